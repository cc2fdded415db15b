"""PTB-XL in its own release, for the data set: `ptbxl_database.csv` beside `records500/` or `records100/`, or both."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import PurePosixPath

from .ptb_xl import DATABASE
from .sources import Source, SourceRecord, Stem, stems

FOLDERS = {500: "records500", 100: "records100"}  # Hz; the first that has a record gives it
FILE_COLUMNS = {500: "filename_hr", 100: "filename_lr"}
FACTS = ("age", "sex", "height", "weight", "scp_codes", "heart_axis")
FOLDS = {str(fold) for fold in range(1, 11)}


def list_ptb_xl(source: Source, sampling_rate: int | None = None) -> list[SourceRecord]:
    """Return the records of the table, each with the files of its highest rate that is there, and files it does not name.

    Args:
        sampling_rate (`int`, *optional*): 500 or 100: only files of this rate.

    Returns:
        records named by their five digits (`00001`), folds and patients as in the table; none where there is no table.
    """
    tables = [path for path in source.files if PurePosixPath(path).name == DATABASE]
    if not tables:
        return []
    folder = tables[0].removesuffix(DATABASE)
    rates = [sampling_rate] if sampling_rate else list(FOLDERS)
    found = {stem.path: stem for stem in stems(source.files) if _rate_of(stem.path, folder) in rates}
    records, named, seen = [], set(), set()
    for line, row in _lines(source.read_text(tables[0])):
        paths = [f"{folder}{row.get(FILE_COLUMNS[rate]) or ''}" for rate in rates]
        named |= set(paths)
        there = [found[path] for path in paths if path in found]
        stem = next((stem for stem in there if stem.header), there[0] if there else None)
        record = _record(row, line, stem, rates)
        if record.record_id in seen:
            record = SourceRecord(
                "ptb-xl", record.record_id, problem=f"line {line} of {DATABASE}: the ecg_id occurs twice"
            )
        seen.add(record.record_id)
        records.append(record)
    ids = {int(record.record_id) for record in records if record.record_id.isdecimal()}
    for path in sorted(set(found) - named):
        digits = PurePosixPath(path).name[:5]
        if not (
            digits.isdecimal() and int(digits) in ids
        ):  # a file of the other rate belongs to a record that is listed
            problem = f"{DATABASE} does not name it"
            records.append(SourceRecord("ptb-xl", PurePosixPath(path).name, problem=problem))
    return sorted(records, key=lambda record: record.record_id)


def _lines(text: str) -> Iterator[tuple[int, dict]]:
    """Yield the number of each line and its values; none where the line cannot be taken apart."""
    reader = csv.DictReader(io.StringIO(text))
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:  # a quote that is never closed makes all that follows one field, up to the reader's limit
            row = {}
        yield reader.line_num, row


def _rate_of(path: str, folder: str) -> int | None:
    below = path.removeprefix(folder).split("/")[0] if path.startswith(folder) else ""
    return next((rate for rate, name in FOLDERS.items() if name == below), None)


def _record(row: dict, line: int, stem: Stem | None, rates: list[int]) -> SourceRecord:
    """Return the record of one line of the table, with its problem if it has one."""
    ecg_id, patient, fold = (_whole(row.get(name)) for name in ("ecg_id", "patient_id", "strat_fold"))
    record_id = f"{int(ecg_id):05d}" if ecg_id else f"line {line}"
    problem = ""
    if not ecg_id:
        problem = f"line {line} of {DATABASE}: ecg_id is no whole number"
    elif fold not in FOLDS:
        problem = f"line {line} of {DATABASE}: strat_fold is none of 1 to 10"
    elif stem is None:
        problem = "no signal file in " + " or ".join(FOLDERS[rate] for rate in rates)
    elif not stem.header:
        problem = f"no header: {stem.name}.hea is not there"
    if problem:
        return SourceRecord("ptb-xl", record_id, problem=problem)
    table = {name: (row.get(name) or "").strip() for name in FACTS}
    patient_id = f"ptb-xl-{patient}" if patient else f"ptb-xl-record-{record_id}"
    return SourceRecord("ptb-xl", record_id, patient_id, int(fold), stem.header, stem.files, table)


def _whole(text: str | None) -> str:
    """Return `12` for "12" and "12.0" (the table holds both forms), "" for anything else."""
    number = (text or "").strip().removesuffix(".0")
    return number if number.isascii() and number.isdecimal() and len(number) < 10 else ""
