"""Cardio-Sparse Attention without the N x N scores, exact to rounding.

The keys of a query are split into two disjoint parts, so that none counts twice:

    row      the global tokens, and its own lead within the window
    columns  the other leads, at `2 w + 1` steps in time; the own lead too where the window does not reach beyond `w`

The scores of the columns are few, `(2 w + 1) L` a query, and are kept for the whole grid. A forward pass has three phases:

    1. scores of the columns        2. rows, block by block        3. output of the columns

Short rows take the softmax of a query over both parts at once, and keep its probabilities for the backward pass. Long rows
are left to a kernel that does not store their scores; the parts are merged by their log-sum-exp z_i and outputs o_i:

    z = log(sum_i exp(z_i)),  o = sum_i exp(z_i - z) o_i

The backward pass treats the parts one after the other, each by itself: with P = exp(s - z) the share that its keys have of
the whole probability, dS = P (dO V^T - rowsum(dO o)). This is what the backward of a flash kernel computes if it is given
the merged o and z.
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

MASKED = -1e30  # a masked score; finite, so that no part is NaN where all its keys are masked
_CPU_BLOCK = 2**19  # numbers of a block on a CPU: 2 MB in float32, about what two cores keep in their caches
_GPU_BLOCK = 2**28
_MOST_SHORT_KEYS = 128  # up to which products with a joint softmax beat the kernel of long rows on a CPU
_WINDOW_QUERIES = 64  # queries that share the keys of one window: 32 to 64 were equal, 128 slower
_LONG_TOKENS = 3 * 2**10  # queries and keys (twice) that one call of the CPU kernel takes: bounds its gradients
_SUMMED_TOKENS = 2**9
_FEW_LEADS = 2  # up to which the batched product is slower than adding lead by lead


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

    def is_whole(self, grid):
        """Whether its keys are those of no other block."""
        everything = slice(0, grid.num_patches)
        return not grid.num_global and self.queries == self.keys == everything

    def put_keys(self, x, grid, value):
        """Add `value` (samples, leads, H, G + keys, D) to the keys of `x`, or write it where nothing else goes there."""
        if grid.num_global:
            x[self.samples, : grid.num_global].add_(value[:, :, :, : grid.num_global].sum(1).transpose(1, 2))
        target, value = self.rows(x, grid, self.keys), value[:, :, :, grid.num_global :]
        target.copy_(value) if self.is_whole(grid) else target.add_(value)

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


def has_short_rows(grid: Grid, device_type: str) -> bool:
    """Whether the rows are short enough for products with a joint softmax, or have no keys of their own."""
    num_keys = grid.num_global + grid.num_patches + len(grid.steps) * grid.num_leads
    return not grid.has_rows or device_type == "cpu" and num_keys <= _MOST_SHORT_KEYS


def row_blocks(grid: Grid, device_type: str) -> Iterator[RowBlock]:
    """Yield the blocks of phase 2: each query once; rows longer than their window in chunks of queries."""
    num_patches, window = grid.num_patches, grid.lead_window
    most = _CPU_BLOCK if device_type == "cpu" else _GPU_BLOCK
    step = num_patches
    if has_short_rows(grid, device_type):
        num_keys = grid.num_global + (num_patches if grid.has_rows else 0) + len(grid.steps) * grid.num_leads
        if not grid.has_rows:
            step = min(step, max(most // (grid.num_heads * max(num_keys, 1)), 1))
        window, capacity = None, most // (grid.num_heads * step * max(num_keys, 1))
    else:
        if window is not None and num_patches > 2 * window + _WINDOW_QUERIES:
            step = _WINDOW_QUERIES
        num_keys = grid.num_global + (num_patches if step == num_patches else step + 2 * window)
        if row_kernel(device_type) is Products:
            step = min(step, max(most // (grid.num_heads * num_keys), 1))
            capacity = most // (grid.num_heads * step * num_keys)
        else:
            capacity = (
                _LONG_TOKENS // (step + 2 * num_keys) if device_type == "cpu" else grid.batch_size * grid.num_leads
            )
    for samples, leads in _chunks(grid.batch_size, grid.num_leads, capacity):
        for start in range(0, num_patches, step):
            stop = min(start + step, num_patches)
            if not grid.has_rows:
                keys = slice(0, 0)
            elif window is None:
                keys = slice(0, num_patches)
            else:
                keys = slice(max(start - window, 0), min(stop + window, num_patches))
            yield RowBlock(samples, leads, slice(start, stop), keys)


def column_blocks(grid: Grid, device_type: str) -> Iterator[tuple[slice, slice]]:
    """Yield `(samples, times of the queries)` of phases 1 and 3."""
    if len(grid.steps):
        most = _CPU_BLOCK if device_type == "cpu" else _GPU_BLOCK
        capacity = most // (grid.num_heads * grid.num_leads * len(grid.steps) * max(grid.head_dim, grid.num_leads))
        yield from _chunks(grid.batch_size, grid.num_patches, capacity)


def _window_band(grid, block, dtype, device):
    """Return what is added to the scores of a block's M queries and `M + 2 W` keys, or None where no window ends."""
    if grid.lead_window is None or grid.lead_window >= grid.num_patches or not grid.has_rows:
        return None
    num_queries = block.queries.stop - block.queries.start
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


def _column_products(left, right, grid, dtype, factor):
    """Return `factor * left . right` of every query and column key, `(B, P, H, L, steps * L)`."""
    num_keys = len(grid.steps) * grid.num_leads
    shape = (grid.batch_size, grid.num_patches, grid.num_heads, grid.num_leads, num_keys)
    products = torch.empty(shape, dtype=dtype, device=left.device)
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


def _columns_forward(columns, v, grid, out):
    """Add the columns' output to that of the rows; `columns` holds probabilities."""
    for samples, times in column_blocks(grid, out.device.type):
        values = grid.column_keys(v, samples, times).to(out.dtype)
        _add_to_queries(grid.columns(out, samples, times), columns[samples, times], values)


def _columns_backward(grad, q, k, v, delta, columns, grid, scale, grads):
    """Add the columns' gradients to those of the rows."""
    dtype = columns.dtype
    for samples, times in column_blocks(grid, q.device.type):
        queries, grad_output = (grid.columns(x, samples, times).to(dtype) for x in (q, grad))
        keys, values = (grid.column_keys(x, samples, times).to(dtype) for x in (k, v))
        probabilities = columns[samples, times]
        grad_scores = _score_gradients(
            _flat(probabilities), _flat(grad_output), _flat(values), _flat(grid.columns(delta, samples, times))
        ).view(probabilities.shape)
        _add_to_queries(grid.columns(grads[0], samples, times), grad_scores, keys, scale)
        _add_to_keys(grads[1], samples, times, grad_scores, queries, grid, scale)
        _add_to_keys(grads[2], samples, times, probabilities, grad_output, grid)


def _add_to_queries(target, weights, source, factor=1.0):
    """Add `factor * weights @ source` to the queries' `target` (samples, times, H, L, D)."""
    num_leads, num_keys = weights.shape[3:]
    if num_leads > _FEW_LEADS:
        target.add_(_products(_flat(weights), _flat(source), factor).view(target.shape))
        return
    for lead, key in itertools.product(range(num_leads), range(num_keys)):
        target[..., lead, :].addcmul_(weights[..., lead, key, None], source[..., key, :], value=factor)


def _add_to_keys(out, samples, times, weights, source, grid, factor=1.0):
    """Add `factor * weights^T @ source` to the keys of `out`: what the queries at `times` send to them."""
    of_steps = weights.unflatten(-1, (-1, grid.num_leads))  # (samples, times, H, L, steps, L)
    if grid.num_leads > _FEW_LEADS:
        products = _products(_flat(weights).transpose(1, 2), _flat(source), factor)
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


def _score_gradients(probabilities, grad_output, values, delta):
    """Return dS = P (dO V^T - delta) for batches of matrices, with `delta` (n, M, 1) = rowsum(dO o)."""
    return torch.baddbmm(delta, grad_output, values.transpose(1, 2), beta=-1).mul_(probabilities)


# Phase 2: short rows, by products with a joint softmax


def _short_rows_forward(block, q, k, v, key_bias, band, grid, scale, out, columns, kept):
    """Write the rows' output, and the columns' probabilities in place of their scores; fill `kept` unless it is empty."""
    queries, keys, values = _row_inputs(block, grid, columns.dtype, q, k, v)
    scores = _products(_flat(queries), _flat(keys).transpose(1, 2), scale).view(*queries.shape[:4], -1)
    bias = block.bias(grid, key_bias, band)
    if bias is not None:
        scores.add_(bias)
    others, num_own = block.of_columns(columns), scores.shape[-1]
    target = kept[block.samples, block.leads, :, block.queries] if kept.numel() else None
    probabilities = torch.softmax(torch.cat([scores, others], -1), -1, out=target)
    others.copy_(probabilities[..., num_own:])
    target = block.rows(out, grid, block.queries)
    target.copy_(torch.bmm(_flat(probabilities)[..., :num_own], _flat(values)).view(target.shape))


def _short_rows_backward(block, grad, q, k, v, delta, kept, grid, scale, grads):
    queries, keys, values = _row_inputs(block, grid, kept.dtype, q, k, v)
    grad, delta = (_flat(block.rows(x, grid, block.queries), kept.dtype) for x in (grad, delta))
    probabilities = _flat(kept[block.samples, block.leads, :, block.queries])[..., : keys.shape[3]]
    block.put_keys(grads[2], grid, torch.bmm(probabilities.transpose(1, 2), grad).view(keys.shape))
    grad_scores = _score_gradients(probabilities, grad, _flat(values), delta)
    target = block.rows(grads[0], grid, block.queries)
    target.copy_(_products(grad_scores, _flat(keys), scale).view(target.shape))  # every query is in one block
    block.put_keys(grads[1], grid, _products(grad_scores.transpose(1, 2), _flat(queries), scale).view(keys.shape))


def _row_inputs(block, grid, dtype, q, k, v):
    return [block.rows(q, grid, block.queries).to(dtype), *(block.take_keys(x, grid, dtype) for x in (k, v))]


# Phase 2: long rows, by the kernel of the device, merged with the columns


def _kernel_inputs(block, grid, dtype, q, k, v, key_bias, band):
    dtype = q.dtype if row_kernel(q.device.type).takes_half else dtype
    bias = block.bias(grid, key_bias, band)
    if bias is not None and bias.ndim == 5:
        bias = bias.flatten(0, 1)  # (samples * leads, 1, queries or 1, keys)
    return [x.flatten(0, 1) for x in _row_inputs(block, grid, dtype, q, k, v)], bias


def _long_rows_forward(block, q, k, v, key_bias, band, grid, scale, out, lse):
    """Write the rows' output; `lse` holds that of the columns, and gets that of both."""
    inputs, bias = _kernel_inputs(block, grid, lse.dtype, q, k, v, key_bias, band)
    own_output, own_lse = row_kernel(q.device.type).forward(*inputs, bias, scale)
    target, total = block.rows(out, grid, block.queries), block.rows(lse, grid, block.queries)
    own_lse = own_lse.reshape(total.shape).to(total.dtype)
    total.copy_(torch.logaddexp(own_lse, total))
    target.copy_(own_output.view(target.shape).to(total.dtype).mul_((own_lse - total).exp_()))


def _long_rows_backward(block, grad, q, k, v, key_bias, band, out, lse, grid, scale, grads):
    inputs, bias = _kernel_inputs(block, grid, lse.dtype, q, k, v, key_bias, band)
    grad, output = (block.rows(x, grid, block.queries).to(inputs[0].dtype) for x in (grad, out))
    total = block.rows(lse, grid, block.queries).squeeze(-1)
    merged = [x.flatten(0, 1) for x in (grad, output, total)]
    grad_queries, grad_keys, grad_values = row_kernel(q.device.type).backward(*merged, *inputs, bias, scale)
    target = block.rows(grads[0], grid, block.queries)
    target.copy_(grad_queries.view(target.shape))  # every query is in one block
    for each, value in ((grads[1], grad_keys), (grads[2], grad_values)):
        block.put_keys(each, grid, value.unflatten(0, target.shape[:2]))


class Products:
    """Rows by plain products of matrices, on every device."""

    takes_half = False

    @staticmethod
    def forward(query, key, value, bias, scale):
        """Return `(output (n, H, M, D), log-sum-exp (n, H, M))` for `query` (n, H, M, D), `key` and `value` (n, H, K, D).

        `bias` is None or broadcastable to `(n, H, M, K)`, and is added to the scores.
        """
        scores = Products._scores(query, key, bias, scale)
        lse = torch.logsumexp(scores, -1, keepdim=True)
        return torch.matmul(scores.sub_(lse).exp_(), value), lse.squeeze(-1)

    @staticmethod
    def backward(grad, output, lse, query, key, value, bias, scale):
        """Return the gradients of query, key, value, for the share of the probability that these keys have in `lse`."""
        probabilities = Products._scores(query, key, bias, scale).sub_(lse[..., None]).exp_()
        grad_scores = torch.matmul(grad, value.transpose(2, 3)).sub_((grad * output).sum(-1, keepdim=True))
        grad_scores.mul_(probabilities).mul_(scale)
        grad_key, grad_value = (x.transpose(2, 3) for x in (grad_scores, probabilities))
        return torch.matmul(grad_scores, key), torch.matmul(grad_key, query), torch.matmul(grad_value, grad)

    @staticmethod
    def _scores(query, key, bias, scale):
        scores = torch.matmul(query, key.transpose(2, 3)).mul_(scale)
        return scores if bias is None else scores.add_(bias)


class FlashCPU:
    """The flash kernel of the CPU. Half precision is computed in float32: natively it was four times slower."""

    takes_half = False

    @staticmethod
    def forward(query, key, value, bias, scale):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, attn_mask=bias, scale=scale)

    @staticmethod
    def backward(grad, output, lse, query, key, value, bias, scale):
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


def row_kernel(device_type: str) -> type:
    """Return what computes long rows on a device: `forward` and `backward` as `Products` has them."""
    return {"cpu": FlashCPU, "cuda": EfficientCUDA}.get(device_type, Products)


# The whole pass


def forward(q, k, v, key_mask, grid: Grid, scale: float, keep: bool = False):
    """Return the output `(B, N, H, D)`, and what the backward pass needs of it.

    Args:
        q, k, v (`torch.Tensor` of shape `(B, N, H, D)`), key_mask (`torch.BoolTensor` of shape `(B, N)`, *optional*).
        keep (`bool`): also return the probabilities.

    Returns:
        The output; the log-sum-exp `(B, N, H, 1)` of all scores (of long rows; else 0); the probabilities of the columns
        `(B, P, H, L, steps * L)` and of short rows `(B, L, H, P, keys)`, empty unless kept or where there are none.
        A query that has no key at all gets some finite output: whoever calls sets it to zero.
    """
    dtype = _compute_dtype(q)
    key_bias = _key_bias(key_mask, dtype)
    lse = torch.zeros((*q.shape[:3], 1), dtype=dtype, device=q.device)
    kept = torch.empty(_kept_shapes(grid, q.device.type, keep)[1], dtype=dtype, device=q.device)
    columns = _column_scores(q, k, key_bias, grid, dtype, scale)
    blocks = list(row_blocks(grid, q.device.type))
    out = _make(q.shape, blocks, grid, dtype, q.device)
    band = _window_band(grid, blocks[0], dtype, q.device)
    if has_short_rows(grid, q.device.type):
        for block in blocks:
            _short_rows_forward(block, q, k, v, key_bias, band, grid, scale, out, columns, kept)
    else:
        of_grid = grid.tokens(lse).permute(0, 2, 3, 1, 4)  # (B, P, H, L, 1)
        of_grid.copy_(torch.logsumexp(columns, -1, keepdim=True))
        for block in blocks:
            _long_rows_forward(block, q, k, v, key_bias, band, grid, scale, out, lse)
        columns.sub_(of_grid).exp_()
    _columns_forward(columns, v, grid, out)
    if grid.num_global:
        queries, keys, values = (x.transpose(1, 2).to(dtype) for x in (q[:, : grid.num_global], k, v))
        attended = torch.matmul(_global_probabilities(queries, keys, key_bias, scale), values)
        out[:, : grid.num_global] = attended.transpose(1, 2)
    return out.to(q.dtype), lse, columns if keep else columns.new_empty(0), kept


def _kept_shapes(grid, device_type, keep):
    """Return the shapes of the probabilities that are kept, of columns and of short rows."""
    if not keep:
        return (0,), (0,)
    batch_size, _, num_leads, num_patches, num_heads, *_ = grid
    num_others = len(grid.steps) * num_leads
    columns = (batch_size, num_patches, num_heads, num_leads, num_others)
    if not has_short_rows(grid, device_type):
        return columns, (0,)
    num_keys = grid.num_global + (num_patches if grid.has_rows else 0) + num_others
    return columns, (batch_size, num_leads, num_heads, num_patches, num_keys)


def backward(grad, q, k, v, key_mask, out, lse, columns, kept, grid: Grid, scale: float):
    """Return the gradients of q, k and v, `(3, B, N, H, D)`; `out`, `lse`, `columns`, `kept` as `forward` returned them."""
    is_needed = has_short_rows(grid, q.device.type) or len(grid.steps) > 0
    if is_needed and not columns.numel() + kept.numel():  # an exported or dynamically compiled model kept nothing
        out, lse, columns, kept = forward(q, k, v, key_mask, grid, scale, keep=True)
    dtype = _compute_dtype(q)
    key_bias = _key_bias(key_mask, dtype)
    blocks = list(row_blocks(grid, q.device.type))
    # As one block: after a large one the C library keeps what is freed, instead of fetching all pages anew each time.
    grads = _make((3, *q.shape), blocks, grid, dtype, q.device)
    delta = _row_sums(grad, out, dtype)
    if has_short_rows(grid, q.device.type):
        for block in blocks:
            _short_rows_backward(block, grad, q, k, v, delta, kept, grid, scale, grads)
    else:
        band = _window_band(grid, blocks[0], dtype, q.device)
        for block in blocks:
            _long_rows_backward(block, grad, q, k, v, key_bias, band, out, lse, grid, scale, grads)
    _columns_backward(grad, q, k, v, delta, columns, grid, scale, grads)
    if grid.num_global:
        _add_global_gradients(grad, q, k, v, key_bias, grid, scale, grads)
    return grads.to(q.dtype)


def _make(shape, blocks, grid, dtype, device):
    """Return memory for outputs or gradients: empty where whole rows are written one after the other, else zeros, also for
    outputs: fresh pages that are first touched in pieces cost many times what it takes to fill them in order."""
    make = torch.empty if all(block.is_whole(grid) for block in blocks) else torch.zeros
    return make(shape, dtype=dtype, device=device)


def _row_sums(grad, out, dtype):
    """Return rowsum(dO o), `(B, N, H, 1)`; in parts, as fresh memory of the whole size costs more than the sums."""
    sums = torch.empty((*out.shape[:3], 1), dtype=dtype, device=out.device)
    for parts in zip(*(x.split(_SUMMED_TOKENS, dim=1) for x in (grad, out, sums)), strict=True):
        torch.sum(parts[0].to(dtype) * parts[1], -1, keepdim=True, out=parts[2])
    return sums


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


def _free_namespace():
    """Return a namespace for the operator that no other import of this file has: a copy loaded from a checkpoint brings its own,
    and imported again it brings another, as the models of the first import still call theirs."""
    own = re.sub(r"\W", "_", __name__)
    names = (f"{own}_{i}" if i else own for i in itertools.count())
    return next(name for name in names if not hasattr(getattr(torch.ops, name), "attention"))


_NAMESPACE = _free_namespace()


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
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
    columns: torch.Tensor,
    kept: torch.Tensor,
    num_leads: int,
    num_global: int,
    time_tolerance: int,
    lead_window: int | None,
    scale: float,
) -> torch.Tensor:
    grid = _grid(q, num_leads, num_global, time_tolerance, lead_window)
    return backward(grad, q, k, v, key_mask, out, lse, columns, kept, grid, scale)


@_attention.register_fake
def _(q, k, v, key_mask, num_leads, num_global, time_tolerance, lead_window, scale, keep):
    grid, dtype = _grid(q, num_leads, num_global, time_tolerance, lead_window), _compute_dtype(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return (
        out,
        q.new_empty((*q.shape[:3], 1), dtype=dtype),
        *(q.new_empty(shape, dtype=dtype) for shape in _kept_shapes(grid, q.device.type, keep)),
    )


@_attention_backward.register_fake
def _(grad, q, k, v, key_mask, out, lse, columns, kept, num_leads, num_global, time_tolerance, lead_window, scale):
    return q.new_empty((3, *q.shape))


def _save_for_backward(ctx, inputs, output):
    q, k, v, key_mask, *settings, _ = inputs
    ctx.settings = settings
    ctx.save_for_backward(q, k, v, key_mask, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    grads = _attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return (*grads.unbind(), *[None] * 7)


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def sparse_attention(q, k, v, key_mask, *, num_leads, num_global, time_tolerance, lead_window, scale):
    """Return the attention of every query over its pattern, `(B, N, H, D)`, differentiable once.

    Args:
        q, k, v (`torch.Tensor` of shape `(B, N, H, D)`): N = num_global + num_leads * patches.
        key_mask (`torch.BoolTensor` of shape `(B, N)`, *optional*): True = may be attended. A query without any key gets
            some finite output, which the caller sets to zero.
    """
    is_trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    is_symbolic = any(
        isinstance(size, torch.SymInt) for size in q.shape
    )  # an exported model may be called with any grid
    settings = (num_leads, num_global, time_tolerance, lead_window, float(scale), is_trained and not is_symbolic)
    return _attention(q, k, v, key_mask, *settings)[0]
