"""Units, resampling, filters: arrays `(num_leads, num_samples)` in, arrays out. numpy and scipy only."""

import functools
import logging
import math
from fractions import Fraction

import numpy as np
from scipy import fft

logger = logging.getLogger(__name__)

UNIT_TO_MV = {"nv": 1e-6, "uv": 1e-3, "mv": 1.0, "v": 1e3}
LOWEST_RATE, HIGHEST_RATE = 50.0, 100_000.0  # Hz; below 50 a QRS complex is lost, above 100 kHz no ECG is recorded
PLAUSIBLE_RANGE_MV = (0.01, 50.0)  # peak to peak: no lead more, the largest one no less
_LARGEST_FACTOR = (
    20_000  # of the rational that stands for a ratio of rates: at most 25 ppm off, less than a recorder's clock
)


def to_millivolt(signal, units, record=None):
    """Return `signal` in millivolt; an implausible amplitude is warned about.

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
    doubt = implausible_amplitude(signal)
    if doubt:
        logger.warning(f"{_where(record)}{doubt}")
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


def implausible_amplitude(signal):
    """Return in words why the amplitudes of `signal` (mV) look like another unit, e.g. microvolt taken for millivolt, or None."""
    return implausible_ranges(lead_ranges(signal))


def implausible_ranges(ranges):
    """Return what `implausible_amplitude` does, from the peak-to-peak values of the leads."""
    low, high = PLAUSIBLE_RANGE_MV
    largest = float(ranges.max(initial=0.0))
    if largest > high:
        typical = float(np.sort(ranges)[len(ranges) // 2])
        who = "leads range" if typical > high else f"row {int(ranges.argmax())} ranges"
        size = f"{typical:.4g} mV (median)" if typical > high else f"{largest:.4g} mV"
        return (
            f"{who} over {size}, an ECG over 0.1 to 10 mV. Check `units`: microvolt or ADC steps passed as millivolt?"
        )
    if 0 < largest < low:
        return f"leads range over {largest:.4g} mV, an ECG over 0.1 to 10 mV. Check `units`: volt passed as millivolt?"
    return None


def lead_ranges(signal):
    """Return peak-to-peak values, shape `(num_leads,)`, of the leads; those without two values count 0."""
    lowest, highest = lead_extremes(signal)
    return np.where(highest >= lowest, highest - lowest, 0.0)


def lead_extremes(signal):
    """Return the lowest and the highest value along the last axis; inf and -inf where there is none."""
    return np.fmin.reduce(signal, axis=-1, initial=np.inf), np.fmax.reduce(signal, axis=-1, initial=-np.inf)


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
    mean = signal.mean(axis=1, keepdims=True, dtype=np.float64)  # NaN in leads with a gap
    filled = np.empty(signal.shape, np.float32)
    np.subtract(signal, mean, out=filled, casting="same_kind")
    for row in np.flatnonzero(np.isnan(mean)):
        filled[row] = _bridged(signal[row])
    return filled


def _bridged(lead):
    there = np.flatnonzero(~np.isnan(lead))
    if not len(there):
        return 0.0
    values = lead[there].astype(np.float64)
    return np.interp(np.arange(len(lead)), there, values - values.mean())


def resample(signal, sampling_rate, target_rate, lowcut_hz=None, highcut_hz=None, *, lowcut_order=2, highcut_order=8):
    """Return `signal` at `target_rate` and band-passed, without any shift in time: sample 0 stays where it is.

    All in the cosine transform, that is, with the signal mirrored at both ends, so that neither the ends nor an offset
    ring: its terms are multiplied by the squared Butterworth magnitude (what running the filter both ways gives; 0.5 at the
    corner) and summed at the new times. What the lower of the two rates cannot hold is left out, not folded.

    Args:
        signal (`np.ndarray` of shape `(num_leads, num_samples)`): millivolt, finite.
        sampling_rate, target_rate (`float`): Hz, above zero. Need not be integers (PTB 1000, INCART 257).
        lowcut_hz, highcut_hz (`float`, *optional*): corners in Hz, below half the target rate; `None` leaves that side open.
        lowcut_order, highcut_order (`int`): orders of the Butterworth filter at each corner.

    Returns:
        `np.ndarray` of shape `(num_leads, round(num_samples * target_rate / sampling_rate))`, float32.

    Raises:
        ValueError: a rate is not positive, a corner is not between 0 and half the target rate, the low one is not below the
            high one, or `signal` is not two-dimensional with at least two samples.
    """
    signal = np.asarray(signal, np.float32)
    if signal.ndim != 2 or signal.shape[1] < 2:
        raise ValueError(f"Signal of shape {signal.shape}; pass (num_leads, num_samples) with at least 2 samples.")
    if not (0 < sampling_rate < math.inf and 0 < target_rate < math.inf):
        raise ValueError(f"Rates of {sampling_rate!r} and {target_rate!r} Hz; both must be above zero and finite.")
    check_band(target_rate, lowcut_hz, highcut_hz)
    num_samples, band = signal.shape[1], (lowcut_hz, highcut_hz, lowcut_order, highcut_order)
    up, down = rational_ratio(float(sampling_rate), float(target_rate))
    if up == down and lowcut_hz is None and highcut_hz is None:
        return signal.copy()
    mean = signal.mean(axis=1, keepdims=True) if lowcut_hz is None else None  # an offset of a volt costs no digits
    signal = signal if mean is None else signal - mean
    pieces = fft.next_fast_len(-(-num_samples // down), real=True)  # of `down` samples in, `up` out
    in_phase, out_of_phase = _terms(pieces, up, down, float(sampling_rate), *band)
    if pieces * down > num_samples:
        signal = np.pad(signal, ((0, 0), (0, pieces * down - num_samples)), mode="symmetric")
    spectrum = fft.dct(signal, axis=1, norm="ortho")[:, : len(in_phase)]
    out = np.zeros((len(signal), pieces * up), np.float32)
    np.multiply(spectrum, in_phase, out=out[:, : len(in_phase)])
    out = fft.idct(out, axis=1, norm="ortho", overwrite_x=True)
    if up != down:
        sines = np.zeros((len(signal), pieces * up), np.float32)  # its first term is that of k = 1
        np.multiply(spectrum[:, 1:], out_of_phase[1:], out=sines[:, : len(out_of_phase) - 1])
        out -= fft.idst(sines, axis=1, norm="ortho", overwrite_x=True)
    out = out[:, : math.floor(num_samples * target_rate / sampling_rate + 0.5)]
    return out if mean is None else out + mean


@functools.lru_cache(maxsize=8)  # records and windows of one length come in rows
def _terms(pieces, up, down, sampling_rate, lowcut_hz, highcut_hz, lowcut_order, highcut_order):
    """Return by what the terms of the cosine transform are multiplied, for the cosines and the sines at the new times.

    Term k is cos(pi k (n + 1/2) / N) at sample n of N, and n = m down / up at the new sample m of M = N up / down. So it is
    cos(pi k (m + 1/2) / M + phase), with the phase pi k (up / down - 1) / (2 M): the new samples are not in the middle of
    their intervals as the old ones are."""
    terms = np.arange(min(pieces * down, pieces * up))
    frequencies = terms * (sampling_rate / (2 * pieces * down))  # Hz
    gain = np.full(len(terms), math.sqrt(up / down))
    if lowcut_hz is not None:
        power = (frequencies / lowcut_hz) ** (2 * lowcut_order)
        gain *= power / (1 + power)
    if highcut_hz is not None:
        gain /= 1 + (frequencies / highcut_hz) ** (2 * highcut_order)
    phase = np.pi * terms * (up / down - 1) / (2 * pieces * up)
    return (gain * np.cos(phase)).astype(np.float32), (gain * np.sin(phase)).astype(np.float32)


@functools.lru_cache(maxsize=64)
def rational_ratio(sampling_rate, target_rate):
    """Return integers `(up, down)`, neither above 20,000, with `up / down` = `target_rate / sampling_rate` (25 ppm)."""
    ratio = Fraction(target_rate).limit_denominator(10_000) / Fraction(sampling_rate).limit_denominator(10_000)
    if ratio <= 1:
        ratio = ratio.limit_denominator(_LARGEST_FACTOR)
    else:
        ratio = 1 / (1 / ratio).limit_denominator(_LARGEST_FACTOR)
    return ratio.numerator, ratio.denominator


def denoise(signal):
    """Return `signal` with the noise floor of each wavelet band taken out: db6, soft threshold.

    The threshold of a band is sigma * sqrt(2 ln n), sigma from the median of its absolute coefficients, so that a band's own
    background goes and beats, which are rare, stay. What lies below rate / 16 is left: P and T waves are not rare there.

    Args:
        signal (`np.ndarray` of shape `(num_leads, num_samples)`): mV, finite.

    Returns:
        `np.ndarray` of the same shape, float32.

    Raises:
        ImportError: PyWavelets is not installed.

    Source: the paper names db6 and no more; threshold after Donoho & Johnstone 1994, by band after Johnstone & Silverman 1997.
    """
    try:
        import pywt
    except ImportError as error:
        raise ImportError("denoise=True needs PyWavelets: pip install PyWavelets") from error
    num_samples = signal.shape[1]
    levels = min(3, pywt.dwt_max_level(num_samples, "db6"))
    approximation, *details = pywt.wavedec(signal, "db6", mode="symmetric", level=levels, axis=-1)
    universal = math.sqrt(2 * math.log(max(num_samples, 2)))
    for detail in details:
        limit = universal * np.median(np.abs(detail), axis=-1, keepdims=True) / 0.6745
        detail[...] = np.sign(detail) * np.maximum(np.abs(detail) - limit, 0)
    return pywt.waverec([approximation, *details], "db6", mode="symmetric", axis=-1)[:, :num_samples].astype(np.float32)


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
