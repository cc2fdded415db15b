"""training.options: what the library takes and these runs do not is refused, with what to do instead."""

import shutil
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from training.arguments import AnyECGTrainingArguments
from training.options import ACCEPTED, OPTIMIZERS, SCHEDULES, refuse_deepspeed_stage
from training.trainer import AnyECGTrainer

GIVEN = {
    "auto_find_batch_size": True, "average_tokens_across_devices": False, "batch_eval_metrics": True,
    "bf16_full_eval": True, "dataloader_drop_last": True, "dataloader_in_order": False, "do_predict": True,
    "enable_jit_checkpoint": True, "eval_do_concat_batches": False, "eval_use_gather_object": True, "fp16": True,
    "fp16_full_eval": True, "fsdp": "full_shard", "fsdp_config": {"version": 2}, "include_for_metrics": ["loss"],
    "include_num_input_tokens_seen": "all", "label_names": ["labels"], "label_smoothing_factor": 0.1,
    "lr_scheduler_type": "reduce_lr_on_plateau", "neftune_noise_alpha": 5.0, "optim": "lomo", "optim_args": "a=1",
    "optim_target_modules": ["all"], "parallelism_config": object(), "prediction_loss_only": True, "push_to_hub": True,
    "remove_unused_columns": True, "restore_callback_states_from_checkpoint": True, "resume_from_checkpoint": "runs/x",
    "save_on_each_node": True, "skip_memory_metrics": False, "torch_compile": True, "torch_compile_backend": "inductor",
    "torch_compile_mode": "default", "train_sampling_strategy": "group_by_length", "use_cache": True,
    "use_liger_kernel": True,
}  # fmt: skip
KNOWN = {option.name for option in fields(TrainingArguments)}


def test_every_refused_option_has_a_case_here():
    assert GIVEN.keys() == ACCEPTED.keys()


def test_a_trainer_that_is_told_to_push_refuses_too(tmp_path):
    trainer = AnyECGTrainer(torch.nn.Linear(1, 1), AnyECGTrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="push_to_hub: not accepted.*training.push_to_hub"):
        trainer.push_to_hub()


@pytest.mark.parametrize("name", sorted(KNOWN & GIVEN.keys()))
def test_an_option_that_is_not_taken_is_refused_with_advice(name):
    with pytest.raises(ValueError, match=rf"^--{name} .*: not accepted\. .{{20}}"):
        AnyECGTrainingArguments(**{name: GIVEN[name]})


@pytest.mark.parametrize("name", ["split_batches", "dispatch_batches"])
def test_batches_are_divided_as_the_trainer_counts_them(name):
    with pytest.raises(ValueError, match=f"--accelerator_config with {name} True: not accepted"):
        AnyECGTrainingArguments(accelerator_config={name: True})
    assert AnyECGTrainingArguments(accelerator_config={"non_blocking": True}).accelerator_config.non_blocking


def test_several_gpus_in_one_process_are_refused_with_the_two_ways_to_start(monkeypatch):
    """The library would wrap the model in DataParallel, whose means are those of a GPU."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    with pytest.raises(ValueError, match="sees 4 GPUs.*--multi_gpu --num_processes 4.*CUDA_VISIBLE_DEVICES=0"):
        AnyECGTrainingArguments()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_with_the_weights_in_shards_is_refused_whoever_asks_for_it(stage):
    """The teacher of latents never moved, and the run ended with the weights that it had started with."""
    args = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    with (
        pytest.raises(ValueError, match="DeepSpeed stage 3: not accepted.*deepspeed_zero2.json")
        if stage == 3
        else nullcontext()
    ):
        refuse_deepspeed_stage(args)


class _Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))

    def forward(self, x=None):
        return {"loss": (x @ self.weight - 1).square().mean()}


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, key):
        return {"x": torch.arange(3.0) * (1 + key[1])}


def _train(folder, **options):
    args = AnyECGTrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, save_steps=3, disable_tqdm=True, **options
    )
    trainer = AnyECGTrainer(
        _Line(), args, train_dataset=_Rows(), data_collator=lambda items: {"x": torch.stack([i["x"] for i in items])}
    )
    checkpoint = folder / "checkpoint-3"
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint.is_dir() else None)
    return trainer.model.weight.detach()


@pytest.mark.parametrize("options", [{"optim": name} for name in OPTIMIZERS] + [{"lr_scheduler_type": "cosine"}])
def test_a_run_with_an_accepted_optimizer_that_is_taken_up_again_ends_bit_equal(tmp_path, options):
    whole = _train(tmp_path / "whole", learning_rate=0.01, **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    assert torch.equal(_train(tmp_path / "again", learning_rate=0.01, **options), whole)
    assert not torch.equal(whole, _Line().weight)


def test_the_usual_schedules_are_accepted():
    assert {"linear", "cosine", "constant", "constant_with_warmup"} <= set(SCHEDULES)


def test_compilation_asked_for_by_the_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="ACCELERATE_DYNAMO_BACKEND: not accepted"):
        _train(tmp_path)
