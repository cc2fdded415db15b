"""ISHNE Holter recordings. No real file is at hand: all are built here from Badilini's specification of 1998."""

import binascii
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyecg_hf.ishne_reader import read_ishne
from anyecg_hf.records import Record, Stated

SECRETS = (b"Jane-Planted", b"Doe-Planted", b"ID-4711-Planted", b"Recorder-Planted", b"text with Name-Planted")
STEPS = np.array([[100, -200, 7], [0, 3, 8], [-32768, 7, 9], [32767, -32767, 10]], "<i2")  # (samples, leads)


def ishne(
    steps=STEPS, *, lead_codes=(5, 6, 11), nanovolts=(2500, 1000, 5000), rate=200, quality=(1, 1, 1), num_samples=None,
    sex=2, birth=(17, 3, 1944), recorded=(16, 3, 2003), text=SECRETS[4], magic=b"ISHNE1.0", num_leads=None, start=None,
    sum_order="<",
):  # fmt: skip
    """Return a file; the offsets in the comments are those of the specification."""

    def per_lead(values):
        return struct.pack("<12h", *values, *[-9] * (12 - len(values)))

    block = struct.pack(
        "<4ih", len(text), len(steps) if num_samples is None else num_samples, 522,
        522 + len(text) if start is None else start, 1,
    )  # fmt: skip
    block += b"".join(struct.pack(f"{size}s", value) for size, value in zip((40, 40, 20), SECRETS))  # 28, 68, 108
    block += struct.pack("<2h3h3h3h3h", sex, 1, *birth, *recorded, *recorded, 9, 30, 0)  # 128 to 156
    block += struct.pack("<h", len(lead_codes) if num_leads is None else num_leads)  # 156
    block += per_lead(lead_codes) + per_lead(quality) + per_lead(nanovolts)  # 158, 182, 206
    block += struct.pack("<h40sh80s80s88s", 0, SECRETS[3], rate, b"", b"", b"")  # 230 to 522
    assert len(block) == 512
    check_sum = struct.pack(sum_order + "H", binascii.crc_hqx(block + text, 0xFFFF))
    return magic + check_sum + block + text + np.asarray(steps).astype("<i2").tobytes()


def read(folder, data, **part):
    path = folder / "holter.ecg"
    path.write_bytes(data)
    return read_ishne(path, Stated(**part))


def test_samples_become_millivolt_and_minus_32768_no_value(tmp_path):
    record = read(tmp_path, ishne())
    expected = STEPS.T * np.array([[2.5e-3], [1e-3], [5e-3]])
    expected[0, 2] = np.nan
    np.testing.assert_array_equal(record.signal, expected.astype(np.float32))
    assert record.signal.dtype == np.float32 and record.sampling_rate == 200.0
    assert (record.lead_names, record.units, record.warnings) == (["I", "II", "V1"], "mV", [])


def test_age_and_sex_are_read(tmp_path):
    record = read(tmp_path, ishne())
    assert (record.age, record.sex) == (58.0, "female")  # one day short of 59
    record = read(tmp_path, ishne(sex=0, birth=(0, 0, 0)))
    assert (record.age, record.sex) == (None, None)


def test_every_lead_of_the_specification_has_a_name(tmp_path):
    steps = np.zeros((2, 10), int)
    record = read(tmp_path, ishne(steps, lead_codes=range(10), nanovolts=[1000] * 10, quality=[0] * 10))
    assert record.lead_names == ["lead 1", "bipolar", "X", "Y", "Z", "I", "II", "III", "aVR", "aVL"]
    record = read(tmp_path, ishne(steps, lead_codes=range(10, 20), nanovolts=[1000] * 10, quality=[0] * 10))
    assert record.lead_names == ["aVF", "V1", "V2", "V3", "V4", "V5", "V6", "ES", "AS", "AI"]


def test_a_poor_lead_is_told(tmp_path):
    assert read(tmp_path, ishne(quality=(1, 3, 1))).warnings == ["lead 2: noise often, says the header."]


@pytest.mark.parametrize("num_samples", [4, 12])
def test_writers_count_the_samples_of_one_lead_or_of_all(tmp_path, num_samples):
    assert read(tmp_path, ishne(num_samples=num_samples)).warnings == []


@pytest.mark.parametrize("order", "<>")
def test_the_check_sum_is_compared_in_either_order_of_its_bytes(tmp_path, order):
    assert read(tmp_path, ishne(sum_order=order)).warnings == []
    damaged = bytearray(ishne(sum_order=order))
    damaged[400] ^= 1
    assert "check sum" in read(tmp_path, bytes(damaged)).warnings[0]


def test_only_the_part_asked_for_is_loaded_of_a_long_recording(tmp_path):
    path = tmp_path / "holter.ecg"
    hours = 24 * 3600 * 200
    with open(path, "wb") as file:  # 24 h of three leads, a hole but for the hundredth second from the end
        file.write(ishne(STEPS[:0], num_samples=hours))
        start = file.tell()
        file.seek(start + (hours - 20000) * 6)
        file.write(STEPS.tobytes())
        file.truncate(start + hours * 6)
    record = read_ishne(path, Stated(start_seconds=24 * 3600 - 100, duration_seconds=5))
    assert record.signal.shape == (3, 1000) and record.warnings == []
    np.testing.assert_array_equal(record.signal[2, :5], (np.array([7, 8, 9, 10, 0]) * 5e-3).astype(np.float32))


def test_parts_are_those_of_the_whole_across_the_size_of_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("anyecg_hf.ishne_reader._CHUNK", 50)
    steps = np.random.default_rng(1).integers(-3000, 3000, (400, 3))
    whole = read(tmp_path, ishne(steps)).signal
    np.testing.assert_array_equal(whole, (steps.T * np.array([[2.5e-3], [1e-3], [5e-3]])).astype(np.float32))
    part = read(tmp_path, ishne(steps), start_seconds=0.25, duration_seconds=1.0).signal
    np.testing.assert_array_equal(part, whole[:, 50:250])
    with pytest.raises(ValueError, match="the recording ends at 2 s"):
        read(tmp_path, ishne(steps), start_seconds=2.0)


def test_a_file_that_ends_early_is_read_as_far_as_it_goes(tmp_path):
    record = read(tmp_path, ishne()[:-7])
    assert record.signal.shape == (3, 2) and "announces 4 samples, the file holds 2 of each" in record.warnings[0]


@pytest.mark.parametrize(
    "data, message",
    [
        (ishne(magic=b"ANN  1.0"), "annotations, no signal"),
        (ishne()[:300], "522 bytes of header"),
        (ishne(STEPS[:0]), "no sample of each lead"),
        (ishne(num_leads=0), "0 leads"),
        (ishne(num_leads=13), "13 leads"),
        (ishne(rate=0), "0 Hz"),
        (ishne(nanovolts=(2500, 0, 1000)), "all must be above 0"),
        (ishne(start=100), "begins at byte 100"),
        (ishne(start=10**9), "begins at byte 1000000000"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, data)
    assert "holter.ecg" in str(error.value) and "Planted" not in str(error.value)


def test_nothing_that_names_the_patient_is_kept_or_told(tmp_path):
    for data in (ishne(), ishne()[:-7], ishne(quality=(5, 5, 5))):
        text = repr(vars(read(tmp_path, data)))
        assert "Planted" not in text and "1944" not in text and "2003" not in text


def is_a_clear_end(folder, data):
    try:
        record = read(folder, data)
    except (ValueError, OSError) as error:
        text = str(error)
        assert "holter.ecg" in text
    else:
        assert isinstance(record, Record) and len(record.lead_names) == len(record.signal) > 0
        assert 0 < record.sampling_rate < float("inf") and not np.isinf(record.signal).any()
        text = repr(record.warnings)
    assert "Planted" not in text


def test_a_file_cut_at_any_byte_ends_clearly(tmp_path):
    for length in range(len(ishne())):
        is_a_clear_end(tmp_path, ishne()[:length])


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_file_ends_clearly(tmp_path_factory, seed):
    rng, data = random.Random(seed), bytearray(ishne())
    for _ in range(rng.randint(1, 8)):
        place = rng.choice([rng.randrange(len(data)), rng.randrange(8, 28), rng.randrange(128, 275)])
        data[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    is_a_clear_end(tmp_path_factory.mktemp("mutants"), bytes(data))
