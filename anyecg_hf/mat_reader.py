"""The MATLAB files of CPSC-2018's own release: `read_cpsc_mat(path, stated) -> Record`. Other MATLAB files are told apart.

Sources: MathWorks, "MAT-File Format", level 5; http://2018.icbeb.org/Challenge.html.
"""

import math
import struct
import zlib

import numpy as np

from .array_reader import in_millivolt
from .leads import STANDARD_LEADS
from .records import Record, parse_age, parse_sex, take_part
from .regular_files import LARGEST_DOCUMENT_BYTES, read_whole

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16"}
_MATRIX, _COMPRESSED = 14, 15
_STRUCT, _CHAR, _CLASSES_OF_NUMBERS = 2, 4, range(6, 16)
_MOST_PARTS = 64
_OTHER_MATLAB = "a MATLAB file of another content than CPSC-2018's. Save its signal with numpy.save and read that."


def read_cpsc_mat(path, stated):
    """Return the `Record` of a file of CPSC-2018's own release: a MATLAB struct of sex, age and data (12 x N, mV, 500 Hz).

    Raises:
        ValueError: the file is damaged, or a MATLAB file of another content.
    """
    fields = _read_struct(read_whole(path), path)
    data, num_leads = fields.get("data"), len(STANDARD_LEADS)
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[0] != num_leads or data.shape[1] == 0:
        raise ValueError(f"{path}: no field 'data' of {num_leads} rows; {_OTHER_MATLAB}")
    signal, warnings = in_millivolt(data, 1.0)
    age, sex = fields.get("age"), fields.get("sex")
    age = age.flat[0] if isinstance(age, np.ndarray) and age.size == 1 else None
    record = Record(signal, 500.0, list(STANDARD_LEADS), age=parse_age(age), sex=parse_sex(sex), warnings=warnings)
    return take_part(record, stated)


def _read_struct(data, path):
    """Return the fields of the first struct of a MAT 5 file that has a field `data`: arrays and strings by name."""
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if data[:10] != b"MATLAB 5.0" or order is None:
        raise ValueError(f"{path}: no MAT 5 header of 128 bytes; {_OTHER_MATLAB}")
    for kind, body in _parts(memoryview(data)[128:], order, path):
        if kind == _COMPRESSED:
            body = _inflate(body, path)
            kind, body = next(_parts(memoryview(body), order, path), (None, b""))
        fields = _read_matrix(body, order, path, with_fields=True) if kind == _MATRIX else None
        if isinstance(fields, dict) and "data" in fields:
            return fields
    raise ValueError(f"{path}: no struct with a field 'data'; {_OTHER_MATLAB}")


def _inflate(data, path):
    try:
        unpacker = zlib.decompressobj()
        unpacked = unpacker.decompress(data, LARGEST_DOCUMENT_BYTES)
    except zlib.error:
        raise ValueError(f"{path}: the compressed part of the MAT 5 file is damaged.") from None
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise ValueError(f"{path}: the compressed part is cut, or larger than {LARGEST_DOCUMENT_BYTES} bytes.")
    return unpacked


def _parts(data, order, path):
    """Yield `(type, bytes)` of the elements that follow one another in `data` (memoryview); the first 64 at most."""
    position = 0
    for _ in range(_MOST_PARTS):
        if position + 8 > len(data):
            return
        kind, size = struct.unpack_from(order + "II", data, position)
        begin = position + 8
        if kind >> 16:  # small: the size shares a word with the type, the next word is the data
            kind, size, begin = kind & 0xFFFF, kind >> 16, position + 4
        if begin + size > len(data):
            raise ValueError(
                f"{path}: an element of {size} bytes in the MAT 5 file, {len(data) - begin} are there; cut?"
            )
        yield kind, data[begin : begin + size]
        position = begin + size
        if kind != _COMPRESSED:
            position += -position % 8


def _read_matrix(body, order, path, *, with_fields=False):
    """Return what a matrix element holds: an array, a string, a dict of a struct's fields, None for all else."""
    parts = list(_parts(body, order, path))
    if len(parts) < 4 or len(parts[0][1]) < 4 or len(parts[1][1]) % 4:
        return None
    flags = struct.unpack_from(order + "I", parts[0][1])[0]
    shape = np.frombuffer(parts[1][1], order + "i4").tolist()
    kind, values = parts[3]
    if flags & 0xFF == _STRUCT and with_fields and math.prod(shape) == 1 and len(parts) > 5:
        length = int.from_bytes(values[:4], "little" if order == "<" else "big")
        names = bytes(parts[4][1])
        names = [names[at : at + length].split(b"\0")[0].decode("latin-1") for at in range(0, len(names), length or 1)]
        return {name: _read_matrix(part[1], order, path) for name, part in zip(names, parts[5:])}
    if flags & 0xFF == _CHAR and kind in _TEXTS:
        codec = _TEXTS[kind] + ({"<": "-le", ">": "-be"}[order] if _TEXTS[kind] == "utf-16" else "")
        return bytes(values).decode(codec, errors="replace")
    if flags & 0xFF in _CLASSES_OF_NUMBERS and not flags & 0x0800 and kind in _NUMBERS:
        dtype = np.dtype(order + _NUMBERS[kind])
        if min(shape, default=-1) >= 0 and math.prod(shape) * dtype.itemsize == len(values):
            return np.frombuffer(values, dtype).reshape(shape, order="F")
    return None
