"""DICOM waveforms: `read_dicom(path, stated) -> Record`. Of a long one only the part asked for is read. Needs no package.

Source: DICOM PS3.3, C.10.9 (waveform), C.10.10 (annotation), C.7.1.1 (patient); PS3.16, CID 3001 (leads).
"""

import dataclasses
import math
import re

import numpy as np

from .dicom_elements import open_dicom
from .leads import LEAD_IDS, STANDARD_LEADS
from .record_fields import findings, standard_lead_names, standard_or_own_name, years_between
from .records import Annotation, Record, parse_age, parse_sex, part_to_read
from .scp_reader import LEAD_NAMES
from .signal_ops import HIGHEST_RATE, unit_to_mv

_SEX, _AGE, _BIRTH = (0x0010, 0x0040), (0x0010, 0x1010), (0x0010, 0x0030)
_DATES = ((0x0008, 0x002A), (0x0008, 0x0022), (0x0008, 0x0023), (0x0008, 0x0020))  # acquisition, content, study
_WAVEFORMS, _ORIGINALITY = (0x5400, 0x0100), (0x003A, 0x0004)
_NUM_CHANNELS, _NUM_SAMPLES, _RATE = (0x003A, 0x0005), (0x003A, 0x0010), (0x003A, 0x001A)
_BITS, _INTERPRETATION = (0x5400, 0x1004), (0x5400, 0x1006)
_PADDING, _DATA = (0x5400, 0x100A), (0x5400, 0x1010)
_CHANNELS, _LABEL, _STATUS, _SOURCE = (0x003A, 0x0200), (0x003A, 0x0203), (0x003A, 0x0205), (0x003A, 0x0208)
_SENSITIVITY, _UNITS, _CORRECTION = (0x003A, 0x0210), (0x003A, 0x0211), (0x003A, 0x0212)
_BASELINE, _TIME_SKEW, _SAMPLE_SKEW = (0x003A, 0x0213), (0x003A, 0x0214), (0x003A, 0x0215)
_CODE, _SCHEME, _MEANING = (0x0008, 0x0100), (0x0008, 0x0102), (0x0008, 0x0104)
_ANNOTATIONS, _FREE_TEXT = (0x0040, 0xB020), (0x0070, 0x0006)
_CONCEPT_NAME, _CONCEPT, _REFERENCED = (0x0040, 0xA043), (0x0040, 0xA168), (0x0040, 0xA0B0)
_POSITIONS, _OFFSETS, _RANGE_TYPE = (0x0040, 0xA132), (0x0040, 0xA138), (0x0040, 0xA130)
_SEQUENCES = {_WAVEFORMS, _CHANNELS, _SOURCE, _UNITS, _ANNOTATIONS, _CONCEPT_NAME, _CONCEPT}

_KINDS = {"SB": "i1", "UB": "u1", "SS": "i2", "US": "u2", "SL": "i4", "UL": "u4"}
_COMPANDED = {"MB": "mu-law", "AB": "A-law"}
_UNITS_IN_WORDS = {"microvolt": "uV", "millivolt": "mV", "volt": "V", "nanovolt": "nV"}
_SCP_CODE, _MDC_CODE = re.compile(r"5\.6\.3-9-(\d{1,3})"), re.compile(r"2:(\d{1,3})|(131\d{3})")
_MDC_LEADS = 131072  # code of partition 2, element 0
_AGE_STRING = re.compile(r"(\d{1,3})([DWMY])")
_YEARS_PER_UNIT = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
_MOST_CHANNELS, _MOST_MARKS = 1_000, 200_000  # 24 hours have 100,000 beats
_LARGEST_MILLIVOLT = 1e30  # of any step; float32 ends at 3e38
_CHUNK = 1 << 20  # values converted at a time


@dataclasses.dataclass
class _Channel:
    """One voltage: which column it is, and how its steps become mV."""

    index: int
    name: str
    millivolt: float  # of a step
    baseline: float  # mV of step 0
    skew: int  # samples by which it begins later than the others


def read_dicom(path, stated):
    """Return the `Record` in a DICOM file (`pathlib.Path`).

    Of several multiplex groups one is read: original rather than derived, with as many of the 12 leads as any, the first
    of these. Channels that are no voltage, or not calibrated, are left out. `warnings` says so.

    Raises:
        ValueError: the file holds no ECG, is damaged or contradictory, or its samples are companded.
        OSError: there is no such regular file.
    """
    warnings = []
    with open_dicom(path, _SEQUENCES) as dicom:
        index, group = _choose_group(dicom, warnings)
        where = f"{path}, waveform group {index + 1}"
        rate = dicom.decimal(group, _RATE)
        if not rate or not 0 < rate <= HIGHEST_RATE:
            raise ValueError(
                f"{where}: sampling frequency (003a,001a) absent, not above 0 or above {HIGHEST_RATE:g} Hz."
            )
        channels = _read_channels(dicom, group, rate, where, warnings)
        samples = _Samples(dicom, group, where, warnings)
        start, stop = part_to_read(stated, rate, samples.num_frames)
        signal = _read_signal(samples, channels, start, stop, where)
        statements, codes, annotations = _read_annotations(dicom, index + 1, rate, start, warnings)
        age, sex = _read_patient(dicom)
    if dicom.ends_early:
        warnings.append("the file ends early.")
    names = standard_lead_names([channel.name for channel in channels], warnings)
    return Record(
        signal,
        rate,
        names,
        age=age,
        sex=sex,
        diagnosis_codes=codes,
        annotations=annotations,
        statements=statements,
        warnings=warnings,
    )


# Groups and channels


def _choose_group(dicom, warnings):
    """Return number (from 0) and elements of the multiplex group to read."""
    groups = dicom.items(dicom.elements, _WAVEFORMS)
    if not groups:
        raise ValueError(f"{dicom.path}: no waveform sequence (5400,0100); an image or a report, not an ECG recording.")

    def rank(index):
        names = {_channel_name(dicom, channel, 0) for channel in dicom.items(groups[index], _CHANNELS)}
        is_derived = dicom.text(groups[index], _ORIGINALITY) == "DERIVED"
        return not names & set(LEAD_IDS), is_derived, -len(names & set(STANDARD_LEADS)), index

    chosen = min(range(len(groups)), key=rank)
    if len(groups) > 1:
        warnings.append(f"waveform group {chosen + 1} of {len(groups)} was read; the others were left out.")
    return chosen, groups[chosen]


def _read_channels(dicom, group, rate, where, warnings):
    """Return the calibrated voltages among the channels of a group."""
    definitions = dicom.items(group, _CHANNELS)
    announced = dicom.whole(group, _NUM_CHANNELS)
    if not 1 <= len(definitions) <= _MOST_CHANNELS or announced != len(definitions):
        raise ValueError(
            f"{where}: {announced} channels announced, {len(definitions)} defined; needed is one number, 1 to {_MOST_CHANNELS}."
        )
    channels = []
    for index, definition in enumerate(definitions):
        unit, sensitivity = _unit_in_mv(dicom, definition), dicom.decimal(definition, _SENSITIVITY)
        if not unit or not sensitivity:
            warnings.append(f"channel {index + 1} left out: no voltage, or not calibrated (no sensitivity or unit).")
            continue
        if dicom.text(definition, _STATUS) not in ("", "OK"):
            warnings.append(f"channel {index + 1}: its status (003a,0205) is not OK.")
        correction, baseline = dicom.decimal(definition, _CORRECTION), dicom.decimal(definition, _BASELINE)
        channels.append(
            _Channel(
                index,
                _channel_name(dicom, definition, index),
                sensitivity * (1.0 if correction is None else correction) * unit,
                (baseline or 0.0) * unit,
                _skew(dicom, definition, rate),
            )
        )
    if not channels:
        raise ValueError(f"{where}: no calibrated voltage among its {len(definitions)} channels.")
    return channels


def _channel_name(dicom, definition, index):
    """Return the lead of a channel: by its code (SCP-ECG, ISO/IEEE 11073), else by the words beside it, else its label."""
    for source in dicom.items(definition, _SOURCE):
        code = dicom.text(source, _CODE)
        scp, mdc = _SCP_CODE.fullmatch(code), _MDC_CODE.fullmatch(code)
        number = int(scp[1]) if scp else int(mdc[1] or int(mdc[2]) - _MDC_LEADS) if mdc else 0
        if 0 < number < len(LEAD_NAMES):
            return LEAD_NAMES[number]
        words = [re.split(r"[,(]", dicom.text(source, _MEANING))[0], code.removeprefix("MDC_ECG_LEAD_")]
        known = [name for name in map(standard_or_own_name, words) if name in LEAD_IDS]
        if known:
            return known[0]
    return standard_or_own_name(dicom.text(definition, _LABEL)[:40] or f"channel {index + 1}")


def _unit_in_mv(dicom, definition):
    """Return the factor from the unit of a channel's sensitivity to mV, or None where it is no voltage."""
    for unit in dicom.items(definition, _UNITS):
        words = dicom.text(unit, _MEANING).lower().rstrip("s")
        for name in (dicom.text(unit, _CODE), _UNITS_IN_WORDS.get(words, words)):
            try:
                return unit_to_mv(name)
            except ValueError:
                continue
    return None


def _skew(dicom, definition, rate):
    """Return the skew of a channel in whole samples; less than half a sample is none."""
    samples, seconds = dicom.decimal(definition, _SAMPLE_SKEW), dicom.decimal(definition, _TIME_SKEW)
    skew = samples or (seconds or 0.0) * rate
    if not abs(skew) < 1e9:
        raise ValueError(f"{dicom.where(_TIME_SKEW)}: a skew of {skew:g} samples.")
    return round(skew)


# Samples


class _Samples:
    """The samples of a group, read in parts: `num_frames`, and `chunks(first, end)`."""

    def __init__(self, dicom, group, where, warnings):
        interpretation, bits = dicom.text(group, _INTERPRETATION), dicom.whole(group, _BITS)
        if interpretation in _COMPANDED:
            raise ValueError(f"{where}: samples companded by {_COMPANDED[interpretation]} (audio); not read.")
        kind = _KINDS.get(interpretation)
        if kind is None or bits != 8 * int(kind[1]):
            raise ValueError(
                f"{where}: sample interpretation (5400,1006) and {bits} bits allocated (5400,1004) are not read together. "
                f"Read are {', '.join(f'{name} with {8 * int(kind[1])}' for name, kind in _KINDS.items())}."
            )
        self._dicom, self._kind = dicom, np.dtype(kind).newbyteorder(dicom.byte_order)
        self._num_channels = dicom.whole(group, _NUM_CHANNELS)
        self._frame_bytes = self._num_channels * self._kind.itemsize
        data, announced = group.get(_DATA), dicom.whole(group, _NUM_SAMPLES)
        if data is None or isinstance(data, list):
            raise ValueError(f"{where}: no waveform data (5400,1010), or in fragments.")
        self._start, available = data.start, data.length // self._frame_bytes
        if announced is None or available == 0 or announced == 0:
            raise ValueError(
                f"{where}: {announced} samples announced (003a,0010), {available} there; the file is cut or empty."
            )
        if available < announced:
            warnings.append(f"the waveform ends early: {available} of {announced} samples are there.")
        elif available > announced:
            warnings.append(f"{available - announced} samples after the {announced} announced ones ignored.")
        self.num_frames = min(announced, available)
        self.no_value = self._read_padding(dicom.bytes(group, _PADDING), warnings)

    def _read_padding(self, padding, warnings):
        """Return the step that stands for "no value", or None. Signed 0 (so ECGToolkit) is also 0 mV: it is kept."""
        if len(padding) != self._kind.itemsize:
            return None
        step = np.frombuffer(padding, self._kind)[0]
        if step == 0 and self._kind.kind == "i":
            warnings.append("padding value (5400,100a) is 0, which is a voltage as well; zeros were kept.")
            return None
        return step

    def chunks(self, first, end):
        """Yield `(number of the first frame, array of shape (frames, channels))` from `first` to `end`."""
        step = max(_CHUNK // self._num_channels, 1)
        for start in range(first, end, step):
            frames = min(step, end - start)
            data = self._dicom.read(self._start + start * self._frame_bytes, frames * self._frame_bytes)
            values = np.frombuffer(data, self._kind, len(data) // self._frame_bytes * self._num_channels)
            yield start, values.reshape(-1, self._num_channels)


def _read_signal(samples, channels, start, stop, where):
    """Return samples `start` to `stop` of the channels in mV, float32; skews are taken out, no value is NaN."""
    for channel in channels:
        largest = abs(channel.millivolt) * 2.0**32 + abs(channel.baseline)
        if not largest < _LARGEST_MILLIVOLT or abs(channel.skew) >= samples.num_frames:
            raise ValueError(
                f"{where}, channel {channel.index + 1}: sensitivity, baseline or skew too large to be true."
            )
    signal = np.full((len(channels), stop - start), np.nan, np.float32)
    first = max(start - max(channel.skew for channel in channels), 0)
    end = min(stop - min(channel.skew for channel in channels), samples.num_frames)
    for frame, values in samples.chunks(first, end):
        for row, channel in zip(signal, channels):
            column = values[:, channel.index]
            millivolt = column.astype(np.float64) * channel.millivolt + channel.baseline
            if samples.no_value is not None:
                millivolt[column == samples.no_value] = np.nan
            place = frame + channel.skew - start  # of the first of these in the row
            skipped = max(-place, 0)
            part = row[place + skipped :][: max(len(millivolt) - skipped, 0)]
            part[:] = millivolt[skipped:][: len(part)]
    return signal


# Annotations and patient


def _read_annotations(dicom, group_number, rate, start, warnings):
    """Return findings in words, SNOMED CT codes, and the marks on this group in the order of time."""
    statements, codes, marks = [], [], []
    for item in dicom.items(dicom.elements, _ANNOTATIONS):
        concept = next(iter(dicom.items(item, _CONCEPT)), {})
        note = next(iter(findings([dicom.text(item, _FREE_TEXT) or dicom.text(concept, _MEANING)])), "")
        samples = _positions(dicom, item, rate)
        if not samples and note:
            statements.append(note)
        if not samples and dicom.text(concept, _SCHEME) == "SCT":
            codes.append(dicom.text(concept, _CODE))
        referenced = np.frombuffer(_even(dicom.bytes(item, _REFERENCED), 2), _numbers(dicom, 2))[::2]
        if len(marks) + len(samples) > _MOST_MARKS:
            warnings.append(f"more than {_MOST_MARKS} marks; the rest was left out.")
            break
        if len(referenced) == 0 or group_number in referenced:
            name = next(iter(dicom.items(item, _CONCEPT_NAME)), {})
            symbol, note = dicom.text(name, _CODE), note or dicom.text(name, _MEANING)
            spans = _spans(samples, dicom.text(item, _RANGE_TYPE), rate)
            marks += [Annotation(sample - start, symbol, note, seconds) for sample, seconds in spans]
    return statements, codes, sorted(marks, key=lambda mark: mark.sample)


def _positions(dicom, item, rate):
    """Return the samples, from 0, that an annotation marks: by number (from 1 in the file), or by seconds."""
    numbers = np.frombuffer(_even(dicom.bytes(item, _POSITIONS, 4 * _MOST_MARKS), 4), _numbers(dicom, 4))
    if len(numbers):
        return [int(number) - 1 for number in numbers]
    seconds = dicom.text(item, _OFFSETS).split("\\")
    finite = [float(text) for text in map(str.strip, seconds) if re.fullmatch(r"-?\d{1,9}(\.\d{0,15})?", text)]
    return [round(value * rate) for value in finite if math.isfinite(value)]


def _spans(samples, range_type, rate):
    """Return `(first sample, duration in seconds or None)`: of a segment, begin and end follow one another."""
    pairs = list(zip(samples[::2], samples[1::2]))
    is_segment = range_type in ("SEGMENT", "MULTISEGMENT") and len(samples) % 2 == 0
    if not is_segment or any(first > last for first, last in pairs):
        return [(sample, None) for sample in samples]
    return [(first, (last - first) / rate) for first, last in pairs]


def _even(value, size):
    return value[: len(value) // size * size]


def _numbers(dicom, size):
    return np.dtype(f"u{size}").newbyteorder(dicom.byte_order)


def _read_patient(dicom):
    """Return age and sex; the date of birth gives the age where it is not stated, and is not kept."""
    sex = parse_sex(dicom.text(dicom.elements, _SEX))
    stated = _AGE_STRING.fullmatch(dicom.text(dicom.elements, _AGE))
    if stated:
        return parse_age(int(stated[1]) * _YEARS_PER_UNIT[stated[2]]), sex
    birth = _date(dicom.text(dicom.elements, _BIRTH))
    recorded = next(filter(None, (_date(dicom.text(dicom.elements, tag)) for tag in _DATES)), None)
    return years_between(birth, recorded) if birth and recorded else None, sex


def _date(text):
    """Return `(year, month, day)` of a date, or of a date and time, or None."""
    found = re.match(r"(\d{4})\.?(\d{2})\.?(\d{2})", text)
    return found and tuple(map(int, found.groups()))
