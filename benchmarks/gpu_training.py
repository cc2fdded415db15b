"""Tokens a second, peak memory and model-FLOPs utilisation of pretraining, against the matrix products that the card reaches.

    python -m benchmarks.gpu_training [--device cuda] [--presets base large xl] [--batch 64] [--steps 10]

A step is forward, backward and AdamW on masked codes in bf16 autocast, 12 leads x 10 s, codes given; xl computes its layers
again in the backward pass. Model FLOPs are three times those of the forward pass, as counted by PyTorch, so that what is
computed again does not count. The peak is the best of several large bf16 products. `--device cpu --presets tiny` runs the
same code where there is no card. Prints a table; with --out writes `gpu_training.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from .memory import LEADS, PRESETS, SECONDS, build, make_batch

CHECKPOINTED = ("xl",)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run, device: torch.device, *, repeats: int) -> float:
    """Return the mean time of `run` after one that warms up."""
    run()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def matmul_peak(device: torch.device) -> float:
    """Return the FLOPs a second of the fastest of some square bf16 products."""
    best = 0.0
    for size in (4096, 8192, 16384) if device.type == "cuda" else (256, 512):
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        seconds = seconds_of(lambda a=a, b=b: a @ b, device, repeats=20)
        best = max(best, 2 * size**3 / seconds)
    return best


def forward_flops(objective, batch: dict[str, torch.Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        objective(**batch)
    return counter.get_total_flops()


def measure(preset: str, device: torch.device, *, batch_size: int, steps: int) -> dict:
    """Return the figures of one preset."""
    torch.manual_seed(0)
    with device:
        objective = build("masked_codes", preset).train()
    config = objective.model.config
    batch = make_batch(batch_size, config.patch_size, config.codebook_size, device=device)
    flops = 3 * forward_flops(objective, batch)
    if preset in CHECKPOINTED:
        objective.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step():
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = objective(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(step, device, repeats=steps)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "preset": preset, "parameters": sum(value.numel() for value in objective.parameters()), "batch": batch_size,
        "checkpointing": preset in CHECKPOINTED, "seconds_a_step": seconds,
        "tokens_a_second": batch_size * LEADS * SECONDS / seconds, "peak_gib": peak, "flops_a_second": flops / seconds,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--presets", nargs="+", default=["base", "large", "xl"], choices=PRESETS)
    parser.add_argument("--batch", type=int, default=64, help="records a step")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, after one that warms up")
    parser.add_argument("--out", help="folder for gpu_training.json")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    peak = matmul_peak(device)
    print(f"{name}: {peak / 1e12:.2f} TFLOP/s in bf16 products")
    print("| preset | M parameters | batch | checkpointing | tokens/s | s a step | peak GiB | TFLOP/s | MFU |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for preset in args.presets:
        row = measure(preset, device, batch_size=args.batch, steps=args.steps)
        row["mfu"] = row["flops_a_second"] / peak
        rows.append(row)
        memory = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        print(
            f"| {preset} | {row['parameters'] / 1e6:.1f} | {args.batch} | {'yes' if row['checkpointing'] else 'no'} | "
            f"{row['tokens_a_second']:.0f} | {row['seconds_a_step']:.3f} | {memory} | "
            f"{row['flops_a_second'] / 1e12:.3f} | {row['mfu']:.2f} |",
            flush=True,
        )
    if args.out:
        report = {"device": name, "matmul_flops_a_second": peak, "rows": rows, "torch": torch.__version__}
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "gpu_training.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
