"""The seven corpora of the data set: how each is found below a source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .challenge import list_challenge
from .incart import list_incart
from .ptb import list_ptb
from .ptb_xl_table import list_ptb_xl
from .sources import Source, SourceRecord


@dataclass(frozen=True)
class Corpus:
    """`listings` are tried in turn: its own release first, then the Challenge's form; `accepted` says so to a user."""

    listings: tuple[Callable[[Source], list[SourceRecord]], ...]
    accepted: str


def _corpus(name: str, example: str, own: Callable | None = None, own_example: str = "") -> Corpus:
    challenge = f"the Challenge 2021's files ({example}.hea, {example}.mat ...)"
    accepted = f"its own release ({own_example}) or {challenge}" if own else challenge
    return Corpus((*filter(None, [own]), partial(list_challenge, name)), accepted)


CORPORA = {
    "cpsc-2018": _corpus("cpsc-2018", "A0001"),
    "cpsc-extra": _corpus("cpsc-extra", "Q0001"),
    "incart": _corpus("incart", "I0001", list_incart, "I01.hea, I01.dat, I01.atr ..."),
    "ptb": _corpus("ptb", "S0001", list_ptb, "patient001/s0010_re.hea ..."),
    "ptb-xl": _corpus("ptb-xl", "HR00001", list_ptb_xl, "ptbxl_database.csv beside records500/ or records100/"),
    "georgia": _corpus("georgia", "E00001"),
    "chapman-ningbo": _corpus("chapman-ningbo", "JS00001"),
}

# Corpora that share recordings which are not known by name (split_files/README.md): a test on one trains on none of them.
RELATED = (frozenset({"cpsc-2018", "cpsc-extra"}),)


def are_related(corpus: str, other: str) -> bool:
    """Tell whether one of two corpora may hold recordings of the other, or is the other."""
    return corpus == other or any({corpus, other} <= group for group in RELATED)
