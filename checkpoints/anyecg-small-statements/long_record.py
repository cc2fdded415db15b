"""From the windows of a long record to its seconds, its stretches and its burdens. Arrays in, arrays out."""

import numpy as np


def by_second(values, start_seconds, window_seconds, duration_seconds):
    """Return what the windows say of each whole second of a record: the mean of those that hold it, NaN where none does.

    Args:
        values (`np.ndarray` of shape `(windows, ...)`): one value, or several, a window.
        start_seconds (`np.ndarray` of shape `(windows,)`): where each window begins.
        window_seconds, duration_seconds (`float`): length of a window and of the record.

    Returns:
        `np.ndarray` of shape `(seconds, ...)`: a second counts to a window that holds its middle; the last one may be cut.
    """
    num_seconds = int(np.ceil(duration_seconds))
    total, times = np.zeros((num_seconds, *values.shape[1:])), np.zeros(num_seconds)
    for value, start in zip(values, start_seconds, strict=True):
        first, end = _seconds_within(start, start + window_seconds, num_seconds)
        total[first:end] += value
        times[first:end] += 1
    with np.errstate(invalid="ignore"):
        return total / times.reshape(-1, *[1] * (values.ndim - 1))


def own_share(start_seconds, window_seconds, duration_seconds):
    """Return which share of each window's seconds is its own, `(windows,)`: what two windows hold counts half to each.

    So numbers of events by window, times this, add up to the number in the record.
    """
    num_seconds = int(np.ceil(duration_seconds))
    spans = [_seconds_within(start, start + window_seconds, num_seconds) for start in start_seconds]
    times = np.zeros(num_seconds)
    for first, end in spans:
        times[first:end] += 1
    return np.array([np.mean(1 / times[first:end]) if end > first else 0.0 for first, end in spans])


def stretches(is_there):
    """Return `(first, end)` of each run of True in `is_there` (bool, `(seconds,)`), the end not included."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_there, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def share_of_time(is_there, is_known):
    """Return in which share of the known seconds something is there, NaN where none is known; both bool `(seconds,)`."""
    return float(is_there[is_known].mean()) if is_known.any() else float("nan")


def share_of_beats(ventricular_beats, beats):
    """Return which share of all beats is ventricular, 0 to 1, NaN where there are no beats; both numbers of the record."""
    return float(np.clip(ventricular_beats / beats, 0, 1)) if beats > 0 else float("nan")


def _seconds_within(start, end, num_seconds):
    """Return the first second whose middle lies at or after `start`, and the first whose middle lies at or after `end`."""
    first, last = (int(np.ceil(time - 0.5 - 1e-6)) for time in (start, end))
    return max(first, 0), min(last, num_seconds)
