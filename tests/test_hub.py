"""Checkpoints that are complete by themselves: what exports, plain saves and pushes leave in a folder."""

import json

import numpy as np
import pytest
import torch
from tiny_checkpoints import catch_pushes, tiny_model, tiny_quantizer
from transformers import AutoConfig, AutoModel, pipeline

from anyecg_hf.checkpoint_code import auto_map, extractor_class, pipelines_in_config
from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.feature_extraction_anyecg_rhythm import AnyECGRhythmFeatureExtractor
from anyecg_hf.hub import check_checkpoint, export_checkpoint
from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling, AnyECGModel
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction, AnyECGForSequenceClassification
from anyecg_hf.modeling_anyecg_long import AnyECGForLongRecords
from anyecg_hf.simulate import simulate_record

MODELS = [
    AnyECGModel,
    AnyECGForMaskedCodeModeling,
    AnyECGForSequenceClassification,
    AnyECGForLeadReconstruction,
    AnyECGForLongRecords,
]
CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


@pytest.fixture
def folder(tmp_path):
    return export_checkpoint(tiny_model(), AnyECGFeatureExtractor(), tmp_path / "classifier", card=CARD)


def rhythm_pair():
    quantizer = tiny_quantizer()
    return quantizer, AnyECGRhythmFeatureExtractor(quantizer=quantizer)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# ---- export --------------------------------------------------------------------------------------------------------


def test_an_export_is_flat_and_has_weights_configurations_code_and_card(folder):
    names = {path.name for path in folder.iterdir()}
    assert all(path.is_file() for path in folder.iterdir())
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "pipelines_anyecg.py"}
    assert (folder / "README.md").read_text() == CARD
    assert "hub.py" not in names and "plotting.py" not in names and "__init__.py" not in names


def test_an_export_names_every_auto_class_that_loads_it(folder):
    config = config_of(folder)
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForPreTraining",
        "AutoModelForSequenceClassification",
        "AutoModelForMaskedImageModeling",
        "AutoModelForAudioFrameClassification",
    }
    assert config["auto_map"]["AutoModel"] == "modeling_anyecg.AnyECGModel"
    assert set(config["custom_pipelines"]) == {
        "ecg-classification",
        "ecg-reconstruction",
        "ecg-feature-extraction",
        "ecg-long-record",
    }
    options = json.loads((folder / "preprocessor_config.json").read_text())
    assert options["auto_map"] == {"AutoFeatureExtractor": "feature_extraction_anyecg.AnyECGFeatureExtractor"}


def test_an_export_of_the_quantizer_is_the_rhythm_tokenizer(tmp_path):
    folder = export_checkpoint(*rhythm_pair(), tmp_path / "rhythm")
    assert config_of(folder)["auto_map"]["AutoModel"] == "modeling_anyecg_quantizer.AnyECGRhythmQuantizer"
    assert "custom_pipelines" not in config_of(folder)
    options = json.loads((folder / "preprocessor_config.json").read_text())
    assert options["auto_map"]["AutoFeatureExtractor"].endswith("_rhythm.AnyECGRhythmFeatureExtractor")


def test_an_exported_classifier_runs_by_path_without_trusting_its_code(folder):
    record = simulate_record(1)
    expected = pipeline("ecg-classification", model=tiny_model(), feature_extractor=AnyECGFeatureExtractor())(record)
    found = pipeline("ecg-classification", model=str(folder))(record)
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    assert np.allclose([each["score"] for each in found], [each["score"] for each in expected], atol=1e-6)


def test_exporting_again_keeps_the_card(folder):
    export_checkpoint(tiny_model(seed=1), AnyECGFeatureExtractor(), folder)
    assert (folder / "README.md").read_text() == CARD


@pytest.mark.parametrize(
    "make",
    [
        lambda: (tiny_model(), AnyECGRhythmFeatureExtractor()),
        lambda: (tiny_quantizer(), AnyECGFeatureExtractor()),
        lambda: (tiny_quantizer(), rhythm_pair()[1]),
        lambda: (tiny_model(), AnyECGFeatureExtractor(sampling_rate=250, patch_size=250)),
    ],
    ids=[
        "rhythm extractor for a classifier",
        "plain one for a quantizer",
        "one with another quantizer",
        "another rate",
    ],
)
def test_parts_that_do_not_belong_together_are_refused(make, tmp_path):
    with pytest.raises(ValueError, match="goes with|do not belong together"):
        export_checkpoint(*make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the check -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "weights are missing"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
        (lambda folder: (folder / "leads.py").unlink(), "imports leads.py, which is missing"),
        (lambda folder: (folder / "pipelines_anyecg.py").unlink(), "pipelines_anyecg.py with ECG.* is missing"),
        (lambda folder: (folder / "training_args.bin").write_bytes(b""), "training_args.bin may hold a pickle"),
        (lambda folder: (folder / "extra.py").write_text("import anyecg_hf\n"), "extra.py imports anyecg_hf by name"),
        (lambda folder: tiny_config().save_pretrained(folder), "no auto_map entry for AutoModel"),
    ],
    ids=["weights", "extractor", "imported module", "pipelines", "pickle", "import by name", "auto_map"],
)
def test_an_incomplete_folder_is_refused_with_what_is_amiss(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        check_checkpoint(folder)


def tiny_config():
    return AnyECGConfig.from_preset("tiny")


# ---- plain saves and pushes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", MODELS, ids=lambda each: each.__name__)
def test_a_plain_save_of_model_and_extractor_is_complete(model_class, tmp_path):
    tiny_model(model_class).save_pretrained(tmp_path)
    AnyECGFeatureExtractor().save_pretrained(tmp_path)
    check_checkpoint(tmp_path)


def test_a_plain_save_of_the_rhythm_extractor_is_complete(tmp_path):
    rhythm_pair()[1].save_pretrained(tmp_path)
    check_checkpoint(tmp_path)


def test_what_a_model_and_an_extractor_push_is_complete(tmp_path, monkeypatch):
    catch_pushes(monkeypatch, tmp_path)
    tiny_model().push_to_hub("someone/classifier")
    AnyECGFeatureExtractor().push_to_hub("someone/classifier")
    check_checkpoint(tmp_path / "someone" / "classifier")


def test_what_a_pipeline_pushes_is_complete(tmp_path, monkeypatch):
    catch_pushes(monkeypatch, tmp_path)
    pipeline("ecg-classification", model=tiny_model(), feature_extractor=AnyECGFeatureExtractor()).push_to_hub(
        "someone/it"
    )
    check_checkpoint(tmp_path / "someone" / "it")
    assert len(config_of(tmp_path / "someone" / "it")["custom_pipelines"]) == 4


def test_what_a_rhythm_extractor_pushes_is_complete(tmp_path, monkeypatch):
    catch_pushes(monkeypatch, tmp_path)
    rhythm_pair()[1].push_to_hub("someone/rhythm")
    check_checkpoint(tmp_path / "someone" / "rhythm")


def test_a_loaded_model_saves_the_same_again(folder, tmp_path):
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "backbone")
    AnyECGFeatureExtractor().save_pretrained(tmp_path / "backbone")
    check_checkpoint(tmp_path / "backbone")
    assert config_of(tmp_path / "backbone")["architectures"] == ["AnyECGModel"]
    assert config_of(tmp_path / "backbone")["custom_pipelines"] == config_of(folder)["custom_pipelines"]


def test_a_loaded_configuration_keeps_its_entries_when_saved_alone(folder, tmp_path):
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "config")
    assert config_of(tmp_path / "config")["custom_pipelines"] == pipelines_in_config()


def test_the_code_does_not_change_the_weights(folder):
    for ours, theirs in zip(tiny_model().parameters(), pipeline_model(folder).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def pipeline_model(folder):
    return pipeline("ecg-classification", model=str(folder)).model


class MyClassifier(AnyECGForSequenceClassification):
    """A user's own class, defined in a file that imports this package."""


def test_a_class_of_ones_own_is_saved_with_its_own_file_as_the_library_does(tmp_path):
    MyClassifier(tiny_model().config).save_pretrained(tmp_path)
    assert config_of(tmp_path)["auto_map"] == {
        "AutoConfig": "configuration_anyecg.AnyECGConfig",
        "AutoModelForSequenceClassification": "test_hub.MyClassifier",
    }
    assert "custom_pipelines" not in config_of(tmp_path)


@pytest.mark.parametrize(("model_type", "count"), [("anyecg", 6), ("anyecg_quantizer", 2)])
def test_auto_map_names_module_and_class(model_type, count):
    entries = auto_map(model_type)
    assert len(entries) == count and all(
        entry.count(".") == 1 and "Tokenizer" not in entry for entry in entries.values()
    )


def test_each_kind_of_model_has_its_extractor():
    assert extractor_class("anyecg") is AnyECGFeatureExtractor
    assert extractor_class("anyecg_quantizer") is AnyECGRhythmFeatureExtractor
