"""training/ecg_metrics/patient_bootstrap.py: resamples of patients."""

import numpy as np
import pytest

from training.ecg_metrics.classification_metrics import class_auroc
from training.ecg_metrics.patient_bootstrap import intervals_of, patient_bootstrap


def test_the_bootstrap_draws_patients_with_all_their_records():
    drawn = []
    patient_bootstrap(["a", "a", "b", "c"], lambda indices: drawn.append(np.sort(indices)) or 0.0, num_resamples=50)
    counts = [np.bincount(indices, minlength=4) for indices in drawn]
    assert all(count[0] == count[1] for count in counts) and len(set(map(tuple, counts))) > 1


def test_the_interval_holds_the_figure():
    generator = np.random.default_rng(0)
    targets = (generator.random((200, 1)) < 0.4).astype(float)
    scores = 0.4 * targets + generator.random((200, 1))
    low, high = patient_bootstrap(
        [str(i // 2) for i in range(200)], lambda i: class_auroc(targets[i], scores[i])[0], num_resamples=200
    )
    assert low < class_auroc(targets, scores)[0] < high


def test_the_interval_of_a_mean_is_that_of_its_standard_error_by_patient():
    """Records of a patient are alike here: taken as independent, their interval would be half as wide."""
    values = np.repeat(np.random.default_rng(0).normal(size=400), 4)
    low, high = patient_bootstrap(np.repeat(np.arange(400), 4), lambda i: values[i].mean(), num_resamples=1000)
    error = values[::4].std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.2 * error)


def test_a_resample_without_a_figure_is_left_out_and_no_figure_at_all_is_nan():
    values = np.array([1.0, 1.0, np.nan])
    low, high = patient_bootstrap("abc", lambda i: [values[i].mean(), np.nan], num_resamples=100)
    assert (low[0], high[0]) == (1, 1) and np.isnan([low[1], high[1]]).all()


def test_every_float_has_an_interval_and_a_count_has_none():
    intervals = intervals_of("aab", lambda i: {"share": float((i > 0).mean()), "count": len(i)}, num_resamples=100)
    assert intervals == {"share": patient_bootstrap("aab", lambda i: float((i > 0).mean()), num_resamples=100)}
