"""Cross-validation by patient, nested: an arm's temperature and thresholds never see the patients that they are measured on.

For each outer fold the training patients are scored by inner folds among them; from these scores come a temperature for
windows, one for segments, and the thresholds (`training/thresholds.py`). Then the arm is fitted on all training patients and
scores the patients left out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from anyecg_hf.long_record import by_second, own_share, share_of_beats

from .ecg_metrics.classification_metrics import class_auprc, class_auroc, expected_calibration_error
from .ecg_metrics.patient_bootstrap import intervals_of
from .labels import MULTI, WINDOW_LABELS
from .long_arms import Arm, Scores, segments
from .long_data import LongRecord
from .splits import spread_order
from .thresholds import choose_thresholds, fit_temperature

logger = logging.getLogger(__name__)

AF, V = (WINDOW_LABELS.index(label) for label in ("AF", "V"))


@dataclass(frozen=True)
class Calibration:
    """Temperatures and thresholds, of windows and of records."""

    temperature: float
    thresholds: list[float]
    record_temperature: float
    record_thresholds: list[float]


@dataclass(frozen=True)
class Judged:
    """A record with calibrated scores and decisions of an arm that has not seen its patient."""

    record: LongRecord
    scores: Scores
    calibration: Calibration

    @property
    def probabilities(self) -> np.ndarray:
        return expit(self.scores.logits / self.calibration.temperature)

    @property
    def record_probabilities(self) -> np.ndarray:
        return expit(self.scores.record_logits / self.calibration.record_temperature)


def record_labels(labels: np.ndarray) -> np.ndarray:
    """Return whether windows hold each finding, by half of one of them, `(2,)` float, from their `labels` (windows, 2)."""
    return (labels >= 0.5).any(0).astype(np.float64)


def patient_folds(records: Sequence[LongRecord], number: int) -> list[list[str]]:
    """Return at most `number` lists of patients; those with AF, and those without, are dealt out in turn, ordered by hash."""
    with_af = {record.patient_id for record in records if record_labels(record.labels)[AF]}
    names = {record.patient_id for record in records}
    patients = sorted(names, key=lambda name: (name not in with_af, spread_order(name)))
    number = min(number, len(patients))
    return [patients[first::number] for first in range(number)]


def refuse_few_patients(records: Sequence[LongRecord], number: int) -> None:
    """Raise a `ValueError` where `number` folds leave no two patients to train on, whom the inner folds need."""
    folds = patient_folds(records, number)
    patients = sum(map(len, folds))
    if patients - max(map(len, folds)) < 2:
        raise ValueError(
            f"The long records are of {patients} patients: {number} folds by patient, and folds among those that are trained "
            f"on, need {3 if number > 2 else 4} at least. Give more records, or more --folds."
        )


def score_out_of_fold(arm: Arm, records: Sequence[LongRecord], number: int) -> list[tuple[LongRecord, Scores]]:
    """Return each record with the scores of `arm` fitted on the patients of the other folds."""
    results = []
    for patients in patient_folds(records, number):
        score = arm.fit([record for record in records if record.patient_id not in patients])
        results += [(record, score(record)) for record in records if record.patient_id in patients]
    return results


def calibrate(scored: Sequence[tuple[LongRecord, Scores]]) -> Calibration:
    """Return the temperatures that minimise cross-entropy, and the thresholds with the highest F1; of labels told, else 0.5."""
    windows = np.concatenate([record.labels for record, _ in scored]) >= 0.5
    parts = [
        (record_labels(record.labels[part]), logits)
        for record, scores in scored
        for part, logits in zip(segments(len(record.labels)), scores.segment_logits, strict=True)
    ]
    of_windows = _calibrate(windows.astype(np.float64), np.concatenate([scores.logits for _, scores in scored]))
    of_records = _calibrate(np.stack([label for label, _ in parts]), np.stack([logits for _, logits in parts]))
    return Calibration(*of_windows, *of_records)


def _calibrate(labels: np.ndarray, logits: np.ndarray) -> tuple[float, list[float]]:
    told = np.isfinite(logits).all(0)
    temperature = fit_temperature(logits[:, told], labels[:, told], problem_type=MULTI)
    chosen, _ = choose_thresholds(labels[:, told], expit(logits[:, told] / temperature))
    thresholds = np.full(len(told), 0.5)
    thresholds[told] = chosen
    return temperature, thresholds.tolist()


def cross_validate(arm: Arm, records: Sequence[LongRecord], *, folds: int, inner_folds: int) -> list[Judged]:
    """Return every record judged by `arm` without having seen its patient (see the module's text)."""
    judged = []
    for number, patients in enumerate(patient_folds(records, folds), start=1):
        train = [record for record in records if record.patient_id not in patients]
        calibration = calibrate(score_out_of_fold(arm, train, inner_folds))
        score = arm.fit(train)
        judged += [Judged(record, score(record), calibration) for record in records if record.patient_id in patients]
        logger.info("%s: fold %d done", arm.name, number)
    return judged


def figures(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the figures of an arm; NaN of what it does not tell or what cannot be measured.

    - `af_auroc`, `af_auprc`, `v_auroc`, `v_auprc`: of windows, all records together; `_within`: mean over the records with both.
    - `af_sensitivity`, ..., `af_f1`: of seconds at the nested thresholds; those of `v_` of windows.
    - `af_burden_error`, `v_burden_error`: mean over records of |share of time, or of beats, - true share|.
    - `v_count_error`: mean absolute error of the ventricular beats of a window; `v_count_error_zero`: had none been told.
    - `ece`: expected calibration error of windows. `record_af_auroc`, `record_v_auroc`: is it in the record at all?
    """
    labels = np.concatenate([one.record.labels for one in judged]) >= 0.5
    probabilities = np.concatenate([one.probabilities for one in judged])
    told = np.isfinite(probabilities).all(0)
    result: dict[str, float] = {}
    for name, column in (("af", AF), ("v", V)):
        result |= _ranking(name, column, labels, probabilities, judged) if told[column] else {}
    result |= _outcomes("af", *_seconds(judged)) if told[AF] else {}
    result |= _outcomes("v", labels[:, V], _decided(judged, V)) if told[V] else {}
    errors = [abs(_af_burden(one) - one.record.af_burden) for one in judged]
    result["af_burden_error"] = float(np.mean(errors)) if told[AF] else float("nan")
    result |= _of_counts(judged)
    result["ece"] = expected_calibration_error(labels[:, told].astype(np.float64), probabilities[:, told])
    of_records = np.stack([record_labels(one.record.labels) for one in judged])
    record_scores = np.stack([one.record_probabilities for one in judged])
    for name, column in (("af", AF), ("v", V)):
        auroc = class_auroc(of_records[:, [column]], record_scores[:, [column]])[0] if told[column] else np.nan
        result[f"record_{name}_auroc"] = float(auroc)
    return result


def _ranking(name: str, column: int, labels, probabilities, judged) -> dict[str, float]:
    within = [class_auroc(one.record.labels[:, [column]] >= 0.5, one.probabilities[:, [column]])[0] for one in judged]
    seen = [value for value in within if np.isfinite(value)]
    return {
        f"{name}_auroc": float(class_auroc(labels[:, [column]].astype(float), probabilities[:, [column]])[0]),
        f"{name}_auroc_within": float(np.mean(seen)) if seen else float("nan"),
        f"{name}_auprc": float(class_auprc(labels[:, [column]].astype(float), probabilities[:, [column]])[0]),
    }


def _outcomes(name: str, truth: np.ndarray, decided: np.ndarray) -> dict[str, float]:
    hits, given, positives = (truth & decided).sum(), decided.sum(), truth.sum()
    negatives = len(truth) - positives

    def share(part: float, whole: float) -> float:
        return float(part / whole) if whole else float("nan")

    return {
        f"{name}_sensitivity": share(hits, positives),
        f"{name}_specificity": share(negatives - (given - hits), negatives),
        f"{name}_ppv": share(hits, given),
        f"{name}_f1": share(2 * hits, given + positives),
    }


def _decided(judged: Sequence[Judged], column: int) -> np.ndarray:
    return np.concatenate([one.probabilities[:, column] >= one.calibration.thresholds[column] for one in judged])


def _spans(one: Judged) -> tuple[np.ndarray, float, float]:
    record = one.record
    return record.start_seconds, record.window_seconds, record.record.duration_seconds


def _af_by_second(one: Judged) -> np.ndarray:
    return by_second(one.probabilities[:, AF], *_spans(one))[: len(one.record.af_seconds)]


def _seconds(judged: Sequence[Judged]) -> tuple[np.ndarray, np.ndarray]:
    """Return truth and decision of all seconds that a window holds."""
    pairs = []
    for one in judged:
        scores = _af_by_second(one)
        known = np.isfinite(scores)
        pairs.append((one.record.af_seconds[known], scores[known] >= one.calibration.thresholds[AF]))
    return np.concatenate([truth for truth, _ in pairs]), np.concatenate([decided for _, decided in pairs])


def _af_burden(one: Judged) -> float:
    scores = _af_by_second(one)
    return float((scores[np.isfinite(scores)] >= one.calibration.thresholds[AF]).mean())


def ventricular_burden(one: Judged) -> float:
    """Return the share of ventricular beats among all, NaN where the arm counts none."""
    beats, ventricular = (one.scores.counts * own_share(*_spans(one))[:, None]).sum(0)
    return share_of_beats(ventricular, beats) if np.isfinite(beats) else float("nan")


def _of_counts(judged: Sequence[Judged]) -> dict[str, float]:
    true = np.concatenate([one.record.counts[:, 1] for one in judged])
    told = np.concatenate([one.scores.counts[:, 1] for one in judged])
    errors = [abs(ventricular_burden(one) - one.record.ventricular_burden) for one in judged]
    return {
        "v_burden_error": float(np.mean(errors)),
        "v_count_error": float(np.abs(told - true).mean()),
        "v_count_error_zero": float(true.mean()),
    }


def arm_report(judged: Sequence[Judged], *, num_resamples: int) -> dict:
    """Return the figures of an arm with 95 % intervals by bootstrap of patients, and a row for each record."""
    patients = [one.record.patient_id for one in judged]
    report: dict = figures(judged)
    if num_resamples:
        report["intervals_95"] = intervals_of(
            patients, lambda indices: figures([judged[index] for index in indices]), num_resamples=num_resamples
        )
    report["records"] = {
        one.record.record_id: {
            "patient": one.record.patient_id,
            "minutes": round(one.record.record.duration_seconds / 60, 1),
            "af_burden": one.record.af_burden,
            "af_burden_told": _af_burden(one),
            "v_burden": one.record.ventricular_burden,
            "v_burden_told": ventricular_burden(one),
        }
        for one in sorted(judged, key=lambda one: one.record.record_id)
    }
    return report
