"""Full precision for what must not depend on how a training runs: the rhythm codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Let all within be computed in float32 proper, as on a CPU: without autocast, and on GPUs without TF32.

    cuDNN's convolutions take TF32 (10 bits of mantissa) unless they are told not to, matrix products where `--tf32` was given.
    """
    settings = _settings()
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, exact in settings:
            setattr(owner, name, exact)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


def _settings() -> list[tuple[object, str, str | bool]]:
    """Return owner, name and exact value of what decides on TF32: torch refuses to read the old names once the new are set."""
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch 2.9 and newer
        return [(owner, "fp32_precision", "ieee") for owner in (backends.cudnn.conv, backends.cuda.matmul)]
    return [(owner, "allow_tf32", False) for owner in (backends.cudnn, backends.cuda.matmul)]
