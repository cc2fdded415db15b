"""WFDB records of several segments: fixed and variable layout, gaps, parts, and segments that contradict each other."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wfdb_files import write_record
from work import count_calls

from anyecg_hf.records import Stated, read_record
from anyecg_hf.wfdb_reader import read_wfdb

wfdb = pytest.importorskip("wfdb")

A, B, C = [1, 2, 3, 4], [10, 20, 30, 40], [5, 6]  # steps of a hundredth millivolt
GAP = [np.nan] * 3


def fixed(folder, *, master="m/2 2 500 6\na 4\nb 2\n", first=(A, B), second=(C, C), **options):
    """A record of two segments with the same two signals; the options are the second segment's."""
    write_record(folder, [list(row) for row in first], name="a")
    write_record(folder, [list(row) for row in second], name="b", **options)
    (folder / "m.hea").write_text(master)
    return folder / "m.hea"


def variable(folder, *, lines=("lay 0", "a 4", "~ 3", "b 2"), leads=("II",), total=9, signals=3, rows=(C,), **options):
    """A record with a layout of three signals; segment a has I and V1, b has the `leads`."""
    layout = ["lay 3 500 0", "~ 0 200/mV 16 0 0 0 0 I", "~ 0 200/mV 16 0 0 0 0 II", "~ 0 200/mV 16 0 0 0 0 V1"]
    (folder / "lay.hea").write_text("\n".join(layout) + "\n")
    write_record(folder, [A, B], name="a")
    write_record(folder, [list(row) for row in rows], name="b", leads=leads, **options)
    (folder / "m.hea").write_text("\n".join([f"m/{len(lines)} {signals} 500 {total}", *lines, "#Age: 60"]) + "\n")
    return folder / "m.hea"


def steps(record):
    """The signal in steps of a hundredth millivolt."""
    return (record.signal * 100).round(3).tolist()


# Fixed layout


def test_segments_of_a_fixed_layout_are_joined(tmp_path):
    record = read_record(fixed(tmp_path))
    assert steps(record) == [A + C, B + C] and record.lead_names == ["I", "V1"]
    assert (record.sampling_rate, record.record_name, record.warnings) == (500, "m", [])


def test_each_segment_has_its_own_gain(tmp_path):
    record = read_record(fixed(tmp_path, gain="200/mV"))
    assert steps(record)[0] == A + [2.5, 3]


def test_segments_in_another_unit_are_converted(tmp_path):
    record = read_record(fixed(tmp_path, gain="0.1/uV"))
    assert steps(record)[0] == A + C


def test_signals_in_another_order_are_matched_by_name_and_that_is_said(tmp_path):
    record = read_record(fixed(tmp_path, second=([7, 7], [8, 8]), leads=("V1", "I")))
    assert steps(record) == [A + [8, 8], B + [7, 7]] and "another order" in record.warnings[0]


def test_a_segment_that_occurs_twice_is_read_twice(tmp_path):
    assert steps(read_record(fixed(tmp_path, master="m/2 2 500 8\na 4\na 4\n")))[0] == A + A


def test_several_samples_per_frame_are_joined_at_the_full_rate(tmp_path):
    write_record(tmp_path, [A, B], name="a", per_frame=2)
    write_record(tmp_path, [C, C], name="b", per_frame=2)
    (tmp_path / "m.hea").write_text("m/2 2 250 3\na 2\nb 1\n")
    for name in "ab":
        text = (tmp_path / f"{name}.hea").read_text().replace(" 500 ", " 250 ", 1)
        (tmp_path / f"{name}.hea").write_text(text)
    record = read_record(tmp_path / "m")
    assert steps(record)[0] == A + C and record.sampling_rate == 500
    part = read_record(tmp_path / "m", start_seconds=3 / 500, duration_seconds=2 / 500)
    assert steps(part)[0] == [4, 5]


# Variable layout


def test_signals_are_matched_to_the_layout_and_gaps_have_no_value(tmp_path):
    record = read_record(variable(tmp_path))
    expected = [A + GAP + GAP[:2], GAP + GAP[:1] + GAP + C, B + GAP + GAP[:2]]
    np.testing.assert_allclose(record.signal * 100, expected, rtol=1e-6)
    assert record.lead_names == ["I", "II", "V1"] and record.age == 60 and record.warnings == []


def test_a_record_of_variable_layout_agrees_with_wfdb(tmp_path):
    path = variable(tmp_path)
    expected = wfdb.rdrecord(str(path.with_suffix("")))
    order = [expected.sig_name.index(name) for name in ("I", "II", "V1")]
    np.testing.assert_array_equal(read_record(path).signal, expected.p_signal.T[order].astype(np.float32))


def test_a_signal_that_the_layout_does_not_have_is_left_out_and_said(tmp_path):
    record = read_record(variable(tmp_path, leads=("II", "aVF"), rows=(C, C)))
    assert record.lead_names == ["I", "II", "V1"] and "not in the layout" in record.warnings[0]


def test_a_record_of_nothing_but_a_gap_is_read_and_said(tmp_path):
    record = read_record(variable(tmp_path, lines=("lay 0", "~ 9")))
    assert record.signal.shape == (3, 9) and np.isnan(record.signal).all()
    assert "all values are missing" in record.warnings[0]


# Parts


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 8), length=st.integers(1, 12))
def test_a_part_is_that_part_of_the_whole(tmp_path_factory, start, length):
    folder = tmp_path_factory.mktemp("part")
    for path in (variable(folder), fixed(folder)):
        whole = read_record(path).signal
        if start < whole.shape[1]:
            part = read_record(path, start_seconds=start / 500, duration_seconds=length / 500)
            np.testing.assert_array_equal(part.signal, whole[:, start : start + length])


def test_a_part_needs_only_the_segments_that_it_touches(tmp_path):
    path = variable(tmp_path)
    (tmp_path / "b.hea").unlink()
    assert read_record(path, duration_seconds=7 / 500).signal.shape == (3, 7)
    with pytest.raises(FileNotFoundError, match="b.hea"):
        read_record(path)


def test_a_start_after_the_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the recording ends at 0.018 s"):
        read_record(variable(tmp_path), start_seconds=1)


# Contradictions


@pytest.mark.parametrize(
    "master, message",
    [
        ("m/3 2 500 6\na 4\nb 2\n", "3 segments announced, 2 segment lines"),
        ("m/1 2 500 6\na 4\nb 2\n", "1 segments announced, 2 segment lines"),
        ("m/0 2 500 6\n", "number of segments is 0"),
        ("m/99999999999 2 500 6\na 4\n", "announced"),
        ("m/2 3 500 6\na 4\nb 2\n", "3 signals announced"),
        ("m/2 2 250 6\na 4\nb 2\n", "sampling rate 500"),
        ("m/2 2 500 6\na 4\nb\n", "1 fields"),
        ("m/2 2 500 6\na 4\nb 2 2\n", "3 fields"),
        ("m/2 2 500 6\na 4\nb two\n", "number of samples"),
        ("m/2 2 500 6\na 4\nb -2\n", "at least 0"),
        ("m/2 2 500 6\na 4\nb 1e9\n", "number of samples"),
        ("m/2 2 500 6\nm 4\nb 2\n", "has segments itself"),
        ("m/2 2 500 6\na 4\nm 2\n", "has segments itself"),
        ("m/2 2 500 6\nm 0\nb 6\n", "has segments itself"),
        ("m/2 2 500 6\n~ 4\n~ 2\n", "nothing but gaps"),
        ("m/2 2 500 0\na 0\nb 0\n", "none of its segments has a sample"),
        ("m/2 2 500 6\na 4\n../b 2\n", "no plain file name"),
        ("m/2 2 500 6\na 4\nsub/b 2\n", "no plain file name"),
        ("m/2 2 500 6\na 4\nhttp://b 2\n", "no plain file name"),
        ("m/2 2 500 6\na 4\nc 2\n", "c.hea"),
    ],
)
def test_a_record_that_contradicts_its_segments_is_refused(tmp_path, master, message):
    with pytest.raises((ValueError, OSError), match=message):
        read_record(fixed(tmp_path, master=master))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"leads": ("I", "V2")}, "other signals"),
        ({"second": (C,)}, "other signals"),
        ({"second": (C, C, C)}, "other signals"),
        ({"rate": 250}, "sampling rate 250"),
        ({"gain": "100/mmHg"}, "no voltage; its record says 1, a voltage"),
        ({"per_frame": 2}, "2 samples per frame"),
    ],
)
def test_segments_that_contradict_each_other_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read_record(fixed(tmp_path, **options))


@pytest.mark.parametrize(
    "master, message, expected",
    [
        ("m/2 2 500 9\na 4\nb 2\n", "its segments have 6", A + C),
        ("m/2 2 500 7\na 4\nb 3\n", "2 samples, m.hea says 3", A + C + GAP[:1]),
        ("m/2 2 500 5\na 4\nb 1\n", "2 samples, m.hea says 1", A + C[:1]),
        ("m/2 2 500 5\na 3\nb 2\n", "4 samples, m.hea says 3", A[:3] + C),
    ],
)
def test_lengths_that_do_not_agree_are_said(tmp_path, master, message, expected):
    record = read_record(fixed(tmp_path, master=master))
    np.testing.assert_allclose(record.signal[0] * 100, expected, rtol=1e-6)
    assert any(message in warning for warning in record.warnings)


def test_two_records_that_name_each_other_are_refused(tmp_path):
    (tmp_path / "p.hea").write_text("p/1 2 500 4\nq 4\n")
    (tmp_path / "q.hea").write_text("q/1 2 500 4\np 4\n")
    with pytest.raises(ValueError, match="has segments itself"):
        read_record(tmp_path / "p")


def test_a_segment_that_ends_early_and_one_that_is_damaged_are_said(tmp_path):
    path = fixed(tmp_path)
    (tmp_path / "a.dat").write_bytes((tmp_path / "a.dat").read_bytes()[:8])
    (tmp_path / "b.dat").write_bytes(bytes(8))
    record = read_record(path)
    np.testing.assert_allclose(record.signal[0] * 100, [1, 2, np.nan, np.nan, 0, 0])
    assert any("ends early" in warning for warning in record.warnings)
    assert any("check sum" in warning for warning in record.warnings)


# Announced sizes


@pytest.mark.parametrize("length", [10**9, 10**15, 9 * 10**17])
def test_an_endless_gap_takes_no_memory_and_its_parts_can_be_read(tmp_path, length):
    path = variable(tmp_path, lines=("lay 0", "a 4", f"~ {length}", "b 2"), total=length + 6)
    tracemalloc.start()
    with pytest.raises(ValueError, match="its files have 20 bytes.*start_seconds"):
        read_record(path)
    part = read_record(path, duration_seconds=1)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert part.signal.shape == (3, 500) and np.isnan(part.signal[:, 4:]).all()


def test_the_work_to_refuse_a_header_of_a_hundred_thousand_segments_grows_as_their_number(tmp_path):
    def read(num_segments):
        lines = ["a 4"] * num_segments
        path = fixed(tmp_path, master="\n".join([f"m/{num_segments} 2 500 {4 * num_segments}", *lines]))
        with pytest.raises(ValueError, match="at most 5000 are opened"):
            read_record(path)
        assert read_record(path, duration_seconds=1).signal.shape == (2, 500)

    assert count_calls(lambda: read(100_000)) < 11 * count_calls(lambda: read(10_000))


# Real recordings


def test_a_real_record_of_fixed_layout_agrees_with_wfdb(real_ecg):
    path = real_ecg / "wfdb_samples" / "041s.hea"
    record = read_record(path)
    expected = wfdb.rdrecord(str(path.with_suffix("")), smooth_frames=False)
    for name, row in zip(record.lead_names, record.signal, strict=True):
        values = expected.e_p_signal[expected.sig_name.index(name)]
        np.testing.assert_array_equal(row, values.astype(np.float32))


def test_the_part_of_a_real_record_of_variable_layout_whose_segments_are_there_agrees_with_wfdb(real_ecg):
    path = real_ecg / "wfdb_samples" / "s25047-2704-05-04-10-44.hea"
    stop = 25740 + 28637 + 4 + 636 + 512 + 4 + 1532 + 4 + 636 + 4 + 508 + 4 + 16508 + 128 + 128 + 48644
    record = read_wfdb(path, Stated(duration_seconds=stop / 125))
    expected = wfdb.rdrecord(str(path.with_suffix("")), sampto=stop)
    assert record.signal.shape == (2, stop)
    for name, row in zip(["II", "V"], record.signal, strict=True):
        values = expected.p_signal[:, expected.sig_name.index(name)]
        np.testing.assert_array_equal(row, values.astype(np.float32))
