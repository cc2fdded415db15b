"""training/metrics.py: AUROC, superclasses, calibration, intervals."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from training.labels import build_task
from training.metrics import (
    class_auroc,
    expected_calibration_error,
    macro_f1,
    multi_label_metrics,
    patient_bootstrap,
    superclass_metrics,
    superclass_scores,
    task_metrics,
)


@pytest.fixture
def scored():
    generator = np.random.default_rng(0)
    targets = (generator.random((400, 4)) < [0.5, 0.2, 0.02, 0.0]).astype(np.float32)
    scores = np.clip(0.3 * targets + 0.7 * generator.random((400, 4)), 0, 1)
    return targets, scores


def test_macro_auroc_is_the_mean_over_classes_with_both_outcomes(scored):
    targets, scores = scored
    expected = np.mean([roc_auc_score(targets[:, c], scores[:, c]) for c in range(3)])
    figures = multi_label_metrics(targets, scores)
    assert figures["macro_auroc"] == pytest.approx(expected) and figures["classes_scored"] == 3
    assert np.isnan(class_auroc(targets, scores)[3])


def test_classes_with_fewer_than_ten_positives_are_left_out_of_the_second_mean(scored):
    targets, scores = scored
    assert multi_label_metrics(targets, scores)["classes_scored_10"] == int((targets.sum(0) >= 10).sum())


def test_no_class_with_both_outcomes_gives_nan_and_no_error():
    figures = multi_label_metrics(np.zeros((5, 2)), np.random.default_rng(0).random((5, 2)))
    assert np.isnan(figures["macro_auroc"]) and figures["classes_scored"] == 0


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


def test_calibration_error_is_zero_for_true_frequencies_and_the_gap_otherwise():
    targets = np.array([[1.0], [0.0], [0.0], [0.0]])
    assert expected_calibration_error(targets, np.full((4, 1), 0.25)) == pytest.approx(0)
    assert expected_calibration_error(targets, np.full((4, 1), 0.75)) == pytest.approx(0.5)


def test_macro_f1_uses_the_threshold_of_each_class():
    targets = np.array([[1, 0], [0, 1]])
    probabilities = np.array([[0.3, 0.1], [0.2, 0.6]])
    assert macro_f1(targets, probabilities, [0.25, 0.5]) == 1.0
    assert macro_f1(targets, probabilities, [0.5, 0.5]) == 0.5


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
