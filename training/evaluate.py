"""Figures of a trained classifier, or of a linear probe on a backbone, on a fold of a corpus:

    python -m training.evaluate --checkpoint DIR --data DIR [--folds 9] [--same_records_as DIR2] [--bootstrap 1000]
    python -m training.evaluate --checkpoint DIR --data DIR --probe trained|random [--probe_records 6000]

Prints the figures and writes them to `results-fold9.json` (or `--output`). `--same_records_as` measures only the
records that the second folder holds too, read from both: how far do figures move with the sampling rate?
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, set_seed

from anyecg_hf.modeling_anyecg import AnyECGModel

from .checkpointing import load_extractor, write_json
from .collate import ECGCollator
from .commands import run_command
from .data import DataArguments, ECGDataset, list_sources, load_folds, with_task
from .ecg_metrics.classification_metrics import class_metrics
from .ecg_metrics.patient_bootstrap import intervals_of
from .inference import embed_records, predict_logits
from .labels import FIXED_TASKS, MULTI, REGRESSION, Task, build_task
from .metrics import (
    can_score_superclasses,
    probabilities_of,
    superclass_metrics,
    task_metrics,
)
from .probe import fit_probe
from .splits import TRAIN_FOLDS, spread_order

logger = logging.getLogger(__name__)


def task_of(config) -> Task:
    """Return the task that a classifier's configuration describes, its labels in the configuration's order.

    Raises:
        ValueError: the labels are those of no task of this project.
    """
    names = tuple(config.id2label[index] for index in range(config.num_labels))
    for name in FIXED_TASKS:
        task = build_task(name)
        if task.names == names and task.problem_type == config.problem_type:
            return task
    if config.problem_type == MULTI:
        return build_task("codes", [names], min_positives=1).reordered(names)
    raise ValueError(f"No task of this project has the labels {names[:5]}... ({config.problem_type}).")


def classifier_report(
    model: PreTrainedModel,
    records: ECGDataset,
    collator: ECGCollator,
    task: Task,
    *,
    num_resamples: int = 0,
) -> dict:
    """Return all figures of a classifier on `records`, which carry the task's targets.

    Multi-label figures that depend on thresholds take those of the model's configuration, 0.5 where it has none.
    """
    logits, targets, thresholds = predict_logits(model, records, collator), records.targets, model.config.thresholds
    report = {"num_records": len(records), **task_metrics(task, logits, targets, thresholds=thresholds)}
    if task.problem_type == REGRESSION:
        return report
    probabilities = probabilities_of(task, logits)
    if task.problem_type == MULTI and can_score_superclasses(task.names):
        by_max = superclass_metrics(targets, probabilities, task.names, rule="max")
        report["superclass_auroc_by_max"] = by_max["superclass_auroc"]
    report["labels"] = class_metrics(targets, probabilities, task.names, thresholds=thresholds)
    if num_resamples:
        report["intervals_95"] = intervals_of(
            records.column("patient_id"),
            lambda indices: task_metrics(task, logits[indices], targets[indices], thresholds=thresholds),
            num_resamples=num_resamples,
        )
    return report


def linear_probe(
    train: ECGDataset, held_out: ECGDataset, backbone: AnyECGModel, collator: ECGCollator, task: Task
) -> dict:
    """Return figures of one regression a label, logistic or of a value linear, on the frozen mean-pooled states of `backbone`."""
    probe = fit_probe(embed_records(backbone, train, collator), train.targets, task)
    logits = probe.logits(embed_records(backbone, held_out, collator))
    return {
        "num_train": len(train),
        "num_records": len(held_out),
        "C": probe.strength,
        **task_metrics(task, logits, held_out.targets),
    }


def load_backbone(checkpoint: str, *, weights: str, seed: int) -> AnyECGModel:
    """Return the backbone of a checkpoint, "trained" or "random" (same configuration, new weights)."""
    if weights == "trained":
        return AnyECGModel.from_pretrained(checkpoint).eval()
    set_seed(seed)
    return AnyECGModel(AutoConfig.from_pretrained(checkpoint)).eval()


def _run_probe(args: argparse.Namespace, sources, collator: ECGCollator) -> dict:
    data_args = DataArguments(data=args.data)
    task = build_task(args.task)
    train = with_task(load_folds(sources, collator.extractor, TRAIN_FOLDS, args=data_args), task)
    names = train.column("record_id")
    order = sorted(range(len(train)), key=lambda index: spread_order(names[index]))
    held_out = with_task(load_folds(sources, collator.extractor, args.folds, args=data_args), task)
    backbone = load_backbone(args.checkpoint, weights=args.probe, seed=args.seed)
    return {
        "probe": args.probe,
        "task": args.task,
        **linear_probe(train.take(order[: args.probe_records]), held_out, backbone, collator, task),
    }


def _run_classifier(args: argparse.Namespace, sources, collator: ECGCollator) -> dict:
    model = AutoModelForSequenceClassification.from_pretrained(args.checkpoint).eval()
    task = task_of(model.config)
    records = load_folds(sources, collator.extractor, args.folds, args=DataArguments(data=args.data))
    if not args.same_records_as:
        return classifier_report(model, with_task(records, task), collator, task, num_resamples=args.bootstrap)
    other_args = DataArguments(data=[args.same_records_as])
    others = load_folds(list_sources(other_args), collator.extractor, args.folds, args=other_args)
    pair = common_records(records, others)
    reports = [classifier_report(model, with_task(part, task), collator, task) for part in pair]
    compared = {
        name: abs(reports[0][name] - reports[1][name])
        for name in ("macro_auroc", "superclass_auroc")
        if name in reports[0]
    }
    return {"data": reports[0], "same_records_as": reports[1], "difference": compared}


def common_records(first: ECGDataset, second: ECGDataset) -> tuple[ECGDataset, ECGDataset]:
    """Return the records that both hold, in the same order.

    Raises:
        ValueError: they have no record in common.
    """
    places = [{name: index for index, name in enumerate(dataset.column("record_id"))} for dataset in (first, second)]
    common = sorted(set(places[0]) & set(places[1]))
    if not common:
        raise ValueError("--data and --same_records_as hold no record of the same id in these folds.")
    return tuple(
        dataset.take([place[name] for name in common]) for dataset, place in zip((first, second), places, strict=True)
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a classifier, or of any backbone with --probe")
    parser.add_argument("--data", nargs="+", required=True, help="as for the training commands")
    parser.add_argument("--folds", nargs="+", type=int, default=[9], help="1-8 train, 9 validation, 10 test")
    parser.add_argument("--same_records_as", help="folder whose records are compared with those of --data")
    parser.add_argument("--bootstrap", type=int, default=0, help="resamples of patients for 95 %% intervals; 0 = none")
    parser.add_argument("--probe", choices=("trained", "random"), help="linear probe on the frozen backbone instead")
    parser.add_argument("--probe_records", type=int, default=6000, help="labelled records of folds 1-8 for the probe")
    parser.add_argument("--task", default="statements", help="task of the probe")
    parser.add_argument("--seed", type=int, default=0, help="of the random backbone")
    parser.add_argument("--output", help="JSON file; default: results-fold9.json in the checkpoint, or probe-*.json")
    args = parser.parse_args(argv)

    sources = list_sources(DataArguments(data=args.data))
    collator = ECGCollator(load_extractor(args.checkpoint))
    report = _run_probe(args, sources, collator) if args.probe else _run_classifier(args, sources, collator)
    name = f"probe-{args.probe}.json" if args.probe else f"results-fold{'-'.join(map(str, args.folds))}.json"
    write_json(args.output or Path(args.checkpoint) / name, report)
    print(json.dumps(_without_labels(report), indent=2))


def _without_labels(report: dict) -> dict:
    """Return the report without the table of all labels, which the file has."""
    return {
        name: _without_labels(value) if isinstance(value, dict) else value
        for name, value in report.items()
        if name != "labels"
    }


if __name__ == "__main__":
    run_command(main)
