"""Units, resampling, filters and quality flags, each on signals whose right answer is known."""

import logging

import numpy as np
import pytest
from analytic_ecg import analytic_ecg
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal as scipy_signal

from anyecg_hf import signal_ops

RATES = [100, 128, 200, 250, 257, 360, 500, 1000, 977.5, 499.97]


@pytest.fixture(autouse=True)
def forget_warnings():
    signal_ops._warned.clear()


def tone(frequency, rate, seconds=10.0):
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)[None]


# Units


@pytest.mark.parametrize(
    "unit, factor",
    [("mV", 1), ("mv", 1), ("uV", 1e-3), ("\u00b5V", 1e-3), ("\u03bcV", 1e-3), ("UV", 1e-3), ("V", 1e3), ("nV", 1e-6)],
)
def test_each_unit_has_its_factor(unit, factor):
    np.testing.assert_allclose(signal_ops.to_millivolt(np.array([[1.0, 2.0]]), unit), [[factor, 2 * factor]])


def test_each_lead_may_have_its_own_unit():
    out = signal_ops.to_millivolt(np.array([[1, 0], [1000, 0]]), ["mV", "uV"])
    np.testing.assert_allclose(out, [[1.0, 0.0], [1.0, 0.0]])


@pytest.mark.parametrize("unit", ["mmHg", "", "adu", "mVolt", None, 3])
def test_an_unknown_unit_raises_and_the_error_lists_the_known_ones(unit):
    with pytest.raises(ValueError, match='Record "r7": unit .*Known: "nV", "uV"'):
        signal_ops.to_millivolt(np.zeros((1, 4)), [unit], record="r7")


def test_units_that_do_not_fit_the_rows_raise():
    with pytest.raises(ValueError, match="2 units for 3 leads"):
        signal_ops.to_millivolt(np.zeros((3, 4)), ["mV", "mV"])


def test_microvolt_taken_for_millivolt_is_warned_about_each_time_with_the_number(caplog):
    signal = analytic_ecg() * 1000
    with caplog.at_level(logging.WARNING):
        signal_ops.to_millivolt(signal, "mV", record="A0001")
        signal_ops.to_millivolt(signal, "mV", record="A0002")
    assert len(caplog.records) == 2
    assert 'Record "A0001"' in caplog.text and " mV (median)" in caplog.text and "units" in caplog.text


def test_volt_taken_for_millivolt_is_warned_about(caplog):
    signal_ops.to_millivolt(analytic_ecg() / 1000, "mV")
    assert "volt passed as millivolt" in caplog.text


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 0.0])
def test_plausible_amplitudes_and_flat_signals_pass_without_a_warning(scale, caplog):
    signal_ops.to_millivolt(analytic_ecg() * scale, "mV")
    assert not caplog.records


# Sampling rates


@pytest.mark.parametrize("rate", [0, -500, float("nan"), float("inf"), 49.9, 100_001, "500", True, [500]])
def test_an_impossible_sampling_rate_raises(rate):
    with pytest.raises(ValueError, match="not a possible rate"):
        signal_ops.check_sampling_rate(rate)


def test_no_sampling_rate_raises_and_the_error_says_what_to_pass():
    with pytest.raises(ValueError, match="Pass sampling_rate"):
        signal_ops.check_sampling_rate(None)


@pytest.mark.parametrize("rate", [50, 257, 977.5, np.int64(500), np.float32(360), 100_000])
def test_a_possible_sampling_rate_comes_back_as_a_float(rate):
    assert signal_ops.check_sampling_rate(rate) == rate


# Resampling


@pytest.mark.parametrize("rate", RATES)
def test_a_tone_is_the_same_tone_at_the_new_rate(rate):
    out = signal_ops.resample(tone(7, rate), rate, 300)
    expected = tone(7, 300)
    assert out.shape[1] == pytest.approx(3000, abs=1)
    inside = slice(100, 2900)
    np.testing.assert_allclose(out[:, inside], expected[:, inside], atol=1e-3)  # 60 dB


@pytest.mark.parametrize("rate", RATES)
def test_a_constant_stays_constant_up_to_both_ends(rate):
    out = signal_ops.resample(np.full((2, int(3 * rate)), 7.25), rate, 300)
    np.testing.assert_allclose(out, 7.25, atol=1e-5)


@pytest.mark.parametrize("rate", RATES)
def test_an_offset_of_one_volt_leaves_no_ripple(rate):
    signal = analytic_ecg(rate)
    out = signal_ops.resample(signal + 1000, rate, 300) - 1000
    np.testing.assert_allclose(out, signal_ops.resample(signal, rate, 300), atol=2e-4)  # float32 at 1000


def test_what_the_new_rate_cannot_hold_is_removed_and_not_folded():
    out = signal_ops.resample(tone(190, 1000), 1000, 300)
    assert np.abs(out[:, 100:-100]).max() < 2e-3


def test_the_first_sample_stays_in_place():
    signal = np.zeros((1, 1000))
    signal[0, 500] = 1.0  # at 2 s
    assert np.argmax(signal_ops.resample(signal, 250, 300)[0]) == 600


def test_an_equal_rate_gives_an_equal_copy():
    signal = analytic_ecg(300).astype(np.float32)
    out = signal_ops.resample(signal, 300, 300.0)
    np.testing.assert_array_equal(out, signal)
    assert out is not signal


@pytest.mark.parametrize("rate", [99_999, 4999.999, 499.9731, 62.4725])
def test_an_odd_rate_needs_neither_huge_factors_nor_much_drift(rate):
    up, down = signal_ops.rational_ratio(float(rate), 300.0)
    assert max(up, down) <= 20_000
    assert abs(up / down * rate / 300 - 1) < 25e-6


@pytest.mark.parametrize("bad", [np.zeros(10), np.zeros((2, 1)), np.zeros((2, 3, 4))])
def test_a_signal_that_is_not_leads_by_samples_is_refused(bad):
    with pytest.raises(ValueError, match="num_leads, num_samples"):
        signal_ops.resample(bad, 500, 300)


@pytest.mark.parametrize("rates", [(0, 300), (500, -1), (float("nan"), 300), (500, float("inf"))])
def test_a_rate_that_is_not_above_zero_is_refused(rates):
    with pytest.raises(ValueError, match="above zero"):
        signal_ops.resample(np.zeros((1, 100)), *rates)


@settings(max_examples=25, deadline=None)
@given(rate=st.floats(50, 2000), target=st.sampled_from([100, 300, 500]), seconds=st.floats(0.5, 3))
def test_any_rate_gives_the_right_length_and_finite_bounded_values(rate, target, seconds):
    num_samples = max(2, round(rate * seconds))
    signal = np.random.default_rng(0).uniform(-1, 1, (2, num_samples))
    out = signal_ops.resample(signal, rate, target)
    assert out.shape == (2, int(np.floor(num_samples * target / rate + 0.5)))
    assert out.dtype == np.float32 and np.isfinite(out).all() and np.abs(out).max() < 4


@settings(max_examples=100, deadline=None)
@given(rate=st.floats(50, 100_000))
def test_the_rational_in_place_of_a_ratio_of_rates_is_close_and_small(rate):
    up, down = signal_ops.rational_ratio(rate, 300.0)
    assert max(up, down) <= 20_000 and abs(up / down * rate / 300 - 1) < 1e-3
    if rate < 5000:
        assert abs(up / down * rate / 300 - 1) < 60e-6


# Filter


def test_the_pass_band_is_left_unchanged_in_size_and_time():
    signal = tone(10, 300)
    out = signal_ops.resample(signal, 300, 300, 0.5, 40)
    np.testing.assert_allclose(out[:, 300:-300], signal[:, 300:-300], atol=2e-3)


@pytest.mark.parametrize("frequency, largest", [(0.1, 0.02), (0.5, 0.51), (40, 0.51), (50, 0.04), (60, 0.005)])
def test_the_stop_bands_are_damped(frequency, largest):
    out = signal_ops.resample(tone(frequency, 300, 60), 300, 300, 0.5, 40)
    assert np.abs(out[:, 3000:-3000]).max() < largest


def test_a_constant_is_removed_up_to_the_ends():
    np.testing.assert_allclose(signal_ops.resample(np.full((2, 3000), 3.0), 300, 300, 0.5, 40), 0, atol=1e-5)


def test_the_filter_is_zero_phase_a_reversed_signal_gives_the_reversed_result():
    signal = analytic_ecg(300)
    there = signal_ops.resample(signal, 300, 300, 0.5, 40)
    back = signal_ops.resample(signal[:, ::-1], 300, 300, 0.5, 40)[:, ::-1]
    np.testing.assert_allclose(there, back, atol=1e-5)


def test_inside_a_record_the_filter_is_a_butterworth_run_both_ways():
    signal = analytic_ecg(300, seconds=40)
    expected = signal - signal.mean(axis=1, keepdims=True)
    for order, corner, kind in ((2, 0.5, "highpass"), (8, 40, "lowpass")):
        sos = scipy_signal.butter(order, corner, kind, fs=300, output="sos")
        expected = scipy_signal.sosfiltfilt(sos, expected, axis=1)
    out = signal_ops.resample(signal, 300, 300, 0.5, 40)
    # what is left is the bend of the bilinear transform near 40 Hz
    np.testing.assert_allclose(out[:, 3000:-3000], expected[:, 3000:-3000], atol=0.01)


def test_the_ends_of_a_cut_record_are_close_to_those_of_the_whole_one():
    whole = analytic_ecg(300, seconds=40) + 0.3 * np.sin(2 * np.pi * 0.2 * np.arange(12_000) / 300)
    filtered = signal_ops.resample(whole, 300, 300, 0.5, 40)
    cut = signal_ops.resample(whole[:, 4500:7500], 300, 300, 0.5, 40)
    assert np.sqrt(np.mean((cut - filtered[:, 4500:7500]) ** 2)) < 0.03
    np.testing.assert_allclose(cut[:, 600:-600], filtered[:, 5100:6900], atol=0.01)


def test_a_side_may_be_left_open():
    signal, inside = tone(60, 300) + 1, slice(100, -100)
    np.testing.assert_allclose(signal_ops.resample(signal, 300, 300, None, 40)[:, inside], 1, atol=0.01)
    np.testing.assert_allclose(
        signal_ops.resample(signal, 300, 300, 0.5, None)[:, inside], signal[:, inside] - 1, atol=0.01
    )
    np.testing.assert_allclose(signal_ops.resample(signal, 300, 300), signal, atol=1e-5)


@pytest.mark.parametrize("band", [(0, 40), (-1, 40), (40, 0.5), (0.5, 150), (0.5, 0.5), (float("nan"), 40)])
def test_a_band_that_is_no_band_raises(band):
    with pytest.raises(ValueError, match="0 < lowcut_hz < highcut_hz < 150"):
        signal_ops.resample(np.zeros((1, 300)), 300, 300, *band)


# Gaps and quality


def test_gaps_are_bridged_by_straight_lines_around_the_mean_of_what_is_there():
    signal = np.array([[1.0, np.nan, np.nan, 4.0, 4.0], [np.nan, 5.0, 5.0, 5.0, np.nan]])
    out = signal_ops.fill_gaps(signal)
    np.testing.assert_allclose(out, [[-2, -1, 0, 1, 1], [0, 0, 0, 0, 0]], atol=1e-6)
    assert out.dtype == np.float32


def test_a_gap_in_one_lead_changes_nothing_in_another():
    signal = np.random.default_rng(0).normal(1, 1, (3, 777)).astype(np.float32)
    whole = signal_ops.fill_gaps(signal)
    signal[1, 100:200] = np.nan
    np.testing.assert_array_equal(signal_ops.fill_gaps(signal)[[0, 2]], whole[[0, 2]])


def test_a_lead_without_any_value_becomes_zeros():
    np.testing.assert_array_equal(signal_ops.fill_gaps(np.full((1, 5), np.nan)), np.zeros((1, 5)))


# Denoising


def test_denoising_takes_white_noise_out_and_leaves_the_beats():
    clean = analytic_ecg(sampling_rate=300).astype(np.float32)
    noisy = clean + np.random.default_rng(0).normal(0, 0.05, clean.shape).astype(np.float32)
    left = signal_ops.denoise(noisy) - clean
    assert np.std(left) < 0.65 * np.std(noisy - clean)
    assert np.ptp(signal_ops.denoise(clean), axis=1) == pytest.approx(np.ptp(clean, axis=1), rel=0.01)


def test_denoising_treats_each_lead_alone_and_keeps_the_length():
    signal = np.random.default_rng(0).normal(0, 0.3, (3, 3001)).astype(np.float32)
    together = signal_ops.denoise(signal)
    assert together.shape == signal.shape and together.dtype == np.float32
    assert np.array_equal(together[1:2], signal_ops.denoise(signal[1:2]))
    assert not np.any(signal_ops.denoise(np.zeros((1, 300), np.float32)))
