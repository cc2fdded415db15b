"""benchmarks/long_records.py: the page that it writes, and what it measures."""

import json

import pytest
from tiny_checkpoints import tiny_model

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg_long import AnyECGForLongRecords
from benchmarks.long_records import main, markdown, measure_here, tiled_record


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    labels = {"id2label": {0: "AF", 1: "V"}, "label2id": {"AF": 0, "V": 1}}
    tiny_model(AnyECGForLongRecords, **labels).save_pretrained(folder)
    AnyECGFeatureExtractor(hop_seconds=10.0).save_pretrained(folder)
    row = {"minutes": 30.1, "af_burden": 0.25, "af_burden_told": 0.2, "v_burden": 0.01, "v_burden_told": None}
    arm = {"af_auroc": 0.9, "intervals_95": {"af_auroc": [0.8, 0.95]}, "v_auroc": None, "records": {"r1": row}}
    names = (
        "long_records",
        "hours",
        "patients",
        "windows",
        "windows_af",
        "windows_v",
        "short_records",
        "short_af",
        "short_v",
    )
    results = {"material": dict.fromkeys(names, 7), "calibration": {}, "arms": {"record head": arm, "rule": arm}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_the_tiled_record_has_the_length_asked_for():
    assert tiled_record(0.2).duration_seconds == pytest.approx(720)


@pytest.mark.parametrize("way", ["windows", "one_pass"])
def test_time_and_memory_are_measured(run, way):
    found = measure_here(str(run), way, 0.02)
    assert found["seconds"] > 0 and found["process_megabytes"] > found["megabytes"] >= 0


def test_the_page_shows_every_arm_and_says_what_is_not_told(run, tmp_path):
    main(["--run", str(run), "--hours", "--one_pass_hours", "--out", str(tmp_path)])
    page = (tmp_path / "long_records.md").read_text()
    assert "| record head | 0.900 (0.80 to 0.95) | – |" in page and "| rule | – |" in page
    assert "| r1 | 30.1 | 25.0 % | 20.0 % | 1.0 % | – |" in page
    report = json.loads((tmp_path / "long_records.json").read_text())
    assert report["cost"] == [] and str(tmp_path) not in page + json.dumps(report)


def test_costs_measured_before_can_be_kept(run, tmp_path):
    rows = [{"way": "windows", "hours": 24.0, "seconds": 91.0, "megabytes": 1234.0}]
    (tmp_path / "long_records.json").write_text(json.dumps({"cost": rows}))
    main(["--run", str(run), "--keep_cost", "--out", str(tmp_path)])
    assert "| windows | 24 | 91.0 | 1234 |" in (tmp_path / "long_records.md").read_text()


def test_a_length_that_could_not_be_measured_says_why(run):
    report = json.loads((run / "results.json").read_text())
    report |= {"machine": "m", "cost": [{"way": "one_pass", "hours": 24.0, "ended": "exit code -9: []"}]}
    assert "| one_pass | 24 | exit code -9" in markdown(report)
