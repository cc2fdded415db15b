"""training.build_dataset: every corpus in, every record out or in the report; again and again the same bytes."""

import csv
import json
import os
import re
import runpy
import shutil
import struct
import sys
from collections import Counter

import fsspec
import numpy as np
import pytest
from datasets import get_dataset_config_names, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_files import (
    TABLE,
    files_of,
    mat_bytes,
    names_of,
    rows_of,
    steps,
    table_row,
    write_challenge,
    write_challenge_corpus,
    write_incart,
    write_ptb,
    write_ptb_xl,
    write_ptb_xl_signal,
    write_table,
)

from training import build_dataset
from training.build_dataset import build_corpus, main
from training.corpora import CORPORA
from training.corpora.challenge import NAMES
from training.corpora.sources import SourceRecord, one_side
from training.dataset_rows import read_samples
from training.shards import LOCK, Output
from training.splits import load_duplicates, load_split, split_of

CORPUS = "cpsc-2018"
TINY_SHARDS = 1e-6  # of a megabyte: a record each
NAMED = names_of(CORPUS)
GOOD, DAMAGED = NAMED["validation"], NAMED["train"]
DIRECTORIES = {  # of the Challenge, by corpus
    "cpsc-2018": "cpsc_2018", "cpsc-extra": "cpsc_2018_extra", "georgia": "georgia", "ptb": "ptb", "ptb-xl": "ptb-xl",
    "chapman-ningbo": "chapman_shaoxing_ningbo", "incart": "st_petersburg_incart_headers",
}  # fmt: skip


@pytest.fixture
def source(tmp_path):
    """Return the folder of a small corpus: a record for each split."""
    write_challenge_corpus(tmp_path / "source", CORPUS)
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def reasons(report):
    assert report["records_in"] == report["records_out"] + report["records_rejected"]
    assert report["records_rejected"] == len(report["rejected"])
    return {each["record_id"]: each["reason"] for each in report["rejected"]}


# Corpora, splits, labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corpus", NAMES)
def test_each_corpus_of_the_challenge_is_built_with_its_committed_splits(corpus, tmp_path, out):
    names = write_challenge_corpus(tmp_path / "deep" / "below", corpus)
    report = build_corpus(corpus, tmp_path, out)
    assert report["splits"] == {"train": 1, "validation": 1, "test": 1} and reasons(report) == {}
    for split, name in names.items():
        (row,) = (row for row in rows_of(out).values() if row["split"] == split)
        assert (row["record_id"], row["corpus"]) == (name, corpus)
        assert (row["patient_id"], row["fold"]) == load_split(corpus)[name]
        assert list(out.glob(f"data/{corpus}/{split}-00000-of-00001.parquet"))


@pytest.mark.parametrize(
    "corpus, pattern, write", [("ptb", r"patient.*", write_ptb), ("incart", r"I\d\d", write_incart)]
)
def test_a_record_has_the_same_split_under_both_its_names(corpus, pattern, write, tmp_path, out):
    for name in names_of(corpus, pattern).values():
        write(tmp_path / "own", name)
    write_challenge_corpus(tmp_path / "challenge", corpus)
    build_corpus(corpus, tmp_path / "own", out / "own")
    build_corpus(corpus, tmp_path / "challenge", out / "challenge")
    own, challenge = (
        {row["patient_id"]: row["fold"] for row in rows_of(out / each).values()} for each in ("own", "challenge")
    )
    assert own == challenge and len(own) == 3


def test_ptb_xl_has_the_same_splits_at_both_rates_and_in_the_challenge(tmp_path, out):
    names = names_of("ptb-xl")  # HRnnnnn
    ids = {split: int(name[2:]) for split, name in names.items()}
    folds = {split: load_split("ptb-xl")[name][1] for split, name in names.items()}
    write_ptb_xl(tmp_path / "own", [table_row(ids[split], folds[split]) for split in ids])
    write_challenge_corpus(tmp_path / "challenge", "ptb-xl")
    built = [
        build_corpus("ptb-xl", tmp_path / "own", out / "100", sampling_rate=100),
        build_corpus("ptb-xl", tmp_path / "own", out / "500"),
        build_corpus("ptb-xl", tmp_path / "challenge", out / "challenge"),
    ]
    assert [report["records_out"] for report in built] == [3, 3, 3]
    found = [
        {int(name.removeprefix("HR")): (row["fold"], row["split"]) for name, row in rows_of(out / form).items()}
        for form in ("100", "500", "challenge")
    ]
    assert found[0] == found[1] == found[2] == {ids[split]: (folds[split], split) for split in ids}
    rates = [{row["sampling_rate"] for row in rows_of(out / form).values()} for form in ("100", "500", "challenge")]
    assert rates == [{100.0}, {500.0}, {500.0}]


def test_ptb_xl_takes_the_rate_that_is_there(tmp_path, out):
    write_ptb_xl(tmp_path, [table_row(1, 3), table_row(2, 4)])
    os.remove(tmp_path / "records500/00000/00002_hr.hea")
    assert reasons(build_corpus("ptb-xl", tmp_path, out)) == {}
    assert {name: row["sampling_rate"] for name, row in rows_of(out).items()} == {"00001": 500.0, "00002": 100.0}


def test_no_patient_is_in_two_splits_whatever_a_table_says(tmp_path, out):
    rows = [table_row(number, fold, patient_id="7") for number, fold in ((1, 3), (2, 9), (3, 10))]
    write_ptb_xl(tmp_path, rows, rates=(100,))
    assert build_corpus("ptb-xl", tmp_path, out)["splits"] == {"train": 3, "validation": 0, "test": 0}
    assert {row["patient_id"] for row in rows_of(out).values()} == {"ptb-xl-7"}


def test_records_of_a_patient_that_no_split_file_names_stay_together(tmp_path, out):
    for name in ("patient998/s9001_re", "patient998/s9002_re", "patient999/s9003_re"):
        write_ptb(tmp_path, name)
    build_corpus("ptb", tmp_path, out)
    rows = rows_of(out)
    assert rows["patient998/s9001_re"]["fold"] == rows["patient998/s9002_re"]["fold"]
    assert rows["patient999/s9003_re"]["patient_id"] == "ptb-patient999"


def test_copies_that_were_found_take_the_side_of_what_they_repeat_and_leave_its_test(tmp_path, out):
    copy, other = [name for name, (_, fold) in load_split("georgia").items() if split_of(fold) == "train"][:2]
    repeated = names_of("cpsc-2018")["test"]
    for corpus, name in (("georgia", copy), ("georgia", other), ("cpsc-2018", repeated)):
        write_challenge(tmp_path / corpus, name, corpus=corpus)
    found = [{"record": copy, "corpus": "georgia", "same_as": repeated, "same_as_corpus": "cpsc-2018"}]
    for corpus in ("georgia", "cpsc-2018"):
        build_corpus(corpus, tmp_path / corpus, out, duplicates=found)
    rows = rows_of(out)
    assert rows[copy]["split"] == rows[repeated]["split"] == "test"
    assert rows[copy]["patient_id"] == rows[repeated]["patient_id"] == f"cpsc-2018-{repeated}"

    def records(config, split):
        return load_dataset(str(out), config, split=split, cache_dir=str(tmp_path / "cache"))["record_id"]

    assert list(records("georgia", "test")) == [copy]
    assert list(records("without-cpsc-2018", "train")) == [other]
    assert "without-georgia" not in get_dataset_config_names(str(out))  # all that is left is held by Georgia, too


def test_all_records_of_a_patient_move_with_a_copy_and_copies_of_copies_go_together():
    names = [name for name, (patient, _) in load_split("ptb").items() if patient == "ptb-patient001"][:2]
    georgia = names_of("georgia")["test"]
    records = [SourceRecord("ptb", name, *load_split("ptb")[name]) for name in names]
    copies = [
        {"record": names[1], "corpus": "ptb", "same_as": "A9999", "same_as_corpus": "cpsc-2018"},
        {"record": "A9999", "corpus": "cpsc-2018", "same_as": georgia, "same_as_corpus": "georgia"},
    ]
    expected = (f"georgia-{georgia}", 10)
    assert [(record.patient_id, record.fold) for record in one_side(records, copies)] == [expected] * 2
    chain = [SourceRecord("cpsc-2018", "A9999", "cpsc-2018-A9999", 1)]
    assert [(record.patient_id, record.fold) for record in one_side(chain, copies)] == [expected]
    circle = [copies[1], {"record": georgia, "corpus": "georgia", "same_as": "A9999", "same_as_corpus": "cpsc-2018"}]
    assert len(one_side(chain, circle)) == 1


def test_a_folder_that_is_a_link_is_read_and_a_circle_of_links_ends(tmp_path, out):
    write_challenge_corpus(tmp_path / "elsewhere", "georgia")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/georgia").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "source", target_is_directory=True)
    assert build_corpus("georgia", tmp_path / "source", out)["records_out"] == 3


def test_files_named_in_capitals_are_listed(source, out):
    header_of(source).rename(header_of(source).with_suffix(".HEA"))
    assert "no header" in build_corpus(CORPUS, source, out)["rejected"][0]["reason"]


def test_two_builds_do_not_write_to_one_folder_at_a_time(source, out):
    with Output(out).alone(), pytest.raises(OSError, match="another command is writing"):
        build_corpus(CORPUS, source, out)
    assert build_corpus(CORPUS, source, out)["records_out"] == 3


@pytest.mark.parametrize(
    "lie", [{"records_out": 1}, {"rejected": [{"record_id": "A1", "reason": ""}]}, {"nulls": None}]
)
def test_a_shard_report_that_lies_is_not_believed(lie, source, out):
    expected = build_corpus(CORPUS, source, out)
    report = next((out / "reports" / CORPUS).glob("train-*.json"))
    report.write_text(json.dumps(json.loads(report.read_text()) | lie))
    assert build_corpus(CORPUS, source, out) == expected


def test_a_diagnosis_that_was_dropped_leaves_open_whether_a_record_is_normal(source, out):
    for path in source.glob("*.hea"):
        path.write_text(path.read_text().replace("Dx: 426783006", "Dx: abc,426783006"))
    build_corpus(CORPUS, source, out)
    assert {row["is_normal"] for row in rows_of(out).values()} == {None}


def test_corpora_that_share_unnamed_recordings_are_left_out_together(tmp_path, out):
    for corpus in ("cpsc-2018", "cpsc-extra", "georgia"):
        write_challenge(tmp_path / corpus, names_of(corpus)["train"], corpus=corpus)
        build_corpus(corpus, tmp_path / corpus, out)
    for left_out in ("cpsc-2018", "cpsc-extra"):
        rows = load_dataset(str(out), f"without-{left_out}", cache_dir=str(tmp_path / "cache"))
        assert set(rows["train"]["corpus"]) == {"georgia"} and set(rows["test"]["corpus"]) == {left_out}


@pytest.mark.parametrize(
    "text", ["record,corpus\nA0001,cpsc-2018\n", "record,corpus,same_as,same_as_corpus\na,b,c,d\n"]
)
def test_a_list_of_duplicates_of_another_form_is_refused(text, tmp_path):
    (tmp_path / "found.csv").write_text(text)
    with pytest.raises(ValueError, match="accepted"):
        load_duplicates(tmp_path / "found.csv")


def test_normal_is_norm_in_ptb_xl_and_lone_sinus_rhythm_in_the_challenge(tmp_path, out):
    statements = {1: "{'NORM': 100.0}", 2: "{'SR': 0.0}", 3: "{'IMI': 0.0}"}
    rows = [table_row(number, 3, scp_codes=codes) for number, codes in statements.items()]
    write_ptb_xl(tmp_path / "own", rows, rates=(100,))
    write_challenge(tmp_path / "georgia", "E00001", corpus="georgia", dx="426783006")
    write_challenge(tmp_path / "georgia", "E00002", corpus="georgia", dx="426783006,713427006,59118001")
    build_corpus("ptb-xl", tmp_path / "own", out)
    build_corpus("georgia", tmp_path / "georgia", out)
    rows = rows_of(out)
    assert [rows[name]["is_normal"] for name in ("00001", "00002", "00003")] == [True, None, False]
    assert [rows[name]["is_normal"] for name in ("E00001", "E00002")] == [True, False]
    assert len(rows["E00002"]["challenge_classes"]) == 2  # the two right bundle branch blocks are one class


# Bad records -----------------------------------------------------------------------------------------------------------


def header_of(folder):
    return folder / f"{DAMAGED}.hea"


def mat_of(folder):
    return folder / f"{DAMAGED}.mat"


def lead_out(path):
    target = path.parent.parent / f"{path.name}.elsewhere"
    path.rename(target)
    path.symlink_to(target)


def put_loop(path):
    path.unlink()
    path.symlink_to(path)


def put_pipe(path):
    path.unlink()
    os.mkfifo(path)


def put_folder(path):
    path.unlink()
    path.mkdir()


def put_hours(folder):
    """Announce five million samples of each lead, and have them: in a file of holes that takes no place."""
    write_challenge(folder, DAMAGED, announced_samples=5_000_000)
    with open(mat_of(folder), "r+b") as file:
        file.write(struct.pack("<5i", 30, 12, 5_000_000, 0, 4))
        file.truncate(24 + 12 * 5_000_000 * 2)


def replaced(old, new):
    """Return what replaces a text in the header."""

    def damage(folder):
        text = header_of(folder).read_text()
        assert old in text
        header_of(folder).write_text(text.replace(old, new))

    return damage


def with_header(data):
    return lambda folder: header_of(folder).write_bytes(data)


def with_data(data):
    return lambda folder: mat_of(folder).write_bytes(data)


def announcing(**announced):
    return lambda folder: write_challenge(folder, DAMAGED, **announced)


REJECTED = {  # what is done to a record, and what of the reason is to be read
    "header missing": (lambda folder: header_of(folder).unlink(), "no header"),
    "data missing": (lambda folder: mat_of(folder).unlink(), "not found"),
    "header empty": (with_header(b""), "no record line"),
    "data empty": (with_data(b""), "cut or empty"),
    "data of 10 bytes": (with_data(b"0123456789"), "cut or empty"),
    "header binary": (with_header(np.random.default_rng(0).bytes(3000)), "ValueError"),
    "header of zeros": (with_header(bytes(3000)), "ValueError"),
    "header huge": (with_header(b"#" * 2_000_000), "larger than"),
    "header cut": (lambda folder: header_of(folder).write_text(header_of(folder).read_text()[:200]), "announced"),
    "header in prose": (with_header(b"see other file"), "ValueError"),
    "one lead more than announced": (replaced(" 12 500 ", " 11 500 "), "11 signals announced, 12"),
    "one lead less than the data": (announcing(announced_leads=11), "data file says 12"),
    "shorter than announced": (announcing(announced_samples=1600), "1600 samples"),
    "longer than announced": (announcing(announced_samples=1400), "1400 samples"),
    "data cut": (with_data(mat_bytes(steps())[:20_000]), "data files hold 832"),
    "data with leads and samples exchanged": (with_data(mat_bytes(steps().T)), "data file says 1500 of 12"),
    "gain infinite": (replaced("1000/mV", "1e999/mV"), "gain"),
    "rate 0": (replaced(" 500 ", " 0 "), "sampling rate"),
    "rate NaN": (replaced(" 500 ", " nan "), "sampling rate"),
    "a million million samples": (announcing(announced_samples=10**12), "announced"),
    "hours of nothing": (put_hours, "at most 50000000"),
    "data of another record": (replaced(f"{DAMAGED}.mat", f"{GOOD}.mat"), "another record"),
    "data above the folder": (replaced(f"{DAMAGED}.mat", "../x.mat"), "no plain file name"),
    "data a link out of the folder": (lambda folder: lead_out(mat_of(folder)), "leads out"),
    "header a link out of the folder": (lambda folder: lead_out(header_of(folder)), "leads out"),
    "data a link to itself": (lambda folder: put_loop(mat_of(folder)), "not found"),
    "data a pipe": (lambda folder: put_pipe(mat_of(folder)), "not a regular file"),
    "header a pipe": (lambda folder: put_pipe(header_of(folder)), "not a regular file"),
    "data a folder": (lambda folder: put_folder(mat_of(folder)), "not a regular file"),
}
KEPT = {
    "age NaN": (dict(age="NaN"), {"age: not stated"}),
    "age 300": (dict(age="300"), {"age: impossible"}),
    "age -1": (dict(age="-1"), {"age: impossible"}),
    "age no number": (dict(age="abc"), {"age: impossible"}),
    "no age": (dict(age=None), {"age: not stated"}),
    "sex unknown": (dict(sex="Unknown"), {"sex: not stated"}),
    "sex no sex": (dict(sex="7"), {"sex: impossible"}),
    "Dx no number": (dict(dx="sinus"), {"snomed_codes: a part of Dx is no number", "snomed_codes: none"}),
    "Dx empty": (dict(dx=""), {"snomed_codes: none"}),
    "no Dx": (dict(dx=None), {"snomed_codes: none"}),
    "Dx in no table": (dict(dx="999999999"), {"snomed_codes: kept, but in no table"}),
}


@pytest.fixture(scope="module")
def clean_rows(tmp_path_factory):
    """Return the rows of `source` with nothing damaged."""
    folder = tmp_path_factory.mktemp("clean")
    write_challenge_corpus(folder / "source", CORPUS)
    build_corpus(CORPUS, folder / "source", folder / "out")
    return rows_of(folder / "out")


def write_kinds(source, kinds):
    """Write a record of each kind into a folder of its own and return their names, which no two share."""
    names = []
    for number, kind in enumerate(kinds):
        folder, name = source / str(number), f"A{9000 + number}"
        write_challenge(folder, DAMAGED, **KEPT.get(kind, ({},))[0])
        if kind in REJECTED:
            write_challenge(folder, GOOD)  # for what points there
            REJECTED[kind][0](folder)
            os.remove(folder / f"{GOOD}.hea"), os.remove(folder / f"{GOOD}.mat")
        for path in folder.iterdir():
            path.rename(folder / path.name.replace(DAMAGED, name))
        if (header := folder / f"{name}.hea").is_file() and not header.is_symlink():
            header.write_bytes(header.read_bytes().replace(DAMAGED.encode(), name.encode()))
        names.append(name)
    return names


@pytest.fixture(scope="module")
def build_of_rejected(tmp_path_factory):
    """Return reasons by kind, rows and folder of a build of `source` with one record more of each kind in `REJECTED`."""
    folder = tmp_path_factory.mktemp("rejected")
    write_challenge_corpus(folder / "source", CORPUS)
    names = write_kinds(folder / "source", REJECTED)
    found = reasons(build_corpus(CORPUS, folder / "source", folder / "out"))
    assert set(found) == set(names)
    return {kind: found[name] for kind, name in zip(REJECTED, names)}, rows_of(folder / "out"), folder


@pytest.mark.parametrize("kind", REJECTED)
def test_a_record_that_cannot_be_read_is_listed_with_its_reason(kind, build_of_rejected):
    assert REJECTED[kind][1] in build_of_rejected[0][kind]


def test_records_that_cannot_be_read_cost_no_other_and_reports_name_no_folder(build_of_rejected, clean_rows):
    _, rows, folder = build_of_rejected
    assert rows == clean_rows
    written = b"".join(data for name, data in files_of(folder / "out").items() if name.endswith(".json")).decode()
    assert str(folder) not in written


@pytest.mark.parametrize("kind", KEPT)
def test_a_record_with_a_doubtful_fact_is_kept_without_it_and_counted(kind, source, out, clean_rows):
    facts, nulls = KEPT[kind]
    write_challenge(source, DAMAGED, **facts)
    report = build_corpus(CORPUS, source, out)
    assert reasons(report) == {} and report["nulls"] == dict.fromkeys(nulls, 1)
    assert rows_of(out)[DAMAGED]["signal"] == clean_rows[DAMAGED]["signal"]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.sampled_from(["good", *REJECTED, *KEPT]), min_size=3, max_size=3))
def test_counts_add_up_for_any_mixture_of_good_and_bad_records(kinds, tmp_path):
    for place in ("source", "out"):
        shutil.rmtree(tmp_path / place, ignore_errors=True)
    names = write_kinds(tmp_path / "source", kinds)
    report = build_corpus(CORPUS, tmp_path / "source", tmp_path / "out")
    assert set(reasons(report)) == {name for name, kind in zip(names, kinds) if kind in REJECTED}
    assert report["records_in"] == 3 and len(rows_of(tmp_path / "out")) == report["records_out"]


def test_of_records_with_one_name_the_first_is_taken(source, out):
    write_challenge(source / "again", DAMAGED, seed=5)
    report = build_corpus(CORPUS, source, out)
    assert report["records_in"] == 4 and "same name" in reasons(report)[DAMAGED]
    assert np.array_equal(read_samples(rows_of(out)[DAMAGED]), steps(0))


def test_of_records_with_one_name_a_whole_one_is_taken(source, out):
    (source / "again").mkdir()
    for path in source.glob(f"{DAMAGED}.*"):
        shutil.move(path, source / "again")
    shutil.copy(source / "again" / f"{DAMAGED}.hea", source)  # comes first, and has no data
    report = build_corpus(CORPUS, source, out)
    assert "same name" in reasons(report)[DAMAGED] and DAMAGED in rows_of(out)


def test_a_corpus_of_bad_records_only_is_a_report(source, out):
    for header in source.glob("*.hea"):
        header.write_text("")
    report = build_corpus(CORPUS, source, out)
    assert (report["records_out"], report["shards"]) == (0, {}) and len(reasons(report)) == 3
    for header in source.glob("*.hea"):
        header.unlink()
    assert len(reasons(build_corpus(CORPUS, source, out))) == 3
    assert not list(out.rglob("*.parquet"))


def test_names_that_are_no_text_stop_nothing(source, out, tmp_path):
    odd = os.fsdecode(b"\xff\xfe")
    shutil.copytree(source, tmp_path / "odd" / odd)
    (tmp_path / "odd" / odd / f"{DAMAGED}.hea").write_text("")
    good = tmp_path / "odd" / odd / f"{GOOD}.hea"
    good.write_text(good.read_text().replace("1000/mV", "0/mV"))  # a remark, with the path
    assert len(reasons(build_corpus(CORPUS, tmp_path / "odd", out))) == 1
    assert rows_of(out)[GOOD]["remarks"]


# PTB-XL's table --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ptb_xl(tmp_path):
    """Return PTB-XL's own release with the records 1, 2, 3 at 100 Hz."""
    write_ptb_xl(tmp_path / "ptb-xl", [table_row(number, number) for number in (1, 2, 3)], rates=(100,))
    return tmp_path / "ptb-xl"


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"ecg_id": "one"}, "line 3 of ptbxl_database.csv: ecg_id"),
        ({"ecg_id": ""}, "line 3 of ptbxl_database.csv: ecg_id"),
        ({"ecg_id": "-2"}, "line 3 of ptbxl_database.csv: ecg_id"),
        ({"ecg_id": "1"}, "line 3 of ptbxl_database.csv: the ecg_id occurs twice"),
        ({"strat_fold": "11"}, "strat_fold"),
        ({"strat_fold": ""}, "strat_fold"),
        ({"strat_fold": "1e0"}, "strat_fold"),
        ({"filename_lr": "records100/00000/09999_lr"}, "no signal file"),
        ({"filename_lr": "../../../etc/passwd"}, "no signal file"),
        ({"filename_lr": ""}, "no signal file"),
    ],
)
def test_a_line_of_the_table_that_cannot_be_is_listed_and_costs_no_other(changed, reason, ptb_xl, out):
    write_table(ptb_xl, [table_row(1, 1), table_row(2, 2, **changed), table_row(3, 3)])
    found = reasons(build_corpus("ptb-xl", ptb_xl, out))
    assert any(reason in each for each in found.values())
    assert set(found) <= {"00001", "00002", "line 3", "00002_lr"} and set(rows_of(out)) == {"00001", "00003"}


@pytest.mark.parametrize(
    "changed, null",
    [
        ({"scp_codes": "__import__('os').system('true')"}, "scp_codes: not understood"),
        ({"scp_codes": "[" * 9999}, "scp_codes: not understood"),
        ({"scp_codes": "{'NORM': " + "9" * 400 + "}"}, "scp_codes: not understood"),
        ({"scp_codes": r"{'\udc80': 1.0}"}, "scp_codes: not understood"),
        ({"scp_codes": "{}"}, "scp_codes: none"),
        ({"scp_codes": "{'XYZ': 1.0}"}, "scp_codes: kept, but in no table"),
        ({"age": "NaN"}, "age: not stated"),
        ({"age": "-1"}, "age: impossible"),
        ({"sex": "2"}, "sex: impossible"),
        ({"weight": "5000"}, "weight: impossible"),
    ],
)
def test_a_doubtful_fact_of_the_table_is_null_and_counted(changed, null, ptb_xl, out):
    write_table(ptb_xl, [table_row(1, 1), table_row(2, 2, **changed), table_row(3, 3)])
    report = build_corpus("ptb-xl", ptb_xl, out)
    assert reasons(report) == {} and report["nulls"] == {null: 1, "height: not stated": 3}


def test_files_that_the_table_does_not_name_are_listed(ptb_xl, out):
    write_ptb_xl_signal(ptb_xl, "records100/00000/00007_lr", 100)
    assert reasons(build_corpus("ptb-xl", ptb_xl, out)) == {"00007_lr": "ptbxl_database.csv does not name it"}


def test_the_other_rate_of_a_record_is_not_counted_again(tmp_path, out):
    write_ptb_xl(tmp_path, [table_row(1, 3)])
    assert build_corpus("ptb-xl", tmp_path, out)["records_in"] == 1


@pytest.mark.parametrize("column", ["ecg_id", "patient_id", "scp_codes", "strat_fold", "filename_lr", "age"])
def test_a_table_without_a_column_loses_no_record_from_the_counts(column, ptb_xl, out):
    with open(ptb_xl / "ptbxl_database.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in TABLE if name != column], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table_row(number, number) for number in (1, 2, 3))
    report = build_corpus("ptb-xl", ptb_xl, out)
    reasons(report)
    assert report["records_out"] == (0 if column in ("ecg_id", "strat_fold", "filename_lr") else 3)


DAMAGED_TABLES = {  # what becomes of a table's text
    "in Latin-1": lambda text: text.encode("latin-1"),
    "with a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "with null bytes": lambda text: text.replace("für", "f\0r").encode(),
    "with short and long lines": lambda text: (text + "4\n,,,,\n" + text.splitlines()[1] + ",more,and,more\n").encode(),
    "with an open quote": lambda text: (text + '4,"open ' + "x" * 200_000 + "\n" + text.splitlines()[1]).encode(),
}


@pytest.mark.parametrize("kind", DAMAGED_TABLES)
def test_a_damaged_table_costs_no_more_than_the_damaged_lines(kind, ptb_xl, out):
    table = ptb_xl / "ptbxl_database.csv"
    table.write_bytes(DAMAGED_TABLES[kind](table.read_bytes().decode()))
    reasons(build_corpus("ptb-xl", ptb_xl, out))
    assert {"00001", "00002", "00003"} == set(rows_of(out))


@pytest.mark.parametrize("data", [b"", b"\0" * 100, bytes(range(256)) * 20, "ecg_id".encode("utf-16")])
def test_a_file_that_is_no_table_costs_all_records_but_not_their_counts(data, ptb_xl, out):
    (ptb_xl / "ptbxl_database.csv").write_bytes(data)
    report = build_corpus("ptb-xl", ptb_xl, out)
    assert {"00001_lr", "00002_lr", "00003_lr"} <= set(reasons(report)) and report["records_out"] == 0


def test_a_table_that_is_a_pipe_is_refused_at_once(ptb_xl, out):
    put_pipe(ptb_xl / "ptbxl_database.csv")
    with pytest.raises(ValueError, match="ptbxl_database.csv: no regular file"):
        build_corpus("ptb-xl", ptb_xl, out)


# Again, elsewhere, changed ---------------------------------------------------------------------------------------------


def stamps(out):
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*.parquet")}


def test_two_builds_give_the_same_bytes(source, out):
    header_of(source).write_text("")  # a rejected record, too
    for place in ("one", "two"):
        build_corpus(CORPUS, source, out / place)
    assert files_of(out / "one") == files_of(out / "two")


def test_a_copy_of_the_source_elsewhere_gives_the_same_parquet_and_report(source, out, tmp_path, monkeypatch):
    header_of(source).write_text("")
    shutil.copytree(source, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    build_corpus(CORPUS, source, out / "one")
    build_corpus(CORPUS, "copy/", "out/two")
    one, two = files_of(out / "one"), files_of(out / "two")
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one if name.endswith(".parquet") or name == f"reports/{CORPUS}.json")


def test_a_second_build_writes_no_shard_again(source, out):
    build_corpus(CORPUS, source, out)
    before, files = stamps(out), files_of(out)
    build_corpus(CORPUS, source, out)
    assert stamps(out) == before and files_of(out) == files


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: data[:99] + b"?" + data[100:], lambda data: b""]
)
def test_a_shard_that_was_damaged_is_written_again_and_no_other(damage, source, out):
    build_corpus(CORPUS, source, out)
    files, before = files_of(out), stamps(out)
    shard = next(out.glob("data/*/train*.parquet"))
    shard.write_bytes(damage(shard.read_bytes()))
    build_corpus(CORPUS, source, out)
    assert files_of(out) == files
    assert {name for name, stamp in stamps(out).items() if stamp != before[name]} == {str(shard.relative_to(out))}


@pytest.mark.parametrize("state", ["{", "null", "[]", "{}", '"x"'])
def test_a_shard_report_that_was_damaged_is_written_again(state, source, out):
    build_corpus(CORPUS, source, out)
    files = files_of(out)
    next(out.glob(f"reports/{CORPUS}/train*.json")).write_text(state)
    build_corpus(CORPUS, source, out)
    assert files_of(out) == files


def test_a_changed_source_is_built_anew_and_nothing_of_the_old_stays(source, out):
    build_corpus(CORPUS, source, out, shard_megabytes=TINY_SHARDS)
    write_challenge(source, DAMAGED, seed=7)
    for suffix in (".hea", ".mat"):
        (source / f"{NAMED['test']}{suffix}").unlink()
    build_corpus(CORPUS, source, out, shard_megabytes=TINY_SHARDS)
    build_corpus(CORPUS, source, out.with_name("fresh"), shard_megabytes=TINY_SHARDS)
    assert files_of(out) == files_of(out.with_name("fresh"))
    assert np.array_equal(read_samples(rows_of(out)[DAMAGED]), steps(7))


def test_a_shard_whose_records_have_all_gone_bad_leaves_no_file(source, out):
    build_corpus(CORPUS, source, out)
    header_of(source).write_text("")
    build_corpus(CORPUS, source, out)
    assert DAMAGED not in rows_of(out) and len(rows_of(out)) == 2


def test_other_shard_sizes_leave_no_shard_of_the_old_size(tmp_path, out):
    for number in range(1, 9):
        write_challenge(tmp_path / "source", f"A{number:04d}")
    build_corpus(CORPUS, tmp_path / "source", out, shard_megabytes=TINY_SHARDS)
    assert len(stamps(out)) == 8
    report = build_corpus(CORPUS, tmp_path / "source", out)
    assert set(stamps(out)) == set(report["shards"]) and len(rows_of(out)) == 8


def test_what_a_killed_build_left_half_written_is_removed(source, out):
    build_corpus(CORPUS, source, out)
    files = files_of(out)
    (out / f"data/{CORPUS}/train-00000-of-00001.parquet.unfinished-123").write_bytes(b"PAR1")
    build_corpus(CORPUS, source, out)
    assert files_of(out) == files


def test_a_corpus_is_out_of_the_data_set_while_it_is_built_anew(source, out, monkeypatch):
    build_corpus(CORPUS, source, out)
    write_challenge(source, DAMAGED, seed=7)
    reports = []  # whether there is one, each time the cards are written
    monkeypatch.setattr(
        build_dataset, "write_cards", lambda _: reports.append((out / f"reports/{CORPUS}.json").exists())
    )
    build_corpus(CORPUS, source, out)
    assert reports == [False, True]


def test_a_corpus_does_not_touch_another(source, out, tmp_path):
    write_challenge_corpus(tmp_path / "georgia", "georgia")
    build_corpus("georgia", tmp_path / "georgia", out)
    before = {name: data for name, data in files_of(out).items() if "georgia" in name and not name.startswith("cards/")}
    assert len(before) > 3
    build_corpus(CORPUS, source, out)
    assert before.items() <= files_of(out).items()


def test_an_object_store_gives_what_folders_give(source, out):
    header_of(source).write_text("")
    write_challenge(source, "A9001", age="NaN", announced_samples=99)
    store = fsspec.filesystem("memory")
    store.put(f"{source}/", "/build-test/source/", recursive=True)
    try:
        report = build_corpus(CORPUS, "memory://build-test/source", "memory://build-test/out")
        again = build_corpus(CORPUS, "memory://build-test/source/", "memory://build-test/out/")
        stored = {path.removeprefix("/build-test/out/"): store.cat_file(path) for path in store.find("/build-test/out")}
    finally:
        store.rm("/build-test", recursive=True)
    assert report == again == build_corpus(CORPUS, source, out)
    here = {name: data for name, data in files_of(out).items() if name != LOCK}
    assert stored.keys() == here.keys()
    state = re.compile(rb'"digest": "\w+"')  # of the files, when each was changed: a store tells it in its own way
    assert all(state.sub(b"", stored[name]) == state.sub(b"", here[name]) for name in here)


def test_an_object_of_the_same_size_that_changed_is_built_anew(source):
    store = fsspec.filesystem("memory")
    store.put(f"{source}/", "/build-test/source/", recursive=True)
    try:
        build_corpus(CORPUS, "memory://build-test/source", "memory://build-test/out")
        old = store.cat_file(f"/build-test/source/{DAMAGED}.hea")
        store.pipe_file(f"/build-test/source/{DAMAGED}.hea", old.replace(b"Age: 57", b"Age: xx"))
        report = build_corpus(CORPUS, "memory://build-test/source", "memory://build-test/out")
    finally:
        store.rm("/build-test", recursive=True)
    assert report["nulls"] == {"age: impossible": 1}


# The command -----------------------------------------------------------------------------------------------------------


def test_one_command_builds_all_corpora_that_are_there(tmp_path, out, capsys):
    for corpus in ("georgia", "ptb"):
        write_challenge_corpus(tmp_path / "source" / corpus, corpus)
    write_incart(tmp_path / "source" / "files" / "incartdb", "I01")
    assert main(["--corpus", "all", "--source", str(tmp_path / "source"), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert {path.stem for path in out.glob("reports/*.json")} == {"georgia", "ptb", "incart"}
    assert "georgia: 3 records in = 3 out (1 train, 1 validation, 1 test) + 0 rejected" in said
    assert said.count("left out") == len(CORPORA) - 3


def test_the_command_says_what_was_rejected(source, out, capsys):
    header_of(source).write_text("")
    assert main(["--corpus", CORPUS, "--source", str(source), "--out", str(out)]) == 0
    assert f"{DAMAGED}: ValueError: {DAMAGED}.hea: no record line" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--corpus", "georgia", "--source", "{source}"], "no records of georgia. Accepted: the Challenge"),
        (["--corpus", "all", "--source", "{empty}"], "no records of any corpus"),
        (["--corpus", "ptb", "--source", "{source}/nowhere"], "there is no such folder"),
        (["--corpus", "ptb", "--source", "{source}/" + f"{DAMAGED}.hea"], "there is no such folder"),
        (["--corpus", "ptb", "--source", "nosuchstore://bucket"], "Protocol not known"),
        (["--corpus", CORPUS, "--source", "{source}", "--out", "{source}/" + f"{DAMAGED}.hea"], DAMAGED),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_said_in_one_line(arguments, said, source, out, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    places = {"source": str(source), "empty": str(tmp_path / "empty")}
    arguments = ["--out", str(out), *(argument.format(**places) for argument in arguments)]
    monkeypatch.setattr(sys, "argv", ["training.build_dataset", *arguments])
    with pytest.warns(RuntimeWarning, match="found in sys.modules"), pytest.raises(SystemExit) as stopped:
        runpy.run_module("training.build_dataset", run_name="__main__")
    assert re.fullmatch(r"error: [^\n]*", stopped.value.code) and said in stopped.value.code


@pytest.mark.parametrize(
    "wrong", [["--num_proc", "0"], ["--shard_megabytes", "0"], ["--shard_megabytes", "nan"], ["--shard_megabytes", "inf"],
              ["--corpus", "mimic"], ["--engine", "spark"]],
)  # fmt: skip
def test_an_impossible_option_is_refused_before_anything_is_done(wrong, source, out, capsys):
    with pytest.raises(SystemExit):
        main(["--corpus", CORPUS, "--source", str(source), "--out", str(out), *wrong])
    assert "error:" in capsys.readouterr().err and not out.exists()


# Real records ----------------------------------------------------------------------------------------------------------


def test_the_real_samples_come_back_with_the_labels_of_their_headers(real_ecg, out):
    challenge = real_ecg / "challenge-2021"
    expected = {"cpsc-2018": 10, "cpsc-extra": 12, "georgia": 36, "chapman-ningbo": 33, "ptb": 6, "ptb-xl": 18}
    for corpus, directory in DIRECTORIES.items():
        report = build_corpus(corpus, challenge / directory, out)
        assert report["records_out"] == expected.get(corpus, 0), reasons(report)
        if corpus == "incart":  # headers without signals
            assert len(reasons(report)) == report["records_in"] and all(
                "not found" in each for each in reasons(report).values()
            )
    rows = rows_of(out)
    counted = Counter()
    for name in rows:
        lines = next(challenge.glob(f"*/{name}.hea")).read_text().splitlines()
        stated = ",".join(line.removeprefix("#Dx:") for line in lines if line.startswith("#Dx:"))
        counted.update({code.strip() for code in stated.split(",")} - {""})
    assert Counter(code for row in rows.values() for code in row["snomed_codes"]) == counted
    assert all(split_of(load_split(row["corpus"])[name][1]) == row["split"] for name, row in rows.items())
    assert all((row["is_normal"] is True) == (row["snomed_codes"] == ["426783006"]) for row in rows.values())
    for name, row in rows.items():
        stored = np.frombuffer(next(challenge.glob(f"*/{name}.mat")).read_bytes()[24:], "<i2").reshape(-1, 12).T
        assert np.array_equal(read_samples(row), stored), name
