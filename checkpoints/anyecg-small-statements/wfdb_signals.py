"""The signals of a single-segment WFDB record, from its data files to millivolt: `SingleSegment`."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .leads import LEAD_IDS
from .record_fields import standard_or_own_name
from .regular_files import require_regular_file
from .signal_ops import unit_to_mv
from .wfdb_decoding import (
    DIFFERENCES,
    FLAC_BITS,
    NO_VALUE,
    SAMPLES_OF_GROUP,
    count_flac_samples,
    count_samples,
    flac_frames,
    plain_frames,
    require_backing,
)

PLAUSIBLE_GAIN = (1e-2, 1e9)  # steps per mV


@dataclass(frozen=True)
class DataFile:
    """A data file, and the signals that share it."""

    path: Path
    signals: dict  # {number of the signal in the header: WfdbSignal}, in the order of the file
    num_samples: int  # that are there, of all signals together
    num_bytes: int
    where: str  # for messages

    @property
    def first(self):
        """Its first signal: storage format and offset are the same for all."""
        return next(iter(self.signals.values()))

    @cached_property  # a header may announce many thousand signals
    def per_frame(self):
        """Samples of a frame, of all signals together."""
        return sum(signal.samples_per_frame for signal in self.signals.values())

    @property
    def num_frames(self):
        """Frames that are there whole."""
        return self.num_samples // self.per_frame

    def columns(self):
        """Return `{number of the signal: slice}`, where each signal is in a frame."""
        ends = np.cumsum([signal.samples_per_frame for signal in self.signals.values()]).tolist()
        widths = {index: signal.samples_per_frame for index, signal in self.signals.items()}
        return {index: slice(end - width, end) for end, (index, width) in zip(ends, widths.items())}


class SingleSegment:
    """A single-segment record: which of its signals are read, and from where.

    Args:
        path (`pathlib.Path`): its header file.
        header (`WfdbHeader`): what is in there. What is doubtful is added to `header.notes`.
        chosen (`list[int]`, *optional*): numbers of the signals to read; default: the voltages at the rate of the leads.

    Raises:
        ValueError: a data file is empty, or not what the header says; there is no voltage.
        OSError: a data file is missing or is no regular file in the record's folder.
    """

    def __init__(self, path, header, chosen=None):
        self.path, self.header, self.notes, self.chosen = path, header, header.notes, chosen
        if chosen is None:
            self.chosen = choose_signals(header.signals, self.notes, path, must_be_stored=True)
        self.signals = [header.signals[index] for index in self.chosen]
        self.samples_per_frame = self.signals[0].samples_per_frame
        for index in filter(lambda index: is_voltage(header.signals[index]), self.chosen):
            _check_gain(header.signals[index], f"{path}, signal {index}", self.notes)
        stored = {}  # by file
        for index, signal in enumerate(header.signals):
            if signal.form:
                stored.setdefault(signal.file, {})[index] = signal
        names = dict.fromkeys(signal.file for signal in self.signals)
        self.files = [self._open(name, stored[name]) for name in names]
        longest = max(file.num_frames for file in self.files)
        self.num_frames = min(longest, header.num_frames or longest)
        self.num_bytes = sum(file.num_bytes for file in self.files)
        self._note_lengths()

    def read(self, start, stop):
        """Return the frames `start` to `stop` of the signals in millivolt, `(signals, samples)`, float32."""
        num_samples = (stop - start) * self.samples_per_frame
        require_backing(len(self.signals) * num_samples, self.num_bytes, self.path)
        out = np.full((len(self.signals), num_samples), np.nan, np.float32)
        self.read_into(dict(zip(self.chosen, out)), start, stop)
        return out

    def read_steps(self):
        """Return all samples of the signals as they are stored, `(signals, samples)`, int32.

        Raises:
            ValueError: a data file ends early or cannot be decoded to its end, or a signal is late in it: there are no
                integers for what is not stored.
        """
        num_frames = self.header.num_frames or self.num_frames
        if any(file.num_frames != num_frames for file in self.files):
            found = ", ".join(str(file.num_frames) for file in self.files)
            raise ValueError(f"{self.path}: {num_frames} samples a signal announced, its data files hold {found}.")
        if any(signal.skew for signal in self.signals):
            raise ValueError(f"{self.path}: signals with a skew have no samples at one of their ends.")
        num_samples = num_frames * self.samples_per_frame
        require_backing(len(self.signals) * num_samples, self.num_bytes, self.path)
        out = np.empty((len(self.signals), num_samples), np.int32)
        num_read = self.read_into(dict(zip(self.chosen, out)), 0, num_frames, convert=lambda values, signal: values)
        if num_read < num_frames:
            raise ValueError(f"{self.path}: damaged, {num_read} of {num_frames} samples can be decoded.")
        return out

    def read_into(self, rows, start, stop, convert=None):
        """Write the frames `start` to `stop` to `rows`, `{number of the signal: float32 array filled with NaN}`.

        `convert(values, signal)` makes what is written of the integers of the file; default: millivolt, NaN for no value.
        Returns how many frames every file has given: fewer than there are where one is damaged.
        """
        num_read = []
        for file in self.files:
            chosen = {index: row for index, row in rows.items() if index in file.signals}
            num_read.append(self._read_file(file, chosen, start, stop, convert or _to_millivolt))
        return min(num_read)

    def _read_file(self, file, rows, start, stop, convert):
        """Write the frames of one file and return how many; signals that are late in it need frames from after `stop`."""
        end, announced = min(file.num_frames, self.num_frames), self.header.num_frames
        skews = [file.signals[index].skew for index in rows]
        first, last = min(start + min(skews), end) if start else 0, min(stop + max(skews), end)
        first_frame, sums, done, columns = None, 0, first, file.columns()
        require_backing((last - first) * file.per_frame, file.num_bytes, file.where)
        for frames in _frames(file, columns, first, last):
            by_column = np.ascontiguousarray(frames.T)
            for index, row in rows.items():
                signal = file.signals[index]
                place = (done - start - signal.skew) * signal.samples_per_frame
                _write(row, place, by_column[columns[index]].T.reshape(-1), signal, convert)
            first_frame = frames[0] if done == 0 else first_frame
            sums = sums + by_column.sum(axis=1, dtype=np.int64)
            done += len(frames)
        if done == first < last:
            raise ValueError(f"{file.where}: damaged, of {last - first} samples none can be read.")
        if done < last:
            self.notes.append(f"{file.where}: damaged, {done} of {last} samples are there.")
        is_whole = first == 0 and done == end == (announced or end)
        if first_frame is not None:
            self._compare(file, columns, first_frame, sums if is_whole else None)
        return done - first

    def _compare(self, file, columns, first_frame, sums):
        """Note first values and check sums (of whole files) that are not those of the header.

        The format keeps 16 bits of the sum, written with or without sign. A first value of 0 is what many write who do
        not know it: no contradiction where the check sum fits.
        """
        for index, signal in file.signals.items():
            first, name = int(first_frame[columns[index]][0]), signal.name[:40]
            found = None if sums is None else int(sums[columns[index]].sum()) & 0xFFFF
            fits = signal.checksum is None or found == signal.checksum & 0xFFFF
            confirmed = sums is None or (signal.checksum is not None and fits)
            if first != signal.first_value and (signal.first_value or signal.first_value == 0 and not confirmed):
                self.notes.append(
                    f'{file.where}: the first value of signal {index} "{name}" is {first}, the header says '
                    f"{signal.first_value}; the data may be damaged, or another record's."
                )
            if sums is not None and not fits:
                self.notes.append(
                    f'{file.where}: check sum of signal {index} "{name}" is {found}, the header says {signal.checksum}; '
                    "the data may be damaged, or another record's."
                )

    def _open(self, name, signals):
        """Return the `DataFile` of a name and its signals, which are in the order of the header."""
        where = f"{self.path}, data file {name[:80]}"
        first = next(iter(signals.values()))
        if any((signal.form, signal.offset) != (first.form, first.offset) for signal in signals.values()):
            raise ValueError(f"{where}: announced with different formats or offsets; a file has one of each.")
        path = require_regular_file(self.path.parent / name)
        num_bytes = path.stat().st_size
        if first.form in FLAC_BITS:
            if first.offset or any(signal.samples_per_frame != first.samples_per_frame for signal in signals.values()):
                raise ValueError(f"{where}: FLAC with an offset, or with signals of different rates, cannot be read.")
            num_samples = count_flac_samples(path, first.form, len(signals), where) * len(signals)
        else:
            num_samples = count_samples(first.form, max(num_bytes - first.offset, 0))
        file = DataFile(path, signals, num_samples, num_bytes, where)
        if not file.num_frames:
            raise ValueError(f"{where}: no sample of each signal in {num_bytes} bytes; the file is cut or empty.")
        return file

    def _note_lengths(self):
        announced = self.header.num_frames
        for file in self.files:
            if file.num_frames < (announced or self.num_frames):
                of = f"of {announced} announced" if announced else f"where another file has {self.num_frames}"
                self.notes.append(f"{file.where}: ends early, {file.num_frames} {of} samples are there.")
            surplus = file.num_samples - (announced or file.num_frames) * file.per_frame
            is_padding = surplus < SAMPLES_OF_GROUP[file.first.form]
            if announced and surplus >= file.per_frame and not is_padding:
                self.notes.append(f"{file.where}: holds {file.num_frames} samples; read as announced: {announced}.")
            if not announced and not is_padding:
                self.notes.append(f"{file.where}: ends within a frame.")
            for signal in file.signals.values():
                if signal.skew >= min(file.num_frames, self.num_frames):
                    self.notes.append(f'{file.where}: skew {signal.skew} of "{signal.name[:40]}" leaves no sample.')


def choose_signals(signals, notes, path, must_be_stored):
    """Return the numbers of the voltages, all at the rate of the leads among them; note what is left out.

    Args:
        signals (`list[WfdbSignal]`): all of a header.
        notes (`list[str]`): is added to.
        path (`pathlib.Path`): of the header, for messages.
        must_be_stored (`bool`): leave out what has no data; the signals of a layout header never have.
    """
    voltages = []
    for index, signal in enumerate(signals):
        if must_be_stored and not signal.form:
            notes.append(f'signal {index} "{signal.name[:40]}" left out: no data stored.')
        elif not is_voltage(signal):
            notes.append(f'signal {index} "{signal.name[:40]}" left out: its unit is no voltage.')
        else:
            voltages.append(index)
    if not voltages:
        raise ValueError(f"{path}: no voltage with data among its signals; {' '.join(notes[:20])}")
    leads = [index for index in voltages if standard_or_own_name(signals[index].name) in LEAD_IDS]
    per_frame = max(signals[index].samples_per_frame for index in leads[:1] or voltages)
    for index in voltages:
        if signals[index].samples_per_frame != per_frame:
            notes.append(f'signal {index} "{signals[index].name[:40]}" left out: its rate is not that of the leads.')
    return [index for index in voltages if signals[index].samples_per_frame == per_frame]


def is_voltage(signal):
    """Whether the unit of a signal is one of voltage."""
    try:
        return unit_to_mv(signal.unit) > 0
    except ValueError:
        return False


def _check_gain(signal, where, notes):
    """Refuse a gain that makes values beyond float32; note one that no device has."""
    steps_per_mv = abs(signal.gain) / unit_to_mv(signal.unit)
    largest = (2.0**32 + abs(signal.baseline)) / steps_per_mv if steps_per_mv else np.inf
    if not largest < float(np.finfo(np.float32).max):
        raise ValueError(f"{where}: gain {signal.gain:g} gives values too large to be true.")
    if not PLAUSIBLE_GAIN[0] <= steps_per_mv <= PLAUSIBLE_GAIN[1]:
        notes.append(f"{where}: {steps_per_mv:g} steps per mV; no device has such a gain.")


def _frames(file, columns, first, last):
    """Yield the frames `first` to `last` of a data file in arrays `(frames, samples of a frame)` of integers."""
    signal = file.first
    if signal.form in FLAC_BITS:
        flac = {"samples_per_frame": signal.samples_per_frame, "start": first, "stop": last, "where": file.where}
        return flac_frames(file.path, signal.form, **flac)
    plain = {"offset": signal.offset, "per_frame": file.per_frame}
    if signal.form != DIFFERENCES:
        return plain_frames(file.path, signal.form, **plain, start=first, stop=last)
    return _integrated(file, columns, plain, first, last)


def _integrated(file, columns, plain, first, last):
    """Yield frames of a file of differences: each value is the signal's first one and all differences up to here."""
    level = {index: s.adc_zero if s.first_value is None else s.first_value for index, s in file.signals.items()}
    for frames in plain_frames(file.path, DIFFERENCES, **plain, start=0, stop=first):
        for index, column in columns.items():
            level[index] += int(frames[:, column].sum(dtype=np.int64))
    for frames in plain_frames(file.path, DIFFERENCES, **plain, start=first, stop=last):
        out = np.empty(frames.shape, np.int64)
        for index, column in columns.items():
            values = np.cumsum(frames[:, column], dtype=np.int64) + level[index]
            out[:, column] = values.reshape(len(frames), -1)
            level[index] = int(values[-1])
        yield out


def _write(row, place, values, signal, convert):
    """Write `values` of a signal, converted, to `row` from index `place` on, as far as they lie in it."""
    values = values[max(-place, 0) : max(len(row) - place, 0)]
    place = max(place, 0)
    row[place : place + len(values)] = convert(values, signal)


def _to_millivolt(values, signal):
    millivolt = values.astype(np.float64)
    if signal.baseline:
        millivolt -= signal.baseline
    millivolt /= signal.gain
    if unit_to_mv(signal.unit) != 1:
        millivolt *= unit_to_mv(signal.unit)
    millivolt[values == NO_VALUE.get(signal.form)] = np.nan
    return millivolt
