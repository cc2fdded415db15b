"""How good a rhythm codebook is: usage, perplexity, and the share of held-out waveform variance that its codes explain.

    python -m tokenization.codebook_health --checkpoint DIR --data DIR

The bar is k-means on raw patches with as many codes, measured on the same patches: a codebook that does not pass it
has learned less than a minute of clustering would give. Figures by thirds of the patches' range show whether small
patches are thrown away.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch.utils.data import DataLoader

from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer
from training.checkpointing import load_extractor, write_json
from training.collate import ECGCollator
from training.data import DataArguments, ECGDataset, load_splits
from training.splits import spread_order

logger = logging.getLogger(__name__)

KMEANS_ITERATIONS = 20
KMEANS_PATCHES = 60_000
BATCH_SIZE = 16


@dataclass
class CodedPatches:
    """The usable patches of some records, and what the quantizer makes of them."""

    patches: np.ndarray  # float32 (num, patch_size), mV
    reconstruction: np.ndarray  # the same shape
    codes: np.ndarray  # int64 (num,)


def codebook_report(coded: CodedPatches, codebook_size: int) -> dict[str, float]:
    """Return usage, perplexity, share of the biggest code and explained variance, also by thirds of patch range."""
    shares = code_shares(coded.codes, codebook_size)
    report = {
        "num_patches": len(coded.codes),
        "usage": float((shares > 0).mean()),
        "perplexity": perplexity_of(shares),
        "biggest_code": float(shares.max()),
        "fve": explained_variance(coded.patches, coded.reconstruction),
    }
    ranges = np.ptp(coded.patches, axis=1)
    edges = np.quantile(ranges, [1 / 3, 2 / 3])
    for third, name in enumerate(("low", "middle", "high")):
        chosen = np.searchsorted(edges, ranges, side="right") == third
        report[f"fve_{name}_range"] = explained_variance(coded.patches[chosen], coded.reconstruction[chosen])
        report[f"perplexity_{name}_range"] = perplexity_of(code_shares(coded.codes[chosen], codebook_size))
    return report | {"range_edges_mv": [float(edge) for edge in edges]}


def code_shares(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """Return the share of each code among `codes` (all valid), `(codebook_size,)`."""
    return np.bincount(codes, minlength=codebook_size) / max(len(codes), 1)


def perplexity_of(shares: np.ndarray) -> float:
    """Return exp of the entropy of `shares`: the number of equally used codes that would carry as much."""
    used = shares[shares > 0]
    return float(np.exp(-(used * np.log(used)).sum()))


def explained_variance(patches: np.ndarray, reconstruction: np.ndarray) -> float:
    """Return 1 - squared error / squared deviation from the mean, over all samples of `patches` (num, patch_size)."""
    patches = patches.astype(np.float64)
    total = np.square(patches - patches.mean()).sum()
    return float(1 - np.square(patches - reconstruction).sum() / total) if total > 0 else float("nan")


def kmeans_report(
    train_patches: np.ndarray, held_out: np.ndarray, codebook_size: int, *, seed: int = 0
) -> dict[str, float]:
    """Return the same report for k-means on raw patches: fitted on `train_patches`, measured on `held_out`.

    Both are float32 `(num, patch_size)` in millivolt.
    """
    return codebook_report(code_by_kmeans(fit_kmeans(train_patches, codebook_size, seed=seed), held_out), codebook_size)


def fit_kmeans(train_patches: np.ndarray, codebook_size: int, *, seed: int = 0) -> KMeans:
    """Return k-means on raw patches, float32 `(num, patch_size)` in millivolt, with `codebook_size` centres."""
    model = KMeans(codebook_size, init="random", n_init=1, max_iter=KMEANS_ITERATIONS, tol=0.0, random_state=seed)
    return model.fit(train_patches)


def code_by_kmeans(model: KMeans, patches: np.ndarray) -> CodedPatches:
    """Return `patches` (num, patch_size) with the number of the nearest centre as code and the centre as waveform."""
    codes = np.concatenate([model.predict(chunk) for chunk in np.array_split(patches, max(1, len(patches) // 20_000))])
    return CodedPatches(patches, model.cluster_centers_[codes].astype(np.float32), codes.astype(np.int64))


def sample_of(dataset: ECGDataset, num_records: int) -> ECGDataset:
    """Return a fixed sample of `num_records` records, the same for every run."""
    names = dataset.column("record_id")
    order = sorted(range(len(dataset)), key=lambda index: spread_order(names[index]))
    return dataset.take(order[:num_records])


def batches_of(dataset: ECGDataset, collator: ECGCollator, *, batch_size: int = BATCH_SIZE) -> Iterator[dict]:
    return iter(DataLoader(dataset, batch_size=batch_size, collate_fn=collator))


def usable_patches(batch: dict[str, torch.Tensor], patch_size: int) -> torch.Tensor:
    """Return the patches of a batch that are real, `(num, patch_size)`."""
    mask = batch["attention_mask"].bool()
    return batch["input_values"].view(*mask.shape, patch_size)[mask]


@torch.no_grad()
def code_records(model: AnyECGRhythmQuantizer, dataset: ECGDataset, collator: ECGCollator) -> CodedPatches:
    """Return all usable patches of `dataset` with their codes and their waveform decoded from the codes."""
    model.eval()
    patches, decoded, codes = [], [], []
    for batch in batches_of(dataset, collator):
        batch = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
        inputs = (batch["input_values"], batch["lead_ids"], batch["attention_mask"])
        batch_codes = model.encode(*inputs)
        batch_decoded = model.decode(batch_codes, *inputs[1:])
        patches.append(usable_patches(batch, model.config.patch_size).cpu())
        decoded.append(usable_patches(batch | {"input_values": batch_decoded}, model.config.patch_size).cpu())
        codes.append(batch_codes[batch_codes >= 0].cpu())
    return CodedPatches(*(torch.cat(parts).numpy() for parts in (patches, decoded, codes)))


def gather_patches(dataset: ECGDataset, collator: ECGCollator, *, num_patches: int, seed: int = 0) -> np.ndarray:
    """Return `num_patches` usable patches (fewer where there are not so many), drawn from a sample of the records."""
    patch_size, per_record = collator.patch_size, 40
    chosen = sample_of(dataset, max(1, num_patches // per_record))
    found = [usable_patches(batch, patch_size).numpy() for batch in batches_of(chosen, collator)]
    patches = np.concatenate(found)
    order = np.random.default_rng(seed).permutation(len(patches))[:num_patches]
    return patches[np.sort(order)]


def measure(model: AnyECGRhythmQuantizer, train: ECGDataset, held_out: ECGDataset, collator: ECGCollator) -> dict:
    """Return `{"quantizer": ..., "kmeans": ..., "passes": ...}` on the held-out records."""
    codebook_size = model.config.codebook_size
    coded = code_records(model, held_out, collator)
    own = codebook_report(coded, codebook_size)
    patches = gather_patches(train, collator, num_patches=KMEANS_PATCHES)
    if len(patches) < codebook_size:
        logger.warning(
            "%d training patches are too few for k-means with %d codes: no baseline", len(patches), codebook_size
        )
        return {"quantizer": own, "kmeans": None, "passes": None}
    baseline = kmeans_report(patches, coded.patches, codebook_size)
    return {"quantizer": own, "kmeans": baseline, "passes": own["fve"] > baseline["fve"]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a quantizer")
    parser.add_argument("--data", nargs="+", required=True, help="as for the training commands; fold 9 is measured")
    parser.add_argument("--num_records", type=int, default=600, help="held-out records (a fixed sample)")
    parser.add_argument("--output", help="JSON file; default: codebook_health.json in the checkpoint")
    args = parser.parse_args(argv)

    model = AnyECGRhythmQuantizer.from_pretrained(args.checkpoint)
    collator = ECGCollator(load_extractor(args.checkpoint))
    train, held_out = load_splits(DataArguments(data=args.data), collator.extractor, seed=0)
    report = measure(model, train, sample_of(held_out, args.num_records), collator)
    write_json(args.output or Path(args.checkpoint) / "codebook_health.json", report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
