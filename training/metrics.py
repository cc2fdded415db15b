"""Figures of classification: macro AUROC and AUPRC, superclass scores, calibration error, confidence intervals.

Classes of which a split holds only positives or only negatives have no AUROC and are left out of every macro mean; how
many were scored is always reported beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, softmax
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, f1_score

from .labels import MULTI, REGRESSION, SINGLE, SUPERCLASSES, Task, superclass_members

NUM_CALIBRATION_BINS = 15
FEW_POSITIVES = 10


def scored_classes(targets: np.ndarray, *, min_positives: int = 1) -> np.ndarray:
    """Return the columns of `targets` (records, classes) of 0/1 that have at least `min_positives` and one negative."""
    positives = targets.sum(axis=0)
    return np.flatnonzero((positives >= max(1, min_positives)) & (positives < len(targets)))


def class_auroc(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the AUROC of each class, `(classes,)`, NaN where a class has only one outcome.

    By the ranks of the positives (Mann & Whitney), all classes at once: a bootstrap calls this a thousand times.
    """
    columns, result = scored_classes(targets), np.full(targets.shape[1], np.nan)
    is_positive = targets[:, columns] > 0
    positives = is_positive.sum(axis=0)
    rank_sums = (rankdata(scores[:, columns], axis=0) * is_positive).sum(axis=0)
    result[columns] = (rank_sums - positives * (positives + 1) / 2) / (positives * (len(targets) - positives))
    return result


def class_auprc(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the average precision of each class, `(classes,)`, NaN where a class has only one outcome."""
    result = np.full(targets.shape[1], np.nan)
    for column in scored_classes(targets):
        result[column] = average_precision_score(targets[:, column], scores[:, column])
    return result


def multi_label_metrics(targets: np.ndarray, scores: np.ndarray, *, prefix: str = "") -> dict[str, float]:
    """Return macro AUROC and AUPRC of `scores` (records, classes) against `targets` of 0/1.

    `macro_auroc` takes all classes with both outcomes, `macro_auroc_10` those with ten positives or more (rare classes
    make the first one noisy). NaN where no class can be scored.
    """
    auroc, frequent = class_auroc(targets, scores), scored_classes(targets, min_positives=FEW_POSITIVES)
    return {
        f"{prefix}macro_auroc": mean_of_scored(auroc),
        f"{prefix}macro_auroc_10": mean_of_scored(auroc[frequent]),
        f"{prefix}macro_auprc": mean_of_scored(class_auprc(targets, scores)),
        f"{prefix}classes_scored": int(np.isfinite(auroc).sum()),
        f"{prefix}classes_scored_10": len(frequent),
    }


def mean_of_scored(values: np.ndarray) -> float:
    """Return the mean of the finite `values`, NaN where there is none."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def superclass_scores(probabilities: np.ndarray, names: Sequence[str], *, rule: str = "any") -> np.ndarray:
    """Return the score of each superclass, `(records, 5)`, from the probabilities of its diagnostic statements.

    Args:
        probabilities (`np.ndarray` of shape `(records, len(names))`): of the statements.
        names: statement codes in the order of the columns.
        rule: "any": 1 - prod(1 - p), the probability of at least one were they independent; "max": the highest of them.

    Raises:
        ValueError: unknown rule, or `names` holds no statement of some superclass.
    """
    members = superclass_members(names)
    absent = [group for group, columns in members.items() if not columns]
    if absent or rule not in ("any", "max"):
        raise ValueError(
            f"Superclass scores by {rule!r} from {len(names)} labels: no statements of {absent}; rules: any, max."
        )
    columns = [probabilities[:, members[group]] for group in SUPERCLASSES]
    if rule == "max":
        return np.stack([column.max(axis=1) for column in columns], axis=1)
    return np.stack([1 - np.prod(1 - column, axis=1) for column in columns], axis=1)


def superclass_targets(targets: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return the superclasses `(records, 5)` of 0/1 that follow from statement targets `(records, len(names))`."""
    members = superclass_members(names)
    return np.stack([targets[:, members[group]].max(axis=1) for group in SUPERCLASSES], axis=1)


def superclass_metrics(
    targets: np.ndarray, probabilities: np.ndarray, names: Sequence[str], *, rule: str = "any"
) -> dict:
    """Return superclass AUROC from statement outputs under both protocols in use.

    `superclass_auroc` leaves out records without any diagnostic statement (Strodthoff et al.); `superclass_auroc_all`
    counts them as negative for every superclass.
    """
    group_targets, group_scores = superclass_targets(targets, names), superclass_scores(probabilities, names, rule=rule)
    stated = group_targets.any(axis=1)
    strict = class_auroc(group_targets[stated], group_scores[stated])
    by_group = {
        f"auroc_{group}": float(value) for group, value in zip(SUPERCLASSES, strict, strict=True) if value == value
    }
    return {
        "superclass_auroc": mean_of_scored(strict),
        "superclass_auroc_all": mean_of_scored(class_auroc(group_targets, group_scores)),
        **by_group,
    }


def can_score_superclasses(names: Sequence[str]) -> bool:
    """Return whether `names` hold statements of every superclass."""
    return all(superclass_members(names).values())


def expected_calibration_error(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean gap between predicted and observed share of positives: 15 equal bins, all labels pooled."""
    targets, probabilities = targets.ravel(), probabilities.ravel()
    bins = np.minimum((probabilities * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_CALIBRATION_BINS)
    gaps = np.abs(
        np.bincount(bins, weights=probabilities, minlength=NUM_CALIBRATION_BINS)
        - np.bincount(bins, weights=targets, minlength=NUM_CALIBRATION_BINS)
    )
    return float(gaps.sum() / counts.sum())


def macro_f1(targets: np.ndarray, probabilities: np.ndarray, thresholds: Sequence[float]) -> float:
    """Return the mean F1 of the classes with both outcomes, with one threshold a class."""
    columns = scored_classes(targets)
    predicted = probabilities >= np.asarray(thresholds)
    return float(np.mean([f1_score(targets[:, c], predicted[:, c], zero_division=0) for c in columns]))


def task_metrics(task: Task, logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return the figures of a task from raw model outputs: `logits` (records, labels) and its targets."""
    if task.problem_type == MULTI:
        probabilities = expit(logits.astype(np.float64))
        figures = multi_label_metrics(targets, probabilities)
        if can_score_superclasses(task.names):
            figures |= superclass_metrics(targets, probabilities, task.names)
        return figures
    if task.problem_type == SINGLE:
        probabilities = softmax(logits.astype(np.float64), axis=-1)
        one_hot = np.eye(len(task.names))[targets.astype(int)]
        return multi_label_metrics(one_hot, probabilities) | {"accuracy": float((logits.argmax(-1) == targets).mean())}
    return _regression_metrics(logits, targets)


def _regression_metrics(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    error = predicted.astype(np.float64).ravel() - targets.ravel()
    spread = float(np.var(targets))
    explained = 1 - float(np.mean(error**2)) / spread if spread > 0 else float("nan")
    return {"mae": float(np.abs(error).mean()), "rmse": float(np.sqrt(np.mean(error**2))), "r2": explained}


def best_metric_of(task: Task) -> tuple[str, bool]:
    """Return `(name, greater_is_better)` of the figure that chooses the checkpoint."""
    return ("mae", False) if task.problem_type == REGRESSION else ("macro_auroc", True)


def patient_bootstrap(
    patients: Sequence[str], figure, *, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of `figure(indices)` over resamples of patients, each with all its records.

    Resamples in which `figure` is NaN are left out (a class may lose all its positives).
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
    finite = np.array(values)[np.isfinite(values)]
    if len(finite) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)
