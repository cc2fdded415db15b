"""The attention pattern against a definition in plain loops, as mask and as what the model really does."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import BACKBONE, PATCH_SIZE, make_batch, make_model

from anyecg_hf.cardio_sparse_attention import cardio_sparse_mask, cardio_sparse_pattern
from anyecg_hf.configuration_anyecg import AnyECGSparseAttentionConfig


def may_attend(query, key, *, time_tolerance, lead_window):
    """The definition for one pair of grid tokens `(lead, patch)`."""
    (query_lead, query_patch), (key_lead, key_patch) = query, key
    steps = abs(query_patch - key_patch)
    in_row = query_lead == key_lead and (lead_window is None or steps <= lead_window)
    in_column = steps <= time_tolerance
    return in_row or in_column


def brute_force(num_leads, num_patches, *, num_global_tokens=0, valid=None, **pattern):
    """Return the mask as nested lists of bool: global tokens first, then leads one after another, patches in each."""
    tokens = [None] * num_global_tokens + list(itertools.product(range(num_leads), range(num_patches)))
    mask = []
    for i, query in enumerate(tokens):
        row = []
        for key in tokens:
            if query is None or key is None:
                allowed = True
            else:
                allowed = may_attend(query, key, **pattern)
            if valid is not None and key is not None and not valid[key[0]][key[1]]:
                allowed = False
            row.append(allowed)
        if not any(row):  # the softmax needs a key; the output is set to zero
            row[i] = True
        mask.append(row)
    return mask


def sparse_config(time_tolerance=0, lead_window=None, num_global_tokens=0):
    return AnyECGSparseAttentionConfig(
        time_tolerance=time_tolerance, lead_window=lead_window, num_global_tokens=num_global_tokens
    )


patterns = st.fixed_dictionaries(
    {
        "time_tolerance": st.integers(0, 2),
        "lead_window": st.none() | st.integers(0, 4),
        "num_global_tokens": st.integers(0, 3),
    }
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 6), patterns)
def test_the_pattern_is_that_of_the_definition(num_leads, num_patches, pattern):
    found = cardio_sparse_pattern(num_leads, num_patches, sparse_config(**pattern))
    assert found.dtype == torch.bool
    assert found.tolist() == brute_force(num_leads, num_patches, **pattern)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 5), patterns, st.integers(0, 2**16))
def test_with_padding_the_mask_is_that_of_the_definition(num_leads, num_patches, pattern, seed):
    valid = torch.rand(2, num_leads, num_patches, generator=torch.Generator().manual_seed(seed)) < 0.6
    found = cardio_sparse_mask(valid, sparse_config(**pattern), implementation="sdpa", dtype=torch.float32)
    for i in range(2):
        assert found[i, 0].tolist() == brute_force(num_leads, num_patches, valid=valid[i].tolist(), **pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_additive_mask_of_eager_says_the_same_as_the_boolean_one(dtype):
    valid = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    config = sparse_config(time_tolerance=1, num_global_tokens=2)
    boolean = cardio_sparse_mask(valid, config, implementation="sdpa", dtype=dtype)
    additive = cardio_sparse_mask(valid, config, implementation="eager", dtype=dtype)
    assert additive.dtype == dtype and additive.shape == boolean.shape == (2, 1, 14, 14)
    assert torch.equal(additive == 0, boolean)
    assert (additive[~boolean] == torch.finfo(dtype).min).all()  # not -inf: a row of -inf is NaN in a softmax


def test_no_row_of_the_mask_is_empty_when_everything_is_masked():
    mask = cardio_sparse_mask(torch.zeros(1, 2, 3).bool(), sparse_config(), implementation="sdpa", dtype=torch.float32)
    assert mask[0, 0].any(-1).all()


@pytest.mark.parametrize("time_tolerance, keys", [(0, 71), (1, 93)])
def test_twelve_leads_of_a_minute_have_as_many_keys_as_the_paper_counts(time_tolerance, keys):
    pattern = cardio_sparse_pattern(12, 60, sparse_config(time_tolerance))
    assert pattern.sum(-1).max() == keys


# What the model does


def attentive_model(**pattern):
    """One layer whose stem keeps to the patch: only the attention can carry anything from one token to another."""
    return make_model(
        BACKBONE,
        attn_implementation="eager",
        num_hidden_layers=1,
        stem_scope="patch",
        sparse_attention_config=pattern,
    )


PATTERNS = [
    {"time_tolerance": 0},
    {"time_tolerance": 1},
    {"time_tolerance": 2, "lead_window": 3},
    {"time_tolerance": 0, "lead_window": 0},
    {"time_tolerance": 1, "lead_window": 2, "num_global_tokens": 2},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_attention_weights_are_zero_off_the_pattern_and_positive_on_it(pattern):
    batch = make_batch(2, 3, 5)
    batch["attention_mask"][1, 0, 2] = 0
    batch["attention_mask"][1, :, 4] = 0
    weights = attentive_model(**pattern)(**batch, output_attentions=True).attentions[0]
    options = {"lead_window": None, **pattern}
    for i in range(2):
        allowed = torch.tensor(brute_force(3, 5, valid=batch["attention_mask"][i].bool().tolist(), **options))
        assert (weights[i][:, ~allowed] == 0).all()
        assert (weights[i][:, allowed] > 0).all()


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=str)
def test_a_token_depends_on_exactly_the_patches_of_the_pattern(pattern):
    """By the gradient of each token's state with respect to the samples: independent of masks and weights."""
    model, batch = attentive_model(**pattern), make_batch(1, 3, 4)
    signal = batch["input_values"].requires_grad_()
    states = model(**batch).last_hidden_state.flatten(1, 2)[0]  # (N, D)
    depends = []
    for state in states:
        (gradient,) = torch.autograd.grad(state.square().sum(), signal, retain_graph=True)
        depends.append((gradient.view(12, PATCH_SIZE) != 0).any(-1).tolist())
    assert depends == brute_force(3, 4, **{"lead_window": None, **pattern})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_output_is_the_formula_of_the_paper(attention):
    """softmax((Q K^T + M) / sqrt(d)) V in float64, in loops over heads, on the layer's own queries, keys and values."""
    model = attentive_model(time_tolerance=1)
    model.set_attn_implementation(attention)
    layer, batch = model.encoder.layers[0].attention, make_batch(1, 3, 4)
    seen = record_inputs_and_output(layer)
    model(**batch)
    x, found = seen["input"][0], seen["output"]  # (N, D)
    attended = []
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        query = layer.query_norm(x @ layer.query.weight.T[:, part]).double()
        key = layer.key_norm(x @ layer.key.weight.T[:, part]).double()
        value = (x @ layer.value.weight.T[:, part]).double()
        mask = torch.tensor(brute_force(3, 4, time_tolerance=1, lead_window=None))
        scores = (query @ key.T / math.sqrt(16)).masked_fill(~mask, -math.inf)
        attended.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ value)
    expected = torch.cat(attended, -1) @ layer.output.weight.double().T + layer.output.bias.double()
    torch.testing.assert_close(found[0].double(), expected, atol=1e-4, rtol=1e-4)


def record_inputs_and_output(module):
    seen = {}

    def keep(_, inputs, output):
        seen["input"], seen["output"] = inputs[0].detach(), output[0].detach()

    module.register_forward_hook(keep)
    return seen


def test_global_tokens_carry_information_across_the_grid():
    """Two layers, no window over time and no tolerance reach everything only by way of the global tokens."""
    options = {"time_tolerance": 0, "lead_window": 0}
    for num_global_tokens, reached in ((0, False), (1, True)):
        model = make_model(
            BACKBONE, stem_scope="patch", sparse_attention_config={**options, "num_global_tokens": num_global_tokens}
        )
        batch = make_batch(1, 2, 4)
        signal = batch["input_values"].requires_grad_()
        state = model(**batch).last_hidden_state[0, 0, 0]
        (gradient,) = torch.autograd.grad(state.square().sum(), signal)
        assert (gradient.view(2, 4, PATCH_SIZE)[1, 3] != 0).any() == reached


def test_global_tokens_are_given_apart_and_only_where_there_are_any():
    with_them = make_model(BACKBONE, sparse_attention_config={"num_global_tokens": 2})(**make_batch(2, 3, 4))
    assert with_them.global_hidden_state.shape == (2, 2, 32)
    assert with_them.last_hidden_state.shape == (2, 3, 4, 32)
    assert make_model(BACKBONE)(**make_batch()).global_hidden_state is None
