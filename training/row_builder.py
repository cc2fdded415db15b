"""From a published record to a row of the data set: `build_row`."""

from __future__ import annotations

import contextlib
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import anyecg_hf
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import LEAD_IDS
from anyecg_hf.records import Annotation, Record
from anyecg_hf.signal_ops import check_sampling_rate
from anyecg_hf.signal_quality import acceptability

from .corpora.facts import facts_of
from .corpora.sources import SourceRecord
from .corpora.wfdb_steps import StoredRecord, read_stored
from .dataset_rows import millivolt_per, read_row, read_samples
from .signal_codec import encode_signal
from .splits import split_of

PACKAGE_LOGGER = logging.getLogger(anyecg_hf.__name__)
IMPOSSIBLE_GAIN = 50_000  # steps per mV: 16 bits would span 1.3 mV
BEATS = set("NLRaVFJASEj/QBenf?r")  # of WFDB's annotation codes those that mark a heartbeat
_RHYTHM = re.compile(r"\(([A-Z0-9_]{1,12})\s*", re.ASCII)  # "(AFIB"; anything else may be free text


@dataclass(frozen=True)
class BuiltRow:
    values: dict  # by column
    nulls: list[str]  # kinds of what is null, for the report: "age: not stated"


def build_row(record: SourceRecord, folder: Path, extractor: AnyECGFeatureExtractor) -> BuiltRow:
    """Return the row of a published record whose files lie in `folder`, checked: it decodes to the samples of the file.

    Raises:
        ValueError: the record is damaged, contradicts itself, or is of a kind that is not read.
        OSError: a file is missing or not readable.
    """
    stored = read_stored(folder / record.header)
    check_sampling_rate(stored.sampling_rate, record.record_id)
    facts, nulls = facts_of(record, stored.comments)
    signal = encode_signal(stored.samples, stored.lead_names)
    values = {
        "record_id": record.record_id, "corpus": record.corpus, "patient_id": record.patient_id,
        "split": split_of(record.fold), "fold": record.fold,
        "signal": signal, "num_samples": stored.samples.shape[1], "sampling_rate": stored.sampling_rate,
        "lead_names": stored.lead_names, "units": stored.units, "gains": stored.gains,
        "gain_divisor": _gain_divisor(record, stored), "baselines": stored.baselines,
        "no_values": stored.no_values, **facts,
        "rhythm_spans": rhythm_spans(stored.annotations, stored.samples.shape[1]),
        "beats": _beats(stored, nulls),
        "remarks": [without_place(note, folder) for note in stored.notes],
    }  # fmt: skip
    if values["gain_divisor"] != 1:
        values["remarks"].append(
            f"gains taken as {values['gain_divisor']:g} times too large: with them 16 bits span no ECG."
        )
        nulls.append("gains: impossible as published, see gain_divisor")
    if not np.array_equal(read_samples(values), stored.samples):
        raise ValueError(f"{record.header}: the encoded signal does not decode to the samples of the file.")
    if not any(map(millivolt_per, stored.units)):
        raise ValueError(f"{record.header}: none of its signals is a voltage ({', '.join(map(repr, stored.units))}).")
    quality = _quality(read_row(values), values["lead_names"], extractor, nulls)
    return BuiltRow(values | quality, nulls + ["remarks: something doubtful"] * bool(values["remarks"]))


def _gain_divisor(record: SourceRecord, stored: StoredRecord) -> float:
    """Return how many times too large the published gains are.

    The Challenge's headers of INCART state 240,000 to 1,041,000 steps per mV, with which 16 bits span 0.1 mV; the corpus's own
    documentation says 250 to 1100.
    """
    is_impossible = record.corpus == "incart" and all(abs(gain) >= IMPOSSIBLE_GAIN for gain in stored.gains)
    return 1000.0 if is_impossible else 1.0


def rhythm_spans(annotations: list[Annotation], num_samples: int) -> list[dict]:
    """Return from where to where each annotated rhythm lasts, in samples: to the next one, or to the record's end."""
    changes = [
        (mark.sample, found[1]) for mark in annotations if mark.symbol == "+" and (found := _RHYTHM.match(mark.note))
    ]
    starts = [min(max(sample, 0), num_samples) for sample, _ in changes] + [num_samples]
    spans = [
        {"start": start, "stop": stop, "rhythm": rhythm}
        for start, stop, (_, rhythm) in zip(starts, starts[1:], changes)
    ]
    return [span for span in spans if span["stop"] > span["start"]]


def _beats(stored: StoredRecord, nulls: list[str]) -> list[dict]:
    """Return the beats within the record; a damaged file may have some anywhere, beyond 64 bits even."""
    beats = [{"sample": mark.sample, "symbol": mark.symbol} for mark in stored.annotations if mark.symbol in BEATS]
    within = [beat for beat in beats if 0 <= beat["sample"] < stored.samples.shape[1]]
    nulls += ["beats: outside the record"] * (len(within) < len(beats))
    return within


def _quality(record: Record, lead_names: list[str], extractor: AnyECGFeatureExtractor, nulls: list[str]) -> dict:
    """Return the quality columns; empty where the model could not take the record: too short, flat, or no lead of its own."""
    try:
        with unsaid():
            found = extractor(record, return_quality=True)
    except ValueError:
        nulls.append("quality: the model's extractor takes nothing of the record")
        return {"quality": [[] for _ in lead_names], "acceptability": None}
    names = {lead_id: name for name, lead_id in LEAD_IDS.items()}
    by_name = {
        names[lead_id]: flags for lead_id, flags in zip(found["lead_ids"][0].tolist(), found["quality"][0].tolist())
    }
    score = acceptability(found["quality"][0])
    return {
        "quality": [by_name.get(name, []) for name in lead_names],
        "acceptability": None if math.isnan(score) else score,
    }


@contextlib.contextmanager
def unsaid() -> Iterator[None]:
    """Keep the extractor from warning of each record: what it finds is in the row."""
    level = PACKAGE_LOGGER.level
    PACKAGE_LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        PACKAGE_LOGGER.setLevel(level)


def without_place(text: str, folder: Path) -> str:
    """Return a message without the folders above the source, which may be named after anything; below it they may be no UTF-8."""
    return text.replace(f"{folder}/", "").encode(errors="backslashreplace").decode()
