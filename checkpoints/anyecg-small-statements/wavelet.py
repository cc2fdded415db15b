"""Daubechies-6 wavelet bands of a patch, in PyTorch: the targets of the quantizer's frequency view.

Convention: that of PyWavelets, `wavedec(x, "db6", mode="periodization")`; an odd length is made even by repeating its last
sample. Source: AnyECG, Multi-View Synergistic Decoder (recursion of cA and cD); taps: Daubechies 1992, table 6.1, N = 6.
"""

import torch

DB6_LOW = (
    -0.0010773010853084796, 0.004777257510945511, 0.0005538422011614961, -0.031582039317486030, 0.02752286553030573,
    0.09750160558732304, -0.12976686756726194, -0.22626469396543983, 0.31525035170919763, 0.7511339080210954,
    0.49462389039845306, 0.11154074335010947,
)  # fmt: skip
DB6_HIGH = tuple((-1) ** (n + 1) * tap for n, tap in enumerate(reversed(DB6_LOW)))


def wavelet_bands(x: torch.Tensor, num_levels: int) -> dict[str, torch.Tensor]:
    """Return every approximation and detail band of `x`: `{"A1", "D1", ..., "A<n>", "D<n>"}`.

    Args:
        x (`torch.Tensor` of shape `(..., samples)`): floating point.
        num_levels (`int`): at most 4 for 300 samples (the longest filter that fits).

    Returns:
        `dict[str, torch.Tensor]`: band of level l has `ceil(samples / 2**l)` coefficients: 150, 75, 38, 19 for 300.
    """
    bands = {}
    for level in range(1, num_levels + 1):
        x, detail = _analysis_step(x)
        bands[f"A{level}"], bands[f"D{level}"] = x, detail
    return bands


def band_lengths(samples: int, num_levels: int) -> dict[str, int]:
    """Return the number of coefficients of each band of a patch of `samples` samples."""
    lengths = {}
    for level in range(1, num_levels + 1):
        samples = (samples + 1) // 2
        lengths[f"A{level}"] = lengths[f"D{level}"] = samples
    return lengths


def _analysis_step(x):
    """One level of the recursion: `(approximation, detail)`, each half as long."""
    if x.shape[-1] % 2:
        x = torch.cat([x, x[..., -1:]], dim=-1)
    filters = torch.tensor([DB6_LOW, DB6_HIGH], dtype=x.dtype, device=x.device).flip(-1)[
        :, None
    ]  # convolution, not correlation
    taps = len(DB6_LOW)
    flat = x.reshape(-1, 1, x.shape[-1])
    repeats = -(-taps // x.shape[-1])  # a signal shorter than the filter wraps around more than once
    wrapped = torch.cat([flat] * (2 * repeats + 1), dim=-1)
    start = repeats * x.shape[-1] - taps // 2 + 1
    padded = wrapped[..., start : start + x.shape[-1] + taps - 2]
    out = torch.nn.functional.conv1d(padded, filters, stride=2)  # (rows, 2, samples / 2)
    out = out.reshape(*x.shape[:-1], 2, -1)
    return out[..., 0, :], out[..., 1, :]
