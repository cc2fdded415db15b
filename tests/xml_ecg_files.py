"""Small XML recordings, written from the specifications, with a patient in them whose name must never come out."""

import base64
import struct
import zlib

import numpy as np

SECRET = "PLANTED"  # stands for names, identifiers, places and physicians in every file below
BIRTH_YEAR = "1951"
SIGNALS = {"I": [4, -8, 12, 300], "II": [10, 0, -20, -30000], "V1": [0, 1, 2, 3]}  # steps; 4 samples


def base64_of(samples):
    return base64.b64encode(np.asarray(samples, "<i2").tobytes()).decode()


# HL7 aECG


def aecg(*, sets=None, series_code="RHYTHM", annotations="", age='<value value="69" unit="a"/>', doctype=""):
    """A document with one rhythm series and a representative beat."""
    return f"""<?xml version="1.0" encoding="UTF-8"?>{doctype}
<AnnotatedECG xmlns="urn:hl7-org:v3" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">
 <id root="{SECRET}"/><effectiveTime><center value="20200518154811"/></effectiveTime>
 <componentOf><timepointEvent><componentOf><subjectAssignment><subject><trialSubject><id extension="{SECRET}"/>
  <subjectDemographicPerson><name>{SECRET}</name><administrativeGenderCode code="F"/>
  <birthTime value="{BIRTH_YEAR}0101"/></subjectDemographicPerson></trialSubject></subject></subjectAssignment></componentOf>
  </timepointEvent></componentOf>
 <controlVariable><relatedObservation><code code="21612-7"/>{age}</relatedObservation></controlVariable>
 <component><series><code code="{series_code}"/>
  {"".join(sets if sets is not None else [sequence_set()])}
  <subjectOf><annotationSet><author><assignedPerson><name>{SECRET}</name></assignedPerson></author>
   {annotations}</annotationSet></subjectOf>
  <derivation><derivedSeries><code code="REPRESENTATIVE_BEAT"/>{sequence_set()}</derivedSeries></derivation>
 </series></component>
</AnnotatedECG>"""


def sequence_set(
    leads=SIGNALS, *, head='value="20200518154811.000"', increment='value="0.002" unit="s"', scale='value="5" unit="uV"',
    origin='<origin value="0" unit="uV"/>', code="TIME_ABSOLUTE"
):  # fmt: skip
    rows = "".join(
        f'<component><sequence><code code="MDC_ECG_LEAD_{name.upper()}"/><value xsi:type="SLIST_PQ">{origin}'
        f"<scale {scale}/><digits>{' '.join(map(str, values))}</digits></value></sequence></component>"
        for name, values in leads.items()
    )
    return f"""<component><sequenceSet><component><sequence><code code="{code}"/><value xsi:type="GLIST_TS">
     <head {head}/><increment {increment}/></value></sequence></component>{rows}</sequenceSet></component>"""


def annotation(code, value, *, boundary="", inner=""):
    support = (
        f"<support><supportingROI><component><boundary>{boundary}</boundary></component></supportingROI></support>"
    )
    return f'<component><annotation><code code="{code}"/>{value}{support if boundary else ""}{inner}</annotation></component>'


# GE MUSE


def muse(
    leads=SIGNALS, *, kind="Rhythm", lead=None, base="500", exponent="0", diagnosis="", patient=None, doctype=None
):
    """A document with a median and a rhythm; `lead` replaces parts of every lead."""
    doctype = '<!DOCTYPE RestingECG SYSTEM "restecg.dtd">' if doctype is None else doctype
    patient = "<PatientAge>69</PatientAge><AgeUnits>YEARS</AgeUnits>" if patient is None else patient
    rows = "".join(muse_lead(name, values, **(lead or {})) for name, values in leads.items())
    return f"""<?xml version="1.0" encoding="ISO-8859-1"?>{doctype}
<RestingECG><PatientDemographics><PatientID>{SECRET}</PatientID>{patient}<Gender>FEMALE</Gender>
  <DateofBirth>01-02-{BIRTH_YEAR}</DateofBirth><PatientLastName>{SECRET} M\xfcller</PatientLastName></PatientDemographics>
 <TestDemographics><AcquisitionDate>05-18-2020</AcquisitionDate><LocationName>{SECRET}</LocationName></TestDemographics>
 {diagnosis}
 <QRSTimesTypes><QRS><Number>1</Number><Type>0</Type><Time>4</Time></QRS></QRSTimesTypes>
 <Waveform><WaveformType>Median</WaveformType><SampleBase>500</SampleBase>{muse_lead("I", [9, 9])}</Waveform>
 <Waveform><WaveformType>{kind}</WaveformType><NumberofLeads>{len(leads)}</NumberofLeads>
  <SampleType>CONTINUOUS_SAMPLES</SampleType><SampleBase>{base}</SampleBase><SampleExponent>{exponent}</SampleExponent>
  {rows}</Waveform></RestingECG>"""


def muse_lead(name, values, *, step="4.88", unit="MICROVOLTS", count=None, checksum=None, more=""):
    data = np.asarray(values, "<i2").tobytes()
    units = f"<LeadAmplitudeUnits>{unit}</LeadAmplitudeUnits>" if unit else ""
    return f"""<LeadData><LeadByteCountTotal>{2 * (count or len(values))}</LeadByteCountTotal>
   <LeadSampleCountTotal>{count or len(values)}</LeadSampleCountTotal>
   <LeadAmplitudeUnitsPerBit>{step}</LeadAmplitudeUnitsPerBit>{units}<LeadID>{name}</LeadID>{more}
   <LeadDataCRC32>{zlib.crc32(data) if checksum is None else checksum}</LeadDataCRC32>
   <WaveFormData>{base64.b64encode(data).decode()}
   </WaveFormData></LeadData>"""


def diagnosis(*lines, name="Diagnosis"):
    """Statements of MUSE: each line is a list of parts; `"DELETED"` before a part marks it so."""
    parts = []
    for line in lines:
        for position, part in enumerate(line):
            flags = ["ENDSLINE"] if position == len(line) - 1 else []
            flags += ["DELETED"] if part.startswith("DELETED") else []
            marks = "".join(f"<StmtFlag>{flag}</StmtFlag>" for flag in flags)
            parts.append(f"<DiagnosisStatement>{marks}<StmtText>{part}</StmtText></DiagnosisStatement>")
    return f"<{name}><Modality>RESTING</Modality>{''.join(parts)}</{name}>"


# GE CardioSoft


def cardiosoft(
    leads=SIGNALS, *, strip=None, count=4, resolution='<Resolution units="uVperLsb">5</Resolution>', more=""
):
    rows = "".join(f'<WaveformData lead="{name}">{",".join(map(str, v))}</WaveformData>' for name, v in leads.items())
    strip = (
        strip
        or f"""<StripData><NumberOfLeads>{len(leads)}</NumberOfLeads><SampleRate units="Hz">500</SampleRate>
  <ChannelSampleCountTotal>{count}</ChannelSampleCountTotal>{resolution}{rows}
  <ArrhythmiaResults><Time units="ms">4</Time><BeatClass>dominant</BeatClass></ArrhythmiaResults></StripData>"""
    )
    return f"""<?xml version="1.0" encoding="ISO8859-1" ?>
<CardiologyXML><ObservationType>RestECG</ObservationType>
 <ObservationDateTime><Day>18</Day><Month>5</Month><Year>2020</Year></ObservationDateTime>
 <ClinicalInfo><Technician><FamilyName>{SECRET}</FamilyName></Technician></ClinicalInfo>
 <PatientInfo><PID>{SECRET}</PID><Name><FamilyName>{SECRET}</FamilyName></Name><Gender>FEMALE</Gender>
  <BirthDateTime><Day>1</Day><Month>1</Month><Year>{BIRTH_YEAR}</Year></BirthDateTime></PatientInfo>
 <Interpretation><Diagnosis><DiagnosisText>Normal sinus rhythm</DiagnosisText></Diagnosis></Interpretation>
 <RestingECGMeasurements><MedianSamples><SampleRate units="Hz">500</SampleRate></MedianSamples></RestingECGMeasurements>
 {strip}{more}</CardiologyXML>"""


# Philips Sierra

TWELVE = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")


def sierra(data, *, names=TWELVE, milliseconds=8, waveform=None, age=None, extra="", text=None):
    """A document with waveforms of 500 Hz at 5 microvolt a step; `data` are the bytes that base64 is made of."""
    waveform = waveform or (
        f'dataencoding="Base64" compression="XLI" numberofleads="{len(names)}" leadlabels="{" ".join(names)}" '
        f'durationperchannel="{milliseconds}" samplespersecond="500" resolution="5" signaloffset="0" '
        'signalsigned="True" bitspersample="16"'
    )
    age = age or f'<age defaultage="50"><dateofbirth>{BIRTH_YEAR}-01-01</dateofbirth></age>'
    return f"""<?xml version="1.0" encoding="utf-16"?>
<restingecgdata xmlns="http://www3.medical.philips.com"><documentinfo><documentname>{SECRET}</documentname></documentinfo>
 <dataacquisition date="2020-05-18" time="15:48:11"><acquirer><institutionname>{SECRET}</institutionname></acquirer>
  <signalcharacteristics><samplingrate>500</samplingrate><signalresolution>5</signalresolution>{extra}
  </signalcharacteristics></dataacquisition>
 <patient><generalpatientdata><patientid>{SECRET}</patientid><name><lastname>{SECRET}</lastname></name>{age}
  <sex>Female</sex></generalpatientdata></patient>
 <interpretations><interpretation><mdsignatureline>Confirmed by: {SECRET}</mdsignatureline>
  <confirmingclinician>{SECRET}</confirmingclinician><severity code="ON">- OTHERWISE NORMAL ECG -</severity>
  <statement><statementcode>SR</statementcode><leftstatement>Sinus rhythm</leftstatement>
   <rightstatement>V-rate 50-99</rightstatement></statement></interpretation></interpretations>
 <waveforms><parsedwaveforms {waveform}>{base64.b64encode(data).decode() if text is None else text}</parsedwaveforms>
  <repbeats><repbeat leadname="I"/></repbeats></waveforms></restingecgdata>""".encode("utf-16")


def xli(rows, *, ends=True):
    """Encode rows of integers as XLI, the whole of it: second differences, bytes split, LZW."""
    return b"".join(xli_chunk(*second_differences(row), ends=ends) for row in rows)


def second_differences(row):
    """Return `(bytes to compress, first second difference)` of a row."""
    row = np.asarray(row, np.int64)
    second = -np.diff(row, 2)  # of samples 2, 3 ...
    stored = np.concatenate([row[:2], second[1:] + 64, [64]])[: len(row)].astype(">i2").view(np.uint8).reshape(-1, 2)
    return stored[:, 0].tobytes() + stored[:, 1].tobytes(), int(second[0]) if len(second) else 0


def xli_chunk(expanded, first, *, ends=True):
    codes = lzw_codes(expanded) + ([1023] if ends else [])
    bits = "".join(f"{code:010b}" for code in codes)
    data = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    return struct.pack("<ihh", len(data), 1, first) + data


def lzw_codes(data):
    table, codes, current = {bytes([byte]): byte for byte in range(256)}, [], b""
    for byte in data:
        longer = current + bytes([byte])
        if longer in table:
            current = longer
            continue
        codes.append(table[current])
        if len(table) < 1023:
            table[longer] = len(table)
        current = bytes([byte])
    return codes + [table[current]]


def stored_limb_leads(rows):
    """Return twelve rows as Sierra stores them: of III, aVR, aVL and aVF what the equations leave over."""
    i, ii, iii, avr, avl, avf, *chest = (np.asarray(row) for row in rows)
    left_over = [ii - i - iii, -avr - (i + ii) // 2, (i - iii) // 2 - avl, (ii + iii) // 2 - avf]
    return [i, ii, *left_over, *chest]
