"""HL7 aECG, the FDA's annotated ECG (<AnnotatedECG>): `read_aecg(path, stated) -> Record`.

Source: HL7 V3 ECG R1-2004 (PORT_MT020001) and its implementation guide. A value is origin + scale x digit. The leads of a
sequence set share a time axis; sets that begin at different times (3 leads of 2.5 s, then the next 3) are put on one,
with NaN where a lead was not recorded.
"""

import dataclasses
import datetime
import re

import numpy as np

from .record_fields import findings
from .records import Annotation, Record, parse_sex, take_part
from .signal_ops import unit_to_mv
from .xml_documents import (
    LARGEST_PADDING,
    age_at,
    age_in_years,
    parse_list,
    parse_number,
    parse_rate,
    read_xml,
    standard_names,
    to_signal,
)

_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "µs": 1e6, "μs": 1e6, "ns": 1e9}
_LEAD_PREFIX = "MDC_ECG_LEAD_"
_AGE_CODES = {"21612-7", "30525-0", "29553-5"}  # LOINC: reported, age, calculated
_FINDINGS = ("MDC_ECG_INTERPRETATION", "MDC_ECG_RHY")  # annotations that are diagnoses; others are marks in time
_LONGEST_RELATIVE = 1e9  # seconds; a time since the year 1 is longer
_TIME_STAMP = re.compile(
    r"(?P<day>\d{8})(?P<hour>\d{2})?(?P<minute>\d{2})?(?P<second>\d{2})?(?:\.(?P<fraction>\d{1,9}))?"
    r"(?P<zone>[-+]\d{4})?",
    re.ASCII,
)


@dataclasses.dataclass
class _SequenceSet:
    """Leads with a common time axis. `start` is in seconds: since the year 1, or from 0 where the time is relative."""

    start: float | None
    rate: float
    leads: list  # of (name as in the file, float64 array in mV)


def read_aecg(path, stated):
    """Return the `Record` of an aECG file (`pathlib.Path`): its rhythm; derived series, e.g. mean beats, are left out.

    Kept of the annotations are those that have a place in time, as marks, and diagnoses. Measurements are not.

    Raises:
        ValueError: the document is damaged, or has no rhythm that can be read.
        OSError: no such regular file.
    """
    root, warnings = read_xml(path, "AnnotatedECG"), []
    all_series = _rhythm_series(root, path, warnings)
    sets = [
        _read_set(element, f"{path}, sequence set {position}", warnings)
        for position, element in enumerate((e for one in all_series for e in one.iterfind("component/sequenceSet")), 1)
    ]
    sets = [one for one in sets if one.leads]
    if not sets:
        raise ValueError(f"{path}: its rhythm series hold no lead with voltages. {' '.join(warnings)}")
    if any(len({len(values) for _, values in one.leads}) > 1 for one in sets):
        warnings.append("leads of one sequence set differ in length; the shorter ones end with NaN.")
    rate, start, names, rows = _join(sets, warnings)
    names = standard_names(names, warnings, path)
    record = Record(to_signal(rows, path), rate, names, warnings=warnings)
    record.age, record.sex = _patient(root)
    _keep_annotations(all_series, start, record)
    return take_part(record, stated)


def _code(element):
    code = element.find("code")
    return "" if code is None else (code.get("code") or "").strip()


def _rhythm_series(root, path, warnings):
    """Return the series of the rhythm: those coded RHYTHM, else those not coded as a beat."""
    everything = root.findall("component/series")
    chosen = [one for one in everything if _code(one).upper() == "RHYTHM"]
    chosen = chosen or [one for one in everything if "BEAT" not in _code(one).upper()]
    if not chosen:
        raise ValueError(f"{path}: no rhythm series among its {len(everything)} series.")
    derived = sum(len(one.findall("derivation/derivedSeries")) for one in everything)
    left_out = len(everything) - len(chosen) + derived
    if left_out:
        warnings.append(
            f"{left_out} derived or other series left out (representative beats); the signal is the rhythm."
        )
    return chosen


def _read_set(element, where, warnings):
    """Return a `_SequenceSet` with the leads that can be read; others are noted."""
    sequences = element.findall("component/sequence")
    times = [one for one in sequences if _code(one).startswith("TIME_")]
    increment = times[0].find("value/increment") if times else None
    if increment is None:
        raise ValueError(f"{where}: no time sequence with an increment, which would give the sampling rate.")
    unit = (increment.get("unit") or "").strip()
    if unit not in _PER_SECOND:
        raise ValueError(f"{where}, increment: its unit is none of {', '.join(_PER_SECOND)}.")
    step = parse_number(increment.get("value"), f"{where}, increment", least=1e-12)
    rate = parse_rate(f"{_PER_SECOND[unit] / step:.12g}", f"{where}, sampling rate (from increment)")
    leads = []
    for position, sequence in enumerate(sequences, start=1):
        values = None if sequence in times else _millivolts(sequence, f"{where}, sequence {position}", warnings)
        if values is not None:
            leads.append((_code(sequence).removeprefix(_LEAD_PREFIX), values))
    return _SequenceSet(_time(times[0].find("value/head")), rate, leads)


def _millivolts(sequence, where, warnings):
    """Return origin + scale x digits in mV, or None and a note where they are no voltages."""
    value = sequence.find("value")
    scale, digits, origin = (None if value is None else value.find(name) for name in ("scale", "digits", "origin"))
    if scale is None or digits is None:
        warnings.append(f"{where} left out: no scale with digits.")
        return None
    factor = _voltage(scale, f"{where}, scale", warnings)
    zero = 0.0 if origin is None else _voltage(origin, f"{where}, origin", warnings)
    if factor is None or zero is None:
        return None
    if factor == 0:
        raise ValueError(f"{where}, scale: is 0; every value would be the same.")
    return zero + factor * parse_list(digits.text, f"{where}, digits")


def _voltage(quantity, where, warnings):
    """Return a quantity in mV, or None and a note where its unit is no voltage."""
    try:
        unit = unit_to_mv(quantity.get("unit"))
    except ValueError:
        warnings.append(f"{where}: its unit is no voltage; the sequence was left out.")
        return None
    return parse_number(quantity.get("value"), where, least=-1e12, most=1e12) * unit


def _time(element):
    """Return a time in seconds from an element with `value`, a time stamp or a number with `unit`; None if it is none."""
    if element is None:
        return None
    unit, value = (element.get("unit") or "").strip(), (element.get("value") or "").strip()
    if unit:
        try:
            return parse_number(value, "time", least=-_LONGEST_RELATIVE, most=_LONGEST_RELATIVE) / _PER_SECOND[unit]
        except (KeyError, ValueError):
            return None
    found = _TIME_STAMP.fullmatch(value)
    if found is None:
        return None
    try:
        day = datetime.datetime.strptime(found["day"], "%Y%m%d").toordinal()
    except ValueError:
        return None
    sign, zone = (found["zone"] or "+0000")[0], (found["zone"] or "+0000")[1:]
    zone = float(sign + "1") * (int(zone[:2]) * 3600 + int(zone[2:]) * 60)
    clock = [int(found[part] or 0) for part in ("hour", "minute", "second")]
    # To the nearest 0.01 ms: a double holds no more of the seconds since the year 1.
    return day * 86400 + clock[0] * 3600 + clock[1] * 60 + clock[2] + float(f"0.{found['fraction'] or 0}") - zone


def _join(sets, warnings):
    """Return `(rate, start, names, rows)`: the sets on one time axis, or the first set where they do not fit on one."""
    rate, leads = sets[0].rate, sets[0].leads
    if len(sets) == 1:
        return rate, sets[0].start or 0.0, [name for name, _ in leads], [values for _, values in leads]
    starts = [one.start or 0.0 for one in sets]
    start = min(starts)
    firsts = [round((own - start) * rate) for own in starts]
    longest = max(first + len(values) for one, first in zip(sets, firsts) for _, values in one.leads)
    names = list(dict.fromkeys(name for one in sets for name, _ in one.leads))
    num_stored = sum(len(values) for one in sets for _, values in one.leads)
    if any(one.rate != rate for one in sets) or longest * len(names) > LARGEST_PADDING * num_stored:
        warnings.append(f"{len(sets) - 1} further sequence sets left out: another rate, or far apart in time.")
        return _join(sets[:1], warnings)
    rows, num_twice = {name: np.full(longest, np.nan) for name in names}, 0
    for one, first in zip(sets, firsts):
        for name, values in one.leads:
            place = rows[name][first : first + len(values)]
            num_twice += not np.isnan(place).all()
            np.copyto(place, values, where=np.isnan(place))
    if num_twice:
        warnings.append(
            f"{num_twice} sequences of leads that are stored for the same time already: the first was kept."
        )
    return rate, start, names, list(rows.values())


def _patient(root):
    """Return age and sex. An age that is stated goes before the birth date."""
    age = None
    for observation in root.iterfind("controlVariable/relatedObservation"):
        value = observation.find("value")
        if age is None and _code(observation) in _AGE_CODES and value is not None:
            age = age_in_years(value.get("value"), value.get("unit"))
    person = next(root.iter("subjectDemographicPerson"), None)
    if person is None:
        return age, None
    gender, birth = person.find("administrativeGenderCode"), person.find("birthTime")
    recorded = [root.find(f"effectiveTime/{name}") for name in ("center", "low")]
    recorded += [root.find("component/series/effectiveTime/low")]
    if age is None and birth is not None:
        day = next((element for element in recorded if element is not None), None)
        age = age_at(_year_month_day(birth), _year_month_day(day))
    return age, parse_sex(None if gender is None else gender.get("code"))


def _year_month_day(element):
    value = "" if element is None else (element.get("value") or "").strip()
    return (value[:4], value[4:6], value[6:8]) if re.match(r"\d{8}", value, re.ASCII) else None


def _keep_annotations(all_series, start, record):
    """Add the annotations of the series to a record: marks in the order of time, statements and their codes."""
    clock = _Clock(start, record.sampling_rate)
    statements, codes = {}, {}  # in the order found, each once
    for series in all_series:
        for annotation in series.iterfind("subjectOf/annotationSet/component/annotation"):
            clock.collect(annotation, record.annotations)
            for part in annotation.iter("annotation"):
                if _code(part).startswith(_FINDINGS):
                    _keep_finding(part, statements, codes)
    record.annotations.sort(key=lambda mark: mark.sample)
    record.statements, record.diagnosis_codes = findings(statements), list(codes)


def _keep_finding(annotation, statements, codes):
    value = annotation.find("value")
    if value is None:
        return
    code = (value.get("code") or "").strip()
    statements[(value.text or "").strip() or value.get("displayName") or code] = True
    if code:
        codes[code[:80]] = True


class _Clock:
    """Finds the samples that annotations speak of."""

    def __init__(self, start, rate):
        self.start, self.rate = start, rate

    def collect(self, annotation, marks):
        """Add marks for an annotation and those within it; return where it begins (seconds), or None.

        An annotation without a place of its own, e.g. a beat, begins with the first of those within it.
        """
        begin, note, duration = self._region(annotation)
        inner = [self.collect(child, marks) for child in annotation.iterfind("component/annotation")]
        if begin is None:
            begin = min((found for found in inner if found is not None), default=None)
        value = annotation.find("value")
        symbol = (value.get("code") if value is not None else None) or _code(annotation)
        if begin is not None and symbol:
            marks.append(Annotation(round(begin * self.rate), symbol.strip()[:80], note, duration))
        return begin

    def _region(self, annotation):
        """Return `(seconds from the first sample or None, note, duration or None)`; the note names leads."""
        begin, notes, duration = None, [], None
        for boundary in annotation.iterfind("support/supportingROI/component/boundary"):
            code = _code(boundary)
            if code.startswith("TIME_"):
                begin, duration, is_end = self._interval(boundary.find("value"), code)
                notes += ["end"] if is_end else []
            elif code.startswith(_LEAD_PREFIX):
                notes.append(code.removeprefix(_LEAD_PREFIX))
        return begin, ", ".join(notes), duration

    def _interval(self, value, code):
        """Return begin and duration in seconds, each possibly None, and whether only the end is stated."""
        if value is None:
            return None, None, False
        is_absolute = self.start > _LONGEST_RELATIVE
        zero = 0.0 if is_absolute and code == "TIME_RELATIVE" else self.start
        low, high, at = _time(value.find("low")), _time(value.find("high")), _time(value)
        begin = next((time for time in (low, at, high) if time is not None), None)
        if begin is None or abs(begin - zero) > _LONGEST_RELATIVE:
            return None, None, False
        if low is None and high is not None:
            return high - zero, None, True
        return begin - zero, None if high is None or high < low else round(high - low, 4), False
