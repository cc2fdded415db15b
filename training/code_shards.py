"""Stored rhythm codes: the shards that `python -m tokenization.encode` writes and stage two reads.

A folder of `codes-00000-of-00003.parquet`, ... A row is one window of one record; the windows of a record follow each other:

    source         fingerprint of the data folder: its files' names, sizes and times (`record_store.source_fingerprint`)
    record_id, patient_id, fold
    lead_ids       as the model takes them (`anyecg_hf.leads.LEAD_IDS`), in the order of the codes
    first_patch    of the window in the record
    num_patches    of the window; the last one of a record may be shorter
    codes          lead by lead, num_leads * num_patches; -100 where a patch is masked

The schema's metadata, key `anyecg_codes`, is JSON: the fields of `CodeOrigin`, and the digest of what goes into the shard.
Pages carry checksums, which every read verifies.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor

from .checkpointing import load_extractor
from .record_store import RecordStore
from .shards import Output

FORMAT = 1
METADATA = b"anyecg_codes"
NO_CODE = -100
READ_BYTES = 1 << 24  # at a time, of weights that may be gigabytes
_COLUMNS = ("source", "record_id", "lead_ids", "first_patch", "num_patches", "codes")
_NAME = re.compile(r"codes-(\d{5})-of-(\d{5})\.parquet")


@dataclass(frozen=True)
class CodeOrigin:
    """What codes follow from, besides the records."""

    quantizer_sha256: str  # of the weights, model.safetensors
    codebook_size: int
    num_lead_ids: int
    extractor: dict  # configuration of the feature extractor
    window_seconds: float  # longer records are coded in windows of this length

    def make_extractor(self) -> AnyECGFeatureExtractor:
        options = {name: value for name, value in self.extractor.items() if name != "feature_extractor_type"}
        return AnyECGFeatureExtractor(**options)

    def refuse_other(self, quantizer_folder: str | Path, *, codes: str) -> None:
        """Raise a ValueError unless quantizer and extractor in a folder are those that these codes were made with."""
        given = weights_sha256(quantizer_folder)
        if given != self.quantizer_sha256:
            raise ValueError(
                f"--codes {codes} were made by another quantizer (SHA-256 of its weights {self.quantizer_sha256[:12]}...) "
                f"than --quantizer {quantizer_folder} ({given[:12]}...). Name the one that made them, leave it out "
                "(--quantizer '' where the recipe names one), or run tokenization.encode with this one."
            )
        extractor = extractor_options(load_extractor(quantizer_folder))
        differing = [
            name for name in {**extractor, **self.extractor} if extractor.get(name) != self.extractor.get(name)
        ]
        if differing:
            pairs = ", ".join(f"{name} {self.extractor.get(name)!r}, not {extractor.get(name)!r}" for name in differing)
            raise ValueError(
                f"--codes {codes} were made with another extractor configuration than that of --quantizer "
                f"{quantizer_folder}: {pairs}. Run tokenization.encode again."
            )


def extractor_options(extractor: AnyECGFeatureExtractor) -> dict:
    """Return an extractor's configuration as it comes out of JSON."""
    return json.loads(json.dumps(extractor.to_dict(), sort_keys=True))


def weights_sha256(folder: str | Path) -> str:
    """Return the SHA-256 of the weights in a folder (of several files, of all in the order of their names).

    Raises:
        ValueError: there are none.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors. Give the output folder of `python -m tokenization.train`.")
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def shard_name(number: int, count: int) -> str:
    return f"codes-{number:05d}-of-{count:05d}.parquet"


def shard_names(out: Output) -> list[str]:
    return [name for name in out.names("") if _NAME.fullmatch(name)]


def shard_bytes(rows: Sequence[dict], origin: CodeOrigin, digest: str) -> bytes:
    """Return rows as a Parquet file; `codes` of a row is an array `(num_leads, num_patches)`."""
    metadata = {METADATA: json.dumps({"format": FORMAT, "digest": digest, **asdict(origin)}).encode()}
    rows = [row | {"codes": row["codes"].ravel()} for row in rows]
    table = pa.Table.from_pylist(rows, schema=_schema(origin.codebook_size).with_metadata(metadata))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def _schema(codebook_size: int) -> pa.Schema:
    code = pa.int16() if codebook_size <= np.iinfo(np.int16).max else pa.int32()
    return pa.schema(
        [
            ("source", pa.string()), ("record_id", pa.string()), ("patient_id", pa.string()), ("fold", pa.int8()),
            ("lead_ids", pa.list_(pa.int8())), ("first_patch", pa.int32()), ("num_patches", pa.int32()),
            ("codes", pa.list_(code)),
        ]
    )  # fmt: skip


def read_metadata(schema: pa.Schema, place: str) -> dict:
    """Return what a shard says of itself: `digest`, `format` and the fields of `CodeOrigin`.

    Raises:
        ValueError: it is no shard of codes, or of another format.
    """
    metadata = json.loads((schema.metadata or {}).get(METADATA, b"{}"))
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{place} is no shard of rhythm codes of format {FORMAT}. Run `python -m tokenization.encode` into a new folder."
        )
    return metadata


def origin_of(metadata: dict) -> CodeOrigin:
    return CodeOrigin(**{name: metadata[name] for name in CodeOrigin.__dataclass_fields__})


class StoredCodes:
    """The codes of many records, in memory: two bytes a patch (four where the codebook is above 32,767).

    Raises:
        ValueError: the folder holds no shards, not all of them, shards of several origins, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder, out = str(folder), Output(folder)
        names = shard_names(out)
        _refuse_incomplete(self.folder, names)
        tables = [_read_table(out, name) for name in names]
        origins = {json.dumps(asdict(origin_of(read_metadata(table.schema, self.folder)))) for table in tables}
        if len(origins) > 1:
            raise ValueError(
                f"--codes {self.folder}: its shards were made by different quantizers, extractors or windows."
            )
        self.origin = origin_of(json.loads(origins.pop()))
        table = pa.concat_tables(tables).combine_chunks()
        self._codes, self._code_ends = _flat(table["codes"])
        self._leads, self._lead_ends = _flat(table["lead_ids"])
        self._first, self._num = (table[name].to_numpy() for name in ("first_patch", "num_patches"))
        self._rows: dict[tuple[str, str], tuple[int, int]] = {}  # (source, record) -> its first row, how many
        sources = map(sys.intern, table["source"].to_pylist())  # a few texts, for many records
        for row, key in enumerate(zip(sources, table["record_id"].to_pylist(), strict=True)):
            first, count = self._rows.get(key, (row, 0))
            self._rows[key] = (first, count + 1)

    def sha256(self) -> str:
        """Return the SHA-256 of the codes and of what they are of; where the records lay and how shards are cut do not count."""
        windows = [(record_id, *place) for (_, record_id), place in self._rows.items()]
        digest = hashlib.sha256(json.dumps([asdict(self.origin), windows], sort_keys=True).encode())
        for values in (self._codes, self._code_ends, self._leads, self._lead_ends, self._first, self._num):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def windows(self, store: RecordStore, row: int) -> list[tuple[int, np.ndarray]]:
        """Return (first patch, codes `(num_leads, num_patches)`) of each window of a record."""
        first, count = self._rows[_key(store, row)]
        return [(int(self._first[each]), self._window(each)) for each in range(first, first + count)]

    def _window(self, row: int) -> np.ndarray:
        codes = self._codes[self._code_ends[row] : self._code_ends[row + 1]]
        return codes.reshape(-1, self._num[row])

    def refuse_others(self, records: Sequence[tuple[RecordStore, int]]) -> None:
        """Check that there are codes of all these records, and that they are of the same patches.

        Raises:
            ValueError: of some there are none, or a record's leads or masked patches are others.
        """
        missing = [_key(*record) for record in records if _key(*record) not in self._rows]
        if missing:
            known = {source for source, _ in self._rows}
            why = "" if missing[0][0] in known else " (its data folder has other files or times than the one encoded)"
            raise ValueError(
                f"--codes {self.folder}: {len(missing)} of {len(records)} records are missing, the first is "
                f"{missing[0][1]!r}{why}. Run tokenization.encode with the same --data and all folds."
            )
        others = [_key(*record)[1] for record in records if not self._fits(*record)]
        if others:
            raise ValueError(
                f"--codes {self.folder}: {len(others)} of {len(records)} records have other leads or masked patches than "
                f"when they were encoded, the first is {others[0]!r}. Run tokenization.encode again."
            )

    def _fits(self, store: RecordStore, row: int) -> bool:
        first, _ = self._rows[_key(store, row)]
        lead_ids = self._leads[self._lead_ends[first] : self._lead_ends[first + 1]]
        coded = np.zeros_like(mask := store.mask(row))
        if not np.array_equal(lead_ids, store.lead_ids(row)):
            return False
        for start, codes in self.windows(store, row):
            if start + codes.shape[1] > mask.shape[1]:
                return False
            coded[:, start : start + codes.shape[1]] = codes >= 0
        return np.array_equal(coded, mask)


def _key(store: RecordStore, row: int) -> tuple[str, str]:
    return store.meta["source"], store.columns["record_id"][row]


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a column of lists, one after the other, and where each list ends (0 first)."""
    values, ends = [], [np.zeros(1, np.int64)]
    for chunk in column.chunks:
        values.append(chunk.flatten().to_numpy())
        ends.append(ends[-1][-1] + np.cumsum(np.diff(chunk.offsets.to_numpy()), dtype=np.int64))
    return np.concatenate(values), np.concatenate(ends)


def _refuse_incomplete(folder: str, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(
            f"--codes {folder}: there are no codes-*.parquet. Give the --out of `python -m tokenization.encode`."
        )
    expected = int(_NAME.fullmatch(names[0])[2])
    if set(names) != {shard_name(number, expected) for number in range(expected)}:
        raise ValueError(
            f"--codes {folder}: {len(names)} of {expected} shards are there. Run the same tokenization.encode again: it "
            "goes on with the next shard."
        )


def _read_table(out: Output, name: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(out.read(name)), columns=list(_COLUMNS), page_checksum_verification=True)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise ValueError(
            f"--codes {out.url}: {name} is damaged ({error}). Remove it and run tokenization.encode again."
        ) from None
