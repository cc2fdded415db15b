"""Figures of a trained classifier, or of a linear probe on a backbone, on a fold of a corpus:

    python -m training.evaluate --checkpoint DIR --data DIR [--folds 9] [--bootstrap 1000] [--by sex age leads] [--report PAGE]
    python -m training.evaluate --checkpoint DIR --data DIR --leads I II V2
    python -m training.evaluate --checkpoint DIR --data DIR --same_records_as DIR2
    python -m training.evaluate --checkpoint DIR --data DIR --probe trained|random [--probe_records 6000]

Prints the figures and writes them to `results-fold9.json` (or `--output`); with `--report` a page of tables and pictures,
too. `--data` is what fine-tuning takes: your own labelled records as well (`--folds all`). `--by` gives the figures of each
sex, age band and subset of leads; `--leads` all figures on these leads only. `--same_records_as` measures only the records
that the second folder holds too, read from both: how far do figures move with the sampling rate?
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, set_seed

from anyecg_hf.leads import LEAD_IDS, resolve_lead_names
from anyecg_hf.modeling_anyecg import AnyECGModel

from .checkpointing import load_extractor, write_json
from .classifier_report import Predictions, compare_groups, count_unlabelled, group_records, report_of
from .collate import ECGCollator
from .commands import run_command
from .data import DataArguments, ECGDataset, list_sources, load_folds, with_task
from .inference import embed_records, predict_logits
from .labels import FIXED_TASKS, MULTI, SINGLE, Task, build_choice_task, build_task
from .lead_subsets import LEAD_SUBSETS
from .metrics import task_metrics
from .probe import fit_probe
from .splits import SPLIT_OF_FOLD, TRAIN_FOLDS, VALIDATION_FOLDS, spread_order

logger = logging.getLogger(__name__)

GROUPINGS = ("sex", "age", "leads")


def task_of(config) -> Task:
    """Return the task that a classifier's configuration describes, its labels in the configuration's order.

    Labels of no task of this project are codes: each record has those that the data name.

    Raises:
        ValueError: a regression of something else than a task of this project.
    """
    names = tuple(config.id2label[index] for index in range(config.num_labels))
    for name in FIXED_TASKS:
        task = build_task(name)
        if sorted(task.names) == sorted(names) and task.problem_type == config.problem_type:
            return task if task.names == names else task.reordered(names)
    if config.problem_type == MULTI:
        return build_task("codes", [names], min_positives=1).reordered(names)
    if config.problem_type == SINGLE:
        return build_choice_task(names)
    raise ValueError(f"No task of this project has the labels {names[:5]}... ({config.problem_type}).")


def predict(model: PreTrainedModel, records: ECGDataset, collator: ECGCollator, task: Task) -> Predictions:
    """Return the outputs for `records`, which carry the task's targets."""
    logits = predict_logits(model, records, collator)
    return Predictions(task, logits, records.targets, records.column("patient_id"), model.config.thresholds)


def restrict_leads(records: ECGDataset, collator: ECGCollator, leads: Sequence[str]) -> tuple[list[int], ECGCollator]:
    """Return the places of the records in which each of these leads is usable, and a collator that takes no other leads."""
    collator = ECGCollator(collator.extractor, window_seconds=collator.window_seconds, leads=leads)
    wanted = {LEAD_IDS[name] for name in leads}
    having = [index for index in range(len(records)) if wanted <= collator.usable_leads(records[index])]
    if len(having) < len(records):
        logger.warning("%d of %d records lack one of %s", len(records) - len(having), len(records), ", ".join(leads))
    return having, collator


def report_groups(
    model: PreTrainedModel,
    records: ECGDataset,
    collator: ECGCollator,
    predictions: Predictions,
    *,
    by: Sequence[str],
    num_resamples: int = 0,
) -> dict[str, dict]:
    """Return the figures by "sex", "age" and "leads" (`LEAD_SUBSETS`, predicted anew), as far as they are asked for.

    Args:
        predictions: of `records`, with all their leads.
    """
    compared = {}
    for name in by:
        if name == "leads":
            groups = _by_leads(model, records, collator, predictions)
        else:
            places = group_records(records.column("age"), records.column("sex"), name)
            groups = {group: predictions.take(indices) for group, indices in places.items()}
        if groups:
            compared[name] = compare_groups(groups, num_resamples=num_resamples)
    return compared


def _by_leads(model, records: ECGDataset, collator: ECGCollator, predictions: Predictions) -> dict[str, Predictions]:
    """Return predictions on each subset of leads; where records have no other leads they are those made already."""
    groups = {}
    for subset, leads in LEAD_SUBSETS.items():
        having, reduced = restrict_leads(records, collator, leads)
        chosen, wanted = records.take(having), {LEAD_IDS[name] for name in leads}
        if all(wanted >= set(store.lead_ids(row).tolist()) for store, row in chosen.rows):
            groups[subset] = predictions.take(having)
        else:
            groups[subset] = predict(model, chosen, reduced, predictions.task)
    return {subset: group for subset, group in groups.items() if len(group)}


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


def _run_probe(args: argparse.Namespace, sources, collator: ECGCollator) -> tuple[dict, None]:
    data_args = DataArguments(data=args.data)
    task = build_task(args.task)
    train = with_task(load_folds(sources, collator.extractor, TRAIN_FOLDS, args=data_args), task)
    names = train.column("record_id")
    order = sorted(range(len(train)), key=lambda index: spread_order(names[index]))
    held_out = with_task(load_folds(sources, collator.extractor, args.folds, args=data_args), task)
    backbone = load_backbone(args.checkpoint, weights=args.probe, seed=args.seed)
    figures = linear_probe(train.take(order[: args.probe_records]), held_out, backbone, collator, task)
    return {"probe": args.probe, "task": args.task, **figures}, None


def _run_classifier(args: argparse.Namespace, sources, collator: ECGCollator) -> tuple[dict, Predictions | None]:
    model = AutoModelForSequenceClassification.from_pretrained(args.checkpoint).eval()
    task = task_of(model.config)
    records = load_folds(sources, collator.extractor, args.folds, args=DataArguments(data=args.data))
    if args.same_records_as:
        return _compare_sources(args, model, records, collator, task), None
    codes = records.column("codes")
    unlabelled = count_unlabelled(task, codes)
    if unlabelled:
        logger.warning("no label of the checkpoint stands for %s", _shortened(unlabelled))
    records = with_task(records, task)
    if args.leads:
        having, collator = restrict_leads(records, collator, args.leads)
        if not having:
            raise ValueError(f"--leads {' '.join(args.leads)}: of {len(records)} records none has all of them.")
        records = records.take(having)
    predictions = predict(model, records, collator, task)
    report = {
        **_describe(args),
        "num_records_without_codes": sum(not each for each in codes),
        "codes_without_label": unlabelled,
        **report_of(predictions, num_resamples=args.bootstrap),
    }
    if args.by:
        report["by"] = report_groups(model, records, collator, predictions, by=args.by, num_resamples=args.bootstrap)
    return report, predictions


def _describe(args: argparse.Namespace) -> dict:
    """Return what was evaluated and how; folders without their paths, which may be named after a patient or a machine."""
    options = [f"--folds {' '.join(map(str, args.folds))}"] if args.folds != list(VALIDATION_FOLDS) else []
    options += [f"--leads {' '.join(args.leads)}"] if args.leads else []
    options += [f"--bootstrap {args.bootstrap}"] if args.bootstrap else []
    options += [f"--by {' '.join(args.by)}"] if args.by else []
    checkpoint = Path(args.checkpoint).name if Path(args.checkpoint).is_absolute() else args.checkpoint
    command = ["python -m training.evaluate", f"--checkpoint {checkpoint}", "--data DIR", *options]
    return {
        "command": " ".join(command),
        "checkpoint": checkpoint,
        "folds": args.folds,
        "leads": args.leads,
        "num_resamples": args.bootstrap,
    }


def _shortened(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{code} ({count} records)" for code, count in list(counts.items())[:5])
    return shown if len(counts) <= 5 else f"{shown} and {len(counts) - 5} more codes: see codes_without_label"


def _compare_sources(args: argparse.Namespace, model, records: ECGDataset, collator: ECGCollator, task: Task) -> dict:
    other_args = DataArguments(data=[args.same_records_as])
    others = load_folds(list_sources(other_args), collator.extractor, args.folds, args=other_args)
    pair = common_records(records, others)
    reports = [report_of(predict(model, with_task(part, task), collator, task)) for part in pair]
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
    parser.add_argument("--folds", nargs="+", default=["9"], help="1-8 train, 9 validation, 10 test; or: all")
    parser.add_argument("--leads", nargs="+", help="the model sees these leads alone")
    parser.add_argument("--by", nargs="+", choices=GROUPINGS, default=[], help="figures of each group, too")
    parser.add_argument("--report", help="HTML page to write, complete in one file")
    parser.add_argument("--same_records_as", help="folder whose records are compared with those of --data")
    parser.add_argument("--bootstrap", type=int, default=0, help="resamples of patients for 95 %% intervals; 0 = none")
    parser.add_argument("--probe", choices=("trained", "random"), help="linear probe on the frozen backbone instead")
    parser.add_argument("--probe_records", type=int, default=6000, help="labelled records of folds 1-8 for the probe")
    parser.add_argument("--task", default="statements", help="task of the probe")
    parser.add_argument("--seed", type=int, default=0, help="of the random backbone")
    parser.add_argument("--output", help="JSON file; default: results-fold9.json in the checkpoint, or probe-*.json")
    args = parser.parse_args(argv)
    if (args.probe or args.same_records_as) and (args.leads or args.by or args.report):
        parser.error("--leads, --by and --report go with neither --probe nor --same_records_as")
    if args.leads and "leads" in args.by:
        parser.error("--by leads compares subsets of leads: leave --leads out")
    args.folds = read_folds(args.folds)
    args.leads = resolve_lead_names(args.leads) if args.leads else None

    if args.report:
        from .evaluation_page import write_page  # not above: matplotlib is loaded with it

    sources = list_sources(DataArguments(data=args.data))
    collator = ECGCollator(load_extractor(args.checkpoint))
    run = _run_probe if args.probe else _run_classifier
    report, predictions = run(args, sources, collator)
    name = "-".join(["results-fold" + "-".join(map(str, args.folds)), *(args.leads or [])])
    name = f"probe-{args.probe}.json" if args.probe else f"{name}.json"
    write_json(args.output or Path(args.checkpoint) / name, report)
    if args.report:
        write_page(args.report, report, predictions)
    print(json.dumps(_without_labels(report), indent=2))


def read_folds(given: Sequence[str]) -> list[int]:
    """Return the folds that are asked for, all ten for "all".

    Raises:
        ValueError: there is no such fold.
    """
    if list(given) == ["all"]:
        return list(SPLIT_OF_FOLD)
    if not set(given) <= {str(fold) for fold in SPLIT_OF_FOLD}:
        raise ValueError(f"--folds {' '.join(given)}: accepted are 1 to 8 (train), 9 (validation), 10 (test), or all.")
    return [int(fold) for fold in given]


def _without_labels(report: dict) -> dict:
    """Return the report without the table of all labels, which the file has."""
    return {
        name: _without_labels(value) if isinstance(value, dict) else value
        for name, value in report.items()
        if name != "labels"
    }


if __name__ == "__main__":
    run_command(main)
