"""Age and sex from the whole record: the paper's third view, which the quantizer learns by, beside masked codes.

A masked patch can be guessed from its neighbours; age and sex are in the shape of all leads, so the pooled states learn it.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from anyecg_hf.modeling_anyecg_quantizer import DEMOGRAPHY_SCALES

from .base import Batch, RecordHead

ATTRIBUTES = ("age", "sex")


class DemographyHead(RecordHead):
    """Linear layer on pooled states; records of unknown age or sex (NaN) are left out of that mean."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, len(ATTRIBUTES))

    @staticmethod
    def count_items(batch: Batch) -> dict[str, torch.Tensor]:
        """Return how many records are of known age, and of known sex."""
        return {name: batch[name].isfinite().sum() for name in ATTRIBUTES}

    def forward(self, pooled: torch.Tensor, batch: Batch, num_items: dict | None) -> torch.Tensor:
        """Return smooth L1 of the age (in spreads of `DEMOGRAPHY_SCALES`) plus cross-entropy of the sex.

        Args:
            pooled (`torch.Tensor` of shape `(B, D)`): mean of the states of a record.
            batch: `age` in years and `sex` (0 male, 1 female), each `(B,)`.
            num_items: over how many records the means go, where that is not those of this batch.
        """
        age, logit = self.linear(pooled).float().unbind(-1)
        center, spread = DEMOGRAPHY_SCALES["age"]
        known = {name: batch[name].isfinite() for name in ATTRIBUTES}
        target = {name: torch.where(known[name], batch[name].float(), 0.0) for name in ATTRIBUTES}
        losses = {
            "age": nn.functional.smooth_l1_loss(age, (target["age"] - center) / spread, reduction="none"),
            "sex": nn.functional.binary_cross_entropy_with_logits(logit, target["sex"], reduction="none"),
        }
        nums = num_items or self.count_items(batch)
        return sum((losses[name] * known[name]).sum() / nums[name].clamp(min=1) for name in ATTRIBUTES)

    @torch.no_grad()
    def record_sums(self, pooled: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return `(B, 4)`: whether the age is known and its error in years, whether the sex is known and guessed right."""
        age, logit = self.linear(pooled).float().unbind(-1)
        center, spread = DEMOGRAPHY_SCALES["age"]
        known_age, known_sex = (batch[name].isfinite() for name in ATTRIBUTES)
        error = torch.where(known_age, (age * spread + center - batch["age"]).abs(), 0.0)
        right = known_sex & ((logit > 0) == (batch["sex"] > 0.5))
        return torch.stack([known_age.float(), error, known_sex.float(), right.float()], dim=1)

    @staticmethod
    def figures(sums: torch.Tensor) -> dict[str, float]:
        """Return the mean error of the age in years and the share of sexes guessed right, NaN where none is known."""
        known_age, error, known_sex, right = sums.sum(0).tolist()
        return {
            "age_mae": error / known_age if known_age else math.nan,
            "sex_accuracy": right / known_sex if known_sex else math.nan,
        }
