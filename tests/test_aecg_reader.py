"""HL7 aECG: units of voltage and time, several sequence sets, annotations, ages; real files against their own text."""

import re

import numpy as np
import pytest
from said import said
from xml_ecg_files import SIGNALS, aecg, annotation, sequence_set

from anyecg_hf.records import Annotation, read_record

REAL = ("ecgtoolkit_Example.xml", "fda_subject1_0.xml")


def read(folder, document, **options):
    path = folder / "record.xml"
    path.write_text(document, encoding="utf-8")
    return read_record(path, **options)


@pytest.mark.parametrize("name", REAL)
def test_real_files_hold_what_their_text_says(real_ecg, name):
    path = real_ecg / "formats" / "hl7_aecg" / name
    record = read_record(path)
    text = path.read_text(encoding="utf-8")
    sequences = re.findall(r'code="MDC_ECG_LEAD_(\w+)"(?:(?!<sequence>).)*?<digits>([^<]*)<', text, re.DOTALL)[:12]
    assert [name.upper() for name in record.lead_names] == [lead for lead, _ in sequences]
    expected = np.array([[int(digit) for digit in digits.split()] for _, digits in sequences]) * 2.5e-3
    np.testing.assert_array_equal(record.signal, expected.astype(np.float32))
    assert (record.sampling_rate, record.age, record.sex) == (500, 46, "male")
    assert record.statements == ["Sinus Rhythm"] and record.diagnosis_codes == ["MDC_ECG_RHY_SINUS_RHY"]
    assert sum(mark.symbol == "MDC_ECG_BEAT_NORMAL" for mark in record.annotations) == 12


@pytest.mark.parametrize("name", REAL)
def test_the_marks_of_r_waves_lie_on_r_waves(real_ecg, name):
    record = read_record(real_ecg / "formats" / "hl7_aecg" / name)
    lead_i = record.signal[record.lead_names.index("I")]
    peaks = [mark for mark in record.annotations if mark.symbol == "MDC_ECG_WAVC_PEAK"]
    assert len(peaks) == 4 and {mark.note for mark in peaks} == {"I"}
    for mark in peaks:
        assert np.argmax(lead_i[mark.sample - 25 : mark.sample + 25]) == 25


def test_a_value_is_origin_plus_scale_times_digit(tmp_path):
    leads = sequence_set(origin='<origin value="-1" unit="mV"/>')
    record = read(tmp_path, aecg(sets=[leads]))
    expected = -1 + 0.005 * np.array(list(SIGNALS.values()))
    np.testing.assert_array_equal(record.signal, expected.astype(np.float32))
    assert record.lead_names == ["I", "II", "V1"] and record.file_format == "HL7 aECG"
    assert "representative beats" in said(record)[0] and len(said(record)) == 1


@pytest.mark.parametrize(
    "scale, factor",
    [
        ('value="5" unit="uV"', 5e-3),
        ('value="5" unit="µV"', 5e-3),
        ('value="5" unit="μV"', 5e-3),
        ('value="0.005" unit="mV"', 5e-3),
        ('value="2e-6" unit="V"', 2e-3),
        ('value="5000" unit="nV"', 5e-3),
    ],
)
def test_units_of_voltage(tmp_path, scale, factor):
    record = read(tmp_path, aecg(sets=[sequence_set(scale=scale)]))
    np.testing.assert_allclose(record.signal, factor * np.array(list(SIGNALS.values())), rtol=1e-6)


@pytest.mark.parametrize(
    "increment, rate",
    [
        ('value="0.002" unit="s"', 500),
        ('value="4" unit="ms"', 250),
        ('value="1000" unit="us"', 1000),
        ('value="3.90625" unit="ms"', 256),
    ],
)
def test_units_of_time(tmp_path, increment, rate):
    assert read(tmp_path, aecg(sets=[sequence_set(increment=increment)])).sampling_rate == rate


def test_leads_of_different_lengths_end_with_nan_and_it_is_said(tmp_path):
    record = read(tmp_path, re.sub(r"(<digits>)\s*\S+\s", r"\1", aecg(), count=1))
    assert np.isnan(record.signal).sum() == 1 and "differ in length" in str(record.warnings)


def test_signals_that_are_no_voltage_are_left_out(tmp_path):
    sets = [sequence_set({"I": [1, 2]}), sequence_set({"RESP": [1, 2]}, scale='value="1" unit="Ohm"')]
    record = read(tmp_path, aecg(sets=sets))
    assert record.lead_names == ["I"] and "no voltage" in str(record.warnings)
    with pytest.raises(ValueError, match="no lead with voltages"):
        read(tmp_path, aecg(sets=sets[1:]))


def test_sets_that_follow_each_other_share_a_time_axis(tmp_path):
    sets = [
        sequence_set({"I": [1, 2, 3], "II": [4, 5, 6]}, head='value="20200518154811.000"'),
        sequence_set({"V1": [7, 8, 9]}, head='value="20200518154811.006"'),
    ]
    record = read(tmp_path, aecg(sets=sets))
    nothing = np.nan
    expected = [[1, 2, 3, nothing, nothing, nothing], [4, 5, 6, nothing, nothing, nothing]]
    expected += [[nothing, nothing, nothing, 7, 8, 9]]
    np.testing.assert_array_equal(record.signal, (np.array(expected) * 0.005).astype(np.float32))


def test_a_set_far_away_or_of_another_rate_is_left_out(tmp_path):
    for other in ({"head": 'value="20210518154811"'}, {"increment": 'value="4" unit="ms"'}):
        record = read(tmp_path, aecg(sets=[sequence_set({"I": [1, 2]}), sequence_set({"V1": [3, 4]}, **other)]))
        assert record.lead_names == ["I"] and "1 further sequence sets left out" in str(record.warnings)


def test_what_is_stored_twice_for_the_same_time_is_kept_once(tmp_path):
    record = read(tmp_path, aecg(sets=[sequence_set({"I": [1, 2]}), sequence_set({"I": [3, 4]})]))
    np.testing.assert_array_equal(record.signal, (np.array([[1, 2]]) * 0.005).astype(np.float32))
    assert "the first was kept" in str(record.warnings)


def test_a_file_without_rhythm_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no rhythm series among its 1 series"):
        read(tmp_path, aecg(series_code="REPRESENTATIVE_BEAT"))


def test_annotations_with_a_place_become_marks(tmp_path):
    low_high = '<code code="TIME_ABSOLUTE"/><value><low value="{0}"/><high value="{1}"/></value>'
    wave = annotation(
        "MDC_ECG_WAVC",
        '<value code="MDC_ECG_WAVC_PWAVE"/>',
        boundary=low_high.format("20200518154811.004", "20200518154811.104"),
    )
    at = annotation(
        "MDC_ECG_WAVC", '<value code="X"/>', boundary='<code code="TIME_RELATIVE"/><value value="2" unit="ms"/>'
    )
    measured = annotation("MDC_ECG_TIME_PD_PR", '<value value="148" unit="ms"/>')
    beat = annotation("MDC_ECG_BEAT", '<value code="MDC_ECG_BEAT_NORMAL"/>', inner=wave + measured)
    record = read(tmp_path, aecg(annotations=beat + at))
    assert record.annotations == [
        Annotation(1, "X"),
        Annotation(2, "MDC_ECG_WAVC_PWAVE", duration_seconds=0.1),
        Annotation(2, "MDC_ECG_BEAT_NORMAL"),
    ]
    later = read(tmp_path, aecg(annotations=beat + at), start_seconds=0.004)
    assert [mark.sample for mark in later.annotations] == [-1, 0, 0]


def test_diagnoses_are_kept_without_signatures_and_dates(tmp_path):
    texts = ("Sinus rhythm", "Compared with ECG of 12-MAR-2015 10:22", "Confirmed by Dr. Brown")
    inner = "".join(annotation("MDC_ECG_INTERPRETATION_STATEMENT", f"<value>{text}</value>") for text in texts)
    record = read(tmp_path, aecg(annotations=annotation("MDC_ECG_INTERPRETATION", "", inner=inner)))
    assert record.statements == ["Sinus rhythm", "Compared with ECG of"]


@pytest.mark.parametrize(
    "age, years",
    [
        ('<value value="69" unit="a"/>', 69),
        ('<value value="18" unit="mo"/>', 1.5),
        ('<value unit="a"/>', 69),  # not said, so from the birth date
        ('<value value="999" unit="a"/>', 69),
    ],
)
def test_ages(tmp_path, age, years):
    record = read(tmp_path, aecg(age=age))
    assert (record.age, record.sex) == (years, "female")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"increment": 'value="0" unit="s"'}, "increment: is 0"),
        ({"increment": 'value="2" unit="Hz"'}, "increment: its unit"),
        ({"increment": 'value="1e-9" unit="s"'}, "sampling rate"),
        ({"scale": 'value="0" unit="uV"'}, "scale: is 0"),
        ({"scale": 'value="1e12" unit="V"', "leads": {"I": ["1e39"]}}, "too large to be true"),
        ({"leads": {"I": ["1e999"]}}, "too large to be true"),
        ({"leads": {"I": ["nan"]}}, "no decimal number"),
        ({"leads": {"I": ["1_0"]}}, "no decimal number"),
        ({"leads": {"I": ["--1"]}}, "no decimal number"),
        ({"leads": {"I": []}}, "no lead with samples"),
        ({"leads": {"I": [0] * 200_000, **{f"L{n}": [0] for n in range(40)}}}, "differ too much in length"),
    ],
)
def test_what_cannot_be_is_a_clear_error(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, aecg(sets=[sequence_set(**options)]))
