"""training/split_files and training/splits.py: published counts, no patient on two sides, copies beside firsts."""

import csv
import sys
from collections import Counter, defaultdict

import pytest

from training import make_split_files
from training.corpora import list_records
from training.splits import (
    SPLIT_CORPORA,
    SPLIT_FILES,
    TEST_FOLDS,
    TRAIN_FOLDS,
    fold_of,
    load_duplicates,
    load_split,
    split_of,
)

PUBLISHED = {  # records in the Challenge, records of the corpus, patients (None: not published)
    "cpsc-2018": (6877, 6877, None),
    "cpsc-extra": (3453, 3453, None),
    "incart": (74, 75, 32),
    "ptb": (516, 549, 290),
    "ptb-xl": (21837, 21837, None),
    "georgia": (10344, 10344, None),
}


def rows_of(corpus):
    with open(SPLIT_FILES / f"{corpus}.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("corpus", PUBLISHED)
def test_a_corpus_has_as_many_records_and_patients_as_published(corpus):
    rows, (num_in_challenge, num_records, num_patients) = rows_of(corpus), PUBLISHED[corpus]
    in_challenge = [row["record"] for row in rows if row["record"]]
    assert (len(in_challenge), len(set(in_challenge)), len(rows)) == (num_in_challenge, num_in_challenge, num_records)
    assert num_patients in (None, len({row["patient"] for row in rows}))


def test_every_number_of_chapman_and_ningbo_has_a_place():
    assert [row["record"] for row in rows_of("chapman-ningbo")] == [f"JS{number:05d}" for number in range(1, 45552)]


@pytest.mark.parametrize("corpus", SPLIT_CORPORA)
def test_no_patient_is_in_two_folds(corpus):
    folds = defaultdict(set)
    for patient, fold in load_split(corpus).values():
        assert patient.startswith(f"{corpus}-") and split_of(fold)
        folds[patient].add(fold)
    assert max(map(len, folds.values())) == 1


@pytest.mark.parametrize("corpus", SPLIT_CORPORA)
def test_each_split_has_records(corpus):
    assert {split_of(fold) for _, fold in load_split(corpus).values()} == {"train", "validation", "test"}


@pytest.mark.parametrize("corpus", [name for name in SPLIT_CORPORA if name != "ptb-xl"])
def test_a_fold_follows_from_the_patient_alone(corpus):
    assert all(fold == fold_of(patient) for patient, fold in load_split(corpus).values())


def test_ptb_xl_keeps_its_folds_and_removed_records_are_beside_those_they_repeat():
    place = load_split("ptb-xl")
    removed = {row["record"]: row["same_as"] for row in load_duplicates() if row["corpus"] == "ptb-xl"}
    assert len(removed) == 38 and all(place[record] == place[first] for record, first in removed.items())
    sizes = Counter(fold for name, (_, fold) in place.items() if name.startswith("HR") and name not in removed)
    assert (sum(sizes[fold] for fold in TRAIN_FOLDS), sizes[9], sizes[10]) == (17418, 2183, 2198)


def test_a_record_is_found_under_its_name_in_the_challenge_and_its_own():
    for corpus, record, own_record in (
        ("ptb", "S0138", "patient044/s0146lre"),  # these two: by their signals, see split_files/README.md
        ("ptb", "S0541", "patient288/s0549_re"),
        ("incart", "I0004", "I04"),
        ("ptb-xl", "HR21837", "21837"),
    ):
        assert load_split(corpus)[record] == load_split(corpus)[own_record]


def test_a_patient_of_ptb_is_in_the_challenge_with_all_records_or_none():
    in_challenge = defaultdict(set)
    for row in rows_of("ptb"):
        in_challenge[row["own_record"].split("/")[0]].add(bool(row["record"]))
    assert Counter(map(len, in_challenge.values())) == {1: 290}
    assert sum(present == {False} for present in in_challenge.values()) == 28


def test_holters_of_incart_are_as_many_to_a_patient_as_published():
    per_patient = Counter(row["patient"] for row in rows_of("incart"))
    assert Counter(per_patient.values()) == {1: 2, 2: 18, 3: 11, 4: 1}
    place = load_split("incart")
    assert place["I16"][0] == place["I17"][0] != place["I18"][0]
    assert "I0036" not in place and place["I36"][0] == place["I35"][0] == place["I37"][0]


def test_copies_share_patient_and_fold_with_the_first():
    duplicates = load_duplicates()
    copies = {(row["corpus"], row["record"]) for row in duplicates}
    assert len(copies) == len(duplicates)
    for row in duplicates:
        place = load_split(row["corpus"])[row["record"]]
        if row["same_as"]:
            assert place == load_split(row["same_as_corpus"])[row["same_as"]], row
            assert (row["same_as_corpus"], row["same_as"]) not in copies, f"{row}: name the first of all"


def test_copies_whose_first_is_not_named_are_counted():
    unnamed = [row for row in load_duplicates() if not row["same_as"]]
    assert Counter(row["corpus"] for row in unnamed) == {"chapman-ningbo": 71 + 13}


def test_an_unknown_corpus_or_fold_is_refused_with_what_is_accepted():
    with pytest.raises(ValueError, match="'mitdb'.*cpsc-2018, .*chapman-ningbo"):
        load_split("mitdb")
    with pytest.raises(ValueError, match="fold 0.*1 to 8"):
        split_of(0)
    assert [split_of(fold) for fold in (1, 8, 9, *TEST_FOLDS)] == ["train", "train", "validation", "test"]


def test_the_files_are_made_again_byte_for_byte(tmp_path, monkeypatch):
    records = tmp_path / "RECORDS"
    records.write_text("\n".join(row["own_record"] for row in rows_of("ptb")))
    monkeypatch.setattr(sys, "argv", ["make_split_files", "--ptb", str(records), "--out", str(tmp_path)])
    make_split_files.main()
    for corpus in SPLIT_CORPORA:
        if corpus != "ptb-xl":
            assert (tmp_path / f"{corpus}.csv").read_bytes() == (SPLIT_FILES / f"{corpus}.csv").read_bytes(), corpus


def test_a_copy_is_written_beside_its_first(tmp_path):
    rows = [
        {"record": "E07509", "patient": "georgia-a", "fold": 1},
        {"record": "E07510", "patient": "georgia-b", "fold": 2},
    ]
    make_split_files.write_split(tmp_path, "georgia", rows)
    assert (tmp_path / "georgia.csv").read_text().splitlines()[2] == "E07510,georgia-a,1"


def published_ptb_xl(folder, numbers, fold):
    """PTB-XL's table for `numbers`, all in `fold`, each with the header that `list_records` looks for."""
    rows = ["ecg_id,patient_id,age,sex,weight,scp_codes,strat_fold,filename_lr,filename_hr"]
    rows += [f"{number},{number + 20000},56,1,,{{}},{fold},one_lr," for number in numbers]
    (folder / "ptbxl_database.csv").write_text("\n".join(rows))
    (folder / "one_lr.hea").write_text("one_lr 12 100 1000\n")
    return folder


def test_the_whole_of_ptb_xl_gives_fold_10_its_patients_and_removed_records_their_firsts(tmp_path):
    removed = {
        int(row["record"][2:]): int(row["same_as"][2:]) for row in load_duplicates() if row["corpus"] == "ptb-xl"
    }
    folder = published_ptb_xl(tmp_path, [n for n in range(1, 21838) if n not in removed], fold=10)
    make_split_files.write_split(tmp_path / "out", "ptb-xl", make_split_files.ptb_xl_rows(folder))
    with open(tmp_path / "out" / "ptb-xl.csv", newline="") as file:
        patients = [row["patient"] for row in csv.DictReader(file)]
    assert patients == [f"ptb-xl-{removed.get(number, number) + 20000}" for number in range(1, 21838)]


def test_half_a_ptb_xl_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 records.*Accepted are PTB-XL 1.0.3 whole, 21,799 records, or its"):
        make_split_files.ptb_xl_rows(published_ptb_xl(tmp_path, [1], fold=3))


def test_real_ptb_xl_has_the_patients_and_folds_of_the_file(real_ecg):
    place = load_split("ptb-xl")
    entries = list_records(real_ecg / "ptb-xl-500")  # 451 records of folds 1 to 9
    assert all(place[entry.record_id] == (entry.patient_id, entry.fold) for entry in entries)


def test_real_challenge_records_are_all_in_the_files(real_ecg):
    names = {name for corpus in SPLIT_CORPORA for name in load_split(corpus)}
    headers = {path.stem for path in (real_ecg / "challenge-2021").rglob("*.hea")}
    assert len(headers) > 100 and headers <= names


def test_real_s0001_begins_as_the_first_record_of_ptb(real_ecg):
    wfdb = pytest.importorskip("wfdb")
    ours = wfdb.rdheader(str(real_ecg / "challenge-2021" / "ptb" / "S0001"))
    theirs = wfdb.rdheader(str(real_ecg / "wfdb_samples" / "s0010_re"))
    assert load_split("ptb")["S0001"] == load_split("ptb")[f"patient001/{theirs.record_name}"]
    assert ours.sig_len == theirs.sig_len
    assert all(
        abs(2 * half - whole) <= 1 for half, whole in zip(ours.init_value, theirs.init_value)
    )  # 1000, 2000 per mV
