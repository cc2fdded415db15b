# Copyright 2025 The anyecg-hf authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""One WFDB record from its header and data files, single-segment, in all storage formats: `read_wfdb(header) -> WfdbContent`.

Every field of the header is parsed whole and strictly, and memory follows the size of the data files, never a number in
the header. Source: header(5) and signal(5) of the WFDB Applications Guide.
"""

import dataclasses
import math
import re
import stat
from pathlib import Path

import numpy as np

from .leads import resolve_lead_name
from .signal_ops import unit_to_mv

try:
    import soundfile
except (ImportError, OSError):  # OSError: the package is there, its C library is not
    soundfile = None

LARGEST_HEADER_BYTES = 1_000_000
LARGEST_FLAC_SAMPLES = 100_000_000  # a constant signal packs without limit; 400 MB unpacked
DEFAULT_RATE, DEFAULT_GAIN = 250.0, 200.0
_FLOAT = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RATE = re.compile(rf"({_FLOAT})(?:/{_FLOAT}(?:\({_FLOAT}\))?)?")  # rate[/counter rate[(base counter)]]
_FORMAT = re.compile(r"(\d+)(?:x(\d+))?(?::(\d+))?(?:\+(\d+))?")  # format[x samples per frame][:skew][+byte offset]
_GAIN = re.compile(rf"({_FLOAT})(?:\(([-+]?\d+)\))?(?:/(\S+))?")  # gain[(base line)][/unit]
_INTEGER = re.compile(r"[-+]?\d{1,18}")
_BYTES = {8: 1, 80: 1, 16: 2, 61: 2, 160: 2, 24: 3, 32: 4}  # a sample; the packed formats are counted in `_num_samples`
_FLAC_BITS = {508: 8, 516: 16, 524: 24}
_NO_VALUE = {80: -(2**7), 508: -(2**7), 212: -(2**11), 310: -(2**9), 311: -(2**9), 24: -(2**23), 524: -(2**23), 32: -(2**31)}
_NO_VALUE.update(dict.fromkeys((16, 61, 160, 516), -(2**15)))  # format 8 holds differences and has no marker


@dataclasses.dataclass
class WfdbContent:
    """What a WFDB record holds: voltages only, in millivolt."""

    signal: np.ndarray  # float32 (num_leads, num_samples), NaN where there is no value
    sampling_rate: float
    lead_names: list[str]
    comments: list[str]
    warnings: list[str]


@dataclasses.dataclass
class _Signal:
    """One signal line of a header."""

    file: str
    format: int
    samples_per_frame: int
    skew: int
    offset: int
    gain: float
    baseline: int
    unit: str
    first_value: int
    checksum: int | None
    name: str


def read_wfdb(header):
    """Return the `WfdbContent` of the record with the header file `header` (`pathlib.Path`).

    Signals that are no voltage are left out, with a note in `warnings`, as are voltages of another rate than the leads.

    Raises:
        ValueError: the header or a data file is damaged, contradictory, or of a kind that is not read (several segments).
        OSError: a file is missing or is no regular file in the record's folder.
    """
    lines, comments = _header_lines(header)
    rate, num_samples, signals, notes = _parse_header(lines, header)
    digital = {}
    for file in dict.fromkeys(signal.file for signal in signals if signal.format):
        group = [signal for signal in signals if signal.file == file]
        digital.update(_read_data_file(header, group, num_samples, notes))
    chosen = _choose_signals(signals, digital, header, notes)
    length = max(len(digital[index]) for index in chosen)
    out = np.full((len(chosen), length), np.nan, np.float32)
    for row, index in zip(out, chosen, strict=True):
        _to_millivolt(digital[index], signals[index], row)
    rate *= signals[chosen[0]].samples_per_frame
    names = _standard_names([signals[index].name for index in chosen], notes)
    return WfdbContent(out, rate, names, comments, notes)


def _header_lines(header):
    """Return the lines of a header that say something, with their numbers, and its comments."""
    if require_regular_file(header, header.parent).stat().st_size > LARGEST_HEADER_BYTES:
        raise ValueError(f"{header}: larger than {LARGEST_HEADER_BYTES} bytes; this is no WFDB header.")
    raw = header.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    lines, comments = [], []
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        line = line.strip()
        if line.startswith("#"):
            comments.append(line[1:].strip())
        elif line:
            lines.append((number, line))
    if not lines:
        raise ValueError(f"{header}: no record line; the header is empty or holds comments only.")
    return lines, comments


def _parse_header(lines, header):
    """Return `(rate of the frames, announced frames or None, signals, notes)`."""
    number, line = lines[0]
    fields, where, notes = line.split(), f"{header}, line {number}", []
    if len(fields) < 2:
        raise ValueError(f'{where}: "{line[:80]}" is no record line; needed: name, number of signals, rate, samples.')
    if re.search(r"/\d+$", fields[0]):
        raise ValueError(f"{where}: a record of several segments, which is not read yet; read its segments one by one.")
    num_signals = _integer(fields[1], where, "number of signals", least=1)
    rate = DEFAULT_RATE
    if len(fields) > 2:
        rate = float(_match(_RATE, fields[2], where, "sampling rate")[1])
    else:
        notes.append(f"{where}: no sampling rate; {DEFAULT_RATE:g} Hz taken, the default of the format.")
    if not 0 < rate < math.inf:
        raise ValueError(f"{where}: sampling rate {fields[2]}; it must be above zero.")
    num_samples = _integer(fields[3], where, "number of samples", least=0) if len(fields) > 3 else 0
    if len(lines) != num_signals + 1:
        raise ValueError(f"{where}: {num_signals} signals announced, {len(lines) - 1} signal lines found.")
    signals = [_parse_signal(text, f"{header}, line {number}", notes) for number, text in lines[1:]]
    return rate, num_samples or None, signals, notes


def _parse_signal(line, where, notes):
    fields = line.split(maxsplit=8)
    if len(fields) < 2:
        raise ValueError(f'{where}: "{line[:80]}" is no signal line; needed at least: file, format.')
    file, layout = fields[0], _match(_FORMAT, fields[1], where, "format")
    form, per_frame, skew, offset = (int(part or default) for part, default in zip(layout.groups(), "0100", strict=True))
    if form and form not in _NO_VALUE and form != 8:
        raise ValueError(f"{where}: storage format {form} is unknown. Known: 8 and {', '.join(map(str, sorted(_NO_VALUE)))}.")
    if per_frame < 1:
        raise ValueError(f"{where}: 0 samples per frame; at least 1 is needed.")
    gain, baseline, unit = _match(_GAIN, fields[2] if len(fields) > 2 else "0", where, "gain").groups()
    numbers = [_integer(text, where, "a number after the gain") for text in fields[3:8]]
    zero, first, checksum = numbers[1] if len(numbers) > 1 else 0, *(numbers[2:4] + [None, None])[:2]
    name = fields[8].strip() if len(fields) > 8 else ""
    gain = float(gain)
    if not math.isfinite(gain):
        raise ValueError(f"{where}: gain {fields[2]} is not finite.")
    if gain == 0:
        gain = DEFAULT_GAIN
        notes.append(f"{where}: not calibrated (no gain); {DEFAULT_GAIN:g} steps per mV taken, the default of the format.")
    baseline = zero if baseline is None else int(baseline)
    return _Signal(file, form, per_frame, skew, offset, gain, baseline, unit or "mV", first or 0, checksum, name or "unnamed")


def _match(pattern, text, where, what):
    found = pattern.fullmatch(text)
    if found is None:
        raise ValueError(f'{where}: "{text[:80]}" is no {what} of a WFDB header.')
    return found


def _integer(text, where, what, least=None):
    value = int(_match(_INTEGER, text, where, f"whole number ({what})")[0])
    if least is not None and value < least:
        raise ValueError(f"{where}: {what} is {value}; at least {least} is needed.")
    return value


def require_regular_file(path, folder):
    """Return `path` if it is a regular file in `folder`, or a link from there into the blobs of the same Hub cache."""
    try:
        mode, target = path.stat().st_mode, path.resolve()
    except OSError as error:
        raise FileNotFoundError(f"{path}: not found or not readable ({error.strerror}). A record needs header and data file.") from None
    if not stat.S_ISREG(mode):
        raise OSError(f"{path}: not a regular file; devices, pipes and folders are not read.")
    home = folder.resolve()
    in_hub_cache = target.parent.name == "blobs" and target.parent.parent / "snapshots" in home.parents
    if target.parent != home and not in_hub_cache:
        raise OSError(f"{path}: a link that leads out of the record's folder; copy the file there.")
    return path


def _read_data_file(header, group, num_samples, notes):
    raise NotImplementedError
