"""Figures of a task of this project: those of `ecg_metrics` from its logits, scores of PTB-XL's superclasses, regression."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, softmax

from .ecg_metrics.classification_metrics import (
    ChallengeWeights,
    class_auroc,
    classification_metrics,
    load_challenge_weights,
    mean_of_scored,
)
from .labels import LABEL_MAPS, MULTI, REGRESSION, SINGLE, SUPERCLASSES, Task, superclass_members


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
    return {
        "superclass_auroc": mean_of_scored(strict),
        "superclass_auroc_all": mean_of_scored(class_auroc(group_targets, group_scores)),
        **{f"auroc_{group}": float(value) for group, value in zip(SUPERCLASSES, strict, strict=True)},
    }


def can_score_superclasses(names: Sequence[str]) -> bool:
    """Return whether `names` hold statements of every superclass."""
    return all(superclass_members(names).values())


def task_metrics(
    task: Task, logits: np.ndarray, targets: np.ndarray, *, thresholds: Sequence[float] | None = None
) -> dict[str, float]:
    """Return the figures of a task from raw model outputs.

    Args:
        logits (`np.ndarray` of shape `(records, labels)`).
        targets: as `Task.encode` gives them.
        thresholds: of a multi-label task, one a label; 0.5 without, as in the pipeline.
    """
    if task.problem_type == REGRESSION:
        return _regression_metrics(logits, targets)
    probabilities = probabilities_of(task, logits)
    figures = classification_metrics(targets, probabilities, thresholds=thresholds, challenge=challenge_weights(task))
    if task.problem_type == MULTI and can_score_superclasses(task.names):
        figures |= superclass_metrics(targets, probabilities, task.names)
    return figures


def probabilities_of(task: Task, logits: np.ndarray) -> np.ndarray:
    """Return the probabilities `(records, labels)`, float64, of a classification task."""
    logits = logits.astype(np.float64)
    return softmax(logits, axis=-1) if task.problem_type == SINGLE else expit(logits)


def challenge_weights(task: Task) -> ChallengeWeights | None:
    """Return the weights of the Challenge score for the task "challenge", None for others, which have no such score."""
    if task.name != "challenge":
        return None
    return load_challenge_weights(LABEL_MAPS / "challenge_weights.csv", task.names)


def _regression_metrics(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    error = predicted.astype(np.float64).ravel() - targets.ravel()
    spread = float(np.var(targets))
    explained = 1 - float(np.mean(error**2)) / spread if spread > 0 else float("nan")
    return {"mae": float(np.abs(error).mean()), "rmse": float(np.sqrt(np.mean(error**2))), "r2": explained}


def best_metric_of(task: Task) -> tuple[str, bool]:
    """Return `(name, greater_is_better)` of the figure that chooses the checkpoint."""
    return ("mae", False) if task.problem_type == REGRESSION else ("macro_auroc", True)
