"""Fetch one record of PTB-XL from PhysioNet, check it, and keep it in the user's cache. Used by demo.py."""

import hashlib
import http.client
import os
import threading
import urllib.request
from pathlib import Path

# ECG 18124 of PTB-XL 1.0.3, in fold 9, which the shipped checkpoints were not trained on. The hash was computed from a
# copy of the release.
URL = "https://physionet.org/files/ptb-xl/1.0.3/records500/18000/18124_hr.dat"
SHA256 = "6d387137f92738541fa01e82145b10d730a45942ec31c6be9ed549af1faa85bc"
SOURCE = "PTB-XL 1.0.3, ECG 18124 (Wagner et al. 2022, PhysioNet, doi.org/10.13026/kfzx-aw45, CC BY 4.0)"
LEADS = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")
SAMPLES = 5000  # of 2 bytes in each lead
CONNECT_SECONDS, FETCH_SECONDS = 5.0, 15.0
FetchError = (OSError, http.client.HTTPException)


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anyecg-hf"


def fetch_record(folder, url=URL, sha256=SHA256):
    """Return the path of the record's header in `folder`; the samples are fetched unless they are there already.

    Raises:
        FetchError: no answer, none in time, or bytes with another hash, of which nothing is kept.
    """
    samples = folder / url.rsplit("/", 1)[-1]
    if not (samples.is_file() and hashlib.sha256(samples.read_bytes()).hexdigest() == sha256):
        content = _within(FETCH_SECONDS, _download, url)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise OSError(f"{len(content)} bytes came from {url}, with another SHA-256 than expected")
        _write(samples, content)
    # PTB-XL's headers all say the same: 500 Hz, 12 leads, 16 bits of 1 microvolt
    lines = [
        f"{samples.stem} {len(LEADS)} 500 {SAMPLES}",
        *(f"{samples.name} 16 1000/mV 16 0 0 0 0 {n}" for n in LEADS),
    ]
    header = samples.with_suffix(".hea")
    _write(header, "\n".join([*lines, ""]).encode())
    return header


def _download(url):
    with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as answer:
        return answer.read(2 * len(LEADS) * SAMPLES + 1)  # one byte too many is enough to know


def _within(seconds, work, *arguments):
    """Return `work(*arguments)`, or give up after `seconds`: looking up a name has no limit else, nor a slow server."""
    outcome = []

    def run():
        try:
            outcome.append((work(*arguments), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    value, error = outcome[0] if outcome else (None, TimeoutError(f"no complete answer within {seconds:g} s"))
    if error is not None:
        raise error
    return value


def _write(path, content):
    """Write under another name first: who looks finds the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)
