"""xresnet1d101: the best network of the PTB-XL benchmark, on which it reached 0.925 for all 71 statements.

Source: Strodthoff et al. 2020 (arXiv 2004.13701), code of the benchmark (helme/ecg_ptbxl_benchmarking: `models/xresnet1d.py`,
`models/fastai_model.py`), after fastai's XResNet and He et al. 2018 (arXiv 1812.01187). As there: 100 Hz, one random crop of
2.5 s a record and epoch, in evaluation the maximum over half-overlapping windows; no layer norm is started at zero.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from anyecg_hf.leads import STANDARD_LEADS

from .windows import WindowedClassifier, WindowedConfig


@strict
class XResNet1dConfig(WindowedConfig):
    """Configuration of `XResNet1d`.

    Args:
        stem_channels, stage_blocks (`list[int]`): three convolutions before the stages; blocks of each stage.
        width, expansion (`int`): channels inside a block, and how many times as many leave it.
        kernel_size (`int`): of the stem's and the blocks' middle convolutions.
        head_size (`int`): of the hidden layer of the head.
        head_dropout (`float`): before the classifier; half of it before the hidden layer.
    """

    model_type = "baseline_xresnet1d"

    stem_channels: list[int] | tuple[int, ...] = (32, 32, 64)
    stage_blocks: list[int] | tuple[int, ...] = (3, 4, 23, 3)
    width: int = 64
    expansion: int = 4
    kernel_size: int = 5
    head_size: int = 128
    head_dropout: float | int = 0.5
    aggregation: str = "max"


class XResNet1d(WindowedClassifier):
    """Bottleneck residual network over time; average and maximum pooled; a hidden layer before the classifier."""

    config: XResNet1dConfig

    def __init__(self, config: XResNet1dConfig):
        super().__init__(config)
        channels = [len(STANDARD_LEADS), *config.stem_channels]
        stem = [
            convolution(channels[i], channels[i + 1], config.kernel_size, stride=2 if i == 0 else 1)
            for i in range(len(config.stem_channels))
        ]
        self.stem = nn.Sequential(*stem, nn.MaxPool1d(3, stride=2, padding=1))
        blocks, num_channels = [], channels[-1]
        for stage, num_blocks in enumerate(config.stage_blocks):
            for index in range(num_blocks):
                blocks.append(Bottleneck(num_channels, config, stride=2 if stage > 0 and index == 0 else 1))
                num_channels = config.width * config.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            nn.BatchNorm1d(2 * num_channels),
            nn.Dropout(config.head_dropout / 2),
            nn.Linear(2 * num_channels, config.head_size),
            nn.ReLU(),
            nn.BatchNorm1d(config.head_size),
            nn.Dropout(config.head_dropout),
        )
        self.classifier = nn.Linear(config.head_size, config.num_labels)
        self.post_init()

    def features(self, windows: torch.Tensor) -> torch.Tensor:
        states = self.blocks(self.stem(windows))  # (N, channels, positions)
        return self.head(torch.cat([states.amax(-1), states.mean(-1)], dim=-1))

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d | nn.Linear):
            init.kaiming_normal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)


class Bottleneck(nn.Module):
    """Convolutions 1, k, 1 beside a shortcut that averages where the stride is 2 and projects where the widths differ."""

    def __init__(self, in_channels: int, config: XResNet1dConfig, *, stride: int):
        super().__init__()
        width, out_channels = config.width, config.width * config.expansion
        self.path = nn.Sequential(
            convolution(in_channels, width, 1),
            convolution(width, width, config.kernel_size, stride=stride),
            convolution(width, out_channels, 1, is_active=False),
        )
        shortcut = [nn.AvgPool1d(2, ceil_mode=True)] if stride != 1 else []
        if in_channels != out_channels:
            shortcut.append(convolution(in_channels, out_channels, 1, is_active=False))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.path(x) + self.shortcut(x))


def convolution(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, is_active: bool = True
) -> nn.Sequential:
    """Return convolution, batch normalisation and, where `is_active`, ReLU."""
    layers = [
        nn.Conv1d(in_channels, out_channels, kernel_size, stride, padding=(kernel_size - 1) // 2, bias=False),
        nn.BatchNorm1d(out_channels),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if is_active else nn.Sequential(*layers)
