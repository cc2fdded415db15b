"""training/evaluate.py: the task of a classifier's configuration, and what is reported of it."""

import numpy as np
import pytest

import training.evaluate
from anyecg_hf.configuration_anyecg import AnyECGConfig
from training.evaluate import classifier_report, task_of
from training.labels import FIXED_TASKS, MULTI, build_task


def _config(task, **fields):
    return AnyECGConfig(id2label=task.id2label, label2id=task.label2id, problem_type=task.problem_type, **fields)


@pytest.mark.parametrize("name", FIXED_TASKS)
def test_the_task_of_a_configuration_is_known_by_its_labels(name):
    assert task_of(_config(build_task(name))).name == name


def test_other_labels_of_several_at_once_are_codes_in_the_order_of_the_configuration():
    task = build_task("codes", [["b", "a"]], min_positives=1).reordered(("b", "a"))
    assert task_of(_config(task)).names == ("b", "a")


def test_other_labels_of_one_of_several_are_an_error_that_shows_them():
    with pytest.raises(ValueError, match=r"No task .* \('a', 'b'\)"):
        task_of(AnyECGConfig(id2label={0: "a", 1: "b"}, problem_type="single_label_classification"))


class _Records:
    """Records as the report looks at them."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def column(self, name):
        return [str(index // 2) for index in range(len(self))]


def _report(monkeypatch, task, targets, logits, *, thresholds, num_resamples=0):
    monkeypatch.setattr(training.evaluate, "predict_logits", lambda *_: logits)
    model = type("Model", (), {"config": _config(task, thresholds=thresholds)})
    return classifier_report(model, _Records(targets), None, task, num_resamples=num_resamples)


def test_a_classifier_of_the_challenges_classes_has_the_challenge_score_and_its_interval(monkeypatch):
    task, generator = build_task("challenge"), np.random.default_rng(0)
    targets = (generator.random((40, 24)) < 0.2).astype(np.float32)
    logits = 2 * targets - 3  # right from a threshold between 0.05 and 0.27 on, and never above one half
    report = _report(monkeypatch, task, targets, logits, thresholds=[0.2] * 24, num_resamples=5)
    assert report["challenge_score"] == report["macro_f1"] == report["macro_auroc"] == 1
    assert report["intervals_95"]["challenge_score"] == pytest.approx((1, 1))
    assert report["labels"]["AF"]["positives"] == targets[:, task.names.index("AF")].sum()
    assert _report(monkeypatch, task, targets, logits, thresholds=None)["challenge_score"] < 0


def test_a_classifier_of_abnormal_records_is_reported_at_its_threshold(monkeypatch):
    task, targets = build_task("anomaly"), np.float32([[1], [1], [0], [0]])
    report = _report(monkeypatch, task, targets, np.array([[1.0], [-1.0], [-2.0], [-3.0]]), thresholds=[0.2])
    assert task.problem_type == MULTI and report["accuracy"] == report["positive_f1"] == 1
    assert report["specificity_at_95_sensitivity"] == 1 and "challenge_score" not in report
