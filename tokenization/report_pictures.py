"""The pictures of the health page (`tokenization.report`), as PNG: narrow enough for a phone, same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from training.pictures import (
    ALONE_COLOUR,
    BAND_COLOUR,
    BAR_COLOUR,
    GREY,
    ORIGINAL_COLOUR,
    OWN_COLOUR,
    SMALL,
    TINY,
    as_png,
    new_figure,
    tidy,
)

from .report_figures import LEADS_A_CODE

CODE_ROW, CURVE_ROW = 1.12, 1.5  # inches
INCHES_A_MV, TRACE_HEIGHTS = 0.5, (3.0, 11.0)


@as_png
def draw_code_shares(shares: Mapping[str, np.ndarray]) -> Figure:
    """Draw the share of each code, sorted, for each way to code (`(codebook_size,)` each)."""
    figure = new_figure(2.9)
    axis = figure.add_subplot()
    size = len(next(iter(shares.values())))
    for (name, values), colour in zip(shares.items(), (OWN_COLOUR, BAR_COLOUR)):
        used = np.sort(values[values > 0])[::-1]
        style = {"drawstyle": "steps-mid"} if len(used) > 1 else {"marker": "o"}
        axis.plot(np.arange(1, len(used) + 1), 100 * used, color=colour, linewidth=1.8,
                  label=f"{name}: {len(used):,} of {size:,} codes used", **style)  # fmt: skip
    axis.axhline(100 / size, color=GREY, linewidth=1, linestyle=":", label="all codes used equally")
    axis.set_yscale("log")
    axis.set_xlim(0, size + 1)
    axis.set_xlabel("codes, the most used first")
    axis.set_ylabel("% of the patches")
    _plain_numbers(axis.yaxis)
    axis.legend(frameon=False, loc="upper right")
    tidy(axis)
    return figure


@as_png
def draw_codes(described: Sequence[Mapping], labels: Sequence[str], *, sampling_rate: float) -> Figure:
    """Draw one row for each code of `describe_codes`: its waveforms in the leads where it occurs most."""
    figure = new_figure(CODE_ROW * len(described) + 0.65)
    grid = figure.subplots(len(described), LEADS_A_CODE, squeeze=False, sharex=True)
    for row, (each, label, axes) in enumerate(zip(described, labels, grid)):
        limits = _limits(each["waveforms"])
        for axis, waveform in zip(axes, each["waveforms"]):
            _draw_waveform(axis, waveform, sampling_rate)
            axis.set_ylim(*limits)
            axis.set_yticks(_ticks(*limits))
        for axis in axes[len(each["waveforms"]) :]:
            axis.set_axis_off()
        axes[0].text(-0.04, 1.03, "mV", transform=axes[0].transAxes, ha="right", fontsize=TINY, color=GREY)
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=TINY, labelpad=4, multialignment="left")
        for axis in axes[1:]:
            axis.tick_params(labelleft=False)
        if row == len(described) - 1:
            for axis in axes:
                axis.set_xlabel("ms", fontsize=TINY)
    _code_legend(figure, grid[0, 0])
    return figure


def _draw_waveform(axis, waveform: Mapping, sampling_rate: float) -> None:
    times = 1000 * np.arange(len(waveform["median"])) / sampling_rate
    axis.fill_between(times, waveform["low"], waveform["high"], color=BAND_COLOUR, linewidth=0,
                      label="real patches, 10th to 90th percentile")  # fmt: skip
    axis.plot(times, waveform["median"], color=ORIGINAL_COLOUR, linewidth=1.3, label="their median")
    axis.plot(times, waveform["decoded_in_records"], color=OWN_COLOUR, linewidth=1.1, label="decoded in their records")
    axis.plot(times, waveform["decoded_alone"], color=ALONE_COLOUR, linewidth=1, linestyle=(0, (3, 1.5)),
              label="decoded from this code alone")  # fmt: skip
    axis.set_title(f"{waveform['lead']}  n = {waveform['count']:,}", fontsize=TINY, loc="left", pad=2)
    axis.set_xlim(0, times[-1])
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3, steps=(1, 2, 5, 10)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.tick_params(labelsize=TINY, length=2)
    axis.axhline(0, color="#dddddd", linewidth=0.6, zorder=0)
    tidy(axis)


def _limits(waveforms: Sequence[Mapping]) -> tuple[float, float]:
    """Return the range in millivolt that all leads of a code share; at least 0.1 mV, so that noise looks like noise."""
    names = ("low", "high", "decoded_in_records", "decoded_alone")
    values = np.concatenate([waveform[name] for waveform in waveforms for name in names])
    low, high = values.min(), values.max()
    spare = max(0.06 * (high - low), (0.1 - (high - low)) / 2)
    return low - spare, high + spare


def _ticks(low: float, high: float) -> list[float]:
    """Return round values between the limits, none at the top: there the unit stands."""
    values = matplotlib.ticker.MaxNLocator(4, steps=(1, 2, 5, 10)).tick_values(low, high)
    return [float(value) for value in values if low <= value <= high - 0.12 * (high - low)]


def _code_legend(figure: Figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)


@as_png
def draw_reconstruction(traces: Mapping[str, tuple[np.ndarray, np.ndarray]], *, sampling_rate: float) -> Figure:
    """Draw a record's leads one below the other, true to one scale: original and decoded."""
    joined = [np.concatenate(pair) for pair in traces.values()]
    zeros = _zero_lines(joined)
    limits = zeros[-1] + min(np.nanmin(joined[-1]), -0.25) - 0.1, max(np.nanmax(joined[0]), 0.25) + 0.1
    figure = new_figure(float(np.clip(INCHES_A_MV * (limits[1] - limits[0]), *TRACE_HEIGHTS)))
    axis = figure.add_subplot()
    for (_, (original, decoded)), zero in zip(traces.items(), zeros):
        times = np.arange(len(original)) / sampling_rate
        axis.plot(times, zero + original, color=ORIGINAL_COLOUR, linewidth=0.7, label="original")
        axis.plot(times, zero + decoded, color=ALONE_COLOUR, linewidth=0.8, alpha=0.85, label="decoded from codes")
    axis.set_yticks(zeros, list(traces))
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, times[-1])
    axis.set_ylim(*limits)
    axis.set_xlabel("s")
    axis.plot([1.012, 1.012], [zeros[-1], zeros[-1] + 1], transform=axis.get_yaxis_transform(), color="black",
              linewidth=2, clip_on=False)  # fmt: skip
    axis.text(1.022, zeros[-1] + 0.5, "1 mV", transform=axis.get_yaxis_transform(), va="center", rotation=90,
              fontsize=TINY)  # fmt: skip
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside upper center", ncols=2, frameon=False)
    tidy(axis)
    axis.spines["left"].set_visible(False)
    return figure


def _zero_lines(traces: Sequence[np.ndarray]) -> np.ndarray:
    """Return where 0 mV of each trace is on one axis in millivolt, so far apart that hardly a trace touches the next."""
    lows, highs = zip(*(np.nanpercentile(trace, (0.2, 99.8)) for trace in traces))
    gaps = [max(high - low, 0.5) + 0.2 for low, high in zip(lows, highs[1:])]
    return -np.concatenate([[0.0], np.cumsum(gaps)])


@as_png
def draw_lead_copy(leads: Sequence[str], same_code: Sequence[Sequence[float]]) -> Figure:
    """Draw how often two leads share a code, in percent."""
    values = 100 * np.array(same_code, dtype=float)
    size = len(leads)
    off = values[~np.eye(size, dtype=bool) & np.isfinite(values)]
    top = max(float(off.max()) if len(off) else 1.0, 1.0)
    figure = new_figure(max(2.5, 0.9 + 0.36 * size))
    axis = figure.add_subplot()
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="#eeeeee", over="#d8d8d8")
    axis.imshow(values, cmap=colours, vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text = "" if row == column or not np.isfinite(value) else f"{value:.0f}" if value >= 10 else f"{value:.1f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=TINY,
                  color="white" if value > 0.6 * top else "black")  # fmt: skip
    axis.set_xticks(range(size), leads, fontsize=TINY)
    axis.set_yticks(range(size), leads, fontsize=TINY)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    return figure


@as_png
def draw_stability(rows: Sequence[Mapping], names: Mapping[str, str]) -> Figure:
    """Draw the share of codes that stay at each alteration, by each way to code; `names`: key in a row -> in the legend."""
    figure = new_figure(0.9 + 0.42 * len(rows))
    axis = figure.add_subplot()
    places, height = np.arange(len(rows)), 0.8 / len(names)
    for index, ((name, label), colour) in enumerate(zip(names.items(), (OWN_COLOUR, BAR_COLOUR))):
        shares = [100 * row[name] for row in rows]
        at = places + (index - (len(names) - 1) / 2) * height
        axis.barh(at, shares, height=height, color=colour, label=label)
        for place, share in zip(at, shares):
            axis.annotate(
                f"{share:.0f}", (share, place), (3, 0), textcoords="offset points", va="center", fontsize=TINY
            )
    axis.set_yticks(places, [row["alteration"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 108)
    axis.set_xticks(range(0, 101, 25))
    axis.set_xlabel("% of codes that stay")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    tidy(axis)
    return figure


@as_png
def draw_curves(series: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw each logged series over the steps; a figure of the evaluation beside that of the training of the same name."""
    panels: dict[str, dict] = {}
    for name, values in series.items():
        panels.setdefault(name.removeprefix("eval_"), {})[name] = values
    num_rows = -(-len(panels) // 2)
    figure = new_figure(CURVE_ROW * num_rows + 0.5)
    grid = figure.subplots(num_rows, 2, squeeze=False, sharex=True)
    for axis, (title, lines) in zip(grid.flat, panels.items()):
        for name, line in lines.items():
            is_evaluation = name.startswith("eval_")
            axis.plot(line["steps"], line["values"], color=BAR_COLOUR if is_evaluation else OWN_COLOUR, linewidth=1.3,
                      marker="o" if len(line["steps"]) < 10 else None, markersize=3)  # fmt: skip
        axis.set_title(title, loc="left", fontsize=SMALL, pad=3)
        axis.tick_params(labelsize=TINY, length=2)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        _plain_numbers(axis.yaxis)
        tidy(axis)
    for axis in grid.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in grid[-1]:
        axis.set_xlabel("step")
    lines = [matplotlib.lines.Line2D([], [], color=colour) for colour in (OWN_COLOUR, BAR_COLOUR)]
    figure.legend(lines, ["training", "evaluation"], loc="outside upper center", ncols=2, frameon=False)
    return figure


def _plain_numbers(axis) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:,.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}")
