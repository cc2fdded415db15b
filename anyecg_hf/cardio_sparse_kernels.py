"""Cardio-Sparse Attention without the N x N scores, exact to rounding.

The keys of a query are split into two disjoint parts, so that none counts twice:

    row      the global tokens, and its own lead within the window
    columns  the other leads, at `2 w + 1` steps in time; the own lead too where the window does not reach beyond `w`

The scores of the columns are few (`(2 w + 1) L` a query), and are kept for the whole grid. Rows come in blocks that fit
the cache; the softmax of a block runs over both parts at once. So a pass has three phases:

    1. scores of the columns        2. row blocks: joint softmax, output of the row        3. output of the columns

The backward pass has the same three phases and recomputes the scores. Where a row is long, the fused kernel of the device
takes the row, and the parts are merged by their log-sum-exp z, with o_i and z_i of each part:

    z = log(sum_i exp(z_i)),  o = sum_i exp(z_i - z) o_i;   backward: P_i = exp(s_i - z), dS_i = P_i (dO V_i^T - rowsum(dO o))

which a fused backward computes by itself if it is given the merged o and z (as in FlashAttention).
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

MASKED = -1e30  # a masked score; finite, so that no part is NaN where all its keys are masked
_CPU_BLOCK = 2**19  # scores of a row block on a CPU: 2 MB in float32, about what two cores keep in their caches
_GPU_BLOCK = 2**28
_CPU_FUSED_FROM = 128  # keys of a row from which the fused CPU kernel beats products with scores in the cache
_WINDOW_QUERIES = 64  # queries that share the keys of one window: 32 to 64 were equal, 128 slower
_FEW_LEADS = 2  # up to which the batched product is slower than adding lead by lead
_FUSED_TOKENS = 2**12  # tokens whose rows one call of the fused CPU kernel takes: bounds its temporary gradients


class Grid(NamedTuple):
    """Shape and pattern of a batch of tokens: `num_global` tokens, then `num_leads` x `num_patches`, lead-major."""

    batch_size: int
    num_global: int
    num_leads: int
    num_patches: int
    num_heads: int
    head_dim: int
    time_tolerance: int
    lead_window: int | None

    @property
    def has_rows(self):
        """Whether the own lead reaches further than the columns."""
        return self.lead_window is None or self.lead_window > self.time_tolerance

    def tokens(self, x):
        """Return the grid part of `x` (B, N, ...) as a view `(B, L, P, ...)`."""
        return x[:, self.num_global :].unflatten(1, (self.num_leads, self.num_patches))

    def columns(self, x, samples, times):
        """Return a view `(samples, times, H, L, D)` of `x` (B, N, H, D)."""
        return self.tokens(x)[samples, :, times].permute(0, 2, 3, 1, 4)


class RowBlock(NamedTuple):
    """Queries of some leads of some samples, and the range of keys of the same leads that they may need."""

    samples: slice
    leads: slice
    queries: slice
    keys: slice
    is_fused: bool

    def rows(self, x, grid, times):
        """Return a view `(samples, leads, H, times, D)` of `x` (B, N, H, D)."""
        return grid.tokens(x)[self.samples, self.leads, times].transpose(2, 3)

    def take_keys(self, x, grid, dtype):
        """Return `(samples, leads, H, G + keys, D)`."""
        own = self.rows(x, grid, self.keys).to(dtype)
        if not grid.num_global:
            return own
        shared = x[self.samples, None, : grid.num_global].transpose(2, 3).to(dtype)
        return torch.cat([shared.expand(-1, own.shape[1], -1, -1, -1), own], dim=3)

    def add_to_keys(self, x, grid, value):
        """Add `value` (samples, leads, H, G + keys, D) to the keys of `x`."""
        if grid.num_global:
            x[self.samples, : grid.num_global].add_(value[:, :, :, : grid.num_global].sum(1).transpose(1, 2))
        self.rows(x, grid, self.keys).add_(value[:, :, :, grid.num_global :])

    def of_columns(self, scores):
        """Return a view `(samples, leads, H, queries, 2 w + 1, L)` of column scores `(2 w + 1, B, P, H, L, L)`."""
        return scores[:, self.samples, self.queries, :, self.leads].permute(1, 4, 3, 2, 0, 5)

    def bias(self, grid, key_bias, band):
        """Return what is added to the scores of the row, broadcastable to `(samples, leads, H, queries, G + keys)`, or None."""
        bias = None
        if band is not None:
            before = grid.lead_window - (self.queries.start - self.keys.start)  # keys that the window would have, were
            num_queries = self.queries.stop - self.queries.start  # the row longer at its start
            bias = band[:num_queries, before : before + self.keys.stop - self.keys.start]
        if key_bias is not None:
            of_keys = grid.tokens(key_bias)[self.samples, self.leads, None, None, self.keys]
            bias = of_keys if bias is None else torch.minimum(bias, of_keys)
        return None if bias is None else torch.nn.functional.pad(bias, (grid.num_global, 0))


# Which blocks


def _chunks(outer: int, inner: int, capacity: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices (of `outer`, of `inner`) with at most `capacity` elements together; whole inner ranges if they fit."""
    if capacity >= inner:
        step = capacity // inner
        for start in range(0, outer, step):
            yield slice(start, min(start + step, outer)), slice(0, inner)
        return
    step = max(capacity, 1)
    for i in range(outer):
        for start in range(0, inner, step):
            yield slice(i, i + 1), slice(start, min(start + step, inner))


def row_blocks(grid: Grid, device_type: str) -> Iterator[RowBlock]:
    """Yield the blocks of phase 2: each query once; rows longer than their window in chunks of queries."""
    num_patches, window = grid.num_patches, grid.lead_window
    num_others = (2 * grid.time_tolerance + 1) * grid.num_leads
    most = _CPU_BLOCK if device_type == "cpu" else _GPU_BLOCK
    if not grid.has_rows:
        step, num_keys = num_patches, 0
    elif window is None or num_patches <= 2 * window + _WINDOW_QUERIES:
        step = num_keys = num_patches
    else:
        step, num_keys = _WINDOW_QUERIES, _WINDOW_QUERIES + 2 * window
    is_fused = num_keys >= {"cpu": _CPU_FUSED_FROM, "cuda": 1}.get(device_type, num_keys + 1)
    if is_fused:
        capacity = _FUSED_TOKENS // num_keys if device_type == "cpu" else grid.batch_size * grid.num_leads
    else:
        step = min(step, max(most // (grid.num_heads * (num_keys + num_others)), 1))
        capacity = most // (grid.num_heads * step * (num_keys + num_others))
    for samples, leads in _chunks(grid.batch_size, grid.num_leads, capacity):
        for start in range(0, num_patches, step):
            stop = min(start + step, num_patches)
            first, last = (
                (0, num_patches) if window is None else (max(start - window, 0), min(stop + window, num_patches))
            )
            keys = slice(first, last) if grid.has_rows else slice(0, 0)
            yield RowBlock(samples, leads, slice(start, stop), keys, is_fused)


def column_blocks(grid: Grid, device_type: str, step: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield `(samples, query times, key times)` of phases 1 and 3, for keys `step` patches after the query."""
    most = _CPU_BLOCK if device_type == "cpu" else _GPU_BLOCK
    first, last = max(0, -step), grid.num_patches - max(0, step)
    if first >= last:
        return
    capacity = most // (grid.num_heads * grid.num_leads * max(grid.head_dim, grid.num_leads))
    for samples, times in _chunks(grid.batch_size, last - first, capacity):
        start, stop = first + times.start, first + times.stop
        yield samples, slice(start, stop), slice(start + step, stop + step)


def _window_band(grid, num_queries, dtype, device):
    """Return what is added to the scores of `num_queries` queries and `num_queries + 2 W` keys, or None without a window."""
    if grid.lead_window is None or not grid.has_rows:
        return None
    queries = torch.arange(num_queries, device=device)[:, None] + grid.lead_window
    outside = (queries - torch.arange(num_queries + 2 * grid.lead_window, device=device)).abs() > grid.lead_window
    return torch.zeros(outside.shape, dtype=dtype, device=device).masked_fill_(outside, MASKED)


# Phases 1 and 3: columns


def _products(left, right, factor=1.0):
    """Return `factor * left @ right` for batches of matrices; the factor goes into the product."""
    empty = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(empty, left, right, beta=0, alpha=factor)


def _flat(x, dtype=None):
    """Return `x` (..., M, D) as matrices `(n, M, D)`; a view where the memory allows it."""
    return (x if dtype is None else x.to(dtype)).flatten(0, -3)


def _steps(grid):
    return range(-grid.time_tolerance, grid.time_tolerance + 1)


def _column_products(left, right, grid, dtype, factor, fill):
    """Return `factor * left . right` of every query and column key, `(2 w + 1, B, P, H, L, L)`; `fill` outside the grid."""
    shape = (
        2 * grid.time_tolerance + 1,
        grid.batch_size,
        grid.num_patches,
        grid.num_heads,
        grid.num_leads,
        grid.num_leads,
    )
    products = torch.empty(shape, dtype=dtype, device=left.device)
    if grid.time_tolerance:
        products.fill_(fill)
    for i, step in enumerate(_steps(grid)):
        for samples, times, key_times in column_blocks(grid, left.device.type, step):
            queries = _flat(grid.columns(left, samples, times), dtype)
            keys = _flat(grid.columns(right, samples, key_times), dtype)
            target = products[i, samples, times]
            target.copy_(_products(queries, keys.transpose(1, 2), factor).view(target.shape))
    return products


def _column_scores(q, k, key_bias, grid, dtype, scale):
    scores = _column_products(q, k, grid, dtype, scale, MASKED)
    if key_bias is not None:
        bias = grid.tokens(key_bias).transpose(1, 2)[:, :, None, None]  # (B, P, 1, 1, L)
        for i, step in enumerate(_steps(grid)):
            for samples, times, key_times in column_blocks(grid, q.device.type, step):
                scores[i, samples, times].add_(bias[samples, key_times])
    if grid.has_rows:
        scores.diagonal(dim1=-2, dim2=-1).fill_(MASKED)  # the own lead is a key of the row
    return scores


def _add_column_outputs(out, probabilities, values, grid, dtype, factor=1.0, transpose=False):
    """Add `factor * probabilities @ values` to `out`, or with `transpose` its transposed: from queries to keys."""
    for i, step in enumerate(_steps(grid)):
        for samples, times, key_times in column_blocks(grid, out.device.type, step):
            sources, targets = (key_times, times) if not transpose else (times, key_times)
            weights = probabilities[i, samples, times]
            weights = weights.transpose(-2, -1) if transpose else weights
            target, source = grid.columns(out, samples, targets), grid.columns(values, samples, sources).to(dtype)
            if grid.num_leads <= _FEW_LEADS:
                for lead, other in itertools.product(range(grid.num_leads), repeat=2):
                    target[..., lead, :].addcmul_(weights[..., lead, other, None], source[..., other, :], value=factor)
            else:
                target.add_(_products(_flat(weights), _flat(source), factor).view(target.shape))


# Phase 2: rows, by products with a joint softmax


def _joint(own, others):
    """Return the scores of a block's row and columns side by side."""
    return torch.cat([own, others.flatten(-2)], dim=-1)


def _row_scores(block, q, k, key_bias, band, grid, dtype, scale):
    queries, keys = block.rows(q, grid, block.queries).to(dtype), block.take_keys(k, grid, dtype)
    scores = _products(_flat(queries), _flat(keys).transpose(1, 2), scale).view(*queries.shape[:4], keys.shape[3])
    bias = block.bias(grid, key_bias, band)
    return queries, keys, scores if bias is None else scores.add_(bias)


def _rows_forward(block, q, k, v, key_bias, band, grid, scale, out, columns):
    """Write the rows' output into `out`; turn the block's part of `columns` from scores into probabilities."""
    _, keys, scores = _row_scores(block, q, k, key_bias, band, grid, columns.dtype, scale)
    others, num_own = block.of_columns(columns), keys.shape[3]
    probabilities = torch.softmax(_joint(scores, others), -1)
    others.copy_(probabilities[..., num_own:].view(others.shape))
    target = block.rows(out, grid, block.queries)
    values = block.take_keys(v, grid, columns.dtype)
    target.copy_(torch.bmm(_flat(probabilities)[..., :num_own], _flat(values)).view(target.shape))


def _rows_backward(block, grad, q, k, v, key_bias, band, grid, scale, columns, grad_columns, grads):
    """Add the rows' gradients; turn the block's columns from scores into probabilities, and their gradients into those
    of the scores."""
    dtype = columns.dtype
    queries, keys, scores = _row_scores(block, q, k, key_bias, band, grid, dtype, scale)
    values, grad = _flat(block.take_keys(v, grid, dtype)), _flat(block.rows(grad, grid, block.queries), dtype)
    others, grad_others, num_own = block.of_columns(columns), block.of_columns(grad_columns), keys.shape[3]
    probabilities = torch.softmax(_joint(scores, others), -1)
    others.copy_(probabilities[..., num_own:].view(others.shape))
    own = _flat(probabilities)[..., :num_own]
    block.add_to_keys(grads[2], grid, torch.bmm(own.transpose(1, 2), grad).view(keys.shape))
    grad_own = torch.bmm(grad, values.transpose(1, 2)).view(scores.shape)
    grad_scores = torch._softmax_backward_data(_joint(grad_own, grad_others), probabilities, -1, dtype)
    grad_others.copy_(grad_scores[..., num_own:].view(others.shape))
    grad_own = _flat(grad_scores)[..., :num_own]
    block.rows(grads[0], grid, block.queries).add_(_products(grad_own, _flat(keys), scale).view(queries.shape))
    block.add_to_keys(grads[1], grid, _products(grad_own.transpose(1, 2), _flat(queries), scale).view(keys.shape))


# Phase 2: rows, by the fused kernel of the device, merged with the columns


def _fused_inputs(block, grid, dtype, q, k, v, key_bias, band):
    dtype = q.dtype if FUSED[q.device.type].takes_half else dtype
    inputs = [block.rows(q, grid, block.queries).to(dtype)]
    inputs += [block.take_keys(x, grid, dtype) for x in (k, v)]
    bias = block.bias(grid, key_bias, band)
    if bias is not None and bias.ndim == 5:
        bias = bias.flatten(0, 1)  # (samples * leads, 1, queries or 1, keys)
    return [x.flatten(0, 1) for x in inputs], bias


def _rows_forward_fused(block, q, k, v, key_bias, band, grid, scale, out, lse, columns):
    inputs, bias = _fused_inputs(block, grid, columns.dtype, q, k, v, key_bias, band)
    own_output, own_lse = FUSED[q.device.type].forward(*inputs, bias, scale)
    others, target = block.of_columns(columns), block.rows(out, grid, block.queries)
    own_lse = own_lse.reshape(target.shape[:4]).to(columns.dtype)
    merged = torch.logaddexp(own_lse, torch.logsumexp(others, (-2, -1)))
    target.copy_(own_output.view(target.shape).to(columns.dtype).mul_((own_lse - merged).exp_()[..., None]))
    others.sub_(merged[..., None, None]).exp_()
    block.rows(lse, grid, block.queries).copy_(merged[..., None])


def _rows_backward_fused(block, grad, q, k, v, key_bias, band, grid, scale, out, lse, columns, grad_columns, grads):
    dtype = columns.dtype
    inputs, bias = _fused_inputs(block, grid, dtype, q, k, v, key_bias, band)
    grad, output, merged = (block.rows(x, grid, block.queries).to(dtype) for x in (grad, out, lse))
    merged = merged.squeeze(-1)
    delta = (grad * output).sum(-1)
    others, grad_others = block.of_columns(columns), block.of_columns(grad_columns)
    others.sub_(merged[..., None, None]).exp_()
    grad_others.sub_(delta[..., None, None]).mul_(others)
    flat = [x.flatten(0, 1).to(inputs[0].dtype) for x in (grad, output)] + [merged.flatten(0, 1)]
    grad_queries, grad_keys, grad_values = FUSED[q.device.type].backward(*flat, *inputs, bias, scale)
    target = block.rows(grads[0], grid, block.queries)
    target.add_(grad_queries.view(target.shape))
    for each, value in ((grads[1], grad_keys), (grads[2], grad_values)):
        block.add_to_keys(each, grid, value.unflatten(0, target.shape[:2]))


class FlashCPU:
    """The flash kernel of the CPU. Half precision is computed in float32: natively it was four times slower."""

    takes_half = False

    @staticmethod
    def forward(query, key, value, bias, scale):
        """Return `(output (n, H, M, D), log-sum-exp (n, H, M))` for `query` (n, H, M, D), `key` and `value` (n, H, K, D).

        `bias` is None or broadcastable to `(n, H, M, K)`, and is added to the scores.
        """
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, attn_mask=bias, scale=scale)

    @staticmethod
    def backward(grad, output, lse, query, key, value, bias, scale):
        """Return the gradients of query, key, value, for the share of the probability that these keys have in `lse`."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return flash(grad, query, key, value, output, lse, 0.0, False, attn_mask=bias, scale=scale)


class EfficientCUDA:
    """The memory-efficient kernel of PyTorch on CUDA, which takes a bias and every precision.

    Written after the signatures of PyTorch 2.13 and tested with a stand-in for the two operators; UNMEASURED on a GPU.
    """

    takes_half = True

    @staticmethod
    def forward(query, key, value, bias, scale):
        bias = EfficientCUDA._aligned(bias, query, key)
        output, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, False, scale=scale
        )
        return output, lse[..., : query.shape[2]]  # the kernel rounds the length up to its block

    @staticmethod
    def backward(grad, output, lse, query, key, value, bias, scale):
        lse = torch.nn.functional.pad(lse, (0, -query.shape[2] % 32), value=float("inf"))
        no_dropout = torch.zeros((), dtype=torch.int64, device=query.device)
        grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad,
            query,
            key,
            value,
            EfficientCUDA._aligned(bias, query, key),
            output,
            lse,
            no_dropout,
            no_dropout,
            0.0,
            [True, True, True, False],
            False,
            scale=scale,
        )
        return grads[:3]

    @staticmethod
    def _aligned(bias, query, key):
        """Return the bias in full shape, its rows at addresses that the kernel takes."""
        if bias is None:
            return None
        num_keys = key.shape[2]
        bias = torch.nn.functional.pad(bias.to(query.dtype), (0, -num_keys % 16))[..., :num_keys]
        return bias.expand(*query.shape[:3], num_keys)


FUSED = {"cpu": FlashCPU, "cuda": EfficientCUDA}


# The whole pass


def forward(q, k, v, key_mask, grid: Grid, scale: float):
    """Return `(output (B, N, H, D), log-sum-exp (B, N, H, 1))`; q, k, v `(B, N, H, D)`, key_mask `(B, N)` bool or None.

    The log-sum-exp is that of all keys where the fused kernel took the rows, else 0. A query that has no key at all gets some finite output: whoever calls sets it to zero.
    """
    dtype = _compute_dtype(q)
    key_bias = _key_bias(key_mask, dtype)
    blocks = list(row_blocks(grid, q.device.type))
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.zeros((*q.shape[:3], 1), dtype=dtype, device=q.device)
    columns = _column_scores(q, k, key_bias, grid, dtype, scale)
    band = _window_band(grid, blocks[0].queries.stop, dtype, q.device)
    for block in blocks:
        if block.is_fused:
            _rows_forward_fused(block, q, k, v, key_bias, band, grid, scale, out, lse, columns)
        else:
            _rows_forward(block, q, k, v, key_bias, band, grid, scale, out, columns)
    _add_column_outputs(out, columns, v, grid, dtype)
    if grid.num_global:
        queries, keys, values = (x.transpose(1, 2).to(dtype) for x in (q[:, : grid.num_global], k, v))
        out[:, : grid.num_global] = torch.matmul(
            _global_probabilities(queries, keys, key_bias, scale), values
        ).transpose(1, 2)
    return out.to(q.dtype), lse


def backward(grad, q, k, v, key_mask, out, lse, grid: Grid, scale: float):
    """Return the gradients of q, k and v, `(B, N, H, D)` each."""
    dtype = _compute_dtype(q)
    key_bias = _key_bias(key_mask, dtype)
    grads = [torch.zeros(q.shape, dtype=dtype, device=q.device) for _ in range(3)]
    columns = _column_scores(q, k, key_bias, grid, dtype, scale)
    grad_columns = _column_products(grad, v, grid, dtype, 1.0, 0.0)
    blocks = list(row_blocks(grid, q.device.type))
    band = _window_band(grid, blocks[0].queries.stop, dtype, q.device)
    for block in blocks:
        if block.is_fused:
            _rows_backward_fused(
                block, grad, q, k, v, key_bias, band, grid, scale, out, lse, columns, grad_columns, grads
            )
        else:
            _rows_backward(block, grad, q, k, v, key_bias, band, grid, scale, columns, grad_columns, grads)
    _add_column_outputs(grads[0], grad_columns, k, grid, dtype, factor=scale)
    _add_column_outputs(grads[1], grad_columns, q, grid, dtype, factor=scale, transpose=True)
    _add_column_outputs(grads[2], columns, grad, grid, dtype, transpose=True)
    if grid.num_global:
        _add_global_gradients(grad, q, k, v, key_bias, grid, scale, grads)
    return tuple(each.to(q.dtype) for each in grads)


def _global_probabilities(queries, keys, key_bias, scale):
    scores = torch.matmul(queries, keys.transpose(2, 3)).mul_(scale)  # (B, H, G, N)
    return torch.softmax(scores if key_bias is None else scores.add_(key_bias[:, None, None]), -1)


def _add_global_gradients(grad, q, k, v, key_bias, grid, scale, grads):
    num_global, dtype = grid.num_global, grads[0].dtype
    grad, queries = (x[:, :num_global].transpose(1, 2).to(dtype) for x in (grad, q))
    keys, values = (x.transpose(1, 2).to(dtype) for x in (k, v))
    probabilities = _global_probabilities(queries, keys, key_bias, scale)
    grad_scores = torch._softmax_backward_data(torch.matmul(grad, values.transpose(2, 3)), probabilities, -1, dtype)
    grads[0][:, :num_global] += torch.matmul(grad_scores, keys).mul_(scale).transpose(1, 2)
    grads[1].add_(torch.matmul(grad_scores.transpose(2, 3), queries).transpose(1, 2), alpha=scale)
    grads[2].add_(torch.matmul(probabilities.transpose(2, 3), grad).transpose(1, 2))


def _compute_dtype(q):
    """Half precision is computed in float32: on a CPU it is faster so, and the products of columns keep their accuracy."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _key_bias(key_mask, dtype):
    if key_mask is None:
        return None
    return torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device).masked_fill_(~key_mask, MASKED)


# The operator: opaque to torch.compile and torch.export, which only need its shapes

_NAMESPACE = re.sub(r"\W", "_", __name__)  # a copy of this file, loaded from a checkpoint, brings its own operator


def _grid(q, num_leads, num_global, time_tolerance, lead_window):
    batch_size, num_tokens, num_heads, head_dim = q.shape
    num_patches = (num_tokens - num_global) // num_leads
    return Grid(batch_size, num_global, num_leads, num_patches, num_heads, head_dim, time_tolerance, lead_window)


@torch.library.custom_op(f"{_NAMESPACE}::attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    num_leads: int,
    num_global: int,
    time_tolerance: int,
    lead_window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(q, k, v, key_mask, _grid(q, num_leads, num_global, time_tolerance, lead_window), scale)


@torch.library.custom_op(f"{_NAMESPACE}::attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    num_leads: int,
    num_global: int,
    time_tolerance: int,
    lead_window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return backward(
        grad, q, k, v, key_mask, out, lse, _grid(q, num_leads, num_global, time_tolerance, lead_window), scale
    )


@_attention.register_fake
def _(q, k, v, key_mask, num_leads, num_global, time_tolerance, lead_window, scale):
    lse = q.new_empty((*q.shape[:3], 1), dtype=_compute_dtype(q))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


@_attention_backward.register_fake
def _(grad, q, k, v, key_mask, out, lse, num_leads, num_global, time_tolerance, lead_window, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    q, k, v, key_mask, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, key_mask, *output)


def _backward(ctx, grad, _):
    q, k, v, key_mask, out, lse = ctx.saved_tensors
    grads = _attention_backward(grad, q, k, v, key_mask, out, lse, *ctx.settings)
    return (*grads, *[None] * 6)


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def sparse_attention(q, k, v, key_mask, *, num_leads, num_global, time_tolerance, lead_window, scale):
    """Return the attention of every query over its pattern, `(B, N, H, D)`, differentiable once.

    Args:
        q, k, v (`torch.Tensor` of shape `(B, N, H, D)`): N = num_global + num_leads * patches.
        key_mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): True = may be attended. A query without any key gets
            some finite output, which the caller sets to zero.
    """
    out, _ = _attention(q, k, v, key_mask, num_leads, num_global, time_tolerance, lead_window, float(scale))
    return out
