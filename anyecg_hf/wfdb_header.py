"""Headers of WFDB records, `read_header(path) -> WfdbHeader`: each field is parsed whole, or refused as an error.

Source: header(5) of the WFDB Applications Guide. Date and time are not used and not checked. Nor is the name in the
record line: most headers of the Georgia set say `E07500.mat` where `E07500` is meant.
"""

import dataclasses
import math
import re

from .regular_files import require_regular_file
from .wfdb_decoding import KNOWN_FORMATS

LARGEST_HEADER_BYTES = 1_000_000
DEFAULT_RATE, DEFAULT_GAIN = 250.0, 200.0  # Hz, steps per mV: what the format takes where the header says nothing
_FLOAT = r"[-+]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d{1,3})?"
_RATE = re.compile(rf"({_FLOAT})(?:/{_FLOAT}(?:\({_FLOAT}\))?)?")  # rate[/counter rate[(base counter)]]
# format[x samples per frame][:skew][+byte offset]
_FORMAT = re.compile(r"(\d{1,9})(?:x(\d{1,9}))?(?::(\d{1,9}))?(?:\+(\d{1,18}))?")
_GAIN = re.compile(rf"({_FLOAT})(?:\(([-+]?\d{{1,18}})\))?(?:/(\S+))?")  # gain[(base line)][/unit]
_INTEGER = re.compile(r"[-+]?\d{1,18}")


@dataclasses.dataclass
class WfdbSignal:
    """One signal line: where the samples are, and how they become a voltage."""

    file: str
    form: int  # storage format
    samples_per_frame: int
    skew: int  # samples by which this signal is late in the file
    offset: int  # bytes before the first sample
    gain: float  # steps per unit
    baseline: int  # the step that stands for 0
    unit: str
    first_value: int
    checksum: int | None
    name: str


@dataclasses.dataclass
class WfdbHeader:
    """A single-segment header. `notes` tells what it left open and what was taken instead."""

    frame_rate: float  # Hz
    num_frames: int | None  # announced; None where the header does not say
    signals: list[WfdbSignal]
    comments: list[str]
    notes: list[str]


def read_header(path):
    """Return the `WfdbHeader` in a file (`pathlib.Path`).

    Raises:
        ValueError: a field is not what the format asks for, or the record has several segments.
        OSError: there is no such regular file.
    """
    lines, comments = _split(require_regular_file(path))
    (number, first), signal_lines = lines[0], lines[1:]
    where, notes = f"{path}, line {number}", []
    fields = first.split()
    if len(fields) < 2:
        raise ValueError(f'{where}: "{first[:80]}" is no record line; needed: name, number of signals, rate, samples.')
    if re.search(r"/\d+$", fields[0]):
        raise ValueError(f"{where}: a record of several segments, not read yet; read its segments one by one.")
    num_signals = _integer(fields[1], where, "number of signals", least=1)
    rate = _parse_rate(fields, where, notes)
    num_frames = _integer(fields[3], where, "number of samples", least=0) if len(fields) > 3 else 0
    if len(signal_lines) != num_signals:
        raise ValueError(f"{where}: {num_signals} signals announced, {len(signal_lines)} signal lines found.")
    signals = [_parse_signal(line, f"{path}, line {number}", notes) for number, line in signal_lines]
    return WfdbHeader(rate, num_frames or None, signals, comments, notes)


def _split(path):
    """Return the lines of a header that say something, with their numbers, and its comments."""
    if path.stat().st_size > LARGEST_HEADER_BYTES:
        raise ValueError(f"{path}: larger than {LARGEST_HEADER_BYTES} bytes; this is no WFDB header.")
    raw = path.read_bytes()
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
        raise ValueError(f"{path}: no record line; the header is empty or holds nothing but comments.")
    return lines, comments


def _parse_rate(fields, where, notes):
    if len(fields) < 3:
        notes.append(f"{where}: no sampling rate; {DEFAULT_RATE:g} Hz taken, the default of the format.")
        return DEFAULT_RATE
    rate = float(_match(_RATE, fields[2], where, "sampling rate")[1])
    if not 0 < rate < math.inf:
        raise ValueError(f"{where}: sampling rate {fields[2]}; it must be above zero and finite.")
    return rate


def _parse_signal(line, where, notes):
    fields = line.split(maxsplit=8)
    if len(fields) < 2:
        raise ValueError(f'{where}: "{line[:80]}" is no signal line; needed at least: file, format.')
    layout = _match(_FORMAT, fields[1], where, "format").groups()
    form, samples_per_frame, skew, offset = (int(part or default) for part, default in zip(layout, (0, 1, 0, 0)))
    if form and form not in KNOWN_FORMATS:
        raise ValueError(f"{where}: storage format {form} is unknown. Known: {sorted(KNOWN_FORMATS)}.")
    if samples_per_frame < 1:
        raise ValueError(f"{where}: 0 samples per frame; at least 1 is needed.")
    gain, baseline, unit = _parse_gain(fields[2] if len(fields) > 2 else "0", where, notes)
    resolution_and_on = [_integer(text, where, "a number after the gain") for text in fields[3:8]]
    _, zero, first_value, checksum, _ = resolution_and_on + [None] * (5 - len(resolution_and_on))
    return WfdbSignal(
        file=fields[0],
        form=form,
        samples_per_frame=samples_per_frame,
        skew=skew,
        offset=offset,
        gain=gain,
        baseline=(zero or 0) if baseline is None else baseline,
        unit=unit,
        first_value=first_value or 0,
        checksum=checksum,
        name=fields[8].strip() if len(fields) > 8 else "unnamed",
    )


def _parse_gain(text, where, notes):
    gain, baseline, unit = _match(_GAIN, text, where, "gain").groups()
    gain = float(gain)
    if not math.isfinite(gain):
        raise ValueError(f"{where}: gain {text} is not finite.")
    if gain == 0:
        gain = DEFAULT_GAIN
        notes.append(f"{where}: not calibrated (no gain); {DEFAULT_GAIN:g} steps per mV taken, the format's default.")
    return gain, baseline if baseline is None else int(baseline), unit or "mV"


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
