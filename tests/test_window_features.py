"""Vectors of windows in their cache: named by content, whole or not at all."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_checkpoints import tiny_model

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg_long import AnyECGForLongRecords
from anyecg_hf.simulate import simulate_record
from training import window_features
from training.window_features import FeatureCache


def make_cache(folder, seed=0, **options):
    model = tiny_model(AnyECGForLongRecords, seed=seed, pooling="mean_max")
    return FeatureCache(model, AnyECGFeatureExtractor(hop_seconds=10.0, **options), folder)


@pytest.fixture(scope="module")
def record():
    return simulate_record(1, duration_seconds=25, lead_names=["II", "V1"], sampling_rate=250)


@pytest.fixture
def calls(monkeypatch):
    made, embed = [], window_features.embed_windows
    monkeypatch.setattr(
        window_features, "embed_windows", lambda *args: made.append(args[2].record_name) or embed(*args)
    )
    return made


def test_the_second_time_nothing_is_computed(tmp_path, record, calls):
    first, again = make_cache(tmp_path).of_record(record), make_cache(tmp_path).of_record(record)
    assert len(calls) == 1 and np.array_equal(first["features"], again["features"])
    assert first["features"].shape == (3, 64) and first["start_seconds"].tolist() == [0, 10, 15]


def test_other_content_weights_or_filters_have_vectors_of_their_own(tmp_path, record, calls):
    make_cache(tmp_path).of_record(record)
    louder = dataclasses.replace(record, signal=record.signal * np.float32(1.01))
    make_cache(tmp_path).of_record(louder)
    make_cache(tmp_path).of_record(dataclasses.replace(record, lead_names=["II", "V2"]))
    make_cache(tmp_path).of_record(dataclasses.replace(record, sampling_rate=251.0))
    make_cache(tmp_path, seed=1).of_record(record)
    make_cache(tmp_path, highcut_hz=35.0).of_record(record)
    assert len(calls) == 6
    renamed = dataclasses.replace(record, record_name="another", annotations=[])
    make_cache(tmp_path).of_record(renamed)
    assert len(calls) == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_made_anew(tmp_path, record, calls, damage):
    whole = make_cache(tmp_path).of_record(record)
    (path,) = (tmp_path / "windows").iterdir()
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes({"cut": data[:-50], "flipped": data, "empty": b""}[damage])
    again = make_cache(tmp_path).of_record(record)
    assert len(calls) == 2 and np.array_equal(whole["features"], again["features"])
    make_cache(tmp_path).of_record(record)
    assert len(calls) == 2


def test_a_failed_write_leaves_nothing_behind(tmp_path, record, monkeypatch):
    def fail(*args):
        raise OSError("no room")

    monkeypatch.setattr(window_features.os, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        make_cache(tmp_path).of_record(record)
    assert list((tmp_path / "windows").iterdir()) == []


def test_a_record_shorter_than_a_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lasts 7 s; a window takes 10 s"):
        make_cache(tmp_path).of_record(simulate_record(1, duration_seconds=7))


def test_vectors_are_those_of_the_model(tmp_path, record):
    cache = make_cache(tmp_path)
    items, _ = cache.extractor.windows(record)
    with torch.no_grad():
        expected = cache.model.embed_windows(**cache.extractor.pad(items, return_tensors="pt")).numpy()
    assert np.allclose(cache.of_record(record)["features"], expected, atol=1e-5)
