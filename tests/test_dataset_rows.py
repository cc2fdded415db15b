"""training.dataset_rows: from published files to a row, and back to the same samples and the same record."""

import numpy as np
import pyarrow as pa
import pytest
import scipy.io
import wfdb
from published_files import (
    BEAT,
    RHYTHM,
    VENTRICULAR,
    annotation_bytes,
    names_of,
    steps,
    table_row,
    write_challenge,
    write_incart,
    write_ptb,
    write_ptb_xl,
)

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import STANDARD_LEADS
from anyecg_hf.records import read_record
from training.build_dataset import list_corpus
from training.corpora.challenge import NAMES
from training.dataset_rows import SCHEMA, read_row, read_samples
from training.row_builder import build_row

MARKS = ((40, BEAT, ""), (50, RHYTHM, "(AFIB"), (300, VENTRICULAR, ""), (400, RHYTHM, "(N"), (700, BEAT, ""))


@pytest.fixture(scope="module")
def extractor():
    return AnyECGFeatureExtractor()


@pytest.fixture
def build(tmp_path, extractor):
    """Return a function that writes one record below `tmp_path` and returns `(row, header)`."""

    def of(corpus, header):
        (record,) = list_corpus(corpus, tmp_path)
        assert record.problem == "" and tmp_path / record.header == header
        return build_row(record, tmp_path, extractor).values, header

    return of


def challenge(corpus, folder, **options):
    return write_challenge(folder, names_of(corpus)["train"], corpus=corpus, **options)


def own(corpus, folder):
    if corpus == "ptb":
        return write_ptb(folder, "patient001/s0010_re")
    if corpus == "incart":
        return write_incart(folder, "I01", marks=MARKS)
    write_ptb_xl(folder, [table_row(1, 3, patient_id="15709.0")], rates=(500,))
    return folder / "records500/00000/00001_hr.hea"


def published_integers(header):
    """Return what wfdb reads; of what it refuses (Georgia's record lines), what scipy reads."""
    if header.stem.startswith("E"):
        return scipy.io.loadmat(header.with_suffix(".mat"))["val"]
    return wfdb.rdrecord(str(header.with_suffix("")), physical=False).d_signal.T


FORMS = [(challenge, corpus) for corpus in NAMES] + [(own, corpus) for corpus in ("ptb-xl", "ptb", "incart")]
every_form = pytest.mark.parametrize(
    "write, corpus", FORMS, ids=[f"{form.__name__}-{corpus}" for form, corpus in FORMS]
)


@every_form
def test_the_published_samples_come_back_bit_for_bit(write, corpus, tmp_path, build):
    row, header = build(corpus, write(corpus, tmp_path))
    assert np.array_equal(read_samples(row), published_integers(header))
    files = [header.with_suffix(suffix) for suffix in (".mat", ".dat", ".xyz") if header.with_suffix(suffix).exists()]
    leads, start = 0, 24 if files[0].suffix == ".mat" else 0
    for file in files:
        stored = np.frombuffer(file.read_bytes()[start:], "<i2").reshape(row["num_samples"], -1).T
        assert np.array_equal(read_samples(row)[leads : leads + len(stored)], stored)
        leads += len(stored)
    assert leads == len(row["lead_names"])


@every_form
def test_a_row_reads_as_its_files_do(write, corpus, tmp_path, build):
    row, header = build(corpus, write(corpus, tmp_path))
    ours, theirs = read_row(row), read_record(header)
    if (write, corpus) == (challenge, "incart"):  # see test_gains_that_cannot_be
        theirs.signal = ours.signal
    assert np.array_equal(ours.signal, theirs.signal, equal_nan=True) and ours.signal.dtype == np.float32
    assert (ours.sampling_rate, ours.lead_names, ours.units) == (theirs.sampling_rate, theirs.lead_names, "mV")
    assert ours.annotations == theirs.annotations
    if corpus != "ptb-xl" or write is challenge:  # PTB-XL's own headers say nothing of the patient
        assert (ours.age, ours.sex) == (theirs.age, theirs.sex)
        assert ours.diagnosis_codes == theirs.diagnosis_codes


@every_form
def test_a_row_fits_the_schema_and_has_quality_for_each_lead_and_second(write, corpus, tmp_path, build):
    row, _ = build(corpus, write(corpus, tmp_path))
    assert set(row) == set(SCHEMA.names)
    read_back = pa.Table.from_pylist([row], schema=SCHEMA).to_pylist()[0]
    assert np.array_equal(read_samples(read_back), read_samples(row))
    lengths = [len(flags) for flags in row["quality"]]
    assert lengths == [3] * 12 + [0] * (len(lengths) - 12) and 0 <= row["acceptability"] <= 1


def test_the_columns_of_a_challenge_record(tmp_path, build):
    row, _ = build("cpsc-2018", challenge("cpsc-2018", tmp_path, age="57", sex="Male", dx="164889003"))
    name = names_of("cpsc-2018")["train"]
    assert (row["record_id"], row["corpus"], row["patient_id"], row["split"]) == (
        name, "cpsc-2018", f"cpsc-2018-{name}", "train",
    )  # fmt: skip
    assert (row["num_samples"], row["sampling_rate"], row["lead_names"]) == (1500, 500.0, list(STANDARD_LEADS))
    assert (row["units"], row["gains"], row["baselines"]) == (["mV"] * 12, [1000.0] * 12, [0] * 12)
    assert row["no_values"] == [-32768] * 12
    assert (row["age"], row["sex"], row["height"], row["weight"]) == (57.0, "male", None, None)
    assert (row["snomed_codes"], row["challenge_classes"], row["is_normal"]) == (["164889003"], ["AF"], False)
    assert row["scp_codes"] == row["superclasses"] == row["beats"] == row["rhythm_spans"] == row["remarks"] == []


def test_the_columns_of_ptb(tmp_path, build):
    row, _ = build("ptb", own("ptb", tmp_path))
    assert (row["record_id"], row["patient_id"]) == ("patient001/s0010_re", "ptb-patient001")
    assert (row["sampling_rate"], row["age"], row["sex"], row["is_normal"]) == (1000.0, 81.0, "female", False)
    assert row["lead_names"] == [*STANDARD_LEADS, "X", "Y", "Z"] and row["gains"] == [2000.0] * 15


def test_the_columns_of_incart(tmp_path, build):
    row, _ = build("incart", own("incart", tmp_path))
    assert (row["record_id"], row["patient_id"], row["sampling_rate"]) == ("I01", "incart-1", 257.0)
    assert (row["gains"], row["baselines"]) == ([306.0] * 12, [-40] * 12)
    assert (row["age"], row["sex"], row["is_normal"]) == (65.0, "female", None)
    assert [(beat["sample"], beat["symbol"]) for beat in row["beats"]] == [(40, "N"), (300, "V"), (700, "N")]
    spans = [(span["start"], span["stop"], span["rhythm"]) for span in row["rhythm_spans"]]
    assert spans == [(50, 400, "AFIB"), (400, 771, "N")]


def test_a_rate_that_no_ecg_has_is_refused(tmp_path, extractor):
    header = challenge("georgia", tmp_path)
    header.write_text(header.read_text().replace(" 500 ", " 1e-9 ", 1))
    (record,) = list_corpus("georgia", tmp_path)
    with pytest.raises(ValueError, match="sampling_rate"):
        build_row(record, tmp_path, extractor)


def test_gains_that_cannot_be_are_kept_and_said_and_read_as_they_are_meant(tmp_path, build):
    row, header = build("incart", challenge("incart", tmp_path))
    published = float(header.read_text().split("\n")[1].split()[2].removesuffix("/mV"))
    assert row["gains"] == [published] * 12 and row["gain_divisor"] == 1000 and "gains" in row["remarks"][0]
    expected = read_samples(row) / (published / 1000)
    np.testing.assert_allclose(read_row(row).signal, expected, rtol=1e-6)
    assert 0.3 < np.ptp(read_row(row).signal, axis=1).max() < 10, "an ECG's amplitude in mV"
    assert build("georgia", challenge("georgia", tmp_path / "other"))[0]["gain_divisor"] == 1


def test_the_columns_of_ptb_xl(tmp_path, build):
    row, _ = build("ptb-xl", own("ptb-xl", tmp_path))
    assert (row["record_id"], row["patient_id"], row["fold"], row["split"]) == ("00001", "ptb-xl-15709", 3, "train")
    assert (row["age"], row["sex"], row["height"], row["weight"]) == (56.0, "female", None, 63.0)
    assert (row["scp_codes"], row["scp_likelihoods"]) == (["NORM", "SR"], [100.0, 0.0])
    assert (row["superclasses"], row["is_normal"]) == (["NORM"], True)
    assert row["lead_names"] == list(STANDARD_LEADS) and row["sampling_rate"] == 500.0


def test_no_value_is_nan_and_its_step_is_kept(tmp_path, build):
    samples = steps().copy()
    samples[3, 10:20] = -32768
    row, _ = build("georgia", challenge("georgia", tmp_path, samples=samples))
    signal = read_row(row).signal
    assert np.isnan(signal[3, 10:20]).all() and np.isnan(signal).sum() == 10
    assert np.array_equal(read_samples(row), samples)


@pytest.mark.parametrize("kind", ["noise", "extremes", "flat", "steps of 4.88"])
def test_signals_that_are_no_ecg_come_back_bit_for_bit(kind, tmp_path, build):
    rng = np.random.default_rng(3)
    samples = {
        "noise": rng.integers(-(2**15), 2**15, (12, 700)),
        "extremes": rng.choice([-(2**15), 2**15 - 1], (12, 700)),
        "flat": np.zeros((12, 700)),
        "steps of 4.88": np.round(rng.integers(-200, 200, (12, 700)) * 4.88),
    }[kind].astype("<i2")
    row, _ = build("chapman-ningbo", challenge("chapman-ningbo", tmp_path, samples=samples))
    assert np.array_equal(read_samples(row), samples)


def test_a_window_of_a_long_record_is_that_part_of_it(tmp_path, build):
    marks = ((100, BEAT, ""), (20_000, RHYTHM, "(AFIB"), (20_100, VENTRICULAR, ""))
    row, header = build("incart", write_incart(tmp_path, "I02", seconds=120, marks=marks))
    whole = read_samples(row)
    for start, stop in ((0, 1), (12_287, 12_289), (20_000, 20_257), (30_839, 30_840)):
        assert np.array_equal(read_samples(row, start, stop), whole[:, start:stop])
    ours = read_row(row, start_seconds=77.5, duration_seconds=10.0)
    theirs = read_record(header, start_seconds=77.5, duration_seconds=10.0)
    assert np.array_equal(ours.signal, theirs.signal) and ours.annotations == theirs.annotations
    assert ours.signal.shape == (12, 2570)


def test_the_last_window_ends_with_the_record(tmp_path, build):
    row, _ = build("incart", write_incart(tmp_path, "I03", seconds=20))
    assert read_row(row, start_seconds=15.0, duration_seconds=10.0).signal.shape == (12, 5 * 257)
    with pytest.raises(ValueError, match="has 20 s"):
        read_row(row, start_seconds=21.0)


def test_beats_far_outside_the_record_are_left_out_and_counted(tmp_path, extractor):
    header = write_incart(tmp_path, "I04")
    comment = 22  # where the time resolution stands: so fine that the next mark is beyond 64 bits
    marks = [(0, comment, "## time resolution: 0.000000000001"), (30, BEAT, "")]
    header.with_suffix(".atr").write_bytes(annotation_bytes(marks))
    (record,) = list_corpus("incart", tmp_path)
    built = build_row(record, tmp_path, extractor)
    assert built.values["beats"] == [] and "beats: outside the record" in built.nulls
    pa.Table.from_pylist([built.values], schema=SCHEMA)


def test_a_damaged_annotation_file_costs_no_record(tmp_path, build):
    header = write_incart(tmp_path, "I05", marks=MARKS)
    header.with_suffix(".atr").write_bytes(header.with_suffix(".atr").read_bytes()[:-9])
    row, _ = build("incart", header)
    assert len(row["beats"]) < 3 and any("I05.atr" in remark for remark in row["remarks"])
    assert not any(str(tmp_path) in remark for remark in row["remarks"])


def test_free_text_of_a_rhythm_does_not_become_a_label(tmp_path, build):
    marks = ((5, RHYTHM, "Mrs Example, see letter"), (50, RHYTHM, "(AFIB"))
    row, _ = build("incart", write_incart(tmp_path, "I06", marks=marks))
    assert [span["rhythm"] for span in row["rhythm_spans"]] == ["AFIB"]


def test_a_signal_that_is_no_voltage_is_kept_and_is_none_of_the_leads(tmp_path, build):
    header = challenge("georgia", tmp_path)
    header.write_text(header.read_text().replace("1000/mV", "1000/mmHg", 1))
    row, _ = build("georgia", header)
    assert np.array_equal(read_samples(row), published_integers(header))
    assert row["units"][:2] == ["mmHg", "mV"] and read_row(row).lead_names == list(STANDARD_LEADS)[1:]
    assert list(map(bool, row["quality"])) == [False] + [True] * 11


def test_a_record_without_a_voltage_is_refused_with_its_units(tmp_path, extractor):
    header = challenge("georgia", tmp_path)
    header.write_text(header.read_text().replace("1000/mV", "1000/mmHg"))
    (record,) = list_corpus("georgia", tmp_path)
    with pytest.raises(ValueError, match="mmHg"):
        build_row(record, tmp_path, extractor)
