"""Memory by arithmetic and the GPU benchmark: what they count, and that they run where there is no card."""

import json

import pytest
import torch

from benchmarks import gpu_training, memory


@pytest.mark.parametrize("preset", memory.PRESETS)
def test_every_preset_is_built_without_memory_for_its_weights(preset):
    millions = [memory.count_parameters(objective, preset).trained / 1e6 for objective in memory.OBJECTIVES]
    backbone = {"tiny": 0.9, "small": 3.1, "medium": 16.7, "base": 92.7, "large": 312.4, "xl": 1491.1}[preset]
    assert millions[0] == pytest.approx(backbone, abs=0.06) and all(value > 0 for value in millions)


@pytest.mark.parametrize("objective", memory.OBJECTIVES)
def test_what_autograd_keeps_of_the_whole_depth_follows_from_one_and_two_layers(objective):
    counts = memory.count(objective, "tiny")
    whole = memory.bytes_a_record(objective, "tiny", counts.num_layers)
    assert counts.activations(checkpointing=False) == pytest.approx(whole, rel=0.01)
    assert counts.activations(checkpointing=True) < whole


@pytest.mark.parametrize("preset", ["large", "xl"])
def test_the_largest_sizes_give_logits_of_the_promised_shape(preset):
    with torch.device("meta"):
        objective = memory.build("masked_codes", preset)
    batch = memory.make_batch(2, objective.model.config.patch_size, 8192)
    batch = {name: value.to("meta") for name, value in batch.items()}
    names = ("input_values", "lead_ids", "attention_mask", "bool_masked_pos")
    assert objective.model(*(batch[name] for name in names)).logits.shape == (2, 12, 10, 8192)


def test_shards_divide_what_is_trained_and_leave_the_activations():
    counts = memory.count("masked_codes", "tiny")
    one, eight = (
        memory.gibibytes(counts, batch_size=4, num_gpus=num, in_shards=num > 1, checkpointing=False) for num in (1, 8)
    )
    assert eight["AdamW"] == pytest.approx(one["AdamW"] / 8) and eight["activations"] == one["activations"]


def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path, capsys):
    options = ["--device", "cpu", "--presets", "tiny", "--batch", "1", "--steps", "1", "--out", str(tmp_path)]
    gpu_training.main(options)
    report = json.loads((tmp_path / "gpu_training.json").read_text())
    assert 0 < report["rows"][0]["mfu"] and report["rows"][0]["parameters"] > 800_000
    assert "| tiny | 0.9 | 1 |" in capsys.readouterr().out
