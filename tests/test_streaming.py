"""Rows of a built data set in training: order, randomness, workers, nodes, restarts, the stock Trainer."""

import itertools
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from model_cases import TINY
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import STANDARD_LEADS
from anyecg_hf.modeling_anyecg_heads import AnyECGForSequenceClassification
from anyecg_hf.signal_quality import UNUSABLE, QualityFlag
from anyecg_hf.simulate import simulate_record
from training.collate import AugmentationArguments, ECGCollator
from training.dataset_rows import SCHEMA, read_row
from training.labels import build_task
from training.signal_codec import encode_signal
from training.streaming import BLOCK_ROWS, OPEN_SHARDS, EpochRows

NUM_SHARDS, ROWS_OF_A_SHARD = OPEN_SHARDS + 2, 2 * BLOCK_ROWS + 5
NUM_ROWS = NUM_SHARDS * ROWS_OF_A_SHARD
EVERYTHING = AugmentationArguments(gain_range=0.1, noise_mv=0.02, lead_subset_probability=0.5, max_shift_seconds=1.0)


def make_row(number, steps, rate=250.0, **values):
    leads = list(STANDARD_LEADS)
    return {
        "record_id": f"R{number:04d}", "corpus": "made", "patient_id": f"made-{number}", "split": "train", "fold": 1,
        "signal": encode_signal(steps, leads), "num_samples": steps.shape[1], "sampling_rate": rate, "lead_names": leads,
        "units": ["mV"] * 12, "gains": [1000.0] * 12, "baselines": [0] * 12, "no_values": [-32768] * 12,
        "scp_codes": ["NORM"] if number % 3 else ["IMI"], "acceptability": 1.0,
    } | values  # fmt: skip


def simulated_steps(seed, seconds=3.0, rate=250):
    signal = simulate_record(seed, duration_seconds=seconds, sampling_rate=rate).signal
    return np.rint(signal * 1000).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of ten files whose records differ by a factor only: it is the order that matters here."""
    folder = tmp_path_factory.mktemp("built")
    base = simulated_steps(0)
    for shard in range(NUM_SHARDS):
        numbers = range(shard * ROWS_OF_A_SHARD, (shard + 1) * ROWS_OF_A_SHARD)
        rows = [make_row(number, base * (1 + number % 7)) for number in numbers]
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        pq.write_table(table, folder / f"train-{shard:05d}-of-{NUM_SHARDS:05d}.parquet", row_group_size=20)
    return folder


@pytest.fixture(scope="module")
def extractor():
    return AnyECGFeatureExtractor()


@pytest.fixture
def rows(folder):
    return load(folder, streaming=True)


def load(folder, streaming):
    files = str(folder / "train-*.parquet")
    cache = None if streaming else str(folder / "cache")
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming, cache_dir=cache)


def names(items):
    return [item["record_id"] for item in items]


def test_an_epoch_gives_every_row_once_and_mixes_files(rows):
    order = names(EpochRows(rows, seed=1))
    assert sorted(order) == [f"R{number:04d}" for number in range(NUM_ROWS)]
    first_batch = {int(name[1:]) // ROWS_OF_A_SHARD for name in order[:32]}
    assert len(first_batch) > 4, "a batch should not come out of one file"


def test_order_follows_from_seed_and_epoch(rows):
    train = EpochRows(rows, seed=1)
    first, again = names(train), names(train)
    train.set_epoch(1)
    assert first == again == names(EpochRows(rows, seed=1))
    assert names(train) != first
    assert names(EpochRows(rows, seed=2)) != first


def test_evaluation_keeps_the_order_and_alters_nothing(rows):
    items = list(EpochRows(rows, shuffle=False))
    assert sorted(names(items)) == [f"R{number:04d}" for number in range(NUM_ROWS)]
    assert names(items) == names(EpochRows(rows, seed=5, shuffle=False))
    assert all(item["seed"] is None for item in items)


def test_a_loaded_data_set_gives_the_same_rows_as_a_streamed_one(folder):
    streamed = {item["record_id"]: item["signal"] for item in EpochRows(load(folder, streaming=True))}
    loaded = {item["record_id"]: item["signal"] for item in EpochRows(load(folder, streaming=False))}
    assert loaded == streamed


@pytest.mark.parametrize("given", [0, 1, 70, OPEN_SHARDS * BLOCK_ROWS, 400, NUM_ROWS])
def test_a_restart_goes_on_after_the_last_row(rows, given):
    whole = names(EpochRows(rows, seed=3))
    train = EpochRows(rows, seed=3)
    iterator = iter(train)
    begun = [next(iterator)["record_id"] for _ in range(given)]
    state = json.loads(json.dumps(train.state_dict()))
    resumed = EpochRows(rows, seed=3)
    resumed.load_state_dict(state)
    assert begun + names(resumed) == whole
    assert names(resumed) == whole, "only the first iteration after loading a state goes on from it"


def test_a_restart_may_be_stopped_at_once_and_restarted(rows):
    whole = names(EpochRows(rows, seed=3))
    train = EpochRows(rows, seed=3)
    iterator = iter(train)
    given = [next(iterator)["record_id"] for _ in range(300)]
    for steps in (0, 1, 30):
        state = train.state_dict()
        train = EpochRows(rows, seed=3)
        train.load_state_dict(state)
        iterator = iter(train)
        given += [next(iterator)["record_id"] for _ in range(steps)]
    assert given == whole[: len(given)]


def test_a_state_of_another_epoch_is_refused(rows):
    train = EpochRows(rows)
    next(iter(train))
    other = EpochRows(rows)
    other.set_epoch(1)
    other.load_state_dict(train.state_dict())
    with pytest.raises(ValueError, match="set_epoch"):
        next(iter(other))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_share_the_rows_and_alter_each_as_one_process_would(rows, extractor, num_workers):
    collator = ECGCollator(extractor, window_seconds=2.0, augmentation=EVERYTHING)

    def by_record(num_workers):
        found = {}
        loader = DataLoader(
            EpochRows(rows, seed=1), batch_size=1, num_workers=num_workers, collate_fn=_KeepNames(collator)
        )
        for name, batch in loader:
            assert name not in found
            found[name] = batch
            if not num_workers and len(found) == 30:
                break
        return found

    alone, shared = by_record(0), by_record(num_workers)
    assert len(shared) == NUM_ROWS
    for name, batch in alone.items():
        assert batch.keys() == shared[name].keys()
        assert all(torch.equal(batch[key], shared[name][key]) for key in batch), name


class _KeepNames:
    """A collator that gives the record's name beside the batch; a class, so that workers can be sent it."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, items):
        return items[0]["record_id"], self.collator(items)


def test_workers_that_persist_see_the_epoch_change(rows):
    train = EpochRows(rows, seed=1)
    loader = DataLoader(train, batch_size=None, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in range(2):
        train.set_epoch(epoch)
        orders.append([item["record_id"] for item in loader])
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


@pytest.mark.parametrize("num_nodes", [2, 3])  # ten files: by file, and by row
def test_nodes_share_the_rows(rows, num_nodes):
    nodes = [
        names(EpochRows(split_dataset_by_node(rows, rank=rank, world_size=num_nodes), seed=1))
        for rank in range(num_nodes)
    ]
    assert sorted(sum(nodes, [])) == [f"R{number:04d}" for number in range(NUM_ROWS)]
    assert max(map(len, nodes)) - min(map(len, nodes)) <= ROWS_OF_A_SHARD


def test_each_choice_follows_from_seed_epoch_and_record(rows, extractor):
    collator = ECGCollator(extractor, window_seconds=2.0, augmentation=EVERYTHING)
    items = {item["record_id"]: item for item in EpochRows(rows, seed=1)}
    train = EpochRows(rows, seed=1)
    train.set_epoch(1)
    later = next(item for item in train if item["record_id"] == "R0003")
    batch = collator([items["R0003"]])
    among_others = collator([items["R0100"], items["R0003"]])
    num_leads = batch["lead_ids"].shape[1]
    assert torch.equal(among_others["input_values"][1, :num_leads], batch["input_values"][0])
    assert not torch.equal(collator([later])["input_values"], batch["input_values"])
    other_seed = next(item for item in EpochRows(rows, seed=2) if item["record_id"] == "R0003")
    assert not torch.equal(collator([other_seed])["input_values"], batch["input_values"])


def test_the_quality_that_is_stored_is_taken_as_it_is(extractor):
    row = make_row(1, simulated_steps(1, seconds=20.0)) | {"index": 1, "seed": None}
    flags = extractor(read_row(row), return_quality=True)["quality"][0]
    flags[3, 4:7] |= int(QualityFlag.DISCONNECTED)
    collator = ECGCollator(extractor, window_seconds=20.0)
    known = collator([row | {"quality": flags.tolist()}])
    assert known["attention_mask"][0].tolist() == ((flags & int(UNUSABLE)) == 0).astype(int).tolist()
    found, kept = collator([row]), known["attention_mask"][0].repeat_interleave(300, dim=1).bool()
    assert torch.equal(known["input_values"][0][kept], found["input_values"][0][kept])
    assert not known["input_values"][0][~kept].any()
    window = ECGCollator(extractor, window_seconds=6.0)([row | {"quality": flags.tolist()}])  # seconds 7 to 13
    assert window["attention_mask"].all()
    late = ECGCollator(extractor, window_seconds=10.0)([row | {"quality": flags.tolist()}])  # seconds 5 to 15
    assert late["attention_mask"][0, 3].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]


def test_of_a_long_record_only_the_window_is_read(extractor, monkeypatch):
    row = make_row(1, simulated_steps(1, seconds=120.0)) | {"index": 1}
    whole = extractor(read_row(row))
    decoded = []

    def spy(row, start=0.0, seconds=None):
        decoded.append((start, seconds))
        return read_row(row, start, seconds)

    monkeypatch.setattr("training.collate.read_row", spy)
    collator = ECGCollator(extractor, window_seconds=10.0)
    middle = collator([row | {"seed": None}])
    assert decoded == [(55.0, 10.0)] and middle["input_values"].shape == (1, 12, 3000)
    expected = whole["input_values"][:, :, 55 * 300 : 65 * 300]
    assert np.corrcoef(middle["input_values"].ravel(), expected.ravel())[0, 1] > 0.99
    starts = set()
    for epoch in range(20):
        collator([row | {"seed": (0, epoch, 1)}])
        starts.add(decoded[-1][0])
    assert len(starts) > 15 and min(starts) < 30 and max(starts) > 80 and max(starts) <= 110


def test_a_window_without_signal_is_left_out_and_said(extractor, caplog):
    good, flat = simulated_steps(1), np.zeros((12, 750), np.int32)
    collator = ECGCollator(extractor, window_seconds=2.0)
    rows = [
        make_row(number, steps) | {"seed": None, "index": 0, "labels": number}
        for number, steps in [(1, good), (2, flat)]
    ]
    batch = collator(rows)
    assert batch["labels"].tolist() == [1]
    assert "R0002" in caplog.text
    with pytest.raises(ValueError, match="R0002"):
        collator(rows[1:])


def test_rows_without_a_target_or_without_signal_are_passed_over(tmp_path):
    steps = simulated_steps(0)
    made = [make_row(0, steps), make_row(1, steps, scp_codes=["SR"]), make_row(2, steps, acceptability=None)]
    pq.write_table(pa.Table.from_pylist(made, schema=SCHEMA), tmp_path / "train-0.parquet")
    train = EpochRows(load(tmp_path, streaming=True), task=build_task("superclass"))
    assert [(item["record_id"], item["labels"].tolist()) for item in train] == [("R0000", [0, 1, 0, 0, 0])]


def test_a_damaged_row_is_an_error(rows, extractor):
    row = next(iter(EpochRows(rows)))
    row["signal"] = row["signal"][:-3]
    with pytest.raises(ValueError, match="check sum"):
        ECGCollator(extractor)([row])


def test_something_else_than_one_split_is_refused(folder):
    splits = datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), streaming=True)
    with pytest.raises(TypeError, match="one split"):
        EpochRows(splits)


def train_with_stock_trainer(folder, output, extractor, max_steps, resume=None, num_workers=0):
    torch.manual_seed(0)
    task = build_task("superclass")
    model = AnyECGForSequenceClassification(
        AnyECGConfig(**TINY, num_labels=5, problem_type="multi_label_classification")
    )
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=max_steps, per_device_train_batch_size=64, save_steps=6, logging_steps=1,
        remove_unused_columns=False, report_to=[], seed=0, use_cpu=True, disable_tqdm=True,
        dataloader_num_workers=num_workers,
    )  # fmt: skip
    collator = ECGCollator(extractor, window_seconds=2.0, augmentation=EVERYTHING)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=EpochRows(load(folder, True), seed=0, task=task, endless=True),
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_stock_trainer_trains_over_epochs_and_resumes_to_the_bit(num_workers, folder, tmp_path, extractor):
    whole = train_with_stock_trainer(folder, tmp_path / "whole", extractor, 14, num_workers=num_workers)
    for step in (6, 12):  # an epoch has 11 steps
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        output = tmp_path / f"resumed-{step}"
        resumed = train_with_stock_trainer(folder, output, extractor, 14, resume=checkpoint, num_workers=num_workers)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), step


def test_endless_rows_are_epoch_after_epoch_and_restart_in_any(rows):
    train = EpochRows(rows, seed=4)
    epochs = []
    for epoch in range(3):
        train.set_epoch(epoch)
        epochs += names(train)
    endless = EpochRows(rows, seed=4, endless=True)
    iterator = iter(endless)
    given = [next(iterator)["record_id"] for _ in range(NUM_ROWS + 100)]
    resumed = EpochRows(rows, seed=4, endless=True)
    resumed.load_state_dict(json.loads(json.dumps(endless.state_dict())))
    given += names(itertools.islice(resumed, 2 * NUM_ROWS - 100))
    assert given == epochs


def test_endless_rows_end_where_no_row_has_a_target(rows):
    assert list(EpochRows(rows, task=build_task("sex"), endless=True)) == []
