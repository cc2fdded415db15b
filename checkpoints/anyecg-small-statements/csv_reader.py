"""Text tables: `read_csv(path, stated) -> Record`; columns are leads. Also the ECGs that Apple's Health app exports.

The export is described by Apple only in words ("Export All Health Data"); its lines are known from published examples,
English and German, that several open readers of it quote. No name, birth date or date of recording is kept.
"""

import codecs
import csv
import io
import itertools
import re
from typing import NamedTuple

import numpy as np

from .leads import LEAD_IDS
from .record_fields import standard_lead_names, standard_or_own_name, years_between
from .records import Record, part_to_read
from .regular_files import open_regular
from .signal_ops import UNIT_TO_MV, check_sampling_rate, unit_to_mv

_LONGEST_LINE = 8192  # characters
_HEAD_LINES = 16  # looked at to tell the layout
_BLOCK_ROWS = 16384
_PLAIN = re.compile(r"[-+0-9.eE]*")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")
_MISSING = {"", "nan", "na", "n/a", "null", "none", "-", "--"}
_SECONDS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("ms", "msec", "millisecond", "milliseconds"), 1e-3),
    **dict.fromkeys(("us", "µs", "μs", "microsecond", "microseconds"), 1e-6),
}
_TIME_NAMES = {"time", "t", "timestamp", "elapsed"}
_COUNTER_NAMES = {"", "index", "sample", "samples", "sample #", "n"}
_ECG_NAMES = ("ecg", "ekg")
_HERTZ = re.compile(r"([0-9]{1,6}(?:[.,][0-9]{1,6})?)\s?(?:hz|hertz)", re.IGNORECASE)
_RECORDED = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2}) [0-9]{2}:[0-9]{2}.*")
_BIRTH_DATES = (  # Apple writes them as the region does; those with two readings (3/4/1990) are not taken
    re.compile(r"(?P<y>[0-9]{4})-(?P<m>[0-9]{2})-(?P<d>[0-9]{2})"),
    re.compile(r"(?P<d>[0-9]{1,2})\.(?P<m>[0-9]{1,2})\.(?P<y>[0-9]{4})"),
    re.compile(r"(?P<d>[0-9]{1,2}) (?P<m>[A-Za-z]{3})[a-z]{0,6} (?P<y>[0-9]{4})"),
    re.compile(r"(?P<m>[A-Za-z]{3})[a-z]{0,6} (?P<d>[0-9]{1,2}), (?P<y>[0-9]{4})"),
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_CLASSIFICATION = ("classif", "klassif", "clasif")  # how the word begins in the languages that have it


class _Layout(NamedTuple):
    """What the head of a table says. `columns` are those of the leads, `factors` turn them into millivolt."""

    delimiter: str | None  # None: one column
    num_columns: int
    columns: list
    names: list
    factors: list
    rate: float | None = None
    time_column: int | None = None
    seconds: float = 1.0  # of one unit of the time column
    vague_time_column: int | None = None  # one without a unit
    age: float | None = None
    statements: tuple = ()


def looks_like_a_table(text):
    """Return whether `text`, the beginning of a file, is a table of numbers or an ECG as the Health app exports it."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(text) > _LONGEST_LINE // 2 and len(lines) > 1:
        lines.pop()  # may be cut
    if not lines or _apple_fields(lines[:_HEAD_LINES]):
        return bool(lines)
    delimiter = _delimiter(lines[0])
    rows = [_split(line, delimiter) for line in lines]
    numeric = [all(map(_is_cell, row)) and any(map(_NUMBER.fullmatch, row)) for row in rows]
    first = next((index for index in range(min(3, len(rows))) if numeric[index]), None)
    return first is not None and len(rows[first]) == len(rows[0]) and 2 * sum(numeric) >= len(rows) - first


def read_csv(path, stated):
    """Return the `Record` of a text table, or of an ECG as Apple's Health app exports it (`ecg_2024-01-31.csv`).

    Columns are leads, rows are samples, separated by comma, semicolon or tab; with the latter two the decimal sign may be
    a comma. The first row names the columns, with the unit in brackets: `time (s),I (mV),II (mV)`; or a second row
    holds the units. A column of time in s, ms or us gives the rate and has to be even; a column that counts samples is passed
    over. What the file does not say (`sampling_rate`, `units`, `lead_names` where there is no first row of names) has to be
    stated. Empty cells and `nan` are "no value". Lines that begin with `#` are comments.

    Raises:
        ValueError: something is not stated, or stated otherwise than in the file; a cell is no number, a row has more or
            fewer cells than the first, the time is uneven.
    """
    warnings = []
    with open_regular(path) as file, io.TextIOWrapper(file, encoding=_encoding(file), errors="replace") as text:
        lines = _lines(text, path)
        head = list(itertools.islice(lines, _HEAD_LINES))
        if not head:
            raise ValueError(f"{path}: no line in it.")
        apple = _apple_fields([line for _, line in head])
        layout, num_lines = _apple_layout(apple, stated, path) if apple else _table_layout(head, stated, warnings, path)
        rows = itertools.chain(head[num_lines:], lines)
        signal, rate = _read_signal(rows, layout, stated, warnings, path)
    names = standard_lead_names(layout.names, warnings)
    return Record(signal, rate, names, age=layout.age, statements=list(layout.statements), warnings=warnings)


# Lines and cells


def _encoding(file):
    """Return the encoding of a text file: by its byte order mark, else UTF-8 if the first lines are, else Latin-1."""
    start = file.read(_LONGEST_LINE)
    file.seek(0)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # the last character may be cut
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8-sig"


def _lines(text, path):
    """Yield `(number, line)` of the lines that are not empty and no comment."""
    for number in itertools.count(1):
        line = text.readline(_LONGEST_LINE + 1)
        if not line:
            return
        if len(line) > _LONGEST_LINE:
            raise ValueError(
                f"{path}: line {number} is longer than {_LONGEST_LINE} characters; rows are samples, not leads."
            )
        if line.strip() and not line.startswith("#"):
            yield number, line.rstrip("\r\n")


def _delimiter(line):
    return next((mark for mark in ";\t," if mark in line), None)


def _split(line, delimiter):
    """Return the cells of a line, without quotation marks and blanks."""
    if '"' in line:
        cells = next(csv.reader([line], delimiter=delimiter or "\0"))
    else:
        cells = line.split(delimiter) if delimiter else [line]
    if delimiter != ",":
        cells = [
            cell.replace(",", ".") if _NUMBER.fullmatch(cell.strip().replace(",", ".")) else cell for cell in cells
        ]
    return [cell.strip().strip("'").strip() for cell in cells]


def _is_cell(cell):
    return cell.lower() in _MISSING or _NUMBER.fullmatch(cell) is not None


# The head of a table


def _table_layout(head, stated, warnings, path):
    """Return the layout of a table, and how many lines of `head` are no data."""
    delimiter = _delimiter(head[0][1])
    first = _split(head[0][1], delimiter)
    if all(map(_is_cell, first)):
        return _layout_without_names(first, delimiter, stated, path), 0
    names, units = map(list, zip(*map(_name_and_unit, first)))
    second = _split(head[1][1], delimiter) if len(head) > 1 else []
    has_units = len(second) == len(first) and not any(units) and any(_is_unit(cell) for cell in second)
    units = second if has_units else units
    layout = _layout_with_names(names, units, delimiter, stated, warnings, path)
    return layout, 2 if has_units else 1


def _name_and_unit(cell):
    """`"I (mV)"` -> `("I", "mV")`; square brackets too; `("I", "")` without."""
    for opening, closing in ("()", "[]"):
        if cell.endswith(closing) and opening in cell:
            name, _, unit = cell[:-1].rpartition(opening)
            return name.strip(), unit.strip()
    return cell, ""


def _is_unit(text):
    return text.casefold() in _SECONDS or _factor(text) is not None


def _factor(unit):
    """Return the factor that turns a unit of voltage into millivolt, or None."""
    return UNIT_TO_MV.get(unit.replace("µ", "u").replace("μ", "u").lower())


def _layout_without_names(first, delimiter, stated, path):
    names = stated.lead_names
    if not names or stated.units is None or len(names) != len(first):
        raise ValueError(
            f"{path}: {len(first)} columns and no row of names; pass lead_names (one per column), units, sampling_rate."
        )
    factors = [unit_to_mv(stated.units, path)] * len(names)
    rate = check_sampling_rate(stated.sampling_rate, path)
    return _Layout(delimiter, len(first), list(range(len(first))), list(names), factors, rate)


def _layout_with_names(names, units, delimiter, stated, warnings, path):
    """Return the layout of a table whose columns have names, and units or none."""
    time_column, seconds, others = None, None, []
    for column, (name, unit) in enumerate(zip(names, units)):
        if time_column is None and column < 2 and (found := _time_unit(name, unit)) is not None:
            time_column, seconds = column, found
        elif column > 0 or name.casefold() not in _COUNTER_NAMES:
            others.append(column)
    columns = _lead_columns(others, names, units, stated, warnings, path)
    if stated.units is None and any(not units[column] for column in columns):
        raise ValueError(f"{path}: no unit with the columns' names; pass units='mV' or what it is.")
    strange = [str(column + 1) for column in columns if units[column] and _factor(units[column]) is None]
    if strange:
        raise ValueError(f"{path}: what stands in brackets in the names of columns {', '.join(strange)} is no voltage.")
    factors = [unit_to_mv(units[column] or stated.units, path) for column in columns]
    if stated.units is not None and any(factor != unit_to_mv(stated.units, path) for factor in factors):
        raise ValueError(f"{path}: the unit passed is not that of the columns; leave units out.")
    rate = None if stated.sampling_rate is None else check_sampling_rate(stated.sampling_rate, path)
    if rate is None and not seconds:
        check = (
            "its time column has no unit"
            if time_column is not None
            else "it has no time column with a unit, like 'time (s)'"
        )
        raise ValueError(f"{path}: {check}; pass sampling_rate=<Hz>.")
    used = time_column if seconds else None
    names = list(stated.lead_names or [names[column] for column in columns])
    vague = None if seconds else time_column
    return _Layout(delimiter, len(units), columns, names, factors, rate, used, seconds or 1.0, vague)


def _time_unit(name, unit):
    """Return the seconds of one unit of a column of time, 0.0 where its unit is not said, None for other columns."""
    words = re.split(r"[\s_]+", name.casefold()) + ([unit.casefold()] if unit else [])
    if words[-1] in _SECONDS and (len(words) == 1 or words[0] in _TIME_NAMES):
        return _SECONDS[words[-1]]
    return 0.0 if words[0] in _TIME_NAMES else None


def _lead_columns(others, names, units, stated, warnings, path):
    """Return the columns that are leads: those the caller names, else known leads and voltages, else "ECG"."""
    leads = [column for column in others if standard_or_own_name(names[column]) in LEAD_IDS]
    if stated.lead_names:
        told = dict(zip(others, stated.lead_names))
        if len(told) != len(others) or len(stated.lead_names) != len(others):
            raise ValueError(
                f"{path}: {len(stated.lead_names)} lead_names for {len(others)} columns; pass one per column."
            )
        for column in leads:
            if standard_or_own_name(names[column]) != standard_or_own_name(told[column]):
                raise ValueError(
                    f"{path}: column {column + 1} is lead {names[column]} by its name, not what lead_names says."
                )
        return others
    chosen = [column for column in others if _factor(units[column]) or (column in leads and not units[column])]
    chosen = chosen or [column for column in others if names[column].casefold().startswith(_ECG_NAMES)]
    if not chosen:
        raise ValueError(
            f"{path}: no column has the name of a lead or a unit of voltage; pass lead_names, one per column."
        )
    warnings += [f"column {column + 1} left out: no lead and no voltage." for column in others if column not in chosen]
    return chosen


# The export of Apple's Health app


def _apple_fields(lines):
    """Return `[(name, value), ...]` of the head of such a file, the last one being the unit; or None for other files.

    Names are in the language of the phone; what is asked for is a rate in hertz, and later one value that is a
    unit of voltage, with only a number in the next line.
    """
    fields, has_rate = [], False
    for line, following in itertools.pairwise(lines):
        cells = _split(line, ",")
        name, value = cells[0], ",".join(cells[1:])
        fields.append((name, value))
        has_rate = has_rate or _HERTZ.fullmatch(value) is not None
        if has_rate and _factor(value) is not None:
            return fields if len(fields) > 2 and _NUMBER.fullmatch(following.strip().replace(",", ".")) else None
    return None


def _apple_layout(fields, stated, path):
    """Return the layout of a file with this head, and how many of its lines are no data."""
    values = [value for _, value in fields]
    rate = float(next(filter(None, map(_HERTZ.fullmatch, values)))[1].replace(",", "."))
    for name, in_file in (("sampling_rate", rate), ("units", values[-1]), ("lead_names", (values[-2],))):
        given = getattr(stated, name)
        if given is not None and given != in_file:
            raise ValueError(f"{path}: {name} was passed, but this file says it itself. Leave it out.")
    if _HERTZ.fullmatch(values[-2]) or not values[-2].strip():
        raise ValueError(f"{path}: no line between the rate and the unit names the lead, like 'Lead,Lead I'.")
    lead = values[-2].split()[-1]
    age, statements = None, []
    for (_, birth), (_, recorded), (name, finding) in zip(fields, fields[1:], fields[2:]):
        if found := _RECORDED.fullmatch(recorded):
            birth = _birth_date(birth)
            age = years_between(birth, tuple(map(int, found.groups()))) if birth else None
            statements = [finding] if finding and name.casefold().startswith(_CLASSIFICATION) else []
    layout = _Layout(None, 1, [0], [lead], [unit_to_mv(values[-1])], check_sampling_rate(rate, path))
    return layout._replace(age=age, statements=tuple(statements)), len(fields)


def _birth_date(text):
    for pattern in _BIRTH_DATES:
        if found := pattern.fullmatch(text):
            month = found["m"].lower()
            month = _MONTHS.index(month) + 1 if month in _MONTHS else int(month) if month.isdecimal() else 0
            return int(found["y"]), month, int(found["d"])
    return None


# The numbers


def _read_signal(rows, layout, stated, warnings, path):
    """Return millivolt, float32 `(leads, samples)` of the part asked for, and the rate."""
    rate, parts, num_rows, last_time = layout.rate, [], 0, None
    for first_line, block in _blocks(rows, layout, warnings, path):
        if layout.time_column is not None:
            times = block[:, layout.time_column] * layout.seconds
            found = rate or _rate_of(times, path)
            last_time = _check_times(times, last_time, found, first_line, path)
            rate = check_sampling_rate(found, path)
        if layout.vague_time_column is not None and num_rows == 0:
            warnings += _doubt_rate(block[:, layout.vague_time_column], rate)
        start = round(min(stated.start_seconds * rate, 1 << 53))
        duration = 1 << 53 if stated.duration_seconds is None else stated.duration_seconds * rate
        stop = start + round(min(duration, 1 << 53))
        wanted = block[max(start - num_rows, 0) : max(stop - num_rows, 0), layout.columns]
        parts.append(_to_millivolt(wanted, layout.factors, first_line, path))
        num_rows += len(block)
        if num_rows >= stop:
            break
    if not num_rows:
        raise ValueError(f"{path}: no row of numbers after the names.")
    part_to_read(stated, rate, num_rows)  # raises where the part begins after the end
    return np.ascontiguousarray(np.concatenate(parts).T), rate


def _blocks(rows, layout, warnings, path):
    """Yield `(number of the first line, float64 array (rows, columns))`."""
    values, first_line = [], None
    for number, line in rows:
        numbers = _numbers(line, layout, number, path)
        if numbers is None:
            if next(rows, None) is not None:
                raise ValueError(f"{path}: line {number} has not {layout.num_columns} cells like the first.")
            warnings.append(f"line {number}, the last, left out: it has not {layout.num_columns} cells; cut?")
            break
        first_line = number if first_line is None else first_line
        values.append(numbers)
        if len(values) == _BLOCK_ROWS:
            yield first_line, np.array(values)
            values, first_line = [], None
    if values:
        yield first_line, np.array(values)


def _numbers(line, layout, number, path):
    """Return the numbers of a line, NaN for no value; None if it has not the cells that it should have."""
    cells = line.split(layout.delimiter) if layout.delimiter and '"' not in line else None
    if cells and len(cells) == layout.num_columns and all(cells) and all(map(_PLAIN.fullmatch, cells)):
        try:
            return list(map(float, cells))
        except ValueError:
            pass  # which one is said below
    cells = _split(line, layout.delimiter)
    if len(cells) != layout.num_columns:
        return None
    for column, cell in enumerate(cells, 1):
        if not _is_cell(cell):
            raise ValueError(f"{path}: line {number}, column {column} is no number.")
    return [float(cell) if cell.lower() not in _MISSING else np.nan for cell in cells]


def _to_millivolt(block, factors, first_line, path):
    with np.errstate(over="ignore", invalid="ignore"):
        millivolt = (block * factors).astype(np.float32)
    if np.isinf(millivolt).any():
        raise ValueError(f"{path}: a value too large to be true within {len(block)} lines from line {first_line} on.")
    return millivolt


def _doubt_rate(times, rate):
    """Return a warning, in a list, where times without a unit fit the rate that the caller states in no unit."""
    step = np.median(np.diff(times)) if len(times) > 1 else 1.0
    fits = step == 1 or any(abs(step * seconds * rate - 1) < 0.01 for seconds in _SECONDS.values())
    text = f"the time column grows by {step:g} a row, which fits {rate:g} Hz in no unit; the rate that was passed is taken."
    return [] if fits else [text]


def _rate_of(times, path):
    """Return the rate that even times (seconds) have: whole Hz if the digits written admit it."""
    seconds = times[-1] - times[0]
    if len(times) < 2 or not 0 < seconds < np.inf:
        raise ValueError(
            f"{path}: the time column does not grow from the first row to the last; pass sampling_rate=<Hz>."
        )
    rate = (len(times) - 1) / seconds
    digits = next((k for k in range(10) if np.abs(times * 10.0**k - np.rint(times * 10.0**k)).max() < 1e-3), 9)
    if abs(round(rate) - rate) <= rate * 10.0**-digits / seconds:
        return float(round(rate))
    return float(rate)


def _check_times(times, last_time, rate, first_line, path):
    """Return the last of the times; they have to be even to one sample."""
    expected = times[0] + np.arange(len(times)) / rate
    follows = last_time is None or 0 <= (times[0] - last_time) * rate <= 2
    even = np.abs(times - expected) * rate <= 1.0 + 1e-6
    if not follows or not even.all():
        line = first_line + (0 if not follows else int(np.argmin(even)))
        raise ValueError(
            f"{path}: the time column is uneven at line {line} or so, for {rate:g} Hz. Fill gaps with empty cells, "
            "or leave the time column out and pass sampling_rate."
        )
    return times[-1]
