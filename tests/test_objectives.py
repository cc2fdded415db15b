"""Objectives by hand: demography and beats beside masked codes, lead copying, the teacher."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling, AnyECGModel
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction
from training.objectives import (
    BeatHead,
    CodeBaselines,
    DemographyHead,
    LatentPrediction,
    MaskedCodes,
    MaskedWaveform,
    beat_statistics,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "stem_channels": [4, 4, 4, 4]}


def _batch(num_records=3, num_leads=4, num_patches=3):
    generator = torch.Generator().manual_seed(0)
    shape = (num_records, num_leads, num_patches)
    hidden = torch.rand(shape, generator=generator) < 0.5
    hidden[:, 0, 0] = True
    return {
        "input_values": torch.randn(num_records, num_leads, 300 * num_patches, generator=generator),
        "lead_ids": torch.arange(1, num_leads + 1).repeat(num_records, 1),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "bool_masked_pos": hidden,
        "labels": torch.randint(0, 8, shape, generator=generator),
        "age": torch.tensor([40.0, float("nan"), 80.0]),
        "sex": torch.tensor([1.0, 0.0, float("nan")]),
    }


def _baselines(batch):
    baselines = CodeBaselines(8, 16)
    baselines.add(batch["labels"], batch["lead_ids"])
    return baselines


def _masked_codes(batch, **options):
    torch.manual_seed(0)
    model = AnyECGForMaskedCodeModeling(AnyECGConfig(**SIZES, codebook_size=8))
    return MaskedCodes(model, None, _baselines(batch), **options)


def test_age_and_sex_add_their_loss_over_the_records_where_each_is_known():
    batch = _batch()
    objective = _masked_codes(batch, record_heads={"demography": (0.5, DemographyHead(16))})
    outputs = objective(**batch)
    with torch.no_grad():
        pooled = objective.model.anyecg(
            batch["input_values"], batch["lead_ids"], batch["attention_mask"], batch["bool_masked_pos"]
        ).pooler_output
        age, logit = objective.record_heads["demography"].linear(pooled).double().T.numpy()
    errors = np.abs(age[[0, 2]] - (np.array([40, 80]) - 60) / 20)
    smooth = np.where(errors < 1, errors**2 / 2, errors - 0.5).mean()
    by_hand = smooth + np.mean([np.log1p(np.exp(-logit[0])), np.log1p(np.exp(logit[1]))])
    assert outputs["loss_demography"].item() == pytest.approx(by_hand, rel=1e-5)
    total = outputs["loss_codes"] + 0.5 * outputs["loss_demography"]
    assert outputs["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    assert objective.count_items(batch)["age"] == 2 and objective.count_items(batch)["sex"] == 2


def test_records_of_unknown_age_and_sex_give_a_finite_loss_and_no_gradient():
    batch = _batch() | {"age": torch.full((3,), float("nan")), "sex": torch.full((3,), float("nan"))}
    objective = _masked_codes(batch, record_heads={"demography": (1.0, DemographyHead(16))})
    outputs = objective(**batch)
    outputs["loss"].backward()
    assert outputs["loss_demography"].item() == 0 and not objective.record_heads["demography"].linear.weight.grad.any()
    assert all(torch.isfinite(value.grad).all() for value in objective.parameters() if value.grad is not None)


def test_demography_figures_are_years_and_the_share_guessed_right():
    head = DemographyHead(2)
    with torch.no_grad():
        head.linear.weight.copy_(torch.eye(2))
        head.linear.bias.zero_()
    batch = {"age": torch.tensor([70.0, 50.0, float("nan")]), "sex": torch.tensor([1.0, 1.0, 0.0])}
    pooled = torch.tensor([[0.0, 2.0], [0.5, -1.0], [9.0, -1.0]])  # guessed: 60 and 70 years; female, male, male
    figures = DemographyHead.figures(head.record_sums(pooled, batch))
    assert figures == {"age_mae": pytest.approx(15.0), "sex_accuracy": pytest.approx(2 / 3)}


def _with_beats(batch):
    generator = torch.Generator().manual_seed(1)
    beats = torch.randn(3, 12, 80, generator=generator) * 0.2 + 0.1
    beats[:, 4:], beats[1, 0] = float("nan"), float("nan")
    rhythm = torch.randn(3, 6, generator=generator)
    rhythm[2] = float("nan")
    return batch | {"beats": beats, "rhythm": rhythm}


def test_beats_add_their_loss_over_the_values_that_are_known():
    batch = _with_beats(_batch())
    objective = _masked_codes(batch, record_heads={"beats": (0.5, BeatHead(16, beat_statistics([batch])))})
    outputs = objective(**batch)
    with torch.no_grad():
        pooled = objective.model.anyecg(
            batch["input_values"], batch["lead_ids"], batch["attention_mask"], batch["bool_masked_pos"]
        ).pooler_output
    by_hand = 0.0
    for name, least in (("beats", 0.02), ("rhythm", 0.01)):
        target = batch[name].double().numpy()
        linear = objective.record_heads["beats"].linear[name]
        predicted = linear(pooled).detach().double().numpy().reshape(target.shape)
        with np.errstate(invalid="ignore"), pytest.warns(RuntimeWarning) if name == "beats" else nullcontext():
            target = (target - np.nanmean(target, axis=0)) / np.maximum(np.nanstd(target, axis=0), least)
        errors = np.abs(predicted - target.clip(-5, 5))
        by_hand += np.nanmean(np.where(errors < 1, errors**2 / 2, errors - 0.5))
    assert outputs["loss_beats"].item() == pytest.approx(by_hand, rel=1e-4)
    total = outputs["loss_codes"] + 0.5 * outputs["loss_beats"]
    assert outputs["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    assert objective.count_items(batch)["beats"] == 11 * 80 and objective.count_items(batch)["rhythm"] == 12


def test_the_losses_of_the_record_can_go_without_the_codes():
    batch = _with_beats(_batch())
    head = BeatHead(16, beat_statistics([batch]))
    objective = _masked_codes(batch, record_heads={"beats": (0.5, head)}, code_weight=0.0)
    outputs = objective(**batch)
    assert outputs["loss"].item() == pytest.approx(0.5 * outputs["loss_beats"].item(), rel=1e-6)
    outputs["loss"].backward()
    assert not objective.model.code_head.weight.grad.any()


def test_records_without_a_beat_give_a_finite_loss_and_no_gradient():
    batch = _with_beats(_batch())
    head = BeatHead(16, beat_statistics([batch]))
    batch |= {"beats": torch.full((3, 12, 80), float("nan")), "rhythm": torch.full((3, 6), float("nan"))}
    objective = _masked_codes(batch, record_heads={"beats": (1.0, head)})
    outputs = objective(**batch)
    outputs["loss"].backward()
    assert outputs["loss_beats"].item() == 0
    assert all(torch.isfinite(value.grad).all() for value in objective.parameters() if value.grad is not None)


def test_beat_figures_are_shares_of_variance_explained():
    batch = _with_beats(_batch())
    head = BeatHead(16, beat_statistics([batch]))
    with torch.no_grad():
        for layer in head.linear.values():
            layer.weight.zero_()
            layer.bias.zero_()
    figures = BeatHead.figures(head.record_sums(torch.zeros(3, 16), batch))
    assert figures == {"beats_explained": pytest.approx(0.0), "rhythm_explained": pytest.approx(0.0)}
    target = {
        name: (batch[name] - getattr(head, f"{name}_mean")) / getattr(head, f"{name}_spread")
        for name in batch
        if name in head.linear
    }
    with torch.no_grad():
        for name, layer in head.linear.items():
            layer.weight[:, :3] = target[name].flatten(1).T.nan_to_num()
    figures = BeatHead.figures(head.record_sums(torch.eye(3, 16), batch))
    assert figures == {"beats_explained": pytest.approx(1.0), "rhythm_explained": pytest.approx(1.0)}


def test_figures_of_what_is_not_known_are_nan_never_the_best_value():
    assert all(np.isnan(value) for value in BeatHead.figures(torch.zeros(3, 4)).values())
    assert all(np.isnan(value) for value in DemographyHead.figures(torch.zeros(3, 4)).values())


def test_lead_copying_takes_the_visible_lead_that_agrees_most_often():
    codes = torch.tensor([[[1, 2, 3], [1, 2, 4], [5, 5, 5]]])
    lead_ids = torch.tensor([[1, 2, 7]])
    baselines = CodeBaselines(8, 16)
    baselines.add(codes, lead_ids)
    assert baselines.agreement[1, 2] == pytest.approx(2 / 3) and baselines.agreement[1, 7] == 0
    hidden = torch.zeros(1, 3, 3, dtype=torch.bool)
    hidden[0, 0, :] = True  # lead I; its copy is lead II
    hidden[0, 1, 1] = True  # which is hidden in the second second: nothing agrees, so the most frequent code, 5
    _, _, hits = baselines(codes, {"lead_ids": lead_ids, "bool_masked_pos": hidden})
    assert hits[0, 0].tolist() == [True, False, False]


def test_the_teacher_follows_slowly_and_stands_at_the_end():
    torch.manual_seed(0)
    objective = LatentPrediction(AnyECGModel(AnyECGConfig(**SIZES)), teacher_decay=0.9)
    before = {name: value.clone() for name, value in objective.teacher.named_parameters()}
    with torch.no_grad():
        for value in objective.model.parameters():
            value.add_(1.0)
    objective.progress = 0.0
    objective.after_step()
    moved = dict(objective.teacher.named_parameters())
    assert all(torch.allclose(moved[name], before[name] + 0.1, atol=1e-5) for name in before)
    objective.progress = 1.0
    objective.after_step()
    assert all(torch.allclose(moved[name], before[name] + 0.1, atol=1e-5) for name in before)
    assert not any(value.requires_grad for value in objective.teacher.parameters())


def test_the_gain_of_masked_waveform_is_that_of_its_records_on_their_linear_estimate():
    batch, model = _batch(), AnyECGForLeadReconstruction(AnyECGConfig(**SIZES, waveform_channels=[4, 4]))
    batch["bool_masked_pos"][2] = False  # a record of which nothing is hidden counts in no figure
    objective = MaskedWaveform(model).eval()
    with torch.no_grad():
        sums = objective(**batch)["sums"].double()
        outputs = model(
            **{name: batch[name] for name in ("input_values", "lead_ids", "attention_mask", "bool_masked_pos")}
        )
    hidden = np.repeat(batch["bool_masked_pos"].numpy(), 300, axis=2)
    target = batch["input_values"].double().numpy()
    errors = [
        [((made.double().numpy() - target)[record][hidden[record]] ** 2).sum() for record in range(2)]
        for made in (outputs.linear_estimate, outputs.reconstruction)
    ]
    figures = objective.figures(sums)
    assert figures["gain_db"] == pytest.approx(np.mean(10 * np.log10(np.divide(*errors))), rel=1e-4)
    power = (target[:2][hidden[:2]] ** 2).sum()
    assert figures["explained_power"] == pytest.approx(1 - sum(errors[1]) / power, rel=1e-4)
