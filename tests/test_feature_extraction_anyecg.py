"""The feature extractor: what goes in, what comes out, what is refused, and that it is the same after saving."""

import copy
import importlib.util
import json
import logging
import pickle
import subprocess
import sys
import textwrap
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from analytic_ecg import STANDARD, analytic_ecg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import signal as scipy_signal

from anyecg_hf import feature_extraction_anyecg, signal_ops
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import LEAD_IDS
from anyecg_hf.records import Record, read_record
from anyecg_hf.signal_quality import UNUSABLE, QualityFlag
from anyecg_hf.simulate import simulate_record

ROOT = Path(__file__).resolve().parent.parent
TWELVE = {"sampling_rate": 500, "lead_names": list(STANDARD), "units": "mV"}


@pytest.fixture(autouse=True)
def forget_warnings():
    signal_ops._warned.clear()


@pytest.fixture(scope="module")
def extractor():
    return AnyECGFeatureExtractor()


@pytest.fixture(scope="module")
def signal():
    return analytic_ecg(500)


@pytest.fixture(scope="module")
def ptb_xl_500(real_ecg):
    """`[(metadata, microvolt (12, 5000))]`, 12 records."""
    spec = importlib.util.spec_from_file_location("unpack_of_the_shared_data", real_ecg / "unpack.py")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    return [record for record, _ in zip(unpack.read_pack("ptb-xl-500"), range(12), strict=False)]


def same(batch, other, atol=0.0):
    assert set(batch) == set(other)
    for key in batch:
        np.testing.assert_allclose(np.asarray(batch[key]), np.asarray(other[key]), rtol=0, atol=atol, err_msg=key)


# The contract


def test_the_output_has_the_shapes_types_and_keys_of_the_contract(extractor, signal):
    batch = extractor(signal, **TWELVE)
    assert set(batch) == set(extractor.model_input_names)
    assert (batch["input_values"].shape, batch["input_values"].dtype) == ((1, 12, 3000), np.float32)
    assert (batch["lead_ids"].shape, batch["lead_ids"].dtype) == ((1, 12), np.int64)
    assert (batch["attention_mask"].shape, batch["attention_mask"].dtype) == ((1, 12, 10), np.int64)
    assert batch["lead_ids"][0].tolist() == list(range(1, 13)) and batch["attention_mask"].all()


def test_the_signal_comes_out_in_millivolt_where_it_was(extractor, signal):
    values = extractor(signal, **TWELVE)["input_values"][0]
    expected = analytic_ecg(300)
    beat = slice(1350, 1380)  # an R wave at 4.55 s: too short for what the high-pass does
    values, expected = values[:, beat] - values[:, 1335:1336], expected[:, beat] - expected[:, 1335:1336]
    np.testing.assert_allclose(values, expected, atol=0.05)
    assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize("kind", ["array", "list", "tuple", "float32", "dict", "dict of a data set", "record"])
def test_every_form_of_a_record_gives_the_same(extractor, signal, kind):
    signal = signal[:2, :1000].astype(np.float32)
    call = {"sampling_rate": 500, "lead_names": ["I", "V2"], "units": "mV"}
    forms = {
        "array": lambda: extractor(signal, **call),
        "list": lambda: extractor(signal.tolist(), **call),
        "tuple": lambda: extractor(tuple(signal), **call),
        "float32": lambda: extractor(signal.astype(np.float64), **call),
        "dict": lambda: extractor({"signal": signal, **call}),
        "dict of a data set": lambda: extractor({"array": signal.tolist(), "label": 3, **call}),
        "record": lambda: extractor(Record(signal, 500.0, ["I", "V2"])),
    }
    same(forms[kind](), extractor(signal, **call), atol=1e-6)


def test_torch_tensors_are_returned_when_asked_for(extractor, signal):
    torch = pytest.importorskip("torch")
    batch = extractor(signal, **TWELVE, return_tensors="pt")
    assert batch["input_values"].dtype == torch.float32 and batch["attention_mask"].dtype == torch.int64
    same({key: value.numpy() for key, value in batch.items()}, extractor(signal, **TWELVE))


def test_the_input_is_left_as_it_was_and_the_result_is_repeatable(extractor, signal):
    given_signal = signal.copy()
    given_signal[0, 100:120] = np.nan
    before = given_signal.copy()
    first, second = extractor(given_signal, **TWELVE), extractor(given_signal, **TWELVE)
    np.testing.assert_array_equal(given_signal, before)
    same(first, second)


# Invariances


@pytest.mark.parametrize("units, factor", [("uV", 1e3), ("\u00b5V", 1e3), ("V", 1e-3), ("nV", 1e6)])
def test_the_unit_does_not_matter_when_it_is_stated(extractor, signal, units, factor):
    same(extractor(signal * factor, **{**TWELVE, "units": units}), extractor(signal, **TWELVE), atol=1e-5)


def test_integers_in_microvolt_are_the_same_as_floats_in_millivolt(extractor, signal):
    steps = np.round(signal * 1000).astype(np.int16)
    same(extractor(steps, **{**TWELVE, "units": "uV"}), extractor(steps / 1000, **TWELVE), atol=1e-5)


def test_an_offset_of_a_lead_does_not_matter(extractor, signal):
    offset = np.linspace(-300, 300, 12)[:, None]
    same(extractor(signal + offset, **TWELVE), extractor(signal, **TWELVE), atol=1e-5)


@pytest.mark.parametrize("rate", [100, 128, 200, 250, 257, 300, 360, 977.5, 1000, 499.97])
def test_the_same_heart_at_another_rate_gives_the_same(extractor, signal, rate):
    other = extractor(analytic_ecg(rate), **{**TWELVE, "sampling_rate": rate})["input_values"]
    expected = extractor(signal, **TWELVE)["input_values"]
    np.testing.assert_allclose(other[..., :2985], expected[..., :2985], atol=0.004)  # mV


@pytest.mark.parametrize("up, down", [(1, 2), (257, 500), (2, 1)])
def test_real_records_at_250_257_and_1000_hz_agree_within_5_microvolt(extractor, ptb_xl_500, up, down):
    for _, microvolt in ptb_xl_500:
        expected = extractor(microvolt, **{**TWELVE, "units": "uV"})["input_values"]
        other = scipy_signal.resample_poly(microvolt.astype(float), up, down, axis=1, padtype="line")
        other = extractor(other, **{**TWELVE, "units": "uV", "sampling_rate": 500 * up / down})["input_values"]
        assert np.abs(other - expected)[..., 30:-30].max() < 0.005


def test_real_records_at_100_hz_agree_within_15_microvolt(extractor, ptb_xl_500):
    for _, microvolt in ptb_xl_500:
        expected = extractor(microvolt, **{**TWELVE, "units": "uV"})["input_values"]
        taps = scipy_signal.firwin(2 * 40 * 5 + 1, 0.97 / 5, window=("kaiser", 6))
        other = scipy_signal.resample_poly(microvolt.astype(float), 1, 5, axis=1, window=taps, padtype="line")
        other = extractor(other, **{**TWELVE, "units": "uV", "sampling_rate": 100})["input_values"]
        difference = np.abs(other - expected)[..., 150:-150]
        assert difference.max() < 0.015 and np.sqrt((difference**2).mean()) < 0.001


def test_permuted_rows_with_their_names_are_the_same_rows_permuted(extractor, signal):
    order = np.random.default_rng(0).permutation(12)
    names = [STANDARD[i] for i in order]
    batch, permuted = extractor(signal, **TWELVE), extractor(signal[order], **{**TWELVE, "lead_names": names})
    np.testing.assert_array_equal(permuted["lead_ids"], batch["lead_ids"][:, order])
    np.testing.assert_array_equal(permuted["input_values"], batch["input_values"][:, order])


def test_a_lead_comes_out_the_same_with_or_without_the_others(extractor, signal):
    alone = extractor(signal[6:7], **{**TWELVE, "lead_names": ["V1"]})
    np.testing.assert_array_equal(alone["input_values"][0, 0], extractor(signal, **TWELVE)["input_values"][0, 6])


def test_reversed_polarity_reverses_the_result(extractor, signal):
    batch, reversed_ = extractor(signal, **TWELVE), extractor(-signal, **TWELVE)
    np.testing.assert_allclose(reversed_["input_values"], -batch["input_values"], atol=1e-6)
    assert np.abs(batch["input_values"]).max() > 0.3


def test_aliases_are_understood(extractor, signal):
    names = ["Lead I", "MLII", "iii", "AVR", "avl", "lead_aVF", "v1", "V2", "ECG V3", "V4", "V5", "brust 6"]
    batch = extractor(signal, **{**TWELVE, "lead_names": names}, lead_aliases={"Brust 6": "V6"})
    same(batch, extractor(signal, **TWELVE))


# Several records


def test_a_batch_is_its_records_one_by_one_padded(extractor, signal):
    records = [
        {"signal": signal, **TWELVE},
        {"signal": signal[:2, :2600], **TWELVE, "lead_names": ["V5", "II"]},
        Record(analytic_ecg(250, 7, 1).astype(np.float32), 250.0, ["aVF"]),
    ]
    batch = extractor(records, return_quality=True)
    assert batch["input_values"].shape == (3, 12, 3000)
    for row, record in enumerate(records):
        alone = extractor(record, return_quality=True)
        leads, samples = alone["input_values"].shape[1:]
        np.testing.assert_array_equal(batch["input_values"][row, :leads, :samples], alone["input_values"][0])
        np.testing.assert_array_equal(batch["lead_ids"][row, :leads], alone["lead_ids"][0])
        patches = samples // 300
        np.testing.assert_array_equal(batch["attention_mask"][row, :leads, :patches], alone["attention_mask"][0])
        assert not batch["input_values"][row, leads:].any() and not batch["input_values"][row, :, samples:].any()
        assert not batch["attention_mask"][row, leads:].any() and not batch["attention_mask"][row, :, patches:].any()
        assert not batch["lead_ids"][row, leads:].any()
        assert (batch["quality"][row, leads:] == int(QualityFlag.PADDING)).all()


FAULTS = {
    "gap": lambda signal: signal[0, 300:310].__setitem__(slice(None), np.nan),
    "lead missing": lambda signal: signal[-1].fill(np.nan),
    "two leads there, one of noise": lambda signal: (signal[2:].fill(np.nan), FAULTS["noise"](signal)),
    "all missing": lambda signal: signal.fill(np.nan),
    "flat lead": lambda signal: signal[0].fill(1.5),
    "all flat": lambda signal: signal.fill(0.25),
    "still second": lambda signal: signal[-1, 200:400].fill(0.125),
    "rail": lambda signal: np.clip(8 * signal, -2.0, 2.0, out=signal),
    "large": lambda signal: np.multiply(signal, 30.0, out=signal),
    "implausible": lambda signal: np.multiply(signal, 1000.0, out=signal),
    "impossible": lambda signal: signal[0, 7:9].fill(1e38),
    "infinite": lambda signal: signal[0, 7:9].fill(-np.inf),
    "swapped": lambda signal: signal.__setitem__(slice(0, 2), signal[1::-1].copy()),
    "noise": lambda signal: signal.__setitem__(0, np.random.default_rng(1).normal(0, 0.3, signal.shape[1])),
}
REFUSED = {"all missing", "all flat", "impossible", "infinite"}
LEAD_SETS = (STANDARD, STANDARD[::-1], ("II", "I", "III", "V4"), ("I", "V5"), ("II", "aVF"))
A_KIND = st.fixed_dictionaries(
    {
        "rate": st.sampled_from([100, 250, 500]),
        "seconds": st.sampled_from([3.0, 3.0, 3.0, 3.9, 3.9, 3.9, 0.4]),
        "leads": st.sampled_from(LEAD_SETS),
    }
)
A_RECORD = st.fixed_dictionaries(
    {
        "leads_reversed": st.booleans(),
        "form": st.sampled_from(["float32", "float64", "uV", "by columns"]),
        "fault": st.sampled_from([*[None] * 6, *sorted(set(FAULTS) - REFUSED), *FAULTS]),
        "beat_seconds": st.floats(0.5, 1.2),
    }
)


def made(name, *, rate, seconds, leads, leads_reversed, form, fault, beat_seconds):
    """Return a record in which something is wrong, as a Record or, in microvolt, as a dictionary."""
    leads = leads[::-1] if leads_reversed else leads
    signal = analytic_ecg(rate, seconds, beat_seconds=beat_seconds)[[STANDARD.index(lead) for lead in leads]]
    signal[: min(3, len(leads))] += 0.01 * np.sin(np.arange(signal.shape[1]))
    if fault:
        FAULTS[fault](signal)
    if form == "uV":
        return {"signal": 1e3 * signal, **TWELVE, "sampling_rate": rate, "lead_names": leads, "units": "uV"} | {
            "record_name": name
        }
    signal = signal if form == "float64" else signal.astype(np.float32)
    return Record(np.asfortranarray(signal) if form == "by columns" else signal, rate, list(leads), record_name=name)


def outcome(call, caplog):
    """Return what a call gives or the error it raises, and what it logs."""
    signal_ops._warned.clear()
    caplog.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of NumPy: a refused record must not cause any
            found = call()
    except (ValueError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    return found, [record.getMessage() for record in caplog.records]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(A_KIND, min_size=1, max_size=3), parts=st.lists(A_RECORD, min_size=1, max_size=8))
def test_any_list_gives_what_its_records_give_one_by_one(extractor, caplog, kinds, parts):
    records = [made(f"r{place}", **kinds[place % len(kinds)], **part) for place, part in enumerate(parts)]
    together, said = outcome(lambda: extractor(records, return_quality=True), caplog)
    alone, said_alone = outcome(
        lambda: extractor.pad(
            [{key: value[0] for key, value in extractor(one, return_quality=True).items()} for one in records]
        ),
        caplog,
    )
    assert said == said_alone
    if isinstance(alone, str) or isinstance(together, str):
        assert together == alone
    else:
        same(together, alone)


def test_a_record_that_is_more_exact_than_those_beside_it_stays_so(extractor, signal):
    records = [{"signal": signal.astype(kind), **TWELVE} for kind in (np.float32, np.float64)]
    same(extractor(records[::-1]), {key: value[::-1] for key, value in extractor(records).items()})
    np.testing.assert_array_equal(extractor(records)["input_values"][1], extractor(signal, **TWELVE)["input_values"][0])


@pytest.mark.parametrize("places", [(2, 4), (4, 2)])
def test_of_several_bad_records_the_first_is_named(extractor, signal, places):
    records = [Record(signal.astype(np.float32), 500.0, list(STANDARD), record_name=f"r{at}") for at in range(6)]
    records[places[0]].signal = np.full_like(records[0].signal, np.nan)  # told from its samples
    records[places[1]].units = "mmHg"  # told without them
    with pytest.raises(ValueError, match='^Record "r2": '):
        extractor(records)


def test_a_list_that_is_worked_on_in_several_parts_gives_the_same(extractor, signal, monkeypatch):
    records = [Record(np.roll(signal, at, 1).astype(np.float32), 500.0, list(STANDARD)) for at in range(5)]
    whole = extractor(records, return_quality=True)
    monkeypatch.setattr(feature_extraction_anyecg, "_MOST_STACKED", 2 * signal.size)
    same(extractor(records, return_quality=True), whole)
    monkeypatch.setattr(feature_extraction_anyecg, "_MOST_STACKED", 1)
    same(extractor(records, return_quality=True), whole)


@pytest.mark.parametrize("seconds, numbers", [(10, (64, 128)), (600, (1, 4))])
def test_a_longer_list_takes_only_the_memory_of_its_result(extractor, seconds, numbers):
    record = Record(np.tile(analytic_ecg(100).astype(np.float32), seconds // 10), 100.0, list(STANDARD))
    peaks = []
    for number in numbers:
        tracemalloc.start()
        batch = extractor([record] * number)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    more = (numbers[1] - numbers[0]) * batch["input_values"][0].nbytes
    assert peaks[1] - peaks[0] < 2.2 * more  # each record's patches, then the batch


def test_a_list_of_arrays_is_many_records_and_a_list_of_rows_is_one(extractor, signal):
    call = {**TWELVE, "lead_names": ["I", "II"]}
    assert extractor([signal[:2], signal[2:4]], **call)["input_values"].shape[0] == 2
    assert extractor([signal[:2].tolist(), signal[2:4].tolist()], **call)["input_values"].shape[0] == 2
    assert extractor([signal[0], signal[1]], **call)["input_values"].shape[0] == 1


def test_items_are_padded_with_labels_stacked_and_codes_filled_with_minus_100(extractor, signal):
    items, _ = extractor.windows(signal[:2, :2000], **{**TWELVE, "lead_names": ["I", "II"]})
    items += extractor.windows(signal[:3, :1000], **{**TWELVE, "lead_names": ["I", "II", "V1"]})[0]
    for number, item in enumerate(items):
        item["labels"] = number
        item["rhythm_codes"] = np.ones_like(item["attention_mask"])
    batch = extractor.pad(items, return_tensors="np")
    assert batch["labels"].tolist() == [0, 1] and batch["input_values"].shape == (2, 3, 1200)
    assert batch["rhythm_codes"][0, 2].tolist() == [-100] * 4 and batch["rhythm_codes"][1, 0].tolist() == [
        1,
        1,
        -100,
        -100,
    ]


def test_items_without_a_mask_count_as_wholly_real(extractor):
    batch = extractor.pad([{"input_values": np.ones((2, 600)), "lead_ids": [1, 2]}])
    assert batch["attention_mask"].tolist() == [[[1, 1], [1, 1]]] and batch["input_values"].dtype == np.float32


@pytest.mark.parametrize(
    "items, message",
    [
        ([], "No items"),
        ([{"input_values": np.ones((2, 500)), "lead_ids": [1, 2]}], "a multiple of 300"),
        ([{"input_values": np.ones((2, 600)), "lead_ids": [1]}], "one id per lead"),
        ([{"input_values": np.ones((1, 2, 600)), "lead_ids": [1, 2]}], "unbatched"),
        (
            [
                {"input_values": np.ones((1, 600)), "lead_ids": [1]},
                {"input_values": np.ones((1, 600)), "lead_ids": [1], "labels": 1},
            ],
            "different keys",
        ),
        (
            [{"input_values": np.ones((1, 600)), "lead_ids": [1], "attention_mask": np.ones((1, 3))}],
            "one entry per lead",
        ),
    ],
)
def test_items_that_do_not_fit_are_refused(extractor, items, message):
    with pytest.raises(ValueError, match=message):
        extractor.pad(items)


# What is refused


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("sampling_rate", None, "Pass sampling_rate"),
        ("sampling_rate", 0, "not a possible rate"),
        ("sampling_rate", float("nan"), "not a possible rate"),
        ("sampling_rate", 1e6, "not a possible rate"),
        ("sampling_rate", 1, "not a possible rate"),
        ("lead_names", None, 'Pass lead_names=\\["I", "II"'),
        ("lead_names", list(STANDARD[:3]), "3 lead names for 12 rows"),
        ("lead_names", [*STANDARD[:11], "foo"], '"foo" is not one of the 12.*lead_aliases'),
        ("lead_names", [*STANDARD[:11], "RESP"], "lead_aliases"),
        ("lead_names", [*STANDARD[:11], "i"], '"I" and "i" are both lead I'),
        ("units", None, 'Pass units="mV"'),
        ("units", "adu", "not a known unit"),
        ("units", ["mV"] * 3, "3 units for 12 rows"),
    ],
)
def test_a_missing_or_impossible_part_raises_and_the_error_says_the_remedy(extractor, signal, part, value, message):
    with pytest.raises(ValueError, match=message):
        extractor(signal, **{**TWELVE, part: value})


def test_one_string_for_all_lead_names_is_refused(extractor, signal):
    with pytest.raises(TypeError, match="pass a list"):
        extractor(signal[:2], **{**TWELVE, "lead_names": "II"})


def test_a_lead_that_occurs_twice_is_refused(extractor, signal):
    with pytest.raises(ValueError, match='Record "B7": leads "I" and "I" are both lead I'):
        extractor(Record(signal[:2].astype(np.float32), 500.0, ["I", "I"], record_name="B7"))


def test_an_alias_may_give_a_standard_name_another_meaning(extractor, signal):
    record = Record(signal[:2].astype(np.float32), 500.0, ["I", "V1"])
    assert extractor(record, lead_aliases={"V1": "V2"})["lead_ids"].tolist() == [[1, 8]]


def test_a_transposed_signal_is_recognised(extractor, signal):
    with pytest.raises(ValueError, match="looks transposed: pass signal.T"):
        extractor(signal.T, **TWELVE)


@pytest.mark.parametrize(
    "bad, message",
    [
        (np.zeros(5000), "One lead: pass"),
        (np.zeros((2, 12, 5000)), "Several records: pass list"),
        (np.float64(3.0), "needed: \\(num_leads, num_samples\\)"),
        (np.zeros((0, 5000)), "empty"),
        (np.zeros((12, 0)), "empty"),
        (np.array([["a", "b"]]), "needed: integers or floats"),
        (np.zeros((12, 5000), complex), "needed: integers or floats"),
        (np.zeros((12, 5000), bool), "needed: integers or floats"),
        ([[1.0, 2.0], [1.0]], "the signal is no array"),
        ([[None, 1.0]], "needed: integers or floats"),
        (np.zeros((12, 1)), "1 samples at 500 Hz last 0.002 s"),
        (np.ones((12, 499)), "at least one patch of 1 s"),
        ([], "empty list"),
        ({"lead_names": ["I"]}, 'needed: "signal"'),
    ],
)
def test_an_array_that_is_no_record_is_refused(extractor, bad, message):
    with pytest.raises(ValueError, match=message):
        extractor(bad, **TWELVE)


@pytest.mark.parametrize("path", ["a/record.hea", Path("a/record")])
def test_a_path_is_refused_with_the_advice_to_read_it(extractor, path):
    with pytest.raises(TypeError, match="read_record"):
        extractor(path)
    with pytest.raises(TypeError, match="read_record"):
        extractor([path])


def test_an_infinite_value_is_refused_and_its_place_is_named(extractor, signal):
    signal = signal.copy()
    signal[7, 1234] = np.inf
    with pytest.raises(ValueError, match="lead V2 is infinite at sample 1234"):
        extractor(signal, **TWELVE)


def test_values_beyond_all_measure_are_refused_and_never_become_nan(extractor, signal):
    signal = signal.copy()
    signal[0, 10] = 1e300
    with pytest.raises(ValueError, match="lead I goes up to 1e\\+300 mV"):
        extractor(signal, **TWELVE)


@pytest.mark.parametrize("part, other", [("sampling_rate", 250), ("units", "uV"), ("lead_names", ["I"] * 12)])
def test_a_call_that_contradicts_its_record_is_refused_with_both_values(extractor, signal, part, other):
    record = Record(signal.astype(np.float32), 500.0, list(STANDARD), record_name="A0001")
    with pytest.raises(ValueError, match=f'Record "A0001": {part} is .* in the record and .* in the call'):
        extractor(record, **{part: other})
    same(extractor(record, **TWELVE), extractor(record))


def test_errors_name_the_record(extractor):
    with pytest.raises(ValueError, match='Record "B7":'):
        extractor({"signal": np.zeros((1, 5000)), "record_name": "B7", "sampling_rate": 500, "units": "mV"})


# Leads that the model does not take


def test_other_signals_of_a_record_are_left_out_with_a_warning(extractor, signal, caplog):
    record = Record(signal[:4].astype(np.float32), 500.0, ["II", "RESP", "X", "V1"], record_name="s0010")
    with caplog.at_level(logging.WARNING):
        batch = extractor(record)
    assert batch["lead_ids"].tolist() == [[2, 7]]
    np.testing.assert_array_equal(
        batch["input_values"],
        extractor(signal[[0, 3]].astype(np.float32), **{**TWELVE, "lead_names": ["II", "V1"]})["input_values"],
    )
    assert 'Record "s0010": left out, not among the model\'s leads: RESP, X.' in caplog.text


def test_a_record_without_any_lead_of_the_model_is_refused(extractor, signal):
    with pytest.raises(ValueError, match="none of its signals \\(X, RESP\\)"):
        extractor(Record(signal[:2].astype(np.float32), 500.0, ["X", "RESP"]))


def test_an_extractor_for_fewer_leads_takes_only_those(signal):
    two = AnyECGFeatureExtractor(lead_names=["V5", "ii"])
    assert two(signal, **TWELVE)["lead_ids"].tolist() == [[2, 11]]


# Missing, flat, saturated


def quality_of(extractor, signal, **options):
    return extractor(signal, **{**TWELVE, **options}, return_quality=True)


def test_a_patch_touched_by_a_gap_is_masked_and_the_rest_is_hardly_changed(extractor, signal):
    gap = signal.copy()
    gap[4, 2200:2210] = np.nan  # second 4
    batch, whole = quality_of(extractor, gap), quality_of(extractor, signal)
    assert np.argwhere(batch["attention_mask"][0] == 0).tolist() == [[4, 4]]
    changed = batch["quality"] ^ whole["quality"]
    assert changed[0, 4, 4] & int(QualityFlag.MISSING) and np.count_nonzero(changed) == 1
    assert not batch["input_values"][0, 4, 1200:1500].any()
    kept = np.delete(np.arange(3000), np.arange(1200, 1500))
    np.testing.assert_allclose(batch["input_values"][0, 4, kept], whole["input_values"][0, 4, kept], atol=0.02)


@pytest.mark.parametrize(
    "fill, flag", [(np.nan, QualityFlag.MISSING), (0.0, QualityFlag.FLAT), (2.5, QualityFlag.FLAT)]
)
def test_a_lead_that_is_missing_or_flat_is_masked_and_named(extractor, signal, caplog, fill, flag):
    damaged = signal.copy()
    damaged[11] = fill
    batch = quality_of(extractor, damaged)
    assert not batch["attention_mask"][0, 11].any() and batch["attention_mask"][0, :11].all()
    assert (batch["quality"][0, 11] == int(flag)).all() and not batch["input_values"][0, 11].any()
    assert "lead V6 is" in caplog.text and "masked" in caplog.text
    np.testing.assert_array_equal(batch["input_values"][0, :11], extractor(signal, **TWELVE)["input_values"][0, :11])


def test_a_flat_stretch_is_masked_patch_by_patch(extractor, signal):
    damaged = signal.copy()
    damaged[3, 2000:] = damaged[3, 2000]
    assert quality_of(extractor, damaged)["attention_mask"][0, 3].tolist() == [1] * 4 + [0] * 6


def test_a_lead_with_less_than_a_microvolt_is_flat_even_if_one_patch_has_more(extractor, signal):
    damaged = signal.copy()
    damaged[0] = 0
    damaged[0, 100] = 0.02
    assert not quality_of(extractor, damaged)["attention_mask"][0, 0].any()


def test_a_record_with_nothing_usable_is_refused(extractor, signal):
    with pytest.raises(ValueError, match="nothing usable: every patch is missing or flat \\(I 100% missing"):
        extractor(np.full_like(signal, np.nan), **TWELVE)
    with pytest.raises(ValueError, match="range 0 mV"):
        extractor(np.zeros((12, 5000)), **TWELVE)


def test_saturated_and_limited_patches_are_flagged_and_not_masked(extractor, signal):
    damaged = signal.copy()
    damaged[1] = np.minimum(20 * damaged[1], 1.5)  # R waves cut off by the amplifier
    damaged[6] *= 20
    batch = quality_of(extractor, damaged)
    assert (batch["quality"][0, 1] & int(QualityFlag.SATURATED)).astype(bool).mean() > 0.8
    assert (batch["quality"][0, 6] & int(QualityFlag.LIMITED)).all()
    assert batch["attention_mask"].all() and np.abs(batch["input_values"]).max() == 5.0


def test_an_electrode_that_jumps_by_volts_costs_its_own_seconds_only(extractor, signal):
    damaged = signal.copy()
    damaged[1, 1700:1800] = 9.0
    batch = quality_of(extractor, damaged)
    assert np.argwhere(batch["attention_mask"][0] == 0).tolist() in ([[1, 3]], [])
    assert QualityFlag.SATURATED in QualityFlag(int(batch["quality"][0, 1, 3]))


def test_masked_entries_of_a_masked_array_count_as_missing(extractor, signal):
    masked = np.ma.masked_array(np.round(signal * 1000).astype(int), mask=np.zeros(signal.shape, bool))
    masked[0, 0] = np.ma.masked
    assert extractor(masked, **{**TWELVE, "units": "uV"})["attention_mask"][0, 0].tolist() == [0] + [1] * 9


def test_quality_is_an_array_that_moves_with_the_batch(extractor, signal):
    torch = pytest.importorskip("torch")
    batch = quality_of(extractor, signal, return_tensors="pt").to(torch.bfloat16)
    assert batch["quality"].dtype == torch.int64 and batch["quality"].shape == batch["attention_mask"].shape


def test_implausible_amplitudes_are_warned_about(extractor, signal, caplog):
    for _ in range(2):  # each time: the second record may be the one that somebody looks at
        caplog.clear()
        extractor(signal * 1000, **TWELVE)
        assert "Check `units`" in caplog.text


def test_one_lead_a_thousand_times_off_is_warned_about(extractor, signal, caplog):
    signal[6] *= 1000
    extractor(signal, **TWELVE)
    assert "row 6 ranges over" in caplog.text


# Length


@pytest.mark.parametrize("num_samples, patches", [(500, 1), (749, 1), (750, 2), (5000, 10), (5249, 10), (5250, 11)])
def test_a_last_patch_is_kept_if_half_of_it_is_there(extractor, num_samples, patches):
    batch = extractor(analytic_ecg(500, 12)[:, :num_samples], **TWELVE)
    assert batch["attention_mask"].shape[2] == patches and batch["input_values"].shape[2] == patches * 300
    real = min(round(num_samples * 0.6), patches * 300)
    assert not batch["input_values"][..., real:].any() and batch["attention_mask"].all()


def test_a_record_no_longer_than_a_window_is_one_window(extractor, signal):
    for length in (1500, 5000):
        items, starts = extractor.windows(signal[:, :length], **TWELVE)
        assert starts.tolist() == [0.0] and len(items) == 1
        whole = extractor(signal[:, :length], **TWELVE)
        same({key: value[None] for key, value in items[0].items()}, whole)


def test_windows_overlap_by_half_and_the_last_ends_with_the_record(extractor):
    items, starts = extractor.windows(analytic_ecg(500, 33.4), **TWELVE, return_quality=True)
    np.testing.assert_allclose(starts, [0, 5, 10, 15, 20, 23.4])
    assert all(item["input_values"].shape == (12, 3000) for item in items)
    assert extractor.pad(items)["quality"].shape == (6, 12, 10)


def test_windows_are_cut_from_the_record_filtered_whole(extractor):
    items, starts = extractor.windows(analytic_ecg(500, 33.4), **TWELVE)
    whole = extractor(analytic_ecg(500, 33.4), **TWELVE)["input_values"][0]
    for item, start in zip(items[:-1], starts[:-1], strict=True):
        begin = round(start * 300)
        np.testing.assert_array_equal(item["input_values"], whole[:, begin : begin + 3000])


def test_the_hop_may_be_chosen():
    extractor = AnyECGFeatureExtractor(window_seconds=5, hop_seconds=2.5)
    assert extractor.windows(analytic_ecg(500, 11), **TWELVE)[1].tolist() == [0, 2.5, 5, 6]


def test_gaps_are_masked_in_the_windows_that_hold_them(extractor):
    signal = analytic_ecg(500, 33.4, 1)
    signal[0, 12_345] = np.nan  # 24.69 s: patch 4 of the window from 20 s, patch 1 of that from 23.4 s
    items, _ = extractor.windows(signal, **{**TWELVE, "lead_names": ["II"]})
    masked = [np.flatnonzero(item["attention_mask"][0] == 0).tolist() for item in items]
    assert masked == [[], [], [], [9], [4], [1]]


def test_windows_without_anything_usable_are_left_out_with_a_warning(extractor, caplog):
    signal = analytic_ecg(500, 40, 2)
    signal[:, 7500:17_500] = np.nan  # 15 to 35 s
    items, starts = extractor.windows(signal, **{**TWELVE, "lead_names": ["I", "II"]})
    assert starts.tolist() == [0, 5, 10, 30] and len(items) == 4 and "window left out" in caplog.text
    with pytest.raises(ValueError, match="nothing usable"):
        extractor.windows(signal * np.nan, **{**TWELVE, "lead_names": ["I", "II"]})


# Options and saving


def test_every_option_is_saved_and_the_loaded_extractor_does_the_same(tmp_path, signal):
    options = {
        "sampling_rate": 250,
        "patch_size": 125,
        "lowcut_hz": None,
        "highcut_hz": 45.0,
        "lowcut_order": 1,
        "highcut_order": 4,
        "denoise": True,
        "clip_mv": 0.4,
        "window_seconds": 5.0,
        "hop_seconds": 1.5,
        "lead_names": ["II", "V1"],
        "padding_value": -1.0,
    }
    extractor = AnyECGFeatureExtractor(**options)
    extractor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored.pop("auto_map") == {"AutoFeatureExtractor": "feature_extraction_anyecg.AnyECGFeatureExtractor"}
    assert stored == {**options, "feature_extractor_type": "AnyECGFeatureExtractor"}
    loaded = AnyECGFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    same(loaded(signal, **TWELVE), extractor(signal, **TWELVE))


def test_an_extractor_of_defaults_is_bit_equal_after_saving(tmp_path, extractor, signal):
    extractor.save_pretrained(tmp_path)
    same(AnyECGFeatureExtractor.from_pretrained(tmp_path)(signal, **TWELVE), extractor(signal, **TWELVE))


def test_an_option_may_be_replaced_on_loading(tmp_path, extractor):
    extractor.save_pretrained(tmp_path)
    assert AnyECGFeatureExtractor.from_pretrained(tmp_path, clip_mv=2.0).clip_mv == 2.0


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda extractor: pickle.loads(pickle.dumps(extractor))])
def test_a_copy_does_the_same(extractor, signal, copier):
    same(copier(extractor)(signal, **TWELVE), extractor(signal, **TWELVE))


def test_an_unknown_option_raises_and_the_close_one_is_suggested():
    with pytest.raises(TypeError, match="no option 'samplin_rate'. Did you mean \"sampling_rate\""):
        AnyECGFeatureExtractor(samplin_rate=300)


def test_keys_of_the_library_pass():
    keys = {"feature_extractor_type": "AnyECGFeatureExtractor", "auto_map": {"AutoFeatureExtractor": "x.Y"}}
    assert AnyECGFeatureExtractor(**keys, processor_class="P").auto_map == keys["auto_map"]


@pytest.mark.parametrize(
    "option, value",
    [
        ("sampling_rate", 0),
        ("sampling_rate", None),
        ("patch_size", 0),
        ("patch_size", 1.5),
        ("lowcut_hz", -1),
        ("lowcut_hz", 50.0),
        ("highcut_hz", 150.0),
        ("highcut_order", 0),
        ("clip_mv", 0),
        ("window_seconds", 0),
        ("window_seconds", 2.5),
        ("hop_seconds", 0),
        ("hop_seconds", 20),
        ("lead_names", []),
        ("lead_names", ["I", "foo"]),
        ("lead_names", ["I", "i"]),
    ],
)
def test_an_option_out_of_range_raises(option, value):
    with pytest.raises(ValueError):
        AnyECGFeatureExtractor(**{option: value})


def test_the_extractor_needs_no_torch(tmp_path):
    script = f"""
        import sys
        from importlib.machinery import PathFinder
        find = PathFinder.find_spec
        hide = lambda name, *rest: None if name.partition(".")[0] == "torch" else find(name, *rest)
        PathFinder.find_spec = staticmethod(hide)
        import numpy as np
        from anyecg_hf import AnyECGFeatureExtractor
        AnyECGFeatureExtractor().save_pretrained({str(tmp_path)!r})
        extractor = AnyECGFeatureExtractor.from_pretrained({str(tmp_path)!r})
        batch = extractor(np.random.rand(2, 5000), sampling_rate=500, lead_names=["I", "II"], units="mV")
        print(batch["input_values"].shape, "torch" in sys.modules)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert result.stdout.strip() == "(1, 2, 3000) False", result.stderr


# Any input


@settings(max_examples=25, deadline=None)
@given(
    rate=st.floats(50, 2000),
    seconds=st.floats(0.2, 6),
    num_leads=st.integers(1, 4),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]),
    share_missing=st.sampled_from([0.0, 0.001, 0.3, 1.0]),
)
def test_any_signal_is_refused_or_gives_what_the_contract_says(rate, seconds, num_leads, scale, share_missing):
    extractor, rng = AnyECGFeatureExtractor(), np.random.default_rng(0)
    signal = scale * rng.normal(size=(num_leads, max(1, round(rate * seconds))))
    signal[rng.random(signal.shape) < share_missing] = np.nan
    names = list(STANDARD[:num_leads])
    try:
        batch = extractor(signal, sampling_rate=rate, lead_names=names, units="mV", return_quality=True)
    except ValueError as error:
        assert "at least one patch" in str(error) or "nothing usable" in str(error)
        return
    values, mask, flags = batch["input_values"][0], batch["attention_mask"][0], batch["quality"][0]
    assert np.isfinite(values).all() and np.abs(values).max() <= 5.0
    assert values.shape == (num_leads, mask.shape[1] * 300) and set(np.unique(mask)) <= {0, 1} and mask.any()
    assert not values.reshape(*mask.shape, 300)[mask == 0].any()
    np.testing.assert_array_equal(mask == 0, (flags & int(UNUSABLE)) != 0)
    assert batch["lead_ids"][0].tolist() == [LEAD_IDS[name] for name in names]


# Real records


def test_the_challenge_records_go_through_whole_and_in_windows(extractor, real_ecg):
    for path in sorted((real_ecg / "challenge-2021" / "georgia").glob("*.hea"))[:6]:
        assert extractor(read_record(path))["lead_ids"][0].tolist() == list(range(1, 13))
    items, starts = extractor.windows(read_record(real_ecg / "challenge-2021" / "ptb" / "S0010"))
    assert len(items) == len(starts) == 23 and starts[-1] == pytest.approx(105.2)


def test_a_two_lead_holter_record_goes_through_in_windows(extractor, real_ecg):
    items, starts = extractor.windows(read_record(real_ecg / "mitdb" / "100"))
    assert (
        len(items) == 361
        and items[0]["lead_ids"].tolist() == [2, 11]
        and starts[-1] == pytest.approx(1795.556, abs=1e-3)
    )


def test_quality_of_another_part_or_number_of_leads_is_refused():
    record = simulate_record(1, duration_seconds=8.0)
    extractor = AnyECGFeatureExtractor()
    record.quality = extractor(record, return_quality=True)["quality"][0]
    np.testing.assert_array_equal(extractor(record, return_quality=True)["quality"][0], record.quality)
    for wrong, message in [
        (record.quality[:, :7], "7 patches"),
        (record.quality[:5], "12 leads"),
        ([0.5] * 12, "quality"),
    ]:
        record.quality = wrong
        with pytest.raises(ValueError, match=message):
            extractor(record)
