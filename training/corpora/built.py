"""A data set built by `training.build_dataset`, as a folder that a model is trained on."""

from __future__ import annotations

import functools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from anyecg_hf.records import Record
from training.dataset_rows import read_row, row_codes

from .entry import RecordEntry, naming_the_file

TABLE = ["record_id", "corpus", "patient_id", "fold", "age", "sex", "weight", "scp_codes", "snomed_codes"]


def is_built(folder: Path) -> bool:
    return bool(_files(folder))


def list_built(folder: Path) -> list[RecordEntry]:
    """Return the records of a built data set, or of one corpus of it (`data/ptb-xl`), without their signals.

    A record has all its codes, PTB-XL's statements and SNOMED CT: each task takes those that it knows.

    Raises:
        ValueError: a file is damaged.
    """
    entries = []
    for path in _files(folder):
        with naming_the_file(path):
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                for index, row in enumerate(file.read_row_group(group, columns=TABLE).to_pylist()):
                    entries.append(_entry(row, (str(path), group, index)))
    return entries


def read_built(place: tuple[str, int, int]) -> Record:
    """Return the record at (file, row group, row)."""
    path, group, index = place
    return read_row(_row_group(path, group).slice(index, 1).to_pylist()[0])


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("data/*/*-of-*.parquet")) or sorted(folder.glob("*-of-*.parquet"))


def _entry(row: dict, place: tuple[str, int, int]) -> RecordEntry:
    return RecordEntry(
        record_id=f"{row['corpus']}/{row['record_id']}",
        patient_id=row["patient_id"],
        fold=row["fold"],
        reader=read_built,
        payload=place,
        age=row["age"],
        sex=row["sex"],
        weight=row["weight"],
        codes=tuple(row_codes(row)),
        corpus=row["corpus"],
    )


@functools.lru_cache(maxsize=2)  # neighbours are read one after the other
def _row_group(path: str, group: int) -> pa.Table:
    return pq.ParquetFile(path).read_row_group(group)
