"""Published files fetched over HTTP(S), several at once, resumed after a break, checked against their SHA-256.

A file grows as `<name>.part` and gets its name only when its SHA-256 is the published one and its bytes are on the disk,
so a run may be stopped or killed at any moment: the same call goes on where it was. Files found right are remembered in
`.verified.jsonl` by size and time of change and are not read again; delete that file to have all of them checked anew.
"""

from __future__ import annotations

import contextlib
import email.utils
import errno
import hashlib
import json
import os
import re
import shutil
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm

SUMS_FILE = "SHA256SUMS.txt"
PART, VERIFIED, LOCK = ".part", ".verified.jsonl", ".download.lock"
CHUNK_BYTES = 1 << 18
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 120.0  # seconds; doubled with each failure in a row
MOST_HEAD_REQUESTS = 500  # asking for the sizes of more files would take as long as fetching small ones
MOST_DROPPED = 8  # files in a row given up for want of an answer before the server is taken for gone
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class DownloadReport:
    """What became of each file: fetched now, whole already, or failed with the reason; bytes received."""

    fetched: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0


class _Failed(Exception):
    """This file cannot be had; trying again does not help, or has been tried often enough."""


class _Temporary(Exception):
    """Worth another try, after `pause` seconds if the server said so."""

    def __init__(self, message: str, pause: float | None = None):
        super().__init__(message)
        self.pause = pause


class _Dropped(_Temporary):
    """No answer, or not a whole one."""


class _Stopped(Exception):
    """Another worker found that nothing more can be done, or the user interrupted."""


def read_sums(text: str) -> dict[str, str]:
    """Return path -> SHA-256 of a published `SHA256SUMS.txt` (`<sha256> <path>` a line, as sha256sum writes it).

    Raises:
        ValueError: a line is of another form, a path could lead out of the folder or to a file that the download
            itself writes, a path is listed twice with different sums, or nothing is listed.
    """
    sums: dict[str, str] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *]?(.+)", line)
        where = f"{SUMS_FILE}, line {number}: {line[:200]!r}"
        if match is None:
            raise ValueError(f"{where}: accepted is `<64 hexadecimal digits> <path>`. Is this the published file?")
        sha256, path = match[1].lower(), match[2]
        if not _is_plain(path):
            raise ValueError(
                f"{where}: accepted are relative paths of plain names: no `..`, backslash, drive letter or control "
                f"character, nothing that ends in {PART}. Nothing was fetched."
            )
        if sums.setdefault(path, sha256) != sha256:
            raise ValueError(f"{where}: the path is listed twice with different sums. Nothing was fetched.")
    if not sums:
        raise ValueError(f"{SUMS_FILE} lists no files. Is this the published file?")
    return sums


def _is_plain(path: str) -> bool:
    """Tell whether `path` leads to one place below a folder on every system, and not to a file of the download itself."""
    parts = path.split("/")
    return (
        path.isprintable()
        and not set(path) & set('\\:*?"<>|')
        and not any(part.strip(". ") == "" or part[-1] in ". " or len(part.encode()) > 240 for part in parts)
        and len(path.encode()) <= 1000
        and not path.endswith((PART, VERIFIED, LOCK))
    )


def select_paths(sums: dict[str, str], folders: tuple[str, ...]) -> dict[str, str]:
    """Return the part of `sums` that is one of `folders` (or files) or lies below one; "" is everything.

    Raises:
        ValueError: nothing is published below one of them.
    """
    chosen: dict[str, str] = {}
    for folder in folders:
        prefix = folder.rstrip("/") + "/" if folder else ""
        below = {path: sha256 for path, sha256 in sums.items() if path.startswith(prefix) or path == folder}
        if not below:
            top = sorted({path.split("/")[0] for path in sums})
            raise ValueError(f"{folder!r}: nothing is published there. Top level: {', '.join(top[:20])}.")
        chosen |= below
    return chosen


def fetch_sums(base_url: str, **options) -> dict[str, str]:
    """Return path -> SHA-256 as published in `base_url`.

    Raises:
        ConnectionError: the file cannot be had.
        ValueError: it is not understood, see `read_sums`.
    """
    downloader = _Downloader(base_url, Path(), {}, **options)

    def attempt() -> bytes:
        with downloader.request(SUMS_FILE) as response:
            return b"".join(_chunks(response))

    try:
        return read_sums(downloader.retried(attempt).decode("utf-8", errors="replace"))
    except _Failed as error:
        raise ConnectionError(f"{base_url}{SUMS_FILE}: {error}. Nothing was fetched.") from error


def download_files(
    base_url: str,
    folder: str | Path,
    sums: dict[str, str],
    *,
    num_workers: int = 4,
    timeout: float = 30,
    retries: int = 5,
    progress: bool = True,
    num_bytes: int | None = None,
) -> DownloadReport:
    """Bring the files of `sums` to `folder`; return what became of each. What fails does not stop the others.

    Args:
        base_url (`str`): http or https; the paths of `sums` follow it.
        folder: made where absent; files that are there and right are kept, wrong ones are replaced.
        sums: path -> SHA-256, from `read_sums`.
        timeout (`float`): seconds without a byte after which a connection counts as dropped.
        retries (`int`): failures of one file in a row, without progress, before it is given up.
        num_bytes (`int`, *optional*): what all files take at least. Default: the server is asked, if they are few.

    Raises:
        ValueError: an argument is none of the above.
        OSError: the disk is or would be full (what is there is kept), or another download writes to `folder`.
    """
    if strange := [path for path in sums if not _is_plain(path)]:
        raise ValueError(f"sums: {strange[0][:200]!r} is no plain relative path, see `read_sums`. Nothing was fetched.")
    folder = Path(folder)
    options = {"num_workers": num_workers, "timeout": timeout, "retries": retries, "progress": progress}
    downloader = _Downloader(base_url, folder, sums, **options)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(folder / LOCK, timeout=1))  # two writers of one part would spoil it
        except TimeoutError:
            raise OSError(f"{folder}: another download is writing here. Wait for it to end, or stop it.") from None
        return downloader.run(num_bytes)


class _Downloader:
    def __init__(self, base_url, folder, sums, *, num_workers=4, timeout=30.0, retries=5, progress=True):
        if num_workers < 1 or retries < 0 or timeout <= 0:
            raise ValueError(
                f"num_workers={num_workers}, retries={retries}, timeout={timeout}: accepted are at least 1, at least "
                "0, and more than 0 seconds."
            )
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url {base_url!r}: accepted are addresses that begin with http:// or https://.")
        self.base_url = base_url.rstrip("/") + "/"
        self.folder, self.sums = folder, sums
        self.num_workers, self.timeout, self.retries, self.progress = num_workers, timeout, retries, progress
        self.opener = urllib.request.build_opener(_CautiousRedirects)
        self.opener.addheaders = [("User-Agent", "anyecg-hf")]  # some servers refuse Python's own name
        self.report = DownloadReport()
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.why_stopped, self.num_dropped = "interrupted", 0
        self.sizes: dict[str, int] = {}

    def run(self, num_bytes: int | None) -> DownloadReport:
        try:
            with _Verified(self.folder / VERIFIED) as verified, ThreadPoolExecutor(self.num_workers) as pool:
                try:
                    self._run(pool, verified, num_bytes)
                except BaseException:  # Ctrl-C included: the workers end at their next chunk
                    self.stop.set()
                    raise
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            to_come, free = self._bytes_to_come(num_bytes), shutil.disk_usage(self.folder).free
            raise OSError(
                error.errno,
                f"{self.folder}: the disk has no room. At least {to_come:,} bytes are to come, {free:,} are free: "
                f"{max(0, to_come - free):,} are missing. What has come is kept: make room, then run the same again",
            ) from error
        self.report.fetched.sort()
        return self.report

    def _run(self, pool: ThreadPoolExecutor, verified: _Verified, num_bytes: int | None) -> None:
        are_whole = pool.map(lambda path: verified.holds(self.folder / path, path, self.sums[path]), self.sums)
        self.report.kept = sorted(path for path, is_whole in zip(self.sums, are_whole) if is_whole)
        missing = sorted(set(self.sums) - set(self.report.kept))
        if num_bytes is None and len(missing) <= MOST_HEAD_REQUESTS:
            self.sizes = {path: size for path, size in zip(missing, pool.map(self.size_of, missing)) if size}
        to_come = self._bytes_to_come(num_bytes)
        if to_come > shutil.disk_usage(self.folder).free:
            raise OSError(errno.ENOSPC, "not begun")
        options = {"total": to_come or None, "unit": "B", "unit_scale": True, "disable": not self.progress}
        with tqdm(desc=f"{len(missing)} files", **options) as self.bar:
            list(pool.map(lambda path: self._bring(path, verified), missing))

    def _bytes_to_come(self, num_bytes: int | None) -> int:
        """Return how many bytes are still to come, as far as known: of `num_bytes` in all, or by the sizes of files."""
        fetched = set(self.report.fetched)
        unfinished = {path: size for path, size in self.sizes.items() if path not in fetched}
        by_files = sum(max(0, size - _size_on_disk(self.part_of(path))) for path, size in unfinished.items())
        if num_bytes is None:
            return by_files
        present = sum(_size_on_disk(self.folder / path) or _size_on_disk(self.part_of(path)) for path in self.sums)
        return max(by_files, num_bytes - present)

    def _bring(self, path: str, verified: _Verified) -> None:
        """Fetch one file and note what became of it. Only a full disk and a server that is gone stop the others."""
        try:
            if self.stop.is_set():
                raise _Stopped
            self.fetch(path)
            verified.add(self.folder / path, path, self.sums[path])
            with self.lock:
                self.report.fetched.append(path)
                self.num_dropped = 0
        except _Stopped:
            self.report.failed[path] = f"not fetched: {self.why_stopped}"
        except _Failed as error:
            if not _size_on_disk(self.part_of(path)):
                self.part_of(path).unlink(missing_ok=True)
            self.report.failed[path] = str(error)
            with self.lock:
                self.num_dropped += isinstance(error.__cause__, _Dropped)
                if self.num_dropped >= MOST_DROPPED:
                    self.why_stopped = f"the server seems to be gone; the file before: {error}"
                    self.stop.set()
        except OSError as error:
            if error.errno in FULL_DISK:
                self.why_stopped = "the disk is full"
                self.stop.set()
                raise
            self.report.failed[path] = f"cannot be written: {error}"

    def part_of(self, path: str) -> Path:
        return self.folder / (path + PART)

    def fetch(self, path: str) -> None:
        """Bring one file whole under its name, trying again where that may help."""
        target, part = self.folder / path, self.part_of(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file():  # not right: no one may take it for whole; if only its end is missing, it is gone on with
            os.replace(target, part)
        self.retried(lambda: self._attempt(path, part), progress=lambda: _size_on_disk(part))
        os.replace(part, target)

    def retried(self, attempt: Callable, progress: Callable[[], int] = lambda: 0):
        """Return what `attempt` returns, trying again after growing pauses while it fails with `_Temporary`."""
        failures = furthest = 0
        while True:
            try:
                return attempt()
            except _Temporary as error:
                reached = progress()
                failures = 1 if reached > furthest else failures + 1
                furthest = max(reached, furthest)
                if failures > self.retries:
                    raise _Failed(f"{error} (given up after {failures} failures in a row)") from error
                pause = FIRST_PAUSE * 2 ** min(failures - 1, 10) if error.pause is None else error.pause
                if self.stop.wait(min(pause, LONGEST_PAUSE)):
                    raise _Stopped from None

    def _attempt(self, path: str, part: Path) -> None:
        """Add to `part` what it lacks and flush it to the disk. A part with a wrong sum is deleted."""
        with open(part, "ab+") as stream:
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256")  # of what an earlier attempt or run has left
            if digest.hexdigest() != self.sums[path]:
                digest = self._receive(path, stream, digest)
            stream.flush()
            os.fsync(stream.fileno())
        if digest.hexdigest() != self.sums[path]:
            part.unlink()
            raise _Temporary(f"its SHA-256 is {digest.hexdigest()}, published is {self.sums[path]}", pause=FIRST_PAUSE)

    def _receive(self, path, stream, digest):
        have = stream.seek(0, os.SEEK_END)
        response, start = self._open_at(path, have)
        with response:
            if start != have:
                stream.truncate(0)
                digest = hashlib.sha256()
            if response.length is not None:
                self.sizes[path] = start + response.length
            for chunk in _chunks(response):
                if self.stop.is_set():
                    raise _Stopped
                stream.write(chunk)
                digest.update(chunk)
                with self.lock:
                    self.report.num_bytes += len(chunk)
                    self.bar.update(len(chunk))
        return digest

    def _open_at(self, path: str, have: int) -> tuple[HTTPResponse, int]:
        """Return the response and the byte with which it begins: `have`, or 0 where the server has no such range."""
        if have:
            response = self.request(path, first_byte=have)
            begins = re.match(rf"bytes {have}-", response.headers.get("Content-Range", ""))
            if response.status == 206 and begins:
                return response, have
            if response.status == 200:
                return response, 0
            response.close()
        return self.request(path), 0

    def size_of(self, path: str) -> int | None:
        """Return the size of a published file, None where the server does not say: then it is found out on the way."""
        try:
            with self.request(path, method="HEAD") as response:
                size = response.headers.get("Content-Length", "")
                return int(size) if re.fullmatch(r"[0-9]{1,18}", size) else None
        except (_Failed, _Temporary):
            return None

    def request(self, path: str, *, method: str = "GET", first_byte: int = 0) -> HTTPResponse:
        """Return the open response to one request; errors as `_Temporary` or `_Failed`. 416 is a response."""
        url = self.base_url + urllib.parse.quote(path)
        headers = {"Range": f"bytes={first_byte}-"} if first_byte else {}
        try:
            return self.opener.open(urllib.request.Request(url, headers=headers, method=method), timeout=self.timeout)
        except urllib.error.HTTPError as error:
            if error.code == 416 and first_byte:
                return error
            error.close()
            message = f"{error.code} {error.reason} ({url})"
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _Temporary(message, _pause_of(error.headers.get("Retry-After"))) from error
            raise _Failed(message) from error
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                raise _Failed(f"{error.reason} ({url})") from error
            raise _Dropped(f"{type(error).__name__}: {error} ({url})") from error


class _CautiousRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects lead to http(s) only, and never from https to http: the sums themselves are not signed."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not newurl.startswith(("https://", "http://") if req.type == "http" else "https://"):
            raise urllib.error.HTTPError(req.full_url, 403, f"redirected to {newurl}: refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Verified:
    """Which files were found right: one JSON line each, size, time of change and sum. A half line is passed over."""

    def __init__(self, path: Path):
        self.path, self.lock, self.entries = path, threading.Lock(), {}
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
            try:
                name, *state = json.loads(line)
                self.entries[name] = state
            except (ValueError, TypeError):  # cut by a kill, or not ours: that file is read once more
                continue

    def __enter__(self):
        self.stream = open(self.path, "a", encoding="utf-8")
        self.stream.write("\n")  # ends a line that a kill has cut
        return self

    def __exit__(self, *_):
        self.stream.close()

    def holds(self, file: Path, name: str, sha256: str) -> bool:
        """Tell whether `file` is there with this sum; it is read only where it is new or has changed."""
        if not file.is_file():
            return False
        if self.entries.get(name) == _state(file, sha256):
            return True
        before = _state(file, sha256)
        with open(file, "rb") as stream:
            is_right = hashlib.file_digest(stream, "sha256").hexdigest() == sha256
        if is_right:
            self._write(name, before)
        return is_right

    def add(self, file: Path, name: str, sha256: str) -> None:
        self._write(name, _state(file, sha256))

    def _write(self, name: str, state: list) -> None:
        with self.lock:
            self.stream.write(json.dumps([name, *state]) + "\n")
            self.stream.flush()


def _state(file: Path, sha256: str) -> list:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, sha256]


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    """Yield the body as it comes; raise `_Temporary` where it ends before the announced length."""
    remaining = response.length  # None where the server does not announce it
    try:
        while chunk := response.read1(CHUNK_BYTES):
            remaining = None if remaining is None else remaining - len(chunk)
            yield chunk
    except (OSError, HTTPException) as error:
        raise _Dropped(f"the connection broke: {type(error).__name__}: {error}") from error
    if remaining:
        raise _Dropped(f"the connection ended {remaining:,} bytes early")


def _pause_of(retry_after: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; None where there is none that is understood."""
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _size_on_disk(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
