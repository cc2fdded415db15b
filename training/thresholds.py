"""Calibration and decision thresholds, both chosen on the validation fold only.

Calibration: one temperature for all labels (Guo et al. 2017) that minimises the cross-entropy of the validation fold;
it is folded into the classifier, whose logits are then calibrated.

Thresholds: for each label the score that maximises its F1 on the validation fold, or Youden's J where the task says so
(`Task.threshold_figure`). A label with fewer than `MIN_POSITIVES` positives there cannot choose one of its own: it takes
the score that is best for all labels pooled. A record is positive where score >= threshold. For the task "challenge" the
thresholds of the labels that chose their own are then moved by `climb_challenge_score`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from .ecg_metrics.classification_metrics import ChallengeWeights
from .labels import MULTI, SINGLE

MIN_POSITIVES = 10
TEMPERATURE_RANGE = (0.1, 10.0)


def fit_temperature(logits: np.ndarray, targets: np.ndarray, *, problem_type: str) -> float:
    """Return the temperature T that minimises the cross-entropy of `logits / T`.

    Args:
        logits (`np.ndarray` of shape `(records, labels)`).
        targets: `(records, labels)` of 0/1 for multi label, `(records,)` of label numbers for single label.
    """
    logits = logits.astype(np.float64)
    if problem_type == MULTI:

        def loss(log_temperature: float) -> float:
            scaled = logits / np.exp(log_temperature)
            return float(np.mean(np.logaddexp(0.0, scaled) - targets * scaled))

    elif problem_type == SINGLE:

        def loss(log_temperature: float) -> float:
            log_probabilities = log_softmax(logits / np.exp(log_temperature), axis=1)
            return float(-np.mean(log_probabilities[np.arange(len(targets)), targets.astype(int)]))

    else:
        raise ValueError(f"A temperature is for classification; the problem type is {problem_type!r}.")
    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURE_RANGE), method="bounded").x))


@torch.no_grad()
def fold_in_temperature(classifier: torch.nn.Linear, temperature: float) -> None:
    """Divide weight and bias of the last layer by `temperature`, so that its logits are the calibrated ones."""
    classifier.weight.div_(temperature)
    classifier.bias.div_(temperature)


@torch.no_grad()
def fold_in_scale(classifier: torch.nn.Linear, *, mean: np.ndarray, std: np.ndarray) -> None:
    """Let a regression head that was trained on standardised targets return them in their own unit."""
    mean, std = (torch.as_tensor(each).to(classifier.bias) for each in (mean, std))
    classifier.weight.mul_(std[:, None])
    classifier.bias.mul_(std).add_(mean)


def best_f1_threshold(targets: np.ndarray, scores: np.ndarray) -> float:
    """Return the threshold with the highest F1 for `scores >= threshold`, midway to the next lower score.

    Args:
        targets (`np.ndarray` of shape `(records,)`): 0/1, at least one 1.
        scores (`np.ndarray` of shape `(records,)`): 0 to 1.
    """
    return _best_threshold(targets, scores, lambda hits, given, positives, _: 2 * hits / (given + positives))


def best_youden_threshold(targets: np.ndarray, scores: np.ndarray) -> float:
    """Return the threshold with the highest J = sensitivity + specificity - 1, else as `best_f1_threshold`.

    J weighs both outcomes alike, however rare one of them is. Source: Youden 1950, Cancer 3:32-35.
    """

    def youden_j(hits, given, positives, negatives):
        return hits / positives - (given - hits) / max(negatives, 1)

    return _best_threshold(targets, scores, youden_j)


def _best_threshold(targets: np.ndarray, scores: np.ndarray, figure: Callable) -> float:
    """Return the threshold with the highest `figure(hits, given, positives, negatives)`, counts of records."""
    order = np.argsort(-scores, kind="stable")
    sorted_scores, hits = scores[order], np.cumsum(targets[order])
    given, positives = np.arange(1, len(scores) + 1), targets.sum()
    values = figure(hits, given, positives, len(scores) - positives)
    is_last_of_its_score = np.append(sorted_scores[1:] != sorted_scores[:-1], True)
    best = int(np.argmax(np.where(is_last_of_its_score, values, -1.0)))
    below = sorted_scores[best + 1] if best + 1 < len(scores) else 0.0
    return float((sorted_scores[best] + below) / 2)


BEST_THRESHOLD = {"f1": best_f1_threshold, "youden": best_youden_threshold}  # by `Task.threshold_figure`


def choose_thresholds(
    targets: np.ndarray,
    probabilities: np.ndarray,
    *,
    best_threshold: Callable = best_f1_threshold,
    min_positives: int = MIN_POSITIVES,
) -> tuple[list[float], list[bool]]:
    """Return one threshold a label, and whether it was chosen on the label's own positives (see the module's text).

    Args:
        targets, probabilities (`np.ndarray` of shape `(records, labels)`): of the validation fold.
        best_threshold: from targets and scores of a label to its threshold, one of `BEST_THRESHOLD`.
        min_positives (`int`): labels with fewer take the pooled threshold, 0.5 where no label has a positive.
    """
    pooled = best_threshold(targets.ravel(), probabilities.ravel()) if targets.any() else 0.5
    is_own = [bool(positives >= min_positives) for positives in targets.sum(axis=0)]
    thresholds = [
        best_threshold(targets[:, label], probabilities[:, label]) if own else pooled
        for label, own in enumerate(is_own)
    ]
    return [_storable(threshold) for threshold in thresholds], is_own


def climb_challenge_score(
    targets: np.ndarray,
    probabilities: np.ndarray,
    thresholds: Sequence[float],
    *,
    may_move: Sequence[bool],
    weights: ChallengeWeights,
) -> list[float]:
    """Return thresholds with a Challenge score at least as high: one label's at a time is put where the score is highest
    while the others stay, over and over until none moves. No single one of those that may move can then raise the score.

    Args:
        targets, probabilities (`np.ndarray` of shape `(records, labels)`): 0/1; 0 to 1, of the validation fold.
        thresholds: one a label, where to start.
        may_move: which labels' thresholds are moved. One may end above all scores: the label is then never given out.
        weights: see `ecg_metrics.classification_metrics.challenge_score`.

    Source: coordinate ascent; the score: Perez Alday et al. 2020 (doi 10.1088/1361-6579/abc960).
    """
    is_true, thresholds = targets > 0, list(thresholds)
    candidates = [_candidates(scores) for scores in probabilities.T]
    has_moved = True
    while has_moved:
        has_moved = False
        for label in np.flatnonzero(may_move):
            is_given = probabilities >= thresholds
            gains = _gains_of_giving(is_true, is_given, int(label), weights.matrix)
            best, is_better = _best_candidate(probabilities[:, label], gains, candidates[label], thresholds[label])
            if is_better:
                thresholds[label], has_moved = best, True
    return thresholds


def _candidates(scores: np.ndarray) -> np.ndarray:
    """Return a threshold for each way to cut `scores` (records,) in two: midway between neighbours, and beyond both ends."""
    levels = np.concatenate([[0.0], np.unique(scores), [1.0]])
    return np.unique([_storable(threshold) for threshold in (levels[:-1] + levels[1:]) / 2])


def _gains_of_giving(is_true: np.ndarray, is_given: np.ndarray, label: int, matrix: np.ndarray) -> np.ndarray:
    """Return by how much each record's credit grows where `label` is given out beside the other labels given, `(records,)`."""
    others = is_given.copy()
    others[:, label] = False
    credit_of_label = is_true @ matrix  # (records, labels), of each label were it given
    credit = (credit_of_label * others).sum(axis=1)
    num_without = (is_true | others).sum(axis=1)
    num_with = num_without + ~is_true[:, label]
    return (credit + credit_of_label[:, label]) / num_with - credit / np.maximum(num_without, 1)


def _best_candidate(
    scores: np.ndarray, gains: np.ndarray, candidates: np.ndarray, current: float
) -> tuple[float, bool]:
    """Return the candidate with the highest sum of `gains` over `scores >= candidate`, and whether `current` has less."""
    order = np.argsort(scores)
    sums = np.append(np.cumsum(gains[order][::-1])[::-1], 0.0)  # of the records from each place on
    sum_at = sums[np.searchsorted(scores[order], [*candidates, current])]
    best = int(sum_at[:-1].argmax())
    return float(candidates[best]), bool(sum_at[best] > sum_at[-1] + 1e-9)


def _storable(threshold: float) -> float:
    """Return the threshold as a configuration holds it: 0 to 1, six digits."""
    return round(min(max(float(threshold), 0.0), 1.0), 6)


def log_odds(prevalence: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) with p kept within [1e-3, 0.99]: the bias with which a multi-label head must start.

    Without it training spends its steps on pulling the logits of rare labels down (measured: 0.05 macro AUROC).
    """
    p = np.clip(prevalence, 1e-3, 0.99)
    return np.log(p / (1 - p))
