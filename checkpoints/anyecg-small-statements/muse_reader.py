"""GE MUSE XML (<RestingECG>) and GE CardioSoft XML (<CardiologyXML>): `read_muse`, `read_cardiosoft`.

Source: GE, MUSE XML Developer Guide (restecg.dtd) and CardioSoft XML export. MUSE stores I, II, V1 ... V6 and leaves III,
aVR, aVL and aVF to be computed; `derive_limb_leads` does so. Its check sums are CRC-32 of the samples' bytes.
"""

import re
import zlib

import numpy as np

from .record_fields import findings
from .records import Annotation, Record, parse_sex, take_part
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

_UNIT_TO_MV = {"MICROVOLTS": 1e-3, "MILLIVOLTS": 1.0, "VOLTS": 1e3}
_OFFSETS = ("LeadTimeOffset", "LeadOffsetFirstSample")
_MONTH_DAY_YEAR = re.compile(r"(\d{1,2})[-/](\d{1,2})[-/](\d{4})", re.ASCII)


def read_muse(path, stated):
    """Return the `Record` of a MUSE file (`pathlib.Path`): the leads stored of the rhythm, beats found by the device.

    Raises:
        ValueError: the document is damaged, or its rhythm is stored in a way that is not read.
        OSError: no such regular file.
    """
    root = read_xml(path, "RestingECG")
    where, warnings = f"{path}, Rhythm waveform", []
    waveform = _rhythm(root, where, warnings)
    rate = _muse_rate(waveform, where)
    leads = waveform.findall("LeadData")
    names = standard_names([lead.findtext("LeadID") for lead in leads], warnings, where)
    _require_one_start(leads, where)
    rows = [_muse_row(lead, f"{where}, lead {position}", warnings) for position, lead in enumerate(leads, start=1)]
    record = Record(to_signal(rows, where), rate, names, warnings=warnings)
    record.age, record.sex = _muse_patient(root)
    record.statements = _muse_statements(root)
    for beat in root.iterfind("QRSTimesTypes/QRS"):
        kind = (beat.findtext("Type") or "").strip()
        note = f"type {kind}" if kind.isdecimal() and len(kind) < 10 else ""
        _add_beat(beat.findtext("Time"), note, record)
    return take_part(record, stated)


def _add_beat(milliseconds, note, record):
    """Add a beat to a record's annotations; one without a time is noted and left out."""
    try:
        seconds = parse_number(milliseconds, "time", least=0, most=1e9) / 1000
    except ValueError:
        record.warnings.append(f"beat {len(record.annotations) + 1} left out: it has no time in milliseconds.")
    else:
        record.annotations.append(Annotation(round(seconds * record.sampling_rate), "QRS", note))


def _rhythm(root, where, warnings):
    """Return the <Waveform> of the rhythm; what else there is is noted."""
    waveforms = root.findall("Waveform")
    rhythms = [one for one in waveforms if (one.findtext("WaveformType") or "Rhythm").strip().lower() == "rhythm"]
    if not rhythms:
        raise ValueError(f"{where}: missing; the file holds {len(waveforms)} other waveforms (median beats).")
    if len(waveforms) > len(rhythms):
        warnings.append("median beats left out; the signal is the rhythm.")
    if len(rhythms) > 1:
        warnings.append(f"{len(rhythms) - 1} further rhythm waveforms left out; the signal is the first.")
    if (rhythms[0].findtext("SampleType") or "CONTINUOUS_SAMPLES").strip() != "CONTINUOUS_SAMPLES":
        raise ValueError(f"{where}, SampleType: only CONTINUOUS_SAMPLES are read.")
    return rhythms[0]


def _muse_rate(waveform, where):
    base = parse_number(waveform.findtext("SampleBase"), f"{where}, SampleBase", least=1e-6, most=1e6)
    exponent = parse_number(waveform.findtext("SampleExponent") or "0", f"{where}, SampleExponent", least=-6, most=6)
    return parse_rate(f"{base * 10.0**exponent:.12g}", f"{where}, SampleBase with SampleExponent")


def _require_one_start(leads, where):
    for name in _OFFSETS:
        starts = {
            parse_number(lead.findtext(name) or "0", f"{where}, lead {position}, {name}")
            for position, lead in enumerate(leads, start=1)
        }
        if len(starts) > 1:
            raise ValueError(
                f"{where}, {name}: differs between leads; leads that begin at different times are not read."
            )


def _muse_row(lead, where, warnings):
    """Return the samples of one lead in mV (float64); counts and check sums that do not fit are noted."""
    if parse_number(lead.findtext("LeadSampleSize") or "2", f"{where}, LeadSampleSize") != 2:
        raise ValueError(f"{where}, LeadSampleSize: only samples of 2 bytes are read.")
    unit = (lead.findtext("LeadAmplitudeUnits") or "MICROVOLTS").strip().upper()
    if unit not in _UNIT_TO_MV:
        raise ValueError(f"{where}, LeadAmplitudeUnits: known are {', '.join(_UNIT_TO_MV)}.")
    decimal_point = (lead.findtext("LeadAmplitudeUnitsPerBit") or "").replace(",", ".")
    step = parse_step(decimal_point, f"{where}, LeadAmplitudeUnitsPerBit")
    data = parse_base64(lead.findtext("WaveFormData"), f"{where}, WaveFormData")
    samples = np.frombuffer(data[: len(data) // 2 * 2], "<i2")
    for name, found in (("LeadByteCountTotal", len(data)), ("LeadSampleCountTotal", len(samples))):
        announced = lead.findtext(name)
        if announced and parse_number(announced, f"{where}, {name}") != found:
            warnings.append(f"{where}, {name}: {announced.strip()[:20]} announced, {found} are there.")
    checksum = (lead.findtext("LeadDataCRC32") or "").strip()
    if checksum and parse_number(checksum, f"{where}, LeadDataCRC32") % 2**32 != zlib.crc32(data):
        warnings.append(f"{where}: the check sum does not fit; the data may be damaged, or another record's.")
    if (lead.findtext("LeadOff") or "").strip().upper() == "TRUE":
        warnings.append(f"{where}: marked as off (LeadOff).")
    if parse_number(lead.findtext("FirstSampleBaseline") or "0", f"{where}, FirstSampleBaseline") != 0:
        warnings.append(f"{where}: FirstSampleBaseline is not 0; it was not applied.")
    return samples.astype(np.float64) * (step * _UNIT_TO_MV[unit])


def _muse_patient(root):
    patient, test = root.find("PatientDemographics"), root.find("TestDemographics")
    if patient is None:
        return None, None
    age = age_in_years(patient.findtext("PatientAge"), patient.findtext("AgeUnits"))
    if age is None and test is not None:
        days = (patient.findtext("DateofBirth"), test.findtext("AcquisitionDate"))
        age = age_at(*(_year_month_day(day) for day in days))
    return age, parse_sex(patient.findtext("Gender"))


def _year_month_day(text):
    found = _MONTH_DAY_YEAR.match((text or "").strip())
    return found and (found[3], found[1], found[2])


def _muse_statements(root):
    """Return the diagnosis, as confirmed or else as the device made it; lines go on until the flag ENDSLINE."""
    for name in ("Diagnosis", "OriginalDiagnosis"):
        lines, line = [], []
        for statement in root.iterfind(f"{name}/DiagnosisStatement"):
            flags = {(flag.text or "").strip() for flag in statement.iterfind("StmtFlag")}
            if "DELETED" not in flags:
                line.append((statement.findtext("StmtText") or "").strip())
            if "ENDSLINE" in flags:
                lines.append(" ".join(line))
                line = []
        kept = findings([*lines, " ".join(line)])
        if kept:
            return kept
    return []


def read_cardiosoft(path, stated):
    """Return the `Record` of a CardioSoft file (`pathlib.Path`): strip data, or full disclosure if there are none.

    Raises:
        ValueError: the document is damaged, or holds neither.
        OSError: no such regular file.
    """
    root = read_xml(path, "CardiologyXML")
    strips = [strip for strip in root.iter("StripData") if strip.find("WaveformData") is not None]
    disclosure = next(root.iter("FullDisclosure"), None)
    warnings = []
    if strips:
        record = _read_strip(strips[0], f"{path}, StripData", warnings)
    elif disclosure is not None:
        record = _read_disclosure(disclosure, f"{path}, FullDisclosure", warnings)
    else:
        raise ValueError(
            f"{path}: neither StripData with WaveformData nor FullDisclosure; it may hold median beats only."
        )
    _note_what_was_left_out(root, len(strips), bool(strips) and disclosure is not None, warnings)
    record.age, record.sex = _cardiosoft_patient(root)
    record.statements = findings(text.text for text in root.iterfind("Interpretation/Diagnosis/DiagnosisText"))
    _add_cardiosoft_beats((strips or [disclosure])[0], record)
    return take_part(record, stated)


def _note_what_was_left_out(root, num_strips, has_disclosure, warnings):
    if next(root.iter("MedianSamples"), None) is not None:
        warnings.append("median beats left out; the signal is the rhythm.")
    if num_strips > 1:
        warnings.append(f"{num_strips - 1} further strips left out; the signal is the first.")
    if has_disclosure:
        warnings.append("full disclosure left out; the signal is the strip.")


def _read_strip(strip, where, warnings):
    """Return a `Record` with the leads of a <StripData>: numbers separated by commas, a <WaveformData> for each lead."""
    leads, rows = strip.findall("WaveformData"), []
    names = standard_names([lead.get("lead") for lead in leads], warnings, where)
    announced = strip.findtext("ChannelSampleCountTotal")
    for position, lead in enumerate(leads, start=1):
        rows.append(parse_list(lead.text, f"{where}, lead {position}", ","))
        if announced and parse_number(announced, f"{where}, ChannelSampleCountTotal") != len(rows[-1]):
            warnings.append(f"{where}, lead {position}: {len(rows[-1])} samples, not as many as are announced.")
    return _cardiosoft_record(strip, rows, names, where=where, warnings=warnings)


def _read_disclosure(disclosure, where, warnings):
    """Return a `Record` with the leads of a <FullDisclosure>: one list, the leads in turn for each moment."""
    names = [name for name in (disclosure.findtext("LeadOrder") or "")[:2000].split(",") if name.strip()]
    names = standard_names(names, warnings, where)
    values = parse_list(disclosure.findtext("FullDisclosureData"), f"{where}, FullDisclosureData", ",")
    announced = disclosure.findtext("NumberOfChannels") or str(len(names))
    if not names or parse_number(announced, f"{where}, NumberOfChannels") != len(names):
        raise ValueError(f"{where}: {len(names)} names in LeadOrder, which is not the announced number of channels.")
    if len(values) % len(names):
        warnings.append(f"{where}: ends early, within a sample of all leads.")
    rows = values[: len(values) // len(names) * len(names)].reshape(-1, len(names)).T
    return _cardiosoft_record(disclosure, list(rows), names, where=where, warnings=warnings)


def _cardiosoft_record(element, rows, names, *, where, warnings):
    resolution = element.find("Resolution")
    if resolution is None or (resolution.get("units") or "uVperLsb").lower() != "uvperlsb":
        raise ValueError(f"{where}, Resolution: missing, or not in uVperLsb.")
    step_mv = parse_step(resolution.text, f"{where}, Resolution") * 1e-3
    rate_element = element.find("SampleRate")
    if rate_element is None or (rate_element.get("units") or "Hz").lower() != "hz":
        raise ValueError(f"{where}, SampleRate: missing, or not in Hz.")
    rate = parse_rate(rate_element.text, f"{where}, SampleRate")
    signal = to_signal([row * step_mv for row in rows], where)
    return Record(signal, rate, names, warnings=warnings)


def _cardiosoft_patient(root):
    patient = root.find("PatientInfo")
    if patient is None:
        return None, None
    age_element = patient.find("Age")
    age = None if age_element is None else age_in_years(age_element.text, age_element.get("units"))
    if age is None:
        days = (patient.find("BirthDateTime"), root.find("ObservationDateTime"))
        age = age_at(*(day and [day.findtext(part) for part in ("Year", "Month", "Day")] for day in days))
    return age, parse_sex(patient.findtext("Gender"))


def _add_cardiosoft_beats(strip, record):
    """Add the beats that the device found in a strip: a <Time> in ms, its <BeatClass>, and so on."""
    for results in strip.iterfind("ArrhythmiaResults"):
        times, classes = results.findall("Time"), results.findall("BeatClass")
        if len(times) != len(classes):
            record.warnings.append(f"{len(times)} times of beats, {len(classes)} classes; beats left out.")
            continue
        for time, beat_class in zip(times, classes):
            _add_beat(time.text, (beat_class.text or "").strip()[:40], record)
