"""Philips Sierra XML (PageWriter, TraceMaster, IntelliSpace; 1.03 to 1.04.01): `read_sierra(path, stated) -> Record`.

Source: Philips' schema of 1.03; for the compression, which it leaves out, sierra-ecg-tools by C. A. Watford. "XLI" holds
for each lead 8 bytes (size, 1, first second difference) and LZW with 10-bit codes. It expands to the high bytes of all
values, then their low bytes: two samples, then 64 minus the second differences. Of III, aVR, aVL and aVF it holds
what is left after Einthoven's and Goldberger's equations. Channels after the labelled leads hold no ECG.
"""

import re
import struct

import numpy as np

from .leads import STANDARD_LEADS
from .record_fields import findings
from .records import Record, parse_sex, take_part
from .xml_documents import (
    age_at,
    age_in_years,
    parse_base64,
    parse_list,
    parse_number,
    parse_rate,
    parse_step,
    read_xml,
    standard_names,
    to_signal,
)

CODE_BITS, FIRST_FREE_CODE, END_CODE = 10, 256, 1023
DELTA_ZERO = 64
LARGEST_SAMPLES = 2_000_000  # of all leads together; a resting ECG has 66,000
CALIBRATION_SECONDS = (0.1, 0.2, 0.1)  # zero, 1 mV, zero: what PageWriters add at the end of every lead
_LIMB = ("III", "aVR", "aVL", "aVF")
_DATE = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})", re.ASCII)


def read_sierra(path, stated):
    """Return the `Record` of a Sierra file (`pathlib.Path`): the waveforms; representative beats are left out.

    Raises:
        ValueError: the document is damaged, or its waveforms are stored in a way that is not read.
        OSError: no such regular file.
    """
    root = read_xml(path, "restingecgdata")
    waveforms, where = root.find("waveforms/parsedwaveforms"), f"{path}, parsedwaveforms"
    if waveforms is None:
        raise ValueError(f"{where}: missing; the file holds no waveforms, or representative beats only.")
    warnings = []
    kept = _Characteristics(root, waveforms, warnings)
    rate = parse_rate(kept["samplespersecond", "samplingrate"], f"{path}, samplingrate")
    step_mv = parse_step(kept["resolution", "signalresolution"], f"{path}, resolution") * 1e-3  # from microvolt
    _require_16_bit(kept, path)
    names = _lead_names(kept, warnings, where)
    samples = _samples(waveforms, kept, names, rate, where=where, warnings=warnings)
    if root.find("waveforms/repbeats/repbeat") is not None:
        warnings.append("representative beats left out; the signal is the rhythm.")
    if _ends_with_calibration(samples, rate, round(1 / step_mv)):
        warnings.append(
            f"the last {sum(CALIBRATION_SECONDS):g} s of every lead are a calibration pulse of 1 mV, no ECG."
        )
    signal = to_signal([row * step_mv for row in samples], where)
    record = Record(signal, rate, names, warnings=warnings, **_patient(root), **_interpretation(root))
    return take_part(record, stated)


class _Characteristics:
    """What is stated of the signal, with the waveforms (1.04) or under <signalcharacteristics>."""

    def __init__(self, root, waveforms, warnings):
        self.attributes, self.elements = waveforms.attrib, root.find("dataacquisition/signalcharacteristics")
        self.warnings = warnings

    def __getitem__(self, names):
        texts = [self.attributes.get(name) for name in names]
        if self.elements is not None:
            texts += [self.elements.findtext(name) for name in names]
        texts = [text.strip() for text in texts if text and text.strip()]
        if len(set(texts)) > 1 and not _same_number(texts):
            self.warnings.append(f"{names[-1]} is stated twice, and otherwise; that of the waveforms is taken.")
        return texts[0] if texts else None


def _same_number(texts):
    try:
        return len(set(map(float, texts))) == 1
    except ValueError:
        return False


def _require_16_bit(kept, path):
    if (kept["bitspersample", "nbitspersample"] or "16") != "16":
        raise ValueError(f"{path}, bitspersample: only samples of 16 bits are read.")
    if (kept["signalsigned",] or "True").lower() != "true":
        raise ValueError(f"{path}, signalsigned: only signed samples are read.")
    if parse_number(kept["signaloffset",] or "0", f"{path}, signaloffset") != 0:
        raise ValueError(f"{path}, signaloffset: samples with an offset are not read.")


def _lead_names(kept, warnings, where):
    number = int(parse_number(kept["numberofleads",] or "64", f"{where}, numberofleads", least=1, most=64))
    labels = (kept["leadlabels",] or "").split(maxsplit=number)[:number]
    if labels:
        if kept["numberofleads",] and len(labels) < number:
            warnings.append(f"{where}: {number} leads announced, {len(labels)} have a label; only these were read.")
        return standard_names(labels, warnings, where)
    if (kept["leadset", "acquisitiontype"] or "") not in ("STD-12", "10-WIRE"):
        raise ValueError(f"{where}: no leadlabels, and neither leadset nor acquisitiontype is STD-12 or 10-WIRE.")
    return list(STANDARD_LEADS)


def _samples(waveforms, kept, names, rate, *, where, warnings):
    """Return the stored samples, one float64 array per lead."""
    method = kept["compression", "compressmethod"] or ("XLI" if kept["compressflag",] == "True" else "None")
    method = "None" if kept["compressflag",] == "False" else method
    encoding = kept["dataencoding",] or "Base64"
    seconds = parse_number(kept["durationperchannel",], f"{where}, durationperchannel", least=1, most=1e8) / 1000
    num_samples = round(seconds * rate)
    if num_samples * len(names) > LARGEST_SAMPLES:
        raise ValueError(
            f"{where}: {num_samples} samples of {len(names)} leads are announced; no resting ECG has these."
        )
    if (encoding, method) == ("Base64", "XLI"):
        rows = decode_xli(parse_base64(waveforms.text, where), len(names), num_samples, where=where, warnings=warnings)
        return _restore_limb_leads(rows, names, where)
    if encoding not in ("Base64", "Plain") or method.lower() not in ("none", "uncompressed"):
        raise ValueError(f"{where}: stored in a way that is not read; read are Base64 with XLI, Base64, and Plain.")
    if encoding == "Plain":
        values = parse_list(waveforms.text, where)
    else:
        data = parse_base64(waveforms.text, where)
        values = np.frombuffer(data[: len(data) // 2 * 2], "<i2").astype(np.float64)
    if len(values) < num_samples * len(names):
        raise ValueError(f"{where}: {len(values)} samples found, {num_samples * len(names)} announced; it is cut.")
    return list(values[: num_samples * len(names)].reshape(len(names), num_samples))


def decode_xli(data, num_leads, num_samples, *, where, warnings):
    """Return the numbers that XLI data (`bytes`) holds, float64 arrays of one length; NaN where a lead ends early."""
    rows, offset = [], 0
    for lead in range(1, num_leads + 1):
        at = f"{where}, lead {lead}"
        if len(data) < offset + 8:
            raise ValueError(f"{at}: missing, the data end at byte {len(data)}; {num_leads} leads are announced.")
        size, _, first = struct.unpack_from("<Ihh", data, offset)
        chunk = data[offset + 8 : offset + 8 + size]
        if len(chunk) < size:
            raise ValueError(f"{at}: {size} bytes announced, {len(chunk)} are there; the data are cut or damaged.")
        row = _sum_up(_expand(chunk, 2 * num_samples, at, warnings), first, at)
        if len(row) < num_samples:
            warnings.append(f"{at}: ends early, {len(row)} of {num_samples} announced samples are there.")
        rows.append(row)
        offset += 8 + size
    longest = max(map(len, rows))
    return [np.concatenate([row, np.full(longest - len(row), np.nan)]) for row in rows]


def _expand(chunk, largest, where, warnings):
    """Return the bytes that LZW codes of 10 bits, the highest bit first, stand for."""
    bits = np.unpackbits(np.frombuffer(chunk, np.uint8))
    codes = bits[: len(bits) // CODE_BITS * CODE_BITS].reshape(-1, CODE_BITS) @ (1 << np.arange(CODE_BITS)[::-1])
    table, out, previous = [bytes([byte]) for byte in range(FIRST_FREE_CODE)], bytearray(), b""
    for code in codes.tolist():
        if code == END_CODE:
            return bytes(out)
        if code > len(table) or code == len(table) and not previous:
            raise ValueError(f"{where}: an unknown LZW code; the data are damaged.")
        entry = table[code] if code < len(table) else previous + previous[:1]
        out += entry
        if len(out) > largest:
            raise ValueError(f"{where}: more samples than the {largest // 2} announced; the data are damaged.")
        if previous and len(table) < END_CODE:
            table.append(previous + entry[:1])
        previous = entry
    warnings.append(f"{where}: the code that ends its data is missing; they may be cut.")
    return bytes(out)


def _sum_up(expanded, first, where):
    """Return samples (float64) from the high bytes and then the low bytes of 64 minus their second differences."""
    number = len(expanded) // 2
    if len(expanded) % 2 or number < 2:
        raise ValueError(f"{where}: {len(expanded)} bytes after expansion; an even number from 4 on is needed.")
    both = np.frombuffer(expanded, np.uint8).reshape(2, number)
    stored = (both[0].astype(np.uint16) << 8 | both[1]).astype(np.uint16).view(np.int16).astype(np.int64)
    second = np.concatenate([[-first], DELTA_ZERO - stored[2:-1]])[: number - 2]
    slopes = stored[1] - stored[0] + np.cumsum(second)
    samples = np.concatenate([stored[:2], stored[1] + np.cumsum(slopes)])
    if np.abs(samples).max() > 1 << 15:
        raise ValueError(f"{where}: the differences add up to more than 16 bits hold; the data are damaged.")
    return samples.astype(np.float64)


def _restore_limb_leads(rows, names, where):
    """Return the rows with III, aVR, aVL and aVF made from I, II and what is stored of them; halves are rounded down."""
    if not set(_LIMB) & set(names):
        return rows
    if not {"I", "II"} <= set(names):
        raise ValueError(f"{where}: limb leads are stored as what is left after I and II, but these are not there.")
    at = dict(zip(names, rows))
    lead_i, lead_ii = at["I"], at["II"]
    lead_iii = lead_ii - lead_i - at.get("III", 0)
    restored = {
        "III": lambda stored: lead_iii,
        "aVR": lambda stored: -stored - np.floor((lead_i + lead_ii) / 2),
        "aVL": lambda stored: np.floor((lead_i - lead_iii) / 2) - stored,
        "aVF": lambda stored: np.floor((lead_ii + lead_iii) / 2) - stored,
    }
    return [restored[name](row) if name in restored else row for name, row in zip(names, rows)]


def _ends_with_calibration(samples, rate, one_mv):
    parts = [round(seconds * rate) for seconds in CALIBRATION_SECONDS]
    pulse = np.repeat([0.0, one_mv, 0.0], parts)
    return sum(parts) > 0 and all(np.array_equal(row[-len(pulse) :], pulse) for row in samples)


def _patient(root):
    """Return age and sex. The age is in years, months ..., or follows from the birth date; `defaultage` is none."""
    patient = root.find("patient/generalpatientdata")
    if patient is None:
        return {}
    age = None
    for element in patient.iterfind("age/*"):
        if element.tag == "dateofbirth":
            recorded = root.find("dataacquisition")
            birth = _DATE.match((element.text or "").strip())
            day = _DATE.match(recorded.get("date", "").strip()) if recorded is not None else None
            stated = age_at(birth and birth.groups(), day and day.groups())
        else:
            stated = age_in_years(element.text, element.tag)
        age = stated if age is None else age
    return {"age": age, "sex": parse_sex(patient.findtext("sex"))}


def _interpretation(root):
    """Return findings in words and their codes; who signed them is left out."""
    statements, codes = [], []
    for interpretation in root.iterfind("interpretations/interpretation"):
        for statement in interpretation.iterfind("statement"):
            codes.append((statement.findtext("statementcode") or "").strip())
            sides = (statement.findtext("leftstatement"), statement.findtext("rightstatement"))
            statements.append("; ".join(side.strip() for side in sides if side and side.strip()))
        statements.append((interpretation.findtext("severity") or "").strip(" -"))
    return {
        "statements": list(dict.fromkeys(findings(statements))),
        "diagnosis_codes": list(dict.fromkeys(code for code in codes if code)),
    }
