"""training/ecg_metrics/reconstruction_metrics.py, against the formulas written out sample by sample in float64."""

import math

import numpy as np
import pytest

from training.ecg_metrics.reconstruction_metrics import (
    by_lead,
    lead_metrics,
    mean_and_median,
    reconstruction_metrics,
    record_means,
)


@pytest.fixture
def leads():
    """Two leads of 90 samples and a reconstruction of each, millivolt."""
    generator = np.random.default_rng(0)
    reference = np.cumsum(generator.normal(0, 0.1, (2, 90)), axis=1)
    return reference + generator.normal(0, 0.05, (2, 90)), reference


def ssim_by_loops(x, y, size, deviation):
    spread = max(y) - min(y)
    c1, c2 = (0.01 * spread) ** 2, (0.03 * spread) ** 2
    kernel = [math.exp(-((k - size // 2) ** 2) / (2 * deviation**2)) for k in range(size)]
    kernel = [weight / math.fsum(kernel) for weight in kernel]
    values = []
    for start in range(len(x) - size + 1):
        a, b = x[start : start + size], y[start : start + size]
        mean_a = math.fsum(w * v for w, v in zip(kernel, a))
        mean_b = math.fsum(w * v for w, v in zip(kernel, b))
        variance_a = math.fsum(w * (v - mean_a) ** 2 for w, v in zip(kernel, a))
        variance_b = math.fsum(w * (v - mean_b) ** 2 for w, v in zip(kernel, b))
        covariance = math.fsum(w * (u - mean_a) * (v - mean_b) for w, u, v in zip(kernel, a, b))
        values.append(
            (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
        )  # fmt: skip
    return math.fsum(values) / len(values)


def figures_by_loops(x, y):
    error = [a - b for a, b in zip(x, y)]
    rmse = math.sqrt(math.fsum(e * e for e in error) / len(error))
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    products = [(a - mean_x) * (b - mean_y) for a, b in zip(x, y)]
    powers = [math.fsum((v - mean) ** 2 for v in values) for values, mean in ((x, mean_x), (y, mean_y))]
    return {
        "mae_mv": math.fsum(map(abs, error)) / len(error),
        "rmse_mv": rmse,
        "psnr_range_db": 20 * math.log10((max(y) - min(y)) / rmse),
        "psnr_fixed_db": 20 * math.log10(4.0 / rmse),
        "ssim_61": ssim_by_loops(x, y, 61, 10.0),
        "ssim_11": ssim_by_loops(x, y, 11, 1.5),
        "pearson_r": math.fsum(products) / math.sqrt(powers[0] * powers[1]),
    }


def test_every_figure_is_that_of_its_formula(leads):
    figures = lead_metrics(*leads)
    for lead, pair in enumerate(zip(*leads)):
        expected = figures_by_loops(*(values.tolist() for values in pair))
        assert {name: values[lead] for name, values in figures.items()} == pytest.approx(expected, rel=1e-9)


def test_a_perfect_reconstruction_has_similarity_one_and_the_psnr_of_the_smallest_error(leads):
    reference = leads[1]
    figures = lead_metrics(reference, reference)
    assert figures["mae_mv"] == pytest.approx(0) and figures["rmse_mv"] == pytest.approx(0)
    assert all(figures[name] == pytest.approx(1) for name in ("ssim_61", "ssim_11", "pearson_r"))
    assert figures["psnr_fixed_db"] == pytest.approx(20 * np.log10(4.0 / 1e-4))


def test_scaling_both_changes_millivolt_figures_and_the_fixed_peak_only(leads):
    one, ten = lead_metrics(*leads), lead_metrics(10 * leads[0], 10 * leads[1])
    assert ten["mae_mv"] == pytest.approx(10 * one["mae_mv"])
    assert ten["psnr_fixed_db"] == pytest.approx(one["psnr_fixed_db"] - 20)
    assert all(ten[name] == pytest.approx(one[name]) for name in ("psnr_range_db", "ssim_61", "ssim_11", "pearson_r"))


def test_a_flat_reference_lead_has_no_figure(leads):
    predicted, reference = leads
    reference[1] = 0.09 * np.arange(90) / 89
    assert all(np.isfinite(values[0]) and np.isnan(values[1]) for values in lead_metrics(predicted, reference).values())


def test_a_constant_prediction_has_no_correlation_and_a_short_record_no_similarity(leads):
    figures = lead_metrics(np.zeros((2, 90)), leads[1])
    assert np.isnan(figures["pearson_r"]).all() and np.isfinite(figures["ssim_61"]).all()
    figures = lead_metrics(leads[0][:, :60], leads[1][:, :60])
    assert np.isnan(figures["ssim_61"]).all() and np.isfinite(figures["ssim_11"]).all()


def test_means_are_over_leads_first_and_over_records_then_without_what_is_not_scored(leads):
    predicted, reference = leads
    pairs = [(predicted, reference), (predicted + 1, reference), (reference, reference)]
    scored = np.array([[True, True], [True, False], [False, False]])
    figures = reconstruction_metrics(*zip(*pairs), scored)
    mae = [np.abs(a - b).mean(axis=1) for a, b in pairs]
    of_records = [(mae[0][0] + mae[0][1]) / 2, mae[1][0]]
    means = record_means(figures)
    assert means["mae_mv"][:2] == pytest.approx(of_records) and np.isnan(means["mae_mv"][2])
    summary = mean_and_median(means)
    assert summary["mae_mv"] == pytest.approx(np.mean(of_records))
    assert summary["mae_mv_median"] == pytest.approx(np.median(of_records))
    leads_of = by_lead(figures, ["I", "II"])
    assert leads_of["I"]["mae_mv"] == pytest.approx((mae[0][0] + mae[1][0]) / 2) and leads_of["I"]["records"] == 2
    assert leads_of["II"]["mae_mv"] == pytest.approx(mae[0][1]) and leads_of["II"]["records"] == 1
