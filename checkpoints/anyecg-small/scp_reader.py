"""SCP-ECG, resting ECGs as electrocardiographs transmit them: `read_scp(path, stated) -> Record`.

Read are sections 0 (pointers), 1 (age, sex), 2 (Huffman tables), 3 (leads), 4 and 5 (reference beat), 6 (rhythm),
8 and 11 (statements), with and without compression. Source: EN 1064 / ISO 11073-91064 (the numbers of clauses below are
its), ANSI/AAMI EC71. What lies between the beats of a file with bimodal compression was averaged by the writer and is
interpolated here (Annex C), as ECGToolkit and BioSig do; `warnings` says so.
"""

import binascii
import dataclasses
import struct
from typing import NamedTuple

import numpy as np

from .record_fields import findings, standard_lead_names, years_between
from .records import Record, parse_age, take_part
from .regular_files import read_whole
from .scp_huffman import decode_huffman, read_tables, undo_differences

LARGEST_FILE_BYTES = 16_000_000  # section 6 holds at most 64 KiB of a lead
_LARGEST_SIGNAL = 1_000_000  # values, of any file ...
_VALUES_PER_BYTE = 64  # ... and of large ones: a Huffman code has one bit at least, and leads may lie one after another
_MOST_STORED = 10_000_000  # values of all leads: 12 leads take 65,535 bytes each at most
_MOST_BEATS = 1_000
_LARGEST_DECIMATION = 8
_LARGEST_TAGS = 65_536  # bytes of section 1 that are looked at
_HEADER_BYTES = 16  # of a section
_NANOVOLT = 1e-6  # in mV

_PATIENT, _HUFFMAN, _LEADS, _BEATS, _REFERENCE, _RHYTHM, _TEXTS, _CODES = 1, 2, 3, 4, 5, 6, 8, 11
_VERSION_3 = 30  # from here on the byte for bimodal compression has no meaning
LEAD_NAMES = (  # by number, 5.6.3; DICOM and ISO/IEEE 11073-10102 took the numbers over
    "unspecified I II V1 V2 V3 V4 V5 V6 V7 V2R V3R V4R V5R V6R V7R X Y Z CC5 CM5 LA RA LL fI fE fC fA fM fF fH "
    "I-cal II-cal V1-cal V2-cal V3-cal V4-cal V5-cal V6-cal V7-cal V2R-cal V3R-cal V4R-cal V5R-cal V6R-cal V7R-cal "
    "X-cal Y-cal Z-cal CC5-cal CM5-cal LA-cal RA-cal LL-cal fI-cal fE-cal fC-cal fA-cal fM-cal fF-cal fH-cal "
    "III aVR aVL aVF -aVR V8 V9 V8R V9R D A J Defib pacing A1 A2 A3 A4"
).split()
_YEARS_PER_UNIT = {
    1: 1.0,
    2: 1 / 12,
    3: 7 / 365.25,
    4: 1 / 365.25,
    5: 1 / 8766,
}  # tag 4: years, months, weeks, days, hours
_SEX = {1: "male", 2: "female"}
_CODECS = {  # tag 14, language support code
    0x03: "iso8859_2", 0x0B: "iso8859_4", 0x13: "iso8859_5", 0x1B: "iso8859_6", 0x23: "iso8859_7", 0x2B: "iso8859_8",
    0x33: "iso8859_11", 0x3B: "iso8859_15", 0x07: "utf_16_le", 0x0F: "shift_jis", 0x17: "euc_jp", 0x1F: "euc_jp",
    0x27: "gb2312", 0x2F: "cp949", 0x37: "utf-8",
}  # fmt: skip
_CODED, _FULL_TEXT = 1, 2  # kinds of statements in section 11


class _Section(NamedTuple):
    body: bytes
    version: int


class _Lead(NamedTuple):
    start: int  # number of its first sample, from 1
    end: int  # number of its last sample
    code: int


@dataclasses.dataclass
class _Beats:
    """Section 4: the reference beat's place in each beat, and the zones around them that were stored in full."""

    length_ms: int
    fiducial: int  # sample of the reference beat, from 1
    subtracted: list[tuple[int, int, int]]  # first sample, fiducial point, last sample
    protected: list[tuple[int, int]]  # first and last sample


@dataclasses.dataclass
class _Coded:
    """Section 5 or 6: what one step and one sample stand for, and the samples of each lead, maybe fewer than announced."""

    nanovolt: int
    interval_us: int
    samples: list[np.ndarray]


def read_scp(path, stated):
    """Return the `Record` in an SCP-ECG file (`pathlib.Path`).

    Leads that were recorded one after another are put at their time, with NaN before and after.

    Raises:
        ValueError: a section is missing, cut or contradictory, or the file holds long-term ECG (version 3) only.
        OSError: there is no such regular file.
    """
    data, warnings = read_whole(path, LARGEST_FILE_BYTES), []
    sections = _split(data, path, warnings)
    if _RHYTHM not in sections:
        raise ValueError(
            f"{path}: no section 6 (rhythm); long-term ECG (section 12) and reference beats alone are not read."
        )
    leads, reference_subtracted = _read_leads(_require(sections, _LEADS, path), f"{path}, section 3")
    nanovolts, interval_us = _read_rhythm(sections, leads, reference_subtracted, path, warnings)
    leads, nanovolts = _leave_out_empty(leads, nanovolts, path, warnings)
    signal = _in_time(leads, nanovolts, len(data), path)
    given = [LEAD_NAMES[lead.code] if lead.code < len(LEAD_NAMES) else f"SCP lead {lead.code}" for lead in leads]
    names = standard_lead_names(given, warnings)
    age, sex, codec = _read_patient(sections[_PATIENT].body if _PATIENT in sections else b"")
    texts, codes = _read_statements(sections, codec, warnings)
    record = Record(
        signal, 1e6 / interval_us, names, age=age, sex=sex, statements=texts, diagnosis_codes=codes, warnings=warnings
    )
    return take_part(record, stated)


# Sections


def _split(data, path, warnings):
    """Return `{number: _Section}` of the sections that are there; note what is cut and check sums that do not fit."""
    size, section_0_bytes = (*_fields("I", data, 2, path), *_fields("I", data, 10, path))
    if size > len(data):
        warnings.append(f"the file ends early: {len(data)} of {size} bytes are there.")
    bad_sums = [] if size > len(data) or _sum_fits(data[:size]) else ["record"]
    sections = {}
    for place in range(22, min(6 + section_0_bytes, len(data), 22 + 10 * 1024) - 9, 10):
        number, length, index = _fields("HII", data, place, path)
        if not 1 <= number <= 11 or number in sections or length <= _HEADER_BYTES or index == 0:
            continue
        section = data[index - 1 : index - 1 + length]
        if len(section) <= _HEADER_BYTES:
            warnings.append(f"section {number} lies behind the end of the file.")
            continue
        if section[2] != number or section[3] != 0:
            raise ValueError(f"{path}: section 0 points to byte {index} for section {number}; there is none.")
        if len(section) < length:
            warnings.append(f"section {number} ends early: {len(section)} of {length} bytes are there.")
        elif not _sum_fits(section):
            bad_sums.append(f"section {number}")
        sections[number] = _Section(section[_HEADER_BYTES:], section[9])
    if bad_sums:
        warnings.append(f"check sums do not fit ({', '.join(bad_sums)}); the data may be damaged.")
    return sections


def _sum_fits(data):
    """Whether the check sum in the first two bytes is that of the others (5.2.1: CRC-CCITT, from 0xFFFF)."""
    return binascii.crc_hqx(data[2:], 0xFFFF) == int.from_bytes(data[:2], "little")


def _require(sections, number, path):
    if number not in sections:
        raise ValueError(f"{path}: no section {number}, which its signal needs; the file is cut or incomplete.")
    return sections[number].body


def _fields(form, body, offset, where):
    """Unpack little-endian fields; a clear error where `body` ends before them."""
    if offset + struct.calcsize("<" + form) > len(body):
        raise ValueError(f"{where}: ends at byte {len(body)}, within a field; the file is cut or damaged.")
    return struct.unpack_from("<" + form, body, offset)


# Signal


def _read_leads(body, where):
    """Return the leads of section 3, and whether the reference beat was subtracted from them."""
    count, flags = _fields("BB", body, 0, where)
    if count == 0:
        raise ValueError(f"{where}: no leads.")
    leads = [_Lead(*_fields("IIB", body, 2 + 9 * index, where)) for index in range(count)]
    leads = [lead._replace(start=max(lead.start, 1)) for lead in leads]  # some writers count from 0
    for number, lead in enumerate(leads, start=1):
        if lead.end < lead.start:
            raise ValueError(f"{where}: lead {number} lasts from sample {lead.start} to {lead.end}.")
    return leads, bool(flags & 1)


def _read_rhythm(sections, leads, reference_subtracted, path, warnings):
    """Return the samples of each lead in nV (float64), as far as they are there, and the sampling interval in us."""
    body, version = sections[_RHYTHM]
    where = f"{path}, section 6"
    _, interval_us, _, bimodal = _fields("HHBB", body, 0, where)
    beats = reference = None
    factor = 1
    if reference_subtracted or (bimodal and version < _VERSION_3):
        beats = _read_beats(_require(sections, _BEATS, path), reference_subtracted, f"{path}, section 4")
        reference = _read_reference(sections, len(leads), beats, path)
        factor = _decimation(interval_us, reference.interval_us, where)
    if factor > 1:
        warnings.append(
            f"bimodal compression: between the beats one of {factor} samples is stored, the rest interpolated."
        )
    stored = [sum(_stored_lengths(lead, beats, factor)) for lead in _bounded(leads, len(body), factor)]
    if sum(stored) > _MOST_STORED:
        raise ValueError(
            f"{path}, section 3: announces {sum(stored)} samples to store; at most {_MOST_STORED} are read."
        )
    rhythm = _decode(sections, _RHYTHM, stored, path)
    out = []
    for index, (lead, count, samples) in enumerate(zip(leads, stored, rhythm.samples)):
        if len(samples) < count or count < lead.end - lead.start + 1 and factor == 1:
            warnings.append(f"lead {index + 1} ends early, at sample {len(samples)} of those stored.")
        nanovolts = _expand(samples, lead, beats, factor) * float(rhythm.nanovolt)
        if reference_subtracted:
            _add_reference(nanovolts, reference.samples[index] * float(reference.nanovolt), lead, beats)
        out.append(nanovolts)
    return out, interval_us // factor


def _bounded(leads, num_bytes, factor):
    """Return the leads with ends that this many bytes can reach: a code has one bit at least."""
    return [lead._replace(end=min(lead.end, lead.start + 8 * factor * num_bytes)) for lead in leads]


def _decode(sections, number, counts, path):
    """Return the `_Coded` samples of section 5 or 6, at most `counts[i]` of lead i."""
    body, where = sections[number].body, f"{path}, section {number}"
    nanovolt, interval_us, order = _fields("HHB", body, 0, where)
    if nanovolt == 0 or interval_us == 0 or order > 2:
        raise ValueError(
            f"{where}: {nanovolt} nV a step, {interval_us} us a sample, differences of order {order}; "
            "needed: above 0, above 0, and 0 to 2."
        )
    tables = read_tables(sections[_HUFFMAN].body, f"{path}, section 2") if _HUFFMAN in sections else None
    lengths = _fields(f"{len(counts)}H", body, 6, where)
    position, samples = 6 + 2 * len(counts), []
    for lead, (length, count) in enumerate(zip(lengths, counts), start=1):
        data = body[position : position + length]
        position += length
        if tables:
            values = decode_huffman(data, count, tables, f"{where}, lead {lead}")
        else:
            values = np.frombuffer(data, "<i2", min(count, len(data) // 2)).astype(np.int64)
        samples.append(undo_differences(values, order))
    return _Coded(nanovolt, interval_us, samples)


def _leave_out_empty(leads, nanovolts, path, warnings):
    filled = [index for index, values in enumerate(nanovolts) if len(values)]
    if not filled:
        raise ValueError(f"{path}, section 6: no sample of any lead; the file is cut or empty.")
    if len(filled) < len(leads):
        warnings.append(f"{len(leads) - len(filled)} of {len(leads)} leads left out: none of their samples is there.")
    return [leads[index] for index in filled], [nanovolts[index] for index in filled]


def _in_time(leads, nanovolts, num_bytes, path):
    """Return the leads in mV, each at its time: float32, `(num_leads, num_samples)`."""
    origin = min(lead.start for lead in leads)
    length = max(lead.start - origin + len(values) for lead, values in zip(leads, nanovolts))
    if len(leads) * length > max(_LARGEST_SIGNAL, _VALUES_PER_BYTE * num_bytes):
        raise ValueError(
            f"{path}, section 3: {len(leads)} leads over {length} samples; more than {num_bytes} bytes hold."
        )
    signal = np.full((len(leads), length), np.nan, np.float32)
    for row, lead, values in zip(signal, leads, nanovolts):
        row[lead.start - origin :][: len(values)] = values * _NANOVOLT
    return signal


# Reference beat and bimodal compression


def _read_beats(body, zones_are_needed, where):
    """Return section 4 as `_Beats`."""
    length_ms, fiducial, count = _fields("HHH", body, 0, where)
    if count > _MOST_BEATS:
        raise ValueError(f"{where}: {count} beats; at most {_MOST_BEATS} are read.")
    zones = [_fields("HIII", body, 6 + 14 * index, where) for index in range(count)]
    place = 6 + 14 * count
    protected = [_fields("II", body, place + 8 * index, where) for index in range(count)] if len(body) > place else []
    if zones_are_needed and not zones:
        raise ValueError(f"{where}: no beats, but section 3 says that the reference beat was subtracted from them.")
    return _Beats(length_ms, fiducial, [zone[1:] for zone in zones if zone[0] == 0], sorted(protected))


def _read_reference(sections, num_leads, beats, path):
    """Return section 5: the reference beat of each lead."""
    body = _require(sections, _REFERENCE, path)
    interval_us = _fields("HH", body, 0, f"{path}, section 5")[1]
    count = round(beats.length_ms * 1000 / max(interval_us, 1))
    return _decode(sections, _REFERENCE, [count] * num_leads, path)


def _decimation(rhythm_us, reference_us, where):
    factor, rest = divmod(rhythm_us, reference_us)
    if rest or not 1 <= factor <= _LARGEST_DECIMATION:
        raise ValueError(
            f"{where}: a sample lasts {rhythm_us} us, one of the reference beat {reference_us} us; "
            f"needed is the same, or 2 to {_LARGEST_DECIMATION} times as long."
        )
    return factor


def _stretches(lead, beats):
    """Yield the stretches of a lead in the order of time: `(number of samples, whether all of them are stored)`."""
    position = lead.start
    for first, last in beats.protected if beats else ():
        first, last = max(first, position), min(last, lead.end)
        if first <= last:
            yield first - position, False
            yield last - first + 1, True
            position = last + 1
    yield lead.end - position + 1, False


def _stored_lengths(lead, beats, factor):
    """Yield how many values are stored for each stretch: one for `factor` samples, what is left over singly."""
    for length, in_full in _stretches(lead, beats):
        yield length if in_full else length // factor + length % factor


def _expand(samples, lead, beats, factor):
    """Return a lead at the full rate, float64: straight lines between stored values, which stand for the middle."""
    if factor == 1:
        return samples.astype(np.float64)
    out, position = [], 0
    for length, in_full in _stretches(lead, beats):
        blocks = 0 if in_full else length // factor
        if averages := samples[position : position + blocks].astype(np.float64).tolist():
            middles = np.arange(len(averages)) * factor + factor // 2
            out.append(np.interp(np.arange(len(averages) * factor), middles, averages))
        position += blocks
        out.append(samples[position : position + length - blocks * factor].astype(np.float64))
        position += length - blocks * factor
        if position >= len(samples):
            break
    return np.concatenate(out)


def _add_reference(nanovolts, reference, lead, beats):
    """Add the reference beat where it was subtracted, in place."""
    for first, fiducial, last in beats.subtracted:
        shift = beats.fiducial - fiducial  # from a sample's number to its number in the reference beat
        first = max(first, lead.start, 1 - shift)
        last = min(last, lead.start + len(nanovolts) - 1, len(reference) - shift)
        if first <= last:
            nanovolts[first - lead.start : last - lead.start + 1] += reference[first + shift - 1 : last + shift]


# Patient and statements


def _read_patient(body):
    """Return age, sex and the codec of texts from section 1; names, numbers and dates are passed over."""
    tags = _split_tags(body[:_LARGEST_TAGS])
    age = None
    if len(stated := tags.get(4, b"")) >= 3:
        number, unit = _fields("HB", stated, 0, "age")
        age = parse_age(number * _YEARS_PER_UNIT[unit]) if number and unit in _YEARS_PER_UNIT else None
    if age is None and len(tags.get(5, b"")) >= 4 and len(tags.get(25, b"")) >= 4:
        age = years_between(_fields("HBB", tags[5], 0, "birth"), _fields("HBB", tags[25], 0, "recording"))
    device = tags.get(14, b"")
    codec = _CODECS.get(device[16]) if len(device) > 16 else None
    return age, _SEX.get(int.from_bytes(tags.get(8, b"")[:1], "little")), codec


def _split_tags(body):
    """Return `{tag: value}` of section 1, the first of each, up to what is cut."""
    tags, position = {}, 0
    while position + 3 <= len(body) and body[position] != 255:
        length = int.from_bytes(body[position + 1 : position + 3], "little")
        tags.setdefault(body[position], body[position + 3 : position + 3 + length])
        position += 3 + length
    return tags


def _read_statements(sections, codec, warnings):
    """Return the statements in words, and the codes, of sections 8 and 11."""
    texts = [_text(value, codec) for value in _split_statements(sections, _TEXTS, warnings)]
    codes = []
    for value in _split_statements(sections, _CODES, warnings):
        if value[:1] == bytes([_CODED]):
            codes += [_text(code, codec) for code in value[1:].split(b"\0")]
        elif value[:1] == bytes([_FULL_TEXT]):
            texts.append(_text(value[1:], codec))
    return findings(texts), [code for code in codes if code]


def _split_statements(sections, number, warnings):
    """Return the statements of section 8 or 11, bytes; behind 9 bytes (status, date, time, count) each has a length."""
    body = sections[number].body if number in sections else b""
    statements, position, count = [], 9, body[8] if len(body) > 8 else 0
    while len(statements) < count:
        length = int.from_bytes(body[position + 1 : position + 3], "little")
        if position + 3 + length > len(body):
            warnings.append(f"section {number} ends early: {len(statements)} of {count} statements are there.")
            break
        statements.append(body[position + 3 : position + 3 + length])
        position += 3 + length
    return statements


def _text(value, codec):
    """Return a text of the file; Latin-1, the format's default, where it is not in its codec."""
    try:
        text = value.decode(codec or "utf-8")
    except UnicodeDecodeError:
        text = value.decode("latin-1")
    return " ".join(text.replace("\0", " ").split())
