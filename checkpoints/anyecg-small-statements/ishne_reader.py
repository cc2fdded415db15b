"""ISHNE Holter recordings: `read_ishne(path, stated) -> Record`. Of a long one only the part asked for is read.

Source: F. Badilini, "The ISHNE Holter Standard Output File Format", Ann. Noninvasive Electrocardiol. 3 (1998) 263-266:
"ISHNE1.0", check sum, header of 512 bytes, text of any length, 16-bit samples of all leads in turn.
"""

import binascii
import io
import struct
from typing import NamedTuple

import numpy as np

from .record_fields import standard_lead_names, years_between
from .records import Record, part_to_read
from .regular_files import open_regular

_MAGIC, _ANNOTATIONS = b"ISHNE1.0", b"ANN  1.0"
_HEADER_END = 522  # magic, check sum, fixed block
_LARGEST_HEADER = 16_000_000  # with its text; the check sum of a larger one is not compared
_MOST_LEADS = 12
_NO_VALUE = -32768
_NANOVOLT = 1e-6  # in mV
_CHUNK = 1 << 20  # values converted at a time
_SEX = {1: "male", 2: "female"}
_LEAD_NAMES = "unknown bipolar X Y Z I II III aVR aVL aVF V1 V2 V3 V4 V5 V6 ES AS AI".split()
_QUALITY = {2: "noise at times", 3: "noise often", 4: "disconnected at times", 5: "disconnected often"}


class _Header(NamedTuple):
    """The fields of the fixed block that are used, in the order of the file."""

    text_bytes: int
    num_samples: int  # of one lead, or of all leads together: writers differ
    text_start: int
    signal_start: int
    sex: int
    birth: tuple[int, int, int]  # year, month, day
    recorded: tuple[int, int, int]
    leads: tuple[int, ...]
    quality: tuple[int, ...]
    nanovolts: tuple[int, ...]  # of a step
    rate: int


def read_ishne(path, stated):
    """Return the `Record` in an ISHNE file (`pathlib.Path`).

    The bipolar leads X, Y, Z of Holter recorders keep these names.

    Raises:
        ValueError: the header is cut or contradictory, or it is a file of annotations.
        OSError: there is no such regular file.
    """
    warnings = []
    with open_regular(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        header = _read_header(file.read(_HEADER_END), size, path)
        _compare_check_sum(file, header, warnings)
        num_samples = _count_samples(header, size, path, warnings)
        start, stop = part_to_read(stated, header.rate, num_samples)
        signal = _read_signal(file, header, start, stop)
    for number, quality in enumerate(header.quality, start=1):
        if quality in _QUALITY:
            warnings.append(f"lead {number}: {_QUALITY[quality]}, says the header.")
    given = [
        _LEAD_NAMES[code] if 0 < code < len(_LEAD_NAMES) else f"lead {i + 1}" for i, code in enumerate(header.leads)
    ]
    names = standard_lead_names(given, warnings)
    age = years_between(header.birth, header.recorded)
    return Record(signal, float(header.rate), names, age=age, sex=_SEX.get(header.sex), warnings=warnings)


def _read_header(data, size, path):
    """Return the `_Header` in the first bytes of a file of `size` bytes."""
    if data.startswith(_ANNOTATIONS):
        raise ValueError(f"{path}: ISHNE annotations, no signal. Pass the recording that they belong to.")
    if not data.startswith(_MAGIC) or len(data) < _HEADER_END:
        raise ValueError(f"{path}: {len(data)} bytes; an ISHNE recording begins with {_HEADER_END} bytes of header.")
    text_bytes, num_samples, text_start, signal_start = struct.unpack_from("<4i", data, 10)
    sex, _, *dates = struct.unpack_from("<8h", data, 128)
    (num_leads,) = struct.unpack_from("<h", data, 156)
    per_lead = struct.unpack_from("<36h", data, 158)
    (rate,) = struct.unpack_from("<h", data, 272)
    if not 1 <= num_leads <= _MOST_LEADS:
        raise ValueError(f"{path}: {num_leads} leads (byte 156); 1 to {_MOST_LEADS} are accepted.")
    leads, quality, nanovolts = (per_lead[first : first + num_leads] for first in (0, 12, 24))
    if rate <= 0 or min(nanovolts) <= 0:
        raise ValueError(f"{path}: {rate} Hz (byte 272), steps of {nanovolts} nV (byte 206); all must be above 0.")
    if not _HEADER_END <= signal_start <= size:
        raise ValueError(
            f"{path}: the signal begins at byte {signal_start} (byte 22) of {size}; the file is cut or damaged."
        )
    birth, recorded = (tuple(dates[first : first + 3][::-1]) for first in (0, 3))
    return _Header(
        text_bytes, num_samples, text_start, signal_start, sex, birth, recorded, leads, quality, nanovolts, rate
    )


def _compare_check_sum(file, header, warnings):
    """Note a check sum (CRC-CCITT of fixed block and text) that fits in neither order of its two bytes."""
    end = max(header.text_start + max(header.text_bytes, 0), _HEADER_END)
    if end > min(header.signal_start, _LARGEST_HEADER):
        warnings.append(f"the header's text ends at byte {end}, within the signal or too far; check sum not compared.")
        return
    file.seek(len(_MAGIC))
    stored, block = file.read(2), file.read(end - len(_MAGIC) - 2)
    if binascii.crc_hqx(block, 0xFFFF) not in (int.from_bytes(stored, "little"), int.from_bytes(stored, "big")):
        warnings.append("the header's check sum does not fit; the header may be damaged.")


def _count_samples(header, size, path, warnings):
    """Return the samples of a lead that are there; note where the header says otherwise."""
    num_leads = len(header.leads)
    num_samples, rest = divmod(size - header.signal_start, 2 * num_leads)
    if num_samples == 0:
        raise ValueError(f"{path}: no sample of each lead behind the header; the file is cut or empty.")
    if header.num_samples not in (num_samples, num_samples * num_leads) or rest:
        warnings.append(
            f"the header announces {header.num_samples} samples, the file holds {num_samples} of each of {num_leads} leads "
            f"and {rest} bytes; what it holds was read."
        )
    return num_samples


def _read_signal(file, header, start, stop):
    """Return samples `start` to `stop` in mV, float32; no value is NaN."""
    num_leads, factors = len(header.leads), np.array(header.nanovolts)[:, None] * _NANOVOLT
    signal = np.full((num_leads, stop - start), np.nan, np.float32)
    file.seek(header.signal_start + 2 * num_leads * start)
    step = _CHUNK // num_leads
    for place in range(0, stop - start, step):
        data = file.read(2 * num_leads * min(step, stop - start - place))
        values = np.frombuffer(data, "<i2", len(data) // (2 * num_leads) * num_leads).reshape(-1, num_leads).T
        signal[:, place : place + values.shape[1]] = np.where(values == _NO_VALUE, np.nan, values * factors)
    return signal
