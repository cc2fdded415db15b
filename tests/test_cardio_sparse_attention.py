"""The attention pattern against a definition in plain loops, as mask and as what the model really does."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import BACKBONE, PATCH_SIZE, make_batch, make_model
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from anyecg_hf import cardio_sparse_attention, cardio_sparse_kernels
from anyecg_hf.cardio_sparse_attention import (
    cardio_sparse_mask,
    cardio_sparse_pattern,
    choose_route,
    make_plan,
    queries_without_keys,
)
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
    for query in tokens:
        row = []
        for key in tokens:
            if query is None or key is None:
                allowed = True
            else:
                allowed = may_attend(query, key, **pattern)
            if valid is not None and key is not None and not valid[key[0]][key[1]]:
                allowed = False
            row.append(allowed)
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


masked_grids = given(st.integers(1, 4), st.integers(1, 5), patterns, st.integers(0, 2**16), st.sampled_from([0.1, 0.6]))


def some_valid(num_leads, num_patches, seed=0, share=0.6):
    return torch.rand(2, num_leads, num_patches, generator=torch.Generator().manual_seed(seed)) < share


@settings(max_examples=60, deadline=None, derandomize=True)
@masked_grids
def test_with_padding_the_mask_is_that_of_the_definition(num_leads, num_patches, pattern, seed, share):
    """Where the definition leaves a query no key, the mask has itself: an empty row is NaN in a softmax."""
    valid = some_valid(num_leads, num_patches, seed, share)
    found = cardio_sparse_mask(valid, sparse_config(**pattern), implementation="sdpa", dtype=torch.float32)
    for i in range(2):
        expected = torch.tensor(brute_force(num_leads, num_patches, valid=valid[i].tolist(), **pattern))
        assert torch.equal(found[i, 0], expected | torch.diag(~expected.any(-1)))


@settings(max_examples=60, deadline=None, derandomize=True)
@masked_grids
def test_queries_without_keys_are_those_of_the_definition(num_leads, num_patches, pattern, seed, share):
    valid = some_valid(num_leads, num_patches, seed, share)
    found = queries_without_keys(valid, sparse_config(**pattern))
    for i in range(2):
        expected = torch.tensor(brute_force(num_leads, num_patches, valid=valid[i].tolist(), **pattern))
        assert torch.equal(found[i], ~expected.any(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "cardio_sparse"])
def test_the_additive_mask_says_the_same_as_the_boolean_one(implementation, dtype):
    valid, config = some_valid(3, 4), sparse_config(time_tolerance=1, num_global_tokens=2)
    boolean = cardio_sparse_mask(valid, config, implementation="sdpa", dtype=dtype)
    additive = cardio_sparse_mask(valid, config, implementation=implementation, dtype=dtype)
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


@pytest.fixture(params=["eager", "sdpa", "cardio_sparse", "sparse route"])
def attention(request, monkeypatch):
    """An implementation; "sparse route" is the default without regard to grids for which it does not pay."""
    if request.param != "sparse route":
        return request.param
    monkeypatch.setattr(cardio_sparse_attention, "_GAIN_NEEDED", 0)
    return "cardio_sparse"


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
        with_keys = allowed.any(-1, keepdim=True)
        assert (weights[i][:, ~allowed & with_keys] == 0).all()
        assert (weights[i][:, allowed] > 0).all()


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=str)
def test_a_token_depends_on_exactly_the_patches_of_the_pattern(pattern, attention):
    """By the gradient of each token's state with respect to the samples: independent of masks and weights."""
    model, batch = attentive_model(**pattern), make_batch(1, 3, 4)
    model.set_attn_implementation(attention)
    signal = batch["input_values"].requires_grad_()
    states = model(**batch).last_hidden_state.flatten(1, 2)[0]  # (N, D)
    depends = []
    for state in states:
        (gradient,) = torch.autograd.grad(state.square().sum(), signal, retain_graph=True)
        depends.append((gradient.view(12, PATCH_SIZE) != 0).any(-1).tolist())
    assert depends == brute_force(3, 4, **{"lead_window": None, **pattern})


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


# Routes


def test_the_route_follows_the_grid():
    assert choose_route(12, 4, sparse_config()).name == "dense"
    assert choose_route(12, 10, sparse_config()).name == "rows_and_columns"
    assert choose_route(12, 60, sparse_config()).name == "rows_and_columns"
    assert choose_route(12, 300, sparse_config(time_tolerance=1)).name == "rows_and_columns"
    assert choose_route(12, 300, sparse_config(lead_window=10)).name == "windows"
    assert choose_route(2, 5000, sparse_config(num_global_tokens=1, lead_window=60)).name == "windows"


@pytest.mark.parametrize("grid", [(1, 10), (1, 100), (1, 5000), (1, 1), (12, 1), (15, 1)], ids=str)
def test_a_single_lead_or_patch_whose_pattern_is_everything_is_dense(grid):
    assert choose_route(*grid, sparse_config()).name == "dense"


def test_a_single_long_lead_with_a_window_is_not_dense():
    assert choose_route(1, 5000, sparse_config(lead_window=60)).name == "windows"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_implementation_is_dense_whatever_the_grid(implementation):
    route = choose_route(12, 300, sparse_config(lead_window=10), implementation=implementation)
    assert route.name == "dense" and implementation in route.reason


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 15), st.integers(1, 5000), patterns)
def test_the_route_says_why_with_the_number_of_tokens(num_leads, num_patches, pattern):
    config = sparse_config(**pattern)
    route = choose_route(num_leads, num_patches, config)
    assert route.name in ("dense", "rows_and_columns", "windows")
    assert str(config.num_global_tokens + num_leads * num_patches) in route.reason
    assert choose_route(num_leads, num_patches, config) == route


def test_no_clock_has_a_say_in_the_route(monkeypatch):
    def refuse():
        raise AssertionError("a clock was read")

    for name in ("time", "perf_counter", "monotonic", "process_time", "perf_counter_ns", "time_ns"):
        monkeypatch.setattr(f"time.{name}", refuse)
    assert choose_route(12, 60, sparse_config()).name == "rows_and_columns"


def test_a_grid_that_is_not_known_yet_takes_a_route_that_is_right_for_all():
    size = ShapeEnv().create_unbacked_symint()
    for grid in ((12, size), (size, 60), (size, size)):
        route = choose_route(*grid, sparse_config(lead_window=3))
        assert route.name == "rows_and_columns" and route.reason


def test_a_plan_has_no_mask_where_nothing_is_masked():
    plan = make_plan(torch.ones(2, 12, 60).bool(), sparse_config(), implementation="cardio_sparse", dtype=torch.float32)
    assert plan.route.name == "rows_and_columns" and plan.mask is None and plan.empty_queries is None


def test_the_mask_of_a_sparse_plan_grows_with_the_tokens_and_not_with_their_pairs():
    valid = torch.ones(2, 12, 60).bool()
    valid[1, 3] = False
    config = sparse_config(num_global_tokens=2)
    plan = make_plan(valid, config, implementation="cardio_sparse", dtype=torch.float32)
    assert plan.mask.shape == (2, 722) and plan.mask.sum() == 2 * 722 - 60


# One layer and the encoder on every route

ROUTES = {"dense": (3, 4, {}), "rows_and_columns": (12, 60, {}), "windows": (3, 150, {"lead_window": 2})}

every_implementation = pytest.mark.parametrize("implementation", ["eager", "sdpa", "cardio_sparse"])
every_route = pytest.mark.parametrize("route", ROUTES)


def make_encoder(route="rows_and_columns", num_global_tokens=0, **options):
    """Return an encoder with weights of order one whose pattern is that of the route."""
    pattern = {**ROUTES[route][2], "num_global_tokens": num_global_tokens}
    return make_model(BACKBONE, sparse_attention_config=pattern, **{"num_hidden_layers": 1, **options}).encoder


def make_grid(route="rows_and_columns", batch_size=2):
    return random_grid(*ROUTES[route][:2], batch_size=batch_size)


def random_grid(num_leads, num_patches, batch_size=2):
    """Return states `(B, L, P, 32)` and a ragged mask: one lead absent, one record short, single patches missing."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(batch_size, num_leads, num_patches, 32, generator=generator)
    valid = torch.rand(batch_size, num_leads, num_patches, generator=generator) < 0.8
    valid[0, -1] = False
    valid[-1, :, 1 + num_patches // 2 :] = False
    return grid, valid


def states_and_gradients(encoder, grid, valid):
    """Return the states, and the gradients of the grid and of all parameters."""
    encoder.zero_grad(set_to_none=True)
    grid = grid.clone().requires_grad_()
    states = encoder(grid, valid).last_hidden_state
    (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return [states.detach(), grid.grad, *(parameter.grad for parameter in encoder.parameters())]


def attend(encoder, grid, valid):
    """Return the output of the first layer's attention, `(B, N, 32)`."""
    config, states = encoder.config, grid.flatten(1, 2)
    if encoder.num_global:
        states = torch.cat([encoder.global_tokens.expand(len(grid), -1, -1), states], 1)
    plan = make_plan(
        valid,
        config.sparse_attention_config,
        implementation=config._attn_implementation,
        dtype=states.dtype,
        dropout=config.attention_dropout if encoder.training else 0.0,
    )
    return encoder.layers[0].attention(states, plan)[0]


def assert_all_close(found, expected, tolerance=1e-5):
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, atol=tolerance * max(right.abs().max().item(), 1), rtol=0)


@pytest.fixture
def calls(monkeypatch):
    """Return a list that gets the name of each run of the operator's two passes: it tells the sparse route."""
    found = []
    for name in ("forward", "backward"):
        function = getattr(cardio_sparse_kernels, name)
        spy = lambda *args, name=name, function=function: found.append(name) or function(*args)  # noqa: E731
        monkeypatch.setattr(cardio_sparse_kernels, name, spy)
    return found


@pytest.mark.parametrize("num_global_tokens", [0, 2])
@every_route
def test_all_implementations_agree_in_states_and_gradients(route, num_global_tokens, calls):
    found = {}
    for implementation in ("eager", "sdpa", "cardio_sparse"):
        encoder = make_encoder(route, num_global_tokens, num_hidden_layers=2, attn_implementation=implementation)
        grid, valid = make_grid(route)
        found[implementation] = states_and_gradients(encoder.double(), grid.double(), valid)
    assert len(calls) == (0 if route == "dense" else 4)
    assert_all_close(found["sdpa"], found["eager"], tolerance=1e-10)
    assert_all_close(found["cardio_sparse"], found["eager"], tolerance=1e-10)


@pytest.mark.parametrize("num_global_tokens", [0, 1])
@every_route
def test_all_implementations_agree_at_padded_queries_too(route, num_global_tokens):
    eager, *others = (
        attend(make_encoder(route, num_global_tokens, attn_implementation=implementation), *make_grid(route))
        for implementation in ("eager", "sdpa", "cardio_sparse")
    )
    assert_all_close(others, [eager, eager])


@every_implementation
@every_route
def test_a_query_without_any_key_gives_zeros_and_sends_no_gradient(route, implementation):
    """Its zeros go through the output projection: what comes out is the projection's bias."""
    encoder, (grid, valid) = make_encoder(route, attn_implementation=implementation), make_grid(route)
    valid[0] = False
    attended = attend(encoder, grid.requires_grad_(), valid)[0]
    assert (attended == encoder.layers[0].attention.output.bias).all()
    (gradient,) = torch.autograd.grad(attended.square().sum(), grid)
    assert (gradient == 0).all()


@every_implementation
@every_route
def test_a_token_that_is_absent_is_nobodys_key_not_even_its_own(route, implementation):
    encoder, (grid, valid) = make_encoder(route, attn_implementation=implementation), make_grid(route)
    expected = attend(encoder, grid, valid)
    spoilt = torch.where(valid[..., None], grid, 7.0).flatten(1, 2)
    for projection in (encoder.layers[0].attention.key, encoder.layers[0].attention.value):
        projection.register_forward_pre_hook(lambda *_: (spoilt,))
    assert torch.equal(attend(encoder, grid, valid), expected)


def test_other_code_that_registers_the_name_does_not_take_over():
    """A checkpoint's own copy of this code registers the same name in the same process."""
    encoder, grid = make_encoder(), make_grid()
    expected = encoder(*grid).last_hidden_state
    AttentionInterface.register("cardio_sparse", lambda *_, **__: 1 / 0)
    try:
        assert torch.equal(encoder(*grid).last_hidden_state, expected)
    finally:
        AttentionInterface.register("cardio_sparse", cardio_sparse_attention.cardio_sparse_attention_forward)


# Dropout


def test_dropout_in_training_takes_the_dense_route_and_evaluation_the_sparse_one(calls):
    encoder, grid = make_encoder(attention_dropout=0.5), make_grid()
    expected = make_encoder()(*grid).last_hidden_state
    assert torch.equal(encoder(*grid).last_hidden_state, expected) and len(calls) == 2
    assert not torch.equal(encoder.train()(*grid).last_hidden_state, expected) and len(calls) == 2
    assert torch.equal(encoder.eval()(*grid).last_hidden_state, expected) and len(calls) == 3


@every_implementation
def test_dropout_is_right_on_average(implementation):
    encoder, (grid, valid) = (
        make_encoder("dense", attention_dropout=0.4, attn_implementation=implementation),
        make_grid("dense"),
    )
    with torch.no_grad():
        expected = attend(encoder, grid, valid)
        torch.manual_seed(0)
        draws = attend(encoder.train(), grid.repeat(2000, 1, 1, 1), valid.repeat(2000, 1, 1)).unflatten(0, (2000, 2))
    assert draws.std(0).max() > 0.1
    errors = (draws.mean(0) - expected).abs() / (draws.std(0) / 2000**0.5).clamp(min=1e-6)
    assert errors.max() < 5 and errors.mean() < 1.2


def test_dropout_on_too_many_tokens_is_an_error_that_says_the_remedy(monkeypatch):
    with pytest.raises(ValueError, match="attention_dropout is 0.1.*16385 tokens.*Set attention_dropout to 0"):
        choose_route(1, 2**14, sparse_config(num_global_tokens=1), dropout=0.1)
    assert choose_route(1, 2**14, sparse_config(), dropout=0.1).name == "dense"
    monkeypatch.setattr(cardio_sparse_attention, "_MOST_DENSE_TOKENS", 8)
    model, batch = make_model(BACKBONE, attention_dropout=0.1), make_batch(1, 3, 3)
    model(**batch)
    with pytest.raises(ValueError, match="attention_dropout"):
        model.train()(**batch)


# Compiling, exporting, checkpointing, lower precision


@pytest.fixture
def compiled():
    """Return a function that compiles an encoder without a C++ compiler."""
    torch._dynamo.reset()
    yield lambda encoder, **options: torch.compile(encoder, backend="aot_eager", fullgraph=True, **options)
    torch._dynamo.reset()


@pytest.mark.parametrize("route", ["rows_and_columns", "windows"])
def test_a_compiled_encoder_gives_the_same_states_and_gradients(route, calls, compiled):
    """Compiled on a batch without padding, then called with padding: the mask must not have got lost."""
    encoder, (grid, valid) = make_encoder(route, num_global_tokens=1), make_grid(route)
    fast = compiled(encoder, dynamic=False)
    for mask in (torch.ones_like(valid), valid):
        del calls[:]
        found = states_and_gradients(fast, grid, mask)
        assert calls == ["forward", "backward"]
        assert_all_close(found, states_and_gradients(encoder, grid, mask))


def test_an_encoder_compiled_for_any_size_takes_other_sizes_without_compiling_again(compiled):
    """The figures in a route's reason made each size a model of its own."""
    sizes = (3, 40), (2, 50), (5, 44)  # all take windows: another route is another program
    encoder = make_encoder("windows")
    fast = compiled(encoder, dynamic=True)
    states_and_gradients(fast, *random_grid(*sizes[0]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in sizes:
            assert_all_close(*(states_and_gradients(each, *random_grid(*size)) for each in (fast, encoder)))


@every_route
def test_an_encoder_exported_for_one_size_honours_any_mask(route):
    encoder, (grid, valid) = make_encoder(route), make_grid(route)
    exported = torch.export.export(encoder, (grid, torch.ones_like(valid)), strict=False).module()
    for mask in (valid, torch.ones_like(valid), torch.zeros_like(valid)):
        assert_all_close([exported(grid, mask).last_hidden_state], [encoder(grid, mask).last_hidden_state])


@pytest.mark.parametrize("num_global_tokens", [0, 1])
@pytest.mark.parametrize("route", ["rows_and_columns", "windows"])
def test_an_encoder_exported_for_any_size_honours_any_mask(route, num_global_tokens):
    encoder = make_encoder(route, num_global_tokens)
    sizes = {i: torch.export.Dim(name, min=1, max=300) for i, name in enumerate(("records", "leads", "patches"))}
    program = torch.export.export(encoder, random_grid(3, 7), dynamic_shapes=(sizes, sizes), strict=False)
    exported = program.module()
    for batch_size, num_leads, num_patches in ((2, 3, 7), (1, 12, 60), (3, 1, 150), (2, 4, 1), (1, 1, 1)):
        grid, valid = random_grid(num_leads, num_patches, batch_size=batch_size)
        assert_all_close([exported(grid, valid).last_hidden_state], [encoder(grid, valid).last_hidden_state])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_activations_gives_the_same_gradients(use_reentrant, calls):
    encoder, grid = make_encoder(num_hidden_layers=2), make_grid()
    expected = states_and_gradients(encoder, *grid)
    for layer in encoder.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=use_reentrant)
    del calls[:]
    found = states_and_gradients(encoder, *grid)
    assert calls == ["forward", "forward", "forward", "backward", "forward", "backward"]
    assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))


@every_route
def test_autocast_gives_the_type_and_about_the_numbers_of_sdpa(route):
    grid, found = make_grid(route), {}
    for implementation in ("sdpa", "cardio_sparse"):
        encoder = make_encoder(route, attn_implementation=implementation)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[implementation] = attend(encoder, *grid)
        found[implementation].float().square().mean().backward()
        assert all(value.grad.isfinite().all() for value in encoder.layers[0].attention.parameters())
        plain = attend(encoder, *grid)
        assert (found[implementation].float() - plain).square().mean().sqrt() < 0.03 * plain.std()
    assert found["cardio_sparse"].dtype == found["sdpa"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_route
def test_an_encoder_in_half_precision_gives_about_the_same(route, dtype):
    encoder, (grid, valid) = make_encoder(route), make_grid(route)
    expected = attend(encoder, grid, valid)
    found = attend(encoder.to(dtype), grid.to(dtype), valid)
    assert found.dtype == dtype
    assert (found.float() - expected).square().mean().sqrt() < 0.03 * expected.std()


# Around it


@pytest.mark.parametrize("implementation", ["sdpa", "cardio_sparse"])
def test_attention_weights_need_eager(implementation):
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        make_model(BACKBONE, attn_implementation=implementation)(**make_batch(), output_attentions=True)


def test_the_sparse_route_gives_shapes_on_the_meta_device():
    encoder, grid = make_encoder().to("meta"), make_grid()
    assert encoder(*(x.to("meta") for x in grid)).last_hidden_state.shape == grid[0].shape
