"""Ways to tell fibrillation and ventricular beats of each window of a long record, for the record head to be compared with.

An `Arm` is fitted on some long records and then scores others. Not one of them chooses thresholds: `long_validation` does, alike
for all.

- `WindowProbe`: logistic regressions on the vectors of single windows, no head; a record is the mean of its windows.
- `WindowProbe` on `one_pass_features`: the same, where the backbone sees the whole record at once, each token a stretch of it.
- `ShippedStatements`: scores AFIB, AFLT and PVC of the classifier of PTB-XL statements, by window; nothing is fitted.
- `RhythmEntropy`: coefficient of sample entropy of the RR intervals around a window; nothing is fitted; beats it cannot tell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit, logit
from sklearn.linear_model import PoissonRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import pipeline
from transformers.modeling_outputs import BaseModelOutputWithPooling

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg import AnyECGModel
from anyecg_hf.modeling_anyecg_heads import pool_tokens

from .heartbeats import find_beats
from .labels import WINDOW_LABELS
from .long_data import LongRecord, WindowSequence
from .probe import LinearProbe

SEGMENT_WINDOWS = 30  # a segment, of which there are more than records, is what record-level calibration rests on
PROBE_STRENGTH = 1e-2  # C of the logistic regressions: the best of 0.001, 0.01, 0.1 in a first look at the same records
ENTROPY_SECONDS = 30.0  # of RR intervals around the middle of a window
MATCH_SECONDS = 0.03  # two RR intervals this near to each other match
_LEAST_SCORE = 1e-6
_STATEMENTS = {"AF": ("AFIB", "AFLT"), "V": ("PVC",)}


def segments(num_windows: int) -> list[slice]:
    """Return consecutive parts of a record of about `SEGMENT_WINDOWS` windows, one where there are fewer."""
    count = max(1, round(num_windows / SEGMENT_WINDOWS))
    edges = np.linspace(0, num_windows, count + 1).round().astype(int)
    return [slice(int(first), int(end)) for first, end in zip(edges[:-1], edges[1:], strict=True)]


@dataclass(frozen=True)
class Scores:
    """What an arm says of a record, not calibrated yet. NaN in the column of a label that it cannot tell.

    Attributes:
        logits (`np.ndarray` of shape `(windows, 2)`), segment_logits `(segments, 2)`, record_logits `(2,)`: log odds.
        counts (`np.ndarray` of shape `(windows, 2)`): expected beats and ventricular beats; NaN where not told.
    """

    logits: np.ndarray
    segment_logits: np.ndarray
    record_logits: np.ndarray
    counts: np.ndarray

    @classmethod
    def of_windows(cls, logits: np.ndarray, counts: np.ndarray | None = None) -> Scores:
        """Return the scores of an arm without a view of the record: the mean of the log odds of its windows."""
        counts = np.full((len(logits), 2), np.nan) if counts is None else counts
        parts = np.stack([logits[part].mean(0) for part in segments(len(logits))])
        return cls(logits, parts, logits.mean(0), counts)


Scorer = Callable[[LongRecord], Scores]


class Arm(ABC):
    """A way to score windows; `name` is its row in the report."""

    name: str

    @abstractmethod
    def fit(self, train: Sequence[LongRecord]) -> Scorer:
        """Return what scores other records, having seen `train`."""


class WindowProbe(Arm):
    """Logistic regressions and, for beats, Poisson regressions on the vectors of single windows.

    Args:
        features_of: from a long record to its vectors `(windows, F)`.
        short: records that are fitted on in any case.
        with_long (`bool`): fit on windows of long records too; False: on those of short ones alone, but for the counts.
    """

    def __init__(
        self,
        name: str,
        short: Sequence[WindowSequence] = (),
        *,
        features_of: Callable[[LongRecord], np.ndarray] = lambda record: record.features,
        with_long: bool = True,
    ):
        self.name, self.short, self.features_of, self.with_long = name, short, features_of, with_long

    def fit(self, train: Sequence[LongRecord]) -> Scorer:
        long = np.concatenate([self.features_of(record) for record in train])
        own, seen = ([long], train) if self.with_long else ([], ())
        features = np.concatenate([*own, *(one.features for one in self.short)])
        labels = np.concatenate([one.labels for one in (*seen, *self.short)]) >= 0.5
        probe = LinearProbe(features.astype(np.float64), labels.astype(np.float64), strength=PROBE_STRENGTH)
        counters = [_fit_counter(long, column) for column in np.concatenate([record.counts for record in train]).T]

        def score(record: LongRecord) -> Scores:
            own = self.features_of(record).astype(np.float64)
            counts = np.stack([np.minimum(counter.predict(own), 1e3) for counter in counters], axis=1)
            return Scores.of_windows(probe.logits(own), counts)

        return score


def _fit_counter(features: np.ndarray, counts: np.ndarray):
    counter = make_pipeline(StandardScaler(), PoissonRegressor(alpha=1.0, max_iter=300))
    return counter.fit(features.astype(np.float64), counts.astype(np.float64))


@torch.no_grad()
def one_pass_features(
    backbone: AnyECGModel, extractor: AnyECGFeatureExtractor, record: LongRecord, *, pooling: str, lead_window: int
) -> np.ndarray:
    """Return the vectors of a record's windows `(windows, F)` from one pass over all of it.

    The time table of a backbone trained on `extractor.window_seconds` is repeated: a patch has the time that it would have in
    its window. The convolutions' statistics are those of the whole lead.

    Args:
        lead_window (`int`): a token attends to its own lead this many patches before and after; see docs/attention.md.
    """
    batch = extractor(record.record, return_tensors="pt")
    patches = batch["attention_mask"].shape[2]
    model = stretched(backbone, patches, round(extractor.window_seconds), lead_window=lead_window)
    outputs = model(**{name: batch[name] for name in ("input_values", "lead_ids", "attention_mask")})
    size = round(extractor.window_seconds * extractor.sampling_rate / extractor.patch_size)
    return np.concatenate([
        _pooled(outputs.last_hidden_state, batch, round(start), size, pooling) for start in record.start_seconds
    ])  # fmt: skip


def _pooled(states: torch.Tensor, batch, first: int, size: int, pooling: str) -> np.ndarray:
    part, mask = states[:, :, first : first + size], batch["attention_mask"][:, :, first : first + size]
    weights = mask[..., None].to(part.dtype)
    mean = (part * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1)
    outputs = BaseModelOutputWithPooling(last_hidden_state=part, pooler_output=mean)
    return pool_tokens(outputs, batch["lead_ids"], mask, pooling).numpy()


def stretched(backbone: AnyECGModel, patches: int, trained_patches: int, *, lead_window: int) -> AnyECGModel:
    """Return a copy of `backbone` for records of `patches`, its attention along a lead limited, its time table repeated."""
    config = type(backbone.config).from_dict(backbone.config.to_dict())
    config.max_patches = patches
    config.sparse_attention_config.lead_window = lead_window
    model = AnyECGModel(config)
    weights = backbone.state_dict()
    table = weights["embeddings.time_embedding.weight"][:trained_patches]
    weights["embeddings.time_embedding.weight"] = table.repeat(-(-patches // trained_patches), 1)[:patches]
    model.load_state_dict(weights)
    return model.eval()


class ShippedStatements(Arm):
    """The scores of a checkpoint of the PTB-XL statements, on the same windows.

    Raises:
        ValueError: it does not know a statement that is needed.
    """

    def __init__(self, name: str, checkpoint: str, extractor: AnyECGFeatureExtractor):
        self.name, self.known = name, {}
        self.classify = pipeline("ecg-classification", model=checkpoint, feature_extractor=extractor)
        self.labels = self.classify.model.config.label2id
        missing = [code for codes in _STATEMENTS.values() for code in codes if code not in self.labels]
        if missing:
            raise ValueError(f"{checkpoint} has no label {', '.join(missing)}. Give a classifier of PTB-XL statements.")

    def fit(self, train: Sequence[LongRecord]) -> Scorer:
        return self._score

    def _score(self, record: LongRecord) -> Scores:
        if record.record_id not in self.known:
            prepared = self.classify.preprocess(record.record)
            (result,) = self.classify.forward([prepared])
            self.known[record.record_id] = Scores.of_windows(self._log_odds(expit(np.stack(result["windows"]))))
        return self.known[record.record_id]

    def _log_odds(self, scores: np.ndarray) -> np.ndarray:
        """Return the log odds that one of the statements of each label holds, as if they were independent."""
        columns = [[self.labels[code] for code in _STATEMENTS[label]] for label in WINDOW_LABELS]
        any_of = np.stack([1 - (1 - scores[:, own]).prod(1) for own in columns], axis=1)
        return logit(np.clip(any_of, _LEAST_SCORE, 1 - _LEAST_SCORE))


class RhythmEntropy(Arm):
    """Irregular RR intervals: their coefficient of sample entropy, from beats found in the filtered signal.

    Source: Lake & Moorman 2011, Am J Physiol Heart Circ Physiol 300:H319-325, with m = 1 and r = 30 ms fixed.
    """

    def __init__(self, name: str, extractor: AnyECGFeatureExtractor):
        self.name, self.extractor, self.known = name, extractor, {}

    def fit(self, train: Sequence[LongRecord]) -> Scorer:
        return self._score

    def _score(self, record: LongRecord) -> Scores:
        if record.record_id not in self.known:
            self.known[record.record_id] = self._of(record)
        return self.known[record.record_id]

    def _of(self, record: LongRecord) -> Scores:
        (item,) = self.extractor.items(record.record)
        usable = np.repeat(item["attention_mask"].astype(bool), self.extractor.patch_size, axis=1)
        beats = find_beats(item["input_values"], usable, self.extractor.sampling_rate) / self.extractor.sampling_rate
        middles = record.start_seconds + self.extractor.window_seconds / 2
        entropy = [_entropy_around(beats, middle) for middle in middles]
        return Scores.of_windows(np.stack([entropy, np.full(len(entropy), np.nan)], axis=1))


def _entropy_around(beats: np.ndarray, middle: float) -> float:
    near = beats[np.abs(beats - middle) <= ENTROPY_SECONDS / 2]
    return coefficient_of_sample_entropy(np.diff(near))


def coefficient_of_sample_entropy(intervals: np.ndarray) -> float:
    """Return COSEn of RR `intervals` (seconds): high where they follow no pattern; -5 of fewer than four.

    Source: as `RhythmEntropy`. Without any match the numbers of matches count as a half.
    """
    if len(intervals) < 4:
        return -5.0
    near = np.abs(intervals[:, None] - intervals[None]) <= MATCH_SECONDS
    pairs = np.triu(near[:-1, :-1], 1)
    longer = (pairs & near[1:, 1:]).sum()
    entropy = np.log(max(pairs.sum(), 0.5) / max(longer, 0.5))
    return float(entropy + np.log(2 * MATCH_SECONDS) - np.log(intervals.mean()))
