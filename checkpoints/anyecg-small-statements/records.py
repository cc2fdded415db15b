"""`Record`, one recording of one patient, and `read_record(path)`, which reads it from a file of any format."""

import dataclasses
import numbers
import re
from pathlib import Path

import numpy as np

from .signal_ops import HIGHEST_RATE, implausible_amplitude

SIMULATED = "simulated"  # the first comment of every simulated record; a picture of it says so
OLDEST_AGE = 120.0
AGE_OVER_89 = 90.0  # what stands here for "over 89", which PTB-XL writes as 300
_AGE = re.compile(r"<?\bage\b>?\s*[:=]\s*([^\s<,;]+)", re.IGNORECASE)
_SEX = re.compile(r"<?\b(?:sex|gender)\b>?\s*[:=]\s*([^\s<,;]+)", re.IGNORECASE)
_MIT_BIH = re.compile(r"(-?\d+)\s+([MF?])\b")  # "69 M 1085 1629 x1": age, sex, numbers of the recording
_DIAGNOSES = re.compile(r"dx\s*:\s*(.*)", re.IGNORECASE)
# A code is 426783006, I48.0, MDC_ECG_RHY_SINUS: digits or capitals. "Sinus" is a word.
_CODE = re.compile(r"(?=[^a-z]*$|.*\d)[\w.:+-]{1,40}", re.ASCII)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


@dataclasses.dataclass
class Annotation:
    """A mark on a recording: a beat, a change of rhythm, an event.

    Args:
        sample (`int`): where, counted from the first sample of `signal`; may lie outside a part that was read.
        symbol (`str`): the code of the format (`"N"`, `"V"`, `"+"` in WFDB).
        note (`str`): what is written with it (`"(AFIB"`). May be free text.
        duration_seconds (`float`, *optional*): how long it lasts, where the format says so (EDF+, aECG, DICOM).
    """

    sample: int
    symbol: str
    note: str = ""
    duration_seconds: float | None = None


@dataclasses.dataclass
class Record:
    """One recording of one patient. Names, identifiers and dates of the patient are not kept.

    Free text, which may hold any of these, is in `statements`, `comments` and the notes of `annotations` only: they are not
    printed with the record, and nothing in this package logs, stores or draws them.

    Args:
        signal (`np.ndarray` of shape `(num_leads, num_samples)`): float32, in `units`; NaN where there is no value.
        sampling_rate (`float`): Hz.
        lead_names (`list[str]`): one per row; standard names where they can be told, else as in the file (`"RESP"`).
        units (`str`): `"mV"` from `read_record`.
        record_name (`str`, *optional*): for messages and results: the file's name without suffix and folder.
        file_format (`str`, *optional*): what it was read from, a key of `anyecg_hf.file_formats.READERS`.
        age (`float`, *optional*): years. 90 stands for "over 89" (300 in PTB-XL); `None`: not stated, or not 0 to 120.
        sex (`str`, *optional*): `"male"`, `"female"` or `None`.
        diagnosis_codes (`list[str]`): as in the file (SNOMED CT in the Challenge sets); free text is no code.
        annotations (`list[Annotation]`): in the order of time.
        statements (`list[str]`): findings in words, as the device or a reader wrote them. Free text.
        comments (`list[str]`): of the header, word for word. Free text.
        warnings (`list[str]`): what is doubtful about the record, or was left out.
        quality (`np.ndarray` of shape `(num_leads, num_patches)`, *optional*): sums of `QualityFlag` that an extractor has
            found in this record before; it takes them as they are. `None` from `read_record`.
        restored, derived (`np.ndarray` of shape `(num_leads, num_samples)`, *optional*): True where a model made the sample;
            where it was computed from other limb leads. As the pipeline `ecg-reconstruction` gives them.
    """

    signal: np.ndarray
    sampling_rate: float
    lead_names: list[str]
    units: str = "mV"
    record_name: str | None = None
    file_format: str | None = None
    age: float | None = None
    sex: str | None = None
    diagnosis_codes: list[str] = dataclasses.field(default_factory=list)
    annotations: list[Annotation] = dataclasses.field(default_factory=list, repr=False)
    statements: list[str] = dataclasses.field(default_factory=list, repr=False)  # may name the patient: not in a log
    comments: list[str] = dataclasses.field(default_factory=list, repr=False)
    warnings: list[str] = dataclasses.field(default_factory=list)
    quality: np.ndarray | None = dataclasses.field(default=None, repr=False)
    restored: np.ndarray | None = dataclasses.field(default=None, repr=False)
    derived: np.ndarray | None = dataclasses.field(default=None, repr=False)

    @property
    def duration_seconds(self):
        """Length of the recording in seconds."""
        return self.signal.shape[1] / self.sampling_rate


@dataclasses.dataclass(frozen=True)
class Stated:
    """What the caller says about a file, each possibly `None`; a reader takes what its file does not say."""

    sampling_rate: float | None = None
    lead_names: tuple[str, ...] | None = None
    units: str | None = None
    record_index: int | None = None
    start_seconds: float = 0.0
    duration_seconds: float | None = None


def read_record(
    path,
    *,
    sampling_rate=None,
    lead_names=None,
    units=None,
    record_index=None,
    start_seconds=0.0,
    duration_seconds=None,
):
    """Return the `Record` in a file: signal in mV with NaN for "no value", rate, lead names, age, sex, findings, marks.

    The format is recognised by what is in the file; docs/formats.md lists them. Signals that are no voltage are left out,
    files that end early are read as far as they go; `record.warnings` says so. Files beside `path` are opened only
    where the format spreads a record over several, and from its own folder only.

    Args:
        path (`str` or `os.PathLike`): a file; for WFDB with or without suffix: `"A0001"`, `"A0001.hea"`, `"A0001.mat"`.
        sampling_rate (`float`, *optional*): Hz, where the file does not say it (NumPy, HDF5, some CSV).
        lead_names (sequence of `str`, *optional*): one per row, likewise.
        units (`str`, *optional*): `"mV"`, `"uV"`, `"V"` or `"nV"`, likewise.
        record_index (`int`, *optional*): which record of a file that holds several (HDF5), from 0.
        start_seconds, duration_seconds (`float`, *optional*): the part to read; of long recordings only this is loaded.

    Raises:
        ValueError: the files are damaged, contradictory or of an unknown kind; something that only the caller can know is
            missing, or the file says otherwise.
        ImportError: reading this format needs a package: `pip install anyecg-hf[formats]`.
        OSError: a file is missing, unreadable, or no regular file.
        TypeError: `path` is no path, `lead_names` one string, a part of the recording no number of seconds.
    """
    if not isinstance(path, str) and not hasattr(path, "__fspath__"):
        raise TypeError(f"{path!r} is no path; pass a str or pathlib.Path, for instance read_record('A0001.hea').")
    from .file_formats import READERS, find_file  # the readers make records

    if isinstance(lead_names, str):
        raise TypeError(f"lead_names is the single string {lead_names!r}; pass a list, one name per row.")
    names = None if lead_names is None else tuple(lead_names)
    stated = Stated(sampling_rate, names, units, record_index, start_seconds, duration_seconds)
    _check_part(stated)
    file, file_format = find_file(Path(path))
    reader = READERS[file_format]
    for name in ("sampling_rate", "lead_names", "units", "record_index"):
        if getattr(stated, name) is not None and name not in reader.stated:
            raise ValueError(f"{file}: {name} was passed, but {file_format} says it itself. Leave it out.")
    record = reader.read(file, stated)
    record.record_name, record.file_format = file.stem, file_format
    record.diagnosis_codes = [code for code in record.diagnosis_codes if _CODE.fullmatch(code)]
    folder = str(file.with_name("x"))[:-1]  # may be named after the patient; warnings become part of results
    record.warnings = [warning.replace(folder, "") for warning in record.warnings]
    doubt = implausible_amplitude(record.signal)
    record.warnings += [doubt] if doubt else []
    if record.sampling_rate > HIGHEST_RATE:
        record.warnings.append(
            f"sampling rate of {record.sampling_rate:g} Hz: above {HIGHEST_RATE:g}, so hardly an ECG's."
        )
    return record


def take_part(record, stated):
    """Cut `record` to the part that was asked for; for readers that have to load the whole."""
    start, stop = part_to_read(stated, record.sampling_rate, record.signal.shape[1])
    record.signal = record.signal[:, start:stop]
    for annotation in record.annotations:
        annotation.sample -= start
    return record


def part_to_read(stated, sampling_rate, num_samples):
    """Return first sample and end of the part that was asked for, of a recording that need not be loaded whole.

    Raises:
        ValueError: the part begins behind the recording's end, or is shorter than a sample.
    """
    first = stated.start_seconds * sampling_rate
    if first >= num_samples - 0.5:
        ends = num_samples / sampling_rate
        raise ValueError(f"start_seconds is {stated.start_seconds:g}, the recording ends at {ends:g} s.")
    start = round(first)
    wanted = num_samples if stated.duration_seconds is None else stated.duration_seconds * sampling_rate
    stop = num_samples if wanted >= num_samples - start else start + round(wanted)
    if stop <= start:
        raise ValueError(
            f"duration_seconds is {stated.duration_seconds:g}, less than a sample at {sampling_rate:g} Hz."
        )
    return start, stop


def _check_part(stated):
    for name in ("start_seconds", "duration_seconds"):
        seconds = getattr(stated, name)
        if not isinstance(seconds, (numbers.Real, type(None))):
            raise TypeError(f"{name} is {seconds!r} ({type(seconds).__name__}); pass a number of seconds.")
    if stated.start_seconds is None or not 0 <= stated.start_seconds < float("inf"):
        raise ValueError(f"start_seconds is {stated.start_seconds!r}; a number of seconds from 0 on is accepted.")
    if stated.duration_seconds is not None and not 0 < stated.duration_seconds < float("inf"):
        raise ValueError(f"duration_seconds is {stated.duration_seconds!r}; a number above 0, or None for all.")


def is_simulated(record):
    """Return whether a `Record`, or what else pipelines take for one, says of itself that it was simulated."""
    comments = record.get("comments") if isinstance(record, dict) else getattr(record, "comments", None)
    return any(str(comment).strip().lower().startswith(SIMULATED) for comment in comments or [])


def parse_comments(comments):
    """Return `age`, `sex`, `diagnosis_codes` and `comments` from the comment lines of a header.

    Understood: the Challenge's `Age: 74`, `Sex: Female`, `Dx: 164889003,59118001`; PhysioNet's `<age>: 81  <sex>: F`;
    MIT-BIH's first line, `69 M 1085 1629 x1`. "NaN", "Unknown", "?" and -1 are "not stated". A diagnosis in words is none
    of the codes; it is in the comments.
    """
    age, sex = find_age_and_sex(comments)
    lines = [found[1] for found in map(_DIAGNOSES.fullmatch, comments) if found]
    codes = [code for line in lines for part in line.split(",") for code in _codes_of(part)]
    return {"age": parse_age(age), "sex": parse_sex(sex), "diagnosis_codes": codes, "comments": list(comments)}


def find_age_and_sex(comments):
    """Return what the comment lines of a header say of age and sex, word for word, each possibly `None`."""
    text = "\n".join(comments)
    age, sex = _AGE.search(text), _SEX.search(text)
    age, sex = age and age[1], sex and sex[1]
    mit_bih = _MIT_BIH.match(comments[0]) if comments else None
    return mit_bih.groups() if mit_bih and age is None and sex is None else (age, sex)


def _codes_of(part):
    """Return the codes of one part of a list with commas: none where it is several words that are not all numbers."""
    words = [word for word in part.split() if word.lower() not in ("unknown", "nan")]
    return words if len(words) == 1 or all(map(str.isdecimal, words)) else []


def parse_age(age):
    """Return an age in years as a float: 300 becomes 90 ("over 89"); `None` if not stated, negative or above 120."""
    text = str(age).strip()
    years = float(text) if _NUMBER.fullmatch(text) else -1.0
    if years == 300:
        return AGE_OVER_89
    return years if 0 <= years <= OLDEST_AGE else None


def parse_sex(sex):
    """Return `"male"`, `"female"`, or `None` for anything but M, Male, F, Female (in any case)."""
    return {"m": "male", "male": "male", "f": "female", "female": "female"}.get(str(sex).strip().lower())
