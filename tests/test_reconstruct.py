"""training/reconstruct.py: the start at least squares, and a run from end to end on simulated records."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import pipeline

import training.reconstruct
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction
from anyecg_hf.simulate import simulate_record
from training.arguments import ModelArguments
from training.reconstruct import OneCaseEach, build_model, lead_covariance

RECIPE = Path(training.reconstruct.__file__).parent / "recipes" / "smoke_reconstruction.yaml"
NETWORK = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "stem_channels": [4, 4, 4, 4],
    "waveform_channels": [8, 8],
}  # fmt: skip
OPTIONS = ["--max_steps", "4", "--save_steps", "2", "--eval_steps", "2", "--logging_steps", "2", "--warmup_steps", "1"]
OPTIONS += ["--per_device_train_batch_size", "4", "--disable_tqdm", "True", "--simulate", "24", "--num_proc", "1"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def reconstruct(folder, cache, *options, network=NETWORK):
    places = ["--output_dir", str(folder), "--cache_dir", str(cache), "--config", json.dumps(network)]
    training.reconstruct.main([str(RECIPE), *places, *OPTIONS, *options])
    return folder


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    return reconstruct(tmp_path_factory.mktemp("run"), cache)


class Records:
    """Four records of noise that share two sources, as `ECGDataset` gives them; the third lacks V6."""

    def __init__(self):
        generator = np.random.default_rng(0)
        self.mixing = generator.normal(size=(12, 2))
        self.signals = [np.round(1000 * self.mixing @ generator.normal(size=(2, 900))) for _ in range(4)]

    def __len__(self):
        return 4

    def column(self, name):
        return list("abcd")

    def __getitem__(self, index):
        rows = np.random.default_rng(index).permutation(12)[:]
        rows = rows[rows != 11] if index == 2 else rows
        mask = np.ones((len(rows), 3), np.uint8)
        mask[0, 1] = index != 1
        steps = self.signals[index][rows].astype(np.int16)
        return {"steps": steps, "step_mv": 0.001, "mask": mask, "lead_ids": rows + 1}


def test_the_mean_products_are_those_of_the_seconds_in_which_all_leads_are_usable():
    records = Records()
    parts = [records.signals[0], np.delete(records.signals[1], slice(300, 600), axis=1), records.signals[3]]
    leads = np.concatenate(parts, axis=1).astype(np.int16) / 1000
    np.testing.assert_allclose(lead_covariance(records, num_records=4), leads @ leads.T / leads.shape[1], rtol=1e-9)


def test_without_a_record_of_twelve_leads_there_is_no_start():
    records = Records()
    with pytest.raises(ValueError, match="all twelve leads"):
        lead_covariance(type("Some", (Records,), {"__getitem__": lambda self, _: records[2]})(), num_records=4)


def test_a_new_head_starts_at_least_squares_and_a_trained_one_goes_on(tmp_path):
    covariance = np.eye(12) + 0.5
    model = build_model(ModelArguments(preset="tiny", config=json.dumps(NETWORK)), covariance).eval()
    generator = torch.Generator().manual_seed(0)
    batch = {"input_values": torch.randn(1, 12, 900, generator=generator), "lead_ids": torch.arange(1, 13)[None]}
    batch["bool_masked_pos"] = torch.zeros(1, 12, 3, dtype=torch.bool)
    batch["bool_masked_pos"][:, 6:] = True
    outputs = model(**batch)
    assert torch.equal(outputs.reconstruction, outputs.linear_estimate)
    seen = batch["input_values"][0, :6].double().numpy()
    expected = covariance[6:, :6] @ np.linalg.solve(covariance[:6, :6], seen)
    np.testing.assert_allclose(outputs.reconstruction[0, 6:].detach(), expected, atol=2e-3)
    with torch.no_grad():
        model.waveform_head.up_fine.bias.fill_(0.25)
    model.save_pretrained(tmp_path)
    again = build_model(ModelArguments(init_from=str(tmp_path)), 2 * covariance)
    assert again.config.lead_covariance == model.config.lead_covariance
    assert (again.waveform_head.up_fine.bias == 0.25).all()


def test_the_run_ends_with_a_folder_that_the_pipeline_takes(run):
    results = json.loads((run / "results.json").read_text())
    assert np.isfinite(results["evaluation"]["eval_gain_db"]) and results["records_seen"] == 16
    restored = pipeline("ecg-reconstruction", model=str(run))(simulate_record(3, lead_names=["I", "II", "V2"]))
    assert restored["restored"].any() and np.isfinite(restored["signal"]).all()
    assert AnyECGForLeadReconstruction.from_pretrained(run).config.lead_covariance is not None


def test_a_u_net_by_itself_takes_no_notice_of_the_backbone(cache, tmp_path):
    network = {**NETWORK, "waveform_state_channels": 0}
    reconstruct(tmp_path, cache, "--max_steps", "1", "--eval_strategy", "no", "--keep_best", "False", network=network)
    model = AnyECGForLeadReconstruction.from_pretrained(tmp_path).eval()
    batch = {"input_values": torch.randn(1, 3, 900), "lead_ids": torch.tensor([[1, 2, 8]])}
    before = model(**batch).reconstruction
    with torch.no_grad():
        for value in model.anyecg.parameters():
            value.add_(1.0)
    assert torch.equal(model(**batch).reconstruction, before)


def test_an_evaluation_goes_through_all_cases():
    records = OneCaseEach([{"record_id": index} for index in range(12)])
    patterns = [records[index]["mask_pattern"] for index in range(12)]
    assert sorted(patterns) == sorted([*training.reconstruct.CASES, "G5"])
