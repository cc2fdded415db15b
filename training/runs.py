"""How a run goes: taken up from the last whole checkpoint, trained to the end, its results written and marked as finished."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from transformers import Trainer, TrainerState, TrainingArguments

from .checkpointing import (
    RESULTS,
    check_arguments,
    check_length,
    checkpoints_in,
    finished_steps,
    last_checkpoint,
    launched_processes,
    lock_folder,
    remove_leftovers,
    save_arguments,
    save_final,
    steps_of,
    warn_of_other_software,
    what_is_damaged_of_the_end,
    write_end,
    write_json,
)
from .objectives import Objective
from .run_inputs import describe_software
from .trainer import AnyECGTrainer, require_finite

logger = logging.getLogger(__name__)

LENGTH_FREE_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")


def run_training(trainer: AnyECGTrainer, *, arguments: Sequence) -> None:
    """Train to the end, from the newest whole checkpoint of the output folder or from the start; see `trainer.model` then.

    A run whose last checkpoint is at the last step is only loaded: it was stopped while its results were written.
    """
    logger.info(describe_processes(trainer))
    checkpoint = _take_folder(trainer, _plain(trainer, arguments))
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
    trainer.take_whole_model()
    # without the precision wrapper of training: results are measured in float32, as users run the model
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def _take_folder(trainer: AnyECGTrainer, arguments: dict) -> str | None:
    """Lock and tidy the output folder; return the checkpoint to go on from, the same on every process."""
    checkpoint, output_dir = None, trainer.args.output_dir
    if trainer.is_world_process_zero():
        trainer.folder_lock = lock_folder(output_dir)
        remove_leftovers(output_dir)
        checkpoint = last_checkpoint(output_dir)
        if checkpoint is not None:
            warn_of_other_software(output_dir, arguments["software"])
            if steps_of(checkpoint) >= total_steps(
                trainer
            ):  # only results are to be written: it was trained as launched before
                arguments = arguments | {"num_processes": launched_processes(output_dir, arguments["num_processes"])}
        save_arguments(output_dir, arguments)
    return broadcast_object_list([checkpoint])[0]


def describe_processes(trainer: Trainer) -> str:
    """Return one line on how many processes train together and how they divide a batch: a launch can start fewer."""
    args, num = trainer.args, trainer.args.world_size
    form = "one process" if num == 1 else f"{num} processes"
    shards = "weights in shards" if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else "weights whole"
    total = trainer.get_total_train_batch_size(args)
    return (
        f"{form} on {args.device.type}, {shards}; a step takes {total} records = {num} x "
        f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} (processes x batch x accumulation)"
    )


def total_steps(trainer: Trainer) -> int:
    """Return the number of optimizer steps that the arguments ask for."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    steps_per_epoch = max(1, math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * steps_per_epoch)


def _load_trained(trainer: AnyECGTrainer, checkpoint: str) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"Training was complete at {checkpoint}, its results were not written. Start the same command once more as one "
            f"process, without the configuration file of FSDP or DeepSpeed, with --max_steps {steps_of(checkpoint)}."
        )
    logger.info("training was complete at %s, step %d", checkpoint, steps_of(checkpoint))
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if (Path(checkpoint) / "pytorch_model_fsdp.bin").is_file():  # which the library takes up in shards only
        trainer.model.load_state_dict(load_file(str(Path(checkpoint) / "model.safetensors")))
    else:
        trainer._load_from_checkpoint(checkpoint)
    # as training does, so that evaluations do not wrap it later in mixed precision, after it was unwrapped
    trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)


def is_finished(trainer: Trainer, arguments: Sequence) -> bool:
    """Return whether the run in the output folder has ended whole at the steps asked for, and say so.

    Raises:
        ValueError: the run was started with other arguments, from other content or for another length that matters, or its end
            is damaged and no checkpoint is left.
    """
    output_dir, plain = trainer.args.output_dir, _plain(trainer, arguments)
    newest = checkpoints_in(output_dir)[:1]
    if newest and int(newest[0].name.rpartition("-")[2]) >= trainer.args.max_steps > 0:
        del plain["num_processes"]  # only the results are to be written, which one process does
    check_arguments(output_dir, plain)
    check_length(output_dir, plain["total_steps"], why_fixed=_why_the_length_is_fixed(trainer))
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


def describe_end(trainer: AnyECGTrainer) -> dict:
    """Return how many steps a run has made and, with `--keep_best`, after which of them its weights are taken."""
    return {"steps": trainer.state.global_step, "best_step": trainer.best.step if trainer.best else None}


def records_seen(trainer: AnyECGTrainer) -> int:
    """Return how many records a run has trained on, in as many processes as it was launched with: one may end the run alone."""
    args = trainer.args
    each = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return trainer.state.global_step * each * launched_processes(args.output_dir, args.world_size)


def _why_the_length_is_fixed(trainer: AnyECGTrainer) -> str | None:
    """Return what in a step depends on how many steps the run will have, None where nothing does."""
    args = trainer.args
    if args.lr_scheduler_type not in LENGTH_FREE_SCHEDULES:
        return f"--lr_scheduler_type {args.lr_scheduler_type.value}"
    if 0 < args.warmup_steps < 1:
        return f"--warmup_steps {args.warmup_steps}, a share of the run,"
    if isinstance(trainer.model, Objective) and trainer.model.follows_length:
        return f"objective {type(trainer.model).__name__}"
    return None


def _plain(trainer: AnyECGTrainer, arguments: Sequence) -> dict:
    """Return all that a run follows from as one dictionary: the arguments (`TrainingArguments` masks its tokens), the launch,
    the length, the content it starts from."""
    merged: dict = {}
    for instance in arguments:
        if isinstance(instance, TrainingArguments):
            merged |= instance.to_dict() | {"num_processes": instance.world_size}
        else:
            merged |= dataclasses.asdict(instance)
    if trainer.best is not None:
        merged["metric_for_best_model"] = trainer.best.name  # the library is told none
    inputs = {"inputs": trainer.inputs, "software": describe_software()}
    return merged | inputs | {"total_steps": total_steps(trainer)}
