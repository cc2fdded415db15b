"""One row of the data set: its columns, and how a row becomes a record again (`read_row`), or the published integers
(`read_samples`, bit for bit). `row_builder` makes rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from anyecg_hf.records import Annotation, Record
from anyecg_hf.signal_ops import unit_to_mv

from .signal_codec import decode_signal

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
        (
            "gain_divisor",
            pa.float64(),
        ),  # how many times too large the published gains are: 1, in the Challenge's INCART 1000
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


def read_samples(row: Mapping, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return the published integers, int32 `(num_leads, num_samples)`, or those from sample `start` up to `stop`."""
    return decode_signal(row["signal"], start, stop)


def read_row(row: Mapping, start_seconds: float = 0.0, duration_seconds: float | None = None) -> Record:
    """Return the `Record` of a row as `datasets` gives it, as `read_record` would of its files: millivolt, NaN for no value.

    Args:
        row: with the columns signal, sampling_rate, lead_names, units, gains, baselines, no_values; others where they are.
        start_seconds, duration_seconds: the part to read; only this is decoded. Annotations are all of the record's, as of
            `read_record`, counted from the part's first sample.

    Raises:
        ValueError: the bytes of the signal are damaged, the part is none of the record, or no signal is a voltage.
    """
    rate = row["sampling_rate"]
    start = round(start_seconds * rate)
    if start_seconds and start >= row["num_samples"]:
        raise ValueError(
            f"start_seconds is {start_seconds:g}, record {row.get('record_id')} has {row['num_samples'] / rate:g} s."
        )
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
        quality=_quality(row, start / rate, signal.shape[1] / rate),
    )


def row_codes(row: Mapping) -> list[str]:
    """Return all diagnosis codes of a row, PTB-XL's statements and SNOMED CT: a task takes those that it knows."""
    return [*(row.get("scp_codes") or ()), *(row.get("snomed_codes") or ())]


def millivolt_per(unit: str) -> float | None:
    """Return how many millivolt a unit is, None where the unit is no voltage."""
    try:
        return unit_to_mv(unit)
    except ValueError:
        return None


def _rhythm_marks(row: Mapping, start: int) -> list[Annotation]:
    return [Annotation(span["start"] - start, "+", f"({span['rhythm']}") for span in row.get("rhythm_spans") or ()]


def _quality(row: Mapping, start_seconds: float, duration_seconds: float) -> np.ndarray | None:
    """Return the flags of the voltages in a part of the record, None where they are not known or the part begins within
    a patch of one second. Leads that the model does not take have none: 0."""
    leads = [flags for flags, unit in zip(row.get("quality") or (), row["units"]) if millivolt_per(unit)]
    num_seconds = max(map(len, leads), default=0)
    if not num_seconds or start_seconds % 1:
        return None
    flags = np.array([lead or [0] * num_seconds for lead in leads], np.int16)
    start = int(start_seconds)
    return flags[:, start : start + max(1, int(duration_seconds + 0.5))]


def _in_millivolt(samples: np.ndarray, row: Mapping) -> tuple[np.ndarray, list[str]]:
    """Return the voltages among the signals, float32 mV, and their names."""
    scales = [millivolt_per(unit) for unit in row["units"]]
    kept = [lead for lead, scale in enumerate(scales) if scale]
    if not kept:
        raise ValueError(f"Record {row.get('record_id')}: none of its signals is a voltage ({list(row['units'])}).")
    if len(kept) < len(samples):
        samples = samples[kept]
    gains, baselines = (np.array([row[name][lead] for lead in kept])[:, None] for name in ("gains", "baselines"))
    gains = gains / (row.get("gain_divisor") or 1.0)
    factors = np.array([scales[lead] for lead in kept])[:, None]
    steps = samples - baselines if baselines.any() else samples
    lowest, highest = steps.min(initial=0), steps.max(initial=0)
    if (factors == 1).all() and (gains == gains.astype(np.float32)).all() and max(-lowest, highest) <= 1 << 24:
        signal = steps.astype(np.float32)
        signal /= gains.astype(np.float32)  # as below to the bit, in a third of the time
    else:
        signal = (steps / gains * factors).astype(np.float32)
    for lead, place in enumerate(kept):
        no_value = row["no_values"][place]
        if no_value is not None and lowest <= no_value - int(baselines[lead, 0]) <= highest:
            signal[lead, samples[lead] == no_value] = np.nan
    return signal, [row["lead_names"][lead] for lead in kept]
