"""training/predictions.py: rows that say what the pipeline says, whatever becomes of the records beside them."""

import json
import os

import pyarrow.parquet as pq
import pytest
from planted_files import BUILDERS
from tiny_checkpoints import COMMIT, put_into_hub_cache, tiny_model, write_record

import training.predictions
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg import AnyECGModel
from anyecg_hf.simulate import simulate_record
from training.archive import list_archive
from training.predictions import METADATA, Checkpoint, PredictionPlan, find_checkpoint, load_classifier, predict_records

AGE = {"id2label": {0: "age"}, "label2id": {"age": 0}, "problem_type": "regression"}


def save(folder, **overrides):
    """Write a tiny classifier and return it as a checkpoint."""
    tiny_model(**overrides).save_pretrained(folder)
    AnyECGFeatureExtractor().save_pretrained(folder)
    return find_checkpoint(str(folder))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("checkpoint"), thresholds=[0.55, 0.2, 0.8, 0.3])


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Records of four formats, one of 35 s, one without a lead; a corrupt file, one of another kind, a broken link."""
    folder = tmp_path_factory.mktemp("archive")
    (folder / "sub").mkdir()
    for number, seconds in enumerate((10, 35, 4)):
        record = simulate_record(seed=number, duration_seconds=seconds)
        if number == 2:
            record.signal[3] = 0
        write_record(record, folder / "sub", f"r{number}")
    for file_format in ("EDF", "HL7 aECG", "SCP-ECG"):
        BUILDERS[file_format](folder).put_into(folder)
    write_record(simulate_record(seed=9), folder, "cut")
    (folder / "cut.dat").write_bytes(b"abc")
    (folder / "letter.txt").write_text("Dear colleague, the ECG is attached.\n")
    (folder / "link.edf").symlink_to("nowhere")
    return folder


@pytest.fixture(scope="module")
def rows(checkpoint, archive):
    return list(predict_records(load_classifier(checkpoint), list_archive(archive)[0], batch_size=4))


def test_scores_findings_and_quality_are_those_of_the_pipeline(checkpoint, archive, rows):
    classifier = load_classifier(checkpoint)
    read = [row for row in rows if row["error"] is None]
    assert [row["num_windows"] for row in read].count(1) == 5 and len(read) == 6
    for row in read:
        result = classifier(str(archive / row["path"]), return_quality=True)
        for finding in result["findings"]:
            assert row[finding["label"]] == pytest.approx(finding["score"], abs=1e-6)
        assert row["findings"] == [finding["label"] for finding in result["findings"] if finding["positive"]]
        del result["quality"]["absent_leads"]
        assert {name: row[name] for name in result["quality"]} == result["quality"]
    assert len({tuple(row["findings"]) for row in read}) > 1


def test_a_bad_file_costs_its_row_which_says_why(archive, rows):
    assert [row["path"] for row in rows] == [record.path for record in list_archive(archive)[0]]
    said = {row["path"]: row["error"] for row in rows if row["error"]}
    assert said.keys() == {"cut.hea", "letter.txt", "link.edf"}
    assert said["cut.hea"].startswith("cut.hea, data file cut.dat: no sample of each signal in 3 bytes")
    assert said["letter.txt"].startswith("letter.txt: ") and said["link.edf"].startswith("link.edf: no such file")


def test_formats_rates_and_what_was_masked_are_in_the_row(rows):
    by_path = {row["path"]: row for row in rows}
    assert by_path["sub/r0.hea"]["file_format"] == "WFDB" and by_path["sub/r0.hea"]["sampling_rate"] == 500
    assert by_path["a.edf"]["file_format"] == "EDF" and by_path["a.edf"]["lead_names"] == ["I", "II"]
    assert by_path["sub/r2.hea"]["masked"][0]["lead"] == "aVR" and not by_path["sub/r2.hea"]["is_acceptable"]


def test_rows_do_not_depend_on_who_reads_the_files(checkpoint, archive, rows):
    records = list_archive(archive)[0]
    assert list(predict_records(load_classifier(checkpoint), records, batch_size=4, num_workers=2)) == rows


def test_one_of_several_labels_is_found_and_a_value_is_no_finding(archive, tmp_path):
    records = list_archive(archive / "sub")[0][:1]
    (row,) = predict_records(
        load_classifier(save(tmp_path / "one", problem_type="single_label_classification")), records
    )
    scores = {label: row[label] for label in ("NORM", "AFIB", "PVC", "LVH")}
    assert row["findings"] == [max(scores, key=scores.get)] and sum(scores.values()) == pytest.approx(1)
    classifier = load_classifier(save(tmp_path / "age", **AGE))
    (row,) = predict_records(classifier, records)
    assert row["findings"] is None and row["age"] == pytest.approx(classifier(str(archive / "sub/r0"))[0]["score"])


def plan(checkpoint, archive, out, **run):
    records = tuple((0, record) for record in list_archive(archive)[0])
    run = {"batch_size": 4, "checkpoint": checkpoint.identity, "software": {"torch": "1"}} | run
    return PredictionPlan("predictions-00000-of-00001", records, str(out), run, checkpoint)


def test_a_shard_tells_its_columns_and_who_made_it(checkpoint, archive, rows, tmp_path):
    report = plan(checkpoint, archive, tmp_path).write()
    table = pq.read_table(tmp_path / "predictions")
    assert table.column_names[:4] == ["source", "path", "record_id", "error"]
    assert table.column_names[-4:] == ["NORM", "AFIB", "PVC", "LVH"] and str(table.schema.field("PVC").type) == "float"
    assert table["record_id"].to_pylist() == [row["record_id"] for row in rows]
    told = json.loads(table.schema.metadata[METADATA])
    assert told["checkpoint"] == {
        "name": os.path.basename(checkpoint.name),
        "revision": None,
        "sha256": checkpoint.sha256,
    }
    assert told["thresholds"] == [0.55, 0.2, 0.8, 0.3] and told["software"] == {"torch": "1"}
    assert report["records_out"] == 9 and [error["path"] for error in report["errors"]][0] == "cut.hea"


def test_an_archive_that_is_gone_is_not_taken_for_bad_files(checkpoint, tmp_path):
    write_record(simulate_record(seed=0), tmp_path, "r")
    away = plan(checkpoint, tmp_path, tmp_path / "out")
    (tmp_path / "r.hea").unlink()
    away.write()
    os.rename(tmp_path, gone := tmp_path.with_name("gone"))
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        away.write()
    assert [path.name for path in (gone / "out" / "predictions").iterdir()] == ["predictions-00000-of-00001.parquet"]


def test_a_label_that_is_named_as_a_column_is_refused(tmp_path):
    labels = {0: "error", 1: "NORM"}
    with pytest.raises(ValueError, match="labels error are there twice or are names of columns"):
        load_classifier(save(tmp_path, id2label=labels, label2id={name: i for i, name in labels.items()}))


def test_a_checkpoint_of_another_model_than_at_the_start_is_refused(checkpoint):
    with pytest.raises(ValueError, match="another model lies there"):
        load_classifier(Checkpoint(checkpoint.name, None, "0" * 64))


def test_a_folder_has_no_revision(checkpoint):
    with pytest.raises(ValueError, match="--revision v2: --checkpoint .* is a folder"):
        find_checkpoint(checkpoint.name, "v2")


def test_a_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="new_head=True"):
        load_classifier(save(tmp_path, model_class=AnyECGModel))


def test_a_repository_of_the_hub_is_kept_at_its_commit(checkpoint, tmp_path, monkeypatch):
    put_into_hub_cache(checkpoint.name, tmp_path, "someone/classifier")
    fetch = training.predictions.snapshot_download
    monkeypatch.setattr(
        training.predictions,
        "snapshot_download",
        lambda *args, **options: fetch(*args, **options, cache_dir=tmp_path, local_files_only=True),
    )
    found = find_checkpoint("someone/classifier", "main")
    assert found == Checkpoint("someone/classifier", COMMIT, checkpoint.sha256)
    assert load_classifier(found).model.config.thresholds == [0.55, 0.2, 0.8, 0.3]
    with pytest.raises(ValueError, match=r"--checkpoint someone/other: no such folder.*ORG/NAME"):
        find_checkpoint("someone/other")
