"""training/corpora/table.py: a table of files and labels is a corpus like any other."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_checkpoints import write_record

from anyecg_hf.simulate import simulate_record
from training.corpora import list_records
from training.record_store import source_fingerprint


def _table(folder, text, name="mine.csv"):
    (folder / name).write_text(text)
    return folder / name


def test_a_row_has_file_labels_patient_age_sex_and_fold(tmp_path):
    entries = list_records(
        _table(tmp_path, "path,label,patient,age,sex,fold\nsub/a,AFIB; PVC,p1,61.5,F,10\nb.edf,,p2,300,male,\n")
    )
    first, second = entries
    assert first.payload == str(tmp_path / "sub" / "a") and first.record_id == "sub/a"
    assert (first.codes, first.patient_id, first.fold, first.age, first.sex) == (
        ("AFIB", "PVC"),
        "p1",
        10,
        61.5,
        "female",
    )
    assert second.codes == () and second.age == 90 and second.sex == "male" and second.fold in range(1, 11)


def test_parquet_may_hold_a_list_of_labels_and_says_the_same(tmp_path):
    rows = [{"path": "a", "label": ["x", "y"], "age": 50.0}, {"path": "b", "label": [], "age": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")
    csv_entries = list_records(_table(tmp_path, "path,label,age\na,x;y,50\nb,,\n"))
    assert list_records(tmp_path / "mine.parquet") == csv_entries


def test_all_records_of_a_patient_share_a_fold_and_two_patients_are_enough(tmp_path):
    rows = "".join(f"r{index},x,p{index % 3}\n" for index in range(12))
    entries = list_records(_table(tmp_path, f"path,label,patient\n{rows}"))
    assert all(
        len({each.fold for each in entries if each.patient_id == patient}) == 1 for patient in ("p0", "p1", "p2")
    )
    assert {each.fold for each in entries} & {9} and {each.fold for each in entries} & set(range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,x\n", r"columns file, label; needed are path and label"),
        ("path,label\n", "0 rows"),
        ("path,label\na,x\na,y\n", r"'a' is in several rows; give all labels .* A;B"),
        ("path,label,sex\na,x,other\n", r"row 1 \('a'\): sex 'other': accepted are male"),
        ("path,label,age\na,x,\nb,x,old\n", r"row 2 \('b'\): age 'old' is no number"),
        ("path,label,fold\na,x,11\n", r"fold '11': accepted are 1-8"),
    ],
)
def test_what_is_not_understood_is_named_with_its_row(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        list_records(_table(tmp_path, text))


def test_the_file_of_an_entry_is_read_and_its_change_or_that_of_the_table_is_noticed(tmp_path):
    record = simulate_record(seed=1, duration_seconds=2, sampling_rate=100)
    write_record(record, tmp_path, "a")
    table = _table(tmp_path, "path,label\na.hea,x\n")
    np.testing.assert_allclose(list_records(table)[0].read().signal, record.signal, atol=0.01)
    before = source_fingerprint(table)
    assert source_fingerprint(table) == before
    os.utime(tmp_path / "a.dat", (1, 1))
    changed = source_fingerprint(table)
    assert changed != before
    _table(tmp_path, "path,label\na.hea,y\n")
    assert source_fingerprint(table) != changed
