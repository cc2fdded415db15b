"""training/ecg_metrics/classification_metrics.py, against scikit-learn and loops that are written out."""

import csv
import warnings

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    brier_score_loss,
    f1_score,
    multilabel_confusion_matrix,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from training.ecg_metrics.classification_metrics import (
    ChallengeWeights,
    challenge_score,
    class_metrics,
    class_specificity,
    classification_metrics,
    decision_metrics,
    expected_calibration_error,
    load_challenge_weights,
    ranking_metrics,
)
from training.labels import LABEL_MAPS, build_task

CLASSES = build_task("challenge").names


@pytest.fixture
def scored():
    """400 records, 4 classes: frequent, less so, rare, absent; with ties among the scores."""
    generator = np.random.default_rng(0)
    targets = (generator.random((400, 4)) < [0.5, 0.2, 0.02, 0.0]).astype(np.float32)
    scores = np.clip(0.3 * targets + 0.7 * generator.random((400, 4)), 0, 1).round(2)
    return targets, scores


def test_macro_figures_are_means_over_classes_with_both_outcomes(scored):
    targets, scores = scored
    figures = ranking_metrics(targets, scores)
    for name, of_class in (("macro_auroc", roc_auc_score), ("macro_auprc", average_precision_score)):
        assert figures[name] == pytest.approx(np.mean([of_class(targets[:, c], scores[:, c]) for c in range(3)]))
    assert figures["classes_scored"] == 3


def test_classes_with_fewer_than_ten_positives_are_left_out_of_the_second_mean(scored):
    targets, scores = scored
    assert targets.sum(axis=0)[2] < 10
    figures = ranking_metrics(targets, scores)
    expected = np.mean([roc_auc_score(targets[:, c], scores[:, c]) for c in range(2)])
    assert figures["macro_auroc_10"] == pytest.approx(expected) and figures["classes_scored_10"] == 2


def test_specificity_is_the_best_of_all_thresholds_that_miss_at_most_a_twentieth(scored):
    targets, scores = scored
    targets[:, 0] = np.arange(400) < 20  # 19 of 20 is just enough
    expected = []
    for column in range(3):
        positive, negative = (scores[targets[:, column] == outcome, column] for outcome in (1, 0))
        enough = [t for t in scores[:, column] if 20 * (positive >= t).sum() >= 19 * len(positive)]
        expected.append(max((negative < t).mean() for t in enough))
    assert class_specificity(targets, scores)[:3] == pytest.approx(expected)
    assert np.isnan(class_specificity(targets, scores)[3])


def test_f1_and_accuracy_of_several_labels_are_those_of_scikit_learn(scored):
    targets, scores = scored[0][:, :3], scored[1][:, :3]
    thresholds = [0.5, 0.4, 0.6]
    figures, given = classification_metrics(targets, scores, thresholds=thresholds), scores >= thresholds
    for name, average in (("positive_f1", "micro"), ("macro_f1", "macro"), ("weighted_f1", "weighted")):
        assert figures[name] == pytest.approx(f1_score(targets, given, average=average))
    assert figures["accuracy"] == pytest.approx(accuracy_score(targets, given))


def test_f1_of_one_label_is_over_its_two_outcomes_where_it_is_a_mean(scored):
    targets, scores = scored[0][:, :1], scored[1][:, :1]
    figures, given = classification_metrics(targets, scores, thresholds=0.6), scores[:, 0] >= 0.6
    for name, average in (("positive_f1", "binary"), ("macro_f1", "macro"), ("weighted_f1", "weighted")):
        assert figures[name] == pytest.approx(f1_score(targets[:, 0], given, average=average))
    assert figures["accuracy"] == pytest.approx(accuracy_score(targets[:, 0], given))


def test_of_one_of_several_labels_the_most_probable_is_given_out():
    generator = np.random.default_rng(0)
    numbers, probabilities = generator.integers(0, 3, 200), generator.dirichlet([1, 1, 1], 200)
    figures, given = classification_metrics(numbers, probabilities), probabilities.argmax(axis=1)
    for name, average in (("macro_f1", "macro"), ("weighted_f1", "weighted")):
        assert figures[name] == pytest.approx(f1_score(numbers, given, average=average))
    assert figures["accuracy"] == pytest.approx(accuracy_score(numbers, given))
    assert figures["macro_auroc"] == pytest.approx(
        roc_auc_score(numbers, probabilities, multi_class="ovr", average="macro")
    )
    top, right, gap = probabilities.max(axis=1), numbers == given, 0.0
    for low in range(15):
        inside = (top >= low / 15) & (top < (low + 1) / 15)
        gap += abs(top[inside].sum() - right[inside].sum()) / 200
    assert figures["ece"] == pytest.approx(gap)


def test_the_brier_score_is_the_mean_of_that_of_the_labels(scored):
    targets, scores = scored
    expected = np.mean([brier_score_loss(targets[:, c], scores[:, c]) for c in range(3)] + [np.mean(scores[:, 3] ** 2)])
    assert classification_metrics(targets, scores)["brier"] == pytest.approx(expected)


def test_calibration_error_is_zero_for_true_frequencies_and_the_gap_otherwise():
    targets = np.array([[1.0], [0.0], [0.0], [0.0]])
    assert expected_calibration_error(targets, np.full((4, 1), 0.25)) == pytest.approx(0)
    assert expected_calibration_error(targets, np.full((4, 1), 0.75)) == pytest.approx(0.5)


def test_no_class_with_both_outcomes_gives_nan_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = classification_metrics(np.zeros((5, 2)), np.random.default_rng(0).random((5, 2)))
    undefined = {name for name, value in figures.items() if np.isnan(value)}
    assert figures["classes_scored"] == 0 and undefined == {
        "macro_auroc", "macro_auroc_10", "macro_auprc", "specificity_at_95_sensitivity", "positive_f1", "macro_f1", "weighted_f1",
    }  # fmt: skip


def test_each_label_has_its_own_figures(scored):
    targets, scores = scored
    labels = class_metrics(targets, scores, ["a", "b", "c", "absent"], thresholds=0.45)
    confusions = [label.pop("confusion") for label in labels.values()]
    false_alarms, sensitivity, _ = roc_curve(targets[:, 1], scores[:, 1])
    assert labels["b"] == pytest.approx({
        "positives": targets[:, 1].sum(),
        "auroc": roc_auc_score(targets[:, 1], scores[:, 1]),
        "auprc": average_precision_score(targets[:, 1], scores[:, 1]),
        "specificity_at_95_sensitivity": labels["b"]["specificity_at_95_sensitivity"],
        "f1": f1_score(targets[:, 1], scores[:, 1] >= 0.45),
        "brier": brier_score_loss(targets[:, 1], scores[:, 1]),
        "prevalence": targets[:, 1].mean(), "threshold": 0.45,
        "sensitivity": recall_score(targets[:, 1], scores[:, 1] >= 0.45),
        "specificity": recall_score(targets[:, 1], scores[:, 1] >= 0.45, pos_label=0),
        "ppv": precision_score(targets[:, 1], scores[:, 1] >= 0.45),
    })  # fmt: skip
    assert 1 - labels["b"]["specificity_at_95_sensitivity"] <= false_alarms[sensitivity >= 0.95].min() + 1e-12
    assert confusions == multilabel_confusion_matrix(targets, scores >= 0.45).tolist()
    absent = labels["absent"]
    assert np.isnan(absent["auroc"]) and np.isnan(absent["sensitivity"]) and absent["positives"] == 0


def test_of_one_of_several_labels_each_is_told_from_all_others_and_has_no_threshold():
    generator = np.random.default_rng(0)
    numbers, probabilities = generator.integers(0, 3, 200), generator.dirichlet([1, 1, 1], 200)
    labels = class_metrics(numbers, probabilities, ["a", "b", "c"])
    confusion = multilabel_confusion_matrix(numbers, probabilities.argmax(axis=1))
    assert [label["confusion"] for label in labels.values()] == confusion.tolist()
    assert np.isnan([label["threshold"] for label in labels.values()]).all()


# The Challenge score


@pytest.fixture
def weights():
    return load_challenge_weights(LABEL_MAPS / "challenge_weights.csv", CLASSES)


def score_by_loops(labels, outputs, weights, normal):
    """The score as the Challenge's own evaluation computes it: one record, one true class, one given class at a time."""

    def observed(outputs):
        total = 0.0
        for true, given in zip(labels, outputs):
            num_classes = max(1, sum(bool(a or b) for a, b in zip(true, given)))
            for j in range(len(true)):
                for k in range(len(true)):
                    if true[j] and given[k]:
                        total += weights[j][k] / num_classes
        return total

    only_normal = [[int(k == normal) for k in range(len(labels[0]))] for _ in labels]
    return (observed(outputs) - observed(only_normal)) / (observed(labels) - observed(only_normal))


def test_the_challenge_score_is_one_for_the_truth_and_zero_for_sinus_rhythm_always(weights):
    targets = (np.random.default_rng(0).random((60, 24)) < 0.1).astype(int)
    always_normal = np.zeros_like(targets)
    always_normal[:, CLASSES.index("NSR")] = 1
    assert challenge_score(targets, targets, weights) == 1
    assert challenge_score(targets, always_normal, weights) == 0
    assert challenge_score(targets, np.zeros_like(targets), weights) < 0


def test_the_challenge_score_is_that_of_the_loops_of_its_definition(weights):
    generator = np.random.default_rng(0)
    for share in (0.02, 0.15, 0.5):
        targets, given = (generator.random((2, 40, 24)) < share).astype(int)
        expected = score_by_loops(targets.tolist(), given.tolist(), weights.matrix.tolist(), CLASSES.index("NSR"))
        assert challenge_score(targets, given, weights) == pytest.approx(expected, rel=1e-12)


def test_the_challenge_score_is_nan_where_all_records_are_sinus_rhythm_alone(weights):
    targets = np.zeros((3, 24))
    targets[:, CLASSES.index("NSR")] = 1
    assert np.isnan(challenge_score(targets, np.ones((3, 24)), weights))


def test_weights_follow_the_order_of_the_labels_and_know_every_name_of_a_merged_class(tmp_path):
    path = tmp_path / "weights.csv"
    path.write_text(",A,B1|B2,NSR\nA,1,0.2,0.3\nB1|B2,0.4,1,0.5\nNSR,0.6,0.7,1\n")
    for name in ("B1", "B2"):
        read = load_challenge_weights(path, ["NSR", name, "A"])
        assert read.matrix.tolist() == [[1, 0.7, 0.6], [0.5, 1, 0.4], [0.3, 0.2, 1]] and read.normal == 0
    assert load_challenge_weights(path, ["A", "B1"], normal="A").matrix.tolist() == [[1, 0.2], [0.4, 1]]


def test_labels_without_weights_are_an_error_that_names_them(tmp_path):
    path = LABEL_MAPS / "challenge_weights.csv"
    with pytest.raises(ValueError, match=r"no weights for AFIB; it has those of AF, .*Name the labels"):
        load_challenge_weights(path, ["AFIB", "NSR"])
    with pytest.raises(ValueError, match="needs sinus rhythm, here 'NSR'; the labels are AF, AFL"):
        load_challenge_weights(path, ["AF", "AFL"])
    mixed = tmp_path / "weights.csv"
    mixed.write_text(",A,B\nB,1,0\nA,0,1\n")
    with pytest.raises(ValueError, match="not the same classes in the same order"):
        load_challenge_weights(mixed, ["A", "B"])


def test_our_weights_are_those_of_the_challenge(real_ecg, weights):
    """Read from the published file under its own names, SNOMED CT codes."""
    from training.labels import snomed_codes

    code_of = {each.challenge_class: code for code, each in snomed_codes().items()}
    codes = [code_of[name] for name in CLASSES]
    published = load_challenge_weights(real_ecg / "labels" / "weights.csv", codes, normal=code_of["NSR"])
    assert isinstance(weights, ChallengeWeights) and published.normal == weights.normal
    assert np.array_equal(published.matrix, weights.matrix)


def test_merged_codes_of_the_published_weights_are_merged_in_our_classes(real_ecg):
    from training.labels import snomed_codes

    with open(real_ecg / "labels" / "weights.csv", newline="") as file:
        header = next(csv.reader(file))[1:]
    merged = [joined.split("|") for joined in header if "|" in joined and "733534002" not in joined]  # LBBB: 2021 only
    assert len(merged) == 3
    for codes in merged:
        assert len({snomed_codes()[code].challenge_class for code in codes}) == 1


def test_decisions_may_be_bool_or_numbers(scored):
    targets, scores = scored
    assert decision_metrics(targets, scores >= 0.5) == decision_metrics(targets, (scores >= 0.5).astype(int))
