"""What the server holds of its visitors: in memory, for a while, and no more than there is room for.

An upload arrives file by file under a token that the page made up (`receive`); with it the page then asks for the record
(`Visits.claim`), which from then on is held under Gradio's name of the session.
"""

import dataclasses
import re
import threading
import time
from pathlib import PurePath

from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

LARGEST_UPLOAD = 64_000_000  # bytes; what the readers of documents take at most
ROOM = 512_000_000  # bytes of all visitors together
SECONDS_HELD = 900.0  # since a visitor last did something
MOST_FILES = 300  # of one record, which may have many segments
TOO_LARGE = (
    f"The files are larger than {LARGEST_UPLOAD / 1e6:.0f} MB together. Cut the recording first, or use anyecg_hf itself: "
    "read_record reads a part of a recording of any length."
)
GONE = "Nothing is held for this page any more: drop the record again, or choose an example."
_TOKEN = re.compile(r"[0-9a-f]{32}")


@dataclasses.dataclass
class Visit:
    """One visitor's record: the files as they came or an example's name, and the part of it that is shown."""

    files: dict = dataclasses.field(default_factory=dict)  # name -> bytearray
    example: str | None = None
    record: object = None
    findings: list = dataclasses.field(default_factory=list)
    last_used: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def num_bytes(self):
        return sum(map(len, self.files.values()))


class Visits:
    """All visits by token or session; safe to use from several threads."""

    def __init__(self):
        self._visits, self._lock = {}, threading.Lock()

    def append(self, token, name, data):
        """Add bytes to a file of an upload; the oldest visits make room.

        Raises:
            ValueError: the upload is too large or has too many files. It is then forgotten.
        """
        with self._lock:
            visit = self._visits.setdefault(token, Visit())
            visit.files.setdefault(name, bytearray()).extend(data)
            visit.last_used = time.monotonic()
            if visit.num_bytes > LARGEST_UPLOAD:
                del self._visits[token]
                raise ValueError(TOO_LARGE)
            if len(visit.files) > MOST_FILES:
                del self._visits[token]
                raise ValueError(f"More than {MOST_FILES} files; drop those of one record.")
            while sum(each.num_bytes for each in self._visits.values()) > ROOM:
                del self._visits[min(self._visits, key=lambda key: self._visits[key].last_used)]

    def claim(self, token, session):
        """Return the visit that was uploaded under `token`, which now replaces that of `session`.

        Raises:
            ValueError: there is none.
        """
        with self._lock:
            if token not in self._visits:
                raise ValueError(GONE)
            self._visits[session] = self._visits.pop(token)
            return self._visits[session]

    def begin(self, session, example):
        """Return a new visit with an example, which replaces that of `session`."""
        with self._lock:
            self._visits[session] = Visit(example=example)
            return self._visits[session]

    def of(self, session):
        """Return the visit of a session. Raises ValueError where it is held no longer."""
        with self._lock:
            if session not in self._visits:
                raise ValueError(GONE)
            self._visits[session].last_used = time.monotonic()
            return self._visits[session]

    def forget(self, key):
        with self._lock:
            self._visits.pop(key, None)

    def expire(self):
        """Forget the visits that nobody has used for `SECONDS_HELD`."""
        with self._lock:
            oldest = time.monotonic() - SECONDS_HELD
            self._visits = {key: visit for key, visit in self._visits.items() if visit.last_used >= oldest}


def receive(visits):
    """Return the endpoint that takes one file: its bytes as the body of a PUT to .../{token}/{name}. Nothing is written."""

    async def receive_file(request):
        token, name = request.path_params["token"], request.path_params["name"]
        if not _TOKEN.fullmatch(token) or not _is_file_name(name):
            return PlainTextResponse("This file's name cannot be used: rename the file.", status_code=400)
        try:
            visits.append(token, name, b"")
            async for chunk in request.stream():
                visits.append(token, name, chunk)
        except ValueError as error:
            return PlainTextResponse(str(error), status_code=413)
        except ClientDisconnect:  # nobody is there to be answered
            visits.forget(token)
            return PlainTextResponse("", status_code=400)
        return PlainTextResponse("")

    return receive_file


def _is_file_name(name):
    return (
        PurePath(name).name == name and name not in ("", ".", "..") and "\0" not in name and len(name.encode()) <= 255
    )
