"""Figures of reconstructed leads, in millivolt and decibel: MAE, RMSE, PSNR, SSIM, Pearson's r.

Every figure is first of one lead of one record, then the mean over the leads of the record, then the mean and the median
over the records. A reference lead that stays within `LEAST_RANGE_MV` is flat: it has no figure and is in no mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import correlate1d

from .classification_metrics import mean_of_scored

FIXED_PEAK_MV = 4.0
LEAST_RANGE_MV = 0.1
LEAST_RMSE_MV = 1e-4  # below, the PSNR rises no more
SSIM_WINDOWS = {"ssim_61": (61, 10.0), "ssim_11": (11, 1.5)}  # samples, standard deviation in samples


def lead_metrics(
    predicted: np.ndarray, reference: np.ndarray, range_mv: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return the figures of each lead of one record, `(leads,)` each, NaN where undefined.

    Args:
        predicted, reference (`np.ndarray` of shape `(leads, samples)`): millivolt, finite.
        range_mv (`np.ndarray` of shape `(leads,)`, *optional*): maximum - minimum of each reference lead over the whole
            record, where these samples are a part of it; default: of these samples.

    Returns:
        `mae_mv`, `rmse_mv`: mean absolute and root mean square error.
        `psnr_range_db`: peak signal-to-noise ratio, the peak being the range (maximum - minimum) of this reference lead.
        `psnr_fixed_db`: the same with a peak of 4 mV for every lead. In both an RMSE under 0.0001 mV counts as that.
        `ssim_61`, `ssim_11`: structural similarity under a Gaussian window of 61 samples, standard deviation 10 (0.2 s at
        300 Hz), and of 11, 1.5 (usual for images). NaN where the record is shorter than the window.
        `pearson_r`: NaN also where the predicted lead is constant.
    """
    predicted, reference = np.asarray(predicted, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    error = predicted - reference
    spread = np.ptp(reference, axis=1) if range_mv is None else np.asarray(range_mv, dtype=np.float64)
    rmse = np.sqrt((error**2).mean(axis=1))
    is_flat = spread < LEAST_RANGE_MV
    spread = np.where(is_flat, np.nan, spread)
    figures = {
        "mae_mv": np.abs(error).mean(axis=1),
        "rmse_mv": rmse,
        "psnr_range_db": _psnr(spread, rmse),
        "psnr_fixed_db": _psnr(FIXED_PEAK_MV, rmse),
        **{name: ssim(predicted, reference, spread, window=window) for name, window in SSIM_WINDOWS.items()},
        "pearson_r": _pearson(predicted, reference),
    }
    return {name: np.where(is_flat, np.nan, values) for name, values in figures.items()}


def _psnr(peak_mv: np.ndarray | float, rmse_mv: np.ndarray) -> np.ndarray:
    return 20 * np.log10(peak_mv / np.maximum(rmse_mv, LEAST_RMSE_MV))


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = (each - each.mean(axis=1, keepdims=True) for each in (x, y))
    power = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    has_spread = (np.ptp(x, axis=1) > 0) & (np.ptp(y, axis=1) > 0)
    return np.where(has_spread, (x * y).sum(axis=1) / np.where(has_spread, power, 1.0), np.nan)


def ssim(x: np.ndarray, y: np.ndarray, spread_mv: np.ndarray, *, window: tuple[int, float]) -> np.ndarray:
    """Return the structural similarity of each lead, the mean over all places where the window lies within the record.

    Args:
        x, y (`np.ndarray` of shape `(leads, samples)`): millivolt.
        spread_mv (`np.ndarray` of shape `(leads,)`): dynamic range of each lead.
        window: samples (odd) and standard deviation of the Gaussian.

    Source: Wang et al. 2004 (doi 10.1109/TIP.2003.819861), equation 13, K1 = 0.01, K2 = 0.03, along time only.
    """
    size, deviation = window
    if x.shape[1] < size:
        return np.full(len(x), np.nan)
    weights = np.exp(-0.5 * ((np.arange(size) - size // 2) / deviation) ** 2)
    weights /= weights.sum()

    def local_mean(values: np.ndarray) -> np.ndarray:
        inside = slice(size // 2, values.shape[1] - size // 2)
        return correlate1d(values, weights, axis=1)[:, inside]  # (leads, positions)

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x, variance_y = local_mean(x**2) - mean_x**2, local_mean(y**2) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = ((k * spread_mv[:, None]) ** 2 for k in (0.01, 0.03))
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return likeness.mean(axis=1)


def reconstruction_metrics(
    predicted: Sequence[np.ndarray], references: Sequence[np.ndarray], scored_leads: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the figures of `lead_metrics` of all records, `(records, leads)` each, NaN where `scored_leads` is False."""
    by_record = [lead_metrics(*pair) for pair in zip(predicted, references, strict=True)]
    return {
        name: np.where(scored_leads, np.stack([figures[name] for figures in by_record]), np.nan)
        for name in by_record[0]
    }


def record_means(figures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the mean over leads of each figure, `(records,)` from `(records, leads)`, NaN for a record without a lead."""
    return {name: np.array([mean_of_scored(leads) for leads in values]) for name, values in figures.items()}


def mean_and_median(of_records: dict[str, np.ndarray]) -> dict[str, float]:
    """Return `name` and `name_median` of the figures of records, `(records,)` each; NaN counts as absent."""
    result = {}
    for name, values in of_records.items():
        defined = values[np.isfinite(values)]
        result[name] = mean_of_scored(values)
        result[f"{name}_median"] = float(np.median(defined)) if len(defined) else float("nan")
    return result


def by_lead(figures: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, dict]:
    """Return for each lead the mean over records of each figure, and `records`: how many have it and are not flat."""
    return {
        lead: {"records": int(np.isfinite(figures["mae_mv"][:, column]).sum())}
        | {name: mean_of_scored(values[:, column]) for name, values in figures.items()}
        for column, lead in enumerate(names)
    }
