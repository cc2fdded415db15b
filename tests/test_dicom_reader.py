"""DICOM waveforms: files built here from PS3.3 and PS3.5, a real one, and pydicom as the other reader where it is there."""

import random
import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyecg_hf.dicom_reader import read_dicom
from anyecg_hf.records import Annotation, Record, Stated
from anyecg_hf.scp_reader import read_scp

IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED = (f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".2", ".1.99"))
STEPS = np.array([[100, -200], [0, 3], [-32768, 7], [50, 51], [60, 61], [70, 71]])  # (samples, channels)
SECRETS = ("Doe-Planted^Jane", "ID-4711-Planted", "Dr-Planted", "Room-Planted")
LONG = ("OB", "OW", "SQ", "UN", "UT")
UNDEFINED = object()  # as length of a sequence and its items


# An encoder: a data set is a list of (group, element, VR, value), a sequence's value a list of data sets


def encode(elements, *, explicit=True, order="<", undefined=False):
    out = b""
    for group, element, form, value in elements:
        if form == "SQ":
            value, length = items(value, explicit=explicit, order=order, undefined=undefined)
        else:
            value = to_bytes(value, form, order)
            length = len(value)
        out += struct.pack(order + "HH", group, element)
        if not explicit:
            out += struct.pack(order + "I", length)
        elif form in LONG:
            out += form.encode() + struct.pack(order + "HI", 0, length)
        else:
            out += form.encode() + struct.pack(order + "H", length)
        out += value
    return out


def items(data_sets, *, order, undefined, **how):
    out = b""
    for data_set in data_sets:
        body = encode(data_set, order=order, undefined=undefined, **how)
        out += struct.pack(order + "HHI", 0xFFFE, 0xE000, 0xFFFFFFFF if undefined else len(body)) + body
        out += struct.pack(order + "HHI", 0xFFFE, 0xE00D, 0) if undefined else b""
    out += struct.pack(order + "HHI", 0xFFFE, 0xE0DD, 0) if undefined else b""
    return out, 0xFFFFFFFF if undefined else len(out)


def to_bytes(value, form, order):
    if isinstance(value, bytes):
        packed = value
    elif form in ("US", "UL"):
        values = value if isinstance(value, (list, tuple)) else [value]
        packed = struct.pack(order + {"US": "H", "UL": "I"}[form] * len(values), *values)
    else:
        packed = str(value).encode()
    return packed + (b"\0" if form in ("OB", "UI") else b" ") * (len(packed) % 2)


def coded(value, scheme, meaning):
    return [[(0x0008, 0x0100, "SH", value), (0x0008, 0x0102, "SH", scheme), (0x0008, 0x0104, "LO", meaning)]]


def channel(code="2:1", *, scheme="MDC", meaning="", unit="uV", sensitivity="2.5", extra=(), label=None):
    elements = [] if label is None else [(0x003A, 0x0203, "SH", label)]
    elements += [(0x003A, 0x0208, "SQ", coded(code, scheme, meaning))]
    if sensitivity is not None:
        elements += [(0x003A, 0x0210, "DS", sensitivity), (0x003A, 0x0211, "SQ", coded(unit, "UCUM", "unit"))]
    return sorted(elements + list(extra))


def group(steps=STEPS, channels=None, *, kind="<i2", interpretation="SS", bits=16, rate="500", extra=(), **changes):
    channels = [channel(), channel("2:3")] if channels is None else channels
    elements = {
        (0x003A, 0x0004): ("CS", changes.get("originality", "ORIGINAL")),
        (0x003A, 0x0005): ("US", changes.get("num_channels", len(channels))),
        (0x003A, 0x0010): ("UL", changes.get("num_samples", len(steps))),
        (0x003A, 0x001A): ("DS", rate),
        (0x003A, 0x0200): ("SQ", channels),
        (0x5400, 0x1004): ("US", bits),
        (0x5400, 0x1006): ("CS", interpretation),
        (0x5400, 0x1010): ("OW", np.asarray(steps).astype(kind).tobytes()),
    }
    elements.update({(tag[0], tag[1]): (tag[2], tag[3]) for tag in extra})
    return [(*tag, *value) for tag, value in sorted(elements.items())]


PATIENT = [
    (0x0008, 0x0005, "CS", "ISO_IR 192"),
    (0x0008, 0x0016, "UI", "1.2.840.10008.5.1.4.1.1.9.1.1"),
    (0x0008, 0x0020, "DA", "20030316"),
    (0x0008, 0x0090, "PN", SECRETS[2]),
    (0x0010, 0x0010, "PN", SECRETS[0]),
    (0x0010, 0x0020, "LO", SECRETS[1]),
    (0x0010, 0x0030, "DA", "19440317"),
    (0x0010, 0x0040, "CS", "F"),
    (0x0038, 0x0300, "LO", SECRETS[3]),
]


def dicom(groups=None, *, syntax=EXPLICIT, before=PATIENT, annotations=None, undefined=False):
    """Return a file."""
    data_set = [*before, (0x5400, 0x0100, "SQ", [group()] if groups is None else groups)]
    if annotations is not None:
        data_set.append((0x0040, 0xB020, "SQ", annotations))
    how = {"explicit": syntax != IMPLICIT, "order": ">" if syntax == BIG_ENDIAN else "<", "undefined": undefined}
    body = encode(sorted(data_set, key=lambda element: element[:2]), **how)
    if syntax == DEFLATED:
        packer = zlib.compressobj(wbits=-15)
        body = packer.compress(body) + packer.flush()
    meta = encode([(0x0002, 0x0001, "OB", b"\0\1"), (0x0002, 0x0010, "UI", syntax)])
    return bytes(128) + b"DICM" + encode([(0x0002, 0x0000, "UL", len(meta))]) + meta + body


def read(folder, data, **part):
    path = folder / "ecg.dcm"
    path.write_bytes(data)
    return read_dicom(path, Stated(**part))


def same(signal, steps):
    np.testing.assert_array_equal(signal, (np.array(steps) * 2.5e-3).astype(np.float32))


# What is read


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED])
def test_every_encoding_gives_the_same_record(tmp_path, syntax, undefined):
    groups = [group(kind=">i2" if syntax == BIG_ENDIAN else "<i2")]
    record = read(tmp_path, dicom(groups, syntax=syntax, undefined=undefined))
    same(record.signal, STEPS.T)
    assert record.signal.dtype == np.float32 and record.sampling_rate == 500.0
    assert (record.lead_names, record.units, record.warnings) == (["I", "V1"], "mV", [])
    assert (record.age, record.sex) == (58.0, "female")  # a day short of 59


@pytest.mark.parametrize(
    "interpretation, bits, kind, zero",
    [("SB", 8, "i1", 0), ("UB", 8, "u1", 60), ("SS", 16, "<i2", 0), ("US", 16, "<u2", 900), ("SL", 32, "<i4", 0),
     ("UL", 32, "<u4", 900)],
)  # fmt: skip
def test_every_kind_of_sample_is_read(tmp_path, interpretation, bits, kind, zero):
    steps = np.array([[1, -2], [3, 4], [-50, 60], [7, 9]])
    baseline = (0x003A, 0x0213, "DS", str(-2.5 * zero))  # uV
    channels = [channel(extra=[baseline]), channel("2:3", extra=[baseline])]
    data = dicom([group(steps + zero, channels, kind=kind, interpretation=interpretation, bits=bits)])
    np.testing.assert_allclose(read(tmp_path, data).signal, steps.T * 2.5e-3, rtol=1e-6)


def test_sensitivity_correction_baseline_and_unit_are_applied(tmp_path):
    corrected = [(0x003A, 0x0212, "DS", "1.5"), (0x003A, 0x0213, "DS", "-3")]
    channels = [channel(extra=corrected), channel("2:3", unit="mV", sensitivity="0.01")]
    expected = np.stack([(STEPS[:, 0] * 2.5 * 1.5 - 3) * 1e-3, STEPS[:, 1] * 0.01])
    np.testing.assert_allclose(read(tmp_path, dicom([group(channels=channels)])).signal, expected, rtol=1e-6)


def test_the_padding_value_is_no_value(tmp_path):
    record = read(tmp_path, dicom([group(extra=[(0x5400, 0x100A, "OW", struct.pack("<h", -32768))])]))
    assert np.isnan(record.signal).tolist() == (STEPS.T == -32768).tolist()


def test_a_padding_value_of_zero_is_a_voltage_and_a_warning_says_so(tmp_path):
    record = read(tmp_path, dicom([group(extra=[(0x5400, 0x100A, "OW", bytes(2))])]))
    same(record.signal, STEPS.T)
    assert "zeros were kept" in record.warnings[0]


@pytest.mark.parametrize("tag, skew", [(0x0215, "2"), (0x0214, "0.004")])
def test_a_skew_is_taken_out_in_parts_as_in_the_whole(tmp_path, tag, skew):
    data = dicom([group(channels=[channel(extra=[(0x003A, tag, "DS", skew)]), channel("2:3")])])
    whole = read(tmp_path, data).signal
    same(whole[0, 2:], STEPS[:4, 0])
    same(whole[1], STEPS[:, 1])
    assert np.isnan(whole[0, :2]).all()
    for start in range(5):
        part = read(tmp_path, data, start_seconds=start / 500, duration_seconds=0.004).signal
        np.testing.assert_array_equal(part, whole[:, start : start + 2])


def test_parts_are_those_of_the_whole_across_the_size_of_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("anyecg_hf.dicom_reader._CHUNK", 14)
    steps = np.random.default_rng(1).integers(-3000, 3000, (500, 2))
    skewed = [channel(extra=[(0x003A, 0x0215, "DS", "-3")]), channel("2:3", extra=[(0x003A, 0x0215, "DS", "5")])]
    data = dicom([group(steps, skewed)])
    whole = read(tmp_path, data).signal
    same(whole[0, :-3], steps[3:, 0])
    same(whole[1, 5:], steps[:-5, 1])
    for start in (0, 1, 100, 490):
        part = read(tmp_path, data, start_seconds=start / 500, duration_seconds=0.04).signal
        np.testing.assert_array_equal(part, whole[:, start : start + 20])
    with pytest.raises(ValueError, match="the recording ends at 1 s"):
        read(tmp_path, data, start_seconds=1.0)


@pytest.mark.parametrize(
    "given, name",
    [
        ({"code": "2:62"}, "aVR"),
        ({"code": "5.6.3-9-61", "scheme": "SCPECG"}, "III"),
        ({"code": "131088"}, "X"),
        ({"code": "MDC_ECG_LEAD_AVF"}, "aVF"),
        ({"code": "99", "scheme": "99VENDOR", "meaning": "Lead aVL, augmented voltage, left"}, "aVL"),
        ({"code": "99", "scheme": "99VENDOR", "meaning": "Lead II (Einthoven)"}, "II"),
        ({"code": "99", "scheme": "99VENDOR", "label": "V6"}, "V6"),
        ({"code": "99", "scheme": "99VENDOR", "label": "ES"}, "ES"),
        ({"code": "99", "scheme": "99VENDOR"}, "channel 1"),
    ],
)
def test_leads_are_known_by_code_words_or_label(tmp_path, given, name):
    assert read(tmp_path, dicom([group(channels=[channel(**given), channel("2:3")])])).lead_names == [name, "V1"]


def test_the_original_group_with_most_leads_is_read_and_a_warning_says_so(tmp_path):
    pressure = group(channels=[channel("109020", unit="mm[Hg]"), channel("109021", unit="mm[Hg]")])
    strip = group(STEPS[:, :1], [channel("2:2")])
    beat = group(STEPS + 5, originality="DERIVED", rate="1000")
    record = read(tmp_path, dicom([beat, pressure, strip, group(), group(STEPS + 9, rate="250")]))
    same(record.signal, STEPS.T)
    assert "group 4 of 5" in record.warnings[0]
    assert read(tmp_path, dicom([pressure, beat])).sampling_rate == 1000.0


def test_channels_that_are_no_voltage_or_not_calibrated_are_left_out(tmp_path):
    steps = np.arange(18).reshape(6, 3)
    channels = [channel("109020", unit="mm[Hg]"), channel("2:2"), channel("2:3", sensitivity=None)]
    record = read(tmp_path, dicom([group(steps, channels)]))
    same(record.signal, [steps[:, 1]])
    assert record.lead_names == ["II"]
    assert [warning.split(":")[0] for warning in record.warnings] == ["channel 1 left out", "channel 3 left out"]


@pytest.mark.parametrize(
    "stated, age", [("054Y", 54.0), ("018M", 1.5), ("026W", 26 * 7 / 365.25), ("121Y", None), ("", 58.0)]
)
def test_the_age_is_stated_or_follows_from_the_dates(tmp_path, stated, age):
    record = read(tmp_path, dicom(before=[*PATIENT, (0x0010, 0x1010, "AS", stated)]))
    assert record.age == (age and pytest.approx(age))
    without_dates = [element for element in PATIENT if element[2] != "DA"]
    assert read(tmp_path, dicom(before=without_dates)).age is None


def test_annotations_become_statements_codes_and_marks(tmp_path):
    def about(*elements, number=1):
        return sorted([(0x0040, 0xA0B0, "US", (number, 0)), *elements])

    concept = coded("5.10.3-3", "SCPECG", "QRS onset")
    annotations = [
        about((0x0070, 0x0006, "ST", "Sinusrhythmus, überwiegend")),
        about((0x0070, 0x0006, "ST", "Confirmed by Dr. Planted")),
        about((0x0040, 0xA168, "SQ", coded("164889003", "SCT", "Atrial fibrillation"))),
        about((0x0040, 0xA043, "SQ", coded("2:16016", "MDC", "RR")), (0x0040, 0xA30A, "DS", "900")),  # a measurement
        about((0x0040, 0xA043, "SQ", concept), (0x0040, 0xA132, "UL", (5, 3))),
        about((0x0070, 0x0006, "ST", "event"), (0x0040, 0xA138, "DS", "0.002\\0.01")),
        about((0x0040, 0xA043, "SQ", concept), (0x0040, 0xA132, "UL", 1), number=2),  # of another group
    ]
    record = read(tmp_path, dicom(annotations=annotations), start_seconds=0.002)
    assert record.statements == ["Sinusrhythmus, überwiegend", "Atrial fibrillation"]
    assert record.diagnosis_codes == ["164889003"]
    onset = "5.10.3-3", "QRS onset"
    assert record.annotations == [
        Annotation(0, "", "event"), Annotation(1, *onset), Annotation(3, *onset), Annotation(4, "", "event")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kind,positions,expected",
    [
        ("SEGMENT", (2, 4), [(1, 0.004)]),
        ("MULTISEGMENT", (1, 2, 4, 6), [(0, 0.002), (3, 0.004)]),
        ("MULTIPOINT", (2, 4), [(1, None), (3, None)]),
        ("SEGMENT", (4, 2), [(1, None), (3, None)]),  # damaged
        ("SEGMENT", (2, 4, 6), [(1, None), (3, None), (5, None)]),
    ],
)
def test_a_segment_is_one_mark_with_a_duration(tmp_path, kind, positions, expected):
    marked = [
        (0x0040, 0xA0B0, "US", (1, 0)),
        (0x0040, 0xA130, "CS", kind),
        (0x0040, 0xA132, "UL", positions),
        (0x0070, 0x0006, "ST", "AF"),
    ]
    record = read(tmp_path, dicom(annotations=[marked]))
    assert [(mark.sample, mark.duration_seconds) for mark in record.annotations] == expected


def test_nothing_that_names_the_patient_is_kept_or_told(tmp_path):
    data = dicom([group(extra=[(0x5400, 0x100A, "OW", bytes(2))])])
    for damaged in (data, data[:330], data[:-10], data.replace(b"PN", b"p\x07"), data.replace(b"LO", b"SQ")):
        try:
            text = repr(vars(read(tmp_path, damaged)))
        except ValueError as error:
            text = str(error)
        assert "Planted" not in text and "1944" not in text and "2003" not in text


# What is damaged, contradictory or hostile


def test_samples_after_the_announced_ones_are_ignored_and_said(tmp_path):
    record = read(tmp_path, dicom([group(num_samples=4)]))
    assert record.signal.shape[1] == 4 and "2 samples after the 4 announced" in str(record.warnings)


def test_a_file_that_ends_early_is_read_as_far_as_it_goes(tmp_path):
    record = read(tmp_path, dicom()[:-7])
    same(record.signal, STEPS[:4].T)
    assert "the waveform ends early: 4 of 6" in record.warnings[0] and "the file ends early." in record.warnings


def test_an_announced_length_is_not_believed(tmp_path):
    record = read(tmp_path, dicom([group(num_samples=4_000_000_000)]))
    assert record.signal.shape == (2, 6) and "6 of 4000000000" in record.warnings[0]


@pytest.mark.parametrize(
    "data, message",
    [
        (dicom([]), "no waveform sequence"),
        (dicom(syntax="1.2.840.10008.1.2.4.50"), "transfer syntax 1.2.840.10008.1.2.4.50, is not read"),
        (dicom([group(interpretation="MB", bits=8)]), "companded by mu-law"),
        (dicom([group(interpretation="AB", bits=8)]), "companded by A-law"),
        (dicom([group(interpretation="SS", bits=8)]), "SS and 8 bits|8 bits allocated"),
        (dicom([group(interpretation="XX")]), "not read together"),
        (dicom([group(num_channels=3)]), "3 channels announced, 2 defined"),
        (dicom([group(num_samples=0)]), "0 samples announced"),
        (dicom([group(STEPS[:0])]), "cut or empty"),
        (dicom([group(rate="0")]), "sampling frequency"),
        (dicom([group(rate="-5")]), "sampling frequency"),
        (dicom([group(rate="fast")]), "003a,001a.: no decimal number"),
        (dicom([group(rate="1e999")]), "no decimal number"),
        (dicom([group(channels=[channel(sensitivity="1e60")] * 2)]), "too large to be true"),
        (dicom([group(channels=[channel(sensitivity=None)] * 2)]), "no calibrated voltage"),
        (dicom([group(channels=[channel(unit="Pa")] * 2)]), "no calibrated voltage"),
        (dicom([group(channels=[channel(extra=[(0x003A, 0x0215, "DS", "99")])] * 2)]), "too large to be true"),
        (dicom([group(channels=[channel(extra=[(0x003A, 0x0214, "DS", "1e30")])] * 2)]), "a skew of"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, data, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, data)
    assert "ecg.dcm" in str(error.value)


def test_a_deflated_file_that_inflates_without_measure_is_refused(tmp_path):
    silence = group(np.zeros((20_000_000, 2), "i1"), interpretation="SB", bits=8, kind="i1")
    data = dicom([silence], syntax=DEFLATED)
    assert len(data) < 100_000
    with pytest.raises(ValueError, match="inflate to more than"):
        read(tmp_path, data)


def test_a_damaged_deflated_file_is_refused(tmp_path):
    data = bytearray(dicom(syntax=DEFLATED))
    data[-200:] = bytes(range(200))
    with pytest.raises(ValueError, match="ecg.dcm"):
        read(tmp_path, bytes(data))


def test_deep_sequences_are_refused_before_python_runs_out_of_stack(tmp_path):
    nested = []
    for _ in range(30):
        nested = [(0x0040, 0xA043, "SQ", [nested])]
    for undefined in (False, True):
        with pytest.raises(ValueError, match="nested deeper"):
            read(tmp_path, dicom(before=[*PATIENT, *nested], undefined=undefined))


def test_a_length_beyond_its_item_is_refused(tmp_path):
    data = dicom(before=[*PATIENT, (0x0040, 0xB020, "SQ", [[(0x0070, 0x0006, "ST", "x" * 20)]])])
    place = data.index(b"ST\x14\0")
    with pytest.raises(ValueError, match="the item ends at"):
        read(tmp_path, data[:place] + b"ST\xff\0" + data[place + 4 :])


def test_only_the_part_asked_for_is_loaded_of_a_long_recording(tmp_path):
    seconds, rate = 3600, 500
    data = dicom([group(STEPS[:0], num_samples=seconds * rate, rate=str(rate))])
    length = seconds * rate * 4
    patched = data[:-4] + struct.pack("<I", length)  # of the waveform data, the last element
    for old in re.finditer(b"(?s)SQ\0\0(....)|\xfe\xff\0\xe0(....)", data):
        place = old.start(old.lastindex)
        stored = struct.unpack_from("<I", data, place)[0]
        if place + 4 + stored == len(data):  # whatever holds the waveform data
            patched = patched[:place] + struct.pack("<I", stored + length) + patched[place + 4 :]
    path = tmp_path / "long.dcm"
    with open(path, "wb") as file:
        file.write(patched)
        file.seek(len(patched) + length - 4000)
        file.write(np.arange(2000, dtype="<i2").tobytes())
    record = read_dicom(path, Stated(start_seconds=seconds - 3, duration_seconds=2))
    assert record.signal.shape == (2, 1000) and record.warnings == []
    same(record.signal[0, 500:], np.arange(0, 1000, 2))


def is_a_clear_end(folder, data):
    try:
        record = read(folder, data)
    except (ValueError, OSError) as error:
        text = str(error)
        assert "ecg.dcm" in text
    else:
        assert isinstance(record, Record) and len(record.lead_names) == len(record.signal) > 0
        assert 0 < record.sampling_rate < float("inf") and not np.isinf(record.signal).any()
        text = repr(record.warnings)
    assert "Planted" not in text


MARKED = [
    [(0x0040, 0xA043, "SQ", coded("1", "SCPECG", "QRS")), (0x0040, 0xA132, "UL", (1, 2)), (0x0070, 0x0006, "ST", "x")]
]


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, DEFLATED])
def test_a_file_cut_at_any_byte_ends_clearly(tmp_path, syntax):
    data = dicom(annotations=MARKED, syntax=syntax)
    for length in range(132, len(data), 1 if syntax == IMPLICIT else 3):
        is_a_clear_end(tmp_path, data[:length])


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), syntax=st.sampled_from([IMPLICIT, EXPLICIT, BIG_ENDIAN]), undefined=st.booleans())
def test_a_mutated_file_ends_clearly(tmp_path_factory, seed, syntax, undefined):
    rng, data = random.Random(seed), bytearray(dicom(annotations=MARKED, syntax=syntax, undefined=undefined))
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(132, len(data))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    is_a_clear_end(tmp_path_factory.mktemp("mutants"), bytes(data))


# Another reader, a real file


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, DEFLATED])
def test_pydicom_reads_the_same_values(tmp_path, syntax):
    pydicom = pytest.importorskip("pydicom", reason="pydicom, the other reader, is not installed")
    corrected = [channel(extra=[(0x003A, 0x0212, "DS", "1.5")]), channel("2:3")]
    record = read(tmp_path, dicom([group(channels=corrected)], syntax=syntax))
    expected = pydicom.dcmread(tmp_path / "ecg.dcm").waveform_array(0).T  # uV
    np.testing.assert_allclose(record.signal, expected * 1e-3, rtol=1e-6)


def test_the_example_of_ecgtoolkit_agrees_with_the_same_recording_in_scp_ecg(real_ecg):
    record = read_dicom(real_ecg / "formats" / "dicom_waveform" / "ecgtoolkit_Example.dcm", Stated())
    other = read_scp(real_ecg / "formats" / "scp_ecg" / "ecgtoolkit_Example.scp", Stated())
    order = [other.lead_names.index(name) for name in record.lead_names]
    np.testing.assert_array_equal(record.signal, other.signal[order])
    assert (record.sampling_rate, record.age, record.sex) == (other.sampling_rate, other.age, other.sex)
    assert len(record.annotations) == 5 and record.annotations[0] == Annotation(142, "5.10.3-1", "P onset")


def test_pydicom_reads_the_real_file_alike(real_ecg):
    pydicom = pytest.importorskip("pydicom", reason="pydicom, the other reader, is not installed")
    path = real_ecg / "formats" / "dicom_waveform" / "ecgtoolkit_Example.dcm"
    expected = pydicom.dcmread(path).waveform_array(0).T
    np.testing.assert_array_equal(read_dicom(path, Stated()).signal, (expected * 1e-3).astype(np.float32))
