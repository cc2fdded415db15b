"""Text tables and the ECGs of Apple's Health app: layouts, what has to be stated, and damaged files."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyecg_hf import csv_reader
from anyecg_hf.records import Record, Stated, read_record

# No file of the Health app is at hand. These follow examples that readers of such files publish, line by line: the
# order of the lines, the empty ones among them, "hertz", the German words, the no-break space and the decimal comma.
APPLE = """\
Name,Planted Patient
Date of Birth,"Feb 5, 1952"
Recorded Date,2020-02-05 09:14:40 -0400
Classification,Sinus Rhythm
Symptoms,
Software Version,1.51
Device,"Watch5,4"
Sample Rate,512.844 hertz


Lead,Lead I
Unit,µV

-48.673
-59.681
12
0.5
"""
APPLE_GERMAN = """\
Name
Geburtstag,"27.03.1987"
Aufzeichnungsdatum,2020-07-31 22:48:19 +0200
Klassifizierung,Sinusrhythmus
Symptome,
Softwareversion,1.13
Gerät,"Watch4,2"
Messrate,"511,562\xa0Hertz"


Ableitung,Ableitung I
Einheit,µV

-180,596
-199,83
-217
"""
STATED = {"sampling_rate": 500, "units": "mV"}


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def table(values, *, header, delimiter=",", decimal="."):
    rows = [delimiter.join(repr(float(value)).replace(".", decimal) for value in row) for row in values]
    return "\n".join([*header, *rows]) + "\n"


# Tables


@pytest.mark.parametrize("delimiter,decimal", [(",", "."), (";", "."), (";", ","), ("\t", "."), ("\t", ",")])
@pytest.mark.parametrize("header", ["time (s){0}I (mV){0}V1 [uV]", '"Time [s]"{0}"Lead I (mV)"{0}"V1 (µV)"'])
def test_the_first_row_says_leads_units_and_rate(tmp_path, delimiter, decimal, header):
    values = [[i / 250, i / 10, -100 * i] for i in range(10)]
    text = table(values, header=[header.format(delimiter)], delimiter=delimiter, decimal=decimal)
    record = read_record(write(tmp_path / "a.csv", text))
    assert (record.lead_names, record.sampling_rate, record.file_format) == (["I", "V1"], 250.0, "CSV")
    np.testing.assert_allclose(record.signal, [np.arange(10) / 10, np.arange(10) / -10], rtol=1e-6)
    assert record.signal.dtype == np.float32 and not record.warnings


@pytest.mark.parametrize(
    "name,scale", [("time (ms)", 1e3), ("time_ms", 1e3), ("seconds", 1), ("t [us]", 1e6), ("ms", 1e3)]
)
@pytest.mark.parametrize("rate", [100, 257.3, 360, 500, 1000])
def test_the_column_of_time_gives_the_rate(tmp_path, name, scale, rate):
    values = [[i / rate * scale, 0.1] for i in range(2000)]
    record = read_record(write(tmp_path / "a.csv", table(values, header=[f"{name},II (mV)"])))
    assert record.sampling_rate == pytest.approx(rate, rel=1e-9)


def test_times_without_a_unit_that_fit_the_stated_rate_in_none_are_said(tmp_path):
    path = write(tmp_path / "a.csv", table([[i * 0.004, 0.1] for i in range(500)], header=["time,II (mV)"]))
    assert read_record(path, sampling_rate=250).warnings == []
    assert "fits 500 Hz in no unit" in read_record(path, sampling_rate=500).warnings[0]


def test_times_written_with_few_digits_give_the_rate_meant(tmp_path):
    rows = [f"{i / 360:.3f},0.5" for i in range(3600)]
    assert read_record(write(tmp_path / "a.csv", "\n".join(["time (s),II (mV)", *rows]))).sampling_rate == 360.0


def test_the_caller_states_what_a_file_without_names_lacks(tmp_path):
    path = write(tmp_path / "a.csv", "1,2\n3,nan\n,-6e-1\n")
    record = read_record(path, lead_names=["I", "AVR"], sampling_rate=500, units="V")
    np.testing.assert_allclose(record.signal, [[1e3, 3e3, np.nan], [2e3, np.nan, -600]])
    assert record.lead_names == ["I", "aVR"]
    for missing in ("lead_names", "sampling_rate", "units"):
        stated = {"lead_names": ["I", "II"], **STATED}
        stated.pop(missing)
        with pytest.raises(ValueError, match=missing):
            read_record(path, **stated)


def test_a_second_row_may_hold_the_units(tmp_path):
    """As `rdsamp -c -H -v` of the WFDB tools writes it."""
    path = write(
        tmp_path / "a.csv", "'Elapsed time','MLII','V5'\n'seconds','mV','uV'\n0.000,-0.145,-65\n0.004,-0.1,0\n"
    )
    record = read_record(path)
    assert (record.lead_names, record.sampling_rate) == (["II", "V5"], 250.0)
    np.testing.assert_allclose(record.signal, [[-0.145, -0.1], [-0.065, 0]], rtol=1e-6)


def test_a_column_that_counts_is_passed_over(tmp_path):
    """As pandas writes a table with its index."""
    record = read_record(write(tmp_path / "a.csv", ",II,V1\n0,0.5,1\n1,0.6,2\n"), **STATED)
    np.testing.assert_allclose(record.signal, [[0.5, 0.6], [1, 2]])


def test_names_and_no_numbers_are_said_to_be_no_recording(tmp_path):
    """Found by fuzzing: the message was about start_seconds, which nobody had passed."""
    (tmp_path / "a.csv").write_bytes(b"titime,\xcc\xcc\xcc\xccI\x0b,2\n")
    with pytest.raises(ValueError, match=r"a\.csv: no row of numbers"):
        read_record(tmp_path / "a.csv", lead_names=["I", "II", "V1"], **STATED)


def test_other_columns_are_left_out_and_said(tmp_path):
    text = "time (s),II (mV),HR (bpm),label\n0,0.5,60,1\n0.01,0.5,60,1\n"
    record = read_record(write(tmp_path / "a.csv", text))
    assert record.lead_names == ["II"]
    assert record.warnings == [
        "column 3 left out: no lead and no voltage.",
        "column 4 left out: no lead and no voltage.",
    ]


def test_lead_names_may_be_stated_for_columns_of_unknown_names(tmp_path):
    path = write(tmp_path / "a.csv", "ch1,ch2\n1,2\n3,4\n")
    with pytest.raises(ValueError, match="pass lead_names"):
        read_record(path, **STATED)
    assert read_record(path, lead_names=["I", "II"], **STATED).lead_names == ["I", "II"]
    with pytest.raises(ValueError, match="3 lead_names for 2 columns"):
        read_record(path, lead_names=["I", "II", "III"], **STATED)


def test_a_column_called_ecg_is_taken(tmp_path):
    record = read_record(write(tmp_path / "a.csv", "ecg,resp\n1,2\n3,4\n"), **STATED)
    assert (record.lead_names, record.signal.tolist()) == (["ecg"], [[1, 3]])


@pytest.mark.parametrize(
    "text,stated,message",
    [
        ("I (mV)\n1\n2\n", {"sampling_rate": 500, "units": "uV"}, "unit passed"),
        ("I,II\n1,2\n", {"lead_names": ["II", "I"], **STATED}, "column 1 is lead I"),
        ("time (s),I\n0,1\n0.01,2\n", {"sampling_rate": 500, "units": "mV"}, "uneven"),
        ("I,II\n1,2\n", {"units": "mV"}, "sampling_rate"),
        ("time,I\n0,2\n1,2\n", {"units": "mV"}, "no unit; pass sampling_rate"),
        ("I,II\n1,2\n", {"sampling_rate": 500}, "units"),
        ("I,II\n1,2\n3\n5,6\n", STATED, "line 3 has not 2 cells"),
        ("I,II\n1,2\n3,x1\n", STATED, "line 3, column 2"),
        ("I,II\n1,2\n3,1_0\n", STATED, "line 3, column 2"),
        ("I,II\n1,2\n3,inf\n", STATED, "line 3, column 2"),
        ("I,II\n1,2\n3,1e999\n", STATED, "too large"),
        ("I;II\n1,5;2,5\n1.234,5;1\n", STATED, "line 3, column 1"),
        ("time (s),I (mV)\n0,1\n0,1\n", {}, "does not grow"),
        ("time (s),I (mV)\n0,1\n0.01,1\n0.02,1\n0.5,1\n0.51,1\n", {}, "uneven"),
        ("time (s),I (mV)\n0,1\nnan,1\n0.02,1\n", {}, "uneven"),
        ("0.5," * 5000 + "0.5\n", {"lead_names": ["I"], **STATED}, "rows are samples"),
    ],
)
def test_what_does_not_fit_is_said_with_its_place(tmp_path, text, stated, message):
    with pytest.raises(ValueError, match=rf"a\.csv: .*{message}"):
        read_record(write(tmp_path / "a.csv", text), **stated)


def test_a_last_line_that_was_cut_is_left_out_and_said(tmp_path):
    record = read_record(write(tmp_path / "a.csv", "I,II\n1,2\n3,4\n5"), **STATED)
    assert record.signal.shape == (2, 2) and "line 4" in record.warnings[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding, end):
    text = "# comment: Planted\nI (µV),II (µV)\n100,200\n300,400\n".replace("\n", end)
    record = read_record(write(tmp_path / "a.csv", text, encoding), sampling_rate=500)
    np.testing.assert_allclose(record.signal, [[0.1, 0.3], [0.2, 0.4]], rtol=1e-6)


def test_a_part_is_the_same_as_that_part_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_reader, "_BLOCK_ROWS", 7)
    path = write(tmp_path / "a.csv", table([[i / 100, i] for i in range(100)], header=["time (s),I (mV)"]))
    whole = read_record(path)
    assert whole.signal.shape == (1, 100)
    for start, duration in ((0, None), (0.33, 0.2), (0.99, None), (0.5, 1e300)):
        part = read_record(path, start_seconds=start, duration_seconds=duration)
        stop = None if duration is None else round(min(start + duration, 1) * 100)
        np.testing.assert_array_equal(part.signal, whole.signal[:, round(start * 100) : stop])
    for start in (1, 1e308):
        with pytest.raises(ValueError, match="ends at 1 s"):
            read_record(path, start_seconds=start)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Dear reader,\nthis is no table.\n",
        "a,b\nc,d\ne,f\n1,2\n",
        "[section]\nkey=1\n",
        '{"I": [1, 2]}',
        "1, 2\nthree\nfour\nfive\n",
    ],
)
def test_other_texts_are_not_taken_for_tables(text):
    assert not csv_reader.looks_like_a_table(text)


# Apple's Health app


def test_an_export_of_the_health_app(tmp_path):
    record = read_record(write(tmp_path / "ecg_2020-02-05.csv", APPLE))
    assert (record.sampling_rate, record.lead_names, record.age) == (512.844, ["I"], 68)
    assert record.statements == ["Sinus Rhythm"]
    np.testing.assert_allclose(record.signal, [[-0.048673, -0.059681, 0.012, 0.0005]], rtol=1e-6)


def test_an_export_in_german(tmp_path):
    record = read_record(write(tmp_path / "ecg_2020-07-31.csv", APPLE_GERMAN))
    assert (record.sampling_rate, record.lead_names, record.age) == (511.562, ["I"], 33)
    assert record.statements == ["Sinusrhythmus"]
    np.testing.assert_allclose(record.signal, [[-0.180596, -0.19983, -0.217]], rtol=1e-6)


@pytest.mark.parametrize(
    "birth,age",
    [
        ('"4 Jan 1992"', 28),
        ("1990-01-01", 30),
        ('"6 February 1952"', 67),
        ("3/4/1990", None),
        ("", None),
        ('"Feb 31, 1952"', None),
    ],
)
def test_the_birth_date_gives_the_age_where_it_has_one_reading(tmp_path, birth, age):
    text = APPLE.replace('"Feb 5, 1952"', birth)
    assert read_record(write(tmp_path / "a.csv", text)).age == age


def test_nothing_of_the_person_is_kept(tmp_path):
    for start in range(0, len(APPLE), 3):
        said = outcome(write(tmp_path / "a.csv", APPLE[:start] + APPLE[start + 5 :]), Stated())
        assert not [secret for secret in ("Planted", "Patient", "1952", "2020", "Watch") if secret in said]


def test_an_export_of_the_health_app_that_names_no_lead_is_an_error(tmp_path):
    without = "\n".join(line for line in APPLE.splitlines() if line.strip() and not line.startswith("Lead")) + "\n"
    with pytest.raises(ValueError, match="names the lead"):
        read_record(write(tmp_path / "a.csv", without))


@pytest.mark.filterwarnings("error")
def test_the_file_is_closed_after_reading(tmp_path):
    read_record(write(tmp_path / "a.csv", APPLE))


def test_the_file_says_rate_and_unit_itself(tmp_path):
    path = write(tmp_path / "a.csv", APPLE)
    with pytest.raises(ValueError, match="units was passed"):
        read_record(path, units="mV")
    with pytest.raises(ValueError, match="sampling_rate was passed"):
        read_record(path, sampling_rate=500)


# Damage


def outcome(path, stated):
    """Read a file; return what is said. Anything but a sound record or a clear error fails the test."""
    try:
        record = csv_reader.read_csv(path, stated)
    except (ValueError, OSError) as error:
        assert type(error) in (ValueError, OSError), repr(error)
        assert str(path) in str(error) or "start_seconds" in str(error)
        return str(error)
    assert isinstance(record, Record) and 0 < record.sampling_rate < 1e7
    assert record.signal.ndim == 2 and len(record.signal) == len(record.lead_names) > 0
    assert not np.isinf(record.signal).any()
    return repr(vars(record))


SOUND = [APPLE, APPLE_GERMAN, table([[i / 100, i, -i] for i in range(30)], header=["time (s),I (mV),II (mV)"])]


@pytest.mark.parametrize("text", SOUND)
def test_a_file_cut_anywhere_ends_clearly(tmp_path, text):
    for cut in range(len(text.encode())):
        (tmp_path / "a.csv").write_bytes(text.encode()[:cut])
        outcome(tmp_path / "a.csv", Stated())


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SOUND), st.integers(0, 2**32), st.integers(1, 8))
def test_random_damage_ends_clearly(tmp_path_factory, text, seed, edits):
    rng, damaged = random.Random(seed), bytearray(text.encode())
    for _ in range(edits):
        damaged[rng.randrange(len(damaged))] = rng.choice([*b"\0\n\r,;\t\"()[]-.e0 '#", rng.randrange(256)])
    path = tmp_path_factory.getbasetemp() / "damaged.csv"
    path.write_bytes(damaged)
    csv_reader.looks_like_a_table(damaged.decode("utf-8", errors="replace"))
    outcome(path, Stated())
    outcome(path, Stated(sampling_rate=100, lead_names=("I", "II"), units="mV"))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_any_text_ends_clearly(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.csv"
    path.write_bytes(text.encode("utf-8", errors="replace"))
    csv_reader.looks_like_a_table(text)
    outcome(path, Stated(sampling_rate=100, lead_names=("I",), units="mV"))


@pytest.mark.parametrize(
    "text", ["(" * 8000 + ")", "[" * 4000 + " " * 4000, " " * 8000 + "x", "1" * 8000, '"' * 8001, "-" * 8000]
)
def test_long_lines_take_no_time(tmp_path, text):
    write(tmp_path / "a.csv", "\n".join(["I,II"] + [text] * 200))
    outcome(tmp_path / "a.csv", Stated(sampling_rate=100, units="mV"))
    csv_reader.looks_like_a_table(text)
