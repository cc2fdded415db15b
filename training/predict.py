"""What a classifier says of a whole archive, as Parquet with a row a record:

    python -m training.predict --checkpoint DIR_OR_REPO --data FOLDER [FOLDER2 ...] --out OUT [--num_proc 8]
    torchrun --nproc-per-node 8 -m training.predict ...      a process each GPU
    python -m training.predict ... --engine ray              the cluster of RAY_ADDRESS, else one on this machine

FOLDER holds files of any format that is read (docs/formats.md), at any depth, or is PTB-XL, a folder of the Challenge, or a
data set of training.build_dataset. Scores are those of `pipeline("ecg-classification")`. A record that cannot be read costs
its row, which says why. The same command goes on after a break; shards that are whole are kept. See docs/predicting.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import PurePosixPath

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from .archive import list_archive
from .commands import run_command
from .corpora.sources import absolute
from .engines import ENGINES, map_shards
from .predictions import PredictionPlan, find_checkpoint, load_classifier
from .run_inputs import describe_software
from .shards import UNFINISHED, Output, finished_report

logger = logging.getLogger(__name__)

FORMAT = 1
RUN, SUMMARY = "run.json", "summary.json"
SHARD_RECORDS = 1000
LONGEST_WAIT = timedelta(days=30)  # of a process for the slowest one
NUM_SHOWN = 10  # reasons, in the log


def plan_predictions(args: argparse.Namespace) -> list[PredictionPlan]:
    """Return the shards that the options ask for.

    Raises:
        ValueError: the checkpoint is none of a classifier, or there are no records.
        FileNotFoundError: there is no such archive.
    """
    checkpoint = find_checkpoint(args.checkpoint, args.revision)
    load_classifier(checkpoint)  # what is wrong with it is said before the archive is listed
    archives = [list_archive(folder) for folder in args.data]
    records = [(source, record) for source, (each, _) in enumerate(archives) for record in each]
    run = {
        "format": FORMAT,
        "checkpoint": checkpoint.identity,
        "data": [digest for _, digest in archives],
        "num_records": len(records),
        "batch_size": args.batch_size,
        "shard_records": args.shard_records,
        "software": describe_software(),
    }
    starts = range(0, len(records), args.shard_records)
    options = {
        "out": absolute(args.out),
        "run": run,
        "checkpoint": checkpoint,
        "num_workers": args.dataloader_num_workers,
    }
    return [
        PredictionPlan(
            f"predictions-{number:05d}-of-{len(starts):05d}",
            tuple(records[start : start + args.shard_records]),
            **options,
        )
        for number, start in enumerate(starts)
    ]


def predict_archive(plans: Sequence[PredictionPlan], *, engine: str = "local", **options) -> dict:
    """Write what is missing of the shards, in all processes that were launched together, and return the summary.

    Args:
        engine, options: as of `engines.map_shards`.

    Raises:
        ValueError: the output folder is of another run, or holds something else.
        OSError: another run writes to it.
    """
    state, output = PartialState(), Output(plans[0].out)
    with output.alone() if state.is_main_process else contextlib.nullcontext():
        if state.is_main_process:
            _begin(output, plans[0].run)
        state.wait_for_everyone()
        own = plans[state.process_index :: state.num_processes]
        missing = [plan for plan in own if finished_report(plan, output) is None]
        started = time.monotonic()
        num_done = _write(missing, show=state.is_main_process, engine=engine, **options)
        num_done, seconds = sum(gather_object([num_done])), time.monotonic() - started
        return _finish(output, plans, num_done, seconds) if state.is_main_process else {}


def _write(plans: Sequence[PredictionPlan], *, show: bool, **options) -> int:
    """Write shards and return how many records they hold."""
    num_done, num_records = 0, sum(len(plan.records) for plan in plans)
    with tqdm(total=num_records, desc="predicting", unit="record", mininterval=1.0, disable=not show) as bar:
        for _, report in map_shards(plans, **options):
            num_done += report["records_out"]
            bar.update(report["records_out"])
    return num_done


def _begin(output: Output, run: dict) -> None:
    """Take the folder, which is empty or was begun by the same run; what a killed one has left half-written goes."""
    there = output.names("")
    if RUN not in there and any(name.startswith(("predictions/", "reports/")) for name in there):
        raise ValueError(f"--out {output.url} holds other files in predictions/ or reports/. Give another --out.")
    before = json.loads(output.read(RUN)) if RUN in there else run
    changed = [name for name in run if name != "software" and before.get(name) != run[name]]
    if changed:
        raise ValueError(
            f"--out {output.url} was begun with other arguments: {'; '.join(_told(name, before, run) for name in changed)}. "
            "Give those, or another --out."
        )
    if before["software"] != run["software"]:
        logger.warning("%s was begun with other software; the metadata of each shard say which.", output.url)
    for name in there:
        if UNFINISHED in name or name == SUMMARY:
            output.remove(name)
    if RUN not in there:
        output.write(RUN, json.dumps(run, indent=1).encode())


def _told(name: str, before: dict, run: dict) -> str:
    if name == "data":
        return "the files of --data were others, or have changed since (names, sizes, times)"
    return f"{name} {json.dumps(before.get(name))}, now {json.dumps(run[name])}"


def _finish(output: Output, plans: Sequence[PredictionPlan], num_done: int, seconds: float) -> dict:
    """List all shards with their sums and the reasons of errors in OUT/summary.json, and say what came out."""
    reports = {plan.parquet: json.loads(output.read(plan.report)) for plan in plans}
    others = [plan.name for plan in plans if reports[plan.parquet]["digest"] != plan.digest]
    if others:
        raise ValueError(f"{others[0]} is of other files of --data: do all processes see the same ones? Start again.")
    reasons: dict[str, list[str]] = {}
    for report in reports.values():
        for error in report["errors"]:
            place = error["path"] or error["record_id"]
            reasons.setdefault(_kind(error["reason"], place), []).append(place)
    by_count = sorted(reasons.items(), key=lambda pair: -len(pair[1]))
    summary = {
        "records": sum(report["records_out"] for report in reports.values()),
        "errors": sum(len(places) for places in reasons.values()),
        "reasons": [{"reason": kind, "records": len(places), "first": places[0]} for kind, places in by_count],
        "shards": {
            name: {key: report[key] for key in ("records_out", "num_bytes", "sha256")}
            for name, report in reports.items()
        },
    }
    output.write(SUMMARY, json.dumps(summary, indent=1).encode())
    _log(summary, num_done, seconds)
    return summary


def _kind(reason: str, place: str) -> str:
    """Return a reason without what it says of the one file: its name in the beginning, and numbers."""
    stem = re.escape(PurePosixPath(place).stem)
    return re.sub(r"(?<![\w.-])\d+(\.\d+)?\b", "N", re.sub(rf'^(Record "[^"]*"|[^:]*{stem}[^:]*): ', "", reason))


def _log(summary: dict, num_done: int, seconds: float) -> None:
    rate = f"{num_done} predicted in {seconds:.0f} s: {num_done / max(seconds, 1e-9):.1f} records/s"
    kept = summary["records"] - num_done
    logger.info("%d records, %d of them with an error; %s, %d kept", summary["records"], summary["errors"], rate, kept)
    for each in summary["reasons"][:NUM_SHOWN]:
        logger.info("  %d x %s (the first: %s)", each["records"], each["reason"][:200], each["first"])
    if len(summary["reasons"]) > NUM_SHOWN:
        logger.info("  ... all in %s", SUMMARY)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    # `cpu`: what makes several processes without a GPU work together
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
    if state.num_processes > 1 and (args.engine, args.num_proc) != ("local", 1):
        raise ValueError(
            f"{state.num_processes} processes were launched: --engine and --num_proc would start more. Leave them out, or "
            "start with python -m training.predict."
        )
    if args.num_proc > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.num_proc)))
    plans = plan_predictions(args)
    logger.info("%d records, %d shards; %d process(es) on %s", plans[0].run["num_records"], len(plans),
                max(state.num_processes, args.num_proc), state.device.type)  # fmt: skip
    predict_archive(plans, engine=args.engine, num_proc=args.num_proc, num_gpus=args.num_gpus)
    state.destroy_process_group()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a classifier, or ORG/NAME on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of ORG/NAME")
    parser.add_argument("--data", nargs="+", required=True, help="archives, one after another")
    parser.add_argument("--out", required=True, help="folder of the predictions, or an address that fsspec knows")
    parser.add_argument(
        "--engine", choices=ENGINES, default="local", help="ray: the cluster of RAY_ADDRESS, else a local one"
    )
    parser.add_argument("--num_proc", type=int, default=1, help="shards predicted at a time")
    parser.add_argument(
        "--num_gpus", type=float, default=0, help="of a shard, with --engine ray; a part of one is fine"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="windows that go through the model together")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="processes that read, of each shard")
    parser.add_argument("--shard_records", type=int, default=SHARD_RECORDS, help="records in a Parquet file")
    args = parser.parse_args(argv)
    for name, least in {
        "num_proc": 1,
        "batch_size": 1,
        "shard_records": 1,
        "dataloader_num_workers": 0,
        "num_gpus": 0,
    }.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: accepted are {least} and above.")
    inside = [folder for folder in args.data if f"{absolute(args.out)}/".startswith(f"{absolute(folder)}/")]
    if inside:
        parser.error(f"--out {args.out} lies in --data {inside[0]}: its files would be taken for records.")
    return args


if __name__ == "__main__":
    run_command(main)
