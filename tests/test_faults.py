"""What a training run does when it is killed, its files are damaged, the disk is full, numbers overflow: each by doing it.

The commands run in processes of their own (`benchmarks.fault_runs`); `python -m benchmarks.faults` kills them by the hundred.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from line_model import Line, Ones
from safetensors.torch import load_file, save_file

import training.finetune
from benchmarks.fault_runs import PATIENCE, Starter, kill_in_save, newest_step, same_end, step_begun_at
from benchmarks.faults import is_right, table
from training import checkpointing
from training.arguments import AnyECGTrainingArguments
from training.checkpointing import (
    SaveError,
    check_arguments,
    check_length,
    last_checkpoint,
    lock_folder,
    name_checkpoint,
    warn_of_other_software,
)
from training.corpora.simulated import list_simulated
from training.record_store import prepare_records
from training.trainer import AnyECGTrainer, NonFiniteError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills and limits of processes are those of POSIX")


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    return Starter(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def output_dir(starter, request):
    """Return an output folder that is not there yet."""
    return starter.folder / str(abs(hash(request.node.nodeid)))


@pytest.fixture
def unfinished(starter, output_dir):
    """Return the folder of a fine-tuning run that was killed after its last checkpoint, before its end was written."""
    shutil.copytree(starter.whole("finetune"), output_dir)
    for name in ("run_finished.json", "results.json", "model.safetensors", "config.json"):
        (output_dir / name).unlink()
    return output_dir


# ---- kill -9 ----


@pytest.mark.parametrize(("stage", "workers"), [("quantizer", "2"), ("pretrain", "0"), ("finetune", "2")])
def test_a_run_killed_in_a_save_and_at_its_end_ends_with_the_same_bits(starter, output_dir, stage, workers):
    whole = starter.whole(stage)
    for number in (2, 3):
        run = starter.start(stage, output_dir, "--dataloader_num_workers", workers)
        assert kill_in_save(run, output_dir, number=number, delay=0.003)
    newest = newest_step(output_dir)
    run = starter.run(stage, output_dir, "--dataloader_num_workers", workers)
    assert run.process.exitcode == 0, run.said()
    assert newest == step_begun_at(run.said()) is not None
    assert same_end(output_dir, whole)
    if stage == "quantizer":  # dead codes were moved, which is random, and their count is in the checkpoint
        assert load_file(whole / "model.safetensors")["vector_quantizer.num_restarts"] > 0
    assert not list(output_dir.glob(".unfinished-*")) and len(list(output_dir.glob("checkpoint-*"))) == 2


@pytest.mark.parametrize(("said", "step"), [
    ("INFO training.runs: going on from /out/killed-2/checkpoint-4, step 4\n", 4),
    ("INFO training.runs: training was complete at /out/checkpoint-8, step 8\n", 8),
    ("INFO training.runs: /out is finished (8 steps): nothing to do.\n", 8),
    ("INFO training.runs: one process on cpu, weights whole\n", None),
])  # fmt: skip
def test_the_log_of_a_run_says_where_it_went_on(said, step):
    assert step_begun_at(said) == step


def test_a_trial_that_trained_from_the_start_again_is_not_right(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", ".unfinished-checkpoint-12"):
        (tmp_path / name).mkdir()
    assert newest_step(tmp_path) == 10 and newest_step(tmp_path / "checkpoint-2") is None
    old = {"stage": "finetune", "workers": 0, "kills": {"random": 1, "save": 1}, "exact": True}
    anew = old | {"newest_checkpoint": 2, "begun_at": None}
    assert is_right(old) and is_right(anew | {"begun_at": 2}) and not is_right(anew)
    assert table([old, anew, anew | {"begun_at": 2}]).splitlines()[-1].endswith("| 6 of 6 | 1 of 2 |")


def test_a_run_killed_while_its_model_is_moved_in_place_is_no_finished_run(starter, unfinished):
    (unfinished / ".unfinished-final-model").mkdir()
    (unfinished / ".unfinished-final-model" / "config.json").write_text("{")
    shutil.copy(starter.whole("finetune") / "results.json", unfinished)
    run = starter.run("finetune", unfinished)
    assert "training was complete" in run.said() and same_end(unfinished, starter.whole("finetune"))
    assert not (unfinished / ".unfinished-final-model").exists()


@pytest.mark.parametrize("stage", ["quantizer", "pretrain", "finetune"])
def test_the_end_of_a_run_in_mixed_precision_is_the_same_after_a_restart(starter, output_dir, stage):
    if stage == "pretrain":
        starter.whole("quantizer")
    options = ("--bf16", "True", "--max_steps", "4")
    starter.run(stage, output_dir, *options)
    again = output_dir.with_name(f"{output_dir.name}-again")
    shutil.copytree(output_dir, again)
    (again / "run_finished.json").unlink()
    run = starter.run(stage, again, *options)
    assert "training was complete" in run.said() and same_end(again, output_dir)


def _as_rank(rank, port):
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _start_two(starter, output_dir):
    port = int(np.random.default_rng().integers(20_000, 60_000))
    runs = []
    for rank in (0, 1):
        prepare = functools.partial(_as_rank, rank, port)
        options = ("--max_steps", "4", "--codebook_start_step", "1", "--health_records", "0")
        runs.append(
            starter.start("quantizer", output_dir, *options, prepare=prepare, log=f"{output_dir.name}-{rank}.log")
        )
    return runs


def test_two_processes_killed_in_a_save_end_with_the_same_bits(starter, output_dir):
    whole, killed = output_dir.with_name(f"{output_dir.name}-whole"), output_dir
    for folder in (whole, killed):
        runs = _start_two(starter, folder)
        if folder == killed:
            assert kill_in_save(runs[0], killed, number=2, delay=0.003)
            runs[1].process.kill()
            runs[1].wait()
            runs = _start_two(starter, folder)
        assert [run.wait() for run in runs] == [0, 0], runs[0].said() + runs[1].said()
    checkpoint = Path(last_checkpoint(killed))
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(json.loads((checkpoint / "files.json").read_text())["files"])
    assert same_end(killed, whole)


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_one_lives(starter, output_dir):
    held = lock_folder(output_dir)
    run = starter.run("finetune", output_dir)
    assert run.process.exitcode == 1 and f"Another process (pid {os.getpid()})" in run.said()
    held.close()


# ---- damaged checkpoints ----


def _checkpoint(output_dir, step):
    folder = output_dir / ".unfinished-x"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "0.distcp").write_bytes(os.urandom(1000))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    name_checkpoint(folder, output_dir / f"checkpoint-{step}")
    return output_dir / f"checkpoint-{step}"


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGES = {
    "0.distcp has another SHA-256": lambda checkpoint: _flip_a_bit(checkpoint / "shards" / "0.distcp"),
    "0.distcp has 500 bytes instead of 1000": lambda checkpoint: os.truncate(checkpoint / "shards" / "0.distcp", 500),
    "0.distcp is missing": lambda checkpoint: (checkpoint / "shards" / "0.distcp").unlink(),
    "it has no files.json": _empty,
    "files.json is damaged": lambda checkpoint: os.truncate(checkpoint / "files.json", 50),
    "shards/1.distcp does not belong": lambda checkpoint: (checkpoint / "shards" / "1.distcp").write_bytes(b"x"),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named_and_the_older_one_taken(tmp_path, caplog, said):
    older, newest = _checkpoint(tmp_path, 90), _checkpoint(tmp_path, 100)
    DAMAGES[said](newest)
    assert last_checkpoint(tmp_path) == str(older)
    assert "checkpoint-100 is not whole" in caplog.text and said in caplog.text


def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_bits(starter, unfinished):
    _flip_a_bit(Path(last_checkpoint(unfinished)) / "optimizer.pt")
    run = starter.run("finetune", unfinished)
    assert "checkpoint-8 is not whole: optimizer.pt" in run.said() and "going on from" in run.said()
    assert same_end(unfinished, starter.whole("finetune"))


def test_a_run_without_a_whole_checkpoint_is_an_error_and_nothing_starts_anew(starter, unfinished):
    for checkpoint in unfinished.glob("checkpoint-*"):
        (checkpoint / "files.json").unlink()  # as the stock Trainer writes them
    run = starter.run("finetune", unfinished)
    assert run.process.exitcode == 1 and "No checkpoint" in run.said() and "stock Trainer" in run.said()
    assert "Traceback" not in run.said() and not (unfinished / "model.safetensors").exists()


def test_the_two_newest_whole_checkpoints_stay_whatever_lies_beside_them(tmp_path):
    for step in (10, 20, 30, 40):
        _checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-30" / "trainer_state.json").unlink()
    checkpointing.delete_old_checkpoints(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-30", "checkpoint-40"]


# ---- the end of a run ----


def test_a_damaged_final_model_is_written_again_from_the_last_checkpoint(starter, unfinished):
    whole = starter.whole("finetune")
    for name in ("run_finished.json", "results.json", "config.json"):
        shutil.copy(whole / name, unfinished)
    shutil.copy(whole / "model.safetensors", unfinished)
    _flip_a_bit(unfinished / "model.safetensors")
    run = starter.run("finetune", unfinished)
    assert "was finished, but model.safetensors has another SHA-256" in run.said()
    assert same_end(unfinished, whole)
    for checkpoint in unfinished.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (unfinished / "results.json").unlink()
    run = starter.run("finetune", unfinished)
    assert run.process.exitcode == 1 and "results.json is missing, and no checkpoint is left" in run.said()


def test_taking_up_a_run_with_other_arguments_is_an_error_that_names_them(tmp_path):
    checkpointing.save_arguments(tmp_path, {"seed": 0, "max_steps": 3, "logging_steps": 1})
    check_arguments(tmp_path, {"seed": 1})  # nothing to go on from: another try of a run that failed at once
    _checkpoint(tmp_path, 1)
    check_arguments(tmp_path, {"seed": 0, "max_steps": 4, "logging_steps": 5})
    with pytest.raises(ValueError, match="seed 0, now 1.*old values.*another --output_dir"):
        check_arguments(tmp_path, {"seed": 1, "max_steps": 4})


def test_another_length_is_an_error_where_each_step_depends_on_it(tmp_path):
    checkpointing.save_arguments(tmp_path, {"total_steps": 3})
    check_length(tmp_path, 4, why_fixed="--lr_scheduler_type cosine")  # nothing to go on from
    _checkpoint(tmp_path, 2)
    check_length(tmp_path, 3, why_fixed="--lr_scheduler_type cosine")
    for steps in (2, 4):
        with pytest.raises(ValueError, match=f"for 3 steps, now it is {steps} .*cosine each step depends.*old length"):
            check_length(tmp_path, steps, why_fixed="--lr_scheduler_type cosine")


def test_a_run_of_constant_rate_may_be_lengthened_but_not_end_before_where_it_is(tmp_path):
    checkpointing.save_arguments(tmp_path, {"total_steps": 9})
    _checkpoint(tmp_path, 6)
    for steps in (6, 12):
        check_length(tmp_path, steps, why_fixed=None)
    with pytest.raises(ValueError, match="has made 6 steps, 5 are asked for.*Give 6 or more"):
        check_length(tmp_path, 5, why_fixed=None)


@pytest.mark.parametrize("said, options", [
    ("for 8 steps, now it is 12 .*--lr_scheduler_type cosine", ()),
    ("for 8 steps, now it is 12 .*--lr_scheduler_type linear", ("--lr_scheduler_type", "linear")),
    ("for 8 steps, now it is 12 .*--warmup_steps 0.25, a share of the run",
     ("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "0.25")),
])  # fmt: skip
def test_a_run_is_not_lengthened_under_a_schedule_that_depends_on_the_length(starter, output_dir, said, options):
    assert starter.run("finetune", output_dir, *options).process.exitcode == 0
    run = starter.run("finetune", output_dir, *options, "--max_steps", "12")
    assert run.process.exitcode == 1 and re.search(said, run.said()) and "Traceback" not in run.said()


def test_a_run_under_a_constant_schedule_that_is_lengthened_ends_as_one_of_that_length(starter, output_dir):
    constant = ("--lr_scheduler_type", "constant_with_warmup")
    longer = output_dir.with_name(f"{output_dir.name}-longer")
    starter.run("finetune", longer, *constant, "--max_steps", "12")
    starter.run("finetune", output_dir, *constant)
    run = starter.run("finetune", output_dir, *constant, "--max_steps", "12")
    assert "going on from" in run.said() and same_end(output_dir, longer)


def test_an_objective_that_follows_the_length_of_a_run_is_not_lengthened(starter, output_dir):
    options = ("--objective", "latents", "--lr_scheduler_type", "constant", "--weight_average_decay", "0")
    options += ("--beat_weight", "0", "--demography_weight", "0")
    starter.whole("quantizer")
    starter.run("pretrain", output_dir, *options, "--max_steps", "2")
    run = starter.run("pretrain", output_dir, *options, "--max_steps", "4")
    assert run.process.exitcode == 1 and "objective LatentPrediction each step depends" in run.said()


def _other_weights(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name] = weights[name] + 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("stage", "option", "start"), [
    ("pretrain", "--quantizer", "quantizer"), ("pretrain", "--init_from", "pretrain"), ("finetune", "--init_from", "pretrain"),
    ("quantizer", "--init_from", "quantizer"),
])  # fmt: skip
def test_a_run_is_not_taken_up_from_a_model_that_has_changed(starter, output_dir, tmp_path, stage, option, start):
    starter.whole("quantizer")
    shutil.copytree(starter.whole(start), tmp_path / "start", ignore=shutil.ignore_patterns("checkpoint-*"))
    options = (option, str(tmp_path / "start"), "--max_steps", "4")
    assert starter.run(stage, output_dir, *options).process.exitcode == 0
    (output_dir / "run_finished.json").unlink()
    _other_weights(tmp_path / "start")
    run = starter.run(stage, output_dir, *options)
    assert run.process.exitcode == 1 and "Traceback" not in run.said()
    assert re.search(rf"started from other content.*: {option} \(SHA-256 \w+..., now \w+...\)", run.said()), run.said()


def _with_one_other_record():
    import training.data

    def changed(num_records):
        first, *rest = list_simulated(num_records)
        return [dataclasses.replace(first, payload=first.payload | {"seed": 99}), *rest]

    training.data.list_simulated = changed


@pytest.mark.parametrize("stage", ["quantizer", "pretrain", "finetune"])
def test_a_run_is_not_taken_up_with_other_training_records_under_the_old_name(starter, output_dir, tmp_path, stage):
    shutil.copytree(starter.whole(stage), output_dir)
    (output_dir / "run_finished.json").unlink()
    cache = ("--cache_dir", str(tmp_path))
    run = starter.run(stage, output_dir, *cache, prepare=_with_one_other_record)
    assert run.process.exitcode == 1 and "started from other content than is there now: training records" in run.said()
    run = starter.run(stage, output_dir, "--cache_dir", str(tmp_path / "again"))
    assert "training was complete" in run.said() and same_end(output_dir, starter.whole(stage))


def test_a_run_is_not_taken_up_to_choose_its_best_weights_by_another_figure(starter, unfinished):
    run = starter.run("finetune", unfinished, "--metric_for_best_model", "loss", "--greater_is_better", "True")
    assert run.process.exitcode == 1
    assert 'metric_for_best_model "macro_auroc", now "loss"' in run.said()


def test_other_software_and_unknown_arguments_are_told_and_do_not_stop_a_run(tmp_path, caplog):
    software = {"torch": "2.13.0", "numpy": "2.4.0"}
    _checkpoint(tmp_path, 2)
    warn_of_other_software(tmp_path, software)
    assert "has no run_arguments.json" in caplog.text
    caplog.clear()
    checkpointing.save_arguments(tmp_path, {"seed": 0, "software": software})
    warn_of_other_software(tmp_path, software)
    assert not caplog.text
    warn_of_other_software(tmp_path, software | {"torch": "2.14.0"})
    assert "other software: torch 2.13.0, now 2.14.0. It may not end" in caplog.text


def test_a_run_keeps_what_software_it_was_started_with(starter):
    software = json.loads((starter.whole("finetune") / "run_arguments.json").read_text())["software"]
    assert software["torch"] == torch.__version__ and len(software["code of the project"]) == 12


def test_a_finished_run_with_another_seed_is_not_said_to_be_done(starter):
    whole = starter.whole("finetune")
    with pytest.raises(ValueError, match="seed 0, now 7"):
        training.finetune.main(starter.argv("finetune", whole, "--seed", "7"))


# ---- numbers that are not finite ----


def test_a_learning_rate_that_is_far_too_high_stops_the_run_and_leaves_finite_checkpoints(starter, output_dir):
    run = starter.run("finetune", output_dir, "--learning_rate", "1e38", "--warmup_steps", "0", "--save_steps", "1")
    assert run.process.exitcode == 1
    assert re.search(
        r"error: .*(step \d+ is (not finite|nan|inf)|not finite after step \d+)", run.said().splitlines()[-1]
    )
    for checkpoint in output_dir.glob("checkpoint-*"):
        assert all(value.isfinite().all() for value in load_file(checkpoint / "model.safetensors").values())
        json.loads((checkpoint / "trainer_state.json").read_text(), parse_constant=pytest.fail)
    assert not (output_dir / "model.safetensors").exists()


def test_a_damaged_weight_in_the_model_to_start_from_is_named(starter, output_dir, tmp_path):
    shutil.copytree(starter.whole("finetune"), tmp_path / "start", ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(tmp_path / "start" / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name][0] = float("nan")
    save_file(weights, tmp_path / "start" / "model.safetensors", metadata={"format": "pt"})
    run = starter.run("finetune", output_dir, "--init_from", str(tmp_path / "start"))
    assert run.process.exitcode == 1 and f"{name} is not finite before the first step" in run.said()


def _line_trainer(output_dir, **options):
    args = AnyECGTrainingArguments(
        output_dir=str(output_dir),
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=1,
        disable_tqdm=True,
        **options,
    )
    return AnyECGTrainer(
        Line(),
        args,
        train_dataset=Ones(),
        eval_dataset=Ones(),
        data_collator=lambda items: {"x": torch.stack([item["x"] for item in items])},
    )


def test_a_weight_that_overflows_in_an_optimizer_step_reaches_no_checkpoint(tmp_path):
    trainer = _line_trainer(tmp_path)
    step = trainer.create_optimizer().step

    def overflow(*args, **kwargs):
        step(*args, **kwargs)
        if trainer.state.global_step == 1:
            trainer.model.weight.data[0] = float("inf")

    trainer.optimizer.step = overflow
    with pytest.raises(NonFiniteError, match="weight is not finite after step 2"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert last_checkpoint(tmp_path).endswith("checkpoint-1")


def test_the_state_of_a_run_is_valid_json_even_where_a_figure_was_not_a_number(tmp_path):
    trainer = _line_trainer(tmp_path)
    trainer.state.log_history.append({"eval_macro_auroc": float("nan")})
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    trainer._save_checkpoint(trainer.model, None)
    json.loads((tmp_path / "checkpoint-0" / "trainer_state.json").read_text(), parse_constant=pytest.fail)


def test_fewer_than_two_checkpoints_are_never_kept(tmp_path, caplog):
    _line_trainer(tmp_path, save_total_limit=1).train()
    assert "--save_total_limit 1 is raised to 2" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize(
    "options",
    [
        {"save_only_model": True},
        {"ignore_data_skip": True},
        {"keep_best": True, "eval_strategy": "steps", "eval_on_start": True},
    ],
)
def test_options_that_a_restart_could_not_repeat_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="--keep_best|--save_only_model"):
        _line_trainer(tmp_path, **options)


# ---- full disk ----


def _limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # the weights fit, the optimizer's state does not


def test_a_save_that_fails_half_way_leaves_nothing_and_the_run_goes_on_when_there_is_room(starter, output_dir):
    run = starter.start("finetune", output_dir)
    assert kill_in_save(run, output_dir, number=2, delay=0.0)
    run = starter.run("finetune", output_dir, prepare=_limit_file_size)
    assert run.process.exitcode == 1 and "Traceback" not in run.said(), run.said()
    assert "could not be written" in run.said() and "MB are needed" in run.said() and "MB are free" in run.said()
    assert not list(output_dir.glob(".unfinished-*")) and last_checkpoint(output_dir).endswith("checkpoint-2")
    starter.run("finetune", output_dir)
    assert same_end(output_dir, starter.whole("finetune"))


def test_a_save_for_which_there_is_no_room_is_not_begun(tmp_path, monkeypatch):
    trainer = _line_trainer(tmp_path)
    trainer.train()
    monkeypatch.setattr(
        checkpointing.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    )
    with pytest.raises(
        SaveError, match=r"checkpoint-4 could not .* 2.0 MB are needed, 1.0 MB are free, 1.0 MB are missing"
    ):
        trainer._save_checkpoint(trainer.model, None)
    assert last_checkpoint(tmp_path).endswith("checkpoint-4")


def test_a_disk_that_is_full_ends_the_run_and_room_lets_it_end_exactly(starter, output_dir):
    output_dir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(output_dir)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this process may not mount a small disk")
    try:
        run = starter.run("finetune", output_dir)
        assert run.process.exitcode == 1 and "MB are missing" in run.said() and "Traceback" not in run.said()
        assert not list(output_dir.glob(".unfinished-*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(output_dir)], check=True)
        starter.run("finetune", output_dir)
        assert same_end(output_dir, starter.whole("finetune"))
    finally:
        subprocess.run(["umount", str(output_dir)], check=True)


# ---- processes and signals ----


def _children(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the children of a process are read from /proc")
def test_a_data_worker_that_is_killed_ends_the_run_with_advice(starter, output_dir):
    run, end = starter.start("finetune", output_dir, "--dataloader_num_workers", "2"), time.monotonic() + PATIENCE
    while run.process.exitcode is None and time.monotonic() < end:
        for child in _children(run.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert run.process.exitcode == 1
    assert "A process that reads records died" in run.said() and "--dataloader_num_workers" in run.said()
    # no traceback of the command; a thread of the library that dies with the worker may print one of its own
    assert 'finetune.py", line' not in run.said()
    starter.run("finetune", output_dir)
    assert same_end(output_dir, starter.whole("finetune"))


def _listen_to_ctrl_c():
    """A suite that runs in the background has it ignored, and so have the processes that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_one_line(starter, output_dir, number, code):
    options = ("--dataloader_num_workers", "2", "--max_steps", "5000")
    run = starter.start("finetune", output_dir, *options, prepare=_listen_to_ctrl_c)
    while not output_dir.exists() and run.process.exitcode is None:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(run.process.pid, number)
    assert run.wait() == code, run.said()
    assert run.said().splitlines()[-1].startswith("stopped by") and "Traceback" not in run.said()


# ---- data ----


@pytest.mark.parametrize("name", ["signals.int16", "mask.uint8", "records.parquet", "meta.json"])
@pytest.mark.parametrize("is_cut", [True, False])
def test_a_cut_or_missing_file_of_prepared_records_is_prepared_anew(tmp_path, caplog, name, is_cut):
    from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor

    prepare = functools.partial(
        prepare_records, list_simulated(3), AnyECGFeatureExtractor(), source="x", cache_dir=tmp_path
    )
    before = prepare()
    path, expected = before.folder / name, before.signal(2)
    if is_cut:
        os.truncate(path, path.stat().st_size - 2)
    else:
        path.unlink()
    after = prepare()
    assert f"{before.folder}" in caplog.text and "prepared anew" in caplog.text
    assert np.array_equal(after.signal(2), expected) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_flipped_bit_in_the_prepared_records_ends_the_run_and_without_the_cache_it_ends_exactly(
    starter, output_dir, tmp_path, workers
):
    options = ("--cache_dir", str(tmp_path), "--dataloader_num_workers", workers)
    whole = starter.whole("finetune")
    shutil.copytree(starter.folder / "cache", tmp_path, dirs_exist_ok=True)
    _flip_a_bit(max(tmp_path.glob("*/signals.int16"), key=lambda path: path.stat().st_size))  # of the training records
    run = starter.run("finetune", output_dir, *options)
    assert run.process.exitcode == 1 and "Traceback" not in run.said(), run.said()
    folder = re.search(r"error: .*Record '.*CRC-32.*Remove the folder (\S+) and", run.said())[1]
    shutil.rmtree(folder)
    run = starter.run("finetune", output_dir, *options)
    assert same_end(output_dir, whole), run.said()


@pytest.mark.parametrize("place", ["data/ptb-xl/train-00000-of-00001.parquet", "fold-1.parquet"])
def test_a_cut_file_of_a_data_set_is_an_error_that_names_it(tmp_path, place):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from training.corpora import list_records

    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"record_id": ["a"] * 1000}), path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{path.name} is damaged or cut"):
        list_records(tmp_path)


def test_a_process_that_dies_while_preparing_records_is_an_error_and_not_a_wait_without_end(tmp_path, monkeypatch):
    from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor

    monkeypatch.setattr("training.record_store.MIN_RECORDS_FOR_PROCESSES", 1)
    monkeypatch.setattr("training.record_store._prepare_one", _die)
    with pytest.raises(ChildProcessError, match="--num_proc"):
        prepare_records(list_simulated(3), AnyECGFeatureExtractor(), source="x", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def _die(entry, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
