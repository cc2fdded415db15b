"""Arrays in NumPy and HDF5 files: what the caller states, parts, and damaged or hostile files."""

import io
import random
import struct
import sys
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyecg_hf import array_reader
from anyecg_hf.leads import STANDARD_LEADS
from anyecg_hf.records import Record, Stated, read_record

NAMES = ["I", "II", "V1"]
STATED = {"sampling_rate": 500, "lead_names": NAMES, "units": "mV"}
SIGNAL = np.random.default_rng(0).normal(0, 0.5, (3, 1000))


def saved(path, array, **options):
    np.save(path, array, **options)
    return path


# NumPy


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", "<i2", ">i2", "i1", "<i4", "<i8", "u1", "<u2"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("transposed", [False, True])
def test_numbers_of_any_kind_and_layout(tmp_path, dtype, order, transposed):
    array = (np.abs(SIGNAL) * 50).astype(dtype)
    path = saved(tmp_path / "a.npy", np.asarray(array.T if transposed else array, order=order))
    record = read_record(path, **{**STATED, "units": "uV"})
    np.testing.assert_allclose(record.signal, array.astype(np.float64) / 1000, rtol=1e-6)
    assert (record.lead_names, record.sampling_rate, record.file_format) == (NAMES, 500.0, "NumPy")
    assert record.signal.dtype == np.float32 and not record.warnings


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions_of_the_header(tmp_path, version):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, SIGNAL, version=version)
    np.testing.assert_allclose(read_record(tmp_path / "a.npy", **STATED).signal, SIGNAL, rtol=1e-6)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_one_signal_of_an_npz_file(tmp_path, save):
    save(tmp_path / "a.npz", signal=SIGNAL.T, rate=500, labels=np.array(["AF"]), names=np.array(NAMES, dtype=object))
    np.testing.assert_allclose(read_record(tmp_path / "a.npz", **STATED).signal, SIGNAL, rtol=1e-6)


def test_an_npz_file_of_two_signals_is_an_error(tmp_path):
    np.savez(tmp_path / "a.npz", one=SIGNAL, two=SIGNAL)
    with pytest.raises(ValueError, match=r"2 of 2 arrays may be the signal \(shapes: \(3, 1000\), \(3, 1000\)\)"):
        read_record(tmp_path / "a.npz", **STATED)


def test_one_lead_may_have_one_axis(tmp_path):
    path = saved(tmp_path / "a.npy", SIGNAL[0])
    assert read_record(path, sampling_rate=500, lead_names=["II"], units="mV").signal.shape == (1, 1000)


def test_a_square_array_is_leads_by_samples(tmp_path):
    record = read_record(saved(tmp_path / "a.npy", SIGNAL[:, :3]), **STATED)
    np.testing.assert_allclose(record.signal, SIGNAL[:, :3], rtol=1e-6)


@pytest.mark.parametrize("missing", ["sampling_rate", "lead_names", "units"])
def test_what_the_file_does_not_say_has_to_be_stated(tmp_path, missing):
    with pytest.raises(ValueError, match=rf"does not say {missing}"):
        read_record(saved(tmp_path / "a.npy", SIGNAL), **{**STATED, missing: None})


@pytest.mark.parametrize(
    "array,message",
    [
        (SIGNAL[:2], r"shape \(2, 1000\) does not fit 3 lead names"),
        (SIGNAL[None], r"shape \(1, 3, 1000\)"),
        (SIGNAL[:, :0], r"shape \(3, 0\)"),
        (SIGNAL[0], r"shape \(1, 1000\)"),
        (SIGNAL.astype(complex), "no array of real numbers"),
        (SIGNAL > 0, "no array of real numbers"),
        (np.array([["a"]]), "no array of real numbers"),
        (np.array([[{}]], dtype=object), "no array of real numbers"),
        (np.zeros((3, 4), dtype=[("x", "f4")]), "table"),
    ],
)
def test_arrays_that_are_no_signal_are_refused(tmp_path, array, message):
    with pytest.raises(ValueError, match=rf"a\.npy: .*{message}"):
        read_record(saved(tmp_path / "a.npy", array), **STATED)


@pytest.mark.parametrize(
    "names,message", [(["I", "I", "II"], "more than once"), (["I", "lead I", "V1"], "more than once")]
)
def test_lead_names_are_told_apart(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        read_record(saved(tmp_path / "a.npy", SIGNAL), **{**STATED, "lead_names": names})


def test_infinite_values_are_no_values_and_said(tmp_path):
    array = SIGNAL.copy()
    array[0, :2], array[1, 5] = [np.inf, 1e300], np.nan
    record = read_record(saved(tmp_path / "a.npy", array), **STATED)
    assert np.argwhere(np.isnan(record.signal)).tolist() == [[0, 0], [0, 1], [1, 5]]
    assert len(record.warnings) == 1


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("layout", ["C", "F", "T"])
def test_a_part_is_the_same_as_that_part_of_the_whole(tmp_path, monkeypatch, suffix, layout):
    monkeypatch.setattr(array_reader, "_BLOCK_VALUES", 64)
    array = {"C": SIGNAL, "F": np.asfortranarray(SIGNAL), "T": np.ascontiguousarray(SIGNAL.T)}[layout]
    path = tmp_path / f"a.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez_compressed(path, array)
    for start, duration in ((0, None), (0.3, 1), (1.998, None), (1, 1e300)):
        part = read_record(path, **STATED, start_seconds=start, duration_seconds=duration)
        stop = None if duration is None else round(min(start + duration, 2) * 500)
        np.testing.assert_allclose(part.signal, SIGNAL[:, round(start * 500) : stop], rtol=1e-6)
    for start in (2, 1e308):
        with pytest.raises(ValueError, match="ends at 2 s"):
            read_record(path, **STATED, start_seconds=start)


def peak_memory(call, *args, **options):
    """Return the memory that a call takes at most, in bytes; errors are its good right."""
    tracemalloc.start()
    try:
        call(*args, **options)
    except ValueError:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_part_of_a_long_recording_is_read_without_loading_it(tmp_path):
    path = saved(tmp_path / "a.npy", np.zeros((3, 3_000_000), np.float32))  # 36 MB
    assert peak_memory(read_record, path, **STATED, start_seconds=5000, duration_seconds=10) < 3e6


def header(shape, descr="<f4", length=None):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) if length is None else length) + text


@pytest.mark.parametrize("shape", ["(3, 1000000000000)", "(3, 99999999999999999999999999)", "(3, 1001)", "(-3, -5)"])
def test_announced_sizes_are_not_believed(tmp_path, shape):
    (tmp_path / "a.npy").write_bytes(header(shape) + bytes(12000))
    with pytest.raises(ValueError, match=r"a\.npy: .*(announced|damaged)"):
        read_record(tmp_path / "a.npy", **STATED)
    assert peak_memory(read_record, tmp_path / "a.npy", **STATED) < 1e6


def test_zip_bombs_take_no_memory(tmp_path):
    zeros, path = bytes(1 << 20), tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as entry:
        entry.write(header(f"(3, {100 << 18})"))
        for _ in range(300):
            entry.write(zeros)
    assert path.stat().st_size < 1e6
    with pytest.raises(ValueError, match="too much for an ECG"):
        read_record(path, **STATED)
    data = path.read_bytes()
    lying = data.replace(struct.pack("<I", (300 << 20) + len(header("(3, 26214400)"))), struct.pack("<I", 4096))
    path.write_bytes(lying)
    assert peak_memory(read_record, path, **STATED) < 2e7


def test_zip_files_of_other_content_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("word/document.xml", "<a>Planted Patient</a>" * 20)
    with pytest.raises(ValueError, match=r"a\.zip: no header of NumPy's format"):
        read_record(tmp_path / "a.zip", **STATED)


# HDF5


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py", reason='HDF5 needs h5py: pip install "anyecg-hf[formats]"')


def code15(h5py, path, tracings, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("tracings", data=tracings, **options)
        file["exam_id"] = np.arange(len(tracings))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (1, 512, 12), "compression": "gzip", "shuffle": True, "fletcher32": True},
        {"chunks": True, "compression": "lzf"},
    ],
)
def test_one_of_the_records_of_a_file_like_code15(tmp_path, h5py, options):
    tracings = np.random.default_rng(1).normal(0, 0.3, (5, 4096, 12)).astype(np.float32)
    tracings[2, :648] = tracings[2, -600:] = 0
    path = code15(h5py, tmp_path / "a.hdf5", tracings, **options)
    names = ["DI", "DII", "DIII", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6"]
    stated = {"sampling_rate": 400, "lead_names": names, "units": "mV"}
    record = read_record(path, **stated, record_index=2)
    assert (record.lead_names, record.file_format) == (list(STANDARD_LEADS), "HDF5")
    np.testing.assert_array_equal(record.signal[:, 648:-600], tracings[2, 648:-600].T)
    assert np.isnan(record.signal[:, :648]).all() and np.isnan(record.signal[:, -600:]).all()
    assert "648 samples at the start and 600 at the end" in record.warnings[0]
    part = read_record(path, **stated, record_index=0, start_seconds=1, duration_seconds=2)
    np.testing.assert_array_equal(part.signal, tracings[0, 400:1200].T)
    for index in (None, 5, -1, True, "0"):
        with pytest.raises(ValueError, match="5 records"):
            read_record(path, **stated, record_index=index)


def test_a_file_like_sph(tmp_path, h5py):
    signal = np.random.default_rng(1).normal(0, 0.3, (12, 5000)).astype(np.float16)
    with h5py.File(tmp_path / "A00001.h5", "w") as file:
        file.create_dataset("ecg", data=signal, compression="gzip")
    stated = {"sampling_rate": 500, "lead_names": STANDARD_LEADS, "units": "mV"}
    record = read_record(tmp_path / "A00001.h5", **stated)
    np.testing.assert_array_equal(record.signal, signal.astype(np.float32))
    part = read_record(tmp_path / "A00001.h5", **stated, start_seconds=2, duration_seconds=1)
    np.testing.assert_array_equal(part.signal, record.signal[:, 1000:1500])
    with pytest.raises(ValueError, match="is one record"):
        read_record(tmp_path / "A00001.h5", **stated, record_index=0)


def test_other_files_of_hdf5_are_described(tmp_path, h5py):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["one/ecg"], file["two"], file["text"] = SIGNAL, SIGNAL, "x"
    with pytest.raises(ValueError, match=r"2 datasets .*shapes: \(3, 1000\), \(3, 1000\)\) among 4 objects"):
        read_record(tmp_path / "a.h5", **STATED)


def test_no_other_file_is_opened(tmp_path, h5py):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["ecg"] = SIGNAL
    SIGNAL.astype("<f8").tofile(tmp_path / "secret.bin")
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file["ecg"] = h5py.ExternalLink("secret.h5", "/ecg")
        file["soft"] = h5py.SoftLink("/nowhere")
    with h5py.File(tmp_path / "storage.h5", "w") as file:
        file.create_dataset("ecg", SIGNAL.shape, "<f8", external=[(str(tmp_path / "secret.bin"), 0, SIGNAL.nbytes)])
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        layout = h5py.VirtualLayout(SIGNAL.shape, "<f8")
        layout[:] = h5py.VirtualSource(tmp_path / "secret.h5", "ecg", SIGNAL.shape)
        file.create_virtual_dataset("ecg", layout)
    for name, message in (
        ("external", "links are not followed"),
        ("storage", "other files"),
        ("virtual", "other files"),
    ):
        with pytest.raises(ValueError, match=message):
            read_record(tmp_path / f"{name}.h5", **STATED)


def test_sizes_that_an_hdf5_file_announces_are_not_believed(tmp_path, h5py):
    with h5py.File(tmp_path / "empty.h5", "w") as file:
        file.create_dataset("ecg", (3, 10**12), "<f8", chunks=(3, 1000))
        file["ecg"][:, :1000] = SIGNAL
    with h5py.File(tmp_path / "chunk.h5", "w") as file:
        file.create_dataset("ecg", (3, 4 * 10**6), "<f8", chunks=(3, 4 * 10**6), compression="gzip")
        file["ecg"][:, :10] = 1
    for name in ("empty", "chunk"):
        with pytest.raises(ValueError, match=r"\.h5: "):
            read_record(tmp_path / f"{name}.h5", **STATED)


@pytest.mark.parametrize("filter_mask", [0, 1])
@pytest.mark.parametrize("num_more", [-1000, 50_000_000])
def test_a_piece_of_another_length_than_announced_is_refused(tmp_path, h5py, filter_mask, num_more):
    """Found by fuzzing: HDF5 took the end of a short piece from memory that it had not written, other values each time."""
    piece = SIGNAL.tobytes()[:num_more] if num_more < 0 else SIGNAL.tobytes() + bytes(num_more)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("ecg", SIGNAL.shape, "<f8", chunks=SIGNAL.shape, compression="gzip")
        dataset.id.write_direct_chunk((0, 0), piece if filter_mask else zlib.compress(piece), filter_mask)
    with pytest.raises(ValueError, match="a piece has, or unpacks to, more or less than its 24000 bytes"):
        read_record(tmp_path / "a.h5", **STATED)


def test_without_h5py_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(ImportError, match=r"pip install \"anyecg-hf\[formats\]\""):
        read_record(tmp_path / "a.h5", **STATED)


# Damage


def outcome(read, path, stated=None):
    """Read a file; return what is said. Anything but a sound record or a clear error fails the test."""
    stated = stated or Stated(500, tuple(NAMES), "mV")
    try:
        record = read(path, stated)
    except (ValueError, OSError) as error:
        assert isinstance(error, OSError) or type(error) in (ValueError, array_reader._Refused), repr(error)
        assert str(path) in str(error)
        return str(error)
    assert isinstance(record, Record) and 0 < record.sampling_rate < 1e7
    assert record.signal.ndim == 2 and len(record.signal) == len(record.lead_names) > 0
    assert not np.isinf(record.signal).any()
    return repr(vars(record))


def numpy_files():
    for save, options in ((np.save, {}), (np.savez, {"text": "x"}), (np.savez_compressed, {"text": "x"})):
        file = io.BytesIO()
        save(file, SIGNAL[:, :20].astype(np.float32), **options)
        yield "a.npy", array_reader.read_numpy, file.getvalue()


SOUND = list(numpy_files())


@pytest.mark.parametrize("name,read,data", SOUND)
def test_a_file_cut_anywhere_ends_clearly(tmp_path, name, read, data):
    for cut in range(0, len(data), 3):
        (tmp_path / name).write_bytes(data[:cut])
        outcome(read, tmp_path / name)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SOUND), st.integers(0, 2**32), st.integers(1, 6))
def test_random_damage_ends_clearly(tmp_path_factory, sound, seed, edits):
    (name, read, data), rng = sound, random.Random(seed)
    damaged = bytearray(data)
    for _ in range(edits):
        at = rng.choice([rng.randrange(min(400, len(data))), rng.randrange(len(data))])
        damaged[at] = rng.choice([0, 1, 255, *b"0123456789,()'{}", rng.randrange(256)])
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(damaged)
    outcome(read, path)


@pytest.fixture(scope="module")
def hdf5_files(tmp_path_factory):
    h5py = pytest.importorskip("h5py", reason='HDF5 needs h5py: pip install "anyecg-hf[formats]"')
    path, found = tmp_path_factory.mktemp("hdf5") / "a.h5", []
    for version in ("earliest", "latest"):
        for options in ({}, {"chunks": (1, 100, 3), "compression": "gzip", "shuffle": True, "fletcher32": True}):
            with h5py.File(path, "w", libver=version) as file:
                file.create_dataset("tracings", data=SIGNAL[:, :400].reshape(4, 100, 3), **options)
                file["exam_id"] = np.arange(4)
            found.append(path.read_bytes())
    return path, found


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.booleans())
def test_random_damage_to_hdf5_files_ends_clearly(hdf5_files, seed, edits, is_cut):
    (path, files), rng = hdf5_files, random.Random(seed)
    damaged = bytearray(rng.choice(files))
    for _ in range(edits):
        damaged[rng.randrange(len(damaged))] = rng.choice([0, 1, 255, rng.randrange(256)])
    path.write_bytes(damaged[: rng.randrange(len(damaged)) if is_cut else None])
    outcome(array_reader.read_hdf5, path, Stated(500, tuple(NAMES), "mV", rng.randrange(4)))
