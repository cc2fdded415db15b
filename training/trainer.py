"""The Trainer of all three stages: exact means, learning rates by layer, whole checkpoints, a stop on non-finite numbers."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from .arguments import AnyECGTrainingArguments
from .checkpointing import (
    MIN_CHECKPOINTS,
    delete_old_checkpoints,
    name_checkpoint,
    unfinished_folder,
    without_nan,
)
from .data import EpochSampler
from .health import PatchRate, TensorBoard, refuse_collapse
from .kept_weights import BestWeights, Kept, WeightAverage, write_weights
from .launch import check_launch, keep_float32_beside_shards
from .objectives import Objective
from .options import NO_PUSH
from .stopping import stop_if_asked

logger = logging.getLogger(__name__)

AVERAGE_FILE = "average.safetensors"
BEST_FILE = "best.safetensors"
NO_FIGURES = ("_runtime", "_per_second", "_preparation_time", "epoch")  # of the machine and the run, not of the model
MARGIN_BYTES = 2_000_000  # of a checkpoint beside its tensors: configuration, random states, log


class NonFiniteError(RuntimeError):
    """The loss, a gradient or a weight is NaN or infinite: the run cannot go on, the last checkpoint is kept."""


class AnyECGTrainer(Trainer):
    """`Trainer` with data that is random by (seed, epoch, record), parts of the loss in the log, a learning rate a
    layer, an average of the weights, and a stop at the first non-finite loss or gradient.

    Args:
        logged (sequence of `str`): fields of the model's output that are logged beside the loss, as means.
        floors: of logged figures, below which the run stops; see `health.refuse_collapse`.
        inputs: SHA-256 of what the run starts from, by name; see `run_inputs.digest_inputs`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: AnyECGTrainingArguments,
        *,
        logged: Sequence[str] = (),
        floors: dict[str, tuple[float, str]] | None = None,
        inputs: dict[str, str] | None = None,
        **kwargs,
    ):
        callbacks = []
        if "tensorboard" in args.report_to:  # ours goes on after a kill
            args.report_to = [name for name in args.report_to if name != "tensorboard"]
            callbacks.append(TensorBoard())
        super().__init__(model, args, callbacks=callbacks, **kwargs)
        self.floors, self._patch_rate = floors or {}, PatchRate()
        self.inputs = inputs or {}
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
        check_launch(self)
        keep_float32_beside_shards(self)
        self._skeleton = skeleton_of(self.model) if self.is_fsdp_enabled or self.is_deepspeed_enabled else None

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch_size = self.get_total_train_batch_size(self.args)
        self._sampler = EpochSampler(len(dataset), seed=seed, batch_size=batch_size)
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

    def _prepare_input(self, data):
        """Under DeepSpeed the library casts samples to the type of the weights: codes would be those of rounded samples."""
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def autocast_smart_context_manager(self, cache_enabled=True):
        """Accelerate wraps a whole model's forward in autocast, and not that of a model in shards of FSDP2."""
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().autocast_smart_context_manager()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._note_parts(outputs, are_shares=num_items_in_batch is not None)
            self._patch_rate.note(inputs)
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        """Return over how many items the means of the loss go, over all micro-batches and processes, by name.

        So the loss of a step does not depend on how its batch is divided. None where the model does not count: then the
        library takes the mean over micro-batches and processes.
        """
        if not hasattr(self.model, "count_items") or not batch_samples:
            return None
        counts = [self.model.count_items(batch) for batch in batch_samples]
        if not counts[0]:
            return None
        totals = torch.stack([sum(count[name] for count in counts) for name in counts[0]]).to(device)
        return dict(zip(counts[0], self.accelerator.reduce(totals, reduction="sum"), strict=True))

    def _note_parts(self, outputs, *, are_shares: bool) -> None:
        """Add up the parts for the log; `are_shares`: a "loss_..." is this micro-batch's share of that of the step."""
        num_shares = self.accelerator.num_processes * self.current_gradient_accumulation_steps if are_shares else 1
        for name in self.logged:
            value, count = self._parts.get(name, (0.0, 0))
            part = outputs[name].detach().float() * (num_shares if name.startswith("loss_") else 1)
            self._parts[name] = (value + part, count + 1)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = logs | self._mean_parts() | self.state_figures()
            logs["patches_per_second"] = self._patch_rate.read() * self.args.world_size
        super().log(logs, start_time)
        refuse_collapse(self.floors, logs, step=self.state.global_step)

    def _mean_parts(self) -> dict[str, float]:
        """Return the means of the parts since they were last asked for, over all processes."""
        if not self._parts:
            return {}
        means = torch.stack([value / count for value, count in self._parts.values()])
        names, self._parts = list(self._parts), {}
        return dict(zip(names, self.accelerator.reduce(means, reduction="mean").tolist(), strict=True))

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
        """Return the figures of the average of the weights, where there is one; without times, which never repeat,
        and without the epoch, which is not that of the best weights."""
        with self.averaged_weights():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            metrics = {name: value for name, value in metrics.items() if not name.endswith(NO_FIGURES)}
            is_whole = metric_key_prefix == "eval"  # else one of several evaluation sets
            if self.best is not None and self.is_in_train and is_whole and self.can_be_best():
                self.best.note(self.model, metrics, step=self.state.global_step)
        return metrics

    def can_be_best(self) -> bool:
        """Return whether the model is by now one that the run may end with."""
        return True

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

    def push_to_hub(self, *args, **kwargs):
        """Raise: the library would upload the whole output folder, unverified."""
        raise ValueError(f"push_to_hub: not accepted. {NO_PUSH}")

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
                for kept, file_name in self.kept_state():
                    kept.save(folder / name / file_name)
            self.accelerator.wait_for_everyone()  # each process writes its own random state, or shard
            if is_first:
                name_checkpoint(folder / name, output_dir / name)
        if is_first:
            delete_old_checkpoints(output_dir, self.args.save_total_limit)

    def require_finite(self) -> None:
        """Raise `NonFiniteError` where a number that a checkpoint would hold is NaN or infinite."""
        kept = [(f"{file} {name}", value) for kept, file in self.kept_state() for name, value in kept.values.items()]
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
        kept = [value for kept, _ in self.kept_state() for value in kept.values.values()]
        optimizer = [value for _, value in self._optimizer_values()]
        values = [*self.model.parameters(), *self.model.buffers(), *kept, *optimizer]
        return sum(value.numel() * value.element_size() for value in values) + MARGIN_BYTES

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for kept, name in self.kept_state():
            kept.load(Path(resume_from_checkpoint) / name)

    def kept_state(self) -> list[tuple[Kept, str]]:
        """Return what is kept beside model and optimizer, with the name of its file in a checkpoint."""
        pairs = [(self.average, AVERAGE_FILE), (self.best, BEST_FILE)]
        return [(kept, name) for kept, name in pairs if kept is not None]

    def take_whole_model(self) -> None:
        """Let the model be a plain one with all its weights on every process, where it was trained in shards."""
        if self._skeleton is None:
            return
        if self.is_deepspeed_enabled:
            values = _gathered_by_deepspeed(self.model)
        else:
            values = {name: _whole(value) for name, value in self.model.state_dict().items()}
        self._skeleton.load_state_dict(values, assign=True)
        self.model = self.model_wrapped = self._skeleton.to(self.args.device)

    def take_final_weights(self) -> None:
        """Let the model be what the run ends with: the best, else with averaged weights, else the last.

        From here on evaluations are of these weights, the average is given up.
        """
        if self.best is not None and self.best.step is not None:
            logger.info("best %s on fold 9: %.4f at step %d", self.best.name, self.best.figure, self.best.step)
            self.best.put_into(self.model)
        elif self.average is not None:
            write_weights(self.model, self.average.values)
        if self.best is not None and self.best.step is None:
            logger.warning(
                "--keep_best: no evaluation gave a finite %s, the run ends with the last weights", self.best.name
            )
        self.average = None


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
    if args.keep_best and args.metric_for_best_model is None:
        raise ValueError(
            "--keep_best needs --metric_for_best_model: the name of a figure of the evaluation, such as loss, fve (quantizer) or "
            "random_cross_entropy (masked codes); and --greater_is_better where its name does not tell."
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


def skeleton_of(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose parameters are on the meta device: nothing of its weights is copied."""
    empty = {
        id(value): nn.Parameter(value.to("meta"), requires_grad=value.requires_grad) for value in model.parameters()
    }
    return copy.deepcopy(model, empty)


def _whole(value: torch.Tensor) -> torch.Tensor:
    """Return `value` gathered from all processes where each holds a shard of it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _gathered_by_deepspeed(model: nn.Module) -> dict[str, torch.Tensor]:
    from deepspeed import zero

    with zero.GatheredParameters(list(model.parameters())):  # whole already in stage 2
        values = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in values.items()}


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

    def on_prediction_step(self, args, state, control, **kwargs):
        stop_if_asked()

    def on_step_begin(self, args, state, control, **kwargs):
        stop_if_asked()
        # dropout of a step follows from (seed, step, process): what was drawn between steps (by a loader, by an
        # evaluation) before or after a restart does not matter
        words = np.random.SeedSequence((args.seed, state.global_step, args.process_index)).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]))
        if isinstance(self.trainer.model, Objective):
            self.trainer.model.progress = state.global_step / max(1, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True  # whatever --logging_steps: floors are checked in the log, before the last save

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients = [value.grad for value in self.trainer.model.parameters() if value.grad is not None]
        if not torch.isfinite(_whole(nn.utils.get_total_norm(gradients))):
            raise NonFiniteError(
                f"A gradient of step {state.global_step + 1} is not finite: training stops before it is applied, "
                "checkpoints are kept. Lower --learning_rate or raise --warmup_steps."
            )

    def on_optimizer_step(self, args, state, control, **kwargs):
        if isinstance(self.trainer.model, Objective):
            self.trainer.model.after_step()
        if self.trainer.average is not None:
            self.trainer.average.update(self.trainer.model, step=state.global_step + 1)
