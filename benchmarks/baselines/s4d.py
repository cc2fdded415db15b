"""S4D: state-space layers with a diagonal transition, computed as a convolution by FFT.

Source: Gu et al. 2022 (arXiv 2206.11893) for the layer (S4D-Lin start, zero-order hold, B = 1); Mehari and Strodthoff
(arXiv 2211.07579, 2308.15291; code tmehari/ssm_ecg) for the network around it: 4 blocks of 512 channels with state 8, both
directions, gated output, dropout 0.2, LayerNorm behind the residual, mean over 2.5 s at 100 Hz. They use S4, whose transition
is diagonal plus low rank: S4D is its successor without the low rank. In evaluation they average over windows.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from anyecg_hf.leads import STANDARD_LEADS

from .windows import WindowedClassifier, WindowedConfig


@strict
class S4DConfig(WindowedConfig):
    """Configuration of `S4DClassifier`.

    Args:
        hidden_size, num_hidden_layers (`int`): channels and blocks.
        state_size (`int`): real numbers in the state of a channel and direction; half as many complex ones.
        min_step, max_step (`float`): range of the step sizes of the channels at the start.
    """

    model_type = "baseline_s4d"

    hidden_size: int = 512
    num_hidden_layers: int = 4
    state_size: int = 8
    min_step: float = 0.001
    max_step: float = 0.1
    dropout: float | int = 0.2


class S4DClassifier(WindowedClassifier):
    """Linear map of the leads, state-space blocks, mean over time."""

    config: S4DConfig

    def __init__(self, config: S4DConfig):
        super().__init__(config)
        self.embedding = nn.Linear(len(STANDARD_LEADS), config.hidden_size)
        self.blocks = nn.Sequential(*(S4DBlock(config) for _ in range(config.num_hidden_layers)))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def features(self, windows: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.embedding(windows.mT)).mean(1)


class S4DBlock(nn.Module):
    """State space, GELU, gated linear map; the input is added, then LayerNorm. Dropout takes whole channels."""

    def __init__(self, config: S4DConfig):
        super().__init__()
        self.state_space = S4D(config)
        self.output = nn.Sequential(nn.Linear(config.hidden_size, 2 * config.hidden_size), nn.GLU())
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout1d(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return and take `(N, positions, hidden_size)`."""
        states = self.dropout(nn.functional.gelu(self.state_space(x.mT)))  # (N, channels, positions)
        return self.norm(x + self.dropout(self.output(states.mT).mT).mT)


class S4D(nn.Module):
    """For each channel `h_t = e^(dt A) h_(t-1) + (e^(dt A) - 1) / A x_t`, `y_t = 2 Re(C h_t) + D x_t`, A diagonal and complex.

    A second C reads the states of the same recurrence run backwards, over what comes after t.
    """

    def __init__(self, config: S4DConfig):
        super().__init__()
        channels, num_states = config.hidden_size, config.state_size // 2
        self.range = (math.log(config.min_step), math.log(config.max_step))
        self.log_step = nn.Parameter(torch.empty(channels))  # log dt
        self.log_decay = nn.Parameter(torch.empty(channels, num_states))  # log(-Re A)
        self.frequency = nn.Parameter(torch.empty(channels, num_states))  # Im A
        self.readout = nn.Parameter(torch.empty(2, channels, num_states, 2))  # C by direction, real and imaginary
        self.skip = nn.Parameter(torch.empty(channels))  # D
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start as S4D-Lin: `A_n = -1/2 + i pi n`."""
        self.log_step.uniform_(*self.range)
        self.log_decay.fill_(math.log(0.5))
        self.frequency.copy_(math.pi * torch.arange(self.frequency.shape[1]).expand_as(self.frequency))
        self.readout.normal_(std=math.sqrt(0.5))
        self.skip.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return and take `(N, channels, positions)`; computed in float32 at least."""
        num_positions = x.shape[-1]
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            forwards, backwards = self.kernels(num_positions)
            kernel = torch.cat([forwards, backwards.flip(-1)], dim=-1)  # circular: the second half is negative times
            spectrum = torch.fft.rfft(x, n=2 * num_positions) * torch.fft.rfft(kernel)
            return torch.fft.irfft(spectrum, n=2 * num_positions)[..., :num_positions] + x * self.skip[:, None]

    def kernels(self, num_positions: int) -> torch.Tensor:
        """Return the answer to an impulse `(2, channels, positions)`: 0, 1, ... samples after it; 1, 2, ... before it."""
        transition = torch.complex(-self.log_decay.exp(), self.frequency)  # A
        exponent = transition * self.log_step.exp()[:, None]  # dt A
        readout = torch.view_as_complex(self.readout) * (exponent.exp() - 1) / transition
        powers = (exponent[..., None] * torch.arange(num_positions, device=exponent.device)).exp()  # (C, states, T)
        return 2 * torch.einsum("dcn,cnt->dct", readout, powers).real
