"""Encode records: one rhythm code a patch, written as Parquet shards that stage two reads instead of the quantizer.

    python -m tokenization.encode --checkpoint TOKENIZER_DIR --data DIR [DIR2 ...] --out CODES_DIR
    accelerate launch -m training.pretrain training/recipes/small_pretrain.yaml --data DIR [DIR2 ...] \
        --codes CODES_DIR --max_shift_seconds 0

Records are prepared as in training, by the tokenizer's extractor and in the same cache. A record longer than
--window_seconds is coded window by window, for a code depends on what else is in the window; stage two then trains on one
of these windows at random, and evaluates on the middle one. What is in a row and in the metadata: `training.code_shards`.

The same command again goes on with the next shard. What stage two does with the shards equals what it does with the
quantizer to the bit on the same kind of device; between kinds a code may differ where two are equally near. Augmentations
that alter the signal are refused there; with `max_leads` or `lead_subset_probability` the codes stay those of the whole
record, while the quantizer would not see the dropped leads either.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer
from training.checkpointing import load_extractor, project_path
from training.code_shards import (
    CodeOrigin,
    extractor_options,
    read_metadata,
    shard_bytes,
    shard_name,
    shard_names,
    weights_sha256,
)
from training.collate import ECGCollator
from training.commands import run_command
from training.data import DataArguments, ECGDataset, list_sources, load_folds
from training.objectives.masked_codes import encode_batch
from training.shards import UNFINISHED, Output
from training.splits import NUM_FOLDS

logger = logging.getLogger(__name__)

SHARD_RECORDS = 50_000


def write_shards(
    quantizer: AnyECGRhythmQuantizer,
    records: ECGDataset,
    collator: ECGCollator,
    origin: CodeOrigin,
    out: Output,
    *,
    batch_size: int = 32,
    shard_records: int = SHARD_RECORDS,
) -> int:
    """Write the codes of `records`, and return how many shards that took; those that are there are kept.

    Raises:
        ValueError: `out` holds codes of other records, or made otherwise.
    """
    places = [range(len(records))[start : start + shard_records] for start in range(0, len(records), shard_records)]
    parts = {shard_name(number, len(places)): records.take(place) for number, place in enumerate(places)}
    digests = {name: _digest(part, origin) for name, part in parts.items()}
    with out.alone():
        missing = _missing(out, digests)
        for name in missing:
            rows = list(encode_records(quantizer, parts[name], collator, batch_size=batch_size))
            out.write(name, shard_bytes(rows, origin, digests[name]))
            logger.info("%s: %d records in %d windows", name, len(parts[name]), len(rows))
    return len(missing)


def encode_records(
    quantizer: AnyECGRhythmQuantizer, records: ECGDataset, collator: ECGCollator, *, batch_size: int = 32
) -> Iterator[dict]:
    """Yield a row of `training.code_shards` for each window of each record, but those without a usable patch."""
    windows = _windows(records, collator)
    while batch := list(islice(windows, batch_size)):
        tensors = collator([item for _, item in batch])
        codes = encode_batch(quantizer, {name: value.to(quantizer.device) for name, value in tensors.items()})
        for (facts, item), found in zip(batch, codes.cpu().numpy(), strict=True):
            num_leads, num_patches = item["mask"].shape
            yield facts | {"num_patches": num_patches, "codes": found[:num_leads, :num_patches]}


def _windows(records: ECGDataset, collator: ECGCollator) -> Iterator[tuple[dict, dict]]:
    """Yield what tells a window from others, and the window as an item for the collator."""
    length, patch_size = collator.window_patches, collator.patch_size
    for index, (store, row) in enumerate(tqdm(records.rows, desc="encoding", unit="record", mininterval=1.0)):
        item = records[index]
        facts = {name: store.columns[name][row] for name in ("record_id", "patient_id", "fold", "lead_ids")}
        facts["source"] = store.meta["source"]
        for first in range(0, item["mask"].shape[1], length):
            mask = item["mask"][:, first : first + length]
            steps = item["steps"][:, first * patch_size : (first + length) * patch_size]
            if mask.any():
                yield facts | {"first_patch": first}, item | {"steps": steps, "mask": mask}


def _digest(records: ECGDataset, origin: CodeOrigin) -> str:
    names = [(store.meta["source"], store.columns["record_id"][row]) for store, row in records.rows]
    return hashlib.sha256(json.dumps([asdict(origin), names], sort_keys=True).encode()).hexdigest()


def _missing(out: Output, digests: dict[str, str]) -> list[str]:
    """Return which of the planned shards are not there yet; what a killed run left half written is removed."""
    for name in out.names(""):
        if UNFINISHED in name:
            out.remove(name)
    there = shard_names(out)
    for name in there:
        schema = pq.read_schema(pa.BufferReader(out.read(name)))
        if read_metadata(schema, name)["digest"] != digests.get(name):
            raise ValueError(
                f"--out {out.url} holds codes of other records, or of another quantizer, extractor, --window_seconds or "
                f"--shard_records ({name}). Give another --out, or remove them."
            )
    return [name for name in digests if name not in there]


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    checkpoint = project_path(args.checkpoint)
    quantizer = AnyECGRhythmQuantizer.from_pretrained(checkpoint).eval()
    quantizer.to("cuda" if torch.cuda.is_available() else "cpu")
    collator = ECGCollator(load_extractor(checkpoint), window_seconds=args.window_seconds)
    origin = CodeOrigin(
        quantizer_sha256=weights_sha256(checkpoint),
        codebook_size=quantizer.config.codebook_size,
        num_lead_ids=quantizer.config.num_lead_ids,
        extractor=extractor_options(collator.extractor),
        window_seconds=args.window_seconds,
    )
    data = DataArguments(data=args.data, simulate=args.simulate, cache_dir=args.cache_dir, num_proc=args.num_proc)
    records = load_folds(list_sources(data), collator.extractor, args.folds, args=data)
    options = {"batch_size": args.batch_size, "shard_records": args.shard_records}
    num_written = write_shards(quantizer, records, collator, origin, Output(args.out), **options)
    state = "finished" if num_written else "is finished already, nothing to do"
    logger.info("%s %s: codes of %d records", args.out, state, len(records))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a quantizer, as tokenization.train writes it")
    parser.add_argument("--data", nargs="+", help="as for the training commands")
    parser.add_argument("--simulate", type=int, default=0, help="number of simulated records where no data is given")
    parser.add_argument("--out", required=True, help="folder of the shards, or an address that fsspec knows")
    parser.add_argument("--folds", type=int, nargs="+", default=range(1, NUM_FOLDS + 1), help="default: all, 1 to 10")
    parser.add_argument("--window_seconds", type=float, default=10.0, help="as in stage two")
    parser.add_argument("--batch_size", type=int, default=32, help="windows encoded together; no code depends on it")
    parser.add_argument("--shard_records", type=int, default=SHARD_RECORDS, help="records in a shard")
    parser.add_argument("--cache_dir", help="of prepared records, as for the training commands")
    parser.add_argument("--num_proc", type=int, default=2, help="processes that prepare records")
    args = parser.parse_args(argv)
    for name in ("batch_size", "shard_records"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: accepted are 1 and above.")
    return args


if __name__ == "__main__":
    run_command(main)
