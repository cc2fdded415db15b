"""Masked-code pretraining of the backbone (stage two):

    accelerate launch -m training.pretrain training/recipes/small_pretrain.yaml --data DIR --quantizer DIR

A frozen quantizer turns each record into codes as it comes out of the augmentation; the backbone predicts the codes of
hidden patches. The code head starts at the log frequencies of the codes. Evaluation on fold 9 gives cross-entropy and
accuracy for each mask pattern beside what the code frequencies alone would reach.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import set_seed

from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling
from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer

from .arguments import AnyECGTrainingArguments, ModelArguments, parse_recipe
from .checkpointing import load_extractor, project_path, save_final, write_json
from .collate import AugmentationArguments, ECGCollator
from .data import DataArguments, ECGDataset, load_splits
from .masking import PATTERNS
from .splits import spread_order
from .trainer import AnyECGTrainer, finish, is_finished, run_command, run_training

logger = logging.getLogger(__name__)

IGNORED = -100
SMOOTHING = 0.5  # added to each code's count, so that an unseen code has a finite log frequency


@dataclass
class MaskedCodeArguments:
    """Where the codes come from, what is hidden, and what stands in for the quantizer's view of the records."""

    quantizer: str | None = field(default=None, metadata={"help": "folder of the trained rhythm quantizer"})
    mask_ratio: float = field(default=0.5, metadata={"help": "share of patches, columns or leads to hide"})
    unigram_records: int = field(default=2000, metadata={"help": "training records that give the code frequencies"})


class MaskedCodeTrainer(AnyECGTrainer):
    """Trainer whose labels are the quantizer's codes where patches are hidden, -100 elsewhere."""

    def __init__(self, *args, quantizer: AnyECGRhythmQuantizer, log_unigram: torch.Tensor, **kwargs):
        self.log_unigram = log_unigram
        super().__init__(
            *args, compute_metrics=self._figures, preprocess_logits_for_metrics=self._per_record_sums, **kwargs
        )
        self.quantizer = quantizer.eval().requires_grad_(False).to(self.args.device)
        self.log_unigram = log_unigram.to(self.args.device)

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if "labels" in inputs:
            return inputs
        with torch.no_grad(), self.compute_loss_context_manager():
            codes = self.quantizer.encode(inputs["input_values"], inputs["lead_ids"], inputs["attention_mask"])
        return inputs | {"labels": codes.masked_fill(~inputs["bool_masked_pos"], IGNORED)}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # the Trainer asks whether there are labels before it prepares the inputs
        return super().prediction_step(model, self._prepare_inputs(inputs), prediction_loss_only, ignore_keys)

    def _per_record_sums(self, logits, labels):
        """Return `(B, 5)`: hidden patches, their cross-entropy, hits, and both again for the code frequencies alone."""
        if isinstance(logits, tuple):
            logits = logits[0]
        hidden = labels != IGNORED
        codes = labels.clamp(min=0)
        log_probabilities = logits.float().log_softmax(-1)
        parts = (
            torch.ones_like(codes, dtype=torch.float32),
            -log_probabilities.gather(-1, codes[..., None])[..., 0],
            (logits.argmax(-1) == codes).float(),
            -self.log_unigram[codes],
            (codes == self.log_unigram.argmax()).float(),
        )
        return torch.stack([(part * hidden).sum((1, 2)) for part in parts], dim=1)

    @staticmethod
    def _figures(prediction) -> dict[str, float]:
        num, cross_entropy, hits, unigram, unigram_hits = prediction.predictions.astype(np.float64).sum(axis=0)
        return {
            "cross_entropy": cross_entropy / num,
            "accuracy": hits / num,
            "unigram_cross_entropy": unigram / num,
            "unigram_accuracy": unigram_hits / num,
        }


class FixedPattern(Dataset):
    """Records of a split for evaluation under one mask pattern."""

    def __init__(self, records: ECGDataset, pattern: str):
        self.records, self.pattern = records, pattern

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.records[index] | {"mask_pattern": self.pattern}


@torch.no_grad()
def count_codes(quantizer: AnyECGRhythmQuantizer, records: Dataset, collator: ECGCollator, *, batch_size: int = 32):
    """Return how often each code occurs in `records`, float64 `(codebook_size,)`."""
    quantizer.eval()
    counts = torch.zeros(quantizer.config.codebook_size, dtype=torch.float64)
    for batch in torch.utils.data.DataLoader(records, batch_size=batch_size, collate_fn=collator):
        inputs = (batch[name].to(quantizer.device) for name in ("input_values", "lead_ids", "attention_mask"))
        codes = quantizer.encode(*inputs)
        counts += torch.bincount(codes[codes >= 0].cpu(), minlength=len(counts))
    return counts


def log_frequencies(counts: torch.Tensor) -> torch.Tensor:
    """Return the smoothed log share of each code, float32."""
    smoothed = counts + SMOOTHING
    return (smoothed / smoothed.sum()).log().float()


def build_model(
    model_args: ModelArguments, codebook_size: int, log_unigram: torch.Tensor
) -> AnyECGForMaskedCodeModeling:
    """Return the backbone with its code head, from `init_from` or new; a new head starts at the code frequencies."""
    if model_args.init_from:
        model = AnyECGForMaskedCodeModeling.from_pretrained(model_args.init_from, codebook_size=codebook_size)
    else:
        config = AnyECGConfig.from_preset(
            model_args.preset, **{**model_args.overrides(), "codebook_size": codebook_size}
        )
        model = AnyECGForMaskedCodeModeling(config)
        with torch.no_grad():
            model.code_head.bias.copy_(log_unigram)
    return model


def build_trainer(model_args, data_args, augmentation, codes_args, args) -> MaskedCodeTrainer:
    """Return the trainer of one run.

    Raises:
        ValueError: no quantizer is named, or its folder is not one.
    """
    if not codes_args.quantizer:
        raise ValueError("No quantizer: pass --quantizer DIR, the output folder of `python -m tokenization.train`.")
    folder = project_path(codes_args.quantizer)
    extractor = load_extractor(folder)
    quantizer = AnyECGRhythmQuantizer.from_pretrained(folder).eval()
    with args.main_process_first(desc="preparing records"):
        train, held_out = load_splits(data_args, extractor, seed=args.seed)
    plain = ECGCollator(extractor, window_seconds=data_args.window_seconds)
    log_unigram = log_frequencies(count_codes(quantizer, _sample(train, codes_args.unigram_records), plain))
    collator = ECGCollator(
        extractor, window_seconds=data_args.window_seconds, augmentation=augmentation, mask_ratio=codes_args.mask_ratio
    )
    set_seed(args.seed)
    return MaskedCodeTrainer(
        build_model(model_args, quantizer.config.codebook_size, log_unigram), args, data_collator=collator,
        train_dataset=train, eval_dataset={pattern: FixedPattern(held_out, pattern) for pattern in PATTERNS},
        processing_class=extractor, quantizer=quantizer, log_unigram=log_unigram,
    )  # fmt: skip


def _sample(dataset: ECGDataset, num_records: int) -> ECGDataset:
    names = dataset.column("record_id")
    return dataset.take(sorted(range(len(dataset)), key=lambda index: spread_order(names[index]))[:num_records])


def main(argv: Sequence[str]) -> None:
    instances = parse_recipe(
        argv, (ModelArguments, DataArguments, AugmentationArguments, MaskedCodeArguments, AnyECGTrainingArguments)
    )
    args = instances[-1]
    trainer = build_trainer(*instances)
    if is_finished(trainer):
        return
    run_training(trainer, arguments=instances)
    report = {"steps": trainer.state.global_step, "evaluation": trainer.evaluate()}
    if trainer.is_world_process_zero():
        save_final(trainer.model, trainer.processing_class, args.output_dir)
        write_json(Path(args.output_dir) / "results.json", report)
    finish(trainer)


if __name__ == "__main__":
    run_command(main)
