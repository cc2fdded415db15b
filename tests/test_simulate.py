import numpy as np
import pytest
from scipy.signal import find_peaks, welch

from anyecg_hf.leads import STANDARD_LEADS
from anyecg_hf.records import Record, is_simulated
from anyecg_hf.signal_ops import resample
from anyecg_hf.simulate import DOWER_TRANSFORM, simulate_record

QUIET = {"noise_mv": 0.0, "heart_rate_variability": 0.0}


def leads_of(record):
    return dict(zip(record.lead_names, record.signal, strict=True))


def r_waves(record):
    """Samples of the R waves: of all beats that the dipole's leftward component shows."""
    trace = leads_of(record)["V5"]
    return find_peaks(trace, height=0.6 * trace.max(), distance=int(0.2 * record.sampling_rate))[0]


def beat(seed=0, **options):
    """One beat of each lead at 1000 Hz about its TP level; the R wave is at sample 350."""
    record = simulate_record(seed, **{**QUIET, "heart_rate": 60, "sampling_rate": 1000, **options})
    centre = r_waves(record)[3]
    cut = record.signal[:, centre - 350 : centre + 500]
    return dict(zip(record.lead_names, cut - np.median(cut[:, 20:60], axis=1, keepdims=True), strict=True))


def test_record_is_marked_as_simulated_and_says_nothing_of_a_patient():
    record = simulate_record(5)
    assert record.record_name == "simulated-5" and record.comments[0] == "simulated" and is_simulated(record)
    assert record.age is None and record.sex is None and record.units == "mV" and record.signal.dtype == np.float32
    assert not is_simulated(Record(record.signal, 500.0, record.lead_names, comments=["Age: 50"]))


def test_same_seed_gives_the_same_record_and_another_seed_another():
    first, again, other = (simulate_record(seed).signal for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.allclose(first, other, atol=0.05)


def test_limb_leads_obey_einthoven_and_goldberger_to_rounding_with_noise():
    lead = leads_of(simulate_record(3, noise_mv=0.1, mains_mv=0.1))
    for found, expected in [
        (lead["III"], lead["II"] - lead["I"]),
        (lead["aVR"], -(lead["I"] + lead["II"]) / 2),
        (lead["aVL"], lead["I"] - lead["II"] / 2),
        (lead["aVF"], lead["II"] - lead["I"] / 2),
    ]:
        assert np.abs(found - expected).max() < 1e-6


def test_leads_are_dowers_views_of_one_dipole():
    record = simulate_record(4, noise_mv=0, lead_names=["X", "Y", "Z", *DOWER_TRANSFORM])
    expected = np.array(list(DOWER_TRANSFORM.values())) @ record.signal[:3]
    assert np.abs(record.signal[3:] - expected).max() < 1e-5


@pytest.mark.parametrize("rate", [257.3, 500, 1000, 2000])
def test_the_same_moments_have_the_same_voltage_at_another_rate(rate):
    noise = 0.03 if rate > 333 else 0.0  # below, the rate cannot show all of it
    fine = simulate_record(6, sampling_rate=1000, noise_mv=noise).signal[:, :9000]
    record = simulate_record(6, sampling_rate=rate, noise_mv=noise)
    time = np.arange(record.signal.shape[1]) / rate
    there = time < 8.9
    for coarse, lead in zip(record.signal, fine, strict=True):
        assert np.abs(np.interp(time[there], np.arange(9000) / 1000, lead) - coarse[there]).max() < 0.05
    assert record.signal.shape[1] == round(10 * rate)


def test_a_low_rate_shows_the_same_signal_below_its_band_and_folds_nothing_into_it():
    low, high = (simulate_record(7, sampling_rate=rate, noise_mv=0.03) for rate in (100, 500))
    low, high = resample(low.signal, 100, 100, None, 35), resample(high.signal, 500, 500, None, 35)[:, ::5]
    assert np.abs(low - high)[:, 50:-50].max() < 0.02


def test_a_longer_record_begins_like_the_shorter_one():
    short, long = (simulate_record(8, duration_seconds=seconds, rhythm="af").signal for seconds in (5, 20))
    assert np.allclose(long[:, : short.shape[1]], short, atol=1e-5)


def test_noise_has_the_strength_asked_for_and_leaves_the_beats_alone():
    clean, noisy = (simulate_record(9, noise_mv=noise, baseline_wander_mv=0).signal for noise in (0, 0.1))
    independent = [STANDARD_LEADS.index(name) for name in DOWER_TRANSFORM]
    assert np.allclose((noisy - clean)[independent].std(1), 0.1, rtol=0.05)


def test_baseline_wander_is_slow_and_the_hum_is_where_it_was_asked():
    clean = simulate_record(9, noise_mv=0, duration_seconds=60).signal[0]
    disturbed = simulate_record(9, noise_mv=0, baseline_wander_mv=0.5, mains_mv=0.2, mains_hz=60, duration_seconds=60)
    frequencies, power = welch(disturbed.signal[0] - clean, fs=500, nperseg=10000)
    assert power[(frequencies > 0.6) & (frequencies < 59)].max() < 1e-5 * power.max()
    assert frequencies[20:][power[20:].argmax()] == pytest.approx(60, abs=0.1)
    assert np.ptp(disturbed.signal[0] - clean) > 0.5


def test_a_hum_that_the_rate_cannot_show_is_absent():
    clean, hum = (simulate_record(1, sampling_rate=100, mains_mv=mains).signal for mains in (0, 1))
    assert np.array_equal(clean, hum)


@pytest.mark.parametrize("seed", range(8))
def test_every_lead_looks_as_an_adults_does(seed):
    lead = beat(seed)
    p_wave, qrs, t_wave = slice(130, 260), slice(290, 430), slice(500, 780)
    for name in ("I", "II", "V4", "V5", "V6"):
        assert 0.02 < lead[name][p_wave].max() < 0.3 and lead[name][p_wave].min() > -0.03, f"P in {name}"
        assert 0.08 < lead[name][t_wave].max() < 1.0 and lead[name][t_wave].min() > -0.03, f"T in {name}"
    assert 0.06 < lead["II"][p_wave].max() < 0.2 and 0.15 < lead["II"][t_wave].max() < 0.6
    assert 0.5 < lead["II"][qrs].max() < 2 and 1.0 < lead["V4"][qrs].max() < 2.2
    assert lead["aVR"].max() < 0.12 and lead["aVR"][qrs].min() < -0.5 and lead["aVR"][t_wave].min() < -0.1
    chest = [lead[f"V{number}"][qrs] for number in range(1, 7)]
    share_of_r = [trace.max() / np.ptp(trace) for trace in chest]
    assert share_of_r[0] < 0.45 and share_of_r[:4] == sorted(share_of_r[:4]) and min(share_of_r[3:]) > 0.75


@pytest.mark.parametrize("heart_rate", [40, 75, 150])
def test_the_heart_beats_as_often_as_asked(heart_rate):
    record = simulate_record(2, heart_rate=heart_rate, duration_seconds=60, noise_mv=0)
    assert len(r_waves(record)) == pytest.approx(heart_rate, abs=2)


def test_rr_intervals_vary_by_what_was_asked():
    record = simulate_record(2, heart_rate_variability=0.06, duration_seconds=300, noise_mv=0)
    assert (np.diff(r_waves(record)) / 500).std() == pytest.approx(0.06, rel=0.25)


def test_a_fast_heart_shortens_qt_and_not_qrs():
    def lengths(heart_rate):
        trace = beat(heart_rate=heart_rate)["V5"]
        return (trace[300:420] > 0.6).sum(), 130 + trace[480:780].argmax()

    (slow_qrs, slow_qt), (fast_qrs, fast_qt) = lengths(60), lengths(100)
    assert abs(slow_qrs - fast_qrs) <= 1 and fast_qt < slow_qt - 25


def test_fibrillation_is_irregular_without_p_and_with_f_waves():
    options = {"duration_seconds": 120, "noise_mv": 0, "heart_rate": 70}
    fibrillation, sinus = (simulate_record(3, rhythm=rhythm, **options) for rhythm in ("atrial fibrillation", "sinus"))

    def before_r(record):  # the mean over beats of what precedes R: f waves, at random to it, leave nothing
        trace = leads_of(record)["II"]
        beats = np.array([trace[r - 130 : r - 35] for r in r_waves(record) if r > 130])
        return np.ptp(beats.mean(0))

    intervals = np.diff(r_waves(fibrillation))
    assert 0.15 < intervals.std() / intervals.mean() < 0.3
    assert np.corrcoef(intervals[:-1], intervals[1:])[0, 1] < 0.25
    assert before_r(sinus) > 0.08 and before_r(fibrillation) < 0.05
    pauses = [(r + 275, r_next - 40) for r, r_next in zip(r_waves(fibrillation)[:-1], r_waves(fibrillation)[1:])]
    pause = max((leads_of(fibrillation)["V1"][slice(*ends)] for ends in pauses), key=len)
    pause = pause - pause.mean()
    dominant = np.abs(np.fft.rfft(pause, 8192)).argmax() * 500 / 8192
    assert 4 < dominant < 9 and 0.05 < np.ptp(pause) < 0.4


def narrow_and_wide_beats(record):
    """Samples of the normal and of the ventricular beats: both point to the feet, T of the latter does not."""
    trace = leads_of(record)["aVF"]
    peaks, found = find_peaks(trace, height=0.55, prominence=0.5, width=1)
    lasting = found["widths"] / record.sampling_rate
    return peaks[lasting < 0.05], peaks[lasting > 0.07]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("heart_rate", [45, 90])
def test_ten_seconds_of_ventricular_beats_show_at_least_one_and_more_normal_ones(seed, heart_rate):
    narrow, wide = narrow_and_wide_beats(simulate_record(seed, rhythm="pvc", heart_rate=heart_rate, noise_mv=0))
    assert 1 <= len(wide) < len(narrow)


def test_ventricular_beats_come_early_in_their_share_with_a_full_compensatory_pause():
    options = {**QUIET, "rhythm": "ventricular beats", "duration_seconds": 120, "ventricular_share": 0.2}
    narrow, wide = narrow_and_wide_beats(simulate_record(1, **options))
    assert len(wide) / (len(wide) + len(narrow)) == pytest.approx(0.2, abs=0.04)
    gaps = np.diff(narrow) / (60 / 70 * 500)
    assert np.all((np.abs(gaps - 1) < 0.02) | (np.abs(gaps - 2) < 0.02))
    assert (np.abs(gaps - 2) < 0.02).sum() == pytest.approx(len(wide), abs=1)
    early = [(moment - narrow[narrow < moment].max()) / (60 / 70 * 500) for moment in wide if moment > narrow[0]]
    assert 0.45 < min(early) and max(early) < 0.8


def test_leads_may_be_any_in_any_order_under_any_of_their_names():
    full, few = simulate_record(11), simulate_record(11, lead_names=["v5", "AVF", "MLII"])
    assert few.lead_names == ["V5", "aVF", "II"]
    assert all(np.array_equal(leads_of(few)[name], leads_of(full)[name]) for name in few.lead_names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rhythm": "flutter"}, "rhythm='flutter'.*'sinus'"),
        ({"heart_rate": 0}, "heart_rate=0.*20 to 250"),
        ({"heart_rate": float("nan")}, "heart_rate=nan"),
        ({"heart_rate": 200, "heart_rate_variability": 0.2}, "heart_rate_variability"),
        ({"noise_mv": -1}, "noise_mv"),
        ({"duration_seconds": 0}, "duration_seconds"),
        ({"sampling_rate": 10}, "sampling_rate=10.*50 to 10000 Hz"),
        ({"lead_names": ["V9"]}, "V9"),
        ({"lead_names": []}, "lead_names is empty"),
    ],
)
def test_what_cannot_be_simulated_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        simulate_record(0, **options)


@pytest.mark.parametrize(("seed", "options"), [(-1, {}), (1.5, {}), (0, {"heart_rate": "fast"}), (0, {"speed": 1})])
def test_a_seed_or_option_of_the_wrong_kind_is_refused(seed, options):
    with pytest.raises(TypeError):
        simulate_record(seed, **options)
