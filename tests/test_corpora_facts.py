"""training.corpora.facts: what headers and tables say of a record, and what becomes of that which cannot be."""

import pytest

from training.corpora.facts import facts_of
from training.corpora.sources import SourceRecord

AF, SINUS, RBBB, CRBBB, NOT_SCORED = "164889003", "426783006", "59118001", "713427006", "251120003"
TABLE = {
    "age": "56.0", "sex": "1", "height": "160.0", "weight": "63.0", "heart_axis": "",
    "scp_codes": "{'NORM': 100.0, 'SR': 0.0}",
}  # fmt: skip


def of_challenge(*comments, corpus="georgia"):
    return facts_of(SourceRecord(corpus, "E00001"), list(comments))


def of_table(**changed):
    return facts_of(SourceRecord("ptb-xl", "00001", table=TABLE | changed), [])


def test_a_challenge_header_gives_age_sex_and_codes():
    facts, nulls = of_challenge("Age: 74", "Sex: Female", f"Dx: {AF},{NOT_SCORED}", "Rx: Unknown")
    assert (facts["age"], facts["sex"], facts["snomed_codes"]) == (74.0, "female", [AF, NOT_SCORED])
    assert facts["challenge_classes"] == ["AF"] and facts["is_normal"] is False
    assert nulls == []


@pytest.mark.parametrize(
    "age, kind",
    [
        ("NaN", "age: not stated"), ("Unknown", "age: not stated"), ("300", "age: impossible"), ("300.0", "age: impossible"),
        ("-1", "age: impossible"), ("121", "age: impossible"), ("abc", "age: impossible"), ("1e2", "age: impossible"),
        ("inf", "age: impossible"),
    ],
)  # fmt: skip
def test_an_age_that_cannot_be_is_null_and_counted(age, kind):
    facts, nulls = of_challenge(f"Age: {age}", "Sex: M", f"Dx: {AF}")
    assert facts["age"] is None and nulls == [kind]


def test_an_age_of_300_is_over_89_in_ptb_xl_in_either_form():
    assert of_table(age="300.0")[0]["age"] == of_challenge("Age: 300", corpus="ptb-xl")[0]["age"] == 90.0


@pytest.mark.parametrize("sex", ["Unknown", "NaN", "x", "2", "Femalex"])
def test_a_sex_that_is_not_known_is_null_and_counted(sex):
    facts, nulls = of_challenge("Age: 5", f"Sex: {sex}", f"Dx: {AF}")
    assert facts["sex"] is None and len(nulls) == 1 and nulls[0].startswith("sex: ")


def test_what_a_header_does_not_say_is_null_and_counted():
    facts, nulls = of_challenge()
    assert (facts["age"], facts["sex"], facts["snomed_codes"], facts["is_normal"]) == (None, None, [], None)
    assert nulls == ["snomed_codes: none", "age: not stated", "sex: not stated"]


@pytest.mark.parametrize("dx", ["", "Unknown", "nan", "?", ","])
def test_an_empty_dx_is_no_label_and_counted(dx):
    facts, nulls = of_challenge("Age: 5", "Sex: M", f"Dx: {dx}")
    assert facts["snomed_codes"] == facts["challenge_classes"] == [] and facts["is_normal"] is None
    assert nulls == ["snomed_codes: none"]


@pytest.mark.parametrize("dx", ["sinus rhythm", "4267830x6", "1e8", "-164889003", "164889003.0", "١٦٤٨٨٩٠٠٣"])
def test_a_dx_that_is_no_number_is_dropped_and_counted(dx):
    facts, nulls = of_challenge("Age: 5", "Sex: M", f"Dx: {dx},{AF}")
    assert facts["snomed_codes"] == [AF] and nulls == ["snomed_codes: a part of Dx is no number"]


def test_codes_that_no_table_knows_are_kept_and_counted():
    facts, nulls = of_challenge("Age: 5", "Sex: M", f"Dx: 999999999,{AF}")
    assert facts["snomed_codes"] == ["999999999", AF] and nulls == ["snomed_codes: kept, but in no table"]


def test_a_code_that_is_there_twice_is_kept_once():
    assert of_challenge(f"Dx: {AF},{RBBB},{AF}", f"Dx: {RBBB}")[0]["snomed_codes"] == [AF, RBBB]


def test_codes_that_the_challenge_counts_as_one_give_one_class():
    pairs = [(CRBBB, RBBB), ("284470004", "63593006"), ("427172004", "17338001")]
    found = [of_challenge(f"Dx: {code}")[0]["challenge_classes"] for pair in pairs for code in pair]
    assert (
        found[0] == found[1] and found[2] == found[3] and found[4] == found[5] and all(len(each) == 1 for each in found)
    )
    assert of_challenge(f"Dx: {CRBBB},{RBBB}")[0]["challenge_classes"] == found[0]


@pytest.mark.parametrize(
    "dx, is_normal", [(SINUS, True), (f"{SINUS},{SINUS}", True), (f"{SINUS},{AF}", False), (AF, False)]
)
def test_a_challenge_record_is_normal_where_sinus_rhythm_is_all_it_has(dx, is_normal):
    assert of_challenge(f"Dx: {dx}")[0]["is_normal"] is is_normal


@pytest.mark.parametrize(
    "reason, is_normal", [("Healthy control", True), ("Myocardial infarction", False), ("n/a", None)]
)
def test_a_healthy_control_of_ptb_is_normal(reason, is_normal):
    facts, _ = facts_of(SourceRecord("ptb", "patient001/s0010_re"), ["age: 81", f"Reason for admission: {reason}"])
    assert facts["is_normal"] is is_normal and facts["age"] == 81.0


@pytest.mark.parametrize(
    "statements, superclasses, is_normal",
    [
        ("{'NORM': 100.0, 'SR': 0.0}", ["NORM"], True),
        ("{'SR': 0.0}", [], None),
        ("{'IMI': 15.0, 'SR': 0.0}", ["MI"], False),
        ("{'NORM': 80.0, 'IMI': 0.0}", ["NORM", "MI"], False),
        ("{'LVH': 100.0, 'CLBBB': 100.0, 'NDT': 100.0}", ["STTC", "CD", "HYP"], False),
    ],
)
def test_norm_is_the_normal_of_ptb_xl_and_sinus_rhythm_is_not(statements, superclasses, is_normal):
    facts, _ = of_table(scp_codes=statements)
    assert facts["superclasses"] == superclasses and facts["is_normal"] is is_normal


def test_every_statement_of_ptb_xl_counts_whatever_its_likelihood():
    facts, nulls = of_table(scp_codes="{'NORM': 100.0, 'SR': 0.0}", heart_axis="LAD")
    assert facts["scp_codes"] == ["NORM", "SR"] and facts["scp_likelihoods"] == [100.0, 0.0]
    assert SINUS in facts["snomed_codes"] and "LAD" in facts["challenge_classes"]
    assert (facts["age"], facts["sex"], facts["height"], facts["weight"], nulls) == (56.0, "female", 160.0, 63.0, [])


@pytest.mark.parametrize(
    "text",
    [
        "", "nan", "NORM", "{'NORM'}", "['NORM']", "{'NORM': 'x'}", "{'NORM': None}", "{'NORM': 100.0",
        "__import__('os').system('true')", "{'NORM': __import__('os').getpid()}", "{'NORM': (lambda: 1)()}",
        "[" * 60_000 + "]" * 60_000, "-" * 100_000 + "1", "1+" * 40_000 + "1", "{1:" * 3000 + "1" + "}" * 3000,
        "{'NORM': " + "9" * 400 + "}", "{'NORM': " + "9" * 5000 + "}", "{'NORM': 1e999}", "{'NORM': -1}", "{'NORM': 101}",
        "{'NORM': 1e400 - 1e400}", r"{'\ud800': 100.0}", r"{'NORM\x00': 100.0}", "{'NÖRM': 1}", "\0",
    ],
)  # fmt: skip
def test_statements_that_are_none_are_null_and_counted_and_never_run(text):
    facts, nulls = of_table(scp_codes=text)
    assert facts["scp_codes"] == facts["scp_likelihoods"] == facts["superclasses"] == [] and facts["is_normal"] is None
    assert nulls == ["scp_codes: not understood"]


def test_statements_that_no_table_knows_are_kept_and_counted():
    facts, nulls = of_table(scp_codes="{'NEWCODE': 50.0, 'NORM': 100.0}")
    assert facts["scp_codes"] == ["NEWCODE", "NORM"] and nulls == ["scp_codes: kept, but in no table"]


@pytest.mark.parametrize("value", ["", "nan", "-5", "0", "1e9", "inf", "tall"])
def test_heights_and_weights_that_cannot_be_are_null_and_counted(value):
    facts, nulls = of_table(height=value, weight=value)
    assert facts["height"] is facts["weight"] is None
    assert [null.split(":")[0] for null in nulls] == ["height", "weight"]
