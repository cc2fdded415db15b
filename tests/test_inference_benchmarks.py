"""benchmarks/inference.py and onnx_int8.py: networks have the sizes they are named after, ratios and losses are what they say."""

import numpy as np
import pytest
import torch

for package in ("onnx", "onnxruntime"):
    pytest.importorskip(package, reason=f'ONNX needs {package}: pip install "anyecg-hf[onnx]"')

from benchmarks import inference, onnx_int8  # noqa: E402
from benchmarks.baselines.net1d import Net1d, Net1dConfig  # noqa: E402
from training.classifier_report import Predictions  # noqa: E402
from training.labels import build_task  # noqa: E402


def test_the_networks_beside_ours_have_the_sizes_that_their_names_say():
    with torch.device("meta"):
        networks = inference.build_others()
    millions = {name: sum(each.numel() for each in network.parameters()) / 1e6 for name, network in networks.items()}
    expected = {"xresnet1d101": 1.9, "Net1D, as ECGFounder": 30.7, "Net1D, 76 M": 76.4, "wav2vec 2.0, 90 M": 90.4}
    assert millions == pytest.approx(expected, abs=0.05)


def test_the_wav2vec_sees_both_segments_of_each_record_of_its_own():
    torch.manual_seed(0)
    network = inference.Wav2Vec2Ecg(hidden_size=48, num_hidden_layers=1, intermediate_size=48).eval()
    batch = inference.make_batch(network, 2)["input_values"]
    with torch.inference_mode():
        expected = network(batch)
        for half in (slice(0, 2500), slice(2500, 5000)):
            other = batch.clone()
            other[1, :, half] = 0
            found = network(other)
            assert found.shape == (2, 71)
            torch.testing.assert_close(found[0], expected[0])
            assert not torch.allclose(found[1], expected[1], atol=1e-3)


def test_each_step_is_timed_in_each_round_but_the_first():
    calls = []
    steps = {("a", "one"): (1, lambda: calls.append("one")), ("a", "batch"): (32, lambda: calls.append("batch"))}
    times = inference.measure(steps, rounds=3, batch_rounds=2)
    assert calls == ["one", "one", "batch", "one", "batch", "one"]
    assert [len(times[step]["processor"]) for step in steps] == [3, 2]


def test_ratios_are_of_a_round_and_a_goal_that_is_missed_is_said_to_be():
    networks = {
        name: Net1d(Net1dConfig(stage_channels=[16], stage_blocks=[1], stem_channels=16, num_labels=71))
        for name in inference.LARGE
    }
    cost = {
        inference.OURS[0]: 10,
        inference.OURS[1]: 8,
        inference.OURS[2]: 7,
        inference.LARGE[0]: 55,
        inference.LARGE[1]: 500,
    }
    rounds = np.array([1.0, 3.0])  # the machine is three times as slow in the second: the ratio is the same
    steps = {("read", "one"): 1, ("extract", "one"): 3}
    for name, ms in cost.items():
        steps |= {(name, "one"): ms, (name, "batch"): ms}
        steps |= {(name, "file to findings"): ms + 4} if name in inference.OURS else {}
    times = {step: {"processor": ms * rounds, "clock": 2 * ms * rounds} for step, ms in steps.items()}
    results = inference.summarize(times, networks) | {"machine": ""}
    assert results["networks"][inference.LARGE[0]]["times_ours_one"] == {"q1": 5.5, "median": 5.5, "q3": 5.5}
    page = inference.table(results)
    first, second = (
        next(line for line in page.splitlines() if line.startswith(f"- {name}")) for name in inference.LARGE
    )
    assert "its pass to ours 5.5 (5.5 to 5.5);" in first and "missed" not in second
    assert first.count("missed") == 2  # 55 / 14 and 55 / 12


def test_the_loss_of_8_bits_is_the_fall_of_auroc_on_the_same_records():
    task, generator = build_task("statements"), np.random.default_rng(0)
    targets = (generator.random((200, 71)) < 0.1).astype(np.float32)
    logits = 3 * targets + generator.normal(size=targets.shape)
    patients = [str(row // 2) for row in range(200)]
    good, bad = (
        Predictions(task, each.astype(np.float32), targets, patients, None)
        for each in (logits, logits + 3 * generator.normal(size=logits.shape))
    )
    loss = onnx_int8.losses(good, bad, 20)
    assert loss["macro_auroc"] == pytest.approx(good.figures()["macro_auroc"] - bad.figures()["macro_auroc"])
    assert loss["macro_auroc"] > 0.05 and onnx_int8.losses(good, good, 2)["macro_auroc"] == 0
