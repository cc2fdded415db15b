"""Quality flags against faults that were put in: each is found where it is, and nowhere else."""

import importlib.util
import itertools
import logging
import math

import numpy as np
import pytest
from analytic_ecg import STANDARD, analytic_ecg
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from anyecg_hf import AnyECGFeatureExtractor
from anyecg_hf import signal_ops as ops
from anyecg_hf.signal_ops import fill_gaps
from anyecg_hf.signal_quality import (
    ACCEPTABLE,
    UNUSABLE,
    QualityFlag,
    acceptability,
    sample_flags,
    saturated_samples,
    still_samples,
)
from anyecg_hf.simulate import simulate_record

# On the samples of the record


def test_a_lead_at_its_rail_for_40_ms_is_saturated_there_and_only_there():
    signal = fill_gaps(analytic_ecg(500, num_leads=2) * 5)
    signal[0] = np.minimum(signal[0], 1.6)
    signal[0, 1000:1040] = 1.6
    found = saturated_samples(signal, 500)
    assert found[0, 1000:1040].all() and not found[1].any() and found[0].sum() < 80


def test_the_rounded_top_of_a_wave_is_no_rail():
    signal = fill_gaps(np.round(analytic_ecg(500) / 0.005) * 0.005)
    assert not saturated_samples(signal, 500).any()


def runs(is_there, shortest):
    """Return where `is_there` holds for so many samples on end, told one by one."""
    found = np.zeros(len(is_there), bool)
    for value, places in itertools.groupby(range(len(is_there)), key=lambda place: is_there[place]):
        places = list(places)
        found[places] = value and len(places) >= shortest
    return found


@pytest.mark.parametrize("rate", [50, 100, 213, 257, 500, 1000])
def test_a_run_just_long_enough_is_found_wherever_it_begins(rate):
    for start in range(100, 140):
        signal = np.random.default_rng(start).uniform(-1, 1, (1, 1000)).astype(np.float32)
        still, rail = signal.copy(), signal.copy()
        still[0, start : start + math.ceil(0.3 * rate) + 1] = 7
        rail[0, start : start + max(4, math.ceil(0.04 * rate))] = 7
        assert still_samples(still, rate).sum() == math.ceil(0.3 * rate)
        assert saturated_samples(rail, rate).sum() == max(4, math.ceil(0.04 * rate))


@settings(max_examples=60, deadline=None)
@given(
    rate=st.sampled_from([50, 100, 213, 257, 500, 1000]),
    stretches=st.lists(st.tuples(st.integers(0, 1999), st.integers(-2, 3)), min_size=1, max_size=6),
    noise=st.sampled_from([0.0, 0.3, 3.0]),
    seed=st.integers(0, 99),
)
def test_runs_are_found_at_every_place_and_length(rate, stretches, noise, seed):
    signal = np.round(np.random.default_rng(seed).normal(0, noise, (3, 2000))).astype(np.float32)
    for lead, (start, more) in enumerate(stretches):
        signal[lead % 3, start : start + math.ceil(0.3 * rate) + more] = 7 * (-1) ** lead
    still = [np.r_[False, runs(np.diff(lead) == 0, max(4, 0.3 * rate))] for lead in signal]
    np.testing.assert_array_equal(still_samples(signal, rate), still)
    for lead, (start, more) in enumerate(stretches):
        signal[lead % 3, start : start + math.ceil(0.04 * rate) + more] = 9 * (-1) ** lead
    rails = [
        [runs(lead == each, max(4, 0.04 * rate)) & (abs(each) >= 1) for each in (lead.max(), lead.min())]
        for lead in signal
    ]
    np.testing.assert_array_equal(saturated_samples(signal, rate), np.any(rails, axis=1))


SPIKE = np.where(np.arange(1500) % 500 == 250, 1.0, 0.001 * (-1.0) ** np.arange(1500))
NOISE = np.random.default_rng(0).normal(size=1500)


@pytest.mark.parametrize("offset", [0.0, 1.0, -300.0])
@pytest.mark.parametrize("shape", ["sine", "spike", "noise"])
def test_a_lead_is_flat_up_to_a_microvolt_and_not_beyond(offset, shape):
    wave = {"sine": np.sin(np.arange(1500)), "spike": SPIKE, "noise": NOISE}[shape]
    wave = (wave - wave[:500].mean()) / wave[:500].std()
    for size in (0.9, 1.1):
        signal = offset + size * 1e-3 * wave[None]
        flags = sample_flags(signal, np.isnan(signal), np.isnan(signal), 500.0, np.array([0, 500]))
        assert has(flags, QualityFlag.FLAT).all() == (size < 1)


def flags_of(signal, saturated=None):
    missing = np.isnan(signal)
    filled = fill_gaps(signal)
    saturated = np.zeros(signal.shape, bool) if saturated is None else saturated
    return sample_flags(filled, missing, saturated, 500.0, np.array([0, 500, 1000, 1500]))


def test_a_patch_with_one_missing_value_is_missing_and_its_neighbours_are_not():
    signal = analytic_ecg(500, 3, 2)
    signal[1, 700] = np.nan
    assert flags_of(signal).tolist() == [[0, 0, 0], [0, int(QualityFlag.MISSING), 0]]


def test_a_patch_that_varies_less_than_a_microvolt_is_flat_whatever_its_offset():
    signal = analytic_ecg(500, 3, 2)
    signal[0, 500:1000] = 3.0
    signal[1, 1000:] = -100 + 0.0005 * np.sin(np.arange(500))
    assert flags_of(signal).tolist() == [[0, int(QualityFlag.FLAT), 0], [0, 0, int(QualityFlag.FLAT)]]


def test_a_missing_patch_is_not_called_flat_for_the_line_that_bridges_it():
    signal = analytic_ecg(500, 3, 1)
    signal[0, 500:1000] = np.nan
    assert flags_of(signal)[0, 1] == int(QualityFlag.MISSING)


def test_a_saturated_patch_says_so():
    saturated = np.zeros((1, 1500), bool)
    saturated[0, 1200] = True
    assert flags_of(analytic_ecg(500, 3, 1), saturated)[0, 2] == int(QualityFlag.SATURATED)


def test_a_lead_that_stands_still_for_most_of_a_second_is_flat_at_any_level():
    signal = np.round(analytic_ecg(500, 3, 2) / 0.005) * 0.005
    signal[0, 550:900] = 1.235
    signal[1, 550:650] = 1.235  # 0.2 s: a T wave's top may do so
    assert flags_of(signal).tolist() == [[0, int(QualityFlag.FLAT), 0], [0, 0, 0]]
    assert still_samples(signal, 500)[0].sum() == 349


# On patches, through the extractor


@pytest.fixture(scope="module")
def extractor():
    return AnyECGFeatureExtractor()


def quality_of(extractor, record):
    return extractor(record, return_quality=True)["quality"][0]


def has(quality, flag):
    return (quality & int(flag)) != 0


def seconds(*numbers):
    return [second in numbers for second in range(10)]


@pytest.mark.parametrize("rhythm", ["sinus", "atrial fibrillation", "ventricular beats"])
@pytest.mark.parametrize("rate", [100, 250, 500, 1000])
def test_nothing_is_said_of_a_clean_record(extractor, rhythm, rate):
    for seed in range(5):
        quality = quality_of(extractor, simulate_record(seed, rhythm=rhythm, sampling_rate=rate))
        assert not quality.any() and acceptability(quality) == 1.0


@pytest.mark.parametrize("line", [50, 60])
@pytest.mark.parametrize("rate", [150, 257, 360, 500])
def test_mains_are_found_in_their_lead_and_second(extractor, line, rate):
    record = simulate_record(3, sampling_rate=rate)
    time = np.arange(record.signal.shape[1]) / rate
    record.signal[7] += 0.15 * np.sin(2 * np.pi * line * time) * ((time >= 4) & (time < 6))
    mains = has(quality_of(extractor, record), QualityFlag.MAINS)
    assert mains[7].tolist() == seconds(4, 5) and mains.sum() == 2


def test_mains_that_a_record_of_100_hz_cannot_hold_are_not_looked_for(extractor):
    record = simulate_record(3, sampling_rate=100)
    record.signal[0] += 0.5 * np.cos(2 * np.pi * 49 * np.arange(record.signal.shape[1]) / 100)
    assert not has(quality_of(extractor, record), QualityFlag.MAINS).any()


def test_muscle_noise_is_no_mains(extractor):
    record = simulate_record(3)
    record.signal += np.random.default_rng(0).normal(0, 0.1, record.signal.shape).astype(np.float32)
    assert has(quality_of(extractor, record), QualityFlag.MAINS).mean() < 0.01


@pytest.mark.parametrize("rate", [100, 500])
def test_drift_is_found_in_its_lead_and_seconds_and_a_constant_offset_is_none(extractor, rate):
    record = simulate_record(3, sampling_rate=rate)
    time = np.arange(record.signal.shape[1]) / rate
    record.signal[2] += 3.0
    record.signal[8] += 1.5 / (1 + np.exp(-(time - 5) * 4))  # a step in about a second
    found = has(quality_of(extractor, record), QualityFlag.DRIFT)
    assert found[8, 4:6].any() and not found[8, :3].any() and not found[8, 7:].any()
    assert not np.delete(found, 8, axis=0).any()


@pytest.mark.parametrize("rhythm", ["sinus", "atrial fibrillation"])
@pytest.mark.parametrize("kind", ["noise", "wander", "nearly nothing"])
def test_a_lead_that_is_not_on_the_patient_is_masked_and_the_others_are_not(extractor, kind, rhythm, caplog):
    record, rng = simulate_record(5, rhythm=rhythm), np.random.default_rng(1)
    size = record.signal.shape[1]
    record.signal[10] = {
        "noise": rng.normal(0, 0.4, size),
        "wander": np.cumsum(rng.normal(0, 0.01, size)),
        "nearly nothing": rng.normal(0, 0.002, size),
    }[kind]
    quality = quality_of(extractor, record)
    assert has(quality, QualityFlag.DISCONNECTED).mean(axis=1).tolist() == pytest.approx([0] * 10 + [1, 0], abs=0.21)
    assert not has(np.delete(quality, 10, axis=0), UNUSABLE).any()
    batch = extractor(record)
    np.testing.assert_array_equal(batch["attention_mask"][0] == 0, has(quality, UNUSABLE))


def test_a_loose_electrode_is_masked_for_the_time_it_is_loose(extractor):
    record = simulate_record(5)
    record.signal[9, 2500:] = np.random.default_rng(1).normal(0, 0.4, 2500)
    masked = has(quality_of(extractor, record), UNUSABLE)[9]
    assert not masked[:4].any() and masked[6:].all()


def test_fibrillation_of_the_ventricles_is_not_masked_for_having_no_beats(extractor):
    time, rng = np.arange(5000) / 500, np.random.default_rng(0)
    phases = np.cumsum(2 * np.pi / 500 * (5 + rng.normal(0, 8, 5000)))
    chaos = [np.sin(phases + lead) * (0.4 + 0.2 * np.sin(2 * np.pi * 0.7 * time + lead)) for lead in range(12)]
    batch = extractor(np.array(chaos), sampling_rate=500, lead_names=list(STANDARD), units="mV")
    assert batch["attention_mask"].mean() > 0.95


def test_a_pause_is_not_masked(extractor):
    record = simulate_record(2, heart_rate=80)
    record.signal[:, 1500:3500] = np.random.default_rng(0).normal(0, 0.01, (12, 2000))  # four seconds without a beat
    assert not has(quality_of(extractor, record), UNUSABLE).any()


@pytest.mark.parametrize("num_leads", [1, 2])
def test_with_one_or_two_leads_none_is_called_disconnected(extractor, num_leads):
    record = simulate_record(5, lead_names=["II", "V5"][:num_leads])
    record.signal[-1] = np.random.default_rng(1).normal(0, 0.4, record.signal.shape[1])
    assert not has(quality_of(extractor, record), QualityFlag.NOISE | QualityFlag.DISCONNECTED).any()


def test_quality_is_in_millivolt_and_seconds_whatever_the_unit_and_the_grid():
    record = simulate_record(5)
    record.signal[9, 2500:] = np.random.default_rng(1).normal(0, 0.4, 2500)
    half = AnyECGFeatureExtractor(patch_size=150)
    fine = has(quality_of(half, record), UNUSABLE)[9]
    assert not fine[:8].any() and fine[12:].all()


# Limb leads


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([1, 0, 2, 3, 4, 5], "I and II were exchanged"),
        ([0, 1, 2, 3, 5, 4], "aVL and aVF were exchanged"),
        ([0, 2, 1, 3, 4, 5], "II and III were exchanged"),
        (3, "aVR were reversed"),
        (2, "III were reversed"),
    ],
)
def test_swapped_or_reversed_limb_leads_are_reported_with_what_would_mend_them(extractor, change, said, caplog):
    record = simulate_record(4)
    if isinstance(change, int):
        record.signal[change] *= -1
    else:
        record.signal[:6] = record.signal[change]
    ops._warned.clear()
    with caplog.at_level(logging.WARNING):
        quality = quality_of(extractor, record)
    assert has(quality, QualityFlag.INCONSISTENT).any() and f"They would agree if {said}" in caplog.text
    assert not has(quality[6:], QualityFlag.INCONSISTENT).any()
    assert acceptability(quality) == 1.0  # wrong names, not a bad signal


@pytest.mark.parametrize("value", [0.0, np.nan])
@pytest.mark.parametrize("row", [0, 2, 4])
def test_a_limb_lead_that_is_flat_or_missing_contradicts_nothing(extractor, row, value):
    record = simulate_record(4)
    record.signal[row, 1000:4000] = value
    assert not has(quality_of(extractor, record), QualityFlag.INCONSISTENT).any()


def test_limb_leads_that_agree_and_too_few_to_tell_are_not_reported(extractor):
    record = simulate_record(4)
    record.signal += np.random.default_rng(0).normal(0, 0.02, record.signal.shape).astype(np.float32)
    assert not has(quality_of(extractor, record), QualityFlag.INCONSISTENT).any()
    two = simulate_record(4, lead_names=["II", "III", "V1"])
    two.signal = two.signal[[1, 0, 2]]
    assert not has(quality_of(extractor, two), QualityFlag.INCONSISTENT).any()


# The verdict


def test_acceptability_is_the_share_of_usable_patches_where_nothing_else_is_said():
    quality = np.zeros((12, 10), np.int64)
    quality[3] = int(QualityFlag.FLAT | QualityFlag.NOISE)
    assert acceptability(quality) == pytest.approx(11 / 12) and acceptability(quality) < ACCEPTABLE
    padded = np.pad(quality, ((0, 3), (0, 2)), constant_values=int(QualityFlag.PADDING))
    assert acceptability(padded) == pytest.approx(11 / 12)
    both = acceptability(np.stack([padded, np.full_like(padded, int(QualityFlag.MISSING))]))
    assert both.tolist() == pytest.approx([11 / 12, 0])


def test_worse_is_never_better():
    order = [0, QualityFlag.MAINS, QualityFlag.DRIFT, QualityFlag.NOISE, QualityFlag.NOISE | QualityFlag.DISCONNECTED]
    scores = [acceptability(np.full((2, 3), int(flag))) for flag in order]
    assert scores == sorted(scores, reverse=True) and scores[0] == 1 and scores[-1] == 0


def test_the_verdict_agrees_with_people_on_the_records_of_the_2011_challenge(extractor, real_ecg):
    verdicts, judged = [], []
    spec = importlib.util.spec_from_file_location("unpack", real_ecg / "unpack.py")
    spec.loader.exec_module(unpack := importlib.util.module_from_spec(spec))
    for record, signal in unpack.read_pack("cinc-2011"):
        try:
            quality = extractor(signal, sampling_rate=500, lead_names=list(STANDARD), units="uV", return_quality=True)[
                "quality"
            ][0]
        except ValueError as error:
            assert "nothing usable" in str(error)
            quality = np.full((12, 10), int(QualityFlag.FLAT))
        verdicts.append(acceptability(quality))
        judged.append(record["acceptable"])
    assert roc_auc_score(judged, verdicts) >= 0.96  # 0.962
