"""What all XML formats must bear: hostile documents, any truncation, any damage, and nothing of the patient comes out."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from work import count_calls
from xml_ecg_files import BIRTH_YEAR, SECRET, aecg, annotation, cardiosoft, diagnosis, muse, sierra, xli

from anyecg_hf.record_fields import findings
from anyecg_hf.records import read_record
from anyecg_hf.xml_documents import DEEPEST, MOST_ELEMENTS, age_at, age_in_years, parse_list

ROWS = np.arange(24).reshape(2, 12) ** 2
DOCUMENTS = {
    "HL7 aECG": aecg(annotations=annotation("MDC_ECG_RHY", '<value code="MDC_ECG_RHY_SINUS_RHY"/>')).encode(),
    "Philips Sierra XML": sierra(xli(ROWS), names=("I", "V1"), milliseconds=24),
    "GE MUSE XML": muse(diagnosis=diagnosis(["Sinus rhythm"], [f"Confirmed by {SECRET}"])).encode("latin-1"),
    "GE CardioSoft XML": cardiosoft().encode("latin-1"),
}
ROOTS = {
    "HL7 aECG": "AnnotatedECG",
    "Philips Sierra XML": "restingecgdata",
    "GE MUSE XML": "RestingECG",
    "GE CardioSoft XML": "CardiologyXML",
}
OFTEN = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
every_format = pytest.mark.parametrize("file_format", DOCUMENTS)


def read(folder, data, **options):
    path = folder / "record.xml"
    path.write_bytes(data)
    return read_record(path, **options)


def everything_in(record):
    return repr(record) + "".join(str(getattr(record, field.name)) for field in dataclasses.fields(record))


def ends_well(folder, data):
    """Read a document: a sound record and nothing of the patient, or a clear error."""
    try:
        record = read(folder, data)
    except (ValueError, OSError) as error:
        assert str(error).startswith(str(folder)) and not isinstance(error, UnicodeError)
        assert not any(word in str(error) for word in ("could not convert", "invalid literal", "reshape", "broadcast"))
        assert SECRET not in str(error)
        return
    assert 0 < record.sampling_rate < np.inf and record.signal.dtype == np.float32
    assert len(record.signal) == len(record.lead_names) > 0 and not np.isinf(record.signal).any()
    assert SECRET not in "".join(record.warnings)


@every_format
def test_a_sound_document_is_recognised_and_read(tmp_path, file_format):
    record = read(tmp_path, DOCUMENTS[file_format])
    assert record.file_format == file_format and record.sex == "female" and record.age == 69


@every_format
def test_nothing_of_the_patient_comes_out(tmp_path, file_format):
    text = everything_in(read(tmp_path, DOCUMENTS[file_format]))
    assert SECRET not in text and BIRTH_YEAR not in text and "2020" not in text


@every_format
@OFTEN
@given(data=st.data())
def test_a_document_cut_anywhere_ends_well(tmp_path, file_format, data):
    document = DOCUMENTS[file_format]
    ends_well(tmp_path, document[: data.draw(st.integers(1, len(document) - 1))])


@every_format
@OFTEN
@given(data=st.data())
def test_damaged_bytes_end_well(tmp_path, file_format, data):
    document = bytearray(DOCUMENTS[file_format])
    for _ in range(data.draw(st.integers(1, 4))):
        document[data.draw(st.integers(0, len(document) - 1))] = data.draw(st.integers(0, 255))
    ends_well(tmp_path, bytes(document))


@every_format
@OFTEN
@given(data=st.data())
def test_damaged_contents_end_well(tmp_path, file_format, data):
    """Numbers and texts are replaced; the document stays well-formed, so the damage gets past the XML parser."""
    encoding = "utf-16" if file_format == "Philips Sierra XML" else "latin-1"
    parts = DOCUMENTS[file_format].decode(encoding).split('"')
    places = [index for index in range(3, len(parts), 2)]
    words = ("", "0", "-1", "1e308", "1e-300", "9" * 30, "x", "NaN", "20200230", "TIME_ABSOLUTE", "uV", "500", "True")
    for _ in range(data.draw(st.integers(1, 3))):
        parts[data.draw(st.sampled_from(places))] = data.draw(st.sampled_from(words))
    ends_well(tmp_path, '"'.join(parts).encode(encoding))
    pieces = DOCUMENTS[file_format].decode(encoding).split("<")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(2, len(pieces) - 1))
        pieces[place] = pieces[place].partition(">")[0] + ">" + data.draw(st.sampled_from(words))
    ends_well(tmp_path, "<".join(pieces).encode(encoding))


# Hostile documents


def hostile(file_format, doctype, content):
    root = ROOTS[file_format]
    return f"<?xml version='1.0'?>{doctype}<{root}>{content}</{root}>".encode()


@every_format
@pytest.mark.parametrize(
    "doctype, content",
    [
        ('<!DOCTYPE r [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>', "&b;"),
        ('<!DOCTYPE r [<!ENTITY a SYSTEM "file:///etc/passwd">]>', "&a;"),
        ('<!DOCTYPE r [<!ENTITY % a SYSTEM "http://127.0.0.1:9/x.dtd"> %a;]>', ""),
        ('<!DOCTYPE r [<!ATTLIST x y CDATA "long">]>', "<x/>"),
        ('<!DOCTYPE r SYSTEM "http://127.0.0.1:9/x.dtd">', "&from_there;"),
        ("", "&undefined;"),
    ],
)
def test_entities_and_dtds_of_a_document_are_refused(tmp_path, file_format, doctype, content):
    with pytest.raises(ValueError, match="refused|undefined entity"):
        read(tmp_path, hostile(file_format, doctype, content))


def test_a_dtd_that_is_only_named_is_neither_fetched_nor_minded(tmp_path):
    (tmp_path / "restecg.dtd").write_text("<!ENTITY broken")
    assert read(tmp_path, muse().encode("latin-1")).lead_names == ["I", "II", "V1"]


@pytest.mark.parametrize(
    "content",
    ["<a>" * 1_000_000, "<a>" * (DEEPEST + 1) + "</a>" * (DEEPEST + 1), "<a/>" * (MOST_ELEMENTS + 1)],
)
def test_documents_too_deep_or_with_too_many_elements_are_refused(tmp_path, content):
    def refuse():
        with pytest.raises(ValueError, match="levels or"):
            read(tmp_path, hostile("GE MUSE XML", "", content))

    assert count_calls(refuse) < 20 * MOST_ELEMENTS


@pytest.mark.parametrize(
    "content", [f"<!--{'-a' * 2_000_000}-->", "<a " + " ".join(f'a{n}=">"' for n in range(300_000)) + "/>"]
)
def test_endless_tags_and_comments_are_refused(tmp_path, content):
    with pytest.raises(ValueError, match="a tag or comment of more than"):
        read(tmp_path, hostile("HL7 aECG", "", content))


def test_announced_sizes_take_no_memory(tmp_path):
    documents = [
        sierra(xli(ROWS), names=("I", "V1"), milliseconds=1_990_000),
        muse(lead={"count": 10**12}).encode("latin-1"),
        cardiosoft(count=10**12).encode("latin-1"),
    ]
    for document in documents:
        tracemalloc.start()
        ends_well(tmp_path, document)
        assert tracemalloc.get_traced_memory()[1] < 80e6  # 64 MB of it are the buffer of read_whole
        tracemalloc.stop()


def test_waveforms_that_expand_without_end_are_refused(tmp_path):
    with pytest.raises(ValueError, match="more samples than the 12 announced"):
        read(tmp_path, sierra(xli(np.zeros((2, 20_000), int)), names=("I", "V1"), milliseconds=24))


# Encodings


@pytest.mark.parametrize(
    "encoding, declared",
    [
        ("utf-16", "utf-16"),
        ("utf-8-sig", "utf-8"),
        ("utf-8", "utf-16"),  # converted since, by a program that left the declaration
        ("cp1252", "windows-1252"),
        ("gbk", "GB2312"),
        ("latin-1", "ISO8859-1"),
    ],
)
def test_encodings(tmp_path, encoding, declared):
    document = cardiosoft().replace("ISO8859-1", declared)
    assert read(tmp_path, document.encode(encoding)).lead_names == ["I", "II", "V1"]


@pytest.mark.parametrize("declared", ["hex", "idna", "unicode_escape", "nonsense"])
def test_encodings_that_are_none_are_refused(tmp_path, declared):
    with pytest.raises(ValueError, match="encoding that is not known"):
        read(tmp_path, cardiosoft().replace("ISO8859-1", declared).encode())


# Small parts


def test_long_lists_of_numbers_are_read_whole():
    numbers = np.random.default_rng(3).integers(-30000, 30000, 100_000)
    for separator, text in ((" ", " \n".join(map(str, numbers))), (",", ",".join(map(str, numbers)))):
        assert np.array_equal(parse_list(text, "w", separator), numbers)


@pytest.mark.parametrize("text", ["1,,2", "1 , ,2", "1;2", "１", "0x10", "1" * 41, "1 2 3e"])
def test_lists_with_gaps_or_other_signs_are_refused(text):
    with pytest.raises(ValueError, match="^w: holds something that is no decimal number"):
        parse_list(text, "w", ",")


@pytest.mark.parametrize(
    "number, unit, years",
    [
        ("40", None, 40),
        ("40", "YEARS", 40),
        ("300", "a", 90),
        ("6", "mo", 0.5),
        ("10", "wk", 70 / 365.25),
        ("3", "Days", 3 / 365.25),
        ("5", "min", None),
        ("", "a", None),
        ("old", "a", None),
    ],
)
def test_ages_in_years(number, unit, years):
    assert age_in_years(number, unit) == (years if years is None else pytest.approx(years, abs=1e-6))


@pytest.mark.parametrize(
    "birth, day, age",
    [
        ((1951, 5, 19), (2020, 5, 18), 68),
        ((1951, 5, 18), (2020, 5, 18), 69),
        ((2020, 1, 1), (2020, 7, 1), 182 / 365.25),
        ((2020, 1, 1), (2019, 1, 1), None),
        ((1800, 1, 1), (2020, 1, 1), None),
        (("1951", "13", "1"), (2020, 1, 1), None),
        (None, (2020, 1, 1), None),
    ],
)
def test_ages_from_dates(birth, day, age):
    assert age_at(birth, day) == (age if age is None else pytest.approx(age, abs=1e-6))


@pytest.mark.parametrize(
    "text, kept",
    [
        ("Sinus rhythm 60-100, PR 0.12", ["Sinus rhythm 60-100, PR 0.12"]),
        ("compared with 2015-03-12 10:22:01 PM, no change", ["compared with  , no change"]),
        ("Confirmed by: Brown", []),
        ("Overread BY Brown", []),
        ("12.03.2015", []),
        (" ", []),
    ],
)
def test_findings_lose_signatures_and_dates(text, kept):
    assert findings([text]) == kept
