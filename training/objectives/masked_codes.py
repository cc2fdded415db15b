"""Masked rhythm codes: predict the quantizer's code of each hidden patch. Source: AnyECG, stage 2, L_mask."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling
from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer
from training.precision import full_precision

from .base import Batch, Objective, RecordHead, mean_over, real_positions, scored_positions, sums_by_record

IGNORED = -100


class MaskedCodes(Objective):
    """Cross-entropy over the codes of hidden patches, beside what two rules reach that learn nothing of the signal.

    Args:
        model: the backbone with its code head.
        quantizer: gives the codes of batches that do not bring them (`labels`); frozen, no part of the weights. None where
            all do.
        baselines: of the training records, see `CodeBaselines`.
        record_heads: name to (factor, head) of losses that a record's mean state has beside its codes: `DemographyHead`,
            `BeatHead`.
        code_weight (`float`): factor of the loss of the codes themselves; 0 = the record's losses alone.
    """

    def __init__(
        self,
        model: AnyECGForMaskedCodeModeling,
        quantizer: AnyECGRhythmQuantizer | None,
        baselines: CodeBaselines,
        *,
        record_heads: Mapping[str, tuple[float, RecordHead]] | None = None,
        code_weight: float = 1.0,
    ):
        super().__init__()
        self.model, self.baselines, self.code_weight = model, baselines, code_weight
        record_heads = record_heads or {}
        self.record_heads = nn.ModuleDict({name: head for name, (_, head) in record_heads.items()})
        self.weights = {name: weight for name, (weight, _) in record_heads.items()}
        self.logged = ("loss_codes", *(f"loss_{name}" for name in record_heads)) if record_heads else ()
        # in a tuple: neither saved nor moved nor trained
        self._frozen = (None if quantizer is None else quantizer.eval().requires_grad_(False),)

    def forward(self, num_items_in_batch=None, **batch):
        where = scored_positions(batch)
        codes = self.codes_of(batch)
        states = self.model.anyecg(
            batch["input_values"], batch["lead_ids"], batch["attention_mask"], batch["bool_masked_pos"]
        )
        logits = self.model.code_head(states.last_hidden_state)
        cross_entropy = nn.functional.cross_entropy(
            logits.flatten(0, 2).float(), codes.masked_fill(~where, IGNORED).flatten(), reduction="none"
        ).view(codes.shape)
        loss = mean_over(cross_entropy, where, num_items_in_batch and num_items_in_batch["hidden"])
        pooled = states.pooler_output
        parts = {f"loss_{name}": head(pooled, batch, num_items_in_batch) for name, head in self.record_heads.items()}
        total = self.code_weight * loss + sum(weight * parts[f"loss_{name}"] for name, weight in self.weights.items())
        outputs = {"loss": total, "loss_codes": loss, **parts}
        if self.training:
            return outputs
        hits = logits.argmax(-1) == codes
        sums = sums_by_record([cross_entropy, hits, *self.baselines(codes, batch)], where)
        by_head = [head.record_sums(pooled, batch) for head in self.record_heads.values()]
        return outputs | {"sums": torch.cat([sums, *by_head], dim=1)}

    def finished_model(self):
        """Return the model, without its code head where that has learned nothing: its weights would be random."""
        return self.model if self.code_weight else self.model.anyecg

    def count_items(self, batch):
        counts = super().count_items(batch)
        for head in self.record_heads.values():
            counts |= head.count_items(batch)
        return counts

    @torch.no_grad()
    def codes_of(self, batch: Batch) -> torch.Tensor:
        """Return the codes `(B, L, P)`, those that the batch brings or those that the quantizer gives it."""
        if "labels" in batch:
            return batch["labels"]
        quantizer = self._frozen[0].to(batch["input_values"].device)
        return encode_batch(quantizer, batch)

    def figures(self, sums):
        num, cross_entropy, hits, unigram, unigram_hits, copy_hits = sums[:, :6].sum(0).tolist()
        figures: dict[str, float] = {}
        for place, head in enumerate(self.record_heads.values()):
            first = 6 + place * RecordHead.NUM_SUMS
            figures |= head.figures(sums[:, first : first + RecordHead.NUM_SUMS])
        if not self.code_weight:
            return figures  # the code head has learned nothing
        return figures | {
            "cross_entropy": cross_entropy / num,
            "accuracy": hits / num,
            "unigram_cross_entropy": unigram / num,
            "unigram_accuracy": unigram_hits / num,
            "lead_copy_accuracy": copy_hits / num,
        }


@torch.no_grad()
def encode_batch(quantizer: AnyECGRhythmQuantizer, batch: Batch) -> torch.Tensor:
    """Return the codes `(B, L, P)` of a batch, -100 where nothing is real: of each record the same whatever it is with.

    So stored codes equal those made in training. Lower precision would find others (bf16 0.4 % on PTB-XL), and so may rounding
    where padding changes the length of a sum: only records with the same leads and patches are encoded together.
    """
    values, real = batch["input_values"].to(quantizer.dtype), real_positions(batch)
    codes = torch.full(real.shape, IGNORED, device=values.device)
    with full_precision(values.device.type):
        for (leads, num_patches), rows in _by_shape(real.cpu()).items():
            places = torch.tensor(rows, device=values.device)[:, None], torch.tensor(leads, device=values.device)
            mask = real[places][..., :num_patches]
            waveforms = values[places][..., : num_patches * quantizer.config.patch_size].contiguous()
            found = quantizer.encode(waveforms, batch["lead_ids"][places], mask)
            codes[places] = nn.functional.pad(found, (0, codes.shape[2] - num_patches), value=IGNORED)
    return codes


def _by_shape(real: torch.Tensor) -> dict[tuple[tuple[int, ...], int], list[int]]:
    """Return the rows of `real` (B, L, P) by which leads have anything real, and how many patches to the last real one."""
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for row, mask in enumerate(real.numpy()):
        leads, patches = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(leads):
            groups.setdefault((tuple(leads), int(patches[-1]) + 1), []).append(row)
    return groups


class CodeBaselines:
    """Two predictions of a hidden code without a network: the frequency of codes, and the code of another lead.

    Attributes:
        log_unigram (`torch.Tensor` of shape `(K,)`): smoothed log share of each code.
        agreement (`torch.Tensor` of shape `(lead ids, lead ids)`): share of seconds in which two leads have one code.
    """

    SMOOTHING = 0.5  # added to each code's count, so that an unseen code has a finite log frequency

    def __init__(self, codebook_size: int, num_lead_ids: int):
        self.counts = torch.zeros(codebook_size, dtype=torch.float64)
        self._agreeing = torch.zeros(num_lead_ids, num_lead_ids, dtype=torch.float64)
        self._together = torch.zeros_like(self._agreeing)

    def add(self, codes: torch.Tensor, lead_ids: torch.Tensor) -> None:
        """Count the codes `(B, L, P)`, below 0 where there is none, of leads `(B, L)`."""
        codes, lead_ids = codes.cpu(), lead_ids.cpu()
        self.counts += torch.bincount(codes[codes >= 0], minlength=len(self.counts))
        both = (codes[:, :, None] >= 0) & (codes[:, None] >= 0)  # (B, L, L, P)
        same = both & (codes[:, :, None] == codes[:, None])
        pairs = (
            lead_ids[:, :, None].expand(both.shape[:3]).flatten(),
            lead_ids[:, None].expand(both.shape[:3]).flatten(),
        )
        self._agreeing.index_put_(pairs, same.sum(-1).double().flatten(), accumulate=True)
        self._together.index_put_(pairs, both.sum(-1).double().flatten(), accumulate=True)

    @property
    def log_unigram(self) -> torch.Tensor:
        smoothed = self.counts + self.SMOOTHING
        return (smoothed / smoothed.sum()).log().float()

    @property
    def agreement(self) -> torch.Tensor:
        return (self._agreeing / self._together.clamp(min=1)).fill_diagonal_(0).float()

    def __call__(self, codes: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return unigram cross-entropy, unigram hits and lead-copy hits at each position, `(B, L, P)` each.

        Lead copy: the code of the visible lead of the same second that agrees most often with the hidden one; where
        all leads are hidden, the most frequent code.
        """
        log_unigram, agreement = self.log_unigram.to(codes.device), self.agreement.to(codes.device)
        most_frequent = log_unigram.argmax()
        lead_ids, visible = batch["lead_ids"], (codes >= 0) & ~batch["bool_masked_pos"].bool()
        score = agreement[lead_ids[:, :, None], lead_ids[:, None]][..., None] * visible[:, None]  # (B, L, L, P)
        best, source = score.max(2)
        copied = torch.where(best > 0, codes.gather(1, source), most_frequent)
        return -log_unigram[codes.clamp(min=0)], codes == most_frequent, codes == copied
