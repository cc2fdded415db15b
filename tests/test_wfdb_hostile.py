"""Unusual, damaged and hostile WFDB records, by class: each is read exactly, read exactly with a warning, or clearly refused.

The base is two leads of four samples. A case replaces parts of its header or its data; see `CASES`.
"""

import os
import random
import re
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from said import said
from wfdb_files import BITS, check_sum, encode, write_record
from work import count_calls

from anyecg_hf.records import Record, read_record

ROWS = [[100, 0, -32768, 50], [-200, 3, 7, 50]]
DATA = encode(16, [value for frame in zip(*ROWS) for value in frame])
HEADER = """r 2 500 4
r.dat 16 100/mV 16 0 100 32918 0 I
r.dat 16 100/mV 16 0 -200 65396 0 V1
# Age: 60
"""
NAN = float("nan")
VALUES = [[1, 0, NAN, 0.5], [-2, 0.03, 0.07, 0.5]]
EXACT, SAID = "exact", "exact and said"  # the other ending is the text that the error has to hold


def scaled(factor, row=0):
    """The base's values with one row multiplied."""
    return [[value * (factor if index == row else 1) for value in values] for index, values in enumerate(VALUES)]


# class -> cases (what is replaced, by what, ending, values if they are not the base's). "" is replaced by a whole header.
FIRST = "r 2 500 4"
GAIN = "r.dat 16 100/mV 16 0 100 32918 0 I"
CASES = {
    "layout": [
        ("r.dat 16 100", "r.dat 16:1 100", EXACT, [[0, NAN, 0.5, NAN], VALUES[1]], 1),
        ("r.dat 16 ", "r.dat 16:1 ", EXACT, [[0, NAN, 0.5, NAN], [0.03, 0.07, 0.5, NAN]]),
        ("r.dat 16 100", "r.dat 16:4 100", SAID, [[NAN] * 4, VALUES[1]], 1),
        ("r.dat 16 100", "r.dat 16:999999999 100", SAID, [[NAN] * 4, VALUES[1]], 1),
        ("r.dat 16 100", "r.dat 16:9999999999 100", "format", None, 1),
        ("r.dat 16 100", "r.dat 16:-1 100", "format", None, 1),
        ("r.dat 16 100", "r.dat 16:1.5 100", "format", None, 1),
        ("r.dat 16 100", "r.dat 16: 100", "format", None, 1),
        ("r.dat 16 ", "r.dat 16+0 ", EXACT),
        ("r.dat 16 ", "r.dat 16+8 ", SAID, [[NAN, 0.5], [0.07, 0.5]]),
        ("r.dat 16 ", "r.dat 16+16 ", "cut or empty"),
        ("r.dat 16 ", "r.dat 16+999999999999999999 ", "cut or empty"),
        ("r.dat 16 ", "r.dat 16+-8 ", "format"),
        ("r.dat 16 100", "r.dat 16+8 100", "different formats or offsets", None, 1),
        ("r.dat 16 100", "r.dat 61 100", "different formats or offsets", None, 1),
        ("r.dat 16 ", "r.dat 16x2 ", SAID, [[1, -2, NAN, 0.07], [0, 0.03, 0.5, 0.5]]),
        ("r.dat 16 ", "r.dat 16x0 ", "0 samples per frame"),
        ("r.dat 16 ", "r.dat 16x999999999 ", "cut or empty"),
        ("r.dat 16 ", "r.dat 16x9999999999 ", "format"),
        ("r.dat 16 ", "r.dat 16x ", "format"),
        ("r.dat 16 ", "r.dat 16x1:0+0 ", EXACT),
        ("r.dat 16 ", "r.dat 16+0x1 ", "format"),
        ("r.dat 16 ", "r.dat x16 ", "format"),
        ("r.dat 16 ", "r.dat 16.0 ", "format"),
        ("r.dat 16 ", "r.dat -16 ", "format"),
        ("r.dat 16 ", "r.dat 17 ", "format 17 is unknown"),
        ("r.dat 16 ", "r.dat 0 ", "no voltage with data"),
        ("r.dat 16 100", "r.dat 0 100", SAID, [[1, -2, 0, 0.03]], 1),
        ("r.dat 16 ", "r.dat 508 ", "FLAC"),
        ("r.dat 16 ", "r.dat 516+8 ", "FLAC"),
    ],
    "gain, base line, units": [
        ("100/mV", "100(0)/mV", EXACT),
        ("100/mV", "1e2/mV", EXACT),
        ("100/mV", "+100./mV", EXACT),
        ("100/mV", ".1e3/mV", EXACT),
        ("100/mV", "100", EXACT),
        ("100/mV", "100(0)", EXACT),
        ("100/mV", "-100/mV", EXACT, (-np.array(VALUES)).tolist()),
        ("100/mV 16", "100(100)/mV 16", EXACT, [[0, -1, NAN, -0.5], VALUES[1]], 1),
        ("100/mV 16", "100(-100)/mV 16", EXACT, [[2, 1, NAN, 1.5], VALUES[1]], 1),
        ("16 0 100", "16 100 100", EXACT, [[0, -1, NAN, -0.5], VALUES[1]]),
        ("100/mV 16 0 100", "100(0)/mV 16 100 100", EXACT),
        ("100/mV", "0", SAID, (np.array(VALUES) / 2).tolist()),
        ("100/mV", "0/mV", SAID, (np.array(VALUES) / 2).tolist()),
        ("100/mV", "0(0)/uV", SAID, (np.array(VALUES) / 2000).tolist()),
        ("100/mV", "", "whole number"),
        ("100/mV", "nan/mV", "gain"),
        ("100/mV", "inf/mV", "gain"),
        ("100/mV", "-inf/mV", "gain"),
        ("100/mV", "1e999/mV", "not finite"),
        ("100/mV", "1e-300/mV", "too large to be true"),
        ("100/mV", "1e-30/mV", "too large to be true"),
        ("100/mV", "1e-10/mV", SAID, (np.array(VALUES) * 1e12).tolist()),
        ("100/mV", "1e100/mV", SAID, (np.array(VALUES) * 0).tolist()),
        ("100/mV", "100,0/mV", "gain"),
        ("100/mV", "1 00/mV", "gain|whole number"),
        ("100/mV", "0x64/mV", "gain"),
        ("100/mV", "100mV", "gain"),
        ("100/mV", "mV", "gain"),
        ("100/mV", "100()/mV", "gain"),
        ("100/mV", "100(0/mV", "gain"),
        ("100/mV", "100(1.5)/mV", "gain"),
        ("100/mV", "100(nan)/mV", "gain"),
        ("100/mV", "100(9999999999)/mV", "32 bits"),
        ("100/mV", "100(99999999999999999999)/mV", "gain"),
        ("100/mV 16 0", "100/mV 16 9999999999", "32 bits"),
        ("100/mV", "100/", "gain"),
        ("100/mV", "\u0661\u0660\u0660/mV", "gain"),
        ("100/mV", "100/mv", EXACT),
        ("100/mV", "100/uV", EXACT, (np.array(VALUES) / 1e3).tolist()),
        ("100/mV 16 0 100", "100/\u00b5V 16 0 100", EXACT, scaled(1e-3)),
        ("100/mV 16 0 100", "100/\u03bcV 16 0 100", EXACT, scaled(1e-3)),
        ("100/mV 16 0 100", "100/V 16 0 100", EXACT, scaled(1e3)),
        ("100/mV 16 0 100", "1/nV 16 0 100", EXACT, scaled(1e-4)),
        ("100/mV 16 0 100", "100/mmHg 16 0 100", SAID, VALUES[1:]),
        ("100/mV 16 0 100", "100/\u00b0C 16 0 100", SAID, VALUES[1:]),
        ("100/mV 16 0 100", "100/mV/s 16 0 100", SAID, VALUES[1:]),
        ("100/mV 16 0 100", "100/MV 16 0 100", EXACT),
        ("100/mV", "100/NU", "no voltage"),
    ],
    "header text": [
        ("", "", "no record line"),
        ("", "\n\n", "no record line"),
        ("", "# nothing\n", "no record line"),
        ("", "\0" * 100, "no record line"),
        ("", "r", "no record line"),
        ("", "r 2 500 4\n", "2 signals announced, 0 signal lines"),
        ("", "r 0 500 4\n", "at least 1"),
        ("", "x" * 1_000_001, "larger than"),
        ("", "x" * 900_000, "no record line"),
        ("", "9" * 900_000 + " 1 1", "signals announced"),
        ("", "r 1 500 4\n" + "r" * 900_000 + " 16\n", "not found"),
        (FIRST, "r 2 500 4 ", EXACT),
        (FIRST, "\n\n  r\t2  500 4", EXACT),
        (FIRST, "# first a comment\nr 2 500 4", EXACT),
        (FIRST, "other 2 500 4", EXACT),
        (FIRST, "a/b 2 500 4", EXACT),
        (FIRST, "r.mat 2 500 4", EXACT),
        (FIRST, "r 2 500/1000(5) 4", EXACT),
        (FIRST, "r 2 5e2 4", EXACT),
        (FIRST, "r 2 500.0 4", EXACT),
        (FIRST, "r 2 500 4 10:00:00", EXACT),
        (FIRST, "r 2 500 4 10:00:00.123 05/06/1990", EXACT),
        (FIRST, "r 2 500 4 05-May-2020 09:49:17", EXACT),
        (FIRST, "r 2 500 4 31:51.982", EXACT),
        (FIRST, "r 2 500 4 25:00:00", SAID),
        (FIRST, "r 2 500 4 10:61:00", SAID),
        (FIRST, "r 2 500 4 10:00:00 32/01/1990", SAID),
        (FIRST, "r 2 500 4 10:00:00 01/13/1990", SAID),
        (FIRST, "r 2 500 4 noon", SAID),
        (FIRST, "r 2", SAID),
        (FIRST, "r 2 500", EXACT),
        (FIRST, "r 2 500 0", EXACT),
        (FIRST, "r two 500 4", "number of signals"),
        (FIRST, "r 2.0 500 4", "number of signals"),
        (FIRST, "r -2 500 4", "at least 1"),
        (FIRST, "r 1 500 4", "1 signals announced, 2"),
        (FIRST, "r 3 500 4", "3 signals announced, 2"),
        (FIRST, "r 99999999999999999999 500 4", "number of signals"),
        (FIRST, "r 2 0 4", "above zero"),
        (FIRST, "r 2 -500 4", "above zero"),
        (FIRST, "r 2 nan 4", "sampling rate"),
        (FIRST, "r 2 inf 4", "sampling rate"),
        (FIRST, "r 2 1e300 4", "above zero"),
        (FIRST, "r 2 500e6 4", SAID),
        (FIRST, "r 2 1e-300 4", "above zero"),
        (FIRST, "r 2 500Hz 4", "sampling rate"),
        (FIRST, "r 2 500,0 4", "sampling rate"),
        (FIRST, "r 2 500/ 4", "sampling rate"),
        (FIRST, "r 2 500/x 4", "sampling rate"),
        (FIRST, "r 2 5_00 4", "sampling rate"),
        (FIRST, "r 2 500 4.0", "number of samples"),
        (FIRST, "r 2 500 4_0", "number of samples"),
        (FIRST, "r 2 500 -4", "at least 0"),
        (FIRST, "r 2 500 0x4", "number of samples"),
        (FIRST, "r 2 500 \u0664", "number of samples"),
        (FIRST, "r/2 2 500 4", "fields"),
        ("16 0 100 32918 0 I", "16 0 100 32918 I", "whole number"),
        ("16 0 100 32918 0 I", "16 0 I", "whole number"),
        ("16 0 100 32918 0 I", "16.0 0 100 32918 0 I", "whole number"),
        ("16 0 100 32918 0 I", "16 0 1e2 32918 0 I", "whole number"),
        ("16 0 100 32918 0 I", "16 0 100 0xFF 0 I", "whole number"),
        ("16 0 100 32918 0 I", "16 0 +100 +32918 0 I", EXACT),
        (GAIN, "r.dat", "no signal line"),
        (GAIN, "r.dat 16", SAID, scaled(0.5)),
        (GAIN, "r.dat 16 100/mV", EXACT),
    ],
    "data and check sums": [
        (" 32918 ", " -32618 ", EXACT),
        (" 65396 ", " -140 ", EXACT),
        (" 32918 ", " 98454 ", EXACT),
        (" 32918 ", " 32919 ", SAID),
        (" 32918 ", " 0 ", SAID),
        (" 0 100 ", " 0 101 ", SAID),
        (" 0 100 ", " 0 99999999999 ", SAID),
        (" 0 100 ", " 0 0 ", EXACT),
        (" 0 100 32918 0 I", " 0 0", SAID),
        (" 0 -200 ", " 0 200 ", SAID),
        (FIRST, "r 2 500 3", SAID, [row[:3] for row in VALUES]),
        (FIRST, "r 2 500 1", SAID, [row[:1] for row in VALUES]),
        (FIRST, "r 2 500 5", SAID),
        (" 32918 0 I\nr.dat", " 32918 0 I\ns.dat", "s.dat"),
        ("r.dat", "r.hea.dat", "r.hea.dat"),
    ],
    "announced sizes": [
        (FIRST, f"r 2 500 {10**9}", SAID),
        (FIRST, f"r 2 500 {10**17}", SAID),
        (FIRST, f"r 2 500 {10**19}", "number of samples"),
        (FIRST, f"r {10**9} 500 4", "signals announced"),
        (FIRST, f"r/{10**9} 2 500 4", "segments announced"),
        (FIRST, f"r/{10**17} 2 500 4", "segments announced"),
        (FIRST, f"r/{10**19} 2 500 4", "number of segments"),
        ("r.dat 16 100", "r.dat 16x1000000 100", "cut or empty", None, 1),
    ],
    "lead names and comments": [
        ("0 I\n", "0 Lead I\n", EXACT),
        ("0 I\n", "0\n", EXACT),
        ("0 I\n", "0 V1\n", SAID),
        ("0 I\n", "0 a name of several words, with commas\n", EXACT),
        ("0 I\n", "0 \u5bfc\u8054 \U0001f493\n", EXACT),
        ("0 I\n", "0 " + "x" * 100_000 + "\n", EXACT),
        ("# Age: 60", "# Age: 60\u2028# Sex: M\x85 Dx: 1\n#\n##\n#", EXACT),
        ("# Age: 60", "#Age:" + " " * 100_000 + "60", EXACT),
        ("# Age: 60", "#Age: " + "9" * 100_000, EXACT),
        ("# Age: 60", "#" + "age " * 100_000, EXACT),
        ("# Age: 60", "#" + "Dx: " * 100_000, EXACT),
    ],
    "security": [
        *(
            ("r.dat", name, "no plain file name")
            for name in (
                "../r.dat", "/etc/passwd", "./r.dat", "sub/r.dat", "..", ".", "-", "\\\\host\\r.dat", "C:r.dat",
                "http://host/r.dat", "https://host/r.dat", "ftp://host/r.dat", "file:///etc/passwd", "s3://b/r.dat",
                "zip://r.dat::r.zip", "simplecache::http://h/r.dat", "r.dat\0", "\0",
            )
        ),
        *(
            ("r.dat", name, "not found|not a regular file|leads out")
            for name in ("|ls", "`id`", "$(id)", "~", "~root", "*", "r.da?", "%2e%2e%2fr.dat", "pipe", "folder", "link", "loop")
        ),
    ],
}  # fmt: skip
ALL = [(kind, *case) for kind, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case[0]}: {case[1][:20]!r} -> {case[2][:40]!r}")
def test_each_case_ends_as_it_should(tmp_path, case):
    _, old, new, ending, values, count = (*case, *(None, -1)[len(case) - 4 :])
    (tmp_path / "r.dat").write_bytes(DATA)
    hostile_neighbours(tmp_path)
    assert old in HEADER
    text = HEADER.replace(old, new, count) if old else new
    (tmp_path / "r.hea").write_bytes(text.encode())
    tracemalloc.start()
    if ending not in (EXACT, SAID):
        with pytest.raises((ValueError, OSError, ImportError), match=ending) as error:
            read_record(tmp_path / "r.hea")
        assert not isinstance(error.value, UnicodeError) and str(tmp_path) in str(error.value)
    else:
        record = read_record(tmp_path / "r.hea")
        expected = np.array(VALUES if values is None else values)
        np.testing.assert_allclose(record.signal, expected, rtol=1e-6, atol=1e-30)
        assert bool(said(record)) == (ending == SAID), said(record)
        assert len(record.lead_names) == len(record.signal)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def hostile_neighbours(folder):
    """Put a pipe, a folder, and links that lead out or in circles beside the record."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "loop").symlink_to(folder / "loop")


def test_there_are_enough_cases():
    assert len(ALL) > 180


@pytest.mark.parametrize("name", ["pipe", "folder", "link", "loop"])
def test_a_header_that_is_no_file_of_its_folder_is_refused(tmp_path, name):
    hostile_neighbours(tmp_path)
    (tmp_path / name).rename(tmp_path / "x.hea")
    with pytest.raises(OSError, match="x.hea"):
        read_record(tmp_path / "x.hea")


# Storage formats


@pytest.mark.parametrize("form", sorted(BITS))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_format_is_read_whole_and_in_parts(tmp_path_factory, form, data):
    folder, low = tmp_path_factory.mktemp("form"), -(2 ** (BITS[form] - 1))
    per_frame, num_leads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    num_samples = per_frame * data.draw(st.integers(1, 9))
    value = st.integers(-60, 60) if form == 8 else st.integers(low, -low - 1)
    rows = [data.draw(st.lists(value, min_size=num_samples, max_size=num_samples)) for _ in range(num_leads)]
    path = write_record(folder, rows, form=form, per_frame=per_frame, gain="1(0)/mV")
    record = read_record(path)
    expected = np.array(rows, np.float64)
    expected[(expected == low) & (form != 8)] = np.nan
    np.testing.assert_array_equal(record.signal, expected.astype(np.float32))
    assert said(record) == []
    start = data.draw(st.integers(0, num_samples - 1))
    length = data.draw(st.integers(1, num_samples))
    rate = record.sampling_rate
    part = read_record(path, start_seconds=start / rate, duration_seconds=length / rate)
    np.testing.assert_array_equal(part.signal, record.signal[:, start : start + length])
    assert said(part) == []


@pytest.mark.parametrize("form", sorted(BITS))
def test_every_format_is_read_as_far_as_a_cut_file_goes(tmp_path, form):
    values = [0, 1, -2, 3, -4, 5, -6, 7, -8, 9, -10]
    path = write_record(tmp_path, [values], form=form, gain="1/mV")
    content = (tmp_path / "r.dat").read_bytes()
    for size in range(len(content)):
        (tmp_path / "r.dat").write_bytes(content[:size])
        try:
            record = read_record(path)
        except ValueError as error:
            assert "cut or empty" in str(error) and size < 8
        else:
            assert record.signal[0].tolist() == values[: record.signal.shape[1]]
            assert "ends early" in record.warnings[0] and record.signal.shape[1] < len(values)


@pytest.mark.parametrize("bits, form", [(8, 508), (16, 516), (24, 524)])
def test_flac_is_read_whole_in_parts_and_refused_when_cut(tmp_path, bits, form):
    soundfile = pytest.importorskip("soundfile")
    values = np.random.default_rng(0).integers(-100, 100, (5000, 2)).astype(np.int32)
    subtype = {8: "PCM_S8", 16: "PCM_16", 24: "PCM_24"}[bits]
    soundfile.write(tmp_path / "r.dat", values << (32 - bits), 500, format="FLAC", subtype=subtype)
    lines = []
    for row, lead in zip(values.T.tolist(), ("I", "V1")):
        lines.append(f"r.dat {form} 1/mV {bits} 0 {row[0]} {check_sum(row)} 0 {lead}")
    (tmp_path / "r.hea").write_text("\n".join(["r 2 500 5000", *lines]))
    record = read_record(tmp_path / "r")
    np.testing.assert_array_equal(record.signal, values.T)
    part = read_record(tmp_path / "r", start_seconds=2, duration_seconds=3)
    np.testing.assert_array_equal(part.signal, values.T[:, 1000:2500])
    assert said(record) == said(part) == []
    content = (tmp_path / "r.dat").read_bytes()
    for size in range(0, len(content), 97):
        (tmp_path / "r.dat").write_bytes(content[:size])
        try:
            record = read_record(tmp_path / "r")
        except (ValueError, OSError) as error:
            assert str(tmp_path) in str(error)
        else:
            assert record.warnings
            same = record.signal == values.T[:, : record.signal.shape[1]]
            assert (same | np.isnan(record.signal)).all()


@pytest.mark.parametrize("num_channels", [1, 3])
def test_flac_of_which_nothing_can_be_decoded_is_refused(tmp_path, num_channels):
    """Found by fuzzing: with bytes put into its comment block, the decoder gives nothing and no error."""
    soundfile = pytest.importorskip("soundfile")
    values = np.random.default_rng(0).integers(-100, 100, (50_000, num_channels)).astype(np.int16)
    soundfile.write(tmp_path / "r.dat", values, 500, format="FLAC", subtype="PCM_16")
    content = (tmp_path / "r.dat").read_bytes()
    (tmp_path / "r.dat").write_bytes(content.replace(b"reference libFL", b"reference libFL\xff\xff\xff\xff\xff"))
    (tmp_path / "r.hea").write_text(f"r {num_channels} 500 50000\n" + "r.dat 516 1/mV\n" * num_channels)
    with pytest.raises(ValueError, match="r.dat: damaged, of 50000 samples none"):
        read_record(tmp_path / "r")


def test_flac_of_other_depth_or_number_of_channels_than_announced_is_refused(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "r.raw", np.zeros((50, 2), np.int16), 500, format="FLAC", subtype="PCM_16")
    for form, num_signals in ((508, 2), (524, 2), (516, 1), (516, 3)):
        (tmp_path / "r.hea").write_text(f"r {num_signals} 500 50\n" + f"r.raw {form} 1/mV\n" * num_signals)
        with pytest.raises(ValueError, match="FLAC, PCM_16 in 2 channels; the header says"):
            read_record(tmp_path / "r")


def test_flac_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "r.dat").write_bytes(b"fLaC")
    (tmp_path / "r.hea").write_text("r 1 500 50\nr.dat 516 1/mV\n")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match=r'pip install "anyecg-hf\[formats\]"'):
        read_record(tmp_path / "r")


def test_a_constant_flac_signal_of_hours_is_bounded(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    with soundfile.SoundFile(tmp_path / "r.dat", "w", 500, 1, "PCM_16", format="FLAC") as file:
        for _ in range(40):
            file.write(np.zeros(1_000_000, np.int16))
    (tmp_path / "r.hea").write_text("r 1 500 40000000\nr.dat 516 1/mV 16 0 0 0 0 I\n")
    with pytest.raises(ValueError, match="40000000 values announced"):
        read_record(tmp_path / "r")
    assert read_record(tmp_path / "r", start_seconds=70_000, duration_seconds=2).signal.shape == (1, 1000)


# Layout


def test_two_files_of_different_formats_signals_of_a_file_apart(tmp_path):
    (tmp_path / "a.dat").write_bytes(encode(212, [1, 2, 3, 4, 5, 6]))
    (tmp_path / "b.dat").write_bytes(encode(80, [7, 8, 9]))
    text = "r 3 500 3\na.dat 212 1/mV 12 0 1 9 0 I\nb.dat 80 1/mV 8 0 7 24 0 II\na.dat 212 1/mV 12 0 2 12 0 V1\n"
    (tmp_path / "r.hea").write_text(text)
    record = read_record(tmp_path / "r")
    assert record.signal.tolist() == [[1, 3, 5], [7, 8, 9], [2, 4, 6]] and record.warnings == []


def test_files_of_different_lengths_are_said(tmp_path):
    (tmp_path / "a.dat").write_bytes(encode(16, [1, 2, 3]))
    (tmp_path / "b.dat").write_bytes(encode(16, [7, 8]))
    (tmp_path / "r.hea").write_text("r 2 500\na.dat 16 1/mV 16 0 1 6 0 I\nb.dat 16 1/mV 16 0 7 15 0 II\n")
    record = read_record(tmp_path / "r")
    np.testing.assert_array_equal(record.signal, [[1, 2, 3], [7, 8, np.nan]])
    assert len(record.warnings) == 1 and "ends early" in record.warnings[0]


@pytest.mark.parametrize("form, surplus", [(212, 1), (310, 1), (311, 2)])
def test_a_last_group_filled_up_is_no_surplus(tmp_path, form, surplus):
    path = write_record(tmp_path, [[5] * 7], form=form)
    (tmp_path / "r.dat").write_bytes(encode(form, [5] * 7 + [0] * surplus))
    assert read_record(path).warnings == []
    (tmp_path / "r.dat").write_bytes(encode(form, [5] * 13))
    assert "holds 13 samples; read as announced: 7" in read_record(path).warnings[0]


def test_a_file_without_announced_length_that_ends_within_a_frame_is_said(tmp_path):
    (tmp_path / "r.dat").write_bytes(encode(16, [1, 2, 3]))
    (tmp_path / "r.hea").write_text("r 2 500\nr.dat 16 1/mV 16 0\nr.dat 16 1/mV 16 0\n")
    record = read_record(tmp_path / "r")
    assert record.signal.tolist() == [[1], [2]] and "within a frame" in record.warnings[0]


def test_a_file_of_a_terabyte_is_read_in_parts_only(tmp_path):
    with open(tmp_path / "r.dat", "wb") as file:
        file.truncate(2**40)  # a sparse file: nothing is written
    (tmp_path / "r.hea").write_text("r 1 500\nr.dat 16 1/mV 16 0\n")
    with pytest.raises(ValueError, match="read it in parts"):
        read_record(tmp_path / "r")
    assert read_record(tmp_path / "r", start_seconds=1e9, duration_seconds=1).signal.shape == (1, 500)


def test_the_file_of_a_signal_that_is_left_out_need_not_be_there(tmp_path):
    path = write_record(tmp_path, [[1, 2, 3]])
    path.write_text(path.read_text().replace("r 1", "r 2") + "absent.dat 16 1/mmHg 16 0 0 0 0 ABP\n")
    assert read_record(path).signal.shape == (1, 3)


def test_many_signals_of_one_long_file_and_tiny_others_take_no_memory(tmp_path):
    (tmp_path / "long.dat").write_bytes(bytes(400_000))
    lines = ["long.dat 80 1/mV"]
    for index in range(1000):
        (tmp_path / f"t{index}").write_bytes(b"\0")
        lines.append(f"t{index} 80 1/mV")
    (tmp_path / "r.hea").write_text("\n".join([f"r {len(lines)} 500", *lines]))
    with pytest.raises(ValueError, match="values announced"):
        read_record(tmp_path / "r")


def test_skews_are_taken_out_of_parts_too(tmp_path):
    rows = [list(range(100)), list(range(100, 200))]
    path = write_record(tmp_path, rows, gain="1/mV")
    path.write_text(path.read_text().replace("r.dat 16", "r.dat 16:3", 1).replace("r.dat 16 ", "r.dat 16:7 "))
    whole = read_record(path).signal
    np.testing.assert_array_equal(whole[0], [*range(3, 100), *[np.nan] * 3])
    np.testing.assert_array_equal(whole[1], [*range(107, 200), *[np.nan] * 7])
    for start, length in ((0, 10), (50, 10), (85, 10), (95, 5), (99, 1)):
        part = read_record(path, start_seconds=start / 500, duration_seconds=length / 500)
        np.testing.assert_array_equal(part.signal, whole[:, start : start + length])


@pytest.mark.parametrize("seconds", [{"start_seconds": 1e308}, {"start_seconds": 2}, {"duration_seconds": 1e-9}])
def test_a_part_that_holds_nothing_is_refused(tmp_path, seconds):
    with pytest.raises(ValueError, match="start_seconds|duration_seconds"):
        read_record(write_record(tmp_path, [[1, 2, 3]]), **seconds)


def test_an_hour_of_a_day_is_read_without_the_day(tmp_path):
    path, num_frames = tmp_path / "day.hea", 86_400 * 500
    lines = ["day.dat 16 1000/mV 16 0 0 0 0 V1"] * 12
    path.write_text("\n".join([f"day 12 500 {num_frames}", *lines]))
    with open(tmp_path / "day.dat", "wb") as file:
        file.truncate(num_frames * 24)  # a sparse file: nothing is written
    tracemalloc.start()
    record = read_record(path, start_seconds=3600 * 23, duration_seconds=60)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()
    assert record.signal.shape == (12, 30_000)


def test_the_work_for_a_header_of_ten_thousand_signals_grows_as_their_number(tmp_path):
    def read(num_signals):
        (tmp_path / "r.dat").write_bytes(bytes(2 * num_signals * 50))
        (tmp_path / "r.hea").write_text(f"r {num_signals} 500 50\n" + "r.dat 16 1 9 0 0 0 0 s\n" * num_signals)
        record = read_record(tmp_path / "r")
        assert record.signal.shape == (num_signals, 50) and len(set(record.lead_names)) == num_signals
        assert len(record.warnings) == 1 and "bear one name" in record.warnings[0]

    assert count_calls(lambda: read(10_000)) < 11 * count_calls(lambda: read(1_000))


# What is private


def test_nothing_of_comments_dates_and_misplaced_text_reaches_a_message(tmp_path):
    private = [
        "# Name: PLANTED",
        "# PLANTED 1 2 3",
        "PLANTED PLANTED",
        "PLANTED 16 PLANTED",
        "r.dat PLANTED",
        "r.dat 16 PLANTED",
    ]
    for line in [*private, "r 2 PLANTED", "r 2 500 4 PLANTED", "r PLANTED", "r.dat 16 1/mV 16 PLANTED"]:
        for text in (HEADER + line, line + "\n" + HEADER, HEADER.replace(FIRST, line), HEADER.replace(GAIN, line)):
            (tmp_path / "r.dat").write_bytes(DATA)
            (tmp_path / "r.hea").write_text(text)
            try:
                record = read_record(tmp_path / "r.hea")
            except (ValueError, OSError) as error:
                assert "PLANTED" not in str(error).replace("data file PLANTED", "").replace(f"{tmp_path}/PLANTED", "")
            else:
                assert "PLANTED" not in repr(record) + "".join(record.warnings)


# Random damage


def valid_records(folder):
    """Nine valid records; the paths of their headers."""
    rng = random.Random(1)
    for index, form in enumerate((16, 212, 80, 310, 311, 8, 61, 160)):
        spread = 20 if form == 8 else 2 ** (BITS[form] - 2)
        rows = [[rng.randrange(-spread, spread) for _ in range(12)] for _ in range(2)]
        (folder / str(index)).mkdir()
        yield write_record(folder / str(index), rows, form=form, per_frame=1 + index % 2)
    (folder / "8").mkdir()
    path = write_record(folder / "8", [[1, 2, 3, 4], [5, 6, 7, 8]], name="a")
    (folder / "8" / "r.hea").write_text("r/2 2 500 8\na 4\na 4\n# Age: 60\n")
    yield path.with_name("r.hea")


def mutate(rng, content):
    """Return bytes with 1 to 4 edits: a byte replaced, taken out or put in."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content) + 1)
        new = bytes(
            [rng.choice(b"0123456789 -+.:/()xeE~#\n\r\t\0\xb5aV") if rng.random() < 0.8 else rng.randrange(256)]
        )
        content[place : place + rng.randint(0, 2)] = rng.choice([b"", new, new])
    return bytes(content)


def outcome(path):
    """Return "read" or "refused" for a mutant; assert that the record is sound, and said to be doubtful where it is."""
    try:
        record = read_record(path)
    except (ValueError, OSError) as error:
        assert not isinstance(error, UnicodeError) and str(path.parent) in str(error), error
        return "refused"
    assert isinstance(record, Record) and len(record.lead_names) == len(record.signal) and record.signal.size
    assert 0 < record.sampling_rate < np.inf and not np.isinf(record.signal).any()
    if not record.warnings:
        assert check_sums_fit(path, record)
    return "read"


def check_sums_fit(path, record):
    """Whether the values of a record, turned back to integers, have the check sums of its header (parsed by hand)."""
    text = path.read_bytes().decode("latin-1")
    lines = [line.split() for line in re.split("[\r\n]+", text) if line.strip() and not line.strip().startswith("#")]
    if len(lines[1]) < 7 or len(lines) != 1 + len(record.signal) or ":" in text:
        return True  # segments, no check sum, a skew: not compared here
    for fields, row in zip(lines[1:], record.signal.astype(np.float64)):
        found = re.match(r"([-+.\deE]+)(?:\((.*)\))?", fields[2])
        baseline = int(found[2] or fields[4])
        steps = row * float(found[1]) + baseline
        form = int(re.match(r"\d+", fields[1])[0])
        steps[np.isnan(steps)] = -(2 ** (BITS[form] - 1))
        exact = abs(baseline) < 10**5 and fields[2].endswith("/mV")
        if exact and len(fields) > 6 and int(np.rint(steps).sum()) & 0xFFFF != int(fields[6]) & 0xFFFF:
            return False
    return True


def try_mutants(folder, seeds):
    """Return how many mutants were read and refused; damaged are the header, the data, or both."""
    paths, counts = list(valid_records(folder)), {"read": 0, "refused": 0}
    kept = {file: file.read_bytes() for path in paths for file in path.parent.iterdir()}
    for seed in seeds:
        rng = random.Random(seed)
        path = rng.choice(paths)
        files = sorted(path.parent.iterdir())
        for file in [path] if rng.random() < 0.6 else rng.sample(files, rng.randint(1, len(files))):
            file.write_bytes(mutate(rng, kept[file]))
        counts[outcome(path)] += 1
        for file in files:
            file.write_bytes(kept[file])
    return counts


def test_mutants_are_read_or_refused_and_none_is_silently_wrong(tmp_path):
    counts = try_mutants(tmp_path, range(int(os.environ.get("ANYECG_MUTANTS", 250))))
    assert min(counts.values()) > 25
