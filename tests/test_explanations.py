"""benchmarks/explanations.py: the deletion test falls fastest where the evidence is known to be deleted first."""

import numpy as np
import pytest
import torch
from tiny_checkpoints import tiny_model

pytest.importorskip("captum", reason="captum is not installed: pip install anyecg-hf[dev]")

from anyecg_hf.modeling_anyecg_heads import AnyECGForSequenceClassification
from anyecg_hf.modeling_outputs_anyecg import AnyECGClassifierOutput
from benchmarks import explanations

LEADS, PATCHES = 2, 10


class WeightedSum(AnyECGForSequenceClassification):
    """The logit is the sum of the samples of seen patches, the patch of number i (from 0, lead by lead) weighted by i."""

    def forward(self, input_values, lead_ids, attention_mask, **kwargs):
        sums = input_values.unflatten(-1, (-1, self.config.patch_size)).sum(-1) * attention_mask
        logit = (sums.flatten(1) * torch.arange(LEADS * PATCHES)).sum(1, keepdim=True)
        return AnyECGClassifierOutput(logits=logit.expand(-1, self.config.num_labels))


@pytest.fixture
def batch():
    values = torch.full((1, LEADS, PATCHES * 300), 1 / 300)  # the sum of each patch is 1
    mask = torch.ones(1, LEADS, PATCHES, dtype=torch.int64)
    return {"input_values": values, "lead_ids": torch.tensor([[1, 2]]), "attention_mask": mask}


@pytest.fixture
def model():
    return tiny_model(WeightedSum)


def test_integrated_gradients_of_a_sum_are_its_parts(model, batch):
    relevance, gap = explanations.integrated_gradients(model, batch, index=0)
    assert relevance.ravel() == pytest.approx(np.arange(LEADS * PATCHES), abs=1e-3) and abs(gap) < 1e-2


@pytest.mark.parametrize("cover", explanations.COVERS)
def test_deleting_takes_from_the_score_what_the_patches_gave(model, batch, cover):
    parts = np.arange(LEADS * PATCHES)
    orders = {"most": parts[::-1].copy(), "least": parts}
    curves = explanations.deletion_curves(model, batch, 0, orders)[cover]
    counts = [round(share * parts.size) for share in (0, *explanations.SHARES)]
    assert curves["most"] == pytest.approx([parts.sum() - parts[::-1][:count].sum() for count in counts], abs=1e-3)
    assert curves["least"] == pytest.approx([parts.sum() - parts[:count].sum() for count in counts], abs=1e-3)


def test_the_area_is_the_mean_height_of_the_curve():
    assert explanations.area(np.full(5, 0.7)) == pytest.approx(0.7)
    falling = 1 - np.array([0, *explanations.SHARES]) / explanations.SHARES[-1]
    assert explanations.area(np.stack([falling, 2 * falling])) == pytest.approx([0.5, 1.0])


def test_figures_tell_what_falls_faster_than_random_from_what_does_not():
    orders = {"random": [2, 1, 0, -1, -2], "occlusion, most": [2, -9, -9, -9, -9], "occlusion, least": [2, 2, 2, 2, 2]}
    orders |= {"gradients, most": orders["random"], "gradients, least": orders["random"]}
    records = [
        {
            "patient_id": str(patient // 2), "label": "AFIB", "gap": -0.1, "cpu_seconds": {"occlusion": 1.0, "gradients": 2.0},
            "log_odds": {cover: orders for cover in explanations.COVERS},
        }
        for patient in range(6)
    ]  # fmt: skip
    figures = explanations.summarise(records, num_resamples=20)
    assert (figures["num_records"], figures["num_patients"], figures["labels"]) == (6, 3, {"AFIB": 6})
    row = figures["masked"]["occlusion, most"]
    assert row["below_random"][0] > 0.2 and row["below_random"] == pytest.approx([row["below_random"][0]] * 3)
    assert row["below_gradients"] == row["below_random"]
    assert figures["flat"]["occlusion, least"]["below_random"][0] < 0
    assert figures["masked"]["gradients, most"]["below_random"] == [0, 0, 0]
    assert "| most relevant, occlusion (`explain`) | masked |" in explanations.table(figures)
