"""One row of the data set: its columns, how a published record becomes one (`build_row`), and how a row becomes a record
again (`read_row`; `read_samples` for the published integers, bit for bit).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import LEAD_IDS
from anyecg_hf.records import Annotation, Record
from anyecg_hf.signal_ops import unit_to_mv
from anyecg_hf.signal_quality import acceptability

from .corpora.facts import facts_of
from .corpora.sources import SourceRecord
from .corpora.wfdb_steps import StoredRecord, read_stored
from .signal_codec import decode_signal, encode_signal
from .splits import split_of

_TEXT, _REAL, _TEXTS = pa.string(), pa.float32(), pa.list_(pa.string())
SCHEMA = pa.schema(
    [
        ("record_id", _TEXT),  # as published
        ("corpus", _TEXT),
        ("patient_id", _TEXT),  # "<corpus>-<key>"; the record's own id where the corpus names no patients
        ("split", _TEXT),  # train, validation, test
        ("fold", pa.int8()),  # 1-8, 9, 10
        ("signal", pa.binary()),  # `read_samples` decodes it
        ("num_samples", pa.int64()),
        ("sampling_rate", pa.float64()),  # Hz
        ("lead_names", _TEXTS),
        ("units", _TEXTS),  # of the leads, as published
        ("gains", pa.list_(pa.float64())),  # steps per unit
        ("baselines", pa.list_(pa.int32())),  # the step that stands for 0
        ("no_values", pa.list_(pa.int32())),  # the step that stands for "no value", or null
        ("age", _REAL),  # years; 90 stands for "over 89"
        ("sex", _TEXT),  # male, female
        ("height", _REAL),  # cm
        ("weight", _REAL),  # kg
        ("snomed_codes", _TEXTS),
        ("challenge_classes", _TEXTS),  # of the 24
        ("scp_codes", _TEXTS),  # PTB-XL's statements ...
        ("scp_likelihoods", pa.list_(_REAL)),  # ... and their likelihoods, 0: unknown
        ("superclasses", _TEXTS),  # NORM, MI, STTC, CD, HYP
        ("is_normal", pa.bool_()),
        (
            "rhythm_spans",
            pa.list_(pa.struct([("start", pa.int64()), ("stop", pa.int64()), ("rhythm", _TEXT)])),
        ),  # samples
        ("beats", pa.list_(pa.struct([("sample", pa.int64()), ("symbol", _TEXT)]))),
        (
            "quality",
            pa.list_(pa.list_(pa.int16())),
        ),  # per lead and second, sums of QualityFlag; empty: no lead of the model
        ("acceptability", _REAL),  # 0 to 1, from the flags; null where nothing is usable
        ("remarks", _TEXTS),  # what the reader found doubtful
    ]
)
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
    facts, nulls = facts_of(record, stored.comments)
    signal = encode_signal(stored.samples, stored.lead_names)
    values = {
        "record_id": record.record_id, "corpus": record.corpus, "patient_id": record.patient_id,
        "split": split_of(record.fold), "fold": record.fold,
        "signal": signal, "num_samples": stored.samples.shape[1], "sampling_rate": stored.sampling_rate,
        "lead_names": stored.lead_names, "units": stored.units, "gains": stored.gains, "baselines": stored.baselines,
        "no_values": stored.no_values, **facts,
        "rhythm_spans": rhythm_spans(stored.annotations, stored.samples.shape[1]),
        "beats": [_beat(mark) for mark in stored.annotations if mark.symbol in BEATS],
        "remarks": [_without_place(note, folder) for note in stored.notes],
    }  # fmt: skip
    if not np.array_equal(read_samples(values), stored.samples):
        raise ValueError(f"{record.header}: the encoded signal does not decode to the samples of the file.")
    if not _has_voltage(stored):
        raise ValueError(f"{record.header}: none of its signals is a voltage ({', '.join(map(repr, stored.units))}).")
    quality = _quality(read_row(values), values["lead_names"], extractor, nulls)
    return BuiltRow(values | quality, nulls + ["remarks: something doubtful"] * bool(stored.notes))


def read_samples(row: Mapping, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return the published integers, int32 `(num_leads, num_samples)`, or those from sample `start` up to `stop`."""
    return decode_signal(row["signal"], start, stop)


def read_row(row: Mapping, start_seconds: float = 0.0, duration_seconds: float | None = None) -> Record:
    """Return the `Record` of a row as `datasets` gives it, as `read_record` would of its files: millivolt, NaN for no value.

    Args:
        row: with the columns signal, sampling_rate, lead_names, units, gains, baselines, no_values; others where they are.
        start_seconds, duration_seconds: the part to read; only this is decoded. Annotations count from its first sample.

    Raises:
        ValueError: the bytes of the signal are damaged, the part is none of the record, or no signal is a voltage.
    """
    rate = row["sampling_rate"]
    start = round(start_seconds * rate)
    stop = None if duration_seconds is None else min(row["num_samples"], start + round(duration_seconds * rate))
    signal, names = _in_millivolt(read_samples(row, start, stop), row)
    beats = [Annotation(beat["sample"] - start, beat["symbol"]) for beat in row.get("beats") or ()]
    return Record(
        signal=signal,
        sampling_rate=rate,
        lead_names=names,
        record_name=row.get("record_id"),
        file_format="dataset",
        age=row.get("age"),
        sex=row.get("sex"),
        diagnosis_codes=list(row.get("scp_codes") or row.get("snomed_codes") or ()),
        annotations=sorted(beats + _rhythm_marks(row, start), key=lambda mark: mark.sample),
        warnings=list(row.get("remarks") or ()),
    )


def row_codes(row: Mapping) -> list[str]:
    """Return all diagnosis codes of a row, PTB-XL's statements and SNOMED CT: a task takes those that it knows."""
    return [*(row.get("scp_codes") or ()), *(row.get("snomed_codes") or ())]


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


def _beat(mark: Annotation) -> dict:
    return {"sample": mark.sample, "symbol": mark.symbol}


def _rhythm_marks(row: Mapping, start: int) -> list[Annotation]:
    return [Annotation(span["start"] - start, "+", f"({span['rhythm']}") for span in row.get("rhythm_spans") or ()]


def _scale(unit: str) -> float | None:
    """Return millivolt per unit, None where the unit is no voltage."""
    try:
        return unit_to_mv(unit)
    except ValueError:
        return None


def _has_voltage(stored: StoredRecord) -> bool:
    return any(_scale(unit) for unit in stored.units)


def _in_millivolt(samples: np.ndarray, row: Mapping) -> tuple[np.ndarray, list[str]]:
    """Return the voltages among the signals, float32 mV, and their names."""
    scales = [_scale(unit) for unit in row["units"]]
    kept = [lead for lead, scale in enumerate(scales) if scale]
    if not kept:
        raise ValueError(f"Record {row.get('record_id')}: none of its signals is a voltage ({list(row['units'])}).")
    if len(kept) < len(samples):
        samples = samples[kept]
    gains = np.array([row["gains"][lead] for lead in kept])[:, None]
    baselines = np.array([row["baselines"][lead] for lead in kept])[:, None]
    factors = np.array([scales[lead] for lead in kept])[:, None]
    signal = ((samples - baselines) / gains * factors).astype(np.float32)
    for lead, place in enumerate(kept):
        if (marker := row["no_values"][place]) is not None:
            signal[lead, samples[lead] == marker] = np.nan
    return signal, [row["lead_names"][lead] for lead in kept]


def _quality(record: Record, lead_names: list[str], extractor: AnyECGFeatureExtractor, nulls: list[str]) -> dict:
    """Return the quality columns; empty where the model could not take the record: too short, flat, or no lead of its own."""
    try:
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


def _without_place(text: str, folder: Path) -> str:
    """Return a message without the folders above the source, which may be named after anything."""
    return text.replace(f"{folder}/", "")
