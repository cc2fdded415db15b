"""What is hidden of a record in the cases of an evaluation and in training."""

import numpy as np
import pytest

from anyecg_hf.leads import LEAD_IDS, STANDARD_LEADS
from training.lead_generation import CASES, KINDS, SPANS, hide_leads

IDS = np.array([LEAD_IDS[name] for name in STANDARD_LEADS])
REAL = np.ones((12, 10), dtype=np.int64)
BY_HAND = {
    "G1 V3": "V3",
    "G2": "V1 V2 V3 V4 V5 V6",
    "G3 V2": "V1 V3 V4 V5 V6",
    "G3 V5": "V1 V2 V3 V4 V6",
    "G4 I": "II III aVR aVL aVF V1 V2 V3 V4 V5 V6",
    "G4 II": "I III aVR aVL aVF V1 V2 V3 V4 V5 V6",
}


def hide(case=None, seed=0, real=REAL, ids=IDS):
    return hide_leads(real, ids, np.random.default_rng(seed), case)


@pytest.mark.parametrize("case", BY_HAND)
def test_a_case_hides_its_leads_whole(case):
    hidden = hide(case)
    assert [name for name, row in zip(STANDARD_LEADS, hidden) if row.all()] == BY_HAND[case].split()
    assert hidden.any(axis=1).sum() == len(BY_HAND[case].split())


def test_there_are_all_six_cases_of_one_lead():
    assert [case for case in CASES if case.startswith("G1")] == [f"G1 V{number}" for number in range(1, 7)]


def test_order_and_absence_of_leads_do_not_matter():
    ids = np.array([LEAD_IDS[name] for name in ("V6", "aVF", "V1", "I")])
    assert np.array_equal(hide("G2", real=REAL[:4], ids=ids).all(axis=1), [True, False, True, False])


@pytest.mark.parametrize("seed", range(40))
def test_in_training_something_real_is_hidden_never_a_limb_lead_that_follows_from_two_others_and_never_all(seed):
    real = (np.random.default_rng(seed).random((12, 10)) < 0.9).astype(np.int64)
    hidden = hide(seed=seed, real=real)
    assert not (hidden & (real == 0)).any() and (real.astype(bool) & ~hidden).any()
    seen_limbs = (real.astype(bool) & ~hidden)[:6].sum(axis=0)
    assert not (hidden[:6] & (seen_limbs >= 2)).any()


def test_training_draws_every_kind():
    shapes = {tuple(hide(seed=seed).sum(axis=1)) for seed in range(300)}
    whole = {tuple(np.flatnonzero(np.array(shape) == 10)) for shape in shapes}
    assert {(row,) for row in range(6, 12)} <= whole  # one precordial lead
    assert tuple(range(6, 12)) in whole and {(6, 8, 9, 10, 11), (6, 7, 8, 9, 11)} <= whole  # G2, G3
    assert {tuple(row for row in range(12) if row != kept) for kept in (0, 1)} <= whole  # G4
    assert any(0 < max(shape) < 10 for shape in shapes)  # spans
    assert sum(KINDS.values()) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(10))
def test_spans_are_one_to_five_seconds_of_one_to_three_leads(seed):
    hidden = hide(SPANS, seed=seed)
    rows = np.flatnonzero(hidden.any(axis=1))
    assert len(rows) <= 3 and 0 <= hidden.any(axis=0).sum() <= 5
    assert all(np.array_equal(hidden[row], hidden[rows[0]]) for row in rows)
    assert not len(rows) or np.ptp(np.flatnonzero(hidden[rows[0]])) == hidden[rows[0]].sum() - 1  # in one piece


def test_a_record_of_one_lead_loses_spans_and_the_same_seed_hides_the_same():
    one = hide(seed=3, real=REAL[:1], ids=IDS[:1])
    assert 0 < one.sum() <= 5 and np.array_equal(one, hide(seed=3, real=REAL[:1], ids=IDS[:1]))


def test_an_unknown_case_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="'G8' is unknown. Accepted: G1 V1, .*G5"):
        hide("G8")
