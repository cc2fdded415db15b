"""The seven corpora as they are published: which records there are, whose, in which fold, and in which files.

Nothing is opened here but PTB-XL's table. A source is a folder, or any address that fsspec knows (`s3://bucket/folder`).
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from training.splits import fold_of, load_split

SIGNAL_SUFFIXES = (".mat", ".dat", ".xyz")
SUFFIXES = (".hea", ".atr", *SIGNAL_SUFFIXES)


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
            raise FileNotFoundError(f"--source {self.url}: there is no such folder.")

    @cached_property
    def files(self) -> dict[str, SourceFile]:
        """All files below the source by their path, in its order."""
        found = self.fs.find(self.root, detail=True)
        files = {}
        for path, facts in sorted(found.items()):
            below = path[len(self.root) :].lstrip("/")
            state = facts.get("mtime") or facts.get("ETag") or facts.get("etag") or facts.get("LastModified") or ""
            files[below] = SourceFile(below, int(facts["size"]), str(state))
        return files

    def read_text(self, path: str) -> str:
        with self.fs.open(f"{self.root}/{path}", "r", encoding="utf-8-sig", newline="") as file:
            return file.read()

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


def stems(files: dict[str, SourceFile]) -> list[Stem]:
    """Return what may be records: names that have a header or a file of samples."""
    groups: dict[str, list[SourceFile]] = {}
    for path, file in files.items():
        suffix = PurePosixPath(path).suffix
        if suffix in SUFFIXES:
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
    split, records, seen = load_split(corpus), [], set()
    for stem in stems(source.files):
        if not re.search(rf"(?:^|/){pattern}$", stem.path):
            continue
        name = name_of(stem.path)
        patient_id, fold = split.get(name) or _by_hash(f"{corpus}-{patient_of(name)}")
        problem = ""
        if not stem.header:
            problem = f"no header: {PurePosixPath(stem.path).name}.hea is not there"
        elif name in seen:
            problem = "another record has the same name; the first was taken"
        seen |= {name} if stem.header else set()
        records.append(SourceRecord(corpus, name, patient_id, fold, stem.header, stem.files, problem=problem))
    return sorted(records, key=lambda record: (record.record_id, record.header))


def _by_hash(patient_id: str) -> tuple[str, int]:
    return patient_id, fold_of(patient_id)


def one_side(records: Sequence[SourceRecord]) -> list[SourceRecord]:
    """Return the records with one fold for each patient: that of the first record where a source says several."""
    folds: dict[str, int] = {}
    for record in records:
        folds.setdefault(record.patient_id, record.fold)
    return [replace(record, fold=folds[record.patient_id]) for record in records]
