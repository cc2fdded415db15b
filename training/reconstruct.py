"""Teach a backbone to generate leads that are missing or damaged:

    accelerate launch -m training.reconstruct training/recipes/small_reconstruction.yaml --data DIR --init_from BACKBONE

The network starts at least squares: mean products of the leads, from training records, estimate what is hidden from what is
seen, and the head, which adds to that, starts at zero. Training hides whole leads and spans (`training/lead_generation.py`);
on fold 9 each record is one of the cases G1 to G5 in turn, and `gain_db` is what is gained on least squares. The run ends as a
folder for `pipeline("ecg-reconstruction")`; figures by case and lead are those of `training.evaluate_reconstruction`.

    ... --preset tiny --config '{"waveform_state_channels": 0, "waveform_channels": [64, 192]}'

trains the head by itself, a 1-D U-Net, to compare with.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import set_seed

from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import LEAD_IDS, STANDARD_LEADS
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction

from .arguments import AnyECGTrainingArguments, ExtractorArguments, ModelArguments, parse_recipe
from .checkpointing import load_extractor
from .collate import AugmentationArguments, ECGCollator
from .commands import run_command
from .data import DataArguments, ECGDataset, load_splits
from .lead_generation import CASES, SPANS, hide_leads
from .objectives import MaskedWaveform
from .pretrain import PretrainTrainer, save_finished
from .run_inputs import digest_inputs
from .runs import describe_end, finish, is_finished, records_seen, run_training
from .splits import spread_order

logger = logging.getLogger(__name__)

CONFIG_CLASS = AnyECGConfig


@dataclass
class ReconstructionArguments:
    """Where the network starts."""

    covariance_records: int = 4000  # training records that give the mean products of the leads

    def __post_init__(self):
        if self.covariance_records < 1:
            raise ValueError(f"--covariance_records {self.covariance_records}: at least one record is needed.")


ARGUMENTS = (
    ModelArguments,
    ExtractorArguments,
    DataArguments,
    AugmentationArguments,
    ReconstructionArguments,
    AnyECGTrainingArguments,
)


class OneCaseEach(Dataset):
    """Records of a split for evaluation, with the cases G1 to G5 in turn."""

    PATTERNS = (*CASES, SPANS)

    def __init__(self, records: ECGDataset):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.records[index] | {"mask_pattern": self.PATTERNS[index % len(self.PATTERNS)]}


def lead_covariance(records: ECGDataset, *, num_records: int) -> np.ndarray:
    """Return the mean products of the 12 standard leads over a fixed sample of `records`, `(12, 12)` in mV^2.

    Of each record the patches count in which all twelve are usable.

    Raises:
        ValueError: there is no such patch.
    """
    names, products, count = records.column("record_id"), np.zeros((len(STANDARD_LEADS),) * 2), 0
    wanted = [LEAD_IDS[name] for name in STANDARD_LEADS]
    for index in sorted(range(len(records)), key=lambda index: spread_order(names[index]))[:num_records]:
        item = records[index]
        rows = [np.flatnonzero(item["lead_ids"] == lead_id) for lead_id in wanted]
        if not all(len(row) for row in rows):
            continue
        rows = np.concatenate(rows)
        usable = item["mask"][rows].all(axis=0)
        leads = item["steps"][rows].reshape(len(rows), len(usable), -1)[:, usable].reshape(len(rows), -1)
        leads = leads * np.float64(item["step_mv"])
        products, count = products + leads @ leads.T, count + leads.shape[1]
    if not count:
        raise ValueError(
            "No training record has a second in which all twelve leads are usable: least squares needs some to start from."
        )
    return products / count


def build_model(model_args: ModelArguments, covariance: np.ndarray) -> AnyECGForLeadReconstruction:
    """Return the model, from `init_from` or new; a head that was not trained before starts at least squares."""
    overrides = model_args.overrides()
    if model_args.init_from:
        model = AnyECGForLeadReconstruction.from_pretrained(model_args.init_from, new_head=True, **overrides)
    else:
        model = AnyECGForLeadReconstruction(AnyECGConfig.from_preset(model_args.preset, **overrides))
    if model.config.lead_covariance is None:
        start_at_least_squares(model, covariance)
    if not model.config.waveform_state_channels:
        model.anyecg.requires_grad_(False)  # takes no part: it would have no optimizer state
    return model


@torch.no_grad()
def start_at_least_squares(model: AnyECGForLeadReconstruction, covariance: np.ndarray) -> None:
    """Let the model give its linear estimate, from `covariance` (12, 12) in mV^2, and nothing beyond it."""
    model.config.lead_covariance = [[float(f"{value:.6g}") for value in row] for row in covariance]
    for value in model.waveform_head.up_fine.parameters():
        value.zero_()


def build_trainer(model_args, extractor_args, data_args, augmentation, reconstruction_args, args) -> PretrainTrainer:
    """Return the trainer of one run."""
    if model_args.init_from:
        inherited = load_extractor(model_args.init_from)
        extractor = extractor_args.inherited(inherited, f"--init_from {model_args.init_from}")
    else:
        extractor = AnyECGFeatureExtractor(**vars(extractor_args))
    with args.main_process_first(desc="preparing records"):
        train, held_out = load_splits(data_args, extractor, seed=args.seed)
    covariance = lead_covariance(train, num_records=reconstruction_args.covariance_records)
    set_seed(args.seed)
    collator = ECGCollator(
        extractor, window_seconds=data_args.window_seconds, augmentation=augmentation, hide=hide_leads
    )
    return PretrainTrainer(
        MaskedWaveform(build_model(model_args, covariance)), args, data_collator=collator, train_dataset=train,
        processing_class=extractor, inputs=digest_inputs(train, held_out, init_from=model_args.init_from),
        eval_dataset=OneCaseEach(held_out),
    )  # fmt: skip


def main(argv: Sequence[str]) -> None:
    instances = parse_recipe(argv, ARGUMENTS)
    trainer = build_trainer(*instances)
    if is_finished(trainer, instances):
        return
    run_training(trainer, arguments=instances)
    report = describe_end(trainer) | {"records_seen": records_seen(trainer), "evaluation": trainer.evaluate()}
    finish(trainer, report, save=save_finished)


if __name__ == "__main__":
    run_command(main)
