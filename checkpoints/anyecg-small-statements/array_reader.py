"""Arrays in NumPy and HDF5 files, whose meaning the caller states: `read_numpy`, `read_hdf5`.

Sources: numpy.lib.format (NPY 1.0 to 3.0); HDF5 through h5py, as in CODE-15 (doi:10.5281/zenodo.4916206) and SPH
(doi:10.6084/m9.figshare.c.5779802).
"""

import contextlib
import itertools
import math
import os
import re
import struct
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from .record_fields import standard_or_own_name
from .records import Record, part_to_read
from .regular_files import LARGEST_DOCUMENT_BYTES, open_regular, require_regular_file
from .signal_ops import check_sampling_rate, unit_to_mv

_BLOCK_VALUES = 1 << 20  # converted at a time
_LONGEST_NPY_HEADER = 10_000  # bytes, as numpy's own limit
_DESCR = re.compile(r"""['"]descr['"]\s?:\s?['"]([<>|=]?)([a-zA-Z])([0-9]{0,4})['"]""")
_ORDER = re.compile(r"""['"]fortran_order['"]\s?:\s?(True|False)""")
_SHAPE = re.compile(r"""['"]shape['"]\s?:\s?\(([0-9, ]{0,200})\)""")
_ITEM_SIZES = {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8)}
_LARGEST_RATIO = 20  # of what is unpacked to the size of the file: an ECG is compressed to a third, not to a thousandth
_MOST_OBJECTS = 200  # looked at in an HDF5 file
_MOST_CHUNKS = 50_000  # that one record is spread over in an HDF5 file
_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF = 1, 2, 3, 32000  # filters of HDF5
_FILTERS = ([], [_SHUFFLE], [_DEFLATE], [_SHUFFLE, _DEFLATE], [_LZF], [_SHUFFLE, _LZF])
_SHORTEST_PADDING_SECONDS = 0.1


class _Refused(ValueError):
    """What this module says itself about a file, as against what a library says."""


def read_numpy(path, stated):
    """Return the `Record` of a `.npy` file, or of a `.npz` file that holds one two-dimensional array.

    `sampling_rate`, `lead_names` and `units` have to be stated. The array is `(leads, samples)`, or `(samples, leads)`:
    the number of lead names decides (`(leads, samples)` if both fit); one-dimensional for one lead. Integers are taken as
    numbers of the stated unit. Of a long recording only the part asked for is loaded.

    Raises:
        ValueError: something is not stated, the array is not of real numbers or fits no lead names, the file is damaged.
    """
    names, rate, factor = _stated_meaning(path, stated)
    with open_regular(path) as file:
        size, is_zip = os.fstat(file.fileno()).st_size, file.read(4) == b"PK\x03\x04"
        stream = _Stream(file, path)
        stream, array = _find_in_npz(file, size, path) if is_zip else (stream, _read_npy_header(stream, size, path))
        if array.dtype is None:
            raise ValueError(f"{path}: no array of real numbers of up to 8 bytes each.")
        leads_first = _leads_first(array.shape, names, path)
        start, stop = part_to_read(stated, rate, math.prod(array.shape) // len(names))
        signal, warnings = np.empty((len(names), stop - start), np.float32), list(array.warnings)
        for place, values in _stored_blocks(stream, array, leads_first, signal.shape, start):
            _to_float32(values, factor, signal[place], warnings)
    return Record(signal, rate, names, warnings=warnings)


def read_hdf5(path, stated):
    """Return the `Record` of an HDF5 file with one numeric dataset of two or three dimensions.

    `sampling_rate`, `lead_names` and `units` have to be stated: CODE-15 (`tracings`) is 400 Hz, mV, leads DI, DII, DIII,
    AVR, AVL, AVF, V1 to V6; SPH (`ecg`) 500 Hz, mV, the 12 leads in standard order. Three dimensions are several records,
    `record_index` says which; such records are filled up with zeros to one length, and those zeros become NaN.

    Raises:
        ValueError: something is not stated, there is no such dataset or more than one, it lies in other files or does
            not fit the lead names, the file is damaged.
        ImportError: h5py is missing.
    """
    names, rate, factor = _stated_meaning(path, stated)
    try:
        import h5py
    except ImportError:
        raise ImportError(f'{path}: reading HDF5 needs h5py: pip install "anyecg-hf[formats]"') from None
    require_regular_file(path)
    with contextlib.ExitStack() as stack:
        with _foreign(path, "HDF5 file"):
            dataset = _find_dataset(h5py, stack.enter_context(h5py.File(path, "r", locking=False)), path)
            shape = dataset.shape
        record = _record_selection(shape, stated.record_index, path)
        leads_first = _leads_first(shape[-2:], names, path)
        start, stop = part_to_read(stated, rate, shape[-1 if leads_first else -2])
        samples = slice(None) if record else slice(start, stop)  # one of several records: whole, to see its padding
        with _foreign(path, "HDF5 file"):
            values = _read_values(
                dataset, record + ((slice(None), samples) if leads_first else (samples, slice(None))), path
            )
    signal, warnings = in_millivolt(values if leads_first else values.T, factor)
    if record:
        _blank_padding(signal, rate, warnings)
        signal = np.ascontiguousarray(signal[:, start:stop])
    return Record(signal, rate, names, warnings=warnings)


# What the caller states


def _stated_meaning(path, stated):
    """Return lead names, rate and factor to mV of a file that says none of it."""
    lacking = [name for name in ("sampling_rate", "lead_names", "units") if not getattr(stated, name)]
    if lacking:
        raise ValueError(
            f"{path}: this format does not say {', '.join(lacking)}; pass it, for instance "
            "read_record(path, sampling_rate=500, lead_names=['I', 'II'], units='mV')."
        )
    names = [standard_or_own_name(name) for name in stated.lead_names]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"{path}: lead_names holds {', '.join(sorted(repeated))} more than once.")
    return names, check_sampling_rate(stated.sampling_rate, path), unit_to_mv(stated.units, path)


def _leads_first(shape, names, path):
    """Return whether the first axis of an array is that of the leads."""
    if len(shape) == 1:
        shape = (1, *shape)
    if len(shape) == 2 and math.prod(shape) and len(names) in shape:
        return shape[0] == len(names)
    raise ValueError(
        f"{path}: an array of shape {shape} does not fit {len(names)} lead names; (leads, samples) and (samples, leads) are read."
    )


def in_millivolt(values, factor):
    """Return numbers `(leads, samples)` in millivolt, float32, and warnings."""
    signal, warnings = np.empty(values.shape, np.float32), []
    for row, out in zip(values, signal):
        _to_float32(row, factor, out, warnings)
    return signal, warnings


def _to_float32(values, factor, out, warnings):
    """Write numbers to `out` in millivolt; what is infinite or too large for float32 becomes NaN, and `warnings` says so."""
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = values.astype(np.float64) * factor
    if np.isinf(out).any():
        out[np.isinf(out)] = np.nan
        note = "infinite values, or such as float32 cannot hold, are NaN."
        if note not in warnings:
            warnings.append(note)


@contextlib.contextmanager
def _foreign(path, what):
    """Say in our own words that a library failed on a damaged file; libraries raise anything on those."""
    try:
        yield
    except _Refused:
        raise
    except Exception as error:
        raise _Refused(f"{path}: damaged {what} ({type(error).__name__}).") from None


# NumPy


class _Array(NamedTuple):
    dtype: np.dtype | None  # None: not of real numbers
    shape: tuple
    fortran_order: bool
    first_byte: int
    warnings: list


class _Stream:
    """Bytes of a file, or of an entry of a zip file, read at increasing positions."""

    def __init__(self, file, path):
        self.file, self.path = file, path

    def read_at(self, position, num_bytes):
        """Return exactly `num_bytes` bytes."""
        with _foreign(self.path, "file"):
            self.file.seek(position)
            data = self.file.read(num_bytes)
        if len(data) < num_bytes:
            raise _Refused(f"{self.path}: ends early, {len(data)} of {num_bytes} bytes at position {position}.")
        return data


def _read_npy_header(stream, size, path):
    """Return what the header of a `.npy` stream of `size` bytes says."""
    start = stream.read_at(0, 10)
    if start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
        raise _Refused(f"{path}: no header of NumPy's format, version 1 to 3.")
    length_form = "<H" if start[6] == 1 else "<I"
    text_position = 8 + struct.calcsize(length_form)
    (length,) = struct.unpack(length_form, stream.read_at(8, text_position - 8))
    if length > _LONGEST_NPY_HEADER:
        raise _Refused(f"{path}: a NumPy header of {length} bytes; up to {_LONGEST_NPY_HEADER} are read.")
    text = stream.read_at(text_position, length).decode("latin-1")
    descr, order, shape = _DESCR.search(text), _ORDER.search(text), _SHAPE.search(text)
    if not (descr and order and shape):
        raise _Refused(f"{path}: the NumPy header is damaged, or describes a table; arrays of numbers are read.")
    kind, item_size = descr[2], int(descr[3] or 0)
    shape = tuple(int(length) for length in shape[1].replace(" ", "").split(",") if length)
    warnings, there = [], size - text_position - length
    if math.prod(shape) * item_size > there:
        raise _Refused(f"{path}: an array of {math.prod(shape) * item_size} bytes announced, {there} are there.")
    if math.prod(shape) * item_size < there:
        warnings.append(f"{there - math.prod(shape) * item_size} bytes after the array ignored.")
    is_numeric = item_size in _ITEM_SIZES.get(kind, ())
    dtype = np.dtype(f"{descr[1].replace('|', '=')}{kind}{item_size}") if is_numeric else None
    return _Array(dtype, shape, order[1] == "True", text_position + length, warnings)


def _find_in_npz(file, size, path):
    """Return the stream of the one array of numbers that can be a signal in a `.npz` file, and what its header says."""
    with _foreign(path, "zip file"):
        archive = zipfile.ZipFile(file)
    entries, arrays = archive.infolist(), {}
    if len(entries) > _MOST_OBJECTS:
        raise _Refused(f"{path}: a zip file of {len(entries)} entries; one array is read.")
    for number, info in enumerate(entries):
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise _Refused(
                f"{path}: entry {number + 1} is encrypted, or compressed in a way that numpy.savez does not use."
            )
        if info.file_size > max(_LARGEST_RATIO * size, LARGEST_DOCUMENT_BYTES):
            raise _Refused(
                f"{path}: entry {number + 1} is {info.file_size} bytes of {size} bytes; too much for an ECG."
            )
        with _foreign(path, "zip file"):
            stream = _Stream(archive.open(info), path)
        arrays[number] = stream, _read_npy_header(stream, info.file_size, path)
    numeric = [found for found in arrays.values() if found[1].dtype is not None and len(found[1].shape) in (1, 2)]
    chosen = [found for found in numeric if len(found[1].shape) == 2] or numeric
    if len(chosen) != 1:
        shapes = ", ".join(str(array.shape) for _, array in chosen[:10])  # no names: one may be the patient's
        raise _Refused(
            f"{path}: {len(chosen)} of {len(entries)} arrays may be the signal (shapes: {shapes or 'none'}). Save one: "
            "numpy.save(file, signal)."
        )
    return chosen[0]


def _stored_blocks(stream, array, leads_first, shape, start):
    """Yield `(place in the signal, numbers)` from sample `start` on, a few megabytes at a time."""
    num_leads, num_wanted = shape
    stride = math.prod(array.shape) // num_leads
    leads_outside = leads_first != array.fortran_order  # one lead after the other in the file
    step = _BLOCK_VALUES if leads_outside else max(_BLOCK_VALUES // num_leads, 1)
    for lead in range(num_leads) if leads_outside else (None,):
        for first in range(0, num_wanted, step):
            wanted = min(step, num_wanted - first)
            begin = lead * stride + start + first if leads_outside else (start + first) * num_leads
            count = wanted if leads_outside else wanted * num_leads
            size = array.dtype.itemsize
            values = np.frombuffer(stream.read_at(array.first_byte + begin * size, count * size), array.dtype)
            samples = slice(first, first + wanted)
            yield (
                ((lead, samples), values)
                if leads_outside
                else ((slice(None), samples), values.reshape(-1, num_leads).T)
            )


# HDF5


def _find_dataset(h5py, file, path):
    """Return the only dataset of numbers with two or three axes; links are not followed, other files not opened."""
    found, num_objects, groups = [], 0, [file]
    while groups:
        group = groups.pop()
        for name in itertools.islice(group, _MOST_OBJECTS + 1):
            num_objects += 1
            if num_objects > _MOST_OBJECTS:
                raise _Refused(f"{path}: more than {_MOST_OBJECTS} objects; one dataset is read.")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            kind = group.get(name, getclass=True)
            if kind is h5py.Group:
                groups.append(group[name])
            elif kind is h5py.Dataset and (dataset := _open_dataset(h5py, group, name, path)) is not None:
                found.append(dataset)
    if len(found) != 1:
        shapes = ", ".join(str(dataset.shape) for dataset in found[:10])  # no names: one may be the patient's
        raise _Refused(
            f"{path}: {len(found)} datasets of numbers with two or three axes (shapes: {shapes or 'none'}) among "
            f"{num_objects} objects; one is read, links are not followed. Copy the one to read into a file of its own."
        )
    return found[0]


def _open_dataset(h5py, group, name, path):
    """Return a dataset if it is of numbers with two or three axes, else None."""
    identifier = h5py.h5d.open(group.id, name.encode("utf-8", "surrogateescape"))
    plan = identifier.get_create_plist()
    if plan.get_layout() == h5py.h5d.VIRTUAL or plan.get_external_count():
        raise _Refused(
            f"{path}: a dataset that lies in other files, which are not opened. Copy the data into one file."
        )
    dtype = identifier.dtype
    if dtype.kind not in _ITEM_SIZES or dtype.itemsize > 8 or len(identifier.shape) not in (2, 3):
        return None
    return h5py.Dataset(identifier)


def _record_selection(shape, index, path):
    """Return the index of the record asked for as a tuple, empty for a dataset of one record."""
    if len(shape) == 2 and index is None:
        return ()
    if len(shape) == 2:
        raise _Refused(
            f"{path}: record_index is {index!r}, but the dataset of shape {shape} is one record. Leave it out."
        )
    if index is None and shape[0] == 1:
        return (0,)
    if not isinstance(index, (int, np.integer)) or isinstance(index, bool) or not 0 <= index < shape[0]:
        raise _Refused(f"{path}: {shape[0]} records, and record_index is {index!r}; pass one from 0 to {shape[0] - 1}.")
    return (int(index),)


def _read_values(dataset, selection, path):
    """Return the numbers of a selection of a dataset.

    Refused are data that take far more memory than the file, in filters that are not known, or in too many pieces.
    Source: HDF5 File Format Specification 3.0, IV.A.2.l (filters). The library unpacks a chunk of deflate however long
    it becomes; so it is unpacked here first, up to its announced length.
    """
    largest = max(_LARGEST_RATIO * os.path.getsize(path), LARGEST_DOCUMENT_BYTES)
    ranges = [
        range(length)[part] if isinstance(part, slice) else range(part, part + 1)
        for part, length in zip(selection, dataset.shape)
    ]
    if math.prod(map(len, ranges)) * dataset.dtype.itemsize > largest or not dataset.id.get_storage_size():
        raise _Refused(f"{path}: a record of shape {dataset.shape[-2:]} announced, and not so much data stored.")
    if dataset.chunks is not None:
        _check_chunks(dataset, ranges, largest, path)
    return dataset[selection]


def _check_chunks(dataset, ranges, largest, path):
    plan = dataset.id.get_create_plist()
    filters = [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]
    if (filters[:-1] if filters[-1:] == [_FLETCHER32] else filters) not in _FILTERS:
        raise _Refused(f"{path}: stored with filters {filters}; gzip, lzf, shuffle and fletcher32 are read.")
    num_bytes = math.prod(dataset.chunks) * dataset.dtype.itemsize
    corners = [range(part[0] // size * size, part[-1] + 1, size) for part, size in zip(ranges, dataset.chunks)]
    if num_bytes > largest or math.prod(map(len, corners)) > _MOST_CHUNKS:
        raise _Refused(f"{path}: stored in pieces of {num_bytes} bytes; too large, or too many for one record.")
    for corner in itertools.product(*corners):
        _check_chunk(dataset, corner, filters, num_bytes, path)


def _check_chunk(dataset, corner, filters, num_bytes, path):
    """Refuse a piece that is not as long as it has to be: of a short one, the library takes the rest from anywhere."""
    stored = dataset.id.get_chunk_info_by_coord(corner)
    applied = [name for number, name in enumerate(filters) if not stored.filter_mask >> number & 1]
    if stored.byte_offset is None or _LZF in applied:
        return
    if stored.size > os.path.getsize(path):
        raise _Refused(f"{path}: a piece of {stored.size} bytes announced, more than the file has.")
    num_found = stored.size - 4 * (_FLETCHER32 in applied)
    if _DEFLATE in applied:
        data = dataset.id.read_direct_chunk(corner)[1]
        num_found = len(zlib.decompressobj().decompress(data, num_bytes + 1))
    if num_found != num_bytes:
        raise _Refused(f"{path}: a piece has, or unpacks to, more or less than its {num_bytes} bytes; damaged.")


def _blank_padding(signal, rate, warnings):
    """Set zeros in all leads at the start and the end of a record to NaN."""
    is_value = signal.any(axis=0)
    first, last = int(is_value.argmax()), int(is_value[::-1].argmax())
    num_before, num_after = (n if n >= _SHORTEST_PADDING_SECONDS * rate else 0 for n in (first, last))
    if is_value.any() and num_before + num_after:
        signal[:, :num_before] = np.nan
        signal[:, signal.shape[1] - num_after :] = np.nan
        warnings.append(
            f"{num_before} samples at the start and {num_after} at the end are 0 in all leads: taken as no value."
        )
