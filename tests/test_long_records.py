"""Training for long records: what a step sees, the arms, nested validation by patient, and the command from end to end."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_checkpoints import tiny_model
from transformers import AutoModelForAudioFrameClassification, pipeline

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg import AnyECGModel
from anyecg_hf.modeling_anyecg_long import AnyECGForLongRecords
from training import long_records
from training.arguments import parse_recipe
from training.long_arms import (
    Arm,
    RhythmEntropy,
    Scores,
    WindowProbe,
    coefficient_of_sample_entropy,
    one_pass_features,
    segments,
    stretched,
)
from training.long_data import (
    SequenceDataset,
    WindowSequence,
    collate_sequences,
    prepare_long_records,
    read_long_records,
    simulate_long_records,
)
from training.long_validation import (
    calibrate,
    cross_validate,
    figures,
    patient_folds,
    refuse_few_patients,
    score_out_of_fold,
)
from training.probe import LinearProbe
from training.window_features import FeatureCache

RECIPE = "training/recipes/smoke_long.yaml"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    model = tiny_model(AnyECGForLongRecords, pooling="mean_max")
    return FeatureCache(model, AnyECGFeatureExtractor(hop_seconds=10.0), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def long(cache):
    return prepare_long_records(simulate_long_records(4), cache)


def short_record(label, size=64):
    labels = np.float32([[label, 0]])
    return WindowSequence(f"s{label}", f"p{label}", np.full((1, size), label, np.float32), labels, labels * np.nan)


class Oracle(Arm):
    """Knows the truth, and whom it was fitted on."""

    name = "oracle"

    def __init__(self):
        self.fitted = []

    def fit(self, train):
        seen = {record.patient_id for record in train}
        self.fitted.append(seen)

        def score(record):
            assert record.patient_id not in seen
            return Scores.of_windows((record.labels - 0.4) * 4, record.counts.astype(np.float64))

        return score


# ---- records -------------------------------------------------------------------------------------------------------


def test_a_simulated_long_record_changes_its_rhythm_and_says_so(long):
    af = long[0].labels[:, 0]
    assert af.tolist() == [0] * 6 + [1] * 6 + [0] * 12
    assert long[0].labels[12:18, 1].all() and not long[0].labels[:12, 1].any()
    assert long[0].af_burden == pytest.approx(0.25) and 0 < long[0].ventricular_burden < 0.2
    assert len(long[0].views) == 2 and not np.array_equal(long[0].views[0], long[0].features)


def test_no_long_records_are_an_error_that_says_what_to_give(cache):
    with pytest.raises(ValueError, match="--long_data"):
        prepare_long_records([], cache)


def test_a_record_without_annotations_or_too_short_is_an_error(cache):
    (record,) = simulate_long_records(1)
    with pytest.raises(ValueError, match="no annotation of its rhythm"):
        prepare_long_records([dataclasses.replace(record, annotations=[])], cache)
    with pytest.raises(ValueError, match="a window takes 10 s"):
        prepare_long_records([dataclasses.replace(record, signal=record.signal[:, :1000])], cache)


def make_dataset(long, **options):
    short = [short_record(0), short_record(1)]
    return SequenceDataset(long, short, **{"long_share": 0.5, "crop_windows": 7, "seed": 3, **options})


def test_a_step_sees_stretches_of_long_records_and_short_ones_strung_together(long):
    dataset = make_dataset(long)
    items = [dataset[(1, index)] for index in range(200)]
    sizes = [len(item["features"]) for item in items]
    made_up = [item for item in items if np.isnan(item["counts"]).all()]
    assert max(sizes) == 7 and min(sizes) == 1 and 60 < len(made_up) < 140
    assert all((item["features"][:, 0] == item["labels"][:, 0]).all() for item in made_up)
    changes = np.mean([np.diff(item["labels"][:, 0]).any() for item in made_up])
    assert 0 < changes < 0.5  # stretches


def test_an_item_follows_from_its_epoch_and_number(long):
    first, again = make_dataset(long), make_dataset(long)
    assert all(np.array_equal(first[(1, 17)][name], again[(1, 17)][name], equal_nan=True) for name in first[(1, 17)])
    sizes = [[len(first[(epoch, index)]["features"]) for index in range(50)] for epoch in (1, 2)]
    assert sizes[0] != sizes[1]


@pytest.mark.parametrize("rhythm_of, known", [("all", {True}), ("changing", {True, False}), ("none", {False})])
def test_long_records_teach_af_as_asked_and_beats_always(long, rhythm_of, known):
    only_sinus = dataclasses.replace(long[0], labels=long[0].labels * np.float32([0, 1]), patient_id="sinus")
    dataset = make_dataset([only_sinus, long[1]], rhythm_of=rhythm_of, long_share=1.0)
    items = [dataset[(0, index)] for index in range(40)]
    assert {bool(np.isfinite(item["labels"][:, 0]).all()) for item in items} == known
    assert all(np.isfinite(item["labels"][:, 1]).all() and np.isfinite(item["counts"]).all() for item in items)


def test_a_batch_is_filled_up_with_what_is_not_known(long):
    dataset = SequenceDataset(long, [short_record(1)], crop_windows=5)
    batch = collate_sequences([dataset[(0, index)] for index in range(20)])
    mask = batch["window_mask"]
    assert batch["window_features"].shape[:2] == mask.shape and (batch["window_features"][~mask] == 0).all()
    assert torch.isnan(batch["labels"][~mask]).all() and torch.isfinite(batch["labels"][mask]).all()


# ---- arms ----------------------------------------------------------------------------------------------------------


def test_segments_cover_a_record_once():
    for count in (1, 29, 44, 46, 181):
        parts = [list(range(count))[part] for part in segments(count)]
        assert sum(parts, []) == list(range(count)) and min(map(len, parts)) >= min(count, 15)


def test_entropy_tells_fibrillation_from_sinus_rhythm(long, cache):
    scores = RhythmEntropy("rule", cache.extractor).fit([])(long[0])
    assert np.nanmin(scores.logits[8:10, 0]) > np.nanmax(scores.logits[1:4, 0])
    assert np.isnan(scores.logits[:, 1]).all() and np.isnan(scores.counts).all()


def test_entropy_of_too_few_or_equal_intervals_is_low():
    assert coefficient_of_sample_entropy(np.ones(3)) == -5
    steady, wild = np.full(30, 0.8), np.random.default_rng(0).uniform(0.4, 1.2, 30)
    assert coefficient_of_sample_entropy(steady) < -2 < coefficient_of_sample_entropy(wild)


def test_a_probe_tells_windows_and_counts_beats(long):
    score = WindowProbe("probe").fit(long[:3])
    scores = score(long[3])
    assert scores.logits.shape == scores.counts.shape == (24, 2)
    assert np.abs(scores.counts[:, 0] - long[3].counts[:, 0]).mean() < 6
    assert scores.record_logits == pytest.approx(scores.logits.mean(0))


def test_one_pass_over_a_window_is_that_window(cache, long):
    """A record of one window has the same vector either way: table, attention and statistics are the same then."""
    record = long[0].record
    ten_seconds = dataclasses.replace(record, signal=record.signal[:, :2500])
    items, starts = cache.extractor.windows(ten_seconds)
    with torch.no_grad():
        expected = cache.model.embed_windows(**cache.extractor.pad(items, return_tensors="pt")).numpy()
    one = dataclasses.replace(long[0], record=ten_seconds, start_seconds=starts)
    found = one_pass_features(cache.model.anyecg, cache.extractor, one, pooling="mean_max", lead_window=20)
    assert np.allclose(found, expected, atol=1e-4)


def test_one_pass_gives_a_vector_for_each_window(cache, long):
    found = one_pass_features(cache.model.anyecg, cache.extractor, long[0], pooling="mean_max", lead_window=5)
    assert found.shape == long[0].features.shape and np.isfinite(found).all()


def test_a_stretched_backbone_repeats_its_time_table():
    backbone = tiny_model(AnyECGModel)
    table = stretched(backbone, 25, 10, lead_window=5).embeddings.time_embedding.weight
    assert torch.equal(table[:10], table[10:20]) and table.shape[0] == 25
    assert backbone.config.max_patches == 128 and backbone.config.sparse_attention_config.lead_window is None


def test_the_head_starts_at_the_probe_of_single_windows(long):
    features = np.concatenate([one.features for one in long]).astype(np.float64)
    probe = LinearProbe(features, np.concatenate([one.labels for one in long]) >= 0.5, strength=1e-2)
    model = tiny_model(AnyECGForLongRecords, pooling="mean_max")
    model.record_head.standardise(torch.from_numpy(features).float())
    long_records.start_at_probe(model, probe)
    with torch.no_grad():
        logits = model(window_features=torch.from_numpy(long[1].features)[None]).logits[0].numpy()
    assert np.allclose(logits, probe.logits(long[1].features), atol=1e-3)


def test_counts_start_at_their_mean(long):
    model, counts = tiny_model(AnyECGForLongRecords, pooling="mean_max"), np.concatenate([one.counts for one in long])
    long_records.start_counter(model, counts)
    with torch.no_grad():
        expected = model(window_features=torch.from_numpy(long[1].features)[None]).counts[0].numpy()
    assert np.allclose(expected, counts.mean(0), atol=1e-3)


# ---- validation ----------------------------------------------------------------------------------------------------


def test_patients_are_dealt_out_whole(long):
    twice = [*long, dataclasses.replace(long[0], record_id="again")]
    folds = patient_folds(twice, 3)
    assert sorted(sum(folds, [])) == ["long-0", "long-1", "long-2", "long-3"] and len(folds) == 3


def test_too_few_patients_are_refused_before_the_training(long):
    refuse_few_patients(long[:3], 3)
    with pytest.raises(ValueError, match="are of 3 patients: 2 folds by patient.* need 4 at least"):
        refuse_few_patients(long[:3], 2)
    with pytest.raises(ValueError, match="are of 1 patients"):
        refuse_few_patients(long[:1], 7)


def test_no_arm_is_fitted_or_calibrated_on_the_patients_that_it_is_measured_on(long):
    oracle = Oracle()
    judged = cross_validate(oracle, long, folds=2, inner_folds=2)
    assert sorted(one.record.record_id for one in judged) == sorted(record.record_id for record in long)
    assert len(oracle.fitted) == 6 and {len(seen) for seen in oracle.fitted} == {1, 2}


def test_one_who_knows_the_truth_has_the_best_figures(long):
    result = figures(cross_validate(Oracle(), long, folds=2, inner_folds=2))
    assert result["af_auroc"] == result["v_auroc"] == result["af_f1"] == result["v_f1"] == 1.0
    assert result["af_burden_error"] == 0 and result["v_burden_error"] < 0.01 and result["v_count_error"] == 0


def test_what_an_arm_does_not_tell_is_not_measured(long, cache):
    result = figures(cross_validate(RhythmEntropy("rule", cache.extractor), long, folds=2, inner_folds=2))
    assert "v_auroc" not in result and np.isnan(result["record_v_auroc"]) and np.isnan(result["v_burden_error"])
    assert result["af_auroc"] > 0.9


def test_calibration_takes_temperature_and_thresholds_of_windows_and_segments(long):
    calibration = calibrate(score_out_of_fold(Oracle(), long, 2))
    assert calibration.temperature < 1  # the oracle is too modest
    assert all(0 < value < 1 for value in (*calibration.thresholds, *calibration.record_thresholds))


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny_model(AnyECGModel).save_pretrained(folder / "backbone")
    AnyECGFeatureExtractor().save_pretrained(folder / "backbone")
    options = {
        "init_from": folder / "backbone", "output_dir": folder / "out", "cache_dir": folder / "cache", "simulate": 18,
        "simulate_long": 4, "max_steps": 6, "save_steps": 3, "num_proc": 1,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    long_records.main([RECIPE, *words])
    return folder / "out", words


def test_the_run_ends_as_a_folder_for_the_pipeline(run):
    folder, _ = run
    long = pipeline("ecg-long-record", model=str(folder))
    result = long(simulate_long_records(1)[0])
    assert set(result["burden"]) == {"AF", "V"} and len(result["second_scores"]["AF"]) == 240
    assert long.feature_extractor.hop_seconds == 10
    model = AutoModelForAudioFrameClassification.from_pretrained(folder)
    assert len(model.config.thresholds) == len(model.config.record_thresholds) == 2
    assert model.record_head.feature_scale.min() > 0 and model.config.pooling == "mean_max"


def test_the_backbone_stays_as_it_was(run):
    folder, _ = run
    before = AnyECGModel.from_pretrained(folder.parent / "backbone").state_dict()
    after = AutoModelForAudioFrameClassification.from_pretrained(folder).anyecg.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_results_hold_every_arm_and_the_calibration(run):
    results = json.loads((run[0] / "results.json").read_text())
    assert len(results["arms"]) == 6 and results["material"]["patients"] == 4
    assert set(results["calibration"]) == {
        "temperature", "thresholds", "record_temperature", "record_thresholds"
    }  # fmt: skip
    head = results["arms"]["record head"]
    assert set(head["records"]) == {"long-0", "long-1", "long-2", "long-3"}


def test_a_finished_run_is_left_alone(run, monkeypatch):
    monkeypatch.setattr(long_records, "validate", None)
    long_records.main([RECIPE, *run[1]])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--long_share", "0"], "--long_share"),
        (["--folds", "1"], "--folds 1: accepted are whole numbers from 2"),
        (["--crop_windows", "0"], "--crop_windows 0"),
        (["--rhythm_of", "some"], "Accepted: all, changing, none"),
    ],
)
def test_options_out_of_range_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe([RECIPE, *words], long_records.ARGUMENTS)


def test_af_from_short_records_needs_some(run):
    words = [*run[1], "--simulate", "0", "--output_dir", str(run[0].parent / "other")]
    with pytest.raises(ValueError, match="Give some by --data, or --rhythm_of all"):
        long_records.main([RECIPE, *words])


def test_real_records_are_read_with_their_patients(real_ecg):
    records = read_long_records([str(real_ecg / "cpsc_2021")])
    assert len(records) == 9 and all(record.lead_names == ["I", "II"] for record in records)
