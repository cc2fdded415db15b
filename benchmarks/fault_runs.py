"""Runs of the training commands as processes of their own that can be killed: for `benchmarks.faults` and the tests of faults.

A run is forked from a process that has only imported the commands (multiprocessing's fork server), which saves the seconds
that the imports take; it is started, killed and ends like one from a shell.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import tokenization.train
import training.finetune
import training.pretrain
from training.checkpointing import FINISHED, UNFINISHED
from training.commands import run_command

RECIPES = Path(training.finetune.__file__).parent / "recipes"
COMMANDS = {"quantizer": tokenization.train, "pretrain": training.pretrain, "finetune": training.finetune}
NETWORK = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1, "hidden_dropout": 0.1, "stem_channels": [4] * 4
}  # fmt: skip
QUANTIZER = NETWORK | {
    "stem_channels": [4] * 3, "num_decoder_layers": 1, "codebook_size": 16, "codebook_dim": 4, "dead_code_steps": 1,
    "dead_code_share": 0.5, "ema_decay": 0.5
}  # fmt: skip
OPTIONS = {
    "steps": "--max_steps 8 --save_steps 2 --eval_steps 4 --logging_steps 3 --warmup_steps 2 --save_total_limit 2 "
    "--per_device_train_batch_size 4 --simulate 18 --max_eval_records 4 --num_proc 1 --disable_tqdm True "
    "--max_shift_seconds 1.0 --gain_range 0.2 --noise_mv 0.02 --lead_subset_probability 0.5",
    "quantizer": "--codebook_start_step 3 --codebook_start_vectors 200 --health_records 2",
    "pretrain": "--unigram_records 8 --weight_average_decay 0.9 --gradient_accumulation_steps 2 --beat_weight 3 "
    "--demography_weight 0.5",
    "finetune": "--weight_average_decay 0.9 --keep_best True --gradient_accumulation_steps 2",
}
PATIENCE = 240  # seconds for one run; more is an error
RESULTS = ("model.safetensors", "results.json", "config.json")


@dataclass
class Run:
    """A training command in a process of its own."""

    process: multiprocessing.Process
    log: Path

    def wait(self) -> int:
        """Return the exit code; negative: the signal it died of."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            raise RuntimeError(f"no end after {PATIENCE} s: {self.said()[-1000:]}")
        return self.process.exitcode

    def said(self) -> str:
        return self.log.read_text()


class Starter:
    """Starts the commands with their output folders below `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])

    def argv(self, stage: str, output_dir: Path, *options: str) -> list[str]:
        network = json.dumps(QUANTIZER if stage == "quantizer" else NETWORK)
        argv = [str(RECIPES / f"smoke_{stage}.yaml"), *OPTIONS["steps"].split(), *OPTIONS[stage].split()]
        argv += ["--output_dir", str(output_dir), "--cache_dir", str(self.folder / "cache"), "--config", network]
        if stage == "pretrain":
            argv += ["--quantizer", str(self.folder / "whole-quantizer")]
        return [*argv, *options]

    def start(self, stage: str, output_dir: Path, *options: str, prepare=None, log: str | None = None) -> Run:
        """Start the command of a stage; `prepare` is called in the new process first, `log` names the file of its output."""
        log = self.folder / (log or f"{output_dir.name}.log")
        argv = self.argv(stage, output_dir, *options)
        process = self.context.Process(target=_run, args=(stage, argv, str(log), prepare))
        process.start()
        return Run(process, log)

    def run(self, stage: str, output_dir: Path, *options: str, prepare=None) -> Run:
        run = self.start(stage, output_dir, *options, prepare=prepare)
        run.wait()
        return run

    def whole(self, stage: str) -> Path:
        """Return the folder of a run that was left alone."""
        folder = self.folder / f"whole-{stage}"
        if stage == "pretrain":
            self.whole("quantizer")
        if not (folder / FINISHED).is_file():
            run = self.run(stage, folder)
            if run.process.exitcode != 0:
                raise RuntimeError(f"the {stage} run that was left alone failed: {run.said()[-2000:]}")
        return folder


def _run(stage: str, argv: list[str], log: str, prepare) -> None:
    """Run a command in this new process as the command line would, its output into a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for data workers, as in a process from a shell
    if prepare is not None:
        prepare()
    sys.argv = [COMMANDS[stage].__name__, *argv]
    run_command(COMMANDS[stage].main)


def same_end(folder: Path, other: Path) -> bool:
    """Return whether two runs ended with the same bits: weights, results, configuration."""
    return all((folder / name).is_file() for name in RESULTS) and all(
        (folder / name).read_bytes() == (other / name).read_bytes() for name in RESULTS
    )


def newest_step(output_dir: Path) -> int | None:
    """Return the step that the next run must go on from: that of the newest folder named as a checkpoint, if there is one."""
    steps = [int(path.name.rpartition("-")[2]) for path in output_dir.glob("checkpoint-*")]
    return max(steps, default=None)


def step_begun_at(said: str) -> int | None:
    """Return the step that a run has gone on from, by what it said; None where it began at the start."""
    match = re.search(r"(?:going on from|training was complete at) .*, step (\d+)|is finished \((\d+) steps\)", said)
    return None if match is None else int(match[1] or match[2])


def kill_at(run: Run, moment: float) -> bool:
    """Kill -9 after `moment` seconds; return whether the run was still going on."""
    run.process.join(moment)
    return _kill(run)


def kill_in_save(run: Run, output_dir: Path, *, number: int, delay: float) -> bool:
    """Kill -9 `delay` seconds after something unfinished appears in the folder for the `number`th time."""
    seen = set()
    while run.process.exitcode is None and len(seen) < number:
        seen |= {path.name for path in output_dir.glob(f"{UNFINISHED}[cf][hi]*")}  # checkpoint-N, final-model
        time.sleep(0.0005)
    time.sleep(delay)
    return _kill(run)


def _kill(run: Run) -> bool:
    run.process.kill()
    run.process.join()
    return run.process.exitcode == -9
