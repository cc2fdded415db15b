"""What several formats state in the same way: the age between two dates, lead names to keep apart, findings in words."""

import datetime
import itertools
import re

from .leads import resolve_lead_name
from .records import parse_age

MOST_STATEMENTS, LONGEST_STATEMENT = 500, 1000  # what goes beyond is no finding
_SIGNATURE = re.compile(
    r"\b(?:confirmed|reviewed|edited|signed|over-?read|interpreted|referred|requested|ordered)\b.{0,60}\bby\b",
    re.IGNORECASE,
)
_DATE_OR_TIME = re.compile(
    r"\b\d{1,4}(?P<mark>[-/.])(?:\d{1,2}|[^\W\d_]{3,9})(?P=mark)\d{2,4}\b|\b\d{1,2}:\d{2}(?::\d{2})?(?:\s?[AP]M\b)?",
    re.IGNORECASE,
)


def years_between(birth, recording):
    """Return the age at a recording in whole years, of infants in parts of a year, or `None`. No date is kept.

    Args:
        birth, recording: `(year, month, day)`.

    >>> years_between((1950, 5, 2), (2000, 5, 1))
    49.0
    """
    try:
        born, recorded = datetime.date(*birth), datetime.date(*recording)
    except (ValueError, OverflowError):  # the 31st of June; a year 0 stands for "not stated"
        return None
    years = recorded.year - born.year - ((recorded.month, recorded.day) < (born.month, born.day))
    return parse_age(f"{years or (recorded - born).days / 365.25:.6f}")


def standard_lead_names(given, warnings):
    """Return one name per lead: standard where it can be told, else as given; `"II (2)"` for a second lead II."""
    names, num_so_far = {}, {}  # a dictionary for its order and its speed
    for name in map(standard_or_own_name, given):
        own = name
        while name in names:
            num_so_far[own] = num_so_far.get(own, 1) + 1
            name = f"{own} ({num_so_far[own]})"
        names[name] = None
    if num_so_far:
        warnings.append("several leads bear one name; the later ones are told apart by a number in brackets.")
    return list(names)


def standard_or_own_name(name):
    """Return the standard spelling of a lead's name, or the name itself."""
    try:
        return resolve_lead_name(name)
    except ValueError:
        return name


def findings(texts):
    """Return statements without the lines that sign them ("Confirmed by ..."), without dates and times of day."""
    kept = []
    for text in itertools.islice(texts, MOST_STATEMENTS):
        text = " ".join((text or "")[:LONGEST_STATEMENT].split())
        if text and not _SIGNATURE.search(text):
            kept.append(_DATE_OR_TIME.sub("", text).strip(" ,;-"))
    return [text for text in kept if text]
