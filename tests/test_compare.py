"""Arms of classifiers compared by a paired bootstrap of patients."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from training.compare import compare
from training.labels import build_task

TASK = build_task("superclass")


def _arms(*, gain):
    """Return targets, patients (two records each), and logits of two arms with two seeds; the second knows more."""
    generator = np.random.default_rng(0)
    targets = (generator.random((400, 5)) < 0.3).astype(float)
    noise = generator.normal(size=(2, 400, 5))
    arms = {"a": [targets + part for part in noise], "b": [(1 + gain) * targets + part for part in noise]}
    return arms, targets, np.repeat(np.arange(200), 2).astype(str)


def test_the_figure_of_an_arm_is_the_mean_of_its_seeds():
    arms, targets, patients = _arms(gain=0.5)
    report = compare(arms, targets, patients, TASK.names, num_resamples=20)
    by_hand = [np.mean([roc_auc_score(targets[:, c], logits[:, c]) for c in range(5)]) for logits in arms["b"]]
    assert report["arms"]["b"]["macro_auroc"]["seeds"] == pytest.approx(by_hand)
    assert report["arms"]["b"]["macro_auroc"]["mean"] == pytest.approx(np.mean(by_hand))
    assert report["num_patients"] == 200


def test_the_interval_leaves_zero_out_where_one_arm_is_better_and_holds_it_where_both_are_one():
    arms, targets, patients = _arms(gain=0.5)
    better = compare(arms, targets, patients, TASK.names, num_resamples=100)["differences"]["b - a"]["macro_auroc"]
    low, high = better["interval_95"]
    assert 0 < low < better["difference"] < high
    same = compare({"a": arms["a"], "b": arms["a"]}, targets, patients, TASK.names, num_resamples=20)
    assert same["differences"]["b - a"]["macro_auroc"] == {"difference": 0.0, "interval_95": (0.0, 0.0)}
