"""`Record`, one recording of one patient, and `read_record(path)`, which reads it from a file. WFDB for now."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from .wfdb_reader import read_wfdb

OLDEST_AGE = 120.0
AGE_OVER_89 = 90.0  # what stands here for "over 89", which PTB-XL writes as 300
_DATA_SUFFIXES = {".dat", ".mat"}  # of a path that names the data file of a WFDB record
_AGE = re.compile(r"<?\bage\b>?\s*[:=]\s*([^\s<,;]+)", re.IGNORECASE)
_SEX = re.compile(r"<?\b(?:sex|gender)\b>?\s*[:=]\s*([^\s<,;]+)", re.IGNORECASE)
_MIT_BIH = re.compile(r"(-?\d+)\s+([MF?])\b")  # "69 M 1085 1629 x1": age, sex, numbers of the recording
_DIAGNOSES = re.compile(r"dx\s*:\s*(.*)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


@dataclasses.dataclass
class Record:
    """One recording of one patient.

    Args:
        signal (`np.ndarray` of shape `(num_leads, num_samples)`): float32, in `units`; NaN where there is no value.
        sampling_rate (`float`): Hz.
        lead_names (`list[str]`): one per row; standard names where they can be told, else as in the file (`"RESP"`).
        units (`str`): `"mV"` from `read_record`.
        record_name (`str`, *optional*): for messages and results.
        age (`float`, *optional*): years. 90 stands for "over 89" (300 in PTB-XL); `None`: not stated, or not 0 to 120.
        sex (`str`, *optional*): `"male"`, `"female"` or `None`.
        diagnosis_codes (`list[str]`): as in the file (SNOMED CT in the Challenge sets).
        comments (`list[str]`): of the header, word for word.
        warnings (`list[str]`): what is doubtful about the record, or was left out.
    """

    signal: np.ndarray
    sampling_rate: float
    lead_names: list[str]
    units: str = "mV"
    record_name: str | None = None
    age: float | None = None
    sex: str | None = None
    diagnosis_codes: list[str] = dataclasses.field(default_factory=list)
    comments: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def duration_seconds(self):
        """Length of the recording in seconds."""
        return self.signal.shape[1] / self.sampling_rate


def read_record(path):
    """Return the `Record` in a file: signal in mV with NaN for "no value", rate, lead names, age, sex, diagnosis codes.

    WFDB, single-segment, all storage formats. Signals that are no voltage are left out, files that end early are read
    as far as they go; `record.warnings` says so. Data files are read from the record's folder only.

    Args:
        path (`str` or `os.PathLike`): with or without suffix: `"A0001"`, `"A0001.hea"`, `"A0001.mat"`, `"100.dat"`.

    Raises:
        ValueError: the files are damaged, contradictory or of an unknown kind.
        OSError: a file is missing, unreadable, or no regular file.
        TypeError: `path` is no path.
    """
    if not isinstance(path, str) and not hasattr(path, "__fspath__"):
        raise TypeError(f"{path!r} is no path; pass a str or pathlib.Path, for instance read_record('A0001.hea').")
    header = _find_header(Path(path))
    content = read_wfdb(header)
    return Record(
        signal=content.signal,
        sampling_rate=content.sampling_rate,
        lead_names=content.lead_names,
        record_name=header.stem,
        **parse_comments(content.comments),
        warnings=content.warnings,
    )


def _find_header(path):
    """Return the header file of the WFDB record that `path` names."""
    candidates = [path] if path.suffix == ".hea" else [path.with_name(path.name + ".hea")] if path.name else []
    if path.suffix in _DATA_SUFFIXES:
        candidates.append(path.with_suffix(".hea"))
    for candidate in candidates:
        if candidate.exists():
            return candidate
    if path.is_file() and path.suffix != ".hea":
        raise ValueError(
            f"{path}: only WFDB records are read, and there is no header beside this file ({candidates[-1].name})."
        )
    raise FileNotFoundError(f"{path}: no such record; looked for {', '.join(map(str, candidates)) or 'a name'}.")


def parse_comments(comments):
    """Return `age`, `sex`, `diagnosis_codes` and `comments` from the comment lines of a header.

    Understood: the Challenge's `Age: 74`, `Sex: Female`, `Dx: 164889003,59118001`; PhysioNet's `<age>: 81  <sex>: F`;
    MIT-BIH's first line, `69 M 1085 1629 x1`. "NaN", "Unknown", "?" and -1 are "not stated".
    """
    text = "\n".join(comments)
    age, sex = _AGE.search(text), _SEX.search(text)
    age, sex = age and age[1], sex and sex[1]
    mit_bih = _MIT_BIH.match(comments[0]) if comments else None
    if mit_bih and age is None and sex is None:
        age, sex = mit_bih.groups()
    codes = [found[1] for found in map(_DIAGNOSES.fullmatch, comments) if found]
    codes = [
        code for line in codes for code in re.split(r"[\s,]+", line) if code and code.lower() not in ("unknown", "nan")
    ]
    return {"age": parse_age(age), "sex": parse_sex(sex), "diagnosis_codes": codes, "comments": list(comments)}


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
