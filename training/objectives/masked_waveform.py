"""Masked waveform reconstruction: draw the hidden patches. Source: masked autoencoders (He et al. 2021, arXiv 2111.06377)."""

from __future__ import annotations

from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction, reconstruction_error

from .base import Objective, mean_over, scored_positions, sums_by_record


class MaskedWaveform(Objective):
    """Loss of lead reconstruction over hidden patches: absolute, squared and slope error, see `reconstruction_error`.

    A hidden second of all leads is unknowable in phase, and the best answer under this loss is a flat line: prefer masks
    of random patches and of whole leads (`--mask_shares 0.5 0 0.5`).
    """

    def __init__(self, model: AnyECGForLeadReconstruction):
        super().__init__()
        self.model = model

    def forward(self, num_items_in_batch=None, **batch):
        where = scored_positions(batch)
        outputs = self.model(
            batch["input_values"], batch["lead_ids"], batch["attention_mask"], batch["bool_masked_pos"]
        )
        scale, target = self.model.config.input_scale_mv, batch["input_values"].float()
        per_patch = reconstruction_error(outputs.reconstruction, target, where, scale)
        loss = mean_over(per_patch, where, num_items_in_batch and num_items_in_batch["hidden"])
        if self.training:
            return {"loss": loss}

        def squares(waveform):
            return (waveform.float() / scale).square().view(*where.shape, -1).mean(-1)

        errors = [squares(waveform - target) for waveform in (outputs.reconstruction, outputs.linear_estimate)]
        return {"loss": loss, "sums": sums_by_record([per_patch, *errors, squares(target)], where)}

    def figures(self, sums):
        """Return the loss, the share of the power that is explained, and what is gained on least squares, decibel a record."""
        num, loss, squared_error, _, squares = sums.sum(0).tolist()
        errors = sums[sums[:, 0] > 0, 2:4].clamp(min=1e-12)
        gain = 10 * (errors[:, 1] / errors[:, 0]).log10().mean()
        return {
            "reconstruction_loss": loss / num,
            "explained_power": 1 - squared_error / squares,
            "gain_db": float(gain),
        }
