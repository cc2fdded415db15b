"""SCP-ECG: files built here from EN 1064, with an encoder of their own, and the two real ones against other formats."""

import binascii
import random
import struct
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyecg_hf.records import Record, Stated
from anyecg_hf.scp_reader import read_scp

NANOVOLT, INTERVAL_US = 2500, 2000  # of a step; 500 Hz
LEAD_I, LEAD_II, LEAD_V1 = 1, 2, 3
WAVE = np.round(400 * np.sin(np.arange(60) / 3) + 37 * np.cos(np.arange(60))).astype(int)
SECRETS = ("Doe-Planted", "Jane-Planted", "ID-4711-Planted", "Dr-Planted", "Room-Planted")


# An encoder


def with_sum(data):
    return struct.pack("<H", binascii.crc_hqx(data, 0xFFFF)) + data


def scp(sections, version=13):
    """Return a file with these sections, `{number: body}`."""
    header = struct.pack("<BB6s", version, version, bytes(6))
    table, packed, index = [], b"", 7 + 16 + 120
    for number in range(1, 12):
        body = sections.get(number)
        length = 16 + len(body) if body is not None else 0
        table.append(struct.pack("<HII", number, length, index if length else 0))
        if length:
            packed += with_sum(struct.pack("<HI", number, length) + header + body)
            index += length
    table = struct.pack("<HII", 0, 136, 7) + b"".join(table)
    section_0 = with_sum(struct.pack("<HI", 0, 136) + header[:2] + b"SCPECG" + table)
    return with_sum(struct.pack("<I", 6 + len(section_0 + packed)) + section_0 + packed)


def tag(number, value):
    return struct.pack("<BH", number, len(value)) + value


PATIENT = b"".join(
    [
        tag(0, SECRETS[0].encode() + b"\0"),
        tag(1, SECRETS[1].encode() + b"\0"),
        tag(2, SECRETS[2].encode() + b"\0"),
        tag(4, struct.pack("<HB", 54, 1)),
        tag(5, struct.pack("<HBB", 1944, 3, 17)),
        tag(8, b"\2"),
        tag(20, SECRETS[3].encode() + b"\0"),
        tag(23, SECRETS[4].encode() + b"\0"),
        tag(25, struct.pack("<HBB", 2003, 3, 16)),
        tag(255, b""),
    ]
)


def leads(*ranges, flags=0):
    return bytes([len(ranges), flags]) + b"".join(struct.pack("<IIB", *lead) for lead in ranges)


def rhythm(*leads, order=0, bimodal=0, nanovolt=NANOVOLT, interval=INTERVAL_US, encode=None):
    """Section 5 or 6 with the samples of each lead."""
    encode = encode or (lambda values: np.array(values).astype("<i2").tobytes())
    data = [encode(differences(values, order)) for values in leads]
    lengths = struct.pack(f"<{len(data)}H", *map(len, data))
    return struct.pack("<HHBB", nanovolt, interval, order, bimodal) + lengths + b"".join(data)


def differences(values, order):
    values = list(map(int, values))
    if order == 1:
        return values[:1] + [b - a for a, b in zip(values, values[1:])]
    if order == 2:
        return values[:2] + [c - 2 * b + a for a, b, c in zip(values, values[1:], values[2:])]
    return values


def to_bytes(bits):
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[place : place + 8], 2) for place in range(0, len(bits), 8))


def default_huffman(values):
    """Annex C: 0 is `0`; n up to 8 is n ones, `0`, sign; else 9 ones and `0` + 8 bits or `1` + 16 bits."""
    bits = ""
    for value in values:
        if abs(value) <= 8:
            bits += "1" * abs(value) + "0" + ("" if value == 0 else "01"[value < 0])
        elif -128 <= value < 128:
            bits += "1111111110" + format(value & 0xFF, "08b")
        else:
            bits += "1111111111" + format(value & 0xFFFF, "016b")
    return to_bytes(bits)


def code(prefix, value, *, number_bits=0, is_value=1):
    stored = int(prefix[::-1], 2)  # the first bit is the lowest
    return struct.pack("<BBBhI", len(prefix), len(prefix) + number_bits, is_value, value, stored)


def two_leads(**changes):
    """Sections of a plain file of two leads; a change of `None` leaves a section out."""
    sections = {1: PATIENT, 3: leads((1, 60, LEAD_I), (1, 60, LEAD_V1)), 6: rhythm(WAVE, -WAVE)}
    sections.update({int(name[1:]): body for name, body in changes.items()})
    return {number: body for number, body in sections.items() if body is not None}


def read(folder, data, **part):
    path = folder / "ecg.scp"
    path.write_bytes(data)
    return read_scp(path, Stated(**part))


def same(signal, steps):
    np.testing.assert_array_equal(signal, (np.array(steps) * 2.5e-3).astype(np.float32))


# What is read


def test_a_plain_file_gives_signal_rate_leads_age_and_sex(tmp_path):
    record = read(tmp_path, scp(two_leads()))
    same(record.signal, [WAVE, -WAVE])
    assert record.signal.dtype == np.float32 and record.sampling_rate == 500.0
    assert (record.lead_names, record.units, record.warnings) == (["I", "V1"], "mV", [])
    assert (record.age, record.sex) == (54.0, "female")


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("huffman", [False, True])
def test_differences_and_the_default_table_are_undone(tmp_path, order, huffman):
    table = struct.pack("<H", 19999) if huffman else None
    coded = rhythm(WAVE, -WAVE, order=order, encode=default_huffman if huffman else None)
    record = read(tmp_path, scp(two_leads(s2=table, s6=coded)))
    same(record.signal, [WAVE, -WAVE])
    assert record.warnings == []


def test_differences_that_overflow_16_bits_come_back(tmp_path):
    jump = np.tile([32000, -32000, -32000], 20)
    coded = rhythm(jump, jump, order=2)
    same(read(tmp_path, scp(two_leads(s6=coded))).signal, [jump, jump])


def test_tables_of_the_file_with_a_switch_and_a_number_behind_the_prefix_are_used(tmp_path):
    first = [code("0", 5), code("10", 2, is_value=0), code("110", 0, number_bits=4), code("111", 100, number_bits=3)]
    second = [code("1", -7), code("00", 1, is_value=0), code("01", 300)]
    tables = struct.pack("<H", 2) + b"".join(struct.pack("<H", len(t)) + b"".join(t) for t in (first, second))
    bits = "0" + "110" + "1000" + "111" + "011" + "10" + "1" + "01" + "00" + "0"
    expected = [5, -8, 103, -7, 300, 5]
    sections = two_leads(s2=tables, s3=leads((1, 6, LEAD_I)), s6=rhythm([0], encode=lambda _: to_bytes(bits)))
    same(read(tmp_path, scp(sections)).signal, [expected])


def reference_beat_file(rhythm_section, *, zones, protected=(), flags=1, last=24):
    """A file of one lead with a reference beat of 5 samples (10 ms) whose fiducial point is sample 3."""
    section_4 = struct.pack("<HHH", 10, 3, len(zones)) + b"".join(struct.pack("<HIII", *zone) for zone in zones)
    section_4 += b"".join(struct.pack("<II", *zone) for zone in protected)
    section_5 = rhythm([10, 20, 30, 20, 10], nanovolt=1000)
    return scp({3: leads((1, last, LEAD_II), flags=flags), 4: section_4, 5: section_5, 6: rhythm_section})


def test_the_reference_beat_is_added_where_it_was_subtracted(tmp_path):
    residual = np.arange(24)
    zones = [(0, 4, 6, 8), (1, 11, 13, 15), (0, 22, 23, 24)]  # the second beat is of another type
    record = read(tmp_path, reference_beat_file(rhythm(residual), zones=zones, protected=[(0, 0)] * 3))
    expected = residual * 2.5
    expected[3:8] += [10, 20, 30, 20, 10]
    expected[21:24] += [20, 30, 20]  # samples 22 to 24 are 2 to 4 of the beat whose third is sample 23
    np.testing.assert_array_equal(record.signal[0], (expected * 1e-3).astype(np.float32))


def test_bimodal_compression_keeps_the_beats_and_draws_lines_between_averages(tmp_path):
    stored = [
        10,
        30,
        1,
        2,
        3,
        4,
        50,
        90,
        9,
        8,
    ]  # 8 samples from two averages, 4 of the beat, 8 from two averages, 2 singly
    section = rhythm(stored, bimodal=1, interval=8000)
    record = read(tmp_path, reference_beat_file(section, zones=[(1, 9, 10, 12)], protected=[(9, 12)], flags=0, last=22))
    same(record.signal, [[10, 10, 10, 15, 20, 25, 30, 30, 1, 2, 3, 4, 50, 50, 50, 60, 70, 80, 90, 90, 9, 8]])
    assert record.sampling_rate == 500.0 and "bimodal" in record.warnings[0] and len(record.warnings) == 1


def test_leads_recorded_one_after_another_stand_at_their_time(tmp_path):
    sections = two_leads(s3=leads((11, 70, LEAD_I), (71, 130, LEAD_V1)))
    record = read(tmp_path, scp(sections))
    same(record.signal[0, :60], WAVE)
    same(record.signal[1, 60:], -WAVE)
    assert np.isnan(record.signal[0, 60:]).all() and np.isnan(record.signal[1, :60]).all()


def test_only_the_part_asked_for_is_returned(tmp_path):
    record = read(tmp_path, scp(two_leads()), start_seconds=0.02, duration_seconds=0.04)
    same(record.signal, [WAVE[10:30], -WAVE[10:30]])


def test_numbers_of_leads_become_names_and_a_second_lead_ii_is_told_apart(tmp_path):
    codes = (LEAD_II, 61, 62, 16, 31, 65, 200, LEAD_II)
    sections = two_leads(s3=leads(*[(1, 60, number) for number in codes]), s6=rhythm(*[WAVE] * 8))
    record = read(tmp_path, scp(sections))
    assert record.lead_names == ["II", "III", "aVR", "X", "I-cal", "-aVR", "SCP lead 200", "II (2)"]
    assert "told apart" in record.warnings[0]


@pytest.mark.parametrize(
    "stated, age",
    [
        (tag(4, struct.pack("<HB", 18, 2)), 1.5),
        (tag(4, struct.pack("<HB", 0, 0)), None),
        (tag(4, struct.pack("<HB", 500, 1)), None),
        (tag(5, struct.pack("<HBB", 1950, 5, 2)) + tag(25, struct.pack("<HBB", 2000, 5, 1)), 49.0),
        (tag(5, struct.pack("<HBB", 1950, 5, 2)) + tag(25, struct.pack("<HBB", 2000, 5, 2)), 50.0),
        (tag(5, struct.pack("<HBB", 1950, 6, 31)) + tag(25, struct.pack("<HBB", 2000, 5, 2)), None),
        (tag(5, struct.pack("<HBB", 1950, 5, 2)), None),
    ],
)
def test_the_age_is_stated_or_follows_from_the_dates(tmp_path, stated, age):
    assert read(tmp_path, scp(two_leads(s1=stated + tag(255, b"")))).age == (age and pytest.approx(age))


def test_statements_are_read_from_sections_8_and_11(tmp_path):
    def statements(*values):
        packed = b"".join(struct.pack("<BH", number, len(value)) + value for number, value in enumerate(values, 1))
        return struct.pack("<BHBBBBBB", 1, 2003, 3, 16, 9, 30, 0, len(values)) + packed

    texts = statements(b"Sinus rhythm\0", "Schenkelblock, unvollständig\0".encode("latin-1"))
    codes = statements(b"\1NSR\0IRBBB\0", b"\2Borderline ECG\0", b"\2Confirmed by Dr. Planted\0", b"\x03\1\2")
    record = read(tmp_path, scp(two_leads(s8=texts, s11=codes)))
    assert record.statements == ["Sinus rhythm", "Schenkelblock, unvollständig", "Borderline ECG"]
    assert record.diagnosis_codes == ["NSR", "IRBBB"]


def test_nothing_that_names_the_patient_is_kept_or_told(tmp_path):
    data = scp(two_leads())
    for damaged in (data, data[:400], data[:-40], data.replace(b"Jane", b"Jone")):
        try:
            record = read(tmp_path, damaged)
            text = repr(record) + repr(vars(record))
        except ValueError as error:
            text = str(error)
        assert "Planted" not in text and "1944" not in text and "2003" not in text


# What is damaged, contradictory or hostile


def test_a_check_sum_that_does_not_fit_is_told(tmp_path):
    data = bytearray(scp(two_leads()))
    data[-1] ^= 1
    record = read(tmp_path, bytes(data))
    assert "record, section 6" in record.warnings[0] and record.signal.shape == (2, 60)


def test_a_file_that_ends_early_is_read_as_far_as_it_goes(tmp_path):
    record = read(tmp_path, scp(two_leads())[:-20])
    same(record.signal[0], WAVE)
    same(record.signal[1, :50], -WAVE[:50])
    assert np.isnan(record.signal[1, 50:]).all()
    assert any("file ends early" in warning for warning in record.warnings)
    record = read(tmp_path, scp(two_leads())[:-150])
    assert record.lead_names == ["I"] and any("1 of 2 leads left out" in warning for warning in record.warnings)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"s3": None}, "no section 3"),
        ({"s6": None}, "no section 6"),
        ({"s3": leads()}, "no leads"),
        ({"s3": leads((60, 1, LEAD_I), (1, 60, LEAD_V1))}, "lead 1 lasts from"),
        ({"s3": leads((1, 60, LEAD_I), (4_000_000_000, 4_000_000_059, LEAD_V1))}, "more than"),
        ({"s3": bytes([9, 0, 1, 2])}, "section 3: ends at byte"),
        ({"s6": rhythm(WAVE, WAVE, nanovolt=0)}, "0 nV a step"),
        ({"s6": rhythm(WAVE, WAVE, interval=0)}, "0 us a sample"),
        ({"s6": b"\1\2\3"}, "section 6: ends at byte"),
        ({"s6": struct.pack("<HHBB2H", 1000, 2000, 3, 0, 0, 0)}, "differences of order 3"),
        ({"s6": rhythm([], [])}, "no sample of any lead"),
        ({"s6": rhythm(WAVE, WAVE, bimodal=1)}, "no section 4"),
        ({"s3": leads((1, 60, LEAD_I), (1, 60, LEAD_V1), flags=1)}, "no section 4"),
        ({"s2": struct.pack("<H", 0)}, "0 Huffman tables"),
        ({"s2": struct.pack("<H", 19000)}, "19000 Huffman tables"),
        ({"s2": struct.pack("<HH", 1, 0)}, "is empty"),
        ({"s2": struct.pack("<HH", 1, 500)}, "ends within Huffman table"),
        ({"s2": struct.pack("<HH", 1, 2) + code("1", 0) + code("10", 0)}, "begins with another"),
        ({"s2": struct.pack("<HH", 1, 2) + code("1001", 0) + code("10", 0)}, "begins with another"),
        ({"s2": struct.pack("<HH", 1, 1) + code("1" * 20, 0)}, "a code of 20 bits"),
        ({"s2": struct.pack("<HH", 1, 1) + code("1" * 10, 0)}, "no code of the Huffman table"),
        (
            {"s2": struct.pack("<HH", 1, 2) + code("0", 9, is_value=0) + code("1", 9, is_value=0)},
            "switches to Huffman table 9",
        ),
    ],
)
def test_a_contradiction_is_refused_with_file_and_section(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, scp(two_leads(**changes)))
    assert "ecg.scp" in str(error.value)


def test_an_announced_length_is_not_believed(tmp_path):
    record = read(tmp_path, scp(two_leads(s3=leads((1, 4_000_000_000, LEAD_I), (1, 4_000_000_000, LEAD_V1)))))
    assert record.signal.shape == (2, 60) and "ends early" in record.warnings[0]


def test_a_reference_beat_at_a_rate_that_does_not_fit_is_refused(tmp_path):
    data = reference_beat_file(rhythm(np.arange(24), interval=3000), zones=[(0, 4, 6, 8)])
    with pytest.raises(ValueError, match="2 to 8 times as long"):
        read(tmp_path, data)


def is_a_clear_end(folder, data):
    """Read a damaged file: a sound record, or an error in the reader's own words that names the file."""
    try:
        record = read(folder, data)
    except (ValueError, OSError) as error:
        assert "ecg.scp" in str(error)
        text = str(error)
    else:
        assert isinstance(record, Record) and len(record.lead_names) == len(record.signal)
        assert 0 < record.sampling_rate < float("inf") and not np.isinf(record.signal).any()
        text = repr(record.warnings)
    assert "Planted" not in text


COMPRESSED = scp(
    {
        1: PATIENT,
        2: struct.pack("<H", 19999),
        3: leads((1, 60, LEAD_I), (1, 60, LEAD_V1), flags=1),
        4: struct.pack("<HHHHIIIII", 10, 3, 1, 0, 8, 10, 12, 9, 12),
        5: rhythm(range(5), range(5), encode=default_huffman),
        6: rhythm(WAVE[:24], WAVE[:24], order=2, bimodal=1, interval=8000, encode=default_huffman),
        8: struct.pack("<BHBBBBBBBH5s", 0, 2003, 3, 16, 9, 30, 0, 1, 1, 5, b"Sinus"),
    }
)


@pytest.mark.parametrize("data", [scp(two_leads()), COMPRESSED])
def test_a_file_cut_at_any_byte_ends_clearly(tmp_path, data):
    for length in range(len(data)):
        is_a_clear_end(tmp_path, data[:length])


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), compressed=st.booleans())
def test_a_mutated_file_ends_clearly(tmp_path_factory, seed, compressed):
    rng, data = random.Random(seed), bytearray(COMPRESSED if compressed else scp(two_leads()))
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(len(data))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    is_a_clear_end(tmp_path_factory.mktemp("mutants"), bytes(data))


# Real files


def test_the_example_of_ecgtoolkit_agrees_with_the_same_recording_in_hl7_aecg(real_ecg):
    record = read_scp(real_ecg / "formats" / "scp_ecg" / "ecgtoolkit_Example.scp", Stated())
    space = "{urn:hl7-org:v3}"
    root = ElementTree.parse(real_ecg / "formats" / "hl7_aecg" / "ecgtoolkit_Example.xml").getroot()
    num_compared = 0
    for sequence in next(root.iter(f"{space}sequenceSet")).iter(f"{space}sequence"):
        digits = sequence.find(f"{space}value/{space}digits")
        if digits is not None:
            name = sequence.find(f"{space}code").get("code").removeprefix("MDC_ECG_LEAD_").replace("AV", "aV")
            same(record.signal[record.lead_names.index(name)], np.array(digits.text.split(), int))
            num_compared += 1
    assert (num_compared, record.sampling_rate, record.age, record.sex) == (12, 500.0, 49.0, "male")
    assert record.warnings == []


def test_a_recording_of_contec_is_read_as_its_bytes_say(real_ecg):
    path = real_ecg / "formats" / "scp_ecg" / "contec_demo.scp"
    record = read_scp(path, Stated())
    body = path.read_bytes()[386 + 16 :]
    assert struct.unpack_from("<HHBB8H", body) == (183, 1000, 0, 0, *[20000] * 8)
    steps = np.frombuffer(body[22:160022], "<i2").reshape(8, 10000)
    np.testing.assert_array_equal(record.signal, (steps * 183e-6).astype(np.float32))
    assert record.lead_names == ["I", "II", "V1", "V2", "V3", "V4", "V5", "V6"]
    assert (record.sampling_rate, record.age, record.sex, record.warnings) == (1000.0, 47.0, "male", [])
