"""Which fold a record belongs to: PTB-XL keeps its own, others get one from a hash of the patient.

`split_files/` holds the result for each published record of the seven corpora; its README says where it comes from.
"""

from __future__ import annotations

import csv
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

SPLIT_FILES = Path(__file__).parent / "split_files"
SPLIT_CORPORA = ("cpsc-2018", "cpsc-extra", "incart", "ptb", "ptb-xl", "georgia", "chapman-ningbo")
NUM_FOLDS = 10
TRAIN_FOLDS = tuple(range(1, 9))
VALIDATION_FOLDS = (9,)
TEST_FOLDS = (10,)
SPLIT_OF_FOLD = MappingProxyType(
    dict.fromkeys(TRAIN_FOLDS, "train")
    | dict.fromkeys(VALIDATION_FOLDS, "validation")
    | dict.fromkeys(TEST_FOLDS, "test")
)
DEALING_ORDER = (1, 9, 2, 3, 4, 5, 6, 7, 8, 10)


def split_of(fold: int) -> str:
    """Return "train", "validation" or "test".

    Raises:
        ValueError: `fold` is none of 1 to 10.
    """
    if fold not in SPLIT_OF_FOLD:
        raise ValueError(f"fold {fold!r}: accepted are 1 to 8 (train), 9 (validation) and 10 (test).")
    return SPLIT_OF_FOLD[fold]


@functools.cache
def load_split(corpus: str) -> Mapping[str, tuple[str, int]]:
    """Return (patient, fold) of each record of `corpus`, as committed in `split_files/`.

    A record is found under its name in the Challenge (HR00001, S0001, I0001) and, where the corpus has a release of
    its own, under its name there as well (00001, patient001/s0010_re, I01).

    Raises:
        ValueError: `corpus` is none of `SPLIT_CORPORA`.
    """
    if corpus not in SPLIT_CORPORA:
        raise ValueError(f"corpus {corpus!r}: accepted are {', '.join(SPLIT_CORPORA)}.")
    places = {}
    for row in _read_rows(SPLIT_FILES / f"{corpus}.csv"):
        names = [name for name in (row["record"], row.get("own_record")) if name]
        places |= dict.fromkeys(names, (row["patient"], int(row["fold"])))
    return MappingProxyType(places)


def place_of(corpus: str, record: str, patient: str | None = None) -> tuple[str, int]:
    """Return (patient, fold) of a record: of its corpus's file, or where that does not list it by a hash of `patient`.

    Args:
        patient: what tells its patient among those of the corpus; default: the record counts as its own.
    """
    listed = load_split(corpus).get(record)
    patient_id = f"{corpus}-{patient or record}"
    return listed or (patient_id, fold_of(patient_id))


def load_duplicates(path: str | Path = SPLIT_FILES / "duplicates.csv") -> list[dict[str, str]]:
    """Return the records known to hold the recording of another one: record, corpus, same_as, same_as_corpus, found_how.

    Where `same_as` is "", it is known that there is another one, but not which: it may stand in another split, until
    `training.duplicates` has found it in the signals.

    Raises:
        ValueError: the file lacks one of the columns, or names a corpus that is none of `SPLIT_CORPORA`.
    """
    rows = _read_rows(path)
    for row in rows:
        if not {"record", "corpus", "same_as", "same_as_corpus"} <= row.keys():
            raise ValueError(
                f"{path}: columns {list(row)}; accepted is what `python -m training.duplicates --out` writes."
            )
        for corpus in (row["corpus"], row["same_as_corpus"]):
            if corpus not in SPLIT_CORPORA and (corpus or row["same_as"]):
                raise ValueError(f"{path}: corpus {corpus!r}; accepted are {', '.join(SPLIT_CORPORA)}.")
    return rows


def shared_records(corpus: str, duplicates: Sequence[Mapping[str, str]]) -> set[str]:
    """Return the records of a corpus that another corpus is known to hold, too."""
    pairs = [
        ((row["corpus"], row["record"]), (row["same_as_corpus"], row["same_as"]))
        for row in duplicates
        if row["same_as"] and row["corpus"] != row["same_as_corpus"]
    ]
    return {record for pair in pairs for own, record in pair if own == corpus}


def _read_rows(path: str | Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fold_of(patient_id: str) -> int:
    """Return a fold, 1 to 10, that depends on nothing but `patient_id`: all records of a patient share it.

    Folds 1-8 train, 9 validates, 10 tests, as in PTB-XL. Adding records to a corpus moves no other record.
    """
    digest = hashlib.sha256(patient_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % NUM_FOLDS + 1


def folds_of(patient_ids: Sequence[str]) -> dict[str, int]:
    """Return the fold of each patient by `fold_of`.

    Where that leaves nothing to train on or nothing to validate on, the corpus is small: its patients are then dealt
    out in turn, in the order of their hashes, so that two of them are enough.
    """
    folds = {patient: fold_of(patient) for patient in patient_ids}
    if set(folds.values()) & set(TRAIN_FOLDS) and set(folds.values()) & set(VALIDATION_FOLDS):
        return folds
    ordered = sorted(folds, key=spread_order)
    return {patient: DEALING_ORDER[place % NUM_FOLDS] for place, patient in enumerate(ordered)}


def spread_order(record_id: str) -> bytes:
    """Return a sort key that spreads records evenly: the first N of this order are a fixed random sample."""
    return hashlib.sha256(b"sample:" + record_id.encode()).digest()
