"""The page of an evaluation (`training.evaluate --report PAGE.html`): tables, ROC, calibration, confusion, groups; one file."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np

from . import evaluation_pictures as pictures
from .checkpointing import without_nan
from .classifier_report import Predictions
from .ecg_metrics.classification_metrics import decide, scored_classes
from .labels import MULTI, REGRESSION, SINGLE
from .number_text import FILTERS

TEMPLATE = files("hub_cards") / "evaluation.html.j2"
MOST_LABELS = 11  # that are drawn one by one; with the mean of all, four rows of three
FIGURES = {
    "macro_auroc": "macro AUROC", "macro_auroc_10": "macro AUROC, labels with 10 positives or more",
    "superclass_auroc": "macro AUROC of PTB-XL's 5 superclasses", "macro_auprc": "macro AUPRC",
    "specificity_at_95_sensitivity": "specificity at 95 % sensitivity, mean of labels", "macro_f1": "macro F1",
    "positive_f1": "F1 of all labels pooled", "accuracy": "records with every label right",
    "challenge_score": "Challenge score", "brier": "Brier score", "ece": "expected calibration error",
    "mae": "mean absolute error", "rmse": "root mean square error", "r2": "R²",
}  # fmt: skip
GROUPINGS = {"sex": "sex", "age": "age in years", "leads": "leads that the model sees"}


def write_page(path: str | Path, report: Mapping, predictions: Predictions) -> None:
    """Write the page of an evaluation: one HTML file that refers to nothing outside it.

    Args:
        report: of `training.evaluate`.
        predictions: what it was made from.
    """
    report = without_nan(dict(report))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= FILTERS
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report, pictures=_draw(report, predictions), figures=FIGURES, groupings=GROUPINGS,
        is_multi=predictions.task.problem_type == MULTI,
        is_regression=predictions.task.problem_type == REGRESSION,
    )  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _draw(report: Mapping, predictions: Predictions) -> dict[str, str]:
    """Return the pictures that there is something for, as `data:` addresses."""
    drawn = {}
    if predictions.task.problem_type == REGRESSION:
        name = predictions.task.names[0]
        drawn["regression"] = pictures.draw_regression(predictions.targets[:, 0], predictions.logits[:, 0], name)
    else:
        drawn |= _draw_labels(report["labels"], predictions)
    panels = _group_panels(report.get("by", {}))
    if panels:
        name = (
            "mean absolute error"
            if predictions.task.problem_type == REGRESSION
            else "macro AUROC of the labels in common"
        )
        drawn["groups"] = pictures.draw_groups(panels, name)
    return {name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in drawn.items()}


def _draw_labels(labels: Mapping[str, Mapping], predictions: Predictions) -> dict[str, bytes]:
    one_hot, probabilities, names = predictions.one_hot, predictions.probabilities, predictions.task.names
    scored = sorted(scored_classes(one_hot), key=lambda label: -one_hot[:, label].sum())  # the most frequent first
    if not scored:
        return {}
    shown = [names[label] for label in scored[:MOST_LABELS]]
    ordered = one_hot[:, scored], probabilities[:, scored], [names[label] for label in scored]
    points = [(1 - labels[name]["specificity"], labels[name]["sensitivity"]) for name in shown]
    drawn = {
        "roc": pictures.draw_roc(*ordered, points),
        "calibration": pictures.draw_calibration(*ordered, len(shown)),
    }
    decisions = decide(predictions.targets, probabilities, predictions.thresholds)
    if predictions.task.problem_type == SINGLE:
        counts = (one_hot.T @ decisions).round().astype(int)
        return drawn | {"confusion_matrix": pictures.draw_confusion_matrix(counts, names)}
    drawn["confusions"] = pictures.draw_confusions({name: labels[name]["confusion"] for name in shown})
    if len(shown) > 1:
        columns = scored[: len(shown)]
        drawn["pairs"] = pictures.draw_pairs(*label_pairs(one_hot[:, columns], decisions[:, columns]), shown)
    return drawn


def label_pairs(targets: np.ndarray, decisions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return of the records with each label (row) the share that gets, and that has, each label (column).

    Args:
        targets, decisions (`np.ndarray` of shape `(records, labels)`): 0/1, at least one positive a label.

    Returns:
        `(given, true)`, `(labels, labels)` each; the diagonal of `given` is the sensitivity, that of `true` is 1.
    """
    positives = targets.sum(axis=0)[:, None]
    return (targets.T @ decisions) / positives, (targets.T @ targets) / positives


def _group_panels(by: Mapping[str, Mapping]) -> dict[str, dict[str, tuple]]:
    """Return for each grouping whose groups have a figure to be compared by: group -> value, interval."""
    panels = {}
    for grouping, compared in by.items():
        figure = "macro_auroc_common" if "common_labels" in compared else "mae"
        values = {
            group: (figures[figure], figures.get("intervals_95", {}).get(figure))
            for group, figures in compared["groups"].items()
            if figures[figure] is not None
        }
        if values:
            over = f" ({len(compared['common_labels'])} labels)" if "common_labels" in compared else ""
            panels[f"{GROUPINGS[grouping]}{over}"] = values
    return panels
