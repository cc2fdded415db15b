"""Why a finding: relevance is what hiding a second of a lead takes from it, and only what was measured is evidence."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from scipy.special import logit
from tiny_checkpoints import LABELS, tiny_model, write_record
from transformers import pipeline

from anyecg_hf import explain
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import LEAD_IDS
from anyecg_hf.modeling_anyecg import AnyECGModel
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction, AnyECGForSequenceClassification
from anyecg_hf.modeling_outputs_anyecg import AnyECGClassifierOutput
from anyecg_hf.simulate import simulate_record

THREE = ["II", "V1", "V5"]


class SumOfEnergies(AnyECGForSequenceClassification):
    """A classifier whose evidence is known: AFIB's logit is the energy of V1 less half of that of II, seen patches only."""

    def forward(self, input_values, lead_ids, attention_mask, **kwargs):
        energy = input_values.unflatten(-1, (-1, self.config.patch_size)).square().mean(-1)  # (B, L, P)
        share = (lead_ids == LEAD_IDS["V1"]).float() - 0.5 * (lead_ids == LEAD_IDS["II"]).float()
        logits = torch.zeros(len(input_values), self.config.num_labels)
        logits[:, 1] = (energy * attention_mask * share[..., None]).sum((1, 2))
        return AnyECGClassifierOutput(logits=logits)


def sum_of_energies(problem_type):
    labels = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    return tiny_model(SumOfEnergies, problem_type=problem_type, **labels)


def make_pipe(model=None, task="ecg-classification", **options):
    model = tiny_model() if model is None else model
    return pipeline(task, model=model, feature_extractor=AnyECGFeatureExtractor(), device="cpu", **options)


@pytest.fixture(scope="module")
def network():
    return make_pipe()


@pytest.fixture(scope="module")
def known():
    return make_pipe(sum_of_energies("multi_label_classification"))


def short_record(seed=1, seconds=4, lead_names=THREE):
    return simulate_record(seed, duration_seconds=seconds, lead_names=lead_names, sampling_rate=250)


def energies(record):
    """Energy of each lead and second as the model gets them."""
    values = AnyECGFeatureExtractor()(record)["input_values"][0]
    return np.square(values.reshape(len(values), -1, 300)).mean(-1)


# ---- what relevance is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead_names", [THREE, ["V5", "V1", "II", "I"]])
def test_relevance_is_where_the_evidence_is_with_its_sign_and_size(known, lead_names):
    record = short_record(lead_names=lead_names)
    found = explain(known, record, label="AFIB")
    shares = {"V1": 1.0, "II": -0.5}
    expected = energies(record) * np.array([[shares.get(name, 0.0)] for name in lead_names])
    assert found.lead_names == lead_names and found.unit == "log-odds"
    assert found.relevance == pytest.approx(expected, abs=1e-5)


def test_one_large_second_of_one_lead_stands_out(known):
    record = short_record()
    record.signal[1, 500:750] *= 3
    relevance = explain(known, record, label="AFIB").relevance
    assert np.unravel_index(relevance.argmax(), relevance.shape) == (1, 2)


def test_relevance_equals_a_loop_that_hides_one_patch_after_another(network):
    record = short_record()
    batch = AnyECGFeatureExtractor()(record, return_tensors="pt")
    expected = np.zeros((3, 4))
    with torch.no_grad():
        whole = network.model(**batch).logits[0, 2]
        for lead in range(3):
            for patch in range(4):
                mask = batch["attention_mask"].clone()
                mask[0, lead, patch] = 0
                expected[lead, patch] = whole - network.model(**{**batch, "attention_mask": mask}).logits[0, 2]
    for size in (1, 5, 32):
        found = explain(network, record, label="PVC", windows_per_batch=size)
        assert found.relevance == pytest.approx(expected, abs=1e-5)
    assert np.abs(expected).max() > 0.01


def test_relevance_equals_the_ablation_of_captum(network):
    captum = pytest.importorskip("captum.attr", reason="captum is not installed: pip install captum")
    record = short_record()
    batch = AnyECGFeatureExtractor()(record, return_tensors="pt")

    def logit_of(mask):
        copies = {name: batch[name].expand(len(mask), *batch[name].shape[1:]) for name in ("input_values", "lead_ids")}
        return network.model(**copies, attention_mask=mask).logits[:, 1]

    mask = batch["attention_mask"].float()
    with torch.no_grad():
        expected = captum.FeatureAblation(logit_of).attribute(mask, perturbations_per_eval=4)[0]
    assert explain(network, record, label="AFIB").relevance == pytest.approx(expected.numpy(), abs=1e-5)


def test_of_one_of_several_classes_the_log_odds_are_those_of_its_probability():
    pipe = make_pipe(tiny_model(problem_type="single_label_classification"))
    record = short_record(seconds=2)
    batch = AnyECGFeatureExtractor()(record, return_tensors="pt")
    hidden = batch["attention_mask"].clone()
    hidden[0, 1, 1] = 0
    with torch.no_grad():
        whole, less = (
            pipe.model(**{**batch, "attention_mask": mask}).logits.softmax(-1)[0, 3].item()
            for mask in (batch["attention_mask"], hidden)
        )
    found = explain(pipe, record, label="LVH")
    assert found.relevance[1, 1] == pytest.approx(logit(whole) - logit(less), abs=1e-4)
    assert found.threshold is None and found.score == pytest.approx(whole, abs=1e-5)


def test_of_a_regression_relevance_is_in_the_value():
    record = short_record(seconds=2)
    found = explain(make_pipe(sum_of_energies("regression")), record, label="AFIB")
    assert found.unit == "value" and found.relevance[1] == pytest.approx(energies(record)[1], abs=1e-5)


def test_the_finding_is_the_pipelines_own_and_by_default_the_highest(network):
    record = short_record()
    findings = network(record, thresholds=0.3)
    found = explain(network, record, thresholds=0.3)
    assert {name: getattr(found, name) for name in findings[0]} == pytest.approx(findings[0])
    last = explain(network, record, label=findings[-1]["label"], thresholds=0.3)
    assert last.score == pytest.approx(findings[-1]["score"])


# ---- what is no evidence -------------------------------------------------------------------------------------------


def test_what_the_model_did_not_see_has_no_relevance(known):
    record = short_record()
    record.signal[0, 300:320] = np.nan  # in the second second
    record.signal[2] = 0.1  # flat from end to end
    relevance = explain(known, record, label="AFIB").relevance
    assert np.argwhere(np.isnan(relevance)).tolist() == [[0, 1], [2, 0], [2, 1], [2, 2], [2, 3]]


def test_what_was_restored_is_no_evidence(known):
    record = short_record(lead_names=["I", "II", "V1"])
    record.signal[1, 250:500] = np.nan
    restored = make_pipe(tiny_model(AnyECGForLeadReconstruction), "ecg-reconstruction")(record, leads=["V1", "V2"])
    found = explain(known, restored, label="AFIB")
    assert found.lead_names == ["I", "II", "V1", "V2"]
    assert np.isnan(found.relevance).tolist() == [[False] * 4, [False, True, False, False], [True] * 4, [True] * 4]
    assert found.score == pytest.approx(next(each["score"] for each in known(restored) if each["label"] == "AFIB"))
    assert np.array_equal(found.record.restored, restored["restored"])  # which its picture shows


# ---- records -------------------------------------------------------------------------------------------------------


def test_a_long_record_is_explained_second_by_second_like_its_features(known):
    record = short_record(seconds=17.6)
    found = explain(known, record, label="AFIB")
    embed = make_pipe(tiny_model(AnyECGModel), "ecg-feature-extraction", pooling="patch")
    assert found.start_seconds == pytest.approx(embed(record)["start_seconds"])
    values = AnyECGFeatureExtractor()(record)["input_values"][0, 1]  # filtered whole
    starts = np.round(found.start_seconds * 300).astype(int)
    expected = [np.square(values[start : start + 300]).mean() for start in starts]
    assert found.relevance.shape == (3, 18) and found.relevance[1] == pytest.approx(expected, abs=1e-5)


def test_any_form_of_one_record_is_taken(known, tmp_path):
    record = short_record()
    expected = explain(known, record, label="AFIB").relevance
    given = {"sampling_rate": 250, "lead_names": ["a", "b", "c"], "units": "mV"}
    aliases = {"a": "II", "b": "V1", "c": "V5"}
    found = explain(known, record.signal, label="AFIB", lead_aliases=aliases, **given)
    assert np.array_equal(found.relevance, expected) and found.record.lead_names == THREE
    path = write_record(record, tmp_path, "r1")
    assert explain(known, str(path), label="AFIB").relevance == pytest.approx(expected, abs=1e-3)  # 16-bit samples


def test_the_model_and_the_record_stay_as_they_were(network):
    record, before = short_record(), dataclasses.replace(short_record(), signal=short_record().signal.copy())
    explain(network, record)
    assert np.array_equal(record.signal, before.signal)
    assert all(parameter.grad is None for parameter in network.model.parameters())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label": "FLU"}, ValueError, "label is 'FLU'.*its labels are NORM, AFIB, PVC, LVH"),
        ({"record": [short_record(), short_record()]}, ValueError, "several records; it takes one"),
        ({"pipe": tiny_model()}, TypeError, "a AnyECGForSequenceClassification for pipe.*ecg-classification"),
        ({"speed": 1}, TypeError, "has no option speed"),
    ],
)
def test_what_cannot_be_explained_is_refused(network, change, error, message):
    with pytest.raises(error, match=message):
        explain(**{"pipe": network, "record": short_record(), **change})


# ---- the picture ---------------------------------------------------------------------------------------------------


def test_the_picture_shades_the_seconds_that_count(known):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install anyecg-hf[plot]")
    from matplotlib.image import imread

    record = short_record()
    record.signal[1, 500:750] *= 3
    figure, file = explain(known, record, label="AFIB").plot(dpi=100), io.BytesIO()
    figure.savefig(file)
    file.seek(0)
    picture = imread(file)[:, :, :3]
    darkest = max((patch for patch in figure.axes[0].patches if patch.get_gid() == "for"), key=lambda p: p.get_alpha())
    x, y = (value / 25.4 * 100 for value in darkest.get_center())
    across = slice(int(x) - 40, int(x) + 40)
    inside = picture[len(picture) - int(y) - 30 : len(picture) - int(y) + 30, across]
    blue = (inside[..., 2] > inside[..., 0] + 0.2).mean()  # paper, grid and ink have no more blue than red
    assert blue > 0.5 and (picture.max(2) < 0.3).sum() > 2000
