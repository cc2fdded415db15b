"""Annotations beside WFDB records: as wfdb reads them, and what damaged files still give."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wfdb_files import annotation_words, note, skip, write_record

from anyecg_hf.records import Annotation, Record, read_record
from anyecg_hf.wfdb_annotations import read_annotations

wfdb = pytest.importorskip("wfdb")

END = annotation_words((0, 0))
NORMAL, PVC, COMMENT, RHYTHM = 1, 5, 22, 28


def read(folder, raw, *, rows=((0, 1, 2, 3) * 500,), **options):
    """The record of 2,000 samples with this annotation file."""
    path = write_record(folder, [list(row) for row in rows], **options)
    path.with_suffix(".atr").write_bytes(raw)
    return read_record(path)


def test_beats_rhythms_and_their_notes_are_read(tmp_path):
    raw = annotation_words((RHYTHM, 10)) + note(b"(AFIB\0") + annotation_words((NORMAL, 20), (PVC, 1000)) + END
    record = read(tmp_path, raw)
    assert record.annotations == [Annotation(10, "+", "(AFIB"), Annotation(30, "N"), Annotation(1030, "V")]
    assert record.warnings == []


def test_numbers_that_go_with_an_annotation_are_passed_over(tmp_path):
    raw = annotation_words((NORMAL, 5), (60, 3), (61, 255), (62, 1)) + note(b"abc") + annotation_words((PVC, 5)) + END
    assert read(tmp_path, raw).annotations == [Annotation(5, "N", "abc"), Annotation(10, "V")]


def test_long_and_negative_intervals_are_added(tmp_path):
    raw = skip(70000) + annotation_words((NORMAL, 1)) + skip(-69000) + annotation_words((PVC, 0)) + END
    record = read(tmp_path, raw)
    assert record.annotations == [Annotation(1001, "V"), Annotation(70001, "N")]
    assert any("not in the order of time" in warning for warning in record.warnings)
    assert any("outside the record" in warning for warning in record.warnings)


def test_a_word_that_is_no_annotation_counts_as_time(tmp_path):
    assert read(tmp_path, annotation_words((0, 100), (NORMAL, 1)) + END).annotations == [Annotation(101, "N")]


def test_a_time_resolution_of_its_own_is_taken(tmp_path):
    raw = annotation_words((COMMENT, 0)) + note(b"## time resolution: 1000") + annotation_words((NORMAL, 500)) + END
    assert read(tmp_path, raw, rate=500).annotations == [Annotation(250, "N")]


def test_frames_are_counted_where_a_frame_has_several_samples(tmp_path):
    assert read(tmp_path, annotation_words((NORMAL, 300)) + END, per_frame=2).annotations == [Annotation(600, "N")]


def test_symbols_defined_in_the_file_are_taken(tmp_path):
    comments = (b"## annotation type definitions", b"42 xy my own beat", b"## end of definitions", b"seen by two")
    raw = b"".join(annotation_words((COMMENT, 0)) + note(text) for text in comments)
    raw += annotation_words((42, 7), (43, 1)) + END
    expected = [Annotation(0, '"', "seen by two"), Annotation(7, "xy"), Annotation(8, "[43]")]
    assert read(tmp_path, raw).annotations == expected


def test_a_part_of_a_record_has_all_annotations_counted_from_its_start(tmp_path):
    path = write_record(tmp_path, [list(range(2000))])
    path.with_suffix(".atr").write_bytes(annotation_words((NORMAL, 10), (NORMAL, 1000)) + END)
    record = read_record(path, start_seconds=2, duration_seconds=1)
    assert [annotation.sample for annotation in record.annotations] == [-990, 10]


@pytest.mark.parametrize("text", ["né".encode(), "né".encode("latin-1")])
def test_notes_are_read_in_both_encodings(tmp_path, text):
    assert read(tmp_path, annotation_words((NORMAL, 1)) + note(text) + END).annotations[0].note == "né"


@pytest.mark.parametrize(
    "raw, message, num_read",
    [
        (b"", "empty", 0),
        (b"\x01", "end mark", 0),
        (annotation_words((NORMAL, 1)), "end mark", 1),
        (annotation_words((NORMAL, 1), (55, 0)) + END, "damaged at byte 2", 1),
        (annotation_words((60, 1), (NORMAL, 1)) + END, "damaged at byte 0", 0),
        (note(b"abc") + END, "damaged at byte 0", 0),
        (annotation_words((NORMAL, 1), (63, 200)) + b"abc", "damaged at byte 2", 1),
        (annotation_words((NORMAL, 1), (59, 0)) + b"ab", "damaged at byte 2", 1),
        (annotation_words((NORMAL, 1)) + END + annotation_words((NORMAL, 1)), "after the end mark", 1),
        (b"\xff" * 2_000_001, "at most 2000000", 0),
    ],
)
def test_a_damaged_file_gives_what_is_before_the_damage_and_a_warning(tmp_path, raw, message, num_read):
    record = read(tmp_path, raw)
    assert len(record.annotations) == num_read and record.signal.shape == (1, 2000)
    assert len(record.warnings) == 1 and message in record.warnings[0]


def test_a_pipe_or_a_link_that_leads_out_in_its_place_is_said(tmp_path):
    (tmp_path / "inside").mkdir()
    path = write_record(tmp_path / "inside", [[1, 2, 3]])
    os.mkfifo(path.with_suffix(".atr"))
    assert "not a regular file" in read_record(path).warnings[0]
    path.with_suffix(".atr").unlink()
    path.with_suffix(".atr").symlink_to("/etc/hostname")
    assert "annotations not read" in read_record(path).warnings[0]


def test_notes_never_reach_warnings_or_the_representation(tmp_path):
    raw = annotation_words((NORMAL, 1)) + note(b"PLANTED NAME") + annotation_words((55, 1))
    record = read(tmp_path, raw)
    assert record.annotations[0].note == "PLANTED NAME"
    assert "PLANTED" not in repr(record) + "".join(record.warnings)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=60), cut=st.integers(0, 60))
def test_any_bytes_give_a_record_with_annotations_in_order(tmp_path_factory, raw, cut):
    valid = annotation_words((RHYTHM, 10)) + note(b"(AFIB\0") + skip(500) + annotation_words((NORMAL, 20)) + END
    for content in (raw, valid[:cut] + raw):
        record = read(tmp_path_factory.mktemp("atr"), content, rows=((1, 2),))
        samples = [annotation.sample for annotation in record.annotations]
        assert isinstance(record, Record) and samples == sorted(samples)
        assert record.warnings or content.startswith(END) or content[-2:] == END or not any(content[-1:])


def test_what_wfdb_wrote_is_read_as_wfdb_reads_it(tmp_path):
    samples = np.array([0, 5, 1023, 1024, 2047, 500_000, 40_000_000])
    symbols = ["+", "N", "V", "/", "~", "|", "r"]
    wfdb.wrann("w", "atr", samples, symbols, aux_note=["(N", "", "", "x", "", "", "last"], write_dir=str(tmp_path))
    same_as_rdann(tmp_path / "w.atr")


def test_all_real_annotation_files_are_read_as_wfdb_reads_them(real_ecg):
    paths = sorted(
        path for folder in ("mitdb", "cpsc_2021", "wfdb_samples") for path in (real_ecg / folder).glob("*.atr")
    )
    assert len(paths) == 19
    for path in paths:
        notes = same_as_rdann(path)
        assert notes == [], path


def same_as_rdann(path):
    """Compare annotations with wfdb's, and return the reader's notes."""
    notes, expected = [], wfdb.rdann(str(path.with_suffix("")), "atr")
    found = read_annotations(path, 360.0, 1, 10**9, notes)
    assert [annotation.sample for annotation in found] == expected.sample.tolist()
    assert [annotation.symbol for annotation in found] == expected.symbol
    assert [annotation.note for annotation in found] == [text.rstrip("\0") for text in expected.aux_note]
    return notes


def test_every_symbol_of_wfdb_is_known(tmp_path):
    table = wfdb.io.annotation.ann_label_table
    stores = [store for store in table["label_store"] if store]
    (tmp_path / "s.atr").write_bytes(b"".join(struct.pack("<H", store << 10 | 1) for store in stores) + END)
    notes = []
    found = read_annotations(tmp_path / "s.atr", 1.0, 1, 1000, notes)
    assert [annotation.symbol for annotation in found] == list(table["symbol"][1:]) and notes == []
