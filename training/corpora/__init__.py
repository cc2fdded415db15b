"""Corpora, for two uses: `list_records` lists any folder or table that a model is trained on, as `RecordEntry`; `CORPORA` the
seven published corpora that the data set is built from, as `SourceRecord`.
"""

from __future__ import annotations

from pathlib import Path

from .built import is_built, list_built
from .catalogue import CORPORA, are_related
from .entry import RecordEntry
from .ptb_xl import is_packed, is_published, list_packed, list_published
from .table import is_table, list_table
from .wfdb_folder import list_wfdb_folder

__all__ = ["CORPORA", "RecordEntry", "are_related", "list_records"]


def list_records(folder: str | Path) -> list[RecordEntry]:
    """Return the records below `folder`, in a fixed order, without reading their signals.

    Args:
        folder: a table of your own (`*.csv`, `*.parquet`; see `table.list_table`), or a folder that is one of
            - PTB-XL as published: `ptbxl_database.csv` beside `records100/` or `records500/` (or a folder that holds
              a single sub-folder of this kind);
            - a data set of `training.build_dataset`, or one of its corpora (`data/ptb-xl`);
            - packed Parquet files, `fold-*.parquet` or `records.parquet`, leads as FLAC;
            - any folder of WFDB records (`*.hea`), searched through all its levels.

    Raises:
        FileNotFoundError: there is no such folder or table.
        ValueError: nothing in it is understood.
    """
    folder = Path(folder)
    if is_table(folder):
        return list_table(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {folder}: there is no such folder, and no such table (*.csv, *.parquet).")
    published = next((place for place in (folder, folder / "ptb-xl") if is_published(place)), None)
    if published is not None:
        return list_published(published)
    if is_built(folder):
        return list_built(folder)
    if is_packed(folder):
        return list_packed(folder)
    entries = list_wfdb_folder(folder)
    if not entries:
        raise ValueError(
            f"--data {folder}: no records found. Accepted: PTB-XL as published (ptbxl_database.csv), a data set of "
            "training.build_dataset, packed Parquet files (fold-*.parquet, records.parquet), or WFDB records (*.hea)."
        )
    return entries
