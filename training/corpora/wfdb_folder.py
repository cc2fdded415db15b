"""Any folder of WFDB records. Labels are the codes of the `Dx` comment (SNOMED in the Challenge corpora), if any."""

from __future__ import annotations

from pathlib import Path

from anyecg_hf.records import read_record
from training.splits import fold_of

from .entry import RecordEntry


def list_wfdb_folder(folder: Path) -> list[RecordEntry]:
    """Return one entry per header below `folder`, in the order of their paths; none is opened yet.

    Age, sex and codes come from the header when the record is read. WFDB names no patient, so each record counts as
    a patient of its own and gets its fold from a hash of its file name.
    """
    entries = []
    for header in sorted(Path(folder).rglob("*.hea")):
        record_id = header.relative_to(folder).with_suffix("").as_posix()
        path = str(header.with_suffix(""))
        entries.append(RecordEntry(record_id, record_id, fold_of(header.stem), read_record, path))
    return entries
