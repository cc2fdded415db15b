"""training/ecg_metrics/ecg_metrics.py as `evaluate` loads it: offline, from the folder."""

import ast
import doctest
import json
import re
import socket
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest

from training.ecg_metrics.classification_metrics import class_metrics, classification_metrics, load_challenge_weights
from training.ecg_metrics.patient_bootstrap import intervals_of
from training.ecg_metrics.reconstruction_metrics import mean_and_median, reconstruction_metrics, record_means
from training.labels import LABEL_MAPS, build_task

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "training" / "ecg_metrics"


@pytest.fixture(scope="module")
def classification(tmp_path_factory):
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def reconstruction(tmp_path_factory):
    return evaluate.load(str(FOLDER), "reconstruction", cache_dir=str(tmp_path_factory.mktemp("cache")))


def _multi_label(num_records=60, num_labels=24):
    generator = np.random.default_rng(0)
    targets = (generator.random((num_records, num_labels)) < 0.2).astype(int)
    return np.clip(0.3 * targets + 0.7 * generator.random(targets.shape), 0, 1), targets


def test_the_folder_is_loaded_without_a_connection_from_copies_of_its_own_files(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    metric = evaluate.load(str(FOLDER), cache_dir=str(tmp_path))
    loaded = sys.modules[type(metric).__module__]
    for function in (loaded.classification_metrics, loaded.reconstruction_metrics, loaded.intervals_of):
        assert function.__module__.startswith("evaluate_modules.metrics.ecg_metrics.")
    assert metric.compute(predictions=[[0.9], [0.2], [0.6]], references=[[1], [0], [0]])["macro_auroc"] == 1.0


def test_the_files_of_the_metric_need_each_other_and_what_its_requirements_name():
    """As a Space it is alone: `evaluate` copies the files that the script itself imports."""
    needed, imported = {"ecg_metrics": set()}, set()
    for path in FOLDER.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        needed[path.stem] = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
        imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert set().union(*needed.values()) == needed["ecg_metrics"] == set(needed) - {"ecg_metrics", "__init__"}
    third_party = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    requirements = re.findall(r"^[\w-]+", (FOLDER / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert third_party == set(requirements)


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL))
def test_an_example_of_the_metric_card_gives_what_it_says(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    example = doctest.DocTestParser().get_doctest(block, {}, "README.md", "README.md", 0)
    said = []
    doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)


def test_figures_of_several_labels_are_those_of_the_functions_that_training_uses(classification):
    probabilities, targets = _multi_label()
    names, path = build_task("challenge").names, LABEL_MAPS / "challenge_weights.csv"
    thresholds, patients = np.linspace(0.3, 0.6, 24), [str(i // 2) for i in range(60)]
    figures = classification.compute(
        predictions=probabilities, references=targets, thresholds=thresholds, label_names=names,
        challenge_weights=str(path), patients=patients, num_resamples=20, seed=3,
    )  # fmt: skip
    options = {"thresholds": thresholds, "challenge": load_challenge_weights(path, names)}
    expected = classification_metrics(targets, probabilities, **options)
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert figures["labels"]["AF"] == class_metrics(targets, probabilities, names, thresholds=thresholds)["AF"]
    intervals = intervals_of(
        patients, lambda i: classification_metrics(targets[i], probabilities[i], **options), num_resamples=20, seed=3
    )
    assert figures["intervals_95"] == intervals
    assert set(figures) - set(expected) == {"labels", "intervals_95"}
    json.dumps(figures)


def test_label_numbers_are_one_of_several_labels(classification):
    generator = np.random.default_rng(0)
    probabilities, numbers = generator.dirichlet([1, 1, 1], 50), generator.integers(0, 3, 50)
    figures = classification.compute(predictions=probabilities, references=numbers)
    assert figures["accuracy"] == (probabilities.argmax(axis=1) == numbers).mean()
    assert figures["labels"]["2"]["positives"] == (numbers == 2).sum()


def test_batches_give_what_all_records_at_once_give(classification):
    probabilities, targets = _multi_label(num_labels=2)
    whole = classification.compute(predictions=probabilities.tolist(), references=targets.tolist())
    for start in range(0, 60, 25):
        classification.add_batch(predictions=probabilities[start : start + 25], references=targets[start : start + 25])
    assert classification.compute() == whole


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        ([[0.1], [1.7]], [[0], [1]], {}, r"record 1, label 0 is 1.7; accepted are probabilities .* sigmoid"),
        ([[0.1], [float("nan")]], [[0], [1]], {}, "record 1, label 0 is nan"),
        ([[0.1, 0.2], [0.3]], [[0, 1], [1, 0]], {}, "record 1 has 1 probabilities, record 0 has 2"),
        ([[0.1, 0.2]], [[0]], {}, r"references: record 0 is \[0.0\]; accepted is 0 or 1 for each of 2 labels"),
        ([[0.1, 0.2]], [[0, 2]], {}, r"references: record 0 is \[0.0, 2.0\]"),
        ([[0.1, 0.9]], [2], {}, "record 0 is 2.0; accepted are label numbers from 0 to 1"),
        ([[0.1, 0.2]], [1], {}, "probabilities of record 0 add up to 0.3; .*softmax"),
        ([[0.1, 0.9]], [1], {"thresholds": 0.5}, "of one of several the most probable"),
        ([[0.1, 0.9]], [[0, 1]], {"thresholds": [0.1, 0.2, 0.3]}, "one for each of 2 labels"),
        ([[0.1, 0.9]], [[0, 1]], {"thresholds": float("nan")}, "one number from 0 to 1"),
        ([[0.1, 0.9]], [[0, 1]], {"label_names": ["a", "a"]}, "label_names has 2 names, 1 of them different"),
        ([[0.1, 0.9]], [[0, 1]], {"patients": ["a", "b"]}, "patients has 2 entries for 1 records"),
    ],
)  # fmt: skip
def test_what_is_no_prediction_or_reference_is_an_error_that_says_what_is(
    predictions, references, options, message, tmp_path
):
    metric = evaluate.load(str(FOLDER), "classification", cache_dir=str(tmp_path))  # a failed one keeps its records
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, **options)


def test_an_unknown_configuration_names_the_known_ones():
    with pytest.raises(ValueError, match="'generation'. Accepted: classification .*reconstruction"):
        evaluate.load(str(FOLDER), "generation")


def _signals(*lengths):
    generator = np.random.default_rng(0)
    references = [np.cumsum(generator.normal(0, 0.1, (3, length)), axis=1) for length in lengths]
    return [each + generator.normal(0, 0.05, each.shape) for each in references], references


def test_figures_of_reconstruction_are_those_of_the_functions_and_records_may_differ_in_length(reconstruction):
    predictions, references = _signals(100, 80, 120)
    scored = np.array([[True, True, True], [True, False, True], [False, True, True]])
    figures = reconstruction.compute(
        predictions=predictions, references=references, scored_leads=scored, lead_names=["I", "II", "V1"],
        patients=["a", "a", "b"], num_resamples=20,
    )  # fmt: skip
    expected = mean_and_median(record_means(reconstruction_metrics(predictions, references, scored)))
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)  # float32 on the way
    assert figures["psnr_fixed_peak_mv"] == 4.0 and figures["num_scored"]["ssim_61"] == 7
    assert figures["leads"]["II"]["records"] == 2 and set(figures["intervals_95"]) == set(expected)
    json.dumps(figures)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda p, r: p[1].__setitem__((2, 5), np.nan), {}, "predictions: record 1, lead 2 holds NaN or infinity"),
        (lambda p, r: p.__setitem__(1, p[1][:, :50]), {}, r"Record 1: predictions have shape \(3, 50\), references \(3, 80\)"),
        (lambda p, r: (p.__setitem__(1, p[1][:2]), r.__setitem__(1, r[1][:2])), {}, "with the 3 leads of record 0"),
        (lambda p, r: p.__setitem__(0, [p[0][0], p[0][1], p[0][2][:7]]), {}, r"leads of record 0 have \[7, 100\] samples"),
        (lambda p, r: None, {"scored_leads": [True, True]}, r"scored_leads has shape \(2,\).*\(2, 3\)"),
        (lambda p, r: None, {"lead_names": ["I"]}, "lead_names has 1 names"),
    ],
)  # fmt: skip
def test_signals_that_do_not_fit_are_an_error_that_names_the_record(change, options, message, tmp_path):
    predictions, references = _signals(100, 80)
    change(predictions, references)
    metric = evaluate.load(str(FOLDER), "reconstruction", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, **options)
