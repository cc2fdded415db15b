"""Safe access to files: regular ones only, from the record's own folder only, and never more memory than the file's size."""

import os
import stat

LARGEST_DOCUMENT_BYTES = 64_000_000  # of formats that are read whole: a 10-s ECG takes a hundredth of it


def require_regular_file(path):
    """Return `path` if it is a regular file in its folder, or a link from there to the blobs of the same Hub cache.

    Raises:
        OSError: there is none, it is a folder, pipe or device, or a link that leads elsewhere.
    """
    try:
        if stat.S_ISREG(path.lstat().st_mode):  # no link: it is where it says
            return path
        mode, target, home = path.stat().st_mode, path.resolve(), path.parent.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise FileNotFoundError(f"{path}: not found or not readable ({reason}).") from None
    if not stat.S_ISREG(mode):
        raise OSError(f"{path}: not a regular file; folders, pipes and devices are not read.")
    in_hub_cache = target.parent.name == "blobs" and target.parent.parent / "snapshots" in home.parents
    if target.parent != home and not in_hub_cache:
        raise OSError(f"{path}: a link that leads out of the record's folder; copy the file there.")
    return path


def open_regular(path):
    """Return an open binary file; `O_NONBLOCK` and a second look keep a pipe that was put there meanwhile from hanging."""
    require_regular_file(path)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path}: not a regular file; folders, pipes and devices are not read.")
    return os.fdopen(descriptor, "rb")


def read_start(path, num_bytes):
    """Return the first bytes of a file."""
    with open_regular(path) as file:
        return file.read(num_bytes)


def read_whole(path, largest=LARGEST_DOCUMENT_BYTES):
    """Return all bytes of a file.

    Raises:
        ValueError: it is larger than `largest` bytes, or empty.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(
                f"{path}: {size} bytes, at most {largest} are read; no single ECG in this format takes that."
            )
        data = file.read(size)
    if not data:
        raise ValueError(f"{path}: the file is empty.")
    return data
