"""examples/own_table.py: from a table of files and labels to a model for the pipeline, on files made at run time."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import tiny_model, write_record
from transformers import AutoModelForSequenceClassification, pipeline

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg import AnyECGModel
from anyecg_hf.simulate import simulate_record
from training.splits import TRAIN_FOLDS, folds_of

LABELS = {"one": ("normal", "fast"), "several": ("", "fast;old"), "value": ("30", "70")}


@pytest.fixture
def own_table(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples"))
    monkeypatch.delitem(sys.modules, "own_table", raising=False)
    import own_table

    return own_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny backbone, twelve short recordings of six patients, slow or fast, and a table for each kind of label."""
    folder = tmp_path_factory.mktemp("own")
    tiny_model(AnyECGModel).save_pretrained(folder / "backbone")
    AnyECGFeatureExtractor().save_pretrained(folder / "backbone")
    (folder / "files").mkdir()
    for number in range(12):
        record = simulate_record(number, heart_rate=(60, 130)[number % 2], duration_seconds=3, lead_names=["I", "II"])
        write_record(record, folder / "files", f"r{number}")
    for kind, labels in LABELS.items():
        with open(folder / f"{kind}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "patient"])
            writer.writerows([f"files/r{number}.hea", labels[number % 2], f"p{number // 2}"] for number in range(12))
    return folder


@pytest.mark.parametrize("kind", LABELS)
def test_a_table_becomes_a_model_that_the_pipeline_takes(own_table, folder, tmp_path, capsys, kind):
    options = ["--kind", kind, "--output", str(tmp_path), "--checkpoint", str(folder / "backbone"), "--epochs", "2"]
    own_table.main([str(folder / f"{kind}.csv"), *options])
    num_held_out = len(own_table.read_table(folder / "one.csv")[1])
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith(f"held out: {num_held_out} records, ")
    findings = pipeline("ecg-classification", model=str(tmp_path))(str(folder / "files" / "r0"))
    expected = {"one": {"fast", "normal"}, "several": {"fast", "old"}, "value": {"value"}}[kind]
    assert {finding["label"] for finding in findings} == expected
    if kind == "value":  # in its own unit, although it was trained on a standardised one
        assert 30 < findings[0]["score"] < 70 and findings[0]["positive"] is None
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path).classifier.bias.item() > 20


def test_no_patient_is_trained_on_and_held_out(own_table, folder):
    train, held_out = own_table.read_table(folder / "one.csv")
    patients = [{row["patient"] for row in part} for part in (train, held_out)]
    assert not patients[0] & patients[1] and len(train) + len(held_out) == 12
    folds = folds_of(sorted(patients[0] | patients[1]))
    assert patients[0] == {patient for patient, fold in folds.items() if fold in TRAIN_FOLDS}
    assert all(row["path"].is_file() for row in train)


def test_what_it_tells_is_how_near_the_answers_are(own_table):
    answers = {"a": [("x", 0.9, True), ("y", 0.1, False)], "b": [("x", 0.8, True), ("y", 0.7, True)]}

    def classify(paths):
        return [[dict(zip(("label", "score", "positive"), each)) for each in answers[path]] for path in paths]

    rows = [{"path": "a", "label": "x"}, {"path": "b", "label": "x"}]
    assert own_table.tell(classify, rows, "several").endswith("all labels right for 50%")
    values = [{"path": "a", "label": "1.9"}, {"path": "b", "label": "0.8"}]
    assert own_table.tell(classify, values, "value").endswith("values missed by 0.5 on average")
    assert np.allclose(own_table.target_of({"label": "x;z"}, ["x", "y", "z"], "several"), [1, 0, 1])


def test_labels_of_a_table_are_taken_apart_only_where_there_may_be_several(own_table):
    rows = [{"label": "b;a"}, {"label": "a"}, {"label": ""}]
    assert own_table.names_of(rows, "several") == ["a", "b"] and own_table.names_of(rows, "value") == ["value"]
    assert own_table.names_of(rows[:2], "one") == ["a", "b;a"]


def test_a_table_without_labels_is_told_what_it_needs(own_table, tmp_path):
    (tmp_path / "table.csv").write_text("path,diagnosis\nr0.hea,x\n")
    with pytest.raises(SystemExit, match="columns .*diagnosis.*; needed are path and label"):
        own_table.main([str(tmp_path / "table.csv")])
