"""Units, resampling, filters: arrays `(num_leads, num_samples)` in, arrays out. numpy and scipy only."""

import functools
import logging
import math
from fractions import Fraction

import numpy as np
from scipy import fft
from scipy.signal import upfirdn

logger = logging.getLogger(__name__)

UNIT_TO_MV = {"nv": 1e-6, "uv": 1e-3, "mv": 1.0, "v": 1e3}
LOWEST_RATE, HIGHEST_RATE = 50.0, 100_000.0  # Hz; below 50 a QRS complex is lost, above 100 kHz no ECG is recorded
PLAUSIBLE_RANGE_MV = (0.01, 50.0)  # of the peak-to-peak value of a lead, median over the leads
_LONGEST_HALF = 20  # of the resampling filter, in samples of the lower of the two rates
_KAISER_BETA = 8.0
_LARGEST_FACTOR = (
    20_000  # of the rational that stands for a ratio of rates: at most 25 ppm off, less than a recorder's clock
)


def to_millivolt(signal, units, record=None):
    """Return `signal` in millivolt; an implausible amplitude is warned about once.

    Args:
        signal (`np.ndarray` of shape `(num_leads, num_samples)`): numbers, NaN where there is no value.
        units (`str`, or one `str` per lead): `"mV"`, `"uV"` (or either micro sign), `"V"`, `"nV"`; case is ignored.
        record (`str`, *optional*): the record's name, for messages.

    Returns:
        `np.ndarray` of the same shape; float32 stays float32, all else becomes float64.

    Raises:
        ValueError: a unit is unknown, or there is not one unit per lead.
    """
    signal = np.asarray(signal)
    signal = signal if signal.dtype == np.float32 else signal.astype(np.float64)
    units = [units] * len(signal) if isinstance(units, str) else list(units)
    if len(units) != len(signal):
        raise ValueError(
            f"{_where(record)}{len(units)} units for {len(signal)} leads; pass one for all, or one per lead."
        )
    factors = [unit_to_mv(unit, record) for unit in units]
    if any(factor != 1.0 for factor in factors):
        signal = (signal * np.array(factors)[:, None]).astype(signal.dtype)
    warn_if_implausible(signal, record)
    return signal


def unit_to_mv(unit, record=None):
    """Return the factor that turns a voltage in `unit` into millivolt; `ValueError` for what is no unit of voltage."""
    factor = _factor(unit) if isinstance(unit, str) and len(unit) <= 16 else None
    if factor is None:
        raise ValueError(
            f'{_where(record)}unit {unit!r} is not a known unit of voltage. Known: "nV", "uV" (or "µV"), "mV", "V". '
            'Pass units="mV" or what the signal is stored in; leave rows out that are no voltage.'
        )
    return factor


@functools.lru_cache(maxsize=256)
def _factor(unit):
    return UNIT_TO_MV.get(unit.strip().replace("µ", "u").replace("μ", "u").lower())


def warn_if_implausible(signal, record=None):
    """Warn once if the amplitudes of `signal` (mV) look like another unit, e.g. microvolt taken for millivolt."""
    ranges = lead_ranges(signal)
    typical = float(np.median(ranges)) if len(ranges) else 0.0
    low, high = PLAUSIBLE_RANGE_MV
    if typical > high or 0 < typical and ranges.max() < low:
        warn_once(
            "amplitude",
            f"{_where(record)}leads range over {typical:.4g} mV (median), an ECG over 0.1 to 10 mV. Check `units`: "
            f"{'microvolt or ADC steps passed as millivolt?' if typical > high else 'volt passed as millivolt?'} "
            "(Said once; further records are not named.)",
        )


def lead_ranges(signal):
    """Return peak-to-peak values, shape `(num_leads,)`, of the leads; those without two values count 0."""
    lowest = np.fmin.reduce(signal, axis=1, initial=np.inf)
    highest = np.fmax.reduce(signal, axis=1, initial=-np.inf)
    return np.where(highest >= lowest, highest - lowest, 0.0)


def check_sampling_rate(sampling_rate, record=None):
    """Return `sampling_rate` as a float; `ValueError` if it is missing, no number, or outside 50 to 100,000 Hz."""
    remedy = f"Pass sampling_rate=<Hz> of the record, {LOWEST_RATE:g} to {HIGHEST_RATE:g}."
    if sampling_rate is None:
        raise ValueError(f"{_where(record)}no sampling rate given; a wrong guess would give wrong findings. {remedy}")
    is_number = isinstance(sampling_rate, (int, float, np.integer, np.floating)) and not isinstance(sampling_rate, bool)
    if not is_number or not LOWEST_RATE <= sampling_rate <= HIGHEST_RATE:  # NaN fails the comparison
        raise ValueError(f"{_where(record)}sampling_rate is {sampling_rate!r}, not a possible rate of an ECG. {remedy}")
    return float(sampling_rate)


def fill_gaps(signal):
    """Return `signal` around zero and without NaN: float32, each lead less its mean, gaps bridged by straight lines.

    Leads without any value become zeros. What was filled has to be masked by the caller: it is for the filters only.
    """
    missing = np.isnan(signal)
    if not missing.any():
        return (signal - signal.mean(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    filled = np.zeros(signal.shape, np.float32)
    positions = np.arange(signal.shape[1])
    for lead, is_missing, out in zip(signal, missing, filled, strict=True):
        if not is_missing.all():
            values = lead[~is_missing].astype(np.float64)
            out[:] = np.interp(positions, positions[~is_missing], values - values.mean())
    return filled


def resample(signal, sampling_rate, target_rate, passband_hz=None):
    """Return `signal` at `target_rate`, low-passed first when going down. Zero phase; the ends are mirrored.

    Args:
        signal (`np.ndarray` of shape `(num_leads, num_samples)`): millivolt, finite.
        sampling_rate, target_rate (`float`): Hz, above zero. Need not be integers (PTB 1000, INCART 257).
        passband_hz (`float`, *optional*): up to where the result has to be right; the lower it is, the shorter is the filter
            that does it. `None`: nearly up to half of the lower rate.

    Returns:
        `np.ndarray` of shape `(num_leads, round(num_samples * target_rate / sampling_rate))`, float32; sample 0 stays
        where it is.

    Raises:
        ValueError: a rate is not positive, or `signal` is not two-dimensional with at least two samples.
    """
    signal = np.asarray(signal, np.float32)
    if signal.ndim != 2 or signal.shape[1] < 2:
        raise ValueError(f"Signal of shape {signal.shape}; pass (num_leads, num_samples) with at least 2 samples.")
    if not (0 < sampling_rate < math.inf and 0 < target_rate < math.inf):
        raise ValueError(f"Rates of {sampling_rate!r} and {target_rate!r} Hz; both must be above zero and finite.")
    up, down = rational_ratio(float(sampling_rate), float(target_rate))
    num_out = math.floor(signal.shape[1] * target_rate / sampling_rate + 0.5)
    if up == down:
        return signal.copy()
    half_length = _half_length(passband_hz, min(sampling_rate, target_rate))
    taps, margin, offset = _resampling_filter(up, down, half_length)
    mean = signal.mean(axis=1, keepdims=True)
    right = margin + down // up + 1  # outputs up to half a step beyond the last sample
    padded = np.pad(signal - mean, ((0, 0), (margin, right)), mode="reflect")
    return upfirdn(taps, padded, up, down, axis=1)[:, offset : offset + num_out] + mean


@functools.lru_cache(maxsize=64)
def rational_ratio(sampling_rate, target_rate):
    """Return integers `(up, down)`, neither above 20,000, with `up / down` = `target_rate / sampling_rate` (25 ppm)."""
    ratio = Fraction(target_rate).limit_denominator(10_000) / Fraction(sampling_rate).limit_denominator(10_000)
    if ratio <= 1:
        ratio = ratio.limit_denominator(_LARGEST_FACTOR)
    else:
        ratio = 1 / (1 / ratio).limit_denominator(_LARGEST_FACTOR)
    return ratio.numerator, ratio.denominator


def _half_length(passband_hz, lower_rate):
    """Return half the length of the resampling filter, in samples of the lower rate: 80 dB beside the transition (Kaiser)."""
    transition = 0.0 if passband_hz is None else 1 - 2 * passband_hz / lower_rate
    return max(2, min(_LONGEST_HALF, math.ceil(2.55 / max(transition, 1e-9))))


@functools.lru_cache(maxsize=16)
def _resampling_filter(up, down, half_length):
    """Return `(taps, margin, offset)`: a windowed sinc, the input samples needed at each end, the first output kept."""
    slower = max(up, down)
    half = half_length * slower
    time = np.arange(-half, half + 1) / slower  # in samples of the lower rate
    taps = np.sinc(time) * np.kaiser(2 * half + 1, _KAISER_BETA)
    margin = math.ceil(half / up)
    lead_in = -(half + margin * up) % down  # zeros in front that put the first kept output on sample 0
    taps = np.concatenate([np.zeros(lead_in), taps, np.zeros(-(lead_in + taps.size) % up)])
    phases = taps.reshape(-1, up)
    taps = (phases / phases.sum(axis=0)).ravel()  # every phase passes a constant unchanged
    return taps.astype(np.float32), margin, (lead_in + half + margin * up) // down


def bandpass(signal, sampling_rate, lowcut_hz=None, highcut_hz=None, *, lowcut_order=2, highcut_order=8):
    """Return `signal` band-passed without any shift in time: Butterworth, forward and backward.

    The squared Butterworth magnitude (what running the filter both ways gives; 0.5 at the corner) is applied to the
    cosine transform, i.e. to the signal mirrored at both ends, so that neither the ends nor an offset ring.

    Args:
        signal (`np.ndarray` of shape `(num_leads, num_samples)`): millivolt, finite.
        sampling_rate (`float`): Hz.
        lowcut_hz, highcut_hz (`float`, *optional*): corners in Hz, below half the rate; `None` leaves that side open.
        lowcut_order, highcut_order (`int`): orders of the Butterworth filter at each corner.

    Returns:
        `np.ndarray` of the same shape, float32.

    Raises:
        ValueError: a corner is not between 0 and half the rate, or the low one is not below the high one.
    """
    check_band(sampling_rate, lowcut_hz, highcut_hz)
    signal = np.asarray(signal, np.float32)
    spectrum = fft.dct(signal, type=2, axis=1, norm="ortho")
    spectrum *= _gain(signal.shape[1], float(sampling_rate), lowcut_hz, highcut_hz, lowcut_order, highcut_order)
    return fft.idct(spectrum, type=2, axis=1, norm="ortho", overwrite_x=True)


@functools.lru_cache(maxsize=4)  # records and windows of one length come in rows
def _gain(num_samples, sampling_rate, lowcut_hz, highcut_hz, lowcut_order, highcut_order):
    """Return the gain of each term of the cosine transform, float32 `(num_samples,)`."""
    frequencies = np.arange(num_samples) * (sampling_rate / (2 * num_samples))  # Hz
    gain = np.ones(num_samples)
    if lowcut_hz is not None:
        power = (frequencies / lowcut_hz) ** (2 * lowcut_order)
        gain *= power / (1 + power)
    if highcut_hz is not None:
        gain /= 1 + (frequencies / highcut_hz) ** (2 * highcut_order)
    return gain.astype(np.float32)


def check_band(sampling_rate, lowcut_hz, highcut_hz):
    """Raise `ValueError` unless 0 < `lowcut_hz` < `highcut_hz` < `sampling_rate` / 2 (those that are given)."""
    corners = [0.0] + [corner for corner in (lowcut_hz, highcut_hz) if corner is not None] + [sampling_rate / 2]
    if not all(low < high for low, high in zip(corners, corners[1:], strict=False)):
        raise ValueError(
            f"Band of {lowcut_hz!r} to {highcut_hz!r} Hz at {sampling_rate:g} Hz; needed: "
            f"0 < lowcut_hz < highcut_hz < {sampling_rate / 2:g}, or None for an open side."
        )


_warned = set()


def warn_once(kind, message):
    """Log `message` as a warning, the first time for its `kind` in this process."""
    if kind not in _warned:
        _warned.add(kind)
        logger.warning(message)


def _where(record):
    return f'Record "{record}": ' if record else ""
