"""ECG-FM's recipe: tell a hidden patch's own features from those of other hidden patches, and a record's halves from others'.

Source: ECG-FM (McKeen et al. 2024, arXiv 2408.05178): wav2vec 2.0 (arXiv 2006.11477) with contiguous masks, CMSC (Kiyasseh et
al. 2021, arXiv 2005.13249) between neighbouring segments of a recording, and random leads hidden.
"""

from __future__ import annotations

import torch
from torch import distributed, nn
from torch.distributed.nn.functional import all_gather
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer

from anyecg_hf.modeling_anyecg import AnyECGModel, masked_mean

from .base import Objective, real_positions, scored_positions

TARGET_SIZE = 128
DIVERSITY_WEIGHT = 0.1
FIRST_TEMPERATURE, LAST_TEMPERATURE = 2.0, 0.5  # of the Gumbel softmax, over the run


class Contrastive(Objective):
    """Contrastive loss over hidden patches plus contrast of records, each on halves of the records.

    A hidden patch's negatives are all other hidden patches of its half. Quantizer and noise are wav2vec 2.0's: with several
    processes each draws its own noise, so runs with another number of processes agree only in distribution.
    """

    logged = ("loss_patches", "loss_records", "loss_diversity", "target_perplexity")
    floors = {"target_perplexity": (8.0, "Almost all patches have one target: lower the learning rate.")}
    patterns = ("span", "lead")
    follows_length = True  # the temperature

    def __init__(self, model: AnyECGModel, *, temperature: float = 0.1):
        super().__init__()
        self.model, self.temperature = model, temperature
        size = model.config.hidden_size
        self.quantizer = Wav2Vec2GumbelVectorQuantizer(
            Wav2Vec2Config(conv_dim=(size,), conv_stride=(1,), conv_kernel=(1,), codevector_dim=TARGET_SIZE,
                           num_codevectors_per_group=160, num_codevector_groups=2)
        )  # fmt: skip
        nn.init.uniform_(self.quantizer.codevectors)
        self.project_target = nn.Linear(TARGET_SIZE, TARGET_SIZE)
        self.project_state = nn.Linear(size, TARGET_SIZE)
        self.project_record = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, TARGET_SIZE))

    def count_items(self, batch):
        return {}

    def forward(self, num_items_in_batch=None, **batch):
        halves = _halves(batch)
        real, where = real_positions(halves), scored_positions(halves)
        states = self.model(halves["input_values"], halves["lead_ids"], real, where).last_hidden_state
        logits, target_perplexity = self._patch_logits(states, halves, real, where)
        correct = torch.arange(where.flatten(1).shape[1], device=where.device).expand(len(where), -1)
        hidden = where.flatten(1)
        per_patch = nn.functional.cross_entropy(logits.transpose(1, 2), correct, reduction="none")
        loss_patches = (per_patch * hidden).sum() / hidden.sum().clamp(min=1)
        record_logits = self._record_logits(masked_mean(states.float(), real))
        own = torch.arange(len(record_logits), device=where.device)
        loss_records = nn.functional.cross_entropy(record_logits, own.view(2, -1).roll(1, 0).flatten())
        num_vectors = self.quantizer.num_groups * self.quantizer.num_vars
        parts = {
            "loss_patches": loss_patches, "loss_records": loss_records, "target_perplexity": target_perplexity,
            "loss_diversity": (num_vectors - target_perplexity) / num_vectors,
        }  # fmt: skip
        parts["loss"] = loss_patches + loss_records + DIVERSITY_WEIGHT * parts["loss_diversity"]
        if not self.training:
            hits = (logits.argmax(-1) == correct) & hidden
            by_half = torch.stack([hidden.sum(1), (per_patch * hidden).sum(1), hits.sum(1)], dim=1).float()
            parts["sums"] = by_half.view(2, -1, 3).sum(0)
        return parts

    def _patch_logits(self, states, halves, real, where):
        """Return `(H, N, N)` cosine over temperature of each position with the targets of all, and the perplexity."""
        patches = halves["input_values"].view(*real.shape, -1)
        signal = torch.where(real[..., None], patches, 0.0).flatten(2) / self.model.config.input_scale_mv
        features = self.model.embeddings.stem(signal, real).flatten(1, 2)
        self.quantizer.temperature = FIRST_TEMPERATURE * (LAST_TEMPERATURE / FIRST_TEMPERATURE) ** self.progress
        targets, perplexity = self.quantizer(features.float(), where.flatten(1))
        targets = nn.functional.normalize(self.project_target(targets).float(), dim=-1)
        guesses = nn.functional.normalize(self.project_state(states).flatten(1, 2).float(), dim=-1)
        logits = (guesses @ targets.transpose(1, 2)).float() / self.temperature
        return logits.masked_fill(~where.flatten(1)[:, None], torch.finfo(logits.dtype).min), perplexity

    def _record_logits(self, pooled):
        """Return `(H, H)`: likeness of each half with each, none with itself; first all first halves, then the second."""
        vectors = nn.functional.normalize(self.project_record(pooled).float(), dim=-1)
        if distributed.is_available() and distributed.is_initialized():
            both = [torch.cat(parts) for parts in zip(*(half.chunk(2) for half in all_gather(vectors)), strict=True)]
            vectors = torch.cat(both)
        likeness = (vectors @ vectors.T).float() / self.temperature  # autocast makes products bf16
        return likeness.fill_diagonal_(torch.finfo(likeness.dtype).min)

    def figures(self, sums):
        num, cross_entropy, hits = sums.sum(0).tolist()
        return {"contrastive_loss": cross_entropy / num, "contrastive_accuracy": hits / num}


def _halves(batch):
    """Return the batch with each record cut in two by time: all first halves, then all second ones."""
    num_patches = batch["attention_mask"].shape[2]
    if num_patches < 2:
        raise ValueError("Contrast of halves needs records of at least two patches: raise --window_seconds.")
    half = num_patches // 2
    size = batch["input_values"].shape[2] // num_patches
    cut = {"lead_ids": batch["lead_ids"].repeat(2, 1)}
    for name, unit in (("input_values", size), ("attention_mask", 1), ("bool_masked_pos", 1)):
        value = batch[name]
        cut[name] = torch.cat([value[..., : half * unit], value[..., half * unit : 2 * half * unit]])
    return cut
