"""The pictures of the page of an evaluation (`evaluation_page`), as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_auc_score, roc_curve

from .pictures import ALONE_COLOUR, BAND_COLOUR, GREY, OWN_COLOUR, TINY, as_png, new_figure, tidy

NUM_COLUMNS = 3
PANEL_HEIGHT, CONFUSION_HEIGHT, GROUP_ROW = 1.75, 1.45, 0.24  # inches
NUM_BINS = 10
LEAST_IN_BIN = 5
FALSE_ALARM_RATES = np.linspace(0, 1, 201)
LOW, HIGH = -0.02, 1.02


@as_png
def draw_roc(targets: np.ndarray, scores: np.ndarray, names: Sequence[str], points: Sequence[tuple]) -> Figure:
    """Draw the mean of all labels' ROC curves, then that of each of the first labels with its threshold's point.

    Args:
        targets, scores (`np.ndarray` of shape `(records, labels)`): of labels with both outcomes.
        points: for each label that gets a panel (1 - specificity, sensitivity) at its threshold.
    """
    curves = [roc_curve(targets[:, label], scores[:, label])[:2] for label in range(len(names))]
    figure, axes = _panels(1 + len(points))
    mean = np.mean([np.interp(FALSE_ALARM_RATES, *curve) for curve in curves], axis=0)
    for curve in curves:
        axes[0].plot(*curve, color=BAND_COLOUR, linewidth=0.5)
    axes[0].plot(FALSE_ALARM_RATES, mean, color=OWN_COLOUR, linewidth=1.8)
    axes[0].set_title(f"mean of {len(names)} labels" if len(names) > 1 else "all records", fontsize=TINY, loc="left")
    for axis, name, curve, point, label in zip(axes[1:], names, curves, points, range(len(names))):
        axis.plot(*curve, color=OWN_COLOUR, linewidth=1.3)
        axis.plot(*point, color=ALONE_COLOUR, marker="o", markersize=4)
        area = roc_auc_score(targets[:, label], scores[:, label])
        axis.set_title(f"{name}  {area:.3f}", fontsize=TINY, loc="left")
    for axis in axes:
        _unit_square(axis)
    figure.supxlabel("1 - specificity", fontsize=TINY)
    figure.supylabel("sensitivity", fontsize=TINY)
    return figure


@as_png
def draw_calibration(targets: np.ndarray, scores: np.ndarray, names: Sequence[str], num_panels: int) -> Figure:
    """Draw the share of positives over the mean score in ten equal bins: all labels pooled, then the first ones."""
    figure, axes = _panels(1 + num_panels)
    pooled = ("all labels pooled" if len(names) > 1 else "all records", targets.ravel(), scores.ravel())
    each = [(name, targets[:, label], scores[:, label]) for label, name in enumerate(names[:num_panels])]
    for axis, (name, outcomes, probabilities) in zip(axes, [pooled, *each]):
        means, shares, low, high = reliability(outcomes, probabilities)
        bars = np.maximum([shares - low, high - shares], 0)
        axis.errorbar(
            means, shares, yerr=bars, color=OWN_COLOUR, marker="o", markersize=3, linewidth=1.1, elinewidth=0.8
        )
        axis.set_title(name, fontsize=TINY, loc="left")
        _unit_square(axis)
    figure.supxlabel("mean score", fontsize=TINY)
    figure.supylabel("share of positives", fontsize=TINY)
    return figure


def reliability(targets: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return mean score, share of positives and its 95 % Wilson limits of each of ten equal bins of five scores and more.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22:209-212.
    """
    bins = np.minimum((scores * NUM_BINS).astype(int), NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    kept = counts >= LEAST_IN_BIN
    counts = counts[kept]
    means = np.bincount(bins, weights=scores, minlength=NUM_BINS)[kept] / counts
    shares = np.bincount(bins, weights=targets, minlength=NUM_BINS)[kept] / counts
    z = 1.959964
    centre = (shares + z**2 / (2 * counts)) / (1 + z**2 / counts)
    half = z / (1 + z**2 / counts) * np.sqrt(shares * (1 - shares) / counts + z**2 / (4 * counts**2))
    return means, shares, centre - half, centre + half


@as_png
def draw_confusions(confusions: Mapping[str, Sequence[Sequence[int]]]) -> Figure:
    """Draw for each label how many records that have it, or not, are given out as having it.

    Args:
        confusions: to each label `[[TN, FP], [FN, TP]]`.
    """
    figure, axes = _panels(len(confusions), CONFUSION_HEIGHT)
    for axis, (name, ((rest, false_alarms), (misses, hits))) in zip(axes, confusions.items()):
        counts = np.array([[hits, misses], [false_alarms, rest]])
        _draw_counts(axis, counts)
        axis.set_xticks([0, 1], ["given", "not given"], fontsize=TINY)
        axis.set_yticks([0, 1], ["has it", "has not"], fontsize=TINY)
        axis.set_title(name, fontsize=TINY, loc="left")
    return figure


@as_png
def draw_confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw how many records of each true label (row) are given out as each label (column)."""
    figure = new_figure(max(2.2, 0.9 + 0.4 * len(names)))
    axis = figure.add_subplot()
    _draw_counts(axis, counts)
    axis.set_xticks(range(len(names)), names, fontsize=TINY, rotation=90 if len(names) > 6 else 0)
    axis.set_yticks(range(len(names)), names, fontsize=TINY)
    axis.set_xlabel("given out", fontsize=TINY)
    axis.set_ylabel("true", fontsize=TINY)
    return figure


def _draw_counts(axis, counts: np.ndarray) -> None:
    """Draw counts, each with its share of the row; the colour is the share."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    with_share = len(counts) <= 6
    for (row, column), count in np.ndenumerate(counts):
        text = f"{count:,}\n{100 * shares[row, column]:.0f} %" if with_share else f"{count:,}"
        colour = "white" if shares[row, column] > 0.6 else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=TINY, color=colour)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


@as_png
def draw_pairs(given: np.ndarray, true: np.ndarray, names: Sequence[str]) -> Figure:
    """Draw in how many percent of the records with the label of the row each label is given out.

    Args:
        given, true (`np.ndarray` of shape `(labels, labels)`): shares, 0 to 1, of the records with the row's label: which
            get the column's, which have it. The colour is the difference.
    """
    size = len(names)
    figure = new_figure(max(2.4, 1.1 + 0.3 * size))
    axis = figure.add_subplot()
    image = axis.imshow(100 * (given - true), cmap="RdBu_r", vmin=-60, vmax=60, aspect="auto")
    for (row, column), share in np.ndenumerate(given):
        colour = "white" if abs(share - true[row, column]) > 0.4 else "black"
        axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=TINY, color=colour)
    axis.set_xticks(range(size), names, fontsize=TINY, rotation=90)
    axis.set_yticks(range(size), names, fontsize=TINY)
    axis.tick_params(length=0)
    axis.set_xlabel("given out, %", fontsize=TINY)
    axis.set_ylabel("records with", fontsize=TINY)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, fraction=0.04)
    bar.set_label("given minus true, percentage points", fontsize=TINY)
    bar.ax.tick_params(labelsize=TINY)
    bar.outline.set_visible(False)
    return figure


@as_png
def draw_groups(panels: Mapping[str, Mapping[str, tuple]], figure_name: str) -> Figure:
    """Draw a figure of each group, with its interval where there is one.

    Args:
        panels: title to {group: (value, (low, high) or None)}.
    """
    heights = [len(groups) + 1.6 for groups in panels.values()]
    figure = new_figure(0.5 + GROUP_ROW * sum(heights))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, groups) in zip(axes, panels.items()):
        for place, (value, interval) in enumerate(groups.values()):
            if interval is not None:
                axis.plot(interval, [place, place], color=OWN_COLOUR, linewidth=1.4)
            axis.plot(value, place, color=OWN_COLOUR, marker="o", markersize=5)
            axis.annotate(
                f"{value:.3f}", (value, place), (0, 5), textcoords="offset points", ha="center", fontsize=TINY
            )
        axis.set_yticks(range(len(groups)), list(groups))
        axis.set_ylim(len(groups) - 0.5, -0.9)
        axis.set_title(title, fontsize=TINY, loc="left")
        axis.grid(axis="x", color="#e4e4e4", linewidth=0.6)
        tidy(axis)
    axes[-1].xaxis.set_major_locator(MaxNLocator(5))
    axes[-1].set_xlabel(figure_name, fontsize=TINY)
    return figure


@as_png
def draw_regression(targets: np.ndarray, predicted: np.ndarray, name: str) -> Figure:
    """Draw what is predicted over what is true, a dot a record."""
    figure = new_figure(4.2)
    axis = figure.add_subplot()
    axis.plot(targets, predicted, linestyle="", marker=".", markersize=3, alpha=0.5, color=OWN_COLOUR)
    limits = [min(targets.min(), predicted.min()), max(targets.max(), predicted.max())]
    axis.plot(limits, limits, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_xlabel(f"{name}, true")
    axis.set_ylabel(f"{name}, predicted")
    tidy(axis)
    return figure


def _panels(number: int, height: float = PANEL_HEIGHT) -> tuple[Figure, list]:
    num_rows = -(-number // NUM_COLUMNS)
    figure = new_figure(0.35 + height * num_rows)
    axes = list(figure.subplots(num_rows, min(NUM_COLUMNS, number), squeeze=False).flat)
    for axis in axes[number:]:
        axis.set_axis_off()
    return figure, axes[:number]


def _unit_square(axis) -> None:
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    axis.set_xlim(LOW, HIGH)
    axis.set_ylim(LOW, HIGH)
    axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axis.tick_params(labelsize=TINY, length=2)
    tidy(axis)
