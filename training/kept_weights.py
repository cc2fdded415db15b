"""What is kept beside the model being trained: the average of its weights, its best state so far. Both travel in checkpoints."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

STATE = "parameters and buffers"


class Kept(Protocol):
    """What travels in every checkpoint beside model and optimizer, in a file of its own."""

    values: dict[str, torch.Tensor]

    def save(self, path: Path) -> None: ...

    def load(self, path: Path) -> None: ...


class WeightAverage:
    """Exponential average of the trainable weights; a young one follows faster: min(decay, (1 + t) / (10 + t))."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.values = copy_weights(model)

    @torch.no_grad()
    def update(self, model: nn.Module, *, step: int) -> None:
        """Move the average towards the weights after optimizer step `step` (1, 2, ...)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = {name: value.detach() for name, value in _trainable(model)}
        torch._foreach_lerp_([self.values[name] for name in weights], list(weights.values()), 1 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module):
        own = copy_weights(model)
        write_weights(model, self.values)
        try:
            yield
        finally:
            write_weights(model, own)

    def save(self, path: Path) -> None:
        save_file(self.values, str(path))

    def load(self, path: Path) -> None:
        _require_file(path, "--weight_average_decay")
        stored = load_file(str(path))
        for name, value in self.values.items():
            value.copy_(stored[name])


class BestWeights:
    """The model's state with the best figure so far; kept in every checkpoint, so that none depends on another.

    All of the state, not only what is trained: an encoder belongs with its codebook, a student with its teacher.
    """

    def __init__(self, name: str, *, greater_is_better: bool):
        self.name, self.greater_is_better = name, greater_is_better
        self.values: dict[str, torch.Tensor] = {}
        self.figure: float | None = None
        self.step: int | None = None
        self.evaluated_step: int | None = None

    def note(self, model: nn.Module, metrics: dict[str, float], *, step: int) -> None:
        """Keep the parameters and persistent buffers of `model` if their figure is the best; NaN never is.

        Raises:
            ValueError: the evaluation gives no figure of this name.
        """
        key = self.name if self.name in metrics else f"eval_{self.name}"
        if key not in metrics:
            raise ValueError(
                f"--metric_for_best_model {self.name!r} is no figure of the evaluation: {sorted(metrics)}."
            )
        self.evaluated_step, figure = step, metrics[key]
        is_better = self.step is None or (figure > self.figure if self.greater_is_better else figure < self.figure)
        if is_better and math.isfinite(figure):
            self.values, self.figure, self.step = copy_state(model), float(figure), step

    def put_into(self, model: nn.Module) -> None:
        """Let `model` be as it was at the best step."""
        model.load_state_dict(self.values)

    def save(self, path: Path) -> None:
        facts = json.dumps([self.figure, self.step, self.evaluated_step])
        save_file(self.values, str(path), metadata={"facts": facts, "format": "pt", "holds": STATE})

    def load(self, path: Path) -> None:
        _require_file(path, "--keep_best")
        with safe_open(str(path), framework="pt") as file:
            if file.metadata().get("holds") != STATE:
                raise ValueError(
                    f"{path} is of an earlier version, which kept the trained weights alone, without codebook or teacher: the "
                    "best model cannot be had from it. Start the run in a new --output_dir."
                )
            self.figure, self.step, self.evaluated_step = json.loads(file.metadata()["facts"])
            self.values = {name: file.get_tensor(name) for name in file.keys()}


def _require_file(path: Path, option: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the run was started without {option}. Start it in a new folder.")


def copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of all that `state_dict` holds: parameters, trained or not, and persistent buffers."""
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in model.state_dict().items()
    }


def copy_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the trainable weights."""
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in _trainable(model)}


@torch.no_grad()
def write_weights(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Put `values`, as `copy_weights` gives them, into `model`."""
    for name, parameter in _trainable(model):
        parameter.copy_(values[name])


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]
