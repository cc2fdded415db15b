"""PTB-XL, as published (WFDB files and `ptbxl_database.csv`) or packed in Parquet with the leads as FLAC.

Every key of `scp_codes` counts as present whatever its likelihood, 0 included: in PTB-XL 0 means "unknown" and is
typical of form and rhythm statements. Source: Strodthoff et al. 2020, label code of the benchmark.
"""

from __future__ import annotations

import ast
import csv
import io
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from anyecg_hf.leads import STANDARD_LEADS
from anyecg_hf.records import Record, read_record
from training.splits import fold_of

from .entry import RecordEntry, naming_the_file, plausible_age

logger = logging.getLogger(__name__)

DATABASE = "ptbxl_database.csv"
SEX = {0: "male", 1: "female"}
FINE_STEP_RATE = 500  # Hz; packs of PTB-XL at this rate are stored at 1 uV a step, all others at 5 uV


def is_published(folder: Path) -> bool:
    return (folder / DATABASE).is_file()


def is_packed(folder: Path) -> bool:
    return bool(_packed_files(folder))


def list_published(folder: Path) -> list[RecordEntry]:
    """Return the records of `ptbxl_database.csv` whose files are there, in the order of `ecg_id`.

    A record is read at 100 Hz (`filename_lr`) where that file exists, else at 500 Hz (`filename_hr`). Rows without
    either file (a partial download) are left out and counted in a warning.
    """
    with open(folder / DATABASE, newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(float(row["ecg_id"])))
    entries, num_absent = [], 0
    for row in rows:
        path = _existing_file(folder, row)
        if path is None:
            num_absent += 1
        else:
            entries.append(_published_entry(row, path))
    if num_absent:
        logger.warning("%s: %d of %d records of %s have no signal file and are left out", folder, num_absent,
                       len(rows), DATABASE)  # fmt: skip
    return entries


def _existing_file(folder: Path, row: dict) -> str | None:
    for column in ("filename_lr", "filename_hr"):
        if row.get(column) and (folder / f"{row[column]}.hea").is_file():
            return str(folder / row[column])
    return None


def _published_entry(row: dict, path: str) -> RecordEntry:
    numbers = {name: _number(row.get(name)) for name in ("ecg_id", "patient_id", "age", "sex", "weight", "strat_fold")}
    codes = tuple(ast.literal_eval(row["scp_codes"]))
    return _entry(numbers, codes, reader=read_record, payload=path)


def _number(text: str | None) -> float | None:
    return float(text) if text not in (None, "", "nan") else None


def _entry(numbers: dict, codes: tuple[str, ...], *, reader, payload) -> RecordEntry:
    return RecordEntry(
        record_id=f"{int(numbers['ecg_id']):05d}",
        patient_id=f"ptb-xl-{int(numbers['patient_id'])}",
        fold=int(numbers["strat_fold"]),
        reader=reader,
        payload=payload,
        age=plausible_age(numbers["age"]),
        sex=SEX.get(numbers["sex"]),
        weight=numbers.get("weight"),
        codes=codes,
    )


def list_packed(folder: Path) -> list[RecordEntry]:
    """Return the records of `fold-*.parquet` or `records.parquet`; the FLAC bytes (6-30 KB each) go along."""
    entries = []
    for path in _packed_files(folder):
        with naming_the_file(path):
            rows = pq.read_table(path).to_pylist()
        entries += [_packed_entry(row) for row in rows]
    return entries


def _packed_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("fold-*.parquet")) or sorted(folder.glob("records.parquet"))


def _packed_entry(row: dict) -> RecordEntry:
    payload = {"flac": row["flac"], "limb_flac": row["limb_flac"], "is_ptb_xl": "ecg_id" in row}
    if "ecg_id" in row:
        payload["name"] = f"{row['ecg_id']:05d}"
        return _entry(row, tuple(row["scp_codes"]), reader=read_packed, payload=payload)
    payload["name"] = str(row["name"])  # packs of other corpora carry a name only
    return RecordEntry(payload["name"], payload["name"], fold_of(payload["name"]), read_packed, payload, codes=())


def read_packed(payload: dict) -> Record:
    """Return the record of one packed row: I, II, V1-V6 as stored, limb leads derived unless stored apart.

    Args:
        payload (`dict`): `flac` and `limb_flac` (bytes; the latter None where III, aVR, aVL, aVF follow from I and
            II), `is_ptb_xl`, `name`.
    """
    stored, sampling_rate = _decode_flac(payload["flac"])
    step_microvolt = 1 if payload["is_ptb_xl"] and sampling_rate == FINE_STEP_RATE else 5
    lead_i, lead_ii = (lead * step_microvolt for lead in stored[:2].astype(np.int32))
    if payload["limb_flac"] is not None:
        limb = _decode_flac(payload["limb_flac"])[0].astype(np.int32) * step_microvolt
    else:  # floor division as in the packs: whole microvolt
        limb = [lead_ii - lead_i, -(lead_i + lead_ii) // 2, lead_i - lead_ii // 2, lead_ii - lead_i // 2]
    microvolt = np.concatenate([[lead_i, lead_ii], limb, stored[2:].astype(np.int32) * step_microvolt])
    return Record(
        signal=(microvolt / 1000.0).astype(np.float32),
        sampling_rate=float(sampling_rate),
        lead_names=list(STANDARD_LEADS),
        record_name=payload["name"],
    )


def _decode_flac(data: bytes) -> tuple[np.ndarray, int]:
    """Return int16 `(num_leads, num_samples)` and the rate in Hz."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("Packed Parquet records need soundfile: pip install soundfile") from error
    samples, sampling_rate = soundfile.read(io.BytesIO(data), dtype="int16", always_2d=True)
    return samples.T, sampling_rate
