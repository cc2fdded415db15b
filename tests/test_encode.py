"""tokenization/encode.py and training/code_shards.py: codes written once, and stage two that reads them."""

import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_checkpoints import tiny_quantizer
from transformers import AutoFeatureExtractor

import tokenization.encode
import training.pretrain
from anyecg_hf.feature_extraction_anyecg_rhythm import AnyECGRhythmFeatureExtractor
from anyecg_hf.simulate import simulate_record
from training.checkpointing import load_extractor
from training.code_shards import METADATA, StoredCodes, shard_bytes
from training.collate import AugmentationArguments, ECGCollator
from training.corpora.entry import RecordEntry
from training.data import DataArguments, list_sources, load_folds
from training.objectives.masked_codes import encode_batch
from training.shards import Output

NUM_RECORDS = 18
LONG = 17  # this record lasts 65 s in the data with a long one
NETWORK = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "stem_channels": [4, 4, 4, 4]}
RECIPE = Path(training.pretrain.__file__).parent / "recipes" / "smoke_pretrain.yaml"


def read_record(number):
    """A record of 12 leads and 10 s; every third lacks seconds of some leads, every fifth is of three leads and 7 s."""
    record = simulate_record(seed=number, duration_seconds=10.0, sampling_rate=300)
    if number % 3 == 0:
        record.signal[2:5, 900:1500] = np.nan
        record.signal[7] = 0.0
    if number % 5 == 0:
        record.signal, record.lead_names = record.signal[6:9, :2100], record.lead_names[6:9]
    return record


def read_long_record(number):
    """A record of 65 s that lacks all leads from second 20 to 30."""
    record = simulate_record(seed=number, duration_seconds=65.0, sampling_rate=300)
    record.signal[:, 6000:9000] = np.nan
    return record


def _entries():
    return [
        RecordEntry(f"r{number:02d}", f"p{number:02d}", number % 9 + 1, read_record, number)
        for number in range(NUM_RECORDS)
    ]


@pytest.fixture
def data(tmp_path_factory, monkeypatch):
    """A folder that the commands take as --data, of 18 records."""
    folder = tmp_path_factory.getbasetemp() / "data"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr("training.data.list_records", lambda _: _entries())
    monkeypatch.setenv("ANYECG_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    quantizer = tiny_quantizer()
    AnyECGRhythmFeatureExtractor(quantizer=quantizer).save_pretrained(folder)
    return folder


def _encode(tokenizer, data, out, *options):
    tokenization.encode.main(
        ["--checkpoint", str(tokenizer), "--data", str(data), "--out", str(out), "--num_proc", "1", *options]
    )
    return out


@pytest.fixture
def codes(tokenizer, data, tmp_path_factory):
    """Codes of all records, made once."""
    out = tmp_path_factory.getbasetemp() / "codes"
    return out if out.exists() else _encode(tokenizer, data, out)


def _argv(data, output_dir, *options):
    return [
        str(RECIPE), "--output_dir", str(output_dir), "--data", str(data), "--num_proc", "1", "--quantizer", "",
        "--config", json.dumps(NETWORK), "--max_steps", "4", "--save_steps", "4", "--eval_strategy", "no", "--logging_steps",
        "1", "--warmup_steps", "1", "--per_device_train_batch_size", "4", "--disable_tqdm", "True", "--max_shift_seconds",
        "0", "--unigram_records", "8", *options,
    ]  # fmt: skip


def _pretrain(data, output_dir, *options):
    training.pretrain.main(_argv(data, output_dir, *options))
    history = json.loads((output_dir / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = [{name: value for name, value in entry.items() if "loss" in name} for entry in history]
    return losses, (output_dir / "model.safetensors").read_bytes()


def _records(tokenizer, data):
    arguments = DataArguments(data=[str(data)], num_proc=1)
    return load_folds(list_sources(arguments), load_extractor(tokenizer), range(1, 11), args=arguments)


def _table(codes):
    return pq.read_table(next(codes.glob("codes-*.parquet"))).to_pylist()


@pytest.mark.parametrize("options", [[], ["--bf16", "True"]])
def test_stored_codes_give_the_losses_and_the_weights_that_the_quantizer_gives(
    tokenizer, codes, data, tmp_path, options
):
    stored = _pretrain(data, tmp_path / "stored", "--codes", str(codes), *options)
    made = _pretrain(data, tmp_path / "made", "--quantizer", str(tokenizer), *options)
    assert len(stored[0]) >= 4 and stored[0] == made[0]
    assert stored[1] == made[1]
    results = [json.loads((tmp_path / name / "results.json").read_text())["evaluation"] for name in ("stored", "made")]
    figures = [{k: v for k, v in each.items() if not k.endswith(("runtime", "per_second"))} for each in results]
    assert figures[0] == figures[1]


def test_stored_codes_are_those_of_the_rhythm_tokenizer(tokenizer, codes, data):
    extractor = AutoFeatureExtractor.from_pretrained(tokenizer)
    for row, entry in list(zip(_table(codes), _entries(), strict=True))[:6]:
        found = extractor(read_record(entry.payload))["rhythm_codes"][0]
        assert row["record_id"] == entry.record_id
        np.testing.assert_array_equal(np.reshape(row["codes"], found.shape), found)


def test_a_row_tells_record_patient_fold_leads_and_patches_and_the_shard_who_made_it(tokenizer, codes):
    row = _table(codes)[5]
    assert (row["record_id"], row["patient_id"], row["fold"]) == ("r05", "p05", 6)
    assert (row["lead_ids"], row["first_patch"], row["num_patches"]) == ([7, 8, 9], 0, 7)
    schema = pq.read_schema(codes / "codes-00000-of-00001.parquet")
    told = json.loads(schema.metadata[METADATA])
    assert told["codebook_size"] == 64 and told["window_seconds"] == 10 and told["extractor"]["highcut_hz"] == 40
    assert len(told["quantizer_sha256"]) == 64 and str(schema.field("codes").type) == "list<element: int16>"


def test_masked_patches_have_no_code_and_all_others_have_one(tokenizer, codes, data):
    records = _records(tokenizer, data)
    assert (records[3]["mask"] == 0).sum() >= 10 and (records[3]["mask"][7] == 0).all()
    for index, row in enumerate(_table(codes)):
        has_code = np.reshape(row["codes"], records[index]["mask"].shape) >= 0
        np.testing.assert_array_equal(has_code, records[index]["mask"] == 1)


def test_a_records_codes_do_not_depend_on_its_batch_nor_on_mixed_precision(tokenizer, data):
    records, collator = _records(tokenizer, data), ECGCollator(load_extractor(tokenizer))
    quantizer = tiny_quantizer()
    together = encode_batch(quantizer, collator([records[index] for index in range(NUM_RECORDS)]))
    for index in range(NUM_RECORDS):
        num_leads, num_patches = records[index]["mask"].shape
        with torch.autocast("cpu", dtype=torch.bfloat16):
            alone = encode_batch(quantizer, collator([records[index]]))[0]
        assert torch.equal(together[index, :num_leads, :num_patches], alone)
        assert (together[index, num_leads:] == -100).all() and (together[index, :, num_patches:] == -100).all()


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch has these names from 2.9")
def test_codes_are_made_without_tf32(tokenizer, data, monkeypatch):
    records, collator = _records(tokenizer, data), ECGCollator(load_extractor(tokenizer))
    quantizer, seen = tiny_quantizer(), []

    def encode(*inputs):
        seen.extend(owner.fp32_precision for owner in (torch.backends.cudnn.conv, torch.backends.cuda.matmul))
        return type(quantizer).encode(quantizer, *inputs)

    monkeypatch.setattr(quantizer, "encode", encode)
    encode_batch(quantizer, collator([records[0]]))
    assert seen == ["ieee", "ieee"]


def test_dropped_leads_take_their_codes_along(tokenizer, codes, data):
    records = _records(tokenizer, data).with_codes(StoredCodes(codes))
    augmentation = AugmentationArguments(max_leads=3)
    batch = ECGCollator(load_extractor(tokenizer), augmentation=augmentation)([records[(0, 1)], records[(0, 5)]])
    assert batch["labels"].shape == (2, 3, 10) and batch["labels"].dtype == torch.int64
    row = _table(codes)[1]
    whole = dict(zip(row["lead_ids"], np.reshape(row["codes"], (12, 10)).tolist(), strict=True))
    assert batch["labels"][0].tolist() == [whole[lead] for lead in batch["lead_ids"][0].tolist()]
    assert (batch["labels"][1, :, 7:] == -100).all()  # the second record lasts 7 s


@pytest.fixture
def long_codes(tokenizer, data, tmp_path, monkeypatch):
    entries = [*_entries()[:LONG], RecordEntry("long", "long", LONG % 9 + 1, read_long_record, LONG)]
    monkeypatch.setattr("training.data.list_records", lambda _: entries)
    return _encode(tokenizer, data, tmp_path / "long")


def test_a_long_record_is_encoded_in_windows_and_one_without_a_usable_patch_is_left_out(tokenizer, long_codes, data):
    rows = [row for row in _table(long_codes) if row["record_id"] == "long"]
    assert [(row["first_patch"], row["num_patches"]) for row in rows] == [
        (0, 10), (10, 10), (30, 10), (40, 10), (50, 10), (60, 5)
    ]  # fmt: skip
    extractor, record = AutoFeatureExtractor.from_pretrained(tokenizer), _records(tokenizer, data)[LONG]
    values = record["steps"][:, 9000:12000] * np.float32(record["step_mv"])
    window = extractor._codes(values, record["lead_ids"], record["mask"][:, 30:40])
    np.testing.assert_array_equal(np.reshape(rows[2]["codes"], (12, 10)), window)


def test_training_takes_the_windows_of_a_long_record_at_random_and_evaluation_the_middle_one(
    tokenizer, long_codes, data
):
    rows = [np.reshape(row["codes"], (12, -1)) for row in _table(long_codes) if row["record_id"] == "long"]
    records = _records(tokenizer, data).with_codes(StoredCodes(long_codes))
    collator = ECGCollator(load_extractor(tokenizer))
    middle = collator([records[LONG]])
    np.testing.assert_array_equal(middle["labels"][0], rows[2])
    np.testing.assert_array_equal(middle["attention_mask"][0], records[LONG]["mask"][:, 30:40])
    seen = {collator([records[(epoch, LONG)]])["labels"].numpy().tobytes() for epoch in range(60)}
    assert seen == {row.astype(np.int64).tobytes() for row in rows}
    twice = [collator([records[(7, LONG)]])["labels"] for _ in range(2)]
    assert torch.equal(*twice)


def test_stage_two_trains_on_stored_codes_of_long_records(long_codes, data, tmp_path):
    losses, _ = _pretrain(data, tmp_path / "run", "--codes", str(long_codes), "--quantizer", "")
    assert all(np.isfinite(value) for entry in losses for value in entry.values())


def test_a_killed_encoding_goes_on_with_the_next_shard_and_a_finished_one_says_so(
    tokenizer, codes, data, tmp_path, monkeypatch, caplog
):
    whole = _encode(tokenizer, data, tmp_path / "whole", "--shard_records", "5", "--batch_size", "4")
    out, written = tmp_path / "killed", []

    def write(self, name, content):
        if written:
            (out / f"{name}.unfinished-1").write_bytes(content[:100])
            raise KeyboardInterrupt
        written.append(name)
        Path(self.path(name)).write_bytes(content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Output, "write", write)
        _encode(tokenizer, data, out, "--shard_records", "5")
    first = out / written[0]
    before = first.stat().st_mtime_ns
    with pytest.raises(ValueError, match="1 of 4 shards are there.*same tokenization.encode"):
        StoredCodes(out)
    _encode(tokenizer, data, out, "--shard_records", "5")
    assert first.stat().st_mtime_ns == before and not list(out.glob("*.unfinished*"))
    names = [f"codes-0000{number}-of-00004.parquet" for number in range(4)]
    assert [path.name for path in sorted(out.glob("codes*"))] == names
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)
    with caplog.at_level("INFO"):
        _encode(tokenizer, data, out, "--shard_records", "5")
    assert "is finished already, nothing to do: codes of 18 records" in caplog.text.replace("\n", " ")


def test_simulated_records_are_encoded_for_a_smoke_run_and_no_records_at_all_are_refused(tokenizer, data, tmp_path):
    options = ["--checkpoint", str(tokenizer), "--out", str(tmp_path), "--num_proc", "1"]
    tokenization.encode.main([*options, "--simulate", "2"])
    assert [row["fold"] for row in _table(tmp_path)] == [1, 2]
    with pytest.raises(ValueError, match="No data: pass --data"):
        tokenization.encode.main(options)


def test_a_folder_with_other_codes_is_refused_and_left_alone(tokenizer, codes, data):
    with pytest.raises(ValueError, match="holds codes of other records, or of another quantizer"):
        _encode(tokenizer, data, codes, "--window_seconds", "5")
    assert len(_table(codes)) == NUM_RECORDS


def test_codes_of_another_quantizer_are_refused(codes, data, tmp_path):
    AnyECGRhythmFeatureExtractor(quantizer=tiny_quantizer(seed=1)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"made by another quantizer \(SHA-256 .*leave it out"):
        training.pretrain.main(_argv(data, tmp_path, "--codes", str(codes), "--quantizer", str(tmp_path / "other")))


def test_codes_of_another_extractor_configuration_are_refused(tokenizer, codes, data, tmp_path):
    shutil.copytree(tokenizer, tmp_path / "other")
    path = tmp_path / "other" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"highcut_hz": 45.0}))
    with pytest.raises(ValueError, match="another extractor configuration.*highcut_hz 40.0, not 45.0"):
        training.pretrain.main(_argv(data, tmp_path, "--codes", str(codes), "--quantizer", str(tmp_path / "other")))


def test_records_without_stored_codes_are_refused_with_their_number_and_the_first(tokenizer, data, tmp_path):
    _encode(tokenizer, data, tmp_path / "codes", "--folds", "1", "2", "3", "9")
    with pytest.raises(ValueError, match="10 of 16 records are missing, the first is 'r03'.*all folds"):
        training.pretrain.main(_argv(data, tmp_path, "--codes", str(tmp_path / "codes")))


def test_codes_of_another_data_folder_are_refused(codes, data, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "more.txt").write_text("")
    with pytest.raises(ValueError, match="16 of 16 records are missing.*its data folder has other files"):
        training.pretrain.main(_argv(tmp_path / "data", tmp_path, "--codes", str(codes)))


def test_codes_of_patches_that_are_masked_by_now_are_refused(tokenizer, codes, data):
    stored, records = StoredCodes(codes), _records(tokenizer, data)
    store, row = records.rows[1]
    store.mask(row)  # opens the maps
    store._maps = (store._maps[0], store._maps[1].copy())
    mask = store.mask(row)
    mask[0, 0] = 0
    store.columns["mask_crc32"][row] = zlib.crc32(mask)
    with pytest.raises(ValueError, match="1 of 18 records have other leads or masked patches.*'r01'"):
        records.with_codes(stored)


@pytest.mark.parametrize("option", ["max_shift_seconds", "gain_range", "noise_mv"])
def test_augmentations_that_alter_the_signal_are_refused_with_stored_codes(codes, data, tmp_path, option):
    with pytest.raises(ValueError, match=f"--{option} 0.5 alters them: pass --{option} 0"):
        training.pretrain.main(_argv(data, tmp_path, "--codes", str(codes), f"--{option}", "0.5"))


@pytest.mark.parametrize(("options", "message"), [
    (["--window_seconds", "5"], "windows of 10 s, --window_seconds is 5"),
    (["--objective", "latents"], "--codes belongs to --objective masked_codes"),
])  # fmt: skip
def test_options_that_do_not_go_with_stored_codes_are_refused(codes, data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        training.pretrain.main(_argv(data, tmp_path, "--codes", str(codes), *options))


def test_a_folder_without_codes_and_a_damaged_shard_are_refused(codes, tmp_path):
    with pytest.raises(ValueError, match="there are no codes"):
        StoredCodes(tmp_path)
    content = bytearray((codes / "codes-00000-of-00001.parquet").read_bytes())
    content[len(content) // 4] ^= 1
    (tmp_path / "codes-00000-of-00001.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="codes-00000-of-00001.parquet is damaged.*Remove it"):
        StoredCodes(tmp_path)


def test_the_digest_of_stored_codes_is_of_the_codes_and_not_of_their_shards(tokenizer, data, codes, tmp_path):
    cut = _encode(tokenizer, data, tmp_path / "cut", "--shard_records", "5")
    assert StoredCodes(cut).sha256() == StoredCodes(codes).sha256()
    other = StoredCodes(codes)
    other._codes = np.where(np.arange(len(other._codes)) == 7, 1 - other._codes.clip(0, 1), other._codes)
    assert other.sha256() != StoredCodes(codes).sha256()


def test_a_run_is_not_taken_up_with_other_codes_in_the_same_folder(tokenizer, data, codes, tmp_path):
    shutil.copytree(codes, tmp_path / "codes")
    argv = _argv(data, tmp_path / "run", "--codes", str(tmp_path / "codes"))
    training.pretrain.main(argv)
    (tmp_path / "run" / "run_finished.json").unlink()
    shutil.rmtree(tmp_path / "codes")
    AnyECGRhythmFeatureExtractor(quantizer=tiny_quantizer(seed=1)).save_pretrained(tmp_path / "other")
    _encode(tmp_path / "other", data, tmp_path / "codes")
    with pytest.raises(ValueError, match=r"started from other content.*--codes \(SHA-256 .*Bring the old files back"):
        training.pretrain.main(argv)


def test_codes_of_a_large_codebook_need_more_than_two_bytes(tokenizer, codes):
    origin = replace(StoredCodes(codes).origin, codebook_size=40_000)
    row = _table(codes)[5] | {"codes": np.full((3, 7), 39_999)}
    content = shard_bytes([row], origin, "digest")
    assert pq.read_table(pa.BufferReader(content))["codes"].to_pylist() == [[39_999] * 21]
