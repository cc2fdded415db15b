"""Data sets of the training commands: records of some folds, their targets, and an order that a restart repeats."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from anyecg_hf import simulate
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor

from .code_shards import StoredCodes
from .corpora import RecordEntry, list_records
from .corpora.simulated import list_simulated
from .labels import Task, encode_all
from .record_store import RecordStore, prepare_records, source_fingerprint
from .splits import TRAIN_FOLDS, VALIDATION_FOLDS, spread_order

logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("codes", "age", "sex")
CONTENT_COLUMNS = ("record_id", "age", "sex", "weight", "lead_ids", "num_samples", "signal_crc32", "mask_crc32")


class ECGDataset(torch.utils.data.Dataset):
    """Rows of one or more stores, with targets; an item knows the seed of everything random done to it.

    Indexed by a number (evaluation: no randomness) or by `(epoch, number)` as `EpochSampler` gives them. An item has
    `steps` (int16 view), `step_mv`, `lead_ids`, `mask`, `age`, `sex`, `weight`, `record_id`, `seed`, with targets
    `labels`, and with stored codes `rhythm_codes`: those of the record's windows, see `StoredCodes.windows`.
    """

    def __init__(
        self,
        rows: Sequence[tuple[RecordStore, int]],
        *,
        targets: np.ndarray | None = None,
        seed: int = 0,
        codes: StoredCodes | None = None,
    ):
        if targets is not None and len(targets) != len(rows):
            raise ValueError(f"{len(targets)} targets for {len(rows)} records: one target a record is needed.")
        self.rows, self.targets, self.seed, self.codes = list(rows), targets, seed, codes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        store, row = self.rows[index]
        item = {
            "steps": store.steps(row), "step_mv": store.step_mv, "mask": store.mask(row),
            "lead_ids": store.lead_ids(row), "record_id": store.columns["record_id"][row],
            "seed": None if epoch is None else (self.seed, epoch, index), "index": index,
        }  # fmt: skip
        item |= {name: store.columns[name][row] for name in ("age", "sex", "weight")}
        if self.targets is not None:
            item["labels"] = self.targets[index]
        if self.codes is not None:
            item["rhythm_codes"] = self.codes.windows(store, row)
        return item

    def column(self, name: str) -> list:
        """Return one column of the records' table (`codes`, `fold`, `patient_id`, ...), in the order of the items."""
        return [store.columns[name][row] for store, row in self.rows]

    def sha256(self) -> str:
        """Return the SHA-256 of all that training sees of the records: their content, order and targets, not their places."""
        digest = hashlib.sha256()
        for store, row in self.rows:
            facts = [store.step_mv, *(store.columns[name][row] for name in CONTENT_COLUMNS)]
            digest.update(json.dumps(facts).encode())
        if self.targets is not None:
            digest.update(np.ascontiguousarray(self.targets).tobytes())
        return digest.hexdigest()

    def take(self, indices: Sequence[int]) -> ECGDataset:
        """Return the dataset of these items, with their targets."""
        targets = None if self.targets is None else self.targets[np.asarray(indices, dtype=int)]
        return ECGDataset([self.rows[index] for index in indices], targets=targets, seed=self.seed, codes=self.codes)

    def with_targets(self, targets: np.ndarray | None) -> ECGDataset:
        return ECGDataset(self.rows, targets=targets, seed=self.seed, codes=self.codes)

    def with_codes(self, codes: StoredCodes) -> ECGDataset:
        """Return the dataset with the rhythm codes of its records; a ValueError where there are none of some."""
        codes.refuse_others(self.rows)
        return ECGDataset(self.rows, targets=self.targets, seed=self.seed, codes=codes)


class EpochSampler(torch.utils.data.Sampler):
    """Yields `(epoch, index)` in an order that follows from the seed and the epoch alone.

    So the order, and with the item's seed all randomness of the data, is the same after a restart and for any number
    of workers. The Trainer calls `set_epoch`.

    Args:
        batch_size (`int`): of a step, over all processes and micro-batches. What does not fill a batch at an epoch's end is
            left out, other records each time: else the steps would depend on how the batch is divided.

    Raises:
        ValueError: there are fewer items than a batch takes.
    """

    def __init__(self, num_items: int, *, seed: int, batch_size: int = 1):
        if num_items < batch_size:
            raise ValueError(
                f"{num_items} training records make no whole batch of {batch_size} (--per_device_train_batch_size x "
                "--gradient_accumulation_steps x processes). Give more records or lower one of these."
            )
        self.num_items, self.seed, self.epoch = num_items, seed, 0
        self.num_taken = num_items - num_items % batch_size

    def __len__(self) -> int:
        return self.num_taken

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_items)
        return ((epoch, int(index)) for index in order[: self.num_taken])


@dataclass
class DataArguments:
    """Which records, and where the prepared ones are kept. `data` may name several folders, read one after another."""

    data: list[str] | None = None
    simulate: int = 0  # number of simulated records where no data is given (smoke recipes)
    max_train_records: int | None = None  # a fixed random sample; None = all
    max_eval_records: int | None = None
    train_fraction: float = 1.0  # of the training patients, chosen by a hash of their ids
    cache_dir: str | None = None  # default: $ANYECG_CACHE, else the cache of the datasets library
    num_proc: int = 2  # processes that prepare records
    window_seconds: float = 10.0  # longer records are cut at random in training, in the middle in evaluation


def load_splits(args: DataArguments, extractor: AnyECGFeatureExtractor, *, seed: int) -> tuple[ECGDataset, ECGDataset]:
    """Return the records of the training folds 1-8 and of the validation fold 9, without targets.

    Raises:
        ValueError: neither `data` nor `simulate` is given, or a split is empty.
    """
    sources = list_sources(args)
    train = load_folds(sources, extractor, TRAIN_FOLDS, args=args, limit=args.max_train_records, seed=seed)
    validation = load_folds(sources, extractor, VALIDATION_FOLDS, args=args, limit=args.max_eval_records, seed=seed)
    if args.train_fraction < 1.0:
        train = _keep_patients(train, args.train_fraction)
    logger.info("%d records to train on (folds 1-8), %d to validate on (fold 9)", len(train), len(validation))
    return train, validation


def list_sources(args: DataArguments) -> list[tuple[list[RecordEntry], str]]:
    """Return `(entries, fingerprint)` of each folder of `args.data`, or of the simulated records.

    Raises:
        ValueError: neither is asked for.
    """
    if args.data:
        return [(list_records(folder), source_fingerprint(folder)) for folder in args.data]
    if args.simulate:
        return [(list_simulated(args.simulate), f"simulated {args.simulate}: {inspect.getsource(simulate)}")]
    raise ValueError("No data: pass --data DIR (PTB-XL, WFDB records or Parquet), or set `simulate: N` in the recipe.")


def load_folds(
    sources: Sequence[tuple[list[RecordEntry], str]],
    extractor: AnyECGFeatureExtractor,
    folds: Sequence[int],
    *,
    args: DataArguments,
    limit: int | None = None,
    seed: int = 0,
) -> ECGDataset:
    """Return the records of `folds` from all `sources`; of each source `limit` at most (a fixed sample)."""
    rows = []
    for entries, source in sources:
        chosen = _choose(entries, folds, limit)
        if not chosen:
            continue
        prepared = entries if limit is None else chosen  # without a limit one cache serves all folds
        store = prepare_records(prepared, extractor, source=source, cache_dir=args.cache_dir, num_proc=args.num_proc)
        wanted = {entry.record_id for entry in chosen}
        rows += [(store, row) for row, name in enumerate(store.columns["record_id"]) if name in wanted]
    if not rows:
        raise ValueError(
            f"No records in folds {tuple(folds)} of {args.data or 'the simulated records'}. PTB-XL names the fold of "
            "each record, others get one from a hash of the record's name: give more records."
        )
    return ECGDataset(rows, seed=seed)


def _choose(entries: Sequence[RecordEntry], folds: Sequence[int], limit: int | None) -> list[RecordEntry]:
    chosen = [entry for entry in entries if entry.fold in folds]
    if limit is None or limit >= len(chosen):
        return chosen
    sample = {entry.record_id for entry in sorted(chosen, key=lambda entry: spread_order(entry.record_id))[:limit]}
    return [entry for entry in chosen if entry.record_id in sample]


def _keep_patients(dataset: ECGDataset, fraction: float) -> ECGDataset:
    patients = sorted(set(dataset.column("patient_id")), key=spread_order)
    kept = set(patients[: max(1, round(fraction * len(patients)))])
    return dataset.take([index for index, patient in enumerate(dataset.column("patient_id")) if patient in kept])


def with_task(records: ECGDataset, task: Task) -> ECGDataset:
    """Return the records that the task keeps, with their targets."""
    columns = [records.column(name) for name in LABEL_COLUMNS]
    rows = [dict(zip(LABEL_COLUMNS, values, strict=True)) for values in zip(*columns, strict=True)]
    targets, kept = encode_all(task, rows)
    if len(kept) < len(records):
        logger.info(
            "task %s: %d of %d records have no target and are left out",
            task.name,
            len(records) - len(kept),
            len(records),
        )
    return records.take(kept).with_targets(targets)


def summary(dataset: ECGDataset) -> dict:
    """Return how many records and patients a split holds and which share carries codes, for logs and cards."""
    return {
        "num_records": len(dataset),
        "num_patients": len(set(dataset.column("patient_id"))),
        "num_with_codes": sum(bool(codes) for codes in dataset.column("codes")),
    }
