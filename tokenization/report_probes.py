"""What the rhythm codes of a record know of its patient: how well its bag of codes predicts age, sex and rhythm, and which
codes go with them. For the health page (`tokenization.report`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score

from training.data import LABEL_COLUMNS, ECGDataset
from training.ecg_metrics.patient_bootstrap import patient_bootstrap
from training.labels import Task, build_task

RIDGE_PENALTIES = np.logspace(-3, 2, 11)
LEAST_RECORDS = {"train": 10, "held_out": 5}  # with and without what is probed
NUM_RESAMPLES = 300
CODES_EACH_SIGN = 3  # are shown of those that go with a target
LEAST_RECORDS_WITH_CODE = 0.03  # share of the training records; rarer codes correlate by chance


@dataclass
class Targets:
    """Targets of training and held-out records; NaN where a record does not say."""

    names: list[str]
    train: np.ndarray  # float (records, names)
    held_out: np.ndarray  # float (records, names)


def probe_targets(train: ECGDataset, held_out: ECGDataset) -> dict[str, Targets]:
    """Return what is predicted from the codes: age, sex (1 = female), and the rhythm statements that are frequent enough.

    Records without any rhythm statement of PTB-XL say nothing about the rhythm.
    """
    found = {}
    for name in ("age", "sex", "rhythm"):
        task = build_task(name)
        names = ["female"] if name == "sex" else list(task.names)
        values = [_targets_of(task, dataset, len(names)) for dataset in (train, held_out)]
        enough = [_is_known_enough(name, *(each[:, column] for each in values)) for column in range(len(names))]
        if any(enough):
            names = [each for each, is_enough in zip(names, enough) if is_enough]
            found[name] = Targets(names, *(each[:, enough] for each in values))
    return found


def _targets_of(task: Task, dataset: ECGDataset, num_names: int) -> np.ndarray:
    rows = zip(*(dataset.column(name) for name in LABEL_COLUMNS))
    targets = [task.encode(dict(zip(LABEL_COLUMNS, row))) for row in rows]
    return np.array([np.full(num_names, np.nan) if each is None else np.reshape(each, num_names) for each in targets])


def _is_known_enough(group: str, train: np.ndarray, held_out: np.ndarray) -> bool:
    """Return whether enough records have, and enough lack, what is predicted; of ages, whether enough are known."""
    for values, least in ((train, LEAST_RECORDS["train"]), (held_out, LEAST_RECORDS["held_out"])):
        counts = [np.isfinite(values).sum()] if group == "age" else [(values == outcome).sum() for outcome in (0, 1)]
        if min(counts) < least:
            return False
    return True


def bag_features(counts: np.ndarray) -> np.ndarray:
    """Return the square root of each code's share of its record: rows of unit length whose distance is Hellinger's."""
    return np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def probe_section(
    train_bags: Mapping[str, np.ndarray],
    held_out_bags: Mapping[str, np.ndarray],
    targets: Mapping[str, Targets],
    patients: Sequence[str],
) -> list[dict]:
    """Return one row for each target: how well ridge regression on a record's bag of codes predicts it.

    Args:
        train_bags, held_out_bags: counts `(records, codebook_size)` of each way to code ("quantizer", "kmeans").
        patients: of the held-out records; the interval is over resamples of patients.
    """
    rows = {}
    for group, each in targets.items():
        known_train, known = (np.isfinite(values).all(axis=1) for values in (each.train, each.held_out))
        own_patients = [patient for patient, is_known in zip(patients, known) if is_known]
        for coding, bags in train_bags.items():
            probe = RidgeCV(RIDGE_PENALTIES, alpha_per_target=True)
            probe.fit(bag_features(bags[known_train]), each.train[known_train])
            scores = probe.predict(bag_features(held_out_bags[coding][known])).reshape(-1, len(each.names))
            for column, name in enumerate(each.names):
                pair = each.held_out[known, column], scores[:, column]
                row = rows.setdefault(name, {"name": name, "group": group, "num_train": int(known_train.sum())})
                row |= _facts(group, each.train[known_train, column], pair[0])
                row[coding] = _figures(group, *pair)
                if coding == "quantizer":
                    row["interval"] = _interval(group, *pair, own_patients)
    return list(rows.values())


def _facts(group: str, train: np.ndarray, held_out: np.ndarray) -> dict:
    """Return the sizes and what one gets without looking at the codes."""
    facts = {"num_held_out": len(held_out)}
    if group == "age":
        constant = np.full(len(held_out), train.mean())
        return facts | {"constant": {"mae": float(mean_absolute_error(held_out, constant)),
                                     "r2": float(r2_score(held_out, constant))}}  # fmt: skip
    return facts | {"positives": int(held_out.sum()), "train_positives": int(train.sum()), "constant": {"auroc": 0.5}}


def _figures(group: str, targets: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    if group == "age":
        return {"r2": float(r2_score(targets, scores)), "mae": float(mean_absolute_error(targets, scores))}
    return {"auroc": float(roc_auc_score(targets, scores))}


def _interval(group: str, targets: np.ndarray, scores: np.ndarray, patients: Sequence[str]) -> tuple[float, float]:
    """Return the 95 % interval of the first figure of `_figures`."""

    def figure(indices):
        if group != "age" and len(np.unique(targets[indices])) < 2:
            return float("nan")
        return next(iter(_figures(group, targets[indices], scores[indices]).values()))

    return patient_bootstrap(patients, figure, num_resamples=NUM_RESAMPLES)


def associated_codes(
    train_bags: np.ndarray, held_out_bags: np.ndarray, target: Targets, name: str, *, num_each: int
) -> list[dict]:
    """Return the codes whose share of a record goes with the target most, `num_each` of each sign.

    Chosen on the training records; the correlation in the held-out records says whether it is more than choice.
    """
    column = target.names.index(name)
    common = ((train_bags > 0).mean(axis=0) >= LEAST_RECORDS_WITH_CODE) & held_out_bags.any(axis=0)
    correlations = [
        _correlations(bag_features(bags), values[:, column])
        for bags, values in ((train_bags, target.train), (held_out_bags, target.held_out))
    ]
    order = np.argsort(np.where(common & np.isfinite(correlations[0]), correlations[0], 0), kind="stable")
    chosen = [code for code in order[::-1][:num_each] if correlations[0][code] > 0 and common[code]]
    chosen += [code for code in order[:num_each] if correlations[0][code] < 0 and common[code]]
    return [{"code": int(code), "r_train": float(correlations[0][code]), "r_held_out": float(correlations[1][code])}
            for code in chosen]  # fmt: skip


def _correlations(features: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return Pearson's r of each column of `features` (records, columns) with `target`, NaN for a constant column."""
    known = np.isfinite(target)
    x, y = features[known] - features[known].mean(axis=0), target[known] - target[known].mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y[:, None]).sum(axis=0) / np.sqrt(np.square(x).sum(axis=0) * np.square(y).sum())
