"""WFDB records, single-segment, in all storage formats: `read_wfdb(header, stated) -> Record`. Needs no wfdb package."""

import re

import numpy as np

from .leads import resolve_lead_name
from .records import Record, parse_comments, take_part
from .regular_files import require_regular_file
from .signal_ops import unit_to_mv
from .wfdb_decoding import DIFFERENCES, FLAC_BITS, NO_VALUE, read_flac, read_plain
from .wfdb_header import read_header

_CHUNK = 1 << 20  # samples converted at a time


def read_wfdb(path, stated):
    """Return the `Record` of the record with the header file `path` (`pathlib.Path`).

    Signals that are no voltage are left out, as are those of another rate than the leads, and `warnings` says so. Leads
    with several samples per frame are read at their full rate; a skew is taken out.

    Raises:
        ValueError: the header or a data file is damaged, contradictory, or of a kind that is not read.
        OSError: a file is missing or is no regular file in the record's folder.
    """
    header = read_header(path)
    digital = {}
    for file in dict.fromkeys(signal.file for signal in header.signals if signal.form):
        group = {index: signal for index, signal in enumerate(header.signals) if signal.file == file}
        digital.update(_read_data_file(path, group, header.num_frames, header.notes))
    chosen = _choose_signals(header, digital, path)
    out = np.full((len(chosen), max(len(digital[index]) for index in chosen)), np.nan, np.float32)
    for row, index in zip(out, chosen):
        _to_millivolt(digital[index], header.signals[index], row)
    signals = [header.signals[index] for index in chosen]
    rate = header.frame_rate * signals[0].samples_per_frame
    names = _standard_names(signals, header.notes)
    record = Record(out, rate, names, **parse_comments(header.comments), warnings=header.notes)
    return take_part(record, stated)


def _read_data_file(header_path, group, num_frames, notes):
    """Return `{index: int array}` for the signals of one data file.

    Args:
        group: `{index: WfdbSignal}` of that file in the order of the header, which is their order in the file.
        num_frames: frames that the header announces, or `None`.
    """
    file = next(iter(group.values())).file
    where = f"{header_path}, data file {file[:80]}"
    if file in (".", "..", "-") or re.search(r"[/\\\0:]", file):
        raise ValueError(f"{where}: no plain file name; data files are read from the record's folder only.")
    path = require_regular_file(header_path.parent / file)
    frames = _read_frames(path, list(group.values()), num_frames, where)
    if len(frames) == 0:
        raise ValueError(f"{where}: no sample of each signal in {path.stat().st_size} bytes; the file is cut or empty.")
    if num_frames and len(frames) < num_frames:
        notes.append(f"{where}: ends early, {len(frames)} of {num_frames} announced samples are there.")
    ends = np.cumsum([signal.samples_per_frame for signal in group.values()])
    columns = np.split(frames[:num_frames], ends[:-1], axis=1)
    out = {}
    for (index, signal), column in zip(group.items(), columns):
        out[index] = column.ravel()
        if signal.form == DIFFERENCES:
            out[index] = np.cumsum(out[index], dtype=np.int64) + signal.first_value
        if num_frames and len(column) == num_frames:
            _compare_checksum(out[index], signal, where, notes)
        if signal.skew >= len(column):
            notes.append(f'{where}: skew {signal.skew} of "{signal.name}" leaves none of its samples.')
    return out


def _read_frames(path, signals, num_frames, where):
    """Return all whole frames of a data file, `(frames, samples of a frame)`, int32."""
    first, per_frame = signals[0], sum(signal.samples_per_frame for signal in signals)
    if any((signal.form, signal.offset) != (first.form, first.offset) for signal in signals):
        raise ValueError(f"{where}: announced with different formats or offsets; a file has one of each.")
    if first.form in FLAC_BITS:
        if first.offset or per_frame != first.samples_per_frame * len(signals):
            raise ValueError(f"{where}: FLAC with an offset, or with signals of different rates, cannot be read.")
        samples = read_flac(
            path, first.form, num_channels=len(signals), samples_per_frame=first.samples_per_frame, where=where
        )
    else:
        largest = num_frames and num_frames * per_frame
        samples = read_plain(path, first.form, offset=first.offset, largest=largest)
    return samples[: len(samples) // per_frame * per_frame].reshape(-1, per_frame)


def _compare_checksum(values, signal, where, notes):
    """Note a check sum that does not fit; the format keeps 16 bits of the sum, written with or without sign."""
    found = int(values.sum(dtype=np.int64)) & 0xFFFF
    if signal.checksum is not None and found != signal.checksum & 0xFFFF:
        notes.append(
            f'{where}: check sum of "{signal.name}" is {found}, the header says {signal.checksum}; '
            "the data may be damaged, or another record's."
        )


def _choose_signals(header, digital, path):
    """Return the indices of the voltages that have data, all at the rate of the leads among them; note the others."""
    signals, notes, voltages = header.signals, header.notes, []
    for index, signal in enumerate(signals):
        if index not in digital:
            notes.append(f'signal "{signal.name}" left out: no data stored.')
        elif not _is_voltage(signal.unit):
            notes.append(f'signal "{signal.name}" left out: its unit is {signal.unit}.')
        else:
            voltages.append(index)
    if not voltages:
        raise ValueError(f"{path}: no voltage with data among its signals; {' '.join(notes)}")
    leads = [index for index in voltages if _lead_or_none(signals[index].name)]
    per_frame = max(signals[index].samples_per_frame for index in leads[:1] or voltages)
    for index in voltages:
        if signals[index].samples_per_frame != per_frame:
            notes.append(f'signal "{signals[index].name}" left out: its rate is not that of the leads.')
    return [index for index in voltages if signals[index].samples_per_frame == per_frame]


def _is_voltage(unit):
    try:
        return unit_to_mv(unit) > 0
    except ValueError:
        return False


def _to_millivolt(values, signal, out):
    """Write one signal to `out` (float32, filled with NaN) in millivolt, without its skew; no value is NaN."""
    values = values[signal.skew * signal.samples_per_frame :]
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK]
        millivolt = (part - np.float64(signal.baseline)) / signal.gain * unit_to_mv(signal.unit)
        if not np.abs(millivolt).max() < np.finfo(np.float32).max:
            raise ValueError(f'Signal "{signal.name}": gain {signal.gain:g} gives values too large to be true.')
        millivolt[part == NO_VALUE.get(signal.form)] = np.nan
        out[start : start + len(part)] = millivolt


def _standard_names(signals, notes):
    """Return standard names where they can be told, others as they are; a lead's second signal keeps its own name."""
    given, names = [signal.name for signal in signals], []
    for name in given:
        standard = _lead_or_none(name)
        if standard in names:
            notes.append(
                f'"{given[names.index(standard)]}" and "{name}" are both {standard}; the second keeps its name.'
            )
            standard = None
        names.append(standard or name)
    return names


def _lead_or_none(name):
    try:
        return resolve_lead_name(name)
    except ValueError:
        return None
