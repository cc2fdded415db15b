"""St Petersburg INCART in its own release: `I01.{hea,dat,atr}` to `I75`, 30 minutes each, with beats; 32 patients."""

from __future__ import annotations

from .sources import Source, SourceRecord, list_named

NAME = r"I\d{2}"


def list_incart(source: Source) -> list[SourceRecord]:
    """Return its records; none where the source has another form."""
    return list_named("incart", source, NAME)
