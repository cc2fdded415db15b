"""What every pretraining objective has: a backbone, a loss from one masked batch, figures of an evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

Batch = Mapping[str, torch.Tensor]


class Objective(nn.Module, ABC):
    """A network with its loss, as the Trainer takes it: `forward(**batch)` returns a dictionary with `loss`.

    A batch holds `input_values` (B, L, T) in millivolt, `lead_ids` (B, L), `attention_mask` (B, L, P) and
    `bool_masked_pos` (B, L, P), True = hidden; with the codes already known also `labels` (B, L, P).

    Attributes:
        model (`PreTrainedModel`): what is trained; a sub-class may hold more than ends in the checkpoint.
        logged (sequence of `str`): keys of the output that are logged beside the loss.
        floors: of logged figures, below which what is learned has collapsed; see `training.health.refuse_collapse`.
        patterns (sequence of `str`): mask patterns that an evaluation goes through, see `training.masking`.
        follows_length (`bool`): whether a step depends on `progress`, so that a run of another length is another run.
    """

    logged: Sequence[str] = ()
    floors: Mapping[str, tuple[float, str]] = {}
    patterns: Sequence[str] = ("random", "time", "lead")
    follows_length = False
    model: PreTrainedModel
    progress = 0.0  # of the run, from 0 to 1: set before each step

    @abstractmethod
    def forward(self, **batch) -> dict[str, torch.Tensor]:
        """Return `loss`, the parts that are logged and, outside training, `sums`: (B, n), what `figures` is made of.

        `num_items_in_batch` (`dict`, *optional*): over how many items the means go, where that is not this batch alone.
        """

    def count_items(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return over how many items the means of the loss go, by name; none where each record counts the same."""
        return {"hidden": scored_positions(batch).sum()}

    @abstractmethod
    def figures(self, sums: torch.Tensor) -> dict[str, float]:
        """Return the figures of an evaluation from the `sums` of all records, float64 `(records, n)`.

        The first two columns of `sums` are always over how many positions and the sum over them of the loss of the objective
        proper, without losses of the record beside it: what an evaluation gives as `loss`.
        """

    def after_step(self) -> None:
        """Called after each optimizer step: for a teacher that follows."""

    def finished_model(self) -> PreTrainedModel:
        """Return the model that the run ends with."""
        return self.model

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **options) -> None:
        """As the Trainer calls it (before Transformers 5.23 by the next name): keep a layer's input only, compute it again."""
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None) -> None:
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class RecordHead(nn.Module, ABC):
    """A loss of the mean of a record's states, beside the objective's own: of something that the whole record says."""

    NUM_SUMS = 4  # columns of `record_sums`

    @staticmethod
    @abstractmethod
    def count_items(batch: Batch) -> dict[str, torch.Tensor]:
        """Return over how many items the means of the loss go, by name."""

    @abstractmethod
    def forward(self, pooled: torch.Tensor, batch: Batch, num_items: dict | None) -> torch.Tensor:
        """Return the loss for `pooled` (B, D); `num_items`: counts over which its means go, default those of this batch."""

    @abstractmethod
    def record_sums(self, pooled: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return `(B, NUM_SUMS)`: what `figures` is made of, for each record."""

    @staticmethod
    @abstractmethod
    def figures(sums: torch.Tensor) -> dict[str, float]:
        """Return the figures of an evaluation from the `record_sums` of all records."""


def real_positions(batch: Batch) -> torch.Tensor:
    """Return where a batch holds a real patch, bool `(B, L, P)`."""
    return batch["attention_mask"].bool() & (batch["lead_ids"] > 0)[..., None]


def scored_positions(batch: Batch) -> torch.Tensor:
    """Return the patches that are hidden and real, bool `(B, L, P)`."""
    return batch["bool_masked_pos"].bool() & real_positions(batch)


def mean_over(values: torch.Tensor, where: torch.Tensor, num_items: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of `values` where `where` is True, over `num_items` (default: as many as are True)."""
    count = where.sum() if num_items is None else num_items
    return (values * where).sum() / torch.as_tensor(count, device=values.device).clamp(min=1e-6)


def sums_by_record(parts: Sequence[torch.Tensor], where: torch.Tensor) -> torch.Tensor:
    """Return `(B, 1 + len(parts))`: how many positions of each record count, and the sum of each part over them."""
    masked = [where.float(), *(part.float() * where for part in parts)]
    return torch.stack([part.flatten(1).sum(1) for part in masked], dim=1)
