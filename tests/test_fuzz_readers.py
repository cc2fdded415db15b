"""The fuzzer's rule: each kind of fault is seen in a reader that has it, and a sound or clearly refused file is none."""

import os
import re
import sys

import numpy as np
import pytest
from wfdb_files import annotation_words, write_record

from anyecg_hf.records import Annotation, Record

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")
if sys.platform == "linux":
    from benchmarks import fuzz_readers


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A target of EDF whose reader is replaced by the tests; made once, for its audit hook stays."""
    return fuzz_readers.Target(
        fuzz_readers.FAMILIES["edf"], tmp_path_factory.mktemp("read"), tmp_path_factory.mktemp("f")
    )


def sound(**changes):
    fields = {"signal": np.zeros((2, 9), np.float32), "sampling_rate": 500.0, "lead_names": ["I", "II"], **changes}
    return Record(**fields)


SHORT = sound(signal=np.zeros((2, 3), np.float32))  # has no part that would be read


def ends(target, monkeypatch, reader, data=b"x"):
    monkeypatch.setattr(target.records, "read_record", reader)
    return target(data)


def never_ends(path, **part):
    while True:
        pass


def crash(error):
    raise error


@pytest.mark.parametrize(
    "reader, fault",
    [
        (lambda path, **part: crash(KeyError("x")), "KeyError"),
        (lambda path, **part: int("x"), "ValueError"),
        (lambda path, **part: np.zeros(3).reshape(2, 2), "ValueError"),
        (lambda path, **part: crash(ValueError(f"{path}: raised outside of anyecg_hf")), "ValueError"),
        (lambda path, **part: crash(MemoryError()), "MemoryError"),
        (lambda path, **part: crash(SystemExit()), "SystemExit"),
        (lambda path, **part: sound(signal=np.full((2, 9), np.inf, np.float32)), "infinite"),
        (lambda path, **part: sound(signal=np.zeros((2, 9))), "float32"),
        (lambda path, **part: sound(lead_names=["I"]), "names"),
        (lambda path, **part: sound(sampling_rate=0.0), "rate"),
        (lambda path, **part: sound(sampling_rate=1e7), "rate"),
        (lambda path, **part: sound(annotations=[Annotation(5, "N"), Annotation(3, "N")]), "marks"),
        (lambda path, **part: sound(comments=["\udc80"]), "text"),
        (lambda path, **part: sound(), "a part differs"),
        (lambda path, **part: np.ones(40_000_000) is None or SHORT, "memory"),
        (lambda path, **part: open(os.devnull).close(), "open /dev/null"),
        (lambda path, **part: open(path, "r+").close(), "open .*r.edf"),
        (lambda path, **part: path.with_name("new").mkdir(), "os.mkdir"),
        (lambda path, **part: os.system("true") or SHORT, "os.system"),
    ],
)
def test_each_kind_of_fault_is_seen(target, monkeypatch, reader, fault):
    assert re.search(fault, ends(target, monkeypatch, reader) or "none")


def test_a_run_that_takes_too_long_is_ended(target, monkeypatch):
    monkeypatch.setattr(fuzz_readers, "SECONDS", 0.2)
    assert "more than" in ends(target, monkeypatch, never_ends)


def test_clear_errors_and_those_of_the_system_are_no_fault(target):
    assert target(b"0       no EDF") is None
    assert target.unclear(FileNotFoundError(2, "no such file")) is None


def test_a_record_of_several_files_is_read_whole_and_in_part(tmp_path):
    path = write_record(tmp_path, [list(range(30)), list(range(30))])
    path.with_suffix(".atr").write_bytes(annotation_words((1, 10), (0, 0)))
    family = fuzz_readers.FAMILIES["wfdb"]
    (content,) = fuzz_readers.inputs_in(tmp_path, family)
    (tmp_path / "new").mkdir()
    target = fuzz_readers.Target(family, tmp_path / "new", tmp_path)
    assert target(content) is None and target(content.replace(b"r 2", b"x 3")) is None
    assert sorted(os.listdir(tmp_path / "new")) == ["r.dat", "r.hea"]
    assert target.records.read_record(target.write(content)).signal.shape == (2, 30)
