"""training/evaluate_reconstruction.py: what is hidden and scored, the baselines, the tables."""

import json

import numpy as np
import pytest
import torch
from analytic_ecg import four_source_ecg

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import STANDARD_LEADS
from training import evaluate_reconstruction
from training.data import DataArguments, list_sources, load_folds
from training.evaluate_reconstruction import (
    ALGEBRA,
    AS_IT_IS,
    Table,
    Trial,
    as_markdown,
    edge_jump,
    measure,
    noise_like,
    report,
)
from training.reconstruction_methods import LEAST_SQUARES, baselines

REAL = np.ones((12, 3), dtype=bool)


def test_a_case_scores_whole_leads_that_do_not_follow_by_algebra():
    real = REAL.copy()
    real[7, 1] = False
    trial = Trial.of_case("G2", real, 300)
    assert [name for name, is_scored in zip(STANDARD_LEADS, trial.scored) if is_scored] == [
        "V1",
        "V3",
        "V4",
        "V5",
        "V6",
    ]
    assert trial.hidden[7, 0] and not trial.hidden[7, 1] and not trial.hidden[:6].any()


@pytest.mark.parametrize("index", range(8))
def test_a_span_hides_every_patch_that_it_touches(index):
    trial = Trial.of_span(index, np.ones((12, 10), dtype=bool), 300, 300)
    assert 300 <= trial.span.stop - trial.span.start <= 1500 and trial.scored.sum() <= 3
    for row in np.flatnonzero(trial.scored):
        shown = np.flatnonzero(~np.repeat(trial.hidden[row], 300))
        assert not ((shown >= trial.span.start) & (shown < trial.span.stop)).any()
    assert not trial.scored[:6].any() or trial.scored[:6].sum() >= 1


@pytest.mark.parametrize("kind", evaluate_reconstruction.NOISE_BANDS_HZ)
def test_noise_has_unit_power_in_its_band(kind):
    noise = noise_like(kind, (2, 3000), 300, np.random.default_rng(0))
    np.testing.assert_allclose(noise.std(axis=1), 1, rtol=1e-6)
    spectrum, frequency = np.abs(np.fft.rfft(noise)) ** 2, np.fft.rfftfreq(3000, 1 / 300)
    low, high = evaluate_reconstruction.NOISE_BANDS_HZ[kind]
    inside = (frequency > low / 2) & (frequency < high * 2)
    assert spectrum[:, inside].sum() > 0.9 * spectrum.sum()


def test_an_error_that_steps_at_the_edges_is_told_from_one_that_does_not():
    reference = np.zeros((2, 900))
    smooth = np.sin(np.linspace(0, 20, 900))
    predicted = np.stack([smooth, smooth + np.repeat([0.0, 0.5, -0.5], 300)])
    even, stepped = edge_jump(predicted, reference, size=300)
    assert even < 2.5 and stepped > 20
    ramp = np.arange(900) / 100 + np.zeros((1, 900))
    assert edge_jump(ramp, reference[:1], size=300)[0] == pytest.approx(1)


def test_figures_are_of_scored_leads_and_the_cases_of_one_lead_are_joined():
    table, signal = Table(), four_source_ecg()
    for name, error in (("V1", 0.1), ("V2", 0.2)):
        trial = Trial.of_case(f"G1 {name}", REAL, 300)
        for method, factor in ((LEAST_SQUARES, 2), ("head", 1)):
            table.add(f"G1 {name}", method, signal + factor * error, signal, trial, 300)
    found = report(table, ["a"], num_resamples=3)["G1"]["head"]
    assert found["precordial"]["mae_mv"] == pytest.approx(0.15, rel=1e-4) and set(found["leads"]) == {"V1", "V2"}
    assert found["precordial"]["gain_db"] == pytest.approx(20 * np.log10(2), rel=1e-4)
    assert found["precordial"]["intervals_95"]["mae_mv"] == pytest.approx((0.15, 0.15), rel=1e-4)
    ranges = np.ptp(signal[6:8].astype(float), axis=1)
    expected = np.mean(20 * np.log10(ranges / [0.1, 0.2]))
    assert found["precordial"]["psnr_range_db"] == pytest.approx(expected, rel=1e-4)


def test_all_cases_are_measured_and_shown(tmp_path):
    extractor = AnyECGFeatureExtractor()
    data = DataArguments(simulate=40, cache_dir=str(tmp_path), num_proc=1)
    records = load_folds(list_sources(data), extractor, range(1, 11), args=data, limit=3)
    methods = baselines(np.eye(12) + 0.5)
    with torch.no_grad():
        table, patients = measure(records, extractor, methods, batch_size=2)
    cases = report(table, patients, num_resamples=0)
    assert set(cases) == {
        "G1",
        "G2",
        "G3 V2",
        "G3 V5",
        "G4 I",
        "G4 II",
        "G5",
        "G6 12 dB",
        "G6 6 dB",
        "G6 0 dB",
        "G6 -6 dB",
        "G7",
    }
    assert cases["G7"][ALGEBRA]["all"]["rmse_mv"] < 1e-3 and "precordial" not in cases["G7"][ALGEBRA]
    assert len(cases["G4 I"]["zeros"]["leads"]) == 11 and len(cases["G1"]["zeros"]["leads"]) == 6
    levels = [cases[f"G6 {level} dB"][AS_IT_IS]["all"]["psnr_range_db"] for level in (12, 6, 0, -6)]
    np.testing.assert_allclose(np.diff(levels), [-6, -6, -6], atol=1e-6)
    page = as_markdown({"what": "", "cases": json.loads(json.dumps(cases))})
    assert "| G4 II | zeros | all |" in page and "| G7 | algebra | all |" in page
