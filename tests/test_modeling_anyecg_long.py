"""The model for long records: any length, any batch, what it learns from, and what it refuses."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_checkpoints import tiny_model
from transformers import AutoModelForAudioFrameClassification

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg import AnyECGModel
from anyecg_hf.modeling_anyecg_long import AnyECGForLongRecords
from anyecg_hf.simulate import simulate_record

LABELS = {"id2label": {0: "AF", 1: "V"}, "label2id": {"AF": 0, "V": 1}}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def long_model(**options):
    return tiny_model(
        AnyECGForLongRecords, pooling="mean_max", record_hidden_size=16, record_reach=2, **LABELS, **options
    )


@pytest.fixture(scope="module")
def model():
    return long_model()


def some_features(model, windows=9, records=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(records, windows, model.config.pooled_size, generator=generator)


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


def test_the_windows_of_a_record_go_in_as_the_extractor_gives_them(model):
    extractor = AnyECGFeatureExtractor(hop_seconds=10.0)
    items, _ = extractor.windows(simulate_record(1, duration_seconds=35, lead_names=["II", "V1"]))
    batch = extractor.pad(items, return_tensors="pt")
    outputs = run(model, **batch)
    assert (
        outputs.logits.shape == (1, 4, 2)
        and outputs.record_logits.shape == (1, 2)
        and outputs.counts.shape == (1, 4, 2)
    )
    assert (outputs.counts >= 0).all()
    kept = run(model, window_features=model.embed_windows(**batch).detach()[None])
    torch.testing.assert_close(outputs.logits, kept.logits, **TOLERANCE)


def test_padded_windows_change_nothing(model):
    features = some_features(model, records=2)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    together, alone = (
        run(model, window_features=features, window_mask=mask),
        run(model, window_features=features[1:, :5]),
    )
    torch.testing.assert_close(together.logits[1, :5], alone.logits[0], **TOLERANCE)
    torch.testing.assert_close(together.record_logits[1], alone.record_logits[0], **TOLERANCE)
    assert (together.counts[1, 5:] == 0).all()


def test_a_window_sees_as_far_as_its_layers_reach_and_no_further(model):
    features = some_features(model, windows=20)
    changed = features.clone()
    changed[0, 0] += 1.0
    difference = (run(model, window_features=changed).logits - run(model, window_features=features).logits).abs()[
        0, :, 0
    ]
    assert difference[0] > 1e-3 and difference[2] > 1e-6  # reach 2
    assert (difference[5:] < 1e-6).all()  # two layers: 4


def test_half_an_hour_takes_the_way_of_windows_and_is_finite(model):
    outputs = run(model, window_features=some_features(model, windows=180))
    assert all(torch.isfinite(value).all() for value in outputs.values())


def test_what_is_not_known_has_no_part_in_the_loss(model):
    features = some_features(model, records=2)
    labels, counts = torch.rand(2, 9, 2), torch.full((2, 9, 2), 3.0)
    labels[1, 4:], counts[1] = torch.nan, torch.nan
    mask = torch.ones(2, 9)
    loss = run(model, window_features=features, window_mask=mask, labels=labels, counts=counts).loss
    assert torch.isfinite(loss)
    unknown = run(model, window_features=features, labels=torch.full_like(labels, torch.nan)).loss
    assert unknown == 0
    without = run(model, window_features=features, labels=labels).loss
    assert loss > without  # by what the counts of the first record cost


def test_a_minute_counts_as_much_as_an_hour(model):
    features, labels = some_features(model, windows=6, records=2), torch.zeros(2, 6, 2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 1:] = False
    both = run(model, window_features=features, window_mask=mask, labels=labels).loss
    parts = [
        run(model, window_features=features[:1], labels=labels[:1]).loss,
        run(model, window_features=features[1:, :1], labels=labels[1:, :1]).loss,
    ]
    assert both.item() == pytest.approx(np.mean([part.item() for part in parts]), rel=1e-5)


def test_the_head_goes_on_a_backbone_and_starts_with_plain_statistics(tmp_path):
    tiny_model(AnyECGModel).save_pretrained(tmp_path)
    model = AutoModelForAudioFrameClassification.from_pretrained(tmp_path, new_head=True, **LABELS)
    assert isinstance(model, AnyECGForLongRecords)
    assert (model.record_head.feature_mean == 0).all() and (model.record_head.feature_scale == 1).all()
    with pytest.raises(ValueError, match="new_head=True"):
        AnyECGForLongRecords.from_pretrained(tmp_path)


def test_a_saved_model_keeps_what_the_head_has_measured_of_its_features(model, tmp_path):
    features = some_features(model, windows=50)
    model = long_model()
    model.record_head.standardise(3 + 2 * features[0])
    model.save_pretrained(tmp_path)
    loaded = AnyECGForLongRecords.from_pretrained(tmp_path)
    assert torch.equal(loaded.record_head.feature_mean, model.record_head.feature_mean)
    assert torch.equal(loaded.record_head.feature_scale, model.record_head.feature_scale)
    own = (3 + 2 * features[0] - loaded.record_head.feature_mean) / loaded.record_head.feature_scale
    torch.testing.assert_close(own.mean(0), torch.zeros(own.shape[1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "either input_values"),
        ({"window_features": torch.zeros(1, 3, 7)}, r"accepted is \(batch, windows, 64\)"),
        ({"window_features": torch.zeros(1, 0, 64)}, "accepted is"),
        ({"window_features": torch.zeros(1, 3, 64), "window_mask": torch.ones(1, 2)}, r"must be \(1, 3\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, inputs, message):
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    "options", [{"record_hidden_size": 7}, {"record_layers": 0}, {"record_reach": -1}, {"record_thresholds": [0.5]}]
)
def test_an_impossible_head_is_refused(options):
    with pytest.raises((StrictDataclassError, ValueError)):
        tiny_model(AnyECGForLongRecords, **LABELS, **options)
