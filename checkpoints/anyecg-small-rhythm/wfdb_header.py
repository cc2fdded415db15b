"""Headers of WFDB records, `read_header(path) -> WfdbHeader`: each field is parsed whole, or refused as an error.

Source: header(5) of the WFDB Applications Guide. Date and time are not used; impossible ones are said. The name in the
record line is not used either: most headers of the Georgia set say `E07500.mat` where `E07500` is meant. Names of data
files and segments are plain names: all of a record lies in one folder. Messages quote numbers only, never text.
"""

import dataclasses
import re

from .regular_files import open_regular
from .wfdb_decoding import KNOWN_FORMATS

LARGEST_HEADER_BYTES = 1_000_000
LARGEST_RATE, SMALLEST_RATE = 1e9, 1e-9  # Hz
DEFAULT_RATE, DEFAULT_GAIN = 250.0, 200.0  # Hz, steps per unit: what the format takes where the header says nothing
GAP = "~"  # in place of a segment: nothing was recorded; in place of a data file: nothing is stored
_FLOAT = r"[-+]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d{1,3})?"
_RATE = re.compile(rf"({_FLOAT})(?:/{_FLOAT}(?:\({_FLOAT}\))?)?", re.ASCII)  # rate[/counter rate[(base counter)]]
# format[x samples per frame][:skew][+byte offset]
_FORMAT = re.compile(r"(\d{1,9})(?:x(\d{1,9}))?(?::(\d{1,9}))?(?:\+(\d{1,18}))?", re.ASCII)
_GAIN = re.compile(rf"({_FLOAT})(?:\(([-+]?\d{{1,10}})\))?(?:/(\S+))?", re.ASCII)  # gain[(base line)][/unit]
_AFTER_GAIN = ("ADC resolution", "ADC zero", "initial value", "check sum", "block size")
_INTEGER = re.compile(r"[-+]?\d{1,18}", re.ASCII)
_NUMERIC = re.compile(r"[-+\d.,eE/x:()]{1,40}", re.ASCII)  # what a message may quote
_CLOCK = re.compile(r"(?:(\d{1,3}):)?(\d{1,2}):(\d{1,2})(?:\.\d*)?", re.ASCII)  # [hours:]minutes:seconds
_DATE = re.compile(r"(\d{1,2})[/.-](\d{1,2}|[A-Za-z]{3})[/.-]\d{1,4}|\d{4}-(\d{1,2})-(\d{1,2})", re.ASCII)


@dataclasses.dataclass
class WfdbSignal:
    """One signal line: where the samples are, and how they become a voltage."""

    file: str
    form: int  # storage format; 0: nothing is stored
    samples_per_frame: int
    skew: int  # frames by which this signal is late in the file
    offset: int  # bytes before the first sample
    gain: float  # steps per unit
    baseline: int  # the step that stands for 0
    unit: str
    first_value: int | None
    adc_zero: int
    checksum: int | None
    name: str


@dataclasses.dataclass
class WfdbSegment:
    """One segment line: the name of a single-segment record, or `GAP`, and how many frames it adds."""

    name: str
    num_frames: int


@dataclasses.dataclass
class WfdbHeader:
    """A header, of `signals` or of `segments`. `notes` tells what it left open and what was taken instead."""

    frame_rate: float  # Hz
    num_signals: int
    num_frames: int | None  # announced; None where the header does not say
    signals: list[WfdbSignal]  # empty where there are segments
    segments: list[WfdbSegment]  # empty where there are signals
    comments: list[str]
    notes: list[str]


def read_header(path):
    """Return the `WfdbHeader` in a file (`pathlib.Path`).

    Raises:
        ValueError: a field is not what the format asks for.
        OSError: there is no such regular file.
    """
    lines, comments = _split(path)
    (number, first), lines = lines[0], lines[1:]
    where, notes, fields = f"{path}, line {number}", [], first.split()
    if len(fields) < 2:
        raise ValueError(f"{where}: no record line; needed: name, number of signals, rate, samples.")
    num_segments = _number_of_segments(fields[0], where)
    num_signals = _integer(fields[1], where, "number of signals", least=1)
    rate = _parse_rate(fields, where, notes)
    num_frames = _integer(fields[3], where, "number of samples", least=0) if len(fields) > 3 else 0
    if not all(map(_is_clock_or_date, fields[4:])):
        notes.append(f"{where}: what follows the number of samples is no possible time and date; not used.")
    announced, what = (num_segments, "segment") if num_segments else (num_signals, "signal")
    if len(lines) != announced:
        raise ValueError(f"{where}: {announced} {what}s announced, {len(lines)} {what} lines found.")
    parse = _parse_segment if num_segments else _parse_signal
    parts = [parse(line, f"{path}, line {number}", notes) for number, line in lines]
    signals, segments = ([], parts) if num_segments else (parts, [])
    return WfdbHeader(rate, num_signals, num_frames or None, signals, segments, comments, notes)


def _split(path):
    """Return the lines of a header that say something, with their numbers, and its comments."""
    with open_regular(path) as file:
        raw = file.read(LARGEST_HEADER_BYTES + 1)
    if len(raw) > LARGEST_HEADER_BYTES:
        raise ValueError(f"{path}: larger than {LARGEST_HEADER_BYTES} bytes; this is no WFDB header.")
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


def _number_of_segments(name, where):
    """Return the number behind the slash in `name/segments`; 0 where there is none, the record being a single one."""
    number = name.rpartition("/")[2] if "/" in name else ""
    return _integer(number, where, "number of segments", least=1) if number.isdecimal() else 0


def _parse_rate(fields, where, notes):
    if len(fields) < 3:
        notes.append(f"{where}: no sampling rate; {DEFAULT_RATE:g} Hz taken, the default of the format.")
        return DEFAULT_RATE
    rate = float(_match(_RATE, fields[2], where, "sampling rate")[1])
    if not SMALLEST_RATE <= rate <= LARGEST_RATE:
        raise ValueError(f"{where}: sampling rate {rate:g} Hz; it must be above zero and at most {LARGEST_RATE:g}.")
    return rate


def _is_clock_or_date(text):
    clock, date = _CLOCK.fullmatch(text), _DATE.fullmatch(text)
    if clock:
        hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        return hours < 24 and minutes < 60 and seconds < 60
    if date is None:
        return False
    day, month = (date[1], date[2]) if date[1] else (date[4], date[3])
    return 1 <= int(day) <= 31 and (month.isalpha() or 1 <= int(month) <= 12)


def _parse_segment(line, where, notes):
    fields = line.split()
    if len(fields) != 2:
        raise ValueError(f"{where}: {len(fields)} fields; a segment line has two: name, number of samples.")
    name, num_frames = fields[0], _integer(fields[1], where, "number of samples", least=0)
    return WfdbSegment(name if name == GAP else _plain_name(name, where), num_frames)


def _parse_signal(line, where, notes):
    fields = line.split(maxsplit=8)
    if len(fields) < 2:
        raise ValueError(f"{where}: no signal line; needed at least: file, format.")
    layout = _match(_FORMAT, fields[1], where, "format").groups()
    form, samples_per_frame, skew, offset = (int(part or default) for part, default in zip(layout, (0, 1, 0, 0)))
    if form and form not in KNOWN_FORMATS:
        raise ValueError(f"{where}: storage format {form} is unknown. Known: {sorted(KNOWN_FORMATS)}.")
    if samples_per_frame < 1:
        raise ValueError(f"{where}: 0 samples per frame; at least 1 is needed.")
    gain, baseline, unit = _parse_gain(fields[2] if len(fields) > 2 else "0", where, notes)
    numbers = [_integer(text, where, name) for name, text in zip(_AFTER_GAIN, fields[3:8])]
    _, zero, first_value, checksum, _ = numbers + [None] * (len(_AFTER_GAIN) - len(numbers))
    return WfdbSignal(
        file=_plain_name(fields[0], where) if form else fields[0],
        form=form,
        samples_per_frame=samples_per_frame,
        skew=skew,
        offset=offset,
        gain=gain,
        baseline=_within_32_bits((zero or 0) if baseline is None else baseline, where, "base line"),
        unit=unit,
        first_value=first_value,
        adc_zero=_within_32_bits(zero or 0, where, "ADC zero"),
        checksum=checksum,
        name=fields[8].strip() if len(fields) > 8 else "unnamed",
    )


def _parse_gain(text, where, notes):
    gain, baseline, unit = _match(_GAIN, text, where, "gain").groups()
    gain = float(gain)
    if abs(gain) == float("inf"):
        raise ValueError(f"{where}: gain {text[:40]} is not finite.")
    if gain == 0:
        gain = DEFAULT_GAIN
        notes.append(f"{where}: not calibrated (no gain); {DEFAULT_GAIN:g} steps per unit taken, the format's default.")
    return gain, baseline if baseline is None else int(baseline), unit or "mV"


def _plain_name(name, where):
    if name in (".", "..", "-") or re.search(r"[/\\\0:]", name):
        raise ValueError(f"{where}: no plain file name; all files of a record are read from its own folder only.")
    return name


def _match(pattern, text, where, what):
    found = pattern.fullmatch(text)
    if found is None:
        shown = f'"{text}"' if _NUMERIC.fullmatch(text) else f"a field of {len(text)} characters"
        raise ValueError(f"{where}: {shown} is no {what} of a WFDB header.")
    return found


def _integer(text, where, what, least=None):
    value = int(_match(_INTEGER, text, where, f"whole number ({what})")[0])
    if least is not None and value < least:
        raise ValueError(f"{where}: {what} is {value}; at least {least} is needed.")
    return value


def _within_32_bits(value, where, what):
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"{where}: {what} is {value}; no sample of 32 bits reaches that.")
    return value
