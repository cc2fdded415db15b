"""Any folder of WFDB records. Labels are the codes of the `Dx` comment (SNOMED in the Challenge corpora), if any."""

from __future__ import annotations

from pathlib import Path

from anyecg_hf.records import read_record
from training.splits import folds_of

from .entry import RecordEntry


def list_wfdb_folder(folder: Path) -> list[RecordEntry]:
    """Return one entry per header below `folder`, in the order of their paths; none is opened yet.

    Age, sex and codes come from the header when the record is read. WFDB names no patient, so each file name counts as
    a patient and gets its fold from its hash (`splits.folds_of`).
    """
    headers = sorted(Path(folder).rglob("*.hea"))
    folds = folds_of([header.stem for header in headers])
    entries = []
    for header in headers:
        record_id = header.relative_to(folder).with_suffix("").as_posix()
        path = str(header.with_suffix(""))
        entries.append(RecordEntry(record_id, header.stem, folds[header.stem], read_record, path))
    return entries
