"""Cardio-Sparse Attention: which token may attend to which, as an exact mask that every attention implementation obeys.

Tokens are `G` global tokens, then the grid of `L` leads x `P` patches, lead-major: token `G + l * P + k`.
The pattern belongs to the model (`sparse_attention_config`), not to the kernel: "eager" and "sdpa" give the same numbers.

Source: AnyECG, Cardio-Sparse Attention: softmax((Q K^T + M) / sqrt(d)) V with M = 0 on A(i), minus infinity elsewhere.
"""

import torch


def cardio_sparse_pattern(
    num_leads: int, num_patches: int, sparse_attention_config, *, device: torch.device | None = None
) -> torch.Tensor:
    """Return the pattern as `torch.BoolTensor` of shape `(N, N)`, N = G + L * P; True = row attends to column.

    Args:
        num_leads, num_patches (`int`): the grid.
        sparse_attention_config (`AnyECGSparseAttentionConfig`): tolerance, window, number of global tokens.
    """
    tokens = torch.arange(num_leads * num_patches, device=device)
    lead, time = tokens // num_patches, tokens % num_patches
    distance = (time[:, None] - time[None, :]).abs()
    own_lead = lead[:, None] == lead[None, :]
    if sparse_attention_config.lead_window is not None:
        own_lead = own_lead & (distance <= sparse_attention_config.lead_window)
    grid = own_lead | (distance <= sparse_attention_config.time_tolerance)
    num_global = sparse_attention_config.num_global_tokens
    return torch.nn.functional.pad(grid, (num_global, 0, num_global, 0), value=True)


def cardio_sparse_mask(
    token_mask: torch.Tensor, sparse_attention_config, *, implementation: str, dtype: torch.dtype
) -> torch.Tensor:
    """Return the attention mask of a batch, shape `(B, 1, N, N)`, in the form that `implementation` takes.

    A token that is not valid is nobody's key. Every token may attend to itself, so that no row is empty (an empty row is
    NaN in a softmax); the outputs of invalid tokens are set to zero by the model.

    Args:
        token_mask (`torch.BoolTensor` of shape `(B, L, P)`): True = real patch.
        implementation (`str`): "eager" gets an additive float mask of `dtype`, all others a boolean one (True = attend).
    """
    batch_size, num_leads, num_patches = token_mask.shape
    pattern = cardio_sparse_pattern(num_leads, num_patches, sparse_attention_config, device=token_mask.device)
    keys = torch.nn.functional.pad(token_mask.flatten(1), (sparse_attention_config.num_global_tokens, 0), value=True)
    itself = torch.eye(pattern.shape[0], dtype=torch.bool, device=token_mask.device)
    mask = ((pattern[None] & keys[:, None, :]) | itself)[:, None]  # (B, 1, N, N)
    if implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
