"""training/collate.py: from items to a batch; randomness that follows from seed, epoch and record alone."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import LEAD_IDS
from training.collate import AugmentationArguments, ECGCollator
from training.corpora.simulated import list_simulated
from training.data import ECGDataset, EpochSampler
from training.lead_subsets import REDUCED_SUBSETS, draw_leads
from training.record_store import prepare_records

EVERYTHING = AugmentationArguments(max_shift_seconds=1.0, gain_range=0.1, noise_mv=0.02, lead_subset_probability=0.5)


@pytest.fixture(scope="module")
def extractor():
    return AnyECGFeatureExtractor()


@pytest.fixture(scope="module")
def dataset(extractor, tmp_path_factory):
    store = prepare_records(
        list_simulated(12), extractor, source="s", cache_dir=tmp_path_factory.mktemp("cache"), num_proc=1
    )
    targets = np.eye(12, 3, dtype=np.float32)
    return ECGDataset([(store, row) for row in range(12)], targets=targets, seed=1)


def _item(num_leads=12, num_patches=10, *, seed=(0, 0, 0), mask=None):
    steps = np.random.default_rng(0).integers(-3000, 3000, (num_leads, num_patches * 300)).astype(np.int16)
    return {
        "steps": steps,
        "step_mv": 1e-3,
        "mask": np.ones((num_leads, num_patches), np.uint8) if mask is None else mask,
        "lead_ids": np.arange(1, num_leads + 1),
        "record_id": "r",
        "index": 0,
        "seed": seed,
        "age": 61.0,
        "sex": "female",
        "weight": None,
    }


def _equal(first, second):
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_a_batch_of_evaluation_is_the_prepared_records_unaltered(dataset, extractor):
    batch = ECGCollator(extractor, augmentation=EVERYTHING)([dataset[0], dataset[1]])
    store = dataset.rows[0][0]
    assert batch["input_values"].shape == (2, 12, 3000) and batch["input_values"].dtype == torch.float32
    np.testing.assert_array_equal(batch["input_values"][1], store.signal(1))
    assert batch["attention_mask"].shape == (2, 12, 10) and batch["lead_ids"].dtype == torch.int64
    assert torch.equal(batch["labels"], torch.eye(12, 3)[:2])


def test_the_same_epoch_gives_the_same_batches_with_and_without_workers(dataset, extractor):
    collator = ECGCollator(extractor, augmentation=EVERYTHING, mask_ratio=0.5, with_demography=True)

    def batches(num_workers):
        sampler = EpochSampler(len(dataset), seed=4)
        sampler.set_epoch(3)
        torch.manual_seed(num_workers)  # the global generators must not matter
        np.random.seed(num_workers)
        return list(DataLoader(dataset, batch_size=5, sampler=sampler, collate_fn=collator, num_workers=num_workers))

    first, second = batches(0), batches(2)
    assert all(
        torch.equal(a[name].nan_to_num(-1.0) if a[name].is_floating_point() else a[name],
                    b[name].nan_to_num(-1.0) if b[name].is_floating_point() else b[name])
        for a, b in zip(first, second, strict=True)
        for name in a
    )  # fmt: skip


def test_two_epochs_see_different_versions_of_a_record(dataset, extractor):
    collator = ECGCollator(extractor, augmentation=AugmentationArguments(max_shift_seconds=1.0))
    first, second = (collator([dataset[(epoch, 0)]])["input_values"] for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_a_shifted_record_begins_later_and_ends_masked_where_less_than_half_a_patch_is_left(extractor):
    collator = ECGCollator(extractor, augmentation=AugmentationArguments(max_shift_seconds=1.0))
    lengths = set()
    for epoch in range(40):
        item = _item(seed=(0, epoch, 0))
        batch = collator([item])
        original = torch.from_numpy(item["steps"] * np.float32(1e-3))
        shift = next(s for s in range(301) if torch.equal(batch["input_values"][0, :, :300], original[:, s : s + 300]))
        num_left = 3000 - shift
        assert torch.equal(batch["input_values"][0, :, :2700], original[:, shift : shift + 2700])
        is_kept = shift <= 150
        assert (batch["attention_mask"][0, :, 9] == int(is_kept)).all()
        tail = batch["input_values"][0, :, 2700:]
        assert not tail[:, num_left - 2700 :].any() if is_kept else not tail.any()
        lengths.add(is_kept)
    assert lengths == {True, False}


def test_a_patch_that_is_partly_made_of_an_unusable_one_is_masked(extractor):
    mask = np.ones((2, 10), np.uint8)
    mask[0, 4] = 0
    collator = ECGCollator(extractor, augmentation=AugmentationArguments(max_shift_seconds=0.5))
    batch = collator([_item(2, seed=(0, 1, 0), mask=mask)])
    assert batch["attention_mask"][0, 0, 3:5].tolist() == [0, 0]
    assert not batch["input_values"][0, 0, 900:1500].any()
    assert batch["attention_mask"][0, 1, :9].all()


def test_long_records_are_cut_in_the_middle_in_evaluation_and_at_random_in_training(extractor):
    collator = ECGCollator(extractor, window_seconds=10.0)
    middle = collator([_item(2, 31, seed=None)])["input_values"][0].numpy()
    steps = _item(2, 31)["steps"] * np.float32(1e-3)
    np.testing.assert_array_equal(middle, steps[:, 10 * 300 : 20 * 300])
    starts = {float(collator([_item(2, 31, seed=(0, epoch, 0))])["input_values"][0, 0, 0]) for epoch in range(8)}
    assert len(starts) > 3


def test_records_of_different_leads_and_lengths_are_padded_and_masked(extractor):
    batch = ECGCollator(extractor)([_item(3, 10), _item(2, 4)])
    assert batch["input_values"].shape == (2, 3, 3000)
    assert batch["lead_ids"].tolist() == [[1, 2, 3], [1, 2, 0]]
    assert batch["attention_mask"][1].tolist() == [[1] * 4 + [0] * 6, [1] * 4 + [0] * 6, [0] * 10]


def test_which_leads_a_record_keeps_does_not_depend_on_what_else_is_in_the_batch(extractor):
    collator = ECGCollator(extractor, augmentation=AugmentationArguments(lead_subset_probability=1.0))
    sizes = set()
    for epoch in range(60):
        alone = collator([_item(seed=(0, epoch, 1))])
        both = collator([_item(seed=(0, epoch, 0)), _item(seed=(0, epoch, 1))])
        num_kept = alone["lead_ids"].shape[1]
        sizes.add(num_kept)
        assert both["lead_ids"][1].tolist()[:num_kept] == alone["lead_ids"][0].tolist()
        assert not both["lead_ids"][1, num_kept:].any()
    assert sizes == {1, 2, 3, 6, 8}


def test_dropping_leads_gives_the_named_subsets_as_often_as_random_leads_and_leaves_no_lead_out(extractor):
    collator = ECGCollator(extractor, augmentation=AugmentationArguments(lead_subset_probability=0.5))
    drawn = Counter(
        tuple(collator([_item(seed=(0, epoch, 0), num_patches=1)])["lead_ids"][0].tolist()) for epoch in range(2000)
    )
    assert drawn[tuple(range(1, 13))] == pytest.approx(1000, abs=90)
    for leads in REDUCED_SUBSETS:  # an eighth each of the records of which leads are dropped
        assert drawn[tuple(LEAD_IDS[name] for name in leads)] >= 90, leads
    single = {leads[0] for leads in drawn if len(leads) == 1}
    assert single == set(range(1, 13))


def test_no_leads_dropped_leaves_the_draws_of_most_leads_as_they_were(extractor):
    collator = ECGCollator(extractor, augmentation=AugmentationArguments(max_leads=3))
    for epoch in range(5):
        rows = np.random.default_rng((0, epoch, 0, 2)).permutation(12)[:3]
        assert collator([_item(seed=(0, epoch, 0))])["lead_ids"][0].tolist() == sorted(rows + 1)


def test_a_record_without_a_lead_of_the_subset_keeps_what_it_has():
    ids = np.array([9, 10])  # V3, V4
    for seed in range(50):
        rows = draw_leads(np.array([0, 1]), ids, np.random.default_rng(seed))
        assert 1 <= len(rows) <= 2 and rows.tolist() == sorted(rows)


def test_only_the_leads_asked_for_are_taken_in_the_order_of_the_record(dataset, extractor):
    batch = ECGCollator(extractor, leads=("V2", "I"))([dataset[0], dataset[1]])
    whole = ECGCollator(extractor)([dataset[0], dataset[1]])
    assert batch["lead_ids"].tolist() == [[1, 8]] * 2
    assert torch.equal(batch["input_values"], whole["input_values"][:, [0, 7]])


def test_a_lead_is_usable_where_something_of_it_is_in_the_window(extractor):
    mask = np.zeros((2, 31), np.uint8)
    mask[0, 5], mask[1, 15] = 1, 1
    assert ECGCollator(extractor).usable_leads(_item(2, 31, seed=None, mask=mask)) == {2}


def test_the_leads_of_a_record_keep_their_names_when_others_are_dropped(extractor):
    collator = ECGCollator(extractor, augmentation=AugmentationArguments(lead_subset_probability=1.0))
    item = _item(seed=(0, 0, 0))
    batch = collator([item])
    for row, lead in enumerate(batch["lead_ids"][0].tolist()):
        np.testing.assert_array_equal(batch["input_values"][0, row], item["steps"][lead - 1] * np.float32(1e-3))


def test_a_record_is_never_left_with_unusable_leads_only(extractor):
    mask = np.zeros((12, 10), np.uint8)
    mask[7] = 1
    collator = ECGCollator(extractor, augmentation=AugmentationArguments(lead_subset_probability=1.0))
    for epoch in range(10):
        assert collator([_item(seed=(0, epoch, 0), mask=mask)])["attention_mask"].any()


def test_noise_falls_on_usable_patches_only(extractor):
    mask = np.ones((2, 10), np.uint8)
    mask[1, 3] = 0
    item = _item(2, mask=mask)
    item["steps"][1, 900:1200] = 0
    batch = ECGCollator(extractor, augmentation=AugmentationArguments(noise_mv=0.5))([item])
    assert not batch["input_values"][0, 1, 900:1200].any()
    assert not np.array_equal(batch["input_values"][0, 0], item["steps"][0] * np.float32(1e-3))


def test_masks_of_evaluation_are_fixed_and_follow_the_pattern_of_the_item(extractor):
    collator = ECGCollator(extractor, mask_ratio=0.5)
    item = _item(seed=None) | {"mask_pattern": "lead"}
    first, second = collator([item]), collator([item])
    assert _equal(first, second) and first["bool_masked_pos"].dtype == torch.bool
    assert first["bool_masked_pos"][0].sum(1).tolist().count(10) == 6


def test_demography_is_nan_where_it_is_unknown(extractor):
    batch = ECGCollator(extractor, with_demography=True)([_item()])
    assert batch["age"].tolist() == [61.0] and batch["sex"].tolist() == [1.0] and batch["weight"].isnan().all()


@pytest.mark.parametrize("wrong", [{"noise_mv": -1.0}, {"lead_subset_probability": 1.5}, {"gain_range": 1.0}])
def test_augmentation_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="--"):
        AugmentationArguments(**wrong)


def test_beats_are_those_of_all_leads_whichever_the_model_sees(dataset, extractor):
    few = ECGCollator(extractor, augmentation=AugmentationArguments(max_leads=3), with_beats=True)
    batch = few([dataset[(0, 0)], dataset[(0, 1)]])
    assert batch["input_values"].shape[1] == 3
    assert batch["beats"].shape == (2, 12, 80) and batch["beats"].isfinite().all() and batch["rhythm"].isfinite().all()
    whole = ECGCollator(extractor, with_beats=True)([dataset[0], dataset[1]])
    assert torch.equal(whole["beats"], batch["beats"])


def test_beats_lie_under_their_leads_whatever_the_order_and_others_than_the_twelve_have_none(dataset, extractor):
    item = dataset[0]
    whole = ECGCollator(extractor, with_beats=True)([item])
    order = np.random.default_rng(0).permutation(12)
    shuffled = item | {name: item[name][order] for name in ("steps", "mask", "lead_ids")}
    assert torch.allclose(ECGCollator(extractor, with_beats=True)([shuffled])["beats"], whole["beats"], atol=1e-5)
    frank = item | {"lead_ids": np.where(item["lead_ids"] == 12, 13, item["lead_ids"])}
    beats = ECGCollator(extractor, with_beats=True)([frank, item])["beats"]
    assert beats[0, 11].isnan().all() and beats[0, :11].isfinite().all() and beats[1].isfinite().all()


def test_a_record_without_heartbeats_has_unknown_beats(extractor):
    item = _item(seed=None) | {"steps": np.zeros((12, 3000), np.int16)}
    batch = ECGCollator(extractor, with_beats=True)([item])
    assert batch["beats"].isnan().all() and batch["rhythm"].isnan().all()


def test_beats_at_a_rate_that_is_no_multiple_of_theirs_are_refused():
    with pytest.raises(ValueError, match="256 Hz"):
        ECGCollator(AnyECGFeatureExtractor(sampling_rate=256, patch_size=256), with_beats=True)
