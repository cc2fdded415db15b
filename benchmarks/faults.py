"""Kill -9: the three training commands are killed and run again until they end; their bits must be those of a run left alone.

    python -m benchmarks.faults --kills 200 [--out benchmarks/results]        about half an hour on one core

A run that trained from the start again would end with the same bits, too: each trial also compares the step that its last run
says it goes on from with the newest checkpoint that the kills have left.

The smoke recipes with very small networks, dropout and random alterations of the records, with 0 and 2 data workers in turn.
Half of the kills come at a uniformly random moment of a run, half while something is being written: the output folder is
watched, and a random moment after an unfinished checkpoint or final model appears in it is chosen. Each trial is killed up to
three times, then run to its end. Adds to `faults.jsonl` in the output folder, so that it may be ended and started again, and
writes `faults.md`.

Each run is a process of its own, forked from one that has only imported the commands (multiprocessing's fork server).
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from .fault_runs import COMMANDS, Starter, kill_at, kill_in_save, newest_step, same_end, step_begun_at


def trial(starter: Starter, stage: str, workers: int, seconds: float, rng: np.random.Generator) -> dict:
    """Kill one run up to three times, run it to its end and compare it with the one left alone."""
    output_dir = starter.folder / f"killed-{stage}"
    shutil.rmtree(output_dir, ignore_errors=True)
    options = ("--dataloader_num_workers", str(workers))
    kills = {"random": 0, "save": 0}
    for kind in rng.permutation(["random", "save", rng.choice(["random", "save"])]):
        run = starter.start(stage, output_dir, *options)
        if kind == "random":
            killed = kill_at(run, rng.uniform(0.05, 1.0) * seconds)
        else:
            killed = kill_in_save(run, output_dir, number=int(rng.integers(1, 5)), delay=rng.uniform(0, 0.08))
        kills[kind] += killed
        if not killed:  # it has ended: there is nothing more to kill
            break
    newest = newest_step(output_dir)
    run = starter.run(stage, output_dir, *options)
    result = {
        "stage": stage, "workers": workers, "kills": kills, "exit_code": run.process.exitcode,
        "newest_checkpoint": newest, "begun_at": step_begun_at(run.said()),
        "exact": run.process.exitcode == 0 and same_end(output_dir, starter.whole(stage)),
    }  # fmt: skip
    return result if is_right(result) else result | {"said": run.said()[-2000:]}


def is_right(trial: dict) -> bool:
    """Return whether a trial ended with the right bits, and went on from the newest checkpoint where that was looked at."""
    return trial["exact"] and trial.get("begun_at") == trial.get("newest_checkpoint")


def table(trials: list[dict]) -> str:
    """Return the Markdown of all trials."""
    lines = [
        "# Kill -9 and run again",
        "",
        f"CPU, PyTorch {version('torch')}, Transformers {version('transformers')}, Python {platform.python_version()}, "
        "one core. Each run was killed up to three times, then run to its end; exact: weights, configuration and results "
        "have the bits of the run that was left alone; taken up: the last run went on from the newest checkpoint (of the runs "
        "of which that was looked at). Command: `python -m benchmarks.faults --kills 200`.",
        "",
        "| stage | workers | runs | kills at a random moment | kills in a save | exact runs | kills in exact runs | taken up |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for stage, workers in sorted({(trial["stage"], trial["workers"]) for trial in trials}):
        lines.append(
            _row([t for t in trials if (t["stage"], t["workers"]) == (stage, workers)], f"{stage} | {workers}")
        )
    return "\n".join([*lines, _row(trials, "all | "), ""])


def _row(trials: list[dict], name: str) -> str:
    random, save = (sum(trial["kills"][kind] for trial in trials) for kind in ("random", "save"))
    exact = [trial for trial in trials if trial["exact"]]
    kills = sum(sum(trial["kills"].values()) for trial in exact)
    seen = [trial["begun_at"] == trial["newest_checkpoint"] for trial in trials if "begun_at" in trial]
    counts = f"{len(trials)} | {random} | {save} | {len(exact)} | {kills} of {random + save}"
    return f"| {name} | {counts} | {sum(seen)} of {len(seen)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in total, those in faults.jsonl included")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--stages", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    stored = args.out / "faults.jsonl"
    trials = [json.loads(line) for line in stored.read_text().splitlines()] if stored.is_file() else []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        starter, seconds = Starter(Path(folder)), {}
        for stage in args.stages:
            for workers in (0, 2):
                starter.whole(stage)  # the first time, records are prepared too
                start = time.perf_counter()
                run = starter.run(stage, starter.folder / "again", "--dataloader_num_workers", str(workers))
                seconds[stage, workers] = time.perf_counter() - start
                exact = same_end(starter.folder / "again", starter.whole(stage))
                print(f"{stage}, {workers} workers: {seconds[stage, workers]:.1f} s", exact or run.said(), flush=True)
                shutil.rmtree(starter.folder / "again")
        while (done := sum(sum(trial["kills"].values()) for trial in trials)) < args.kills:
            stage, workers = args.stages[len(trials) % len(args.stages)], 2 * (len(trials) // len(args.stages) % 2)
            result = trial(starter, stage, workers, seconds[stage, workers], np.random.default_rng((len(trials), 15)))
            trials.append(result)
            with open(stored, "a") as file:
                file.write(json.dumps(result) + "\n")
            (args.out / "faults.md").write_text(table(trials))
            print(done, stage, workers, result["kills"], "right" if is_right(result) else result["said"], flush=True)
    print(table(trials))


if __name__ == "__main__":
    main()
