"""benchmarks/results.py: the page of all models follows from the files of results, and from nothing else."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import results
from training.arguments import parse_recipe
from training.finetune import ARGUMENTS

ROWS = yaml.safe_load(results.ROWS.read_text())
CLASSIFIERS = {
    "comparisons": [],
    "reconstructions": [],
    "classifiers": [
        {"model": name, "file": f"{name}.json", "train": f"train {name}", "measure": f"measure {name}"}
        for name in ("low", "absent", "high")
    ],
}


def _write(folder, name, auroc, num_records=40, positives=7, **figures):
    labels = {"NORM": {"positives": positives, "auroc": auroc}}
    content = {"num_records": num_records, "macro_auroc": auroc, "labels": labels, **figures}
    (folder / f"{name}.json").write_text(json.dumps(content))


def _lines(page, beginning):
    return [line for line in page.splitlines() if line.startswith(beginning)]


def test_the_committed_page_is_what_the_command_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    results.main()
    assert (tmp_path / "results.md").read_text() == (results.HERE / "results.md").read_text()


def test_models_stand_best_first_and_those_without_a_file_last_as_not_run(tmp_path):
    _write(tmp_path, "low", 0.7)
    _write(tmp_path, "high", 0.91234, intervals_95={"macro_auroc": [0.9, 0.92]}, ece=0.00123)
    page = results.render(CLASSIFIERS, tmp_path)
    high, low, absent = [line for line in page.splitlines() if line.endswith(".json` |")]
    assert high.startswith("| high | 0.912 (0.900 to 0.920) |") and "| 0.0012 | 40 |" in high
    assert low.startswith("| low | 0.700 |") and absent.startswith("| absent | not run |")
    assert "absent:\n\n    train absent\n    measure absent" in page


@pytest.mark.parametrize("other", [{"num_records": 39}, {"positives": 8}])
def test_models_that_were_measured_on_other_records_are_refused(tmp_path, other):
    _write(tmp_path, "low", 0.7)
    _write(tmp_path, "high", 0.9, **other)
    with pytest.raises(ValueError, match="high.json and low.json differ in the"):
        results.render(CLASSIFIERS, tmp_path)


def test_results_of_fine_tuning_are_taken_as_those_of_evaluation(tmp_path):
    (tmp_path / "low.json").write_text(json.dumps({"steps": 5, "evaluation": {"macro_auroc": 0.8, "macro_f1": None}}))
    assert _lines(results.render(CLASSIFIERS, tmp_path), "| low | 0.800 |  |  |  |")


def test_arms_stand_with_each_seed_and_their_difference(tmp_path):
    arms = {
        "a": {"macro_auroc": {"mean": 0.8, "seeds": [0.7, 0.9]}},
        "b": {"macro_auroc": {"mean": 0.9, "seeds": [0.9]}},
    }
    difference = {"macro_auroc": {"difference": 0.1, "interval_95": [0.05, 0.15]}}
    content = {"arms": arms, "differences": {"b - a": difference}, "num_records": 5, "num_patients": 4}
    (tmp_path / "c.json").write_text(json.dumps(content))
    rows = {"classifiers": [], "reconstructions": [], "comparisons": [{"what": "C", "file": "c.json", "measure": "m"}]}
    page = results.render(rows, tmp_path)
    first, second = _lines(page, "| a |") + _lines(page, "| b |")
    assert first.endswith("| 0.800 | 0.700, 0.900 |  |") and second.endswith(
        "| 0.900 | 0.900 | 0.100 (0.050 to 0.150) |"
    )
    assert page.index("| b |") < page.index("| a |") and "5 records of 4 patients." in page


def test_methods_of_a_case_stand_best_first(tmp_path):
    methods = {"zeros": {"all": {"psnr_range_db": 18.0}}, "head": {"all": {"psnr_range_db": 30.0}}}
    (tmp_path / "r.json").write_text(json.dumps({"what": "W.", "cases": {"G1": methods}}))
    rows = {"classifiers": [], "comparisons": [], "reconstructions": [{"what": "R", "file": "r.json", "measure": "m"}]}
    assert "| G1 | head 30.00 > zeros 18.00 |" in results.render(rows, tmp_path)


def test_every_row_names_what_trains_and_measures_it_with_a_recipe_that_is_understood():
    for row in [row for section in ROWS.values() for row in section]:
        assert row["file"].removesuffix(".json") in row["measure"].split("--output ")[1]
        if "finetune" in row.get("train", "") or "baselines train" in row.get("train", ""):
            recipe, *options = [w for w in row["train"].split() if w.endswith(".yaml")] + row["train"].split(".yaml ")[
                1
            ].split()
            *_, args = parse_recipe([str(Path(results.HERE).parent / recipe), *options], ARGUMENTS)
            assert (
                f"--checkpoint {args.output_dir} " in row["measure"]
                or "checkpoints/anyecg-small-statements" in row["measure"]
            )
