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

    @property
    def steps(self):
        """In patches, from a query to the columns that hold its keys; none where a single lead has them all in its row."""
        return (
            range(-self.time_tolerance, self.time_tolerance + 1)
            if self.num_leads > 1 or not self.has_rows
            else range(0)
        )

    def tokens(self, x):
        """Return the grid part of `x` (B, N, ...) as a view `(B, L, P, ...)`."""
        return x[:, self.num_global :].unflatten(1, (self.num_leads, self.num_patches))

    def columns(self, x, samples, times):
        """Return a view `(samples, times, H, L, D)` of `x` (B, N, H, D)."""
        return self.tokens(x)[samples, :, times].permute(0, 2, 3, 1, 4)

    def column_keys(self, x, samples, times, fill=0.0):
        """Return what the queries at `times` find at their steps, `(samples, times, H, steps * L, D)`; `fill` off the grid."""
        if len(self.steps) <= 1:
            return self.columns(x, samples, times)[:, :, :, : self.num_leads * len(self.steps)]
        first, last = times.start + self.steps[0], times.stop + self.steps[-1]
        inside = self.tokens(x)[samples, :, max(first, 0) : min(last, self.num_patches)]
        padding = (0, 0) * 2 + (max(-first, 0), max(last - self.num_patches, 0))
        windows = torch.nn.functional.pad(inside, padding, value=fill).unfold(2, len(self.steps), 1)
        return windows.permute(0, 2, 3, 5, 1, 4).flatten(3, 4)


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

    def of_columns(self, columns):
        """Return a view `(samples, leads, H, queries, steps * L)` of what the columns hold, `(B, P, H, L, steps * L)`."""
        return columns[self.samples, self.queries, :, self.leads].transpose(1, 3)

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
        for start, stop in _even_parts(outer, capacity // inner):
            yield slice(start, stop), slice(0, inner)
        return
    for i in range(outer):
        for start, stop in _even_parts(inner, max(capacity, 1)):
            yield slice(i, i + 1), slice(start, stop)


def _even_parts(length, most):
    """Return `(start, stop)` of as few parts of at most `most` as there can be, all about equally long."""
    num_parts = -(-length // most)
    edges = [length * i // num_parts for i in range(num_parts + 1)]
    return zip(edges, edges[1:])


def row_blocks(grid: Grid, device_type: str) -> Iterator[RowBlock]:
    """Yield the blocks of phase 2: each query once; rows longer than their window in chunks of queries."""
    num_patches, window = grid.num_patches, grid.lead_window
    num_others = len(grid.steps) * grid.num_leads
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
        step = min(step, max(most // (grid.num_heads * max(num_keys + num_others, 1)), 1))
        capacity = most // (grid.num_heads * step * (num_keys + num_others))
    for samples, leads in _chunks(grid.batch_size, grid.num_leads, capacity):
        for start in range(0, num_patches, step):
            stop = min(start + step, num_patches)
            first, last = (
                (0, num_patches) if window is None else (max(start - window, 0), min(stop + window, num_patches))
            )
            keys = slice(first, last) if grid.has_rows else slice(0, 0)
            yield RowBlock(samples, leads, slice(start, stop), keys, is_fused)


def column_blocks(grid: Grid, device_type: str) -> Iterator[tuple[slice, slice]]:
    """Yield `(samples, times of the queries)` of phases 1 and 3."""
    if len(grid.steps):
        most = _CPU_BLOCK if device_type == "cpu" else _GPU_BLOCK
        capacity = most // (grid.num_heads * grid.num_leads * len(grid.steps) * max(grid.head_dim, grid.num_leads))
        yield from _chunks(grid.batch_size, grid.num_patches, capacity)


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


def _new_columns(grid, dtype, device):
    """Return room for one number for each query and column key, `(B, P, H, L, steps * L)`."""
    num_keys = len(grid.steps) * grid.num_leads
    return torch.empty(
        (grid.batch_size, grid.num_patches, grid.num_heads, grid.num_leads, num_keys), dtype=dtype, device=device
    )


def _column_products(left, right, grid, dtype, factor=1.0):
    """Return `factor * left . right` of every query and column key, `(B, P, H, L, steps * L)`."""
    products = _new_columns(grid, dtype, left.device)
    for samples, times in column_blocks(grid, left.device.type):
        queries = _flat(grid.columns(left, samples, times), dtype)
        keys = _flat(grid.column_keys(right, samples, times), dtype)
        target = products[samples, times]
        target.copy_(_products(queries, keys.transpose(1, 2), factor).view(target.shape))
    return products


def _column_scores(q, k, key_bias, grid, dtype, scale):
    scores = _column_products(q, k, grid, dtype, scale)
    if len(grid.steps) > 1 or key_bias is not None:
        if key_bias is None:
            key_bias = torch.zeros((), dtype=dtype, device=q.device).expand(q.shape[:2])
        everything = (slice(0, grid.batch_size), slice(0, grid.num_patches))
        bias = grid.column_keys(key_bias[..., None, None], *everything, fill=MASKED)  # (B, P, 1, steps * L, 1)
        scores.add_(bias.transpose(3, 4))
    if grid.has_rows:  # the own lead is a key of the row
        scores.unflatten(-1, (-1, grid.num_leads)).diagonal(dim1=3, dim2=5).fill_(MASKED)
    return scores


def _add_column_outputs(out, weights, values, grid, dtype, factor=1.0):
    """Add `factor * weights @ values` to the queries of `out`; weights `(B, P, H, L, steps * L)`."""
    for samples, times in column_blocks(grid, out.device.type):
        target, source = grid.columns(out, samples, times), grid.column_keys(values, samples, times).to(dtype)
        if grid.num_leads <= _FEW_LEADS:
            for lead, key in itertools.product(range(grid.num_leads), range(source.shape[3])):
                target[..., lead, :].addcmul_(
                    weights[samples, times, :, lead, key, None], source[..., key, :], value=factor
                )
        else:
            target.add_(_products(_flat(weights[samples, times]), _flat(source), factor).view(target.shape))


def _add_to_column_keys(out, weights, values, grid, dtype, factor=1.0):
    """Add `factor * weights^T @ values` to the keys of `out`: what the queries send to them."""
    for samples, times in column_blocks(grid, out.device.type):
        source = grid.columns(values, samples, times).to(dtype)
        of_steps = weights[samples, times].unflatten(-1, (-1, grid.num_leads))  # (samples, times, H, L, steps, L)
        if grid.num_leads > _FEW_LEADS:
            products = _products(_flat(weights[samples, times]).transpose(1, 2), _flat(source), factor)
            products = products.view(*source.shape[:3], -1, *source.shape[3:])  # (samples, times, H, steps, L, D)
        for i, step in enumerate(grid.steps):
            first, last = max(times.start + step, 0), min(times.stop + step, grid.num_patches)
            if first >= last:
                continue
            target = grid.columns(out, samples, slice(first, last))
            inside = slice(first - step - times.start, last - step - times.start)
            if grid.num_leads > _FEW_LEADS:
                target.add_(products[:, inside, :, i])
                continue
            for lead, key in itertools.product(range(grid.num_leads), repeat=2):
                weight = of_steps[:, inside, :, lead, i, key, None]
                target[..., key, :].addcmul_(weight, source[:, inside, :, lead], value=factor)


# Phase 2: rows, by products with a joint softmax


def _joint(own, others):
    """Return what a block's row and columns hold side by side, `(samples, leads, H, queries, G + keys + steps * L)`."""
    return torch.cat([own, others], dim=-1)


def _row_scores(block, q, k, key_bias, band, grid, dtype, scale):
    queries, keys = block.rows(q, grid, block.queries).to(dtype), block.take_keys(k, grid, dtype)
    scores = _products(_flat(queries), _flat(keys).transpose(1, 2), scale).view(*queries.shape[:4], keys.shape[3])
    bias = block.bias(grid, key_bias, band)
    return scores if bias is None else scores.add_(bias)


def _probabilities(block, q, k, key_bias, band, grid, scale, columns):
    """Return the joint softmax of a block, and write its part of the columns back in place of their scores."""
    scores = _row_scores(block, q, k, key_bias, band, grid, columns.dtype, scale)
    others = block.of_columns(columns)
    probabilities = torch.softmax(_joint(scores, others), -1)
    others.copy_(probabilities[..., scores.shape[-1] :])
    return probabilities


def _rows_forward(block, probabilities, v, grid, out):
    """Write the rows' output."""
    values, target = block.take_keys(v, grid, out.dtype), block.rows(out, grid, block.queries)
    own = _flat(probabilities)[..., : values.shape[3]]
    target.copy_(torch.bmm(own, _flat(values)).view(target.shape))


def _rows_backward(block, grad, q, k, v, probabilities, grid, scale, grad_columns, grads):
    """Add the rows' gradients; turn the gradients of the columns' probabilities into those of their scores."""
    dtype = probabilities.dtype
    grad = _flat(block.rows(grad, grid, block.queries), dtype)
    queries, keys, values = (
        block.rows(q, grid, block.queries).to(dtype),
        *(block.take_keys(x, grid, dtype) for x in (k, v)),
    )
    num_own, others = keys.shape[3], block.of_columns(grad_columns)
    own = _flat(probabilities)[..., :num_own]
    block.add_to_keys(grads[2], grid, torch.bmm(own.transpose(1, 2), grad).view(keys.shape))
    grad_own = torch.bmm(grad, _flat(values).transpose(1, 2)).view(*probabilities.shape[:4], num_own)
    grad_scores = torch._softmax_backward_data(_joint(grad_own, others), probabilities, -1, dtype)
    others.copy_(grad_scores[..., num_own:])
    own = _flat(grad_scores)[..., :num_own]
    target = block.rows(grads[0], grid, block.queries)
    target.copy_(_products(own, _flat(keys), scale).view(target.shape))  # every query is in one block
    block.add_to_keys(grads[1], grid, _products(own.transpose(1, 2), _flat(queries), scale).view(keys.shape))


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
    target, total = block.rows(out, grid, block.queries), block.rows(lse, grid, block.queries)
    own_lse = own_lse.reshape(total.shape).to(total.dtype)
    total.copy_(torch.logaddexp(own_lse, total))  # it held that of the columns
    target.copy_(own_output.view(target.shape).to(total.dtype).mul_((own_lse - total).exp_()))
    block.of_columns(columns).sub_(total).exp_()


def _rows_backward_fused(block, grad, q, k, v, key_bias, band, grid, scale, out, lse, columns, grad_columns, grads):
    dtype = columns.dtype
    inputs, bias = _fused_inputs(block, grid, dtype, q, k, v, key_bias, band)
    grad, output, total = (block.rows(x, grid, block.queries).to(dtype) for x in (grad, out, lse))
    delta = (grad * output).sum(-1, keepdim=True)
    others, grad_others = block.of_columns(columns), block.of_columns(grad_columns)
    others.sub_(total).exp_()
    grad_others.sub_(delta).mul_(others)
    flat = [x.flatten(0, 1).to(inputs[0].dtype) for x in (grad, output)] + [total.squeeze(-1).flatten(0, 1)]
    grad_queries, grad_keys, grad_values = FUSED[q.device.type].backward(*flat, *inputs, bias, scale)
    target = block.rows(grads[0], grid, block.queries)
    target.copy_(grad_queries.view(target.shape))  # every query is in one block
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
        least = torch.finfo(query.dtype).min / 2  # -1e30 is minus infinity in float16: NaN in a row without valid keys
        bias = torch.nn.functional.pad(bias.clamp(min=least).to(query.dtype), (0, -num_keys % 16))[..., :num_keys]
        return bias.expand(*query.shape[:3], num_keys)


FUSED = {"cpu": FlashCPU, "cuda": EfficientCUDA}


# The whole pass


def keeps_probabilities(grid: Grid, device_type: str) -> bool:
    """Whether a forward pass that is to be differentiated keeps its probabilities: where they take at most twice the
    memory of q, which spares the backward pass to compute them again."""
    block = next(row_blocks(grid, device_type))
    num_keys = grid.num_global + block.keys.stop - block.keys.start + len(grid.steps) * grid.num_leads
    return not block.is_fused and block.queries.stop == grid.num_patches and num_keys <= 2 * grid.head_dim


def forward(q, k, v, key_mask, grid: Grid, scale: float, keep: bool = False):
    """Return the output `(B, N, H, D)`, and what the backward pass needs of it.

    Args:
        q, k, v (`torch.Tensor` of shape `(B, N, H, D)`), key_mask (`torch.BoolTensor` of shape `(B, N)`, *optional*).
        keep (`bool`): keep the probabilities `(B, L, H, P, keys)` for the backward pass, see `keeps_probabilities`.

    Returns:
        The output, the log-sum-exp `(B, N, H, 1)` of all scores (0 where no fused kernel took the rows), the probabilities
        (empty unless kept). A query that has no key at all gets some finite output: whoever calls sets it to zero.
    """
    dtype = _compute_dtype(q)
    key_bias = _key_bias(key_mask, dtype)
    blocks = list(row_blocks(grid, q.device.type))
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.zeros((*q.shape[:3], 1), dtype=dtype, device=q.device)
    kept = torch.empty(_kept_shape(grid, q.device.type, keep), dtype=dtype, device=q.device)
    columns = _column_scores(q, k, key_bias, grid, dtype, scale)
    band = _window_band(grid, blocks[0].queries.stop, dtype, q.device)
    if blocks[0].is_fused:  # the rows are added block by block
        grid.tokens(lse).copy_(torch.logsumexp(columns, -1).permute(0, 3, 1, 2)[..., None])
    for block in blocks:
        if block.is_fused:
            _rows_forward_fused(block, q, k, v, key_bias, band, grid, scale, out, lse, columns)
            continue
        probabilities = _probabilities(block, q, k, key_bias, band, grid, scale, columns)
        if keep:
            kept[block.samples, block.leads] = probabilities
        _rows_forward(block, probabilities, v, grid, out)
    _add_column_outputs(out, columns, v, grid, dtype)
    if grid.num_global:
        queries, keys, values = (x.transpose(1, 2).to(dtype) for x in (q[:, : grid.num_global], k, v))
        attended = torch.matmul(_global_probabilities(queries, keys, key_bias, scale), values)
        out[:, : grid.num_global] = attended.transpose(1, 2)
    return out.to(q.dtype), lse, kept


def _kept_shape(grid, device_type, keep):
    if not keep:
        return (0,)
    block = next(row_blocks(grid, device_type))
    num_keys = grid.num_global + block.keys.stop - block.keys.start + len(grid.steps) * grid.num_leads
    return (grid.batch_size, grid.num_leads, grid.num_heads, grid.num_patches, num_keys)


def backward(grad, q, k, v, key_mask, out, lse, kept, grid: Grid, scale: float):
    """Return the gradients of q, k and v, `(B, N, H, D)` each; `out`, `lse`, `kept` as returned by `forward`."""
    dtype = _compute_dtype(q)
    key_bias = _key_bias(key_mask, dtype)
    blocks = list(row_blocks(grid, q.device.type))
    band = _window_band(grid, blocks[0].queries.stop, dtype, q.device)
    grads = [torch.zeros(q.shape, dtype=dtype, device=q.device) for _ in range(3)]
    is_kept = kept.numel() > 0
    columns = _new_columns(grid, dtype, q.device) if is_kept else _column_scores(q, k, key_bias, grid, dtype, scale)
    grad_columns = _column_products(grad, v, grid, dtype)
    for block in blocks:
        if block.is_fused:
            _rows_backward_fused(
                block, grad, q, k, v, key_bias, band, grid, scale, out, lse, columns, grad_columns, grads
            )
            continue
        if is_kept:
            probabilities, others = kept[block.samples, block.leads], block.of_columns(columns)
            others.copy_(probabilities[..., probabilities.shape[-1] - others.shape[-1] :])
        else:
            probabilities = _probabilities(block, q, k, key_bias, band, grid, scale, columns)
        _rows_backward(block, grad, q, k, v, probabilities, grid, scale, grad_columns, grads)
    _add_column_outputs(grads[0], grad_columns, k, grid, dtype, factor=scale)
    _add_to_column_keys(grads[1], grad_columns, q, grid, dtype, factor=scale)
    _add_to_column_keys(grads[2], columns, grad, grid, dtype)
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
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return forward(q, k, v, key_mask, _grid(q, num_leads, num_global, time_tolerance, lead_window), scale, keep)


@torch.library.custom_op(f"{_NAMESPACE}::attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    kept: torch.Tensor,
    num_leads: int,
    num_global: int,
    time_tolerance: int,
    lead_window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grid = _grid(q, num_leads, num_global, time_tolerance, lead_window)
    return backward(grad, q, k, v, key_mask, out, lse, kept, grid, scale)


@_attention.register_fake
def _(q, k, v, key_mask, num_leads, num_global, time_tolerance, lead_window, scale, keep):
    grid, dtype = _grid(q, num_leads, num_global, time_tolerance, lead_window), _compute_dtype(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return (
        out,
        q.new_empty((*q.shape[:3], 1), dtype=dtype),
        q.new_empty(_kept_shape(grid, q.device.type, keep), dtype=dtype),
    )


@_attention_backward.register_fake
def _(grad, q, k, v, key_mask, out, lse, kept, num_leads, num_global, time_tolerance, lead_window, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    q, k, v, key_mask, *settings, _ = inputs
    ctx.settings = settings
    ctx.save_for_backward(q, k, v, key_mask, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    grads = _attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return (*grads, *[None] * 7)


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def sparse_attention(q, k, v, key_mask, *, num_leads, num_global, time_tolerance, lead_window, scale):
    """Return the attention of every query over its pattern, `(B, N, H, D)`, differentiable once.

    Args:
        q, k, v (`torch.Tensor` of shape `(B, N, H, D)`): N = num_global + num_leads * patches.
        key_mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): True = may be attended. A query without any key gets
            some finite output, which the caller sets to zero.
    """
    settings = (num_leads, num_global, time_tolerance, lead_window)
    is_trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    # an exported program may be called with any grid
    keep = is_trained and not _is_symbolic(q) and keeps_probabilities(_grid(q, *settings), q.device.type)
    return _attention(q, k, v, key_mask, *settings, float(scale), keep)[0]


def _is_symbolic(x):
    return any(isinstance(size, torch.SymInt) for size in x.shape)
