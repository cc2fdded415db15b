"""Data files of WFDB records, in every storage format, to integers. Memory follows the size of the file, no header.

Source: signal(5) of the WFDB Applications Guide.
"""

import numpy as np

try:
    import soundfile
except (ImportError, OSError):  # OSError: the package is there, its C library is not
    soundfile = None

LARGEST_FLAC_SAMPLES = 30_000_000  # a constant signal packs without limit, so beyond this ...
FLAC_SAMPLES_PER_BYTE = 20  # ... no file may hold more than this; an ECG takes about one
DIFFERENCES = 8  # the format that stores first differences
FLAC_BITS = {508: 8, 516: 16, 524: 24}
_BYTES_PER_SAMPLE = {8: 1, 80: 1, 16: 2, 61: 2, 160: 2, 24: 3, 32: 4}
_BITS = {80: 8, 508: 8, 310: 10, 311: 10, 212: 12, 16: 16, 61: 16, 160: 16, 516: 16, 24: 24, 524: 24, 32: 32}
NO_VALUE = {form: -(2 ** (bits - 1)) for form, bits in _BITS.items()}  # differences have no marker
KNOWN_FORMATS = {DIFFERENCES, *NO_VALUE}


def read_plain(path, form, *, offset, largest):
    """Return the samples of a file without compression, in the order of the file.

    Args:
        path (`pathlib.Path`): the data file.
        form (`int`): storage format, 8 to 311.
        offset (`int`): bytes before the first sample.
        largest (`int` or `None`): how many samples the header announces; no more are read.

    Returns:
        `np.ndarray` of shape `(num_samples,)`, int32; for format 8 the differences.
    """
    available = _num_samples(form, max(path.stat().st_size - offset, 0))
    wanted = available if largest is None else min(available, largest)
    with open(path, "rb") as file:
        file.seek(offset)
        data = np.frombuffer(file.read(_num_bytes(form, wanted)), np.uint8)
    return _DECODERS[form](data)[:wanted]


def read_flac(path, form, *, num_channels, samples_per_frame, where):
    """Return the samples of a FLAC file in the order of the other formats: frame by frame, channel by channel.

    Returns:
        `np.ndarray` of shape `(num_frames * num_channels * samples_per_frame,)`, int32.

    Raises:
        ValueError: soundfile is not installed; the file is damaged, or not what the header says.
    """
    if soundfile is None:
        raise ValueError(f"{where}: compressed with FLAC; to read it: pip install soundfile")
    largest = max(LARGEST_FLAC_SAMPLES, FLAC_SAMPLES_PER_BYTE * path.stat().st_size)
    try:
        info = soundfile.info(str(path))
        if info.format != "FLAC" or info.channels != num_channels or info.frames * num_channels > largest:
            raise ValueError(
                f"{where}: {info.format} with {info.channels} channels of {info.frames} samples; needed: FLAC with "
                f"{num_channels} channels, one for each signal, and at most {largest} samples in all."
            )
        data = soundfile.read(str(path), dtype="int32", always_2d=True)[0]
    except soundfile.SoundFileError as error:
        raise ValueError(f"{where}: damaged or no FLAC file ({error}).") from None
    data >>= 32 - FLAC_BITS[form]
    frames = len(data) // samples_per_frame
    return data[: frames * samples_per_frame].reshape(frames, samples_per_frame, -1).transpose(0, 2, 1).ravel()


def _num_samples(form, num_bytes):
    if form == 212:
        return num_bytes * 2 // 3
    if form in (310, 311):  # three samples in four bytes; what a cut last group still holds differs
        left = num_bytes % 4
        return num_bytes // 4 * 3 + (max(left - 1, 0) if form == 311 else left // 2)
    return num_bytes // _BYTES_PER_SAMPLE[form]


def _num_bytes(form, num_samples):
    if form == 212:
        return (num_samples * 3 + 1) // 2
    if form in (310, 311):
        return num_samples // 3 * 4 + 4
    return num_samples * _BYTES_PER_SAMPLE[form]


def _whole_groups(data, size):
    """Return `data` as int32 rows of `size` bytes, the last one filled up with zeros."""
    padded = np.concatenate([data, np.zeros(-len(data) % size, np.uint8)])
    return padded.reshape(-1, size).astype(np.int32)


def _signed(values, bits):
    """Return the lowest `bits` of `values` read as two's complement."""
    half = 1 << (bits - 1)
    return ((values & (2 * half - 1)) ^ half) - half


def _decode_212(data):
    low, middle, high = _whole_groups(data, 3).T
    return _signed(np.stack([low | middle << 8, high | middle << 4 & 0xF00], axis=1).ravel(), 12)


def _decode_310(data):
    words = _whole_groups(data, 4)
    first, second = words[:, 0] | words[:, 1] << 8, words[:, 2] | words[:, 3] << 8
    return _signed(np.stack([first >> 1, second >> 1, first >> 11 | second >> 11 << 5], axis=1).ravel(), 10)


def _decode_311(data):
    words = _whole_groups(data, 4)
    word = words[:, 0] | words[:, 1] << 8 | words[:, 2] << 16 | words[:, 3] << 24
    return _signed(np.stack([word, word >> 10, word >> 20], axis=1).ravel(), 10)


def _decode_24(data):
    low, middle, high = _whole_groups(data, 3).T
    return _signed(low | middle << 8 | high << 16, 24)


_DECODERS = {
    8: lambda data: data.view(np.int8).astype(np.int32),
    80: lambda data: data.astype(np.int32) - 128,
    16: lambda data: data.view("<i2").astype(np.int32),
    61: lambda data: data.view(">i2").astype(np.int32),
    160: lambda data: data.view("<u2").astype(np.int32) - 32768,
    24: _decode_24,
    32: lambda data: data.view("<i4").astype(np.int32),
    212: _decode_212,
    310: _decode_310,
    311: _decode_311,
}
