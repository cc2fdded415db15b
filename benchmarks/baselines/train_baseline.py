"""`training.finetune` with a network of this folder: `preset` names it, `config` overrides single fields of its configuration."""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from training import finetune
from training.arguments import ModelArguments
from training.labels import Task

from . import NETWORKS
from .windows import WindowedClassifier


def build_model(model_args: ModelArguments, task: Task, targets: np.ndarray) -> WindowedClassifier:
    """Return a new network with its head at the labels' frequencies, as AnyECG's is started.

    Raises:
        ValueError: unknown network or field of its configuration, or weights to start from.
    """
    if model_args.init_from or model_args.preset not in NETWORKS:
        raise ValueError(
            f"--preset {model_args.preset}, --init_from {model_args.init_from}: a baseline is one of {', '.join(NETWORKS)}, "
            "and starts from scratch."
        )
    config_class, model_class = NETWORKS[model_args.preset]
    overrides, known = model_args.overrides(), {field.name for field in fields(config_class)}
    if set(overrides) - known:
        raise ValueError(f"--config {sorted(set(overrides) - known)}: no fields of {config_class.__name__}.")
    config = config_class(**overrides, id2label=task.id2label, label2id=task.label2id, problem_type=task.problem_type)
    model = model_class(config)
    finetune.start_head(model.classifier, task, targets)
    return model


def main(argv: Sequence[str]) -> None:
    finetune.main(argv, build_model=build_model)
