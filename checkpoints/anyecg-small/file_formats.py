"""Which format a file has, told from its content, and the reader for each: `find_file(path)`, `READERS`."""

import os
import re
from typing import NamedTuple

from .aecg_reader import read_aecg
from .array_reader import read_hdf5, read_numpy
from .csv_reader import looks_like_a_table, read_csv
from .dicom_reader import read_dicom
from .edf_reader import read_edf
from .ishne_reader import read_ishne
from .mat_reader import read_cpsc_mat
from .muse_reader import read_cardiosoft, read_muse
from .regular_files import read_start
from .scp_reader import read_scp
from .sierra_reader import read_sierra
from .wfdb_reader import read_wfdb

_START_BYTES = 8192
_ROOT = re.compile(r"<(?![?!])(?:[\w.-]+:)?([\w.-]+)")  # the first element of an XML document
_ROOTS = {
    "AnnotatedECG": "HL7 aECG",
    "restingecgdata": "Philips Sierra XML",
    "RestingECG": "GE MUSE XML",
    "CardiologyXML": "GE CardioSoft XML",
}
_WFDB_DATA_SUFFIXES = {".dat", ".mat"}  # of a path that names the data file of a WFDB record


class Reader(NamedTuple):
    """How a format is read: `read(path, stated) -> Record`, and what the caller may state because the file need not."""

    read: callable
    stated: frozenset = frozenset()


_WHAT_ARRAYS_LACK = frozenset({"sampling_rate", "lead_names", "units"})
READERS = {
    "WFDB": Reader(read_wfdb),
    "CPSC-2018 MAT": Reader(read_cpsc_mat),
    "EDF": Reader(read_edf, frozenset({"units"})),
    "DICOM": Reader(read_dicom),
    "HL7 aECG": Reader(read_aecg),
    "Philips Sierra XML": Reader(read_sierra),
    "GE MUSE XML": Reader(read_muse),
    "GE CardioSoft XML": Reader(read_cardiosoft),
    "SCP-ECG": Reader(read_scp),
    "ISHNE": Reader(read_ishne),
    "CSV": Reader(read_csv, _WHAT_ARRAYS_LACK),
    "NumPy": Reader(read_numpy, _WHAT_ARRAYS_LACK),
    "HDF5": Reader(read_hdf5, _WHAT_ARRAYS_LACK | {"record_index"}),
}


def find_file(path):
    """Return `(file, format)` for a path: the file that the record begins with, and a key of `READERS`.

    Raises:
        ValueError: the format is not known.
        OSError: there is no such regular file.
    """
    if not path.name:
        raise FileNotFoundError(f"{path}: no file name.")
    header = _wfdb_header(path)
    exists = os.path.exists(path)
    if not exists and header is not None:
        return header, "WFDB"
    if not exists:
        raise FileNotFoundError(f"{path}: no such file, and no WFDB header {path.name}.hea either.")
    file_format = _recognise(read_start(path, _START_BYTES))
    if path.suffix == ".hea" and file_format in (None, "CSV"):
        return path, "WFDB"
    if header is not None and file_format in (None, "CSV", "CPSC-2018 MAT"):
        return header, "WFDB"
    if file_format is None:
        raise ValueError(
            f"{path}: not recognised by its content, and there is no WFDB header beside it. Read are: {', '.join(READERS)}."
        )
    return path, file_format


def _wfdb_header(path):
    """Return the header file of the WFDB record that `path` may name, or None."""
    candidates = [path.with_name(path.name + ".hea")]
    if path.suffix in _WFDB_DATA_SUFFIXES:
        candidates.append(path.with_suffix(".hea"))
    return next(filter(os.path.exists, candidates), None)  # pathlib's raises where the suffix makes a name too long


def _recognise(start):
    """Return the format of a file that begins with `start` (bytes), or None."""
    if start[128:132] == b"DICM":
        return "DICOM"
    if start[:8] in (b"0       ", b"\xffBIOSEMI"):
        return "EDF"
    if start[:8] in (b"ISHNE1.0", b"ANN  1.0"):
        return "ISHNE"
    if start[16:22] == b"SCPECG" or start[8:10] + start[22:24] + start[28:32] == b"\0\0\0\0\7\0\0\0":
        return "SCP-ECG"  # by its name, or, in old files, by the pointer of section 0 to itself
    if start[:8] == b"\x89HDF\r\n\x1a\n":
        return "HDF5"
    if start[:6] == b"\x93NUMPY" or start[:4] == b"PK\x03\x04":
        return "NumPy"
    if start[:10] == b"MATLAB 5.0":
        return "CPSC-2018 MAT"
    text = _text(start)
    if text is None:
        return None
    if text.lstrip().startswith("<"):
        root = _ROOT.search(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
        return _ROOTS.get(root[1]) if root else None
    return "CSV" if looks_like_a_table(text) else None


def _text(start):
    """Return bytes as text where they can be text, else None."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return start.decode("utf-16", errors="replace")
    if b"\0" in start:
        return None
    return start.decode("utf-8-sig", errors="replace")
