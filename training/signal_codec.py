"""A record's whole-number samples as bytes and back, bit for bit: what cannot be foreseen of them, in planes of bytes, by zstd.

Three things make the bytes smaller than FLAC of all leads, and faster to decode:

- III, aVR, aVL and aVF follow from I and II up to rounding. Only the difference is stored, and nothing where a rule of
  rounding makes it zero throughout.
- Samples that were rescaled when a corpus was published are the multiples of a step, rounded (4.88 in Chapman/Ningbo,
  2.44 in Georgia). Which multiple is stored: up to 2.3 bits a sample less, and the limb leads agree again.
- Of the rest the differences from sample to sample are stored, or the differences of these: lowest bytes first, then the
  next, which are mostly zero. A general compressor learns which values are frequent; FLAC takes them for noise.

Little-endian: `HEADER`; for each `BLOCK` of samples its parts; CRC-32 of all that. A part is `PART` (how often differences
were taken, how many planes), the size of each plane as `SIZE`, and the planes: of the leads in the record's order, less those
that are derived; then of the differences of these.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from anyecg_hf.leads import STANDARD_LEADS, resolve_lead_name

VERSION = 2
# version, leads, samples; step: numerator, denominator, 1 if towards zero; rows of I, II, III, aVR, aVL, aVF (NOWHERE:
# absent or stored as they are); how III (always 0), aVR, aVL, aVF are rounded.
HEADER = struct.Struct("<BHI HHB 6H 4B")
PART, SIZE = struct.Struct("<BB"), struct.Struct("<I")
CRC = struct.Struct("<I")
NOWHERE = 0xFFFF
MOST_DIFFERENCES, MOST_PLANES = 2, 4
BLOCK = 3 * 4096  # samples packed together: what the shortest window of a long record costs
MAX_SAMPLES, MAX_SAMPLES_PER_BYTE = (
    1 << 24,
    1 << 17,
)  # of a signal; and for each byte. Zeros throughout take next to none
STEPS = ((122, 25), (61, 25))  # 4.88 and 2.44: 20 and 10 mV in 4096 steps, as uV. No tie can occur: 25 is odd
LEVEL = 3  # of 1 to 19: 15 makes a tenth less of PTB-XL, in three times the time
QUICK, THOROUGH = pa.Codec("zstd", compression_level=1), pa.Codec("zstd", compression_level=LEVEL)
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
        ValueError: wrong shape, a number beyond 32 bits, not one name per row, or hours of nothing but zeros.
    """
    samples = _checked(samples, lead_names)
    step, multiples = _divide_by_step(samples)
    rows, roundings = _choose_derived(multiples, _limb_rows(lead_names))
    data = _encode(multiples, step, rows, roundings)
    if any(row != NOWHERE for row in rows):  # differences can cost more than the leads would
        data = min(data, _encode(multiples, step, [NOWHERE] * 6, [0] * 4), key=len)
    if samples.size > _most_samples(data):
        raise ValueError(
            f"samples of shape {samples.shape}, almost all equal: too little to tell from a deceit. Cut the record."
        )
    return data + CRC.pack(zlib.crc32(data))


def decode_signal(data: bytes, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return the samples that `encode_signal` was given, int32 `(num_leads, num_samples)`.

    Args:
        data (`bytes`): from `encode_signal`.
        start, stop (`int`): decode only the samples from `start` up to, not including, `stop`: a window of a long record
            takes the time of the blocks that it touches.

    Raises:
        ValueError: the bytes are damaged, cut off, of another version, or made to deceive; or the record has no such
            window. Memory is taken only for what is announced, and at most for `MAX_SAMPLES` and `MAX_SAMPLES_PER_BYTE`.
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
    if leads * length > _most_samples(data):
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
            parts.skip(1 + bool(_derived(rows)))
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
    stored, derived = _stored(leads, rows), _derived(rows)
    samples = parts.next(len(stored), length)
    if not derived:
        out[:] = samples
    else:
        for lead, row in zip(stored, samples):
            out[lead] = row
        differences = parts.next(len(derived), length)
        is_narrow = _fits(out[rows[:2]], 30) and _fits(differences, 16)  # what follows is then within 32 bits
        block = out if is_narrow else out.astype(np.int64)
        for lead, difference in zip(derived, differences):
            block[rows[lead]] = _foresee(block, rows, lead, roundings) + difference
        if not is_narrow:
            out[:] = _as_int32(block)
    if step[:2] != [1, 1]:
        out[:] = _as_int32(_multiply(out.astype(np.int64), *step))


def _most_samples(data):
    return MAX_SAMPLES + MAX_SAMPLES_PER_BYTE * len(data)


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


def _stored(leads, rows):
    """Return the rows that are stored as they are."""
    return sorted(set(range(leads)) - set(rows[III:]))


def _derived(rows):
    """Return which of III, aVR, aVL, aVF are derived."""
    return [lead for lead in (III, AVR, AVL, AVF) if rows[lead] != NOWHERE]


# Header and parts ------------------------------------------------------------------------------------------------------


def _encode(multiples, step, rows, roundings):
    leads, length = multiples.shape
    data = [HEADER.pack(VERSION, leads, length, *step, *rows, *roundings)]
    for first in range(0, length, BLOCK):
        data += map(_pack, _encode_block(multiples[:, first : first + BLOCK], rows, roundings))
    return b"".join(data)


def _encode_block(block, rows, roundings):
    yield block[_stored(len(block), rows)]
    if derived := _derived(rows):
        yield np.array([block[rows[lead]] - _foresee(block, rows, lead, roundings) for lead in derived])


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

    def next(self, leads, length):
        """Return the samples of the next part, int32 `(leads, length)`."""
        num_differences, planes = self._next_planes()
        return _unpack(num_differences, planes, leads, length)

    def skip(self, count):
        for _ in range(count):
            self._next_planes()

    def _next_planes(self):
        num_differences, num_planes = PART.unpack(self._take(PART.size))
        if num_differences > MOST_DIFFERENCES or num_planes > MOST_PLANES:
            raise _refused(f"a part states {num_differences} differences in {num_planes} planes")
        sizes = [SIZE.unpack(self._take(SIZE.size))[0] for _ in range(num_planes)]
        return num_differences, [self._take(size) for size in sizes]

    def _take(self, size):
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise _refused(f"a part of {size} bytes is cut off")
        return self.data[start : self.position]

    def check_end(self):
        if self.position != len(self.data):
            raise _refused(f"{len(self.data) - self.position} bytes follow the last part")


def _pack(rows):
    """Return the shortest part that holds `rows`, int64 within 34 bits."""
    tried = [_planes(rows, number) for number in range(MOST_DIFFERENCES + 1)]
    shortest = min(tried, key=lambda planes: sum(len(QUICK.compress(plane, asbytes=True)) for plane in planes))
    planes = [THOROUGH.compress(plane, asbytes=True) for plane in shortest]
    sizes = [SIZE.pack(len(plane)) for plane in planes]
    return b"".join([PART.pack(tried.index(shortest), len(planes)), *sizes, *planes])


def _planes(rows, num_differences):
    """Return the bytes of the differences, lowest first, modulo 2 ** 32; signs are put last (0, -1, 1, -2 ... as 0, 1, 2, 3)."""
    for _ in range(num_differences):
        rows = np.diff(rows, axis=1, prepend=0)
    signed = rows.astype(np.uint32).view(np.int32)  # wraps
    unsigned = ((signed << 1) ^ (signed >> 31)).astype("<u4")
    planes = np.moveaxis(unsigned.view(np.uint8).reshape(*unsigned.shape, 4), 2, 0)
    num_planes = max((number + 1 for number in range(4) if planes[number].any()), default=0)
    return [plane.tobytes() for plane in planes[:num_planes]]


def _unpack(num_differences, planes, leads, length):
    unsigned = np.zeros(leads * length, np.uint32)
    for plane in reversed(planes):
        unsigned <<= 8
        unsigned |= _inflate(plane, leads * length)
    rows = (unsigned >> 1).view(np.int32)
    unsigned &= 1
    rows ^= np.negative(unsigned, out=unsigned).view(np.int32)
    rows = rows.reshape(leads, length)
    for _ in range(num_differences):
        np.cumsum(rows, axis=1, dtype=np.int32, out=rows)  # wraps, and back
    return rows


def _inflate(data, size):
    try:
        return np.frombuffer(QUICK.decompress(data, size), np.uint8)
    except OSError as error:  # damaged, or of another size
        raise _refused(f"a part cannot be inflated to {size} bytes ({error})") from error
