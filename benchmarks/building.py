"""Building the data set: records a second with one and two processes and with Ray, and what that makes of ten million records.

    python -m benchmarks.building [--data $ANYECG_DATA] [--out benchmarks/results]
    python -m benchmarks.building --planning      what listing and planning take, of 20,000 records; a few seconds

The 451 records of PTB-XL at 500 Hz (simulated ones where the recordings are absent) are written as WFDB files and built three
times from nothing, starts of processes left out by building a second, longer list: the rate is that of the difference. The three
data sets are compared byte for byte. Prints and writes `building.md`: about two minutes, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
import time
import tracemalloc
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy: one core for each worker

from training.build_dataset import build_corpus, list_corpus  # noqa: E402
from training.shards import plan_shards  # noqa: E402
from training.splits import load_split  # noqa: E402

from .data import write_records  # noqa: E402

WAYS = {
    "1 process": {"num_proc": 1},
    "2 processes": {"num_proc": 2},
    "Ray, 2 processes": {"num_proc": 2, "engine": "ray"},
}
COPIES = 4  # of the records, under other numbers
SHARD_MEGABYTES = 9
TEN_MILLION = 10_000_000
CORES = 64  # of the cluster on paper


def write_copies(folder, data):
    """Write the records `COPIES` times; return what they are and how many bytes one takes."""
    what = write_records(folder, data)
    headers = sorted(folder.glob("HR*.hea"))
    for number, header in enumerate(headers, start=1):
        for copy in range(1, COPIES):
            name = f"HR{number + 22_000 + copy * len(headers):05d}"
            (folder / f"{name}.hea").write_text(header.read_text().replace(header.stem, name))
            shutil.copyfile(header.with_suffix(".dat"), folder / f"{name}.dat")
    files = [path.stat().st_size for path in folder.iterdir()]
    return what, 2 * sum(files) / len(files)


def files_of(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.glob("data/**/*.parquet"))}


def seconds_of(source, out, **options):
    start = time.perf_counter()
    report = build_corpus("ptb-xl", source, out, shard_megabytes=SHARD_MEGABYTES, **options)
    return time.perf_counter() - start, report["records_out"]


def rate_of(short, long, folder, options):
    """Return records a second without the start, the seconds of the start, and the files of the longer build."""
    few_seconds, few = seconds_of(short, folder / "few", **options)
    many_seconds, many = seconds_of(long, folder / "many", **options)
    rate = (many - few) / (many_seconds - few_seconds)
    return rate, few_seconds - few / rate, files_of(folder / "many"), many


def paper(record_bytes, parquet_bytes, rate):
    """Return what ten million such records take, as lines of text."""
    cpu_hours = TEN_MILLION / rate / 3600
    source, built = TEN_MILLION * record_bytes / 1e12, TEN_MILLION * parquet_bytes / 1e12
    hours = cpu_hours / CORES
    return [
        f"Ten million such records, from these figures: {source:.2f} TB of source, {built:.2f} TB of Parquet, "
        f"{cpu_hours:.0f} hours of one core. {CORES} cores: {60 * hours:.0f} minutes, reading "
        f"{1e6 * source / hours / 3600:.0f} MB/s and writing {1e6 * built / hours / 3600:.0f} MB/s in all.",
    ]


def planning(num_records=20_000):
    """Return microseconds and bytes that a record takes until it stands in a plan, of empty files in the Challenge's form."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, num_records + 1):
            for suffix in (".hea", ".mat"):
                (Path(folder) / f"JS{number:05d}{suffix}").touch()
        load_split("chapman-ningbo")  # the split file is read once, whatever the number of records
        tracemalloc.start()
        records = list_corpus("chapman-ningbo", folder)
        plan_shards(records, source=folder, out=folder, shard_bytes=1 << 20)
        num_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        start = time.perf_counter()
        plan_shards(list_corpus("chapman-ningbo", folder), source=folder, out=folder, shard_bytes=1 << 20)
        seconds = time.perf_counter() - start
    return f"a record takes {1e6 * seconds / num_records:.0f} us and {num_bytes / num_records / 1e3:.1f} kB of memory"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("ANYECG_DATA", "../shared/ecg")))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--planning", action="store_true")
    options = parser.parse_args()
    if options.planning:
        print(planning())
        return
    os.environ.setdefault("RAY_worker_niceness", "0")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in ("few", "many"):
            (folder / name).mkdir()
        write_records(folder / "few", options.data)
        what, record_bytes = write_copies(folder / "many", options.data)
        lines, rates, built = [], {}, {}
        for name, how in WAYS.items():
            rates[name], start, built[name], num_records = rate_of(
                folder / "few", folder / "many", folder / name.replace(" ", "-"), how
            )
            ratio = rates[name] / rates["1 process"]
            lines.append(f"| {name} | {rates[name]:.0f} | {ratio:.2f} | {start:.1f} |")
        same = len({frozenset((path, hash(data)) for path, data in files.items()) for files in built.values()}) == 1
        parquet_bytes = sum(map(len, built["1 process"].values())) / num_records
    head = [
        f"{num_records} records ({what}), {record_bytes / 1e3:.0f} kB each as WFDB, {parquet_bytes / 1e3:.1f} kB as Parquet.",
        "",
    ]
    head += ["| | records/s | of one process | start, s |", "|---|---|---|---|"]
    verdict = "The three data sets are equal byte for byte." if same else "**The three data sets differ.**"
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    text = "\n".join([*head, *lines, "", verdict, *paper(record_bytes, parquet_bytes, rates["1 process"]), machine])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "building.md").write_text(f"# Building the data set\n\n`python -m benchmarks.building`\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
