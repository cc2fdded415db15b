"""WFDB records of several segments, `ManySegments`: of fixed layout (all alike) or variable (after a layout header).

Source: header(5) of the WFDB Applications Guide, "Segment specification". A segment is a single-segment record in the
same folder, not in a sub-folder; `~` is a gap, its values are NaN. Signals are matched by name. Every segment that
touches the part to be read has to be there and to have the rate and, per frame, the number of samples of the record. A
gap costs its author one line, so what a record gives is bounded by the size of its files (`require_backing`).
"""

import bisect
import itertools
import math

import numpy as np

from .wfdb_decoding import require_backing
from .wfdb_header import GAP, read_header
from .wfdb_signals import SingleSegment, choose_signals, is_voltage

MOST_SEGMENTS = 5_000  # opened in one call


class ManySegments:
    """A multi-segment record: its signals are those of the layout header or, without one, of its first segment.

    Args:
        path (`pathlib.Path`): its header file.
        header (`WfdbHeader`): what is in there. What is doubtful is added to `header.notes`.

    Raises:
        ValueError: the segments contradict the record or each other, or there is no voltage.
        OSError: the header of the layout or the first segment is missing or is no regular file in the record's folder.
    """

    def __init__(self, path, header):
        self.path, self.header, self.notes, self.segments = path, header, header.notes, header.segments
        self.ends = list(itertools.accumulate(segment.num_frames for segment in self.segments))
        self.num_frames = self.ends[-1]
        if self.num_frames < 1:
            raise ValueError(f"{path}: none of its segments has a sample.")
        if header.num_frames not in (None, self.num_frames):
            self.notes.append(
                f"{path}: {header.num_frames} samples announced, its segments have {self.num_frames}; the latter is taken."
            )
        named = [segment.name for segment in self.segments if segment.name != GAP]
        if not named:
            raise ValueError(f"{path}: nothing but gaps; at least one segment needs a name.")
        self.is_variable = self.segments[0].num_frames == 0 and self.segments[0].name != GAP
        self.layout = self._read_header(named[0]).signals
        self.chosen = choose_signals(self.layout, self.notes, path, must_be_stored=not self.is_variable)
        if len(self.layout) != header.num_signals:
            raise ValueError(f"{path}: {header.num_signals} signals announced, {named[0]}.hea has {len(self.layout)}.")
        self.signals = [self.layout[index] for index in self.chosen]
        self.samples_per_frame = self.signals[0].samples_per_frame

    def read(self, start, stop):
        """Return the frames `start` to `stop` of the signals in millivolt, `(signals, samples)`, float32."""
        places = self._places(start, stop)
        opened = {name: self._open(name) for name in dict.fromkeys(self.segments[place].name for place in places)}
        with_data = [segment for segment, _ in opened.values() if segment]
        num_samples = (stop - start) * self.samples_per_frame
        num_bytes = sum(segment.num_bytes for segment in with_data)
        require_backing(len(self.signals) * num_samples, num_bytes, self.path)
        out = np.full((len(self.signals), num_samples), np.nan, np.float32)
        for place in places:
            segment, rows = opened[self.segments[place].name]
            if segment:
                self._read_segment(place, segment, {index: out[row] for index, row in rows.items()}, start, stop)
        if not with_data:
            self.notes.append(f"{self.path}: no segment of this part holds these signals; all values are missing.")
        for segment in with_data:
            self.notes.extend(segment.notes)
        return out

    def _places(self, start, stop):
        """Return which of the segments, gaps aside, have samples among the frames `start` to `stop`."""
        first, last = bisect.bisect_right(self.ends, start), bisect.bisect_left(self.ends, stop)
        places = [place for place in range(first, last + 1) if self.segments[place].name != GAP]
        places = [place for place in places if self.segments[place].num_frames]
        if len(places) > MOST_SEGMENTS:
            raise ValueError(
                f"{self.path}: {len(places)} segments in this part; at most {MOST_SEGMENTS} are opened at once. "
                "Read it in parts, with start_seconds and duration_seconds."
            )
        return places

    def _read_header(self, name):
        """Return the header of a segment or layout, which has to be a single-segment one at the record's rate."""
        path = self._path(name)
        header = read_header(path)
        if header.segments:
            raise ValueError(f"{path}: has segments itself; a segment of {self.path.name} must not.")
        if not math.isclose(header.frame_rate, self.header.frame_rate, rel_tol=1e-6):
            raise ValueError(
                f"{path}: sampling rate {header.frame_rate:g} Hz, {self.path.name} says {self.header.frame_rate:g}."
            )
        return header

    def _path(self, name):
        return self.path.with_name(name + ".hea")

    def _open(self, name):
        """Return a segment and `{number of the signal in it: row}`, or `(None, {})` where it holds none of the signals."""
        header, path = self._read_header(name), self._path(name)
        keys, wanted = _keys(header.signals), _keys(self.layout)
        self._compare_with_layout(path, keys, wanted, header.notes)
        numbers, rows = {key: number for number, key in enumerate(keys)}, {}
        for row, index in enumerate(self.chosen):
            number = numbers.get(wanted[index])
            if number is None:
                continue
            signal, expected = header.signals[number], self.layout[index]
            if not is_voltage(signal) or signal.samples_per_frame != expected.samples_per_frame:
                kind = "a" if is_voltage(signal) else "no"
                raise ValueError(
                    f"{path}, signal {number}: {signal.samples_per_frame} samples per frame, {kind} voltage; "
                    f"its record says {expected.samples_per_frame}, a voltage."
                )
            if signal.form:
                rows[number] = row
        return (SingleSegment(path, header, list(rows)), rows) if rows else (None, {})

    def _compare_with_layout(self, path, keys, wanted, notes):
        """Refuse a segment of a fixed layout with other signals, and note other differences from the layout."""
        if not self.is_variable and sorted(keys) != sorted(wanted):
            raise ValueError(
                f"{path}: other signals than the first segment; without a layout header they are the same."
            )
        if not self.is_variable and keys != wanted:
            notes.append(f"{path}: its signals are in another order than in the first segment; taken by name.")
        known = set(wanted)
        for number in [number for number, key in enumerate(keys) if key not in known]:
            notes.append(f"{path}, signal {number}: left out, not in the layout header.")

    def _read_segment(self, place, segment, rows, start, stop):
        """Write what a segment has of the frames `start` to `stop` to `rows`, each of which begins with frame `start`."""
        listed, own = self.segments[place].num_frames, segment.header.num_frames or segment.num_frames
        if listed != own:
            self.notes.append(f"{segment.path}: {own} samples, {self.path.name} says {listed}; its place may be wrong.")
        begin, end = self.ends[place] - listed, self.ends[place]
        first, last = max(start, begin), min(stop, end)
        part = slice((first - start) * self.samples_per_frame, (last - start) * self.samples_per_frame)
        segment.read_into({index: row[part] for index, row in rows.items()}, first - begin, last - begin)


def _keys(signals):
    """Return `(name, how many of that name came before)` for each signal."""
    seen, keys = {}, []
    for signal in signals:
        keys.append((signal.name, seen.get(signal.name, 0)))
        seen[signal.name] = keys[-1][1] + 1
    return keys
