"""Data files of WFDB records, in every storage format, to integers, any part of a file and no more than that part.

Source: signal(5) of the WFDB Applications Guide.
"""

import contextlib

import numpy as np

from .regular_files import open_regular

LARGEST_UNBACKED_VALUES = 30_000_000  # a constant signal packs without limit and a gap is one line, so beyond this ...
VALUES_PER_BYTE = 20  # ... no record may give more values than this for a byte of its files; an ECG takes about one
LARGEST_VALUES = 1_000_000_000  # read at once: twice a day of 12 leads at 500 Hz
DIFFERENCES = 8  # the format that stores first differences
FLAC_BITS = {508: 8, 516: 16, 524: 24}
_BITS = {80: 8, 508: 8, 310: 10, 311: 10, 212: 12, 16: 16, 61: 16, 160: 16, 516: 16, 24: 24, 524: 24, 32: 32}
NO_VALUE = {form: -(2 ** (bits - 1)) for form, bits in _BITS.items()}  # differences have no marker
KNOWN_FORMATS = {DIFFERENCES, *NO_VALUE}
_GROUPS = {8: (1, 1), 80: (1, 1), 16: (1, 2), 61: (1, 2), 160: (1, 2), 24: (1, 3), 32: (1, 4)}  # samples, bytes
_GROUPS |= {212: (2, 3), 310: (3, 4), 311: (3, 4)}
SAMPLES_OF_GROUP = {form: 1 for form in FLAC_BITS} | {form: samples for form, (samples, _) in _GROUPS.items()}
_CHUNK, _FRAMES, _LARGEST_CHUNK = 1 << 17, 256, 1 << 23  # samples decoded at a time: few, but of this many frames
_SUBTYPES = {508: "PCM_S8", 516: "PCM_16", 524: "PCM_24"}


def require_backing(num_values, num_bytes, where):
    """Raise `ValueError` if files of `num_bytes` are to become `num_values` values: more than any real record."""
    if num_values > min(LARGEST_VALUES, max(LARGEST_UNBACKED_VALUES, VALUES_PER_BYTE * num_bytes)):
        raise ValueError(
            f"{where}: {num_values} values announced, its files have {num_bytes} bytes; too many to be true or to be "
            "read at once. If the record is that long, read it in parts, with start_seconds and duration_seconds."
        )


def count_samples(form, num_bytes):
    """Return how many samples of a format without compression a file of `num_bytes` holds."""
    samples, size = _GROUPS[form]
    whole, left = divmod(num_bytes, size)
    if form == 310:  # what a cut last group still holds differs: here the third sample needs all four bytes ...
        return whole * samples + left // 2
    return whole * samples + (max(left - 1, 0) if samples > 1 else 0)  # ... elsewhere each needs one byte more


def plain_frames(path, form, *, offset, per_frame, start, stop):
    """Yield the frames `start` to `stop` of a file without compression, in arrays `(frames, per_frame)` of integers.

    Args:
        path (`pathlib.Path`): the data file; it holds at least `stop` frames.
        form (`int`): storage format, 8 to 311. For format 8 these are the differences.
        offset (`int`): bytes before the first sample.
        per_frame (`int`): samples of a frame, of all signals together.
    """
    samples, size = _GROUPS[form]
    step = _frames_at_a_time(per_frame)
    with open_regular(path) as file:
        for begin in range(start, stop, step):
            first, last = begin * per_frame, min(begin + step, stop) * per_frame
            group = first // samples
            file.seek(offset + group * size)
            data = np.frombuffer(file.read((-(-last // samples) - group) * size), np.uint8)
            decoded = _DECODERS[form](data)[first - group * samples : last - group * samples]
            yield decoded[: len(decoded) // per_frame * per_frame].reshape(-1, per_frame)


def count_flac_samples(path, form, num_channels, where):
    """Return how many samples of each channel a FLAC file announces; `num_channels` is one for each signal."""
    with _open_flac(path, where) as file:
        found, needed = (file.format, file.subtype, file.channels), ("FLAC", _SUBTYPES[form], num_channels)
        if found != needed:
            raise ValueError("{}: {}, {} in {} channels; the header says {}, {} in {}.".format(where, *found, *needed))
        return file.frames


def flac_frames(path, form, *, samples_per_frame, start, stop, where):
    """Yield the frames `start` to `stop` of a FLAC file like `plain_frames`: channel by channel in each frame."""
    with _open_flac(path, where) as file:
        step = _frames_at_a_time(samples_per_frame * file.channels)
        if start:  # a seek decodes, and may fail at damage that lies elsewhere
            file.seek(start * samples_per_frame)
        for begin in range(start, stop, step):
            wanted = min(step, stop - begin) * samples_per_frame
            data = file.read(wanted, dtype="int32", always_2d=True) >> (32 - FLAC_BITS[form])
            frames = len(data) // samples_per_frame
            if frames:
                groups = data[: frames * samples_per_frame].reshape(frames, samples_per_frame, -1)
                yield groups.transpose(0, 2, 1).reshape(frames, -1)
            if len(data) < wanted:
                return


def _frames_at_a_time(per_frame):
    return max(_CHUNK // per_frame, min(_FRAMES, _LARGEST_CHUNK // per_frame), 1)


@contextlib.contextmanager
def _open_flac(path, where):
    """Open a FLAC file as `soundfile.SoundFile`; a damaged one is a `ValueError`, here and while it is read."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package is there, its C library is not
        raise ImportError(f'{where}: compressed with FLAC; to read it: pip install "anyecg-hf[formats]"') from None
    try:
        with open_regular(path) as raw, soundfile.SoundFile(raw) as file:
            yield file
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", "not readable")
        raise ValueError(f"{where}: damaged or no FLAC file ({reason})") from None


def _whole_groups(data, size):
    """Return `data` as rows of `size` bytes, the last one filled up with zeros."""
    padded = np.concatenate([data, np.zeros(-len(data) % size, np.uint8)]) if len(data) % size else data
    return padded.reshape(-1, size)


def _signed(values, bits):
    """Return the lowest `bits` of each of `values` (int16, changed in place) as two's complement, in one row."""
    values <<= 16 - bits
    values >>= 16 - bits
    return values.ravel()


def _decode_212(data):
    low, middle, high = _whole_groups(data, 3).T
    values = np.empty((len(low), 2), np.int16)
    np.left_shift(middle, 8, out=values[:, 0], dtype=np.int16)
    np.left_shift(middle & 0xF0, 4, out=values[:, 1], dtype=np.int16)
    values[:, 0] |= low
    values[:, 1] |= high
    return _signed(values, 12)


def _decode_310(data):
    first, second = _whole_groups(data, 4).view("<u2").T
    values = np.stack([first >> 1, second >> 1, first >> 11 | second >> 11 << 5], axis=1)
    return _signed(values.view(np.int16), 10)


def _decode_311(data):
    word = _whole_groups(data, 4).view("<u4")[:, 0]
    return _signed(np.stack([word, word >> 10, word >> 20], axis=1).astype(np.int16), 10)


def _decode_24(data):
    groups = _whole_groups(data, 3)
    words = np.zeros((len(groups), 4), np.uint8)
    words[:, 1:] = groups
    return words.view("<i4")[:, 0] >> 8


_DECODERS = {
    8: lambda data: data.view(np.int8),
    80: lambda data: data.astype(np.int16) - 128,
    16: lambda data: _whole_groups(data, 2).view("<i2")[:, 0],
    61: lambda data: _whole_groups(data, 2).view(">i2")[:, 0].astype(np.int16),
    160: lambda data: (_whole_groups(data, 2).view("<u2")[:, 0] ^ 0x8000).view(np.int16),
    24: _decode_24,
    32: lambda data: _whole_groups(data, 4).view("<i4")[:, 0],
    212: _decode_212,
    310: _decode_310,
    311: _decode_311,
}
