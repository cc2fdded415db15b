"""Median heartbeat and rhythm of the whole record, beside masked codes: a record-level view that needs no labels.

A code is of one second cut anywhere and says the phase of its beat before anything else; the median beat has no phase. From
half of the patches the pooled states tell it for all leads, the absent ones too: so they learn morphology and what leads have
to do with each other. Ours, not the paper's; measured in `benchmarks/results/pilots.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from .base import Batch, RecordHead

LIMIT = 5.0  # spreads: a target further from the mean is an artefact
LEAST_SPREAD = {"beats": 0.02, "rhythm": 0.01}  # millivolt; share of an interval


def beat_statistics(batches: Iterable[Batch]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return mean and spread of each value of `beats` (B, 12, samples) and `rhythm` (B, figures) over all batches."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in LEAST_SPREAD}
    for batch in batches:
        for name, values in found.items():
            values.append(batch[name].double())
    statistics = {}
    for name, least in LEAST_SPREAD.items():
        values = torch.cat(found[name])
        mean = values.nanmean(0)
        spread = (values - mean).square().nanmean(0).sqrt()
        statistics[name] = mean.nan_to_num().float(), spread.nan_to_num().clamp(min=least).float()
    return statistics


class BeatHead(RecordHead):
    """Linear layer on pooled states; leads without a median beat and records without a rhythm (NaN) are left out.

    Each sample of each lead's beat is in spreads of the training records, so that P and ST count as much as QRS.

    Args:
        hidden_size (`int`): of the states.
        statistics: of training records, see `beat_statistics`.
    """

    def __init__(self, hidden_size: int, statistics: dict[str, tuple[torch.Tensor, torch.Tensor]]):
        super().__init__()
        self.linear = nn.ModuleDict(
            {name: nn.Linear(hidden_size, mean.numel()) for name, (mean, _) in statistics.items()}
        )
        for name, (mean, spread) in statistics.items():
            self.register_buffer(f"{name}_mean", mean)
            self.register_buffer(f"{name}_spread", spread)

    @staticmethod
    def count_items(batch: Batch) -> dict[str, torch.Tensor]:
        """Return how many values of beats and of rhythm are known."""
        return {name: batch[name].isfinite().sum() for name in LEAST_SPREAD}

    def forward(self, pooled: torch.Tensor, batch: Batch, num_items: dict | None) -> torch.Tensor:
        """Return smooth L1 of the beats plus that of the rhythm, in spreads.

        Args:
            pooled (`torch.Tensor` of shape `(B, D)`): mean of the states of a record.
            batch: `beats` (B, 12, samples) and `rhythm` (B, figures).
            num_items: over how many values the means go, where that is not those of this batch.
        """
        nums, loss = num_items or self.count_items(batch), pooled.new_zeros((), dtype=torch.float32)
        for name in LEAST_SPREAD:
            predicted, target, known = self._compared(name, pooled, batch)
            distance = nn.functional.smooth_l1_loss(predicted, target, reduction="none") * known
            loss = loss + distance.sum() / nums[name].clamp(min=1)
        return loss

    @torch.no_grad()
    def record_sums(self, pooled: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return `(B, 4)`: of the beats and of the rhythm, the sum of squared errors and that of the targets, in spreads."""
        sums = []
        for name in LEAST_SPREAD:
            predicted, target, known = self._compared(name, pooled, batch)
            sums += [((predicted - target).square() * known).flatten(1).sum(1), target.square().flatten(1).sum(1)]
        return torch.stack(sums, dim=1)

    def _compared(self, name: str, pooled: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Return prediction, target (0 where unknown) and what is known, all in the shape of the target."""
        mean, spread = getattr(self, f"{name}_mean"), getattr(self, f"{name}_spread")
        known = batch[name].isfinite()
        target = torch.where(known, (batch[name].float() - mean) / spread, 0.0).clamp(-LIMIT, LIMIT)
        return self.linear[name](pooled).float().view(target.shape), target, known

    @staticmethod
    def figures(sums: torch.Tensor) -> dict[str, float]:
        """Return the shares of the variance of beats and of rhythm that are explained, NaN where none is known."""
        beat_error, beats, rhythm_error, rhythm = sums.sum(0).tolist()
        return {
            "beats_explained": 1 - beat_error / beats if beats else math.nan,
            "rhythm_explained": 1 - rhythm_error / rhythm if rhythm else math.nan,
        }
