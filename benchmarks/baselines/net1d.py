"""Net1D: a pre-activation residual network with grouped convolutions and squeeze-and-excitation, at about 5 M parameters.

Source: Hong et al. (hsd1503/resnet1d, `net1d.py`), the network of ECGFounder at another size. As there whole records, "same"
padding, shortcuts without weights. Dropout, which the source has at 0.5 behind each activation, is off, as in ECGFounder.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from anyecg_hf.leads import STANDARD_LEADS

from .windows import WindowedClassifier, WindowedConfig


@strict
class Net1dConfig(WindowedConfig):
    """Configuration of `Net1d`.

    Args:
        stem_channels (`int`): of the first convolution, which halves the positions as each stage does.
        stage_channels, stage_blocks (`list[int]`): of each stage.
        kernel_size, group_width (`int`): of a block's middle convolution; channels in one of its groups.
    """

    model_type = "baseline_net1d"

    stem_channels: int = 64
    stage_channels: list[int] | tuple[int, ...] = (64, 128, 128, 256, 256, 512, 512)
    stage_blocks: list[int] | tuple[int, ...] = (2, 2, 2, 2, 2, 2, 2)
    kernel_size: int = 16
    group_width: int = 16
    window_seconds: float | int = 10.0
    hop_seconds: float | int = 5.0


class Net1d(WindowedClassifier):
    """Stem, stages of residual blocks, mean over time."""

    config: Net1dConfig

    def __init__(self, config: Net1dConfig):
        super().__init__(config)
        channels = config.stem_channels
        self.stem = nn.Sequential(
            SameConv1d(len(STANDARD_LEADS), channels, config.kernel_size, stride=2), nn.BatchNorm1d(channels), nn.ReLU()
        )
        blocks = []
        for out_channels, num_blocks in zip(config.stage_channels, config.stage_blocks, strict=True):
            for index in range(num_blocks):
                blocks.append(ResidualBlock(channels, out_channels, config, stride=2 if index == 0 else 1))
                channels = out_channels
        blocks[0].before = nn.Identity()  # the stem has normalised
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, config.num_labels)
        self.post_init()

    def features(self, windows: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stem(windows)).mean(-1)


class ResidualBlock(nn.Module):
    """Convolutions 1, k (grouped), 1, each behind normalisation and ReLU; gates on the channels; a shortcut without weights."""

    def __init__(self, in_channels: int, out_channels: int, config: Net1dConfig, *, stride: int):
        super().__init__()
        self.stride, self.num_new = stride, out_channels - in_channels
        self.before = _activation(in_channels)
        self.path = nn.Sequential(
            nn.Conv1d(in_channels, out_channels, 1),
            _activation(out_channels),
            SameConv1d(
                out_channels, out_channels, config.kernel_size, stride, groups=out_channels // config.group_width
            ),
            _activation(out_channels),
            nn.Conv1d(out_channels, out_channels, 1),
        )
        self.gates = nn.Sequential(
            nn.Linear(out_channels, out_channels // 2),
            nn.ReLU(),
            nn.Linear(out_channels // 2, out_channels),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `(N, out_channels, ceil(positions / stride))` for `x` (N, in_channels, positions)."""
        out = self.path(self.before(x))
        shortcut = nn.functional.max_pool1d(x, self.stride, ceil_mode=True)
        half = self.num_new // 2
        shortcut = nn.functional.pad(shortcut, (0, 0, half, self.num_new - half))
        return out * self.gates(out.mean(-1))[..., None] + shortcut


class SameConv1d(nn.Conv1d):
    """Convolution whose output has `ceil(positions / stride)` positions: zeros at both ends, one more at the right if odd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (kernel_size,), (stride,) = self.kernel_size, self.stride
        num_positions = x.shape[-1]
        missing = max(0, (-(-num_positions // stride) - 1) * stride + kernel_size - num_positions)
        return super().forward(nn.functional.pad(x, (missing // 2, missing - missing // 2)))


def _activation(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(channels), nn.ReLU())
