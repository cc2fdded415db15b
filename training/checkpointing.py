"""The folders a run writes: checkpoints to go on from, the final model, the mark that it is finished.

All is written under another name in the same folder, flushed to the disk, listed with sizes and sums, and only then
renamed: what has its name is whole, whenever the process was killed. All commands write and read them through this file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are not noticed
    fcntl = None

logger = logging.getLogger(__name__)

FILES = "files.json"  # in a checkpoint: size and SHA-256 of all others
FINISHED = "run_finished.json"
ARGUMENTS = "run_arguments.json"
RESULTS = "results.json"
CONFIG = "config.json"
EXTRACTOR_FILE = "preprocessor_config.json"
UNFINISHED = ".unfinished-"
LOCK = ".lock"
MIN_CHECKPOINTS = 2  # kept: where the newest is damaged later, there is another

# a run may be taken up with other values of these: they say where and how long, not what is computed in a step
VOLATILE = {
    "output_dir", "max_steps", "num_train_epochs", "num_proc", "cache_dir", "disable_tqdm", "save_steps", "save_strategy",
    "save_total_limit", "save_on_each_node", "dataloader_num_workers", "dataloader_prefetch_factor",
    "dataloader_pin_memory", "dataloader_persistent_workers", "per_device_eval_batch_size", "eval_accumulation_steps",
    "run_name", "project", "push_to_hub", "local_rank", "use_cpu", "ddp_timeout", "torch_empty_cache_steps",
    "skip_memory_metrics", "health_records",
    "total_steps", "inputs", "software",  # compared on their own
}  # fmt: skip
VOLATILE_BEGINNINGS = ("logging_", "log_", "hub_", "report_", "trackio_")


class SaveError(RuntimeError):
    """A checkpoint or the final model could not be written, most often for want of room; nothing half is left."""


# ---- files ----


def flush_and_sum(folder: Path) -> dict[str, dict]:
    """Make sure that all files below `folder` are on the disk; return their sizes and SHA-256 by relative name."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _flush_folder(path)
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = _describe(file)
    _flush_folder(folder)
    return files


def _describe(file) -> dict:
    return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def what_is_damaged(folder: Path, files: dict[str, dict]) -> str | None:
    """Return the first thing that is wrong with the listed `files` of `folder`, None where they are as listed."""
    for name, listed in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != listed["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {listed['size']}"
    for name, listed in files.items():
        with open(folder / name, "rb") as file:
            if _describe(file) != listed:
                return f"{name} has another SHA-256 than when it was written"
    return None


def write_json(path: str | Path, content: dict) -> None:
    """Write JSON under another name, then rename: a reader never sees half a file. NaN and infinity become null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{UNFINISHED}{path.name}-{os.getpid()}")
    try:
        with open(unfinished, "w") as file:
            file.write(json.dumps(without_nan(content), indent=2, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and run the same command again.") from None


def without_nan(content):
    """Return `content` with None for each NaN and infinity: JSON has neither."""
    if isinstance(content, dict):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextmanager
def unfinished_folder(output_dir: str | Path, name: str, *, needed: int, is_owner: bool = True) -> Iterator[Path]:
    """Give a folder to write `name` in. The owner removes what is left in it, whatever happens.

    Args:
        needed (`int`): bytes that will be written, as far as known.
        is_owner (`bool`): False for all but one of the processes that write into it together.

    Raises:
        SaveError: there is not room enough, or something could not be written.
    """
    output_dir = Path(output_dir)
    folder = output_dir / f"{UNFINISHED}{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_owner and shutil.disk_usage(output_dir).free < needed:
            raise SaveError(_no_room(output_dir, name, needed, "the disk is too full"))
        yield folder
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _is_write_error(error):
            raise
        raise SaveError(_no_room(output_dir, name, needed, str(error))) from error
    finally:
        if is_owner:
            shutil.rmtree(folder, ignore_errors=True)


def _is_write_error(error: Exception) -> bool:
    # torch.save reports a full disk as a RuntimeError of its archive writer
    return (
        not isinstance(error, RuntimeError) or re.search("inline_container|PytorchStreamWriter", str(error)) is not None
    )


def _no_room(output_dir: Path, name: str, needed: int, reason: str) -> str:
    free = shutil.disk_usage(output_dir).free if output_dir.is_dir() else 0
    missing = f", {(needed - free) / 1e6:.1f} MB are missing" if needed > free else ""
    return (
        f"{name} could not be written in {output_dir}: {reason}. About {needed / 1e6:.1f} MB are needed, "
        f"{free / 1e6:.1f} MB are free{missing}. Nothing half is left and earlier checkpoints are kept: make room and "
        "run the same command again."
    )


# ---- the folder of a run ----


def lock_folder(output_dir: str | Path):
    """Keep other processes from training into `output_dir`; the lock ends with this process, however that ends.

    Returns:
        the open lock file: keep it as long as the lock is needed. None where the system has no such locks.

    Raises:
        ValueError: another process trains into the folder, such as one that outlived its launcher.
    """
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return None
    file = open(Path(output_dir) / LOCK, "a+")  # noqa: SIM115 (stays open)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(
            f"Another process (pid {file.read().strip()}) trains into {output_dir}: wait for its end or end it, or use "
            "another --output_dir."
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see to it that only one run writes into it", output_dir, error)
        return file
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def remove_leftovers(output_dir: str | Path) -> None:
    """Remove what a killed process had not finished writing; only under the lock."""
    for path in Path(output_dir).glob(f"{UNFINISHED}*"):
        logger.info("removed: %s, left by a run that was killed", path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_arguments(output_dir: str | Path, arguments: dict) -> None:
    """Compare the arguments of a run that is taken up again with those it was started with, and the content it starts from.

    Raises:
        ValueError: some differ that matter, and there is something to go on from.
    """
    before, now = _started_with(output_dir), json.loads(json.dumps(without_nan(arguments), default=str))
    changed = [
        f"{name} {json.dumps(before[name])}, now {json.dumps(now[name])}"
        for name in sorted(set(before) & set(now))  # another version of the library has other names
        if before[name] != now[name] and name not in VOLATILE and not name.startswith(VOLATILE_BEGINNINGS)
    ]
    if changed:
        raise ValueError(
            f"The run in {output_dir} was started with other arguments: {'; '.join(changed)}. Going on would not be the "
            "same run. Give the old values, or start anew with another --output_dir."
        )
    _refuse_other_content(output_dir, before.get("inputs", {}), now.get("inputs", {}))


def _refuse_other_content(output_dir: str | Path, before: dict[str, str], now: dict[str, str]) -> None:
    changed = [
        f"{name} (SHA-256 {before[name][:12]}..., now {now[name][:12]}...)"
        for name in before
        if name in now and now[name] != before[name]
    ]
    if changed:
        raise ValueError(
            f"The run in {output_dir} was started from other content than is there now: {', '.join(changed)}. Going on would "
            "not be the same run. Bring the old files back, or start anew with another --output_dir."
        )


def warn_of_other_software(output_dir: str | Path, software: dict[str, str]) -> None:
    """Warn where a run that is taken up again was started with other software, or where nothing is known of its start."""
    if not (Path(output_dir) / ARGUMENTS).is_file():
        logger.warning(
            "%s has no %s: whether the run was started with the same arguments and data cannot be told",
            output_dir,
            ARGUMENTS,
        )
    before = _started_with(output_dir).get("software", {})
    changed = [f"{name} {before[name]}, now {now}" for name, now in software.items() if before.get(name, now) != now]
    if changed:
        logger.warning(
            "%s was started with other software: %s. It may not end as an undisturbed run does",
            output_dir,
            "; ".join(changed),
        )


def check_length(output_dir: str | Path, steps: int, *, why_fixed: str | None) -> None:
    """Compare the length of a run that is taken up again with the one it was started for.

    Args:
        steps (`int`): asked for now.
        why_fixed (`str`, *optional*): what in a step depends on the length; None where a run may be lengthened.

    Raises:
        ValueError: the length is another and each step depends on it, or the run is already longer.
    """
    before = _started_with(output_dir).get("total_steps", steps)
    if before == steps:
        return
    if why_fixed:
        raise ValueError(
            f"The run in {output_dir} was started for {before} steps, now it is {steps} (--max_steps, --num_train_epochs): with "
            f"{why_fixed} each step depends on the length, going on would not be the same run. Give the old length, or start "
            "anew with another --output_dir."
        )
    newest = max([int(path.name.rpartition("-")[2]) for path in checkpoints_in(output_dir)], default=0)
    done = max(newest, finished_steps(output_dir) or 0)
    if done > steps:
        raise ValueError(
            f"The run in {output_dir} has made {done} steps, {steps} are asked for (--max_steps, --num_train_epochs): it would "
            f"not end where a run of {steps} steps does. Give {done} or more, or start anew with another --output_dir."
        )


def launched_processes(output_dir: str | Path, default: int) -> int:
    """Return how many processes the run in `output_dir` was started with, `default` where that is not known."""
    return _started_with(output_dir).get("num_processes", default)


def _started_with(output_dir: str | Path) -> dict:
    """Return the arguments of the run in `output_dir`, none where there is nothing to go on from."""
    path = Path(output_dir) / ARGUMENTS
    if not path.is_file() or not (checkpoints_in(output_dir) or (Path(output_dir) / FINISHED).is_file()):
        return {}
    return _read_json(path)


def save_arguments(output_dir: str | Path, arguments: dict) -> None:
    """Keep the arguments of a run beside it."""
    write_json(Path(output_dir) / ARGUMENTS, arguments)


# ---- checkpoints ----


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Return all checkpoint folders, newest first, whole or not."""
    numbered = [
        (int(match.group(1)), path)
        for path in Path(output_dir).glob("checkpoint-*")
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered, reverse=True)]


def name_checkpoint(folder: Path, checkpoint: Path) -> None:
    """Flush and list what `folder` holds, then give it its name; one of the same name, which was damaged, goes."""
    write_json(folder / FILES, {"files": flush_and_sum(folder)})
    if checkpoint.exists():
        _remove_checkpoint(checkpoint)
    os.rename(folder, checkpoint)
    _flush_folder(checkpoint.parent)


def _remove_checkpoint(checkpoint: Path) -> None:
    gone = checkpoint.with_name(f"{UNFINISHED}removal-of-{checkpoint.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(checkpoint, gone)  # a kill leaves no half folder under its name
    shutil.rmtree(gone)


def why_not_whole(checkpoint: str | Path) -> str | None:
    """Return why a checkpoint cannot be used, None where all its files are as they were written."""
    checkpoint = Path(checkpoint)
    if not (checkpoint / FILES).is_file():
        return f"it has no {FILES}, the list of its files"
    try:
        files = json.loads((checkpoint / FILES).read_text())["files"]
        damage = what_is_damaged(checkpoint, files)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{FILES} is damaged"
    found = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    surplus = {path.as_posix() for path in found if not path.name.startswith(".")} - {*files, FILES}
    return damage or (f"{sorted(surplus)[0]} does not belong to it" if surplus else None)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest checkpoint that is whole, None where there are no checkpoints; those passed over are named.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    passed_over = []
    for checkpoint in checkpoints_in(output_dir):
        reason = why_not_whole(checkpoint)
        if reason is None:
            return str(checkpoint)
        logger.warning("passed over: %s is not whole: %s", checkpoint, reason)
        passed_over.append(f"{checkpoint.name} ({reason})")
    if passed_over:
        raise ValueError(
            f"No checkpoint in {output_dir} is whole: {', '.join(passed_over)}. Nothing was started anew. Bring one back "
            "from a copy, or train from the start: remove them or use another --output_dir. (Checkpoints of the stock "
            f"Trainer, which have no {FILES}, cannot be gone on from.)"
        )
    return None


def delete_old_checkpoints(output_dir: str | Path, limit: int | None) -> None:
    """Delete checkpoints that are older than the newest `limit` whole ones; None or 0 keeps all."""
    num_whole = 0
    for checkpoint in checkpoints_in(output_dir) if limit else ():
        if num_whole >= max(limit, MIN_CHECKPOINTS):
            _remove_checkpoint(checkpoint)
        elif (reason := why_not_whole(checkpoint)) is None:
            num_whole += 1
        else:
            logger.warning("%s is not whole: %s", checkpoint, reason)


def steps_of(checkpoint: str | Path) -> int:
    """Return how many optimizer steps a checkpoint has seen."""
    return int(json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"])


# ---- the end of a run ----


def finished_steps(output_dir: str | Path) -> int | None:
    """Return the number of steps of a finished run, None where the run in `output_dir` is not finished."""
    path = Path(output_dir) / FINISHED
    return int(_read_json(path)["steps"]) if path.is_file() else None


def what_is_damaged_of_the_end(output_dir: str | Path) -> str | None:
    """Return what is wrong with the model and results of a finished run, None where they are as they were written."""
    files = _read_json(Path(output_dir) / FINISHED).get("files", {})
    return what_is_damaged(Path(output_dir), files)


def write_end(output_dir: str | Path, write: Callable[[Path], None], *, steps: int, needed: int) -> None:
    """Let `write` fill a folder, move its files to `output_dir` and mark the run as finished, in this order.

    config.json goes first and comes last: nothing takes the folder for a model in between.
    """
    output_dir = Path(output_dir)
    with unfinished_folder(output_dir, "final-model", needed=needed) as folder:
        write(folder)
        files = flush_and_sum(folder)
        for name in (FINISHED, CONFIG):
            (output_dir / name).unlink(missing_ok=True)
        for name in sorted(files, key=lambda name: name == CONFIG):
            (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / name, output_dir / name)
        _flush_folder(output_dir)
        write_json(output_dir / FINISHED, {"steps": steps, "files": files})


def save_final(model: PreTrainedModel, extractor, folder: str | Path) -> None:
    """Write a model and its feature extractor to `folder`: all that `from_pretrained` needs."""
    model.save_pretrained(str(folder))
    extractor.save_pretrained(str(folder))


def project_path(path: str) -> str:
    """Return `path`, or the same path below the project's root where only that exists: recipes name folders so."""
    at_root = Path(__file__).resolve().parent.parent / path
    return str(at_root) if not Path(path).exists() and at_root.exists() else path


def load_extractor(folder: str | Path) -> AnyECGFeatureExtractor:
    """Return the plain feature extractor of a checkpoint; of a rhythm tokenizer its waveform part, without the codes.

    Raises:
        ValueError: `folder` holds no `preprocessor_config.json`.
    """
    path = Path(folder) / EXTRACTOR_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no {EXTRACTOR_FILE}. Give the folder of a model that a training command has written."
        )
    options = set(inspect.signature(AnyECGFeatureExtractor.__init__).parameters) - {"self", "kwargs"}
    stored = json.loads(path.read_text())
    return AnyECGFeatureExtractor(**{name: value for name, value in stored.items() if name in options})
