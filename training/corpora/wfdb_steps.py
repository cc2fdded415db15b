"""WFDB records as whole numbers, just as they are stored: what a data set keeps of them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anyecg_hf.record_fields import standard_lead_names
from anyecg_hf.records import Annotation
from anyecg_hf.regular_files import read_start
from anyecg_hf.wfdb_annotations import read_annotations
from anyecg_hf.wfdb_decoding import NO_VALUE
from anyecg_hf.wfdb_header import WfdbHeader, read_header
from anyecg_hf.wfdb_signals import SingleSegment

from .sources import SIGNAL_SUFFIXES

MAT_HEADER = struct.Struct("<5i")  # type, rows, columns, imaginary, length of the name: level 4 of the MAT format
MOST_SAMPLES = 50_000_000  # of all leads: ten times INCART's; a file of holes may announce any number
MAT_OFFSET = 24  # bytes before the samples: that header and the name "val"


@dataclass(frozen=True)
class StoredRecord:
    """A record as its files hold it."""

    samples: np.ndarray  # int32 (num_leads, num_samples)
    sampling_rate: float  # Hz
    lead_names: list[str]  # standard names where they can be told, else as published
    units: list[str]  # per lead, as published
    gains: list[float]  # steps per unit, per lead
    baselines: list[int]  # the step that stands for 0, per lead
    no_values: list[int | None]  # the step that stands for "no value", per lead
    annotations: list[Annotation]
    comments: list[str]
    notes: list[str]  # what is doubtful


def read_stored(path: Path) -> StoredRecord:
    """Return the record with the header file `path`, every signal of it.

    Raises:
        ValueError: header or data are damaged, contradict each other in the number of leads or samples, or are of a kind
            that no corpus here has (several segments, several rates, skew).
        OSError: a file is missing or is no regular file in the record's folder.
    """
    header = read_header(path)
    _refuse_unusual(header, path)
    source = SingleSegment(path, header, chosen=list(range(len(header.signals))))
    _compare_with_mat(header, path)
    if (num_samples := len(header.signals) * source.num_frames) > MOST_SAMPLES:
        raise ValueError(
            f"{path}: {num_samples} samples; of a record of these corpora at most {MOST_SAMPLES} are read."
        )
    samples, signals = source.read_steps(), header.signals
    rate = header.frame_rate * signals[0].samples_per_frame
    annotations = read_annotations(
        path.with_suffix(".atr"), rate, signals[0].samples_per_frame, samples.shape[1], header.notes
    )
    return StoredRecord(
        samples=samples,
        sampling_rate=rate,
        lead_names=standard_lead_names([signal.name for signal in signals], header.notes),
        units=[signal.unit for signal in signals],
        gains=[signal.gain for signal in signals],
        baselines=[signal.baseline for signal in signals],
        no_values=[NO_VALUE.get(signal.form) for signal in signals],
        annotations=annotations,
        comments=header.comments,
        notes=list(dict.fromkeys(header.notes)),
    )


def _refuse_unusual(header: WfdbHeader, path: Path) -> None:
    if header.segments:
        raise ValueError(f"{path}: several segments; a record of these corpora has one.")
    if any(not signal.form for signal in header.signals):
        raise ValueError(f"{path}: a signal without stored samples.")
    others = {signal.file for signal in header.signals} - {path.stem + suffix for suffix in SIGNAL_SUFFIXES}
    if others:  # one signal under two names could be in two splits
        raise ValueError(f"{path}: names data files of another record ({', '.join(map(repr, sorted(others)))[:80]}).")
    if len({signal.samples_per_frame for signal in header.signals}) > 1:
        raise ValueError(f"{path}: signals of different rates; a record of these corpora has one rate.")


def _compare_with_mat(header: WfdbHeader, path: Path) -> None:
    """Refuse a `.mat` file of another number of leads or samples than the WFDB header says: sizes alone may agree."""
    for name in dict.fromkeys(signal.file for signal in header.signals):
        signals = [signal for signal in header.signals if signal.file == name]
        if not name.endswith(".mat") or signals[0].offset != MAT_OFFSET:
            continue
        start = read_start(path.parent / name, MAT_OFFSET)
        _, rows, columns, _, _ = MAT_HEADER.unpack(start[: MAT_HEADER.size])
        if (rows, columns) != (len(signals), header.num_frames or columns):
            raise ValueError(
                f"{path}: {len(signals)} leads of {header.num_frames} samples announced, the data file says "
                f"{rows} of {columns}."
            )
