"""training/classifier_report.py: figures of all records, of each label and of groups, against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import recall_score, roc_auc_score

from training.classifier_report import (
    Predictions,
    compare_groups,
    count_unlabelled,
    group_records,
    label_table,
    report_of,
)
from training.labels import build_task

NAMES = ("a", "b", "rare")
TASK = build_task("codes", [NAMES], min_positives=1)


def _predictions(num_records=600, seed=0, shares=(0.4, 0.1, 0.005), task=TASK):
    generator = np.random.default_rng(seed)
    targets = (generator.random((num_records, len(task.names))) < shares).astype(np.float32)
    logits = (2 * targets - 2 + generator.normal(size=targets.shape)).astype(np.float32)
    return Predictions(task, logits, targets, [str(i // 2) for i in range(num_records)], [0.4] * len(task.names))


def test_an_interval_is_that_of_a_bootstrap_of_patients_and_holds_the_figure():
    predictions = _predictions()
    label = label_table(predictions, num_resamples=300)["a"]
    generator, values = np.random.default_rng(7), []
    for _ in range(300):  # patients are pairs of neighbours
        rows = 2 * generator.integers(300, size=300)
        rows = np.concatenate([rows, rows + 1])
        values.append(roc_auc_score(predictions.targets[rows, 0], predictions.logits[rows, 0]))
    assert label["auroc_interval_95"] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.006)
    assert label["auroc_interval_95"][0] < label["auroc"] < label["auroc_interval_95"][1]


def test_a_label_with_fewer_than_ten_positives_has_a_figure_and_no_interval():
    predictions = _predictions()
    label = label_table(predictions, num_resamples=5)["rare"]
    assert 1 <= label["positives"] < 10 and label["auroc_interval_95"] is None
    assert label["auroc"] == pytest.approx(roc_auc_score(predictions.targets[:, 2], predictions.logits[:, 2]))


def test_without_resamples_there_are_no_intervals():
    report = report_of(_predictions())
    assert "intervals_95" not in report and "auroc_interval_95" not in report["labels"]["a"]
    assert report["num_records"] == 600 and report["num_patients"] == 300


def test_groups_are_by_sex_and_age_band_and_the_unknown_are_a_group():
    ages, sexes = [17.9, 18, 39.5, 64, 65, 80, 90, None], ["male", "female", None, "male", None, None, "male", "female"]
    assert group_records(ages, sexes, "sex") == {"female": [1, 7], "male": [0, 3, 6], "unknown": [2, 4, 5]}
    assert group_records(ages, sexes, "age") == {
        "under 18": [0], "18 to 39": [1, 2], "40 to 64": [3], "65 to 79": [4], "80 and over": [5, 6], "unknown": [7],
    }  # fmt: skip


def test_groups_are_compared_over_the_labels_that_each_large_one_can_score():
    whole = _predictions()
    groups = {"x": whole.take(range(0, 400)), "y": whole.take(range(400, 590)), "small": whole.take(range(590, 600))}
    compared = compare_groups(groups, num_resamples=20)
    assert compared["common_labels"] == ["a", "b"]
    for name in ("x", "y"):
        group, figures = groups[name], compared["groups"][name]
        expected = np.mean([roc_auc_score(group.targets[:, c], group.logits[:, c]) for c in (0, 1)])
        assert figures["macro_auroc_common"] == pytest.approx(expected)
        low, high = figures["intervals_95"]["macro_auroc_common"]
        assert low < expected < high
        assert figures["num_records"] == len(group)
    assert np.isnan(compared["groups"]["small"]["macro_auroc_common"])


def test_records_of_unknown_sex_do_not_decide_what_is_compared():
    whole = _predictions(shares=(0.4, 0.1, 0.1))
    unknown = whole.take(range(400, 600))
    unknown.targets[:] = 0
    compared = compare_groups({"male": whole.take(range(400)), "unknown": unknown})
    assert compared["common_labels"] == list(NAMES) and np.isnan(compared["groups"]["unknown"]["macro_auroc"])


def test_one_of_several_labels_and_values_have_groups_too():
    task = build_task("superclass_single")
    generator = np.random.default_rng(0)
    numbers = generator.integers(0, 5, 400)
    logits = generator.normal(size=(400, 5)) + 2 * np.eye(5)[numbers]
    predictions = Predictions(task, logits, numbers, [str(i) for i in range(400)])
    compared = compare_groups({"x": predictions.take(range(200)), "y": predictions.take(range(200, 400))})
    assert compared["common_labels"] == list(task.names)
    given = logits.argmax(axis=1)
    recall = recall_score(numbers, given, average=None)
    assert [label["sensitivity"] for label in report_of(predictions)["labels"].values()] == pytest.approx(recall)
    ages = generator.uniform(20, 90, (200, 1))
    values = Predictions(build_task("age"), ages + 3, ages, [str(i) for i in range(200)])
    by_age = compare_groups({"all": values}, num_resamples=3)
    assert by_age["groups"]["all"]["mae"] == pytest.approx(3) and "labels" not in report_of(values)


def test_codes_without_a_label_are_counted_and_none_with_one_is_an_error():
    assert count_unlabelled(TASK, [("a", "z"), ("z", "b"), ("q",), ()]) == {"z": 2, "q": 1}
    with pytest.raises(ValueError, match=r"None of 2 records has a label .* knows a, b, rare .* carry z"):
        count_unlabelled(TASK, [("z",), ("z",)])
    assert count_unlabelled(build_task("anomaly"), [("426783006",)]) == {}
