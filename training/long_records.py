"""Train and validate a head for records of minutes to a day on cached window vectors of a frozen backbone:

    python -m training.long_records training/recipes/small_long.yaml --long_data MITDB CPSC2021 --data PTBXL

`--long_data`: folders of WFDB records with rhythm and beat annotations (`.atr`), from which also the figures come; `--data`:
short records with PTB-XL statements, folds 1-8, of which each is one window. The run ends as a folder for
`pipeline("ecg-long-record")`, trained on all long records, its temperature and thresholds those of their cross-validation by
patient. `results.json` has the figures of that cross-validation, nested, for the head and for every other arm of
`training/long_arms.py`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from transformers import set_seed
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging as transformers_logging

from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg_long import AnyECGForLongRecords

from .arguments import AnyECGTrainingArguments, ModelArguments, parse_recipe
from .checkpointing import load_extractor, project_path
from .commands import run_command
from .data import DataArguments, list_sources, load_folds, with_task
from .labels import MULTI, WINDOW_LABELS, build_task
from .long_arms import (
    PROBE_STRENGTH,
    Arm,
    RhythmEntropy,
    Scorer,
    Scores,
    ShippedStatements,
    WindowProbe,
    one_pass_features,
    segments,
)
from .long_data import (
    RHYTHM_OF,
    LongRecord,
    SequenceDataset,
    WindowSequence,
    collate_sequences,
    prepare_long_records,
    prepare_short_records,
    read_long_records,
    sequences_sha256,
    simulate_long_records,
)
from .long_validation import arm_report, calibrate, cross_validate, refuse_few_patients
from .probe import LinearProbe
from .run_inputs import model_sha256
from .runs import describe_end, finish, is_finished, records_seen, run_training
from .splits import TRAIN_FOLDS
from .thresholds import fold_in_temperature
from .trainer import AnyECGTrainer
from .window_features import FeatureCache

logger = logging.getLogger(__name__)

CONFIG_CLASS = AnyECGConfig
HOP_SECONDS = 10.0  # windows follow each other: what is at their edges, the windows around tell the head


@dataclass
class LongRecordArguments:
    """Which long records, how the head sees them, how it is validated and beside what."""

    long_data: list[str] | None = None
    simulate_long: int = 0  # number of simulated long records where no --long_data is given (smoke recipes)
    long_share: float = 0.5  # of a step's sequences that are stretches of long records; the others are short records
    crop_windows: int = 36  # most windows of a stretch
    leads_alone: float = 0.5  # share of stretches that show one lead only
    rhythm_of: str = field(
        default="none",
        metadata={"help": "long records that teach AF: all, changing (those with and without) or none"},
    )
    folds: int = 7  # of the cross-validation by patient
    inner_folds: int = 3  # among the training patients of each: for temperature and thresholds
    bootstrap: int = 1000  # resamples of patients for 95 % intervals; 0 = none
    statements: str | None = field(
        default=None, metadata={"help": "folder of a classifier of PTB-XL statements to compare with"}
    )
    lead_window: int = 10  # patches along its lead that a token sees in the arm of one pass over the record

    def __post_init__(self):
        if not 0 < self.long_share <= 1 or not 0 <= self.leads_alone <= 1:
            raise ValueError("--long_share must be above 0 and at most 1, --leads_alone from 0 to 1.")
        for name in ("crop_windows", "folds", "inner_folds", "lead_window"):
            if getattr(self, name) < (2 if "folds" in name else 1):
                raise ValueError(
                    f"--{name} {getattr(self, name)}: accepted are whole numbers from {1 + ('folds' in name)}."
                )
        if self.rhythm_of not in RHYTHM_OF:
            raise ValueError(f"--rhythm_of {self.rhythm_of!r} is unknown. Accepted: {', '.join(RHYTHM_OF)}.")
        self.statements = self.statements and project_path(self.statements)


ARGUMENTS = (ModelArguments, DataArguments, LongRecordArguments, AnyECGTrainingArguments)


@dataclass
class Material:
    """What all arms are fitted on and measured with."""

    long: list[LongRecord]
    short: list[WindowSequence]
    extractor: AnyECGFeatureExtractor
    model_args: ModelArguments
    long_args: LongRecordArguments
    args: AnyECGTrainingArguments

    @cached_property
    def probe(self) -> LinearProbe | None:
        """Logistic regressions of the short records' windows, None where there are none."""
        if not self.short:
            return None
        features = np.concatenate([one.features for one in self.short]).astype(np.float64)
        labels = np.concatenate([one.labels for one in self.short]).astype(np.float64)
        return LinearProbe(features, labels, strength=PROBE_STRENGTH)

    def dataset(self, records: Sequence[LongRecord]) -> SequenceDataset:
        options = {
            name: getattr(self.long_args, name) for name in ("long_share", "crop_windows", "leads_alone", "rhythm_of")
        }
        return SequenceDataset(records, self.short, seed=self.args.seed, **options)


def build_model(model_args: ModelArguments) -> AnyECGForLongRecords:
    """Return the model: backbone of `init_from` frozen, head new.

    Raises:
        ValueError: no `init_from`: vectors of an untrained backbone would be kept for nothing.
    """
    if not model_args.init_from:
        raise ValueError(
            "--init_from is needed: the folder of a pretrained backbone, such as checkpoints/anyecg-small."
        )
    head = {"id2label": dict(enumerate(WINDOW_LABELS)), "label2id": {name: i for i, name in enumerate(WINDOW_LABELS)}}
    options = {"pooling": "mean_max", "problem_type": MULTI, **model_args.overrides()}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the report of the head's weights, which are to be missing, for each fold
    model = AnyECGForLongRecords.from_pretrained(model_args.init_from, new_head=True, **head, **options)
    transformers_logging.set_verbosity(verbosity)
    model.anyecg.requires_grad_(False)
    return model


def load_material(model_args, data_args, long_args, args) -> Material:
    """Return records as vectors of windows, from the cache where they are there."""
    model = build_model(model_args)
    extractor = load_extractor(model_args.init_from)
    extractor.hop_seconds = HOP_SECONDS
    cache = FeatureCache(model, extractor, data_args.cache_dir)
    records = (
        read_long_records(long_args.long_data)
        if long_args.long_data
        else simulate_long_records(long_args.simulate_long)
    )
    long = prepare_long_records(records, cache)
    refuse_few_patients(long, long_args.folds)
    if long_args.rhythm_of == "none" and not (data_args.data or data_args.simulate):
        raise ValueError(
            "--rhythm_of none: AF is learned from short records only. Give some by --data, or --rhythm_of all."
        )
    short = []
    if data_args.data or data_args.simulate:
        sources = list_sources(data_args)
        limits = {"limit": data_args.max_train_records, "seed": args.seed}
        chosen = load_folds(sources, load_extractor(model_args.init_from), TRAIN_FOLDS, args=data_args, **limits)
        short = prepare_short_records(with_task(chosen, build_task("windows")), cache, seed=args.seed)
    logger.info(
        "%d long records of %d patients, %d short ones", len(long), len({one.patient_id for one in long}), len(short)
    )
    return Material(long, short, extractor, model_args, long_args, args)


def build_trainer(material: Material, records: Sequence[LongRecord], args: AnyECGTrainingArguments) -> AnyECGTrainer:
    """Return the trainer of a head on `records` and all short ones."""
    set_seed(args.seed)
    model, dataset = build_model(material.model_args), material.dataset(records)
    model.record_head.standardise(torch.from_numpy(dataset.all_features()))
    start_at_probe(model, material.probe)
    start_counter(model, np.concatenate([one.counts for one in records]))
    inputs = {"long records": sequences_sha256(records), "short records": sequences_sha256(material.short)}
    inputs["--init_from"] = model_sha256(material.model_args.init_from)
    return AnyECGTrainer(
        model, args, train_dataset=dataset, processing_class=material.extractor, data_collator=collate_sequences,
        inputs=inputs,
    )  # fmt: skip


@torch.no_grad()
def start_at_probe(model: AnyECGForLongRecords, probe: LinearProbe | None) -> None:
    """Let the findings of a window start at those of logistic regressions of single windows; the context adds to them.

    Source: Kumar et al. 2022 (arXiv 2202.10054), as `--head_start probe` of fine-tuning.
    """
    if probe is None:
        return
    head, width = model.record_head, model.config.pooled_size
    weight = torch.as_tensor(probe.weight, dtype=torch.float32)
    head.window_classifier.weight.zero_()
    head.window_classifier.weight[:, :width] = weight * head.feature_scale
    head.window_classifier.bias.copy_(torch.as_tensor(probe.bias, dtype=torch.float32) + weight @ head.feature_mean)


@torch.no_grad()
def start_counter(model: AnyECGForLongRecords, counts: np.ndarray) -> None:
    """Let the counts of every window start at the mean of those in training, `(windows, 2)`."""
    mean = torch.as_tensor(counts.mean(0), dtype=torch.float32).clamp(min=1e-2)
    model.record_head.counter.weight.zero_()
    model.record_head.counter.bias.copy_(mean.expm1().log())  # the softplus of which is the mean


class RecordHead(Arm):
    """The head of `AnyECGForLongRecords`, trained by the recipe's own arguments."""

    def __init__(self, name: str, material: Material):
        self.name, self.material = name, material

    def fit(self, train: Sequence[LongRecord]) -> Scorer:
        args = copy.copy(self.material.args)
        args.save_strategy, args.report_to, args.disable_tqdm = SaveStrategy.NO, [], True
        args.logging_steps = max(args.max_steps, 1)
        trainer = build_trainer(self.material, train, args)
        trainer.train()
        trainer.take_final_weights()
        return scorer_of(trainer.model)


def scorer_of(model: AnyECGForLongRecords) -> Scorer:
    """Return what scores records by a trained head, not calibrated."""
    model.eval()

    @torch.no_grad()
    def score(record: LongRecord) -> Scores:
        features = torch.from_numpy(record.features)[None].to(model.device)
        whole = model(window_features=features)
        parts = [model(window_features=features[:, part]).record_logits[0] for part in segments(len(record.features))]
        arrays = (whole.logits[0], torch.stack(parts), whole.record_logits[0], whole.counts[0])
        return Scores(*(array.double().cpu().numpy() for array in arrays))

    return score


def rivals(material: Material) -> list[Arm]:
    """Return the arms that the head is compared with."""
    model, extractor = build_model(material.model_args).eval(), material.extractor
    options = {"pooling": model.config.pooling, "lead_window": material.long_args.lead_window}
    in_one_pass: dict[str, np.ndarray] = {}

    def of_one_pass(record: LongRecord) -> np.ndarray:
        if record.record_id not in in_one_pass:
            in_one_pass[record.record_id] = one_pass_features(model.anyecg, extractor, record, **options)
        return in_one_pass[record.record_id]

    arms: list[Arm] = [WindowProbe("logistic regression of windows", material.short)]
    if material.short:
        arms.append(WindowProbe("... of windows of long records alone"))
        arms.append(WindowProbe("... of short records alone", material.short, with_long=False))
    arms.append(WindowProbe("... of windows from one pass, lead_window", material.short, features_of=of_one_pass))
    arms.append(RhythmEntropy("RR entropy rule", extractor))
    if material.long_args.statements:
        arms.append(ShippedStatements("statements classifier by window", material.long_args.statements, extractor))
    return arms


def validate(material: Material) -> tuple[dict, list]:
    """Return the report of all arms, and the head's scores of all records, each by a fold without its patient."""
    options = {"folds": material.long_args.folds, "inner_folds": material.long_args.inner_folds}
    report, scored = {}, []
    for arm in (RecordHead("record head", material), *rivals(material)):
        judged = cross_validate(arm, material.long, **options)
        scored = scored or [(one.record, one.scores) for one in judged]  # of the head, which comes first
        report[arm.name] = arm_report(judged, num_resamples=material.long_args.bootstrap)
        logger.info("%s: %s", arm.name, {name: value for name, value in report[arm.name].items() if "auroc" in name})
    return report, scored


def complete_head(model: AnyECGForLongRecords, scored: list) -> dict:
    """Fold the temperatures of the cross-validation into the head and store its thresholds; return what was done."""
    calibration = calibrate(scored)
    fold_in_temperature(model.record_head.window_classifier, calibration.temperature)
    fold_in_temperature(model.record_head.record_classifier, calibration.record_temperature)
    model.config.thresholds, model.config.record_thresholds = calibration.thresholds, calibration.record_thresholds
    return vars(calibration)


def describe(material: Material) -> dict:
    """Return what the figures are of."""
    long, short = material.long, np.concatenate([one.labels for one in material.short] or [np.zeros((0, 2))])
    windows = np.concatenate([one.labels for one in long]) >= 0.5
    return {
        "long_records": len(long),
        "patients": len({one.patient_id for one in long}),
        "hours": sum(one.record.duration_seconds for one in long) / 3600,
        "windows": len(windows),
        "windows_af": int(windows[:, 0].sum()),
        "windows_v": int(windows[:, 1].sum()),
        "short_records": len(short),
        "short_af": int(short[:, 0].sum()),
        "short_v": int(short[:, 1].sum()),
    }


def main(argv: Sequence[str]) -> None:
    instances = model_args, data_args, long_args, args = parse_recipe(argv, ARGUMENTS)
    if args.world_size > 1:
        raise ValueError(f"{args.world_size} processes: the head is small, start it as one, with `python -m`.")
    material = load_material(model_args, data_args, long_args, args)
    trainer = build_trainer(material, material.long, args)
    if is_finished(trainer, instances):
        return
    run_training(trainer, arguments=instances)
    arms, scored = validate(material)
    report = describe_end(trainer) | {"records_seen": records_seen(trainer), "material": describe(material)}
    report |= {"calibration": complete_head(trainer.model, scored), "arms": arms}
    finish(trainer, report)


if __name__ == "__main__":
    run_command(main)
