"""training/probe.py: regressions as one linear layer, against scikit-learn's own pipeline."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from training.labels import build_task
from training.probe import STRENGTHS, LinearProbe, fit_probe

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


def test_the_layer_gives_the_values_of_a_ridge_regression_of_scikit_learn():
    values = np.stack([40 + 5 * FEATURES[:, 0], FEATURES[:, 1] - FEATURES[:, 2]], axis=1) + GENERATOR.normal(
        size=(400, 2)
    )
    probe = LinearProbe(FEATURES, values, is_regression=True, strength=0.01)
    expected = make_pipeline(StandardScaler(), Ridge(alpha=100)).fit(FEATURES, values).predict(FEATURES)
    assert probe.logits(FEATURES) == pytest.approx(expected, abs=1e-9)
    assert LinearProbe(FEATURES, values, is_regression=True).strength == max(STRENGTHS)  # little noise: little penalty


@pytest.mark.parametrize("task", ["sex", "superclass_single"])
def test_one_of_several_labels_is_told_by_each_against_the_rest(task):
    task = build_task(task)
    numbers = GENERATOR.integers(0, len(task.names), 400)
    features = FEATURES + numbers[:, None] * [0, 0, 1]
    probe = fit_probe(features, numbers, task)
    one_hot = np.eye(len(task.names))[numbers]
    assert np.array_equal(probe.weight, LinearProbe(features, one_hot, strength=probe.strength).weight)
    assert (probe.logits(features).argmax(axis=1) == numbers).mean() > 1 / len(task.names) + 0.2


def test_a_label_with_one_outcome_has_the_log_odds_of_its_frequency_everywhere():
    targets = np.stack([TARGETS[:, 0], np.zeros(400)], axis=1)
    probe = LinearProbe(FEATURES, targets, strength=1.0)
    assert not probe.weight[1].any()
    assert probe.logits(FEATURES)[:, 1] == pytest.approx(np.log(1e-3 / (1 - 1e-3)))


def test_a_probe_of_too_few_records_to_choose_by_says_which_penalty_it_takes(caplog):
    assert LinearProbe(FEATURES[:3], TARGETS[:3]).strength == 0.1
    assert "too few to choose" in caplog.text


def test_the_penalty_is_the_best_one_on_the_last_tenth():
    generator = np.random.default_rng(1)
    noise = generator.normal(size=(600, 40))
    targets = (noise[:, :2] + 2 * generator.normal(size=(600, 2)) > 0.5).astype(np.float32)

    def auroc(strength):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200))
        decided = [probe.fit(noise[:540], targets[:540, label]).decision_function(noise[540:]) for label in range(2)]
        return np.mean([roc_auc_score(targets[540:, label], decided[label]) for label in range(2)])

    scores = {strength: auroc(strength) for strength in STRENGTHS}
    assert LinearProbe(noise, targets).strength == max(scores, key=scores.get)
