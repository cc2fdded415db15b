"""The folders a run writes: checkpoints to go on from, the final model, the mark that it is finished.

All commands write and read them through this file.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
from pathlib import Path

from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor

logger = logging.getLogger(__name__)

FINISHED = "run_finished.json"
ARGUMENTS = "run_arguments.json"
EXTRACTOR_FILE = "preprocessor_config.json"
VOLATILE = {"output_dir", "max_steps", "num_train_epochs", "logging_steps", "num_proc", "cache_dir", "disable_tqdm"}


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the folder of the newest checkpoint in `output_dir`, None where there is none."""
    return get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None


def steps_of(checkpoint: str | Path) -> int:
    """Return how many optimizer steps a checkpoint has seen."""
    return int(json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"])


def finished_steps(output_dir: str | Path) -> int | None:
    """Return the number of steps of a finished run, None where the run in `output_dir` is not finished."""
    path = Path(output_dir) / FINISHED
    return int(json.loads(path.read_text())["steps"]) if path.is_file() else None


def mark_finished(output_dir: str | Path, *, steps: int) -> None:
    write_json(Path(output_dir) / FINISHED, {"steps": steps})


def write_json(path: str | Path, content: dict) -> None:
    """Write JSON under another name, then rename: a reader never sees half a file. NaN and infinity become null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(_without_nan(content), indent=2, default=str) + "\n")
    os.replace(unfinished, path)


def _without_nan(content):
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def save_arguments(output_dir: str | Path, arguments: dict) -> None:
    """Keep the arguments of a run beside it; warn where a run that is taken up again was started with others."""
    path = Path(output_dir) / ARGUMENTS
    arguments = json.loads(json.dumps(arguments, default=str))
    if path.is_file():
        before = json.loads(path.read_text())
        changed = {
            name: (before.get(name), arguments.get(name))
            for name in sorted(set(before) | set(arguments))
            if name not in VOLATILE and before.get(name) != arguments.get(name)
        }
        if changed:
            logger.warning("%s was started with other arguments (before, now): %s", output_dir, changed)
    write_json(path, arguments)


def save_final(model: PreTrainedModel, extractor, output_dir: str | Path) -> None:
    """Write the finished model and its feature extractor to `output_dir`: a complete folder for `from_pretrained`."""
    model.save_pretrained(str(output_dir))
    extractor.save_pretrained(str(output_dir))
    (Path(output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle; run_arguments.json says the same
    logger.info("model saved in %s", output_dir)


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
