"""The Trainer of all three stages, and how a command runs it: resume, stop on non-finite numbers, finish."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from .arguments import AnyECGTrainingArguments
from .checkpointing import (
    MIN_CHECKPOINTS,
    RESULTS,
    SaveError,
    check_arguments,
    checkpoints_in,
    delete_old_checkpoints,
    finished_steps,
    last_checkpoint,
    lock_folder,
    name_checkpoint,
    remove_leftovers,
    save_arguments,
    save_final,
    steps_of,
    unfinished_folder,
    what_is_damaged_of_the_end,
    without_nan,
    write_end,
    write_json,
)
from .data import EpochSampler
from .health import CollapseError, PatchRate, TensorBoard, refuse_collapse
from .objectives import Objective

logger = logging.getLogger(__name__)

AVERAGE_FILE = "average.safetensors"
BEST_FILE = "best.safetensors"
TIMES = ("_runtime", "_per_second", "_preparation_time")  # figures of the machine, not of the model
MARGIN_BYTES = 2_000_000  # of a checkpoint beside its tensors: configuration, random states, log


class NonFiniteError(RuntimeError):
    """The loss, a gradient or a weight is NaN or infinite: the run cannot go on, the last checkpoint is kept."""


class Terminated(BaseException):
    """SIGTERM has arrived."""


class AnyECGTrainer(Trainer):
    """`Trainer` with data that is random by (seed, epoch, record), parts of the loss in the log, a learning rate a
    layer, an average of the weights, and a stop at the first non-finite loss or gradient.

    Args:
        logged (sequence of `str`): fields of the model's output that are logged beside the loss, as means.
        floors: of logged figures, below which the run stops; see `health.refuse_collapse`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: AnyECGTrainingArguments,
        *,
        logged: Sequence[str] = (),
        floors: dict[str, tuple[float, str]] | None = None,
        **kwargs,
    ):
        callbacks = []
        if "tensorboard" in args.report_to:  # ours goes on after a kill
            args.report_to = [name for name in args.report_to if name != "tensorboard"]
            callbacks.append(TensorBoard())
        super().__init__(model, args, callbacks=callbacks, **kwargs)
        self.floors, self._patch_rate = floors or {}, PatchRate()
        _refuse_what_cannot_be_taken_up(self.args)
        self.best = None
        if self.args.keep_best:
            name, self.args.metric_for_best_model = (
                self.args.metric_for_best_model,
                None,
            )  # kept here, not by the library
            self.best = BestWeights(name, greater_is_better=self.args.greater_is_better)
        self.logged = tuple(logged)
        self._parts: dict[str, tuple[float, int]] = {}
        self._sampler: EpochSampler | None = None
        self._unfinished: Path | None = None
        self.average = (
            WeightAverage(self.model, self.args.weight_average_decay) if self.args.weight_average_decay else None
        )
        self.add_callback(_StepCallback(self))

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = EpochSampler(len(dataset), seed=seed)
        return self._sampler

    def set_data_epoch(self, epoch: int) -> None:
        """Tell the sampler the epoch. Accelerate does so too, but not through every wrapper of a resumed run."""
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}: training stops, checkpoints are kept."
                " Lower --learning_rate, raise --warmup_steps or lower --max_grad_norm; is a record damaged?"
            )
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._note_parts(outputs)
            self._patch_rate.note(inputs)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """Return over how many items the means of the loss go, over all micro-batches and processes, by name.

        So the loss of a step does not depend on how its batch is divided. None where the model does not count.
        """
        if not hasattr(self.model, "count_items") or not batch_samples:
            return None
        counts = [self.model.count_items(batch) for batch in batch_samples]
        totals = {name: sum(count[name] for count in counts).to(device) for name in counts[0]}
        return self.accelerator.reduce(totals, reduction="sum")

    def _note_parts(self, outputs) -> None:
        for name in self.logged:
            value, count = self._parts.get(name, (0.0, 0))
            self._parts[name] = (value + outputs[name].detach().float(), count + 1)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = logs | {name: float(value / count) for name, (value, count) in self._parts.items()}
            logs = logs | self.state_figures() | {"patches_per_second": self._patch_rate.read()}
            self._parts = {}
        super().log(logs, start_time)
        refuse_collapse(self.floors, logs, step=self.state.global_step)

    def state_figures(self) -> dict[str, float]:
        """Return figures of the model's own state, to be logged beside the loss."""
        return {}

    def get_decay_parameter_names(self, model):
        """Return matrices and kernels: vectors (biases, norms, scales, tokens) and embedding tables do not decay."""
        return [name for name, value in model.named_parameters() if value.ndim >= 2 and "embedding" not in name]

    def create_optimizer(self, model=None):
        """Build the optimizer, with a learning rate for each layer where `layer_decay` is below 1."""
        if self.optimizer is None and self.args.layer_decay < 1.0:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(self._layer_groups(options["lr"]), **options)
        return super().create_optimizer(model)

    def _layer_groups(self, learning_rate: float) -> list[dict]:
        decaying = set(self.get_decay_parameter_names(self.model))
        depth = 1 + max((layer_of(name) or 0) for name, _ in self.model.named_parameters())
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, value in self.model.named_parameters():
            if value.requires_grad:
                layer = layer_of(name)
                groups.setdefault((depth if layer is None else layer, name in decaying), []).append(value)
        return [
            {
                "params": values,
                "lr": learning_rate * self.args.layer_decay ** (depth - layer),
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            for (layer, decays), values in sorted(groups.items(), key=lambda item: item[0], reverse=True)
        ]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Return the figures of the average of the weights, where there is one; without times, which never repeat."""
        with self.averaged_weights():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            metrics = {name: value for name, value in metrics.items() if not name.endswith(TIMES)}
            is_whole = metric_key_prefix == "eval"  # else one of several evaluation sets
            if self.best is not None and self.is_in_train and is_whole:
                self.best.note(self.model, metrics, step=self.state.global_step)
        return metrics

    def evaluate_last_step(self) -> None:
        """Evaluate the last weights where the evaluation interval did not end with them: they may be the best."""
        if self.best is not None and self.best.evaluated_step != self.state.global_step:
            with self.averaged_weights():
                self.best.note(self.model, super().evaluate(), step=self.state.global_step)

    def _determine_best_metric(self, metrics, trial):
        return False  # `BestWeights` keeps them; the library would note a folder that is deleted later

    @contextmanager
    def averaged_weights(self):
        """Let the model hold the average of its weights for a while, where there is one."""
        if self.average is None:
            yield
            return
        with self.average.applied_to(self.model):
            yield

    def _get_output_dir(self, trial):
        return str(self._unfinished) if self._unfinished else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint under another name, list its files, give it its name, then delete old ones."""
        self.require_finite()
        self.state.log_history = without_nan(self.state.log_history)
        output_dir, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        is_first = self.is_world_process_zero()
        with unfinished_folder(output_dir, name, needed=self._bytes_to_write(), is_owner=is_first) as folder:
            self._unfinished = folder
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished = None
            if is_first:
                for kept, file_name in self._kept_weights():
                    kept.save(folder / name / file_name)
            self.accelerator.wait_for_everyone()  # each process writes its own random state, or shard
            if is_first:
                name_checkpoint(folder / name, output_dir / name)
        if is_first:
            delete_old_checkpoints(output_dir, self.args.save_total_limit)

    def require_finite(self) -> None:
        """Raise `NonFiniteError` where a number that a checkpoint would hold is NaN or infinite."""
        kept = [(f"{file} {name}", value) for kept, file in self._kept_weights() for name, value in kept.values.items()]
        require_finite(
            [*self.model.named_parameters(), *self.model.named_buffers(), *kept, *self._optimizer_values()],
            when=f"after step {self.state.global_step}",
            advice="It is not written, earlier checkpoints are kept. Lower --learning_rate or raise --warmup_steps.",
        )

    def _optimizer_values(self) -> list[tuple[str, torch.Tensor]]:
        if self.optimizer is None:
            return []
        states = [state for state in self.optimizer.state.values() if isinstance(state, dict)]
        return [(f"optimizer {key}", x) for state in states for key, x in state.items() if isinstance(x, torch.Tensor)]

    def _bytes_to_write(self) -> int:
        kept = [value for kept, _ in self._kept_weights() for value in kept.values.values()]
        optimizer = [value for _, value in self._optimizer_values()]
        values = [*self.model.parameters(), *self.model.buffers(), *kept, *optimizer]
        return sum(value.numel() * value.element_size() for value in values) + MARGIN_BYTES

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for kept, name in self._kept_weights():
            kept.load(Path(resume_from_checkpoint) / name)

    def _kept_weights(self) -> list[tuple[WeightAverage | BestWeights, str]]:
        pairs = [(self.average, AVERAGE_FILE), (self.best, BEST_FILE)]
        return [(kept, name) for kept, name in pairs if kept is not None]

    def take_final_weights(self) -> None:
        """Let the model hold the weights that the run ends with: the best, else the average, else the last."""
        if self.best is not None and self.best.step is not None:
            logger.info("best %s on fold 9: %.4f at step %d", self.best.name, self.best.figure, self.best.step)
            write_weights(self.model, self.best.values)
        elif self.average is not None:
            write_weights(self.model, self.average.values)


def _refuse_what_cannot_be_taken_up(args: TrainingArguments) -> None:
    """Refuse options with which a run that was killed would not end as if it had not been."""
    if args.load_best_model_at_end:
        raise ValueError(
            "--load_best_model_at_end: use --keep_best True, which keeps the best weights in each checkpoint."
        )
    if args.save_only_model or args.ignore_data_skip:
        raise ValueError(
            "--save_only_model and --ignore_data_skip: a killed run could not be taken up; leave them out."
        )
    if args.save_strategy == "best":
        raise ValueError("--save_strategy best: use steps or epoch, and --keep_best True.")
    if args.keep_best and (args.eval_on_start or (args.eval_strategy == "epoch" and args.save_strategy == "steps")):
        raise ValueError(
            "--keep_best with --eval_on_start, or with --eval_strategy epoch and --save_strategy steps: a run taken up "
            "from a checkpoint would choose among other evaluations. Use the same strategy for both."
        )
    if args.save_total_limit is not None and 0 < args.save_total_limit < MIN_CHECKPOINTS:
        logger.warning("--save_total_limit %d is raised to %d", args.save_total_limit, MIN_CHECKPOINTS)
        args.save_total_limit = MIN_CHECKPOINTS


def require_finite(named: Iterable[tuple[str, torch.Tensor]], *, when: str, advice: str) -> None:
    """Raise `NonFiniteError` with the name of the first value that is NaN or infinite."""
    for name, value in named:
        own = value.to_local() if hasattr(value, "to_local") else value  # of a sharded one, this process's part
        if not torch.isfinite(own).all():
            raise NonFiniteError(f"{name} is not finite {when}. {advice}")


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
    """The weights with the best figure so far; kept in every checkpoint, so that none depends on another."""

    def __init__(self, name: str, *, greater_is_better: bool):
        self.name, self.greater_is_better = name, greater_is_better
        self.values: dict[str, torch.Tensor] = {}
        self.figure: float | None = None
        self.step: int | None = None
        self.evaluated_step: int | None = None

    def note(self, model: nn.Module, metrics: dict[str, float], *, step: int) -> None:
        """Keep the weights of `model` if their figure is the best; NaN never is.

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
            self.values, self.figure, self.step = copy_weights(model), float(figure), step

    def save(self, path: Path) -> None:
        facts = json.dumps([self.figure, self.step, self.evaluated_step])
        save_file(self.values, str(path), metadata={"facts": facts, "format": "pt"})

    def load(self, path: Path) -> None:
        _require_file(path, "--keep_best")
        with safe_open(str(path), framework="pt") as file:
            self.figure, self.step, self.evaluated_step = json.loads(file.metadata()["facts"])
            self.values = {name: file.get_tensor(name) for name in file.keys()}


def _require_file(path: Path, option: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the run was started without {option}. Start it in a new folder.")


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


def layer_of(name: str) -> int | None:
    """Return the depth of a parameter: 0 embeddings, 1 ... the layers, None what comes after (final norm, heads)."""
    if "embeddings." in name:
        return 0
    match = re.search(r"encoder\.layers\.(\d+)\.", name)
    return int(match.group(1)) + 1 if match else None


class _StepCallback(TrainerCallback):
    """What the Trainer's loop has no method for: epoch to the sampler, seeds, gradients looked at, average and teacher."""

    def __init__(self, trainer: AnyECGTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.set_data_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        # dropout of a step follows from (seed, step, process): what was drawn between steps (by a loader, by an
        # evaluation) before or after a restart does not matter
        words = np.random.SeedSequence((args.seed, state.global_step, args.process_index)).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]))
        if isinstance(self.trainer.model, Objective):
            self.trainer.model.progress = state.global_step / max(1, state.max_steps)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = [value.grad for value in self.trainer.model.parameters() if value.grad is not None]
        if not torch.isfinite(nn.utils.get_total_norm(gradients)):
            raise NonFiniteError(
                f"A gradient of step {state.global_step + 1} is not finite: training stops before it is applied, "
                "checkpoints are kept. Lower --learning_rate or raise --warmup_steps."
            )

    def on_optimizer_step(self, args, state, control, **kwargs):
        if isinstance(self.trainer.model, Objective):
            self.trainer.model.after_step()
        if self.trainer.average is not None:
            self.trainer.average.update(self.trainer.model, step=state.global_step + 1)


def run_training(trainer: AnyECGTrainer, *, arguments: Sequence) -> None:
    """Train to the end, from the newest whole checkpoint of the output folder or from the start; see `trainer.model` then.

    A run whose last checkpoint is at the last step is only loaded: it was stopped while its results were written.
    """
    checkpoint = _take_folder(trainer, _plain(arguments))
    require_finite(
        trainer.model.state_dict().items(), when="before the first step", advice="Take another model for --init_from."
    )
    if checkpoint is not None and steps_of(checkpoint) >= total_steps(trainer):
        _load_trained(trainer, checkpoint)
    else:
        if checkpoint is not None:
            logger.info("going on from %s, step %d", checkpoint, steps_of(checkpoint))
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.require_finite()
    trainer.evaluate_last_step()
    trainer.take_final_weights()
    # without the precision wrapper of training: results are measured in float32, as users run the model
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _take_folder(trainer: AnyECGTrainer, arguments: dict) -> str | None:
    """Lock and tidy the output folder; return the checkpoint to go on from, the same on every process."""
    checkpoint, output_dir = None, trainer.args.output_dir
    if trainer.is_world_process_zero():
        trainer.folder_lock = lock_folder(output_dir)
        remove_leftovers(output_dir)
        checkpoint = last_checkpoint(output_dir)
        save_arguments(output_dir, arguments)
    return broadcast_object_list([checkpoint])[0]


def total_steps(trainer: Trainer) -> int:
    """Return the number of optimizer steps that the arguments ask for."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    steps_per_epoch = max(1, math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * steps_per_epoch)


def _load_trained(trainer: AnyECGTrainer, checkpoint: str) -> None:
    logger.info("training was complete at %s, step %d", checkpoint, steps_of(checkpoint))
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    trainer._load_from_checkpoint(checkpoint)
    # as training does, so that evaluations do not wrap it later in mixed precision, after it was unwrapped
    trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)


def is_finished(trainer: Trainer, arguments: Sequence) -> bool:
    """Return whether the run in the output folder has ended whole at the steps asked for, and say so.

    Raises:
        ValueError: the run was started with other arguments, or its end is damaged and no checkpoint is left.
    """
    output_dir = trainer.args.output_dir
    check_arguments(output_dir, _plain(arguments))
    done = finished_steps(output_dir)
    if done is None or done < total_steps(trainer):
        return False
    damage = what_is_damaged_of_the_end(output_dir)
    if damage is None:
        logger.info("%s is finished (%d steps): nothing to do. Another --output_dir starts anew.", output_dir, done)
        return True
    if not checkpoints_in(output_dir):
        raise ValueError(
            f"The run in {output_dir} was finished, but {damage}, and no checkpoint is left to write it from. Bring the "
            "file back from a copy, or train again in another --output_dir."
        )
    logger.warning("%s was finished, but %s: written again from the last checkpoint", output_dir, damage)
    return False


def finish(trainer: AnyECGTrainer, report: dict, *, save: Callable = save_final) -> None:
    """Write the model (by `save(model, extractor, folder)`) and its results, and mark the run as finished."""
    if not trainer.is_world_process_zero():
        return

    def write(folder: Path) -> None:
        save(trainer.model, trainer.processing_class, folder)
        write_json(folder / RESULTS, report)

    output_dir = trainer.args.output_dir
    write_end(output_dir, write, steps=total_steps(trainer), needed=trainer._bytes_to_write())
    logger.info("finished: %s", output_dir)


def start_logging() -> None:
    """Log progress to standard error: this project's messages (of the first process), and the libraries' warnings."""
    level = logging.INFO if int(os.environ.get("LOCAL_RANK", "0")) == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for package in ("training", "tokenization", "anyecg_hf", "__main__"):
        logging.getLogger(package).setLevel(level)
    transformers_logging.set_verbosity_warning()


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Run `main` on the command line. What a user can meet ends with one line and code 1; a signal with its own code."""
    start_logging()
    try:
        with _sigterm_as_exception():
            main(sys.argv[1:])
    except (KeyboardInterrupt, Terminated) as stop:
        name, code = ("SIGTERM", 143) if isinstance(stop, Terminated) else ("Ctrl-C", 130)
        print(f"stopped by {name}: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(code)
    except (ValueError, OSError, NonFiniteError, CollapseError, SaveError) as error:
        _exit_with(error, str(error))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        _exit_with(
            error,
            f"A process that reads records died ({error}). Most often memory ran out: lower --dataloader_num_workers "
            "(0: none). Checkpoints are kept: the same command goes on from the last one.",
        )


def _exit_with(error: Exception, text: str) -> None:
    if os.environ.get("ANYECG_TRACEBACK"):
        raise error
    if text.startswith("Caught "):  # from a worker, with its traceback: the last line is the message
        text = text.strip().rpartition("\n")[2]
    sys.exit(f"error: {text} (ANYECG_TRACEBACK=1 shows where)")


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Let SIGTERM clean up like Ctrl-C does. Processes forked meanwhile die of it as usual."""
    own = os.getpid()

    def stop(number, frame):
        if os.getpid() == own:
            raise Terminated
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _plain(arguments: Sequence) -> dict:
    """Return all argument dataclasses as one dictionary (`TrainingArguments` masks its tokens), with the launch."""
    merged: dict = {}
    for instance in arguments:
        if isinstance(instance, TrainingArguments):
            merged |= instance.to_dict() | {"num_processes": instance.world_size}
        else:
            merged |= dataclasses.asdict(instance)
    return merged
