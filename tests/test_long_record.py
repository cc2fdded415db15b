"""From windows to seconds, stretches and burdens; and the pipeline `ecg-long-record`."""

import numpy as np
import pytest
from tiny_checkpoints import tiny_model, write_record
from transformers import pipeline

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.long_record import by_second, own_share, share_of_beats, share_of_time, stretches
from anyecg_hf.modeling_anyecg_heads import AnyECGForSequenceClassification
from anyecg_hf.modeling_anyecg_long import AnyECGForLongRecords
from anyecg_hf.simulate import simulate_record

THRESHOLDS = [0.4, 0.6]


@pytest.fixture(scope="module")
def pipe():
    labels = {"id2label": {0: "AF", 1: "V"}, "label2id": {"AF": 0, "V": 1}}
    model = tiny_model(AnyECGForLongRecords, record_hidden_size=16, **labels)
    model.config.thresholds, model.config.record_thresholds = THRESHOLDS, [0.3, 0.7]
    return pipeline("ecg-long-record", model=model, feature_extractor=AnyECGFeatureExtractor(hop_seconds=10.0))


@pytest.fixture(scope="module")
def record():
    return simulate_record(1, duration_seconds=47, lead_names=["II", "V1"], sampling_rate=250)


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def test_a_second_is_the_mean_of_the_windows_that_hold_it():
    seconds = by_second(np.array([0.0, 1.0]), np.array([0.0, 6.0]), 10.0, 16.0)
    assert seconds.tolist() == [0] * 6 + [0.5] * 4 + [1] * 6


def test_a_second_that_no_window_holds_is_not_known():
    seconds = by_second(np.array([[0.2, 0.4], [0.6, 0.8]]), np.array([0.0, 20.0]), 10.0, 30.0)
    assert seconds.shape == (30, 2) and np.isnan(seconds[10:20]).all() and np.isfinite(seconds[20:]).all()


def test_a_last_window_between_seconds_counts_once():
    starts = np.array([0.0, 5.5555])
    assert by_second(np.array([1.0, 2.0]), starts, 10.0, 15.5555).shape == (16,)
    # 15.56 s at one beat a second: counted in both windows, they add up to those of the record
    assert (own_share(starts, 10.0, 15.5555) * 10).sum() == pytest.approx(15.5, abs=0.6)


def test_stretches_are_the_runs_of_true():
    assert stretches(np.array([True, True, False, True, False])) == [(0, 2), (3, 4)]
    assert stretches(np.zeros(3, dtype=bool)) == [] and stretches(np.ones(3, dtype=bool)) == [(0, 3)]


def test_shares_of_nothing_are_not_known():
    assert np.isnan(share_of_time(np.zeros(3, dtype=bool), np.zeros(3, dtype=bool)))
    assert np.isnan(share_of_beats(0.0, 0.0)) and share_of_beats(3.0, 2.0) == 1.0


# ---- pipeline ------------------------------------------------------------------------------------------------------


def test_a_long_record_gives_scores_by_window_and_second_and_burdens(pipe, record):
    result = pipe(record)
    assert result["record_name"] == "simulated-1" and result["analysed_seconds"] == 47
    assert result["window_start_seconds"].tolist() == [0, 10, 20, 30, 37]
    assert result["beats"].shape == result["window_scores"]["AF"].shape == (5,)
    seconds = result["second_scores"]["AF"]
    assert seconds.shape == (47,) and seconds[:10] == pytest.approx(result["window_scores"]["AF"][0])
    assert seconds[37:40] == pytest.approx(result["window_scores"]["AF"][3:].mean())
    assert result["burden"]["AF"] == pytest.approx((seconds >= THRESHOLDS[0]).mean())
    in_stretches = sum(end - start for start, end in result["stretches"]["AF"])
    assert in_stretches == (seconds >= THRESHOLDS[0]).sum()


def test_the_burden_of_ventricular_beats_is_a_share_of_beats(pipe, record):
    result = pipe(record)
    own = own_share(result["window_start_seconds"], 10.0, 47.0)
    expected = (result["ventricular_beats"] * own).sum() / (result["beats"] * own).sum()
    assert result["burden"]["V"] == pytest.approx(min(expected, 1))


def test_findings_of_the_record_have_their_own_thresholds(pipe, record):
    findings = pipe(record)["findings"]
    assert {each["label"]: each["threshold"] for each in findings} == {"AF": 0.3, "V": 0.7}
    assert findings[0]["score"] >= findings[1]["score"]
    assert all(each["positive"] == (each["score"] >= each["threshold"]) for each in findings)


def test_a_stretch_without_signal_is_not_analysed(pipe, record):
    signal = record.signal.copy()
    signal[:, 20 * 250 : 32 * 250] = np.nan
    result = pipe({"signal": signal, "sampling_rate": 250, "lead_names": record.lead_names, "units": "mV"})
    assert np.isnan(result["second_scores"]["AF"][20:30]).all() and result["analysed_seconds"] == 37
    assert np.isfinite(result["burden"]["AF"]) and 20 not in result["window_start_seconds"]


def test_records_of_other_lengths_and_batches_give_the_same(pipe, record, tmp_path):
    short = simulate_record(2, duration_seconds=12, lead_names=["I"], sampling_rate=500)
    path = str(write_record(short, tmp_path, "r1"))
    both = pipe([record, path], batch_size=2, windows_per_batch=3, return_quality=True)
    alone = pipe(record)
    assert both[1]["record_name"] == "r1" and "lead_names" in both[1]["quality"]
    assert both[0]["window_scores"]["V"] == pytest.approx(alone["window_scores"]["V"], abs=1e-5)


def test_a_saved_pipeline_gives_the_same(pipe, record, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline("ecg-long-record", model=str(tmp_path))(record)
    assert again["window_scores"]["AF"] == pytest.approx(pipe(record)["window_scores"]["AF"], abs=1e-6)
    assert again["burden"] == pytest.approx(pipe(record)["burden"])


def test_a_model_without_a_record_head_is_refused():
    model = tiny_model(AnyECGForSequenceClassification)
    with pytest.raises(ValueError, match="AnyECGForLongRecords"):
        pipeline("ecg-long-record", model=model, feature_extractor=AnyECGFeatureExtractor())
