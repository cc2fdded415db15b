"""Linear probe: a logistic regression a label, or a linear one a value, on frozen features of a record. For evaluation, and as
the start of a head."""

from __future__ import annotations

import logging

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from .ecg_metrics.classification_metrics import as_one_hot, class_auroc, mean_of_scored
from .labels import REGRESSION, SINGLE, Task
from .thresholds import log_odds

logger = logging.getLogger(__name__)

# C of the logistic regression; the best on a tenth of the training records is taken
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
DEFAULT_STRENGTH = 1e-1  # where there are too few records to choose


class LinearProbe:
    """One logistic regression a label, or one linear regression a value, on standardised features: as a linear layer on the
    features as they are.

    Attributes:
        weight (`np.ndarray` of shape `(labels, features)`), bias (`np.ndarray` of shape `(labels,)`): of that layer. A label
            with one outcome in training has no weight and the log odds of its frequency as bias.
        strength (`float`): C of scikit-learn, 1 / alpha of a linear regression; the same for all labels.
    """

    def __init__(
        self, features: np.ndarray, targets: np.ndarray, *, is_regression: bool = False, strength: float | None = None
    ):
        """Fit.

        Args:
            features (`np.ndarray` of shape `(records, features)`): finite.
            targets (`np.ndarray` of shape `(records, labels)`): 0 and 1; of a regression any finite values.
            strength (`float`, *optional*): default: the one of `STRENGTHS` with the best macro AUROC (of a regression the
                smallest squared error) on the last tenth of the records, for which the first nine tenths are fitted: give
                them in an order that says nothing.
        """
        self.strength = _best_strength(features, targets, is_regression) if strength is None else strength
        scaler = StandardScaler().fit(features)
        fit = self._fit_values if is_regression else self._fit_labels
        weight, bias = fit(scaler.transform(features), targets)
        self.weight = weight / scaler.scale_
        self.bias = bias - self.weight @ scaler.mean_

    def _fit_values(self, standardised: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        fitted = Ridge(alpha=1 / self.strength).fit(standardised, values)
        return fitted.coef_.reshape(values.shape[1], -1), fitted.intercept_

    def _fit_labels(self, standardised: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight = np.zeros((targets.shape[1], standardised.shape[1]))
        bias = log_odds(targets.mean(axis=0)).astype(np.float64)
        labels = range(targets.shape[1])
        for label in tqdm(labels, desc=f"probe, C {self.strength}", unit="label", leave=False, delay=2.0):
            if 0 < targets[:, label].sum() < len(targets):
                fitted = LogisticRegression(C=self.strength, max_iter=200).fit(standardised, targets[:, label])
                weight[label], bias[label] = fitted.coef_[0], fitted.intercept_[0]
        return weight, bias

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return `(records, labels)` for `features` (records, features)."""
        return features @ self.weight.T + self.bias


def fit_probe(features: np.ndarray, targets: np.ndarray, task: Task) -> LinearProbe:
    """Return the probe of a task from its targets as `Task.encode` gives them; of one of several labels each against the rest."""
    if task.problem_type == SINGLE:
        targets = as_one_hot(targets, len(task.names))
    return LinearProbe(features, targets, is_regression=task.problem_type == REGRESSION)


def _best_strength(features: np.ndarray, targets: np.ndarray, is_regression: bool) -> float:
    cut = len(features) * 9 // 10

    def score(strength: float) -> float:
        probe = LinearProbe(features[:cut], targets[:cut], is_regression=is_regression, strength=strength)
        logits = probe.logits(features[cut:])
        if is_regression:
            return -float(np.mean((logits - targets[cut:]) ** 2))
        return mean_of_scored(class_auroc(targets[cut:], logits))

    scores = {strength: score(strength) for strength in STRENGTHS} if cut else {}
    if not scores or not np.isfinite(list(scores.values())).any():
        logger.warning(
            "%d records are too few to choose the probe's penalty by: C = %g", len(features), DEFAULT_STRENGTH
        )
        return DEFAULT_STRENGTH
    return max(scores, key=scores.get)
