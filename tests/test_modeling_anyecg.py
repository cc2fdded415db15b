"""The backbone: stem, embeddings, hidden patches, pooling; and masked-code pretraining.

What all model classes share is in test_modeling_common.py.
"""

import pytest
import torch
from model_cases import (
    BACKBONE,
    HEADS,
    MASKED_CODES,
    NUM_CODES,
    PATCH_SIZE,
    RECONSTRUCTION,
    make_batch,
    make_model,
    run,
)
from torch import nn
from transformers import AutoModelForSequenceClassification

from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.modeling_anyecg import AnyECGMaskedGroupNorm, AnyECGModel, eager_attention_forward, masked_mean
from anyecg_hf.modeling_anyecg_heads import AnyECGForSequenceClassification

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
both_scopes = pytest.mark.parametrize("stem_scope", ["lead", "patch"])
can_hide = pytest.mark.parametrize("case", [BACKBONE, MASKED_CODES, RECONSTRUCTION], ids=lambda case: case.name)


def hidden(*grid, seed=0):
    return torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < 0.4


# Masked normalisation


def test_masked_normalisation_with_nothing_masked_is_group_normalisation():
    norm, x = AnyECGMaskedGroupNorm(2, 4), torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.group_norm(x, 2, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(x, torch.ones(3, 1, 20)), expected)


@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0])
def test_masked_normalisation_is_group_normalisation_of_what_is_visible(offset):
    """In float64 by hand; a lead with a large offset (slow drift, clipped) keeps its small details."""
    generator = torch.Generator().manual_seed(0)
    norm = AnyECGMaskedGroupNorm(2, 4)
    nn.init.normal_(norm.weight, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    x = torch.randn(3, 4, 600, generator=generator) + offset
    mask = torch.ones(3, 1, 600)
    mask[1, :, 200:] = 0
    mask[2, :, ::2] = 0
    found = norm(x, mask)
    for i in range(3):
        seen = x[i][:, mask[i, 0] == 1].double()
        groups = seen.view(2, -1)
        scaled = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        expected = scaled.view_as(seen) * norm.weight.double()[:, None] + norm.bias.double()[:, None]
        torch.testing.assert_close(found[i][:, mask[i, 0] == 1].double(), expected, atol=1e-3, rtol=1e-3)
        assert (found[i][:, mask[i, 0] == 0] == 0).all()


def test_masked_normalisation_of_nothing_is_finite():
    x = torch.randn(1, 4, 20).requires_grad_()
    norm = AnyECGMaskedGroupNorm(2, 4)
    norm(x, torch.zeros(1, 1, 20)).sum().backward()
    assert x.grad.isfinite().all()


# Stem and embeddings


@both_scopes
def test_a_whole_record_is_the_same_with_and_without_a_mask(stem_scope):
    model, batch = make_model(BACKBONE, stem_scope=stem_scope), make_batch()
    without = model(batch["input_values"], batch["lead_ids"]).last_hidden_state
    torch.testing.assert_close(model(**batch).last_hidden_state, without, **TOLERANCE)


def stem_of_all(model, values):
    """Return the stem's vectors of `values` (B, L, T) with every patch visible."""
    grid = (*values.shape[:2], values.shape[2] // PATCH_SIZE)
    return model.embeddings.stem(values, torch.ones(grid, dtype=torch.bool))


def test_with_the_scope_patch_no_patch_sees_the_edge_of_its_neighbour():
    model, batch = make_model(BACKBONE, stem_scope="patch"), make_batch(1, 1, 3)
    alone = stem_of_all(model, batch["input_values"][..., PATCH_SIZE : 2 * PATCH_SIZE])
    torch.testing.assert_close(stem_of_all(model, batch["input_values"])[:, :, 1:2], alone, **TOLERANCE)


def test_with_the_scope_lead_patches_see_across_their_edges():
    model, batch = make_model(BACKBONE, stem_scope="lead"), make_batch(1, 1, 3)
    alone = stem_of_all(model, batch["input_values"][..., PATCH_SIZE : 2 * PATCH_SIZE])
    assert (stem_of_all(model, batch["input_values"])[:, :, 1:2] - alone).abs().max() > 1e-2


def test_a_stem_of_the_default_shape_keeps_patches_apart_from_their_neighbours_mask():
    """The real kernel sizes and strides: one patch of a lead masked, against the same lead whole."""
    config = AnyECGConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, stem_scope="patch")
    torch.manual_seed(0)
    model, batch = AnyECGModel(config).eval(), make_batch(1, 2, 5)
    batch["attention_mask"][0, 0, 2] = 0
    visible = batch["attention_mask"].bool()
    whole = stem_of_all(model, batch["input_values"])
    torch.testing.assert_close(
        model.embeddings.stem(batch["input_values"], visible)[visible], whole[visible], **TOLERANCE
    )


def test_the_amplitude_survives_the_normalisation():
    model, batch = make_model(BACKBONE), make_batch()
    louder = {**batch, "input_values": 3 * batch["input_values"]}
    found = model(**louder).last_hidden_state - model(**batch).last_hidden_state
    assert found.abs().max() > 1e-2


def test_an_offset_survives_the_normalisation():
    model, batch = make_model(BACKBONE), make_batch()
    higher = {**batch, "input_values": batch["input_values"] + 0.5}
    assert (model(**higher).last_hidden_state - model(**batch).last_hidden_state).abs().max() > 1e-2


def test_the_input_is_in_millivolt_of_the_configured_scale():
    model, batch = make_model(BACKBONE, input_scale_mv=0.5), make_batch()
    other = make_model(BACKBONE, input_scale_mv=1)
    doubled = {**batch, "input_values": 2 * batch["input_values"]}
    torch.testing.assert_close(run(BACKBONE, other, doubled), run(BACKBONE, model, batch), **TOLERANCE)


def test_the_time_of_a_patch_and_the_name_of_a_lead_matter():
    model, batch = make_model(BACKBONE), make_batch(1, 2, 3)
    renamed = {**batch, "lead_ids": torch.tensor([[1, 7]])}
    assert (run(BACKBONE, model, renamed) - run(BACKBONE, model, batch)).abs().max() > 1e-2
    batch["input_values"][:] = batch["input_values"][..., :PATCH_SIZE].repeat(1, 1, 3)
    states = run(BACKBONE, model, batch)
    assert (states[:, :, 0] - states[:, :, 2]).abs().max() > 1e-2


def test_double_precision_input_is_taken():
    model, batch = make_model(BACKBONE), make_batch()
    as_double = {**batch, "input_values": batch["input_values"].double()}
    torch.testing.assert_close(run(BACKBONE, model, as_double), run(BACKBONE, model, batch), **TOLERANCE)


# Pooling


def test_the_pooled_output_is_the_mean_of_the_real_patches():
    model, batch = make_model(BACKBONE), make_batch(2, 3, 4)
    batch["attention_mask"][1, 0] = 0
    batch["attention_mask"][1, :, 3] = 0
    outputs = model(**batch)
    for i in range(2):
        states = outputs.last_hidden_state[i][batch["attention_mask"][i].bool()]
        torch.testing.assert_close(outputs.pooler_output[i], states.mean(0), **TOLERANCE)


def test_the_mean_of_nothing_is_zero():
    assert torch.equal(masked_mean(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3).bool()), torch.zeros(1, 4))


# Hidden patches


@can_hide
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@both_scopes
@pytest.mark.parametrize("with_mask", [True, False])
def test_nothing_of_a_hidden_waveform_reaches_the_output(case, attention, stem_scope, with_mask):
    model, batch = make_model(case, attn_implementation=attention, stem_scope=stem_scope), make_batch(2, 3, 4)
    batch["bool_masked_pos"] = hidden(2, 3, 4)
    if not with_mask:
        del batch["attention_mask"]
    patches = batch["input_values"].clone().view(2, 3, 4, PATCH_SIZE)
    patches[batch["bool_masked_pos"]] = float("nan")
    other = {**batch, "input_values": patches.flatten(2)}
    found = run(case, model, other)
    assert found.isfinite().all()
    assert torch.equal(found, run(case, model, batch))


@can_hide
def test_no_gradient_reaches_the_samples_of_hidden_patches(case):
    model, batch = make_model(case), make_batch(2, 3, 4)
    batch["bool_masked_pos"] = hidden(2, 3, 4)
    batch["input_values"].requires_grad_()
    getattr(model(**batch), case.main_output).square().sum().backward()
    gradient = batch["input_values"].grad.view(2, 3, 4, PATCH_SIZE)
    assert (gradient[batch["bool_masked_pos"]] == 0).all() and (gradient[~batch["bool_masked_pos"]] != 0).any()


@can_hide
def test_hiding_a_patch_changes_the_output(case):
    model, batch = make_model(case), make_batch()
    found = run(case, model, {**batch, "bool_masked_pos": hidden(2, 3, 3)})
    assert (found - run(case, model, batch)).abs().max() > 1e-2


@can_hide
def test_hiding_nothing_is_the_same_as_not_hiding(case):
    model, batch = make_model(case), make_batch()
    nothing = {**batch, "bool_masked_pos": torch.zeros(2, 3, 3, dtype=torch.bool)}
    torch.testing.assert_close(run(case, model, nothing), run(case, model, batch), **TOLERANCE)


def test_a_hidden_patch_still_knows_its_lead_and_time():
    model, batch = make_model(BACKBONE), make_batch(1, 3, 4)
    states = run(BACKBONE, model, {**batch, "bool_masked_pos": torch.ones(1, 3, 4, dtype=torch.bool)})
    assert len(states.flatten(0, 2).round(decimals=3).unique(dim=0)) == 12


def test_a_hidden_patch_is_not_the_same_as_an_absent_one():
    model, batch = make_model(BACKBONE), make_batch(1, 2, 3)
    where = torch.zeros(1, 2, 3, dtype=torch.bool)
    where[0, 0, 1] = True
    as_hidden = run(BACKBONE, model, {**batch, "bool_masked_pos": where})
    as_absent = run(BACKBONE, model, {**batch, "attention_mask": (~where).long()})
    assert (as_hidden[0, 1, 1] - as_absent[0, 1, 1]).abs().max() > 1e-3
    assert (as_hidden[where] != 0).any() and (as_absent[where] == 0).all()


def test_whole_leads_can_be_hidden():
    model, batch = make_model(BACKBONE), make_batch(1, 3, 3)
    where = torch.zeros(1, 3, 3, dtype=torch.bool)
    where[:, 1] = True
    assert run(BACKBONE, model, {**batch, "bool_masked_pos": where}).isfinite().all()


# Masked codes


def test_the_loss_of_masked_codes_is_the_cross_entropy_of_the_predicted_patches():
    model, batch = make_model(MASKED_CODES), make_batch(2, 3, 4)
    labels = torch.randint(NUM_CODES, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    labels[hidden(2, 3, 4, seed=1)] = -100
    outputs = model(**batch, labels=labels)
    log_probabilities = outputs.logits.double().log_softmax(-1)
    picked = [-log_probabilities[i, j, k, labels[i, j, k]] for i, j, k in (labels != -100).nonzero().tolist()]
    torch.testing.assert_close(outputs.loss.double(), torch.stack(picked).mean(), **TOLERANCE)


def test_without_labels_there_is_no_loss():
    assert all(make_model(case)(**make_batch()).loss is None for case in HEADS)


# Attention by hand


def test_the_eager_attention_drops_weights_in_training_only():
    module = nn.Module()
    query, key, value = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    plain, weights = eager_attention_forward(module.eval(), query, key, value, None, 0.5, dropout=0.5)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5).transpose(1, 2)
    torch.testing.assert_close(plain, expected, **TOLERANCE)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 5), **TOLERANCE)
    dropped, _ = eager_attention_forward(module.train(), query, key, value, None, 0.5, dropout=0.5)
    assert not torch.allclose(dropped, plain)


# Heads asked for through the configuration


@pytest.fixture
def backbone_folder(tmp_path):
    make_model(BACKBONE).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


LABELS = {"id2label": {0: "AF", 1: "NORM"}, "label2id": {"AF": 0, "NORM": 1}}


@pytest.mark.parametrize("options", [{"num_labels": 2}, LABELS], ids=["num_labels", "id2label"])
@pytest.mark.parametrize(
    "model_class",
    [AnyECGForSequenceClassification, AutoModelForSequenceClassification],
    ids=["own class", "Auto class"],
)
def test_labels_ask_for_a_new_head(model_class, options, backbone_folder):
    model = model_class.from_pretrained(backbone_folder, **options)
    assert model.classifier.weight.shape == (2, 32)
    assert torch.equal(model.anyecg.embeddings.mask_token, make_model(BACKBONE).embeddings.mask_token)


def test_a_new_head_does_not_excuse_a_missing_weight_of_the_backbone(tmp_path):
    from safetensors.torch import load_file, save_file

    make_model(BACKBONE).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="encoder.norm.weight"):
        AnyECGForSequenceClassification.from_pretrained(tmp_path, new_head=True)


@pytest.mark.parametrize("num_patches", [1, 2, 16])
@pytest.mark.parametrize("num_leads", [1, 12, 15])
def test_any_number_of_leads_and_patches_runs(num_leads, num_patches):
    states = run(BACKBONE, make_model(BACKBONE), make_batch(1, num_leads, num_patches))
    assert states.shape == (1, num_leads, num_patches, 32) and states.isfinite().all()


def test_without_the_amplitude_feature_the_stem_divides_a_gain_out():
    """GroupNorm leaves hardly anything of a gain; the amplitude feature brings it back."""
    changes = {}
    for has_amplitude in (True, False):
        torch.manual_seed(0)
        config = AnyECGConfig.from_preset("tiny", stem_amplitude=has_amplitude)
        stem = AnyECGModel(config).eval().embeddings.stem
        signal, visible = torch.randn(1, 2, 600), torch.ones(1, 2, 2, dtype=torch.bool)
        with torch.no_grad():
            plain, louder = stem(signal, visible), stem(signal * 4, visible)
        changes[has_amplitude] = ((louder - plain).norm() / plain.norm()).item()
    assert changes[False] < 0.25 < changes[True]
