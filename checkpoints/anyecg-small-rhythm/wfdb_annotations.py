"""Annotations of WFDB records in the MIT format: `read_annotations(path, ...)`. Damaged files give what is before the damage.

Source: annot(5) of the WFDB Applications Guide. Words of 16 bits: 6 for the kind, 10 for the time since the one before.
"""

import os
import re

import numpy as np

from .records import Annotation
from .regular_files import read_whole

LARGEST_ANNOTATION_BYTES = 2_000_000  # a day of beats takes a fifth
_COMMENT, _LAST_KIND = 22, 49
_SKIP, _NUMBER, _CHANNEL, _NOTE = 59, 60, 62, 63  # no annotations: a long time; numbers and a text of the last one
_SYMBOLS = {
    **dict(enumerate("NLRaVFJASEj/Q~", start=1)),
    16: "|",
    **dict(enumerate('sT*D"=pB^t+u?![]en@xf()r', start=18)),
}
_RESOLUTION = re.compile(r"## time resolution: (\d{1,9}(?:\.\d{0,12})?)\s*", re.ASCII)
_DEFINITION = re.compile(r"(\d{1,2}) (\S{1,20})(?: .*)?", re.ASCII | re.DOTALL)


def read_annotations(path, sampling_rate, samples_per_frame, num_samples, notes):
    """Return the annotations (`list[Annotation]`, in the order of time) of a file that need not exist.

    Args:
        path (`pathlib.Path`): the file, `A0001.atr`.
        sampling_rate (`float`): Hz, of the signal that the annotations are counted in.
        samples_per_frame (`int`): of that signal; a file counts frames, unless it states a time resolution.
        num_samples (`int`): length of the record, to compare with.
        notes (`list[str]`): what is doubtful is added here: the record is read even if its annotations cannot be.
    """
    if not os.path.lexists(path):
        return []
    try:
        found, problem = _decode(read_whole(path, LARGEST_ANNOTATION_BYTES))
    except (ValueError, OSError) as error:
        notes.append(f"annotations not read: {error}")
        return []
    found, resolution, symbols = _take_definitions(found)
    scale = sampling_rate / resolution if resolution else samples_per_frame
    annotations = [Annotation(round(time * scale), symbols.get(kind, f"[{kind}]"), note) for time, kind, note in found]
    if problem:
        notes.append(f"{path}: {problem}; {len(annotations)} annotations read.")
    if any(one.sample > other.sample for one, other in zip(annotations, annotations[1:])):
        notes.append(f"{path}: not in the order of time; sorted.")
        annotations.sort(key=lambda annotation: annotation.sample)
    last = num_samples + sampling_rate  # CPSC-2021 puts the end of a rhythm one sample after the record
    if annotations and not (annotations[0].sample >= 0 and annotations[-1].sample < last):
        notes.append(f"{path}: annotations outside the record of {num_samples} samples; it may be another record's.")
    return annotations


def _decode(data):
    """Return `(time, kind, note)` of each annotation in `data` (bytes), and what is wrong with the file, or `None`."""
    words, found, position, time = np.frombuffer(data[: len(data) // 2 * 2], "<u2").tolist(), [], 0, 0
    while position < len(words):
        kind, value = words[position] >> 10, words[position] & 0x3FF
        position += 1
        if kind == 0 and value == 0:
            return found, "data after the end mark" if any(words[position:]) else None
        if kind == _SKIP and position + 2 <= len(words):
            interval = words[position] << 16 | words[position + 1]  # the high half comes first
            time += (interval ^ 1 << 31) - (1 << 31)
            position += 2
        elif kind == _NOTE and found and 2 * position + value <= len(data):
            note = data[2 * position : 2 * position + value].rstrip(b"\0")
            found[-1] = (*found[-1][:2], _text(note))
            position += (value + 1) // 2
        elif kind <= _LAST_KIND:
            time += value
            found.append((time, kind, ""))
        elif not (_NUMBER <= kind <= _CHANNEL and found):
            return found, f"damaged at byte {2 * position - 2}"
    return found, "ends without its end mark"


def _text(raw):
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _take_definitions(found):
    """Return the annotations without those that describe the file, its time resolution in Hz or `None`, its symbols.

    Descriptions are comments at time 0 that begin with "## ", and all between two of them that enclose symbols.
    """
    resolution, symbols, kept, within = None, dict(_SYMBOLS), [], False
    for time, kind, note in found:
        is_description = time == 0 and kind == _COMMENT and (within or note.startswith("## "))
        if is_description:
            stated, defined = _RESOLUTION.fullmatch(note), _DEFINITION.fullmatch(note)
            resolution = float(stated[1]) if stated else resolution
            within = note.startswith("## annotation type definitions") or within and not note.startswith("## end of")
            symbols |= {int(defined[1]): defined[2]} if within and defined else {}
        elif kind:
            kept.append((time, kind, note))
    return kept, resolution, symbols
