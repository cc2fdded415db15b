"""What is reported of a model's outputs on labelled records: figures of all, of each label, of groups of records."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .ecg_metrics.classification_metrics import (
    FEW_POSITIVES,
    as_one_hot,
    class_auroc,
    class_metrics,
    mean_of_scored,
    scored_classes,
)
from .ecg_metrics.patient_bootstrap import intervals_of, patient_bootstrap
from .labels import MULTI, REGRESSION, Task
from .metrics import can_score_superclasses, probabilities_of, superclass_metrics, task_metrics

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
AGE_BANDS = {
    "under 18": 18,
    "18 to 39": 40,
    "40 to 64": 65,
    "65 to 79": 80,
    "80 and over": np.inf,
}  # years, below which
LEAST_RECORDS = 100  # of a group that is compared with others


@dataclass(frozen=True)
class Predictions:
    """A model's outputs for labelled records.

    Args:
        logits (`np.ndarray` of shape `(records, labels)`), targets: as `Task.encode` gives them.
        patients: the patient of each record.
        thresholds: of a multi-label task, one a label; None is 0.5.
    """

    task: Task
    logits: np.ndarray
    targets: np.ndarray
    patients: Sequence[str]
    thresholds: Sequence[float] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def probabilities(self) -> np.ndarray:
        return probabilities_of(self.task, self.logits)

    @property
    def one_hot(self) -> np.ndarray:
        return as_one_hot(self.targets, len(self.task.names))

    def take(self, indices: Sequence[int]) -> Predictions:
        indices = np.asarray(indices, dtype=int)
        patients = [self.patients[index] for index in indices]
        return replace(self, logits=self.logits[indices], targets=self.targets[indices], patients=patients)

    def figures(self) -> dict[str, float]:
        return task_metrics(self.task, self.logits, self.targets, thresholds=self.thresholds)


def report_of(predictions: Predictions, *, num_resamples: int = 0) -> dict:
    """Return the figures of all records and, of a classifier, `labels`: those of each.

    Args:
        num_resamples (`int`): of patients, for 95 % intervals; with 0 there are none.
    """
    report = {
        "num_records": len(predictions),
        "num_patients": len(set(predictions.patients)),
        **predictions.figures(),
    }
    if num_resamples:
        report["intervals_95"] = intervals_of(
            predictions.patients, lambda indices: predictions.take(indices).figures(), num_resamples=num_resamples
        )
    task = predictions.task
    if task.problem_type == REGRESSION:
        return report
    if task.problem_type == MULTI and can_score_superclasses(task.names):
        by_max = superclass_metrics(predictions.targets, predictions.probabilities, task.names, rule="max")
        report["superclass_auroc_by_max"] = by_max["superclass_auroc"]
    return report | {"labels": label_table(predictions, num_resamples=num_resamples)}


def label_table(predictions: Predictions, *, num_resamples: int = 0) -> dict[str, dict]:
    """Return the figures of each label, see `class_metrics`, with `auroc_interval_95` where resamples are asked for.

    A label with fewer than ten records of either outcome has no interval (None): with a single positive, nothing but the
    negatives would differ between resamples, and the interval would be narrow where least is known.
    """
    one_hot, probabilities, names = predictions.one_hot, predictions.probabilities, predictions.task.names
    labels = class_metrics(predictions.targets, probabilities, names, thresholds=predictions.thresholds)
    if not num_resamples:
        return labels
    limits = patient_bootstrap(
        predictions.patients,
        lambda indices: class_auroc(one_hot[indices], probabilities[indices]),
        num_resamples=num_resamples,
    )
    for figures, low, high in zip(labels.values(), *limits, strict=True):
        is_known = FEW_POSITIVES <= figures["positives"] <= len(predictions) - FEW_POSITIVES
        figures["auroc_interval_95"] = (low, high) if is_known else None
    return labels


def group_records(ages: Sequence[float | None], sexes: Sequence[str | None], by: str) -> dict[str, list[int]]:
    """Return the records of each group, by "sex" or "age" (bands in years); groups without records are left out.

    Records of which it is not known are a group of their own, "unknown".
    """
    names = [sex or UNKNOWN for sex in sexes] if by == "sex" else [_age_band(age) for age in ages]
    order = ("female", "male", UNKNOWN) if by == "sex" else (*AGE_BANDS, UNKNOWN)
    places = {group: [index for index, name in enumerate(names) if name == group] for group in order}
    return {group: indices for group, indices in places.items() if indices}


def _age_band(age: float | None) -> str:
    return UNKNOWN if age is None else next(name for name, limit in AGE_BANDS.items() if age < limit)


def compare_groups(groups: Mapping[str, Predictions], *, num_resamples: int = 0) -> dict:
    """Return the figures of each group, and among them `macro_auroc_common`, over the same labels in each.

    Labels are in common that have ten records of either outcome at least in each group of 100 records and more; smaller
    groups, and "unknown", have no such figure. `macro_auroc` is over all labels that a group can score: other ones in each,
    and so not to be compared between groups.

    Returns:
        `common_labels`, and `groups`: to each name `num_records`, `num_patients`, the figures of the task, and with
        resamples `intervals_95` (of a classifier: of AUROC).
    """
    task = next(iter(groups.values())).task
    if task.problem_type == REGRESSION:
        return {"groups": {name: report_of(group, num_resamples=num_resamples) for name, group in groups.items()}}
    compared = [name for name, group in groups.items() if name != UNKNOWN and len(group) >= LEAST_RECORDS]
    common = _common_labels([groups[name] for name in compared])
    return {
        "common_labels": [task.names[label] for label in common],
        "groups": {
            name: _group_report(group, common if name in compared else [], num_resamples)
            for name, group in groups.items()
        },
    }


def _common_labels(groups: Sequence[Predictions]) -> list[int]:
    able = [
        set(scored_classes(group.one_hot, min_positives=FEW_POSITIVES))
        & set(scored_classes(1 - group.one_hot, min_positives=FEW_POSITIVES))
        for group in groups
    ]
    return sorted(int(label) for label in set.intersection(*able)) if able else []


def _group_report(group: Predictions, common: list[int], num_resamples: int) -> dict:
    report = {"num_records": len(group), "num_patients": len(set(group.patients)), **group.figures()}
    report |= _auroc_figures(group, common)
    if num_resamples:
        report["intervals_95"] = intervals_of(
            group.patients, lambda indices: _auroc_figures(group.take(indices), common), num_resamples=num_resamples
        )
    return report


def _auroc_figures(group: Predictions, common: list[int]) -> dict[str, float]:
    """Return the figures that have intervals: those that are quick to compute, for each of many groups."""
    one_hot, probabilities, names = group.one_hot, group.probabilities, group.task.names
    auroc = class_auroc(one_hot, probabilities)
    figures = {"macro_auroc": mean_of_scored(auroc), "macro_auroc_common": mean_of_scored(auroc[common])}
    if group.task.problem_type == MULTI and can_score_superclasses(names):
        figures["superclass_auroc"] = superclass_metrics(one_hot, probabilities, names)["superclass_auroc"]
    return figures


def count_unlabelled(task: Task, codes: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return the codes of the records for which no label of a task of several codes stands, with how many records have them.

    Tasks that are no choice among codes (abnormal, age, sex) have none.

    Raises:
        ValueError: no record has a code that stands for a label: these are records of another task.
    """
    if task.problem_type == REGRESSION or task.name in ("anomaly", "sex"):
        return {}
    counts = Counter(code for each in codes for code in set(each))
    without = {code: count for code, count in counts.most_common() if not _has_label(task, code)}
    if len(without) == len(counts):
        raise ValueError(
            f"None of {len(codes)} records has a label of this checkpoint. It knows {', '.join(task.names[:8])} ...; the records "
            f"carry {', '.join(list(without)[:8]) or 'no codes'}. Name them alike, or evaluate a checkpoint of their labels."
        )
    return without


def _has_label(task: Task, code: str) -> bool:
    target = task.encode({"codes": [code], "age": None, "sex": None})
    return target is not None and (task.problem_type != MULTI or bool(target.any()))
