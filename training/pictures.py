"""What the pictures of pages have in common: narrow enough for a phone, the same bytes for the same figures."""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WIDTH, DPI = 5.6, 160  # inches: with letters of 8 points and more still readable on a screen of 6 cm
OWN_COLOUR, BAR_COLOUR, ORIGINAL_COLOUR, ALONE_COLOUR = "#35618f", "#e0a030", "#1c1c1c", "#b5473c"
BAND_COLOUR, GREY = "#c9d6e4", "#666666"
SMALL, TINY = 9, 8  # points


def as_png(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """Let a function that returns a figure return its PNG, drawn with the library's own settings."""

    def png(*args, **kwargs) -> bytes:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update({"font.size": SMALL, "axes.titlesize": SMALL, "legend.fontsize": TINY})
            target = io.BytesIO()
            draw(*args, **kwargs).savefig(target, format="png", metadata={"Software": None})
        return target.getvalue()

    png.__doc__ = draw.__doc__
    return png


def new_figure(height: float) -> Figure:
    """Return an empty figure, `height` inches high."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
