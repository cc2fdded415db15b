"""Shards of the data set: `plan_shards` says which record goes where, `write_shard` makes one Parquet file of a plan.

Plans are small and travel to any process or machine; whoever runs `write_shard(plan)` needs nothing else but the source and
the output, folders or addresses that fsspec knows. Two files come of it, each under its name only when whole:

    data/<corpus>/<split>-00000-of-00003.parquet
    reports/<corpus>/<split>-00000-of-00003.json     what was taken and rejected, the plan's digest, the Parquet's SHA-256

A shard whose report has the plan's digest and whose Parquet has the report's SHA-256 is not written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub.utils import WeakFileLock

import anyecg_hf
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor

from . import corpora, dataset_rows, labels, row_builder, signal_codec, splits
from .corpora.sources import Source, SourceRecord
from .dataset_rows import SCHEMA
from .row_builder import build_row, without_place
from .splits import split_of

FORMAT = 1
SPLITS = ("train", "validation", "test")
ROW_GROUP_BYTES = 4 << 20  # of encoded signals: what a reader holds at a time
UNFINISHED, LOCK = ".unfinished", ".build.lock"


@dataclass(frozen=True)
class ShardPlan:
    """What goes into one shard, and from where to where."""

    corpus: str
    name: str  # "train-00000-of-00003"
    source: str
    out: str
    records: tuple[SourceRecord, ...]

    @cached_property
    def digest(self) -> str:
        """What the shard's content follows from: the files, what tables say of them, and the code that reads them."""
        facts = json.dumps([FORMAT, self.name, [asdict(record) for record in self.records]], sort_keys=True)
        return hashlib.sha256((facts + _code_digest() + pa.__version__).encode()).hexdigest()

    @property
    def parquet(self) -> str:
        return f"data/{self.corpus}/{self.name}.parquet"

    @property
    def report(self) -> str:
        return f"reports/{self.corpus}/{self.name}.json"

    def agrees(self, report: dict) -> bool:
        """Tell whether the counts of a report can be those of this plan."""
        num_in, num_out = report["records_in"], report["records_out"]
        is_of_all = num_in == len(self.records) == num_out + len(report["rejected"])
        return is_of_all and isinstance(report["nulls"], dict)

    def write(self) -> dict:
        """See `write_shard`."""
        return write_shard(self)


def plan_shards(
    records: Sequence[SourceRecord], *, source: str, out: str, shard_bytes: int, shared: Container[str] = ()
) -> list[ShardPlan]:
    """Return the shards of a corpus's readable records: by split, in the order of the records, `shard_bytes` of source each.

    Records named in `shared` are held by another corpus, too. They have files of their own, "train-shared-...", which a test
    on that corpus leaves out of training.
    """
    plans = []
    for split, kind in itertools.product(SPLITS, ("", "-shared")):
        chosen = [each for each in records if split_of(each.fold) == split and (each.record_id in shared) == bool(kind)]
        groups = _group(chosen, shard_bytes)
        for number, group in enumerate(groups):
            name = f"{split}{kind}-{number:05d}-of-{len(groups):05d}"
            plans.append(ShardPlan(group[0].corpus, name, source, out, tuple(group)))
    return plans


def _group(records: Sequence[SourceRecord], shard_bytes: int) -> list[list[SourceRecord]]:
    groups: list[list[SourceRecord]] = []
    filled = shard_bytes
    for record in records:
        if filled >= shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(record)
        filled += record.num_bytes
    return groups


def write_shard(plan: ShardPlan) -> dict:
    """Write one shard, unless it is there already, and return its report.

    Returns:
        digest, records_in, records_out, rejected (`{record_id, reason}` each), nulls (kind -> how many rows), sha256 and
        num_bytes of the Parquet file (None where every record was rejected: then there is no file).
    """
    out = Output(plan.out)
    found = finished_report(plan, out)
    if found is not None:
        return found
    source, extractor = Source(plan.source), AnyECGFeatureExtractor()
    rows, rejected, nulls = [], [], Counter()
    for record in plan.records:
        with source.local(record) as folder:
            try:
                built = build_row(record, folder, extractor)
            except (ValueError, TypeError, OSError, ImportError) as error:  # what the readers promise for bad records
                rejected.append({"record_id": record.record_id, "reason": _reason(error, folder)})
                continue
        rows.append(built.values)
        nulls.update(set(built.nulls))
    report = {
        "digest": plan.digest, "records_in": len(plan.records), "records_out": len(rows), "rejected": rejected,
        "nulls": dict(sorted(nulls.items())),
    }  # fmt: skip
    return put_shard(plan, out, report, _parquet(rows) if rows else None)


def put_shard(plan, out: Output, report: dict, data: bytes | None) -> dict:
    """Write a shard's Parquet, if there are rows, and then its report; return the report with size and SHA-256 of the first."""
    report = report | {"sha256": None, "num_bytes": None}
    if data is not None:
        out.write(plan.parquet, data)
        report |= {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
    out.write(plan.report, json.dumps(report, indent=1).encode())
    return report


def finished_report(plan, out: Output) -> dict | None:
    """Return the report of a shard that is there, whole, and of this plan; else None.

    Args:
        plan: a `ShardPlan`, or whatever else has `digest`, `parquet`, `report` and `agrees`.
    """
    try:
        report = json.loads(out.read(plan.report))
        if report["digest"] != plan.digest or not plan.agrees(report):
            return None
        if not _is_of(report, None if report["sha256"] is None else out.read(plan.parquet)):
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or cut short by a hand from outside
        return None
    return report


def _is_of(report: dict, data: bytes | None) -> bool:
    """Tell whether a Parquet file is the reported one, and its rows are as many as the report says."""
    if data is None:
        return (report["records_out"], report["num_bytes"]) == (0, None)
    if hashlib.sha256(data).hexdigest() != report["sha256"]:
        return False
    num_rows = pq.read_metadata(pa.BufferReader(data)).num_rows
    return (report["records_out"], report["num_bytes"]) == (num_rows, len(data))


class Output:
    """Where the data set is written: a folder, here or in an object store. A file is there whole or not at all."""

    def __init__(self, url: str | Path):
        self.url = str(url)
        self.fs, self.root = fsspec.core.url_to_fs(self.url)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self.path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write under a name of its own first: on a disk that is renamed, in a store a put is whole by itself."""
        target = self.path(name)
        self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "file"
            local.write_bytes(data)
            unfinished = f"{target}{UNFINISHED}-{os.getpid()}"
            self.fs.put_file(str(local), unfinished)
        self.fs.mv(unfinished, target)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other commands on this machine from writing here; in an object store nothing can."""
        if not isinstance(self.fs, LocalFileSystem):
            yield
            return
        self.fs.makedirs(self.root, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(WeakFileLock(f"{self.root}/{LOCK}", timeout=1))
            except TimeoutError:
                raise OSError(f"{self.url}: another command is writing here. Wait for it to end, or stop it.") from None
            yield

    def names(self, folder: str) -> list[str]:
        """Return the files below a folder, by name; none where it is not there."""
        root = self.path(folder)
        if not self.fs.isdir(root):
            return []
        return sorted(path[len(root) :].lstrip("/") for path in self.fs.find(root))

    def remove(self, name: str) -> None:
        self.fs.rm_file(self.path(name))


def _parquet(rows: list[dict]) -> bytes:
    """Return the rows as a Parquet file, the same bytes for the same rows. Signals are packed already."""
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    mean_bytes = max(1, sum(len(row["signal"]) for row in rows) // len(rows))
    codecs = {".".join(path): "ZSTD" for path in _leaves(SCHEMA)} | {"signal": "NONE"}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression=codecs,
        row_group_size=max(1, min(1000, ROW_GROUP_BYTES // mean_bytes)),
        use_dictionary=[path for path in codecs if path != "signal"],
        write_statistics=[path for path in codecs if path != "signal"],
    )
    return sink.getvalue().to_pybytes()


def _leaves(schema: pa.Schema) -> list[tuple[str, ...]]:
    """Return the paths of all leaf columns as Parquet names them."""
    parquet = pq.ParquetFile(pa.BufferReader(_empty_file(schema))).schema
    return [tuple(parquet.column(index).path.split(".")) for index in range(len(parquet.names))]


def _empty_file(schema: pa.Schema) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    return sink.getvalue()


@cache
def _code_digest() -> str:
    """Return a digest of the code that rows follow from: readers and extractor, labels, splits, codec."""
    package = Path(anyecg_hf.__file__).parent.glob("*.py")
    files = [path for path in package if not path.name.startswith(("modeling", "pipelines", "cardio", "plotting"))]
    files += Path(corpora.__file__).parent.glob("*.py")
    files += [Path(inspect.getfile(module)) for module in (dataset_rows, labels, row_builder, signal_codec, splits)]
    files += labels.LABEL_MAPS.glob("*.csv")
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(files))).hexdigest()


def _reason(error: Exception, folder: Path) -> str:
    return f"{type(error).__name__}: {without_place(str(error), folder)}"
