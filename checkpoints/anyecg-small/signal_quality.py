"""What may be wrong with a lead in a second: flags, measured on arrays, and a verdict on the whole record made of them.

Two kinds of measure: on the record's own samples (`sample_flags`, `line_flags`: gaps, flat stretches, rails, mains, drift),
which any filter would smear or take out; and on patches in the model's band (`beat_flags`: electrodes that are off, leads
that contradict each other).
"""

import enum
import functools
import itertools
import math

import numpy as np
from scipy.ndimage import uniform_filter1d

from .signal_ops import resample

FLAT_STD_MV = 1e-3
STILL_SECONDS = 0.3  # equal values for so long are no ECG: the smallest steps in use, 5 uV, change within 0.1 s
SATURATED_SECONDS, SATURATED_MV = 0.04, 1.0  # a rail: this long at the lead's extreme, this far from its mean
MAINS_HZ, MAINS_MV, MAINS_CONTRAST = (50.0, 60.0), 0.05, 3.0  # amplitude; times that of the neighbouring frequencies
DRIFT_MV, DRIFT_HZ = 0.5, 0.5  # what the signal below 0.5 Hz moves within a patch
BEATS_ALIKE, BEATS_ABSENT = 0.7, 0.3  # from, below: see `beat_agreement`
LIMB_SHARE, LIMB_MV = 0.3, 0.05  # of the larger limb leads; what contradicts less is noise
EXPLAINED_SHARE = 0.8  # of the contradicting patches: so many have to agree after a change of names to explain it
_SLOPE_SECONDS = 0.027  # the steepest part of a QRS complex
_BLOCK_SECONDS, _SMOOTHED_BLOCKS = 0.02, 6
_LEAST_SLOPE_MV = 0.005  # over `_SLOPE_SECONDS`: less is noise of the amplifier
ACCEPTABLE = 0.92  # `acceptability` from which a record counts as acceptable: less than one of twelve leads is lost


class QualityFlag(enum.IntFlag):
    """What may be said of one patch of one lead; flags add up. 0 is a usable patch with nothing to say."""

    MISSING = 1  # at least one sample had no value (NaN)
    FLAT = 2  # standard deviation below 1 microvolt, or standing still for half of the patch: no signal
    SATURATED = 4  # stood at the lead's rail for 40 ms or longer; not masked
    LIMITED = 8  # went beyond the extractor's +-clip_mv and was limited; not masked
    PADDING = 16  # not part of the record: a lead or a stretch of time added to fill the batch
    MAINS = 32  # 50 or 60 Hz with an amplitude of 0.05 mV or more; not masked
    DRIFT = 64  # the base line moves by 0.5 mV or more within the patch; not masked
    NOISE = 128  # does not show the heartbeats that the other leads show, or no two leads show the same; not masked
    DISCONNECTED = 256  # as NOISE, and so clearly that this lead cannot be on the patient
    INCONSISTENT = 512  # limb leads contradict (I + III = II ...): perhaps swapped, or not simultaneous; not masked


UNUSABLE = QualityFlag.MISSING | QualityFlag.FLAT | QualityFlag.PADDING | QualityFlag.DISCONNECTED
# What a patch costs the verdict, by the worst of its flags. Not fitted: unusable, doubtful, disturbed. Names of leads that
# contradict are no fault of the signal.
_COST = {
    QualityFlag.MAINS: 0.1,  # the band-pass takes it out
    QualityFlag.DRIFT: 0.25,
    QualityFlag.SATURATED: 0.5,
    QualityFlag.LIMITED: 0.5,
    QualityFlag.NOISE: 0.5,
    UNUSABLE: 1.0,
}


def acceptability(quality):
    """Return how usable a record is, from 0 (not at all) to 1 (nothing to say); `ACCEPTABLE` and more can be read.

    One less the mean cost of a patch: 1 if it is masked, 0.5 if noisy or at a rail, 0.25 if the base line drifts, 0.1 for mains.

    Args:
        quality (`np.ndarray` of shape `(..., num_leads, num_patches)`, int): sums of `QualityFlag`; padding does not count.

    Returns:
        `np.ndarray` of shape `(...)`, or a float for one record; NaN where all is padding.
    """
    quality = np.asarray(quality)
    cost = np.zeros(quality.shape)
    for flags, each in _COST.items():
        np.maximum(cost, each * ((quality & int(flags)) != 0), out=cost)
    is_real = (quality & int(QualityFlag.PADDING)) == 0
    counts = is_real.sum(axis=(-2, -1))
    with np.errstate(invalid="ignore"):
        score = 1 - (cost * is_real).sum(axis=(-2, -1)) / counts
    return float(score) if quality.ndim == 2 else score


# On the samples of the record


def sample_flags(signal, missing, saturated, sampling_rate, edges):
    """Return the `QualityFlag`s of each patch, `int64 (num_leads, num_patches)`: missing, flat, saturated.

    Args:
        signal (`np.ndarray` of shape `(num_leads, num_samples)`): millivolt, gaps filled, not yet filtered.
        missing, saturated (`np.ndarray` of the same shape, bool): see `numpy.isnan` and `saturated_samples`.
        sampling_rate (`float`): Hz.
        edges (`np.ndarray` of shape `(num_patches + 1,)`): first sample of each patch, and the end of the last.
    """
    inside = slice(edges[0], edges[-1])
    starts, counts = edges[:-1] - edges[0], np.diff(edges)
    is_flat = _varies_little(signal[:, inside], starts, counts)
    still = still_samples(signal[:, inside], sampling_rate)
    leads = np.flatnonzero(still.any(axis=1))
    is_flat[leads] |= np.add.reduceat(still[leads], starts, axis=1, dtype=np.int64) >= counts / 2
    flags = np.where(is_flat, int(QualityFlag.FLAT), 0)
    for where, flag in ((missing, QualityFlag.MISSING), (saturated, QualityFlag.SATURATED)):
        if where[:, inside].any():
            flags |= np.logical_or.reduceat(where[:, inside], starts, axis=1) * int(flag)
    flags[(flags & int(QualityFlag.MISSING)) != 0] &= ~int(QualityFlag.FLAT)  # what bridges a gap says nothing
    return flags.astype(np.int64)


def _varies_little(signal, starts, counts):
    """Return in which patches the standard deviation is below 1 microvolt, bool `(num_leads, num_patches)`."""
    lowest, highest = (each.reduceat(signal, starts, axis=1) for each in (np.minimum, np.maximum))
    # two values alone that are so far apart make a variance of this: the leads that need no closer look, nearly all
    least_variance = np.square(highest - lowest) / (2 * counts)
    far = np.maximum(highest, -lowest)
    found = least_variance < 2 * _flat_variance(far)
    leads = np.flatnonzero(found.any(axis=1))
    values = signal[leads].astype(np.float64)
    mean = np.add.reduceat(values, starts, axis=1) / counts
    variance = np.add.reduceat(values**2, starts, axis=1) / counts - mean**2
    found[leads] = variance < _flat_variance(mean)
    return found


def _flat_variance(mean):
    return (
        FLAT_STD_MV**2 + 1e-12 * mean**2
    )  # the second term: rounding of the squares when a lead wanders far from zero


def saturated_samples(signal, sampling_rate):
    """Return where a lead stands at a rail: boolean, the shape of `signal` (mV, gaps filled, at its own rate).

    A rail is the lead's largest or smallest value, at least 1 mV from zero (its mean, after `fill_gaps`), for 40 ms.
    """
    found = np.zeros(signal.shape, bool)
    shortest = _run_length(SATURATED_SECONDS, sampling_rate)
    for extreme in (signal.max(axis=1, keepdims=True), signal.min(axis=1, keepdims=True)):
        every = shortest // 2  # two of these samples lie in every run that is long enough
        is_there = signal[:, ::every] == extreme
        may_be = (is_there[:, 1:] & is_there[:, :-1]).any(axis=1, keepdims=True) & (np.abs(extreme) >= SATURATED_MV)
        leads = np.flatnonzero(may_be)
        if len(leads):
            found[leads] |= _long_runs(signal[leads] == extreme[leads], shortest)
    return found


def still_samples(signal, sampling_rate):
    """Return where a lead does not change at all for 0.3 s or longer: boolean, the shape of `signal`."""
    found = np.zeros(signal.shape, bool)
    shortest = _run_length(STILL_SECONDS, sampling_rate)
    leads = np.flatnonzero(_may_stand_still(signal, shortest))
    if len(leads):
        is_equal = signal[leads, 1:] == signal[leads, :-1]
        found[leads, 1:] = _long_runs(is_equal, shortest)
    return found


def _may_stand_still(signal, shortest):
    """Return the leads of which a few samples allow that `shortest` on end equal the one before, bool `(num_leads,)`."""
    every = max(1, shortest // 32)
    some = signal[:, ::every]
    is_still, length = some[:, 1:] == some[:, :-1], 1  # (leads, places): for `length` of these samples from there on
    while 2 * length < shortest // every:  # so many of them lie in a run and equal the one before, less the first
        is_still = is_still[:, length:] & is_still[:, :-length]
        length *= 2
    return is_still.any(axis=1)


def _run_length(seconds, sampling_rate):
    """Return of how many samples a run of so many seconds consists, never fewer than 4."""
    return max(4, math.ceil(seconds * sampling_rate))


def _long_runs(is_there, shortest):
    """Return where `is_there` holds for at least `shortest` samples on end."""
    padded = np.zeros((len(is_there), is_there.shape[1] + 2), np.int8)
    padded[:, 1:-1] = is_there
    steps = np.diff(padded, axis=1)  # (leads, samples + 1): 1 at the start of a run, -1 behind its end
    starts, stops = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    is_long = stops - starts >= shortest
    steps.fill(0)
    steps.reshape(-1)[starts[is_long]] = 1
    steps.reshape(-1)[stops[is_long]] = -1
    return steps[:, :-1].cumsum(axis=1, dtype=np.int8).view(bool)


def line_flags(signal, usable, sampling_rate, edges):
    """Return the `QualityFlag`s of each patch, `int64 (num_leads, num_patches)`: mains and drift of the base line.

    Args:
        signal, sampling_rate, edges: as for `sample_flags`.
        usable (`np.ndarray` of shape `(num_leads, num_patches)`, bool): False where `sample_flags` found a gap or nothing;
            0 there.
    """
    patches = _equal_patches(signal, edges)
    mains = mains_amplitude(patches, sampling_rate) >= MAINS_MV
    drifts = drift(patches, sampling_rate) >= DRIFT_MV
    return (mains * int(QualityFlag.MAINS) | drifts * int(QualityFlag.DRIFT)) * usable


def _equal_patches(signal, edges):
    """Return `(num_leads, num_patches, samples)`, patches that begin at `edges` and all have the length of the first."""
    length = int(edges[1] - edges[0])
    if (np.diff(edges) == length).all():
        return signal[:, edges[0] : edges[-1]].reshape(len(signal), -1, length)
    places = edges[:-1, None] + np.arange(length)
    return signal[:, np.minimum(places, signal.shape[1] - 1)]  # the last value stands for what is missing


def mains_amplitude(patches, sampling_rate):
    """Return the amplitude of 50 or 60 Hz in each patch, mV; 0 where it does not stand out from its neighbours.

    Args: `patches` of shape `(num_leads, num_patches, samples)`, mV, not filtered. Lines that the rate cannot hold are not
    looked for.
    """
    num_samples = patches.shape[-1]
    amplitude = np.zeros(patches.shape[:-1])
    for line in MAINS_HZ:
        beside = max(4.0, 3 * sampling_rate / num_samples)  # the window's main lobe, and more
        if line + beside > sampling_rate / 2:
            continue
        parts = patches @ _mains_basis(num_samples, float(sampling_rate), line, beside)
        each = np.hypot(parts[..., :3], parts[..., 3:])  # at the line, below, above
        stands_out = each[..., 0] >= MAINS_CONTRAST * each[..., 1:].max(axis=-1)
        amplitude = np.maximum(amplitude, np.where(stands_out, each[..., 0], 0.0))
    return amplitude


@functools.lru_cache(maxsize=8)
def _mains_basis(num_samples, sampling_rate, line, beside):
    """Return `(num_samples, 6)`: cosines and sines at the line, below, above, in a window that lets nothing else through."""
    window = np.hanning(num_samples + 2)[1:-1]
    angles = 2 * np.pi / sampling_rate * np.outer(np.arange(num_samples), [line, line - beside, line + beside])
    waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return (window[:, None] * waves * (2 / window.sum())).astype(np.float32)


def drift(patches, sampling_rate):
    """Return how far the base line (what lies below 0.5 Hz) moves within each patch, mV, `(num_leads, num_patches)`.

    Args: as for `mains_amplitude`.
    """
    num_leads, num_patches, num_samples = patches.shape
    per_patch = max(2, round(num_samples / sampling_rate * 10))
    means = _block_means(patches, per_patch)
    rate = per_patch * sampling_rate / num_samples
    base_line = resample(means, rate, rate, None, DRIFT_HZ, highcut_order=2).reshape(num_leads, num_patches, per_patch)
    return base_line.max(axis=-1) - base_line.min(axis=-1)


# On patches at the model's rate, in its band


def beat_flags(patches, usable, sampling_rate, lead_names):
    """Return the `QualityFlag`s of each patch, int64 `(..., num_leads, num_patches)`: noise, disconnected, contradicting.

    Args:
        patches (`np.ndarray` of shape `(..., num_leads, num_patches, patch_size)`): mV, gaps filled, in the model's
            band; of one record or, with axes before these, of several.
        usable (`np.ndarray` of shape `(..., num_leads, num_patches)`, bool): False where `sample_flags` found a gap or
            nothing; 0 there.
        sampling_rate (`float`): Hz.
        lead_names (list of `str`): standard names.
    """
    agreement, around = beat_agreement(patches, usable, sampling_rate)
    num_agreeing = ((around >= BEATS_ALIKE) & usable).sum(axis=-2, keepdims=True)
    # not so in fibrillation, nor where all is noise: there no lead is worse than the others
    most_agree = (num_agreeing >= 2) & (2 * num_agreeing > usable.sum(axis=-2, keepdims=True))
    is_absent = (agreement < BEATS_ALIKE) & (around < BEATS_ABSENT) & most_agree
    flags = (around < BEATS_ALIKE) * int(QualityFlag.NOISE) | is_absent * int(QualityFlag.DISCONNECTED)
    return (flags | limb_leads_contradict(patches, usable, lead_names) * int(QualityFlag.INCONSISTENT)) * usable


def beat_agreement(patches, usable, sampling_rate):
    """Return how well each lead follows the heartbeats that the other leads show, around each patch: -1 to 1.

    A heartbeat is where all leads are steep at once. The steepness of a lead, smoothed over 0.12 s, is correlated with the
    mean of the others: over the patch, and over the patch with a second to each side. 1 where nothing can be said: fewer than
    three leads, or no beat.

    Args: as for `beat_flags`. Unusable ones have no beats. Returns: both, float `(..., num_leads, num_patches)`.
    """
    num_patches, patch_size = patches.shape[-2:]
    too_few = usable.any(axis=-1).sum(axis=-1) < 3
    if too_few.all():
        return np.ones((2, *usable.shape))
    per_patch = max(4, round(patch_size / sampling_rate / _BLOCK_SECONDS))
    slope = _slope(patches, sampling_rate)
    slope[~usable] = 0
    steepness = uniform_filter1d(_block_means(slope, per_patch), _SMOOTHED_BLOCKS, axis=-1)
    # a beat of this lead: the steepest block of most patches, so that one with an artefact does not hide the beats of others
    steepest = np.sort(steepness.reshape(*usable.shape, per_patch).max(axis=-1), axis=-1)
    scale = np.maximum(steepest[..., [math.ceil(0.85 * (num_patches - 1))]], _LEAST_SLOPE_MV)
    own = np.minimum(steepness / scale, 1.0)
    others = own.sum(axis=-2, keepdims=True) - own  # the mean of the others, but for a factor

    own, others = (each.astype(np.float64).reshape(*usable.shape, per_patch) for each in (own, others))
    sums = [own.sum(axis=-1), others.sum(axis=-1), *map(np.vecdot, (own, own, others), (others, own, others))]
    in_patch = np.stack(sums) / per_patch
    reach = max(1, round(sampling_rate / patch_size))  # patches to each side: a second
    num_others = np.maximum(1, usable.sum(axis=-2, keepdims=True) - usable)
    around = uniform_filter1d(in_patch, 2 * reach + 1, axis=-1)
    agreement = np.stack([_correlation(means, num_others) for means in (in_patch, around)])
    agreement[:, too_few] = 1.0
    return agreement


def _correlation(means, num_others):
    """Return the correlation of a lead with the sum of `num_others` other ones, from the means that `beat_agreement` makes."""
    own, others, product, own_squared, others_squared = means
    least = 1e-3  # of one lead; with beats it is ten times that: nothing there to follow, or nothing that follows
    variance, variance_others = own_squared - own**2, others_squared - others**2
    size = np.sqrt(np.maximum(variance, least) * np.maximum(variance_others, least * num_others**2))
    return np.where(variance_others < least * num_others**2, 1.0, (product - own * others) / size)


def limb_leads_contradict(patches, usable, lead_names):
    """Return in which patches of which limb leads these contradict each other: bool `(..., num_leads, num_patches)`.

    Checked are I + III = II and aVR = -(I + II) / 2, aVL = I - II / 2, aVF = II - I / 2, where the leads are there and usable.

    Args: as for `beat_flags`.
    """
    found = np.zeros(usable.shape, bool)
    sums = [factors for factors in _SUMS_TO_ZERO if all(name in lead_names for name in factors)]
    if not sums:
        return found
    rows = [row for row, name in enumerate(lead_names) if name in _LIMB_LEADS]
    factors = np.array([[each.get(lead_names[row], 0) for row in rows] for each in sums], np.float32)
    limb_leads = patches[..., rows, :, :]
    rest = factors @ limb_leads.reshape(*limb_leads.shape[:-2], -1)  # (..., sums, samples)
    takes_part = factors != 0
    sizes = _rms(limb_leads)
    largest = np.stack([sizes[..., each, :].max(axis=-2) for each in takes_part], axis=-2)  # (..., sums, patches)
    is_known = ~(takes_part @ ~usable[..., rows, :])
    rest = _rms(rest.reshape(*largest.shape, patches.shape[-1]))
    is_violated = is_known & (rest > LIMB_SHARE * largest + LIMB_MV)
    found[..., rows, :] = takes_part.T @ is_violated
    return found


def _rms(patches):
    return np.sqrt(np.vecdot(patches, patches) / patches.shape[-1])


def explain_contradiction(patches, usable, lead_names):
    """Return what would make limb leads agree that contradict each other: `"aVL and aVF were exchanged"`, `"III were
    reversed"`, or `None` if no such single change would.

    Args: as for `limb_leads_contradict`.
    """
    limb_leads = [name for name in lead_names if name in _LIMB_LEADS]
    few = (1 - EXPLAINED_SHARE) * limb_leads_contradict(patches, usable, lead_names).mean()
    signs = np.ones((len(lead_names), 1, 1), np.float32)
    for one, other in itertools.combinations(limb_leads, 2):
        names = [{one: other, other: one}.get(name, name) for name in lead_names]
        if limb_leads_contradict(patches, usable, names).mean() < few:
            return f"{one} and {other} were exchanged"
    for name in limb_leads:
        row = lead_names.index(name)
        signs[row] = -1
        if limb_leads_contradict(patches * signs, usable, lead_names).mean() < few:
            return f"{name} were reversed"
        signs[row] = 1
    return None


_LIMB_LEADS = ("I", "II", "III", "aVR", "aVL", "aVF")
_SUMS_TO_ZERO = (
    {"I": 1, "II": -1, "III": 1},
    {"I": 0.5, "II": 0.5, "aVR": 1},
    {"I": -1, "II": 0.5, "aVL": 1},
    {"I": 0.5, "II": -1, "aVF": 1},
)


def _slope(patches, sampling_rate):
    """Return by how much each lead changes within 27 ms, in the shape of `patches`; 0 at the ends."""
    signal = patches.reshape(*patches.shape[:-2], -1)
    lag = max(1, round(_SLOPE_SECONDS * sampling_rate))
    slope = np.zeros(signal.shape, np.float32)
    inside = slope[..., lag // 2 : lag // 2 + signal.shape[-1] - lag]
    np.subtract(signal[..., lag:], signal[..., :-lag], out=inside)
    np.abs(inside, out=inside)
    return slope.reshape(patches.shape)


def _block_means(patches, per_patch):
    """Return means of blocks of equal length (to a sample), `per_patch` of them a patch: `(..., num_leads, blocks)`."""
    size, rest = divmod(patches.shape[-1], per_patch)
    if not rest and size <= 8:  # four times as fast for so few
        blocks = patches.reshape(*patches.shape[:-2], -1, size)
        return sum(blocks[..., place] for place in range(size)) / np.float32(size)
    return (patches @ _averages(patches.shape[-1], per_patch)).reshape(*patches.shape[:-2], -1)


@functools.lru_cache(maxsize=8)
def _averages(num_samples, num_blocks):
    """Return `(num_samples, num_blocks)`, whose columns average the samples of a block."""
    edges = np.linspace(0, num_samples, num_blocks + 1).round().astype(np.int64)
    averages = np.zeros((num_samples, num_blocks), np.float32)
    for block, (start, stop) in enumerate(itertools.pairwise(edges)):
        averages[start:stop, block] = 1 / (stop - start)
    return averages
