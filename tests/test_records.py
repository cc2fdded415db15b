"""Records and their reader: every storage format, headers as published, and what is damaged or hostile."""

import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from said import said
from scipy.io import loadmat

from anyecg_hf.leads import STANDARD_LEADS, resolve_lead_name
from anyecg_hf.records import Record, parse_age, parse_comments, parse_sex, read_record

wfdb = pytest.importorskip("wfdb")

UNIT_TO_MV = {"nV": 1e-6, "uV": 1e-3, "V": 1e3}
DATA = np.array([[100, -200], [0, 3], [-32768, 7], [50, 50]], "<i2")  # (samples, signals); one value is missing


def write(folder, header, *, data=DATA, name="r"):
    """Write a WFDB record and return the path of its header."""
    (folder / f"{name}.hea").write_bytes(header if isinstance(header, bytes) else header.encode())
    if data is not None:
        (folder / f"{name}.dat").write_bytes(data if isinstance(data, bytes) else data.tobytes())
    return folder / f"{name}.hea"


def two_leads(folder, **options):
    """A record of two leads with right check sums; the options replace parts of its header."""
    sums = [int(column.astype(np.int64).sum()) & 0xFFFF for column in options.pop("data", DATA).T]
    first = options.pop("first", "r 2 500 4")
    gains = options.pop("gains", ("100/mV", "100/mV"))
    names = options.pop("names", ("I", "V1"))
    comments = options.pop("comments", "")
    lines = [f"r.dat 16 {gain} 16 0 0 {total} 0 {name}" for gain, total, name in zip(gains, sums, names, strict=True)]
    return write(folder, "\n".join([first, *lines, comments]) + "\n", **options)


# What a record holds


def test_a_record_knows_its_signal_rate_names_and_unit(tmp_path):
    record = read_record(two_leads(tmp_path))
    np.testing.assert_array_equal(record.signal, np.array([[1, 0, np.nan, 0.5], [-2, 0.03, 0.07, 0.5]], np.float32))
    assert record.signal.dtype == np.float32
    assert (record.sampling_rate, record.lead_names, record.units) == (500.0, ["I", "V1"], "mV")
    assert (record.record_name, record.warnings) == ("r", [])
    assert record.duration_seconds == pytest.approx(0.008)


@pytest.mark.parametrize("suffix", ["", ".hea", ".dat"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_may_have_a_suffix_or_none(tmp_path, suffix, kind):
    two_leads(tmp_path)
    assert read_record(kind(str(tmp_path / "r") + suffix)).lead_names == ["I", "V1"]


def test_a_record_name_may_contain_a_dot(tmp_path):
    two_leads(tmp_path)
    (tmp_path / "r.hea").rename(tmp_path / "night.01.hea")
    assert read_record(tmp_path / "night.01").record_name == "night.01"


def test_lead_names_become_standard_where_they_can_be_told(tmp_path):
    assert read_record(two_leads(tmp_path, names=("MLII", "RESP"))).lead_names == ["II", "RESP"]


@pytest.mark.parametrize("names,kept", [(("II", "MLII"), ["II", "II (2)"]), (("ECG", "ECG"), ["ECG", "ECG (2)"])])
def test_a_second_signal_of_one_name_gets_a_number_and_a_warning_says_so(tmp_path, names, kept):
    record = read_record(two_leads(tmp_path, names=names))
    assert record.lead_names == kept and "bear one name" in record.warnings[0]


def test_a_header_in_the_spelling_of_the_georgia_set_is_read(tmp_path):
    path = two_leads(tmp_path, first="E07500.mat 2 500 4 05-May-2020 09:49:17")
    assert read_record(path).record_name == "r"


# Age, sex, diagnoses


@pytest.mark.parametrize(
    "text, age",
    [
        ("74", 74.0),
        ("0", 0.0),
        ("9.5", 9.5),
        ("300", 90.0),
        ("90", 90.0),
        ("101", 101.0),
        ("121", None),
        ("-1", None),
        ("NaN", None),
        ("nan", None),
        ("??", None),
        ("Unknown", None),
        (None, None),
    ],
)
def test_ages_are_years_or_none_and_300_stands_for_over_89(text, age):
    assert parse_age(text) == age


@pytest.mark.parametrize(
    "text, sex",
    [
        ("M", "male"),
        ("Male", "male"),
        ("F", "female"),
        ("female", "female"),
        ("Unknown", None),
        ("?", None),
        (None, None),
    ],
)
def test_sex_is_male_female_or_none(text, sex):
    assert parse_sex(text) == sex


@pytest.mark.parametrize(
    "comments, age, sex, codes",
    [
        (["Age: 74", "Sex: Female", "Dx: 164889003,59118001"], 74.0, "female", ["164889003", "59118001"]),
        (["Age: NaN", "Sex: Unknown", "Dx: ", "Rx: Unknown"], None, None, []),
        (["Age: 60", "Sex: M", "Dx: Unknown"], 60.0, "male", []),
        (["<age>: 81  <sex>: F  <diagnoses>: (none)"], 81.0, "female", []),
        (["<age>: ?? <sex>: ?"], None, None, []),
        (["69 M 1085 1629 x1", "Aldomet, Inderal"], 69.0, "male", []),
        (["-1 F 0 0 x1"], None, "female", []),
        (["persistent atrial fibrillation"], None, None, []),
        ([], None, None, []),
    ],
)
def test_comments_of_the_published_sets_are_understood(comments, age, sex, codes):
    found = parse_comments(comments)
    assert (found["age"], found["sex"], found["diagnosis_codes"]) == (age, sex, codes)
    assert found["comments"] == comments


def test_comments_reach_the_record(tmp_path):
    record = read_record(two_leads(tmp_path, comments="#Age: 54\n# Sex: Male\n#Dx: 426783006"))
    assert (record.age, record.sex, record.diagnosis_codes) == (54.0, "male", ["426783006"])
    assert record.comments == ["Age: 54", "Sex: Male", "Dx: 426783006"]


# Units and gains


@pytest.mark.parametrize("unit, factor", [("mV", 1), ("mv", 1), ("uV", 1e-3), ("nV", 1e-6), ("V", 1e3)])
def test_units_of_voltage_become_millivolt(tmp_path, unit, factor):
    record = read_record(two_leads(tmp_path, gains=(f"100/{unit}", "100/mV")))
    np.testing.assert_allclose(record.signal[:, 3], [0.5 * factor, 0.5], rtol=1e-6)


@pytest.mark.parametrize("encoding, sign", [("utf-8", "\u00b5"), ("utf-8", "\u03bc"), ("latin-1", "\u00b5")])
def test_both_micro_signs_in_both_encodings_are_microvolt(tmp_path, encoding, sign):
    path = two_leads(tmp_path)
    path.write_bytes(path.read_text().replace("100/mV", f"100/{sign}V", 1).encode(encoding))
    assert read_record(path).signal[0, 3] == pytest.approx(0.0005)


def test_a_unit_left_out_is_millivolt_and_a_base_line_left_out_is_the_adc_zero(tmp_path):
    path = two_leads(tmp_path, gains=("200", "200(50)"))
    path.write_text(path.read_text().replace("200 16 0 0", "200 16 10 0"))
    np.testing.assert_allclose(read_record(path).signal[:, 3], [(50 - 10) / 200, 0.0])


@pytest.mark.parametrize("gain", ["0", "0/mV"])
def test_a_record_without_calibration_is_read_with_a_warning(tmp_path, gain):
    record = read_record(two_leads(tmp_path, gains=(gain, "100/mV")))
    assert record.signal[0, 0] == pytest.approx(0.5) and "not calibrated" in record.warnings[0]


def test_a_signal_that_is_no_voltage_is_left_out_with_a_warning(tmp_path):
    record = read_record(two_leads(tmp_path, gains=("100/mV", "12/mmHg"), names=("I", "ABP")))
    assert record.lead_names == ["I"] and record.warnings == ['signal 1 "ABP" left out: its unit is no voltage.']


def test_a_record_without_any_voltage_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no voltage with data among its signals; .* left out"):
        read_record(two_leads(tmp_path, gains=("1/mmHg", "1/NU")))


def test_a_gain_that_makes_impossible_values_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too large to be true"):
        read_record(two_leads(tmp_path, gains=("1e-300/mV", "100/mV")))


# Storage


@pytest.mark.parametrize("form", ["80", "212", "16", "24", "32"])
def test_each_format_is_read_as_wfdb_wrote_it(tmp_path, form):
    bits = {"80": 8, "212": 12, "16": 16, "24": 24, "32": 32}[form]
    digital = np.random.default_rng(1).integers(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1, (501, 3))
    digital[5, 1] = -(2 ** (bits - 1))
    wfdb.wrsamp(
        "w", 360, ["mV"] * 3, ["I", "II", "V5"], d_signal=digital, fmt=[form] * 3, adc_gain=[200.0, 1e4, 333.3],
        baseline=[0, 7, -3], write_dir=str(tmp_path),
    )  # fmt: skip
    expected = wfdb.rdrecord(str(tmp_path / "w")).p_signal.T.astype(np.float32)
    record = read_record(tmp_path / "w")
    np.testing.assert_array_equal(record.signal, expected)
    assert np.isnan(record.signal[1, 5]) and said(record) == []


def test_several_samples_per_frame_are_read_at_the_full_rate(tmp_path):
    data = np.arange(1, 13, dtype="<i2")  # 4 frames of 2 + 1
    lines = "r 2 250 4\nr.dat 16x2 1/mV 16 0 1 0 0 II\nr.dat 16 1/mV 16 0 3 0 0 RESP\n"
    record = read_record(write(tmp_path, lines, data=data))
    np.testing.assert_array_equal(record.signal, [[1, 2, 4, 5, 7, 8, 10, 11]])
    assert record.sampling_rate == 500 and record.lead_names == ["II"]
    assert any('"RESP" left out: its rate' in warning for warning in record.warnings)


def test_a_skew_is_taken_out_and_the_end_has_no_value(tmp_path):
    path = two_leads(tmp_path)
    path.write_text(path.read_text().replace("r.dat 16 ", "r.dat 16:1 ", 1))
    np.testing.assert_array_equal(read_record(path).signal[0], np.array([0, np.nan, 0.5, np.nan], np.float32))


def test_a_byte_offset_is_skipped(tmp_path):
    path = two_leads(tmp_path)
    path.write_text(path.read_text().replace("r.dat 16 ", "r.dat 16+24 "))
    (tmp_path / "r.dat").write_bytes(bytes(24) + DATA.tobytes())
    assert read_record(path).signal[0, 0] == 1.0


def test_without_an_announced_length_the_file_decides(tmp_path):
    assert read_record(two_leads(tmp_path, first="r 2 500")).signal.shape == (2, 4)


def test_a_file_that_ends_early_is_read_as_far_as_it_goes_with_a_warning(tmp_path):
    path = two_leads(tmp_path)
    (tmp_path / "r.dat").write_bytes(DATA.tobytes()[:-3])
    record = read_record(path)
    assert record.signal.shape == (2, 3) and "ends early, 3 of 4" in record.warnings[0]


def test_an_announced_length_is_not_believed(tmp_path):
    record = read_record(two_leads(tmp_path, first="r 2 500 999999999999999"))
    assert record.signal.shape == (2, 4) and "ends early" in record.warnings[0]


def test_a_check_sum_that_does_not_fit_is_told(tmp_path):
    path = two_leads(tmp_path)
    (tmp_path / "r.dat").write_bytes(DATA[::-1, ::-1].tobytes())
    assert sum("check sum" in warning for warning in read_record(path).warnings) == 2


@pytest.mark.parametrize("content", [b"", b"\x01"])
def test_an_empty_data_file_is_refused(tmp_path, content):
    path = two_leads(tmp_path)
    (tmp_path / "r.dat").write_bytes(content)
    with pytest.raises(ValueError, match="cut or empty"):
        read_record(path)


def test_a_damaged_flac_file_is_refused(tmp_path):
    pytest.importorskip("soundfile")
    with pytest.raises(ValueError, match="damaged or no FLAC"):
        read_record(write(tmp_path, "r 1 500 4\nr.dat 516 100/mV 16 0 0 0 0 I\n", data=b"fLaC" + bytes(60)))


# Headers


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no record line"),
        ("# comment only", "no record line"),
        ("r", "no record line"),
        ("r two 500 4", "number of signals"),
        ("r 0 500 4", "at least 1"),
        ("r 2 500x 4", "sampling rate"),
        ("r 2 0 4", "above zero"),
        ("r 2 -500 4", "above zero"),
        ("r 2 nan 4", "sampling rate"),
        ("r 2 500 4.5", "number of samples"),
        ("r 2 500 -4", "at least 0"),
        ("r 3 500 4", "3 signals announced, 2 signal lines found"),
        ("r 1 500 4", "1 signals announced, 2 signal lines found"),
        ("r/3 2 500 4", "3 segments announced, 2 segment lines found"),
    ],
)
def test_a_record_line_that_says_something_else_is_refused(tmp_path, text, message):
    signals = "r.dat 16 100/mV 16 0 0 0 0 I\nr.dat 16 100/mV 16 0 0 0 0 V1" if text.startswith("r") else ""
    with pytest.raises(ValueError, match=message):
        read_record(write(tmp_path, f"{text}\n{signals}\n"))


@pytest.mark.parametrize(
    "line, message",
    [
        ("r.dat", "no signal line"),
        ("r.dat sixteen 100/mV", "format"),
        ("r.dat 17 100/mV", "storage format 17 is unknown"),
        ("r.dat 16x0 100/mV", "0 samples per frame"),
        ("r.dat 16 abc/mV", "gain"),
        ("r.dat 16 100,5/mV", "gain"),
        ("r.dat 16 100(1.5)/mV", "gain"),
        ("r.dat 16 1e999/mV", "not finite"),
        ("r.dat 16 100/mV 16 zero 0 0 0 I", "whole number"),
        ("r.dat 16 100/mV I", "whole number"),
        ("~ 0 100/mV 16 0 0 0 0 I", "no voltage with data"),
    ],
)
def test_a_signal_line_that_says_something_else_is_refused_with_its_number(tmp_path, line, message):
    with pytest.raises(ValueError, match=message) as error:
        read_record(write(tmp_path, f"# a comment\nr 1 500 4\n{line}\n"))
    assert "line 3" in str(error.value) or "no voltage" in message


def test_different_formats_announced_for_one_file_are_refused(tmp_path):
    path = two_leads(tmp_path)
    path.write_text(path.read_text().replace("r.dat 16 ", "r.dat 212 ", 1))
    with pytest.raises(ValueError, match="different formats"):
        read_record(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_kind_of_line_end_and_a_byte_order_mark_are_read(tmp_path, end):
    path = two_leads(tmp_path, comments="#Age: 5")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_text().replace("\n", end).encode())
    assert read_record(path).age == 5.0


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_header_is_read_or_clearly_refused(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("mutants")
    path = two_leads(folder, comments="#Age: 50\n#Sex: M\n#Dx: 1,2")
    rng, text = random.Random(seed), path.read_text()
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text))
        text = (
            text[:place]
            + rng.choice(["", "9", "-", "/", "(", "x", ":", "+", "e", " ", "\n", "\u00b5", "\0", "#"])
            + (text[place + rng.randint(0, 2) :])
        )
    path.write_bytes(text.encode())
    try:
        record = read_record(path)
    except (ValueError, OSError) as error:
        assert str(folder) in str(error) or "Signal" in str(error)  # in the reader's own words
    else:
        assert isinstance(record, Record) and len(record.lead_names) == len(record.signal)
        assert record.sampling_rate > 0 and not np.isinf(record.signal).any()


# Files


def test_no_such_record_is_an_error_that_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.hea"):
        read_record(tmp_path / "nothing")


def test_a_missing_data_file_is_an_error(tmp_path):
    path = two_leads(tmp_path)
    (tmp_path / "r.dat").unlink()
    with pytest.raises(FileNotFoundError, match="r.dat"):
        read_record(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "ecg.xml").write_text("<ecg/>")
    with pytest.raises(ValueError, match="not recognised"):
        read_record(tmp_path / "ecg.xml")


def test_something_that_is_no_path_raises_type_error():
    with pytest.raises(TypeError, match="is no path"):
        read_record(np.zeros((12, 5000)))


@pytest.mark.parametrize("file", ["../r.dat", "/etc/passwd", "a/r.dat", "..", "-", "http://host/r.dat", "c:r.dat"])
def test_a_data_file_outside_the_folder_is_refused(tmp_path, file):
    path = two_leads(tmp_path)
    path.write_text(path.read_text().replace("r.dat", file))
    with pytest.raises(ValueError, match="no plain file name"):
        read_record(path)


def test_a_pipe_in_place_of_the_data_is_refused_and_not_waited_for(tmp_path):
    path = two_leads(tmp_path)
    (tmp_path / "r.dat").unlink()
    os.mkfifo(tmp_path / "r.dat")
    with pytest.raises(OSError, match="not a regular file"):
        read_record(path)


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "inside").mkdir()
    path = two_leads(tmp_path / "inside")
    (tmp_path / "inside" / "r.dat").rename(tmp_path / "secret.dat")
    (tmp_path / "inside" / "r.dat").symlink_to(tmp_path / "secret.dat")
    with pytest.raises(OSError, match="leads out of the record's folder"):
        read_record(path)


def test_a_record_in_a_hub_cache_is_read_through_its_links(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc" / "georgia", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    two_leads(blobs)
    for suffix, blob in ((".hea", "1" * 40), (".dat", "2" * 40)):
        (blobs / f"r{suffix}").rename(blobs / blob)
        (snapshot / f"r{suffix}").symlink_to(os.path.relpath(blobs / blob, snapshot))
    assert read_record(snapshot / "r").signal.shape == (2, 4)


# Real recordings


def same_as_wfdb(record, path):
    """Compare a record with what wfdb reads, lead by lead, exactly."""
    expected = wfdb.rdrecord(str(path.with_suffix("")), smooth_frames=False)
    names = []
    for name in expected.sig_name:
        try:
            names.append(resolve_lead_name(name))
        except ValueError:
            names.append(name)
    for row, (name, lead) in enumerate(zip(record.lead_names, record.signal, strict=True)):
        index = names.index(name) if names.count(name) == 1 else row
        values = expected.e_p_signal[index] * UNIT_TO_MV.get(expected.units[index], 1)
        np.testing.assert_array_equal(lead, values.astype(np.float32))


def test_all_challenge_records_are_read_exactly_georgia_included(real_ecg):
    paths = [
        path for path in sorted((real_ecg / "challenge-2021").glob("*/*.hea")) if path.with_suffix(".mat").exists()
    ]
    assert len(paths) == 115
    for path in paths:
        record = read_record(path)
        assert record.lead_names == list(STANDARD_LEADS) and record.warnings == []
        stored = loadmat(path.with_suffix(".mat"))["val"]
        gain = float(re.search(r" 16\+24 ([\d.]+)/", path.read_text())[1])
        np.testing.assert_array_equal(record.signal, (stored / gain).astype(np.float32))
        assert record.diagnosis_codes and record.sex in ("male", "female")


def test_challenge_records_agree_with_wfdb_where_it_reads_them(real_ecg):
    num_compared = 0
    for path in sorted((real_ecg / "challenge-2021").glob("*/*.hea")):
        first_line = path.read_text().split("\n", 1)[0]
        if path.with_suffix(".mat").exists() and ".mat" not in first_line:
            same_as_wfdb(read_record(path), path)
            num_compared += 1
    assert num_compared == 84


def test_mit_bih_records_agree_with_wfdb(real_ecg):
    for path in sorted((real_ecg / "mitdb").glob("*.hea")):
        record = read_record(path)
        same_as_wfdb(record, path)
        assert record.warnings == [] and record.sampling_rate == 360 and record.age and record.sex


@pytest.mark.parametrize(
    "options", [{"lead_names": "II"}, {"start_seconds": "1"}, {"duration_seconds": "x"}, {"duration_seconds": [1]}]
)
def test_an_argument_of_the_wrong_kind_is_a_clear_error(tmp_path, options):
    np.save(tmp_path / "a.npy", np.ones((2, 500)))
    given = {"sampling_rate": 250, "lead_names": ["I", "II"], "units": "mV", **options}
    with pytest.raises(TypeError, match=next(iter(options))):
        read_record(tmp_path / "a.npy", **given)


def test_a_name_that_has_no_room_for_a_suffix_is_read(tmp_path):
    path = tmp_path / ("x" * 251 + ".csv")
    path.write_text("I\n" + "0.5\n" * 500)
    assert read_record(path, sampling_rate=250, units="mV").signal.shape == (1, 500)
    with pytest.raises(OSError, match="no such file"):
        read_record("x" * 5000)


def test_two_lead_records_of_cpsc_2021_agree_with_wfdb(real_ecg):
    for path in sorted((real_ecg / "cpsc_2021").glob("*.hea")):
        record = read_record(path)
        same_as_wfdb(record, path)
        assert record.lead_names == ["I", "II"] and record.warnings == []


def test_headers_without_their_signals_say_which_file_is_missing(real_ecg):
    for path in (real_ecg / "challenge-2021" / "st_petersburg_incart_headers").glob("*.hea"):
        with pytest.raises(FileNotFoundError, match=f"{path.stem}.mat"):
            read_record(path)


def test_every_wfdb_sample_is_read_exactly_or_clearly_refused(real_ecg):
    num_read = 0
    for path in sorted((real_ecg / "wfdb_samples").glob("*.hea")):
        try:
            record = read_record(path)
        except (ValueError, OSError) as error:
            assert str(path.parent) in str(error)
        else:
            same_as_wfdb(record, path)
            num_read += 1
    assert num_read == 50


def test_the_age_of_a_record_that_does_not_tell_it_is_none(real_ecg):
    ages = [read_record(path).age for path in (real_ecg / "challenge-2021" / "georgia").glob("*.hea")]
    assert all(age is None or 0 <= age <= 120 for age in ages)


@pytest.mark.parametrize(("factor", "said"), [(1, None), (1000, "Check `units`"), (1e-5, "volt passed as millivolt")])
def test_an_amplitude_a_thousand_times_off_is_said_with_the_record(tmp_path, factor, said):
    np.save(tmp_path / "a.npy", factor * np.sin(np.arange(2000) / 20)[None])
    warnings = read_record(tmp_path / "a.npy", sampling_rate=500, lead_names=["I"], units="mV").warnings
    assert any(said in warning for warning in warnings) if said else warnings == []
