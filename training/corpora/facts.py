"""What a corpus says about a record and its patient, as values of a row; what cannot be is null, and counted by kind.

`facts_of` returns the values and the kinds of what was left null or dropped, for the report of the build.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence

from anyecg_hf.records import AGE_OVER_89, find_age_and_sex, parse_age, parse_sex
from training.labels import is_normal, ptb_xl_statements, snomed_codes

from .sources import SourceRecord

NOT_STATED = {"", "nan", "none", "unknown", "n/a", "na", "?", "u"}
PLAUSIBLE = {"height": (30.0, 250.0), "weight": (1.0, 400.0)}  # cm, kg
SEX_OF_PTB_XL = {"0": "male", "0.0": "male", "1": "female", "1.0": "female"}
OVER_89 = "300"  # so PTB-XL writes ages over 89; other corpora mean nothing by it
NO_NUMBER = "snomed_codes: a part of Dx is no number"
AXES = {"LAD": "39732003", "ALAD": "39732003", "RAD": "47665007", "ARAD": "47665007"}  # heart_axis of PTB-XL
DISEASED = ("MI", "STTC", "CD", "HYP")  # the superclasses that are not NORM
_SNOMED = re.compile(r"\d{6,18}", re.ASCII)
_DX = re.compile(r"dx\s*:\s*(.*)", re.IGNORECASE)
_ADMISSION = re.compile(r"reason for admission\s*:\s*(.*)", re.IGNORECASE)  # PTB


def facts_of(record: SourceRecord, comments: Sequence[str]) -> tuple[dict, list[str]]:
    """Return the columns age to is_normal of a row, and what is null or was dropped, as "age: not stated"."""
    nulls: list[str] = []
    if record.table:
        return _facts_of_table(record.table, nulls), nulls
    age, sex = find_age_and_sex(comments)
    codes = _snomed_codes(comments, nulls)
    facts = {
        "age": _age(age, record.corpus, nulls),
        "sex": _known(parse_sex(sex), sex, "sex", nulls),
        "height": None,
        "weight": None,
        "snomed_codes": codes,
        "challenge_classes": challenge_classes(codes),
        "scp_codes": [],
        "scp_likelihoods": [],
        "superclasses": [],
        "is_normal": _is_normal(codes, comments, nulls),
    }
    return facts, nulls


def challenge_classes(codes: Iterable[str]) -> list[str]:
    """Return which of the Challenge's 24 classes the codes stand for, in the order of the classes."""
    known = snomed_codes()
    found = {known[code].challenge_class for code in codes if code in known}
    return [name for name in dict.fromkeys(each.challenge_class for each in known.values()) if name and name in found]


def _facts_of_table(table: dict, nulls: list[str]) -> dict:
    statements = _statements(table["scp_codes"], nulls)
    superclasses = _superclasses(statements)
    codes = _translated(statements, table["heart_axis"])
    return {
        "age": _age(table["age"], "ptb-xl", nulls),
        "sex": _known(SEX_OF_PTB_XL.get(table["sex"]), table["sex"], "sex", nulls),
        "height": _measure("height", table["height"], nulls),
        "weight": _measure("weight", table["weight"], nulls),
        "snomed_codes": codes,
        "challenge_classes": challenge_classes(codes),
        "scp_codes": list(statements),
        "scp_likelihoods": list(statements.values()),
        "superclasses": superclasses,
        "is_normal": is_normal(list(statements)),
    }


def _is_stated(text: str | None) -> bool:
    return text is not None and text.strip().lower() not in NOT_STATED


def _known(value, text: str | None, column: str, nulls: list[str]):
    """Return `value`; where it is None, note whether nothing was stated or nothing that can be."""
    if value is None:
        nulls.append(f"{column}: {'impossible' if _is_stated(text) else 'not stated'}")
    return value


def _age(text: str | None, corpus: str, nulls: list[str]) -> float | None:
    is_300 = (text or "").strip().removesuffix(".0") == OVER_89
    if is_300 and corpus == "ptb-xl":
        return AGE_OVER_89
    return _known(None if is_300 else parse_age(text), text, "age", nulls)


def _measure(column: str, text: str, nulls: list[str]) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return _known(None, text, column, nulls)
    low, high = PLAUSIBLE[column]
    return _known(value if low <= value <= high else None, text, column, nulls)


def _snomed_codes(comments: Sequence[str], nulls: list[str]) -> list[str]:
    """Return the codes of the `Dx` lines, each once, known or not; what is no number is dropped."""
    parts = [part for line in comments if (found := _DX.fullmatch(line)) for part in re.split(r"[,;\s]+", found[1])]
    parts = [part for part in parts if _is_stated(part)]
    if any(not _SNOMED.fullmatch(part) for part in parts):
        nulls.append(NO_NUMBER)
    codes = list(dict.fromkeys(part for part in parts if _SNOMED.fullmatch(part)))
    if not codes:
        nulls.append("snomed_codes: none")
    if any(code not in snomed_codes() for code in codes):
        nulls.append("snomed_codes: kept, but in no table")
    return codes


def _is_normal(codes: list[str], comments: Sequence[str], nulls: list[str]) -> bool | None:
    if not codes:
        return _is_normal_by_admission(comments)
    normal = is_normal(codes)
    return None if normal and NO_NUMBER in nulls else normal  # what was dropped may be a finding


def _is_normal_by_admission(comments: Sequence[str]) -> bool | None:
    """Return whether PTB's own header calls the patient a healthy control; None where it gives no reason."""
    reasons = [found[1] for line in comments if (found := _ADMISSION.fullmatch(line)) and _is_stated(found[1])]
    return reasons[0].strip().lower() == "healthy control" if reasons else None


def _statements(text: str, nulls: list[str]) -> dict[str, float]:
    """Return PTB-XL's statements with their likelihoods; every key counts, whatever its likelihood (0: unknown)."""
    try:
        statements = {str(code).strip(): float(likelihood) for code, likelihood in ast.literal_eval(text).items()}
    except (ValueError, SyntaxError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError):
        statements = None
    if statements is None or not all(map(_is_statement, statements, statements.values())):
        nulls.append("scp_codes: not understood")
        return {}
    known = {statement.code for statement in ptb_xl_statements()}
    if not statements:
        nulls.append("scp_codes: none")
    if not set(statements) <= known:
        nulls.append("scp_codes: kept, but in no table")
    return statements


def _is_statement(code: str, likelihood: float) -> bool:
    return code.isascii() and code.isprintable() and 0 <= likelihood <= 100


def _superclasses(statements: Iterable[str]) -> list[str]:
    group_of = {statement.code: statement.superclass for statement in ptb_xl_statements()}
    found = {group_of.get(code) for code in statements}
    return [name for name in ("NORM", *DISEASED) if name in found]


def _translated(statements: Iterable[str], heart_axis: str) -> list[str]:
    """Return the SNOMED CT codes for PTB-XL's statements and axis, as the Challenge translated them."""
    code_of = {statement.code: statement.snomed_code for statement in ptb_xl_statements()}
    codes = [code_of.get(code) for code in statements] + [AXES.get(heart_axis)]
    return list(dict.fromkeys(code for code in codes if code))
