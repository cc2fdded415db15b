"""Records per second for training: rows of the built data set against the WFDB files with wfdb and scipy.

    python -m benchmarks.data [--data $ANYECG_DATA] [--passes 6] [--out benchmarks/results]

The 451 records of PTB-XL at 500 Hz are written as WFDB files in the published form and built into a data set, both in a
temporary folder (simulated ones where the recordings are absent). Both routes end in batches of 32 at 300 Hz, band-passed:

    plain   wfdb.rdsamp, resample_poly, sosfiltfilt in a DataLoader
    ours    load_dataset(streaming=True), EpochRows, ECGCollator in a DataLoader: decoded, filtered, checked, masked

Passes over all records in turns, with 1 and 2 workers that persist, one thread each. Prints and writes `data.md`. Two minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy: one core for each worker

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import scipy  # noqa: E402
import torch  # noqa: E402
import wfdb  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor  # noqa: E402
from anyecg_hf.leads import STANDARD_LEADS  # noqa: E402
from anyecg_hf.simulate import simulate_record  # noqa: E402
from training.build_dataset import build_corpus  # noqa: E402
from training.collate import ECGCollator  # noqa: E402
from training.dataset_rows import read_row  # noqa: E402
from training.streaming import EpochRows  # noqa: E402

from .reading import plain  # noqa: E402

BATCH = 32
NUM_FILES = 6  # of one size, so that two workers have the same to do
NUM_SIMULATED = 450
WANTED = 5.0


class PlainRecords(Dataset):
    """The route of most scripts, one record at a time."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return torch.from_numpy(np.ascontiguousarray(plain(self.paths[index]).T, np.float32))


def write_records(folder, data):
    """Write PTB-XL's 500-Hz records, or simulated ones, in the form that PhysioNet publishes; return what they are."""
    specification = importlib.util.spec_from_file_location("unpack", data / "unpack.py") if data.is_dir() else None
    if specification is not None:
        unpack = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(unpack)
        for meta, signal in unpack.read_pack("ptb-xl-500"):
            unpack.write_record(folder / f"HR{meta['ecg_id']:05d}", signal, 500, 1)
        return "PTB-XL, 12 leads, 10 s, 500 Hz"
    for number in range(NUM_SIMULATED):
        signal = simulate_record(number, sampling_rate=500).signal.T.astype(np.float64)
        leads = list(STANDARD_LEADS)
        wfdb.wrsamp(f"HR{number + 1:05d}", 500, ["mV"] * 12, leads, signal, fmt=["16"] * 12, write_dir=str(folder))
    return "simulated, 12 leads, 10 s, 500 Hz"


def loaders(folder, built, num_workers):
    """Return both routes as loaders whose workers stay alive between passes."""
    options = {"num_workers": num_workers, "persistent_workers": True, "multiprocessing_context": "fork"}
    paths = sorted(str(path.with_suffix("")) for path in folder.glob("*.hea"))
    rows = datasets.load_dataset("parquet", data_files=f"{built}/data/ptb-xl/*.parquet", split="train", streaming=True)
    collator = ECGCollator(AnyECGFeatureExtractor())
    return {
        "plain": DataLoader(PlainRecords(paths), batch_size=BATCH, **options),
        "ours": DataLoader(EpochRows(rows, seed=0), batch_size=BATCH, collate_fn=collator, **options),
    }


def records_per_second(loader, num_records):
    """Return the rate of one pass over all records, without the start of the workers."""
    iterator = iter(loader)
    start, seen = None, 0
    for batch in iterator:
        if start is None:  # the first batch: imports, caches and open files of each worker are in it
            start = time.perf_counter()
            continue
        seen += len(batch["input_values"] if isinstance(batch, dict) else batch)
    return seen / (time.perf_counter() - start)


def compare(folder, built, num_workers, num_records, passes):
    """Return records/s of each route (median over passes, taken in turns) and the ratio of each turn."""
    routes = loaders(folder, built, num_workers)
    rates = {name: [] for name in routes}
    for turn in range(passes + 1):  # the first warms up
        for name, loader in routes.items():
            rate = records_per_second(loader, num_records)
            if turn:
                rates[name].append(rate)
    ratios = [ours / plain for ours, plain in zip(rates["ours"], rates["plain"])]
    return {name: statistics.median(each) for name, each in rates.items()} | {"ratio": statistics.median(ratios)}


def steps_in_milliseconds(built):
    """Return what each step of a row costs in one process, the best of three passes."""
    rows = datasets.load_dataset("parquet", data_files=f"{built}/data/ptb-xl/*.parquet", split="train", streaming=True)
    extractor = AnyECGFeatureExtractor()
    best = {}
    for _ in range(3):
        start = time.perf_counter()
        read = list(EpochRows(rows, shuffle=False))
        times = {"row from Parquet": time.perf_counter() - start}
        times |= dict.fromkeys(["decode to millivolt", "extract, in lists of 32"], 0.0)
        for first in range(0, len(read), BATCH):
            start = time.perf_counter()
            records = [read_row(row) for row in read[first : first + BATCH]]
            middle = time.perf_counter()
            extractor.items(records)
            times["decode to millivolt"] += middle - start
            times["extract, in lists of 32"] += time.perf_counter() - middle
        for name, seconds in times.items():
            best[name] = min(best.get(name, np.inf), 1e3 * seconds / len(read))
    return best


def report(what, num_records, compared, steps):
    lines = [f"{num_records} records ({what}), batches of {BATCH}.", ""]
    lines += ["| workers | plain, records/s | ours, records/s | ratio | wanted |", "|---|---|---|---|---|"]
    for num_workers, each in compared.items():
        verdict = "reached" if each["ratio"] >= WANTED else "**missed**"
        row = f"| {num_workers} | {each['plain']:.0f} | {each['ours']:.0f} | {each['ratio']:.2f} | {WANTED:g}, {verdict} |"
        lines.append(row)
    lines += ["", "Ours, one process: " + ", ".join(f"{name} {value:.2f} ms" for name, value in steps.items()) + "."]
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in (wfdb, np, scipy, datasets, torch))
    return "\n".join([*lines, f"{platform.machine()}, {os.cpu_count()} cores; {versions}"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ANYECG_DATA", "../shared/ecg")))
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder, built = Path(folder) / "wfdb", Path(folder) / "built"
        folder.mkdir()
        what = write_records(folder, options.data)
        megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        shard_megabytes = 0.99 * megabytes / NUM_FILES
        num_records = build_corpus("ptb-xl", folder, built, shard_megabytes=shard_megabytes)["records_out"]
        steps = steps_in_milliseconds(built)
        compared = {number: compare(folder, built, number, num_records, options.passes) for number in (1, 2)}
    text = report(what, num_records, compared, steps)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "data.md").write_text(f"# Reading the data set\n\n`python -m benchmarks.data`\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
