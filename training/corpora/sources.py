"""The seven corpora as they are published: which records there are, whose, in which fold, and in which files.

Nothing is opened here but PTB-XL's table. A source is a folder, or any address that fsspec knows (`s3://bucket/folder`).
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from training.splits import place_of

SIGNAL_SUFFIXES = (".mat", ".dat", ".xyz")
SUFFIXES = (".hea", ".atr", *SIGNAL_SUFFIXES)
STATES = ("mtime", "ETag", "etag", "LastModified", "last_modified", "created")  # as folders and stores call it


@dataclass(frozen=True)
class SourceFile:
    path: str  # below the source, with "/"
    num_bytes: int
    state: str  # changes when the file does: time of change, or the store's own tag


@dataclass(frozen=True)
class SourceRecord:
    """One published record, before it is read. `problem` says why it cannot be: such a one is only counted and listed."""

    corpus: str
    record_id: str
    patient_id: str = ""
    fold: int = 0
    header: str = ""  # path of the header below the source
    files: tuple[SourceFile, ...] = ()
    table: dict = field(default_factory=dict)  # what the corpus's table says about it, as text
    problem: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


class Source:
    """A folder of published files, here or in an object store.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, url: str | Path):
        self.url = str(url)
        self.fs, self.root = fsspec.core.url_to_fs(self.url)
        if not self.fs.isdir(self.root):
            raise FileNotFoundError(f"{self.url}: there is no such folder.")

    @cached_property
    def files(self) -> dict[str, SourceFile]:
        """All files below the source by their path, in its order."""
        found = self.fs.find(self.root, detail=True)
        if isinstance(self.fs, LocalFileSystem):  # it does not go into folders that are links
            found |= _linked(self.fs, self.root, {os.path.realpath(self.root)})
        files = {}
        for path, facts in sorted(found.items()):
            below = path[len(self.root) :].lstrip("/")
            state = next((str(facts[key]) for key in STATES if facts.get(key)), "")
            files[below] = SourceFile(below, int(facts["size"] or 0), state)
        return files

    def read_text(self, path: str) -> str:
        """Return a table's text, read as Latin-1 where it is no UTF-8: what is needed of it is the same in both."""
        if not self.fs.isfile(f"{self.root}/{path}"):  # opening a pipe would wait for ever
            raise ValueError(f"{path}: no regular file.")
        raw = self.fs.cat_file(f"{self.root}/{path}")
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            return raw.decode("latin-1")

    @contextlib.contextmanager
    def local(self, record: SourceRecord) -> Iterator[Path]:
        """Give a folder in which the record's files lie under their paths: the source itself, or a copy of these files."""
        if isinstance(self.fs, LocalFileSystem):
            yield Path(self.root)
            return
        with tempfile.TemporaryDirectory() as folder:
            for file in record.files:
                target = Path(folder) / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(f"{self.root}/{file.path}", str(target))
            yield Path(folder)


def absolute(url: str | Path) -> str:
    """Return an address that means the same to any process: of a folder here its full path."""
    fs, root = fsspec.core.url_to_fs(str(url))
    return root if isinstance(fs, LocalFileSystem) else str(url)


def _linked(fs: LocalFileSystem, root: str, passed: set[str]) -> dict[str, dict]:
    """Return the files in folders below `root` that are links, each folder once: a link may lead back."""
    found = {}
    for folder, names, _ in os.walk(root):
        for path in (f"{folder}/{name}" for name in names if os.path.islink(f"{folder}/{name}")):
            if os.path.realpath(path) not in passed:
                passed.add(os.path.realpath(path))
                found |= fs.find(path, detail=True) | _linked(fs, path, passed)
    return found


@dataclass(frozen=True)
class Stem:
    """The files of one record: all that bear its name, in one folder."""

    path: str  # without suffix
    files: tuple[SourceFile, ...]

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def header(self) -> str:
        return next((file.path for file in self.files if file.path.endswith(".hea")), "")

    @property
    def is_whole(self) -> bool:
        return bool(self.header) and any(file.path.endswith(SIGNAL_SUFFIXES) for file in self.files)


def stems(files: dict[str, SourceFile]) -> list[Stem]:
    """Return what may be records: names that have a header or a file of samples."""
    groups: dict[str, list[SourceFile]] = {}
    for path, file in files.items():
        suffix = PurePosixPath(path).suffix
        if suffix.lower() in SUFFIXES:  # capitals are no name that a header can be read under: listed as without one
            groups.setdefault(path.removesuffix(suffix), []).append(file)
    return [Stem(path, tuple(group)) for path, group in groups.items()]


def list_named(
    corpus: str,
    source: Source,
    pattern: str,
    name_of: Callable[[str], str] = lambda path: PurePosixPath(path).name,
    patient_of: Callable[[str], str] = lambda name: name,
) -> list[SourceRecord]:
    """Return the records of a corpus that are known by their names, in the order of these.

    Args:
        pattern: what the whole of a path without suffix has to match, from its last folder on where it names one.
        name_of: from that path to the record's name.
        patient_of: from a name that the split file does not list to what tells its patient.
    """
    records, seen = [], set()
    for stem in sorted(stems(source.files), key=lambda stem: not stem.is_whole):  # of two with one name, the whole one
        if not re.search(rf"(?:^|/){pattern}\Z", stem.path, re.ASCII):
            continue
        name = name_of(stem.path)
        patient_id, fold = place_of(corpus, name, patient_of(name))
        problem = ""
        if not stem.header:
            problem = f"no header: {PurePosixPath(stem.path).name}.hea is not there"
        elif name in seen:
            problem = "another record has the same name and was taken"
        seen |= {name} if stem.header else set()
        records.append(SourceRecord(corpus, name, patient_id, fold, stem.header, stem.files, problem=problem))
    return sorted(records, key=lambda record: (record.record_id, record.header))


def _originals(duplicates: Sequence[Mapping[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
    """Return (corpus, record) of each copy -> that of what it repeats in the end, through copies of copies."""
    repeats = {
        (row["corpus"], row["record"]): (row["same_as_corpus"], row["same_as"]) for row in duplicates if row["same_as"]
    }
    originals = {}
    for copy in repeats:
        passed, original = {copy}, repeats[copy]
        while original in repeats and original not in passed:
            passed.add(original)
            original = repeats[original]
        originals[copy] = original
    return originals


def one_side(records: Sequence[SourceRecord], duplicates: Sequence[Mapping[str, str]] = ()) -> list[SourceRecord]:
    """Return the records with one fold for each patient, and copies with the patient and fold of what they repeat.

    Where a source gives a patient several folds, it is that of the first record. `duplicates` as `splits.load_duplicates`.
    """
    originals = _originals(duplicates)
    moved: dict[str, tuple[str, int]] = {}  # patients, with all their records: a copy is of the same person
    for record in records:
        original = originals.get((record.corpus, record.record_id))
        if original is not None:
            moved.setdefault(record.patient_id, place_of(*original))
    places = [moved.get(record.patient_id, (record.patient_id, record.fold)) for record in records]
    records = [replace(record, patient_id=patient, fold=fold) for record, (patient, fold) in zip(records, places)]
    folds: dict[str, int] = {}
    for record in records:
        folds.setdefault(record.patient_id, record.fold)
    return [replace(record, fold=folds[record.patient_id]) for record in records]
