"""What a file says of the patient stays out of logs, errors, results, pictures and data sets: planted in every format.

`Record.statements`, `comments` and the notes of annotations are free text, kept for those who ask for them. Nothing else
of a record, and nothing made of it, may tell a name, an identifier, a date, or where the file lay.
"""

import contextlib
import dataclasses
import io
import json
import logging
import re
import traceback
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from planted_files import BUILDERS, MARKER, spellings
from tiny_checkpoints import tiny_model
from transformers import pipeline

from anyecg_hf import signal_ops
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg import AnyECGModel
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction, AnyECGForSequenceClassification
from anyecg_hf.records import read_record
from training.archive import list_archive
from training.corpora import list_records
from training.corpora.entry import RecordEntry
from training.data import DataArguments, list_sources, load_folds
from training.predictions import predict_records
from training.record_store import prepare_records

MODELS = {
    "ecg-classification": AnyECGForSequenceClassification,
    "ecg-reconstruction": AnyECGForLeadReconstruction,
    "ecg-feature-extraction": AnyECGModel,
}
FREE_TEXT = ("statements", "comments", "annotations")
STATED_BY_NAME = {}  # file name -> what `read_record` has to be told; readers of a corpus get a path only
every_format = pytest.mark.parametrize("file_format", BUILDERS)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Return a function: a format's `Planted` files, made once."""
    made = {}

    def builder(file_format):
        if file_format not in made:
            made[file_format] = BUILDERS[file_format](tmp_path_factory.mktemp("made"))
        return made[file_format]

    return builder


@pytest.fixture(scope="module")
def pipelines():
    torch.manual_seed(0)
    extractor = AnyECGFeatureExtractor()
    return [
        pipeline(task, model=tiny_model(kind), feature_extractor=extractor, device="cpu")
        for task, kind in MODELS.items()
    ]


@pytest.fixture
def folder(tmp_path):
    """A folder named after the patient."""
    return tmp_path / f"{MARKER} Jane"


def told(text, planted):
    """Return what a text tells of the patient: markers, dates in any spelling, their years, times of day."""
    secrets = [MARKER.lower(), *planted.times]
    secrets += [spelling for date in planted.dates for spelling in spellings(*date)]
    found = [secret for secret in secrets if secret.lower() in text.lower()]
    return found + [str(year) for year, *_ in planted.dates if re.search(rf"(?<![\d.]){year}(?!\d)", text)]


@contextlib.contextmanager
def listening(caplog, capfd, monkeypatch):
    """Yield a function that returns what was logged, warned of and printed since."""
    monkeypatch.setattr(signal_ops, "_warned", set())
    caplog.set_level(logging.DEBUG)
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: caplog.text + "".join(capfd.readouterr()) + "".join(str(each.message) for each in caught)


def as_text(result):
    """Return a result as JSON; arrays in full would hold any four digits, so only their shapes."""
    return json.dumps(result, default=lambda value: str(np.shape(value)))


# The files themselves


@every_format
def test_what_is_planted_is_in_the_files_and_the_filters_would_notice_it(build, file_format):
    planted = build(file_format)
    everything = b"".join(planted.files.values())
    squeezed = everything.replace(b"\0", b"").lower()  # UTF-16 and UTF-32 have zeros between the letters
    assert MARKER.lower().encode() in squeezed
    for text in planted.hidden:
        assert text in everything
    for date in planted.dates:
        assert all(told(spelling, planted) for spelling in spellings(*date))
    assert all(told(f"... {text} ...", planted) for text in (MARKER.title(), *planted.times))
    assert not told("Sinus rhythm, 59 years, 0.1944 mV, 12003 samples, 120200", planted)


@every_format
def test_free_text_is_there_for_those_who_ask_for_it(build, folder, file_format):
    planted = build(file_format)
    record = read_record(planted.put_into(folder), **planted.stated)
    kept = str([getattr(record, name) for name in FREE_TEXT])
    assert (MARKER in kept) == planted.is_free_text_kept
    assert "confirmed by" not in str(record.statements).lower()


# Records, messages


@every_format
def test_no_record_shows_the_patient(build, folder, file_format):
    planted = build(file_format)
    record = read_record(planted.put_into(folder), **planted.stated)
    shown = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    shown = {name: value for name, value in shown.items() if name not in (*FREE_TEXT, "signal")}
    for text in (repr(record), str(record), f"{record}", str(shown)):
        assert told(text, planted) == []
    assert shown["record_name"] in next(iter(planted.files)) and record.signal.shape[1] >= 1497


@every_format
def test_warnings_are_there_to_be_looked_at(build, folder, file_format):
    """Without a warning in most of the files the tests of warnings test nothing."""
    planted = build(file_format)
    record = read_record(planted.put_into(folder), **planted.stated)
    silent = ("SCP-ECG", "Apple Watch CSV", "NumPy", "HDF5", "CPSC-2018 MAT")
    assert bool(record.warnings) != (file_format in silent)


@every_format
def test_nothing_is_logged_or_put_into_results(build, folder, pipelines, caplog, capfd, monkeypatch, file_format):
    planted = build(file_format)
    path = planted.put_into(folder)
    with listening(caplog, capfd, monkeypatch) as heard:
        record = read_record(path, **planted.stated)
        record.signal[:, :600] = np.nan  # a gap, which pipelines log
        results = [pipe(record, return_quality=True) for pipe in pipelines]
        results += [] if planted.stated else [pipelines[0](str(path), return_quality=True)]
        said = heard()
    assert "masked" in said  # so that something is heard at all
    assert told(said, planted) == []
    for result in results:
        assert told(as_text(result), planted) == []
        assert {"quality", "record_name"} <= set(result)


# Damage


@every_format
def test_no_error_about_a_cut_file_tells_the_patient(build, folder, caplog, capfd, monkeypatch, file_format):
    planted, num_errors = build(file_format), 0
    with listening(caplog, capfd, monkeypatch) as heard:
        for name, data in planted.files.items():
            for cut in {*range(0, len(data), max(len(data) // 8, 1)), *range(0, min(len(data), 2000), 131)}:
                path = planted.put_into(folder)
                (folder / name).write_bytes(data[:cut])
                num_errors += outcome(path, planted)
        said = heard()
    assert told(said, planted) == [] and num_errors


TEXTUAL = [
    name for name in BUILDERS if "XML" in name or "CSV" in name or "WFDB" in name or "aECG" in name or "EDF" in name
]


@pytest.mark.parametrize("file_format", TEXTUAL)
def test_no_error_quotes_text_that_stands_where_a_number_should(build, folder, file_format):
    """Each number of the header in turn is overwritten with the marker: a damaged file's text slides into other fields."""
    planted, num_errors = build(file_format), 0
    name, data = next(iter(planted.files.items()))
    is_wide = data[:2] == b"\xff\xfe"
    text = data.decode("utf-16" if is_wide else "latin-1")
    if "EDF" in file_format:  # fields have a width
        places = [(found.start(), found.start() + 7) for found in re.finditer(r"(?<= )[-0-9][0-9.]*(?= )", text[:1280])]
    else:
        places = [found.span() for found in re.finditer(r"(?<![\w.-])-?\d[\d.]*(?![\w.])", text[:6000])][:40]
    assert len(places) > 4
    for begin, end in places:
        edited = text[:begin] + MARKER + text[end:]
        path = planted.put_into(folder)
        (folder / name).write_bytes(edited.encode("utf-16") if is_wide else edited.encode("latin-1"))
        num_errors += outcome(path, planted)
    assert num_errors


@pytest.mark.parametrize(
    "name,content,stated",
    [
        ("r.hea", f"r 1 500 3\nr.dat 16 200/{MARKER} 16 0 1 6 0 I\n", {}),
        ("r.hea", f"{MARKER} x 500 3\n", {}),
        ("a.csv", f"time (s),I ({MARKER})\n0,1\n0.002,1\n", {"lead_names": ["I"]}),
        ("a.csv", f"Name ({MARKER}),Born (1951)\n1,1\n2,1\n", {"lead_names": ["I", "II"], "sampling_rate": 500}),
        ("a.csv", f"Name,{MARKER}\nBorn,1951-01-01\nI (mV),II (mV)\n1,2\n3,4\n", {"sampling_rate": 500}),
        ("a.xml", f"<{MARKER}/>", {}),
        ("a.xml", f"<AnnotatedECG><{MARKER}></AnnotatedECG>", {}),
        ("a.xml", f'<!DOCTYPE AnnotatedECG [<!ENTITY {MARKER} "{MARKER}">]><AnnotatedECG/>', {}),
        ("a.xml", f"<RestingECG>&{MARKER};</RestingECG>", {}),
        ("a.xml", f'<?xml version="1.0" encoding="{MARKER}"?><RestingECG/>', {}),
        ("a.bin", f"\0{MARKER}", {}),
    ],
)
def test_no_error_quotes_a_name_in_a_place_of_its_own(folder, name, content, stated):
    folder.mkdir()
    (folder / name).write_text(content)
    (folder / "r.dat").write_bytes(bytes([1, 0, 2, 0, 3, 0]))
    with pytest.raises(ValueError) as caught:
        read_record(folder / name, **stated)
    assert MARKER.lower() not in str(caught.value).replace(str(folder), "").lower()


def test_errors_about_several_arrays_do_not_name_them(folder):
    folder.mkdir()
    np.savez(folder / "a.npz", **{f"{MARKER} 1": np.zeros((2, 9)), f"{MARKER} 2": np.zeros((2, 9))})
    with pytest.raises(ValueError, match="2 of 2 arrays may be the signal") as caught:
        read_record(folder / "a.npz", sampling_rate=500, lead_names=["I", "II"], units="mV")
    assert MARKER not in str(caught.value).replace(str(folder), "")


def test_errors_about_several_datasets_do_not_name_them(folder):
    h5py = pytest.importorskip("h5py", reason='HDF5 needs h5py: pip install "anyecg-hf[formats]"')
    folder.mkdir()
    with h5py.File(folder / "a.h5", "w") as file:
        file[f"{MARKER}/1"], file[f"{MARKER}/2"] = np.zeros((2, 9)), np.zeros((2, 9))
    with pytest.raises(ValueError, match="2 datasets of numbers") as caught:
        read_record(folder / "a.h5", sampling_rate=500, lead_names=["I", "II"], units="mV")
    assert MARKER not in str(caught.value).replace(str(folder), "")


@pytest.mark.parametrize(
    "line,codes",
    [
        ("164889003,59118001", ["164889003", "59118001"]),
        ("164889003 59118001", ["164889003", "59118001"]),
        ("AFIB, I48.0", ["AFIB", "I48.0"]),
        (f"Sinus rhythm, seen by Dr. {MARKER}, 426783006", ["426783006"]),
        (f"SEEN BY {MARKER}", []),
        (f"426783006 {MARKER} 4711", []),
        ("Jane", []),
    ],
)
def test_a_diagnosis_in_words_is_no_code(folder, line, codes):
    folder.mkdir()
    (folder / "r.dat").write_bytes(bytes([1, 0, 2, 0, 3, 0]))
    (folder / "r.hea").write_text(f"r 1 500 3\nr.dat 16 200/mV 16 0 1 6 0 I\n# Dx: {line}\n")
    assert read_record(folder / "r.hea").diagnosis_codes == codes


def outcome(path, case):
    """Read a file; return whether that was an error. Whatever is said, the folder of the path aside, is harmless."""
    try:
        record = read_record(path, **case.stated)
    except (ValueError, OSError) as error:
        said = "".join(traceback.format_exception(error)).replace(str(path.parent), "")
        assert told(said, case) == [], said
        return True
    assert told(str(record.warnings), case) == []
    return False


# Pictures


@every_format
def test_pictures_show_leads_and_times_only(build, folder, file_format):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install anyecg-hf[plot]")
    from anyecg_hf.plotting import plot_record

    planted = build(file_format)
    record = read_record(planted.put_into(folder), **planted.stated)
    findings, svg, png = [{"label": "SR", "score": 0.9, "threshold": 0.5}], io.StringIO(), io.BytesIO()
    figure = plot_record(record, findings=findings, seconds=1)
    words = str([(text.get_text(), text.get_gid()) for text in figure.findobj(matplotlib.text.Text)])
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # words as words, not as curves
        figure.savefig(svg, format="svg", metadata={"Date": None})
    picture = re.sub(r' d="[^"]*"|<!--.*?-->|translate\([^)]*\)', "", svg.getvalue(), flags=re.DOTALL)
    assert "'I'" in words and "'SR'" in words and ">SR<" in picture
    assert told(words, planted) == [] and told(picture, planted) == []
    if file_format in ("WFDB", "DICOM"):
        plot_record(record, seconds=1, dpi=40).savefig(png, format="png")
        assert MARKER.lower().encode() not in png.getvalue().lower() and b"Software" in png.getvalue()


# Data sets


def read_planted(path):
    """Read a record as a corpus does: from its path alone."""
    return read_record(path, **STATED_BY_NAME.get(path.rpartition("/")[2], {}))


def in_cache(folder):
    """Return all that a cache of prepared records holds, but the signals: as text, and as bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    tables = [path for path in files if path.suffix == ".parquet"]
    assert tables and any(path.name == "meta.json" for path in files)
    texts = [path.read_text() for path in files if path.suffix == ".json"]
    texts += [str(pq.read_table(path).to_pylist()) + str(pq.read_schema(path).metadata) for path in tables]
    return "".join([*texts, *map(str, files)]), b"".join(path.read_bytes() for path in files)


@every_format
def test_data_sets_keep_nothing_of_the_patient(
    build, folder, tmp_path, caplog, capfd, monkeypatch, pipelines, file_format
):
    planted = build(file_format)
    path = planted.put_into(folder)
    (folder / f"cut{path.suffix}").write_bytes(path.read_bytes()[:40])
    names = [path.name, f"cut{path.suffix}"]
    STATED_BY_NAME.update(dict.fromkeys(names, planted.stated))
    entries = [RecordEntry(f"r{i}", f"p{i}", 1, read_planted, str(folder / name)) for i, name in enumerate(names)]
    extractor = pipelines[0].feature_extractor
    with listening(caplog, capfd, monkeypatch) as heard:
        store = prepare_records(entries, extractor, source="files", cache_dir=tmp_path / "cache", num_proc=1)
        said = heard()
    assert "1 of 2 records could not be prepared" in said and set(store.meta["unreadable"]) == {"r1"}
    text, raw = in_cache(tmp_path / "cache")
    assert told(said, planted) == [] and told(text, planted) == []
    assert MARKER.encode() not in raw and MARKER.title().encode() not in raw
    assert store.columns["record_id"] == ["r0"]


def test_a_folder_of_records_gives_columns_and_cache_without_the_patient(build, folder, tmp_path, caplog, monkeypatch):
    planted = build("WFDB")
    path = planted.put_into(folder / "sub")
    (folder / "sub" / "cut.hea").write_bytes(path.read_bytes()[:40])
    caplog.set_level(logging.DEBUG)
    args = DataArguments(data=[str(folder)], cache_dir=str(tmp_path / "cache"), num_proc=1)
    rows = load_folds(list_sources(args), AnyECGFeatureExtractor(), range(1, 11), args=args)
    text, raw = in_cache(tmp_path / "cache")
    columns = {name: rows.column(name) for name in rows.rows[0][0].columns}
    items = {name: value for name, value in rows[0].items() if name not in ("steps", "mask")}
    for shown in (text, caplog.text, str(columns), str(items)):
        assert told(shown, planted) == []
    assert MARKER.encode() not in raw
    assert columns["record_id"] == ["sub/r"] and columns["codes"] == [["426783006"]] and columns["age"] == [59.0]


def test_ptb_xl_gives_no_report_date_or_name(folder, tmp_path, build, caplog):
    planted = build("WFDB")
    planted.put_into(folder / "records100")
    columns = (
        "ecg_id,patient_id,age,sex,weight,nurse,site,device,recording_date,report,scp_codes,validated_by,strat_fold"
    )
    row = f"1,7,59,1,,{MARKER},{MARKER},{MARKER},2003-03-16 11:22:33,{MARKER} report,\"{{'SR': 0.0}}\",{MARKER},3"
    (folder / "ptbxl_database.csv").write_text(f"{columns},filename_lr,filename_hr\n{row},records100/r,\n")
    (entry,) = list_records(folder)
    described = {
        field.name: getattr(entry, field.name) for field in dataclasses.fields(entry) if field.name != "payload"
    }
    args = DataArguments(data=[str(folder)], cache_dir=str(tmp_path / "cache"), num_proc=1)
    rows = load_folds(list_sources(args), AnyECGFeatureExtractor(), range(1, 11), args=args)
    text, raw = in_cache(tmp_path / "cache")
    assert len(rows) == 1 and rows.column("patient_id") == ["ptb-xl-7"]
    assert told(str(described) + text + caplog.text, planted) == [] and MARKER.encode() not in raw


@every_format
def test_predictions_of_an_archive_tell_nothing_of_the_patient(
    build, folder, pipelines, caplog, capfd, monkeypatch, file_format
):
    planted = build(file_format)
    path = planted.put_into(folder)
    (folder / f"cut{path.suffix}").write_bytes(path.read_bytes()[:40])
    with listening(caplog, capfd, monkeypatch) as heard:
        rows = list(predict_records(pipelines[0], list_archive(folder)[0]))
        said = heard()
    by_path = {row["path"]: row for row in rows}
    assert by_path[f"cut{path.suffix}"]["error"] and bool(by_path[path.name]["error"]) == bool(planted.stated)
    assert told(said, planted) == [] and told(str(rows), planted) == []
