"""Which patches pretraining hides: random ones, whole seconds of all leads (scattered, or one span), or whole leads.

Random patches can often be read from another limb lead of the same second (III = II - I); whole seconds cannot, and
whole leads teach what leads have to do with each other. Hence the mixture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PATTERNS = ("random", "time", "lead", "span")
PATTERN_SHARES = (0.5, 0.25, 0.25, 0.0)


def mask_record(
    attention_mask: np.ndarray,
    generator: np.random.Generator,
    *,
    ratio: float = 0.5,
    pattern: str | None = None,
    shares: Sequence[float] = PATTERN_SHARES,
) -> np.ndarray:
    """Return what is hidden of one record: bool `(num_leads, num_patches)`, True = hidden.

    About `ratio` of the patches, columns or leads that hold anything real are hidden: at least one, and never all that
    is real. A record with a single real patch, which cannot be both, stays visible. Patches whose `attention_mask` is 0
    are never hidden.

    Args:
        attention_mask (`np.ndarray` of shape `(num_leads, num_patches)`): 1 real, 0 absent or unusable.
        generator: the only source of randomness.
        ratio (`float`): share to hide, above 0 and below 1.
        pattern: "random" patches, "time" columns, whole "lead"s, or a "span" of neighbouring columns; None draws one.
            Where a record has only one column (or one lead) to hide, random patches are hidden instead.
        shares: how often each of `PATTERNS` is drawn; they sum to 1.

    Raises:
        ValueError: `ratio` out of range, or an unknown `pattern`.
    """
    if not 0.0 < ratio < 1.0:
        raise ValueError(f"Mask ratio {ratio}: accepted are numbers above 0 and below 1.")
    if pattern is None:
        pattern = PATTERNS[generator.choice(len(PATTERNS), p=shares)]
    if pattern not in PATTERNS:
        raise ValueError(f"Mask pattern {pattern!r} is unknown. Accepted: {', '.join(PATTERNS)}.")
    real = attention_mask.astype(bool)
    columns = real.any(axis=0)
    units = {"random": real, "time": columns, "lead": real.any(axis=1), "span": columns}[pattern]
    if units.sum() < 2:
        units, pattern = real, "random"
    hidden = (_hide_span if pattern == "span" else _hide_some)(units, generator, ratio)
    if pattern == "lead":
        hidden = hidden[:, None]
    return np.broadcast_to(hidden, real.shape) & real


def _hide_some(units: np.ndarray, generator: np.random.Generator, ratio: float) -> np.ndarray:
    """Return a mask like `units` with about `ratio` of its True entries, between one and all but one of them."""
    hidden = np.zeros(units.shape, dtype=bool)
    candidates = np.flatnonzero(units)
    if len(candidates) >= 2:
        hidden.flat[generator.choice(candidates, _num_hidden(len(candidates), ratio), replace=False)] = True
    return hidden


def _hide_span(units: np.ndarray, generator: np.random.Generator, ratio: float) -> np.ndarray:
    """Return a mask like `units` (columns) with neighbouring True entries hidden, as many as `_hide_some` would."""
    hidden = np.zeros(units.shape, dtype=bool)
    candidates = np.flatnonzero(units)
    num_hidden = _num_hidden(len(candidates), ratio)
    first = int(generator.integers(len(candidates) - num_hidden + 1))
    hidden[candidates[first : first + num_hidden]] = True
    return hidden


def _num_hidden(num_candidates: int, ratio: float) -> int:
    return min(max(round(ratio * num_candidates), 1), num_candidates - 1)
