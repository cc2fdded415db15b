"""Objectives by hand: demography beside masked codes, lead copying, the teacher."""

import numpy as np
import pytest
import torch

from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling, AnyECGModel
from training.objectives import CodeBaselines, LatentPrediction, MaskedCodes
from training.objectives.demography import DemographyHead

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
    objective = _masked_codes(batch, demography_weight=0.5)
    outputs = objective(**batch)
    with torch.no_grad():
        pooled = objective.model.anyecg(
            batch["input_values"], batch["lead_ids"], batch["attention_mask"], batch["bool_masked_pos"]
        ).pooler_output
        age, logit = objective.demography.linear(pooled).double().T.numpy()
    errors = np.abs(age[[0, 2]] - (np.array([40, 80]) - 60) / 20)
    smooth = np.where(errors < 1, errors**2 / 2, errors - 0.5).mean()
    by_hand = smooth + np.mean([np.log1p(np.exp(-logit[0])), np.log1p(np.exp(logit[1]))])
    assert outputs["loss_demography"].item() == pytest.approx(by_hand, rel=1e-5)
    total = outputs["loss_codes"] + 0.5 * outputs["loss_demography"]
    assert outputs["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    assert objective.count_items(batch)["age"] == 2 and objective.count_items(batch)["sex"] == 2


def test_records_of_unknown_age_and_sex_give_a_finite_loss_and_no_gradient():
    batch = _batch() | {"age": torch.full((3,), float("nan")), "sex": torch.full((3,), float("nan"))}
    objective = _masked_codes(batch, demography_weight=1.0)
    outputs = objective(**batch)
    outputs["loss"].backward()
    assert outputs["loss_demography"].item() == 0 and not objective.demography.linear.weight.grad.any()
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
