"""EDF and EDF+ files: `read_edf(path, stated) -> Record`.

Source: Kemp et al., Electroencephalogr Clin Neurophysiol 82 (1992) 391 (EDF); Kemp and Olivan, Clin Neurophysiol 114
(2003) 1755 (EDF+); https://www.edfplus.info/specs. Decoded here: edfio 0.4 closes the gaps of EDF+D without a word, and
ends in any exception on a damaged header.
"""

import os
import re
from typing import NamedTuple

import numpy as np

from .leads import LEAD_IDS
from .record_fields import standard_lead_names, standard_or_own_name, years_between
from .records import Annotation, Record, parse_sex, part_to_read
from .regular_files import open_regular
from .signal_ops import unit_to_mv

_COLUMNS = {  # of the signals' part of the header, in order: name and width
    "label": 16,
    "transducer": 80,
    "unit": 8,
    "physical minimum": 8,
    "physical maximum": 8,
    "digital minimum": 8,
    "digital maximum": 8,
    "prefiltering": 80,
    "samples per record": 8,
    "reserved": 32,
}
_INTEGER = re.compile(r"[+-]?[0-9]{1,8}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+[.,]?[0-9]*|[.,][0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_DATE = re.compile(r"([0-9]{2})-([A-Z]{3})-([0-9]{4})", re.IGNORECASE)
_SHORT_DATE = re.compile(r"([0-9]{2})[./-]([0-9]{2})[./-]([0-9]{2})")
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_TAL = re.compile(rb"([+-][0-9]{1,12}(?:\.[0-9]{0,24})?)(?:\x15([0-9]{0,12}(?:\.[0-9]{0,24})?))?\x14(.*)", re.DOTALL)
_NO_ECG = re.compile(r"(?:EEG|EOG|EMG|ERG|EP|MEG|MCG|EDF Annotations)\b")  # types of signal in EDF+ labels
_SOME_ECG = re.compile(r"E[CK]G", re.IGNORECASE)
_RATES = (0.01, 1e6)  # Hz; what lies outside is a damaged header
_BLOCK_BYTES = 1 << 22  # read at a time
_MOST_SIGNALS = 640  # as in EDFlib
_MOST_ANNOTATIONS = 300_000  # two days of beats
_MOST_GAP_VALUES = 1 << 24  # of samples that gaps may add: 64 MB


class _Signal(NamedTuple):
    """One signal of the header. `calibration` is `(gain, offset)` to mV, or why the signal is none of the leads."""

    label: str
    calibration: tuple | str
    num_samples: int  # in a data record
    first_sample: int  # its place there


class _Header(NamedTuple):
    signals: list
    record_seconds: float
    num_records: int
    first_byte: int  # of the data records
    is_continuous: bool
    age: float | None
    sex: str | None
    warnings: list

    @property
    def record_samples(self):
        """Samples of all signals in one data record, 2 bytes each."""
        return sum(signal.num_samples for signal in self.signals)


def read_edf(path, stated):
    """Return the `Record` of an EDF or EDF+ file (`pathlib.Path`); of a long one only the part asked for is loaded.

    Kept are voltages at the rate of the leads; signals of other units or rates, and those that the label calls EEG, EOG,
    EMG ..., are left out, and `warnings` says so. Gaps of a discontinuous file (EDF+D) are NaN, so time runs on. The
    annotations of EDF+ have the symbol `'"'` (a note, as in WFDB) and their text in `note`.

    Raises:
        ValueError: the header is damaged, no lead is there, or data records overlap.
    """
    with open_regular(path) as file:
        header = _read_header(file, stated.units, path)
        leads = _choose_leads(header, path)
        samples_per_record = leads[0].num_samples
        rate = samples_per_record / header.record_seconds
        onsets, annotations = _read_annotations(file, header)
        starts = _record_starts(header, onsets, samples_per_record, path)
        start, stop = part_to_read(stated, rate, int(starts[-1]) + samples_per_record)
        signal = _read_signal(file, header, leads, starts, (start, stop), path)
    marks = [
        Annotation(round((at - onsets[0]) * rate) - start, '"', text, seconds) for at, text, seconds in annotations
    ]
    names = standard_lead_names([lead.label for lead in leads], header.warnings)
    return Record(signal, rate, names, age=header.age, sex=header.sex, annotations=marks, warnings=header.warnings)


# The header


def _read_header(file, units, path):
    fixed = file.read(256)
    if fixed[:8] == b"\xffBIOSEMI":
        raise ValueError(f"{path}: a BDF file (24 bits a sample), which is not read. Convert it to EDF.")
    if len(fixed) < 256 or fixed[:8] != b"0       ":
        raise ValueError(f"{path}: no EDF header of 256 bytes that begins with version 0.")
    num_signals = _integer(fixed[252:256], "number of signals", path)
    table = file.read(256 * max(num_signals, 0))
    if num_signals > _MOST_SIGNALS:
        raise ValueError(f"{path}: {num_signals} signals announced; up to {_MOST_SIGNALS} are read.")
    if num_signals < 1 or len(table) < 256 * num_signals:
        raise ValueError(f"{path}: {num_signals} signals announced, and {len(table)} bytes are there to describe them.")
    if _integer(fixed[184:192], "bytes in header", path) != 256 * (num_signals + 1):
        raise ValueError(f"{path}: the field 'bytes in header' does not fit {num_signals} signals; damaged.")
    signals = _read_signals(table, num_signals, units, path)
    kind, seconds = fixed[192:197], _number(fixed[244:252])
    if seconds is None or seconds < 0:
        raise ValueError(f"{path}: the field 'duration of a data record' is no number of seconds.")
    announced, warnings = _integer(fixed[236:244], "number of data records", path), []
    num_records = _count_records(file, signals, announced, len(fixed) + len(table), warnings, path)
    age, sex = _read_patient(fixed) if kind in (b"EDF+C", b"EDF+D") else (None, None)
    return _Header(signals, seconds, num_records, len(fixed) + len(table), kind != b"EDF+D", age, sex, warnings)


def _read_signals(table, num_signals, units, path):
    columns, position = {}, 0
    for name, width in _COLUMNS.items():
        columns[name] = [table[position + index * width :][:width] for index in range(num_signals)]
        position += width * num_signals
    leads = [unit for label, unit in zip(columns["label"], columns["unit"]) if not _NO_ECG.match(_text(label))]
    if units is not None and all(map(_text, leads)):
        raise ValueError(f"{path}: units was passed, but every signal states its own. Leave it out.")
    signals, first_sample = [], 0
    for index in range(num_signals):
        fields = {name: column[index] for name, column in columns.items()}
        num_samples = _integer(fields["samples per record"], f"samples per record of signal {index + 1}", path)
        if num_samples < 0:
            raise ValueError(f"{path}: signal {index + 1} has {num_samples} samples in a data record.")
        signals.append(_Signal(_text(fields["label"]), _calibration(fields, units), num_samples, first_sample))
        first_sample += num_samples
    return signals


def _calibration(fields, units):
    """Return `(gain, offset)`, which make millivolt of a stored number, or in words why that is not possible.

    `units` is what the caller says of signals whose own unit is blank.
    """
    if _NO_ECG.match(_text(fields["label"])):
        return "its label says that it is no ECG"
    unit = _text(fields["unit"]) or units
    if not unit:
        return "its unit is blank; pass units='uV' or what it is"
    try:
        factor = unit_to_mv(unit)
    except ValueError:
        return "its unit is no voltage"
    limits = [_number(fields[f"{kind} {end}"]) for kind in ("physical", "digital") for end in ("minimum", "maximum")]
    if None in limits:
        return "its calibration is not readable"
    low, high, digital_low, digital_high = limits
    if low == high or not -32768 <= digital_low < digital_high <= 32767:
        return "its calibration is impossible"
    gain = (high - low) / (digital_high - digital_low) * factor
    offset = low * factor - digital_low * gain
    if not abs(gain) * 32768 + abs(offset) < float(np.finfo(np.float32).max):
        return "its calibration gives values too large to be true"
    return gain, offset


def _count_records(file, signals, announced, first_byte, warnings, path):
    """Return how many whole data records there are to read; differences from the number announced are noted."""
    size = os.fstat(file.fileno()).st_size - first_byte
    record_bytes = 2 * sum(signal.num_samples for signal in signals)
    there = size // record_bytes if record_bytes else 0
    if there == 0 or announced == 0 or announced < -1:
        raise ValueError(
            f"{path}: {announced} data records of {record_bytes} bytes announced, {size} bytes are there; none to read."
        )
    if announced == -1:
        warnings.append(f"number of data records not stated (-1); {there} are there.")
    elif there < announced:
        warnings.append(f"ends early: {there} of {announced} announced data records are there.")
    elif size > announced * record_bytes:
        warnings.append(f"{size - announced * record_bytes} bytes after the last announced data record ignored.")
    return there if announced == -1 else min(there, announced)


def _read_patient(fixed):
    """Return `(age, sex)` from the identification fields of EDF+: "code sex birthdate name", "Startdate date ..."."""
    patient, recording = _text(fixed[8:88]).split(), _text(fixed[88:168]).split()
    sex = parse_sex(patient[1]) if len(patient) > 1 else None
    birth = _parse_date(patient[2]) if len(patient) > 2 else None
    recorded = _parse_date(recording[1]) if len(recording) > 1 and recording[0] == "Startdate" else None
    if recorded is None and (short := _SHORT_DATE.fullmatch(_text(fixed[168:176]))):
        day, month, year = map(int, short.groups())
        recorded = (year + (1900 if year >= 85 else 2000), month, day)  # EDF counts from 1985 to 2084
    return years_between(birth, recorded) if birth and recorded else None, sex


def _parse_date(text):
    """Return `(1951, 8, 2)` of `02-AUG-1951`, or None."""
    found = _DATE.fullmatch(text)
    if not found or found[2].upper() not in _MONTHS:
        return None
    return int(found[3]), _MONTHS.index(found[2].upper()) + 1, int(found[1])


def _text(data):
    """Return a header field as text; it should be ASCII, a micro sign comes as UTF-8 or Latin-1."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.strip(" \0\t\r\n")


def _integer(data, field, path):
    text = _text(data)
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"{path}: the field '{field}' is no whole number; the header is damaged.")
    return int(text)


def _number(data):
    """Return a header field as a float (a decimal comma occurs), or None."""
    text = _text(data)
    return float(text.replace(",", ".")) if _NUMBER.fullmatch(text) else None


def _choose_leads(header, path):
    """Return the signals that are voltages at the rate of the leads among them; the others are noted."""
    warnings, kept = header.warnings, []
    for position, signal in enumerate(header.signals, 1):
        if isinstance(signal.calibration, str) or signal.num_samples == 0:
            reason = signal.calibration if isinstance(signal.calibration, str) else "it has no samples"
            if signal.label != "EDF Annotations":
                warnings.append(f"signal {position} left out: {reason}.")
        else:
            kept.append((position, signal))
    if not kept:
        raise ValueError(f"{path}: no lead of an ECG among {len(header.signals)} signals. {' '.join(warnings)}".strip())
    signals = [signal for _, signal in kept]
    leads = [signal for signal in signals if standard_or_own_name(signal.label) in LEAD_IDS]
    leads = leads or [signal for signal in signals if _SOME_ECG.match(signal.label)]
    num_samples = max(signal.num_samples for signal in leads[:1] or signals)
    for position, signal in kept:
        if signal.num_samples != num_samples:
            warnings.append(f"signal {position} left out: its rate is not that of the leads.")
    rate = num_samples / header.record_seconds if header.record_seconds else 0.0
    if not _RATES[0] <= rate <= _RATES[1]:
        raise ValueError(f"{path}: {num_samples} samples in {header.record_seconds:g} s are no possible rate.")
    return [signal for signal in signals if signal.num_samples == num_samples]


# The data records


def _blocks(file, header, first, last):
    """Yield `(index of the first data record, int16 array (records, samples))`, a few megabytes at a time."""
    width = header.record_samples
    step = max(_BLOCK_BYTES // (2 * width), 1)
    for index in range(first, last, step):
        file.seek(header.first_byte + index * 2 * width)
        data = file.read(2 * width * min(step, last - index))
        block = np.frombuffer(data[: len(data) // (2 * width) * 2 * width], "<i2").reshape(-1, width)
        yield index, block


def _read_annotations(file, header):
    """Return the onset of each data record in seconds (NaN where not stated), and what `_parse_lists` found in all."""
    signals = [signal for signal in header.signals if signal.label == "EDF Annotations"]
    onsets, annotations, damaged = np.full(header.num_records, np.nan), [], 0
    for first, block in _blocks(file, header, 0, header.num_records) if signals else ():
        for number, signal in enumerate(signals):
            rows = np.ascontiguousarray(block[:, signal.first_sample : signal.first_sample + signal.num_samples])
            for index, row in enumerate(rows, first):
                lists, num_damaged = _parse_lists(row.tobytes())
                damaged += num_damaged
                if number == 0 and lists and lists[0][1] == "":
                    onsets[index] = lists[0][0]
                annotations += [mark for mark in lists if mark[1]][: _MOST_ANNOTATIONS - len(annotations)]
    if damaged:
        header.warnings.append(f"{damaged} annotations left out: not in the form of EDF+.")
    if len(annotations) == _MOST_ANNOTATIONS:
        header.warnings.append(f"annotations after the first {_MOST_ANNOTATIONS} left out.")
    if np.isnan(onsets[0]):
        onsets[0] = 0.0
    return onsets, sorted(annotations, key=lambda mark: mark[0])


def _parse_lists(data):
    """Return `(onset, text, duration or None)` of a data record's time-stamped lists, and how many are damaged."""
    found, damaged = [], 0
    for part in re.finditer(rb"[^\0]+", data):
        stamped = _TAL.fullmatch(part[0])
        if stamped is None or not stamped[3].endswith(b"\x14") and stamped[3]:
            damaged += 1
        else:
            texts, seconds = stamped[3].split(b"\x14")[:-1] or [b""], (stamped[2] or b"").strip(b".")
            seconds = float(stamped[2]) if seconds else None
            found += [(float(stamped[1]), text.decode("utf-8", errors="replace"), seconds) for text in texts]
    return found, damaged


def _record_starts(header, onsets, samples_per_record, path):
    """Return the place of each data record's first sample in time, in samples, int64."""
    follow_on = np.arange(header.num_records) * samples_per_record
    if header.is_continuous:
        late = np.abs((onsets - onsets[0]) * (samples_per_record / header.record_seconds) - follow_on)
        if late[np.isfinite(late)].max(initial=0.0) > max(samples_per_record / 2, 1.5):
            header.warnings.append("its data records bear times with gaps, yet the file says it has none (EDF+C).")
        return follow_on
    if np.isnan(onsets).any():
        raise ValueError(f"{path}: {np.isnan(onsets).sum()} data records of a discontinuous file (EDF+D) have no time.")
    exact = (onsets - onsets[0]) * (samples_per_record / header.record_seconds)
    starts = np.rint(np.clip(exact, -1, 1 << 53)).astype(np.int64)
    rounding = starts - follow_on
    rounding = np.maximum.accumulate(rounding)  # times are rounded: a sample too early is no overlap
    starts = follow_on + rounding
    if (starts - exact).max() > 1.5:
        raise ValueError(
            f"{path}: data record {int((starts - exact).argmax()) + 1} begins before the one before it ends."
        )
    return starts


def _read_signal(file, header, leads, starts, bounds, path):
    """Return millivolt, float32 `(leads, stop - start)`; NaN where no data record covers the time."""
    (start, stop), num_samples = bounds, leads[0].num_samples
    gap_values = len(leads) * (stop - start - len(starts) * num_samples)
    if gap_values > _MOST_GAP_VALUES:
        raise ValueError(
            f"{path}: {stop - start} samples with the gaps, {len(starts) * num_samples} without. "
            "Read it in parts: start_seconds=..., duration_seconds=..."
        )
    signal = np.full((len(leads), stop - start), np.nan, np.float32)
    first, last = np.searchsorted(starts, start, "right") - 1, np.searchsorted(starts, stop, "left")
    for index, block in _blocks(file, header, int(first), int(last)):
        places = (starts[index : index + len(block), None] + np.arange(num_samples)).ravel() - start
        inside = (places >= 0) & (places < stop - start)
        for row, lead in zip(signal, leads):
            stored = block[:, lead.first_sample : lead.first_sample + num_samples].ravel()[inside]
            gain, offset = lead.calibration
            row[places[inside]] = stored * gain + offset
    return signal
