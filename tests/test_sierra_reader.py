"""Philips Sierra XML: the compression against an encoder, an independent decoder, and by hand; what is refused."""

import base64
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xml_ecg_files import TWELVE, lzw_codes, sierra, stored_limb_leads, xli, xli_chunk

from anyecg_hf.records import read_record
from anyecg_hf.sierra_reader import decode_xli

REAL = ("2020-5-18_15-48-11.xml", "ad4d3d80-d165_1-04_orig.xml")
ROWS = np.random.default_rng(7).integers(-400, 400, (12, 40)).cumsum(axis=1)


def write(folder, document):
    path = folder / "record.xml"
    path.write_bytes(document)
    return path


def decode(data, num_leads, num_samples):
    warnings = []
    return decode_xli(data, num_leads, num_samples, where="w", warnings=warnings), warnings


def as_steps(record):
    return record.signal.astype(np.float64) / 0.005


def test_a_chunk_put_together_by_hand_gives_its_samples():
    # 10, 12, then 13 (second difference -1) and 13 (-1): 2*12 - 10 - 1 and 2*13 - 12 - 1, stored as 1 and 64 + 1.
    codes = [0, 0, 0, 0, 10, 12, 65, 64, 1023]  # high bytes, low bytes, end; no code above 255 is needed
    bits = "".join(f"{code:010b}" for code in codes) + "000000"
    data = int(bits, 2).to_bytes(12, "big")
    rows, warnings = decode(struct.pack("<ihh", 12, 1, 1) + data, 1, 4)
    assert rows[0].tolist() == [10, 12, 13, 13] and warnings == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-2000, 2000), min_size=2, max_size=600), st.integers(0, 3))
def test_what_is_encoded_comes_back(row, repeats):
    row = row * (1 + 20 * repeats)  # long ones fill the table of codes
    rows, warnings = decode(xli([row, row]), 2, len(row))
    assert rows[0].tolist() == row == rows[1].tolist() and warnings == []


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=4, max_size=3000))
def test_the_expansion_agrees_with_sierraecg(data):
    lzw = pytest.importorskip("sierraecg.lzw", reason="sierraecg is not installed")
    decoder, out = lzw.LzwDecoder(xli_chunk(data, 0)[8:] + b"\0" * 4, bits=10), bytearray()
    while (byte := decoder.read()) != -1:
        out.append(byte)
    assert bytes(out) == data and lzw_codes(data)[-1] < 1023


@pytest.mark.parametrize("name", REAL)
def test_real_files_agree_with_sierraecg(real_ecg, name):
    sierraecg = pytest.importorskip("sierraecg", reason="sierraecg is not installed")
    path = real_ecg / "formats" / "philips_sierra" / name
    record, other = read_record(path), sierraecg.read_file(str(path))
    assert record.lead_names == [lead.label for lead in other.leads]
    np.testing.assert_allclose(as_steps(record), [lead.samples for lead in other.leads], atol=1e-3)


@pytest.mark.parametrize("name", REAL)
def test_real_files_obey_einthoven_and_goldberger(real_ecg, name):
    record = read_record(real_ecg / "formats" / "philips_sierra" / name)
    ecg = dict(zip(record.lead_names, as_steps(record)[:, :5300]))
    assert record.signal.shape == (12, 5500) and record.sampling_rate == 500 and record.sex in ("female", None)
    assert np.abs(ecg["III"] - (ecg["II"] - ecg["I"])).max() < 1.01
    assert np.abs(ecg["aVR"] + (ecg["I"] + ecg["II"]) / 2).max() < 2.01
    assert np.abs(ecg["aVL"] - (ecg["I"] - ecg["III"]) / 2).max() < 2.01
    assert np.abs(ecg["aVF"] - (ecg["II"] + ecg["III"]) / 2).max() < 2.01
    assert np.abs(as_steps(record)[:, 5350:5450] - 200).max() < 1e-3 and "calibration" in str(record.warnings)


def test_twelve_leads_are_read_in_millivolt(tmp_path):
    record = read_record(write(tmp_path, sierra(xli(stored_limb_leads(ROWS)), milliseconds=80)))
    np.testing.assert_array_equal(record.signal, (ROWS * 0.005).astype(np.float32))
    assert record.lead_names == list(TWELVE) and record.sampling_rate == 500
    assert (record.age, record.sex, record.diagnosis_codes) == (69, "female", ["SR"])
    assert record.statements == ["Sinus rhythm; V-rate 50-99", "OTHERWISE NORMAL ECG"]
    assert "representative beats" in record.warnings[0]


def test_version_1_03_states_rate_resolution_and_leads_with_the_device(tmp_path):
    waveform = (
        'compressflag="True" compressmethod="XLI" dataencoding="Base64" durationperchannel="80" nbitspersample="16"'
    )
    data = xli([*stored_limb_leads(ROWS), *np.zeros((4, 40), int)])  # four channels without a lead
    document = sierra(data, waveform=waveform, extra="<leadset>STD-12</leadset>", age="<age><months>18</months></age>")
    record = read_record(write(tmp_path, document))
    np.testing.assert_array_equal(record.signal, (ROWS * 0.005).astype(np.float32))
    assert record.lead_names == list(TWELVE) and record.age == 1.5


@pytest.mark.parametrize(
    "attributes, text",
    [
        ('dataencoding="Base64" compressflag="False"', base64.b64encode(ROWS.astype("<i2").tobytes()).decode()),
        ('dataencoding="Plain" compressflag="False"', "\n".join(" ".join(map(str, row)) for row in ROWS.tolist())),
    ],
)
def test_waveforms_without_compression_hold_the_leads_themselves(tmp_path, attributes, text):
    rows = ROWS if "Plain" in attributes else ROWS.astype("<i2")
    attributes += f' leadlabels="{" ".join(TWELVE)}" durationperchannel="80"'
    record = read_record(write(tmp_path, sierra(b"", waveform=attributes, text=text)))
    np.testing.assert_array_equal(record.signal, (rows * 0.005).astype(np.float32))


def test_leads_that_end_early_are_filled_up_and_said(tmp_path):
    rows = [*ROWS[:6], *(row[:30] for row in ROWS[6:])]
    record = read_record(write(tmp_path, sierra(xli(stored_limb_leads(rows)), milliseconds=80)))
    assert np.isnan(record.signal[6:, 30:]).all() and not np.isnan(record.signal[:6]).any()
    assert sum("ends early, 30 of 40" in warning for warning in record.warnings) == 6


def test_data_without_their_end_are_said_to_be_doubtful(tmp_path):
    record = read_record(write(tmp_path, sierra(xli(stored_limb_leads(ROWS), ends=False), milliseconds=80)))
    np.testing.assert_array_equal(record.signal, (ROWS * 0.005).astype(np.float32))
    assert "may be cut" in str(record.warnings)


def test_numbers_stated_twice_and_otherwise_are_said(tmp_path):
    document = sierra(xli(stored_limb_leads(ROWS)), milliseconds=80, extra="<resolution>1</resolution>")
    record = read_record(write(tmp_path, document))
    np.testing.assert_array_equal(record.signal, (ROWS * 0.005).astype(np.float32))
    assert "resolution is stated twice" in str(record.warnings)


def test_leads_without_a_label_are_said(tmp_path):
    waveform = 'dataencoding="Base64" compression="XLI" numberofleads="12" leadlabels="I II" durationperchannel="80"'
    record = read_record(write(tmp_path, sierra(xli(stored_limb_leads(ROWS)), waveform=waveform)))
    assert record.lead_names == ["I", "II"] and "12 leads announced, 2 have a label" in str(record.warnings)


def test_a_part_is_cut_out(tmp_path):
    path = write(tmp_path, sierra(xli(stored_limb_leads(ROWS)), milliseconds=80))
    part = read_record(path, start_seconds=0.02, duration_seconds=0.04)
    np.testing.assert_array_equal(part.signal, read_record(path).signal[:, 10:30])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"milliseconds": 8_000_000}, "no resting ECG"),
        ({"milliseconds": 40}, "more samples than the 20 announced"),
        ({"names": ("III", "V1")}, "left after I and II"),
        ({"data": b""}, "lead 1: missing"),
        ({"data": struct.pack("<Ihh", 2**32 - 1, 1, 0)}, "4294967295 bytes announced, 0 are there"),
        ({"data": xli_chunk(b"\0\0\0", 0)}, "even number"),
        ({"data": struct.pack("<Ihh", 2, 1, 0) + b"\xff\xc0"}, "0 bytes after expansion"),
        ({"data": struct.pack("<Ihh", 2, 1, 0) + b"\xfe\x80"}, "unknown LZW code"),
        ({"text": "%%%"}, "no base64"),
        ({"waveform": 'dataencoding="Base64" compression="ZIP" durationperchannel="80"'}, "neither leadset"),
    ],
)
def test_damage_is_a_clear_error(tmp_path, change, message):
    options = {"milliseconds": 80, "data": xli(stored_limb_leads(ROWS)), **change}
    with pytest.raises(ValueError, match=message):
        read_record(write(tmp_path, sierra(options.pop("data"), **options)))


@pytest.mark.parametrize(
    "given, field",
    [("<bitspersample>12</bitspersample>", "bitspersample"), ("<signaloffset>3</signaloffset>", "signaloff")],
)
def test_other_ways_to_store_samples_are_refused(tmp_path, given, field):
    waveform = 'dataencoding="Base64" compression="XLI" durationperchannel="80"'
    with pytest.raises(ValueError, match=field):
        read_record(write(tmp_path, sierra(b"", waveform=waveform, extra=given)))
