"""The encoding of samples: bit for bit, compact, and nothing but a clear refusal for bytes that are not its own."""

import io
import tracemalloc
import zlib
from functools import cache

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.io import loadmat

from anyecg_hf.leads import STANDARD_LEADS
from anyecg_hf.simulate import simulate_record
from training.signal_codec import (
    BLOCK,
    CRC,
    HEADER,
    MAX_SAMPLES,
    MAX_SAMPLES_PER_BYTE,
    PART,
    SIZE,
    VERSION,
    decode_signal,
    encode_signal,
)

ROUNDINGS = {
    "down": lambda total: np.floor(total / 2),
    "up": lambda total: np.ceil(total / 2),
    "half to even": lambda total: np.rint(total / 2),
    "towards zero": lambda total: np.trunc(total / 2),
    "half away from zero": lambda total: np.sign(total) * np.floor(abs(total) / 2 + 0.5),
}
RANGES = {"int8": 7, "int16": 15, "24 bits": 23, "25 bits": 24, "int32": 31}


def same_again(samples, lead_names):
    """Encode and decode; return the bytes."""
    data = encode_signal(samples, lead_names)
    found = decode_signal(data)
    assert found.dtype == np.int32 and found.shape == samples.shape
    np.testing.assert_array_equal(found, samples)
    return data


def numbered(count):
    return [f"lead {number}" for number in range(count)]


def simulated(seed=1, **options):
    """A 12-lead record in whole uV; III, aVR, aVL, aVF follow from I and II, halves downwards."""
    signal = np.rint(simulate_record(seed, **options).signal * 1000).astype(np.int64)
    return with_limb_leads(signal, ROUNDINGS["down"])


def with_limb_leads(signal, half):
    signal = signal.copy()
    one, two = signal[:2]
    signal[2] = two - one
    signal[3], signal[4], signal[5] = half(-(one + two)), half(2 * one - two), half(2 * two - one)
    return signal


@cache
def long_record(length):
    """Several blocks with derived leads; their differences are all zero in the first block only."""
    random = np.random.default_rng(0)
    signal = with_limb_leads(np.cumsum(random.integers(-9, 10, (12, length)), axis=1), ROUNDINGS["up"])
    signal[3:6, BLOCK:] += random.integers(-1, 2, (3, length - BLOCK))
    return signal, encode_signal(signal, STANDARD_LEADS)


def sealed(data):
    """The bytes with a right check sum, as someone who means harm would send them."""
    return bytes(data[: -CRC.size]) + CRC.pack(zlib.crc32(data[: -CRC.size]))


def with_header(data, **changes):
    names = ["version", "leads", "length", "numerator", "denominator", "towards_zero"]
    names += ["I", "II", "III", "aVR", "aVL", "aVF", "round_III", "round_aVR", "round_aVL", "round_aVF"]
    fields = dict(zip(names, HEADER.unpack(data[: HEADER.size]), strict=True)) | changes
    return sealed(HEADER.pack(*fields.values()) + data[HEADER.size :])


@pytest.fixture(scope="module")
def short():
    """The bytes of a short record with derived leads and differences: every kind of field occurs."""
    signal = simulated(duration_seconds=1)
    signal[2:6] += np.random.default_rng(0).integers(-1, 2, (4, signal.shape[1]))
    return encode_signal(signal, STANDARD_LEADS)


# Bit for bit


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_numbers_come_back(data):
    bits = RANGES[data.draw(st.sampled_from(list(RANGES)))]
    leads, length = data.draw(st.integers(1, 64)), data.draw(st.sampled_from([0, 1, 2, 3, 17, 300]))
    low, high = -(1 << bits), (1 << bits) - 1
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    kind = data.draw(st.sampled_from(["noise", "flat", "walk", "extremes", "no value here and there"]))
    samples = {
        "noise": lambda: random.integers(low, high, (leads, length), endpoint=True),
        "flat": lambda: np.full((leads, length), random.integers(low, high, endpoint=True)),
        "walk": lambda: np.cumsum(random.integers(-9, 10, (leads, length)), axis=1).clip(low, high),
        "extremes": lambda: random.choice([low, high, 0], (leads, length)),
        "no value here and there": lambda: np.where(random.random((leads, length)) < 0.1, low, 3),
    }[kind]()
    dtype = data.draw(st.sampled_from([np.int32, np.int64] + ([np.int16, ">i2"] if bits <= 15 else [])))
    names = data.draw(st.permutations([*STANDARD_LEADS, *numbered(52)]))[:leads]
    encoded = same_again(samples.astype(dtype), names)
    raw = samples.size * (2 if bits <= 15 else 4)
    of_zstd = 13  # bytes around a plane that cannot be made smaller
    assert len(encoded) <= raw + HEADER.size + CRC.size + PART.size + 4 * (SIZE.size + of_zstd)


@settings(max_examples=60, deadline=None)
@given(
    half=st.sampled_from(list(ROUNDINGS)),
    order=st.permutations(range(12)),
    absent=st.sets(st.integers(0, 11), max_size=9),
    scale=st.sampled_from([1, 40, 100_000]),
    errors=st.sampled_from([0, 1, 5, 20_000]),
)
def test_limb_leads_come_back_however_they_were_rounded(half, order, absent, scale, errors):
    random = np.random.default_rng(len(absent))
    signal = with_limb_leads(np.cumsum(random.integers(-scale, scale + 1, (12, 200)), axis=1), ROUNDINGS[half])
    signal[2:6] += random.integers(-errors, errors + 1, (4, 200)).astype(np.int64)
    kept = [row for row in order if row not in absent]
    same_again(signal[kept], [STANDARD_LEADS[row] for row in kept])


@settings(max_examples=60, deadline=None)
@given(
    step=st.sampled_from([4.88, 2.44, 5, 10, 3, 65535, 65536, 100_000]),
    rounded=st.sampled_from([np.rint, np.trunc, np.floor]),
    spoiled=st.booleans(),
)
@example(step=4.88, rounded=np.rint, spoiled=True)
def test_samples_on_a_step_come_back(step, rounded, spoiled):
    multiples = np.cumsum(np.random.default_rng(0).integers(-20, 21, (12, 700)), axis=1)
    signal = rounded(with_limb_leads(multiples, ROUNDINGS["up"]) * step).astype(np.int64)
    if spoiled:
        signal[4, -1] += 1
    same_again(signal, STANDARD_LEADS)


@pytest.mark.parametrize("value", [-(2**31), 2**31 - 1, -32768])
def test_limb_leads_that_overflow_come_back(value):
    signal = np.random.default_rng(0).choice([value, -value - 1, 0], (12, 50))
    same_again(signal, STANDARD_LEADS)
    same_again(np.full((12, 50), value), STANDARD_LEADS)


def test_limb_leads_beyond_16_bits_follow_from_leads_within():
    one, two = np.array([[-(2**15), 2**15 - 1] * 500, [2**15 - 1, -(2**15)] * 500])
    signal = np.array([one, two, two - one, -(one + two) // 2, one - two // 2, two - one // 2])
    data = encode_signal(signal, STANDARD_LEADS[:6])
    np.testing.assert_array_equal(decode_signal(data), signal)
    assert len(data) < 2 * 2 * 1000 + 200  # the two as they are, and no more


def test_half_an_hour_comes_back():
    random = np.random.default_rng(0)
    same_again(np.cumsum(random.integers(-9, 10, (12, 257 * 1800)), axis=1), STANDARD_LEADS)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_window_is_that_part_of_the_record(data):
    length = 3 * BLOCK - 5
    signal, encoded = long_record(length)
    near = st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, length - 1, length])
    start, stop = sorted(data.draw(st.tuples(near, near | st.integers(0, length))))
    np.testing.assert_array_equal(decode_signal(encoded, start, stop), signal[:, start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 10**9), (10**9, None)])
def test_a_window_outside_the_record_is_refused(short, start, stop):
    with pytest.raises(ValueError, match="the record has 500 samples"):
        decode_signal(short, start, stop)


def test_same_record_gives_the_same_bytes():
    assert encode_signal(simulated(), STANDARD_LEADS) == encode_signal(simulated().astype(np.int16), STANDARD_LEADS)


def test_a_name_given_twice_and_names_in_other_spelling_come_back():
    signal = simulated(duration_seconds=2)
    data = same_again(signal, [name.upper() for name in STANDARD_LEADS])
    assert len(data) == len(encode_signal(signal, STANDARD_LEADS))
    same_again(signal, ["I", "II", "II", "III", "III", "I"] * 2)


# Size


@pytest.mark.parametrize("half", ROUNDINGS)
def test_limb_leads_that_follow_take_no_room(half):
    signal = with_limb_leads(simulated(), ROUNDINGS[half])
    without = encode_signal(np.delete(signal, range(2, 6), axis=0), numbered(8))
    order = [5, 0, 7, 6, 2, 1, 3, 4, 11, 10, 9, 8]
    for rows in (range(12), order):
        data = same_again(signal[list(rows)], [STANDARD_LEADS[row] for row in rows])
        assert len(data) <= len(without) + 200


def test_limb_leads_that_were_rounded_apart_take_little_room():
    exact = simulate_record(2).signal * 1000.0
    exact[2] = exact[1] - exact[0]
    exact[3:6] = -(exact[0] + exact[1]) / 2, exact[0] - exact[1] / 2, exact[1] - exact[0] / 2
    signal = np.rint(exact).astype(np.int64)
    without = encode_signal(np.delete(signal, range(2, 6), axis=0), numbered(8))
    assert len(same_again(signal, STANDARD_LEADS)) < len(without) + 4 * signal.shape[1] * 2.3 / 8  # 2.3 bits each


def test_names_that_mislead_cost_no_more_than_no_names():
    signal = simulated()
    signal[3] *= 2  # another gain
    misled = encode_signal(signal[::-1], STANDARD_LEADS)
    assert len(misled) <= len(encode_signal(signal[::-1], numbered(12)))


def test_a_limb_lead_that_was_off_does_not_spoil_the_others():
    signal = simulated()
    signal[3] = 0
    without = encode_signal(np.delete(signal, [2, 4, 5], axis=0), numbered(9))
    assert len(same_again(signal, STANDARD_LEADS)) <= len(without) + 200


def test_rescaled_samples_take_the_room_of_the_original_ones():
    multiples = simulated() // 5
    original = encode_signal(multiples, STANDARD_LEADS)
    for rescaled in (np.rint(multiples * 4.88), np.trunc(multiples * 2.44), multiples * 50):
        assert len(same_again(rescaled.astype(np.int64), STANDARD_LEADS)) < len(original) * 1.01


@pytest.mark.parametrize("leads", [1, 2, 6, 12, 64])
@pytest.mark.parametrize("value", [0, 1, -32768, 2**23 - 1, -(2**31)])
def test_a_long_flat_record_is_small_and_still_read(leads, value):
    same_again(np.full((leads, 50_000), value), [*STANDARD_LEADS, *numbered(52)][:leads])


@pytest.mark.parametrize(
    "corpus", ["ptb-xl", "chapman_shaoxing_ningbo", "georgia", "cpsc_2018", "cpsc_2018_extra", "ptb"]
)
def test_real_records_take_less_than_flac_of_all_leads(corpus, real_ecg):
    soundfile = pytest.importorskip("soundfile")
    paths = sorted((real_ecg / "challenge-2021" / corpus).rglob("*.mat"))[:6]
    flac = encoded = 0
    for path in paths:
        names = [line.split()[-1] for line in path.with_suffix(".hea").read_text().splitlines()[1:13]]
        samples = loadmat(path)["val"]
        for leads in (samples[:8], samples[8:]):  # a stream takes eight
            with io.BytesIO() as file:
                soundfile.write(file, leads.T.copy(), 500, "PCM_16", format="FLAC")
                flac += len(file.getvalue())
        encoded += len(same_again(samples, names))
    assert paths and encoded < 0.9 * flac


# Refusals


@pytest.mark.parametrize(
    ("samples", "names", "error", "says"),
    [
        (np.zeros((2, 5)), ["I", "II"], TypeError, "float64"),
        (np.zeros(5, int), ["I"], ValueError, "shape"),
        (np.zeros((0, 5), int), [], ValueError, "shape"),
        (np.zeros((2, 5), int), ["I"], ValueError, "one name per row"),
        (np.zeros((2, 5), int), "ab", ValueError, "one name per row"),
        (np.full((1, 5), 2**31), ["I"], ValueError, "32 bits"),
        (np.full((1, 5), 2**64 - 1, np.uint64), ["I"], ValueError, "32 bits"),
    ],
)
def test_what_is_no_record_is_refused_when_encoded(samples, names, error, says):
    with pytest.raises(error, match=says):
        encode_signal(samples, names)


def test_damage_at_any_byte_is_refused(short):
    for place in range(len(short)):
        damaged = bytearray(short)
        damaged[place] ^= 1 + place % 255
        with pytest.raises(ValueError, match="not a signal"):
            decode_signal(bytes(damaged))


def test_cut_and_lengthened_bytes_are_refused(short):
    for end in range(len(short)):
        with pytest.raises(ValueError, match="not a signal"):
            decode_signal(short[:end])
        if end > HEADER.size + CRC.size:
            with pytest.raises(ValueError, match="not a signal"):
                decode_signal(sealed(short[:end]))  # cut before it was sealed
    for data in (short + b"\0", sealed(short + b"\0")):
        with pytest.raises(ValueError, match="not a signal"):
            decode_signal(data)


def test_damage_that_was_sealed_again_gives_an_error_or_a_whole_signal(short):
    """A check sum keeps out accidents only: who means harm may change samples, but not make the decoder fall over."""
    leads, length = decode_signal(short).shape
    random = np.random.default_rng(0)
    for _ in range(1000):
        data = bytearray(short)
        for place in random.integers(HEADER.size if random.random() < 0.8 else 0, len(data), random.integers(1, 4)):
            data[place] = random.integers(256)
        try:
            found = decode_signal(sealed(data))
        except ValueError as error:
            assert "not a signal" in str(error)
        else:
            assert found.dtype == np.int32 and found.size <= MAX_SAMPLES + MAX_SAMPLES_PER_BYTE * len(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},
        {"version": 3},
        {"leads": 0},
        {"leads": 11},
        {"leads": 2},
        {"leads": 13},
        {"leads": 65535},
        {"length": 0},
        {"length": 499},
        {"length": 501},
        {"length": 2**32 - 1},
        {"numerator": 0},
        {"denominator": 0},
        {"towards_zero": 2},
        {"I": 0xFFFF},
        {"II": 0xFFFF},
        {"III": 0xFFFF},
        {"III": 12},
        {"III": 0},
        {"aVR": 2},
        {"round_III": 1},
        {"round_aVF": 5},
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused(short, changes):
    with pytest.raises(ValueError, match="not a signal"):
        decode_signal(with_header(short, **changes))


def test_samples_that_would_overflow_are_refused():
    largest = encode_signal(np.array([[2**31 - 1, 0, 1, 5]]), ["V1"])
    with pytest.raises(ValueError, match="32 bits"):
        decode_signal(with_header(largest, numerator=3))
    two = encode_signal(np.array([[-(2**31)] * 9, [2**31 - 1] * 9]), ["V1", "V2"])
    three = with_header(two[: -CRC.size] + PART.pack(0, 0) + bytes(CRC.size), leads=3, I=0, II=1, III=2)
    with pytest.raises(ValueError, match="32 bits"):
        decode_signal(three)


@pytest.mark.parametrize("num_differences, num_planes", [(3, 1), (255, 1), (0, 5), (0, 255), (0, 2), (0, 0)])
def test_a_part_of_another_form_is_refused(num_differences, num_planes):
    data = bytearray(encode_signal(np.arange(3000).reshape(1, -1) % 97, ["V1"]))
    data[HEADER.size : HEADER.size + PART.size] = PART.pack(num_differences, num_planes)
    with pytest.raises(ValueError, match="not a signal"):
        decode_signal(sealed(data))


def one_plane(plane, length):
    head = HEADER.pack(VERSION, 1, length, 1, 1, 0, *[0xFFFF] * 6, *[0] * 4)
    return sealed(head + PART.pack(0, 1) + SIZE.pack(len(plane)) + plane + bytes(CRC.size))


def test_a_bomb_takes_no_memory():
    """Ten thousand bytes that inflate to a hundred million, announced as one sample."""
    bomb = pa.Codec("zstd").compress(bytes(100_000_000), asbytes=True)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="cannot be inflated to 1 bytes"):
            decode_signal(one_plane(bomb, 1))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000 and pa.total_allocated_bytes() <= before
    finally:
        tracemalloc.stop()


def test_a_plane_of_another_length_is_refused():
    plane = pa.Codec("zstd").compress(bytes(range(100)), asbytes=True)
    assert decode_signal(one_plane(plane, 100)).shape == (1, 100)
    for wrong, length in [(plane + b"more", 100), (plane[:-1], 100), (plane, 99), (plane, 101), (b"", 100)]:
        with pytest.raises(ValueError, match=f"cannot be inflated to {length} bytes"):
            decode_signal(one_plane(wrong, length))


def test_hours_of_zeros_are_refused_rather_than_encoded_and_never_decoded():
    same_again(np.zeros((64, MAX_SAMPLES // 64), np.int8), numbered(64))
    with pytest.raises(ValueError, match="Cut the record"):
        encode_signal(np.zeros((64, MAX_SAMPLES // 16), np.int8), numbered(64))
