"""From items of `ECGDataset`, or rows of the data set (`EpochRows`), to a batch of tensors: window, shift, gain, noise, lead
dropping, masks, padding.

All randomness of an item follows from its own seed, (seed, epoch, record), and never from a global generator: a batch is
the same after a restart, in any worker, at any moment. Items without a seed (evaluation) are not altered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import LEAD_IDS, STANDARD_LEADS

from .dataset_rows import read_row
from .heartbeats import BEAT_RATE, BEAT_SAMPLES, RHYTHM, measure_beats
from .lead_subsets import draw_leads
from .masking import PATTERN_SHARES, mask_record

logger = logging.getLogger(__name__)

SEX_CODES = {"male": 0.0, "female": 1.0}
EVAL_MASK_SEED = 20_240_917  # masks of evaluation are fixed, whatever the seed of the run
_STREAMS = {
    "window": 0,
    "mask": 1,
    "leads": 2,
    "cut": 3,
}  # one generator each, so that an option does not change the others


@dataclass
class AugmentationArguments:
    """What training does to a record before the model sees it. All are off at 0."""

    max_shift_seconds: float = 0.0  # the record starts up to this much later; what is cut off is gone
    gain_range: float = 0.0  # all leads times a factor between 1 - this and 1 + this
    noise_mv: float = 0.0  # white noise of a standard deviation up to this
    lead_subset_probability: float = 0.0  # of a record to keep only some leads, see `lead_subsets.draw_leads`
    max_leads: int = 0  # of a record with more leads so many random ones are kept, which costs as much less

    def __post_init__(self):
        for name in ("max_shift_seconds", "gain_range", "noise_mv", "lead_subset_probability", "max_leads"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: accepted are 0 (off) and above.")
        if self.lead_subset_probability > 1 or self.gain_range >= 1:
            raise ValueError("--lead_subset_probability must be at most 1, and --gain_range below 1.")


class ECGCollator:
    """Callable: list of items -> dictionary of tensors that the models' `forward` takes.

    Args:
        extractor: its `pad` makes the batch; its rate, patch size and window cut the records.
        window_seconds (`float`): longer records are cut to this, at random where items have a seed, else in the middle.
        augmentation: for items with a seed; None = none.
        leads (sequence of `str`, *optional*): standard names; of each record only these are taken. None = all.
        mask_ratio (`float`, *optional*): adds `bool_masked_pos`; None = no masks.
        mask_pattern (`str`, *optional*): of all masks; None draws one a record with `mask_shares`.
        hide (callable, *optional*): adds `bool_masked_pos` in place of these masks: what it returns for a record's attention
            mask, lead ids, generator and pattern; see `training.lead_generation`.
        with_demography (`bool`): adds `age` (years), `sex` (0 male, 1 female), `weight` (kg), NaN where unknown.
        with_beats (`bool`): adds `beats` and `rhythm`, see `training.heartbeats`: of all leads, before some are dropped.

    Raises:
        ValueError: beats are asked for at a rate at which they cannot be measured.
    """

    def __init__(
        self,
        extractor: AnyECGFeatureExtractor,
        *,
        window_seconds: float = 10.0,
        augmentation: AugmentationArguments | None = None,
        leads: Sequence[str] | None = None,
        mask_ratio: float | None = None,
        mask_pattern: str | None = None,
        mask_shares: Sequence[float] = PATTERN_SHARES,
        hide: Callable | None = None,
        with_demography: bool = False,
        with_beats: bool = False,
    ):
        self.extractor = extractor
        self.patch_size = int(extractor.patch_size)
        self.window_seconds = window_seconds
        self.window_patches = max(1, round(window_seconds * extractor.sampling_rate / self.patch_size))
        self.augmentation = augmentation or AugmentationArguments()
        self.lead_ids = None if leads is None else [LEAD_IDS[name] for name in leads]
        self.mask_ratio, self.mask_pattern, self.mask_shares, self.hide = mask_ratio, mask_pattern, mask_shares, hide
        self.with_demography, self.with_beats = with_demography, with_beats
        if with_beats and extractor.sampling_rate % BEAT_RATE:
            raise ValueError(
                f"Beats are measured at {BEAT_RATE} Hz, of which the model's {extractor.sampling_rate} Hz are no multiple: "
                "leave --beat_weight out."
            )

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Return `input_values` (B, L, T), `lead_ids` (B, L), `attention_mask` (B, L, P) and what was asked for.

        Args:
            items: of `ECGDataset`, whose `rhythm_codes` become `labels` (B, L, P); or rows of the data set, read and
                extracted here, of long records the window alone. A row in whose window nothing is usable is left out of
                the batch, with a warning.

        Raises:
            ValueError: nothing is left of a batch, or a row's signal is damaged.
        """
        if "signal" in items[0]:
            items = self._read_rows(items)
        features = [self._features(item) for item in items]
        beats = self._beats(features) if self.with_beats else {}
        self._drop_leads(features, items)
        if self.mask_ratio is not None or self.hide is not None:
            for feature, item in zip(features, items, strict=True):
                feature["bool_masked_pos"] = self._hidden(feature, item)
        batch = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in self._pad(features).items()}
        if "bool_masked_pos" in batch:
            batch["bool_masked_pos"] = batch["bool_masked_pos"].bool()
        if "rhythm_codes" in batch:
            batch["labels"] = batch.pop("rhythm_codes")
        elif "labels" in items[0]:
            batch["labels"] = torch.from_numpy(np.stack([np.asarray(item["labels"]) for item in items]))
        return batch | beats | (self._demography(items) if self.with_demography else {})

    def _features(self, item: dict) -> dict[str, np.ndarray]:
        """Return one record as the extractor's `pad` takes it: in millivolt, cut, altered where it has a seed."""
        generator = _generator(item, "window")
        coded = {}
        if "rhythm_codes" in item:
            steps, mask, coded["rhythm_codes"] = self._coded_window(item, generator)
        else:
            steps, mask = self._window(item["steps"], item["mask"], generator)
        values = steps if item["step_mv"] is None else steps * np.float32(item["step_mv"])  # None: in millivolt already
        if generator is not None:
            values = self._alter(values, mask, generator)
        feature = {
            "input_values": values,
            "lead_ids": item["lead_ids"],
            "attention_mask": mask.astype(np.int64),
            **coded,
        }
        if self.lead_ids is None:
            return feature
        rows = np.isin(item["lead_ids"], self.lead_ids)
        return {name: value[rows] for name, value in feature.items()}

    def usable_leads(self, item: dict) -> set[int]:
        """Return the ids of the leads of which something is usable in the window that evaluation takes of an item."""
        _, mask = self._window(item["steps"], item["mask"], None)
        return set(np.asarray(item["lead_ids"])[mask.any(axis=1)].tolist())

    def _coded_window(self, item: dict, generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return samples, mask and codes of one of the windows that were encoded: codes depend on what else is in it."""
        windows = item["rhythm_codes"]
        chosen = (len(windows) - 1) // 2 if generator is None else int(generator.integers(len(windows)))
        first, codes = windows[chosen]
        end = first + codes.shape[1]
        steps = item["steps"][:, first * self.patch_size : end * self.patch_size]
        return steps, item["mask"][:, first:end], codes.astype(np.int64)

    def _window(self, steps: np.ndarray, mask: np.ndarray, generator) -> tuple[np.ndarray, np.ndarray]:
        """Return samples and mask of a window that begins at a patch, shifted where that is asked for."""
        surplus = mask.shape[1] - self.window_patches
        if surplus > 0:
            first = surplus // 2 if generator is None else int(generator.integers(surplus + 1))
            steps = steps[:, first * self.patch_size : (first + self.window_patches) * self.patch_size]
            mask = mask[:, first : first + self.window_patches]
        if generator is None or self.augmentation.max_shift_seconds == 0:
            return steps, mask
        return self._shift(steps, mask, generator)

    def _shift(self, steps: np.ndarray, mask: np.ndarray, generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the record begun `shift` samples later: the end is filled with zeros, as the extractor does.

        A new patch counts as real where the patches that it is made of are; the last one, of which a part is missing,
        where at least half of it is there.
        """
        limit = round(self.augmentation.max_shift_seconds * self.extractor.sampling_rate)
        shift = int(generator.integers(min(limit, steps.shape[1] - self.patch_size) + 1))
        whole, part = divmod(shift, self.patch_size)
        moved = np.zeros_like(steps)
        moved[:, : steps.shape[1] - shift] = steps[:, shift:]
        shifted = np.zeros_like(mask)
        shifted[:, : mask.shape[1] - whole] = mask[:, whole:]
        if part:
            shifted[:, : mask.shape[1] - whole - 1] &= mask[:, whole + 1 :]
            if part > self.patch_size // 2:
                shifted[:, mask.shape[1] - whole - 1] = 0
        if not shifted.any():  # hardly anything usable: leave such a record in place
            return steps, mask
        moved = moved * np.repeat(shifted, self.patch_size, axis=1).astype(moved.dtype)
        return moved, shifted

    def _alter(self, values: np.ndarray, mask: np.ndarray, generator) -> np.ndarray:
        options = self.augmentation
        if options.gain_range:
            values = values * np.float32(generator.uniform(1 - options.gain_range, 1 + options.gain_range))
        if options.noise_mv:
            amplitude = np.float32(generator.uniform(0, options.noise_mv))
            noise = generator.standard_normal(values.shape, dtype=np.float32) * amplitude
            values = values + noise * np.repeat(mask, self.patch_size, axis=1)
        return values

    def _read_rows(self, rows: Sequence[dict]) -> list[dict]:
        """Return items in the form of `ECGDataset`'s of the rows of which something is usable."""
        records = [self._read_window(row) for row in rows]
        try:
            features, kept = self.extractor.items(records), rows
        except ValueError:  # of one of them; which and why is found out one by one
            usable = [place for place, record in enumerate(records) if self._is_usable(record)]
            if not usable:
                raise
            features = self.extractor.items([records[place] for place in usable])
            kept = [rows[place] for place in usable]
        absent = {"age": None, "sex": None, "weight": None, "index": 0, "seed": None}
        return [
            absent | row | {
                "steps": feature["input_values"], "step_mv": None, "lead_ids": feature["lead_ids"],
                "mask": feature["attention_mask"].astype(np.uint8),
            }
            for row, feature in zip(kept, features, strict=True)
        ]  # fmt: skip

    def _read_window(self, row: dict):
        """Return the record of a row, of a long one a window: at random where the row has a seed, else the middle.

        It begins with a whole second, of which the quality is known.
        """
        surplus = int(row["num_samples"] / row["sampling_rate"] - self.window_seconds)
        if surplus <= 0:
            return read_row(row)
        generator = _generator(row, "cut") if row.get("seed") else None
        start = surplus // 2 if generator is None else int(generator.integers(surplus + 1))
        return read_row(row, float(start), self.window_seconds)

    def _is_usable(self, record) -> bool:
        try:
            self.extractor.items(record)
        except ValueError as error:
            logger.warning("left out of its batch: %s", error)
            return False
        return True

    def _drop_leads(self, features: list[dict], items: Sequence[dict]) -> None:
        """Remove leads of some records: whether, how many and which says each one's seed."""
        for feature, item in zip(features, items, strict=True):
            generator, probability = _generator(item, "leads"), self.augmentation.lead_subset_probability
            if generator is None:
                continue
            usable = np.flatnonzero(feature["attention_mask"].any(axis=1))
            kept = usable
            if probability and generator.random() < probability:
                kept = draw_leads(usable, feature["lead_ids"], generator)
            most = self.augmentation.max_leads or len(kept)
            if len(kept) > most:
                kept = np.sort(generator.permutation(kept)[:most])
            if len(kept) < len(usable):
                feature.update({name: value[kept] for name, value in feature.items()})

    def _hidden(self, feature: dict, item: dict) -> np.ndarray:
        generator = _generator(item, "mask") or np.random.default_rng((EVAL_MASK_SEED, item["index"]))
        pattern = item.get("mask_pattern") or self.mask_pattern
        if self.hide is not None:
            return self.hide(feature["attention_mask"], feature["lead_ids"], generator, pattern)
        return mask_record(
            feature["attention_mask"], generator, ratio=self.mask_ratio, pattern=pattern, shares=self.mask_shares
        )

    def _beats(self, features: list[dict]) -> dict[str, torch.Tensor]:
        """Return `beats` (B, 12, samples) in millivolt by lead and `rhythm` (B, figures), NaN where nothing can be said."""
        beats = np.full((len(features), len(STANDARD_LEADS), BEAT_SAMPLES), np.nan, dtype=np.float32)
        rhythm = np.full((len(features), len(RHYTHM)), np.nan, dtype=np.float32)
        for row, feature in enumerate(features):
            leads = np.flatnonzero((feature["lead_ids"] > 0) & (feature["lead_ids"] <= len(STANDARD_LEADS)))
            usable = np.repeat(feature["attention_mask"][leads].astype(bool), self.patch_size, axis=1)
            found = measure_beats(feature["input_values"][leads], usable, self.extractor.sampling_rate)
            if found is not None:
                beats[row, feature["lead_ids"][leads] - 1], rhythm[row] = found
        return {"beats": torch.from_numpy(beats), "rhythm": torch.from_numpy(rhythm)}

    def _pad(self, features: list[dict]) -> dict[str, np.ndarray]:
        shapes = {feature["input_values"].shape for feature in features}
        if len(shapes) == 1:  # the extractor's `pad` would do the same, at twice the time
            return {name: np.stack([feature[name] for feature in features]) for name in features[0]}
        return dict(self.extractor.pad(features))

    def _demography(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        def number(value) -> float:
            return float("nan") if value is None else float(value)

        return {
            "age": torch.tensor([number(item["age"]) for item in items]),
            "sex": torch.tensor([SEX_CODES.get(item["sex"], float("nan")) for item in items]),
            "weight": torch.tensor([number(item["weight"]) for item in items]),
        }


def _generator(item: dict, stream: str) -> np.random.Generator | None:
    """Return the item's generator for one kind of randomness, None for an item of an evaluation."""
    return None if item["seed"] is None else np.random.default_rng((*item["seed"], _STREAMS[stream]))
