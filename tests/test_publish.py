"""training/publish.py: what a card says of the run and the evaluation that it is made from."""

import copy
import json
import re
import shutil
from types import SimpleNamespace

import jinja2
import numpy as np
import pytest
import yaml
from conftest import ROOT

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling
from anyecg_hf.reference_pair import REFERENCE
from training.checkpointing import without_nan
from training.classifier_report import Predictions, compare_groups, group_records, report_of
from training.labels import build_task
from training.publish import describe_run, refresh, render_card


def test_the_records_seen_are_those_of_all_processes(tmp_path):
    arguments = {
        "seed": 3,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "num_processes": 2,
    }
    (tmp_path / "run_arguments.json").write_text(json.dumps(arguments))
    (tmp_path / "run_finished.json").write_text(json.dumps({"steps": 10, "files": {}}))
    assert describe_run(tmp_path) == {"seed": 3, "steps": 10, "batch_size": 64, "records_seen": 640}


def test_a_run_that_is_not_finished_gets_no_card(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        describe_run(tmp_path)


def test_the_card_of_lead_generation_shows_each_case_and_method(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = ("psnr_range_db", "ssim_61", "mae_mv", "rmse_mv", "gain_db")
    head = dict.fromkeys(names, 21.5) | {"intervals_95": {"psnr_range_db": [20.5, 22.5]}}
    squares = {name: value for name, value in head.items() if name != "gain_db"}
    cases = {"G2": {"head": {"precordial": head}}, "G7": {"algebra": {"all": squares}}}
    card = render_card(
        yaml.safe_load((ROOT / "hub_cards" / "anyecg-small-reconstruction.yaml").read_text()),
        model=SimpleNamespace(num_parameters=lambda: 7, config=SimpleNamespace()),
        extractor=AnyECGFeatureExtractor(),
        run={"seed": 0, "records_seen": 1, "steps": 1, "batch_size": 1},
        results={"reconstruction_fold9": {"what": "All about it.", "cases": cases}},
    )
    assert (
        "| G2 | head | 21.50 (20.50 to 22.50) | 21.50 |" in card
        and "| G7 | algebra | 21.50 (20.50 to 22.50) |  |" in card
    )
    assert "plot_record" in card and "All about it." in card


def test_code_that_gives_other_numbers_does_not_refresh_a_checkpoint(tmp_path, monkeypatch):
    """After a change that is meant, delete reference.safetensors: then there is a new one."""
    monkeypatch.chdir(ROOT)
    folder = shutil.copytree(ROOT / "checkpoints" / "anyecg-small", tmp_path / "anyecg-small")
    pair = (folder / REFERENCE).read_bytes()
    refresh(folder)
    assert (folder / REFERENCE).read_bytes() == pair
    monkeypatch.setattr(AnyECGForMaskedCodeModeling, "forward", _doubled(AnyECGForMaskedCodeModeling.forward))
    with pytest.raises(ValueError, match="model.logits differs"):
        refresh(folder)
    assert (folder / REFERENCE).read_bytes() == pair
    (folder / REFERENCE).unlink()
    refresh(folder)
    assert (folder / REFERENCE).read_bytes() != pair


def _doubled(forward):
    def doubled(self, input_values, **inputs):
        return forward(self, 2 * input_values, **inputs)

    return doubled


# The card of a classifier

TASK = build_task("statements")
THRESHOLDS = [0.3] * len(TASK.names)


@pytest.fixture(scope="module")
def evaluation():
    """An evaluation of made-up outputs for 300 records, as training.evaluate writes it."""
    generator = np.random.default_rng(0)
    targets = (generator.random((300, len(TASK.names))) < 0.15).astype(np.float32)
    targets[:, 1] = np.arange(300) < 4
    logits = 2 * targets - 2 + generator.normal(size=targets.shape)
    predictions = Predictions(TASK, logits, targets, [str(index) for index in range(300)], THRESHOLDS)
    ages, sexes = [70.0] * 150 + [50.0] * 145 + [None] * 5, ["male", "female"] * 150
    by = {
        name: compare_groups(
            {group: predictions.take(rows) for group, rows in group_records(ages, sexes, name).items()}, num_resamples=3
        )
        for name in ("sex", "age")
    }
    by["leads"] = compare_groups({"12": predictions, "1 (I)": predictions}, num_resamples=3)
    head = {"command": "python -m training.evaluate ...", "num_resamples": 3}
    return without_nan(head | report_of(predictions, num_resamples=3) | {"by": by})


def _classifier_card(monkeypatch, evaluation, *, thresholds=THRESHOLDS, facts=None):
    monkeypatch.chdir(ROOT)
    given = yaml.safe_load((ROOT / "hub_cards" / "anyecg-small-statements.yaml").read_text())
    config = SimpleNamespace(
        id2label=TASK.id2label, num_labels=len(TASK.names), thresholds=thresholds, problem_type=TASK.problem_type
    )
    return render_card(
        given | {"arms": [], "rates": None} | (facts or {}),
        model=SimpleNamespace(num_parameters=lambda: 7, config=config),
        extractor=AnyECGFeatureExtractor(),
        run={"seed": 0, "records_seen": 1, "steps": 1, "batch_size": 1},
        results={"statements_fold9": evaluation},
    )


def test_the_card_of_a_classifier_has_a_row_for_each_label_and_group(monkeypatch, evaluation):
    card = _classifier_card(monkeypatch, evaluation)
    name, rare = TASK.names[:2]
    label, (low, high) = evaluation["labels"][name], evaluation["labels"][name]["auroc_interval_95"]
    row = (
        f"| {name} | {label['positives']} | {100 * label['prevalence']:.1f} % | {label['auroc']:.3f} ({low:.3f} to {high:.3f}) | "
        f"{label['auprc']:.3f} | 0.300 | {label['sensitivity']:.3f} | {label['specificity']:.3f} | {label['ppv']:.3f} |"
    )
    assert row in card.splitlines()
    assert f"| {rare} | 4 | 1.3 % | {evaluation['labels'][rare]['auroc']:.3f} (–) |" in card
    for name in ("female", "male", "65 to 79", "1 (I)"):
        assert f"\n| {name} | " in card
    assert "\n| unknown | 5 | – (–) |" in card
    for text in ("Not a medical device", "## Intended use", "## What the weights have seen", "| data | PTB-XL"):
        assert text in card


@pytest.mark.parametrize("path", [("by",), ("labels", "NDT", "auroc_interval_95"), ("by", "age"), ("intervals_95",)])
def test_an_evaluation_that_lacks_a_figure_gives_no_card(monkeypatch, evaluation, path):
    partial = copy.deepcopy(evaluation)
    place = partial
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(jinja2.UndefinedError):
        _classifier_card(monkeypatch, partial)


def test_a_fact_that_is_empty_is_an_error(monkeypatch, evaluation):
    for name in ("intended_use", "seen", "licence_of_data", "groups"):
        with pytest.raises(ValueError, match=f"no {name}"):
            _classifier_card(monkeypatch, evaluation, facts={name: ""})


def test_an_index_of_results_that_names_no_figure_gives_no_card(monkeypatch, evaluation):
    row = {"task": "ecg-classification", "type": "f1", "name": "F1"}
    for figure in ("statements_fold9.macro_f2", "other.macro_f1", "statements_fold9", "statements_fold9.command"):
        with pytest.raises(ValueError, match=f"names {re.escape(figure)}, where no number is"):
            _classifier_card(monkeypatch, evaluation, facts={"index": [row | {"figure": figure}]})


def test_an_evaluation_of_other_thresholds_gives_no_card(monkeypatch, evaluation):
    with pytest.raises(ValueError, match=r"statements_fold9.json is of other labels or thresholds"):
        _classifier_card(monkeypatch, evaluation, thresholds=[0.2, *THRESHOLDS[1:]])


def test_the_card_of_long_records_shows_every_way_and_what_it_costs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = ("af_auroc", "af_f1", "af_burden_error", "v_auroc", "v_f1", "v_burden_error")
    head = dict.fromkeys(names, 0.75) | {"intervals_95": dict.fromkeys(names, [0.7, 0.8])}
    rule = head | dict.fromkeys(names[3:])
    facts = yaml.safe_load((ROOT / "hub_cards" / "anyecg-small-long.yaml").read_text())
    material = ("long_records", "hours", "patients", "windows", "windows_af", "windows_v")
    card = render_card(
        facts,
        model=SimpleNamespace(num_parameters=lambda: 7, config=SimpleNamespace(thresholds=[0.3, 0.4])),
        extractor=AnyECGFeatureExtractor(),
        run={"seed": 0, "records_seen": 1, "steps": 1, "batch_size": 1},
        results={
            "long_records": {
                "arms": {"record head": head, "a rule": rule},
                "material": dict.fromkeys(material, 9),
                "calibration": {"record_thresholds": [0.5, 0.6]},
                "cost": [
                    {"way": "windows", "hours": 24.0, "seconds": 90.0, "megabytes": 1234.0},
                    {"way": "one_pass", "hours": 24.0, "ended": "exit code -9"},
                ],
            }
        },
    )
    assert "| a rule | 0.750 (0.70 to 0.80) | 0.750 (0.70 to 0.80) | 0.750 (0.70 to 0.80) | – | – | – |" in card
    assert "24.0 h in windows 90 s and 1234 MB." in card and "All figures are out of fold" in card
    for text in ("PTB-XL 1.0.3, folds 1-8", "--data DIR", "Seed 0", "ODC-By", "CC BY 4.0", "from 0.300 (AF)"):
        assert text in " ".join(card.split()), text
