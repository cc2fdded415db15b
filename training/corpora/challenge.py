"""Corpora in the form in which PhysioNet's Challenge 2021 publishes them: `A0001.hea`, `A0001.mat`, codes in the header."""

from __future__ import annotations

from .sources import Source, SourceRecord, list_named

NAMES = {  # of records, by corpus
    "cpsc-2018": r"A\d{4}",
    "cpsc-extra": r"Q\d{4}",
    "incart": r"I\d{4}",
    "ptb": r"S\d{4}",
    "ptb-xl": r"HR\d{5}",
    "georgia": r"E\d{5}",
    "chapman-ningbo": r"JS\d{5}",
}


def list_challenge(corpus: str, source: Source) -> list[SourceRecord]:
    """Return the records of a corpus, at any depth below the source; files of other corpora beside them do not matter."""
    return list_named(corpus, source, NAMES[corpus])
