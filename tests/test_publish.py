"""training/publish.py: what a card says of the run that it is made from."""

import json
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from training.publish import describe_run, render_card


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
