"""training/metrics.py: superclasses, the figures of every task."""

import numpy as np
import pytest

from training.labels import build_task
from training.metrics import superclass_metrics, superclass_scores, task_metrics


def test_a_superclass_is_scored_by_the_statements_that_belong_to_it():
    names = build_task("statements").names
    probabilities = np.zeros((1, 71))
    probabilities[0, [names.index("IMI"), names.index("AMI"), names.index("SR")]] = [0.5, 0.4, 0.9]
    assert superclass_scores(probabilities, names, rule="max")[0].tolist() == [0, 0.5, 0, 0, 0]
    assert superclass_scores(probabilities, names, rule="any")[0] == pytest.approx([0, 0.7, 0, 0, 0])


def test_superclass_scores_need_statements_of_every_superclass():
    with pytest.raises(ValueError, match="HYP"):
        superclass_scores(np.zeros((1, 2)), ["NORM", "IMI"])


def test_both_superclass_protocols_are_given_and_differ_by_the_records_without_a_diagnosis():
    names = build_task("statements").names
    generator = np.random.default_rng(0)
    targets = np.zeros((60, 71), dtype=np.float32)
    for row, code in enumerate(["NORM", "IMI", "NDT", "IRBBB", "LVH", "SR"] * 10):
        targets[row, names.index(code)] = 1
    probabilities = 0.5 * targets + 0.5 * generator.random((60, 71))
    figures = superclass_metrics(targets, probabilities, names)
    stated = targets[:, names.index("SR")] == 0
    expected = superclass_metrics(targets[stated], probabilities[stated], names)
    assert figures["superclass_auroc"] == expected["superclass_auroc"] == expected["superclass_auroc_all"]
    assert figures["superclass_auroc_all"] != figures["superclass_auroc"]


def test_task_metrics_take_logits_of_every_problem_type():
    statements = build_task("statements")
    targets = np.zeros((4, 71), dtype=np.float32)
    targets[:2, 0] = 1
    assert task_metrics(statements, 2 * targets - 1, targets)["macro_auroc"] == 1.0
    single = task_metrics(build_task("sex"), np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([0, 1]))
    assert single["accuracy"] == 1.0 and single["macro_auroc"] == 1.0
    age = task_metrics(build_task("age"), np.array([[50.0], [70.0]]), np.array([[52.0], [68.0]]))
    assert age["mae"] == 2.0 and age["r2"] == pytest.approx(0.9375)


def test_very_confident_logits_are_no_problem():
    targets = np.array([[1.0, 0.0], [0.0, 1.0]])
    figures = task_metrics(build_task("codes", [["a", "b"]], min_positives=1), 800 * (2 * targets - 1), targets)
    assert figures["macro_auroc"] == 1.0


def test_the_challenge_task_has_the_challenge_score_and_no_other_task_has_it():
    challenge, generator = build_task("challenge"), np.random.default_rng(0)
    targets = (generator.random((50, 24)) < 0.1).astype(np.float32)
    assert task_metrics(challenge, 8 * targets - 4, targets)["challenge_score"] == pytest.approx(1)
    only_sinus_rhythm = np.where(np.arange(24) == challenge.names.index("NSR"), 4.0, -4.0) * np.ones((50, 1))
    assert task_metrics(challenge, only_sinus_rhythm, targets)["challenge_score"] == pytest.approx(0)
    assert "challenge_score" not in task_metrics(build_task("superclass"), 8 * targets[:, :5] - 4, targets[:, :5])


def test_figures_with_thresholds_follow_the_thresholds_and_one_half_without():
    task, targets = build_task("anomaly"), np.array([[1.0], [0.0]], dtype=np.float32)
    logits = np.array([[-1.0], [-2.0]])  # probabilities 0.27 and 0.12
    assert task_metrics(task, logits, targets)["accuracy"] == 0.5
    assert task_metrics(task, logits, targets, thresholds=[0.2])["accuracy"] == 1.0
