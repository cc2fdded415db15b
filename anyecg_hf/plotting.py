"""A picture of a record on ECG paper, true to scale: 25 mm a second, 10 mm a millivolt; findings beside it, reasons on it.

    figure = plot_record(read_record("path/to/record"), findings=classify("path/to/record"))
    figure.savefig("record.png")

The whole page is one matplotlib axis in millimetres. It shows leads, times and findings, and nothing about the patient.
"""

import io
from dataclasses import dataclass, fields

import numpy as np

from .leads import STANDARD_LEADS
from .records import Record, is_simulated
from .signal_ops import to_millivolt

try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.textpath import TextPath
except ImportError:
    Figure = None
else:

    class _PageFigure(Figure):
        """Shown by a notebook, which knows how to show a figure only where a window of pyplot could show it, too."""

        def _repr_png_(self):
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()


MM_PER_SECOND = 25.0
MM_PER_MV = 10.0
COLUMNS = (("I", "II", "III"), ("aVR", "aVL", "aVF"), ("V1", "V2", "V3"), ("V4", "V5", "V6"))
RHYTHM_LEAD = "II"
PAGE_SECONDS = 10.0

_PAPER, _THIN_LINE, _THICK_LINE = "#fffbfa", "#f9dcd9", "#eeb0ab"
_INK, _GREY, _ALERT, _POSITIVE = "#101010", "#666666", "#b3261e", "#1a4f9c"  # positive is not the same as bad
_FOR, _AGAINST, _UNSEEN = "#2166c8", "#d06a00", "#bdbdbd"  # told apart by the colour-blind, too
_RESTORED = "#8e24aa"  # of a trace that a model made
_DARKEST = 0.65  # opacity of the cell with the largest relevance
_MARGIN, _HEADER, _FOOTER = 8.0, 12.0, 9.0  # mm
_CALIBRATION_WIDTH = 10.0  # mm: 2.5 before, 5 for 200 ms, 2.5 after
_PANEL_WIDTH, _PANEL_LINE = 106.0, 6.0  # mm
_LEAST_WIDTH = 150.0  # mm: what the words above the paper need
_KEY_LINE = 6.0  # mm: for the key to an explanation
_CELL_REACH = 9.0  # mm: how far the shade of an explanation goes above and below the zero line
_REACH = (10.0, 50.0)  # mm: what a row is given above and below its zero line, at least and at most


def plot_record(
    record, *, findings=None, explanation=None, start_seconds=0.0, seconds=PAGE_SECONDS, mask=None, dpi=150
):
    """Return a picture of `record` as a matplotlib figure.

    12 leads that fill 10 seconds are printed in four columns of 2.5 s, one after the other in time, over a strip of
    lead II; any other set or length one lead below the other. Each lead is shown about its median. Rows are as far
    apart as their traces need, up to 50 mm to either side; what is larger is cut off there, with a note below the name.
    What a model restored is drawn in violet on a violet ground and said to be so at the lead's name, as are derived limb leads.

    Args:
        record (`Record`, or `dict` as the pipeline `ecg-reconstruction` returns it): NaN, and what `mask` excludes, is shown
            as a gap.
        findings (`list[dict]`, *optional*): `{"label", "score", "threshold", "positive"}` as the pipeline
            `ecg-classification` returns them; `threshold` and `positive` may be absent or `None`.
        explanation (`Explanation`, *optional*): of this record, from `anyecg_hf.explain`. Its relevance is a shade behind
            the traces, which then stand one below the other: blue speaks for the finding, orange against it, the darker
            the more; grey was not seen, or may not count as evidence.
        start_seconds, seconds (`float`): the part to show, at most 60 s; a longer record is named as such.
        mask (`np.ndarray` of shape `(num_leads, num_samples)`, *optional*): False or 0 where there is no usable value.
        dpi (`int`): dots an inch of the figure; its size in millimetres does not depend on it.

    Returns:
        `matplotlib.figure.Figure`, which belongs to no window: use its `savefig`, or end a notebook's cell with it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the part asked for is empty or too long, signal, names and mask do not match, or a finding lacks its
            label or score.

    >>> figure = plot_record(simulate_record(0), findings=[{"label": "SR", "score": 0.98, "threshold": 0.5}])
    """
    _require_matplotlib()
    if isinstance(record, dict):
        names = {field.name for field in fields(Record)} - {"quality"}
        record = Record(**{name: value for name, value in record.items() if name in names})
    part = _cut(record, start_seconds, seconds, mask)
    findings = _checked(findings)
    rows = _rows(part, in_columns=explanation is None)
    num_keys = part.is_marked + (explanation is not None)
    page = _Page.for_rows(rows, part, findings, key_height=num_keys * _KEY_LINE)
    figure = _PageFigure(figsize=(page.width / 25.4, page.height / 25.4), dpi=dpi)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, page.width), ylim=(0, page.height))
    axes.set_axis_off()
    _draw_paper(axes, page)
    if explanation is not None:
        _draw_explanation(axes, page, part, explanation)
    for row, zero in zip(rows, page.zero_lines, strict=True):
        _draw_calibration(axes, page.paper_left, zero)
        for strip in row:
            _draw_strip(axes, page, strip, zero)
    _draw_words(axes, page, part, record)
    if part.is_marked:
        _draw_key_to_marks(axes, page, line=num_keys)
    if findings is not None:
        _draw_findings(axes, page, findings)
    return figure


def _require_matplotlib():
    if Figure is None:
        raise ImportError("Drawing a record needs matplotlib, which is not installed: pip install anyecg-hf[plot]")


# ---- what is shown -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """The stretch of the record that is drawn."""

    signal: np.ndarray  # (num_leads, num_samples) mV about each lead's median, NaN where there is no value
    lead_names: list
    sampling_rate: float
    start_seconds: float
    seconds: float
    record_seconds: float
    restored: np.ndarray  # bool (num_leads, num_samples): made by a model
    derived: np.ndarray  # bool (num_leads, num_samples): computed from other limb leads

    @property
    def is_marked(self):
        return bool(self.restored.any() or self.derived.any())


@dataclass(frozen=True)
class _Strip:
    """One lead's trace in one row: where it begins on the paper, and what it shows."""

    lead_name: str
    left: float  # mm from the end of the calibration mark
    height: np.ndarray  # (num_samples,) mm above the zero line
    step: float  # mm from sample to sample
    restored: np.ndarray  # bool (num_samples,)
    note: str  # to the lead's name: what of it was not measured

    def reach(self, side):
        """Return how far the trace goes above (+1) or below (-1) the zero line in mm, within what a row may have."""
        finite = self.height[np.isfinite(self.height)]
        return float(np.clip((side * finite).max(initial=0.0), *_REACH))

    @property
    def is_cut(self):
        return bool(np.nanmax(np.abs(self.height), initial=0.0) > _REACH[1])


def _cut(record, start_seconds, seconds, mask):
    """Return the `_Part` of the record asked for."""
    signal, rate = _usable_signal(record, mask), float(record.sampling_rate)
    record_seconds = signal.shape[1] / rate
    first, count = round(start_seconds * rate), round(seconds * rate)
    if not (start_seconds >= 0 and 0 < seconds <= 60 and 0 <= first < signal.shape[1] and count > 0):
        raise ValueError(
            f"start_seconds={start_seconds!r}, seconds={seconds!r} of a record of {record_seconds:g} s cannot be "
            "drawn; pass a start within the record and at most 60 seconds."
        )
    shown = signal[:, first : first + count]
    middle = [np.median(lead[np.isfinite(lead)]) if np.isfinite(lead).any() else 0.0 for lead in shown]
    shown = shown - np.array(middle)[:, None]
    restored, derived = (_marks(record, name)[:, first : first + count] for name in ("restored", "derived"))
    seconds = shown.shape[1] / rate
    return _Part(shown, list(record.lead_names), rate, first / rate, seconds, record_seconds, restored, derived)


def _marks(record, name):
    """Return which samples have a mark, bool of the shape of the signal."""
    marks, shape = getattr(record, name, None), np.shape(record.signal)
    if marks is None:
        return np.zeros(shape, dtype=bool)
    if np.shape(marks) != shape:
        raise ValueError(f"{name} has shape {np.shape(marks)}, the signal {shape}; pass one value per lead and sample.")
    return np.asarray(marks, dtype=bool)


def _usable_signal(record, mask):
    """Return the record's signal in millivolt, float64, NaN where there is no value or the mask excludes it."""
    signal = np.array(record.signal, dtype=np.float64)
    if signal.ndim != 2 or len(signal) != len(record.lead_names) or not signal.size:
        raise ValueError(
            f"A signal of shape {signal.shape} with the leads {list(record.lead_names)} cannot be drawn; "
            "pass a Record whose signal is (num_leads, num_samples), one name per row."
        )
    if mask is not None:
        mask = np.asarray(mask)
        if mask.shape != signal.shape:
            shapes = f"mask has shape {mask.shape}, the signal {signal.shape}"
            raise ValueError(f"{shapes}; pass one value per lead and sample.")
        signal[mask == 0] = np.nan
    signal = to_millivolt(signal, record.units)
    return np.where(np.isfinite(signal), signal, np.nan)


def _rows(part, in_columns):
    """Return the rows of the picture, each a list of `_Strip`; in columns only if that is wanted and they fit."""
    is_standard = sorted(part.lead_names) == sorted(STANDARD_LEADS)
    if not in_columns or not is_standard or abs(part.seconds - PAGE_SECONDS) > 0.1:
        return [[_strip(part, lead, 0.0, part.seconds)] for lead in range(len(part.lead_names))]
    width = PAGE_SECONDS / len(COLUMNS)
    rows = [
        [_strip(part, part.lead_names.index(name), column * width, width) for column, name in enumerate(names)]
        for names in zip(*COLUMNS, strict=True)
    ]
    return [*rows, [_strip(part, part.lead_names.index(RHYTHM_LEAD), 0.0, part.seconds)]]


def _strip(part, lead, start, seconds):
    rate, step = part.sampling_rate, MM_PER_SECOND / part.sampling_rate
    first, last = round(start * rate), round((start + seconds) * rate)
    height, restored = part.signal[lead, first:last] * MM_PER_MV, part.restored[lead, first:last]
    note = _note("restored", restored) or _note("derived", part.derived[lead, first:last])
    return _Strip(part.lead_names[lead], first * step, height, step, restored, note)


def _note(mark, samples):
    if not samples.any():
        return ""
    return f" ({mark})" if samples.all() else f" ({mark} in part)"


def _checked(findings):
    """Return the findings with every field, positive ones first, then by score; None stays None."""
    if findings is None:
        return None
    rows = []
    for index, finding in enumerate(findings):
        try:
            label, score = str(finding["label"]), float(finding["score"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f'Finding {index} is {finding!r}; each is a dict with "label" and "score" (a number), where known also '
                '"threshold" and "positive", as the pipeline ecg-classification returns them for one record.'
            ) from None
        threshold, positive = finding.get("threshold"), finding.get("positive")
        if positive is None and threshold is not None:
            positive = score >= threshold
        rows.append({"label": label, "score": score, "threshold": threshold, "positive": bool(positive)})
    return sorted(rows, key=lambda row: (not row["positive"], -row["score"]))


# ---- where it goes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Page:
    """Sizes in millimetres; the origin is the page's lower left corner."""

    width: float
    height: float
    paper_left: float
    paper_bottom: float
    paper_width: float
    paper_height: float
    zero_lines: tuple  # height of each row's 0 mV on the page

    @property
    def trace_left(self):
        return self.paper_left + _CALIBRATION_WIDTH

    @classmethod
    def for_rows(cls, rows, part, findings, key_height):
        above = [max(strip.reach(+1) for strip in row) for row in rows]
        below = [max(strip.reach(-1) for strip in row) for row in rows]
        depths = [_up_to_5(above[0] + 5)]  # of the zero lines under the paper's upper edge, on its thick lines
        for low, high in zip(below, above[1:], strict=False):
            depths.append(depths[-1] + _up_to_5(max(low + high, 20.0)))
        paper_height = depths[-1] + _up_to_5(below[-1])
        paper_width = _CALIBRATION_WIDTH + _up_to_5(part.seconds * MM_PER_SECOND)
        if findings is not None:  # room for the positive ones, and for some that are not
            positive = sum(finding["positive"] for finding in findings)
            paper_height = max(paper_height, _up_to_5(_PANEL_LINE * (min(positive, 20) + 4)))
        top = _MARGIN + _FOOTER + paper_height
        return cls(
            width=2 * _MARGIN + max(paper_width, _LEAST_WIDTH) + (_PANEL_WIDTH if findings is not None else 0.0),
            height=top + _HEADER + key_height + _MARGIN / 2,
            paper_left=_MARGIN,
            paper_bottom=_MARGIN + _FOOTER,
            paper_width=paper_width,
            paper_height=paper_height,
            zero_lines=tuple(top - depth for depth in depths),
        )


def _up_to_5(length):
    """Return the next multiple of 5 mm, so that zero lines lie on thick lines."""
    return 5.0 * np.ceil(length / 5.0 - 1e-6)


# ---- drawing -------------------------------------------------------------------------------------------------------


def _draw_paper(axes, page):
    left, bottom, width, height = page.paper_left, page.paper_bottom, page.paper_width, page.paper_height
    # All of the page, so that bbox_inches="tight", with which notebooks save, cuts nothing off.
    axes.add_patch(Rectangle((0, 0), page.width, page.height, facecolor="white", edgecolor="none", zorder=-1))
    axes.add_patch(Rectangle((left, bottom), width, height, facecolor=_PAPER, edgecolor="none", zorder=0))
    for spacing, colour, line_width, order in ((1.0, _THIN_LINE, 0.3, 1), (5.0, _THICK_LINE, 0.6, 2)):
        upright = np.arange(0, width + 0.01, spacing) + left
        across = np.arange(0, height + 0.01, spacing) + bottom
        lines = [[(x, bottom), (x, bottom + height)] for x in upright]
        lines += [[(left, y), (left + width, y)] for y in across]
        look = {"colors": colour, "linewidths": line_width, "zorder": order, "gid": f"grid-{spacing:g}mm"}
        axes.add_collection(LineCollection(lines, **look))


def _draw_calibration(axes, left, zero):
    """Draw 1 mV for 200 ms before the row."""
    x = left + np.array([0, 2.5, 2.5, 7.5, 7.5, 10])
    y = zero + MM_PER_MV * np.array([0, 0, 1, 1, 0, 0])
    axes.plot(x, y, color=_INK, linewidth=0.8, solid_joinstyle="miter", zorder=5, gid="calibration")


def _draw_strip(axes, page, strip, zero):
    left = page.trace_left + strip.left
    x = left + strip.step * np.arange(strip.height.size)
    y = np.clip(strip.height, -_REACH[1], _REACH[1])
    _draw_gaps(axes, strip, left, zero)
    # the pale rim keeps crossing traces of neighbouring rows apart
    rim = [withStroke(linewidth=2.2, foreground=_PAPER, alpha=0.85)]
    axes.plot(x, zero + y, color=_INK, linewidth=0.8, zorder=4, gid=f"trace-{strip.lead_name}", path_effects=rim)
    _draw_restored(axes, strip, x, zero + y, zero)
    if strip.left > 0:
        axes.plot([left, left], [zero - 4, zero + 4], color=_GREY, linewidth=0.8, zorder=5)
    height = min(max(_local_top(strip) + 2.0, 6.0), _REACH[1] - 3)
    rim = [withStroke(linewidth=2.5, foreground=_PAPER)]
    word = {"color": _INK, "zorder": 6, "path_effects": rim}
    axes.text(left + 1.5, zero + height, strip.lead_name + strip.note, fontsize=10, weight="bold", gid="lead", **word)
    if strip.is_cut:
        note = f"cut at {_REACH[1] / MM_PER_MV:g} mV"
        axes.text(left + 1.5, zero + height - 3, note, fontsize=6.5, gid="cut", **word)


def _draw_restored(axes, strip, x, y, zero):
    """Draw what a model made in a colour and on a ground of its own."""
    if not strip.restored.any():
        return
    y = np.where(strip.restored, y, np.nan)
    axes.plot(x, y, color=_RESTORED, linewidth=0.8, zorder=4.5, gid=f"restored-{strip.lead_name}")
    for first, last in _stretches(strip.restored):
        corner, size = (x[first], zero - 5), ((last - first) * strip.step, 10)
        look = {"facecolor": _RESTORED, "alpha": 0.12, "edgecolor": "none", "zorder": 2.6, "gid": "restored"}
        axes.add_patch(Rectangle(corner, *size, **look))


def _stretches(flags):
    """Return `(first, last + 1)` of each run of True."""
    return np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]]))).reshape(-1, 2)


def _local_top(strip):
    """Return how high the trace goes in its first 10 mm, where the lead's name stands."""
    start = strip.height[: max(1, int(10.0 / strip.step))]
    return float(np.nanmax(start, initial=0.0))


def _draw_gaps(axes, strip, left, zero):
    """Shade what has no value; say so where there is room."""
    look = {"facecolor": "#d9d9d9", "alpha": 0.6, "edgecolor": "none", "zorder": 3, "gid": "gap"}
    for first, last in _stretches(np.isnan(strip.height)):
        start, width = left + first * strip.step, (last - first) * strip.step
        if width < 1.0:
            continue
        axes.add_patch(Rectangle((start, zero - 5), width, 10, **look))
        if width > 18:
            where = {"ha": "center", "va": "center", "zorder": 6}
            axes.text(start + width / 2, zero, "no signal", fontsize=8, color=_GREY, **where)


def _draw_explanation(axes, page, part, explanation):
    """Shade each cell by its relevance, and say above the paper what the shades mean. One row a lead."""
    values = dict(zip(explanation.lead_names, explanation.relevance, strict=True))
    largest = np.nanmax(np.abs(explanation.relevance), initial=0.0)
    begins = np.asarray(explanation.start_seconds) - part.start_seconds
    ends = np.minimum(
        begins + explanation.patch_seconds, np.append(begins[1:], np.inf)
    )  # the last window's may overlap
    begins, ends = begins.clip(0), ends.clip(max=part.seconds)
    for name, zero in zip(part.lead_names, page.zero_lines, strict=True):
        for begin, end, value in zip(begins, ends, values.get(name, ())):
            if begin < end and value != 0:
                look = _cell_look(value, largest)
                corner = (page.trace_left + begin * MM_PER_SECOND, zero - _CELL_REACH)
                size = ((end - begin) * MM_PER_SECOND, 2 * _CELL_REACH)
                axes.add_patch(Rectangle(corner, *size, **look, edgecolor="none", zorder=2.5))
    _draw_key(axes, page, explanation, largest)


def _cell_look(value, largest):
    if np.isnan(value):
        return {"facecolor": _UNSEEN, "alpha": 0.5, "gid": "unseen"}
    colour, gid = (_FOR, "for") if value > 0 else (_AGAINST, "against")
    return {"facecolor": colour, "alpha": _DARKEST * abs(value) / largest, "gid": gid}


def _draw_key(axes, page, explanation, largest):
    x, y = page.paper_left, page.paper_bottom + page.paper_height + 3 + _KEY_LINE
    threshold = "" if explanation.threshold is None else f", threshold {explanation.threshold:.2f}"
    label = _shortened(explanation.label, 40.0, "bold")
    axes.text(x, y, label, fontsize=9, weight="bold", color=_INK, gid="explained", parse_math=False)
    x += _text_width(label, "bold") / 72 * 25.4 + 2
    words = (
        (None, f"score {explanation.score:.2f}{threshold}"),
        (_FOR, "for"),
        (_AGAINST, "against"),
        (_UNSEEN, "not counted"),
        (None, f"darkest: {largest:.2g} in the {explanation.unit}"),
    )
    for colour, word in words:
        if colour is not None:
            axes.add_patch(Rectangle((x, y - 0.3), 2.6, 2.6, facecolor=colour, alpha=_DARKEST, edgecolor="none"))
            x += 3.6
        axes.text(x, y, word, fontsize=8, color=_GREY, gid="key")
        x += _text_width(word, "normal") / 72 * 25.4 * 8 / 9 + 4


def _draw_key_to_marks(axes, page, line):
    x, y = page.paper_left, page.paper_bottom + page.paper_height + 3 + line * _KEY_LINE
    axes.add_patch(Rectangle((x, y - 0.3), 2.6, 2.6, facecolor=_RESTORED, edgecolor="none"))
    word = "restored: made by a model, not measured.  derived: computed from other limb leads."
    axes.text(x + 3.6, y, word, fontsize=8, color=_GREY, gid="key-to-marks")


def _draw_words(axes, page, part, record):
    left, top = page.paper_left, page.paper_bottom + page.paper_height + 3
    scale = f"{MM_PER_SECOND:g} mm/s   {MM_PER_MV:g} mm/mV   {part.sampling_rate:g} Hz   {_which_part(part)}"
    axes.text(left, top, scale, fontsize=9, color=_INK, gid="scale")
    if is_simulated(record):
        look = {"fontsize": 11, "weight": "bold", "color": _ALERT, "ha": "right", "gid": "simulated"}
        axes.text(left + max(page.paper_width, _LEAST_WIDTH), top, "SIMULATED, not a patient", **look)
    warning = "Not a medical device. For research only: no diagnosis, no treatment may rest on this picture."
    axes.text(left, page.paper_bottom - 6, warning, fontsize=8, color=_GREY, gid="footer")


def _which_part(part):
    """Return what stretch of the record is shown, in words."""
    if part.record_seconds - part.seconds < 0.1:
        return f"{part.seconds:.4g} s"
    total = f"{part.record_seconds:.4g} s" if part.record_seconds < 600 else f"{part.record_seconds / 60:.3g} min"
    if part.start_seconds == 0:
        return f"first {part.seconds:.4g} s of {total}"
    return f"{part.start_seconds:.5g} s to {part.start_seconds + part.seconds:.5g} s of {total}"


def _draw_findings(axes, page, findings):
    """Draw the table of findings to the right of the paper: positive ones first, as many as there is room for."""
    left = page.paper_left + max(page.paper_width, _LEAST_WIDTH) + 6
    right = page.width - _MARGIN
    y = page.paper_bottom + page.paper_height - 4
    columns = {"score": right - 17.0, "threshold": right}
    axes.text(left, y, "Findings", fontsize=11, weight="bold", color=_INK)
    for name, x in columns.items():
        axes.text(x, y, name, fontsize=8, color=_GREY, ha="right")
    axes.plot([left, right], [y - 2, y - 2], color=_GREY, linewidth=0.6)
    room = int((y - page.paper_bottom) / _PANEL_LINE) - 1
    shown = findings if len(findings) <= room else findings[: room - 1]
    for finding in shown:
        y -= _PANEL_LINE
        _draw_finding(axes, finding, left, y, columns)
    if not findings:
        axes.text(left, y - _PANEL_LINE, "none", fontsize=9, color=_GREY)
    if len(shown) < len(findings):
        hidden = findings[len(shown) :]
        positive = sum(finding["positive"] for finding in hidden)
        note = f"and {len(hidden)} more" + (f", {positive} of them positive" if positive else ", none of them positive")
        axes.text(left, y - _PANEL_LINE, note, fontsize=8, color=_GREY)


def _draw_finding(axes, finding, left, y, columns):
    colour, weight = (_POSITIVE, "bold") if finding["positive"] else (_INK, "normal")
    if finding["positive"]:
        axes.add_patch(Rectangle((left, y - 0.3), 2.2, 2.2, facecolor=_POSITIVE, edgecolor="none"))
    label = _shortened(finding["label"], columns["score"] - 12.0 - left - 4.0, weight)
    axes.text(left + 4, y, label, fontsize=9, weight=weight, color=colour, gid="finding", parse_math=False)
    axes.text(columns["score"], y, f"{finding['score']:.2f}", fontsize=9, weight=weight, color=colour, ha="right")
    threshold = "-" if finding["threshold"] is None else f"{finding['threshold']:.2f}"
    axes.text(columns["threshold"], y, threshold, fontsize=9, color=_GREY, ha="right")


def _shortened(text, width, weight):
    """Return `text`, cut with an ellipsis to `width` millimetres at 9 points."""
    points = width / 25.4 * 72
    needed = _text_width(text, weight)
    if needed <= points:
        return text
    text = text[: int(1.3 * len(text) * points / needed)]  # then letter by letter
    while text and _text_width(text + "…", weight) > points:
        text = text[:-1]
    return text.rstrip() + "…"


def _text_width(text, weight):
    """Return the width of `text` at 9 points, in points; a dollar is a dollar and begins no formula."""
    if not text.strip():
        return 0.0
    return TextPath((0, 0), text.replace("$", r"\$"), size=9, prop={"weight": weight}).get_extents().width
