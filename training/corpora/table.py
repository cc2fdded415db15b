"""A table of your own, CSV or Parquet: a row a record, with its file and its labels."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from anyecg_hf.records import read_record
from training.splits import SPLIT_OF_FOLD, folds_of

from .entry import RecordEntry, naming_the_file, plausible_age

NEEDED, OPTIONAL = ("path", "label"), ("patient", "age", "sex", "fold")
SEXES = {"male": "male", "m": "male", "female": "female", "f": "female", "": None, "unknown": None}


def is_table(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in (".csv", ".parquet")


def list_table(path: Path) -> list[RecordEntry]:
    """Return the records of a table, in the order of its rows, without reading their signals.

    Columns: `path` (a file that `read_record` knows, seen from the table's folder) and `label` (one or several, "AFIB;PVC", in
    Parquet also a list; empty: none). Where they are there: `patient`, whose records share a fold (default: each record its
    own), `age` in years, `sex` (male, female, m, f; else taken from the file), `fold` (1-8 train, 9 validation, 10 test;
    default: by a hash of the patient).

    Raises:
        ValueError: a column is missing, or a row says what is not understood; the row is named.
    """
    rows = _read_rows(path)
    if not rows or not set(NEEDED) <= set(rows[0]):
        raise ValueError(
            f"--data {path}: {len(rows)} rows with the columns {', '.join(rows[0]) if rows else 'none'}; needed are "
            f"{' and '.join(NEEDED)}, accepted also {', '.join(OPTIONAL)}."
        )
    twice = [name for name, count in Counter(row["path"] for row in rows).items() if count > 1]
    if twice:
        raise ValueError(f"--data {path}: {twice[0]!r} is in several rows; give all labels of a record in one, as A;B.")
    folds = folds_of([_patient(row) for row in rows])
    entries = []
    for number, row in enumerate(rows, start=1):
        try:
            entries.append(_entry(row, path.parent, folds[_patient(row)]))
        except ValueError as error:
            raise ValueError(f"--data {path}, row {number} ({row['path']!r}): {error}") from None
    return entries


def _read_rows(path: Path) -> list[dict]:
    if path.suffix.lower() == ".parquet":
        with naming_the_file(path):
            return pq.read_table(path).to_pylist()
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def _patient(row: dict) -> str:
    return str(row.get("patient") or row["path"])


def _entry(row: dict, folder: Path, fold: int) -> RecordEntry:
    if not row["path"]:
        raise ValueError("no path is given.")
    return RecordEntry(
        record_id=str(row["path"]),
        patient_id=_patient(row),
        fold=_fold(row.get("fold")) or fold,
        reader=read_record,
        payload=str(folder / row["path"]),
        age=plausible_age(_number(row.get("age"), "age")),
        sex=_sex(row.get("sex")),
        codes=_labels(row["label"]),
    )


def _labels(given: str | list | None) -> tuple[str, ...]:
    names = given if isinstance(given, list) else str(given or "").split(";")
    return tuple(dict.fromkeys(str(name).strip() for name in names if str(name).strip()))


def _number(given: str | float | None, column: str) -> float | None:
    if given is None or str(given).strip() == "":
        return None
    try:
        return float(given)
    except ValueError:
        raise ValueError(f"{column} {given!r} is no number; leave it empty where it is not known.") from None


def _fold(given: str | int | None) -> int | None:
    fold = _number(given, "fold")
    if fold is not None and fold not in SPLIT_OF_FOLD:
        raise ValueError(f"fold {given!r}: accepted are 1-8 (train), 9 (validation) and 10 (test).")
    return None if fold is None else int(fold)


def _sex(given: str | None) -> str | None:
    name = str(given or "").strip().lower()
    if name not in SEXES:
        raise ValueError(f"sex {given!r}: accepted are male, female, m, f, or empty where it is not known.")
    return SEXES[name]
