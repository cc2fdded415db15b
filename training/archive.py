"""What records an archive holds, in whatever form: `list_archive(folder)`; nothing of a signal is read before its turn."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from anyecg_hf.records import Record, read_record

from .corpora import RecordEntry, list_records
from .corpora.built import is_built
from .corpora.ptb_xl import is_packed, is_published
from .corpora.sources import Source, SourceFile, SourceRecord, absolute, stems
from .record_store import source_fingerprint
from .row_builder import without_place

READ_ERRORS = (ValueError, TypeError, OSError, ImportError, MemoryError)  # what a bad file may give, as readers promise


@dataclass(frozen=True)
class ArchiveRecord:
    """One record of an archive, before it is read."""

    path: str | None  # below the archive: the file that it begins with; None where only its name is known
    record_id: str
    folder: str  # the archive; its place is in no message
    reader: Callable[[Any], Record]
    payload: Any

    def read(self) -> Record:
        """Return the record.

        Raises:
            ValueError: it cannot be read, with the reason.
        """
        with _naming_no_place(self.folder):
            return self.reader(self.payload)


def list_archive(folder: str | Path) -> tuple[list[ArchiveRecord], str]:
    """Return the records of an archive in a fixed order, and a SHA-256 of its files' names, sizes and times of change.

    PTB-XL as published, a data set of `training.build_dataset` and packed Parquet files are listed by their tables, as
    `corpora.list_records` does. In any other folder, or address that fsspec knows, each file is a record of any format that
    `read_record` knows; a WFDB header, `.dat`, `.mat`, `.xyz` and `.atr` of one name are one. Names that begin with a dot
    are left out. A folder that cannot be opened is listed as a record that cannot be read.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is nothing in it, or a table is damaged.
    """
    place = Path(absolute(folder))
    if any((is_published(place), is_published(place / "ptb-xl"), is_built(place), is_packed(place))):
        return [_of_entry(entry, place) for entry in list_records(place)], source_fingerprint(place)
    source = Source(absolute(folder))
    files = {path: file for path, file in source.files.items() if not _is_hidden(path)}
    records = [_of_files(source, record_id, group) for record_id, group in _group(files)]
    records += [
        ArchiveRecord(path, path, source.url, _refuse_folder, f"{path}: folder not readable ({reason}).")
        for path, reason in _unreadable_folders(source)
    ]
    if not records:
        raise ValueError(f"--data {folder}: there are no files.")
    facts = json.dumps([astuple(file) for file in files.values()])
    return sorted(records, key=lambda record: record.path), hashlib.sha256(facts.encode()).hexdigest()


def _of_entry(entry: RecordEntry, folder: Path) -> ArchiveRecord:
    path = None
    if isinstance(entry.payload, str):  # a WFDB record
        path = Path(f"{entry.payload}.hea").relative_to(folder).as_posix()
    elif isinstance(entry.payload, tuple):  # a row of a Parquet file
        path = Path(entry.payload[0]).relative_to(folder).as_posix()
    return ArchiveRecord(path, entry.record_id, str(folder), entry.reader, entry.payload)


def _of_files(source: Source, record_id: str, files: tuple[SourceFile, ...]) -> ArchiveRecord:
    header = next((file.path for file in files if file.path.endswith(".hea")), files[0].path)
    record = SourceRecord("", record_id, header=header, files=files)
    return ArchiveRecord(header, record_id, source.url, _read_files, (source.url, record))


def _group(files: dict[str, SourceFile]) -> Iterator[tuple[str, tuple[SourceFile, ...]]]:
    """Yield the files of each record with its name."""
    rest = dict(files)
    for stem in stems(files):
        if stem.header:
            yield stem.path, stem.files
            for file in stem.files:
                del rest[file.path]
    for path, file in rest.items():
        yield path, (file,)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(path).parts)


def _unreadable_folders(source: Source) -> list[tuple[str, str]]:
    """Return the folders that listing the files has passed over, each with the reason; of an object store none."""
    errors: list[OSError] = []
    if isinstance(source.fs, LocalFileSystem):
        for _ in os.walk(source.root, onerror=errors.append):
            pass
    return [(os.path.relpath(error.filename, source.root), error.strerror) for error in errors]


def _read_files(place: tuple[str, SourceRecord]) -> Record:
    url, record = place
    with Source(url).local(record) as folder, _naming_no_place(folder):
        return read_record(folder / record.header)


def _refuse_folder(problem: str) -> Record:
    raise OSError(problem)


@contextlib.contextmanager
def _naming_no_place(folder: str | Path) -> Iterator[None]:
    """Let an error be a `ValueError` that names files below `folder` only."""
    try:
        yield
    except READ_ERRORS as error:
        raise ValueError(without_place(str(error) or type(error).__name__, folder)) from None
