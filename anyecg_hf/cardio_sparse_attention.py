"""Cardio-Sparse Attention: which token may attend to which, and the route that computes it.

Tokens are `G` global tokens, then the grid of `L` leads x `P` patches, lead-major: token `G + l * P + k`.
The pattern belongs to the model (`sparse_attention_config`), not to the kernel: "cardio_sparse", "sdpa" and "eager" give the
same numbers. "cardio_sparse", the default, takes the route that was measured to be the fastest for the grid.

Source: AnyECG, Cardio-Sparse Attention: softmax((Q K^T + M) / sqrt(d)) V with M = 0 on A(i), minus infinity elsewhere.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .cardio_sparse_kernels import sparse_attention

IMPLEMENTATION = "cardio_sparse"
_MOST_DENSE_TOKENS = 2**14  # dropout needs all N x N probabilities: above this they do not fit a usual machine
_GAIN_NEEDED = 4.5  # dense keys for each sparse one, from which the sparse route wins on small grids (measured)


class CardioSparseRoute(NamedTuple):
    """How the attention of one grid is computed, and why so.

    `name` is "dense" (scaled dot product with the exact mask), "rows_and_columns", or "windows" (rows in chunks of time).
    """

    name: str
    reason: str


class CardioSparsePlan(NamedTuple):
    """What all layers of one forward pass share.

    Args:
        route (`CardioSparseRoute`): how it is computed.
        mask (`torch.Tensor`, *optional*): of shape `(B, 1, N, N)` in the form of the implementation where the route is
            dense, else `(B, N)` bool, True = may be attended; `None` = nothing is masked.
        empty_queries (`torch.BoolTensor` of shape `(B, N)`, *optional*): queries without any key; their output is 0.
        num_leads (`int`): rows of the grid.
    """

    route: CardioSparseRoute
    mask: torch.Tensor | None
    empty_queries: torch.Tensor | None
    num_leads: int


def cardio_sparse_pattern(
    num_leads: int, num_patches: int, sparse_attention_config, *, device: torch.device | None = None
) -> torch.Tensor:
    """Return the pattern as `torch.BoolTensor` of shape `(N, N)`, N = G + L * P; True = row attends to column.

    Args:
        num_leads, num_patches (`int`): the grid.
        sparse_attention_config (`AnyECGSparseAttentionConfig`): tolerance, window, number of global tokens.
    """
    lead, time = (torch.arange(size, device=device) for size in (num_leads, num_patches))
    lead, time = (each.flatten() for each in torch.meshgrid(lead, time, indexing="ij"))  # of each token
    distance = (time[:, None] - time[None, :]).abs()
    own_lead = lead[:, None] == lead[None, :]
    if sparse_attention_config.lead_window is not None:
        own_lead = own_lead & (distance <= sparse_attention_config.lead_window)
    grid = own_lead | (distance <= sparse_attention_config.time_tolerance)
    num_global = sparse_attention_config.num_global_tokens
    return pad(grid, (num_global, 0, num_global, 0), value=True)


def cardio_sparse_mask(
    token_mask: torch.Tensor, sparse_attention_config, *, implementation: str, dtype: torch.dtype
) -> torch.Tensor:
    """Return the attention mask of a batch, shape `(B, 1, N, N)`, in the form that `implementation` takes.

    A token that is not valid is nobody's key. A query that has no key at all may attend to itself, because an empty row is
    NaN in a softmax; its output is set to zero afterwards (see `queries_without_keys`).

    Args:
        token_mask (`torch.BoolTensor` of shape `(B, L, P)`): True = real patch.
        implementation (`str`): "eager" and "cardio_sparse" get an additive mask of `dtype`, others a boolean one (True =
            attend).
    """
    num_leads, num_patches = token_mask.shape[1:]
    pattern = cardio_sparse_pattern(num_leads, num_patches, sparse_attention_config, device=token_mask.device)
    mask = pattern & _key_mask(token_mask, sparse_attention_config)[:, None, :]
    itself = torch.eye(pattern.shape[0], dtype=torch.bool, device=token_mask.device)
    mask = (mask | (itself & ~mask.any(-1, keepdim=True)))[:, None]  # (B, 1, N, N)
    if implementation not in ("eager", IMPLEMENTATION):
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def queries_without_keys(token_mask: torch.Tensor, sparse_attention_config) -> torch.Tensor:
    """Return, for `token_mask` (B, L, P), the queries to whose pattern no valid token belongs, `(B, N)` bool."""
    batch_size, num_leads, num_patches = token_mask.shape
    num_global = sparse_attention_config.num_global_tokens
    if num_global:  # a global token is a key of every query
        return token_mask.new_zeros(batch_size, num_global + num_leads * num_patches)
    columns = _any_within(token_mask.any(1, keepdim=True), sparse_attention_config.time_tolerance)
    rows = _any_within(token_mask, sparse_attention_config.lead_window)
    return ~(columns | rows).flatten(1)


def _any_within(valid, reach):
    """Return whether any of `valid` (B, rows, P) is True at most `reach` patches away (None: anywhere in the row)."""
    num_patches = valid.shape[-1]
    if reach is None or not isinstance(num_patches, torch.SymInt) and reach >= num_patches:
        return valid.any(-1, keepdim=True).expand(valid.shape)
    # running counts: a max pooling would fix the sizes of an exported model
    patches = torch.arange(num_patches, device=valid.device)
    counts = pad(valid.cumsum(-1), (1, 0))  # (B, rows, P + 1): valid tokens before each patch
    return counts[..., (patches + reach + 1).clamp(max=num_patches)] > counts[..., (patches - reach).clamp(min=0)]


def _key_mask(token_mask, sparse_attention_config):
    return pad(token_mask.flatten(1), (sparse_attention_config.num_global_tokens, 0), value=True)


def choose_route(
    num_leads: int,
    num_patches: int,
    sparse_attention_config,
    *,
    implementation: str = IMPLEMENTATION,
    dropout: float = 0.0,
) -> CardioSparseRoute:
    """Return how the attention over `num_leads` x `num_patches` tokens is computed, and why.

    It depends on the arguments alone: the crossovers were measured by `benchmarks/attention.py`, nothing is timed here.

    Raises:
        ValueError: dropout on more tokens than all pairs of which fit the memory.
    """
    config = sparse_attention_config
    num_tokens = config.num_global_tokens + num_leads * num_patches
    if implementation != IMPLEMENTATION:
        return CardioSparseRoute("dense", f'attn_implementation is "{implementation}": it gets the exact mask.')
    if dropout > 0:
        if num_tokens > _MOST_DENSE_TOKENS:
            raise ValueError(
                f"attention_dropout is {dropout} and the record has {num_tokens} tokens: dropout on probabilities needs all "
                f"pairs of tokens, accepted up to {_MOST_DENSE_TOKENS}. Set attention_dropout to 0 or take shorter windows."
            )
        return CardioSparseRoute("dense", f"attention_dropout is {dropout}: dropout needs every probability.")
    if isinstance(num_leads, torch.SymInt) or isinstance(num_patches, torch.SymInt):
        return CardioSparseRoute("rows_and_columns", "the grid is unknown while the model is exported.")
    others = num_leads * min(2 * config.time_tolerance + 1, num_patches)
    own = num_patches if config.lead_window is None else min(2 * config.lead_window + 1, num_patches)
    keys = config.num_global_tokens + others + (own if own > min(2 * config.time_tolerance + 1, num_patches) else 0)
    # a number in a text would fix the sizes of a compiled model: it would be compiled anew for each batch
    told = (
        "a query attends to a part of the tokens"
        if torch.compiler.is_compiling()
        else f"a query attends to about {keys} of {num_tokens} tokens"
    )
    gain = num_tokens / keys
    wide = num_tokens >= 1024  # products of this size run at full speed: what is left out is gained
    if gain < (1.2 if wide else _GAIN_NEEDED):
        return CardioSparseRoute("dense", f"{told}: too few are left out to gain from it.")
    if config.lead_window is not None and own < num_patches:
        return CardioSparseRoute("windows", f"{told}, in its lead to {2 * config.lead_window + 1}.")
    return CardioSparseRoute("rows_and_columns", f"{told}.")


def make_plan(
    token_mask: torch.Tensor, sparse_attention_config, *, implementation: str, dtype: torch.dtype, dropout: float = 0.0
) -> CardioSparsePlan:
    """Return the plan of one forward pass for `token_mask` (B, L, P) bool, True = real patch.

    Args:
        implementation (`str`): the model's `attn_implementation`.
        dtype (`torch.dtype`): of the hidden states.
        dropout (`float`): on the attention probabilities, in this pass.
    """
    num_leads, num_patches = token_mask.shape[1:]
    route = choose_route(
        num_leads, num_patches, sparse_attention_config, implementation=implementation, dropout=dropout
    )
    # While a graph is traced the values are unknown: then masks stay, with the same result.
    nothing_masked = not torch.compiler.is_compiling() and token_mask.device.type != "meta" and bool(token_mask.all())
    empty = None if nothing_masked else queries_without_keys(token_mask, sparse_attention_config)
    if (
        empty is not None
        and not torch.compiler.is_compiling()
        and empty.device.type != "meta"
        and not bool(empty.any())
    ):
        empty = None
    if route.name == "dense":
        mask = cardio_sparse_mask(token_mask, sparse_attention_config, implementation=implementation, dtype=dtype)
    else:
        mask = None if nothing_masked else _key_mask(token_mask, sparse_attention_config)
    return CardioSparsePlan(route, mask, empty, num_leads)


def cardio_sparse_attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, *, plan: CardioSparsePlan, **kwargs
):
    """Attention function "cardio_sparse" in the form that Transformers calls.

    Args:
        query, key, value (`torch.Tensor` of shape `(B, H, N, D)`): heads before tokens.
        attention_mask (`torch.Tensor`, *optional*): the plan's mask.
        plan (`CardioSparsePlan`): from `make_plan`.

    Returns:
        `(output (B, N, H, D), None)`.
    """
    scale = module.head_dim**-0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the normalised ones are float32
    if plan.route.name == "dense":
        mask = None if attention_mask is None else attention_mask.to(value.dtype)
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
        return output.transpose(1, 2), None
    config = module.config.sparse_attention_config
    output = sparse_attention(
        *(x.transpose(1, 2).contiguous() for x in (query, key, value)),
        attention_mask,
        num_leads=plan.num_leads,
        num_global=config.num_global_tokens,
        time_tolerance=config.time_tolerance,
        lead_window=config.lead_window,
        scale=scale,
    )
    return output, None


AttentionInterface.register(IMPLEMENTATION, cardio_sparse_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
