"""What the annotations of a long record say of each of its windows: fibrillation or flutter, ventricular beats.

Beats and rhythms as MIT-BIH and CPSC-2021 write them (WFDB annotations). Source of the beat groups: ANSI/AAMI EC57, where
ventricular ectopic beats are V (premature) and E (escape); fusion beats (F) are of neither kind and count as beats only.
"""

from __future__ import annotations

import re

import numpy as np

from anyecg_hf.modeling_anyecg_long import BEAT_KINDS
from anyecg_hf.records import Record

from .labels import WINDOW_LABELS

AF_RHYTHMS = ("(AFIB", "(AFL")
BEATS = frozenset("NLRBAaJSVrFejnE/fQ?")
VENTRICULAR_BEATS = frozenset("VE")
_WITHOUT_AF = re.compile(r"non atrial fibrillation", re.IGNORECASE)  # how CPSC-2021 says that a record has no AF
_CPSC_2021 = re.compile(r"data_(\d+)_\d+")
_SAME_PERSON = {"202": "201"}  # of MIT-BIH: its directory says so


def patient_of(record_name: str) -> str:
    """Return the patient of a record of MIT-BIH or CPSC-2021 by its name; of any other the name itself."""
    found = _CPSC_2021.fullmatch(record_name)
    return f"cpsc2021-{found[1]}" if found else _SAME_PERSON.get(record_name, record_name)


def is_af(record: Record) -> np.ndarray:
    """Return where the rhythm is atrial fibrillation or flutter, bool `(num_samples,)`.

    A rhythm lasts to the next one; before the first there is none (CPSC-2021 marks the stretches of AF only).

    Raises:
        ValueError: no rhythm is annotated, and no comment of the header says that there is no fibrillation.
    """
    result = np.zeros(record.signal.shape[1], dtype=bool)
    changes = [(mark.sample, mark.note) for mark in record.annotations if mark.note.startswith("(")]
    if not changes and not any(_WITHOUT_AF.search(comment) for comment in record.comments):
        raise ValueError(
            f'Record "{record.record_name}" has no annotation of its rhythm (notes such as "(AFIB", "(N" in its .atr file), '
            'and no comment "non atrial fibrillation". Leave it out, or annotate it.'
        )
    ends = [*(sample for sample, _ in changes), len(result)][1:]
    for (start, note), end in zip(changes, ends, strict=True):
        result[max(start, 0) : max(end, 0)] = note in AF_RHYTHMS
    return result


def beat_samples(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """Return where the beats are, and which of them are ventricular, int and bool `(beats,)`.

    Raises:
        ValueError: no beat is annotated.
    """
    marks = [mark for mark in record.annotations if mark.symbol in BEATS]
    if not marks:
        raise ValueError(
            f'Record "{record.record_name}" has no annotated beats (an .atr file beside it). Leave it out, or annotate it.'
        )
    return np.array([mark.sample for mark in marks]), np.array([mark.symbol in VENTRICULAR_BEATS for mark in marks])


def label_windows(record: Record, start_seconds: np.ndarray, window_seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Return `(labels, counts)` of windows of an annotated record.

    Args:
        start_seconds (`np.ndarray` of shape `(windows,)`): where each begins.
        window_seconds (`float`): the length of each.

    Returns:
        labels float32 `(windows, 2)`: share of the window in AF, 0 to 1; 1 where there is a ventricular beat, else 0.
        counts float32 `(windows, 2)`: beats and ventricular beats, see `BEAT_KINDS`.

    Raises:
        ValueError: as `is_af` and `beat_samples`.
    """
    af, (beats, are_ventricular) = is_af(record), beat_samples(record)
    labels = np.zeros((len(start_seconds), len(WINDOW_LABELS)), dtype=np.float32)
    counts = np.zeros((len(start_seconds), len(BEAT_KINDS)), dtype=np.float32)
    for window, start in enumerate(start_seconds):
        first, end = round(start * record.sampling_rate), round((start + window_seconds) * record.sampling_rate)
        inside = (beats >= first) & (beats < end)
        counts[window] = inside.sum(), (inside & are_ventricular).sum()
        labels[window] = af[first:end].mean(), counts[window, 1] > 0
    return labels, counts
