"""Whether a run goes well, while it goes: patches a second, a collapse noticed, and everything logged in TensorBoard."""

from __future__ import annotations

import time
from pathlib import Path

from transformers.integrations import TensorBoardCallback


class CollapseError(RuntimeError):
    """What is learned has collapsed: the run cannot recover, it stops and says why."""


class PatchRate:
    """Real patches that went through a model, a second."""

    def __init__(self):
        self._patches, self._since = 0, time.monotonic()

    def note(self, batch: dict) -> None:
        if "attention_mask" in batch:
            self._patches = self._patches + batch["attention_mask"].sum()

    def read(self) -> float:
        """Return the rate since this was last called."""
        now = time.monotonic()
        rate = float(self._patches) / max(now - self._since, 1e-9)
        self._patches, self._since = 0, now
        return rate


def refuse_collapse(floors: dict[str, tuple[float, str]], figures: dict[str, float], *, step: int) -> None:
    """Raise `CollapseError` if one of the `figures` just logged lies below its floor.

    Args:
        floors: name of a figure to `(least value, what it means and what to do)`.
    """
    for name, (floor, meaning) in floors.items():
        if name in figures and not figures[name] >= floor:
            raise CollapseError(
                f"Collapse at step {step}: {name} is {figures[name]:.4g}, the floor is {floor:.4g}. {meaning} Training stops, "
                "checkpoints are kept; start again in another --output_dir."
            )


class TensorBoard(TensorBoardCallback):
    """Writes to `<output_dir>/tensorboard`; what a killed run logged after its last checkpoint is taken back."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.tb_writer = self._SummaryWriter(
                log_dir=str(Path(args.output_dir) / "tensorboard"), purge_step=state.global_step + 1
            )
        super().on_train_begin(args, state, control, **kwargs)
