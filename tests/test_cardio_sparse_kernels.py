"""The operator of the sparse route against a masked softmax over all pairs in float64, written here a second time."""

import functools
import importlib.util
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyecg_hf import cardio_sparse_kernels as kernels

ROWS_BY = {
    "joint softmax": {"_MOST_SHORT_KEYS": 10**9},
    "the kernel of the CPU": {"_MOST_SHORT_KEYS": 0},
    "the kernel of any device": {"_MOST_SHORT_KEYS": 0, "row_kernel": lambda _: kernels.Products},
}
BLOCKS = {
    "usual": {},
    "middle": {"_CPU_BLOCK": 6000, "_WINDOW_QUERIES": 16, "_LONG_TOKENS": 200, "_FEW_LEADS": 4, "_SUMMED_TOKENS": 50},
    "small": {"_CPU_BLOCK": 500, "_WINDOW_QUERIES": 5, "_LONG_TOKENS": 8, "_FEW_LEADS": 0, "_SUMMED_TOKENS": 3},
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

rows_by = pytest.mark.parametrize("rows", ROWS_BY)
in_blocks = pytest.mark.parametrize("blocks", BLOCKS)


class Case(NamedTuple):
    num_leads: int
    num_patches: int
    num_global: int = 0
    time_tolerance: int = 0
    lead_window: int | None = None
    masked: str = "nothing"
    batch_size: int = 2
    num_heads: int = 2
    head_dim: int = 4
    seed: int = 0

    @property
    def num_tokens(self):
        return self.num_global + self.num_leads * self.num_patches

    @property
    def settings(self):
        return {
            "num_leads": self.num_leads,
            "num_global": self.num_global,
            "time_tolerance": self.time_tolerance,
            "lead_window": self.lead_window,
            "scale": self.head_dim**-0.5,
        }

    @property
    def grid(self):
        sizes = (self.batch_size, self.num_global, self.num_leads, self.num_patches, self.num_heads, self.head_dim)
        return kernels.Grid(*sizes, self.time_tolerance, self.lead_window)

    def inputs(self, dtype=torch.float64, size=1.0):
        """Return unit-normal `(q, k, v, gradient of the output)`; `size` makes the scores larger."""
        shape = (4, self.batch_size, self.num_tokens, self.num_heads, self.head_dim)
        q, k, v, grad = torch.randn(shape, generator=self.generator(), dtype=torch.float64).to(dtype)
        return q * size, k, v, grad

    def generator(self):
        return torch.Generator().manual_seed(self.seed)

    def key_mask(self):
        """Return `(B, N)` bool, True = may be attended, or None."""
        if self.masked == "nothing":
            return None
        shape = (self.batch_size, self.num_leads, self.num_patches)
        chance, some = torch.rand(shape, generator=self.generator()), torch.ones(shape, dtype=torch.bool)
        if self.masked == "some":
            some = chance < 0.7
        elif self.masked == "most":
            some = chance < 0.1
        elif self.masked == "leads":
            some = (chance[..., :1] < 0.6).expand(shape)
        elif self.masked == "a record":
            some[0] = False
        elif self.masked == "the ends":
            some = torch.arange(self.num_patches) < 1 + self.num_patches * chance[..., :1]
        return pad(some.flatten(1), (self.num_global, 0), value=True)


@st.composite
def cases(draw, most_tokens=320):
    num_patches = draw(st.sampled_from([1, 2, 3, 17, 150]) | st.integers(1, 150))
    return Case(
        num_leads=draw(st.integers(1, min(15, max(1, most_tokens // num_patches)))),
        num_patches=num_patches,
        num_global=draw(st.integers(0, 2)),
        time_tolerance=draw(st.integers(0, 3)),
        lead_window=draw(st.sampled_from([None, 0, 1, 3, 10, 60])),
        masked=draw(st.sampled_from(["nothing", "some", "most", "leads", "a record", "the ends"])),
        num_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([2, 4, 7])),
        seed=draw(st.integers(0, 2**16)),
    )


# The definition


def allowed_pairs(case, key_mask):
    """Return `(B, N, N)` bool, True = row attends to column: query by query, from the definition in words."""
    num_leads, num_patches, first = case.num_leads, case.num_patches, case.num_global
    allowed = np.zeros((case.num_tokens, case.num_tokens), dtype=bool)
    allowed[:first, :] = allowed[:, :first] = True
    reach = num_patches if case.lead_window is None else case.lead_window
    for query, query_lead, time in zip(
        range(first, case.num_tokens), np.repeat(range(num_leads), num_patches), np.tile(range(num_patches), num_leads)
    ):
        for lead in range(num_leads):
            steps = max(reach, case.time_tolerance) if lead == query_lead else case.time_tolerance
            start = first + lead * num_patches
            allowed[query, start + max(0, time - steps) : start + min(num_patches, time + steps + 1)] = True
    allowed = torch.from_numpy(allowed).expand(case.batch_size, -1, -1)
    return allowed if key_mask is None else allowed & key_mask[:, None, :]


def over_all_pairs(q, k, v, allowed, scale):
    """Softmax over the allowed keys `(B, N, H, D)`; zero where there are none."""
    allowed = allowed[:, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores - scores.detach().masked_fill(~allowed, -1e300).amax(-1, keepdim=True)
    weights = torch.where(allowed, scores, 0).exp() * allowed
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def value_and_gradients(function, q, k, v, grad):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = function(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def of_the_operator(case, q, k, v, grad, operator=kernels.sparse_attention):
    """Return `[output, gradients of q, k, v]`; queries without keys are set to zero, as the model does."""
    key_mask = case.key_mask()
    empty = ~allowed_pairs(case, key_mask).any(-1)[..., None, None]
    attend = lambda q, k, v: operator(q, k, v, key_mask, **case.settings).masked_fill(empty, 0)  # noqa: E731
    return value_and_gradients(attend, q, k, v, grad)


def of_the_definition(case, *inputs):
    allowed = allowed_pairs(case, case.key_mask())
    attend = lambda q, k, v: over_all_pairs(q, k, v, allowed, case.head_dim**-0.5)  # noqa: E731
    return value_and_gradients(attend, *(x.double() for x in inputs))


def assert_as_defined(case, dtype=torch.float64, tolerance=None, size=1.0, **options):
    inputs = case.inputs(dtype, size)
    found, expected = of_the_operator(case, *inputs, **options), of_the_definition(case, *inputs)
    for name, mine, right in zip(("output", "of q", "of k", "of v"), found, expected):
        assert mine.dtype == dtype and mine.shape == right.shape, name
        error, most = (mine.double() - right).abs().max().item(), max(right.abs().max().item(), 1)  # 1: of the input
        assert error <= (tolerance or TOLERANCES[dtype]) * most, f"{name}: {error:.2g} of {most:.2g}"


@pytest.fixture
def constants(monkeypatch):
    """Return a function that sets module constants of the kernels for this test."""

    def set_all(*groups):
        for name, value in {name: value for group in groups for name, value in group.items()}.items():
            monkeypatch.setattr(kernels, name, value)

    return set_all


@pytest.fixture
def engine(rows, blocks, constants):
    constants(ROWS_BY[rows], BLOCKS[blocks])


# Values and gradients


@in_blocks
@rows_by
def test_values_and_gradients_are_those_of_the_definition(engine):
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(cases())
    def check(case):
        assert_as_defined(case)

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocks", ["usual", "middle"])
@rows_by
def test_lower_precision_is_as_exact_as_it_can_be(engine, dtype):
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(cases())
    def check(case):
        assert_as_defined(case, dtype)

    check()


EDGES = [
    Case(1, 150),
    Case(1, 150, lead_window=3),
    Case(1, 1),
    Case(15, 1, time_tolerance=3),
    Case(15, 1, num_global=2, lead_window=0),
    Case(12, 2, time_tolerance=3, lead_window=1),
    Case(3, 140, time_tolerance=2, lead_window=60, masked="leads"),
    Case(2, 150, lead_window=10, masked="most"),
    Case(2, 5, masked="a record", lead_window=1),
    Case(3, 4, time_tolerance=3, lead_window=3, num_global=1, masked="some"),
]


@pytest.mark.parametrize("case", EDGES, ids=str)
@in_blocks
@rows_by
def test_grids_of_extreme_shape_are_no_exception(case, engine):
    assert_as_defined(case)
    assert_as_defined(case, torch.float32)


@pytest.mark.parametrize("case", [Case(4, 40, 1, 1, 10, "some", head_dim=16), Case(12, 20, head_dim=64)], ids=str)
@in_blocks
@rows_by
def test_large_logits_keep_float32_accuracy(case, engine):
    assert_as_defined(case, torch.float32, tolerance=1e-5, size=16)


@in_blocks
@rows_by
@pytest.mark.parametrize("masked", ["a record", "most", "leads"])
def test_no_mask_makes_a_gradient_nan_even_where_queries_have_no_key(engine, masked):
    """Straight from the operator, whose output at such queries is of no use but finite; so is what it sends back."""
    case = Case(3, 9, 0, 1, 2, masked)
    q, k, v, grad = case.inputs(torch.float32)
    operator = lambda q, k, v: kernels.sparse_attention(q, k, v, case.key_mask(), **case.settings)  # noqa: E731
    assert all(x.isfinite().all() for x in value_and_gradients(operator, q, k, v, grad))


@rows_by
@pytest.mark.parametrize("blocks", ["small"])
@pytest.mark.parametrize("case", [Case(2, 3, 1, 1, 2, "some", 1, 1, 2), Case(3, 4, 0, 0, 1, "most", 1, 1, 2)], ids=str)
def test_gradients_are_those_of_finite_differences(case, engine):
    key_mask = case.key_mask()
    empty = ~allowed_pairs(case, key_mask).any(-1)[..., None, None]
    inputs = [x.requires_grad_() for x in case.inputs()[:3]]
    operator = lambda *qkv: kernels.sparse_attention(*qkv, key_mask, **case.settings).masked_fill(empty, 0)  # noqa: E731
    assert torch.autograd.gradcheck(operator, inputs)


@rows_by
@pytest.mark.parametrize("blocks", ["middle"])
def test_masked_keys_have_no_influence_and_get_no_gradient(engine):
    case = Case(3, 20, 1, 1, 5, "some")
    q, k, v, grad = case.inputs()
    masked = ~case.key_mask()[..., None, None]
    found = of_the_operator(case, q, k, v, grad)
    other = of_the_operator(case, q, k.masked_fill(masked, 1e4), v.masked_fill(masked, -1e4), grad)
    for first, second in zip(found, other):
        torch.testing.assert_close(first, second, atol=1e-12, rtol=0)
    assert (other[2][masked.expand_as(k)] == 0).all() and (other[3][masked.expand_as(v)] == 0).all()


@rows_by
@pytest.mark.parametrize("blocks", ["middle"])
@pytest.mark.parametrize("num_global", [0, 1])
def test_any_layout_of_memory_gives_the_same(engine, num_global):
    case = Case(3, 20, num_global, 1, 5, "some")
    inputs = case.inputs()
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not strided[0].is_contiguous()
    for found, expected in zip(of_the_operator(case, *strided), of_the_operator(case, *inputs)):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@rows_by
@pytest.mark.parametrize("blocks", ["usual"])
def test_a_gradient_that_is_one_number_everywhere_is_taken(engine):
    case = Case(3, 7)
    *qkv, grad = case.inputs()
    expanded = torch.ones(()).double().expand(grad.shape)
    found, expected = of_the_operator(case, *qkv, expanded), of_the_operator(case, *qkv, expanded.contiguous())
    assert all(torch.equal(first, second) for first, second in zip(found, expected))


@rows_by
@pytest.mark.parametrize("blocks", ["usual"])
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_of_the_three_may_want_its_gradient_alone(engine, wanted):
    case = Case(3, 7, 1)
    *qkv, grad = case.inputs()
    expected = of_the_operator(case, *qkv, grad)[1 + wanted]
    qkv[wanted].requires_grad_()
    kernels.sparse_attention(*qkv, None, **case.settings).backward(grad)
    assert torch.equal(qkv[wanted].grad, expected)
    assert [x.grad is None for x in qkv].count(False) == 1


def test_the_same_input_gives_the_same_bits():
    case = Case(12, 60, masked="some")
    first, second = (of_the_operator(case, *case.inputs(torch.float32)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@rows_by
@pytest.mark.parametrize("blocks", ["usual"])
def test_inputs_are_left_as_they_were(engine):
    case = Case(3, 20, 1, 1, 5, "some")
    inputs, key_mask = case.inputs(), case.key_mask()
    before = [x.clone() for x in (*inputs, key_mask)]
    qkv = [x.requires_grad_() for x in inputs[:3]]
    kernels.sparse_attention(*qkv, key_mask, **case.settings).backward(inputs[3])
    assert all(torch.equal(x, y) for x, y in zip((*inputs, key_mask), before))


def test_a_second_derivative_is_an_error_and_not_a_wrong_number():
    case = Case(2, 3)
    qkv = [x.requires_grad_() for x in case.inputs()[:3]]
    out = kernels.sparse_attention(*qkv, None, **case.settings)
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


# Blocks


@pytest.mark.parametrize("device", ["cpu", "cuda", "another"])
@in_blocks
@rows_by
def test_each_query_is_in_one_block_whose_keys_hold_its_window(engine, device):
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(cases())
    def check(case):
        grid, seen = case.grid, np.zeros((case.batch_size, case.num_leads, case.num_patches), dtype=int)
        for block in kernels.row_blocks(grid, device):
            seen[block.samples, block.leads, block.queries] += 1
            if grid.has_rows:
                reach = case.num_patches if case.lead_window is None else case.lead_window
                assert block.keys.start <= max(0, block.queries.start - reach)
                assert block.keys.stop >= min(case.num_patches, block.queries.stop + reach)
            else:
                assert block.keys == slice(0, 0)
                assert kernels.has_short_rows(grid, device)  # the kernel of the CPU does not survive zero keys
        assert (seen == 1).all()

    check()


@in_blocks
def test_each_column_is_in_one_block_where_it_has_keys(blocks, constants):
    constants(BLOCKS[blocks])

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(cases())
    def check(case):
        seen = np.zeros((case.batch_size, case.num_patches), dtype=int)
        for samples, times in kernels.column_blocks(case.grid, "cpu"):
            seen[samples, times] += 1
        assert (seen == (0 if case.num_leads == 1 and case.grid.has_rows else 1)).all()

    check()


# Memory


class Sizes(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation returns, also inside our operator."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = {
            kernels._attention._opoverload: (kernels.forward, 4),
            kernels._attention_backward._opoverload: (kernels.backward, 9),
        }
        if func in inside:
            function, num_tensors = inside[func]
            pattern, others = args[num_tensors : num_tensors + 4], args[num_tensors + 4 :]
            with self:
                return function(*args[:num_tensors], kernels._grid(args[1], *pattern), *others)
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def largest_tensor(function, *inputs):
    q, k, v, grad = inputs
    with Sizes() as sizes:
        value_and_gradients(function, q, k, v, grad)
    return sizes.largest


LONG = [
    Case(4, 200, batch_size=1),
    Case(4, 200, 1, 1, None, batch_size=1),
    Case(4, 200, 0, 0, 10, batch_size=1),
    Case(12, 100, batch_size=1, head_dim=8),
    Case(4, 200, 0, 3, 3, "some", batch_size=1),
]


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("blocks", ["usual", "middle"])
@rows_by
def test_no_tensor_of_the_sparse_route_holds_all_pairs(case, engine):
    operator = lambda q, k, v: kernels.sparse_attention(q, k, v, case.key_mask(), **case.settings)  # noqa: E731
    inputs = case.inputs(torch.float32)
    assert inputs[0].numel() <= largest_tensor(operator, *inputs) < case.num_tokens**2


def test_the_dense_route_does_hold_all_pairs():
    case = LONG[0]
    allowed = allowed_pairs(case, None)

    def dense(q, k, v):
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, -1e30)[:, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    assert largest_tensor(dense, *case.inputs(torch.float32)) >= case.num_tokens**2


@pytest.mark.parametrize("case", LONG, ids=str)
def test_row_scores_never_exceed_the_size_of_a_block(case, constants):
    constants(ROWS_BY["the kernel of any device"], {"_CPU_BLOCK": 20_000})
    operator = lambda q, k, v: kernels.sparse_attention(q, k, v, case.key_mask(), **case.settings)  # noqa: E731
    of_columns = (2 * case.time_tolerance + 1) * case.num_tokens * case.num_heads * case.num_leads

    of_tokens = 3 * (case.num_tokens + case.num_leads * case.num_global) * case.num_heads * case.head_dim  # gradients
    assert largest_tensor(operator, *case.inputs(torch.float32)) <= max(of_columns, of_tokens, 20_000)


@pytest.mark.parametrize("rows", [name for name in ROWS_BY if name != "joint softmax"])  # it is for short rows
@pytest.mark.parametrize("blocks", ["usual"])
def test_memory_grows_with_the_length_and_not_with_its_square(engine):
    largest = []
    for num_patches in (1000, 2000):
        case = Case(4, num_patches, time_tolerance=1, lead_window=20, batch_size=1)
        operator = lambda q, k, v, c=case: kernels.sparse_attention(q, k, v, None, **c.settings)  # noqa: E731
        largest.append(largest_tensor(operator, *case.inputs(torch.float32)))
    assert largest[1] <= 2.1 * largest[0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(cases())
def test_kept_probabilities_take_at_most_128_numbers_a_query_and_head(case):
    q = case.inputs(torch.float32)[0]
    columns, rows = kernels.forward(q, q, q, None, case.grid, 1.0, True)[2:]
    queries = case.num_tokens * case.batch_size * case.num_heads
    num_others = (2 * case.time_tolerance + 1) * case.num_leads
    assert columns.numel() <= num_others * queries
    assert rows.numel() <= (128 if case.grid.has_rows else num_others + case.num_global) * queries


@pytest.mark.parametrize("way", ["no_grad", "inference_mode", "nobody wants a gradient"])
def test_nothing_is_kept_where_no_gradient_is_wanted(way, monkeypatch):
    case, kept = Case(12, 60, head_dim=64), []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args: kept.append(args[-1]) or forward(*args))
    q, k, v, _ = case.inputs(torch.float32)
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(way, torch.enable_grad)():
        kernels.sparse_attention(q.requires_grad_(way == "no_grad"), k, v, None, **case.settings)
    kernels.sparse_attention(q.clone().requires_grad_(), k, v, None, **case.settings)
    assert kept == [False, True]


# The operator


@rows_by
@pytest.mark.parametrize("blocks", ["usual"])
@pytest.mark.parametrize(
    "case, dtype", [(Case(2, 3), torch.bfloat16), (Case(2, 5, 1, 1, 2, "some"), torch.float32)], ids=str
)
@pytest.mark.parametrize("keep", [False, True])
def test_the_operator_passes_the_checks_of_torch(case, engine, dtype, keep):
    qkv = [x.requires_grad_() for x in case.inputs(dtype)[:3]]
    options, tolerances = [*case.settings.values()], {"atol": 1e-6, "rtol": 1e-5}
    torch.library.opcheck(kernels._attention, (*qkv, case.key_mask(), *options, keep), **tolerances)
    qkv = [x.detach() for x in qkv]
    saved = kernels._attention(*qkv, case.key_mask(), *options, keep)
    torch.library.opcheck(
        kernels._attention_backward, (torch.ones_like(saved[0]), *qkv, case.key_mask(), *saved, *options)
    )


@in_blocks
@rows_by
def test_a_backward_pass_for_which_nothing_was_kept_gives_the_same(engine):
    """So it is in a model that is exported or compiled for any size."""

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(cases())
    def check(case):
        q, k, v, grad = case.inputs()
        expected, found = (
            kernels.backward(grad, q, k, v, key_mask, *saved, case.grid, 1.0)
            for key_mask in [case.key_mask()]
            for saved in (kernels.forward(q, k, v, key_mask, case.grid, 1.0, keep) for keep in (True, False))
        )
        for mine, right in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, right, atol=1e-12, rtol=0)

    check()


def test_two_copies_of_the_code_in_one_process_have_operators_of_their_own(monkeypatch):
    """A checkpoint brings this file along: Transformers imports it beside the package's."""
    copy = load_copy("transformers_modules.some-model.0a1b.cardio_sparse_kernels", monkeypatch)
    assert copy._attention._qualname != kernels._attention._qualname
    case = Case(3, 7, 1, 1, 2, "some")
    assert_as_defined(case, operator=copy.sparse_attention)
    monkeypatch.setattr(copy, "forward", refuse)
    assert_as_defined(case)
    with pytest.raises(NotImplementedError):
        assert_as_defined(case, operator=copy.sparse_attention)


def test_a_copy_that_is_imported_again_still_works(monkeypatch):
    """Transformers runs a checkpoint's files again when they have changed."""
    name = "transformers_modules.other_model.cardio_sparse_kernels"
    first = load_copy(name, monkeypatch)
    second = load_copy(name, monkeypatch)
    assert first._attention._qualname != second._attention._qualname  # under one name the first's would be freed memory
    assert_as_defined(Case(3, 7), operator=second.sparse_attention)
    assert_as_defined(Case(3, 7), operator=first.sparse_attention)


def load_copy(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def refuse(*_):
    raise NotImplementedError


# The kernel of CUDA, with plain maths in place of its two operators

EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
EFFICIENT_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default


def efficient_attention(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale):
    check_as_the_kernel_does(query, key, value, attn_bias)
    assert compute_log_sumexp and dropout_p == 0 and not is_causal
    inputs = [None if x is None else x.to("meta") for x in (query, key, value, attn_bias)]
    shapes = EFFICIENT(*inputs, compute_log_sumexp, dropout_p, is_causal, scale=scale)
    scores = scores_of(query, key, attn_bias, scale)
    lse = pad(torch.logsumexp(scores, -1), (0, -query.shape[2] % 32), value=float("inf"))
    out = (torch.softmax(scores, -1) @ value.float()).to(query.dtype)
    assert (out.shape, lse.shape) == (shapes[0].shape, shapes[1].shape)
    seed = torch.zeros((), dtype=torch.int64)
    return out, lse, seed, seed


def efficient_attention_backward(
    grad, query, key, value, attn_bias, out, lse, seed, offset, dropout_p, wanted, is_causal=False, *, scale
):
    check_as_the_kernel_does(query, key, value, attn_bias)
    num_queries = query.shape[2]
    assert grad.shape == out.shape == query.shape and grad.dtype == out.dtype == query.dtype
    assert lse.shape == (*query.shape[:2], num_queries + -num_queries % 32) and lse.dtype == torch.float32
    assert (lse[..., num_queries:] == float("inf")).all()
    assert seed.dtype == offset.dtype == torch.int64 and dropout_p == 0 and not is_causal
    tensors = (grad, query, key, value, attn_bias, out, lse, seed, offset)
    meta = [None if x is None else x.to("meta") for x in tensors]
    shapes = EFFICIENT_BACKWARD(*meta, dropout_p, wanted, is_causal, scale=scale)
    weights = (scores_of(query, key, attn_bias, scale) - lse[..., :num_queries, None]).exp()
    grad, query, key, value, out = (x.float() for x in (grad, query, key, value, out))
    of_scores = weights * (grad @ value.transpose(2, 3) - (grad * out).sum(-1, keepdim=True)) * scale
    grads = (of_scores @ key, of_scores.transpose(2, 3) @ query, weights.transpose(2, 3) @ grad)
    assert all(mine.shape == right.shape for mine, right in zip(grads, shapes))
    return *(x.to(tensors[1].dtype) for x in grads), None


def check_as_the_kernel_does(query, key, value, bias):
    """Its demands on types, strides and addresses: rows at multiples of 16 bytes, the last dimension without gaps."""
    assert query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    for x in (query, key, value):
        assert x.ndim == 4 and x.stride(-1) == 1 and x.dtype == query.dtype and x.shape[2] > 0
    if bias is not None:
        assert bias.shape == (*query.shape[:3], key.shape[2]) and bias.dtype == query.dtype
        assert bias.stride(-1) == 1 and bias.data_ptr() % 16 == 0
        assert all(bias.stride(i) * bias.itemsize % 16 == 0 for i in range(3) if bias.shape[i] > 1)


def scores_of(query, key, bias, scale):
    scores = query.float() @ key.float().transpose(2, 3) * scale
    return scores if bias is None else scores + bias.float()


@pytest.fixture
def stand_in_for_cuda(monkeypatch):
    """Blocks and kernel as on CUDA, on a CPU; returns how often each of its two operators was called."""
    calls = {"forward": 0, "backward": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    aten = torch.ops.aten
    forward, backward = counted("forward", efficient_attention), counted("backward", efficient_attention_backward)
    monkeypatch.setattr(aten, "_scaled_dot_product_efficient_attention", forward)
    monkeypatch.setattr(aten, "_scaled_dot_product_efficient_attention_backward", backward)
    monkeypatch.setattr(kernels, "row_kernel", lambda _: kernels.EfficientCUDA)
    for name in ("row_blocks", "column_blocks", "has_short_rows"):
        blocks = getattr(kernels, name)
        as_on_cuda = functools.partial(lambda function, grid, _, *step: function(grid, "cuda", *step), blocks)
        monkeypatch.setattr(kernels, name, as_on_cuda)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_of_cuda_gives_values_and_gradients_of_the_definition(stand_in_for_cuda, dtype):
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(cases(most_tokens=200))
    def check(case):
        assert_as_defined(
            case, dtype, tolerance=4e-2 if dtype == torch.bfloat16 else None
        )  # the parts are bfloat16 too

    check()


@pytest.mark.parametrize("case", [case for case in EDGES if case.grid.has_rows], ids=str)
def test_the_kernel_of_cuda_takes_the_rows_of_every_grid(case, stand_in_for_cuda):
    assert_as_defined(case, torch.float32)
    assert stand_in_for_cuda["forward"] >= 1 and stand_in_for_cuda["forward"] == stand_in_for_cuda["backward"]


@pytest.mark.parametrize("masked", ["nothing", "some", "leads", "a record"])
def test_the_kernel_of_cuda_in_float16_is_finite_where_a_whole_lead_is_absent(masked, stand_in_for_cuda):
    assert_as_defined(Case(3, 9, 0, 1, 4, masked), torch.float16)
