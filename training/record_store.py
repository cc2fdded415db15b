"""Records prepared once and read fast: every record goes through the feature extractor and into a ragged memory map.

A cache is a folder `<key>/` below `$ANYECG_CACHE` (default: `anyecg` in the cache of the `datasets` library):

    signals.int16    all records one after the other, each (num_leads, num_samples), `step_mv` a step
    mask.uint8       attention masks in the same order, each (num_leads, num_patches)
    records.parquet  one row a record: ids, fold, age, sex, weight, codes, lead_ids, num_samples, place in the maps, CRC-32
                     of its signal and of its mask
    meta.json        extractor configuration, step, source, records that could not be prepared and why, CRC-32 of
                     records.parquet and of itself

The key follows from the source files, the records chosen, the extractor's configuration and the preparation code, so
a change of any of them prepares anew. The folder is written under another name and renamed when whole; one whose files are
missing, cut or (the two small ones) altered is noticed at opening and prepared anew. Signal and mask of a record are compared
with their CRC-32 at each read: what a disk or a memory has altered since is an error, not a record to train on.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import multiprocessing
import os
import shutil
import signal
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from anyecg_hf import feature_extraction_anyecg
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor

from .corpora import RecordEntry
from .corpora.entry import plausible_age
from .corpora.table import list_table

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2
WFDB_SUFFIXES = (".hea", ".dat", ".mat")
DEFAULT_RANGE_MV = 30.0  # of int16 where the extractor does not clip
MAX_SHARE_UNREADABLE = 0.5
MIN_RECORDS_FOR_PROCESSES = 64


class DamagedCacheError(ValueError):
    """A cache folder is not as it was written."""


def prepare_records(
    entries: Sequence[RecordEntry],
    extractor: AnyECGFeatureExtractor,
    *,
    source: str,
    cache_dir: str | Path | None = None,
    num_proc: int = 2,
) -> RecordStore:
    """Return the prepared records, from the cache where they are already there.

    Args:
        entries: records of one corpus, in the order in which they are stored.
        extractor: turns a record into model input; its configuration is part of the cache key.
        source (`str`): what identifies the files (`source_fingerprint`), or any text for generated records.
        cache_dir: see the module's text.
        num_proc (`int`): processes that read and filter.

    Raises:
        ValueError: no entries, or more than half of them cannot be read or extracted.
    """
    if not entries:
        raise ValueError(f"No records to prepare from {source!r}: check --data and the folds asked for.")
    key = _cache_key(entries, extractor, source)
    folder = default_cache_dir(cache_dir) / key
    if folder.is_dir():
        try:
            return RecordStore(folder)
        except DamagedCacheError as error:
            logger.warning("%s: the records are prepared anew", error)
            _put_away(folder)
    _write_cache(folder, entries, extractor, source=source, num_proc=num_proc)
    return RecordStore(folder)


def _put_away(folder: Path) -> None:
    away = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")  # a name that is cleaned up after a kill
    os.rename(folder, away)
    shutil.rmtree(away)


def default_cache_dir(cache_dir: str | Path | None = None) -> Path:
    """Return `cache_dir`, else `$ANYECG_CACHE`, else `anyecg` inside the cache of the `datasets` library."""
    if cache_dir or os.environ.get("ANYECG_CACHE"):
        return Path(cache_dir or os.environ["ANYECG_CACHE"]).expanduser()
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "anyecg"


def source_fingerprint(folder: str | Path) -> str:
    """Return a digest of the names, sizes and times of all files below `folder`; its own path does not count.

    Of a table it is that of its own content and of the files that it names.
    """
    folder, digest = Path(folder), hashlib.sha256()
    if folder.is_file():
        digest.update(folder.read_bytes())
        paths = [path for entry in list_table(folder) for path in _files_of(Path(entry.payload))]
    else:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
    below = folder.parent if folder.is_file() else folder
    for path in paths:
        status = path.stat()
        name = path.relative_to(below).as_posix() if path.is_relative_to(below) else path.name
        digest.update(f"{name}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files_of(path: Path) -> list[Path]:
    """Return the files of a record named in a table: the one named, and of a WFDB record header and signals."""
    stem = path.with_suffix("") if path.suffix in WFDB_SUFFIXES else path
    named = [path, *(Path(f"{stem}{suffix}") for suffix in WFDB_SUFFIXES)]
    return [each for each in dict.fromkeys(named) if each.is_file()]


def _cache_key(entries: Sequence[RecordEntry], extractor: AnyECGFeatureExtractor, source: str) -> str:
    readers = sorted({inspect.getmodule(entry.reader) for entry in entries}, key=lambda module: module.__name__)
    package = sorted(
        Path(feature_extraction_anyecg.__file__).parent.glob("*.py")
    )  # any reader may be the one that is used
    code = "".join(path.read_text("utf-8") for path in package if not path.name.startswith(("modeling", "pipelines")))
    code += "".join(inspect.getsource(module) for module in readers)
    parts = [
        str(CACHE_FORMAT), source, _extractor_json(extractor), code,
        "\n".join(f"{entry.record_id}|{entry.fold}|{entry.codes}" for entry in entries),
    ]  # fmt: skip
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _extractor_json(extractor: AnyECGFeatureExtractor) -> str:
    return json.dumps(extractor.to_dict(), sort_keys=True, default=str)


def _write_cache(folder: Path, entries, extractor, *, source: str, num_proc: int) -> None:
    _remove_leftovers(folder)
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        _fill_cache(unfinished, entries, extractor, source=source, num_proc=num_proc)
        for path in unfinished.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        _rename_or_yield(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left of the same cache; one that is still running keeps its own."""
    for leftover in folder.parent.glob(f"{folder.name}.unfinished-*"):
        if not Path(f"/proc/{leftover.name.rpartition('-')[2]}").exists():
            shutil.rmtree(leftover, ignore_errors=True)


def _rename_or_yield(unfinished: Path, folder: Path) -> None:
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not (folder / "meta.json").is_file():  # another process was not faster: a real error
            raise


def _fill_cache(folder: Path, entries, extractor, *, source: str, num_proc: int) -> None:
    step_mv = (getattr(extractor, "clip_mv", None) or DEFAULT_RANGE_MV) / 32767
    rows, unreadable = [], {}
    place_signal = place_mask = 0
    with open(folder / "signals.int16", "wb") as signals, open(folder / "mask.uint8", "wb") as masks:
        for entry, prepared in _prepare_all(entries, extractor, step_mv, num_proc):
            if isinstance(prepared, str):
                unreadable[entry.record_id] = prepared
                continue
            signals.write(prepared.signal.tobytes())
            masks.write(prepared.mask.tobytes())
            rows.append(prepared.row | {"signal_start": place_signal, "mask_start": place_mask})
            place_signal, place_mask = place_signal + prepared.signal.size, place_mask + prepared.mask.size
    _report_unreadable(unreadable, len(entries), source)
    pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), folder / "records.parquet")
    meta = {
        "format": CACHE_FORMAT, "step_mv": step_mv, "source": source, "num_records": len(rows),
        "extractor": json.loads(_extractor_json(extractor)), "unreadable": unreadable,
        "records_crc32": zlib.crc32((folder / "records.parquet").read_bytes()),
    }  # fmt: skip
    meta["meta_crc32"] = _crc32_of_meta(meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _crc32_of_meta(meta: dict) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _schema() -> pa.Schema:
    text, integer, real = pa.string(), pa.int64(), pa.float32()
    return pa.schema(
        [
            ("record_id", text), ("patient_id", text), ("fold", pa.int8()), ("age", real), ("sex", text),
            ("weight", real), ("codes", pa.list_(text)), ("lead_ids", pa.list_(pa.int8())), ("num_samples", integer),
            ("num_patches", integer), ("signal_start", integer), ("mask_start", integer),
            ("signal_crc32", pa.uint32()), ("mask_crc32", pa.uint32()),
        ]
    )  # fmt: skip


def _report_unreadable(unreadable: dict[str, str], num_entries: int, source: str) -> None:
    if not unreadable:
        return
    name, reason = next(iter(unreadable.items()))
    text = f"{len(unreadable)} of {num_entries} records could not be prepared, the first is {name!r}: {reason}"
    if len(unreadable) > MAX_SHARE_UNREADABLE * num_entries:
        raise ValueError(f"{text} Nothing was cached; check the data (source {source[:80]}).")
    logger.warning("%s They are left out; meta.json in the cache lists all.", text)


def _prepare_all(entries, extractor, step_mv: float, num_proc: int) -> Iterator[tuple]:
    """Yield `(entry, PreparedRecord or the reason why not)` in the order of `entries`, with a progress bar."""
    work = partial(_prepare_one, extractor=extractor, step_mv=step_mv)
    bar = partial(tqdm, total=len(entries), desc="preparing records", unit="record", mininterval=1.0)
    if num_proc <= 1 or len(entries) < MIN_RECORDS_FOR_PROCESSES:
        yield from zip(entries, bar(map(work, entries)), strict=True)
        return
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    try:
        with ProcessPoolExecutor(num_proc, mp_context=context, initializer=_leave_stopping_to_the_parent) as pool:
            yield from zip(entries, bar(pool.map(work, entries, chunksize=16)), strict=True)
    except BrokenProcessPool:
        raise ChildProcessError(
            "A process that prepared records died: most often memory ran out. Lower --num_proc. Nothing was cached."
        ) from None


def _leave_stopping_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: one message is enough
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclass
class PreparedRecord:
    signal: np.ndarray  # int16 (num_leads, num_samples)
    mask: np.ndarray  # uint8 (num_leads, num_patches)
    row: dict


def _prepare_one(entry: RecordEntry, *, extractor, step_mv: float) -> PreparedRecord | str:
    try:
        record = entry.read()
        features = extractor(record)
        return _pack(entry, record, features, step_mv)
    except (ValueError, TypeError, OSError) as error:  # what readers and the extractor promise for bad records
        return _without_folder(f"{type(error).__name__}: {error}", entry.payload)


def _without_folder(reason: str, payload) -> str:
    """Return a reason without the record's folder, which may be named after a patient: it is logged and stored."""
    return reason.replace(str(Path(payload).with_name("x"))[:-1], "") if isinstance(payload, (str, Path)) else reason


def _pack(entry: RecordEntry, record, features, step_mv: float) -> PreparedRecord:
    values = np.asarray(features["input_values"][0], dtype=np.float32)  # (leads, samples), mV
    mask = np.asarray(features["attention_mask"][0], dtype=np.uint8)  # (leads, patches)
    steps = np.clip(np.rint(values / step_mv), -32767, 32767).astype(np.int16)
    row = _facts(entry, record) | {
        "lead_ids": [int(lead) for lead in np.asarray(features["lead_ids"][0])],
        "num_samples": values.shape[1],
        "num_patches": mask.shape[1],
        "signal_crc32": zlib.crc32(steps.tobytes()),
        "mask_crc32": zlib.crc32(mask.tobytes()),
    }
    return PreparedRecord(steps, mask, row)


def _facts(entry: RecordEntry, record) -> dict:
    codes = entry.codes if entry.codes is not None else tuple(record.diagnosis_codes or ())
    return {
        "record_id": entry.record_id,
        "patient_id": entry.patient_id,
        "fold": entry.fold,
        "age": entry.age if entry.age is not None else plausible_age(record.age),
        "sex": entry.sex or record.sex,
        "weight": entry.weight,
        "codes": list(codes),
    }


class RecordStore:
    """Prepared records of one cache folder, read by row without loading the whole.

    Raises:
        DamagedCacheError: a file is missing, cannot be read, or has another size than its records need; on reading a record:
            its signal or mask is not as it was written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            records = (self.folder / "records.parquet").read_bytes()
            self._check_small_files(records)
            table = pq.read_table(pa.BufferReader(records))
        except DamagedCacheError:
            raise
        except (OSError, ValueError) as error:  # pyarrow's are among them
            raise DamagedCacheError(f"{self.folder} is damaged ({error})") from error
        self.step_mv = float(self.meta["step_mv"])
        self.columns = {name: table[name].to_pylist() for name in table.column_names}
        self._check_size("signals.int16", "num_samples", bytes_each=2)
        self._check_size("mask.uint8", "num_patches", bytes_each=1)
        self._lead_ids = [np.array(ids, dtype=np.int64) for ids in self.columns["lead_ids"]]
        self._maps: tuple[np.ndarray, np.ndarray] | None = None

    def _check_small_files(self, records: bytes) -> None:
        crc32 = self.meta.pop("meta_crc32", None)
        if crc32 != _crc32_of_meta(self.meta):
            raise DamagedCacheError(f"{self.folder / 'meta.json'} has another CRC-32 than when it was written")
        if self.meta["records_crc32"] != zlib.crc32(records):
            raise DamagedCacheError(f"{self.folder / 'records.parquet'} has another CRC-32 than when it was written")

    def _check_size(self, name: str, column: str, *, bytes_each: int) -> None:
        path = self.folder / name
        counts = (
            len(leads) * count for leads, count in zip(self.columns["lead_ids"], self.columns[column], strict=True)
        )
        found, needed = path.stat().st_size if path.is_file() else 0, bytes_each * sum(counts)
        if found != needed:
            raise DamagedCacheError(f"{path} has {found} bytes instead of {needed}")

    def __len__(self) -> int:
        return len(self._lead_ids)

    def __getstate__(self) -> dict:  # a worker process opens the maps itself instead of being sent their content
        return self.__dict__ | {"_maps": None}

    def steps(self, row: int) -> np.ndarray:
        """Return int16 `(num_leads, num_samples)`, `step_mv` millivolt a step: a view into the map."""
        shape = (len(self._lead_ids[row]), self.columns["num_samples"][row])
        return self._checked(_view(self._open()[0], self.columns["signal_start"][row], shape), row, "signal")

    def mask(self, row: int) -> np.ndarray:
        """Return uint8 `(num_leads, num_patches)`, 1 = usable: a view into the map."""
        shape = (len(self._lead_ids[row]), self.columns["num_patches"][row])
        return self._checked(_view(self._open()[1], self.columns["mask_start"][row], shape), row, "mask")

    def _checked(self, values: np.ndarray, row: int, part: str) -> np.ndarray:
        written, found = self.columns[f"{part}_crc32"][row], zlib.crc32(values)
        if found != written:
            path = self.folder / {"signal": "signals.int16", "mask": "mask.uint8"}[part]
            raise DamagedCacheError(
                f"Record {self.columns['record_id'][row]!r}: its {part} in the cache of prepared records, {path}, has the CRC-32 "
                f"{found:08x}, it was written with {written:08x}: the file has been altered since (by the disk?). Remove the "
                f"folder {self.folder} and run the same command again: the records are prepared anew."
            )
        return values

    def lead_ids(self, row: int) -> np.ndarray:
        return self._lead_ids[row]

    def signal(self, row: int) -> np.ndarray:
        """Return float32 `(num_leads, num_samples)` in millivolt at the model's rate."""
        return self.steps(row) * np.float32(self.step_mv)

    def _open(self) -> tuple[np.ndarray, np.ndarray]:
        if self._maps is None:
            self._maps = (
                np.memmap(self.folder / "signals.int16", dtype=np.int16, mode="r").view(np.ndarray),
                np.memmap(self.folder / "mask.uint8", dtype=np.uint8, mode="r").view(np.ndarray),
            )
        return self._maps


def _view(flat: np.ndarray, start: int, shape: tuple[int, int]) -> np.ndarray:
    return flat[start : start + shape[0] * shape[1]].reshape(shape)
