"""training/archive.py: which records an archive holds, whatever lies in it, and what is said of one that cannot be read."""

import os

import fsspec
import numpy as np
import pytest
from published_files import steps, table_row, write_challenge, write_ptb_xl
from tiny_checkpoints import write_record

from anyecg_hf.records import read_record
from anyecg_hf.simulate import simulate_record
from training.archive import list_archive
from training.build_dataset import build_corpus


def listed(folder):
    return [(record.path, record.record_id) for record in list_archive(folder)[0]]


def test_each_file_is_a_record_and_the_files_of_a_wfdb_record_are_one(tmp_path):
    write_record(simulate_record(0), tmp_path, "b")
    (tmp_path / "b.atr").touch()
    write_challenge(tmp_path / "deep" / "er", "A0001")
    for name in ("a.edf", "alone.dat", "deep/x.xml", ".DS_Store", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert listed(tmp_path) == [
        ("a.edf", "a.edf"), ("alone.dat", "alone.dat"), ("b.hea", "b"), ("deep/er/A0001.hea", "deep/er/A0001"),
        ("deep/x.xml", "deep/x.xml"),
    ]  # fmt: skip


def test_ptb_xl_and_a_built_data_set_are_listed_by_their_tables(tmp_path):
    write_ptb_xl(tmp_path / "published", [table_row(3, 1), table_row(1, 9)])
    assert listed(tmp_path / "published") == [
        ("records100/00000/00001_lr.hea", "00001"), ("records100/00000/00003_lr.hea", "00003")
    ]  # fmt: skip
    build_corpus("ptb-xl", tmp_path / "published", tmp_path / "built")
    records, _ = list_archive(tmp_path / "built")
    assert [(record.path, record.record_id) for record in records] == [
        ("data/ptb-xl/train-00000-of-00001.parquet", "ptb-xl/00003"),
        ("data/ptb-xl/validation-00000-of-00001.parquet", "ptb-xl/00001"),
    ]
    expected = read_record(tmp_path / "published" / "records500" / "00000" / "00001_hr").signal
    np.testing.assert_array_equal(records[1].read().signal, expected)


def test_an_archive_in_an_object_store_is_listed_and_read(tmp_path):
    write_challenge(tmp_path, "A0001", samples=steps(1))
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path}/", "/archive-test/", recursive=True)
    try:
        (record,), _ = list_archive("memory://archive-test")
        np.testing.assert_array_equal(record.read().signal, read_record(tmp_path / "A0001").signal)
        store.pipe("/archive-test/A0001.mat", b"")
        with pytest.raises(ValueError, match="^A0001.hea, data file A0001.mat"):
            record.read()
    finally:
        store.rm("/archive-test", recursive=True)


def test_the_digest_follows_the_files_and_not_their_place(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
        (folder / "a.edf").write_bytes(b"1")
        os.utime(folder / "a.edf", (1000, 1000))
    first, second = (list_archive(folder)[1] for folder in folders)
    assert first == second
    os.utime(folders[0] / "a.edf", (1000, 1001))
    assert list_archive(folders[0])[1] != first


def test_what_is_no_file_is_a_record_that_cannot_be_read(tmp_path):
    (tmp_path / "link.edf").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / os.fsdecode(b"no-utf-\xff")).touch()
    said = {}
    for record in list_archive(tmp_path)[0]:
        with pytest.raises(ValueError) as caught:
            record.read()
        said[record.path] = str(caught.value)
    assert "link.edf: no such file" in said["link.edf"] and "pipe: not a regular file" in said["pipe"]
    assert len(said) == 3 and all(str(tmp_path) not in text and text.encode() for text in said.values())


def test_a_folder_that_cannot_be_opened_is_a_record_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.edf").touch()
    scandir = os.scandir

    def refuse(path="."):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # permissions do not bind root, as whom suites may run
    records, _ = list_archive(tmp_path)
    assert [record.path for record in records] == ["a.edf", "locked"]
    with pytest.raises(ValueError, match=r"^locked: folder not readable \(Permission denied\)"):
        records[1].read()


def test_an_archive_that_is_not_there_or_is_empty_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        list_archive(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--data .*: there are no files"):
        list_archive(tmp_path)
