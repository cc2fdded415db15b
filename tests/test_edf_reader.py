"""EDF and EDF+: what is read, what is left out, gaps, annotations, and damaged files."""

import os
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from said import said

from anyecg_hf import edf_reader
from anyecg_hf.records import Record, Stated, read_record

PATIENT, RECORDING = "MCH-0234567 F 02-MAY-1951 Haagse_Harry", "Startdate 01-MAY-2002 PSG-1234/2002 NN Telemetry03"
DATA = np.array([[[-5, 0, 7, 32767], [1, 2, 3, 4]], [[9, 8, 7, -32768], [5, 6, 7, 8]]])  # (records, signals, samples)


def signal(label="ECG II", unit="uV", physical=(-3276.8, 3276.7), digital=(-32768, 32767), data=None):
    """One signal; `data` is `(records, samples per record)`."""
    return label, unit, physical, digital, np.asarray(DATA[:, 0] if data is None else data)


def lists(*texts):
    """An annotation signal whose records hold these bytes."""
    width = max(map(len, texts)) + 2
    rows = [np.frombuffer(text.ljust(width // 2 * 2, b"\0"), "<i2") for text in texts]
    return "EDF Annotations", "", (-1, 1), (-32768, 32767), np.array(rows)


def write(path, signals, *, kind="", count=None, seconds="1", patient=PATIENT, recording=RECORDING, date="16.09.87"):
    """Write a file from the specification (www.edfplus.info/specs/edf.html), field by field."""
    num_records = len(signals[0][4])
    count = num_records if count is None else count
    fixed = [("0", 8), (patient, 80), (recording, 80), (date, 8), ("20.35.00", 8), (256 * (len(signals) + 1), 8)]
    fixed += [(kind, 44), (count, 8), (seconds, 8), (len(signals), 4)]
    labels, units, physical, digital, data = zip(*signals)
    table = [(labels, 16), ([""] * len(signals), 80), (units, 8)]
    table += [([low for low, _ in limits], 8) for limits in (physical,)] + [([high for _, high in physical], 8)]
    table += [([low for low, _ in digital], 8), ([high for _, high in digital], 8), ([""] * len(signals), 80)]
    table += [([rows.shape[1] for rows in data], 8), ([""] * len(signals), 32)]
    fields = fixed + [(value, width) for values, width in table for value in values]
    header = b"".join((v if isinstance(v, bytes) else str(v).encode("latin-1")).ljust(w)[:w] for v, w in fields)
    records = b"".join(rows[index].astype("<i2").tobytes() for index in range(num_records) for rows in data)
    path.write_bytes(header + records)
    return path


def long_file(path, num_records=40, kind="EDF+C", onsets=None):
    """Two leads of 8 samples a record, values known from their place, with an annotation in each record."""
    data = np.arange(num_records * 8).reshape(-1, 8)
    onsets = range(num_records) if onsets is None else onsets
    texts = (f"+{at}\x14\x14\0+{at + 0.5}\x151\x14beat {index}\x14\0" for index, at in enumerate(onsets))
    marks = lists(*(text.encode() for text in texts))
    return write(path, [signal("I", data=data), marks, signal("V1", "mV", (-32768, 32767), data=-data)], kind=kind)


# What is read


def test_values_are_millivolt_by_the_calibration_of_the_header(tmp_path):
    path = write(
        tmp_path / "a.edf",
        [signal("ECG II", "mV", (-1, 3), (-2048, 2047)), signal("EKG V1", "uV", (500, -500), data=DATA[:, 1])],
    )
    record = read_record(path)
    first = (DATA[:, 0].ravel() + 2048) * (4 / 4095) - 1
    second = ((DATA[:, 1].ravel() + 32768) * (-1000 / 65535) + 500) / 1000
    np.testing.assert_allclose(record.signal, [first, second], rtol=1e-6, atol=1e-9)
    assert (record.lead_names, record.sampling_rate, record.file_format) == (["II", "V1"], 4.0, "EDF")
    assert record.signal.dtype == np.float32


def test_values_agree_with_wfdb(tmp_path):
    """Up to a constant: wfdb rounds the base line towards zero, and so is off by a unit of the converter."""
    wfdb_edf = pytest.importorskip("wfdb.io.convert.edf")
    rng = np.random.default_rng(0)
    signals = [
        signal(name, "mV", (-3.2768, 3.2767), data=rng.integers(-32768, 32767, (3, 500)))
        for name in ("I", "II", "V1", "V2")
    ]
    path = write(tmp_path / "a.edf", signals)
    ours, theirs = read_record(path), wfdb_edf.read_edf(str(path))
    assert (theirs.fs, theirs.sig_name) == (ours.sampling_rate, ours.lead_names)
    np.testing.assert_allclose(ours.signal, theirs.p_signal.T, atol=1.01e-4)
    np.testing.assert_allclose(np.diff(ours.signal), np.diff(theirs.p_signal.T), atol=1e-4 / 50)


@pytest.mark.parametrize(
    "unit,factor",
    [("uV", 1e-3), (b"\xb5V", 1e-3), ("µV".encode(), 1e-3), ("μV".encode(), 1e-3), ("mV", 1), ("V", 1e3), ("nV", 1e-6)],
)
def test_units_of_voltage_in_any_encoding(tmp_path, unit, factor):
    record = read_record(write(tmp_path / "a.edf", [signal(unit=unit, physical=(-32768, 32767))]))
    np.testing.assert_allclose(record.signal[0], DATA[:, 0].ravel() * factor, rtol=1e-6)


def test_what_is_no_lead_is_left_out_and_said(tmp_path):
    others = [
        signal("Temp rectal", "degC"),
        signal("EEG C3-A2"),
        signal("ECG", data=DATA[:, 0, :2]),
        signal("aVR", physical=(1, 1)),
        signal("III", digital=(5, 5)),
        signal("aVL", ""),
    ]
    record = read_record(write(tmp_path / "a.edf", [*others, signal("II")]))
    assert record.lead_names == ["II"]
    reasons = ["no voltage", "no ECG", "rate", "impossible", "impossible", "unit is blank"]
    for position, reason in enumerate(reasons, 1):
        assert sum(f"signal {position} left out" in text and reason in text for text in said(record)) == 1
    assert len(said(record)) == 6


def test_a_file_without_a_lead_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"a\.edf: no lead of an ECG among 1 signals.*unit is no voltage"):
        read_record(write(tmp_path / "a.edf", [signal("Temp", "degC")]))


def test_two_signals_of_one_lead_are_told_apart(tmp_path):
    record = read_record(write(tmp_path / "a.edf", [signal("II"), signal("ECG II")]))
    assert record.lead_names[0] == "II" and len(set(record.lead_names)) == 2 and record.warnings


def test_the_duration_of_a_data_record_gives_the_rate(tmp_path):
    assert read_record(write(tmp_path / "a.edf", [signal()], seconds="0.008")).sampling_rate == 500.0


# How many data records there are


@pytest.mark.parametrize(
    "count,cut,samples,said",
    [
        (2, 0, 8, []),
        (-1, 0, 8, ["not stated"]),
        (1, 0, 4, ["8 bytes after"]),
        (2, 3, 4, ["1 of 2"]),
        (-1, 3, 4, ["not stated"]),
        (99999999, 0, 8, ["2 of 99999999"]),
    ],
)
def test_the_size_of_the_file_decides(tmp_path, count, cut, samples, said):
    path = write(tmp_path / "a.edf", [signal()], count=count)
    path.write_bytes(path.read_bytes()[: -cut or None])
    record = read_record(path)
    assert record.signal.shape == (1, samples)
    assert [text in warning for text, warning in zip(said, record.warnings, strict=True)] == [True] * len(said)


@pytest.mark.parametrize(
    "at,field,message",
    [
        (252, b"x   ", "number of signals"),
        (252, b"9999", "640"),
        (252, b"0   ", "0 signals"),
        (184, b"768     ", "bytes in header"),
        (236, b"0       ", "none to read"),
        (236, b"-2      ", "none to read"),
        (244, b"0       ", "no possible rate"),
        (244, b"nan     ", "duration"),
        (244, b"1e-300  ", "no possible rate"),
        (472, b"99999999", "none to read"),
        (472, b"-4      ", "-4 samples"),
        (376, b"1_0     ", "not readable"),
        (368, b"1e300   ", "too large"),
    ],
)
def test_a_damaged_field_is_named(tmp_path, at, field, message):
    path = write(tmp_path / "a.edf", [signal()])
    data = bytearray(path.read_bytes())
    data[at : at + len(field)] = field
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.edf: .*{message}"):
        read_record(path)


def test_bdf_is_refused(tmp_path):
    path = write(tmp_path / "a.bdf", [signal()])
    path.write_bytes(b"\xffBIOSEMI" + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="BDF"):
        read_record(path)


# Parts, annotations, gaps


def test_a_part_is_the_same_as_that_part_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(edf_reader, "_BLOCK_BYTES", 300)  # several blocks
    path = long_file(tmp_path / "a.edf")
    whole = read_record(path)
    np.testing.assert_allclose(whole.signal[1], -np.arange(320), rtol=1e-6)
    for start, duration in ((0, None), (3.25, 10), (39.9, None), (0.1, 0.2), (12, 1e300)):
        part = read_record(path, start_seconds=start, duration_seconds=duration)
        first = round(start * 8)
        stop = None if duration is None else first + round(min(duration, 100) * 8)
        np.testing.assert_array_equal(part.signal, whole.signal[:, first:stop])
        assert part.annotations[5].sample == whole.annotations[5].sample - first
    with pytest.raises(ValueError, match="ends at 40 s"):
        read_record(path, start_seconds=40)
    with pytest.raises(ValueError, match="ends at 40 s"):
        read_record(path, start_seconds=1e308)


def test_annotations_have_their_place_and_text(tmp_path):
    record = read_record(long_file(tmp_path / "a.edf", num_records=3))
    assert [(mark.sample, mark.symbol, mark.note) for mark in record.annotations] == [
        (4, '"', "beat 0"),
        (12, '"', "beat 1"),
        (20, '"', "beat 2"),
    ]


def test_durations_of_annotations_are_kept_where_they_are_stated(tmp_path):
    marks = lists(
        b"+0\x14\x14\0+0.5\x1530.25\x14AF\x14Holter\x14\0+1\x15\x14beat\x14\0+1\x14noise\x14\0+1\x150\x14x\x14\0"
    )
    record = read_record(write(tmp_path / "a.edf", [signal(data=DATA[:1, 0]), marks], kind="EDF+C"))
    assert [(mark.note, mark.duration_seconds) for mark in record.annotations] == [
        ("AF", 30.25), ("Holter", 30.25), ("beat", None), ("noise", None), ("x", 0.0)
    ]  # fmt: skip
    assert record.warnings == []


def test_annotations_count_from_the_first_data_record_and_may_share_a_time(tmp_path):
    marks = lists(
        b"+0.5\x14\x14\0-1\x14early\x14Vorhofflimmern \xc3\xa9\x14\0", b"+1.5\x14\x14Recording ends\x14\0+\x14bad\x14\0"
    )
    record = read_record(write(tmp_path / "a.edf", [signal(), marks], kind="EDF+C"))
    assert [(mark.sample, mark.note) for mark in record.annotations] == [
        (-6, "early"),
        (-6, "Vorhofflimmern é"),
        (4, "Recording ends"),
    ]
    assert record.warnings == ["1 annotations left out: not in the form of EDF+."]


def test_gaps_of_a_discontinuous_file_are_nan(tmp_path):
    path = long_file(tmp_path / "a.edf", num_records=3, kind="EDF+D", onsets=[0.25, 1.25, 4.25])
    record = read_record(path)
    expected = np.full(40, np.nan)
    expected[:16], expected[32:] = np.arange(16), np.arange(16, 24)
    np.testing.assert_allclose(record.signal[1], -expected, rtol=1e-6)
    assert [mark.sample for mark in record.annotations] == [4, 12, 36]
    part = read_record(path, start_seconds=1.5, duration_seconds=2.75)
    np.testing.assert_array_equal(part.signal, record.signal[:, 12:34])
    within = read_record(path, start_seconds=2.5, duration_seconds=1)
    assert np.isnan(within.signal).all() and within.signal.shape == (2, 8)


def test_a_continuous_file_ignores_times_and_says_where_they_have_gaps(tmp_path):
    record = read_record(long_file(tmp_path / "a.edf", num_records=3, kind="EDF+C", onsets=[0, 1, 40]))
    assert record.signal.shape == (2, 24) and "times with gaps" in str(record.warnings)
    assert not read_record(long_file(tmp_path / "b.edf", num_records=3, kind="EDF+C")).warnings


def test_overlapping_or_untimed_data_records_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="data record 3 begins before"):
        read_record(long_file(tmp_path / "a.edf", num_records=3, kind="EDF+D", onsets=[0, 1, 1.5]))
    untimed = lists(b"+0\x14\x14\0", b"")
    with pytest.raises(ValueError, match="1 data records .* no time"):
        read_record(write(tmp_path / "b.edf", [signal(), untimed], kind="EDF+D"))


def test_an_endless_gap_takes_no_memory(tmp_path):
    path = long_file(tmp_path / "a.edf", num_records=3, kind="EDF+D", onsets=[0, 1, 900000000])
    with pytest.raises(ValueError, match="in parts"):
        read_record(path)
    part = read_record(path, start_seconds=900000000, duration_seconds=1)
    np.testing.assert_allclose(part.signal[1], -np.arange(16, 24), rtol=1e-6)


def test_a_day_is_read_in_parts_without_loading_it(tmp_path):
    path = write(tmp_path / "day.edf", [signal("I", data=np.zeros((6000, 2500)))], seconds="10")  # 30 MB
    tracemalloc.start()
    record = read_record(path, start_seconds=50000, duration_seconds=10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert record.signal.shape == (1, 2500)
    assert peak < 12e6


# The patient


@pytest.mark.parametrize(
    "patient,recording,date,age,sex",
    [
        (PATIENT, RECORDING, "16.09.87", 50, "female"),
        ("X M 01-MAY-1951 X", RECORDING, "16.09.87", 51, "male"),
        ("X M 01-MAY-1951 X", "Startdate X X X X", "16.09.87", 36, "male"),
        ("X X X X", RECORDING, "16.09.87", None, None),
        ("X F 31-FEB-1951 X", RECORDING, "16.09.87", None, "female"),
        ("X F 01-MAY-1851 X", RECORDING, "16.09.87", None, "female"),
        ("", "", "", None, None),
    ],
)
def test_age_and_sex(tmp_path, patient, recording, date, age, sex):
    path = write(
        tmp_path / "a.edf",
        [signal(), lists(b"+0\x14\x14\0", b"+1\x14\x14\0")],
        kind="EDF+C",
        patient=patient,
        recording=recording,
        date=date,
    )
    record = read_record(path)
    assert (record.age, record.sex) == (age, sex)


def test_nothing_of_the_patient_is_kept(tmp_path):
    path = long_file(tmp_path / "a.edf")
    secrets = ("MCH-0234567", "Haagse", "1951", "2002", "PSG", "Telemetry", "20.35")
    assert not [secret for secret in secrets if secret in repr(vars(read_record(path)))]
    data = path.read_bytes()
    for cut in range(0, len(data), 97):
        path.write_bytes(data[:cut])
        said = outcome(path)
        assert not [secret for secret in secrets if secret in said]


# Damage


def outcome(path):
    """Read a file; return what is said. Anything but a sound record or a clear error fails the test."""
    try:
        record = edf_reader.read_edf(path, Stated())
    except (ValueError, OSError) as error:
        assert type(error) in (ValueError, FileNotFoundError, OSError), repr(error)
        assert str(path) in str(error)
        return str(error)
    assert isinstance(record, Record) and 0 < record.sampling_rate < 1e7
    assert record.signal.ndim == 2 and len(record.signal) == len(record.lead_names) > 0
    assert not np.isinf(record.signal).any()
    return repr(vars(record))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("edf") / "a.edf"
    return path, long_file(path, num_records=3, kind="EDF+D").read_bytes()


def test_a_file_cut_anywhere_ends_clearly(sound):
    path, data = sound
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        outcome(path)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_random_damage_ends_clearly(sound, seed, edits):
    path, data = sound
    rng, damaged = random.Random(seed), bytearray(data)
    for _ in range(edits):
        at = rng.choice([rng.randrange(256), rng.randrange(256, 1024), rng.randrange(len(data))])
        damaged[at] = rng.choice([*b" 0123456789-+.eE\0\x14\x15", rng.randrange(256)])
    path.write_bytes(damaged)
    outcome(path)


def test_the_published_annotation_file(real_ecg):
    """formats/edf/test_edfann.edf holds annotations only: a clear error. Its lists are parsed as they are written."""
    path = real_ecg / "formats" / "edf" / "test_edfann.edf"
    with pytest.raises(ValueError, match="no lead of an ECG among 1 signals"):
        read_record(path)
    lists, damaged = edf_reader._parse_lists(path.read_bytes()[512:])
    assert damaged == 0 and [mark[:2] for mark in lists[:3]] == [
        (0.0, ""),
        (0.0, "Sleep stage W"),
        (30.0, "Sleep stage W"),
    ]
    assert all(seconds for _, text, seconds in lists if text.startswith("Sleep stage"))
    assert len(lists) == path.read_bytes()[512:].count(b"\x14\0")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.edf")
    with pytest.raises(OSError, match="regular"):
        edf_reader.read_edf(tmp_path / "a.edf", Stated())


def test_a_blank_unit_is_asked_for_and_taken_from_the_caller(tmp_path):
    path = write(tmp_path / "a.edf", [signal(unit="")])
    with pytest.raises(ValueError, match="its unit is blank; pass units="):
        read_record(path)
    stated = read_record(write(tmp_path / "b.edf", [signal(unit="uV")]))
    np.testing.assert_array_equal(read_record(path, units="uV").signal, stated.signal)


def test_units_for_a_file_that_states_them_are_refused(tmp_path):
    with pytest.raises(ValueError, match="every signal states its own"):
        read_record(write(tmp_path / "a.edf", [signal()]), units="mV")
