"""Metric for `evaluate.load`: classification of ECGs, or reconstruction of their leads. How to use it: README.md.

`evaluate` copies this file and the files that it imports, and no others: every file of the metric is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from .classification_metrics import class_metrics, classification_metrics, load_challenge_weights
from .patient_bootstrap import intervals_of
from .reconstruction_metrics import FIXED_PEAK_MV, by_lead, mean_and_median, reconstruction_metrics, record_means

DESCRIPTION = """Figures of electrocardiogram models, by configuration. "classification" (also without a name): AUROC, AUPRC,
F1, accuracy, specificity at 95 % sensitivity, Challenge score, Brier score, calibration error. "reconstruction": MAE, RMSE,
PSNR, SSIM, Pearson's r. Both with 95 % intervals by a bootstrap of patients."""

CLASSIFICATION_INPUTS = """
Args:
    predictions (`(records, labels)`): probabilities from 0 to 1, not logits.
    references: for several labels at once `(records, labels)` of 0/1; for one of several `(records,)` of label numbers, and
        then the probabilities of a record add up to 1.
    thresholds (`float` or one a label, *optional*): for several labels at once: a label is given out where its probability is
        at least that; 0.5. For one of several the most probable is given out.
    label_names (list of `str`, *optional*): in the order of the columns; "0", "1", ... without.
    challenge_weights (path, *optional*): a file in the form of the Challenge's `weights.csv`, for `challenge_score`.
    normal_label (`str`): the label that is sinus rhythm, for `challenge_score`; "NSR".
    patients (one a record, *optional*): for the intervals.
    num_resamples (`int`), seed (`int`): of the bootstrap; 1000, 0.
Returns:
    dict of the figures; `labels`, a dict of the figures of each label; with `patients`, `intervals_95`, `(low, high)` of each
    figure. What cannot be said is NaN: a label with one outcome only has no AUROC, AUPRC, specificity or F1.
    `classes_scored` is how many labels the macro means are over.
"""

RECONSTRUCTION_INPUTS = """
Args:
    predictions, references (a list of `(leads, samples)`): millivolt; the same leads in all records, any number of samples.
    scored_leads (`(records, leads)` of bool, *optional*): which leads were reconstructed; all without.
    lead_names (list of `str`, *optional*): in the order of the rows; "0", "1", ... without.
    patients, num_resamples, seed: as for classification.
Returns:
    dict of the figures, mean over records of the mean over leads, and `..._median` over records; `psnr_fixed_peak_mv`;
    `num_scored`, for each figure of how many leads of all records; `leads`, a dict of the figures of each lead; with
    `patients`, `intervals_95`. A reference lead with a range under 0.1 mV is not scored.
"""


class ECGMetrics(evaluate.Metric):
    """The metric; its two configurations are told apart by `config_name`."""

    def _info(self):
        row = datasets.Sequence(datasets.Value("float64"))
        signal = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        several = datasets.Features({"predictions": row, "references": row})
        one_of_several = datasets.Features({"predictions": row, "references": datasets.Value("float64")})
        signals = datasets.Features({"predictions": signal, "references": signal})
        accepted = {
            "default": ([several, one_of_several], CLASSIFICATION_INPUTS),
            "classification": ([several, one_of_several], CLASSIFICATION_INPUTS),
            "reconstruction": (signals, RECONSTRUCTION_INPUTS),
        }
        if self.config_name not in accepted:
            raise ValueError(
                f"This metric has no configuration {self.config_name!r}. Accepted: classification (also without a name), "
                "reconstruction."
            )
        features, inputs = accepted[self.config_name]
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=inputs, features=features)

    def _compute(self, predictions, references, **options):
        compute = _reconstruction if self.config_name == "reconstruction" else _classification
        return compute(list(predictions), list(references), **options)


def _classification(
    predictions,
    references,
    *,
    thresholds=None,
    label_names=None,
    challenge_weights=None,
    normal_label="NSR",
    patients=None,
    num_resamples=1000,
    seed=0,
) -> dict:
    probabilities = _checked_probabilities(predictions)
    targets = _checked_targets(references, probabilities)
    names = _checked_names("label_names", label_names, probabilities.shape[1])
    thresholds = _checked_thresholds(thresholds, targets, probabilities.shape[1])
    challenge = None
    if challenge_weights is not None:
        challenge = load_challenge_weights(challenge_weights, names, normal=normal_label)

    def figures(indices: np.ndarray) -> dict[str, float]:
        return classification_metrics(
            targets[indices], probabilities[indices], thresholds=thresholds, challenge=challenge
        )

    result = figures(np.arange(len(targets)))
    result["labels"] = class_metrics(targets, probabilities, names, thresholds=thresholds)
    if patients is not None:
        _check_patients(patients, len(targets))
        result["intervals_95"] = intervals_of(patients, figures, num_resamples=num_resamples, seed=seed)
    return result


def _reconstruction(
    predictions, references, *, scored_leads=None, lead_names=None, patients=None, num_resamples=1000, seed=0
) -> dict:
    predictions, references = _checked_signals(predictions, references)
    shape = len(references), len(references[0])
    names = _checked_names("lead_names", lead_names, shape[1])
    scored_leads = np.ones(shape, dtype=bool) if scored_leads is None else np.asarray(scored_leads)
    if scored_leads.shape != shape or scored_leads.dtype != bool:
        raise ValueError(
            f"scored_leads has shape {scored_leads.shape} and type {scored_leads.dtype}; needed is one bool for each record "
            f"and lead, {shape}."
        )
    of_leads = reconstruction_metrics(predictions, references, scored_leads)
    of_records = record_means(of_leads)

    def figures(indices: np.ndarray) -> dict[str, float]:
        return mean_and_median({name: values[indices] for name, values in of_records.items()})

    result = figures(np.arange(shape[0])) | {"psnr_fixed_peak_mv": FIXED_PEAK_MV}
    result["num_scored"] = {name: int(np.isfinite(values).sum()) for name, values in of_leads.items()}
    result["leads"] = by_lead(of_leads, names)
    if patients is not None:
        _check_patients(patients, shape[0])
        result["intervals_95"] = intervals_of(patients, figures, num_resamples=num_resamples, seed=seed)
    return result


def _checked_probabilities(predictions: list) -> np.ndarray:
    """Return predictions as `(records, labels)`, float64; an error where they are no probabilities."""
    num_labels = len(predictions[0])
    for record, row in enumerate(predictions):
        if len(row) != num_labels or num_labels == 0:
            raise ValueError(
                f"predictions: record {record} has {len(row)} probabilities, record 0 has {num_labels}; needed is one for each "
                "label, at least one, in every record."
            )
    probabilities = np.asarray(predictions, dtype=np.float64)
    wrong = np.argwhere(~((probabilities >= 0) & (probabilities <= 1)))  # NaN too
    if len(wrong):
        record, label = wrong[0]
        raise ValueError(
            f"predictions: record {record}, label {label} is {probabilities[record, label]}; accepted are probabilities from 0 "
            "to 1. Pass the sigmoid of logits of several labels at once, the softmax of one of several."
        )
    return probabilities


def _checked_targets(references: list, probabilities: np.ndarray) -> np.ndarray:
    """Return references as `(records, labels)` of 0/1 or `(records,)` of label numbers; an error for all else."""
    num_labels = probabilities.shape[1]
    if np.ndim(references[0]) == 0:
        return _checked_label_numbers(np.asarray(references), probabilities)
    for record, row in enumerate(references):
        if len(row) != num_labels or not np.isin(row, (0, 1)).all():
            raise ValueError(
                f"references: record {record} is {np.asarray(row).tolist()}; accepted is 0 or 1 for each of {num_labels} labels."
            )
    return np.asarray(references, dtype=np.float64)


def _checked_label_numbers(numbers: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    num_labels = probabilities.shape[1]
    wrong = np.flatnonzero(~np.isin(numbers, np.arange(num_labels)))
    if len(wrong):
        raise ValueError(
            f"references: record {wrong[0]} is {numbers[wrong[0]]}; accepted are label numbers from 0 to {num_labels - 1}, or "
            "for several labels at once a row of 0 and 1."
        )
    sums = probabilities.sum(axis=1)
    wrong = np.flatnonzero(np.abs(sums - 1) > 1e-3)
    if len(wrong):
        raise ValueError(
            f"predictions: the probabilities of record {wrong[0]} add up to {sums[wrong[0]]:.4g}; where one of several labels is "
            "right they add up to 1. Pass the softmax, or references of 0 and 1 for each label."
        )
    return numbers


def _checked_names(argument: str, names: Sequence[str] | None, number: int) -> list[str]:
    if names is None:
        return [str(index) for index in range(number)]
    if len(names) != number or len(set(names)) != number:
        raise ValueError(
            f"{argument} has {len(names)} names, {len(set(names))} of them different; needed are {number} different ones."
        )
    return list(names)


def _checked_thresholds(thresholds, targets: np.ndarray, num_labels: int) -> np.ndarray | None:
    if thresholds is None:
        return None
    if targets.ndim == 1:
        raise ValueError("thresholds are for several labels at once; of one of several the most probable is given out.")
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if thresholds.shape not in ((), (num_labels,)) or not ((thresholds >= 0) & (thresholds <= 1)).all():
        raise ValueError(
            f"thresholds is {thresholds.tolist()}; accepted is one number from 0 to 1, or one for each of {num_labels} labels."
        )
    return thresholds


def _check_patients(patients: Sequence[str], num_records: int) -> None:
    if len(patients) != num_records:
        raise ValueError(
            f"patients has {len(patients)} entries for {num_records} records; needed is one for each record."
        )


def _checked_signals(predictions: list, references: list) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return both as lists of `(leads, samples)`; an error where shapes differ or a value is not finite."""
    pairs = [(_as_matrix(a, "predictions", i), _as_matrix(b, "references", i))
             for i, (a, b) in enumerate(zip(predictions, references, strict=True))]  # fmt: skip
    for record, (predicted, reference) in enumerate(pairs):
        if predicted.shape != reference.shape or len(reference) != len(pairs[0][1]):
            raise ValueError(
                f"Record {record}: predictions have shape {predicted.shape}, references {reference.shape}; needed are equal "
                f"shapes (leads, samples) with the {len(pairs[0][1])} leads of record 0."
            )
        for name, signal in (("predictions", predicted), ("references", reference)):
            wrong = np.flatnonzero(~np.isfinite(signal).all(axis=1))
            if len(wrong):
                raise ValueError(
                    f"{name}: record {record}, lead {wrong[0]} holds NaN or infinity; needed are millivolt. Leave a lead that "
                    "was not reconstructed out by scored_leads."
                )
    return [predicted for predicted, _ in pairs], [reference for _, reference in pairs]


def _as_matrix(signal, name: str, record: int) -> np.ndarray:
    rows = [np.asarray(row, dtype=np.float64) for row in signal]
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"{name}: the leads of record {record} have {sorted(lengths)} samples; needed is at least one lead, and the same "
            "number of samples, above zero, in all of them."
        )
    return np.stack(rows)
