"""The median heartbeat and the rhythm of a record, measured: what the record-level view of pretraining predicts.

A second cut anywhere shows its beat in any phase, so a code of a patch says little of the beat's shape; the beats of a record
laid over each other by their QRS complexes do. Nothing here was fitted, no labels are needed.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import uniform_filter1d
from scipy.signal import find_peaks

BEFORE_SECONDS, AFTER_SECONDS = 0.3, 0.5  # of the QRS complex: from before the P wave to the T wave's end
BEAT_RATE = 100  # Hz of a median beat: what the extractor leaves ends at 40 Hz
BEAT_SAMPLES = round((BEFORE_SECONDS + AFTER_SECONDS) * BEAT_RATE)
RHYTHM = ("log_rate", "spread", "successive", "shortest", "longest", "ectopic")
MIN_BEATS = 3
_SMOOTHED_SECONDS = 0.1  # about a QRS complex
_REFRACTORY_SECONDS = 0.22
_LEAST, _LEAST_SEARCHED = 0.5, 0.25  # of the usual steepness of a beat: anywhere; in a pause that is too long
_LONG_PAUSE = 1.5  # median intervals
_AFTER_T_SECONDS = 0.4  # after a beat: what comes sooner is most often its T wave
_ALIGNED_SECONDS = 0.05  # how far a beat is moved to lie over the others
_ALIKE = 0.8  # correlation with the median beat, below which a beat is another kind


def measure_beats(signal: np.ndarray, usable: np.ndarray, sampling_rate: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the median beat of each lead and the rhythm of a record, None where fewer than three beats are seen.

    Args:
        signal (`np.ndarray` of shape `(num_leads, num_samples)`): millivolt, in the model's band.
        usable (`np.ndarray` of shape `(num_leads, num_samples)`, bool): False where a lead is absent or masked.
        sampling_rate (`float`): Hz, a multiple of `BEAT_RATE`.

    Returns:
        median beats `(num_leads, BEAT_SAMPLES)` in millivolt, NaN for a lead without three usable beats; and the figures
        named by `RHYTHM`, NaN where fewer than two intervals are seen whole: log of beats a second; standard deviation, root
        mean square of successive differences, shortest and longest of the intervals, over their mean; share of beats unlike
        the median beat.
    """
    before, after = round(BEFORE_SECONDS * sampling_rate), round(AFTER_SECONDS * sampling_rate)
    reach = round(_ALIGNED_SECONDS * sampling_rate)
    if signal.shape[1] < MIN_BEATS * (before + after):
        return None
    places = find_beats(signal, usable, sampling_rate)
    places = places[(places >= before + reach) & (places < signal.shape[1] - after - reach)]
    if len(places) < MIN_BEATS:
        return None
    places, likeness = _align(signal, usable, places, sampling_rate)
    step = round(sampling_rate / BEAT_RATE)
    columns = places[:, None] + np.arange(-before, after, step)
    beats, seen = signal[:, columns], usable[:, columns]  # (leads, beats, samples)
    alike = likeness >= _ALIKE if (likeness >= _ALIKE).sum() >= MIN_BEATS else np.ones(len(places), dtype=bool)
    whole = seen.all(-1) & alike
    median = np.full((len(signal), BEAT_SAMPLES), np.nan, dtype=np.float32)
    for kept in np.unique(whole, axis=0):  # most often one: all leads whole
        leads = (whole == kept).all(1)
        if kept.sum() >= MIN_BEATS:
            median[leads] = np.median(beats[leads][:, kept], axis=1)
    is_whole = np.diff(np.cumsum(~usable.any(0))[places]) == 0  # an interval with a gap in all leads is no pause
    intervals = np.where(is_whole, np.diff(places) / sampling_rate, np.nan)
    return median, _rhythm(intervals, 1 - (likeness >= _ALIKE).mean())


def find_beats(signal: np.ndarray, usable: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Return the samples at which all leads together are steepest, one a heartbeat; args as for `measure_beats`."""
    slope = np.where(usable, np.abs(np.diff(signal, axis=1, prepend=signal[:, :1])), 0.0)
    slope = uniform_filter1d(slope, round(_SMOOTHED_SECONDS * sampling_rate), axis=1)
    scale = np.quantile(slope, 0.98, axis=1, keepdims=True)
    steepness = (np.minimum(slope / np.maximum(scale, 1e-6), 1.5)).sum(0)
    second = round(sampling_rate)
    whole_seconds = len(steepness) // second * second
    peaks_a_second = steepness[:whole_seconds].reshape(-1, second).max(1)
    seen = usable[:, :whole_seconds].any(0).reshape(-1, second).any(1)
    usual = np.quantile(peaks_a_second[seen], 0.7) if seen.any() else 0.0
    peaks, found = find_peaks(steepness, height=_LEAST_SEARCHED * usual, distance=round(_REFRACTORY_SECONDS * second))
    heights = found["peak_heights"]
    is_beat = heights >= _LEAST * usual
    return np.sort(np.concatenate([peaks[is_beat], _missed(peaks, heights, is_beat, sampling_rate)]))


def _missed(peaks: np.ndarray, heights: np.ndarray, is_beat: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Return the highest peak of each long pause between beats: wide ventricular beats are less steep than the others."""
    beats, missed = peaks[is_beat], []
    pauses = np.diff(beats)
    margin = _AFTER_T_SECONDS * sampling_rate
    for start, pause in zip(beats[:-1], pauses, strict=True):
        inside = (peaks > start + margin) & (peaks < start + pause - margin / 2)
        if pause > _LONG_PAUSE * np.median(pauses) and inside.any():
            missed.append(peaks[inside][heights[inside].argmax()])
    return np.array(missed, dtype=beats.dtype)


def _align(
    signal: np.ndarray, usable: np.ndarray, places: np.ndarray, sampling_rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the places moved so that the beats lie over their median, and how alike each is to it.

    By the leads that are usable in all beats, where there are such: a lead that is masked in some would make those beats others.
    """
    half, step = round(0.15 * sampling_rate), round(sampling_rate / BEAT_RATE)
    reach = round(_ALIGNED_SECONDS * sampling_rate)
    shifts = np.arange(-reach, reach + 1)
    columns = places[:, None, None] + shifts[:, None] + np.arange(-half, half, step)
    is_steady = usable[:, columns[:, [0, -1]].reshape(-1)].all(1)
    moved = signal[is_steady if is_steady.any() else usable.any(1)][:, columns]  # (leads, beats, shifts, samples)
    moved = moved - moved.mean(-1, keepdims=True)
    size = np.sqrt(np.maximum(np.einsum("lbst,lbst->bs", moved, moved), 1e-12))
    best = np.full(len(places), reach)
    for _ in range(2):
        template = np.median(moved[:, np.arange(len(places)), best], axis=1)  # (leads, samples)
        likeness = np.einsum("lbst,lt->bs", moved, template) / size
        best = likeness.argmax(-1)
    return places + shifts[best], likeness.max(-1) / max(float(np.linalg.norm(template)), 1e-6)


def _rhythm(intervals: np.ndarray, ectopic: float) -> np.ndarray:
    """Return the figures of `RHYTHM` from the intervals in their order, NaN where one is not known; all NaN of fewer than two."""
    successive = np.diff(intervals)
    successive, intervals = successive[np.isfinite(successive)], intervals[np.isfinite(intervals)]
    if len(intervals) < 2:
        return np.full(len(RHYTHM), np.nan, dtype=np.float32)
    mean = intervals.mean()
    successive = np.sqrt((successive**2).mean()) if len(successive) else 0.0
    figures = [-np.log(mean), intervals.std() / mean, successive / mean, intervals.min() / mean, intervals.max() / mean]
    return np.array([*figures, ectopic], dtype=np.float32)
