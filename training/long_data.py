"""Records to train a record head on: long annotated ones, and short ones with statements, each as vectors of windows.

Long records are few; short ones (PTB-XL) show what one window of fibrillation or of ventricular beats looks like in thousands of
patients. Both are `WindowSequence`: a short record is a sequence of one window.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from anyecg_hf.leads import STANDARD_LEADS, resolve_lead_name
from anyecg_hf.modeling_anyecg_long import BEAT_KINDS
from anyecg_hf.records import Annotation, Record
from anyecg_hf.simulate import simulate_record

from .collate import AugmentationArguments, ECGCollator
from .corpora import list_records
from .data import ECGDataset
from .inference import INPUT_NAMES
from .long_labels import beat_samples, is_af, label_windows, patient_of
from .window_features import WINDOWS_PER_BATCH, FeatureCache

logger = logging.getLogger(__name__)

STRETCH_SECONDS = 60.0  # of a simulated record; after each its rhythm changes
SEQUENCES_AN_EPOCH = 4096
# In a record of one rhythm its patient and device can be learned in place of the rhythm: with a dozen patients they are.
RHYTHM_OF = ("all", "changing", "none")
STRETCH_WINDOWS, AF_SHARE, V_SHARES = 12, 0.3, (0.0, 0.1, 0.5)  # of made-up sequences


@dataclass(frozen=True)
class WindowSequence:
    """Consecutive windows of one record.

    Attributes:
        features (`np.ndarray` of shape `(windows, F)`): of the backbone, float32.
        labels (`np.ndarray` of shape `(windows, 2)`): in the order of `WINDOW_LABELS`, see `label_windows`.
        counts (`np.ndarray` of shape `(windows, 2)`): beats and ventricular beats; NaN where not known.
    """

    record_id: str
    patient_id: str
    features: np.ndarray
    labels: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class LongRecord(WindowSequence):
    """A long annotated record.

    Attributes:
        record (`Record`): as it was read, with the leads that the model takes.
        start_seconds (`np.ndarray` of shape `(windows,)`): where each window begins.
        window_seconds (`float`): length of a window.
        views (tuple of `np.ndarray` of shape `(windows, F)`): vectors of each lead alone, where there are several.
        af_seconds (`np.ndarray` of shape `(seconds,)`, bool): whether AF is there for half of each whole second.
        num_beats, num_ventricular_beats (`int`): in all of the record.
    """

    record: Record = field(repr=False)
    start_seconds: np.ndarray = field(repr=False)
    window_seconds: float
    views: tuple[np.ndarray, ...] = field(repr=False)
    af_seconds: np.ndarray = field(repr=False)
    num_beats: int
    num_ventricular_beats: int

    @property
    def af_burden(self) -> float:
        """Share of the record's seconds in AF."""
        return float(self.af_seconds.mean())

    @property
    def ventricular_burden(self) -> float:
        """Share of ventricular beats among all."""
        return self.num_ventricular_beats / self.num_beats


def read_long_records(folders: Sequence[str]) -> list[Record]:
    """Return the records below `folders`, each with the leads that the model knows."""
    records = [entry.read() for folder in folders for entry in list_records(folder)]
    return [_known_leads(record) for record in records]


def simulate_long_records(number: int) -> list[Record]:
    """Return simulated records of four minutes whose rhythm changes each minute, for smoke runs and tests."""
    return [_join([_stretch(seed, place) for place in range(4)], f"long-{seed}") for seed in range(number)]


def _stretch(seed: int, place: int) -> Record:
    rhythm = ("sinus", "af", "pvc")[(seed + place) % 3]
    return simulate_record(
        seed, rhythm=rhythm, duration_seconds=STRETCH_SECONDS, sampling_rate=250, lead_names=["II", "V1"]
    )


def _join(parts: Sequence[Record], name: str) -> Record:
    ends = np.cumsum([part.signal.shape[1] for part in parts])
    marks = [
        Annotation(mark.sample + end - part.signal.shape[1], mark.symbol, mark.note)
        for part, end in zip(parts, ends, strict=True)
        for mark in part.annotations
    ]
    signal = np.concatenate([part.signal for part in parts], axis=1)
    return dataclasses.replace(parts[0], signal=signal, annotations=marks, record_name=name)


def _known_leads(record: Record) -> Record:
    """Return the record without leads that are none of the twelve.

    Raises:
        ValueError: there is no other.
    """
    rows = [row for row, name in enumerate(record.lead_names) if _is_standard(name)]
    if not rows:
        raise ValueError(f'Record "{record.record_name}" has no standard lead, but {", ".join(record.lead_names)}.')
    return _take_leads(record, rows)


def _is_standard(name: str) -> bool:
    try:
        return resolve_lead_name(name) in STANDARD_LEADS
    except ValueError:
        return False


def _take_leads(record: Record, rows: Sequence[int]) -> Record:
    names = [record.lead_names[row] for row in rows]
    return dataclasses.replace(record, signal=record.signal[list(rows)], lead_names=names)


def prepare_long_records(records: Sequence[Record], cache: FeatureCache) -> list[LongRecord]:
    """Return the records with the vectors and labels of their windows.

    Raises:
        ValueError: no records, one without annotations, or one shorter than a window.
    """
    if not records:
        raise ValueError("No long records: pass --long_data with folders of WFDB records (.hea, .dat, .atr).")
    return [_prepare(record, cache) for record in records]


def _prepare(record: Record, cache: FeatureCache) -> LongRecord:
    af, (beats, are_ventricular) = is_af(record), beat_samples(record)  # first: an error costs no embedding
    own = cache.of_record(record)
    starts = own["start_seconds"]
    labels, counts = label_windows(record, starts, cache.extractor.window_seconds)
    return LongRecord(
        record_id=record.record_name,
        patient_id=patient_of(record.record_name),
        features=own["features"],
        labels=labels,
        counts=counts,
        record=record,
        start_seconds=starts,
        window_seconds=cache.extractor.window_seconds,
        views=_leads_alone(record, cache, starts),
        af_seconds=_by_half(af, record.sampling_rate),
        num_beats=len(beats),
        num_ventricular_beats=int(are_ventricular.sum()),
    )


def _leads_alone(record: Record, cache: FeatureCache, starts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the vectors of each lead alone; of leads whose windows are not those of the record (some unusable), none."""
    if len(record.lead_names) < 2:
        return ()
    alone = [cache.of_record(_take_leads(record, [row])) for row in range(len(record.lead_names))]
    return tuple(each["features"] for each in alone if np.array_equal(each["start_seconds"], starts))


def _by_half(is_there: np.ndarray, sampling_rate: float) -> np.ndarray:
    edges = np.round(np.arange(int(np.ceil(len(is_there) / sampling_rate)) + 1) * sampling_rate).astype(int)
    edges = np.minimum(edges, len(is_there))
    return np.array([is_there[first:end].mean() >= 0.5 for first, end in zip(edges[:-1], edges[1:]) if end > first])


def prepare_short_records(records: ECGDataset, cache: FeatureCache, *, seed: int) -> list[WindowSequence]:
    """Return short records, with targets of the task "windows", as sequences of one window of two random leads."""
    collator = ECGCollator(cache.extractor, augmentation=AugmentationArguments(max_leads=2))
    content = f"short {records.sha256()} {seed}"
    features = cache.get(content, lambda: {"features": _embed_short(records, collator, cache, seed)})["features"]
    unknown = np.full((1, len(BEAT_KINDS)), np.nan, dtype=np.float32)
    rows = zip(records.column("record_id"), records.column("patient_id"), features, records.targets, strict=True)
    return [WindowSequence(name, str(patient), own[None], target[None], unknown) for name, patient, own, target in rows]


@torch.no_grad()
def _embed_short(records: ECGDataset, collator: ECGCollator, cache: FeatureCache, seed: int) -> np.ndarray:
    logger.info("embedding %d short records", len(records))
    loader = DataLoader(_InEpochZero(records, seed), batch_size=WINDOWS_PER_BATCH, collate_fn=collator)
    vectors = [cache.model.embed_windows(**{name: batch[name] for name in INPUT_NAMES}) for batch in loader]
    return torch.cat(vectors).float().numpy()


class _InEpochZero(Dataset):
    """The items of a data set with the seeds of one epoch: which leads are kept follows from them."""

    def __init__(self, records: ECGDataset, seed: int):
        self.records = ECGDataset(records.rows, targets=records.targets, seed=seed)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return self.records[(0, index)]


class SequenceDataset(Dataset):
    """What one step trains on: stretches of long records, and short records strung together; item i follows from its seed.

    A strung sequence is made up: stretches with and without AF, about `STRETCH_WINDOWS` windows each, every window another
    patient's. So thousands of patients, not a dozen, teach what a window shows, and that its neighbours are of its kind.

    Args:
        long: their patients are drawn alike, then one of the patient's records, then a stretch of it.
        short: sequences of one window; may be empty.
        long_share (`float`): of items that are stretches of long records, 0 to 1.
        crop_windows (`int`): most windows of an item.
        leads_alone (`float`): share of stretches of long records that show one lead only.
        rhythm_of (`str`): which long records teach AF, see `RHYTHM_OF`; all teach ventricular beats and counts.
    """

    def __init__(
        self,
        long: Sequence[LongRecord],
        short: Sequence[WindowSequence] = (),
        *,
        long_share: float = 0.5,
        crop_windows: int = 36,
        leads_alone: float = 0.5,
        rhythm_of: str = "all",
        seed: int = 0,
    ):
        self.by_patient = _by_patient([_teaching(one, rhythm_of) for one in long])
        self.short, self.by_kind = list(short), _by_kind(short)
        self.long_share = long_share if len(short) else 1.0
        self.crop_windows, self.leads_alone, self.seed = crop_windows, leads_alone, seed

    def __len__(self) -> int:
        return SEQUENCES_AN_EPOCH

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        generator = np.random.default_rng((self.seed, *key))
        size = int(generator.integers(1, self.crop_windows + 1))
        if generator.random() < self.long_share:
            return self._stretch(generator, size)
        return self._strung(generator, size)

    def _stretch(self, generator: np.random.Generator, size: int) -> dict[str, np.ndarray]:
        records = self.by_patient[generator.integers(len(self.by_patient))]
        one = records[generator.integers(len(records))]
        features = one.features
        if one.views and generator.random() < self.leads_alone:
            features = one.views[generator.integers(len(one.views))]
        size = min(size, len(features))
        first = int(generator.integers(len(features) - size + 1))
        part = slice(first, first + size)
        return {"features": features[part], "labels": one.labels[part], "counts": one.counts[part]}

    def _strung(self, generator: np.random.Generator, size: int) -> dict[str, np.ndarray]:
        windows, has_af, v_share = [], False, 0.0
        for place in range(size):
            if place == 0 or generator.random() < 1 / STRETCH_WINDOWS:  # a new stretch begins
                has_af, v_share = generator.random() < AF_SHARE, generator.choice(V_SHARES)
            pool = self.by_kind.get((has_af, generator.random() < v_share)) or self.short
            windows.append(pool[generator.integers(len(pool))])
        return {
            name: np.concatenate([getattr(one, name) for one in windows]) for name in ("features", "labels", "counts")
        }

    def all_features(self) -> np.ndarray:
        """Return the vectors of all windows, `(windows, F)`."""
        long = [one.features for records in self.by_patient for one in records]
        return np.concatenate([*long, *(one.features for one in self.short)])


def _by_patient(records: Sequence[WindowSequence]) -> list[list[WindowSequence]]:
    patients: dict[str, list[WindowSequence]] = {}
    for record in records:
        patients.setdefault(record.patient_id, []).append(record)
    return list(patients.values())


def _teaching(one: LongRecord, rhythm_of: str) -> LongRecord:
    """Return the record with AF not known where it is not to be learned from."""
    is_changing = 0 < (one.labels[:, 0] >= 0.5).mean() < 1
    if rhythm_of == "all" or (rhythm_of == "changing" and is_changing):
        return one
    labels = one.labels.copy()
    labels[:, 0] = np.nan
    return dataclasses.replace(one, labels=labels)


def _by_kind(short: Sequence[WindowSequence]) -> dict[tuple[bool, bool], list[WindowSequence]]:
    """Return short records by whether they have AF and ventricular beats."""
    kinds: dict[tuple[bool, bool], list[WindowSequence]] = {}
    for one in short:
        kinds.setdefault((bool(one.labels[0, 0] >= 0.5), bool(one.labels[0, 1] >= 0.5)), []).append(one)
    return kinds


def sequences_sha256(sequences: Sequence[WindowSequence]) -> str:
    """Return the SHA-256 of what training sees of sequences: vectors, labels and counts in their order."""
    digest = hashlib.sha256()
    for one in sequences:
        digest.update(f"{one.record_id} {one.patient_id} {one.features.shape}".encode())
        for array in (one.features, one.labels, one.counts):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def collate_sequences(items: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Return `window_features` (B, W, F), `window_mask` (B, W), `labels`, `counts` (B, W, 2): filled up with zero and NaN."""
    sizes = torch.tensor([len(item["features"]) for item in items])

    def padded(name: str, fill: float) -> torch.Tensor:
        result = torch.full((len(items), int(sizes.max()), items[0][name].shape[1]), fill)
        for row, item in zip(result, items, strict=True):
            row[: len(item[name])] = torch.from_numpy(item[name])
        return result

    return {
        "window_features": padded("features", 0.0),
        "window_mask": torch.arange(int(sizes.max())) < sizes[:, None],
        "labels": padded("labels", torch.nan),
        "counts": padded("counts", torch.nan),
    }
