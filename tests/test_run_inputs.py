"""training/run_inputs.py: what a run starts from is told by its content, not by its path, time or form."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tiny_quantizer

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from training.corpora.simulated import list_simulated
from training.data import ECGDataset
from training.record_store import prepare_records
from training.run_inputs import digest_inputs, model_sha256


def _records(cache_dir, entries, source="x"):
    store = prepare_records(entries, AnyECGFeatureExtractor(), source=source, cache_dir=cache_dir, num_proc=1)
    return ECGDataset([(store, row) for row in range(len(store))])


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return _records(tmp_path_factory.mktemp("cache"), list_simulated(3))


def test_records_from_another_place_are_the_same_records(records, tmp_path):
    assert _records(tmp_path, list_simulated(3), source="elsewhere").sha256() == records.sha256()


@pytest.mark.parametrize(
    "change", [{"payload": {"seed": 99, "rhythm": "sinus", "heart_rate": 60}}, {"age": 31.5}, {"sex": None}]
)
def test_another_signal_age_or_sex_of_one_record_makes_other_records(records, tmp_path, change):
    first, *rest = list_simulated(3)
    assert _records(tmp_path, [replace(first, **change), *rest]).sha256() != records.sha256()


def test_another_order_or_other_targets_make_other_records(records):
    assert records.take([0, 2, 1]).sha256() != records.sha256()
    with_targets = [records.with_targets(np.array(values)).sha256() for values in ([0, 1, 1], [0, 1, 0])]
    assert len({records.sha256(), *with_targets}) == 3


def test_a_model_is_its_weights_configuration_and_extractor_and_nothing_else(tmp_path):
    tiny_quantizer().save_pretrained(tmp_path)
    AnyECGFeatureExtractor().save_pretrained(tmp_path)
    before = model_sha256(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    _edit(tmp_path / "config.json", transformers_version="5.99.0")
    assert model_sha256(tmp_path) == before
    _edit(tmp_path / "preprocessor_config.json", highcut_hz=30.0)
    other_extractor = model_sha256(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["vector_quantizer.codebook"][0, 0] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert len({before, other_extractor, model_sha256(tmp_path)}) == 3


def _edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_inputs_are_named_as_the_options_are_and_absent_models_are_left_out(records, tmp_path):
    tiny_quantizer().save_pretrained(tmp_path)
    inputs = digest_inputs(records, records.take([0]), quantizer=str(tmp_path), init_from=None)
    assert set(inputs) == {"training records", "records of fold 9", "--quantizer"}
    assert len(set(inputs.values())) == 3
