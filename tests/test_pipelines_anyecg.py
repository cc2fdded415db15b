"""The pipelines: forms of input, batches, long records, what is said of quality, and each task's result."""

import dataclasses
import logging

import datasets
import numpy as np
import pytest
import torch
from tiny_checkpoints import LABELS, tiny_model, tiny_quantizer, write_record
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg import AnyECGModel
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction, AnyECGForSequenceClassification
from anyecg_hf.pipelines_anyecg import ECGClassificationPipeline, register_pipelines
from anyecg_hf.records import is_simulated, read_record
from anyecg_hf.simulate import simulate_record

TOLERANCE = 1e-5  # float32, sums in another order
TASKS = {
    "ecg-classification": AnyECGForSequenceClassification,
    "ecg-reconstruction": AnyECGForLeadReconstruction,
    "ecg-feature-extraction": AnyECGModel,
}


def make_pipe(task, model=None, extractor=None, **options):
    model = tiny_model(TASKS[task]) if model is None else model
    options.setdefault("device", "cpu")  # an accelerator would be taken where there is one, and rounds otherwise
    return pipeline(task, model=model, feature_extractor=extractor or AnyECGFeatureExtractor(), **options)


@pytest.fixture(scope="module")
def classify():
    return make_pipe("ecg-classification")


@pytest.fixture(scope="module")
def embed():
    return make_pipe("ecg-feature-extraction")


@pytest.fixture(scope="module")
def reconstruct():
    return make_pipe("ecg-reconstruction")


@pytest.fixture(scope="module")
def record():
    return simulate_record(1)


@pytest.fixture(scope="module")
def records(record):
    """Records that differ in rate, length and leads."""
    return [
        record,
        simulate_record(2, sampling_rate=250, duration_seconds=4, lead_names=["V5", "II"]),
        simulate_record(3, duration_seconds=17, lead_names=["I", "II", "V1", "V2"]),
    ]


@pytest.fixture
def damaged():
    """14 s with a gap in II from 2 to 3 s, and a flat V2."""
    record = simulate_record(4, duration_seconds=14, sampling_rate=500)
    record.signal[1, 1100:1300] = np.nan
    record.signal[7] = 0.1
    record.record_name = "damaged"
    return record


def scores(findings):
    return np.array([{each["label"]: each["score"] for each in findings}[label] for label in LABELS.values()])


def as_dict(record):
    return {
        "signal": record.signal,
        "sampling_rate": record.sampling_rate,
        "lead_names": record.lead_names,
        "units": "mV",
    }


# ---- forms of input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".hea", ".dat"])
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_path_with_or_without_suffix_is_read(classify, record, tmp_path, suffix, kind):
    path = write_record(record, tmp_path, "r1")
    found = classify(kind(path.with_name(path.name + suffix)))
    assert np.allclose(scores(found), scores(classify(record)), atol=0.01)  # 16 bit on disk


@pytest.mark.parametrize(
    "form",
    [
        lambda signal: signal,
        lambda signal: signal.tolist(),
        lambda signal: list(signal),
        torch.tensor,
    ],
    ids=["array", "nested list", "list of rows", "tensor"],
)
def test_a_bare_signal_is_one_record(classify, record, form):
    found = classify(form(record.signal), sampling_rate=record.sampling_rate, lead_names=record.lead_names, units="mV")
    assert found == classify(record)


def test_options_may_be_given_once_for_all_calls(record):
    given = {"sampling_rate": record.sampling_rate, "lead_names": record.lead_names, "units": "mV", "top_k": 1}
    assert len(make_pipe("ecg-classification", **given)(record.signal)) == 1


@pytest.mark.parametrize("key", ["signal", "array"])
def test_a_dict_is_one_record(classify, record, key):
    given = as_dict(record)
    given[key] = given.pop("signal")
    assert classify(given) == classify(record)


def test_a_dict_of_a_path_is_one_record(classify, record, tmp_path):
    path = write_record(record, tmp_path, "r1")
    assert classify({"path": str(path), "label": 3}) == classify(path)


def test_microvolt_gives_the_same_result(classify, record):
    given = as_dict(record) | {"signal": record.signal * 1000, "units": "uV"}
    assert np.allclose(scores(classify(given)), scores(classify(record)), atol=TOLERANCE)


def test_names_of_leads_can_be_explained(classify, record):
    given = as_dict(record) | {"lead_names": ["one", *record.lead_names[1:]]}
    assert classify(given, lead_aliases={"one": "I"}) == classify(record)


def test_a_list_gives_a_list_in_its_order(classify, records):
    assert classify(records) == [classify(one) for one in records]
    assert classify(tuple(records)) == classify(records)
    assert classify([]) == []


def test_a_list_may_mix_forms(classify, record, tmp_path):
    path = write_record(record, tmp_path, "r1")
    assert classify([path, str(path), as_dict(record)]) == [classify(path), classify(path), classify(record)]


@pytest.mark.parametrize("stream", [lambda them: (one for one in them), iter], ids=["generator", "iterator"])
def test_a_generator_is_read_as_its_results_are_asked_for(classify, records, stream):
    read = []

    def watched():
        for one in stream(records):
            read.append(one)
            yield one

    results = iter(classify(watched()))
    assert read == [] and next(results) == classify(records[0]) and len(read) == 1
    assert list(results) == [classify(one) for one in records[1:]]


def test_an_iterator_is_a_stream(classify, records):
    assert list(classify(iter(records))) == classify(records)


@pytest.fixture
def dataset(records):
    return datasets.Dataset.from_list([{**as_dict(one), "signal": one.signal.tolist()} for one in records])


def test_a_dataset_of_records_gives_results_one_by_one(classify, records, dataset):
    results = classify(dataset)
    assert not isinstance(results, list) and len(results) == 3
    assert list(results) == list(results) == classify(records)


def test_a_dataset_of_arrays_gives_the_same(classify, records, dataset):
    assert list(classify(dataset.with_format("numpy", columns=["signal"], output_all_columns=True))) == classify(
        records
    )


def test_a_dataset_that_streams_gives_the_same(classify, records, dataset):
    assert list(classify(dataset.to_iterable_dataset(), batch_size=2)) == classify(records, batch_size=2)


@pytest.fixture
def paths(records, tmp_path):
    return [str(write_record(one, tmp_path, f"r{i}")) for i, one in enumerate(records)]


def test_a_column_of_paths_is_read(classify, paths):
    dataset = datasets.Dataset.from_dict({"path": paths, "file": paths})
    assert list(classify(dataset["file"])) == list(classify(dataset)) == classify(paths)
    assert list(classify(KeyDataset(dataset, "file"))) == classify(paths)


def test_workers_give_the_same(classify, paths):
    assert list(classify(datasets.Dataset.from_dict({"path": paths}), num_workers=2)) == classify(paths)


# ---- batches and windows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batched_is_single(classify, records, batch_size):
    for batched, single in zip(classify(records, batch_size=batch_size), classify(records), strict=True):
        assert np.allclose(scores(batched), scores(single), atol=TOLERANCE)


@pytest.mark.parametrize("pooling", ["record", "lead", "patch"])
def test_batched_features_are_single_ones(embed, records, pooling):
    batched, single = embed(records, batch_size=3, pooling=pooling), embed(records, pooling=pooling)
    for one, other in zip(batched, single, strict=True):
        parts = (
            [(one, other)] if pooling == "record" else [(one[key], other[key]) for key in other if key != "lead_names"]
        )
        assert all(np.allclose(a, b, atol=1e-4, equal_nan=True) for a, b in parts)


def test_batched_reconstruction_is_single(reconstruct, records):
    for one, other in zip(reconstruct(records, batch_size=3), reconstruct(records), strict=True):
        assert np.allclose(one["signal"], other["signal"], atol=1e-4, equal_nan=True)
        assert np.array_equal(one["restored"], other["restored"])


def test_few_windows_at_a_time_give_the_same(classify, records):
    few = classify(records, windows_per_batch=1)
    assert all(np.allclose(scores(a), scores(b), atol=TOLERANCE) for a, b in zip(few, classify(records), strict=True))


@pytest.mark.parametrize("merge", ["mean", "max"])
def test_a_long_record_has_the_merged_scores_of_its_windows(classify, merge):
    long = simulate_record(5, duration_seconds=18, lead_names=["II", "V2"])
    items, starts = classify.feature_extractor.windows(long)
    assert starts.tolist() == [0, 5, 8]
    batch = classify.feature_extractor.pad(items, return_tensors="pt")
    with torch.no_grad():
        windows = classify.model(**batch).logits.sigmoid().numpy()
    assert np.allclose(scores(classify(long, merge=merge)), getattr(windows, merge)(0), atol=TOLERANCE)


def test_windows_of_another_length_are_the_extractors_choice(record):
    pipe = make_pipe("ecg-classification", extractor=AnyECGFeatureExtractor(window_seconds=5.0, hop_seconds=5.0))
    assert pipe(record, return_quality=True)["quality"]["num_windows"] == 2


def test_windows_without_a_usable_patch_are_left_out_and_named(classify):
    long = simulate_record(6, duration_seconds=30, lead_names=["II", "V2"])
    start, end = (round(second * long.sampling_rate) for second in (10, 20))
    long.signal[:, start:end] = np.nan
    result = classify(long, return_quality=True)
    assert result["quality"]["num_windows"] == 4
    stretches = [(each["lead"], each["start_seconds"], each["end_seconds"]) for each in result["quality"]["masked"]]
    assert stretches == [("II", 10, 20), ("V2", 10, 20)] and result["quality"]["usable_share"] == pytest.approx(
        2 / 3, abs=1e-3
    )


def _unusable(duration_seconds=10):
    """A record of two leads: one without any value, one that is flat."""
    record = simulate_record(3, duration_seconds=duration_seconds, lead_names=["I", "V2"])
    record.signal[0], record.signal[1], record.record_name = np.nan, 0.5, "empty"
    return record


@pytest.mark.parametrize("duration_seconds", [10, 23])
def test_an_unusable_signal_is_an_answer_where_there_is_room_for_it_and_else_an_error(
    classify, record, duration_seconds
):
    unusable = _unusable(duration_seconds)
    first, second = classify([unusable, record], return_quality=True, batch_size=2)
    assert first["answer"] == "signal unusable" and first["findings"] == [] and first["record_name"] == "empty"
    quality = first["quality"]
    assert (quality["usable_share"], quality["is_acceptable"], quality["num_windows"]) == (0, False, 0)
    stretches = {(each["lead"], each["reason"], each["end_seconds"]) for each in quality["masked"]}
    assert {("I", "missing", duration_seconds), ("V2", "flat", duration_seconds)} <= stretches
    assert second["findings"] == classify(record)
    with pytest.raises(ValueError, match='"empty": nothing usable'):
        classify(unusable)
    with pytest.raises(ValueError, match='"empty": nothing usable'):
        make_pipe("ecg-feature-extraction")(unusable, return_quality=True)


def test_no_finding_is_an_answer_whatever_of_the_labels_is_asked_for(classify, record):
    ranked = [finding["label"] for finding in classify(record)]
    for thresholds, answer in ((1.0, "no finding"), ({**dict.fromkeys(ranked, 1.0), ranked[-1]: 0.0}, "findings")):
        result = classify(record, thresholds=thresholds, top_k=1, return_quality=True)
        assert result["answer"] == answer and len(result["findings"]) == 1
        assert not result["findings"][0]["positive"]


@pytest.mark.parametrize("problem_type", ["single_label_classification", "regression"])
def test_one_of_several_labels_and_a_value_are_findings_of_any_usable_record(record, problem_type):
    pipe = make_pipe("ecg-classification", tiny_model(problem_type=problem_type))
    assert pipe(record, return_quality=True)["answer"] == "findings"
    assert pipe(_unusable(), return_quality=True)["answer"] == "signal unusable"


# ---- quality -------------------------------------------------------------------------------------------------------


def test_what_is_masked_is_said_in_a_warning(classify, damaged, caplog):
    with caplog.at_level(logging.WARNING, logger="anyecg_hf"):
        classify(damaged)
    (message,) = [entry.message for entry in caplog.records if "masked, so the result rests on" in entry.message]
    assert 'Record "damaged"' in message and "II missing 2-3 s" in message and "V2 flat 0-14 s" in message


def test_nothing_is_said_of_a_good_record(classify, record, caplog):
    with caplog.at_level(logging.WARNING, logger="anyecg_hf"):
        classify(record)
    assert caplog.records == []


@pytest.mark.parametrize("task", TASKS)
def test_results_name_what_is_masked(task, damaged):
    pipe = make_pipe(task)
    result = pipe(damaged) if task == "ecg-reconstruction" else pipe(damaged, return_quality=True)
    assert result["record_name"] == "damaged"
    assert result["quality"]["masked"] == [
        {"lead": "II", "start_seconds": 2.0, "end_seconds": 3.0, "reason": "missing"},
        {"lead": "V2", "start_seconds": 0.0, "end_seconds": 14.0, "reason": "flat"},
    ]
    assert result["quality"]["usable_share"] == pytest.approx(1 - 15 / (12 * 14), abs=1e-3)


def test_absent_leads_and_the_readers_notes_are_named(classify, record):
    few = simulate_record(1, lead_names=["II", "V5"])
    few.warnings.append("signal RESP left out")
    quality = classify(few, return_quality=True)["quality"]
    assert quality["lead_names"] == ["II", "V5"] and len(quality["absent_leads"]) == 10
    assert quality["notes"] == ["signal RESP left out"] and quality["masked"] == []


def test_saturation_is_doubtful_but_used(classify, record):
    clipped = simulate_record(1)
    clipped.signal[1, 1000:1100] = 3.0
    quality = classify(clipped, return_quality=True)["quality"]
    assert quality["masked"] == []
    assert ("II", "saturated") in {(each["lead"], each["reason"]) for each in quality["doubtful"]}
    assert quality["is_acceptable"] and classify(record, return_quality=True)["quality"]["acceptability"] == 1.0


def test_absent_leads_may_be_left_out_or_flat(classify):
    full, few = simulate_record(1), simulate_record(1, lead_names=["I", "II", "V1"])
    for row, name in enumerate(full.lead_names):
        if name not in few.lead_names:
            full.signal[row] = 0
    assert np.allclose(scores(classify(full)), scores(classify(few)), atol=TOLERANCE)


# ---- classification ------------------------------------------------------------------------------------------------


def test_findings_have_four_keys_and_are_sorted_by_score(classify, record):
    found = classify(record)
    assert all(list(each) == ["label", "score", "threshold", "positive"] for each in found)
    assert sorted(each["label"] for each in found) == sorted(LABELS.values())
    assert [each["score"] for each in found] == sorted((each["score"] for each in found), reverse=True)
    assert all(type(each["score"]) is float and type(each["positive"]) is bool for each in found)


def test_multi_label_scores_are_sigmoids(classify, record):
    inputs = classify.feature_extractor(record, return_tensors="pt")
    with torch.no_grad():
        expected = classify.model(**inputs).logits.sigmoid()[0].numpy()
    assert np.allclose(scores(classify(record)), expected, atol=1e-6)


def test_single_label_scores_are_a_softmax_and_the_highest_is_positive(record):
    found = make_pipe("ecg-classification", tiny_model(problem_type="single_label_classification"))(record)
    assert sum(each["score"] for each in found) == pytest.approx(1)
    assert [each["positive"] for each in found] == [True, False, False, False]
    assert {each["threshold"] for each in found} == {None}


def test_a_regression_gives_values_and_no_verdict(record):
    model = tiny_model(problem_type="regression", id2label={0: "age"}, label2id={"age": 0})
    pipe = make_pipe("ecg-classification", model)
    with torch.no_grad():
        value = model(**pipe.feature_extractor(record, return_tensors="pt")).logits.item()
    (found,) = pipe(record)
    assert found == {"label": "age", "score": pytest.approx(value), "threshold": None, "positive": None}


def test_an_unknown_problem_type_asks_for_the_function(record):
    pipe = make_pipe("ecg-classification", tiny_model(problem_type=None))
    with pytest.raises(ValueError, match="problem_type is None.*function_to_apply"):
        pipe(record)
    assert sum(each["score"] for each in pipe(record, function_to_apply="softmax")) == pytest.approx(1)


def test_top_k_keeps_the_highest(classify, record):
    assert classify(record, top_k=2) == classify(record)[:2]


def test_stored_thresholds_decide(record):
    model = tiny_model(thresholds=[0.0, 1.0, 0.25, 0.75])
    found = {each["label"]: each for each in make_pipe("ecg-classification", model)(record)}
    assert [found[label]["threshold"] for label in LABELS.values()] == [0.0, 1.0, 0.25, 0.75]
    assert found["NORM"]["positive"] and not found["AFIB"]["positive"]
    assert all(each["positive"] == (each["score"] >= each["threshold"]) for each in found.values())


def test_without_stored_thresholds_a_half_decides(classify, record):
    assert {each["threshold"] for each in classify(record)} == {0.5}


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0.3, [0.3] * 4), ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]), ({"PVC": 0.9}, [0.5, 0.5, 0.9, 0.5])],
    ids=["one for all", "one each", "some by name"],
)
def test_thresholds_may_be_given(classify, record, given, expected):
    found = {each["label"]: each["threshold"] for each in classify(record, thresholds=given)}
    assert [found[label] for label in LABELS.values()] == expected


def test_stored_thresholds_do_not_judge_the_scores_of_another_function(record):
    pipe = make_pipe("ecg-classification", tiny_model(thresholds=[0.1] * 4))
    assert {each["threshold"] for each in pipe(record, function_to_apply="none")} == {None}


# ---- feature extraction --------------------------------------------------------------------------------------------


def test_pooling_gives_one_vector_a_record_a_lead_or_a_patch(embed, record):
    vector, leads, patches = (embed(record, pooling=pooling) for pooling in ("record", "lead", "patch"))
    assert vector.shape == (32,) and vector.dtype == np.float32
    assert list(leads) == record.lead_names and {each.shape for each in leads.values()} == {(32,)}
    assert patches["features"].shape == (12, 10, 32) and patches["start_seconds"].tolist() == list(range(10))
    assert np.array_equal(embed(record), vector)


def test_the_record_vector_is_the_models_pooled_output(embed, record):
    with torch.no_grad():
        expected = embed.model(**embed.feature_extractor(record, return_tensors="pt")).pooler_output[0]
    assert np.allclose(embed(record), expected, atol=TOLERANCE)


def test_vectors_are_means_over_the_usable_patches_only(embed, damaged):
    short = {"signal": damaged.signal[:, :5000], "sampling_rate": 500, "lead_names": damaged.lead_names, "units": "mV"}
    patches = embed(short, pooling="patch")
    usable = ~np.isnan(patches["features"][..., 0])
    assert not usable[7].any() and (~usable[1]).sum() == 1
    assert np.allclose(embed(short), patches["features"][usable].mean(0), atol=TOLERANCE)
    by_lead = embed(short, pooling="lead")
    assert "V2" not in by_lead and np.allclose(
        by_lead["II"], np.nanmean(patches["features"][1], axis=0), atol=TOLERANCE
    )


def test_patches_of_a_long_record_cover_it_once(embed):
    patches = embed(simulate_record(7, duration_seconds=17.4, lead_names=["II"]), pooling="patch")
    starts = patches["start_seconds"]
    assert patches["features"].shape[1] == len(starts) and not np.isnan(patches["features"]).any()
    assert starts[:16].tolist() == pytest.approx([*range(15), 14.4]) and starts[-1] == pytest.approx(16.4)


def test_a_head_gives_the_features_of_its_backbone(embed, record):
    head = tiny_model(AnyECGForSequenceClassification)
    pipe = make_pipe("ecg-feature-extraction", head)
    with torch.no_grad():
        expected = head.anyecg(**pipe.feature_extractor(record, return_tensors="pt")).pooler_output[0]
    assert np.allclose(pipe(record), expected, atol=TOLERANCE)


# ---- reconstruction ------------------------------------------------------------------------------------------------


def test_absent_leads_are_restored_and_measured_ones_come_back_as_they_were(reconstruct):
    few = simulate_record(8, lead_names=["V1", "II", "V6"])
    result = reconstruct(few)
    assert result["lead_names"] == list(reconstruct.feature_extractor.lead_names)
    assert result["signal"].shape == result["restored"].shape == (12, 3000) and result["signal"].dtype == np.float32
    given = reconstruct.feature_extractor(few)["input_values"][0]
    for row, name in enumerate(few.lead_names):
        assert np.array_equal(result["signal"][result["lead_names"].index(name)], given[row])
    restored = dict(zip(result["lead_names"], result["restored"].all(1)))
    assert [name for name, is_restored in restored.items() if not is_restored] == ["II", "V1", "V6"]
    assert result["sampling_rate"] == 300 and result["units"] == "mV" and not result["derived"].any()


def test_restored_leads_are_the_models(reconstruct):
    few = simulate_record(8, lead_names=["II", "V1"])
    batch = reconstruct.feature_extractor(few, return_tensors="pt")
    values, hidden = torch.zeros(1, 12, 3000), torch.ones(1, 12, 10, dtype=torch.bool)
    values[:, [1, 6]], hidden[:, [1, 6]] = batch["input_values"], False
    with torch.no_grad():
        expected = reconstruct.model(values, torch.arange(1, 13)[None], bool_masked_pos=hidden).reconstruction[0, 8]
    result = reconstruct(few, leads=["V3"])
    assert result["lead_names"] == ["II", "V1", "V3"]
    assert np.allclose(result["signal"][2], expected, atol=TOLERANCE)


def test_limb_leads_follow_from_i_and_ii_and_are_said_to_be_derived(reconstruct):
    full = reconstruct(simulate_record(9))
    result = reconstruct(simulate_record(9, lead_names=["I", "II"]))
    derived = [name for name, is_derived in zip(result["lead_names"], result["derived"].all(1)) if is_derived]
    assert derived == ["III", "aVR", "aVL", "aVF"] and not (result["derived"] & result["restored"]).any()
    assert np.allclose(result["signal"][:6], full["signal"][:6], atol=2e-3)


@pytest.mark.parametrize("pair", [("I", "III"), ("III", "aVF"), ("aVR", "aVL")])
def test_limb_leads_follow_from_any_two(reconstruct, pair):
    result = reconstruct(simulate_record(9, lead_names=[*pair, "V1"]))
    lead = dict(zip(result["lead_names"], result["signal"]))
    limbs = list(result["lead_names"][:6])
    assert [limbs[row] for row in np.flatnonzero(result["derived"].all(1))] == [n for n in limbs if n not in pair]
    assert not result["restored"][:6].any() and result["restored"][7:].all()
    np.testing.assert_allclose(lead["I"] + lead["III"], lead["II"], atol=1e-5)
    np.testing.assert_allclose(lead["aVR"], -(lead["I"] + lead["II"]) / 2, atol=1e-5)
    np.testing.assert_allclose(lead["aVL"], (lead["I"] - lead["III"]) / 2, atol=1e-5)
    np.testing.assert_allclose(lead["aVF"], (lead["II"] + lead["III"]) / 2, atol=1e-5)


def test_what_is_restored_does_not_depend_on_what_else_is_asked_for(reconstruct):
    few = simulate_record(9, lead_names=["I", "II"])
    whole, one = reconstruct(few), reconstruct(few, leads=["V4"])
    assert one["lead_names"] == ["I", "II", "V4"]
    np.testing.assert_allclose(one["signal"][2], whole["signal"][whole["lead_names"].index("V4")], atol=TOLERANCE)


def test_restored_leads_stay_marked_when_the_result_is_given_again(reconstruct):
    first = reconstruct(simulate_record(8, lead_names=["I", "II", "V1"]))
    again = reconstruct(
        {**first, "signal": np.where(first["restored"], 1.0, first["signal"])}
    )  # its content is not taken
    assert np.array_equal(again["restored"], first["restored"]) and np.array_equal(again["derived"], first["derived"])
    measured = ~first["restored"] & ~first["derived"]
    assert measured.any(1).sum() == 3


def test_a_record_that_was_simulated_says_so_when_restored_and_nothing_else_of_its_comments_is_kept(reconstruct):
    record = simulate_record(3, lead_names=["I", "II", "V2"])
    record.comments.append("Doe, John")
    assert is_simulated(reconstruct(record)) and "Doe" not in str(reconstruct(record)["comments"])
    measured = dataclasses.replace(record, comments=["Doe, John"])
    assert reconstruct(measured)["comments"] == [] and not is_simulated(reconstruct(measured))


def test_a_result_of_other_pipelines_says_what_of_its_record_was_restored(reconstruct, classify):
    restored = reconstruct(simulate_record(8, lead_names=["I", "II", "V1"]), leads=["V2", "V5"])
    notes = classify(restored, return_quality=True)["quality"]["notes"]
    assert notes == ["restored by a model in whole or in part, not measured: V2, V5"]
    assert not classify(simulate_record(8), return_quality=True)["quality"]["notes"]


def test_windows_of_a_restored_lead_pass_into_each_other_without_a_step(reconstruct, monkeypatch):
    """Where each window makes another constant, the joined lead moves from one to the next by small steps only."""
    monkeypatch.setattr(
        type(reconstruct),
        "_run",
        lambda self, items: [np.full_like(it["input_values"], i) for i, it in enumerate(items)],
    )
    result = reconstruct(simulate_record(10, duration_seconds=23.7, lead_names=["II", "V1"]), leads=["V2"])
    made = result["signal"][2]
    assert made[0] == 0 and made.max() > 1.5 and np.abs(np.diff(made)).max() < 0.01


def test_a_measured_lead_that_is_asked_for_is_hidden_and_made_anew(reconstruct, record):
    changed = simulate_record(1)
    changed.signal[8] = simulate_record(99).signal[8]
    one, other = (reconstruct(each, leads=["V3"]) for each in (record, changed))
    assert one["restored"][8].all() and not one["restored"][:8].any()
    assert np.array_equal(one["signal"], other["signal"])


def test_unusable_stretches_of_measured_leads_are_restored(reconstruct, damaged):
    result = reconstruct(damaged)
    assert np.array_equal(np.flatnonzero(result["restored"].any(1)), [7]) and result["restored"][7].all()
    assert np.array_equal(np.flatnonzero(result["derived"].any(1)), [1])  # lead II, from I and III
    assert np.array_equal(np.flatnonzero(result["derived"][1]), np.arange(600, 900))
    np.testing.assert_allclose(
        result["signal"][1, 600:900], (result["signal"][0] + result["signal"][2])[600:900], atol=1e-5
    )
    assert np.isfinite(result["signal"]).all() and result["signal"].shape == (12, 4200)


def test_measured_samples_of_a_long_record_are_joined_without_a_seam(reconstruct):
    long = simulate_record(10, duration_seconds=23.7, lead_names=["II", "V1"])
    whole = AnyECGFeatureExtractor(window_seconds=30.0)(long)["input_values"][0]
    result = reconstruct(long, leads=["V2"])
    assert result["signal"].shape == (3, 7110) and not result["restored"][:2].any()
    assert np.array_equal(result["signal"][:2], whole[:, :7110]) and np.isfinite(result["signal"]).all()


def test_the_result_is_a_record_that_pipelines_take(reconstruct, classify):
    few = simulate_record(11, lead_names=["I", "II", "V2"])
    assert len(classify(reconstruct(few))) == len(LABELS)


def test_nothing_is_restored_of_a_complete_record(reconstruct, record):
    result = reconstruct(record)
    assert not result["restored"].any() and not result["derived"].any()


def test_lead_aliases_are_understood_in_leads(reconstruct):
    assert reconstruct(simulate_record(8, lead_names=["II"]), leads=["avr"])["lead_names"] == ["II", "aVR"]


def test_asking_for_all_measured_leads_is_refused(reconstruct):
    with pytest.raises(ValueError, match="leave at least one"):
        reconstruct(simulate_record(8, lead_names=["II"]), leads=["II"])


# ---- precision, registration, errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_bfloat16_models_get_bfloat16_input(task, record, tmp_path):
    tiny_model(TASKS[task]).save_pretrained(tmp_path)
    AnyECGFeatureExtractor().save_pretrained(tmp_path)
    pipe = pipeline(task, model=str(tmp_path), dtype=torch.bfloat16)
    assert pipe.model.dtype == torch.bfloat16
    result, expected = pipe(record), pipeline(task, model=str(tmp_path))(record)
    if task == "ecg-classification":
        assert np.allclose(scores(result), scores(expected), atol=0.05)


def test_a_model_in_training_mode_is_put_to_rest(record):
    model = tiny_model(hidden_dropout=0.5).train()
    pipe = make_pipe("ecg-classification", model)
    assert pipe(record) == pipe(record) and not model.training


def test_registering_twice_says_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        register_pipelines()
    assert caplog.records == []


@pytest.mark.parametrize("task", TASKS)
def test_a_saved_pipeline_loads_by_task(task, record, tmp_path):
    pipe = make_pipe(task)
    pipe.save_pretrained(tmp_path)
    result, again = pipe(record), pipeline(task, model=str(tmp_path))(record)
    values = {"ecg-classification": scores, "ecg-reconstruction": lambda it: it["signal"]}.get(task, np.asarray)
    assert np.allclose(values(result), values(again), atol=TOLERANCE)


def test_a_missing_file_is_named_by_the_reader(classify, tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such: no such file"):
        classify(tmp_path / "no-such")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lead_names": ["II"], "units": "mV"}, "sampling.rate"),
        ({"sampling_rate": 300, "units": "mV"}, "lead names"),
        ({"sampling_rate": 300, "lead_names": ["II"]}, "units"),
    ],
    ids=["rate", "leads", "units"],
)
def test_an_array_without_its_description_is_refused(classify, given, message):
    with pytest.raises(ValueError, match=message):
        classify(np.random.default_rng(0).normal(size=(1, 3000)), **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "median"}, "'mean', 'max'"),
        ({"function_to_apply": "relu"}, "'sigmoid'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"windows_per_batch": 0}, "windows_per_batch is 0"),
        ({"thresholds": [0.5]}, "1 thresholds for 4 labels"),
        ({"thresholds": {"nope": 0.5}}, "names nope"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_impossible_options_are_refused(classify, record, options, message):
    with pytest.raises(ValueError, match=message):
        classify(record, **options)


def test_unknown_options_are_refused(classify, record):
    with pytest.raises(TypeError, match="no option topk. Options: .*top_k"):
        classify(record, topk=3)


def test_an_unknown_pooling_is_refused(embed, record):
    with pytest.raises(ValueError, match="'record', 'lead', 'patch'"):
        embed(record, pooling="beat")


def test_an_unknown_lead_to_make_is_refused(reconstruct, record):
    with pytest.raises(ValueError, match='"V9" is not one'):
        reconstruct(record, leads=["V9"])


@pytest.mark.parametrize("model", [lambda: tiny_model(AnyECGModel), tiny_quantizer], ids=["backbone", "quantizer"])
def test_a_model_for_another_task_is_refused(model):
    with pytest.raises(ValueError, match="needs a model like AnyECGForSequenceClassification"):
        make_pipe("ecg-classification", model())


def test_an_extractor_of_another_rate_is_refused():
    with pytest.raises(ValueError, match="gives sampling_rate 250, the model needs 300"):
        make_pipe("ecg-classification", extractor=AnyECGFeatureExtractor(sampling_rate=250, patch_size=250))


def test_a_pipeline_without_an_extractor_is_refused():
    with pytest.raises(ValueError, match="feature extractor"):
        ECGClassificationPipeline(tiny_model())


# ---- real records --------------------------------------------------------------------------------------------------


def challenge_records(folder, number):
    return [str(path) for path in sorted((folder / "challenge-2021" / "georgia").glob("*.hea"))[:number]]


def test_real_records_batched_are_single(classify, real_ecg):
    paths = [*challenge_records(real_ecg, 3), str(real_ecg / "challenge-2021" / "ptb" / "S0010")]
    for batched, single in zip(classify(paths, batch_size=4), classify(paths), strict=True):
        assert np.allclose(scores(batched), scores(single), atol=TOLERANCE)


def test_a_real_two_lead_recording_of_half_an_hour_is_one_result(classify, real_ecg):
    result = classify(real_ecg / "mitdb" / "100", return_quality=True)
    assert result["record_name"] == "100" and result["quality"]["lead_names"] == ["II", "V5"]
    assert result["quality"]["num_windows"] > 300 and np.isfinite(scores(result["findings"])).all()


def test_a_real_record_of_few_leads_is_filled_in(reconstruct, real_ecg):
    record = read_record(challenge_records(real_ecg, 1)[0])
    rows = [record.lead_names.index(name) for name in ("I", "II", "V2")]
    few = dataclasses.replace(record, signal=record.signal[rows], lead_names=["I", "II", "V2"])
    result, whole = reconstruct(few), reconstruct(record)
    assert np.isfinite(result["signal"]).all() and result["restored"].any(1).sum() == 5
    assert np.abs(result["signal"] - whole["signal"])[2:6].max() < 0.02  # mV: derived against measured limb leads
