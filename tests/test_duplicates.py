"""training/duplicates.py on simulated records: the same recording is found in every form, another one is not."""

import csv
import sys

import numpy as np
import pytest
from scipy.signal import butter, sosfilt

from anyecg_hf.leads import STANDARD_LEADS
from anyecg_hf.records import Record
from anyecg_hf.signal_ops import resample
from anyecg_hf.simulate import simulate_record
from training import duplicates
from training.corpora import RecordEntry
from training.duplicates import SAME, Pair, alike_pairs, compare, copies, fingerprint, fingerprints
from training.splits import SPLIT_FILES

SECONDS = 10.0


@pytest.fixture(scope="module")
def original():
    return simulate_record(seed=1, noise_mv=0.02, duration_seconds=SECONDS, sampling_rate=500)


def changed(record, signal=None, sampling_rate=None, lead_names=None):
    return Record(
        signal=np.asarray(record.signal if signal is None else signal, np.float32),
        sampling_rate=sampling_rate or record.sampling_rate,
        lead_names=list(lead_names or record.lead_names),
    )


def at_rate(record, rate):
    return changed(record, resample(record.signal, record.sampling_rate, rate), rate)


def leads_only(record, names):
    return changed(record, record.signal[[record.lead_names.index(name) for name in names]], lead_names=names)


def rounded(record):
    return changed(record, np.round(record.signal / 0.005) * 0.005)


def with_gap(record):
    signal = record.signal.copy()
    signal[:, 1400:1600] = np.nan
    return changed(record, signal)


def filtered_in_real_time(record):
    corners = butter(2, [0.67, 40], "band", fs=record.sampling_rate, output="sos")
    return changed(record, sosfilt(corners, record.signal - record.signal[:, :1]))


def with_held_end(record):
    signal = record.signal.copy()
    signal[:, -60:] = signal[:, -61:-60]
    return changed(record, signal)


FORMS = {
    "unchanged": lambda r: changed(r),
    "at 100 Hz": lambda r: at_rate(r, 100),
    "at 257 Hz": lambda r: at_rate(r, 257),
    "in microvolt taken for millivolt": lambda r: changed(r, r.signal * 1000),
    "in volt taken for millivolt": lambda r: changed(r, r.signal / 1000),
    "at 100 Hz in steps of 5 uV": lambda r: rounded(at_rate(r, 100)),
    "filtered 0.5 to 40 Hz": lambda r: changed(r, resample(r.signal, 500, 500, 0.5, 40)),
    "filtered 0.05 to 25 Hz": lambda r: changed(r, resample(r.signal, 500, 500, 0.05, 25)),
    "filtered in real time, with its delay": filtered_in_real_time,
    "with an offset": lambda r: changed(r, r.signal + 3.0),
    "cut to 6 seconds": lambda r: changed(r, r.signal[:, :3000]),
    "with its leads in another order": lambda r: leads_only(r, STANDARD_LEADS[::-1]),
    "with leads aVR, aVF and V2 only": lambda r: leads_only(r, ("aVR", "aVF", "V2")),
    "with a gap": with_gap,
    "with its last value held": with_held_end,
}


def give(record):
    return record


def entries_of(records):
    return [RecordEntry(f"r{place}", f"p{place}", 1, give, record) for place, record in enumerate(records)]


def same_recordings(records):
    entries = entries_of(records)
    prints, _ = fingerprints(entries)
    return {(p.first, p.second) for p in compare(entries, alike_pairs(prints)) if p.agreement >= SAME}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_recording_is_found(original, form):
    assert same_recordings([original, FORMS[form](original)]) == {(0, 1)}


def test_two_changed_forms_are_found_as_one_recording(original):
    small = rounded(at_rate(original, 100))
    assert same_recordings([small, changed(original, resample(original.signal, 500, 1000, 0.5, 40), 1000)]) == {(0, 1)}


@pytest.mark.parametrize("rhythm", ["sinus", "atrial fibrillation", "ventricular beats"])
def test_another_recording_of_the_same_heart_is_not(rhythm):
    """One long recording cut in two halves: the same heart, electrodes and rate, other beats."""
    options = {"rhythm": rhythm, "noise_mv": 0.01, "duration_seconds": 2 * SECONDS, "sampling_rate": 250}
    whole = [simulate_record(seed=seed, **options) for seed in range(6)]
    halves = [changed(r, part) for r in whole for part in np.split(r.signal, 2, axis=1)]
    assert same_recordings(halves) == set()


def test_a_recording_among_many_is_found_across_blocks(original, monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    others = [simulate_record(seed=seed, sampling_rate=100) for seed in range(2, 32)]
    records = [original, *others, at_rate(original, 100), changed(others[3])]
    assert same_recordings(records) == {(0, 31), (4, 32)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: leads_only(r, ("II", "V1")), "do not follow from others"),
        (lambda r: changed(r, r.signal[:, :2000]), "shorter than 5 seconds"),
        (lambda r: changed(r, np.ones_like(r.signal)), "flat"),
        (lambda r: changed(r, np.full_like(r.signal, np.nan)), "flat"),
    ],
)
def test_a_record_that_cannot_be_compared_is_left_out_and_counted(original, change, reason):
    assert reason in fingerprint(change(original))
    prints, left_out = fingerprints(entries_of([original, change(original)]))
    assert list(prints) == [0] and sum(left_out.values()) == 1 and reason in next(iter(left_out))


def test_a_record_that_cannot_be_read_does_not_stop_the_others(original):
    def refuse(payload):
        raise ValueError("cut off")

    entries = [RecordEntry("bad", "bad", 1, refuse, None), *entries_of([original])]
    prints, left_out = fingerprints(entries)
    assert list(prints) == [1] and left_out == {"cannot be read (ValueError)": 1}


def test_a_group_is_listed_under_its_first_record():
    listed = list(zip(entries_of([None] * 5), ["a", "a", "b", "b", "b"], strict=True))
    rows = list(copies(listed, [Pair(0, 3, 0.99), Pair(2, 3, 0.995)]))  # 0 and 2 are one by way of 3
    assert [(row["record"], row["corpus"], row["same_as"], row["same_as_corpus"]) for row in rows] == [
        ("r2", "b", "r0", "a"),
        ("r3", "b", "r0", "a"),
    ]
    assert [row["found_how"] for row in rows] == ["signals agree, 0.9950"] * 2


def test_no_records_give_no_pairs():
    assert fingerprints([])[0] == {} and alike_pairs({}) == [] and list(copies([], [])) == []


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_command_writes_the_columns_of_the_committed_file(tmp_path, original, monkeypatch, capsys, num_workers):
    wfdb = pytest.importorskip("wfdb")
    for folder, name, record in (
        ("one", "a", original),
        ("one", "b", simulate_record(seed=9)),
        ("two", "c", at_rate(original, 100)),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        names, signal = record.lead_names, record.signal.T.astype(np.float64)
        wfdb.wrsamp(
            name, fs=record.sampling_rate, units=["mV"] * 12, sig_name=names, p_signal=signal, fmt=["16"] * 12,
            write_dir=str(tmp_path / folder),
        )  # fmt: skip
    out = tmp_path / "found.csv"
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    command = ["duplicates", "--data", *folders, "--out", str(out), "--num_workers", str(num_workers)]
    monkeypatch.setattr(sys, "argv", command)
    duplicates.main()
    assert "3 records, 1 pairs alike at first look, 1 of them the same recording" in capsys.readouterr().out
    with open(out, newline="") as file, open(SPLIT_FILES / "duplicates.csv", newline="") as committed:
        rows = list(csv.DictReader(file))
        assert list(rows[0]) == next(csv.reader(committed))
    assert [(row["record"], row["corpus"], row["same_as"], row["same_as_corpus"]) for row in rows] == [
        ("c", "two", "a", "one")
    ]


def test_real_ptb_xl_is_found_at_500_hz_and_in_the_challenge_under_the_same_numbers(real_ecg):
    """HRnnnnn is ecg_id nnnnn, and no recording is that of another number."""
    challenge = duplicates.list_records(real_ecg / "challenge-2021" / "ptb-xl")
    others = [*duplicates.list_records(real_ecg / "ptb-xl-500")[:60], *challenge]
    numbers = {entry.record_id.removeprefix("HR") for entry in others}
    small = [entry for entry in duplicates.list_records(real_ecg / "ptb-xl-100") if entry.record_id in numbers]
    assert len(small) == 60 + 16  # two of the 18 are of fold 10, which is not there
    entries = [*small, *others]
    prints, left_out = fingerprints(entries)
    found = {(p.first, p.second) for p in compare(entries, alike_pairs(prints)) if p.agreement >= SAME}
    place = {entry.record_id: number for number, entry in enumerate(small)}
    ids = [(entry.record_id.removeprefix("HR"), number) for number, entry in enumerate(others, start=len(small))]
    assert not left_out and found == {(place[ecg_id], number) for ecg_id, number in ids if ecg_id in place}
