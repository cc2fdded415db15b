"""Is one way of training better than another? Classifiers of two or more arms, each with one or more seeds, on the same records:

    python -m training.compare --data DIR --arm scratch DIR1 DIR2 DIR3 --arm pretrained DIR4 DIR5 DIR6 [--output FILE]

The figure of an arm is the mean over its seeds of the macro AUROC. Differences from the first arm come with the 95 % interval
of a paired bootstrap: patients are drawn with all their records, the same ones for all classifiers.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence

import numpy as np
from scipy.special import expit
from transformers import AutoModelForSequenceClassification

from .checkpointing import load_extractor, write_json
from .collate import ECGCollator
from .commands import run_command
from .data import DataArguments, ECGDataset, list_sources, load_folds, with_task
from .ecg_metrics.classification_metrics import class_auroc, mean_of_scored
from .ecg_metrics.patient_bootstrap import patient_bootstrap
from .evaluate import task_of
from .inference import predict_logits
from .labels import MULTI, Task
from .metrics import can_score_superclasses, superclass_metrics

logger = logging.getLogger(__name__)


def predictions_of(
    checkpoint: str, sources, folds: Sequence[int], data: Sequence[str]
) -> tuple[np.ndarray, ECGDataset, Task]:
    """Return the logits of a classifier, the records that they belong to, with their targets, and its task.

    Raises:
        ValueError: the classifier is not one of several labels at once.
    """
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    task = task_of(model.config)
    if task.problem_type != MULTI:
        raise ValueError(f"{checkpoint}: {task.problem_type}; compared are multi-label classifiers.")
    collator = ECGCollator(load_extractor(checkpoint))
    records = with_task(load_folds(sources, collator.extractor, folds, args=DataArguments(data=list(data))), task)
    return predict_logits(model, records, collator), records, task


def macro_auroc(targets: np.ndarray, logits: np.ndarray, names: Sequence[str]) -> float:
    return mean_of_scored(class_auroc(targets, logits))


def superclass_auroc(targets: np.ndarray, logits: np.ndarray, names: Sequence[str]) -> float:
    return superclass_metrics(targets, expit(logits.astype(np.float64)), names)["superclass_auroc"]


def figures_for(names: Sequence[str]) -> dict:
    """Return the figures that labels of these names allow, by name."""
    if not can_score_superclasses(names):
        return {"macro_auroc": macro_auroc}
    return {"macro_auroc": macro_auroc, "superclass_auroc": superclass_auroc}


def compare(
    arms: dict[str, list[np.ndarray]],
    targets: np.ndarray,
    patients: Sequence[str],
    names: Sequence[str],
    *,
    num_resamples: int = 1000,
) -> dict:
    """Return the figures of each arm, by seed and in the mean, and their differences from the first arm with intervals.

    Args:
        arms: name to the logits `(records, labels)` of each seed.
        targets (`np.ndarray` of shape `(records, labels)`): 0 and 1.
        patients: of each record.
        names: of the labels.
    """
    (first, *others), figures = arms, figures_for(names)
    report: dict = {"num_records": len(targets), "num_patients": len(set(patients)), "arms": {}, "differences": {}}
    for name, seeds in arms.items():
        by_seed = {figure: [compute(targets, logits, names) for logits in seeds] for figure, compute in figures.items()}
        report["arms"][name] = {
            figure: {"mean": float(np.mean(values)), "seeds": values} for figure, values in by_seed.items()
        }
    for name in others:
        report["differences"][f"{name} - {first}"] = {
            figure: _difference(arms[name], arms[first], targets, patients, names, compute, num_resamples)
            for figure, compute in figures.items()
        }
    return report


def _difference(ours, theirs, targets, patients, names, compute, num_resamples) -> dict:
    def difference(indices: np.ndarray) -> float:
        means = [
            np.mean([compute(targets[indices], logits[indices], names) for logits in arm]) for arm in (ours, theirs)
        ]
        return float(means[0] - means[1])

    return {
        "difference": difference(np.arange(len(targets))),
        "interval_95": patient_bootstrap(patients, difference, num_resamples=num_resamples),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="as for the training commands")
    parser.add_argument("--arm", nargs="+", action="append", required=True, metavar=("NAME", "CHECKPOINT"))
    parser.add_argument("--folds", nargs="+", type=int, default=[9], help="1-8 train, 9 validation, 10 test")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of patients")
    parser.add_argument("--output", help="JSON file; default: printed only")
    args = parser.parse_args(argv)
    if len(args.arm) < 2 or any(len(arm) < 2 for arm in args.arm):
        parser.error("give two arms or more, each with a name and at least one checkpoint: --arm NAME DIR [DIR ...]")

    sources = list_sources(DataArguments(data=args.data))
    predictions = {name: [predictions_of(folder, sources, args.folds, args.data) for folder in folders]
                   for name, *folders in args.arm}  # fmt: skip
    _, records, task = next(iter(predictions.values()))[0]
    for name, seeds in predictions.items():
        for _, others, its_task in seeds:
            if its_task.names != task.names or others.column("record_id") != records.column("record_id"):
                raise ValueError(
                    f"Arm {name!r} has other labels or records than the first: compare classifiers of one task."
                )
    report = compare(
        {name: [logits for logits, *_ in seeds] for name, seeds in predictions.items()},
        records.targets, records.column("patient_id"), task.names, num_resamples=args.bootstrap,
    )  # fmt: skip
    if args.output:
        write_json(args.output, {"command_arms": args.arm, **report})
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_command(main)
