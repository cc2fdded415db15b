"""training/evaluation_page.py and evaluation_pictures.py: one file with everything in it, true to the report."""

import base64
import re

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix

from training import evaluation_pictures as pictures
from training.classifier_report import Predictions, compare_groups, report_of
from training.evaluation_page import label_pairs, write_page
from training.labels import build_task

HEAD = {
    "command": "python -m training.evaluate --checkpoint x --data DIR", "checkpoint": "x <b>", "folds": [9], "leads": None,
    "num_resamples": 0, "num_records_without_codes": 2, "codes_without_label": {"<i>": 4},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr("training.pictures.DPI", 40)
    monkeypatch.setattr("training.evaluation_page.MOST_LABELS", 2)


def _predictions(name):
    generator, task = np.random.default_rng(0), build_task(name)
    patients, size = [str(index) for index in range(240)], (240, len(task.names))
    if name == "age":
        ages = generator.uniform(20, 90, size)
        return Predictions(task, ages + generator.normal(0, 5, size), ages, patients)
    if name == "superclass_single":
        numbers = generator.integers(0, 5, 240)
        return Predictions(task, generator.normal(size=size) + np.eye(5)[numbers], numbers, patients)
    targets = (generator.random(size) < 0.2).astype(np.float32)
    return Predictions(task, 2 * targets - 2 + generator.normal(size=size), targets, patients, [0.4] * len(task.names))


def _page(name, folder, *, groups=True, num_resamples=0):
    predictions = _predictions(name)
    report = HEAD | report_of(predictions, num_resamples=num_resamples) | {"num_resamples": num_resamples}
    if groups:
        halves = {"male": predictions.take(range(120)), "female": predictions.take(range(120, 240))}
        report["by"] = {"sex": compare_groups(halves, num_resamples=num_resamples)}
    write_page(folder / "pages" / "page.html", report, predictions)
    return (folder / "pages" / "page.html").read_text(), report


@pytest.mark.parametrize(
    ("name", "num_pictures"), [("rhythm", 5), ("superclass_single", 4), ("age", 2), ("anomaly", 4)]
)
def test_a_page_is_one_file_that_refers_to_nothing_and_runs_nothing(tmp_path, name, num_pictures):
    text, _ = _page(name, tmp_path)
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == num_pictures
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert not re.search(r"<script|<link|<iframe|@import|url\(|https?:", text)
    assert "x &lt;b&gt;" in text and "&lt;i&gt; (4 records)" in text and "2 records carry no code" in text
    assert "not a medical device" in text and 'name="viewport"' in text


def test_the_tables_hold_the_figures_of_the_report(tmp_path):
    text, report = _page("rhythm", tmp_path, num_resamples=3)
    low, high = report["intervals_95"]["macro_auroc"]
    assert f"<td>{report['macro_auroc']:.3f}</td><td>{low:.3f} to {high:.3f}</td>" in text
    label = report["labels"]["AFIB"]
    (rest, false_alarms), (misses, hits) = label["confusion"]
    row = re.search(r"<tr><td>AFIB</td>.*?</tr>", text, re.DOTALL)[0]
    cells = re.findall(r"<td>(.*?)</td>", row)
    assert cells == [
        "AFIB", str(label["positives"]), f"{100 * label['prevalence']:.1f} %", f"{label['auroc']:.3f}",
        "{:.3f} to {:.3f}".format(*label["auroc_interval_95"]), f"{label['auprc']:.3f}", "0.400", f"{label['sensitivity']:.3f}",
        f"{label['specificity']:.3f}", f"{label['ppv']:.3f}", str(hits), str(misses), str(false_alarms), str(rest),
    ]  # fmt: skip
    group = report["by"]["sex"]["groups"]["male"]
    assert f"<td>male</td><td>120</td><td>{group['macro_auroc_common']:.3f}</td>" in text


def test_without_intervals_and_groups_there_is_a_page_all_the_same(tmp_path):
    text, _ = _page("rhythm", tmp_path, groups=False)
    assert "none was asked for" in text and "<h2>Groups</h2>" not in text


def test_records_that_give_no_figure_at_all_give_a_page_without_curves(tmp_path):
    predictions = _predictions("anomaly").take(range(6))
    predictions.targets[:] = 1
    write_page(tmp_path / "page.html", HEAD | report_of(predictions), predictions)
    assert "ROC" not in re.findall(r"<h2>(.*?)</h2>", (tmp_path / "page.html").read_text())


def test_the_same_report_gives_the_same_page(tmp_path):
    assert _page("anomaly", tmp_path)[0] == _page("anomaly", tmp_path)[0]


def test_bins_of_calibration_and_their_intervals_are_those_of_scikit_learn_and_scipy():
    generator = np.random.default_rng(0)
    scores = generator.random(400)
    targets = (generator.random(400) < scores**2).astype(float)
    means, shares, low, high = pictures.reliability(targets, scores)
    expected_shares, expected_means = calibration_curve(targets, scores, n_bins=10)
    assert means == pytest.approx(expected_means) and shares == pytest.approx(expected_shares)
    inside = (scores >= 0.3) & (scores < 0.4)
    limits = binomtest(int(targets[inside].sum()), int(inside.sum())).proportion_ci(method="wilson")
    assert (low[3], high[3]) == pytest.approx(tuple(limits))


def test_bins_of_fewer_than_five_scores_are_left_out():
    scores = np.array([0.05] * 5 + [0.95] * 4)
    assert pictures.reliability(np.ones(9), scores)[0] == pytest.approx([0.05])


def test_pairs_of_labels_are_shares_of_the_records_with_the_first():
    generator = np.random.default_rng(0)
    targets, decisions = (generator.random((50, 3)) < 0.5).astype(float), generator.random((50, 3)) < 0.5
    given, true = label_pairs(targets, decisions)
    for row in range(3):
        chosen = targets[:, row] == 1
        assert given[row] == pytest.approx(decisions[chosen].mean(axis=0))
        assert true[row] == pytest.approx(targets[chosen].mean(axis=0))


def test_the_matrix_of_one_of_several_labels_is_that_of_scikit_learn(tmp_path, monkeypatch):
    drawn, draw = {}, pictures.draw_confusion_matrix
    monkeypatch.setattr(
        pictures, "draw_confusion_matrix", lambda counts, names: drawn.update(counts=counts) or draw(counts, names)
    )
    _page("superclass_single", tmp_path)
    predictions = _predictions("superclass_single")
    expected = confusion_matrix(predictions.targets, predictions.logits.argmax(axis=1))
    assert np.array_equal(drawn["counts"], expected)
