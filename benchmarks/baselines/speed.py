"""Parameters, work and training speed of every network beside AnyECG's, on one core:

    OMP_NUM_THREADS=1 python -m benchmarks.baselines.speed [--rounds 3] [--seconds 5] [--batch 32]

Speeds are per second of processor time, so that other work on the machine matters little; networks take turns, and the speed
relative to anyecg-small is the median over rounds. A step is forward, backward and AdamW on random records of 12 leads and
10 s; reading and filtering are left out. FLOPs are those of the matrix products and convolutions of one record's forward
pass in training (S4D's FFTs are not counted).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.modeling_anyecg_heads import AnyECGForSequenceClassification

from . import NETWORKS

NUM_LABELS = 71


def build_networks() -> dict[str, torch.nn.Module]:
    """Return all networks for 71 statements, in training mode, AnyECG's small one first."""
    small = AnyECGConfig.from_preset("small", num_labels=NUM_LABELS)
    dense = AnyECGConfig.from_preset(
        "small", num_labels=NUM_LABELS, sparse_attention_config={"time_tolerance": small.max_patches - 1}
    )
    networks = {
        "anyecg-small": AnyECGForSequenceClassification(small),
        "anyecg-small, dense": AnyECGForSequenceClassification(dense),
    }
    for name, (config_class, model_class) in NETWORKS.items():
        networks[name] = model_class(config_class(num_labels=NUM_LABELS))
    return {name: network.train() for name, network in networks.items()}


def make_batch(size: int) -> dict[str, torch.Tensor]:
    """Return `size` random records of 12 leads and 10 s at 300 Hz with labels."""
    return {
        "input_values": torch.randn(size, 12, 3000) * 0.2,
        "lead_ids": torch.arange(1, 13).expand(size, -1),
        "attention_mask": torch.ones(size, 12, 10, dtype=torch.long),
        "labels": (torch.rand(size, NUM_LABELS) < 0.04).float(),
    }


def count_flops(network: torch.nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Return the floating-point operations of the forward pass a record: two for a product that is added."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(**batch)
    return counter.get_total_flops() / len(batch["labels"])


def measure(network: torch.nn.Module, batch: dict[str, torch.Tensor], seconds: float) -> float:
    """Return the records a second of training steps, after one that is not counted; `seconds` are of processor time."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    num_steps, start = -1, 0.0
    while num_steps < 1 or time.process_time() - start < seconds:
        network(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        num_steps += 1
        if num_steps == 0:
            start = time.process_time()
    return num_steps * len(batch["labels"]) / (time.process_time() - start)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each network in a round")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    networks, batch = build_networks(), make_batch(args.batch)
    speeds = {name: [] for name in networks}
    for _ in range(args.rounds):
        for name, network in networks.items():
            speeds[name].append(measure(network, batch, args.seconds))
    first = next(iter(speeds.values()))
    print(f"{torch.get_num_threads()} thread(s), batch {args.batch}, float32")
    print("| network | million parameters | MFLOPs a record, forward | records/s of a core | times anyecg-small |")
    print("|---|---|---|---|---|")
    for name, network in networks.items():
        millions = sum(value.numel() for value in network.parameters()) / 1e6
        relative = statistics.median(own / other for own, other in zip(speeds[name], first, strict=True))
        flops, speed = count_flops(network, batch) / 1e6, statistics.median(speeds[name])
        print(f"| {name} | {millions:.2f} | {flops:.0f} | {speed:.1f} | {relative:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
