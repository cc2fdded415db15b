"""MATLAB files of CPSC-2018's own release: as scipy writes them, as published, and damaged or hostile ones."""

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat, savemat

from anyecg_hf import mat_reader
from anyecg_hf.leads import STANDARD_LEADS
from anyecg_hf.records import Record, Stated, read_record

SIGNAL = np.random.default_rng(0).normal(0, 0.5, (3, 1000))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("data", [SIGNAL[:1] * np.ones((12, 1)), np.arange(-600, 600).reshape(12, 100)])
def test_a_file_as_scipy_writes_it(tmp_path, compressed, data):
    savemat(tmp_path / "A0001.mat", {"ECG": {"sex": "Female", "age": 63, "data": data}}, do_compression=compressed)
    record = read_record(tmp_path / "A0001.mat")
    np.testing.assert_array_equal(record.signal, data.astype(np.float32))
    assert (record.age, record.sex, record.sampling_rate, record.lead_names) == (
        63,
        "female",
        500.0,
        list(STANDARD_LEADS),
    )
    assert record.file_format == "CPSC-2018 MAT"


@pytest.mark.parametrize("age,sex", [(np.nan, "NaN"), (-1.0, "x"), (np.zeros(0), ""), ("old", 3)])
def test_age_and_sex_may_be_unknown(tmp_path, age, sex):
    savemat(tmp_path / "a.mat", {"ECG": {"sex": sex, "age": age, "data": np.zeros((12, 10))}})
    record = read_record(tmp_path / "a.mat")
    assert (record.age, record.sex) == (None, None)


@pytest.mark.parametrize("name", ["A1980", "A1981", "A1982"])
def test_the_published_files_as_scipy_reads_them(real_ecg, name):
    path = real_ecg / "cpsc_2018_original" / f"{name}.mat"
    record, theirs = read_record(path), loadmat(path)["ECG"][0, 0]
    np.testing.assert_array_equal(record.signal, theirs["data"].astype(np.float32))
    assert (record.age, record.sex) == (theirs["age"].item(), theirs["sex"].item().lower())
    part = read_record(path, start_seconds=1, duration_seconds=2)
    np.testing.assert_array_equal(part.signal, record.signal[:, 500:1500])


@pytest.mark.parametrize(
    "content",
    [
        {"x": np.zeros((12, 10))},
        {"ECG": {"data": np.zeros((2, 10))}},
        {"ECG": {"data": "text"}},
        {"ECG": {"data": np.zeros((12, 10), complex)}},
        {"ECG": {"data": {"data": np.zeros((12, 10))}}},
        {"ECG": {"sex": "F"}},
        {},
    ],
)
def test_other_matlab_files_are_told_apart(tmp_path, content):
    savemat(tmp_path / "a.mat", content)
    with pytest.raises(ValueError, match=r"a\.mat: .*another content"):
        read_record(tmp_path / "a.mat")


def test_a_matlab_bomb_takes_no_memory_beyond_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(mat_reader, "LARGEST_DOCUMENT_BYTES", 1_000_000)
    savemat(tmp_path / "a.mat", {"ECG": {"data": np.zeros((12, 1_000_000))}}, do_compression=True)
    assert (tmp_path / "a.mat").stat().st_size < 200_000
    with pytest.raises(ValueError, match="larger than 1000000 bytes"):
        read_record(tmp_path / "a.mat")
    packed = (tmp_path / "a.mat").read_bytes()[136:]
    tracemalloc.start()
    with pytest.raises(ValueError):
        mat_reader._inflate(packed, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


# Damage


def outcome(path):
    """Read a file; return what is said. Anything but a sound record or a clear error fails the test."""
    try:
        record = mat_reader.read_cpsc_mat(path, Stated())
    except (ValueError, OSError) as error:
        assert isinstance(error, OSError) or type(error) is ValueError, repr(error)
        assert str(path) in str(error)
        return str(error)
    assert isinstance(record, Record) and record.signal.shape[0] == len(record.lead_names) == 12
    assert not np.isinf(record.signal).any()
    return repr(vars(record))


def sound(compressed):
    file = io.BytesIO()
    savemat(
        file, {"ECG": {"sex": "Male", "age": 50, "data": np.arange(60.0).reshape(12, 5)}}, do_compression=compressed
    )
    return file.getvalue()


SOUND = [sound(compressed) for compressed in (False, True)]


@pytest.mark.parametrize("data", SOUND)
def test_a_file_cut_anywhere_ends_clearly(tmp_path, data):
    for cut in range(0, len(data), 3):
        (tmp_path / "a.mat").write_bytes(data[:cut])
        outcome(tmp_path / "a.mat")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SOUND), st.integers(0, 2**32), st.integers(1, 6))
def test_random_damage_ends_clearly(tmp_path_factory, data, seed, edits):
    rng, damaged = random.Random(seed), bytearray(data)
    for _ in range(edits):
        at = rng.choice([rng.randrange(min(400, len(data))), rng.randrange(len(data))])
        damaged[at] = rng.choice([0, 1, 255, rng.randrange(256)])
    path = tmp_path_factory.getbasetemp() / "a.mat"
    path.write_bytes(damaged)
    outcome(path)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_random_damage_within_the_compressed_part_ends_clearly(tmp_path_factory, seed, edits):
    rng, inner = random.Random(seed), bytearray(zlib.decompress(SOUND[1][136:]))
    for _ in range(edits):
        inner[rng.randrange(len(inner))] = rng.choice([0, 1, 2, 4, 14, 15, 255, rng.randrange(256)])
    packed = zlib.compress(inner)
    path = tmp_path_factory.getbasetemp() / "a.mat"
    path.write_bytes(SOUND[1][:128] + struct.pack("<II", 15, len(packed)) + packed)
    outcome(path)
