"""How faithful explanations are: deletion test of `anyecg_hf.explain`, and of captum's integrated gradients, on PTB-XL fold 9.

    python -m benchmarks.explanations --checkpoint checkpoints/anyecg-small-statements --data DIR [--records 200] [--num_proc 2]

One finding a record: of the statements that the record carries and the model finds, the one that is rarest in the fold. Its
patches (seconds of a lead) are deleted, the most relevant first, the least relevant first, or in random order, and the
score is read again: the faster it falls, the more it rested on what went first. Deleted means masked, the model's own
absence (`attention_mask` 0), and, as a test that is not the occlusion's own, put flat: 0 mV and still seen. Records of which
a patch is unusable are left out. Needs captum (extra `dev`). Writes `explanations.json` and `explanations.md`; 95 % intervals
over patients.

Source: deletion test, Samek et al. 2017 (arXiv 1509.06321); integrated gradients, Sundararajan et al. 2017 (arXiv 1703.01365).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from captum.attr import IntegratedGradients
from scipy.special import expit
from transformers import pipeline

import anyecg_hf
from training.checkpointing import write_json
from training.corpora import RecordEntry, list_records
from training.ecg_metrics.patient_bootstrap import patient_bootstrap
from training.splits import spread_order

RESULTS = Path(__file__).resolve().parent / "results"
SHARES = (0.05, 0.1, 0.2, 0.4)  # of the patches that are deleted
STEPS = 16  # of the integral, Gauss-Legendre
METHODS = {"occlusion": "occlusion (`explain`)", "gradients": "integrated gradients"}
COVERS = {"masked": "masked", "flat": "put flat"}


@functools.cache
def load(checkpoint: str):
    """Return the checkpoint's pipeline, once in each process."""
    torch.set_num_threads(1)
    return pipeline("ecg-classification", model=checkpoint, device="cpu")


def measure(entry: RecordEntry, checkpoint: str, counts: Counter) -> dict | None:
    """Return log-odds of one record under deletion, by order and cover; None where there is nothing to explain."""
    pipe, record = load(checkpoint), entry.read()
    positive = {finding["label"] for finding in pipe(record) if finding["positive"]}
    found = sorted(positive & set(entry.codes or ()), key=lambda code: (counts[code], code))
    if not found:
        return None
    start = time.process_time()
    explanation = anyecg_hf.explain(pipe, record, label=found[0])
    seconds = {"occlusion": time.process_time() - start}
    if np.isnan(explanation.relevance).any():
        return None
    (item,) = pipe.preprocess(record)["items"]
    batch, index = pipe._model_inputs([item]), pipe.model.config.label2id[found[0]]
    start = time.process_time()
    gradients, gap = integrated_gradients(pipe.model, batch, index)
    seconds["gradients"] = time.process_time() - start
    orders = {"random": np.random.default_rng(list(spread_order(entry.record_id))).permutation(gradients.size)}
    for name, relevance in (("occlusion", explanation.relevance), ("gradients", gradients)):
        orders[f"{name}, most"] = np.argsort(-relevance, axis=None, kind="stable")
        orders[f"{name}, least"] = orders[f"{name}, most"][::-1]
    return {
        "record_id": entry.record_id, "patient_id": entry.patient_id, "label": found[0], "cpu_seconds": seconds,
        "gap": gap, "log_odds": deletion_curves(pipe.model, batch, index, orders),
    }  # fmt: skip


def integrated_gradients(model, batch, index: int) -> tuple[np.ndarray, float]:
    """Return the relevance `(leads, patches)` of the logit against a record of 0 mV, and by how much its sum is off."""
    method = IntegratedGradients(lambda values, ids, mask: model(values, ids, mask).logits[:, index])
    values, gap = method.attribute(
        batch["input_values"],
        baselines=0.0,
        additional_forward_args=(batch["lead_ids"], batch["attention_mask"]),
        n_steps=STEPS,
        method="gausslegendre",
        internal_batch_size=8,
        return_convergence_delta=True,
    )
    grid = (*batch["attention_mask"].shape[1:], -1)
    return values.detach().reshape(grid).sum(-1).numpy(), float(gap)


@torch.no_grad()
def deletion_curves(model, batch, index: int, orders: dict[str, np.ndarray]) -> dict[str, dict[str, list[float]]]:
    """Return the logit with nothing deleted and with each of `SHARES`, by cover and order."""
    keep = np.ones((len(orders), len(SHARES), batch["attention_mask"].numel()), np.int64)
    for row, order in enumerate(orders.values()):
        for column, share in enumerate(SHARES):
            keep[row, column, order[: round(share * len(order))]] = 0
    keep = torch.from_numpy(keep).reshape(-1, *batch["attention_mask"].shape[1:])
    whole, curves = float(model(**batch).logits[0, index]), {}
    for cover in COVERS:
        logits = []
        for part in keep.split(8):
            lead_ids = batch["lead_ids"].expand(len(part), -1)
            values = batch["input_values"].expand(len(part), -1, -1)
            if cover == "flat":
                values, part = values * part.repeat_interleave(model.config.patch_size, -1), torch.ones_like(part)
            logits.append(model(values, lead_ids, part).logits[:, index])
        rows = torch.cat(logits).reshape(len(orders), -1).tolist()
        curves[cover] = {order: [whole, *row] for order, row in zip(orders, rows, strict=True)}
    return curves


def area(curve: np.ndarray) -> np.ndarray:
    """Return the mean height of curves `(..., shares)` from nothing to the last share deleted."""
    shares = (0.0, *SHARES)
    return np.trapezoid(curve, shares) / shares[-1]


def summarise(records: list[dict], *, num_resamples: int = 1000) -> dict:
    """Return the figures of all records: areas, their distance from random with an interval over patients, costs."""
    patients = [record["patient_id"] for record in records]
    figures = {"num_records": len(records), "num_patients": len(set(patients))}
    figures["labels"] = dict(Counter(record["label"] for record in records).most_common())
    figures["cpu_seconds"] = {
        name: float(np.median([record["cpu_seconds"][name] for record in records])) for name in METHODS
    }
    figures["gradients_gap"] = float(np.median([abs(record["gap"]) for record in records]))
    for cover in COVERS:
        curves = {
            order: expit(np.array([record["log_odds"][cover][order] for record in records]))
            for order in records[0]["log_odds"][cover]
        }  # (records, shares), scores
        areas = {order: area(curve) for order, curve in curves.items()}
        interval = functools.partial(_mean_with_interval, patients=patients, num_resamples=num_resamples)
        figures[cover] = {
            order: {
                "area": float(areas[order].mean()),
                "below_random": interval(areas["random"] - areas[order]),
                "scores": curve.mean(axis=0).tolist(),
            }
            for order, curve in curves.items()
        }
        ahead = areas["gradients, most"] - areas["occlusion, most"]
        figures[cover]["occlusion, most"]["below_gradients"] = interval(ahead)
    return figures


def _mean_with_interval(values: np.ndarray, *, patients: list[str], num_resamples: int) -> list[float]:
    """Return the mean of one value a record, and the ends of its 95 % interval over patients."""
    ends = patient_bootstrap(patients, lambda rows: values[rows].mean(), num_resamples=num_resamples)
    return [float(values.mean()), *ends]


def table(figures: dict) -> str:
    """Return the figures as Markdown."""
    labels = ", ".join(f"{label} {count}" for label, count in figures["labels"].items())
    lines = [
        f"{figures['num_records']} findings in as many records of {figures['num_patients']} patients: {labels}.",
        "",
        "| deleted first | patches are | area | below random | "
        + " | ".join(f"{share:.0%}" for share in (0, *SHARES))
        + " |",
        "|---" * (5 + len(SHARES)) + "|",
    ]
    for cover, word in COVERS.items():
        for order, row in figures[cover].items():
            name, _, end = order.partition(", ")
            what = f"{end} relevant, {METHODS[name]}" if end else "random"
            below = _in_words(row["below_random"]) if end else ""
            scores = " | ".join(f"{score:.2f}" for score in row["scores"])
            lines.append(f"| {what} | {word} | {row['area']:.3f} | {below} | {scores} |")
    ahead = {cover: _in_words(figures[cover]["occlusion, most"]["below_gradients"]) for cover in COVERS}
    seconds = figures["cpu_seconds"]
    lines += [
        "",
        f"Area: mean score while 0 to {SHARES[-1]:.0%} of the patches are deleted; the right columns: mean score at each share. "
        f"With the most relevant first, occlusion lies below integrated gradients by {ahead['masked']} where patches are masked, "
        f"by {ahead['flat']} where they are put flat. "
        f"One explanation takes {seconds['occlusion']:.1f} s of one CPU core by occlusion, {seconds['gradients']:.1f} s by "
        f"integrated gradients of {STEPS} steps, whose sum is off by {figures['gradients_gap']:.2g} in the log-odds (medians).",
    ]
    return "\n".join(lines)


def _in_words(mean_and_ends: list[float]) -> str:
    mean, low, high = mean_and_ends
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a classifier of statements")
    parser.add_argument("--data", required=True, help="folder of PTB-XL")
    parser.add_argument("--records", type=int, default=200, help="how many to explain; Ctrl-C ends it before")
    parser.add_argument("--num_proc", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    entries = [entry for entry in list_records(args.data) if entry.fold == 9]
    counts = Counter(code for entry in entries for code in entry.codes)
    entries.sort(key=lambda entry: spread_order(entry.record_id))
    work = functools.partial(measure, checkpoint=args.checkpoint, counts=counts)
    records = []
    with get_context("spawn").Pool(args.num_proc) as pool, contextlib.suppress(KeyboardInterrupt):
        for record in pool.imap(work, entries):
            records += [record] if record else []
            print(f"\r{len(records)} of {args.records}", end="", flush=True)
            if len(records) >= args.records:
                break
    figures = summarise(records)
    write_json(args.out / "explanations.json", figures)
    command = f"python -m benchmarks.explanations --checkpoint {args.checkpoint} --data DIR --records {len(records)}"
    text = f"# Explanations\n\n`{command}`\n\n{table(figures)}\n"
    (args.out / "explanations.md").write_text(text, encoding="utf-8")
    print(f"\n{table(figures)}")


if __name__ == "__main__":
    main()
