"""What annotations say of windows: rhythm, beats, patients; and what is refused."""

import dataclasses

import numpy as np
import pytest

from anyecg_hf.records import Annotation, Record
from anyecg_hf.simulate import simulate_record
from training.long_labels import beat_samples, is_af, label_windows, patient_of


def annotated(*marks, seconds=40, comments=()):
    marks = [Annotation(sample, symbol, note) for sample, symbol, note in marks]
    signal = np.zeros((1, 100 * seconds), np.float32)
    return Record(signal, 100.0, ["II"], record_name="r1", annotations=marks, comments=list(comments))


def test_a_rhythm_lasts_to_the_next_and_before_the_first_there_is_none():
    af = is_af(annotated((1000, "+", "(AFIB"), (2000, "+", "(N"), (3000, "+", "(AFL")))
    assert not af[:1000].any() and af[1000:2000].all() and not af[2000:3000].any() and af[3000:].all()


def test_a_rhythm_annotated_beyond_the_record_is_cut():
    af = is_af(annotated((-5, "+", "(AFIB"), (4005, "+", "(N")))
    assert af.all() and len(af) == 4000


def test_a_header_may_say_that_there_is_no_fibrillation():
    assert not is_af(annotated((5, "N", ""), comments=["non atrial fibrillation"])).any()


def test_a_record_without_rhythm_is_refused():
    with pytest.raises(ValueError, match='"r1" has no annotation of its rhythm'):
        is_af(annotated((5, "N", ""), comments=["69 M"]))


def test_a_record_without_beats_is_refused():
    with pytest.raises(ValueError, match='"r1" has no annotated beats'):
        beat_samples(annotated((0, "+", "(N"), (7, "~", "")))


def test_fusion_beats_are_beats_and_escapes_are_ventricular():
    samples, ventricular = beat_samples(annotated(*[(10 * i, symbol, "") for i, symbol in enumerate("NVEF|+")]))
    assert samples.tolist() == [0, 10, 20, 30] and ventricular.tolist() == [False, True, True, False]


def test_windows_hold_the_share_of_af_and_the_beats_within_them():
    beats = [(100 * second + 50, "V" if second in (12, 13, 29) else "N", "") for second in range(40)]
    record = annotated((0, "+", "(N"), (1500, "+", "(AFIB"), (2000, "+", "(N"), *beats)
    labels, counts = label_windows(record, np.array([0.0, 10.0, 20.0, 30.0]), 10.0)
    assert labels.tolist() == [[0, 0], [0.5, 1], [0, 1], [0, 0]]
    assert counts.tolist() == [[10, 0], [10, 2], [10, 1], [10, 0]]


def test_a_simulated_record_says_where_its_beats_are():
    record = simulate_record(3, rhythm="pvc", duration_seconds=20, lead_names=["II"], ventricular_share=0.2)
    samples, ventricular = beat_samples(record)
    assert not is_af(record).any() and is_af(dataclasses.replace(simulate_record(3, rhythm="af"))).all()
    assert 15 <= len(samples) <= 30 and 1 <= ventricular.sum() < len(samples) / 2
    rate = record.sampling_rate
    for sample in samples[1:-1]:  # the lead is at its largest near each beat
        near = np.abs(record.signal[0, int(sample - 0.06 * rate) : int(sample + 0.1 * rate)]).max()
        assert near > np.median(np.abs(record.signal[0])) * 3


@pytest.mark.parametrize(
    "name, patient",
    [("data_92_12", "cpsc2021-92"), ("data_92_4", "cpsc2021-92"), ("202", "201"), ("201", "201"), ("holter", "holter")],
)
def test_patients_are_told_from_the_names_of_records(name, patient):
    assert patient_of(name) == patient


def test_real_records_give_the_shares_that_their_annotations_have(real_ecg):
    from anyecg_hf.records import read_record

    record = read_record(real_ecg / "mitdb" / "201")
    assert is_af(record).mean() == pytest.approx(605.8 / 1805.6, abs=0.001)
    samples, ventricular = beat_samples(record)
    assert ventricular.sum() == 198 and len(samples) == 1963  # 37 P waves without a beat are none
    assert not is_af(read_record(real_ecg / "cpsc_2021" / "data_21_7")).any()
    assert is_af(read_record(real_ecg / "cpsc_2021" / "data_84_1")).mean() > 0.99
