"""Cardio-Sparse Attention against what else could compute it: time, peak memory, growth, training step, errors, route.

    python -m benchmarks.attention [--quick] [--only PATTERN] [--resume] [--out benchmarks/results]
    python -m benchmarks.attention --profile "12x60 B4 w=0"

Prints the tables and writes `attention.json` (after each job), `attention.md` and `attention.png`; about 15 minutes on two
quiet cores. `--only` runs the jobs whose name contains PATTERN ("crossover", "time/12x60", "memory", ...) and keeps the rest
of an earlier file; `--resume` skips the jobs that the file holds. Float32, CPU, all cores.

Attention alone is measured, without linear layers: Longformer's and BigBird's modules get q, k, v in place of their
projections, so nothing has to be subtracted. The methods of a grid run in turns (A B C A B C ...) in one process on the same
q, k, v (Longformer, BigBird and FlexAttention in turns of their own); memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import logging
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import transformers
from matplotlib import pyplot
from matplotlib.ticker import NullFormatter
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, BigBirdConfig, BigBirdModel, LongformerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from anyecg_hf import AnyECGConfig, AnyECGSparseAttentionConfig
from anyecg_hf.cardio_sparse_attention import (
    IMPLEMENTATION,
    cardio_sparse_attention_forward,
    cardio_sparse_mask,
    choose_route,
    make_plan,
)
from anyecg_hf.cardio_sparse_kernels import sparse_attention
from anyecg_hf.modeling_anyecg import AnyECGEncoder

logger = logging.getLogger("attention")

HEAD_DIM = 64
PASSES = ("forward", "both")  # both: forward and backward
LARGEST_MASK = 4000  # tokens: a float for each pair takes 64 MB there, 1.9 GB at 12x1800
LONG = 5  # seconds from which a call is measured only twice
LARGEST = 22_000  # tokens: what is run of the other methods
BIG_BIRD_BLOCK = 64
MEASURED_LAYERS = 2  # of the equal layers of an encoder, the rest is extrapolated
NO_ATTENTION = "benchmark_no_attention"


@dataclass(frozen=True)
class Case:
    """A grid of tokens and a pattern on it."""

    leads: int
    patches: int
    batch: int = 1
    heads: int = 12
    tolerance: int = 0
    window: int | None = None
    num_global: int = 0
    is_padded: bool = False

    @property
    def tokens(self):
        return self.num_global + self.leads * self.patches

    @property
    def shape(self):
        return self.batch, self.tokens, self.heads, HEAD_DIM

    @property
    def grid(self):
        return f"{self.leads}x{self.patches} B{self.batch}" + (f" G={self.num_global}" if self.num_global else "")

    @property
    def pattern(self):
        window = "" if self.window is None else f" W={self.window}"
        return f"w={self.tolerance}{window}{' padded' if self.is_padded else ''}"

    @property
    def config(self):
        return AnyECGSparseAttentionConfig(
            time_tolerance=self.tolerance, lead_window=self.window, num_global_tokens=self.num_global
        )

    def token_mask(self):
        """Return `(B, L, P)` bool, True = real; where padded: half of the samples shorter, the last without its last lead."""
        mask = torch.ones(self.batch, self.leads, self.patches, dtype=torch.bool)
        if self.is_padded:
            mask[: self.batch // 2, :, self.patches * 2 // 3 :] = False
            mask[-1, -1] = False
        return mask


def _patterns(case, windows=(None,)):
    return [replace(case, tolerance=w, window=window) for window in windows for w in (0, 1)]


GRIDS = [
    _patterns(Case(12, 10, 4)),
    [*_patterns(Case(12, 60, 4)), Case(12, 60, 4, is_padded=True)],
    [Case(12, 60, 4, num_global=1)],
    _patterns(Case(12, 300), (None, 60)),
    _patterns(Case(12, 1800), (None, 60)),
    _patterns(Case(2, 7200, heads=8), (None, 60)),
    _patterns(Case(2, 86400, heads=8), (60,)),
]
GROWTH = {
    "12 leads, W=60": [Case(12, patches, window=60) for patches in (300, 600, 1800, 7200)],
    "2 leads, W=60": [Case(2, patches, heads=8, window=60) for patches in (7200, 86400)],
    "12 leads, whole rows": [Case(12, patches) for patches in (300, 1800)],
}
CROSSOVER = [
    Case(leads, patches, 8, tolerance=w, window=window)
    for leads, lengths, window in (
        (12, (5, 10, 15, 20, 30), None),
        (6, (10,), None),
        (3, (10,), None),
        (2, (10, 30, 60, 120, 600), None),
        (1, (60,), 5),
    )
    for patches in lengths
    for w in (0, 1, 2)
]
ERRORS = [Case(12, 60, 2), Case(12, 60, 2, tolerance=1), Case(12, 60, 2, is_padded=True), Case(12, 60, 2, num_global=1)]
STEPS = [Case(12, 60, 4), Case(12, 300)]


# Methods: what they take, what they compute, where they do not run


@dataclass(frozen=True)
class Method:
    """One way to compute attention.

    Args:
        name (`str`): in the tables.
        make_function (`Callable`): from a case to a function of three inputs; its output has the shape of an input.
        make_inputs (`Callable`): from a case to the three inputs, in the memory layout that the method works in.
        reason (`Callable`): from a case to why the method does not run there ("": nothing to tell), or None where it runs.
        ignores (`tuple`): of (field, value): what of a pattern its time does not depend on.
        label (`str`, *optional*): in place of the pattern.
        has_backward (`bool`): whether it has one on a CPU.
        is_foreign (`bool`): takes turns only with its like: some allocate gigabytes, which disturbs who comes next.
    """

    name: str
    make_function: Callable
    make_inputs: Callable
    reason: Callable = lambda case: None
    ignores: tuple = ()
    label: str | None = None
    has_backward: bool = True
    is_foreign: bool = False

    def reduce(self, case):
        return replace(case, **dict(self.ignores))

    def pattern(self, case):
        return self.label or case.pattern


def make_qkv(case):
    return _randn(case.shape)


def _randn(shape):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).requires_grad_() for _ in range(3))


def make_cardio_sparse(case):
    key_mask = None
    if case.is_padded:
        key_mask = torch.nn.functional.pad(case.token_mask().flatten(1), (case.num_global, 0), value=True)
    return partial(
        sparse_attention,
        key_mask=key_mask,
        num_leads=case.leads,
        num_global=case.num_global,
        time_tolerance=case.tolerance,
        lead_window=case.window,
        scale=HEAD_DIM**-0.5,
    )


def make_routed(case):
    """Return what a layer of the model calls, with the route that `choose_route` takes."""
    plan = make_plan(case.token_mask(), case.config, implementation=IMPLEMENTATION, dtype=torch.float32)
    module = SimpleNamespace(config=SimpleNamespace(sparse_attention_config=case.config), head_dim=HEAD_DIM)

    def routed(*qkv):
        return cardio_sparse_attention_forward(module, *(x.transpose(1, 2) for x in qkv), plan.mask, plan=plan)[0]

    return routed


def _route(case):
    return choose_route(case.leads, case.patches, case.config).name


def _dense(*qkv, mask=None):
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), attn_mask=mask).transpose(1, 2)


def make_dense_with_mask(case):
    mask = cardio_sparse_mask(case.token_mask(), case.config, implementation=IMPLEMENTATION, dtype=torch.float32)
    return partial(_dense, mask=mask)


def make_row_inputs(case):
    return _randn((case.batch * case.leads, case.patches, case.heads, HEAD_DIM))


def make_rows(case):
    return make_cardio_sparse(replace(case, batch=case.batch * case.leads, leads=1))


def make_longformer_inputs(case):
    """Return inputs `(tokens, rows, width)`, a row for each lead."""
    return _randn((_longformer_tokens(case), case.batch * case.leads, case.heads * HEAD_DIM))


def _longformer_tokens(case):
    return -(-case.patches // (2 * case.window)) * 2 * case.window  # it takes multiples of the two-sided window


def make_longformer(case):
    config = LongformerConfig(
        hidden_size=case.heads * HEAD_DIM,
        num_attention_heads=case.heads,
        attention_window=[2 * case.window],
        attention_probs_dropout_prob=0.0,
    )
    with torch.device("meta"):  # the projections are replaced: no storage for their weights
        module = LongformerSelfAttention(config, layer_id=0)
    mask = torch.zeros(case.batch * case.leads, _longformer_tokens(case))
    mask[:, case.patches :] = -10000.0  # Longformer's sign for a padded token

    def longformer(*qkv):
        qkv = (qkv[0].clone(), *qkv[1:])  # the module scales its query in place
        for projection, x in zip((module.query, module.key, module.value), qkv):
            projection.forward = lambda _, x=x: x
        return module(qkv[0].transpose(0, 1), mask, mask < 0, is_global_attn=False)[0].transpose(0, 1)

    return longformer


def _big_bird_tokens(case):
    return max(-(-case.tokens // BIG_BIRD_BLOCK), 12) * BIG_BIRD_BLOCK


def make_big_bird_inputs(case):
    return _randn((case.batch, _big_bird_tokens(case), case.heads, HEAD_DIM))


def make_big_bird(case):
    """Return BigBird's attention with 3 random, 3 neighbouring and 2 global blocks, at the next size that it takes."""
    tokens = _big_bird_tokens(case)
    config = BigBirdConfig(
        hidden_size=case.heads * HEAD_DIM, num_attention_heads=case.heads, max_position_embeddings=tokens
    )
    with torch.device("meta"):
        module = BigBirdBlockSparseAttention(config, seed=0).train()  # in eval nothing is random
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(case.batch, tokens), BIG_BIRD_BLOCK
    )

    def big_bird(*qkv):
        return module.bigbird_block_sparse_attention(
            *(x.transpose(1, 2) for x in qkv), band, from_mask, to_mask, blocked, blocked, case.heads,
            config.num_random_blocks, HEAD_DIM, BIG_BIRD_BLOCK, BIG_BIRD_BLOCK, case.batch, tokens, tokens,
            seed=0, plan_from_length=None, plan_num_rand_blocks=None,
        )[0]  # fmt: skip

    return big_bird


def make_flex(case):
    def attends(_, head, query, key):
        distance = (query % case.patches - key % case.patches).abs()
        own_lead = query // case.patches == key // case.patches
        if case.window is not None:
            own_lead = own_lead & (distance <= case.window)
        return own_lead | (distance <= case.tolerance)

    block_mask = _flex_block_mask(attends, case.tokens)
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(*qkv):
        return compiled(*(x.detach().transpose(1, 2) for x in qkv), block_mask=block_mask).transpose(1, 2)

    with torch.no_grad():
        flex(*make_qkv(case))  # compiles
    return flex


def _flex_block_mask(attends, tokens, block=128):
    """Return the `BlockMask` of a pattern; `create_block_mask` would hold integers for all pairs of tokens."""
    keys = torch.arange(tokens)
    some, every = [], []
    for queries in keys.split(block):
        pairs = attends(0, 0, queries[:, None], keys)
        some.append([part.any() for part in pairs.split(block, 1)])
        every.append([part.all() for part in pairs.split(block, 1)])
    some, every = torch.tensor(some), torch.tensor(every)
    blocks = []
    for each in (some & ~every, every):  # to be masked inside, to be taken whole
        blocks += [each.sum(-1).int(), each.int().argsort(dim=-1, descending=True, stable=True).int()]
    return BlockMask.from_kv_blocks(
        *(x[None, None] for x in blocks), BLOCK_SIZE=block, mask_mod=attends, seq_lengths=(tokens, tokens)
    )


def _no_flex(case):
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "needs a C++ compiler"
    if case.tokens > LARGEST:
        return "left out to save time: its block mask looks at each pair of tokens once"
    return "left out to save time: like the plain case" if case.is_padded or case.num_global else None


def _no_rows(case):
    if case.window is None:
        return ""  # Longformer is its window
    return "left out to save time and memory" if case.tokens > LARGEST else None


def _no_big_bird(case):
    if case.tokens < 11 * BIG_BIRD_BLOCK:
        return "needs 11 blocks of 64 tokens"
    if case.tokens > LARGEST_MASK:
        return "it returns the probabilities of all pairs, which take gigabytes"
    if case.num_global:
        return "left out to save time: its random pattern is another one anyway"
    return None


def _no_mask(case):
    return f"the mask alone takes {4 * case.tokens**2 / 1e9:.2g} GB" if case.tokens > LARGEST_MASK else None


def _no_dense(case):
    return "hours, by the square of the tokens" if case.tokens > LARGEST else None


def _no_routed(case):
    return None if _route(case) == "dense" else ""


_PATTERN = (("tolerance", 0), ("window", None), ("is_padded", False))
_COLUMNS = (("tolerance", 0), ("is_padded", False))
_METHODS = (
    Method("dense", lambda case: _dense, make_qkv, _no_dense, _PATTERN, "all pairs"),
    Method("dense + mask", make_dense_with_mask, make_qkv, _no_mask, _PATTERN, "any mask"),
    Method("cardio_sparse", make_cardio_sparse, make_qkv),
    Method("cardio_sparse, chosen route", make_routed, make_qkv, _no_routed),
    Method("cardio_sparse, rows alone", make_rows, make_row_inputs, _no_rows, _COLUMNS, is_foreign=True),
    Method("Longformer, rows alone", make_longformer, make_longformer_inputs, _no_rows, _COLUMNS, is_foreign=True),
    Method("BigBird", make_big_bird, make_big_bird_inputs, _no_big_bird, _PATTERN, "random blocks", is_foreign=True),
    Method("FlexAttention", make_flex, make_qkv, _no_flex, has_backward=False, is_foreign=True),
)
METHODS = {method.name: method for method in _METHODS}


def plan_runs(cases):
    """Return `({(method, case): None}, {(method, case): reason})`: what runs, each once, and what does not."""
    runs, left_out = {}, {}
    for method, case in itertools.product(METHODS.values(), cases):
        case = method.reduce(case)
        reason = method.reason(case)
        (runs if reason is None else left_out)[method, case] = reason
    return runs, left_out


# Time


def run_forward(function, inputs):
    with torch.no_grad():
        function(*inputs)


def run_both(function, inputs, grad):
    torch.autograd.grad(function(*inputs), inputs, grad)  # the gradients are dropped at once


def run_in_turns(calls, seconds, *, fewest=3, most=30):
    """Return `{name: {"median", "least", "runs"}}` in seconds for `{name: call}`, run A B C A B C ... about `seconds` long.

    The first round warms up and does not count. A call of more than `LONG` seconds runs twice, and both count.
    """
    samples = {name: [] for name in calls}
    gc.collect()
    start = time.perf_counter()
    for round_number in range(1, most + 2):
        for name, call in calls.items():
            if round_number > 2 and samples[name][0] > LONG:
                continue
            before = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - before)
        if round_number >= fewest and time.perf_counter() - start > seconds:
            break
    counted = {name: times if times[0] > LONG else times[1:] for name, times in samples.items()}
    return {
        name: {"median": statistics.median(times), "least": min(times), "runs": len(times)}
        for name, times in counted.items()
    }


def time_runs(runs, seconds):
    """Return `{"forward": {run: times}, "both": {run: times}}` for `runs` of (method, case)."""
    inputs, functions, grads = {}, {}, {}
    for method, case in runs:
        key = method.make_inputs, case.shape, case.window if method.make_inputs is make_longformer_inputs else None
        if key not in inputs:
            qkv = method.make_inputs(case)
            inputs[key] = qkv, torch.randn_like(qkv[0])
        functions[method, case] = partial(run_forward, method.make_function(case), inputs[key][0])
        grads[method, case] = inputs[key][1]
    both = {run: partial(run_both, *call.args, grads[run]) for run, call in functions.items() if run[0].has_backward}
    return {"forward": run_in_turns(functions, seconds), "both": run_in_turns(both, seconds)}


def measure_times(cases, seconds):
    runs, left_out = plan_runs(cases)
    times = time_runs([run for run in runs if not run[0].is_foreign], seconds)
    foreign = time_runs([run for run in runs if run[0].is_foreign], seconds / 2)
    times = {name: times[name] | foreign[name] for name in PASSES}
    rows = [
        {"method": method.name, "pattern": method.pattern(case), "tokens": case.tokens}
        | {name: times[name].get((method, case)) for name in PASSES}
        for method, case in runs
    ]
    left_out = [
        {"method": method.name, "case": f"{case.grid} {method.pattern(case)}", "reason": reason}
        for (method, case), reason in left_out.items()
        if reason
    ]
    return {"rows": rows, "left_out": left_out, "batch_heads": cases[0].batch * cases[0].heads}


# Memory


def measure_memory(cases):
    runs, _ = plan_runs(cases)
    rows = []
    for method, case in runs:
        if not method.has_backward:
            continue  # FlexAttention: the compiler would be measured
        row = {"method": method.name, "pattern": method.pattern(case)}
        for name in PASSES:
            row[name] = _in_fresh_process(peak_memory, method.name, case, name == "both", torch.get_num_threads())
        rows.append(row)
        logger.info("  %s %s: %s", method.name, row["pattern"], {name: row[name]["above_inputs"] for name in PASSES})
    return {"rows": rows}


def _in_fresh_process(function, *args):
    """Return `function(*args)` from a new process: forked from a server that only imported modules, as importing takes
    seconds; for the largest cases, whose whole process counts, started from nothing."""
    start = "spawn" if args[1].tokens > 100_000 else "forkserver"
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(["benchmarks.attention"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def peak_memory(name, case, with_backward, threads):
    """Return the peak resident memory in MB of one run: above its inputs (masks count), and of the whole process."""
    torch.set_num_threads(threads)
    method = METHODS[name]
    small = replace(case, batch=1, heads=1, patches=min(case.patches, 300))
    _run_once(method.make_function(small), method.make_inputs(small), with_backward)  # loads libraries, starts threads
    inputs = method.make_inputs(case)
    grad = torch.randn_like(inputs[0]) if with_backward else None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident_memory("VmRSS")
    _run_once(method.make_function(case), inputs, with_backward, grad)
    peak = _resident_memory("VmHWM")
    return {"above_inputs": round(peak - before, 1), "process": round(peak, 1)}


def _run_once(function, inputs, with_backward, grad=None):
    if with_backward:
        run_both(function, inputs, torch.ones_like(inputs[0]) if grad is None else grad)
    else:
        run_forward(function, inputs)


def _resident_memory(field):
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


# Growth, errors, crossover


def measure_growth(cases, seconds):
    """Return times at each length and the exponent of the length, by least squares in logarithms."""
    method = METHODS["cardio_sparse"]
    times = time_runs([(method, case) for case in cases], seconds)
    result = {"patches": [case.patches for case in cases], "tokens": [case.tokens for case in cases]}
    for name in PASSES:
        medians = [times[name][method, case]["median"] for case in cases]
        exponent = np.polyfit(np.log(result["patches"]), np.log(medians), 1)[0]
        result[name] = {"seconds": medians, "exponent": float(exponent)}
    return result | {"batch_heads": cases[0].batch * cases[0].heads}


def measure_errors(case):
    """Return the greatest difference to float64 with the exact mask, as a share of the greatest value, by method."""
    inputs = make_qkv(case)
    grad = torch.randn(case.shape, generator=torch.Generator().manual_seed(1))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = cardio_sparse_mask(case.token_mask(), case.config, implementation="sdpa", dtype=torch.float32)
    wanted = _output_and_gradients(partial(_dense, mask=mask), exact, grad.double())
    return {
        name: {
            what: float((x - y).abs().max() / y.abs().max())
            for what, x, y in zip(
                ("out", "dq", "dk", "dv"),
                _output_and_gradients(METHODS[name].make_function(case), inputs, grad),
                wanted,
            )
        }
        for name in ("cardio_sparse", "dense + mask")
    }


def _output_and_gradients(function, inputs, grad):
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


def measure_crossover(case, seconds):
    """Return how many times faster than dense + mask the sparse operator is, and the route that is chosen."""
    runs = [(METHODS[name], case) for name in ("dense + mask", "cardio_sparse")]
    times = time_runs(runs, seconds)
    gains = {name: times[name][runs[0]]["median"] / times[name][runs[1]]["median"] for name in PASSES}
    return gains | {"sparse_forward": times["forward"][runs[1]]["median"], "route": _route(case)}


# A training step of the base model


def _no_attention(module, query, key, value, attention_mask, **kwargs):
    return (query + key + value).transpose(1, 2), None  # all three, so that the backward passes of their linears stay


AttentionInterface.register(NO_ATTENTION, _no_attention)


def measure_step(case, seconds):
    """Return seconds of a training step of the base preset's layers with AdamW, by attention; stem and head left out.

    Two of the twelve equal layers are measured and scaled; the plan (mask) of a pass is timed apart and counts once.
    """
    scale = AnyECGConfig.from_preset("base").num_hidden_layers / MEASURED_LAYERS
    implementations = (IMPLEMENTATION, "sdpa", NO_ATTENTION)
    plans = {
        name: partial(make_plan, case.token_mask(), case.config, implementation=name, dtype=torch.float32)
        for name in implementations[:2]
    }
    plan_times = run_in_turns(plans, seconds / 10)
    steps = {name: _make_step(case, name, plans.get(name, plans[IMPLEMENTATION])()) for name in implementations}
    times = run_in_turns(steps, seconds)
    return {
        name: times[name]["median"] * scale + (plan_times[name]["median"] if name in plans else 0)
        for name in implementations
    } | {"route": _route(case), "runs": times[IMPLEMENTATION]["runs"]}


def _make_step(case, implementation, plan):
    torch.manual_seed(0)
    config = AnyECGConfig.from_preset("base", attn_implementation=implementation)
    encoder = AnyECGEncoder(config, MEASURED_LAYERS).train()
    optimizer = torch.optim.AdamW(encoder.layers.parameters())
    embeddings = torch.randn(case.batch, case.tokens, config.hidden_size)

    def step():
        states = embeddings.detach().requires_grad_()  # as from a stem that learns too
        for layer in encoder.layers:
            states, _ = layer(states, plan)
        states.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# Tables


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def of_section(results, section):
    return {key.split("/", 1)[1]: value for key, value in results["jobs"].items() if key.startswith(section + "/")}


def find_row(results, section, grid, method, pattern):
    rows = results["jobs"].get(f"{section}/{grid}", {"rows": []})["rows"]
    return next((row for row in rows if (row["method"], row["pattern"]) == (method, pattern)), None)


def ratio(results, grid, method, pattern, name, to=("dense", "all pairs")):
    """Return how many times faster than `to` the method is in the pass `name`, or None if either was not measured."""
    row, base = find_row(results, "time", grid, method, pattern), find_row(results, "time", grid, *to)
    if row is None or base is None or row[name] is None or base[name] is None:
        return None
    return base[name]["median"] / row[name]["median"]


def extrapolated_dense(results, name):
    """Return seconds of dense attention at 2x86400 by the square of the length, or None."""
    row = find_row(results, "time", "2x7200 B1", "dense", "all pairs")
    return None if row is None else row[name]["median"] * (86400 / 7200) ** 2


def time_table(results):
    rows = []
    for grid, job in of_section(results, "time").items():
        for row in job["rows"]:
            key = row["method"], row["pattern"]
            memory = find_row(results, "memory", grid, *key)
            rows.append(
                [grid, key[1], key[0]]
                + [_milliseconds(row[name]) for name in PASSES]
                + [_gain(results, grid, row, name) for name in PASSES]
                + ["–" if memory is None else f"{memory[name]['above_inputs']:.0f}" for name in PASSES]
            )
    header = ["grid, batch", "pattern", "method", "forward ms (least)", "f+b ms (least)", "x forward", "x f+b"]
    return table([*header, "MB forward", "MB f+b"], rows)


def _milliseconds(timing):
    if timing is None:
        return "–"
    digits = 1 if timing["median"] < 1 else 0
    return f"{1e3 * timing['median']:.{digits}f} ({1e3 * timing['least']:.{digits}f})"


def _gain(results, grid, row, name):
    value = ratio(results, grid, row["method"], row["pattern"], name)
    if value is not None:
        return f"{value:.2f}"
    if grid.startswith("2x86400") and row[name] and extrapolated_dense(results, name):
        return f"{extrapolated_dense(results, name) / row[name]['median']:.0f} (extrapolated)"
    return "–"


def left_out_table(results):
    cases = {}
    for job in of_section(results, "time").values():
        for item in job["left_out"]:
            cases.setdefault((item["method"], item["reason"]), []).append(item["case"])
    return table(
        ["method", "not run at", "because"], [[method, ", ".join(c), why] for (method, why), c in cases.items()]
    )


def process_table(results):
    rows = [
        [grid, row["pattern"], row["method"], *(f"{row[name]['process'] / 1e3:.2f}" for name in PASSES)]
        for grid, job in of_section(results, "memory").items()
        for row in job["rows"]
        if grid.startswith("2x86400")
    ]
    return table(["grid", "pattern", "method", "forward GB", "f+b GB"], rows)


def growth_table(results):
    rows = [
        [name, ", ".join(map(str, job["patches"]))]
        + [
            cell
            for each in PASSES
            for cell in (", ".join(f"{s:.3g}" for s in job[each]["seconds"]), f"{job[each]['exponent']:.2f}")
        ]
        for name, job in of_section(results, "growth").items()
    ]
    return table(["series", "patches", "forward s", "exponent", "f+b s", "exponent"], rows)


def step_table(results):
    rows = [
        [name, *(f"{job[i]:.2f}" for i in (IMPLEMENTATION, "sdpa", NO_ATTENTION))]
        + [f"{job['sdpa'] / job[IMPLEMENTATION]:.2f}", f"{job['sdpa'] / job[NO_ATTENTION]:.2f}"]
        + [f"{job[NO_ATTENTION] / job[IMPLEMENTATION]:.0%}"]
        for name, job in of_section(results, "step").items()
    ]
    header = ["grid, batch", "cardio_sparse s", "sdpa (dense + mask) s", "no attention s", "x", "x at most"]
    return table([*header, "share that is not attention"], rows)


def error_table(results):
    rows = [
        [name, method, *(f"{errors[what]:.1e}" for what in ("out", "dq", "dk", "dv"))]
        for name, job in of_section(results, "errors").items()
        for method, errors in job.items()
    ]
    return table(["case", "method", "out", "dq", "dk", "dv"], rows)


def crossover_table(results):
    rows = [
        [name, f"{1e3 * job['sparse_forward']:.2f}", f"{job['forward']:.2f}", f"{job['both']:.2f}", job["route"]]
        + [_verdict(job)]
        for name, job in of_section(results, "crossover").items()
    ]
    return table(["case", "sparse forward ms", "x forward", "x f+b", "route chosen", "verdict"], rows)


def _verdict(job):
    """Return what the chosen route costs against the other: more than 5 % in forward and backward together is a loss."""
    loss = job["both"] if job["route"] == "dense" else 1 / job["both"]
    return f"{loss - 1:.0%} slower than the other" if loss > 1.05 else "good"


# Targets


WANTED_GAINS = {  # dense without mask / cardio_sparse at w = 0: forward, forward and backward
    ("12x60 B4", ""): (3.0, 4.0),
    ("12x300 B1", ""): (7.5, 9.0),
    ("12x1800 B1", ""): (10.0, 10.0),
    ("12x1800 B1", " W=60"): (45.0, 45.0),
    ("2x7200 B1", " W=60"): (28.0, 30.0),
}
WANTED_AT_TOLERANCE_1 = 0.7  # of the above
WANTED_STEP = {"12x60 B4": 1.15, "12x300 B1": 1.9}


def list_targets(results):
    """Yield `(target, sign, limit, measured or None)`."""
    for w, name in itertools.product((0, 1), PASSES):
        to = "dense + mask", "any mask"
        yield (
            f"12x10 B4 w={w} {name}: dense + mask / chosen route", ">=", 0.95,
            ratio(results, "12x10 B4", _method_of("12x10 B4", w, results), f"w={w}", name, to),
        )  # fmt: skip
    for (grid, window), limits in WANTED_GAINS.items():
        for w, (name, limit) in itertools.product((0, 1), zip(PASSES, limits)):
            measured = ratio(results, grid, "cardio_sparse", f"w={w}{window}", name)
            share = WANTED_AT_TOLERANCE_1 if w else 1
            yield f"{grid} w={w}{window} {name}: dense / cardio_sparse", ">=", round(limit * share, 2), measured
    yield from _list_growth_and_memory(results)
    for grid, limit in WANTED_STEP.items():
        job = of_section(results, "step").get(grid)
        yield f"base training step {grid}: sdpa / cardio_sparse", ">=", limit, job and job["sdpa"] / job[IMPLEMENTATION]


def _method_of(grid, w, results):
    chosen = "cardio_sparse, chosen route"
    return chosen if find_row(results, "time", grid, chosen, f"w={w}") else "cardio_sparse"


def _list_growth_and_memory(results):
    for series, name in itertools.product(("12 leads, W=60", "2 leads, W=60"), PASSES):
        job = of_section(results, "growth").get(series)
        yield f"growth exponent, {series}, {name}", "<=", 1.15, job and job[name]["exponent"]
    dense = find_row(results, "memory", "12x300 B1", "dense", "all pairs")
    sparse = find_row(results, "memory", "12x300 B1", "cardio_sparse", "w=0")
    measured = dense and sparse and sparse["both"]["above_inputs"] / dense["both"]["above_inputs"]
    yield "memory above inputs 12x300 B1 w=0 both: cardio_sparse / dense", "<=", 1.5, measured
    for w in (0, 1):
        row = find_row(results, "memory", "2x86400 B1", "cardio_sparse", f"w={w} W=60")
        yield f"whole process 2x86400 w={w} W=60 both, GB", "<=", 6.0, row and row["both"]["process"] / 1e3


def target_table(results):
    rows = []
    for name, sign, limit, measured in list_targets(results):
        if measured is None:
            rows.append([name, f"{sign} {limit:g}", "not measured", "–"])
        else:
            reached = measured >= limit if sign == ">=" else measured <= limit
            rows.append([name, f"{sign} {limit:g}", f"{measured:.2f}", "reached" if reached else "**missed**"])
    return table(["target", "wanted", "measured", ""], rows)


# Report


def report(results):
    """Return the Markdown text of all that was measured."""
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    parts = [
        f"# Attention: time and memory\n\n{machine}. Float32; medians, in brackets the least. Patterns: w = time_tolerance, W = "
        "lead_window; f+b: forward and backward; x: time of dense attention without mask / time of this, in the same run; MB: "
        "peak resident memory above the inputs, in a process of its own, with the masks. The values of a mask do not change the "
        "time of dense attention: it was measured with one. Longformer computes the rows alone (it cannot express columns), "
        "padded to a multiple of its window; BigBird another pattern (random blocks), padded to 64 tokens; FlexAttention has "
        "no backward pass on a CPU. Command: `python -m benchmarks.attention`."
    ]
    sections = (
        ("Targets", target_table, ""),
        ("Time and memory", time_table, "time"),
        ("Not run", left_out_table, "time"),
        ("Whole process at 24 h", process_table, "memory/2x86400"),
        ("Growth with the length", growth_table, "growth"),
        ("Training step of the base preset (12 layers, scaled from 2)", step_table, "step"),
        ("Greatest difference to float64, as a share of the greatest value", error_table, "errors"),
        ("Crossover: dense + mask / sparse, and the route chosen", crossover_table, "crossover"),
    )
    for title, make_table, needs in sections:
        if any(key.startswith(needs) for key in results["jobs"]):
            parts.append(f"## {title}\n\n{make_table(results)}")
    return "\n\n".join(parts) + "\n"


LINES = {  # (method, pattern or None = the only one): colour
    ("dense", "all pairs"): "black",
    ("dense + mask", "any mask"): "grey",
    ("cardio_sparse", "w=0"): "tab:blue",
    ("cardio_sparse", "w=0 W=60"): "tab:red",
    ("cardio_sparse", "w=1 W=60"): "tab:orange",
    ("Longformer, rows alone", "w=0 W=60"): "tab:green",
    ("BigBird", "random blocks"): "tab:purple",
}


def plot(results, path):
    """Draw time of forward and backward against tokens, a panel for each number of leads."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for leads, panel in zip((12, 2), panels):
        for (method, pattern), colour in LINES.items():
            points = sorted(_points(results, leads, method, pattern).items())
            if points:
                label = f"{method}, {pattern}" if method.startswith("cardio") else method
                panel.loglog(*zip(*points), marker="o", color=colour, label=label)
        panel.set(title=f"{leads} leads", xlabel="tokens of a record (leads x patches)")
        panel.grid(alpha=0.3, which="both")
    _plot_extrapolated(results, panels[1])
    for panel, place in zip(panels, ("upper left", "lower left")):  # where no line runs
        panel.xaxis.set_minor_formatter(NullFormatter())
        if panel.lines:
            panel.legend(fontsize=8, loc=place)
    panels[0].set_ylabel("forward and backward, ms per record and head")
    figure.savefig(path, dpi=120)


def _points(results, leads, method, pattern):
    """Return `{tokens: milliseconds per record and head}` of one line."""
    points = {}
    for grid, job in of_section(results, "time").items():
        row = find_row(results, "time", grid, method, pattern)
        if grid.startswith(f"{leads}x") and "G=" not in grid and row and row["both"]:
            points[row["tokens"]] = 1e3 * row["both"]["median"] / job["batch_heads"]
    return points


def _plot_extrapolated(results, panel):
    seconds = extrapolated_dense(results, "both")
    if seconds is not None:
        start = find_row(results, "time", "2x7200 B1", "dense", "all pairs")
        ends = start["both"]["median"], seconds
        panel.loglog([14400, 172800], [1e3 * s / 8 for s in ends], "k:", label="dense, extrapolated")


# Command


def list_jobs(quick):
    """Return `{name: call}` of all that is measured; `quick`: the small grids, for a short time each."""
    seconds = 0.5 if quick else 12
    most_tokens = 1000 if quick else 10**9
    jobs = {f"errors/{case.grid} {case.pattern}": partial(measure_errors, case) for case in ERRORS}
    grids = [cases for cases in GRIDS if cases[0].tokens <= most_tokens]
    jobs |= {f"time/{cases[0].grid}": partial(measure_times, cases, seconds) for cases in grids}
    jobs |= {f"memory/{cases[0].grid}": partial(measure_memory, cases) for cases in grids}
    for name, cases in GROWTH.items():
        cases = [case for case in cases if case.tokens <= 8 * most_tokens]
        if len(cases) > 1:
            jobs[f"growth/{name}"] = partial(measure_growth, cases, seconds)
    steps = STEPS[:1] if quick else STEPS
    jobs |= {f"step/{case.grid}": partial(measure_step, case, 2 * seconds) for case in steps}
    crossover = CROSSOVER[::6] if quick else CROSSOVER
    jobs |= {
        f"crossover/{case.grid} {case.pattern}": partial(measure_crossover, case, seconds / 12) for case in crossover
    }
    return jobs


def run_jobs(args, path):
    """Run the jobs that were asked for, write the file after each, and return all results."""
    results = {"jobs": {}}
    if (args.resume or args.only) and path.exists():
        results = json.loads(path.read_text())
    results["machine"] = describe_machine(args.quick)
    start = time.perf_counter()
    for name, job in list_jobs(args.quick).items():
        if args.only not in name or args.resume and name in results["jobs"]:
            continue
        before = time.perf_counter()
        results["jobs"][name] = job()
        path.write_text(json.dumps(results, indent=1) + "\n")
        now = time.perf_counter()
        logger.info("%s: %.1f s (%.1f min in all)", name, now - before, (now - start) / 60)
    return results


def describe_machine(quick):
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    machine = {
        "CPU": model[1] if model else platform.machine(),
        "threads": torch.get_num_threads(),
        "load at the start": round(os.getloadavg()[0], 1),
        "PyTorch": torch.__version__,
        "Transformers": transformers.__version__,
    }
    return machine | ({"QUICK RUN": "not for comparison"} if quick else {})


def profile(name):
    """Print the operators that take the time of `cardio_sparse` in one case, forward and backward."""
    cases = {f"{case.grid} {case.pattern}": case for cases in GRIDS for case in cases}
    if name not in cases:
        raise SystemExit(f'No case "{name}". Cases: {", ".join(cases)}.')
    case = cases[name]
    inputs, function = make_qkv(case), make_cardio_sparse(case)
    run_both(function, inputs, torch.ones_like(inputs[0]))
    with torch.profiler.profile() as forward:
        out = function(*inputs)
    with torch.profiler.profile() as backward:
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    for title, measured in (("forward", forward), ("backward", backward)):
        print(f"{name}, {title}")
        print(measured.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small grids, a minute or two; written to outputs/")
    parser.add_argument("--only", default="", metavar="PATTERN", help="jobs whose name contains this")
    parser.add_argument("--resume", action="store_true", help="skip the jobs that the file holds")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results, with --quick outputs)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--profile", metavar="CASE", help='print the operators of a case, as "12x60 B4 w=0"')
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64  # FlexAttention: one compilation for each pattern
    if args.profile:
        profile(args.profile)
        return
    matplotlib.use("Agg")
    out = args.out or Path("outputs" if args.quick else "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    results = run_jobs(args, out / "attention.json")
    text = report(results)
    (out / "attention.md").write_text(text)
    plot(results, out / "attention.png")
    print(text)


if __name__ == "__main__":
    main()
