"""What all baselines share: the batches of AnyECG's models as 12 channels, crops in training, windows in evaluation, the loss.

A batch holds any leads in any order, each with its id; a baseline has one channel for each of the 12 standard leads. Absent
leads, padding and unusable patches are zero, which is the mean of a record without its baseline.
"""

from abc import ABC, abstractmethod

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from anyecg_hf.leads import STANDARD_LEADS
from anyecg_hf.modeling_anyecg_heads import AnyECGForSequenceClassification


@strict
class WindowedConfig(PreTrainedConfig):
    """Configuration of a network that sees a record through windows of one length.

    Args:
        sampling_rate (`int`): of the input, Hz.
        decimation (`int`): each so many-th sample is kept: 3 leaves 100 Hz. No low-pass is put before it: the extractor has one
            at 40 Hz.
        input_scale_mv (`float`): millivolt that become 1; the deviation of a sample of PTB-XL.
        window_seconds, hop_seconds (`float`): length of a window, and from one to the next in evaluation.
        aggregation (`str`): "mean" or "max" of the logits of a record's windows.
        thresholds (`list[float]`, *optional*): score from which a label counts as positive, in the order of `id2label`.
    """

    sampling_rate: int = 300
    decimation: int = 3
    input_scale_mv: float | int = 0.22
    window_seconds: float | int = 2.5
    hop_seconds: float | int = 1.25
    aggregation: str = "mean"
    thresholds: list[float] | None = None

    @property
    def window_samples(self) -> int:
        return self._kept_samples(self.window_seconds)

    @property
    def hop_samples(self) -> int:
        return self._kept_samples(self.hop_seconds)

    def _kept_samples(self, seconds: float) -> int:
        return round(seconds * self.sampling_rate / self.decimation)

    def validate_windows(self):
        if self.aggregation not in ("mean", "max"):
            raise ValueError(f'aggregation is "{self.aggregation}"; accepted are "mean" and "max".')
        if min(self.decimation, self.window_samples, self.hop_samples) < 1:
            raise ValueError(
                f"decimation {self.decimation}, window_seconds {self.window_seconds}, hop_seconds {self.hop_seconds}: "
                "a window and a hop need a sample or more."
            )


class WindowedClassifier(PreTrainedModel, ABC):
    """Logits of a record: in training of one random window of it, in evaluation those of all its windows together.

    A subclass gives `features` and a `classifier`, a linear layer on them. Temperatures are folded into that layer: mean and
    maximum of the windows' logits follow.
    """

    main_input_name = "input_values"
    accepts_loss_kwargs = False  # the loss of a batch is a mean: the Trainer divides it by the accumulation steps
    _loss = AnyECGForSequenceClassification._loss  # the same losses, by `config.problem_type`
    _guess_problem_type = AnyECGForSequenceClassification._guess_problem_type

    @abstractmethod
    def features(self, windows: torch.Tensor) -> torch.Tensor:
        """Return `(N, features)` for `windows` (N, 12, samples) in model units."""

    def forward(
        self,
        input_values: torch.Tensor,
        lead_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Return logits `(B, num_labels)`, and the loss where `labels` are given; arguments as for AnyECG's classifier."""
        channels = self._channels(input_values, lead_ids, attention_mask)
        num_samples = self._num_samples(input_values, attention_mask)
        if self.training:
            logits = self.classifier(self.features(crop(channels, num_samples, self.config.window_samples)))
        else:
            windows, is_inside = cut(channels, num_samples, self.config.window_samples, self.config.hop_samples)
            per_window = self.classifier(self.features(windows[is_inside]))
            logits = aggregate(per_window, is_inside, self.config.aggregation)
        loss = None if labels is None else self._loss(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _channels(self, input_values, lead_ids, attention_mask):
        """Return the standard leads in their order in model units, decimated: `(B, 12, T / decimation)`."""
        if attention_mask is not None:
            patch_size = input_values.shape[-1] // attention_mask.shape[-1]
            input_values = input_values * attention_mask.to(input_values.dtype).repeat_interleave(patch_size, dim=-1)
        values = input_values[..., :: self.config.decimation] / self.config.input_scale_mv
        places = lead_ids.where(lead_ids <= len(STANDARD_LEADS), 0)  # 0: padding and other leads, left out below
        channels = values.new_zeros(values.shape[0], len(STANDARD_LEADS) + 1, values.shape[-1])
        return channels.scatter(1, places[..., None].expand_as(values), values)[:, 1:]

    def _num_samples(self, input_values, attention_mask):
        """Return after how many of the kept samples the last usable patch of each record ends: `(B,)`."""
        batch_size, _, total = input_values.shape
        if attention_mask is not None:
            usable = attention_mask.bool().any(1)  # (B, P)
            ends = torch.arange(1, usable.shape[-1] + 1, device=usable.device) * (total // usable.shape[-1])
            length = (usable * ends).amax(-1)
        else:
            length = torch.full((batch_size,), total, device=input_values.device)
        return -(-length // self.config.decimation)

    @torch.no_grad()
    def _init_weights(self, module):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # as torch starts its layers


def crop(channels: torch.Tensor, num_samples: torch.Tensor, size: int) -> torch.Tensor:
    """Return a window `(B, 12, size)` of each record, begun at random where it is not shorter; the rest is zero.

    The global generator draws: the Trainer seeds it by (seed, step, process), so a resumed run draws the same.

    Args:
        channels (`torch.Tensor` of shape `(B, 12, T)`); num_samples (`torch.Tensor` of shape `(B,)`): of each record.
    """
    channels = _at_least(channels, size)
    choices = (num_samples - size).clamp(min=0) + 1
    starts = (torch.rand(len(choices), device=channels.device) * choices).long()
    places = starts[:, None] + torch.arange(size, device=channels.device)  # (B, size)
    return channels.gather(-1, places[:, None].expand(-1, channels.shape[1], -1))


def cut(channels: torch.Tensor, num_samples: torch.Tensor, size: int, hop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all windows `(B, W, 12, size)`, begun every `hop` samples, and which lie inside their record `(B, W)` bool.

    The first one always counts: of a record that is shorter than a window the rest is zero.
    """
    windows = _at_least(channels, size).unfold(-1, size, hop).movedim(2, 1)
    starts = torch.arange(windows.shape[1], device=channels.device) * hop
    return windows, (starts + size <= num_samples[:, None]) | (starts == 0)


def _at_least(channels, size):
    return nn.functional.pad(channels, (0, max(0, size - channels.shape[-1])))


def aggregate(per_window: torch.Tensor, is_inside: torch.Tensor, rule: str) -> torch.Tensor:
    """Return the logits of each record `(B, labels)`: "mean" or "max" of those of its windows.

    Args:
        per_window (`torch.Tensor` of shape `(windows, labels)`): of the windows for which `is_inside` (B, W) is True, in order.
    """
    logits = per_window.new_full((*is_inside.shape, per_window.shape[-1]), 0 if rule == "mean" else -torch.inf)
    logits[is_inside] = per_window
    return logits.amax(1) if rule == "max" else logits.sum(1) / is_inside.sum(1, keepdim=True)
