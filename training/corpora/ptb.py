"""PTB Diagnostic ECG Database in its own release: `patient001/s0010_re.{hea,dat,xyz}`, 12 leads and X, Y, Z at 1000 Hz."""

from __future__ import annotations

from .sources import Source, SourceRecord, list_named

NAME = r"patient\d{3}/s\d{4}\w{0,4}"


def list_ptb(source: Source) -> list[SourceRecord]:
    """Return its records, named as in the published list (`patient001/s0010_re`); none where the source has another form."""
    return list_named(
        "ptb",
        source,
        NAME,
        name_of=lambda path: "/".join(path.split("/")[-2:]),
        patient_of=lambda name: name.split("/")[0],
    )
