"""training/evaluate.py: the task of a classifier's configuration, and what is measured on a user's own labelled records."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.metrics import roc_auc_score
from tiny_checkpoints import LABELS, tiny_model, write_record
from transformers import pipeline

import training.evaluate
import training.finetune
from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.simulate import simulate_record
from training.classifier_report import Predictions, report_of
from training.data import DataArguments, list_sources
from training.evaluate import task_of
from training.labels import FIXED_TASKS, MULTI, build_task

SMOKE = ROOT / "training" / "recipes" / "smoke_finetune.yaml"
NUM_RECORDS = 24
RHYTHMS = {"sinus": "NORM", "af": "AFIB", "pvc": "NORM;PVC"}


def _config(task, **fields):
    return AnyECGConfig(id2label=task.id2label, label2id=task.label2id, problem_type=task.problem_type, **fields)


@pytest.mark.parametrize("name", FIXED_TASKS)
def test_the_task_of_a_configuration_is_known_by_its_labels(name):
    assert task_of(_config(build_task(name))).name == name


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("superclass", {"codes": ["IMI", "NDT"]}),
        ("superclass_single", {"codes": ["IMI"]}),
        ("challenge", {"codes": ["164889003"]}),
    ],
)
def test_its_labels_may_stand_in_another_order(name, row):
    task = build_task(name)
    other = task.reordered(task.names[::-1])
    assert task_of(_config(other)).names == task.names[::-1]
    found, target = task_of(_config(other)).encode(row), task.encode(row)
    if task.problem_type == MULTI:
        assert target.any() and np.array_equal(found, target[::-1])
    else:
        assert other.names[found] == task.names[target] == "MI"


def test_other_labels_are_codes_in_the_order_of_the_configuration():
    task = build_task("codes", [["b", "a"]], min_positives=1).reordered(("b", "a"))
    assert task_of(_config(task)).names == ("b", "a")
    choice = task_of(AnyECGConfig(id2label={0: "b", 1: "a"}, problem_type="single_label_classification"))
    assert [choice.encode({"codes": codes}) for codes in (["a"], ["b", "z"], ["a", "b"], [])] == [1, 0, None, None]


def test_a_regression_of_another_value_is_an_error_that_shows_it():
    with pytest.raises(ValueError, match=r"No task .* \('potassium',\)"):
        task_of(AnyECGConfig(id2label={0: "potassium"}, problem_type="regression"))


def test_a_classifier_of_the_challenges_classes_has_the_challenge_score_and_its_interval():
    task, generator = build_task("challenge"), np.random.default_rng(0)
    targets = (generator.random((40, 24)) < 0.2).astype(np.float32)
    logits = 2 * targets - 3  # right from a threshold between 0.05 and 0.27 on, and never above one half
    patients = [str(index // 2) for index in range(40)]
    report = report_of(Predictions(task, logits, targets, patients, [0.2] * 24), num_resamples=5)
    assert report["challenge_score"] == report["macro_f1"] == report["macro_auroc"] == 1
    assert report["intervals_95"]["challenge_score"] == pytest.approx((1, 1))
    assert report["labels"]["AF"]["positives"] == targets[:, task.names.index("AF")].sum()
    assert report_of(Predictions(task, logits, targets, patients))["challenge_score"] < 0


def test_a_classifier_of_abnormal_records_is_reported_at_its_threshold():
    task, targets = build_task("anomaly"), np.float32([[1], [1], [0], [0]])
    logits = np.array([[1.0], [-1.0], [-2.0], [-3.0]])
    report = report_of(Predictions(task, logits, targets, list("abcd"), [0.2]))
    assert task.problem_type == MULTI and report["accuracy"] == report["positive_f1"] == 1
    assert report["specificity_at_95_sensitivity"] == 1 and "challenge_score" not in report


# A user's own records: files, a table of them, a checkpoint


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of records with a table of labels; every third record's age and sex are not known, one has a lead less."""
    folder = tmp_path_factory.mktemp("own")
    lines = ["path,label,patient,age,sex"]
    for index in range(NUM_RECORDS):
        rhythm = list(RHYTHMS)[index % 3]
        record = simulate_record(
            seed=index, rhythm=rhythm, duration_seconds=6, sampling_rate=100, heart_rate=60 + index
        )
        if index == 4:
            record.signal, record.lead_names = record.signal[:-5], list(record.lead_names)[:-5]  # no V2 to V6
        write_record(record, folder, f"r{index}")
        known = f"{30 + 2 * index},{'MF'[index % 2]}" if index % 3 else ","
        lines.append(f"r{index}.hea,{RHYTHMS[rhythm]},p{index // 2},{known}")
    (folder / "own.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    _save(tiny_model(thresholds=[0.6, 0.5, 0.4, 0.5]), folder)
    return folder


def _save(model, folder):
    model.save_pretrained(folder)
    AnyECGFeatureExtractor(patch_size=model.config.patch_size).save_pretrained(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def evaluate(own, checkpoint, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("ANYECG_CACHE", str(cache))

    def run(*options, checkpoint=checkpoint, data=own / "own.csv"):
        argv = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(tmp_path / "out.json")]
        training.evaluate.main([*argv, "--folds", "all", *options])
        return json.loads((tmp_path / "out.json").read_text())

    return run


def _scores(checkpoint, records):
    """Return the scores of the pipeline, `(records, labels)`."""
    classify = pipeline("ecg-classification", model=str(checkpoint))
    by_label = [{each["label"]: each["score"] for each in found} for found in classify(records)]
    return np.array([[scores[name] for name in LABELS.values()] for scores in by_label])


def _paths(own):
    return [str(own / f"r{index}") for index in range(NUM_RECORDS)]


def test_figures_of_a_table_are_those_of_the_pipelines_scores(evaluate, own, checkpoint):
    report = evaluate("--bootstrap", "5")
    scores = _scores(checkpoint, _paths(own))
    assert report["num_records"] == NUM_RECORDS and report["num_patients"] == NUM_RECORDS // 2
    truth = np.array(
        [[name in RHYTHMS[list(RHYTHMS)[i % 3]].split(";") for name in LABELS.values()] for i in range(24)]
    )
    for column, name in enumerate(("NORM", "AFIB", "PVC")):
        label = report["labels"][name]
        expected = roc_auc_score(truth[:, column], scores[:, column])
        assert label["auroc"] == pytest.approx(expected, abs=0.03)  # stored records are rounded: neighbours may change
        assert label["positives"] == truth[:, column].sum() and label["prevalence"] == pytest.approx(
            label["positives"] / 24
        )
        given = scores[:, column] >= label["threshold"]
        assert label["sensitivity"] == pytest.approx(given[truth[:, column]].mean(), abs=0.07)
    assert [label["threshold"] for label in report["labels"].values()] == [0.6, 0.5, 0.4, 0.5]
    assert report["labels"]["LVH"]["auroc"] is None and report["labels"]["LVH"]["auroc_interval_95"] is None


def test_a_reduced_set_of_leads_is_what_the_pipeline_sees_of_a_record_with_these_leads(
    own, checkpoint, cache, monkeypatch
):
    monkeypatch.setenv("ANYECG_CACHE", str(cache))
    from anyecg_hf import read_record
    from training.collate import ECGCollator
    from training.data import load_folds, with_task

    args = DataArguments(data=[str(own / "own.csv")])
    collator = ECGCollator(AnyECGFeatureExtractor.from_pretrained(checkpoint))
    task = build_task("codes", [list(LABELS.values())], min_positives=1).reordered(tuple(LABELS.values()))
    records = with_task(load_folds(list_sources(args), collator.extractor, range(1, 11), args=args), task)
    having, reduced = training.evaluate.restrict_leads(records, collator, ("I", "II", "V2"))
    assert len(having) == NUM_RECORDS - 1 and 4 not in having
    predictions = training.evaluate.predict(tiny_model(), records.take(having), reduced, task)
    whole = [read_record(path) for path in _paths(own)]
    few = [
        {"signal": each.signal[[0, 1, 7]], "lead_names": ["I", "II", "V2"], "sampling_rate": 100, "units": "mV"}
        for each in (whole[index] for index in having)
    ]
    np.testing.assert_allclose(predictions.probabilities, _scores(checkpoint, few), atol=0.01)


def test_groups_are_in_the_report_those_of_unknown_sex_and_age_among_them_and_a_page_is_written(evaluate, tmp_path):
    page = tmp_path / "page.html"
    by = evaluate("--by", "sex", "age", "leads", "--bootstrap", "3", "--report", str(page))["by"]
    assert "<td>unknown</td><td>8</td>" in page.read_text() and str(tmp_path) not in page.read_text()
    counts = {kind: {name: group["num_records"] for name, group in by[kind]["groups"].items()} for kind in by}
    assert counts["sex"] == {"female": 8, "male": 8, "unknown": 8}
    assert counts["age"] == {"18 to 39": 3, "40 to 64": 9, "65 to 79": 4, "unknown": 8}
    assert counts["leads"] == {"12": 23, "6 (limb leads)": 24, "3 (I, II, V2)": 23, "2 (I, II)": 24, "1 (I)": 24}
    assert len(by["sex"]["groups"]["male"]["intervals_95"]["macro_auroc"]) == 2


def test_another_order_of_labels_gives_the_same_figures(evaluate, checkpoint, tmp_path):
    model, order = tiny_model(thresholds=[0.5, 0.4, 0.5, 0.6]), [3, 2, 1, 0]
    model.config.thresholds = [[0.6, 0.5, 0.4, 0.5][place] for place in order]
    model.config.id2label = {new: LABELS[old] for new, old in enumerate(order)}
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    with torch.no_grad():
        for parameter in (model.classifier.weight, model.classifier.bias):
            parameter.copy_(parameter[order].clone())
    _save(model, tmp_path / "other")
    labels, other = evaluate()["labels"], evaluate(checkpoint=tmp_path / "other")["labels"]
    assert list(other) == list(labels)[::-1]
    for name in ("NORM", "AFIB", "PVC"):
        assert other[name]["auroc"] == pytest.approx(labels[name]["auroc"])
        assert other[name]["confusion"] == labels[name]["confusion"]


def test_labels_that_the_checkpoint_does_not_know_are_stated_and_none_known_is_an_error(evaluate, own, caplog):
    text = (own / "own.csv").read_text()
    (own / "some.csv").write_text(text.replace("NORM;PVC", "NORM;VENTRICULAR"))
    report = evaluate(data=own / "some.csv")
    assert report["codes_without_label"] == {"VENTRICULAR": 8} and report["labels"]["PVC"]["positives"] == 0
    assert "no label of the checkpoint stands for VENTRICULAR (8 records)" in caplog.text
    (own / "none.csv").write_text(text.replace("NORM", "X").replace("AFIB", "Y").replace("PVC", "Z"))
    with pytest.raises(ValueError, match=r"None of 24 records has a label of this checkpoint. It knows NORM, AFIB"):
        evaluate(data=own / "none.csv")


def test_records_without_any_label_are_counted(evaluate, own):
    (own / "gaps.csv").write_text((own / "own.csv").read_text().replace("AFIB", ""))
    assert evaluate(data=own / "gaps.csv")["num_records_without_codes"] == 8


def test_a_folder_of_records_gives_what_its_table_gives(evaluate, own, tmp_path):
    for index in range(NUM_RECORDS):
        for suffix in ("hea", "dat"):
            (tmp_path / f"r{index}.{suffix}").write_bytes((own / f"r{index}.{suffix}").read_bytes())
        codes = RHYTHMS[list(RHYTHMS)[index % 3]].replace(";", ",")
        with open(tmp_path / f"r{index}.hea", "a") as file:
            file.write(f"# Dx: {codes}\n")
    from_folder, from_table = evaluate(data=tmp_path), evaluate()
    assert from_folder["macro_auroc"] == pytest.approx(from_table["macro_auroc"])


def test_what_fine_tuning_took_evaluation_takes_and_repeats_its_figures(evaluate, own, cache, tmp_path):
    options = {
        "output_dir": tmp_path / "run",
        "cache_dir": cache,
        "data": own / "own.csv",
        "task": "codes",
        "preset": "tiny",
    }
    options |= {"min_positives": 2, "max_steps": 1, "per_device_train_batch_size": 4, "save_steps": 1, "eval_steps": 1}
    options |= {
        "num_proc": 1,
        "logging_steps": 1,
        "warmup_steps": 0,
        "weight_average_decay": 0,
        "lead_subset_probability": 0.5,
    }
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    network = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "stem_channels": [8, 8, 8, 8]}
    training.finetune.main([str(SMOKE), *argv, "--config", json.dumps(network)])
    trained = json.loads((tmp_path / "run" / "results.json").read_text())["evaluation"]
    report = evaluate("--folds", "9", checkpoint=tmp_path / "run")
    assert list(report["labels"]) == ["AFIB", "NORM", "PVC"] and report["codes_without_label"] == {}
    for name in ("macro_auroc", "brier", "ece", "positive_f1"):
        assert report[name] == pytest.approx(np.nan if trained[name] is None else trained[name], abs=1e-6, nan_ok=True)


def test_leads_alone_are_evaluated_and_named_in_the_report(evaluate):
    report = evaluate("--leads", "ii", "I", "V2")
    assert report["leads"] == ["II", "I", "V2"] and report["num_records"] == 23
    assert "--leads II I V2" in report["command"]


@pytest.mark.parametrize(
    "options",
    [
        ["--leads", "I", "--by", "leads"],
        ["--probe", "trained", "--by", "sex"],
        ["--same_records_as", "x", "--leads", "I"],
    ],
)
def test_options_that_exclude_each_other_are_refused(evaluate, options, capsys):
    with pytest.raises(SystemExit):
        evaluate(*options)
    assert "--leads" in capsys.readouterr().err


@pytest.mark.parametrize("folds", [["0"], ["nine"], ["all", "9"]])
def test_folds_that_there_are_not_are_refused(folds):
    with pytest.raises(ValueError, match="accepted are 1 to 8"):
        training.evaluate.read_folds(folds)


def test_no_path_of_the_machine_is_in_the_report(evaluate, own, checkpoint):
    assert str(own) not in json.dumps(evaluate()) and str(checkpoint) not in json.dumps(evaluate())
