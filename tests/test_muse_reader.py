"""GE MUSE and CardioSoft: counts, check sums, units, statements, ages; real files against a decoding by hand."""

import base64
import re

import numpy as np
import pytest
from said import said
from xml_ecg_files import SIGNALS, cardiosoft, diagnosis, muse

from anyecg_hf.records import Annotation, read_record

STEPS = np.array(list(SIGNALS.values()))


def read(folder, document, **options):
    path = folder / "record.xml"
    path.write_text(document, encoding="latin-1")
    return read_record(path, **options)


@pytest.mark.parametrize("name", ["example1.xml", "example2.xml"])
def test_real_muse_files_hold_what_their_text_says(real_ecg, name):
    path = real_ecg / "formats" / "ge_muse_xml" / name
    rhythm = path.read_text(encoding="latin-1").partition("<WaveformType>Rhythm")[2]
    leads = re.findall(r"<LeadID>(\w+)<.*?<WaveFormData>([^<]*)<", rhythm, re.DOTALL)
    expected = np.array([np.frombuffer(base64.b64decode(data), "<i2") for _, data in leads]) * 4.88e-3
    record = read_record(path)
    assert record.lead_names == [lead for lead, _ in leads] == ["I", "II", "V1", "V2", "V3", "V4", "V5", "V6"]
    np.testing.assert_array_equal(record.signal, expected.astype(np.float32))
    assert record.sampling_rate == 500 and record.warnings == ["median beats left out; the signal is the rhythm."]


@pytest.mark.parametrize("name", ["example1.xml", "example2.xml", "dummy_ecg.xml"])
def test_marks_of_beats_lie_on_beats(real_ecg, name):
    record = read_record(real_ecg / "formats" / "ge_muse_xml" / name)
    steepest = np.abs(np.diff(record.signal, axis=1)).max(axis=0)
    assert len(record.annotations) >= 8 and {mark.symbol for mark in record.annotations} == {"QRS"}
    for mark in record.annotations:
        near = steepest[max(mark.sample - 40, 0) : mark.sample + 40]
        assert near.max() > 5 * np.median(steepest)


def test_the_real_cardiosoft_file_holds_what_its_text_says(real_ecg):
    path = real_ecg / "formats" / "ge_muse_xml" / "dummy_ecg.xml"
    strip = path.read_text(encoding="latin-1").partition("<StripData>")[2]
    leads = re.findall(r'<WaveformData lead="(\w+)">([^<]*)<', strip)
    expected = np.array([[int(value) for value in data.split(",")] for _, data in leads]) * 5e-3
    record = read_record(path)
    assert record.lead_names == [lead for lead, _ in leads] and record.file_format == "GE CardioSoft XML"
    np.testing.assert_array_equal(record.signal, expected.astype(np.float32))
    assert record.statements[0] == "Normal sinus rhythm" and len(record.annotations) == 12


def test_a_muse_file_gives_millivolt_age_sex_and_beats(tmp_path):
    record = read(tmp_path, muse())
    np.testing.assert_array_equal(record.signal, (STEPS * 4.88e-3).astype(np.float32))
    assert (record.sampling_rate, record.lead_names) == (500, ["I", "II", "V1"])
    assert (record.age, record.sex) == (69, "female")
    assert record.annotations == [Annotation(2, "QRS", "type 0")]
    assert said(record) == ["median beats left out; the signal is the rhythm."]


@pytest.mark.parametrize(
    "lead, factor",
    [
        ({"unit": ""}, 4.88e-3),  # microvolt is the default of restecg.dtd
        ({"unit": "MILLIVOLTS", "step": "0.005"}, 5e-3),
        ({"unit": "VOLTS", "step": "1e-6"}, 1e-3),
        ({"step": "4,88"}, 4.88e-3),
    ],
)
def test_units_of_muse(tmp_path, lead, factor):
    np.testing.assert_allclose(read(tmp_path, muse(lead=lead)).signal, STEPS * factor, rtol=1e-6)


def test_the_rate_is_base_times_a_power_of_ten(tmp_path):
    assert read(tmp_path, muse(base="25", exponent="1")).sampling_rate == 250
    assert read(tmp_path, muse(base="5000", exponent="-1")).sampling_rate == 500


@pytest.mark.parametrize(
    "lead, notice",
    [
        ({"count": 6}, "12 announced, 8 are there"),
        ({"checksum": 17}, "check sum does not fit"),
        ({"more": "<LeadOff>TRUE</LeadOff>"}, "marked as off"),
        ({"more": "<FirstSampleBaseline>3</FirstSampleBaseline>"}, "not applied"),
    ],
)
def test_doubts_about_a_lead_are_said_with_its_values(tmp_path, lead, notice):
    record = read(tmp_path, muse(lead=lead))
    np.testing.assert_array_equal(record.signal, (STEPS * 4.88e-3).astype(np.float32))
    assert sum(notice in warning for warning in record.warnings) == 3


def test_check_sums_may_be_written_with_a_sign(tmp_path):
    document = muse({"I": SIGNALS["I"]})
    checksum = re.findall(r"<LeadDataCRC32>(\d+)<", document)[-1]
    signed = document.replace(f"<LeadDataCRC32>{checksum}<", f"<LeadDataCRC32>{int(checksum) - 2**32}<")
    assert len(read(tmp_path, signed).warnings) == 1


def test_statements_are_joined_up_to_their_end_and_lose_signatures_dates_and_deletions(tmp_path):
    lines = [
        ["Sinus rhythm with ", "first degree AV block"],
        ["DELETED Acute MI"],
        ["When compared with ECG of "],
        ["10-MAY-2021 14:14,"],
        ["Confirmed by Doe, John (123456) on 05/10/2021 1:15:09 PM"],
    ]
    record = read(tmp_path, muse(diagnosis=diagnosis(*lines) + diagnosis(["Other"], name="OriginalDiagnosis")))
    assert record.statements == ["Sinus rhythm with first degree AV block", "When compared with ECG of"]
    assert read(tmp_path, muse(diagnosis=diagnosis(["Other"], name="OriginalDiagnosis"))).statements == ["Other"]


def test_beats_without_a_time_are_left_out_and_said(tmp_path):
    record = read(tmp_path, muse().replace("<Time>4</Time>", "<Time>soon</Time>"))
    assert record.annotations == [] and "beat 1 left out" in said(record)[-1]
    record = read(tmp_path, cardiosoft().replace("<BeatClass>dominant</BeatClass>", ""))
    assert record.annotations == [] and "beats left out" in said(record)[-1]


@pytest.mark.parametrize(
    "patient, age",
    [
        ("<PatientAge>18</PatientAge><AgeUnits>MONTHS</AgeUnits>", 1.5),
        ("<PatientAge>73</PatientAge>", 73),
        ("<PatientAge>5</PatientAge><AgeUnits>LIGHTYEARS</AgeUnits>", 69),  # from the dates
        ("", 69),
    ],
)
def test_ages_of_muse(tmp_path, patient, age):
    assert read(tmp_path, muse(patient=patient)).age == age


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "Median"}, "Rhythm waveform: missing"),
        ({"leads": {}}, "no lead with samples"),
        ({"leads": {f"L{n}": [1] for n in range(301)}}, "301 leads"),
        ({"base": "0"}, "SampleBase"),
        ({"exponent": "99999999"}, "SampleExponent"),
        ({"lead": {"step": ""}}, "LeadAmplitudeUnitsPerBit: missing"),
        ({"lead": {"step": "0"}}, "LeadAmplitudeUnitsPerBit"),
        ({"lead": {"unit": "INCHES"}}, "LeadAmplitudeUnits"),
        ({"lead": {"more": "<LeadSampleSize>3</LeadSampleSize>"}}, "LeadSampleSize"),
    ],
)
def test_what_muse_cannot_mean_is_a_clear_error(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, muse(**options))


def test_leads_that_begin_at_different_times_are_refused(tmp_path):
    document = muse().replace("<LeadID>V1", "<LeadTimeOffset>2500</LeadTimeOffset><LeadID>V1")
    with pytest.raises(ValueError, match="LeadTimeOffset: differs"):
        read(tmp_path, document)


def test_a_cardiosoft_strip_gives_millivolt_age_sex_and_beats(tmp_path):
    record = read(tmp_path, cardiosoft())
    np.testing.assert_array_equal(record.signal, (STEPS * 5e-3).astype(np.float32))
    assert (record.sampling_rate, record.lead_names, record.age, record.sex) == (500, ["I", "II", "V1"], 69, "female")
    assert record.annotations == [Annotation(2, "QRS", "dominant")]
    assert record.statements == ["Normal sinus rhythm"] and len(said(record)) == 1


def test_full_disclosure_is_read_where_there_is_no_strip(tmp_path):
    data = ",".join(map(str, STEPS.T.ravel())) + ","
    disclosure = f"""<FullDisclosure><NumberOfChannels>3</NumberOfChannels><SampleRate units="Hz">500</SampleRate>
      <Resolution units="uVperLsb">5</Resolution><LeadOrder>I, II, V1</LeadOrder>
      <FullDisclosureData>{data}</FullDisclosureData></FullDisclosure>"""
    record = read(tmp_path, cardiosoft(strip=disclosure))
    np.testing.assert_array_equal(record.signal, (STEPS * 5e-3).astype(np.float32))
    assert record.lead_names == ["I", "II", "V1"]
    assert "full disclosure left out" in str(read(tmp_path, cardiosoft(more=disclosure)).warnings)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"resolution": ""}, "Resolution: missing"),
        ({"resolution": '<Resolution units="furlong">5</Resolution>'}, "not in uVperLsb"),
        ({"leads": {"I": [1, "", 3]}}, "no decimal number"),
        ({"leads": {"I": ["x"]}}, "no decimal number"),
        ({"strip": "<Nothing/>"}, "neither StripData"),
    ],
)
def test_what_cardiosoft_cannot_mean_is_a_clear_error(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, cardiosoft(**options))


def test_a_number_of_samples_that_does_not_fit_is_said(tmp_path):
    assert "not as many as are announced" in str(read(tmp_path, cardiosoft(count=5)).warnings)
