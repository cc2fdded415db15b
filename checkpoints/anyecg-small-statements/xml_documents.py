"""XML documents, read safely, and what the XML formats have in common: numbers, base64, lead names, ages, findings.

A document may name its DTD, as MUSE does (`<!DOCTYPE RestingECG SYSTEM "restecg.dtd">`): it is not fetched. One that
declares anything itself is refused, so there are no entities to expand. Nothing else is ever opened.
"""

import base64
import codecs
import re
from xml.etree.ElementTree import TreeBuilder
from xml.parsers import expat

import numpy as np

from .record_fields import standard_lead_names, years_between
from .records import parse_age
from .regular_files import read_whole
from .signal_ops import HIGHEST_RATE

LARGEST_BYTES = 32_000_000  # half an hour of 12 leads as text; the largest real file has half a million
DEEPEST, MOST_ELEMENTS, LONGEST_TAG = 100, 300_000, 1_000_000  # the deepest has 25 levels, the largest 5,000 elements
_PIECE_BYTES = 1 << 18
MOST_LEADS = 300  # what goes beyond is no recording
LARGEST_PADDING = 8  # times the samples there are: what may be filled with NaN where leads differ in length
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_DECLARED_ENCODING = re.compile(rb"\s*<\?xml[^>]{0,200}?\sencoding\s*=\s*[\"']([\w.-]{1,40})")
_TEXT_ENCODINGS = re.compile(r"utf-8|ascii|iso8859-\d+|cp\d+|koi8-[ru]|gb2312|gbk|gb18030|big5|shift_jis|euc_(jp|kr)")
_NUMBER = re.compile(r"[-+]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d{1,3})?", re.ASCII)
_NOT_IN_LISTS = {" ": re.compile(r"[^-+.eE\d\s]", re.ASCII), ",": re.compile(r"[^-+.eE\d\s,]|,\s*,", re.ASCII)}
_PIECE = re.compile(r".{1,100000}[^\s,]*", re.DOTALL)  # ends where a number ends
_LONGEST_NUMBER, _LARGEST_NUMBER = 40, 1e100  # digits; what any step can be multiplied with
_YEARS = {"": 1.0, "a": 1.0, "y": 1.0, "mo": 1 / 12, "w": 7 / 365.25, "d": 1 / 365.25, "h": 1 / 8766}


def read_xml(path, root_name):
    """Return the root element of a document; elements and attributes have their names without namespaces.

    Raises:
        ValueError: not well-formed, another root, a DTD of its own, too large, too deep, or too many elements.
        OSError: no such regular file.
    """
    tree = _LimitedTree(path)
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = tree.start, tree.end
    parser.CharacterDataHandler = tree.builder.data
    parser.StartDoctypeDeclHandler, parser.SkippedEntityHandler = tree.doctype, tree.skipped_entity
    try:
        _feed(parser, _decode(read_whole(path, LARGEST_BYTES), path).encode(), path)
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise ValueError(f"{path}, line {error.lineno}: no well-formed XML ({reason}); it is cut or damaged.") from None
    root = tree.builder.close()
    if root.tag != root_name:
        raise ValueError(f"{path}: its first element is not <{root_name}>, which this format begins with.")
    return root


def _feed(parser, data, path):
    """Parse a document (UTF-8) piece by piece, and refuse a tag or comment that has not ended after a long while."""
    for end in range(_PIECE_BYTES, len(data) + _PIECE_BYTES, _PIECE_BYTES):
        parser.Parse(data[end - _PIECE_BYTES : end], False)
        if min(end, len(data)) - parser.CurrentByteIndex > LONGEST_TAG:
            raise ValueError(f"{path}: a tag or comment of more than {LONGEST_TAG} bytes; no ECG has one.")
    parser.Parse(b"", True)


class _LimitedTree:
    """Builds the tree of a document while it is parsed, and refuses what no ECG needs."""

    def __init__(self, path):
        self.path, self.builder = path, TreeBuilder()
        self.depth = self.num_elements = 0

    def start(self, name, attributes):
        self.depth += 1
        self.num_elements += 1
        if self.depth > DEEPEST or self.num_elements > MOST_ELEMENTS:
            raise ValueError(
                f"{self.path}: more than {DEEPEST} levels or {MOST_ELEMENTS} elements; no single ECG takes that."
            )
        self.builder.start(_local(name), {_local(key): value for key, value in attributes.items()})

    def end(self, name):
        self.depth -= 1
        self.builder.end(_local(name))

    def doctype(self, name, system_id, public_id, has_declarations):
        if has_declarations:
            raise ValueError(
                f"{self.path}: declares a DTD of its own (<!DOCTYPE ... [...]>); such documents are refused."
            )

    def skipped_entity(self, name, is_parameter_entity):
        raise ValueError(f"{self.path}: uses an entity (&...;) that is defined elsewhere; such documents are refused.")


def _local(name):
    return name.rpartition(":")[2]


def _decode(data, path):
    """Return the document's text; what is not in its encoding becomes U+FFFD."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace").lstrip()
    declared = _DECLARED_ENCODING.match(data)
    name = declared[1].decode("ascii", "replace").lower() if declared else "utf-8"
    if name.startswith("utf-16"):  # no mark, so it was converted since
        name = "utf-8"
    try:
        name = codecs.lookup(name).name
    except LookupError:
        name = ""
    if not _TEXT_ENCODINGS.fullmatch(name):
        raise ValueError(f"{path}: declares an encoding that is not known; save it as UTF-8.")
    return data.decode(name, "replace").lstrip()


def parse_number(text, where, *, least=-1e300, most=1e300):
    """Return a decimal number as a float; `ValueError` that begins with `where` if it is none, or out of range."""
    found = _NUMBER.fullmatch((text or "").strip())
    if found is None:
        raise ValueError(f"{where}: missing, or no decimal number.")
    value = float(found[0])
    if not least <= value <= most:
        raise ValueError(f"{where}: is {value:g}; from {least:g} to {most:g} is accepted.")
    return value


def parse_rate(text, where):
    """Return a sampling rate in Hz."""
    return parse_number(text, where, least=1.0, most=HIGHEST_RATE)


def parse_step(text, where):
    """Return what one step of the stored numbers stands for: a number above zero."""
    return parse_number(text, where, least=1e-12, most=1e12)


def parse_list(text, where, separator=" "):
    """Return decimal numbers, separated by blanks or (`separator=","`) by commas and blanks, as a float64 array."""
    text = text or ""
    if _NOT_IN_LISTS[separator].search(text):
        raise ValueError(f"{where}: holds something that is no decimal number.")
    pieces = [np.zeros(0)]
    for piece in _PIECE.findall(text):
        numbers = piece.replace(",", " ").split()
        try:
            if max(map(len, numbers), default=0) > _LONGEST_NUMBER:
                raise ValueError
            pieces.append(np.array([float(number) for number in numbers]))
        except ValueError:
            raise ValueError(f"{where}: holds something that is no decimal number.") from None
    values = np.concatenate(pieces)
    if np.abs(values).max(initial=0.0) > _LARGEST_NUMBER:
        raise ValueError(f"{where}: holds a number too large to be true.")
    return values


def parse_base64(text, where):
    """Return the bytes that base64 text stands for; blanks and line ends are allowed anywhere."""
    try:
        return base64.b64decode((text or "").encode("ascii", "replace").translate(None, b" \t\r\n"), validate=True)
    except ValueError:
        raise ValueError(f"{where}: no base64; it is cut or damaged.") from None


def to_signal(rows, where):
    """Return rows in mV (float64, NaN where there is no value) as one float32 array; short rows end with NaN."""
    longest = max(map(len, rows), default=0)
    if longest == 0:
        raise ValueError(f"{where}: no lead with samples.")
    if longest * len(rows) > LARGEST_PADDING * sum(map(len, rows)) + 1_000_000:
        raise ValueError(f"{where}: its leads differ too much in length, the longest has {longest} samples.")
    signal = np.full((len(rows), longest), np.nan, np.float32)
    for position, (row, out) in enumerate(zip(rows, signal), start=1):
        if not np.fmax.reduce(np.abs(row), initial=0.0) < np.finfo(np.float32).max:
            raise ValueError(f"{where}, lead {position}: its step gives values too large to be true.")
        out[: len(row)] = row
    return signal


def standard_names(given, warnings, where):
    """Return one name per lead (at most `MOST_LEADS`), as `standard_lead_names` does; those that have none are numbered."""
    if len(given) > MOST_LEADS:
        raise ValueError(f"{where}: {len(given)} leads; up to {MOST_LEADS} are read.")
    names = [(name or "").strip()[:40] or f"lead {position}" for position, name in enumerate(given, start=1)]
    return standard_lead_names(names, warnings)


def age_in_years(number, unit):
    """Return an age in years from a number and its unit ("YEARS", "mo", "wk", "d", "h" ...), or None if it is none."""
    unit = (unit or "").strip().lower()
    years = _YEARS.get(unit if unit in _YEARS else "mo" if unit.startswith("mo") else unit[:1])
    found = _NUMBER.fullmatch((number or "").strip())
    if years is None or found is None:
        return None
    return parse_age(number) if years == 1.0 else parse_age(f"{float(found[0]) * years:.6f}")


def age_at(birth, recorded):
    """Return the age in years on the day of the recording, or None if a date is missing or none.

    Args:
        birth, recorded: `(year, month, day)` as texts or numbers, or None. They are not kept.
    """
    try:
        birth, recorded = (tuple(int(part) for part in day) for day in (birth, recorded))
    except (TypeError, ValueError):
        return None
    return years_between(birth, recorded)
