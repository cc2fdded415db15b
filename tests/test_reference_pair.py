"""The reference pair of a checkpoint: `verify` passes what was exported and refuses what is no longer that."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from tiny_checkpoints import tiny_model, tiny_quantizer
from transformers.feature_extraction_utils import BatchFeature

from anyecg_hf import reference_pair, verify
from anyecg_hf.configuration_anyecg import AnyECGConfig, AnyECGQuantizerConfig
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.feature_extraction_anyecg_rhythm import AnyECGRhythmFeatureExtractor
from anyecg_hf.hub import export_checkpoint
from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling, AnyECGModel
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction, AnyECGForSequenceClassification
from anyecg_hf.modeling_anyecg_long import AnyECGForLongRecords
from anyecg_hf.reference_pair import CODES_TOLERANCE, REFERENCE, TOLERANCE

OUTPUTS = {  # of the model, by class; beside them come those of the extractor
    AnyECGModel: {"last_hidden_state", "pooler_output"},
    AnyECGForMaskedCodeModeling: {"logits"},
    AnyECGForSequenceClassification: {"logits"},
    AnyECGForLeadReconstruction: {"reconstruction", "linear_estimate"},
    AnyECGForLongRecords: {"logits", "record_logits", "counts"},
    "quantizer": {"vectors", "morphology", "frequency", "demography"},
}
# Without effect on what a class gives: the mask token where nothing is hidden; what adds the same to all that a softmax compares.
UNUSED = {
    AnyECGForSequenceClassification: ("mask_token", "key_norm.bias"),
    AnyECGForLongRecords: ("mask_token", "key_norm.bias", "record_head.attention.bias"),
    "quantizer": ("mask_token", "key_norm.bias"),
}
each_class = pytest.mark.parametrize("kind", OUTPUTS, ids=lambda kind: getattr(kind, "__name__", kind))


def make(kind, **options):
    """Return a tiny model and its extractor; its zeros (biases, norms) are numbers, or their loss would not show."""
    model = tiny_quantizer(**options) if kind == "quantizer" else tiny_model(kind, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value += 0.2 * torch.randn(value.shape, generator=generator)
    if kind == "quantizer":
        return model, AnyECGRhythmFeatureExtractor(quantizer=model)
    return model, AnyECGFeatureExtractor()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    for kind in (AnyECGForSequenceClassification, "quantizer"):
        export_checkpoint(*make(kind), root / getattr(kind, "__name__", kind))
    return root


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported / "AnyECGForSequenceClassification", tmp_path / "classifier")


@pytest.fixture
def rhythm_folder(exported, tmp_path):
    return shutil.copytree(exported / "quantizer", tmp_path / "rhythm")


def change_json(path, **values):
    content = json.loads(path.read_text())
    assert set(values) <= set(content)
    path.write_text(json.dumps(content | values))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_reference(folder, arrays=None, **metadata):
    """Write the pair anew with other arrays (None: without) and metadata."""
    with safe_open(folder / REFERENCE, framework="np") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()} | (arrays or {})
        metadata = file.metadata() | metadata
    save_file({name: value for name, value in kept.items() if value is not None}, folder / REFERENCE, metadata=metadata)


# What was exported


@each_class
def test_a_checkpoint_as_exported_passes_with_every_output(kind, tmp_path):
    folder = export_checkpoint(*make(kind), tmp_path / "it")
    deviations = verify(folder)
    codes = {"extractor.rhythm_codes"} if kind == "quantizer" else set()
    of_extractor = {"extractor.input_values", "extractor.lead_ids", "extractor.attention_mask"} | codes
    assert set(deviations) == {f"model.{name}" for name in OUTPUTS[kind]} | of_extractor
    assert all(value < 1e-6 for value in deviations.values())
    assert (folder / REFERENCE).stat().st_size < 90_000


@each_class
def test_the_stored_outputs_are_those_of_the_class_called_by_hand(kind, tmp_path):
    model, extractor = make(kind)
    folder = export_checkpoint(model, extractor, tmp_path / "it")
    with safe_open(folder / REFERENCE, framework="np") as file:
        stored, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    batch = extractor(
        list(stored["signal"]),
        sampling_rate=json.loads(metadata["sampling_rate"]),
        units=json.loads(metadata["units"]),
        lead_names=json.loads(metadata["lead_names"]),
        return_tensors="pt",
    )
    assert batch["attention_mask"].all() and batch["input_values"].shape == (2, 12, 1200)
    assert batch["input_values"].abs().max() == extractor.clip_mv  # or another limit would go unnoticed
    if kind == "quantizer":
        assert torch.equal(batch["rhythm_codes"], torch.from_numpy(stored["extractor.rhythm_codes"]))
        return
    hidden = (torch.arange(2 * 12 * 4) % 3 == 0).view(2, 12, 4)
    takes_hidden = kind not in (AnyECGForSequenceClassification, AnyECGForLongRecords)
    with torch.no_grad():
        outputs = model(**batch, **({"bool_masked_pos": hidden} if takes_hidden else {}))
    for name in OUTPUTS[kind]:
        whole, kept = outputs[name].flatten().tolist(), stored[f"model.{name}"].flatten()
        if len(whole) <= 1024:
            assert np.allclose(kept, whole, atol=1e-5)
        else:
            assert 900 < len(kept) <= 1024 and set(np.round(kept, 3)) <= set(np.round(np.float32(whole), 3))


def test_a_model_in_training_and_in_bfloat16_is_exported_as_it_will_be_loaded(tmp_path):
    model, extractor = make(AnyECGForSequenceClassification, classifier_dropout=0.5)
    folder = export_checkpoint(model.to(torch.bfloat16).train(), extractor, tmp_path / "it")
    assert model.training and model.dtype == torch.bfloat16
    assert max(verify(folder).values()) < 1e-6


def test_a_quantizer_in_bfloat16_gives_the_codes_that_it_will_give(tmp_path):
    model, _ = make("quantizer")
    model = model.to(torch.bfloat16)
    folder = export_checkpoint(model, AnyECGRhythmFeatureExtractor(quantizer=model), tmp_path / "it")
    assert verify(folder)["extractor.rhythm_codes"] == 0


def test_other_patches_leads_and_rates_can_be_exported_too(tmp_path):
    model = tiny_model(AnyECGModel, sampling_rate=100, patch_size=50, stem_strides=[5, 2, 1, 1], stem_bins=5,
                       stem_kernel_sizes=[25, 6, 5, 5], max_patches=3)  # fmt: skip
    extractor = AnyECGFeatureExtractor(sampling_rate=100, patch_size=50, lead_names=["V5", "II"], window_seconds=1.5)
    assert max(verify(export_checkpoint(model, extractor, tmp_path / "it")).values()) < 1e-6


def test_a_model_whose_output_is_not_finite_is_not_exported(tmp_path):
    model, extractor = make(AnyECGModel)
    torch.nn.init.constant_(model.encoder.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="last_hidden_state.* not finite"):
        export_checkpoint(model, extractor, tmp_path / "it")


# What is no longer that


@each_class
def test_random_values_in_any_one_tensor_are_noticed(kind):
    model, extractor = make(kind)
    batch = dict(extractor(reference_pair._made_up_records(model.config, extractor), return_tensors="pt"))

    def outputs(codes=None):
        found = reference_pair._outputs(model, lambda *_, **__: BatchFeature(dict(batch)), None, codes)
        return {name: reference_pair._thinned(values) for name, values in found.items()}

    expected, generator, unnoticed = outputs(), torch.Generator().manual_seed(0), []
    for name, value in model.named_parameters():
        kept = value.detach().clone()
        with torch.no_grad():
            value.copy_(kept[torch.randperm(len(kept), generator=generator)])  # as large as before, in other places
            value.neg_()
            found = outputs(expected.get("extractor.rhythm_codes"))
            value.copy_(kept)
        if all(reference_pair._deviation(found[key], expected[key]) <= TOLERANCE for key in found):
            unnoticed.append(name)
    assert [name for name in unnoticed if not name.endswith(UNUSED.get(kind, "key_norm.bias"))] == []


def test_one_random_layer_is_refused_and_the_weights_are_blamed(folder):
    name = "anyecg.encoder.layers.0.mlp.down.weight"
    change_weights(folder, lambda weights: weights[name].normal_(std=0.2, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"model.logits differs by up to .*allowed is 0.0001.*weights are not those"):
        verify(folder)


def test_a_codebook_that_was_exchanged_is_refused(rhythm_folder):
    def shuffle(weights):
        weights["vector_quantizer.codebook"] = weights["vector_quantizer.codebook"].flip(0).contiguous()

    change_weights(rhythm_folder, shuffle)
    with pytest.raises(ValueError, match="extractor.rhythm_codes: .* of the values differ, allowed are 2%"):
        verify(rhythm_folder)


def test_weights_that_are_missing_are_an_error_of_loading(folder):
    change_weights(folder, lambda weights: weights.pop("classifier.weight"))
    with pytest.raises(ValueError, match=r"does not fit .* missing weights 1 \(classifier.weight\)"):
        verify(folder)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"input_scale_mv": 0.55}, "input_scale_mv is 0.55, at export it was 0.5; model.logits differs"),
        ("config.json", {"thresholds": [0.1] * 4}, r"thresholds is \[0.1, 0.1, 0.1, 0.1\], at export it was null"),
        ("config.json", {"pooling": "mean_max"}, None),
        (
            "preprocessor_config.json",
            {"highcut_hz": 35.0},
            "highcut_hz is 35.0, at export it was 40.0; extractor.input",
        ),
        ("preprocessor_config.json", {"lowcut_hz": None}, "lowcut_hz is null, at export it was 0.5; extractor.input"),
        ("preprocessor_config.json", {"clip_mv": 20.0}, "clip_mv is 20.0.*extractor.input_values"),
        ("preprocessor_config.json", {"window_seconds": 20.0}, "window_seconds is 20.0, at export it was 10.0"),
        ("preprocessor_config.json", {"lead_names": ["I", "II"]}, r"lead_names is \[.*its outputs are .*\(2, 2, 4\)"),
    ],
)
def test_a_changed_setting_is_named(folder, file, values, message):
    change_json(folder / file, **values)
    with pytest.raises((ValueError, RuntimeError), match=message and f"{file}: {message}"):
        verify(folder)


def test_labels_in_another_order_are_named(folder):
    labels = {"0": "AFIB", "1": "NORM", "2": "PVC", "3": "LVH"}
    change_json(folder / "config.json", id2label=labels, label2id={name: int(i) for i, name in labels.items()})
    with pytest.raises(
        ValueError, match='id2label is .*"0": "AFIB".*at export it was .*"0": "NORM".* settings were changed'
    ):
        verify(folder)


def test_another_filter_is_noticed_where_only_the_code_has_changed(folder, monkeypatch):
    monkeypatch.setattr(
        AnyECGFeatureExtractor, "_in_band", lambda self, filled, rate: np.repeat(filled, 2, axis=1)[:, :1200]
    )
    with pytest.raises(ValueError, match="extractor.input_values differs.*feature extractor is another one"):
        verify(folder)


def test_few_codes_may_fall_the_other_way_and_change_nothing_else(rhythm_folder):
    codes = load_file(rhythm_folder / REFERENCE)["extractor.rhythm_codes"].numpy()
    assert 1 / codes.size <= CODES_TOLERANCE < 2 / codes.size
    vectors = load_file(rhythm_folder / "model.safetensors")["vector_quantizer.codebook"]
    assert len(set(codes.flatten().tolist())) > 1 and len(vectors) == 64
    expected = verify(rhythm_folder)
    original = AnyECGRhythmFeatureExtractor._codes

    def one_flipped(self, *inputs):
        found = original(self, *inputs)
        if not one_flipped.done:
            found[0, 0], one_flipped.done = (found[0, 0] + 1) % 64, True
        return found

    one_flipped.done = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnyECGRhythmFeatureExtractor, "_codes", one_flipped)
        found = verify(rhythm_folder)
    assert found.pop("extractor.rhythm_codes") == 1 / codes.size
    expected.pop("extractor.rhythm_codes")
    assert found == expected


# A pair that is not there, or not to be trusted


def test_a_checkpoint_without_a_pair_says_how_to_get_one(folder):
    (folder / REFERENCE).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no reference pair.*export_checkpoint\(model, feature_extractor, folder\)"
    ):
        verify(folder)


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({"model.logits": np.full((2, 4), np.nan, np.float32)}, {}, "model.logits is not finite"),
        ({"model.logits": np.zeros((2, 4), np.float64)}, {}, "model.logits is not finite numbers of float32 or int64"),
        ({"model.logits": np.zeros((0, 4), np.float32)}, {}, "model.logits is not finite"),
        ({"signal": None}, {}, "no 'signal'"),
        ({"signal": np.zeros((2, 12, 1000), np.float32)}, {}, "signal is float32"),
        ({"signal": np.zeros((12, 1000), np.int16)}, {}, r"signal is int16 \(12, 1000\)"),
        ({}, {"format": "2"}, 'its format is "2"'),
        ({}, {"settings": "{}"}, "its settings are not those"),
        ({}, {"settings": "[1"}, "delimiter"),
        ({}, {"settings": '{"config.json": 1, "preprocessor_config.json": {}}'}, "its settings are not those"),
        ({}, {"lead_names": "3"}, "int"),
    ],
)
def test_a_pair_that_is_none_is_refused(folder, arrays, metadata, message):
    change_reference(folder, arrays, **metadata)
    with pytest.raises(ValueError, match=f"{REFERENCE} is no reference pair that can be read: .*{message}"):
        verify(folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"model.logits": np.zeros((2, 5), np.float32)},
            r"its outputs are .*model.logits \(2, 4\), those of .*\(2, 5\)",
        ),
        ({"model.logits": None}, r"its outputs are .*model.logits"),
        ({"model.more": np.zeros(3, np.float32)}, r"those of the reference pair .*model.more \(3,\)"),
    ],
)
def test_a_pair_of_other_outputs_is_refused(folder, arrays, message):
    change_reference(folder, arrays)
    with pytest.raises(ValueError, match=message):
        verify(folder)


@pytest.mark.parametrize("codes", [np.full((2, 12, 4), 64), np.full((2, 12, 4), -101), np.zeros((2, 12, 3)), None])
def test_codes_that_the_quantizer_does_not_have_are_refused(rhythm_folder, codes):
    change_reference(rhythm_folder, {"extractor.rhythm_codes": codes if codes is None else codes.astype(np.int64)})
    with pytest.raises(ValueError, match="are no codes of this quantizer|its outputs are"):
        verify(rhythm_folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\0" * 2_000_001], ids=["empty", "noise", "large"])
def test_a_file_that_is_no_safetensors_or_too_large_is_refused(folder, content):
    (folder / REFERENCE).write_bytes(content)
    with pytest.raises(ValueError, match="no reference pair that can be read"):
        verify(folder)


def test_a_checkpoint_of_a_foreign_class_is_refused(folder):
    change_json(folder / "config.json", architectures=["Other"])
    with pytest.raises(ValueError, match="names Other in `architectures`"):
        verify(folder)


def test_the_settings_compared_are_all_of_ours():
    for config, own in ((AnyECGConfig(), "record_thresholds"), (AnyECGQuantizerConfig(), "commitment_weight")):
        stated = reference_pair._settings(config, AnyECGFeatureExtractor())
        assert {own, "id2label", "input_scale_mv", "sparse_attention_config"} <= set(stated["config.json"])
        assert set(stated["config.json"]["sparse_attention_config"]) == {
            "lead_window",
            "time_tolerance",
            "num_global_tokens",
        }
        assert {"highcut_hz", "clip_mv", "lead_names", "window_seconds"} <= set(stated["preprocessor_config.json"])
    assert TOLERANCE == 1e-4
