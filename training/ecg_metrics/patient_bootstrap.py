"""Confidence intervals by the bootstrap of patients: the records of one patient are not independent of each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np


def patient_bootstrap(
    patients: Sequence[str], figure: Callable, *, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of `figure(indices)` over resamples of patients, each with all its records.

    Args:
        patients: the patient of each record.
        figure: from the indices of the drawn records to a float, or to a list of floats; then the limits are lists too.
        num_resamples (`int`): above zero.
        seed (`int`): of the draws.

    Returns:
        `(low, high)`, the percentiles 2.5 and 97.5. Resamples in which a figure is NaN are left out of its interval (a
        class may lose all its positives); NaN where that leaves none.
    """
    by_patient: dict[str, list[int]] = {}
    for index, patient in enumerate(patients):
        by_patient.setdefault(patient, []).append(index)
    groups = [np.array(indices) for indices in by_patient.values()]
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_resamples):
        drawn = generator.integers(len(groups), size=len(groups))
        values.append(figure(np.concatenate([groups[group] for group in drawn])))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        low, high = np.nanpercentile(np.array(values, dtype=float), [2.5, 97.5], axis=0)
    return low.tolist(), high.tolist()


def intervals_of(
    patients: Sequence[str], figures: Callable, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each float of the dict `figures(indices)`, from the same resamples; counts have none."""
    first = figures(np.arange(len(patients)))
    names = [name for name, value in first.items() if isinstance(value, float)]

    def values(indices: np.ndarray) -> list[float]:
        drawn = figures(indices)
        return [drawn[name] for name in names]

    low, high = patient_bootstrap(patients, values, num_resamples=num_resamples, seed=seed)
    return dict(zip(names, zip(low, high)))
