"""Lead names, their aliases and ids, and the limb leads that follow from two others."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyecg_hf.leads import (
    LEAD_IDS,
    STANDARD_LEADS,
    derivable,
    derive_limb_leads,
    fill_limb_leads,
    resolve_lead_name,
    resolve_lead_names,
)

ALIASES = {
    "avr": "aVR",
    "AVR": "aVR",
    "avf": "aVF",
    "v1": "V1",
    "ii": "II",
    "Lead II": "II",
    "lead_III": "III",
    "LEAD V3": "V3",
    "ECG lead II": "II",
    "ECG_V6": "V6",
    "ekg I": "I",
    " V4 ": "V4",
    "MLII": "II",
    "MLIII": "III",
    "DI": "I",
    "D2": "II",
    "vx": "X",
    "Z": "Z",
    "\u2161": "II",  # the one-character Roman numeral
}
UNKNOWN = ["", "ECG", "ECG 1", "RESP", "V", "V7", "V10", "MCL1", "col 1", "aV", "C4", "1", "IV", "ECGII", "Pleth"]


def test_the_ids_count_the_standard_leads_from_one_and_leave_zero_for_padding():
    assert [LEAD_IDS[name] for name in STANDARD_LEADS] == list(range(1, 13))
    assert (LEAD_IDS["X"], LEAD_IDS["Y"], LEAD_IDS["Z"]) == (13, 14, 15)


@pytest.mark.parametrize("name", LEAD_IDS)
def test_a_standard_name_resolves_to_itself(name):
    assert resolve_lead_name(name) == name


@pytest.mark.parametrize("given_name, expected", ALIASES.items())
def test_an_alias_resolves_to_the_standard_name(given_name, expected):
    assert resolve_lead_name(given_name) == expected


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_name_raises_and_the_error_says_the_remedy(name):
    with pytest.raises(ValueError, match="lead_aliases"):
        resolve_lead_name(name)


@pytest.mark.parametrize("name", ["-aVR", "\u2212aVR", "-II"])
def test_a_reversed_lead_is_refused_with_the_advice_to_turn_it_round(name):
    with pytest.raises(ValueError, match="multiply the row by -1"):
        resolve_lead_name(name)


@pytest.mark.parametrize("name", [None, 2, b"II", ["II"]])
def test_a_name_that_is_no_string_raises_type_error(name):
    with pytest.raises(TypeError, match="strings"):
        resolve_lead_name(name)


def test_the_error_names_the_record():
    with pytest.raises(ValueError, match='Record "A0001": lead "foo"'):
        resolve_lead_names(["I", "foo"], record="A0001")


def test_own_aliases_are_understood_in_any_case_and_come_first():
    assert resolve_lead_name("Chest_1", {"chest 1": "V1"}) == "V1"
    assert resolve_lead_name("MLII", {"mlii": "V5"}) == "V5"
    assert resolve_lead_name("brust", {"Brust": "lead v2"}) == "V2"


def test_an_alias_for_something_that_is_no_lead_raises():
    with pytest.raises(ValueError, match="which is no lead"):
        resolve_lead_name("I", {"foo": "bar"})


def test_names_keep_their_order():
    assert resolve_lead_names(["V6", "avr", "MLII"]) == ["V6", "aVR", "II"]


def test_two_names_for_one_lead_raise_and_both_are_named():
    with pytest.raises(ValueError, match='"MLII" and "II" are both lead II'):
        resolve_lead_names(["MLII", "V1", "II"])


def test_one_string_in_place_of_a_list_of_names_raises():
    with pytest.raises(TypeError, match="pass a list"):
        resolve_lead_names("II")


@given(name=st.sampled_from(list(LEAD_IDS)), prefix=st.sampled_from(["", "Lead ", "ECG ", "ecg lead ", "lead_"]))
def test_case_and_prefix_never_matter(name, prefix):
    assert resolve_lead_name(prefix + name.upper()) == resolve_lead_name(prefix + name.lower()) == name


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_a_known_lead_or_a_value_error(text):
    try:
        assert resolve_lead_name(text) in LEAD_IDS
    except ValueError as error:
        assert "Known: I, II" in str(error)


def test_derived_limb_leads_obey_einthoven_and_goldberger():
    signal = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    out, names = derive_limb_leads(signal, ["V1", "II", "I"])
    lead = dict(zip(names, out, strict=True))
    assert names == ["V1", "II", "I", "III", "aVR", "aVL", "aVF"]
    np.testing.assert_array_equal(out[:3], signal)
    np.testing.assert_allclose(lead["I"] + lead["III"], lead["II"], atol=1e-6)
    np.testing.assert_allclose(lead["aVR"] + lead["aVL"] + lead["aVF"], 0, atol=1e-6)
    np.testing.assert_allclose(lead["aVL"], (lead["I"] - lead["III"]) / 2, atol=1e-6)
    assert out.dtype == np.float32


def test_limb_leads_that_are_there_are_left_as_they_are():
    signal = np.ones((4, 5), np.float32)
    out, names = derive_limb_leads(signal, ["I", "II", "III", "aVF"])
    assert names == ["I", "II", "III", "aVF", "aVR", "aVL"]
    np.testing.assert_array_equal(out[2:4], 1.0)
    again, same = derive_limb_leads(out, names)
    assert same == names and again.shape == out.shape


def test_a_missing_value_in_a_source_lead_stays_missing_in_the_derived_one():
    signal = np.zeros((2, 4))
    signal[0, 2] = np.nan
    out, _ = derive_limb_leads(signal, ["I", "II"])
    assert np.isnan(out[2:, 2]).all() and not np.isnan(out[:, [0, 1, 3]]).any()


def limb_leads(num_samples=60):
    """Return the six limb leads as differences of electrode potentials, float64, in standard order."""
    right, left, foot = np.random.default_rng(1).normal(size=(3, num_samples))
    terminal = [right - (left + foot) / 2, left - (right + foot) / 2, foot - (right + left) / 2]
    return np.stack([left - right, foot - right, foot - left, *terminal])


@pytest.mark.parametrize("pair", list(itertools.combinations(range(6), 2)))
def test_any_two_limb_leads_give_the_other_four(pair):
    leads, names = limb_leads(), list(STANDARD_LEADS[:6])
    out, found = derive_limb_leads(leads[list(pair)], [names[row] for row in pair])
    assert sorted(found) == sorted(names)
    for name, row in zip(found, out, strict=True):
        np.testing.assert_allclose(row, leads[names.index(name)], atol=1e-12)


def test_limb_leads_are_filled_in_where_two_others_are_known_and_nowhere_else():
    leads, names = limb_leads(), list(STANDARD_LEADS[:6])
    signal = np.concatenate([leads, leads[:1]])
    known = np.random.default_rng(2).random((7, 60)) < 0.5
    known[6] = False
    where = derivable([*names, "V1"], known)
    damaged = np.where(known, signal, 99.0)
    filled = fill_limb_leads(damaged, [*names, "V1"], known)
    for column in range(60):
        enough = known[:6, column].sum() >= 2
        for row in range(7):
            assert where[row, column] == (enough and row < 6 and not known[row, column])
            expected = signal[row, column] if known[row, column] or where[row, column] else 99.0
            assert filled[row, column] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("names, given", [(["I", "V1"], "there is I in"), (["V1", "V2"], "there is none in")])
def test_of_fewer_than_two_limb_leads_nothing_can_be_derived(names, given):
    with pytest.raises(ValueError, match=given):
        derive_limb_leads(np.zeros((2, 3)), names)


def test_names_that_do_not_fit_the_rows_raise():
    with pytest.raises(ValueError, match="one name per row"):
        derive_limb_leads(np.zeros((3, 4)), ["I", "II"])
