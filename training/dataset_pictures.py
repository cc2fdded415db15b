"""A picture of a corpus and one of the whole data set, as PNG: the same bytes for the same counts."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np

from .dataset_statistics import UNUSABLE_NAME, Statistics
from .shards import SPLITS

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError:
    matplotlib = None

SPLIT_COLOURS = {"train": "#35618f", "validation": "#e0a030", "test": "#b5473c"}
SEX_COLOURS = {"male": "#4c78a8", "female": "#c46a9b", None: "#b8b8b8"}
FLAG_COLOUR, UNUSABLE_COLOUR, GREY = "#8a8f98", "#b5473c", "#666666"
TITLES = {
    "challenge_classes": "Challenge classes", "superclasses": "superclasses", "snomed_codes": "SNOMED CT codes",
    "beats": "annotated beats",
}  # fmt: skip
MOST_CLASSES = 24
AGE_BINS = np.arange(0, 125, 5)
MOST_LENGTHS = 12  # bars
LEAST_BARS = 7  # fewer are drawn no thicker
BAR_INCHES = 0.24
WIDTH, MARGINS = 11.0, (1.35, 0.6, 0.25, 0.95)  # inches; left, bottom, right, top
COLUMN_GAP, ROW_GAP = 1.35, 0.95
DPI = 110


def has_matplotlib() -> bool:
    return matplotlib is not None


def draw_corpus(title: str, statistics: Statistics, classes: list[str]) -> bytes:
    """Return the picture of one corpus: classes by split, ages by sex, lengths, quality.

    Args:
        classes: those of the Challenge, the most frequent first; without any, the next of `TITLES` is shown.
    """
    column, names = _shown_classes(statistics, classes)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = _figure(title, statistics, height=8.5)
        grid = _grid(figure, 3, 2, width_ratios=(1.15, 1), height_ratios=(1, 1, 1.25))
        _draw_classes(figure.add_subplot(grid[:, 0]), statistics, column, names)
        _draw_ages(figure.add_subplot(grid[0, 1]), statistics)
        _draw_lengths(figure.add_subplot(grid[1, 1]), statistics)
        _draw_quality(figure.add_subplot(grid[2, 1]), statistics)
        return _png(figure)


def draw_all(title: str, corpora: Mapping[str, Statistics], total: Statistics, classes: list[str]) -> bytes:
    """Return the picture of the whole: records by corpus, ages by corpus, classes by corpus."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        heights = (0.6 + BAR_INCHES * max(len(corpora), LEAST_BARS), BAR_INCHES * max(len(classes), 3))
        figure = _figure(title, total, height=sum(heights) + sum(MARGINS[1::2]) + ROW_GAP)
        grid = _grid(figure, 2, 2, height_ratios=heights)
        _draw_sizes(figure.add_subplot(grid[0, 0]), corpora)
        _draw_age_ranges(figure.add_subplot(grid[0, 1]), corpora)
        _draw_class_table(figure.add_subplot(grid[1, :]), corpora, classes)
        return _png(figure)


def _figure(title: str, statistics: Statistics, *, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    records, patients = statistics.num_records(), statistics.num_patients()
    figure.suptitle(f"{title}: {records:,} records, {patients:,} patients", fontsize=14, y=1 - 0.3 / height)
    return figure


def _grid(figure: Figure, num_rows: int, num_columns: int, **ratios):
    """Return a grid whose margins and gaps are so many inches whatever the size: a layout by trial takes twice as long."""
    left, bottom, right, top = MARGINS
    height = figure.get_figheight()
    inner_width, inner_height = WIDTH - left - right, height - bottom - top
    column = (inner_width - COLUMN_GAP * (num_columns - 1)) / num_columns
    row = (inner_height - ROW_GAP * (num_rows - 1)) / num_rows
    return figure.add_gridspec(
        num_rows, num_columns, **ratios, left=left / WIDTH, right=1 - right / WIDTH, bottom=bottom / height,
        top=1 - top / height, wspace=COLUMN_GAP / column, hspace=ROW_GAP / row,
    )  # fmt: skip


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _shown_classes(statistics: Statistics, classes: list[str]) -> tuple[str, list[str]]:
    """Return the first column that has something to show, and its most frequent values."""
    for column in TITLES:
        names = classes if column == "challenge_classes" else statistics.ordered(column)
        if names:
            return column, names[:MOST_CLASSES]
    return "snomed_codes", []


def _draw_classes(axis, statistics: Statistics, column: str, names: list[str]) -> None:
    axis.set_title(TITLES[column], loc="left")
    if not names:
        _say_nothing(axis, "no diagnosis codes")
        return
    _draw_by_split(axis, names, {split: [statistics.of(column, split)[name] for name in names] for split in SPLITS})
    if column == "beats":
        axis.set_xlabel("beats")


def _draw_by_split(axis, names: list[str], counts: Mapping[str, list[int]]) -> None:
    """Draw stacked bars from top to bottom, the sum behind each."""
    places, left = np.arange(len(names)), np.zeros(len(names))
    for split, values in counts.items():
        axis.barh(places, values, left=left, color=SPLIT_COLOURS[split], label=split)
        left += values
    for place, value in zip(places, left):
        axis.annotate(f"{value:,.0f}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(places, names)
    axis.set_ylim(max(len(names), LEAST_BARS) - 0.4, -0.6)
    axis.set_xlim(0, max(left.max() * 1.16, 1))
    axis.set_xlabel("records")
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    handles = [Patch(color=SPLIT_COLOURS[split], label=split) for split, values in counts.items() if any(values)]
    axis.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.02, 1),
        borderaxespad=0.2,
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    _tidy(axis)


def _draw_ages(axis, statistics: Statistics) -> None:
    axis.set_title("ages", loc="left")
    values, weights, colours, labels = [], [], [], []
    ages_by_sex = statistics.of("age_by_sex")
    for sex, colour in SEX_COLOURS.items():
        found = dict(sorted((age, count) for (age, other), count in ages_by_sex.items() if other == sex))
        if found:
            values.append(list(found))
            weights.append(list(found.values()))
            colours.append(colour)
            labels.append(sex or "sex unknown")
    if not values:
        _say_nothing(axis, "no ages stated")
        return
    axis.hist(values, bins=AGE_BINS, weights=weights, stacked=True, color=colours, label=labels, rwidth=0.94)
    axis.set_xlim(AGE_BINS[0], AGE_BINS[-1])
    axis.set_xlabel(f"years (unknown: {statistics.of('age')[None]:,}; 90: also over 89)", color=GREY)
    axis.set_ylim(0, axis.get_ylim()[1] * 1.25)
    axis.legend(loc="upper left", ncols=3, frameon=False, fontsize=8)
    _count_axis(axis)


def _draw_lengths(axis, statistics: Statistics) -> None:
    axis.set_title("lengths", loc="left")
    found = {seconds: count for seconds, count in sorted(statistics.of("seconds").items())}
    if not found:
        _say_nothing(axis, "no records")
        return
    if len(found) <= MOST_LENGTHS:
        places = np.arange(len(found))
        axis.bar(places, list(found.values()), color=FLAG_COLOUR, width=min(0.8, 0.15 * len(found)))
        axis.set_xticks(places, [f"{seconds:g}" for seconds in found])
        axis.set_xlim(-0.6, len(found) - 0.4)
    else:
        axis.hist(list(found), bins=30, weights=list(found.values()), color=FLAG_COLOUR, rwidth=0.94)
    rates = ", ".join(f"{rate:g}" for rate in sorted(statistics.of("sampling_rate")))
    axis.set_xlabel(f"seconds (sampled at {rates} Hz)", color=GREY)
    _count_axis(axis)


def _draw_quality(axis, statistics: Statistics) -> None:
    axis.set_title("quality flags", loc="left")
    found = statistics.of("lead_seconds")
    if not found[""]:
        _say_nothing(axis, "no quality flags")
        return
    names = sorted(set(found) - {"", UNUSABLE_NAME}, key=lambda name: (-found[name], name)) + [UNUSABLE_NAME]
    shares = [100 * statistics.share_of_lead_seconds(name) for name in names]
    places = np.arange(len(names))
    axis.barh(places, shares, color=[FLAG_COLOUR] * (len(names) - 1) + [UNUSABLE_COLOUR])
    for place, share in zip(places, shares):
        axis.annotate(f"{share:.2g} %", (share, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(places, names)
    axis.set_ylim(max(len(names), LEAST_BARS) - 0.4, -0.6)
    axis.set_xlim(0, max(1.18 * max(shares), 0.1))
    axis.set_xlabel(f"% of {found['']:,} lead-seconds", color=GREY)
    _tidy(axis)


def _draw_sizes(axis, corpora: Mapping[str, Statistics]) -> None:
    axis.set_title("records by corpus", loc="left")
    counts = {split: [statistics.num_records(split) for statistics in corpora.values()] for split in SPLITS}
    _draw_by_split(axis, list(corpora), counts)


def _draw_age_ranges(axis, corpora: Mapping[str, Statistics]) -> None:
    axis.set_title("ages: median, quartiles, 5th to 95th percentile", loc="left")
    for place, statistics in enumerate(corpora.values()):
        found = statistics.quantiles("age", (0.05, 0.25, 0.5, 0.75, 0.95))
        if found is None:
            axis.text(60, place, "no ages stated", ha="center", va="center", color=GREY, fontsize=9)
            continue
        axis.plot((found[0], found[4]), (place, place), color=FLAG_COLOUR, linewidth=1.2)
        axis.plot(
            (found[1], found[3]), (place, place), color=SPLIT_COLOURS["train"], linewidth=8, solid_capstyle="butt"
        )
        axis.plot((found[2], found[2]), (place - 0.3, place + 0.3), color="white", linewidth=2)
    axis.set_yticks(np.arange(len(corpora)), list(corpora))
    axis.set_ylim(max(len(corpora), LEAST_BARS) - 0.4, -0.6)
    axis.set_xlim(AGE_BINS[0], AGE_BINS[-1])
    axis.set_xlabel("years", color=GREY)
    _tidy(axis)


def _draw_class_table(axis, corpora: Mapping[str, Statistics], classes: list[str]) -> None:
    """Draw how many records of a corpus bear each class, shaded by the share of them."""
    axis.set_title("classes of the Challenge by corpus: records, shaded by their share of the corpus", loc="left")
    if not classes:
        _say_nothing(axis, "no diagnosis codes")
        return
    counts = np.array([[each.of("challenge_classes")[name] for each in corpora.values()] for name in classes])
    shares = counts / np.maximum([each.num_records() for each in corpora.values()], 1)
    axis.imshow(np.sqrt(shares), aspect="auto", cmap="Blues", vmin=0, vmax=1)  # root: small shares are told apart, too
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.4 else "#b0b0b0" if count == 0 else "black"
        axis.text(column, row, f"{count:,}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(np.arange(len(corpora)), list(corpora))
    axis.set_xlim(-0.5, max(len(corpora), LEAST_BARS) - 0.5)
    axis.set_yticks(np.arange(len(classes)), classes)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)


def _say_nothing(axis, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axis.transAxes)
    axis.set_axis_off()


def _count_axis(axis) -> None:
    axis.set_ylabel("records", color=GREY)
    axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
    _tidy(axis)


def _tidy(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    for each in (axis.xaxis, axis.yaxis):
        if isinstance(each.get_major_formatter(), matplotlib.ticker.ScalarFormatter):
            each.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
