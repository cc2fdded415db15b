"""The checkpoints that ship: complete, small, up to date with the code, and their cards true to the results beside them."""

import json
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import anyecg_hf
from anyecg_hf.hub import check_checkpoint
from training.publish import MAX_MEGABYTES, RUN, card_of, load_model

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = sorted(path.parent for path in (ROOT / "checkpoints").glob("*/config.json"))
each_checkpoint = pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)


def test_tokenizer_backbone_and_classifier_ship():
    assert [folder.name for folder in CHECKPOINTS] == ["anyecg-small", "anyecg-small-rhythm", "anyecg-small-statements"]


@each_checkpoint
def test_a_checkpoint_is_complete_and_at_most_30_mb(folder):
    check_checkpoint(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MAX_MEGABYTES * 1e6


@each_checkpoint
def test_a_checkpoint_loads_without_missing_or_surplus_weights(folder):
    model, extractor = load_model(folder)
    assert extractor.sampling_rate == model.config.sampling_rate == 300


@each_checkpoint
def test_a_checkpoint_gives_what_it_gave_when_it_was_exported(folder):
    assert max(anyecg_hf.verify(folder).values()) <= 1e-5


@each_checkpoint
def test_the_code_in_a_checkpoint_is_that_of_the_package(folder):
    """After a change of `anyecg_hf`: python -m training.publish --refresh checkpoints/*"""
    package = Path(anyecg_hf.__file__).parent
    for path in folder.glob("*.py"):
        assert path.read_text() == (package / path.name).read_text(), path.name


@each_checkpoint
def test_a_card_has_licence_data_command_seed_and_the_warning(folder):
    card = (folder / "README.md").read_text()
    for text in ("PTB-XL 1.0.3, folds 1-8", "--data DIR", "Seed 0", "Not a medical device", "## Limits", "CC BY 4.0"):
        assert text in card, text
    for text in ("## Intended use", "## What the weights have seen", "| code | ", "| weights | ", "| data | "):
        assert text in card, text


@each_checkpoint
def test_the_hub_reads_licence_task_data_and_results_from_a_card(folder):
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.library_name, data.datasets) == ("apache-2.0", "transformers", ["ptb-xl"])
    assert data.pipeline_tag in ("feature-extraction", "other") and "ecg" in data.tags
    assert data.model_name == folder.name
    index = yaml.safe_load((ROOT / "hub_cards" / f"{folder.name}.yaml").read_text())["index"]
    for result, row in zip(data.eval_results, index, strict=True):
        name, *keys = row["figure"].split(".")
        measured = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert result.metric_value == pytest.approx(reduce(getitem, keys, measured), abs=5e-5)
        assert result.dataset_split == "fold 9 (validation)"


@each_checkpoint
def test_a_card_is_what_template_facts_and_results_give(folder, monkeypatch):
    """After a change of one of them: python -m training.publish --refresh checkpoints/*"""
    monkeypatch.chdir(ROOT)
    model, extractor = load_model(folder)
    facts, run = Path("hub_cards") / f"{folder.name}.yaml", json.loads((folder / RUN).read_text())
    assert (folder / "README.md").read_text() == card_of(facts, model=model, extractor=extractor, run=run)


def test_the_card_of_the_classifier_has_a_row_for_each_label_and_group():
    card = (ROOT / "checkpoints" / "anyecg-small-statements" / "README.md").read_text()
    facts = yaml.safe_load((ROOT / "hub_cards" / "anyecg-small-statements.yaml").read_text())
    figures = json.loads((ROOT / "benchmarks" / "results" / f"{facts['evaluation']}.json").read_text())
    for name, label in figures["labels"].items():
        (row,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
        assert f"| {label['positives']} | {100 * label['prevalence']:.1f} % | {label['auroc']:.3f} (" in row
        assert f"| {label['sensitivity']:.3f} | {label['specificity']:.3f} |" in row
    for grouping in ("sex", "age", "leads"):
        for name, group in figures["by"][grouping]["groups"].items():
            assert f"| {name} | {group['num_records']:,} |" in card


def test_the_classifier_names_71_statements_with_a_threshold_each():
    config = anyecg_hf.AnyECGConfig.from_pretrained(ROOT / "checkpoints" / "anyecg-small-statements")
    assert len(config.id2label) == len(config.thresholds) == 71
    assert {"NORM", "IMI", "AFIB", "PVC"} <= set(config.id2label.values())
    assert {label: index for index, label in config.id2label.items()} == config.label2id


@each_checkpoint
def test_every_result_that_a_card_quotes_is_in_the_repository(folder):
    facts = yaml.safe_load((ROOT / "hub_cards" / f"{folder.name}.yaml").read_text())
    for result in facts["results"]:
        assert json.loads((ROOT / "benchmarks" / "results" / f"{result}.json").read_text())
