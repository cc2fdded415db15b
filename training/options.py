"""Options of the library's `TrainingArguments` that these runs do not take, each with what to do instead.

They would be ignored without a word, would change what a step's mean or an evaluation is, or would let a run that was killed
end otherwise than one left alone.
"""

from __future__ import annotations

from transformers import SchedulerType, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

SCHEDULES = tuple(kind.value for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy"))
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd")
_OF_THE_METRICS = "Figures are computed from all records of an evaluation at once: leave it out."
_OF_A_LANGUAGE_MODEL = "It is made for language models, and nothing here would follow it: leave it out."
_BY_THE_COMMAND = "A command trains and evaluates as its recipe says and goes on from its own checkpoints"
_FULL_EVAL = "It would also round the weights that the run ends with. For a faster evaluation take --bf16 True."
NO_COMPILING = "It was not tried here, and a run taken up again might be compiled to other rounding: leave it out."
_NO_FSDP = (
    "Start with `accelerate launch --config_file training/recipes/fsdp2.yaml`, which says what is cut into shards."
)
NO_PUSH = (
    "Checkpoints stay here. When the run has ended: `python -m training.publish`, then `python -m training.push_to_hub`, as "
    "docs/publishing.md says."
)

# name: (accepted values, what to do)
ACCEPTED = {
    "auto_find_batch_size": (
        (False,),
        "The batch of a step must not follow from free memory. Lower --per_device_train_batch_size and raise "
        "--gradient_accumulation_steps by the same factor: the steps stay the same.",
    ),
    "average_tokens_across_devices": ((True,), "The means of a step go over all processes: leave it out."),
    "batch_eval_metrics": ((False,), _OF_THE_METRICS),
    "bf16_full_eval": ((False,), _FULL_EVAL),
    "dataloader_drop_last": (
        (False,),
        "Leave it out. Training takes whole batches anyway, and evaluation would miss records.",
    ),
    "dataloader_in_order": ((True,), "Batches in the order of their arrival differ from run to run: leave it out."),
    "do_predict": ((False,), f"{_BY_THE_COMMAND}; for the test fold see `python -m training.evaluate --help`."),
    "enable_jit_checkpoint": ((False,), "SIGTERM ends a run; it goes on from its last checkpoint: lower --save_steps."),
    "eval_do_concat_batches": ((True,), _OF_THE_METRICS),
    "eval_use_gather_object": ((False,), _OF_THE_METRICS),
    "fp16": ((False,), "A gradient that overflows ends a run here, and fp16 lets it overflow by design. Take --bf16 True."),
    "fp16_full_eval": ((False,), _FULL_EVAL),
    "fsdp": ((None, "", False, []), _NO_FSDP),
    "fsdp_config": ((None,), _NO_FSDP),
    "include_for_metrics": (([],), _OF_THE_METRICS),
    "include_num_input_tokens_seen": (("no", False), "The log holds patches_per_second: leave it out."),
    "label_names": ((None,), "What is predicted follows from the objective or --task: leave it out."),
    "label_smoothing_factor": ((0.0,), "The losses here do not smooth their targets: leave it out."),
    "lr_scheduler_type": (
        SCHEDULES,
        f"The learning rate follows from the step alone, not from evaluations. Accepted are {', '.join(SCHEDULES)}.",
    ),
    "neftune_noise_alpha": ((None,), f"{_OF_A_LANGUAGE_MODEL} For noise in the records see --noise_mv."),
    "optim": (OPTIMIZERS, f"Accepted are {', '.join(OPTIMIZERS)}: with these a run taken up again ends bit-equal."),
    "optim_args": ((None,), "None of the accepted optimizers reads it: leave it out."),
    "optim_target_modules": ((None,), "None of the accepted optimizers reads it: leave it out."),
    "parallelism_config": ((None,), "Processes divide the records and, under FSDP2 or DeepSpeed, the weights: leave it out."),
    "prediction_loss_only": ((False,), _OF_THE_METRICS),
    "push_to_hub": ((False,), NO_PUSH),
    "remove_unused_columns": ((False,), "The collator makes the columns that the models read: leave it out."),
    "restore_callback_states_from_checkpoint": ((False,), f"{_BY_THE_COMMAND}: leave it out."),
    "resume_from_checkpoint": (
        (None,),
        f"{_BY_THE_COMMAND}: give the same command again. For other weights to start from: --init_from.",
    ),
    "save_on_each_node": ((False,), "--output_dir is one folder that all nodes see: leave it out."),
    "skip_memory_metrics": ((True,), "Results would hold figures that differ from run to run: leave it out."),
    "torch_compile": ((False,), NO_COMPILING),
    "torch_compile_backend": ((None,), NO_COMPILING),
    "torch_compile_mode": ((None,), NO_COMPILING),
    "train_sampling_strategy": (
        ("random",),
        "The order of the records follows from (seed, epoch), so that a run can be taken up again: leave it out.",
    ),
    "use_cache": ((False,), _OF_A_LANGUAGE_MODEL),
    "use_liger_kernel": ((False,), _OF_A_LANGUAGE_MODEL),
}  # fmt: skip
ACCELERATOR_OPTIONS = ("non_blocking", "use_seedable_sampler")  # of --accelerator_config, that change no result


def refuse_options(args: TrainingArguments) -> None:
    """Refuse what was given for an option and is not accepted, before the library reads it.

    Raises:
        ValueError: with the option, its value and what to do.
    """
    for name, (accepted, advice) in ACCEPTED.items():
        value = getattr(args, name, accepted[0])  # other versions of the library have other options
        if value not in accepted:
            raise ValueError(f"--{name} {getattr(value, 'value', value)}: not accepted. {advice}")


def refuse_accelerator_options(args: TrainingArguments) -> None:
    """Refuse options of --accelerator_config that change how batches are made, after the library has read them.

    Raises:
        ValueError: with the option and its value.
    """
    defaults = AcceleratorConfig().to_dict()
    for name, value in args.accelerator_config.to_dict().items():
        if name not in ACCELERATOR_OPTIONS and value != defaults[name]:
            raise ValueError(
                f"--accelerator_config with {name} {value}: not accepted, batches would be divided otherwise than the Trainer "
                f"counts them. Accepted are {', '.join(ACCELERATOR_OPTIONS)}."
            )


def refuse_data_parallel(args: TrainingArguments) -> None:
    """Refuse one process with several GPUs: the library would divide each batch among them, each with means of its own.

    Raises:
        ValueError: with the two ways to start instead.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs. Start one process a GPU, `accelerate launch --multi_gpu --num_processes "
            f"{args.n_gpu} -m MODULE RECIPE ...`, or show it a single one: `CUDA_VISIBLE_DEVICES=0 python -m MODULE RECIPE ...`."
        )


def refuse_deepspeed_stage(args: TrainingArguments) -> None:
    """Refuse DeepSpeed with the weights themselves in shards: what reads or moves weights here finds none.

    Raises:
        ValueError: stage 3.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed stage 3: not accepted. The teacher of --objective latents would stay as it started, and --quantizer and "
            "--init_from could not be read. Take training/recipes/deepspeed_zero2.json, or FSDP2 "
            "(training/recipes/fsdp2.yaml), which cuts the weights too."
        )
