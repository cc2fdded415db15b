"""Figures of classification, from probabilities: AUROC, AUPRC, F1, Challenge score, Brier score, calibration error.

A class of which the records hold only positives or only negatives has no AUROC, AUPRC, specificity or F1: these are NaN
and left out of every macro mean; how many classes were scored is always reported beside it.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

NUM_CALIBRATION_BINS = 15
FEW_POSITIVES = 10
NEEDED_SENSITIVITY = 0.95
DEFAULT_THRESHOLD = 0.5


def classification_metrics(
    targets: np.ndarray,
    probabilities: np.ndarray,
    *,
    thresholds: Sequence[float] | float | None = None,
    challenge: ChallengeWeights | None = None,
) -> dict[str, float]:
    """Return all figures that are one number.

    Args:
        targets: for several labels at once `(records, labels)` of 0/1; for one of several `(records,)` of label numbers.
        probabilities (`np.ndarray` of shape `(records, labels)`): 0 to 1.
        thresholds: for several labels at once, one for all or one a label: a label is given out where its probability
            is at least that; `None` is 0.5. Of several, the most probable is given out.
        challenge: weights of the labels, for `challenge_score`.

    Returns:
        The figures of `ranking_metrics` and `decision_metrics`; `brier`: mean squared difference of probability and
        outcome, over all labels; `ece`: see `expected_calibration_error`, of one of several labels that of the most
        probable one; `challenge_score` where weights are given.
    """
    decisions = decide(targets, probabilities, thresholds)
    one_hot = as_one_hot(targets, probabilities.shape[1])
    calibrated = (one_hot, probabilities)
    if targets.ndim == 1:
        calibrated = ((one_hot * decisions).any(axis=1), probabilities.max(axis=1))
    figures = {
        **ranking_metrics(one_hot, probabilities),
        **decision_metrics(one_hot, decisions),
        "brier": float(class_brier(one_hot, probabilities).mean()),
        "ece": expected_calibration_error(*calibrated),
    }
    if challenge is not None:
        figures["challenge_score"] = challenge_score(one_hot, decisions, challenge)
    return figures


def class_metrics(
    targets: np.ndarray,
    probabilities: np.ndarray,
    names: Sequence[str],
    *,
    thresholds: Sequence[float] | float | None = None,
) -> dict[str, dict]:
    """Return for each label its positives and figures; arguments as for `classification_metrics`.

    Beside what `classification_metrics` has: `prevalence`, the share of positives; `threshold`, NaN where the most probable
    of several labels is given out; at it, `confusion` `[[TN, FP], [FN, TP]]` in records, `sensitivity`, `specificity` and
    `ppv`, NaN where nothing is to be divided by.
    """
    one_hot, decisions = as_one_hot(targets, len(names)), decide(targets, probabilities, thresholds)
    confusion = class_confusion(one_hot, decisions)
    columns = {
        "positives": one_hot.sum(axis=0).astype(int),
        "prevalence": one_hot.mean(axis=0, dtype=float),
        "auroc": class_auroc(one_hot, probabilities),
        "auprc": class_auprc(one_hot, probabilities),
        "threshold": _threshold_of_each(targets, thresholds, len(names)),
        **_rates(confusion),
        "specificity_at_95_sensitivity": class_specificity(one_hot, probabilities),
        "f1": class_f1(one_hot, decisions),
        "brier": class_brier(one_hot, probabilities),
        "confusion": confusion,
    }
    return {
        name: {figure: values[label].tolist() for figure, values in columns.items()} for label, name in enumerate(names)
    }


def class_confusion(targets: np.ndarray, decisions: np.ndarray) -> np.ndarray:
    """Return how many records of each class are right and wrong, int `(classes, 2, 2)`: `[[TN, FP], [FN, TP]]` each.

    Args:
        targets, decisions (`np.ndarray` of shape `(records, classes)`): 0/1.
    """
    is_positive, is_given = targets > 0, decisions > 0
    hits = (is_positive & is_given).sum(axis=0)
    false_alarms, misses = is_given.sum(axis=0) - hits, is_positive.sum(axis=0) - hits
    rest = len(targets) - hits - false_alarms - misses
    return np.stack([rest, false_alarms, misses, hits], axis=1).reshape(-1, 2, 2)


def _rates(confusion: np.ndarray) -> dict[str, np.ndarray]:
    (rest, false_alarms), (misses, hits) = np.moveaxis(confusion.astype(float), 0, -1)
    with np.errstate(invalid="ignore"):
        return {
            "sensitivity": hits / (hits + misses),
            "specificity": rest / (rest + false_alarms),
            "ppv": hits / (hits + false_alarms),
        }


def _threshold_of_each(targets: np.ndarray, thresholds: Sequence[float] | float | None, num_labels: int) -> np.ndarray:
    if targets.ndim == 1:
        return np.full(num_labels, np.nan)
    return np.broadcast_to(np.asarray(DEFAULT_THRESHOLD if thresholds is None else thresholds, float), (num_labels,))


def as_one_hot(targets: np.ndarray, num_labels: int) -> np.ndarray:
    """Return targets of shape `(records, labels)`, 0/1, from these or from label numbers `(records,)`."""
    return targets if targets.ndim == 2 else np.eye(num_labels)[targets.astype(int)]


def decide(targets: np.ndarray, probabilities: np.ndarray, thresholds: Sequence[float] | float | None) -> np.ndarray:
    """Return which labels are given out, `(records, labels)` of bool; see `classification_metrics`."""
    if targets.ndim == 1:
        return as_one_hot(probabilities.argmax(axis=1), probabilities.shape[1]) > 0
    return probabilities >= np.asarray(DEFAULT_THRESHOLD if thresholds is None else thresholds)


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
    columns, result = scored_classes(targets), np.full(targets.shape[1], np.nan)
    is_positive, hits, given = _counts_by_threshold(targets[:, columns], scores[:, columns])
    result[columns] = (is_positive * hits / given).sum(axis=0) / is_positive.sum(axis=0)
    return result


def class_specificity(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return the highest specificity of each class at a sensitivity of at least 95 %, NaN where it has one outcome."""
    columns, result = scored_classes(targets), np.full(targets.shape[1], np.nan)
    is_positive, hits, given = _counts_by_threshold(targets[:, columns], scores[:, columns])
    is_enough = hits / is_positive.sum(axis=0) >= NEEDED_SENSITIVITY
    false_alarms = np.where(is_enough, given - hits, len(targets)).min(axis=0)
    result[columns] = 1 - false_alarms / (~is_positive).sum(axis=0)
    return result


def _counts_by_threshold(targets: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each record, highest score first, whether it is positive, and how many positives and how many records
    have at least its score; `(records, classes)` each. All classes at once, for the bootstrap."""
    order = np.argsort(-scores, axis=0)
    is_positive = np.take_along_axis(targets, order, axis=0) > 0
    ordered = np.take_along_axis(scores, order, axis=0)
    is_last_of_its_score = np.vstack([ordered[1:] != ordered[:-1], np.ones((1, scores.shape[1]), dtype=bool)])
    place = np.where(is_last_of_its_score, np.arange(len(scores))[:, None], len(scores))
    place = np.minimum.accumulate(place[::-1], axis=0)[::-1]  # of the last record with this score
    return is_positive, np.take_along_axis(is_positive.cumsum(axis=0), place, axis=0), place + 1


def class_f1(targets: np.ndarray, decisions: np.ndarray) -> np.ndarray:
    """Return the F1 of each class, `(classes,)`, NaN where a class has only one outcome."""
    columns, result = scored_classes(targets), np.full(targets.shape[1], np.nan)
    hits = (targets * decisions).sum(axis=0)
    result[columns] = (2 * hits / np.maximum(targets.sum(axis=0) + decisions.sum(axis=0), 1))[columns]
    return result


def class_brier(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the Brier score of each class, `(classes,)`: the mean squared difference of probability and outcome."""
    return ((probabilities - targets) ** 2).mean(axis=0)


def ranking_metrics(targets: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Return what needs no threshold, of `scores` (records, classes) against `targets` of 0/1.

    `macro_auroc`, `macro_auprc` and `specificity_at_95_sensitivity` are means over all classes with both outcomes,
    `macro_auroc_10` over those with ten positives or more (rare classes make the first one noisy). NaN where no class
    can be scored.
    """
    auroc, frequent = class_auroc(targets, scores), scored_classes(targets, min_positives=FEW_POSITIVES)
    return {
        "macro_auroc": mean_of_scored(auroc),
        "macro_auroc_10": mean_of_scored(auroc[frequent]),
        "macro_auprc": mean_of_scored(class_auprc(targets, scores)),
        "specificity_at_95_sensitivity": mean_of_scored(class_specificity(targets, scores)),
        "classes_scored": int(np.isfinite(auroc).sum()),
        "classes_scored_10": len(frequent),
    }


def decision_metrics(targets: np.ndarray, decisions: np.ndarray) -> dict[str, float]:
    """Return what depends on which labels are given out; both `(records, classes)` of 0/1.

    Returns:
        `positive_f1`: F1 of all (record, class) pairs together, for one class its F1. `macro_f1`, `weighted_f1`: mean over the
        classes with both outcomes, plain and weighted by their positives; for one class, over its two outcomes.
        `accuracy`: share of records of which every class is right. F1 is NaN where no class has both outcomes.
    """
    is_one_class = targets.shape[1] == 1
    outcomes, decided = targets, decisions
    if is_one_class:
        outcomes, decided = np.hstack([1 - targets, targets]), np.hstack([1 - decisions, decisions])
    f1, columns = class_f1(outcomes, decided), scored_classes(outcomes)
    positives = outcomes.sum(axis=0)
    return {
        "positive_f1": float(class_f1(targets.reshape(-1, 1), decisions.reshape(-1, 1))[0]),
        "macro_f1": mean_of_scored(f1),
        "weighted_f1": float(np.average(f1[columns], weights=positives[columns])) if len(columns) else float("nan"),
        "accuracy": float((targets == decisions).all(axis=1).mean()),
    }


def mean_of_scored(values: np.ndarray) -> float:
    """Return the mean of the finite `values`, NaN where there is none."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def expected_calibration_error(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean gap between predicted and observed share of positives: 15 equal bins, all labels pooled.

    Source: Guo et al. 2017 (arXiv 1706.04599), equation 3, there of the most probable of several labels.
    """
    targets, probabilities = targets.ravel(), probabilities.ravel()
    bins = np.minimum((probabilities * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_CALIBRATION_BINS)
    gaps = np.abs(
        np.bincount(bins, weights=probabilities, minlength=NUM_CALIBRATION_BINS)
        - np.bincount(bins, weights=targets, minlength=NUM_CALIBRATION_BINS)
    )
    return float(gaps.sum() / counts.sum())


@dataclass(frozen=True)
class ChallengeWeights:
    """`matrix` `(classes, classes)`: credit for a true class (row) given out as another (column); `normal`: the column of
    sinus rhythm, which a doctor who looks at nothing would always give out."""

    matrix: np.ndarray
    normal: int


def load_challenge_weights(path: str | Path, names: Sequence[str], *, normal: str = "NSR") -> ChallengeWeights:
    """Return the weights of the classes `names`, in this order, from a file in the form of the Challenge's `weights.csv`.

    Args:
        path: CSV whose first row and first column name the classes. Names that the Challenge counts as one class stand
            together, as `427172004|17338001`: any of them is the class.
        normal (`str`): which of `names` is sinus rhythm.

    Raises:
        ValueError: rows and columns of the file differ, a class of `names` is not in it, or `normal` is not in `names`.
    """
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    if [row[0] for row in rows] != header[1:]:
        raise ValueError(
            f"{path}: rows and columns are not the same classes in the same order; take the file as published."
        )
    place = {name: index for index, joined in enumerate(header[1:]) for name in joined.split("|")}
    absent = [name for name in names if name not in place]
    if absent:
        raise ValueError(
            f"{path} has no weights for {', '.join(absent)}; it has those of {', '.join(header[1:])}. "
            "Name the labels as the file does."
        )
    if normal not in names:
        raise ValueError(
            f"The Challenge score needs sinus rhythm, here {normal!r}; the labels are {', '.join(names)}. "
            "Say which of them it is."
        )
    matrix = np.array([[float(value) for value in row[1:]] for row in rows])
    columns = [place[name] for name in names]
    return ChallengeWeights(matrix[np.ix_(columns, columns)], list(names).index(normal))


def challenge_score(targets: np.ndarray, decisions: np.ndarray, weights: ChallengeWeights) -> float:
    """Return the score of the PhysioNet Challenges 2020 and 2021: 1 for the truth, 0 for sinus rhythm always, may be below.

    Args:
        targets, decisions (`np.ndarray` of shape `(records, classes)`): 0/1.

    Returns:
        The score, NaN where giving out sinus rhythm always is as good as the truth (all records are just that).

    Source: Perez Alday et al. 2020 (doi 10.1088/1361-6579/abc960), section "Scoring"; physionetchallenges/evaluation-2021.
    """
    is_true, inactive = targets > 0, np.zeros(targets.shape, dtype=bool)
    inactive[:, weights.normal] = True
    score, of_truth, of_inactive = (
        _challenge_credit(is_true, given > 0, weights.matrix) for given in (decisions, is_true, inactive)
    )
    return float((score - of_inactive) / (of_truth - of_inactive)) if of_truth != of_inactive else float("nan")


def _challenge_credit(is_true: np.ndarray, is_given: np.ndarray, matrix: np.ndarray) -> float:
    """Return the sum of weights over all pairs of a true and a given class, each record's divided by its classes."""
    num_classes = np.maximum((is_true | is_given).sum(axis=1, keepdims=True), 1)
    confusion = is_true.T.astype(float) @ (is_given / num_classes)
    return float((matrix * confusion).sum())
