"""Linear probe: one logistic regression a label on frozen features of a record. For evaluation, and as the start of a head."""

from __future__ import annotations

import logging

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from .ecg_metrics.classification_metrics import class_auroc, mean_of_scored
from .thresholds import log_odds

logger = logging.getLogger(__name__)

# C of the logistic regression; the best on a tenth of the training records is taken
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
DEFAULT_STRENGTH = 1e-1  # where there are too few records to choose


class LinearProbe:
    """Logistic regressions on standardised features, as one linear layer on the features as they are.

    Attributes:
        weight (`np.ndarray` of shape `(labels, features)`), bias (`np.ndarray` of shape `(labels,)`): of that layer. A label
            with one outcome in training has no weight and the log odds of its frequency as bias.
        strength (`float`): C of scikit-learn, the same for all labels.
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray, *, strength: float | None = None):
        """Fit.

        Args:
            features (`np.ndarray` of shape `(records, features)`): finite.
            targets (`np.ndarray` of shape `(records, labels)`): 0 and 1.
            strength (`float`, *optional*): default: the one of `STRENGTHS` with the best macro AUROC on the last tenth of
                the records, for which the first nine tenths are fitted: give them in an order that says nothing.
        """
        self.strength = _best_strength(features, targets) if strength is None else strength
        scaler = StandardScaler().fit(features)
        standardised = scaler.transform(features)
        self.weight = np.zeros((targets.shape[1], features.shape[1]))
        self.bias = log_odds(targets.mean(axis=0)).astype(np.float64)
        for label in tqdm(
            range(targets.shape[1]), desc=f"probe, C {self.strength}", unit="label", leave=False, delay=2.0
        ):
            if 0 < targets[:, label].sum() < len(targets):
                fitted = LogisticRegression(C=self.strength, max_iter=200).fit(standardised, targets[:, label])
                self.weight[label] = fitted.coef_[0] / scaler.scale_
                self.bias[label] = fitted.intercept_[0] - self.weight[label] @ scaler.mean_

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return `(records, labels)` for `features` (records, features)."""
        return features @ self.weight.T + self.bias


def _best_strength(features: np.ndarray, targets: np.ndarray) -> float:
    cut = len(features) * 9 // 10

    def score(strength: float) -> float:
        logits = LinearProbe(features[:cut], targets[:cut], strength=strength).logits(features[cut:])
        return mean_of_scored(class_auroc(targets[cut:], logits))

    scores = {strength: score(strength) for strength in STRENGTHS} if cut else {}
    if not scores or not np.isfinite(list(scores.values())).any():
        logger.warning(
            "%d records are too few to choose the probe's penalty by: C = %g", len(features), DEFAULT_STRENGTH
        )
        return DEFAULT_STRENGTH
    return max(scores, key=scores.get)
