"""training/thresholds.py: temperature, thresholds by F1, Youden's J and the Challenge score, starting bias."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import balanced_accuracy_score, f1_score
from work import count_calls

from training.ecg_metrics.classification_metrics import ChallengeWeights, challenge_score, load_challenge_weights
from training.labels import LABEL_MAPS, MULTI, REGRESSION, SINGLE, build_task
from training.thresholds import (
    BEST_THRESHOLD,
    best_f1_threshold,
    best_youden_threshold,
    choose_thresholds,
    climb_challenge_score,
    fit_temperature,
    fold_in_scale,
    fold_in_temperature,
    log_odds,
)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), num=st.integers(1, 40), num_levels=st.integers(2, 20))
def test_no_threshold_has_a_higher_f1_than_the_chosen_one(seed, num, num_levels):
    generator = np.random.default_rng(seed)
    targets = (generator.random(num) < 0.4).astype(int)
    targets[0] = 1
    scores = generator.integers(1, num_levels, num) / num_levels  # with ties
    chosen = f1_score(targets, scores >= best_f1_threshold(targets, scores))
    for threshold in {*scores, 0.0, 0.5}:
        assert f1_score(targets, scores >= threshold, zero_division=0) <= chosen + 1e-12


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), num=st.integers(2, 40), num_levels=st.integers(2, 20))
def test_no_threshold_has_a_higher_youden_j_than_the_chosen_one(seed, num, num_levels):
    generator = np.random.default_rng(seed)
    targets = (generator.random(num) < 0.8).astype(int)
    targets[:2] = 0, 1
    scores = generator.integers(1, num_levels, num) / num_levels  # with ties
    chosen = balanced_accuracy_score(targets, scores >= best_youden_threshold(targets, scores))  # (J + 1) / 2
    for threshold in {*scores, 0.0, 2.0}:
        assert balanced_accuracy_score(targets, scores >= threshold) <= chosen + 1e-12


def test_where_nearly_all_are_positive_youden_separates_and_f1_calls_all_positive():
    targets = np.array([1] * 18 + [0, 0])
    scores = np.array([0.9] * 14 + [0.3] * 4 + [0.4, 0.35])
    assert best_youden_threshold(targets, scores) == pytest.approx(0.65)
    assert best_f1_threshold(targets, scores) < 0.3
    assert BEST_THRESHOLD == {"f1": best_f1_threshold, "youden": best_youden_threshold}


def test_a_label_takes_the_threshold_of_the_figure_that_is_asked_for():
    targets, scores = np.array([[1]] * 18 + [[0]] * 2), np.array([[0.9]] * 14 + [[0.3]] * 4 + [[0.4], [0.35]])
    assert choose_thresholds(targets, scores, best_threshold=best_youden_threshold) == ([0.65], [True])
    everywhere = choose_thresholds(np.ones((3, 1)), scores[:3], best_threshold=best_youden_threshold)[0][0]
    assert (scores[:3] >= everywhere).all()  # no negative: nothing is missed


def test_a_threshold_lies_between_two_scores_and_not_on_one():
    assert best_f1_threshold(np.array([1, 1, 0, 0]), np.array([0.9, 0.8, 0.4, 0.1])) == pytest.approx(0.6)


def test_labels_with_few_positives_share_one_pooled_threshold():
    generator = np.random.default_rng(0)
    targets = (generator.random((500, 3)) < [0.3, 0.004, 0.0]).astype(float)
    targets[:2, 1] = 1
    probabilities = np.clip(0.2 * targets + 0.6 * generator.random((500, 3)), 0, 1)
    thresholds, is_own = choose_thresholds(targets, probabilities)
    pooled = round(best_f1_threshold(targets.ravel(), probabilities.ravel()), 6)
    assert is_own == [True, False, False]
    assert thresholds[1] == thresholds[2] == pooled != thresholds[0]
    assert all(0 <= threshold <= 1 for threshold in thresholds)


def test_without_any_positive_every_threshold_is_one_half():
    assert choose_thresholds(np.zeros((5, 2)), np.random.default_rng(0).random((5, 2)))[0] == [0.5, 0.5]


def _score_by_loops(targets, given, weights):
    """The Challenge's score, written out record by record as its text has it."""

    def credit(outputs):
        total = 0.0
        for true, out in zip(targets, outputs, strict=True):
            either = max(1, sum(1 for a, b in zip(true, out, strict=True) if a or b))
            for j in range(len(true)):
                for k in range(len(true)):
                    total += weights.matrix[j, k] / either if true[j] and out[k] else 0.0
        return total

    inactive = [[k == weights.normal for k in range(len(row))] for row in targets]
    return (credit(given) - credit(inactive)) / (credit(targets) - credit(inactive))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num=st.integers(2, 10), num_levels=st.integers(2, 8))
def test_no_other_threshold_of_one_label_gives_a_higher_challenge_score(seed, num, num_levels):
    generator = np.random.default_rng(seed)
    targets = (generator.random((num, 3)) < 0.4).astype(int)
    targets[0] = 1, 0, 1  # not all are sinus rhythm alone: the score exists
    probabilities = generator.integers(1, num_levels + 1, (num, 3)) / num_levels  # with ties, and 1
    weights = ChallengeWeights(np.maximum(generator.random((3, 3)).round(1), np.eye(3)), normal=1)
    start, may_move = generator.random(3).round(2).tolist(), [True, True, bool(seed % 2)]
    found = climb_challenge_score(targets, probabilities, start, may_move=may_move, weights=weights)
    reached = _score_by_loops(targets, probabilities >= found, weights)
    assert reached >= _score_by_loops(targets, probabilities >= start, weights) - 1e-9
    for label in range(3):
        if not may_move[label]:
            assert found[label] == start[label]
            continue
        for threshold in [*probabilities[:, label], 0.0, 0.999999]:
            others = [*found[:label], threshold, *found[label + 1 :]]
            assert _score_by_loops(targets, probabilities >= others, weights) <= reached + 1e-9


def test_the_challenge_score_of_24_classes_is_climbed_with_little_work():
    names = build_task("challenge").names
    weights = load_challenge_weights(LABEL_MAPS / "challenge_weights.csv", names)
    generator = np.random.default_rng(0)
    logits = generator.normal(-3, 2, (2183, 24))
    targets = (generator.random(logits.shape) < expit(logits)).astype(float)
    thresholds, is_own = choose_thresholds(targets, expit(logits))
    found = []
    num_calls = count_calls(
        lambda: found.extend(
            climb_challenge_score(targets, expit(logits), thresholds, may_move=is_own, weights=weights)
        )
    )
    assert num_calls < 20 * logits.size
    before, after = (challenge_score(targets, expit(logits) >= each, weights) for each in (thresholds, found))
    assert after > before and all(threshold == round(threshold, 6) for threshold in found)


def test_a_label_that_only_costs_is_never_given_out():
    weights = ChallengeWeights(np.array([[1.0, -1.0], [0.0, 1.0]]), normal=1)
    targets, probabilities = np.array([[1, 0]] * 4), np.full((4, 2), 0.8)
    found = climb_challenge_score(targets, probabilities, [0.5, 0.5], may_move=[True, True], weights=weights)
    assert 0.8 >= found[0] and 0.8 < found[1] <= 1


def test_the_temperature_undoes_overconfidence():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1.5, (4000, 5))
    targets = (generator.random(logits.shape) < expit(logits)).astype(float)
    assert fit_temperature(3 * logits, targets, problem_type=MULTI) == pytest.approx(3, rel=0.05)


def test_the_temperature_of_a_single_label_task_undoes_overconfidence():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1, (4000, 3))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = np.array([generator.choice(3, p=share) for share in shares])
    assert fit_temperature(2 * logits, targets, problem_type=SINGLE) == pytest.approx(2, rel=0.1)


def test_regression_has_no_temperature():
    with pytest.raises(ValueError, match="regression"):
        fit_temperature(np.zeros((2, 1)), np.zeros((2, 1)), problem_type=REGRESSION)


def test_folding_in_divides_the_logits():
    classifier, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
    before = classifier(x)
    fold_in_temperature(classifier, 2.0)
    torch.testing.assert_close(classifier(x), before / 2)


def test_a_folded_scale_returns_targets_in_their_own_unit():
    classifier, x = torch.nn.Linear(4, 1), torch.randn(2, 4)
    before = classifier(x)
    fold_in_scale(classifier, mean=np.float32([60.0]), std=np.float32([15.0]))
    torch.testing.assert_close(classifier(x), before * 15 + 60)


def test_a_scale_is_folded_into_a_head_that_is_on_another_device():
    fold_in_scale(torch.nn.Linear(4, 1, device="meta"), mean=np.float32([60.0]), std=np.float32([15.0]))


def test_the_starting_bias_is_the_log_odds_within_limits():
    assert log_odds(np.array([0.5, 0.2])) == pytest.approx([0.0, np.log(0.25)])
    assert np.isfinite(log_odds(np.array([0.0, 1.0]))).all()
