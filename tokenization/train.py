"""Train the rhythm quantizer (stage one):

    python -m tokenization.train training/recipes/small_quantizer.yaml --data DIR --output_dir OUT

First a few steps as a plain autoencoder, then k-means on its vectors starts the codebook (a random codebook collapses),
then the quantizer proper. The output folder ends as a rhythm tokenizer: `AutoModel` gives the quantizer,
`AutoFeatureExtractor` the extractor that returns `rhythm_codes`. The same command again goes on from the last
checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from transformers import TrainerCallback, set_seed

from anyecg_hf.configuration_anyecg import AnyECGQuantizerConfig
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.feature_extraction_anyecg_rhythm import AnyECGRhythmFeatureExtractor
from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer
from training.arguments import AnyECGTrainingArguments, ExtractorArguments, ModelArguments, parse_recipe
from training.checkpointing import load_extractor, save_final
from training.collate import AugmentationArguments, ECGCollator
from training.commands import run_command
from training.data import DataArguments, ECGDataset, load_splits
from training.run_inputs import digest_inputs
from training.runs import describe_end, finish, is_finished, run_training
from training.trainer import AnyECGTrainer

from .code_use import CodeUse
from .codebook_health import batches_of, code_shares, measure, perplexity_of, sample_of

logger = logging.getLogger(__name__)

LOGGED = (
    "loss_morphology", "loss_frequency", "loss_demography", "loss_codebook", "loss_commitment", "usage", "perplexity",
)  # fmt: skip
NUM_STATISTICS_RECORDS = 256
CODE_USE_FILE = "code_use.safetensors"
COLLAPSED = (
    "Most patches get the same few codes. Start the codebook later (--codebook_start_step), from more vectors, or lower "
    "commitment_weight or the learning rate."
)


@dataclass
class CodebookArguments:
    """How the codebook starts and how it is judged at the end."""

    codebook_start_step: int = field(default=60, metadata={"help": "steps as a plain autoencoder before k-means"})
    codebook_start_vectors: int = field(
        default=32_768, metadata={"help": "vectors for k-means, better ten a code or more"}
    )
    min_perplexity_share: float = field(
        default=0.05,
        metadata={"help": "the run stops where the codebook's perplexity falls below this share of its size"},
    )
    health_records: int = field(default=600, metadata={"help": "fold-9 records for the final report; 0 = no report"})


CONFIG_CLASS = AnyECGQuantizerConfig
ARGUMENTS = (
    ModelArguments,
    ExtractorArguments,
    DataArguments,
    AugmentationArguments,
    CodebookArguments,
    AnyECGTrainingArguments,
)


class QuantizerTrainer(AnyECGTrainer):
    """Trainer of the quantizer: autoencoder first, codebook by k-means, explained variance in evaluation."""

    def __init__(self, *args, codebook: CodebookArguments, **kwargs):
        super().__init__(*args, logged=LOGGED, compute_metrics=_evaluation_figures, **kwargs)
        _refuse_divided_codebook(self)
        self.codebook = codebook
        least = codebook.min_perplexity_share * self.model.config.codebook_size
        self.floors = {"codebook_perplexity": (least, COLLAPSED)}
        self.code_use = CodeUse(self.model.vector_quantizer)
        self.add_callback(_CodebookStart(self))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        is_autoencoder = model.training and self.state.global_step < self.codebook.codebook_start_step
        with _without_codebook(self.model, is_autoencoder):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and not is_autoencoder:
            self.code_use.note(outputs.rhythm_codes, sum_up=self.accelerator.reduce)
        return (loss, outputs) if return_outputs else loss

    def state_figures(self):
        if self.state.global_step <= self.codebook.codebook_start_step:
            return {}
        return self.code_use.figures()

    def can_be_best(self):
        return self.state.global_step > self.codebook.codebook_start_step  # before, the codebook is random

    def kept_state(self):
        return [*super().kept_state(), (self.code_use, CODE_USE_FILE)]

    def start_codebook(self) -> None:
        """Fill the codebook by k-means on the encoder's vectors of a fixed sample of training records, alike everywhere."""
        if self.is_world_process_zero():
            self._fit_codebook()
        if self.args.world_size > 1:
            for value in self.model.vector_quantizer.state_dict().values():
                distributed.broadcast(value, src=0)
        self.code_use.begin()

    def _fit_codebook(self) -> None:
        device, patches_each = self.model.device, 100
        records = sample_of(self.train_dataset, -(-self.codebook.codebook_start_vectors // patches_each))
        generator = torch.Generator(device="cpu").manual_seed(self.args.seed)
        vectors = []
        self.model.eval()
        with torch.no_grad():
            for batch in batches_of(records, self.data_collator):
                inputs = (batch[name].to(device) for name in ("input_values", "lead_ids", "attention_mask"))
                states, valid = self.model.encode_vectors(*inputs)
                vectors.append(states[valid].float().cpu())
            vectors = torch.cat(vectors)
            chosen = vectors[torch.randperm(len(vectors), generator=generator)[: self.codebook.codebook_start_vectors]]
            self.model.vector_quantizer.initialize(chosen.to(device), generator=generator)
        self.model.train()
        logger.info("step %d: codebook started by k-means on %d vectors", self.state.global_step, len(chosen))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return loss, sums of squares a record, and codes: waveforms of a whole fold would fill the memory."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        mask = inputs["attention_mask"].bool()
        samples = inputs["input_values"].float().view(*mask.shape, -1)
        residual = samples - outputs.reconstruction.float().view(samples.shape)
        count = mask.sum((1, 2)) * samples.shape[-1]
        samples, residual = samples * mask[..., None], residual * mask[..., None]
        sums = torch.stack([count.float(), *(x.sum((1, 2, 3)) for x in (samples, samples**2, residual**2))], dim=1)
        return outputs.loss.detach(), sums, outputs.rhythm_codes


def _refuse_divided_codebook(trainer: QuantizerTrainer) -> None:
    """Refuse launches in which the codebook would not be that of one process with the whole batch."""
    if trainer.args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"--gradient_accumulation_steps {trainer.args.gradient_accumulation_steps}: the codebook follows every batch that "
            "it sees, so stage one takes 1. For a larger batch start more processes or raise --per_device_train_batch_size."
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "Stage one does not run under FSDP or DeepSpeed: the codebook must be whole on every process. Start it without "
            "their configuration file (accelerate launch --multi_gpu, torchrun); the xl quantizer fits one GPU."
        )


class _CodebookStart(TrainerCallback):
    def __init__(self, trainer: QuantizerTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        start = self.trainer.codebook.codebook_start_step
        if start >= state.max_steps:
            raise ValueError(
                f"--codebook_start_step {start}: the run ends at step {state.max_steps}, before its codebook starts, and its "
                f"codes would be random. Give less than {state.max_steps}, or train longer (--max_steps, --num_train_epochs)."
            )

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.trainer.codebook.codebook_start_step:
            self.trainer.start_codebook()


@contextmanager
def _without_codebook(model: AnyECGRhythmQuantizer, active: bool):
    """Let the encoder's unit vectors pass to the decoder as they are, and leave the codebook losses out."""
    if not active:
        yield
        return

    def pass_through(module, inputs, output):
        _, codes, loss_codebook, loss_commitment = output
        return nn.functional.normalize(inputs[0].float(), dim=-1), codes, loss_codebook * 0, loss_commitment * 0

    handle = model.vector_quantizer.register_forward_hook(pass_through)
    try:
        yield
    finally:
        handle.remove()


def _evaluation_figures(prediction) -> dict[str, float]:
    """Return explained variance, usage and perplexity over the whole evaluation set."""
    count, total, squares, residual = prediction.predictions.astype(np.float64).sum(axis=0)
    codes = prediction.label_ids[prediction.label_ids >= 0]
    shares = code_shares(codes, int(codes.max()) + 1)
    return {
        "fve": float(1 - residual / (squares - total**2 / count)),
        "codes_used": int((shares > 0).sum()),
        "perplexity": perplexity_of(shares),
        "biggest_code": float(shares.max()),
    }


def build_trainer(model_args, extractor_args, data_args, augmentation, codebook, args) -> QuantizerTrainer:
    """Return the trainer of one run, its model freshly started (or taken from `init_from`)."""
    set_seed(args.seed)
    if model_args.init_from:
        model = AnyECGRhythmQuantizer.from_pretrained(model_args.init_from, **model_args.overrides())
        extractor = load_extractor(model_args.init_from)
        extractor = extractor_args.inherited(extractor, f"--init_from {model_args.init_from}")
    else:
        config = AnyECGQuantizerConfig.from_preset(model_args.preset, **model_args.overrides())
        extractor = AnyECGFeatureExtractor(
            sampling_rate=config.sampling_rate, patch_size=config.patch_size, **vars(extractor_args)
        )
        model = AnyECGRhythmQuantizer(config)
    with args.main_process_first(desc="preparing records"):
        train, held_out = load_splits(data_args, extractor, seed=args.seed)
    collator = ECGCollator(
        extractor, window_seconds=data_args.window_seconds, augmentation=augmentation, with_demography=True
    )
    if not model_args.init_from:
        _fit_bands(model, train, collator)
    return QuantizerTrainer(
        model,
        args,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=extractor,
        codebook=codebook,
        inputs=digest_inputs(train, held_out, init_from=model_args.init_from),
    )


def _fit_bands(model: AnyECGRhythmQuantizer, train: ECGDataset, collator: ECGCollator) -> None:
    batch = next(batches_of(sample_of(train, NUM_STATISTICS_RECORDS), collator, batch_size=NUM_STATISTICS_RECORDS))
    model.fit_band_statistics(batch["input_values"], batch["attention_mask"])


def save_tokenizer(model: AnyECGRhythmQuantizer, extractor: AnyECGFeatureExtractor, output_dir: str | Path) -> None:
    """Write the quantizer and the feature extractor that carries it to one folder."""
    options = {name: value for name, value in extractor.to_dict().items() if name != "feature_extractor_type"}
    save_final(model, AnyECGRhythmFeatureExtractor(quantizer=model, **options), output_dir)


def main(argv: Sequence[str]) -> None:
    instances = parse_recipe(argv, ARGUMENTS)
    codebook = instances[-2]
    trainer = build_trainer(*instances)
    if is_finished(trainer, instances):
        return
    run_training(trainer, arguments=instances)
    report = describe_end(trainer) | {"evaluation": trainer.evaluate()}
    if trainer.is_world_process_zero() and codebook.health_records:
        held_out = sample_of(trainer.eval_dataset, codebook.health_records)
        report["codebook_health"] = measure(trainer.model, trainer.train_dataset, held_out, trainer.data_collator)
    finish(trainer, report, save=save_tokenizer)


if __name__ == "__main__":
    run_command(main)
