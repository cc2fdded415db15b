"""Fine-tune the backbone, or train it from scratch, on a labelled task:

    accelerate launch -m training.finetune training/recipes/small_statements.yaml --data DIR --output_dir OUT

The head's bias starts at the log odds of each label (with a zero bias training spends itself on pulling logits down).
The checkpoint with the best figure on fold 9 is kept; then one temperature is folded into the head and one threshold a
label chosen, both on fold 9, and everything is written as a folder that `pipeline("ecg-classification")` takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, set_seed

from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg_heads import AnyECGForSequenceClassification

from .arguments import AnyECGTrainingArguments, ExtractorArguments, ModelArguments, parse_recipe
from .checkpointing import checkpoints_in, load_extractor
from .collate import AugmentationArguments, ECGCollator
from .commands import run_command
from .data import DataArguments, ECGDataset, load_splits, with_task
from .ecg_metrics.classification_metrics import challenge_score, expected_calibration_error
from .inference import predict_logits
from .labels import MULTI, REGRESSION, SINGLE, Task, build_task
from .metrics import best_metric_of, challenge_weights, probabilities_of, task_metrics
from .probe import LinearProbe, fit_probe
from .run_inputs import digest_inputs
from .runs import describe_end, finish, is_finished, records_seen, run_training
from .splits import spread_order
from .thresholds import (
    BEST_THRESHOLD,
    choose_thresholds,
    climb_challenge_score,
    fit_temperature,
    fold_in_scale,
    fold_in_temperature,
    log_odds,
)
from .trainer import AnyECGTrainer

logger = logging.getLogger(__name__)


@dataclass
class TaskArguments:
    """What is predicted; see `training/labels.py`."""

    task: str = field(
        default="statements",
        metadata={
            "help": "statements, superclass, superclass_single, subclass, diagnostic, form, rhythm, challenge, anomaly, windows, "
            "codes, age, sex"
        },
    )
    head_start: str = field(
        default="frequencies",
        metadata={
            "help": "frequencies: bias at the log odds of each label; probe: also weights, those of logistic regressions (of a "
            "value, of a linear one) on the records to train on, as the backbone is before the first step"
        },
    )
    freeze_backbone: bool = field(
        default=False, metadata={"help": "train the head only, the norm and linear layer on the mean of the states"}
    )
    min_positives: int = field(default=20, metadata={"help": "for --task codes: training records that a label needs"})

    def __post_init__(self):
        if self.head_start not in ("frequencies", "probe"):
            raise ValueError(f"--head_start {self.head_start!r} is unknown. Accepted: frequencies, probe.")


CONFIG_CLASS = AnyECGConfig
ARGUMENTS = (
    ModelArguments,
    ExtractorArguments,
    DataArguments,
    AugmentationArguments,
    TaskArguments,
    AnyECGTrainingArguments,
)


def standardised(records: ECGDataset, mean: np.ndarray, std: np.ndarray) -> ECGDataset:
    return records.with_targets(((records.targets - mean) / std).astype(np.float32))


def build_model(model_args: ModelArguments, task: Task, targets: np.ndarray) -> AnyECGForSequenceClassification:
    """Return the classifier: backbone from `init_from` or new, head new and started at the labels' frequencies."""
    head = {"id2label": task.id2label, "label2id": task.label2id, "problem_type": task.problem_type}
    if model_args.init_from:
        model = AnyECGForSequenceClassification.from_pretrained(
            model_args.init_from, new_head=True, **head, **model_args.overrides()
        )
    else:
        config = AnyECGConfig.from_preset(model_args.preset, **model_args.overrides())
        for name, value in head.items():
            setattr(config, name, value)
        model = AnyECGForSequenceClassification(config)
    start_head(model.classifier, task, targets)
    model.anyecg.embeddings.mask_token.requires_grad_(False)  # nothing is hidden: it would have no optimizer state
    return model


@torch.no_grad()
def start_head(classifier: torch.nn.Linear, task: Task, targets: np.ndarray) -> None:
    """Set the bias to the log odds (multi label) or log frequencies (single label) of the training targets."""
    if task.problem_type == MULTI:
        bias = log_odds(targets.mean(axis=0))
    elif task.problem_type == SINGLE:
        counts = np.bincount(targets.astype(int), minlength=len(task.names)) + 0.5
        bias = np.log(counts / counts.sum())
    else:
        bias = np.zeros(len(task.names))
    classifier.bias.copy_(torch.as_tensor(bias, dtype=classifier.bias.dtype))


def start_head_at_probe(
    model: AnyECGForSequenceClassification, task: Task, train: ECGDataset, collator: ECGCollator
) -> None:
    """Let the head be a linear probe of the backbone as it is: fine-tuning then starts at the probe's figures.

    The first process fits it for all, which must all come here: another GPU's rounding may choose another penalty.

    Args:
        train: with targets as they are trained on: those of a regression standardised.

    Source: Kumar et al. 2022 (arXiv 2202.10054): a random head distorts the features before it has learned anything.
    """
    is_first = PartialState().is_main_process
    probe = broadcast_object_list([_fit_probe(model, task, train, collator) if is_first else None])[0]
    with torch.no_grad():
        model.classifier.weight.copy_(torch.as_tensor(probe.weight))
        model.classifier.bias.copy_(torch.as_tensor(probe.bias))


def _fit_probe(
    model: AnyECGForSequenceClassification, task: Task, train: ECGDataset, collator: ECGCollator
) -> LinearProbe:
    patients = train.column("patient_id")
    train = train.take(
        sorted(range(len(train)), key=lambda index: spread_order(patients[index]))
    )  # in no order, none cut in two
    classifier, model.classifier = model.classifier, torch.nn.Identity()
    features = predict_logits(model, train, collator)  # what the head will see
    model.classifier = classifier
    return fit_probe(features, train.targets, task)


def freeze_backbone(model: PreTrainedModel) -> None:
    """Let the head alone be trained: the backbone keeps its weights and does not drop out.

    Raises:
        ValueError: the model has no backbone of AnyECG.
    """
    if not hasattr(model, "anyecg"):
        raise ValueError(
            f"--freeze_backbone: a {type(model).__name__} is not divided into backbone and head. Leave it out."
        )

    def stop_dropout(backbone, inputs) -> None:
        backbone.eval()  # before each step the Trainer puts the whole model into training

    model.anyecg.requires_grad_(False)
    model.anyecg.register_forward_pre_hook(stop_dropout)


def build_trainer(
    model_args, extractor_args, data_args, augmentation, task_args, args, *, build_model: Callable = build_model
) -> tuple[AnyECGTrainer, Task]:
    """Return the trainer of one run and its task.

    Args:
        build_model: from model arguments, task and training targets to a model whose last layer is its `classifier`; another
            than AnyECG's (see `benchmarks/baselines`) is trained and measured in the same way.
    """
    if model_args.init_from:
        extractor = extractor_args.inherited(
            load_extractor(model_args.init_from), f"--init_from {model_args.init_from}"
        )
    else:
        extractor = AnyECGFeatureExtractor(**vars(extractor_args))
    with args.main_process_first(desc="preparing records"):
        train, held_out = load_splits(data_args, extractor, seed=args.seed)
    task = build_task(task_args.task, train.column("codes"), min_positives=task_args.min_positives)
    train, held_out = with_task(train, task), with_task(held_out, task)
    inputs = digest_inputs(train, held_out, init_from=model_args.init_from)
    set_seed(args.seed)
    model = build_model(model_args, task, train.targets)
    scale = _target_scale(task, train)
    if scale is not None:
        train, held_out = standardised(train, *scale), standardised(held_out, *scale)
    if task_args.head_start == "probe" and not checkpoints_in(args.output_dir):
        start_head_at_probe(
            model.to(args.device), task, train, ECGCollator(extractor, window_seconds=data_args.window_seconds)
        )
    if task_args.freeze_backbone:
        freeze_backbone(model)
    if args.metric_for_best_model is None:
        args.metric_for_best_model, args.greater_is_better = best_metric_of(task)
    trainer = AnyECGTrainer(
        model, args, train_dataset=train, eval_dataset=held_out, processing_class=extractor,
        inputs=inputs,
        data_collator=ECGCollator(extractor, window_seconds=data_args.window_seconds, augmentation=augmentation),
        compute_metrics=lambda prediction: _figures(task, prediction, scale) | {"loss": _loss(model, prediction)},
    )  # fmt: skip
    trainer.target_scale = scale
    return trainer, task


def _target_scale(task: Task, train: ECGDataset) -> tuple[np.ndarray, np.ndarray] | None:
    if task.problem_type != REGRESSION:
        return None
    return train.targets.mean(axis=0), np.maximum(train.targets.std(axis=0), 1e-6)


def _loss(model: PreTrainedModel, prediction) -> float:
    """Return the loss over all records, in place of a mean over batches."""
    return float(model._loss(torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)))


def _figures(task: Task, prediction, scale) -> dict[str, float]:
    logits, targets = prediction.predictions, prediction.label_ids
    if scale is not None:
        mean, std = scale
        logits, targets = logits * std + mean, targets * std + mean
    return task_metrics(task, logits, targets)


def complete_head(trainer: AnyECGTrainer, task: Task) -> dict:
    """Fold scale or temperature into the head and choose thresholds, all on fold 9; return what was done and measured.

    The figures are those of the completed model: they follow from one pass in full precision.
    """
    model, targets = trainer.model, trainer.eval_dataset.targets
    logits = predict_logits(model, trainer.eval_dataset, trainer.data_collator).astype(np.float64)
    if task.problem_type == REGRESSION:
        mean, std = trainer.target_scale
        fold_in_scale(model.classifier, mean=mean, std=std)
        facts = {"target_mean": mean.tolist(), "target_std": std.tolist()}
        return {"calibration": facts, "evaluation": task_metrics(task, logits * std + mean, targets * std + mean)}
    temperature = fit_temperature(logits, targets, problem_type=task.problem_type)
    fold_in_temperature(model.classifier, temperature)
    facts = {"temperature": temperature}
    if task.problem_type == MULTI:
        facts["ece_before"] = expected_calibration_error(targets, probabilities_of(task, logits))
        facts |= _set_thresholds(model, task, targets, logits / temperature)
    figures = task_metrics(task, logits / temperature, targets, thresholds=model.config.thresholds)
    return {"calibration": facts, "evaluation": figures}


def _set_thresholds(model, task: Task, targets: np.ndarray, logits: np.ndarray) -> dict:
    """Store a threshold for each label; return which labels had too few positives for one of their own, and of the task
    "challenge" the score before the thresholds were moved for it."""
    probabilities, weights, facts = probabilities_of(task, logits), challenge_weights(task), {}
    thresholds, is_own = choose_thresholds(targets, probabilities, best_threshold=BEST_THRESHOLD[task.threshold_figure])
    if weights is not None:
        facts["challenge_score_by_f1"] = challenge_score(targets, probabilities >= thresholds, weights)
        thresholds = climb_challenge_score(targets, probabilities, thresholds, may_move=is_own, weights=weights)
    model.config.thresholds = thresholds
    facts["labels_with_pooled_threshold"] = [name for name, own in zip(task.names, is_own, strict=True) if not own]
    return facts


def main(argv: Sequence[str], *, build_model: Callable = build_model) -> None:
    """Run the command; `build_model` as for `build_trainer`."""
    instances = parse_recipe(argv, ARGUMENTS)
    trainer, task = build_trainer(*instances, build_model=build_model)
    if is_finished(trainer, instances):
        return
    run_training(trainer, arguments=instances)
    report = {}
    if trainer.is_world_process_zero():
        report = describe_end(trainer) | {"records_seen": records_seen(trainer)} | complete_head(trainer, task)
        logger.info("fold 9: %s", report["evaluation"])
    finish(trainer, report)


if __name__ == "__main__":
    run_command(main)
