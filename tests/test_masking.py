"""training/masking.py: what masked-code pretraining hides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.masking import PATTERNS, mask_record


def _generator(seed=0):
    return np.random.default_rng(seed)


@settings(max_examples=200, deadline=None)
@given(
    num_leads=st.integers(1, 12),
    num_patches=st.integers(1, 12),
    share=st.floats(0.05, 1.0),
    ratio=st.floats(0.05, 0.95),
    pattern=st.sampled_from((None, *PATTERNS)),
    seed=st.integers(0, 10_000),
)
def test_something_real_is_hidden_never_all_of_it_and_nothing_that_is_not_real(
    num_leads, num_patches, share, ratio, pattern, seed
):
    real = _generator(seed).random((num_leads, num_patches)) < share
    hidden = mask_record(real.astype(np.int64), _generator(seed), ratio=ratio, pattern=pattern)
    assert hidden.dtype == bool and hidden.shape == real.shape
    assert not (hidden & ~real).any()
    if real.sum() >= 2:
        assert 0 < hidden.sum() < real.sum()
    else:
        assert not hidden.any()


def test_half_of_the_patches_are_hidden_at_ratio_one_half():
    assert mask_record(np.ones((12, 10)), _generator(), ratio=0.5, pattern="random").sum() == 60


def test_the_time_pattern_hides_whole_seconds_of_all_leads():
    hidden = mask_record(np.ones((12, 10)), _generator(), ratio=0.5, pattern="time")
    assert (hidden.all(axis=0) | ~hidden.any(axis=0)).all() and hidden[0].sum() == 5


def test_the_lead_pattern_hides_whole_leads():
    hidden = mask_record(np.ones((12, 10)), _generator(), ratio=0.5, pattern="lead")
    assert (hidden.all(axis=1) | ~hidden.any(axis=1)).all() and hidden[:, 0].sum() == 6


def test_a_single_lead_gets_random_patches_where_leads_were_asked_for():
    assert mask_record(np.ones((1, 10)), _generator(), pattern="lead").sum() == 5


def test_the_patterns_come_half_a_quarter_and_a_quarter_of_the_time():
    counts = {"random": 0, "time": 0, "lead": 0}
    for seed in range(800):
        hidden = mask_record(np.ones((6, 8)), _generator(seed))
        by_time = (hidden.all(axis=0) | ~hidden.any(axis=0)).all()
        by_lead = (hidden.all(axis=1) | ~hidden.any(axis=1)).all()
        counts["time" if by_time else "lead" if by_lead else "random"] += 1
    assert abs(counts["random"] - 400) < 60 and abs(counts["time"] - 200) < 50 and abs(counts["lead"] - 200) < 50


def test_the_same_seed_hides_the_same():
    first, second = (mask_record(np.ones((12, 10)), _generator(7)) for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(ratio):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        mask_record(np.ones((2, 2)), _generator(), ratio=ratio)


def test_an_unknown_pattern_is_refused():
    with pytest.raises(ValueError, match="'beat'.*random, time, lead"):
        mask_record(np.ones((2, 2)), _generator(), pattern="beat")
