r"""Pretrain the backbone on records without labels (stage two):

    accelerate launch -m training.pretrain training/recipes/small_pretrain.yaml --data DIR --quantizer DIR
    accelerate launch -m training.pretrain training/recipes/small_pretrain.yaml --data DIR --objective latents \
        --demography_weight 0 --beat_weight 0
    accelerate launch -m training.pretrain training/recipes/small_pretrain.yaml --data DIR --codes DIR --max_shift_seconds 0

What is learned is an objective, a file of `training/objectives`: masked rhythm codes (the paper), masked waveform,
contrast (ECG-FM), prediction of latents (JEPA). Codes come from the quantizer, or stored from `tokenization.encode`, which
takes less time and gives the same losses. Evaluation on fold 9 gives the objective's figures for each mask pattern.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, set_seed

from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling, AnyECGModel
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction
from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer

from .arguments import AnyECGTrainingArguments, ExtractorArguments, ModelArguments, parse_recipe
from .checkpointing import load_extractor, project_path, save_final
from .code_shards import StoredCodes
from .collate import AugmentationArguments, ECGCollator
from .commands import run_command
from .data import DataArguments, ECGDataset, load_splits
from .masking import PATTERN_SHARES, PATTERNS
from .objectives import (
    BeatHead,
    CodeBaselines,
    Contrastive,
    DemographyHead,
    LatentPrediction,
    MaskedCodes,
    MaskedWaveform,
    Objective,
    RecordHead,
    beat_statistics,
)
from .objectives.masked_codes import encode_batch
from .run_inputs import digest_inputs
from .runs import describe_end, finish, is_finished, run_training
from .splits import spread_order
from .trainer import AnyECGTrainer, require_finite

logger = logging.getLogger(__name__)

OBJECTIVES = {
    "masked_codes": AnyECGForMaskedCodeModeling,
    "masked_waveform": AnyECGForLeadReconstruction,
    "contrastive": AnyECGModel,
    "latents": AnyECGModel,
}  # and the model that each trains
NEEDS_FLOAT32_WEIGHTS = {
    "contrastive": "its targets are computed in float32",
    "latents": "a step moves its teacher by less than bf16 can hold",
}


@dataclass
class ObjectiveArguments:
    """What is learned, what is hidden, and for masked codes where the codes come from."""

    objective: str = field(default="masked_codes", metadata={"help": ", ".join(OBJECTIVES)})
    quantizer: str | None = field(default=None, metadata={"help": "folder of the trained rhythm quantizer"})
    codes: str | None = field(
        default=None, metadata={"help": "folder of tokenization.encode: takes the quantizer's place"}
    )
    mask_ratio: float = field(default=0.5, metadata={"help": "share of patches, columns or leads to hide"})
    mask_shares: list[float] = field(
        default_factory=lambda: list(PATTERN_SHARES),
        metadata={"help": f"how often each pattern is drawn: {', '.join(PATTERNS)}"},
    )
    code_weight: float = field(
        default=1.0,
        metadata={
            "help": "masked codes: factor of their loss; 0 = only those of the whole record, the model has no code head then"
        },
    )
    demography_weight: float = field(
        default=0.0, metadata={"help": "masked codes: factor of the loss of age and sex, predicted beside the codes"}
    )
    beat_weight: float = field(
        default=0.0,
        metadata={"help": "masked codes: factor of the loss of the record's median beat and rhythm, beside the codes"},
    )
    unigram_records: int = field(
        default=2000, metadata={"help": "training records that give the code frequencies and the spread of beats"}
    )

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"--objective {self.objective!r} is unknown. Accepted: {', '.join(OBJECTIVES)}.")
        if self.unigram_records < 1:
            raise ValueError(f"--unigram_records {self.unigram_records}: at least one record is needed.")
        if not (self.code_weight or self.demography_weight or self.beat_weight):
            raise ValueError("--code_weight 0 leaves nothing to learn: give --demography_weight or --beat_weight.")
        for name in ("code_weight", "demography_weight", "beat_weight"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"--{name} {value}: accepted are 0 (without) and above.")
            if value and name != "code_weight" and self.objective != "masked_codes":
                raise ValueError(f"--{name} belongs to --objective masked_codes, not to {self.objective}: set it to 0.")
        if len(self.mask_shares) != len(PATTERNS) or min(self.mask_shares) < 0 or abs(sum(self.mask_shares) - 1) > 1e-6:
            raise ValueError(
                f"--mask_shares {self.mask_shares}: give a share for each of {', '.join(PATTERNS)}, together 1."
            )


CONFIG_CLASS = AnyECGConfig
ARGUMENTS = (
    ModelArguments,
    ExtractorArguments,
    DataArguments,
    AugmentationArguments,
    ObjectiveArguments,
    AnyECGTrainingArguments,
)


class PretrainTrainer(AnyECGTrainer):
    """Trainer of an objective: evaluation keeps sums a record, logits of a whole fold would fill the memory."""

    def __init__(self, model: Objective, *args, **kwargs):
        super().__init__(
            model, *args, logged=model.logged, floors=model.floors, compute_metrics=self._figures, **kwargs
        )

    @property
    def objective(self) -> Objective:
        return self.model

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        return outputs["loss"].detach(), outputs["sums"].double(), inputs["lead_ids"][:, 0]  # the library wants labels

    def _figures(self, prediction) -> dict[str, float]:
        """Return the objective's figures, and the loss over all records in place of a mean over batches."""
        sums = torch.from_numpy(prediction.predictions)
        return {"loss": float(sums[:, 1].sum() / sums[:, 0].sum())} | self.objective.figures(sums)


class FixedPattern(Dataset):
    """Records of a split for evaluation under one mask pattern."""

    def __init__(self, records: ECGDataset, pattern: str):
        self.records, self.pattern = records, pattern

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.records[index] | {"mask_pattern": self.pattern}


@torch.no_grad()
def code_baselines(
    quantizer: AnyECGRhythmQuantizer | None, records: ECGDataset, collator: ECGCollator, *, batch_size: int = 32
) -> CodeBaselines:
    """Return frequencies and agreement of the codes of `records`: of those stored with them, else of the quantizer's."""
    origin = quantizer.config if records.codes is None else records.codes.origin
    baselines = CodeBaselines(origin.codebook_size, origin.num_lead_ids)
    for batch in DataLoader(records, batch_size=batch_size, collate_fn=collator):
        if records.codes is None:
            batch = {name: value.to(quantizer.device) for name, value in batch.items()}
            batch["labels"] = encode_batch(quantizer, batch)
        baselines.add(batch["labels"], batch["lead_ids"])
    return baselines


def build_model(model_args: ModelArguments, objective: str, **overrides) -> PreTrainedModel:
    """Return the model that the objective trains, from `init_from` or new."""
    model_class, overrides = OBJECTIVES[objective], model_args.overrides() | overrides
    if model_args.init_from:
        return model_class.from_pretrained(model_args.init_from, new_head=True, **overrides)
    return model_class(AnyECGConfig.from_preset(model_args.preset, **overrides))


def build_objective(model_args, objective_args, args, *, train: ECGDataset, collator: ECGCollator) -> Objective:
    """Return the objective of one run with its freshly started (or given) model.

    Raises:
        ValueError: masked codes without a quantizer.
    """
    if objective_args.objective == "masked_codes":
        return _masked_codes(model_args, objective_args, args, train, collator)
    set_seed(args.seed)
    model = build_model(model_args, objective_args.objective)
    return {"masked_waveform": MaskedWaveform, "contrastive": Contrastive, "latents": LatentPrediction}[
        objective_args.objective
    ](model)


def _masked_codes(model_args, objective_args, args, train, collator) -> MaskedCodes:
    quantizer = None
    if train.codes is None:
        folder = _quantizer_folder(objective_args)
        quantizer = AnyECGRhythmQuantizer.from_pretrained(folder).eval()
        require_finite(quantizer.state_dict().items(), when=f"in --quantizer {folder}", advice="Train it again.")
    baselines = None
    if args.process_index == 0:  # minutes with a large quantizer
        at_device = quantizer and quantizer.to(args.device)
        baselines = code_baselines(at_device, _sample(train, objective_args.unigram_records), collator)
    baselines = broadcast_object_list([baselines])[0]
    statistics = _beat_statistics(objective_args, args, _sample(train, objective_args.unigram_records), collator)
    set_seed(args.seed)  # after all that only the first process does: models and heads start alike everywhere
    model = build_model(model_args, "masked_codes", codebook_size=len(baselines.counts))
    if not model_args.init_from:
        with torch.no_grad():
            model.code_head.bias.copy_(baselines.log_unigram)
    heads: dict[str, tuple[float, RecordHead]] = {}
    if objective_args.demography_weight:
        heads["demography"] = objective_args.demography_weight, DemographyHead(model.config.hidden_size)
    if statistics is not None:
        heads["beats"] = objective_args.beat_weight, BeatHead(model.config.hidden_size, statistics)
    return MaskedCodes(model, quantizer, baselines, record_heads=heads, code_weight=objective_args.code_weight)


def _beat_statistics(objective_args, args, sample: ECGDataset, collator: ECGCollator) -> dict | None:
    """Return mean and spread of the beats of `sample`, the same on every process, None where no beats are learned."""
    if not objective_args.beat_weight:
        return None
    statistics = None
    if args.process_index == 0:
        with_beats = ECGCollator(collator.extractor, window_seconds=collator.window_seconds, with_beats=True)
        statistics = beat_statistics(DataLoader(sample, batch_size=32, collate_fn=with_beats))
    return broadcast_object_list([statistics])[0]


def _quantizer_folder(objective_args: ObjectiveArguments) -> str:
    if not objective_args.quantizer:
        raise ValueError(
            "No quantizer: pass --quantizer DIR, the output folder of `python -m tokenization.train`, or --codes DIR, that of "
            "`python -m tokenization.encode`."
        )
    return project_path(objective_args.quantizer)


def _stored_codes(objective_args, augmentation, data_args) -> StoredCodes | None:
    """Return the codes of `--codes`, None without it.

    Raises:
        ValueError: they are not those of what the backbone is going to see.
    """
    if not objective_args.codes:
        return None
    if objective_args.objective != "masked_codes":
        raise ValueError(
            f"--codes belongs to --objective masked_codes, not to {objective_args.objective}: leave it out."
        )
    altering = [name for name in ("max_shift_seconds", "gain_range", "noise_mv") if getattr(augmentation, name)]
    if altering:
        raise ValueError(
            f"--codes are those of records as they are, and --{altering[0]} {getattr(augmentation, altering[0])} alters them: "
            f"pass {' '.join(f'--{name} 0' for name in altering)}, or leave --codes out."
        )
    codes = StoredCodes(project_path(objective_args.codes))
    if codes.origin.window_seconds != data_args.window_seconds:
        raise ValueError(
            f"--codes {codes.folder} are of windows of {codes.origin.window_seconds:g} s, --window_seconds is "
            f"{data_args.window_seconds:g}: set it to that, or run tokenization.encode with this."
        )
    if objective_args.quantizer:
        codes.origin.refuse_other(_quantizer_folder(objective_args), codes=codes.folder)
    return codes


def _extractor(model_args, extractor_args, objective_args, codes) -> AnyECGFeatureExtractor:
    """Return the extractor of the codes, the quantizer or of the weights to start from, else a new one."""
    if codes is not None:
        return extractor_args.inherited(codes.origin.make_extractor(), f"--codes {codes.folder}")
    if objective_args.objective == "masked_codes":
        folder = _quantizer_folder(objective_args)
        return extractor_args.inherited(load_extractor(folder), f"--quantizer {folder}")
    if model_args.init_from:
        return extractor_args.inherited(load_extractor(model_args.init_from), f"--init_from {model_args.init_from}")
    config = AnyECGConfig.from_preset(model_args.preset, **model_args.overrides())
    return AnyECGFeatureExtractor(
        sampling_rate=config.sampling_rate, patch_size=config.patch_size, **vars(extractor_args)
    )


def build_trainer(model_args, extractor_args, data_args, augmentation, objective_args, args) -> PretrainTrainer:
    """Return the trainer of one run.

    Raises:
        ValueError: masked codes without a quantizer, a folder that is not one, stored codes of something else, or an
            objective that DeepSpeed cannot train in bf16.
    """
    if objective_args.objective == "latents" and args.weight_average_decay:
        raise ValueError(
            "--weight_average_decay with --objective latents: the teacher, which the run ends with, is an average already. "
            "Leave it out, or 0."
        )
    _refuse_bf16_by_deepspeed(objective_args, args)
    codes = _stored_codes(objective_args, augmentation, data_args)
    extractor = _extractor(model_args, extractor_args, objective_args, codes)
    with args.main_process_first(desc="preparing records"):
        train, held_out = load_splits(data_args, extractor, seed=args.seed)
    if codes is not None:
        train, held_out = train.with_codes(codes), held_out.with_codes(codes)
    plain = ECGCollator(extractor, window_seconds=data_args.window_seconds)
    objective = build_objective(model_args, objective_args, args, train=train, collator=plain)
    collator = ECGCollator(
        extractor, window_seconds=data_args.window_seconds, augmentation=augmentation,
        mask_ratio=objective_args.mask_ratio, mask_shares=objective_args.mask_shares,
        with_demography=objective_args.demography_weight > 0, with_beats=objective_args.beat_weight > 0,
    )  # fmt: skip
    needs_quantizer = objective_args.objective == "masked_codes" and codes is None
    quantizer = _quantizer_folder(objective_args) if needs_quantizer else None
    return PretrainTrainer(
        objective, args, data_collator=collator, train_dataset=train, processing_class=extractor,
        inputs=digest_inputs(train, held_out, quantizer=quantizer, init_from=model_args.init_from),
        eval_dataset={pattern: FixedPattern(held_out, pattern) for pattern in objective.patterns},
    )  # fmt: skip


def _refuse_bf16_by_deepspeed(objective_args, args) -> None:
    reason = NEEDS_FLOAT32_WEIGHTS.get(objective_args.objective)
    if reason and args.bf16 and args.deepspeed_plugin is not None:
        raise ValueError(
            f"--objective {objective_args.objective} by DeepSpeed in bf16: not accepted. DeepSpeed makes all weights bf16, and "
            f"{reason}. Leave --bf16 or --deepspeed out, or take FSDP2 (training/recipes/fsdp2.yaml)."
        )


def _sample(dataset: ECGDataset, num_records: int) -> ECGDataset:
    names = dataset.column("record_id")
    return dataset.take(sorted(range(len(dataset)), key=lambda index: spread_order(names[index]))[:num_records])


def main(argv: Sequence[str]) -> None:
    instances = parse_recipe(argv, ARGUMENTS)
    trainer = build_trainer(*instances)
    if is_finished(trainer, instances):
        return
    run_training(trainer, arguments=instances)
    report = describe_end(trainer) | {"evaluation": trainer.evaluate()}
    finish(trainer, report, save=save_finished)


def save_finished(objective: Objective, extractor: AnyECGFeatureExtractor, folder: Path) -> None:
    """Write the model that an objective ends with."""
    save_final(objective.finished_model(), extractor, folder)


if __name__ == "__main__":
    run_command(main)
