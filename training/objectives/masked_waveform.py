"""Masked waveform reconstruction: draw the hidden patches. Source: masked autoencoders (He et al. 2021, arXiv 2111.06377)."""

from __future__ import annotations

import torch

from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction

from .base import Objective, mean_over, scored_positions, sums_by_record


class MaskedWaveform(Objective):
    """Loss of lead reconstruction over hidden patches: absolute, squared and slope error in model units.

    A hidden second of all leads is unknowable in phase, and the best answer under this loss is a flat line: prefer masks
    of random patches and of whole leads (`--mask_shares 0.5 0 0.5`).
    """

    def __init__(self, model: AnyECGForLeadReconstruction):
        super().__init__()
        self.model = model

    def forward(self, num_items_in_batch=None, **batch):
        where = scored_positions(batch)
        drawn = self.model(
            batch["input_values"], batch["lead_ids"], batch["attention_mask"], batch["bool_masked_pos"]
        ).reconstruction
        target = batch["input_values"].view(*where.shape, -1).float()
        error = (drawn.view(target.shape).float() - target) / self.model.config.input_scale_mv
        error = torch.where(where[..., None], error, 0.0)
        per_patch = error.abs().mean(-1) + 0.5 * error.square().mean(-1) + error.diff(dim=-1).abs().mean(-1)
        loss = mean_over(per_patch, where, num_items_in_batch and num_items_in_batch["hidden"])
        if self.training:
            return {"loss": loss}
        squares = (target / self.model.config.input_scale_mv).square().mean(-1)
        return {"loss": loss, "sums": sums_by_record([per_patch, error.square().mean(-1), squares], where)}

    def figures(self, sums):
        num, loss, squared_error, squares = sums.sum(0).tolist()
        return {"reconstruction_loss": loss / num, "explained_power": 1 - squared_error / squares}
