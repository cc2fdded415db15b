"""training/heartbeats.py: the median beat and the rhythm of a record, against signals whose beats are known."""

import numpy as np
import pytest
import wfdb
from analytic_ecg import WAVES, analytic_ecg

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.records import read_record
from anyecg_hf.simulate import simulate_record
from training.heartbeats import AFTER_SECONDS, BEAT_SAMPLES, BEFORE_SECONDS, RHYTHM, find_beats, measure_beats

RATE = 300


def _measured(signal, usable=None):
    return measure_beats(signal, np.ones(signal.shape, bool) if usable is None else usable, RATE)


def test_the_median_beat_of_an_analytic_ecg_is_its_formula():
    median, rhythm = _measured(analytic_ecg(RATE, beat_seconds=0.83).astype(np.float32))
    time = np.arange(-BEFORE_SECONDS, AFTER_SECONDS, 0.01)[:BEAT_SAMPLES]
    beat = sum(
        height * (0.5 + 0.1 * np.cos(6 * (number + 1))) * np.exp(-0.5 * ((time - place) / width) ** 2)
        for number, (place, width, height) in enumerate(WAVES)
    )  # lead V1, the seventh
    shifted = [np.interp(time + lag, time, beat) for lag in np.arange(-0.03, 0.031, 1 / RATE)]  # steepest beside R
    assert min(np.abs(median[6, 5:-5] - each[5:-5]).max() for each in shifted) < 0.03
    assert np.exp(-rhythm[0]) == pytest.approx(0.83, abs=0.005)
    assert np.abs(rhythm[1:3]).max() < 0.01 and rhythm[RHYTHM.index("ectopic")] == 0


def test_the_rate_is_that_of_the_simulated_heart():
    for rate in (30.0, 45.0, 70.0, 120.0, 160.0, 220.0):
        record = simulate_record(seed=3, heart_rate=rate, sampling_rate=RATE)
        _, rhythm = _measured(record.signal)
        assert 60 * np.exp(rhythm[0]) == pytest.approx(rate, rel=0.05)


def test_fibrillation_is_irregular_and_ventricular_beats_are_other_beats():
    spread, ectopic = RHYTHM.index("spread"), RHYTHM.index("ectopic")
    rhythms = {}
    for name in ("sinus", "atrial fibrillation", "ventricular beats"):
        records = [simulate_record(seed=seed, rhythm=name, sampling_rate=RATE) for seed in range(4)]
        rhythms[name] = np.mean([_measured(record.signal)[1] for record in records], axis=0)
    assert rhythms["atrial fibrillation"][spread] > 2 * rhythms["sinus"][spread]
    assert rhythms["ventricular beats"][ectopic] > 0.05 > rhythms["sinus"][ectopic]


def test_the_median_beat_does_not_depend_on_where_the_record_begins():
    signal = simulate_record(seed=5, sampling_rate=RATE).signal
    first, second = _measured(signal)[0], _measured(signal[:, 140:])[0]
    assert np.abs(first - second).mean() < 0.02 * np.abs(first).max()


def test_a_masked_lead_has_no_beat_and_changes_no_other_one():
    signal = simulate_record(seed=2, sampling_rate=RATE).signal.copy()
    whole = _measured(signal)[0]
    usable = np.ones(signal.shape, bool)
    usable[4], signal[4] = False, 0.0
    median = _measured(signal, usable)[0]
    assert np.isnan(median[4]).all()
    others = np.arange(12) != 4
    assert np.abs(median[others] - whole[others]).mean() < 0.02 * np.abs(whole).max()  # aligned to a sample


def test_a_gap_in_all_leads_is_no_pause_of_the_heart():
    signal = analytic_ecg(RATE, seconds=20, beat_seconds=0.83).astype(np.float32)
    usable = np.ones(signal.shape, bool)
    usable[:, 8 * RATE : 11 * RATE], signal[:, 8 * RATE : 11 * RATE] = False, 0.0
    rhythm = _measured(signal, usable)[1]
    assert np.exp(-rhythm[0]) == pytest.approx(0.83, abs=0.005)
    assert rhythm[RHYTHM.index("longest")] < 1.05 and rhythm[RHYTHM.index("successive")] < 0.02


def test_a_large_lead_that_is_masked_for_some_beats_makes_them_no_other_beats():
    signal = simulate_record(seed=2, sampling_rate=RATE).signal.copy()
    signal[7:9] *= 3
    usable = np.ones(signal.shape, bool)
    usable[7:9, : 4 * RATE], signal[7:9, : 4 * RATE] = False, 0.0
    assert _measured(signal, usable)[1][RHYTHM.index("ectopic")] == 0


@pytest.mark.parametrize("num_samples", [0, 75, 299, 600])
def test_a_record_of_less_than_three_beats_says_nothing(num_samples):
    assert _measured(np.ones((12, num_samples), np.float32)) is None


def test_a_record_without_beats_or_with_two_says_nothing():
    assert _measured(np.zeros((12, 3000), np.float32)) is None
    two_beats = analytic_ecg(RATE, seconds=1.9, beat_seconds=0.8).astype(np.float32)
    assert _measured(two_beats) is None


def test_beats_of_mit_bih_are_found_where_people_annotated_them(real_ecg):
    found_right, found_all, annotated = 0, 0, 0
    for path in sorted((real_ecg / "mitdb").glob("*.hea"))[:6]:
        record = read_record(path.with_suffix(""))
        annotation = wfdb.rdann(str(path.with_suffix("")), "atr")
        is_beat = np.isin(annotation.symbol, list("NLRBAaJSVFejnE/fQ"))
        times = annotation.sample[is_beat] / record.sampling_rate
        features = AnyECGFeatureExtractor().items(record)
        signal, mask = features[0]["input_values"], features[0]["attention_mask"]
        for start in range(60, 600, 60):  # ten seconds a minute
            cut = slice(start * RATE, (start + 10) * RATE)
            usable = np.repeat(mask[:, start : start + 10].astype(bool), RATE, axis=1)
            beats = start + find_beats(signal[:, cut], usable, RATE) / RATE
            wanted = times[(times > start + 0.2) & (times < start + 9.8)]
            inside = beats[(beats > start + 0.2) & (beats < start + 9.8)]
            annotated += len(wanted)
            found_all += len(inside)
            found_right += sum(np.abs(beats - time).min() < 0.15 for time in wanted) if len(beats) else 0
    assert annotated > 400
    assert found_right / annotated > 0.97
    assert found_all / annotated < 1.03
