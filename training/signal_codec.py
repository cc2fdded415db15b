"""A record's whole-number samples as bytes and back, bit for bit: FLAC of what cannot be foreseen.

Two things make the bytes smaller than FLAC of all leads:

- III, aVR, aVL and aVF follow from I and II up to rounding. Only the difference is stored, and nothing where a rule of
  rounding makes it zero throughout.
- Samples that were rescaled when a corpus was published are the multiples of a step, rounded (4.88 in Chapman/Ningbo,
  2.44 in Georgia). Which multiple is stored: up to 2.3 bits a sample less, and the limb leads agree again.

Little-endian: `HEADER`; for each `BLOCK` of samples its parts; CRC-32 of all that. A part is `PART` (how it is packed, how
many bytes) and its data: up to 8 leads in the record's order, less those that are derived; then the differences of these,
two leads at a time.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import soundfile

from anyecg_hf.leads import STANDARD_LEADS, resolve_lead_name

VERSION = 1
# version, leads, samples; step: numerator, denominator, 1 if towards zero; rows of I, II, III, aVR, aVL, aVF (NOWHERE:
# absent or stored as they are); how III (always 0), aVR, aVL, aVF are rounded.
HEADER = struct.Struct("<BHI HHB 6H 4B")
PART = struct.Struct("<BI")
CRC = struct.Struct("<I")
NOWHERE = 0xFFFF
LEADS_OF_A_PART, DERIVED_LEADS_OF_A_PART = 8, 2  # what one FLAC stream takes; what one byte takes as NIBBLES
BLOCK = 3 * 4096  # samples packed together: what the shortest window of a long record costs. FLAC's frames have 4096
MAX_SAMPLES_PER_BYTE = 2048  # 12 flat leads reach 900
STEPS = ((122, 25), (61, 25))  # 4.88 and 2.44: 20 and 10 mV in 4096 steps, as uV. No tie can occur: 25 is odd
RAW_16, RAW_32, FLAC_16, FLAC_24, DELTAS, NIBBLES, ZEROS = range(7)
III, AVR, AVL, AVF = range(2, 6)  # places in the header's rows
ROUNDINGS = (  # of half an odd number: what is added to the whole number below
    lambda below, total: 0,
    lambda below, total: 1,
    lambda below, total: below & 1,  # to even
    lambda below, total: total < 0,  # towards zero
    lambda below, total: total > 0,  # away from zero
)


def encode_signal(samples: np.ndarray, lead_names: Sequence[str]) -> bytes:
    """Return the bytes from which `decode_signal` makes the same numbers.

    Args:
        samples (`np.ndarray` of shape `(num_leads, num_samples)`): any integer type, each number within 32 bits.
        lead_names (sequence of `str`): one per row, in any order, standard leads or not. They tell what may follow from
            what: wrong ones, or leads of different gain, cost bytes, never a bit of the signal.

    Raises:
        TypeError: `samples` are not integers.
        ValueError: wrong shape, a number beyond 32 bits, or not one name per row.
    """
    samples = _checked(samples, lead_names)
    step, multiples = _divide_by_step(samples)
    rows, roundings = _choose_derived(multiples, _limb_rows(lead_names))
    data = _encode(multiples, step, rows, roundings)
    if any(row != NOWHERE for row in rows):  # differences can cost more than the leads would
        data = min(data, _encode(multiples, step, [NOWHERE] * 6, [0] * 4), key=len)
    return data + CRC.pack(zlib.crc32(data))


def decode_signal(data: bytes, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return the samples that `encode_signal` was given, int32 `(num_leads, num_samples)`.

    Args:
        data (`bytes`): from `encode_signal`.
        start, stop (`int`): decode only the samples from `start` up to, not including, `stop`: a window of a long record
            takes the time of the blocks that it touches.

    Raises:
        ValueError: the bytes are damaged, cut off, of another version, or made to deceive; or the record has no such
            window. Memory is taken only for what is announced, if that is at most `MAX_SAMPLES_PER_BYTE` for each byte.
    """
    data = memoryview(data)  # so that slices are no copies
    if len(data) < HEADER.size + CRC.size:
        raise _refused(f"{len(data)} bytes are fewer than the header's {HEADER.size + CRC.size}")
    if CRC.unpack(data[-CRC.size :])[0] != zlib.crc32(data[: -CRC.size]):
        raise _refused("the check sum does not agree, they are damaged or cut off")
    if data[0] != VERSION:
        raise _refused(f"version {data[0]} is unknown, version {VERSION} is accepted")
    _, leads, length, *fields = HEADER.unpack(data[: HEADER.size])
    step, rows, roundings = fields[:3], fields[3:9], fields[9:]
    _check_header(leads, step, rows, roundings)
    if leads * length > MAX_SAMPLES_PER_BYTE * len(data):
        raise _refused(f"{leads} x {length} samples are announced, which cannot be in {len(data)} bytes")
    stop = length if stop is None else stop
    if not 0 <= start <= stop <= length:
        raise ValueError(
            f"start={start}, stop={stop}; the record has {length} samples: 0 <= start <= stop <= {length}."
        )

    parts = _Parts(data[HEADER.size : -CRC.size])
    signal = np.empty((leads, stop - start), np.int32)
    for first in range(0, length, BLOCK):
        block_length = min(BLOCK, length - first)
        if first >= stop or first + block_length <= start:
            parts.skip(len(_stored_groups(leads, rows)) + len(_derived_groups(rows)))
            continue
        if start <= first and first + block_length <= stop:
            _decode_block(parts, signal[:, first - start :][:, :block_length], step, rows, roundings)
            continue
        block = np.empty((leads, block_length), np.int32)
        _decode_block(parts, block, step, rows, roundings)
        block = block[:, max(start - first, 0) : stop - first]
        at = max(first - start, 0)
        signal[:, at : at + block.shape[1]] = block
    parts.check_end()
    return signal


def _decode_block(parts, out, step, rows, roundings):
    """Put the samples of a block into `out`, int32."""
    leads, length = out.shape
    stored = [(group, parts.next(len(group), length)) for group in _stored_groups(leads, rows)]
    derived = [(group, parts.next(len(group), length, is_derived=True)) for group in _derived_groups(rows)]
    is_narrow = all(part.dtype.itemsize <= 2 for _, part in stored + derived)  # the sums are then within 32 bits
    block = out if is_narrow else np.empty(out.shape, np.int64)
    for group, part in stored:
        for lead, samples in zip(group, part):
            block[lead] = samples
    for group, part in derived:
        for lead, difference in zip(group, part):
            block[rows[lead]] = _foresee(block, rows, lead, roundings) + difference
    if not is_narrow:
        out[:] = _as_int32(block)
    if step[:2] != [1, 1]:
        out[:] = _as_int32(_multiply(out.astype(np.int64), *step))


def _refused(reason):
    return ValueError(f"These bytes are not a signal of encode_signal: {reason}. Build or download the record again.")


def _checked(samples, lead_names):
    samples = np.asarray(samples)
    if samples.dtype.kind not in "iu":
        raise TypeError(f"samples of type {samples.dtype}; pass the whole numbers of the file, not millivolt.")
    if samples.ndim != 2 or not 0 < len(samples) < NOWHERE or samples.shape[1] >= 2**32:
        raise ValueError(f"samples of shape {samples.shape}; pass (leads, samples), 1 to {NOWHERE - 1} leads.")
    if isinstance(lead_names, str) or len(lead_names) != len(samples):
        raise ValueError(f"lead_names={lead_names!r} for {len(samples)} rows; pass a list, one name per row.")
    if not _fits(samples, 32):
        raise ValueError(f"samples from {samples.min()} to {samples.max()}; accepted are numbers of 32 bits.")
    return samples.astype(np.int64)


def _fits(samples, bits):
    return not samples.size or (samples.min() >= -(1 << bits - 1) and samples.max() < 1 << bits - 1)


def _as_int32(samples):
    if not _fits(samples, 32):
        raise _refused("samples beyond 32 bits follow from them")
    return samples.astype(np.int32)


# The step --------------------------------------------------------------------------------------------------------------


def _divide_by_step(samples):
    """Return `(numerator, denominator, towards_zero)` of the step of which all samples are multiples, and these."""
    for step in ((*fraction, towards_zero) for fraction in STEPS for towards_zero in (0, 1)):
        for part in (samples[:, :500], samples):  # the first is there to be quick
            multiples = _divide(part, *step)
            if not np.array_equal(_multiply(multiples, *step), part):
                break
        else:
            return step, multiples
    divisor = int(np.gcd.reduce(samples, axis=None)) or 1  # not zero by now: zeros are multiples of any step
    divisor = divisor if divisor <= 0xFFFF else 1
    return (divisor, 1, 0), samples // divisor


def _divide(samples, numerator, denominator, towards_zero):
    if towards_zero:  # the first multiple whose magnitude is not below the sample's
        return np.sign(samples) * -(-abs(samples) * denominator // numerator)
    return (2 * samples * denominator + numerator) // (2 * numerator)


def _multiply(multiples, numerator, denominator, towards_zero):
    if towards_zero:
        return np.sign(multiples) * (abs(multiples) * numerator // denominator)
    return (2 * multiples * numerator + denominator) // (2 * denominator)


# The limb leads --------------------------------------------------------------------------------------------------------


def _limb_rows(lead_names):
    """Return the rows of I, II, III, aVR, aVL, aVF; the first where a lead occurs twice."""
    rows = {}
    for row, name in enumerate(lead_names):
        try:
            rows.setdefault(resolve_lead_name(name), row)
        except ValueError:
            continue  # not a standard lead: nothing follows from its name
    return [rows.get(name, NOWHERE) for name in STANDARD_LEADS[:6]]


def _choose_derived(signal, limb_rows):
    """Return the rows with only those leads that had better be derived, and the rounding of each with the least left over."""
    rows, roundings = [*limb_rows[:2], *[NOWHERE] * 4], [0] * 4
    if NOWHERE in limb_rows[:2]:
        return [NOWHERE] * 6, roundings
    for lead in (III, AVR, AVL, AVF):
        if limb_rows[lead] == NOWHERE:
            continue
        actual, left_over = signal[limb_rows[lead]], []
        for rounding in range(len(ROUNDINGS) if lead != III else 1):
            roundings[lead - III] = rounding
            left_over.append(abs(actual - _foresee(signal, rows, lead, roundings)).sum())
        roundings[lead - III] = int(np.argmin(left_over))
        if min(left_over) <= abs(np.diff(actual, 2)).sum():  # else FLAC foresees it better
            rows[lead] = limb_rows[lead]
    return (rows, roundings) if any(row != NOWHERE for row in rows[III:]) else ([NOWHERE] * 6, [0] * 4)


def _foresee(signal, rows, lead, roundings):
    """Return a derived lead. aVL and aVF: from III where it is derived as well, as its rounding is known then."""
    one, two = signal[rows[0]], signal[rows[1]]
    if lead == III:
        return two - one
    three = two - one if rows[III] == NOWHERE else signal[rows[III]]
    total = {AVR: -(one + two), AVL: one - three, AVF: two + three}[lead]
    below = total >> 1
    below += total & ROUNDINGS[roundings[lead - III]](below, total) & 1
    return below


def _stored_groups(leads, rows):
    stored = sorted(set(range(leads)) - set(rows[III:]))
    return [stored[at : at + LEADS_OF_A_PART] for at in range(0, len(stored), LEADS_OF_A_PART)]


def _derived_groups(rows):
    derived = [lead for lead in (III, AVR, AVL, AVF) if rows[lead] != NOWHERE]
    return [derived[at : at + DERIVED_LEADS_OF_A_PART] for at in range(0, len(derived), DERIVED_LEADS_OF_A_PART)]


# Header and parts ------------------------------------------------------------------------------------------------------


def _encode(multiples, step, rows, roundings):
    leads, length = multiples.shape
    data = [HEADER.pack(VERSION, leads, length, *step, *rows, *roundings)]
    for first in range(0, length, BLOCK):
        for kind, part in _encode_block(multiples[:, first : first + BLOCK], rows, roundings):
            data += [PART.pack(kind, len(part)), part]
    return b"".join(data)


def _encode_block(block, rows, roundings):
    yield from (_pack(block[group]) for group in _stored_groups(len(block), rows))
    for group in _derived_groups(rows):
        differences = np.array([block[rows[lead]] - _foresee(block, rows, lead, roundings) for lead in group])
        yield _pack(differences) if differences.any() else (ZEROS, b"")


def _check_header(leads, step, rows, roundings):
    present = [row for row in rows if row != NOWHERE]
    if leads < 1 or 0 in step[:2] or step[2] > 1 or max(roundings) >= len(ROUNDINGS) or roundings[0]:
        raise _refused(f"the header states {leads} leads, step {step}, roundings {roundings}")
    if max(present, default=0) >= leads or len(set(present)) < len(present) or (present and NOWHERE in rows[:2]):
        raise _refused(f"the header states limb leads in rows {rows} of {leads}")


class _Parts:
    """The parts of a record's bytes, one after the other."""

    def __init__(self, data):
        self.data, self.position = data, 0

    def next(self, leads, length, is_derived=False):
        """Return the samples of the next part, `(leads, length)`."""
        kind, data = self._next_bytes()
        if kind == ZEROS and is_derived and not data:
            return np.zeros((leads, length), np.int8)
        return _unpack(kind, data, leads, length)

    def skip(self, count):
        for _ in range(count):
            self._next_bytes()

    def _next_bytes(self):
        start = self.position + PART.size
        if start > len(self.data):
            raise _refused("a part is missing")
        kind, size = PART.unpack(self.data[self.position : start])
        self.position = start + size
        if self.position > len(self.data):
            raise _refused(f"a part of {size} bytes is cut off")
        return kind, self.data[start : self.position]

    def check_end(self):
        if self.position != len(self.data):
            raise _refused(f"{len(self.data) - self.position} bytes follow the last part")


def _pack(rows):
    """Return the kind and the bytes of the shortest form of `rows`, int64."""
    kind, raw_type = (RAW_16, "<i2") if _fits(rows, 16) else (RAW_32, "<i4")
    found = [(kind, rows.astype(raw_type).tobytes())]
    if _fits(rows, 24):
        found.append((FLAC_16, _to_flac(rows, 16)) if kind == RAW_16 else (FLAC_24, _to_flac(rows, 24)))
    else:
        changes = np.diff(rows, prepend=0).astype("<u4").view(np.uint8).reshape(*rows.shape, 4)  # modulo 2 ** 32
        found.append((DELTAS, _deflate(np.moveaxis(changes, 2, 0).tobytes(), zlib.Z_DEFAULT_STRATEGY)))
    if len(rows) <= DERIVED_LEADS_OF_A_PART and _fits(rows, 4):
        # One byte for two leads: what is left over of them goes together. Nothing repeats, so there is nothing to look for
        found.append(
            (NIBBLES, _deflate(((rows[0] + 8) * 16 + rows[-1] + 8).astype(np.uint8).tobytes(), zlib.Z_HUFFMAN_ONLY))
        )
    return min(found, key=lambda item: len(item[1]))


def _unpack(kind, data, leads, length):
    if kind in (RAW_16, RAW_32):
        if len(data) != leads * length * (2 if kind == RAW_16 else 4):
            raise _refused(f"{len(data)} bytes do not hold {leads} x {length} samples")
        return np.frombuffer(data, "<i2" if kind == RAW_16 else "<i4").reshape(leads, length)
    if kind in (FLAC_16, FLAC_24):
        return _from_flac(data, leads, length, 16 if kind == FLAC_16 else 24)
    if kind == DELTAS:
        planes = _inflate(data, 4 * leads * length).reshape(4, leads, length)
        changes = np.ascontiguousarray(np.moveaxis(planes, 0, 2)).view("<u4")[..., 0]
        return np.cumsum(changes, axis=1, dtype=np.uint32).view(np.int32)
    if kind == NIBBLES and leads <= DERIVED_LEADS_OF_A_PART:
        pairs = _inflate(data, length)
        return np.stack([pairs >> 4, pairs & 15][:leads]).view(np.int8) - np.int8(8)
    raise _refused(f"kind {kind} of part is unknown")


def _to_flac(rows, bits):
    with io.BytesIO() as file:
        samples = np.ascontiguousarray(rows.T, np.int16 if bits == 16 else np.int32) << (0 if bits == 16 else 8)
        soundfile.write(file, samples, 48000, f"PCM_{bits}", format="FLAC", compression_level=1.0)
        return file.getvalue()


def _from_flac(data, leads, length, bits):
    if bytes(data[:4]) != b"fLaC":  # soundfile would look for any other format
        raise _refused("a part is not the FLAC stream that it should be")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if (file.channels, file.frames, file.subtype) != (leads, length, f"PCM_{bits}"):
                raise _refused(f"a FLAC stream holds {file.channels} x {file.frames} samples of {file.subtype}")
            samples = file.read(dtype=f"int{16 if bits == 16 else 32}", always_2d=True).T
    except soundfile.SoundFileError as error:
        raise _refused(f"a FLAC stream cannot be read ({error})") from error
    if samples.shape != (leads, length):
        raise _refused(f"a FLAC stream ends after {samples.shape[1]} of {length} samples")
    return samples if bits == 16 else samples >> 8


def _deflate(data, strategy):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return packer.compress(data) + packer.flush()


def _inflate(data, size):
    unpacker = zlib.decompressobj(-15)
    try:
        found = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise _refused(f"a part cannot be inflated ({error})") from error
    if len(found) != size or not unpacker.eof or unpacker.unused_data:
        raise _refused(f"a part does not inflate to {size} bytes")
    return np.frombuffer(found, np.uint8)
