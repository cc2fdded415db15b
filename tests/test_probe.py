"""training/probe.py: logistic regressions as one linear layer, against scikit-learn's own pipeline."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from training.probe import LinearProbe

GENERATOR = np.random.default_rng(0)
FEATURES = GENERATOR.normal(3.0, [1.0, 10.0, 0.1], (400, 3))
TARGETS = np.stack([FEATURES[:, 0] + GENERATOR.normal(size=400) > 3, FEATURES[:, 1] > 20], axis=1).astype(np.float32)


def test_the_layer_gives_what_the_regressions_of_scikit_learn_decide():
    probe = LinearProbe(FEATURES, TARGETS, strength=0.1)
    for label in range(2):
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200)).fit(
            FEATURES, TARGETS[:, label]
        )
        assert probe.logits(FEATURES)[:, label] == pytest.approx(pipeline.decision_function(FEATURES), abs=1e-9)


def test_a_label_with_one_outcome_has_the_log_odds_of_its_frequency_everywhere():
    targets = np.stack([TARGETS[:, 0], np.zeros(400)], axis=1)
    probe = LinearProbe(FEATURES, targets, strength=1.0)
    assert not probe.weight[1].any()
    assert probe.logits(FEATURES)[:, 1] == pytest.approx(np.log(1e-3 / (1 - 1e-3)))


def test_a_strong_penalty_is_chosen_where_features_are_noise():
    noise = GENERATOR.normal(size=(200, 60))
    targets = (noise[:, :1] + 3 * GENERATOR.normal(size=(200, 1)) > 0).astype(np.float32)
    assert LinearProbe(noise, targets).strength < 1.0
