"""A recording in each format, 3 s of leads I and II, with a patient planted wherever the format has room for one.

Every text that is planted holds `MARKER`: a name, an identifier, a place, a physician, free text within a statement. Dates
and times are those of `Planted.dates` and `times`.
"""

import dataclasses
import functools
import io
import struct
import zipfile

import numpy as np
import pytest
import scipy.io
from test_dicom_reader import PATIENT as DICOM_PATIENT
from test_dicom_reader import channel, coded, dicom, group
from test_edf_reader import lists
from test_edf_reader import signal as edf_signal
from test_edf_reader import write as write_edf
from test_ishne_reader import ishne
from test_scp_reader import leads as scp_leads
from test_scp_reader import rhythm, scp, tag
from test_scp_reader import two_leads as scp_sections
from wfdb_files import annotation_words, note, write_record
from xml_ecg_files import aecg, annotation, cardiosoft, diagnosis, muse, sequence_set, sierra, xli

from anyecg_hf.simulate import simulate_record

MARKER = "PLANTED"  # in any case
RATE, SECONDS = 500, 3
STATED = {"sampling_rate": RATE, "lead_names": ["I", "II"], "units": "mV"}
FINDING = f"Sinus rhythm, as seen by {MARKER} before"  # free text that signs nothing: no filter finds it


@dataclasses.dataclass
class Planted:
    """Files of one record, and what of them is the patient's.

    Args:
        files: `{name: bytes}`; the first is the one to read.
        hidden: bytes that have to be in one of the files, else the test tests nothing; `MARKER` is looked for anyway.
        dates: `(year, month, day)` of birth and recording.
        times: of day, as texts.
        stated: what the caller has to say to `read_record`.
        is_free_text_kept: whether statements, comments or notes hold `MARKER`, which is their right.
    """

    files: dict
    hidden: list = dataclasses.field(default_factory=list)
    dates: tuple = ()
    times: tuple = ()
    stated: dict = dataclasses.field(default_factory=dict)
    is_free_text_kept: bool = False

    def put_into(self, folder):
        """Write the files and return the path to read."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder / next(iter(self.files))


@functools.cache
def steps():
    """Return leads I and II in steps of 5 microvolt, int `(2, samples)`."""
    record = simulate_record(3, sampling_rate=RATE, duration_seconds=SECONDS, lead_names=["I", "II"])
    return np.rint(record.signal * 200).astype(int)


def rows():
    return dict(zip(("I", "II"), steps()))


def spellings(year, month, day):
    """Return a date as formats and people write it."""
    name = "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC".split()[month - 1]
    numbers = [(year, month, day), (day, month, year), (month, day, year)]
    found = [
        mark.join(f"{number:02d}" for number in each) for each in numbers for mark in ("-", "/", ".", "", " ", ", ")
    ]
    return [*found, f"{day:02d}-{name}-{year}", f"{name.title()} {day}, {year}", f"{day} {name.title()} {year}"]


# WFDB


def wfdb(folder, *, comments=()):
    """A record of which the check sum does not fit and a signal is left out, so that there are warnings."""
    path = write_record(folder, steps().tolist() + [[0] * (RATE * SECONDS)], leads=("I", "II", "RESP"), gain="200/mV")
    lines = path.read_text().splitlines()
    lines[0] = f"{MARKER} 3 {RATE} {RATE * SECONDS} 11:22:33 16/03/2003"
    fields = lines[1].split()
    lines[1] = " ".join([*fields[:6], str((int(fields[6]) + 1) & 0xFFFF), *fields[7:]])
    lines[3] = lines[3].replace("/mV", "/l")
    path.write_text("\n".join([*lines, *comments]) + "\n")
    return {"r.hea": path.read_bytes(), "r.dat": (folder / "r.dat").read_bytes()}


def wfdb_with_comments(folder):
    comments = [
        "# Age: 59",
        "# Sex: F",
        f"# Name: Doe-{MARKER}, Jane",
        f"# Patient ID: {MARKER}-4711",
        "# Date of birth: 17/03/1944",
        f"# Dx: 426783006, {FINDING}",
        f"# Technician: {MARKER}",
    ]
    beats = annotation_words((1, 100)) + note(f"told by {MARKER}".encode()) + annotation_words((22, 50))
    beats += note(f"called Dr. {MARKER}".encode()) + annotation_words((0, 0))
    files = {**wfdb(folder, comments=comments), "r.atr": beats}
    return Planted(
        files, [b"16/03/2003", b"17/03/1944"], ((1944, 3, 17), (2003, 3, 16)), ("11:22:33",), is_free_text_kept=True
    )


def wfdb_with_damaged_annotations(folder):
    beats = annotation_words((1, 100)) + note(f"told by {MARKER}".encode()) + annotation_words((55, 1))
    return Planted({**wfdb(folder), "r.atr": beats}, dates=((2003, 3, 16),), is_free_text_kept=True)


def wfdb_of_segments(folder):
    """A variable layout whose first segment has another length than the record says: the warning names its file."""
    single = wfdb(folder)
    layout = f"layout 2 {RATE} 0\n~ 0 200/mV 16 0 0 0 0 I\n~ 0 200/mV 16 0 0 0 0 II\n# {MARKER}\n"
    record = f"{MARKER}/2 2 {RATE} {RATE * SECONDS - 3} 11:22:33 16/03/2003\nlayout 0\nr {RATE * SECONDS - 3}\n"
    record += f"# Name: {MARKER}\n"
    return Planted(
        {"many.hea": record.encode(), "layout.hea": layout.encode(), **single},
        [b"16/03/2003"],
        ((2003, 3, 16),),
        ("11:22:33",),
        is_free_text_kept=True,
    )


# Binary formats


def edf(folder):
    marks = [f"+{second}\x14\x14\0+{second}.5\x150.5\x14{FINDING}\x14\0".encode() for second in range(SECONDS)]
    limits = {"physical": (-163840, 163835), "digital": (-32768, 32767)}
    signals = [edf_signal(name, data=row.reshape(SECONDS, -1), **limits) for name, row in rows().items()]
    signals.append(edf_signal("EEG Fpz", data=steps()[0].reshape(SECONDS, -1)))  # left out
    path = write_edf(
        folder / "a.edf",
        [*signals, lists(*marks)],
        kind="EDF+C",
        patient=f"{MARKER}-4711 F 17-MAR-1944 Doe_{MARKER}",
        recording=f"Startdate 16-MAR-2003 {MARKER}-2003 Dr_{MARKER} Device_{MARKER}",
        date="16.03.03",
    )
    hidden = [b"17-MAR-1944", b"16-MAR-2003", b"16.03.03", b"20.35.00"]
    dates = ((1944, 3, 17), (2003, 3, 16))
    return Planted({"a.edf": path.read_bytes()}, hidden, dates, ("20.35.00", "20:35:00"), is_free_text_kept=True)


def plain_edf(folder):
    """EDF, whose two fields are free text."""
    limits = {"physical": (-163840, 163835), "digital": (-32768, 32767)}
    signals = [edf_signal(name, data=row.reshape(SECONDS, -1), **limits) for name, row in rows().items()]
    texts = {"patient": f"Jane Doe-{MARKER} born 17.03.1944", "recording": f"Holter, Dr. {MARKER}"}
    path = write_edf(folder / "a.edf", signals, count=SECONDS + 1, date="16.03.03", **texts)  # ends early
    return Planted({"a.edf": path.read_bytes()}, [b"17.03.1944", b"16.03.03"], ((1944, 3, 17), (2003, 3, 16)))


def dicom_file(folder, **how):
    patient = [
        *DICOM_PATIENT,
        (0x0008, 0x0030, "TM", "112233"),
        (0x0008, 0x0080, "LO", f"Hospital {MARKER}"),
        (0x0008, 0x1050, "PN", f"Performer^{MARKER}"),
        (0x0008, 0x1060, "PN", f"Reader^{MARKER}"),
        (0x0010, 0x21B0, "LT", f"History of {MARKER}"),
        (0x0010, 0x4000, "LT", f"Comments on {MARKER}"),
    ]
    texts = [FINDING, f"Confirmed by Dr. {MARKER}", f"{MARKER} on 16-MAR-2003 at 11:22"]
    annotations = [[(0x0040, 0xA0B0, "US", (1, 0)), (0x0070, 0x0006, "ST", text)] for text in texts]
    annotations += [[(0x0040, 0xA168, "SQ", coded(f"1 {MARKER}", "SCT", f"Code of {MARKER}"))]]
    annotations += [[(0x0040, 0xA132, "UL", 700), (0x0070, 0x0006, "ST", f"{MARKER} pressed the button")]]
    channels = [channel("2:1", sensitivity="5"), channel("2:2", sensitivity="5"), channel("2:3", sensitivity=None)]
    samples = np.concatenate([steps(), steps()[:1]]).T  # the third is not calibrated
    data = dicom([group(samples, channels)], before=sorted(patient), annotations=annotations, **how)
    hidden = [] if how else [b"19440317", b"20030316", b"112233"]
    dates = ((1944, 3, 17), (2003, 3, 16))
    return Planted({"ecg.dcm": data}, hidden, dates, ("112233", "11:22:33"), is_free_text_kept=True)


def scp_file(folder):
    section_1 = b"".join(
        [
            tag(26, struct.pack("<BBB", 11, 22, 33)),
            tag(30, f"Comment on {MARKER}\0".encode()),
            tag(21, f"Reader {MARKER}\0".encode()),
        ]
    )
    patient = section_1 + scp_sections()[1]
    texts = scp_statements(FINDING.encode() + b"\0", f"Confirmed by Dr. {MARKER}".encode())
    codes = scp_statements(f"\1NSR\0seen by {MARKER}\0".encode(), f"\2{FINDING}".encode())
    last = RATE * SECONDS
    sections = scp_sections(
        s1=patient,
        s3=scp_leads((1, last, 1), (1, last, 2)),
        s6=rhythm(*steps(), nanovolt=5000),
        s8=texts,
        s11=codes,
    )
    hidden = [struct.pack("<HBB", 1944, 3, 17), struct.pack("<HBB", 2003, 3, 16), b"Doe-Planted"]
    dates = ((1944, 3, 17), (2003, 3, 16))
    return Planted({"a.scp": scp(sections)}, hidden, dates, ("11:22:33",), is_free_text_kept=True)


def scp_statements(*values):
    packed = b"".join(struct.pack("<BH", number, len(value)) + value for number, value in enumerate(values, 1))
    return struct.pack("<BHBBBBBB", 1, 2003, 3, 16, 11, 22, 33, len(values)) + packed


def ishne_file(folder):
    data = ishne(steps().T, lead_codes=(5, 6), nanovolts=(5000, 5000), rate=RATE, quality=(1, 4), num_samples=7)
    hidden = [struct.pack("<3h", 17, 3, 1944), struct.pack("<3h", 16, 3, 2003), b"text with Name-Planted"]
    return Planted({"a.ecg": data}, hidden, ((1944, 3, 17), (2003, 3, 16)))


# XML


def aecg_file(folder):
    texts = (FINDING, f"Confirmed by Dr. {MARKER}", "Compared with 18-MAY-2020 15:48:11")
    inner = "".join(annotation("MDC_ECG_INTERPRETATION_STATEMENT", f"<value>{text}</value>") for text in texts)
    rhythm_code = annotation("MDC_ECG_RHY", f'<value code="by Dr. {MARKER}" displayName="Rhythm of {MARKER}"/>')
    marks = rhythm_code + annotation("MDC_ECG_INTERPRETATION", "", inner=inner)
    text = aecg(sets=[sequence_set(rows())], annotations=marks)
    return Planted(
        {"a.xml": text.encode()},
        [b"19510101", b"20200518154811"],
        ((1951, 1, 1), (2020, 5, 18)),
        ("154811", "15:48:11"),
        is_free_text_kept=True,
    )


def sierra_file(folder):
    text = sierra(xli(steps()), names=("I", "II"), milliseconds=1000 * SECONDS).decode("utf-16")
    text = text.replace("<leftstatement>Sinus rhythm", f"<leftstatement>{FINDING}")
    text = text.replace("<statementcode>SR", f"<statementcode>by {MARKER}")
    return Planted(
        {"a.xml": text.encode("utf-16")},
        [text_in_utf16("1951-01-01"), text_in_utf16("2020-05-18"), text_in_utf16(MARKER)],
        ((1951, 1, 1), (2020, 5, 18)),
        ("15:48:11",),
        is_free_text_kept=True,
    )


def text_in_utf16(text):
    return text.encode("utf-16-le")


def muse_file(folder):
    words = diagnosis([FINDING], [f"Confirmed by Dr. {MARKER}"], ["Compared with 18-MAY-2020 15:48"])
    text = muse(rows(), diagnosis=words, lead={"checksum": 1})
    text = text.replace("<LocationName>", f"<AcquisitionTime>15:48:11</AcquisitionTime><OverreaderLastName>{MARKER}"
                        "</OverreaderLastName><LocationName>")  # fmt: skip
    return Planted(
        {"a.xml": text.encode("latin-1")},
        [b"01-02-1951", b"05-18-2020", b"15:48:11"],
        ((1951, 1, 2), (2020, 5, 18)),
        ("15:48:11",),
        is_free_text_kept=True,
    )


def cardiosoft_file(folder):
    text = cardiosoft(rows(), count=RATE * SECONDS + 1).replace("Normal sinus rhythm", FINDING)
    text = text.replace("<BeatClass>dominant", f"<BeatClass>told by {MARKER}")
    return Planted(
        {"a.xml": text.encode("latin-1")},
        [b"<Year>1951<", b"<Year>2020<"],
        ((1951, 1, 1), (2020, 5, 18)),
        is_free_text_kept=True,
    )


# Tables and arrays


def csv_file(folder):
    lines = [
        f"# Patient: {MARKER}, born 1951-01-01",
        "# Recorded 2020-05-18 15:48:11",
        "time (s),I (mV),II (mV),note (x)",
    ]
    lines += [f"{index / RATE:.3f},{one / 200},{two / 200},0" for index, (one, two) in enumerate(steps().T.tolist())]
    text = "\n".join([*lines, f"{MARKER}"]) + "\n"  # the last row is cut
    return Planted(
        {"a.csv": text.encode()}, [b"1951-01-01", b"2020-05-18"], ((1951, 1, 1), (2020, 5, 18)), ("15:48:11",)
    )


def apple_csv(folder):
    head = f"""Name,Jane {MARKER}
Date of Birth,"Jan 1, 1951"
Recorded Date,2020-05-18 15:48:11 -0400
Classification,{FINDING.replace(",", "")}
Symptoms,{MARKER}
Software Version,1.51
Device,"Watch of {MARKER}"
Sample Rate,500 hertz


Lead,Lead I
Unit,µV

"""
    text = head + "\n".join(str(5 * value) for value in steps()[0].tolist()) + "\n"
    return Planted(
        {"ecg.csv": text.encode()},
        [b"Jan 1, 1951", b"2020-05-18 15:48:11"],
        ((1951, 1, 1), (2020, 5, 18)),
        ("15:48:11",),
        is_free_text_kept=True,
    )


def npz_file(folder):
    file = io.BytesIO()
    extra = {
        f"name of {MARKER}": np.array(f"Jane {MARKER}"),
        "birth": np.array("1951-01-01"),
        "day": np.array([20200518]),
    }
    np.savez(file, signal=steps() / 200, notes=np.array([MARKER], dtype=object), **extra)
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = f"archive of {MARKER}".encode()
    hidden = [text.encode("utf-32-le") for text in (MARKER, "1951-01-01")] + [struct.pack("<q", 20200518)]
    return Planted({"a.npz": file.getvalue()}, hidden, ((1951, 1, 1), (2020, 5, 18)), stated=STATED)


def hdf5_file(folder):
    h5py = pytest.importorskip("h5py", reason='HDF5 needs h5py: pip install "anyecg-hf[formats]"')
    file = io.BytesIO()
    with h5py.File(file, "w") as archive:
        archive[f"{MARKER}/tracings"] = steps() / 200
        archive[f"{MARKER}/tracings"].attrs["name"] = f"Jane {MARKER}"
        archive.attrs["birth"], archive.attrs["recorded"] = "1951-01-01", "2020-05-18 15:48:11"
        archive[f"id of {MARKER}"] = np.array([4711])
        archive["report"] = FINDING
    hidden, dates = [b"1951-01-01", b"2020-05-18"], ((1951, 1, 1), (2020, 5, 18))
    return Planted({"a.h5": file.getvalue()}, hidden, dates, ("15:48:11",), stated=STATED)


def mat_file(folder):
    file = io.BytesIO()
    fields = {"sex": "Female", "age": 69, "data": np.tile(steps(), (6, 1)) / 200, "name": MARKER, "birth": "1951-01-01"}
    scipy.io.savemat(file, {"ECG": fields, f"of_{MARKER}": "2020-05-18"})
    data = file.getvalue()
    data = b"MATLAB 5.0 MAT-file, of ".ljust(24) + f"{MARKER} on 2020-05-18 15:48:11".ljust(92).encode() + data[116:]
    hidden, dates = [b"1951-01-01", b"2020-05-18"], ((1951, 1, 1), (2020, 5, 18))
    return Planted({"a.mat": data}, hidden, dates, ("15:48:11",))


BUILDERS = {
    "WFDB": wfdb_with_comments,
    "WFDB, annotations damaged": wfdb_with_damaged_annotations,
    "WFDB of segments": wfdb_of_segments,
    "EDF+": edf,
    "EDF": plain_edf,
    "DICOM": dicom_file,
    "DICOM, implicit": functools.partial(dicom_file, syntax="1.2.840.10008.1.2"),
    "HL7 aECG": aecg_file,
    "Philips Sierra XML": sierra_file,
    "GE MUSE XML": muse_file,
    "GE CardioSoft XML": cardiosoft_file,
    "SCP-ECG": scp_file,
    "ISHNE": ishne_file,
    "CSV": csv_file,
    "Apple Watch CSV": apple_csv,
    "NumPy": npz_file,
    "HDF5": hdf5_file,
    "CPSC-2018 MAT": mat_file,
}
