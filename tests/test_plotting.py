import importlib.util
import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install anyecg-hf[plot]")
from matplotlib.image import imread

from anyecg_hf import plotting
from anyecg_hf.leads import STANDARD_LEADS
from anyecg_hf.plotting import plot_record
from anyecg_hf.records import Record, read_record
from anyecg_hf.simulate import simulate_record

FINDINGS = [
    {"label": "low", "score": 0.1, "threshold": 0.4, "positive": False},
    {"label": "high", "score": 0.9, "threshold": 0.5, "positive": True},
    {"label": "rare but over its threshold", "score": 0.3, "threshold": 0.2, "positive": True},
]


def step_record(seconds=10.0, lead_names=("II",), rate=200.0, **fields):
    """1 mV in the last tenth of the record, 0 before."""
    signal = np.zeros((len(lead_names), round(seconds * rate)), dtype=np.float32)
    signal[:, int(0.9 * signal.shape[1]) :] = 1.0
    return Record(signal, rate, list(lead_names), **fields)


def traces(figure):
    """(lead name, line) from top to bottom and left to right as drawn."""
    lines = [(line.get_gid() or "", line) for line in figure.axes[0].lines]
    return [(gid.removeprefix("trace-"), line) for gid, line in lines if gid.startswith("trace-")]


def texts(figure, gid=None):
    return [text.get_text() for text in figure.axes[0].texts if gid is None or text.get_gid() == gid]


def zero_line(line):
    """Height in mm of a trace that is 0 mV at its start."""
    return line.get_ydata()[0]


def patches(figure, gid):
    return [patch for patch in figure.axes[0].patches if patch.get_gid() == gid]


def test_the_axis_is_the_page_in_millimetres():
    figure = plot_record(simulate_record(0))
    size = figure.get_size_inches() * 25.4
    axes = figure.axes[0]
    assert (axes.get_xlim()[1], axes.get_ylim()[1]) == pytest.approx(tuple(size))
    assert axes.get_position().bounds == (0, 0, 1, 1)


def test_one_second_is_25_mm_and_one_millivolt_10_mm():
    ((_, line),) = traces(plot_record(step_record()))
    assert np.ptp(line.get_xdata()) == pytest.approx(250 * (2000 - 1) / 2000)
    assert np.ptp(line.get_ydata()) == pytest.approx(10)


def test_the_saved_picture_keeps_the_scale_in_its_pixels():
    file = io.BytesIO()
    plot_record(step_record(lead_names=["V1"]), dpi=254).savefig(file)  # 10 pixels a millimetre
    file.seek(0)
    dark = imread(file)[:, :, :3].max(2) < 0.3
    height = {column: np.flatnonzero(dark[:, column]) for column in (1500, 2600)}  # before and after the step
    middle = [rows[(rows > 120) & (rows < dark.shape[0] - 200)].mean() for rows in height.values()]
    assert middle[0] - middle[1] == pytest.approx(100, abs=1.5)


def test_the_calibration_mark_is_1_mv_for_200_ms():
    figure = plot_record(simulate_record(0))
    marks = [line for line in figure.axes[0].lines if line.get_gid() == "calibration"]
    assert len(marks) == 4
    for mark in marks:
        x, y = mark.get_data()
        up = np.flatnonzero(y == y.max())
        assert np.ptp(y) == pytest.approx(10) and np.ptp(x[up]) == pytest.approx(5)


def test_the_paper_has_lines_every_1_and_5_mm_and_zero_lies_on_a_thick_one():
    figure = plot_record(step_record(lead_names=STANDARD_LEADS))
    grid = {lines.get_gid(): lines.get_segments() for lines in figure.axes[0].collections}
    for gid, spacing in (("grid-1mm", 1.0), ("grid-5mm", 5.0)):
        across = sorted({segment[0][1] for segment in grid[gid] if segment[0][1] == segment[1][1]})
        assert np.diff(across) == pytest.approx(spacing)
    thick = np.array([segment[0][1] for segment in grid["grid-5mm"] if segment[0][1] == segment[1][1]])
    assert all(np.abs(thick - zero_line(line)).min() < 1e-6 for name, line in traces(figure) if name != "V4")


def test_twelve_leads_of_ten_seconds_are_four_columns_in_time_over_a_strip_of_lead_ii():
    record = simulate_record(1, lead_names=STANDARD_LEADS[::-1])
    figure = plot_record(record)
    rows = ["I aVR V1 V4", "II aVL V2 V5", "III aVF V3 V6", "II"]
    assert [name for name, _ in traces(figure)] == " ".join(rows).split()
    assert texts(figure, "lead") == " ".join(rows).split()
    signal = dict(zip(record.lead_names, record.signal, strict=True))
    _, avr = traces(figure)[1]
    expected = 10 * signal["aVR"][1250:2500]
    assert avr.get_ydata() - avr.get_ydata()[0] == pytest.approx(expected - expected[0], abs=1e-3)
    assert avr.get_xdata()[0] - traces(figure)[0][1].get_xdata()[0] == pytest.approx(62.5)
    assert len(traces(figure)[-1][1].get_xdata()) == 5000


@pytest.mark.parametrize(
    ("lead_names", "seconds"), [(["V5", "II"], 10), (STANDARD_LEADS, 5), ([*STANDARD_LEADS, "X", "Y", "Z"], 10)]
)
def test_other_leads_or_lengths_stand_one_below_the_other(lead_names, seconds):
    figure = plot_record(simulate_record(0, lead_names=lead_names, duration_seconds=seconds))
    assert [name for name, _ in traces(figure)] == list(lead_names)
    middles = [np.median(line.get_ydata()) for _, line in traces(figure)]
    assert np.all(np.diff(middles) < -15)
    assert len({line.get_xdata()[0] for _, line in traces(figure)}) == 1


def test_two_rows_of_one_name_are_both_shown():
    record = Record(np.stack([np.zeros(2000), np.sin(np.arange(2000))]).astype(np.float32), 200.0, ["ECG", "ECG"])
    first, second = (np.ptp(line.get_ydata()) for _, line in traces(plot_record(record)))
    assert first == 0 and second > 15


def test_large_waves_push_the_rows_apart_so_that_neighbours_do_not_cross():
    record = simulate_record(2, lead_names=["V3", "V4", "V2"], noise_mv=0)
    record.signal *= 3
    extents = [(line.get_ydata().min(), line.get_ydata().max()) for _, line in traces(plot_record(record))]
    assert all(upper[0] >= lower[1] - 1e-6 for upper, lower in zip(extents, extents[1:], strict=False))


def test_what_is_larger_than_the_row_can_be_is_cut_and_said_to_be():
    record = step_record()
    record.signal *= 30
    figure = plot_record(record)
    assert np.ptp(traces(figure)[0][1].get_ydata()) == pytest.approx(50)
    assert texts(figure, "cut") == ["cut at 5 mV"]


def test_a_constant_offset_is_not_shown():
    record = step_record()
    record.signal += 100
    assert np.ptp(traces(plot_record(record))[0][1].get_ydata()) == pytest.approx(10, abs=1e-3)
    assert not texts(plot_record(record), "cut")


def test_microvolt_and_millivolt_give_the_same_picture():
    volts = step_record()
    micro = Record(volts.signal * 1000, volts.sampling_rate, volts.lead_names, units="uV")
    lines = [traces(plot_record(record))[0][1].get_ydata() for record in (volts, micro)]
    assert lines[0] == pytest.approx(lines[1], abs=1e-4)


def test_missing_values_are_a_shaded_gap_in_the_trace():
    record = step_record()
    record.signal[0, 600:1000] = np.nan
    figure = plot_record(record)
    assert np.flatnonzero(np.isnan(traces(figure)[0][1].get_ydata())).tolist() == list(range(600, 1000))
    (gap,) = patches(figure, "gap")
    assert gap.get_width() == pytest.approx(2 * 25) and "no signal" in texts(figure)


def test_masked_parts_are_gaps_too():
    record = step_record(lead_names=["I", "II"])
    mask = np.ones(record.signal.shape, dtype=int)
    mask[1, :400] = 0
    figure = plot_record(record, mask=mask)
    missing = [np.isnan(line.get_ydata()).sum() for _, line in traces(figure)]
    assert missing == [0, 400] and not np.isnan(record.signal).any()


def test_a_lead_without_any_value_is_drawn_as_missing():
    record = simulate_record(0)
    record.signal[6] = np.nan
    figure = plot_record(record)
    figure.savefig(io.BytesIO())
    assert "no signal" in texts(figure) and len(patches(figure, "gap")) == 1


def test_of_a_long_record_the_first_ten_seconds_are_shown_and_named():
    figure = plot_record(step_record(seconds=1800, rate=50.0))
    assert "first 10 s of 30 min" in texts(figure, "scale")[0]
    assert len(traces(figure)[0][1].get_xdata()) == 500


def test_another_part_can_be_asked_for():
    record = simulate_record(0, lead_names=["II"], duration_seconds=60)
    figure = plot_record(record, start_seconds=30, seconds=20)
    assert "30 s to 50 s of 60 s" in texts(figure, "scale")[0]
    expected = 10 * record.signal[0, 15000:25000]
    found = traces(figure)[0][1].get_ydata()
    assert found - found[0] == pytest.approx(expected - expected[0], abs=1e-3)


def test_scale_and_rate_are_written_down():
    assert texts(plot_record(step_record()), "scale") == ["25 mm/s   10 mm/mV   200 Hz   10 s"]


def test_a_simulated_record_says_so_and_a_real_one_does_not():
    assert texts(plot_record(simulate_record(0)), "simulated") == ["SIMULATED, not a patient"]
    assert texts(plot_record(step_record(comments=["Age: 60"])), "simulated") == []


def test_every_picture_says_that_it_is_no_medical_device():
    assert texts(plot_record(step_record()), "footer")[0].startswith("Not a medical device")


def test_nothing_about_the_patient_is_shown():
    fields = {"record_name": "A0001", "age": 71.0, "sex": "female", "diagnosis_codes": ["164889003"]}
    figure = plot_record(step_record(**fields, comments=["Name: Jane Roe", "1984-11-09"]), findings=FINDINGS)
    words = " ".join(texts(figure))
    assert not any(hint in words for hint in ("A0001", "71", "female", "164889003", "Jane", "1984"))


def test_positive_findings_come_first_with_score_and_threshold():
    figure = plot_record(simulate_record(0), findings=FINDINGS)
    assert texts(figure, "finding") == ["high", "rare but over its threshold", "low"]
    assert {"0.90", "0.50", "0.30", "0.20", "0.10", "0.40"} <= set(texts(figure))
    assert figure.get_size_inches()[0] > plot_record(simulate_record(0)).get_size_inches()[0] + 3


def test_findings_that_do_not_fit_are_counted_and_all_positive_ones_fit():
    many = [{"label": f"statement {i}", "score": i / 100, "threshold": 0.65, "positive": i >= 65} for i in range(71)]
    figure = plot_record(step_record(), findings=many)
    shown = texts(figure, "finding")
    assert shown[:6] == [f"statement {i}" for i in (70, 69, 68, 67, 66, 65)]
    assert f"and {71 - len(shown)} more, none of them positive" in texts(figure)


def test_a_long_label_ends_before_the_score():
    figure = plot_record(step_record(), findings=[{"label": "incomplete right bundle branch block " * 3, "score": 1}])
    canvas = figure.canvas.get_renderer()
    label, score = (
        next(t for t in figure.axes[0].texts if test(t.get_text())) for test in (_is_cut_off, "1.00".__eq__)
    )
    assert label.get_window_extent(canvas).x1 < score.get_window_extent(canvas).x0


def _is_cut_off(text):
    return text.endswith("…")


@pytest.mark.parametrize("label", ["costs $5 or $6", "a_b^c", "STT↑ ünïcode", ""])
def test_any_label_is_drawn_as_it_is(label):
    figure = plot_record(step_record(), findings=[{"label": label, "score": 0.5}])
    figure.savefig(io.BytesIO())
    assert texts(figure, "finding") == [label]


def test_threshold_and_positive_may_be_absent():
    findings = [{"label": "a", "score": 0.6, "threshold": 0.5}, {"label": "b", "score": 0.9, "threshold": None}]
    assert texts(plot_record(step_record(), findings=findings), "finding") == ["a", "b"]


@pytest.mark.parametrize("finding", [{"label": "x"}, {"score": 1}, "x", {"label": "x", "score": "high"}])
def test_a_finding_without_label_or_score_is_refused(finding):
    with pytest.raises(ValueError, match="Finding 0 is .*ecg-classification"):
        plot_record(step_record(), findings=[finding])


def explained(relevance, lead_names, label="AFIB", threshold=0.4):
    """What `plot_record` uses of an `Explanation`, in patches of one second."""
    relevance = np.array(relevance, dtype=np.float32)
    fields = {"lead_names": list(lead_names), "start_seconds": np.arange(relevance.shape[1]), "patch_seconds": 1.0}
    return SimpleNamespace(relevance=relevance, label=label, score=0.9, threshold=threshold, unit="log-odds", **fields)


def test_an_explanation_shades_each_second_of_each_lead_by_its_sign_and_size():
    explanation = explained([[0.0, 2.0, np.nan], [-1.0, 0.0, 0.0]], ["V5", "II"])  # not in the record's order
    figure = plot_record(step_record(seconds=3.0, lead_names=["II", "V5"]), explanation=explanation)
    zero = {name: zero_line(line) for name, line in traces(figure)}
    left = traces(figure)[0][1].get_xdata()[0]
    ((strong,), (against,), (unseen,)) = (patches(figure, gid) for gid in ("for", "against", "unseen"))
    assert (strong.get_x(), strong.get_width()) == pytest.approx((left + 25, 25))
    assert strong.get_y() + strong.get_height() / 2 == pytest.approx(zero["V5"])
    assert (against.get_x(), unseen.get_x()) == pytest.approx((left, left + 50))
    assert against.get_y() + against.get_height() / 2 == pytest.approx(zero["II"])
    assert against.get_alpha() == pytest.approx(strong.get_alpha() / 2)


def test_twelve_explained_leads_stand_one_below_the_other_so_that_no_second_is_left_out():
    explanation = explained(np.ones((12, 10)), STANDARD_LEADS)
    figure = plot_record(simulate_record(0), explanation=explanation)
    assert [name for name, _ in traces(figure)] == list(STANDARD_LEADS)
    assert len(patches(figure, "for")) == 120


def test_of_an_explained_record_another_part_has_its_own_seconds():
    explanation = explained(np.arange(20)[None], ["II"])
    figure = plot_record(step_record(seconds=20.0), explanation=explanation, start_seconds=12.5, seconds=3)
    left = traces(figure)[0][1].get_xdata()[0]
    shades = sorted(patches(figure, "for"), key=lambda patch: patch.get_x())
    assert [patch.get_x() - left for patch in shades] == pytest.approx([0, 12.5, 37.5, 62.5])
    assert [patch.get_width() for patch in shades] == pytest.approx([12.5, 25, 25, 12.5])


def test_seconds_that_overlap_are_not_shaded_twice():
    explanation = explained([[1.0, 1.0, 1.0]], ["II"])
    explanation.start_seconds = np.array([0.0, 1.0, 1.3])  # the last window ends with the record
    shades = patches(plot_record(step_record(seconds=2.3), explanation=explanation), "for")
    assert [patch.get_width() for patch in shades] == pytest.approx([25, 7.5, 25])


@pytest.mark.parametrize(("label", "threshold"), [("AFIB", 0.4), ("costs $5 or $6 " * 5, None)])
def test_the_key_names_the_finding_and_the_scale_within_the_page(label, threshold):
    figure = plot_record(step_record(), explanation=explained(np.full((1, 10), 1.5), ["II"], label, threshold))
    assert texts(figure, "explained")[0].startswith(label[:10])
    words = ["score 0.90" if threshold is None else "score 0.90, threshold 0.40", "for", "against", "not counted"]
    assert texts(figure, "key") == [*words, "darkest: 1.5 in the log-odds"]
    renderer = figure.canvas.get_renderer()
    boxes = [
        text.get_window_extent(renderer) for text in figure.axes[0].texts if text.get_gid() in ("explained", "key")
    ]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    assert boxes[-1].x1 < figure.bbox.x1


def test_an_explanation_in_which_nothing_counts_is_drawn_too():
    figure = plot_record(step_record(), explanation=explained(np.zeros((1, 10)), ["II"]))
    figure.savefig(io.BytesIO())
    assert patches(figure, "for") == patches(figure, "against") == []


def restored_result():
    """A result of `ecg-reconstruction`: II measured, III derived, V1 restored, V2 restored from 4 to 6 s."""
    record = step_record(lead_names=("II", "III", "V1", "V2"), rate=300)
    marks = {name: np.zeros((4, 3000), dtype=bool) for name in ("restored", "derived")}
    marks["derived"][1], marks["restored"][2], marks["restored"][3, 1200:1800] = True, True, True
    fields = {"signal": record.signal, "sampling_rate": 300.0, "lead_names": record.lead_names, "units": "mV"}
    return {**fields, "record_name": None, **marks, "quality": {}}


def test_restored_and_derived_leads_are_named_so_and_restored_samples_have_a_colour_and_a_ground():
    figure = plot_record(restored_result())
    assert texts(figure, "lead") == ["II", "III (derived)", "V1 (restored)", "V2 (restored in part)"]
    lines = {line.get_gid(): line for line in figure.axes[0].lines if (line.get_gid() or "").startswith("restored-")}
    assert set(lines) == {"restored-V1", "restored-V2"}
    assert np.array_equal(np.flatnonzero(np.isfinite(lines["restored-V2"].get_ydata())), np.arange(1200, 1800))
    assert all(line.get_color() != dict(traces(figure))["II"].get_color() for line in lines.values())
    assert [round(patch.get_width()) for patch in patches(figure, "restored")] == [250, 50]
    (key,) = texts(figure, "key-to-marks")
    assert "not measured" in key


def test_marks_are_drawn_of_a_record_and_beside_an_explanation_too_and_follow_the_part_shown():
    result = restored_result()
    record = Record(result["signal"], 300.0, result["lead_names"], restored=result["restored"])
    assert texts(plot_record(record, start_seconds=7, seconds=2), "lead") == ["II", "III", "V1 (restored)", "V2"]
    figure = plot_record(record, explanation=explained(np.ones((4, 10)), record.lead_names))
    keys = [text for text in figure.axes[0].texts if text.get_gid() in ("key", "key-to-marks", "scale")]
    assert len({round(text.get_position()[1], 1) for text in keys}) == 3  # each on a line of its own
    assert max(text.get_position()[1] for text in keys) < figure.axes[0].get_ylim()[1] - 3


def test_a_measured_record_has_no_key_to_marks():
    figure = plot_record(step_record())
    assert not texts(figure, "key-to-marks") and not patches(figure, "restored")


def test_marks_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="restored has shape"):
        plot_record({**restored_result(), "restored": np.zeros((4, 10), dtype=bool)})


@pytest.mark.parametrize("part", [{"start_seconds": 10}, {"seconds": 0}, {"seconds": 61}, {"start_seconds": -1}])
def test_a_part_outside_the_record_is_refused(part):
    with pytest.raises(ValueError, match="record of 10 s cannot be drawn"):
        plot_record(step_record(), **part)


def test_a_mask_or_names_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"mask has shape \(3,\)"):
        plot_record(step_record(), mask=np.ones(3))
    with pytest.raises(ValueError, match="one name per row"):
        plot_record(Record(np.zeros((2, 100), dtype=np.float32), 100.0, ["II"]))


def test_without_matplotlib_the_error_names_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("anyecg_hf.plotting_without_matplotlib", plotting.__file__)
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    with pytest.raises(ImportError, match=r"pip install anyecg-hf\[plot\]"):
        bare.plot_record(step_record())


@pytest.mark.parametrize(
    "path", ["challenge-2021/georgia", "challenge-2021/ptb", "challenge-2021/cpsc_2018", "mitdb"], ids=lambda p: p[-8:]
)
def test_real_records_are_drawn(real_ecg, tmp_path, path):
    header = sorted((real_ecg / path).glob("*.hea"))[0]
    plot_record(read_record(header), findings=FINDINGS).savefig(tmp_path / "record.png")
    picture = imread(tmp_path / "record.png")
    assert (picture[:, :, :3].max(2) < 0.3).sum() > 2000


def test_a_notebook_shows_the_whole_page():
    formatters = pytest.importorskip("IPython.core.formatters", reason="IPython is not installed")
    figure = plot_record(step_record(), dpi=50)
    shown, _ = formatters.DisplayFormatter().format(figure)
    width, height = (round(inches * 50) for inches in figure.get_size_inches())
    assert np.abs(np.array(imread(io.BytesIO(shown["image/png"])).shape[:2]) - (height, width)).max() <= 1
    tight = io.BytesIO()
    figure.savefig(tight, bbox_inches="tight", pad_inches=0)  # as a notebook with pyplot does
    assert np.abs(np.array(imread(io.BytesIO(tight.getvalue())).shape[:2]) - (height, width)).max() <= 1
