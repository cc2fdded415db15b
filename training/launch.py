"""How a run was launched: what would not train as it says is refused, and mixed precision in shards is that of a whole model."""

from __future__ import annotations

import dataclasses
import os

import torch
from accelerate.utils import DynamoBackend, FullyShardedDataParallelPlugin
from transformers import Trainer

from .options import NO_COMPILING


def check_launch(trainer: Trainer) -> None:
    """Refuse launches that would not do what they ask for.

    Raises:
        ValueError: FSDP that does not shard, is version 1 or writes checkpoints in shards, options that need whole weights
            beside shards, or compilation.
    """
    args = trainer.args
    if trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(f"ACCELERATE_DYNAMO_BACKEND: not accepted. {NO_COMPILING}")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not trainer.is_fsdp_enabled:
        raise ValueError(
            f"FSDP is asked for, but accelerate does not shard {args.world_size} process(es) on {args.device.type}: it needs "
            "several GPUs. Start it without the FSDP configuration file."
        )
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer.accelerator.state.fsdp_plugin)
    if (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and (trainer.average or trainer.best):
        raise ValueError(
            "--weight_average_decay and --keep_best keep whole copies of the weights, which FSDP and DeepSpeed cut into "
            "shards. Set them to 0 and False, or start without the configuration file of FSDP or DeepSpeed."
        )


def _check_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    form = plugin.state_dict_type.name
    if plugin.fsdp_version != 2 or form != "FULL_STATE_DICT":
        raise ValueError(
            f"FSDP version {plugin.fsdp_version} with state_dict_type {form}: accepted are version 2 and FULL_STATE_DICT, as in "
            "training/recipes/fsdp2.yaml."
        )


def keep_float32_beside_shards(trainer: Trainer) -> None:
    """Let FSDP2 cast the weights alone: samples, losses and the sums of evaluations and gradients stay in float32.

    Accelerate's policy casts all that goes into and out of the model: codes would be made of rounded samples (1 in 1,000 was
    another). The casts of autocast take its place, see `AnyECGTrainer.autocast_smart_context_manager`.
    """
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, cast_forward_inputs=False, output_dtype=None, reduce_dtype=torch.float32
        )
