"""Classification, regression and reconstruction: losses, pooling and the size of the head."""

import math

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model_cases import BACKBONE, CLASSIFIER, PATCH_SIZE, RECONSTRUCTION, make_batch, make_model, run, state_of
from torch import nn
from transformers import AutoModelForSequenceClassification

from anyecg_hf.modeling_anyecg_heads import AnyECGForSequenceClassification, least_squares_weights

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
both_poolings = pytest.mark.parametrize("pooling", ["mean", "mean_max"])


def classifier(**options):
    return make_model(CLASSIFIER, **{"thresholds": None, "problem_type": None, **options})


# Losses


def test_the_multi_label_loss_is_the_mean_binary_cross_entropy():
    batch, labels = make_batch(4), torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]])
    outputs = classifier(problem_type="multi_label_classification")(**batch, labels=labels)
    p = 1 / (1 + np.exp(-outputs.logits.detach().double().numpy()))
    expected = -np.where(labels.numpy() == 1, np.log(p), np.log(1 - p)).mean()
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_multi_label_loss_takes_whole_numbers_too():
    model, labels = classifier(problem_type="multi_label_classification"), torch.tensor([[1, 0, 0], [0, 1, 1]])
    assert torch.equal(model(**make_batch(), labels=labels).loss, model(**make_batch(), labels=labels.float()).loss)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_the_single_label_loss_is_the_cross_entropy(shape):
    labels = torch.tensor([0, 2, 1, 2])
    outputs = classifier(problem_type="single_label_classification")(**make_batch(4), labels=labels.view(shape))
    expected = -outputs.logits.double().log_softmax(-1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(outputs.loss.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("num_labels, shape", [(1, (4,)), (1, (4, 1)), (3, (4, 3))])
def test_the_regression_loss_is_the_mean_squared_error(num_labels, shape):
    values = 50 + 20 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    outputs = classifier(problem_type="regression", num_labels=num_labels)(**make_batch(4), labels=values)
    expected = (outputs.logits.double() - values.view(4, num_labels).double()).square().mean()
    torch.testing.assert_close(outputs.loss.double(), expected, **TOLERANCE)


def test_the_regression_loss_of_one_record_is_a_number():
    outputs = classifier(problem_type="regression", num_labels=1)(**make_batch(1), labels=torch.tensor([50.0]))
    assert outputs.loss.shape == () and outputs.loss.item() == pytest.approx(
        (outputs.logits.item() - 50) ** 2, rel=1e-5
    )


@pytest.mark.parametrize(
    "num_labels, labels, problem_type",
    [
        (1, torch.tensor([0.5, 1.5]), "regression"),
        (3, torch.tensor([0, 2]), "single_label_classification"),
        (3, torch.tensor([[0.0, 1, 1], [1, 0, 0]]), "multi_label_classification"),
    ],
)
def test_an_unset_problem_type_is_guessed_as_the_library_does(num_labels, labels, problem_type):
    guessed = classifier(num_labels=num_labels)(**make_batch(), labels=labels).loss
    stated = classifier(num_labels=num_labels, problem_type=problem_type)(**make_batch(), labels=labels).loss
    assert torch.equal(guessed, stated)


def test_guessing_the_problem_type_leaves_the_configuration_alone():
    model = classifier()
    model(**make_batch(), labels=torch.tensor([0, 2]))
    assert model.config.problem_type is None


@pytest.mark.parametrize(
    "problem_type, labels",
    [
        ("multi_label_classification", torch.zeros(3, 2)),
        ("multi_label_classification", torch.zeros(3)),
        ("regression", torch.zeros(3)),  # would be broadcast over the three values
        ("regression", torch.zeros(3, 1)),
        ("regression", torch.zeros(3, 4)),
        ("single_label_classification", torch.zeros(4, dtype=torch.int64)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(tuple(value.shape)),
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_labels_of_another_shape_are_an_error(problem_type, labels):
    with pytest.raises((ValueError, RuntimeError)):
        classifier(problem_type=problem_type, num_labels=3)(**make_batch(3), labels=labels)


def test_an_unknown_problem_type_is_an_error():
    with pytest.raises((ValueError, StrictDataclassError), match="multilabel"):
        classifier(problem_type="multilabel")(**make_batch(2), labels=torch.zeros(2, 3))


# Pooling


@both_poolings
def test_the_logits_are_norm_and_linear_map_of_the_pooled_states(pooling):
    model, batch = classifier(pooling=pooling), make_batch(2, 3, 4)
    batch["attention_mask"][1, 0] = 0
    batch["attention_mask"][1, :, 3] = 0
    states = model.anyecg(**batch).last_hidden_state
    for i in range(2):
        real = states[i][batch["attention_mask"][i].bool()]
        pooled = torch.cat([real.mean(0), real.amax(0)] if pooling == "mean_max" else [real.mean(0)])
        normed = nn.functional.layer_norm(pooled, pooled.shape, model.pooled_norm.weight, model.pooled_norm.bias, 1e-6)
        expected = normed @ model.classifier.weight.T + model.classifier.bias
        torch.testing.assert_close(run(CLASSIFIER, model, batch)[i], expected, **TOLERANCE)


@both_poolings
def test_padding_and_absent_leads_do_not_change_the_logits(pooling):
    model, batch = classifier(pooling=pooling), make_batch(2, 3, 3)
    padded = {
        "input_values": nn.functional.pad(batch["input_values"], (0, 2 * PATCH_SIZE, 0, 1), value=3.0),
        "lead_ids": nn.functional.pad(batch["lead_ids"], (0, 1)),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 2, 0, 1)),
    }
    torch.testing.assert_close(run(CLASSIFIER, model, padded), run(CLASSIFIER, model, batch), **TOLERANCE)


@both_poolings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_record_without_a_real_patch_gives_finite_logits_and_gradients(pooling, dtype):
    model, batch = classifier(pooling=pooling).to(dtype), make_batch()
    batch["attention_mask"][0] = 0
    outputs = model(**batch, labels=torch.ones(2, 3))
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


# Size of the head


@pytest.fixture
def folder(tmp_path):
    make_model(CLASSIFIER).save_pretrained(tmp_path)
    return tmp_path


def test_a_head_of_another_size_is_an_error_unless_asked_for(folder):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AnyECGForSequenceClassification.from_pretrained(folder, num_labels=5, thresholds=None)


@pytest.mark.parametrize("model_class", [AnyECGForSequenceClassification, AutoModelForSequenceClassification])
def test_a_head_of_another_size_is_made_anew_and_the_rest_is_kept(model_class, folder):
    options = {"num_labels": 5, "thresholds": None, "ignore_mismatched_sizes": True}
    model = model_class.from_pretrained(folder, **options)
    assert model.classifier.weight.shape == (5, 32) and model.config.num_labels == 5
    assert model(**make_batch()).logits.shape == (2, 5) and model(**make_batch()).logits.isfinite().all()
    kept, old = state_of(model), state_of(make_model(CLASSIFIER))
    assert [
        name for name in kept if not name.startswith("classifier.") and not torch.equal(kept[name], old[name])
    ] == []


def test_thresholds_of_the_old_labels_do_not_outlive_them(folder):
    """Else they are wrong in silence, and saving fails after the training."""
    labels = {"id2label": {0: "AF", 1: "NORM"}, "label2id": {"AF": 0, "NORM": 1}}
    try:
        model = AnyECGForSequenceClassification.from_pretrained(folder, **labels, ignore_mismatched_sizes=True)
    except (ValueError, StrictDataclassError) as error:
        assert "thresholds" in str(error)
    else:
        assert model.config.thresholds is None


def test_labels_and_thresholds_are_saved_and_loaded_in_their_order(tmp_path):
    labels = {2: "AF", 0: "NORM", 1: "LBBB"}
    model = make_model(CLASSIFIER, id2label=labels, label2id={name: i for i, name in labels.items()}, num_labels=3)
    model.save_pretrained(tmp_path)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    assert [config.id2label[i] for i in range(3)] == ["NORM", "LBBB", "AF"]
    assert config.thresholds == [0.2, 0.5, 0.8]


# Reconstruction


def reconstruction_loss(reconstruction, target, scored):
    """Mean over the scored patches of L1 + 0.5 MSE + L1 of the slope, in units of 0.5 mV, in float64.

    The slope is taken from the sample before the patch to the one after it; what is not scored has no error.
    """
    error = (reconstruction - target).detach().double().numpy() / 0.5
    error = np.where(np.repeat(scored.numpy(), PATCH_SIZE, axis=2), error, 0)
    losses = []
    for i, j, k in scored.nonzero().tolist():
        first, last = k * PATCH_SIZE, (k + 1) * PATCH_SIZE
        e = error[i, j, first:last]
        around = error[i, j, max(first - 1, 0) : last + 1]
        slopes = np.abs(np.diff(around)).sum() / (PATCH_SIZE + 1)
        losses.append(np.abs(e).mean() + 0.5 * (e**2).mean() + slopes)
    return np.mean(losses)


def reconstruction_batch():
    batch = make_batch(2, 3, 4)
    batch["attention_mask"][1, :, 3] = 0
    batch["bool_masked_pos"] = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    target = batch["input_values"] + 0.1 * torch.randn(2, 3, 1200, generator=torch.Generator().manual_seed(1))
    return batch, target


def test_the_reconstruction_loss_takes_hidden_and_real_patches_only():
    model, (batch, target) = make_model(RECONSTRUCTION), reconstruction_batch()
    outputs = model(**batch, labels=target)
    scored = batch["bool_masked_pos"] & batch["attention_mask"].bool()
    assert outputs.loss.item() == pytest.approx(reconstruction_loss(outputs.reconstruction, target, scored), rel=1e-5)


def test_other_targets_of_patches_that_are_seen_do_not_change_the_loss():
    model, (batch, target) = make_model(RECONSTRUCTION), reconstruction_batch()
    plain = model(**batch, labels=target).loss
    patches = target.clone().view(2, 3, 4, PATCH_SIZE)
    patches[~batch["bool_masked_pos"] | (batch["attention_mask"] == 0)] = math.nan
    other = model(**batch, labels=patches.flatten(2)).loss
    assert torch.equal(other, plain)
    other.backward()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


def test_where_nothing_is_hidden_every_real_patch_counts():
    model, (batch, target) = make_model(RECONSTRUCTION), reconstruction_batch()
    del batch["bool_masked_pos"]
    outputs = model(**batch, labels=target)
    expected = reconstruction_loss(outputs.reconstruction, target, batch["attention_mask"].bool())
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_reconstruction_is_in_millivolt():
    """The same network at another scale: input and output both follow it."""
    batch = make_batch()
    doubled = {**batch, "input_values": 2 * batch["input_values"]}
    found = run(RECONSTRUCTION, make_model(RECONSTRUCTION, input_scale_mv=1.0), doubled)
    expected = 2 * run(RECONSTRUCTION, make_model(RECONSTRUCTION, input_scale_mv=0.5), batch)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_a_lead_is_generated_from_a_row_of_any_content():
    model, batch = make_model(RECONSTRUCTION), make_batch(1, 3, 3)
    batch["bool_masked_pos"] = torch.zeros(1, 3, 3, dtype=torch.bool)
    batch["bool_masked_pos"][:, 2] = True
    outputs = []
    for content in (0.0, 9.0, math.nan):
        batch["input_values"][:, 2] = content
        outputs.append(run(RECONSTRUCTION, model, batch))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert (outputs[0][:, 2] != 0).any()


def test_another_lead_id_generates_another_lead():
    model, batch = make_model(RECONSTRUCTION), make_batch(1, 3, 3)
    batch["bool_masked_pos"] = torch.zeros(1, 3, 3, dtype=torch.bool)
    batch["bool_masked_pos"][:, 2] = True
    first = run(RECONSTRUCTION, model, batch)[:, 2]
    batch["lead_ids"][:, 2] = 12
    assert (run(RECONSTRUCTION, model, batch)[:, 2] - first).abs().max() > 1e-2


def test_a_step_at_the_edge_of_a_hidden_patch_is_part_of_the_loss():
    model, (batch, _) = make_model(RECONSTRUCTION), reconstruction_batch()
    batch["bool_masked_pos"] = torch.zeros(2, 3, 4, dtype=torch.bool)
    batch["bool_masked_pos"][0, 0, 1] = True
    made = model(**batch).reconstruction.detach()
    scored = batch["bool_masked_pos"]
    offset = made.clone()
    offset[0, 0, 300:600] -= 0.5  # one model unit, constant in the patch: two steps, one at each edge
    assert model(**batch, labels=offset).loss.item() == pytest.approx(1 + 0.5 + 2 / 301, rel=1e-4)
    assert reconstruction_loss(made, offset, scored) == pytest.approx(1 + 0.5 + 2 / 301, rel=1e-4)


# Least squares


def leads_of(num_samples=4000, seed=0):
    """Return twelve leads that depend on four sources and some noise, float64 `(12, num_samples)` in millivolt."""
    generator = np.random.default_rng(seed)
    sources = generator.normal(size=(4, num_samples))
    return 0.3 * generator.normal(size=(12, 4)) @ sources + 0.02 * generator.normal(size=(12, num_samples))


def test_a_hidden_lead_starts_from_its_least_squares_estimate_and_a_seen_one_from_itself():
    leads = leads_of(3 * PATCH_SIZE)
    model = make_model(RECONSTRUCTION, lead_covariance=(leads @ leads.T / leads.shape[1]).tolist())
    order = [8, 0, 6, 11, 1]  # rows in an order of their own, some leads absent
    batch = {"input_values": torch.tensor(leads[order])[None].float(), "lead_ids": torch.tensor(order)[None] + 1}
    batch["bool_masked_pos"] = torch.zeros(1, 5, 3, dtype=torch.bool)
    batch["bool_masked_pos"][0, [0, 3], 1] = True
    estimate = model(**batch).linear_estimate[0].detach().double().numpy()
    seen = [0, 6, 1]
    for row, lead in ((0, 8), (3, 11)):
        weights, *_ = np.linalg.lstsq(leads[seen].T, leads[lead], rcond=None)
        np.testing.assert_allclose(estimate[row, 300:600], weights @ leads[seen][:, 300:600], atol=2e-3)
        np.testing.assert_allclose(estimate[row, :300], leads[lead, :300], atol=1e-6)
    np.testing.assert_allclose(estimate[[1, 2, 4]], leads[seen], atol=1e-6)


def test_leads_that_depend_on_each_other_have_bounded_weights():
    leads = leads_of()
    leads[2], leads[4] = leads[1] - leads[0], leads[0] - leads[1] / 2
    products = torch.tensor(leads @ leads.T / leads.shape[1], dtype=torch.float32)
    seen = torch.ones(12)
    seen[7] = 0
    weights = least_squares_weights(products, seen)
    assert weights.abs().max() < 2 and (weights[:, 7] == 0).all()
    found = weights[7].double().numpy() @ leads
    expected = np.linalg.lstsq(leads[seen.bool().numpy()].T, leads[7], rcond=None)[0] @ leads[seen.bool().numpy()]
    assert np.sqrt(np.mean((found - expected) ** 2)) < 2e-3


def test_without_mean_products_hidden_patches_start_from_zero():
    model, (batch, _) = make_model(RECONSTRUCTION), reconstruction_batch()
    estimate = model(**batch).linear_estimate.view(2, 3, 4, PATCH_SIZE)
    assert (estimate[batch["bool_masked_pos"]] == 0).all() and (estimate[0, 0, 1] != 0).any()


def test_the_waveform_makes_no_step_at_the_edges_of_patches():
    """Samples of a smooth record, of random weights: the jump over an edge is as large as those elsewhere."""
    batch = make_batch(4, 6, 6)
    batch["input_values"] = nn.functional.avg_pool1d(batch["input_values"], 31, stride=1, padding=15) * 5
    batch["bool_masked_pos"] = torch.zeros(4, 6, 6, dtype=torch.bool)
    batch["bool_masked_pos"][:, 3:] = True
    jumps = run(RECONSTRUCTION, make_model(RECONSTRUCTION), batch)[:, 3:].diff(dim=-1).abs()
    at_edges = torch.zeros(jumps.shape[-1], dtype=torch.bool)
    at_edges[PATCH_SIZE - 1 :: PATCH_SIZE] = True
    assert jumps[..., at_edges].mean() < 1.3 * jumps[..., ~at_edges].mean()


def test_labels_of_another_length_are_an_error():
    with pytest.raises((ValueError, RuntimeError)):
        make_model(RECONSTRUCTION)(**make_batch(2, 3, 3), labels=torch.zeros(2, 3, 600))


def test_a_head_shares_nothing_with_a_second_one_on_the_same_backbone(tmp_path):
    make_model(BACKBONE).save_pretrained(tmp_path)
    first, second = (AnyECGForSequenceClassification.from_pretrained(tmp_path, num_labels=2) for _ in range(2))
    with torch.no_grad():
        first.anyecg.embeddings.mask_token.add_(1)
    assert not torch.equal(first.anyecg.embeddings.mask_token, second.anyecg.embeddings.mask_token)
