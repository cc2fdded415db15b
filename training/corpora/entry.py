"""What a corpus says about one record before its signal is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from anyecg_hf.records import Record

OLDEST_AGE = 90.0  # years; PTB-XL writes 300 for "over 89", other corpora have typing errors above 120


@dataclass(frozen=True)
class RecordEntry:
    """One record of a corpus: who, which fold, which statements, and how to read its signal.

    `reader(payload)` returns the `Record`; both are picklable, so that entries travel to worker processes.
    Fields that are `None` here (`age`, `sex`, `codes`) are taken from the record once it is read.
    """

    record_id: str
    patient_id: str
    fold: int  # 1-8 train, 9 validation, 10 test
    reader: Callable[[Any], Record]
    payload: Any
    age: float | None = None  # years
    sex: str | None = None  # "male", "female"
    weight: float | None = None  # kg
    codes: tuple[str, ...] | None = None
    corpus: str | None = None  # where the data name it

    def read(self) -> Record:
        """Return the record: signal in millivolt, rate, lead names."""
        return self.reader(self.payload)


def plausible_age(age: float | None) -> float | None:
    """Return `age` in years, 90 for PTB-XL's "over 89" (stored as 300), None where it is absent or below zero."""
    if age is None or age != age or age < 0:
        return None
    return OLDEST_AGE if age > 120 else float(age)


@contextmanager
def naming_the_file(path: Path) -> Iterator[None]:
    """Let an error of reading Parquet be a `ValueError` that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or cut ({error}): copy or build it anew.") from error
