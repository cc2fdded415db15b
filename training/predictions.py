"""Predictions of a classifier as Parquet shards: what is in a row, and `PredictionPlan`, which writes the rows of one shard.

    predictions/predictions-00000-of-00003.parquet     a row a record, in the order of the archive
    reports/predictions-00000-of-00003.json            the plan's digest, what could not be predicted, the Parquet's SHA-256

Columns: those of `COLUMNS`, then one float32 a label, in the model's order, named as the label. The schema's metadata, key
`anyecg_predictions`, is JSON: the checkpoint (name, commit of the Hub, SHA-256), its labels and thresholds, the software.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch.utils.data import DataLoader, Dataset
from transformers import pipeline

from anyecg_hf.pipelines_anyecg import ECGClassificationPipeline

from .archive import READ_ERRORS, ArchiveRecord
from .checkpointing import project_path
from .corpora.sources import Source
from .row_builder import unsaid
from .run_inputs import model_sha256
from .shards import Output, put_shard

METADATA = b"anyecg_predictions"
_TEXT, _TEXTS, _REAL = pa.string(), pa.list_(pa.string()), pa.float32()
_STRETCHES = pa.list_(pa.struct([("lead", _TEXT), ("start_seconds", _REAL), ("end_seconds", _REAL), ("reason", _TEXT)]))
COLUMNS = [
    ("source", pa.int32()),  # which folder of --data, from 0
    ("path", _TEXT),  # below it; null of packed records
    ("record_id", _TEXT),
    ("error", _TEXT),  # why there is no prediction: then all that follows is null
    ("findings", _TEXTS),  # labels at or above their threshold, highest score first; null of a regression
    ("is_acceptable", pa.bool_()),  # this and the next four: `anyecg_hf.quality_report`
    ("acceptability", _REAL),  # 0 to 1
    ("usable_share", _REAL),  # 0 to 1, of lead-seconds
    ("masked", _STRETCHES),
    ("doubtful", _STRETCHES),
    ("notes", _TEXTS),  # what the reader of the file found doubtful
    ("lead_names", _TEXTS),  # that the model took
    ("sampling_rate", pa.float64()),  # Hz, of the file
    ("duration_seconds", pa.float64()),
    ("num_windows", pa.int32()),
    ("file_format", _TEXT),
]
_OF_QUALITY = (
    "is_acceptable", "acceptability", "usable_share", "masked", "doubtful", "lead_names", "duration_seconds",
    "num_windows",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A classifier: its folder, or its repository on the Hub at one commit; any machine can load it from that."""

    name: str
    revision: str | None
    sha256: str = ""

    @property
    def folder(self) -> str:
        """The folder of the files; those of a repository are fetched where they are not in the cache.

        Raises:
            ValueError: there is neither such a folder nor such a repository.
        """
        if Path(self.name).is_dir():
            return self.name
        try:
            return snapshot_download(self.name, revision=self.revision, allow_patterns=["*.json", "*.safetensors"])
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise ValueError(
                f"--checkpoint {self.name}: no such folder, and no repository of the Hub that can be read "
                f"({type(error).__name__}). Give the folder of a classifier, as training.finetune writes it, or ORG/NAME."
            ) from None

    @property
    def identity(self) -> dict:
        """What tells it from others; of the folder only the name, which is another on each machine."""
        return asdict(self) | {"name": Path(self.name).name if Path(self.name).is_dir() else self.name}


def find_checkpoint(given: str, revision: str | None = None) -> Checkpoint:
    """Return a folder, or the repository ORG/NAME at the commit that `revision` (a branch, tag or commit) stands for now.

    Raises:
        ValueError: there is neither, it holds no weights, or a folder is given with a revision.
    """
    name = project_path(given)
    if Path(name).is_dir():
        if revision:
            raise ValueError(f"--revision {revision}: --checkpoint {given} is a folder, which has none. Leave it out.")
        return Checkpoint(str(Path(name).resolve()), None, model_sha256(name))
    folder = Checkpoint(name, revision).folder
    return Checkpoint(name, Path(folder).name, model_sha256(folder))


@functools.lru_cache(maxsize=1)  # a process writes many shards
def load_classifier(checkpoint: Checkpoint) -> ECGClassificationPipeline:
    """Return the pipeline of a checkpoint on this process's device.

    Raises:
        ValueError: it is no classifier, not the one that the plans were made for, or a label is named as a column.
    """
    folder = checkpoint.folder
    if model_sha256(folder) != checkpoint.sha256:
        raise ValueError(
            f"--checkpoint {checkpoint.name}: another model lies there on this machine, or since the start."
        )
    classifier = pipeline("ecg-classification", model=folder, device=PartialState().device)
    taken = Counter([*dict(COLUMNS), *labels_of(classifier)])
    if twice := [name for name, count in taken.items() if count > 1]:
        raise ValueError(
            f"--checkpoint {checkpoint.name}: labels {', '.join(twice)} are there twice or are names of columns. Rename "
            "them in id2label of its config.json."
        )
    return classifier


def labels_of(classifier: ECGClassificationPipeline) -> list[str]:
    """Return the labels in the model's order."""
    config = classifier.model.config
    return [config.id2label[index] for index in range(config.num_labels)]


@dataclass(frozen=True)
class PredictionPlan:
    """Which records one shard predicts, by what, and where it goes."""

    name: str  # "predictions-00000-of-00003"
    records: tuple[tuple[int, ArchiveRecord], ...]  # each with its place among the folders of --data
    out: str
    run: dict  # what all rows follow from: see `predict.describe_run`
    checkpoint: Checkpoint
    num_workers: int = 0  # processes that read

    @property
    def digest(self) -> str:
        facts = {name: value for name, value in self.run.items() if name != "software"}
        return hashlib.sha256(json.dumps([self.name, facts], sort_keys=True).encode()).hexdigest()

    @property
    def parquet(self) -> str:
        return f"predictions/{self.name}.parquet"

    @property
    def report(self) -> str:
        return f"reports/{self.name}.json"

    def agrees(self, report: dict) -> bool:
        """Tell whether the counts of a report can be those of this plan."""
        return report["records_out"] == len(self.records) and isinstance(report["errors"], list)

    def write(self) -> dict:
        """Write the shard and return its report: digest, records_out, errors (`{path, record_id, reason}` each), sha256
        and num_bytes of the Parquet.

        Raises:
            FileNotFoundError: an archive is gone (a network drive?): its records are not taken for bad.
        """
        classifier = load_classifier(self.checkpoint)
        options = {"batch_size": self.run["batch_size"], "num_workers": self.num_workers}
        rows = list(predict_records(classifier, [record for _, record in self.records], **options))
        for folder in {record.folder for _, record in self.records}:
            Source(folder)
        for row, (source, _) in zip(rows, self.records, strict=True):
            row["source"] = source
        errors = [
            {"path": row["path"], "record_id": row["record_id"], "reason": row["error"]} for row in rows if row["error"]
        ]
        report = {"digest": self.digest, "records_out": len(rows), "errors": errors}
        return put_shard(self, Output(self.out), report, _parquet(rows, classifier, self.run))


def predict_records(
    classifier: ECGClassificationPipeline,
    records: Sequence[ArchiveRecord],
    *,
    batch_size: int = 32,
    num_workers: int = 0,
) -> Iterator[dict]:
    """Yield a row of `COLUMNS` (without `source`) and labels for each record, with what `classifier` says of it.

    Args:
        batch_size: windows that go through the model together; of a long record there are many.
        num_workers: processes that read and filter; with 0 this one does.
    """
    loader = DataLoader(_Prepared(classifier, records), batch_size=1, num_workers=num_workers, collate_fn=list)
    waiting: list[tuple[ArchiveRecord, dict | str]] = []
    with unsaid():  # what is masked is in the row
        for record, prepared in zip(records, chain.from_iterable(loader), strict=True):
            waiting.append((record, prepared))
            if sum(len(each["items"]) for _, each in waiting if isinstance(each, dict)) >= batch_size:
                yield from _predict(classifier, waiting, batch_size)
                waiting = []
        yield from _predict(classifier, waiting, batch_size)


class _Prepared(Dataset):
    """The windows of each record, or the reason why there are none."""

    def __init__(self, classifier: ECGClassificationPipeline, records: Sequence[ArchiveRecord]):
        self.classifier, self.records = classifier, records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict | str:
        try:
            record = self.records[index].read()
            prepared = self.classifier.preprocess(record)
        except READ_ERRORS as error:
            return str(error) or type(error).__name__
        return prepared | {"sampling_rate": record.sampling_rate, "file_format": record.file_format}


def _predict(
    classifier: ECGClassificationPipeline, waiting: Sequence[tuple[ArchiveRecord, dict | str]], batch_size: int
) -> Iterator[dict]:
    readable = [prepared for _, prepared in waiting if isinstance(prepared, dict)]
    results = iter(classifier.forward(readable, windows_per_batch=batch_size))
    for record, prepared in waiting:
        row = {"path": _as_text(record.path), "record_id": _as_text(record.record_id), "error": None}
        if isinstance(prepared, str):
            yield row | {"error": _as_text(prepared)}
        else:
            yield row | _outcome(classifier.postprocess(next(results), return_quality=True), prepared)


def _outcome(result: dict, prepared: dict) -> dict:
    findings, quality = result["findings"], result["quality"]
    is_regression = all(finding["positive"] is None for finding in findings)
    return {
        "findings": None if is_regression else [finding["label"] for finding in findings if finding["positive"]],
        **{name: quality[name] for name in _OF_QUALITY},
        "notes": [_as_text(note) for note in quality["notes"]],
        **{name: prepared[name] for name in ("sampling_rate", "file_format")},
        **{finding["label"]: finding["score"] for finding in findings},
    }


def _as_text(name: str | None) -> str | None:
    """Return a name that Parquet takes: those of files may be no UTF-8."""
    return name and name.encode(errors="backslashreplace").decode()


def _parquet(rows: Iterable[dict], classifier: ECGClassificationPipeline, run: dict) -> bytes:
    """Return the rows as a Parquet file, the same bytes for the same rows."""
    labels, config = labels_of(classifier), classifier.model.config
    told = run | {"labels": labels, "thresholds": config.thresholds, "problem_type": config.problem_type}
    schema = pa.schema([*COLUMNS, *((label, _REAL) for label in labels)], {METADATA: json.dumps(told).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()
