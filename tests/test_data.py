"""training/data.py and training/corpora: what is read, what is cached, in which order and fold it comes."""

import io
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from published_files import write_challenge

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import STANDARD_LEADS
from anyecg_hf.records import read_record
from anyecg_hf.simulate import simulate_record
from training.build_dataset import build_corpus
from training.corpora import list_records
from training.corpora.entry import RecordEntry, plausible_age
from training.corpora.simulated import list_simulated
from training.data import (
    DataArguments,
    ECGDataset,
    EpochSampler,
    _keep_patients,
    list_sources,
    load_folds,
    load_splits,
    with_task,
)
from training.labels import build_task
from training.record_store import DamagedCacheError, RecordStore, prepare_records
from training.splits import fold_of, folds_of, load_split


@pytest.fixture(scope="module")
def extractor():
    return AnyECGFeatureExtractor()


@pytest.fixture(scope="module")
def store(extractor, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return prepare_records(list_simulated(18), extractor, source="simulated", cache_dir=cache, num_proc=1)


def _write_wfdb(folder, name, record, comments=()):
    wfdb = pytest.importorskip("wfdb")
    folder.mkdir(parents=True, exist_ok=True)
    wfdb.wrsamp(
        name,
        fs=record.sampling_rate,
        units=["mV"] * len(record.lead_names),
        sig_name=list(record.lead_names),
        p_signal=record.signal.T.astype(np.float64),
        fmt=["16"] * len(record.lead_names),
        comments=list(comments),
        write_dir=str(folder),
    )


@pytest.fixture
def published(tmp_path):
    """Three records in the layout of PTB-XL, the third with a row but no file."""
    rows = ["ecg_id,patient_id,age,sex,weight,scp_codes,strat_fold,filename_lr,filename_hr"]
    codes = ["{'NORM': 100.0, 'SR': 0.0}", "{'IMI': 35.0}", "{'AFIB': 0.0}"]
    for number, fold in ((1, 3), (2, 9), (3, 9)):
        path = f"records100/00000/{number:05d}_lr"
        rows.append(
            f'{number},{15709.0 + number},{"300" if number == 1 else "56.0"},1,,"{codes[number - 1]}",{fold},{path},'
        )
        if number < 3:
            record = simulate_record(seed=number, duration_seconds=10, sampling_rate=100)
            _write_wfdb(tmp_path / "ptb-xl" / "records100" / "00000", f"{number:05d}_lr", record)
    (tmp_path / "ptb-xl" / "ptbxl_database.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "ptb-xl"


def test_published_ptb_xl_gives_every_statement_whatever_its_likelihood(published):
    entries = list_records(published)
    assert [entry.codes for entry in entries] == [("NORM", "SR"), ("IMI",)]
    assert [entry.fold for entry in entries] == [3, 9]
    assert entries[0].record_id == "00001" and entries[0].patient_id == "ptb-xl-15710"
    assert entries[0].age == 90.0 and entries[0].sex == "female" and entries[0].weight is None


def test_rows_of_the_database_without_a_file_are_left_out_and_counted(published, caplog):
    list_records(published)
    assert "1 of 3 records" in caplog.text


def test_the_parent_folder_of_published_ptb_xl_is_understood(published):
    assert len(list_records(published.parent)) == 2


def test_packed_records_give_the_derived_limb_leads_in_millivolt(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    import pyarrow as pa
    import pyarrow.parquet as pq

    steps = np.random.default_rng(0).integers(-200, 200, (8, 1000)).astype(np.int16)
    flac = io.BytesIO()
    soundfile.write(flac, steps.T, 100, format="FLAC", subtype="PCM_16")
    row = {"ecg_id": 7, "patient_id": 3, "strat_fold": 9, "age": 61, "sex": 0, "scp_codes": ["SR"]}
    pq.write_table(
        pa.Table.from_pylist([row | {"flac": flac.getvalue(), "limb_flac": None}]), tmp_path / "fold-9.parquet"
    )
    (entry,) = list_records(tmp_path)
    record = entry.read()
    assert record.sampling_rate == 100 and tuple(record.lead_names) == STANDARD_LEADS and entry.sex == "male"
    lead_i, lead_ii = steps[:2] * 0.005
    np.testing.assert_allclose(record.signal[[0, 1, 6]], [lead_i, lead_ii, steps[2] * 0.005], atol=1e-6)
    np.testing.assert_allclose(record.signal[2], lead_ii - lead_i, atol=1e-6)
    np.testing.assert_allclose(record.signal[3], -(lead_i + lead_ii) / 2, atol=0.0011)


def test_a_folder_of_wfdb_records_takes_age_sex_and_codes_from_the_headers(tmp_path, extractor):
    record = simulate_record(seed=1, duration_seconds=4, sampling_rate=250)
    _write_wfdb(tmp_path / "deep" / "er", "A0001", record, ["Age: 47", "Sex: Female", "Dx: 426783006,164889003"])
    store = prepare_records(list_records(tmp_path), extractor, source="x", cache_dir=tmp_path / "cache", num_proc=1)
    columns = {name: store.columns[name][0] for name in ("record_id", "age", "sex", "codes", "fold")}
    assert columns == {
        "record_id": "deep/er/A0001",
        "age": 47.0,
        "sex": "female",
        "codes": ["426783006", "164889003"],
        "fold": 1,
    }


def test_a_folder_that_holds_no_records_says_what_is_accepted(tmp_path):
    with pytest.raises(ValueError, match="ptbxl_database.csv"):
        list_records(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_records(tmp_path / "absent")


def test_the_real_packs_have_the_published_number_of_records_and_folds(real_ecg):
    entries = list_records(real_ecg / "ptb-xl-100")
    assert len(entries) == 19_601
    assert sum(entry.fold == 9 for entry in entries) == 2_183
    assert max(entry.age for entry in entries if entry.age is not None) == 90


@pytest.mark.parametrize(
    ("given", "expected"), [(300, 90.0), (89, 89.0), (None, None), (-1, None), (float("nan"), None)]
)
def test_ages_that_mean_over_89_become_90_and_impossible_ones_none(given, expected):
    assert plausible_age(given) == expected


def test_the_fold_of_a_patient_does_not_depend_on_the_others():
    folds = [fold_of(f"patient-{number}") for number in range(2000)]
    assert set(folds) == set(range(1, 11))
    assert abs(folds.count(9) - 200) < 60
    assert fold_of("patient-1") == folds[1]


def test_a_small_corpus_is_dealt_out_so_that_two_patients_are_enough():
    assert sorted(folds_of(["A", "B"]).values()) == [1, 9]
    assert sorted(folds_of([str(number) for number in range(10)]).values()).count(9) >= 1


def test_a_corpus_with_records_in_both_splits_keeps_the_folds_of_the_hash():
    patients = [f"patient-{number}" for number in range(500)]
    assert folds_of(patients) == {patient: fold_of(patient) for patient in patients}


def test_prepared_records_are_what_the_extractor_gives(store, extractor):
    entry = list_simulated(18)[4]
    expected = extractor(entry.read())
    np.testing.assert_allclose(store.signal(4), expected["input_values"][0], atol=store.step_mv)
    assert store.mask(4).tolist() == expected["attention_mask"][0].tolist()
    assert store.lead_ids(4).tolist() == expected["lead_ids"][0].tolist()
    assert store.columns["codes"][4] == list(entry.codes)


def test_a_second_call_reads_the_cache(store, extractor, monkeypatch):
    monkeypatch.setattr(RecordEntry, "read", lambda self: pytest.fail("a record was read again"))
    again = prepare_records(
        list_simulated(18), extractor, source="simulated", cache_dir=store.folder.parent, num_proc=1
    )
    assert again.folder == store.folder


def test_another_filter_or_source_is_another_cache(store, extractor):
    other = AnyECGFeatureExtractor(highcut_hz=30.0)
    folders = {
        prepare_records(list_simulated(2), given, source=source, cache_dir=store.folder.parent, num_proc=1).folder
        for given, source in ((extractor, "a"), (extractor, "b"), (other, "a"))
    }
    assert len(folders) == 3


def test_a_preparation_that_fails_leaves_nothing_behind(tmp_path, extractor):
    broken = [RecordEntry(f"b{i}", "p", 1, _unreadable, None) for i in range(3)]
    with pytest.raises(ValueError, match="3 of 3 records"):
        prepare_records(broken, extractor, source="x", cache_dir=tmp_path, num_proc=1)
    assert list(tmp_path.iterdir()) == []


def test_a_single_broken_record_is_left_out_and_named(tmp_path, extractor, caplog):
    entries = [*list_simulated(3), RecordEntry("bad", "p", 1, _unreadable, None)]
    store = prepare_records(entries, extractor, source="x", cache_dir=tmp_path, num_proc=1)
    assert len(store) == 3 and "bad" in store.meta["unreadable"] and "'bad'" in caplog.text


def _unreadable(payload):
    raise ValueError("cut short")


def test_two_processes_prepare_the_same_bytes_as_one(tmp_path, extractor, monkeypatch):
    monkeypatch.setattr("training.record_store.MIN_RECORDS_FOR_PROCESSES", 2)
    entries = list_simulated(6)
    stores = [prepare_records(entries, extractor, source="x", cache_dir=tmp_path / str(n), num_proc=n) for n in (1, 2)]
    assert (stores[0].folder / "signals.int16").read_bytes() == (stores[1].folder / "signals.int16").read_bytes()


def test_a_store_travels_to_a_worker_without_its_signals(store):
    store.signal(0)
    travelled = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 100_000
    np.testing.assert_array_equal(travelled.signal(3), store.signal(3))


def _flip_a_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "read"), [("signals.int16", "steps"), ("mask.uint8", "mask")])
def test_a_flipped_bit_of_a_prepared_record_is_an_error_that_names_record_file_and_remedy(
    tmp_path, extractor, name, read
):
    store = prepare_records(list_simulated(3), extractor, source="x", cache_dir=tmp_path, num_proc=1)
    expected = [getattr(store, read)(row).copy() for row in range(3)]
    path = store.folder / name
    _flip_a_bit(path, path.stat().st_size // 2)  # of the second of three equally long records
    store = RecordStore(store.folder)
    record_id = store.columns["record_id"][1]
    with pytest.raises(DamagedCacheError, match=f"'{record_id}'.*{name}.*CRC-32.*Remove the folder {store.folder}"):
        ECGDataset([(store, 1)])[0]
    for row in (0, 2):
        np.testing.assert_array_equal(getattr(store, read)(row), expected[row])


@pytest.mark.parametrize(("name", "old", "new"), [("meta.json", b'"step_mv": 0.0001', b'"step_mv": 0.0002'),
                                                  ("records.parquet", b"PAR1", b"PAR0")])  # fmt: skip
def test_an_altered_table_or_step_of_prepared_records_is_prepared_anew(tmp_path, extractor, caplog, name, old, new):
    def prepare():
        return prepare_records(list_simulated(3), extractor, source="x", cache_dir=tmp_path, num_proc=1)

    before = prepare()
    content = (before.folder / name).read_bytes()
    assert old in content
    (before.folder / name).write_bytes(content.replace(old, new, 1))
    after = prepare()
    assert f"{name} has another CRC-32" in caplog.text and "prepared anew" in caplog.text
    assert (after.folder / name).read_bytes() == content


def test_the_order_of_an_epoch_follows_from_seed_and_epoch():
    sampler = EpochSampler(10, seed=3)
    sampler.set_epoch(2)
    first = list(sampler)
    assert first == list(sampler) and {epoch for epoch, _ in first} == {2}
    assert sorted(index for _, index in first) == list(range(10))
    sampler.set_epoch(3)
    assert [index for _, index in sampler] != [index for _, index in first]


def test_an_item_of_training_carries_its_seed_and_one_of_evaluation_none(store):
    dataset = ECGDataset([(store, row) for row in range(len(store))], seed=5)
    assert dataset[(2, 7)]["seed"] == (5, 2, 7) and dataset[7]["seed"] is None


def test_splits_keep_to_the_folds_and_limits_take_a_fixed_sample(tmp_path, extractor):
    args = DataArguments(simulate=18, max_train_records=10, max_eval_records=1, cache_dir=str(tmp_path), num_proc=1)
    train, held_out = load_splits(args, extractor, seed=0)
    assert len(train) == 10 and len(held_out) == 1
    assert set(train.column("fold")) <= set(range(1, 9)) and set(held_out.column("fold")) == {9}
    again, _ = load_splits(args, extractor, seed=1)
    assert again.column("record_id") == train.column("record_id")


def test_a_fraction_of_the_training_patients_is_the_same_for_every_seed(tmp_path, extractor):
    args = DataArguments(simulate=18, train_fraction=0.25, cache_dir=str(tmp_path), num_proc=1)
    train, held_out = load_splits(args, extractor, seed=0)
    assert len(train) == 4 and len(held_out) == 2


def test_a_fraction_takes_whole_patients_and_a_smaller_one_some_of_those_of_a_larger_one():
    patients = [f"p{number // 3}" for number in range(3000)]
    records = ECGDataset([(SimpleNamespace(columns={"patient_id": patients}), row) for row in range(3000)])
    tenth, hundredth = (_keep_patients(records, fraction).column("patient_id") for fraction in (0.1, 0.01))
    assert (len(tenth), len(hundredth)) == (300, 30) and set(hundredth) < set(tenth)
    assert set(Counter(tenth).values()) == {3}


def test_without_data_the_command_is_told_what_to_pass(extractor):
    with pytest.raises(ValueError, match="--data DIR"):
        list_sources(DataArguments())


def test_an_empty_fold_is_an_error(store, extractor):
    args = DataArguments(simulate=18, cache_dir=str(store.folder.parent))
    with pytest.raises(ValueError, match="No records in folds"):
        load_folds(list_sources(args), extractor, (10,), args=args)


def test_records_without_a_target_are_left_out_of_a_task(store):
    dataset = ECGDataset([(store, row) for row in range(len(store))])
    labelled = with_task(dataset, build_task("superclass"))
    assert 0 < len(labelled) < len(dataset) and labelled.targets[:, 0].all()


def test_a_store_is_read_from_its_folder_alone(store):
    assert len(RecordStore(store.folder)) == 18


def test_a_built_data_set_is_read_as_a_folder_of_records_with_its_patients_and_folds(tmp_path, extractor):
    for seed, (corpus, name) in enumerate([("georgia", "E00001"), ("georgia", "E00002"), ("cpsc-2018", "A0001")]):
        write_challenge(tmp_path / "source", name, corpus=corpus, seed=seed, dx="164889003,426783006")
    for corpus in ("georgia", "cpsc-2018"):
        build_corpus(corpus, tmp_path / "source", tmp_path / "built")
    entries = {entry.record_id: entry for entry in list_records(tmp_path / "built")}
    assert set(entries) == {"georgia/E00001", "georgia/E00002", "cpsc-2018/A0001"}
    for record_id, entry in entries.items():
        corpus, name = record_id.split("/")
        assert (entry.patient_id, entry.fold) == load_split(corpus)[name] and entry.corpus == corpus
        assert (entry.age, entry.sex, entry.codes) == (57.0, "male", ("164889003", "426783006"))
        np.testing.assert_array_equal(entry.read().signal, read_record(tmp_path / "source" / f"{name}.hea").signal)
    assert {entry.record_id for entry in list_records(tmp_path / "built/data/georgia")} == {
        "georgia/E00001",
        "georgia/E00002",
    }
    store = prepare_records(list(entries.values()), extractor, source="built", cache_dir=tmp_path / "cache")
    assert store.columns["record_id"] == list(entries)
