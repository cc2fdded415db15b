"""Records of half an hour and of a day: what a run of `training.long_records` found, and time and memory of its model.

    python -m benchmarks.long_records --run runs/small_long [--hours 0.5 24] [--one_pass_hours 0.5 24] [--out benchmarks/results]

Writes `long_records.json` and `long_records.md`: the figures of the run's `results.json`, all arms, and for simulated records of
two leads (ten minutes repeated) the time from samples to the result and the peak memory of a process of its own, on one thread.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioFrameClassification, pipeline

import anyecg_hf  # noqa: F401  registers models and pipelines
from anyecg_hf.records import Record
from anyecg_hf.simulate import simulate_record
from training.checkpointing import write_json
from training.long_arms import stretched

SAMPLING_RATE, TILE_SECONDS = 250.0, 600.0
LEAD_WINDOW = 10
WAYS = ("windows", "one_pass")
COLUMNS = {
    "af_auroc": "AF, windows: AUROC",
    "af_auroc_within": "within a record",
    "af_auprc": "AUPRC",
    "af_sensitivity": "AF, seconds: sensitivity",
    "af_specificity": "specificity",
    "af_ppv": "PPV",
    "af_f1": "F1",
    "af_burden_error": "AF burden, mean error",
    "record_af_auroc": "AF in the record: AUROC",
}
V_COLUMNS = {
    "v_auroc": "V, windows: AUROC",
    "v_auroc_within": "within a record",
    "v_auprc": "AUPRC",
    "v_sensitivity": "sensitivity",
    "v_specificity": "specificity",
    "v_f1": "F1",
    "v_count_error": "V beats a window, mean error",
    "v_burden_error": "V burden, mean error",
    "record_v_auroc": "V in the record: AUROC",
    "ece": "calibration error, AF and V",
}

COMMANDS = (
    "    python -m training.long_records training/recipes/small_long.yaml --long_data MITDB CPSC2021 --data PTBXL",
    "    python -m benchmarks.long_records --run runs/small_long",
)
WHAT = """\
{long_records} records ({hours:.1f} h) of {patients} patients: MIT-BIH (30 min) and CPSC-2021 (1 to 9 min); {windows} windows of
10 s, {windows_af} with AF (fibrillation or flutter) for half of them, {windows_v} with a ventricular beat. Cross-validation by
patient; temperature and thresholds of each fold are of its training patients alone. All but the rule, the classifier of
statements and the regression on long records alone also saw {short_records} records of 10 s of PTB-XL, folds 1-8 ({short_af}
with AF, {short_v} with ventricular beats), two random
leads of each. In brackets: 95 % intervals by bootstrap of patients. One seed.

The recipe of the head followed on six others that were tried on these outer folds (the last of them, with long_share 0.15,
had an AF AUROC of 0.965), the C of the regressions is one of three: these rows are optimistic. Nothing
was chosen for the rule and the classifier of statements but the thresholds."""


def tiled_record(hours: float) -> Record:
    """Return a two-lead record of that length: ten simulated minutes again and again."""
    tile = simulate_record(
        1, rhythm="pvc", duration_seconds=TILE_SECONDS, sampling_rate=SAMPLING_RATE, lead_names=["II", "V1"]
    )
    times = int(np.ceil(hours * 3600 / TILE_SECONDS))
    signal = np.tile(tile.signal, (1, times))[:, : round(hours * 3600 * SAMPLING_RATE)]
    return Record(signal, SAMPLING_RATE, list(tile.lead_names), record_name="tiled")


def measure_here(checkpoint: str, way: str, hours: float) -> dict[str, float]:
    """Return seconds, and megabytes above what the process held before, of one record in this process."""
    torch.set_num_threads(1)
    long = pipeline("ecg-long-record", model=checkpoint, device="cpu")
    long(tiled_record(0.02))  # what is allocated once
    record = tiled_record(hours)
    before, start = _reset_peak(), time.perf_counter()
    if way == "windows":
        long(record)
    else:
        _one_pass(checkpoint, record)
    seconds, peak = time.perf_counter() - start, _memory_mb("VmHWM")
    return {"seconds": seconds, "megabytes": peak - before, "process_megabytes": peak}


@torch.no_grad()
def _one_pass(checkpoint: str, record: Record) -> None:
    model = AutoModelForAudioFrameClassification.from_pretrained(checkpoint).eval()
    extractor = AutoFeatureExtractor.from_pretrained(checkpoint)
    batch = extractor(record, return_tensors="pt")
    patches = batch["attention_mask"].shape[2]
    stretched(model.anyecg, patches, round(extractor.window_seconds), lead_window=LEAD_WINDOW)(**batch)


def _reset_peak() -> float:
    """Let the peak of this process's memory begin anew; return what it holds now. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory_mb("VmRSS")


def _memory_mb(name: str) -> float:
    return float(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure(checkpoint: str, way: str, hours: float) -> dict:
    """Return what `measure_here` finds in a fresh process, or why it ended."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.long_records",
        "--run",
        checkpoint,
        "--here",
        way,
        "--hours",
        str(hours),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"ended": f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def markdown(report: dict) -> str:
    """Return the report as a page."""
    lines = ["# Long records", "", *COMMANDS, "", WHAT.format(**report["material"]), ""]
    lines += [*_table(report["arms"], COLUMNS), "", *_table(report["arms"], V_COLUMNS), ""]
    lines += ["## The record head, record by record", "", "| record | minutes | AF burden | told | V burden | told |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in report["arms"]["record head"]["records"].items():
        burdens = [_percent(row[key]) for key in ("af_burden", "af_burden_told", "v_burden", "v_burden_told")]
        lines.append(f"| {name} | {row['minutes']} | {' | '.join(burdens)} |")
    lines += ["", "## Time and memory", "", report["machine"], ""]
    lines += ["| way | hours | seconds | MB above the start |", "|---|---|---|---|"]
    for row in report["cost"]:
        told = f"{row['seconds']:.1f} | {row['megabytes']:.0f}" if "seconds" in row else f"{row['ended']} |"
        lines.append(f"| {row['way']} | {row['hours']:g} | {told} |")
    return "\n".join(lines) + "\n"


def _table(arms: dict, columns: dict[str, str]) -> list[str]:
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, arm in arms.items():
        lines.append(f"| {name} | " + " | ".join(_cell(arm, key) for key in columns) + " |")
    return lines


def _cell(arm: dict, key: str) -> str:
    if arm.get(key) is None:
        return "–"
    low, high = arm.get("intervals_95", {}).get(key, (None, None))
    return f"{arm[key]:.3f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="output folder of training.long_records")
    parser.add_argument("--hours", nargs="*", type=float, default=[0.5, 24.0], help="lengths, by windows")
    parser.add_argument(
        "--one_pass_hours", nargs="*", type=float, default=[0.5], help="lengths, in one pass with lead_window"
    )
    parser.add_argument("--keep_cost", action="store_true", help="keep time and memory that are in --out, measure none")
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--here", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(measure_here(args.run, args.here, args.hours[0])))
        return
    results = json.loads((Path(args.run) / "results.json").read_text())
    kept = json.loads((Path(args.out) / "long_records.json").read_text())["cost"] if args.keep_cost else None
    lengths = [("windows", hours) for hours in args.hours] + [("one_pass", hours) for hours in args.one_pass_hours]
    report = {name: results[name] for name in ("material", "calibration", "arms")} | {
        "machine": f"One thread of a CPU that other work shared; two leads at {SAMPLING_RATE:g} Hz, lead_window {LEAD_WINDOW}; "
        "from samples in memory to the result, filters and signal quality included.",
        "cost": kept or [{"way": way, "hours": hours, **measure(args.run, way, hours)} for way, hours in lengths],
    }
    write_json(Path(args.out) / "long_records.json", report)
    (Path(args.out) / "long_records.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
