"""training/labels.py: PTB-XL's statements and the targets of every task."""

import csv
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from training.labels import (
    MULTI,
    REGRESSION,
    SINGLE,
    build_task,
    encode_all,
    is_normal,
    ptb_xl_statements,
    snomed_codes,
    superclass_members,
)


def _row(*codes, age=None, sex=None):
    return {"codes": codes, "age": age, "sex": sex}


@pytest.mark.parametrize(
    ("task", "num_labels"),
    [("statements", 71), ("diagnostic", 44), ("form", 19), ("rhythm", 12), ("superclass", 5), ("subclass", 23)],
)
def test_the_ptb_xl_tasks_have_as_many_labels_as_the_benchmark(task, num_labels):
    assert len(build_task(task).names) == num_labels


def test_the_statement_table_agrees_with_the_one_of_ptb_xl(real_ecg):

    with open(real_ecg / "labels" / "scp_statements.csv", newline="") as file:
        published = {row[""]: row for row in csv.DictReader(file)}
    assert [statement.code for statement in ptb_xl_statements()] == list(published)
    for statement in ptb_xl_statements():
        row = published[statement.code]
        assert statement.kinds == tuple(kind for kind in ("diagnostic", "form", "rhythm") if row[kind] == "1.0")
        assert (statement.superclass or "") == row["diagnostic_class"]
        assert (statement.subclass or "") == row["diagnostic_subclass"]


def test_every_statement_of_a_record_is_positive_and_nothing_else():
    task = build_task("statements")
    target = task.encode(_row("NORM", "SR"))
    assert {task.names[i] for i in np.flatnonzero(target)} == {"NORM", "SR"}
    assert task.problem_type == MULTI and target.dtype == np.float32


def test_a_record_without_a_diagnostic_statement_is_dropped_from_the_superclass_task():
    task = build_task("superclass")
    assert task.encode(_row("SR", "PVC")) is None
    assert task.encode(_row("IMI", "LVH", "SR")).tolist() == [0, 1, 0, 0, 1]


def test_the_single_label_task_keeps_records_with_exactly_one_superclass():
    task = build_task("superclass_single")
    assert task.problem_type == SINGLE
    assert task.encode(_row("NORM", "SR")) == 0
    assert task.encode(_row("IMI", "LVH")) is None


def test_form_and_rhythm_statements_belong_to_no_superclass():
    members = superclass_members(build_task("statements").names)
    assert {group: len(positions) for group, positions in members.items()} == {
        "NORM": 1,
        "MI": 14,
        "STTC": 13,
        "CD": 11,
        "HYP": 5,
    }


def test_labels_of_any_corpus_are_the_codes_that_occur_often_enough_in_training():
    codes = [["426783006"], ["426783006", "164889003"], ["426783006"], ["270492004"]]
    task = build_task("codes", codes, min_positives=2)
    assert task.names == ("426783006",)
    with pytest.raises(ValueError, match="min_positives"):
        build_task("codes", codes, min_positives=10)


def test_age_is_a_regression_and_records_without_age_are_dropped():
    task = build_task("age")
    targets, kept = encode_all(task, [_row(age=61.0), _row(), _row(age=90.0)])
    assert task.problem_type == REGRESSION
    assert targets.tolist() == [[61.0], [90.0]] and kept.tolist() == [0, 2]


def test_sex_is_a_single_label():
    task = build_task("sex")
    assert [task.encode(_row(sex=sex)) for sex in ("male", "female", None)] == [0, 1, None]


@pytest.mark.parametrize(
    ("codes", "normal"),
    [
        (("NORM", "SR"), True),
        (("NORM",), True),
        (("NORM", "IRBBB"), False),  # a conduction disturbance beside NORM
        (("IMI", "SR"), False),
        (("SR", "PVC"), None),  # no diagnostic statement
        (("NORM", "SR", "426783006"), True),  # of a built data set: statements count where there are any
        (("SR", "426783006"), None),
        (("426783006",), True),
        (("426783006", "426783006"), True),
        (("426783006", "164889003"), False),
        (("999999999",), False),  # any other code, known or not
        (("426783006", "sinus"), None),  # what is no code may be a finding
        ((), None),
    ],
)
def test_normal_is_norm_alone_among_diagnoses_or_sinus_rhythm_alone_among_codes(codes, normal):
    assert is_normal(codes) is normal


def test_anomaly_is_one_label_of_which_a_record_may_have_none_and_open_records_are_dropped():
    task = build_task("anomaly")
    assert (task.names, task.problem_type, task.threshold_figure) == (("abnormal",), MULTI, "youden")
    targets, kept = encode_all(task, [_row("NORM"), _row("SR"), _row("LVH"), _row("426783006"), _row("164889003")])
    assert targets.tolist() == [[0], [1], [0], [1]] and kept.tolist() == [0, 2, 3, 4]
    assert targets.dtype == np.float32


def test_both_label_maps_follow_the_order_of_the_names():
    task = build_task("rhythm")
    assert all(task.label2id[name] == index for index, name in task.id2label.items())


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match="'arrhythmia'.*statements.*age"):
        build_task("arrhythmia")


def test_a_task_that_fits_no_record_says_which_codes_the_records_carry():
    with pytest.raises(ValueError, match="426783006"):
        encode_all(build_task("statements"), [_row("426783006")])


# SNOMED codes and the Challenge's classes


def test_the_24_classes_merge_the_pairs_that_the_challenge_counts_as_one():
    task = build_task("challenge")
    assert len(task.names) == 24 and task.problem_type == MULTI

    def positives(*codes):
        return [task.names[i] for i in np.flatnonzero(task.encode(_row(*codes)))]

    for one, other, name in (
        ("713427006", "59118001", "RBBB"), ("284470004", "63593006", "PAC"), ("427172004", "17338001", "PVC")
    ):  # fmt: skip
        assert positives(one) == positives(other) == positives(one, other) == [name]
    assert positives("733534002") == []  # complete left bundle branch block: merged with LBBB in 2021 only


def test_a_record_with_other_codes_only_is_negative_and_one_without_codes_is_dropped():
    task = build_task("challenge")
    assert not task.encode(_row("999999999", "164951009")).any()
    assert task.encode(_row()) is None


def test_the_snomed_table_agrees_with_those_of_the_challenge(real_ecg):

    codes = snomed_codes()
    assert len(codes) == 137
    for name in ("dx_mapping_scored.csv", "dx_mapping_unscored.csv"):
        with open(real_ecg / "labels" / name, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                each = codes[row["SNOMEDCTCode"]]
                assert (each.abbreviation, each.description) == (row["Abbreviation"].strip(), row["Dx"].strip())
                assert name == "dx_mapping_scored.csv" or each.challenge_class is None
    with open(real_ecg / "labels" / "ConditionNames_SNOMED-CT.csv", newline="", encoding="utf-8-sig") as file:
        assert {row["Snomed_CT"].strip() for row in csv.DictReader(file)} <= set(codes)


def test_nearly_all_codes_of_the_published_headers_are_known(real_ecg):
    from anyecg_hf.records import parse_comments

    headers = sorted((real_ecg / "challenge-2021").rglob("*.hea"))
    lines = [[line[1:].strip() for line in path.read_text().splitlines() if line[0] == "#"] for path in headers]
    found = [code for comments in lines for code in parse_comments(comments)["diagnosis_codes"]]
    assert len(found) > 200 and sum(code in snomed_codes() for code in found) >= 0.99 * len(found)


def ptb_xl_codes(real_ecg):
    """Return the translated codes of each record of folds 1 to 9."""
    translated = {statement.code: statement.snomed_code for statement in ptb_xl_statements()}
    tables = [
        pq.read_table(path, columns=["scp_codes"]) for path in sorted((real_ecg / "ptb-xl-100").glob("*.parquet"))
    ]
    rows = [set(codes) for table in tables for codes in table["scp_codes"].to_pylist()]
    return [({translated[code] for code in codes} - {None}, codes) for codes in rows]


def test_translated_statements_occur_as_often_as_the_challenge_published(real_ecg):
    """Folds 1 to 9 are nine tenths of what was counted: the counts may differ as those of a random nine tenths do."""
    records = ptb_xl_codes(real_ecg)
    counts = Counter(code for codes, _ in records for code in codes)
    published = {}
    for name in ("scored", "unscored"):
        with open(real_ecg / "labels" / f"dx_mapping_{name}.csv", newline="") as file:
            published |= {row["SNOMEDCTCode"]: int(row["PTB_XL"]) for row in csv.DictReader(file)}
    share = len(records) / 21_837
    assert len(counts) == 47
    for code, count in counts.items():
        expected = published[code] * share
        assert abs(count - expected) <= 2 * max(1.0, (expected * (1 - share)) ** 0.5), code
    assert {code for code, count in published.items() if count} - set(counts) == {
        "39732003", "47665007", "251200008"  # left, right and indeterminate axis: of the column heart_axis
    }  # fmt: skip


def test_sinus_rhythm_alone_is_hardly_ever_without_norm_in_the_challenges_ptb_xl(real_ecg):
    alone = [statements for codes, statements in ptb_xl_codes(real_ecg) if codes == {"426783006"}]
    assert (len(alone), sum("NORM" not in statements for statements in alone)) == (6557, 5)


def test_ptb_xl_has_as_many_normal_records_as_its_diagnostic_superclasses_say(real_ecg):
    """Counted here without the task: of folds 1 to 9, NORM alone, another superclass, no diagnostic statement."""
    group = {statement.code: statement.superclass for statement in ptb_xl_statements()}
    expected = Counter()
    for _, statements in ptb_xl_codes(real_ecg):
        found = {group[code] for code in statements} - {None}
        expected["open" if not found else found == {"NORM"}] += 1
    counted = Counter(is_normal(sorted(statements)) for _, statements in ptb_xl_codes(real_ecg))
    assert counted == {None: expected["open"], True: expected[True], False: expected[False]}
