"""How cards and pages write figures: templates use these as filters. What cannot be said is a dash."""

from __future__ import annotations

from collections.abc import Sequence

DASH = "–"


def fixed(value: float | None, digits: int = 3) -> str:
    """Return `0.915`."""
    return DASH if value is None else f"{value:.{digits}f}"


def interval(limits: Sequence[float | None] | None, digits: int = 3) -> str:
    """Return `0.905 to 0.923`."""
    return DASH if limits is None or None in limits else f"{limits[0]:.{digits}f} to {limits[1]:.{digits}f}"


def percent(value: float | None) -> str:
    """Return `8.3 %` of a share."""
    return DASH if value is None else f"{100 * value:.1f} %"


FILTERS = {"fixed": fixed, "interval": interval, "percent": percent}
