"""What one record costs on one core, from the file to the findings, beside networks of the sizes of others:

    python -m benchmarks.inference [--rounds 20] [--out benchmarks/results]

A 12-lead record of 10 s at 500 Hz (simulated, WFDB) is read, extracted and classified: by the shipped classifier in PyTorch,
in onnxruntime, and in onnxruntime with 8-bit weights. Beside it forward passes alone, on random numbers, of networks with random
weights: xresnet1d101, Net1D as in ECGFounder's code and widened to 76 M parameters, a wav2vec 2.0 of 90 M built as ECG-FM's
(12 channels, 500 Hz, two segments of 5 s). All take turns within a round, one record at a time and in batches of 32, on one
thread; times are of processor time, which other work on the machine moves less than the clock; the clock is given too.
Needs the extra `onnx`. About ten minutes; prints a table and writes `inference.json` and `inference.md`.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy: one core

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoModelForSequenceClassification, Wav2Vec2Config, Wav2Vec2Model  # noqa: E402

from anyecg_hf import read_record  # noqa: E402
from training.checkpointing import load_extractor, write_json  # noqa: E402
from training.export_onnx import FLOAT, INT8, export, open_session, run_session  # noqa: E402

from .baselines import NETWORKS  # noqa: E402
from .baselines.speed import count_flops  # noqa: E402
from .reading import write_record  # noqa: E402

CHECKPOINT = "checkpoints/anyecg-small-statements"
NUM_LABELS, BATCH = 71, 32
ECGFOUNDER = {"stage_channels": [64, 160, 160, 400, 400, 1024, 1024], "stage_blocks": [2, 2, 2, 3, 3, 4, 4]}
WIDE = {**ECGFOUNDER, "stage_channels": [96, 256, 256, 640, 640, 1648, 1648]}
AT_500_HZ = {"sampling_rate": 500, "decimation": 1}
OURS = ("PyTorch", "onnxruntime", "onnxruntime, int8")
LARGE = ("Net1D, 76 M", "wav2vec 2.0, 90 M")
GOAL = 5


class Wav2Vec2Ecg(nn.Module):
    """The library's wav2vec 2.0 in the size of ECG-FM, whose first convolution takes 12 channels; the mean over a record.

    Source: fairseq-signals, `models/conv_transformer.py`: four convolutions of 256 channels, width and stride 2; 12 layers, 768.
    """

    segment_samples = 2500

    def __init__(self, **options):
        super().__init__()
        convolutions = {"conv_dim": (256,) * 4, "conv_kernel": (2,) * 4, "conv_stride": (2,) * 4}
        self.wav2vec2 = Wav2Vec2Model(Wav2Vec2Config(**convolutions, **options))
        self.wav2vec2.feature_extractor.conv_layers[0].conv = nn.Conv1d(12, 256, 2, stride=2, bias=False)
        self.classifier = nn.Linear(self.wav2vec2.config.hidden_size, NUM_LABELS)

    def forward(self, input_values, **kwargs):
        """Return logits `(B, labels)` for `input_values` (B, 12, T), T a multiple of the segment."""
        segments = input_values.unflatten(-1, (-1, self.segment_samples)).movedim(2, 1)
        x = segments.flatten(0, 1)  # (B * segments, 12, samples)
        for layer in self.wav2vec2.feature_extractor.conv_layers:
            x = layer(x)
        states, _ = self.wav2vec2.feature_projection(x.transpose(1, 2))
        states = self.wav2vec2.encoder(states).last_hidden_state
        return self.classifier(states.unflatten(0, (len(input_values), -1)).mean((1, 2)))


def build_others() -> dict[str, nn.Module]:
    """Return the networks beside ours, with random weights, in evaluation mode."""
    xresnet_config, xresnet = NETWORKS["xresnet1d101"]
    net1d_config, net1d = NETWORKS["net1d"]
    networks = {
        "xresnet1d101": xresnet(xresnet_config(num_labels=NUM_LABELS)),
        "Net1D, as ECGFounder": net1d(net1d_config(num_labels=NUM_LABELS, **ECGFOUNDER, **AT_500_HZ)),
        LARGE[0]: net1d(net1d_config(num_labels=NUM_LABELS, **WIDE, **AT_500_HZ)),
        LARGE[1]: Wav2Vec2Ecg(),
    }
    return {name: network.eval() for name, network in networks.items()}


def make_batch(network: nn.Module, size: int) -> dict[str, torch.Tensor]:
    """Return random records of 12 leads and 10 s at the rate that a network takes."""
    rate = getattr(getattr(network, "config", None), "sampling_rate", 500)
    return {
        "input_values": torch.randn(size, 12, 10 * rate) * 0.2,
        "lead_ids": torch.arange(1, 13).expand(size, -1),
        "attention_mask": torch.ones(size, 12, 10, dtype=torch.long),
    }


def list_steps(folder: Path, others: dict[str, nn.Module]) -> dict[tuple[str, str], tuple[int, Callable]]:
    """Return what is measured: (what, how) -> (records of a call, the call)."""
    path = write_record(folder)
    export(CHECKPOINT, folder / "onnx", int8=True)
    extractor, record = load_extractor(CHECKPOINT), read_record(path)
    model = AutoModelForSequenceClassification.from_pretrained(CHECKPOINT).eval()
    sessions = [open_session(folder / "onnx" / name, num_threads=1) for name in (FLOAT, INT8)]

    def classify(batch, session=None):
        if session is None:
            return model(**{name: torch.as_tensor(value) for name, value in batch.items()}).logits.sigmoid()
        return 1 / (1 + np.exp(-run_session(session, batch)["logits"]))

    one, many = extractor(record), extractor([record] * BATCH)
    steps = {
        ("read", "one"): (1, lambda: read_record(path)),
        ("extract", "one"): (1, lambda: extractor(record)),
        ("extract", "batch"): (BATCH, lambda: extractor([record] * BATCH)),
    }
    for name, session in zip(OURS, (None, *sessions), strict=True):
        steps[name, "one"] = (1, lambda s=session: classify(one, s))
        steps[name, "batch"] = (BATCH, lambda s=session: classify(many, s))
        steps[name, "file to findings"] = (1, lambda s=session: classify(extractor(read_record(path)), s))
    for name, network in others.items():
        single, batch = make_batch(network, 1), make_batch(network, BATCH)
        steps[name, "one"] = (1, lambda n=network, b=single: n(**b))
        steps[name, "batch"] = (BATCH, lambda n=network, b=batch: n(**b))
    return steps


@torch.inference_mode()
def measure(steps: dict, rounds: int, batch_rounds: int) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Return milliseconds a record of each round by "processor" and "clock"; the first, without batches, is not counted."""
    found = {step: {"processor": [], "clock": []} for step in steps}
    for turn in range(rounds + 1):
        for step, (size, call) in steps.items():
            if step[1] == "batch" and not 1 <= turn <= batch_rounds:
                continue
            started = time.process_time(), time.perf_counter()
            call()
            spent = time.process_time() - started[0], time.perf_counter() - started[1]
            for clock, seconds in zip(("processor", "clock"), spent, strict=True):
                found[step][clock] += [1e3 * seconds / size] * (turn > 0)
    return {step: {clock: np.array(values) for clock, values in times.items()} for step, times in found.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Return median and quartiles."""
    quartiles = np.percentile(values, (25, 50, 75))
    return {name: round(float(value), 4) for name, value in zip(("q1", "median", "q3"), quartiles, strict=True)}


def summarize(times: dict, others: dict[str, nn.Module]) -> dict:
    """Return all figures; ratios are of a network's pass alone to ours in PyTorch, or to all of ours, from the file."""
    model = AutoModelForSequenceClassification.from_pretrained(CHECKPOINT).eval()
    networks = dict.fromkeys(OURS, model) | others
    results = {
        "steps": {
            f"{what}, {how}": {clock: spread(values) for clock, values in each.items()}
            for (what, how), each in times.items()
        },
        "networks": {},
    }
    for name, network in networks.items():
        batch = {**make_batch(network, 2), "labels": torch.zeros(2, NUM_LABELS)}
        figures = {
            "million_parameters": sum(weight.numel() for weight in network.parameters()) / 1e6,
            "mega_flops_a_record": count_flops(network, batch) / 1e6,
            "batch_records_a_second": spread(1e3 / times[name, "batch"]["processor"]),
        }
        for how in ("one", "batch"):
            figures[f"times_ours_{how}"] = _ratio(times, (name, how), (OURS[0], how))
        for route in OURS[:2]:
            figures[f"times_ours_from_the_file_{route}"] = _ratio(times, (name, "one"), (route, "file to findings"))
        results["networks"][name] = figures
    return results


def _ratio(times: dict, step: tuple[str, str], base: tuple[str, str]) -> dict[str, float]:
    """Return how many times the processor time of `base` a step takes in the same round."""
    return spread(times[step]["processor"] / times[base]["processor"])


def _told(figures: dict[str, float], digits: int = 1) -> str:
    return f"{figures['median']:.{digits}f} ({figures['q1']:.{digits}f} to {figures['q3']:.{digits}f})"


def table(results: dict) -> str:
    """Return the page of a run: median and, in brackets, quartiles over rounds."""
    steps, networks = results["steps"], results["networks"]
    lines = ["| one record | ms, processor | ms, clock |", "|---|---|---|"]
    for name, each in steps.items():
        if not name.endswith("batch") and name.startswith(("read", "extract", *OURS)):
            lines.append(f"| {name} | {_told(each['processor'])} | {_told(each['clock'])} |")
    lines += [
        "",
        "| network | million parameters | MFLOPs a record | ms, one record | times ours | "
        f"records/s, batches of {BATCH} | times ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in networks.items():
        label = f"anyecg-small, {name}" if name in OURS else name
        size = f"{each['million_parameters']:.1f} | {each['mega_flops_a_record']:.0f}"
        one, many = (steps[f"{name}, one"]["processor"], each["times_ours_one"]), each["batch_records_a_second"]
        told = [_told(value) for value in (*one, many, each["times_ours_batch"])]
        lines.append(f"| {label} | {size} | {' | '.join(told)} |")
    lines += ["", *(_verdict(name, networks[name]) for name in LARGE), "", results["machine"]]
    return "\n".join(lines)


def _verdict(name: str, figures: dict) -> str:
    """Return a line that says where a larger network costs the goal's multiple of ours."""
    ratios = {
        "its pass to ours": figures["times_ours_one"],
        "in batches": figures["times_ours_batch"],
        "its pass to reading, extraction and pass of ours": figures[f"times_ours_from_the_file_{OURS[0]}"],
        f"the same in {OURS[1]}": figures[f"times_ours_from_the_file_{OURS[1]}"],
    }
    told = [f"{what} {_told(each)}{'' if each['median'] >= GOAL else ', **missed**'}" for what, each in ratios.items()]
    return f"- {name}, wanted {GOAL} times: {'; '.join(told)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of one record")
    parser.add_argument("--batch_rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    others = build_others()
    with tempfile.TemporaryDirectory() as folder:
        times = measure(list_steps(Path(folder), others), args.rounds, args.batch_rounds)
    results = summarize(times, others)
    versions = ", ".join(f"{each.__name__} {each.__version__}" for each in (torch, onnxruntime, transformers, np))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    results["machine"] = f"{platform.machine()}, one thread of {os.cpu_count()} cores, load {load:.1f}; {versions}"
    write_json(args.out / "inference.json", results)
    head = (
        f"# Inference\n\n`python -m benchmarks.inference`: {args.rounds} rounds, {args.batch_rounds} of batches; median and, in "
        f"brackets, quartiles.\nTimes ours: processor time against `anyecg-small, {OURS[0]}` in the same round. Networks beside "
        "ours: the pass alone, in PyTorch, without reading and filtering."
    )
    (args.out / "inference.md").write_text(f"{head}\n\n{table(results)}\n")
    print(table(results))


if __name__ == "__main__":
    main()
