"""Rows of the built data set for training: in an order and with randomness that a restart, on any machine, repeats.

    rows = datasets.load_dataset(folder_or_repository, "ptb-xl", split="train", streaming=True)
    train = EpochRows(rows, seed=0, task=build_task("superclass"), endless=True)
    Trainer(..., train_dataset=train, data_collator=ECGCollator(extractor, augmentation=...))      # remove_unused_columns=False

What is done to a record follows from (seed, epoch, record) alone; in what order records come, from seed, epoch, the shards and
the number of workers. `state_dict` and `load_state_dict` go on after the last record given, to the record.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterator, Sequence

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node

from anyecg_hf.signal_ops import warn_once

from .dataset_rows import row_codes
from .labels import Task

TRAINING_COLUMNS = (  # the others (beats, rhythms ...) are left unread
    "record_id", "corpus", "patient_id", "fold", "signal", "num_samples", "sampling_rate", "lead_names", "units", "gains",
    "gain_divisor", "baselines", "no_values", "age", "sex", "height", "weight", "scp_codes", "snomed_codes", "is_normal",
    "quality", "acceptability",
)  # fmt: skip
OPEN_SHARDS = 8  # read at a time, so that neighbours in one file (one corpus) do not make a batch
BLOCK_ROWS = 32  # read from each of them at a time; what is open is shuffled together: 256 rows


class EpochRows(torch.utils.data.IterableDataset):
    """Rows with `seed`, the seed of all that is random about them, and `labels` where a task is given.

    Args:
        rows: from `load_dataset`, streaming or not, one split; `split_dataset_by_node(rows, ...)` of it for one of several nodes.
        seed (`int`): of order and alterations.
        task (`Task`, *optional*): gives `labels`; rows that it drops, and rows of which the model can use nothing (their
            `acceptability` is null), are passed over.
        endless (`bool`): one iteration makes pass after pass, epoch after epoch. For the Trainer, with `max_steps`: its resume
            counts batches from the beginning of the training, as if it were one epoch.
        shuffle (`bool`): False for evaluation: rows in their order, without `seed`: nothing is altered.
        columns: what is read of a row; those of `TRAINING_COLUMNS` that it has by default.
    """

    def __init__(
        self,
        rows,
        *,
        seed: int = 0,
        task: Task | None = None,
        endless: bool = False,
        shuffle: bool = True,
        columns: Sequence[str] = TRAINING_COLUMNS,
    ):
        if isinstance(rows, datasets.Dataset):
            rows = rows.to_iterable_dataset(num_shards=max(1, min(64, len(rows))))
        if not isinstance(rows, datasets.IterableDataset):
            raise TypeError(
                f"rows is a {type(rows).__name__}; pass one split, as load_dataset(..., split=...) gives it."
            )
        present = rows.column_names
        self.rows = rows if present is None else rows.select_columns([name for name in columns if name in present])
        self.seed, self.task, self.endless, self.shuffle = seed, task, endless, shuffle
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that persist see it change
        self._state: dict | None = None
        self._start: dict | None = None

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Tell which epoch begins; the Trainer and Accelerate do."""
        if epoch and not self.endless:
            warn_once(
                "EpochRows", "EpochRows of several epochs: under the Trainer pass endless=True, or a resume goes wrong."
            )
        self._epoch.fill_(epoch)

    @property
    def num_shards(self) -> int:
        """How many files there are to divide among workers: more workers than this would be idle.

        One where `split_dataset_by_node` gives each node every n-th row, as it does if the nodes do not divide the files.
        """
        node = self.rows._distributed
        is_by_row = node is not None and self.rows._ex_iterable.num_shards % node.world_size != 0
        return 1 if is_by_row else self.rows.num_shards

    def state_dict(self) -> dict:
        """Return where the iteration stands, as plain JSON: of this process, or of the worker that asks."""
        return self._start or self._state or {"epoch": self.epoch, "given": 0, "round": 0, "next": 0, "streams": []}

    def load_state_dict(self, state: dict) -> None:
        """Let the next iteration go on after the last row that was given when `state` was taken.

        Raises:
            ValueError: the state is of another epoch: call `set_epoch` first.
        """
        self._start = dict(state)

    def __iter__(self) -> Iterator[dict]:
        keep_freed_memory()
        epoch, start = self.epoch, self._start
        self._state, self._start = start, None
        if start is not None and start["epoch"] != epoch and not self.endless:
            raise ValueError(f"The state is of epoch {start['epoch']}, this is epoch {epoch}: call set_epoch first.")
        epoch = start["epoch"] if start is not None else epoch
        is_empty = start is None
        while True:
            for item in self._pass(epoch, start):
                is_empty = False
                yield item
            if not self.endless or is_empty:  # no row at all: another pass would not find one either
                return
            epoch, start, is_empty = epoch + 1, None, True

    def _pass(self, epoch: int, start: dict | None) -> Iterator[dict]:
        """Yield the rows of one epoch, from a state on."""
        reader = _Interleaved(self.rows, self._order(epoch), self.num_shards, start)
        given = start["given"] if start else 0  # of the round that the state was taken in
        for state, block in reader.rounds():
            order = range(len(block))
            if self.shuffle:
                order = np.random.default_rng((self.seed, epoch, _worker()[0], state["round"])).permutation(len(block))
            for place in range(given, len(block)):
                self._state = {"epoch": epoch, "given": place + 1, **state}
                item = self._item(block[order[place]], epoch)
                if item is not None:
                    yield item
            given = 0

    def _order(self, epoch: int) -> list[int]:
        """Return the shards that this worker reads, in their order."""
        worker, num_workers = _worker()
        order = np.arange(self.num_shards)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_shards)
        return [int(shard) for shard in order[worker::num_workers]]

    def _item(self, row: dict, epoch: int) -> dict | None:
        if row.get("acceptability", 0.0) is None:
            return None
        number = record_number(row)
        item = row | {"index": number, "seed": (self.seed, epoch, number) if self.shuffle else None}
        if self.task is None:
            return item
        labels = self.task.encode(row | {"codes": row_codes(row)})
        return None if labels is None else item | {"labels": labels}


@functools.cache  # once a process
def keep_freed_memory() -> None:
    """Let glibc keep up to 62 MB of freed memory for the next batch. By default it gives arrays of this size back at once and
    gets them anew page by page, a sixth of the time of reading a row. Freeing one block of almost 32 MB raises its limits.
    """
    np.empty(31 << 20, np.uint8)


def record_number(row: dict) -> int:
    """Return a number for a record that depends on its corpus and name only, not on its place among others."""
    name = f"{row['corpus']}/{row['record_id']}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _worker() -> tuple[int, int]:
    info = torch.utils.data.get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


class _Stream:
    """One shard, read in batches, with a state that is right before its first batch, too."""

    def __init__(self, rows: datasets.IterableDataset, shard: int, num_shards: int, state: dict | None = None):
        self.shard, self._start = shard, state
        self.rows = (
            split_dataset_by_node(rows, rank=shard, world_size=num_shards) if num_shards > 1 else copy.copy(rows)
        )
        if state is not None:
            self.rows.load_state_dict(state)
        self._batches = self.rows.iter(BLOCK_ROWS)
        self._has_begun = False

    def next_rows(self) -> list[dict] | None:
        self._has_begun = True
        batch = next(self._batches, None)
        return None if batch is None else [dict(zip(batch, values)) for values in zip(*batch.values())]

    def state(self) -> dict:
        return {"shard": self.shard, "state": self.rows.state_dict() if self._has_begun else self._start}


class _Interleaved:
    """Blocks of rows from up to `OPEN_SHARDS` shards at a time, from the start or from a state on."""

    def __init__(self, rows: datasets.IterableDataset, order: list[int], num_shards: int, start: dict | None):
        self.rows, self.order, self.num_shards = rows, order, num_shards
        self.round, self.next, streams = (start["round"], start["next"], start["streams"]) if start else (0, 0, [])
        self.open = [_Stream(rows, stream["shard"], num_shards, stream["state"]) for stream in streams]

    def rounds(self) -> Iterator[tuple[dict, list[dict]]]:
        """Yield the state at the beginning of each round and its rows."""
        while self.open or self.next < len(self.order):
            while len(self.open) < OPEN_SHARDS and self.next < len(self.order):
                self.open.append(_Stream(self.rows, self.order[self.next], self.num_shards))
                self.next += 1
            state = {"round": self.round, "next": self.next, "streams": [stream.state() for stream in self.open]}
            blocks = [(stream, stream.next_rows()) for stream in self.open]
            self.open = [stream for stream, block in blocks if block is not None]
            yield state, [row for _, block in blocks for row in block or ()]
            self.round += 1
