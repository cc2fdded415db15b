"""Reading and preparing a record against the plain route (wfdb.rdsamp, resample_poly, sosfiltfilt), and a file of 24 hours.

    python -m benchmarks.reading [--repeats 400] [--hours 24] [--out benchmarks/results]

Three measurements, each in processes of its own with one thread: a 12-lead record of 10 s at 500 Hz (WFDB, format 16) by both
routes in turns, with the largest difference of each from a float64 reference; the same with two workers; a long 12-lead
500-Hz file in pieces of ten minutes, with the peak memory of the process. The records are simulated; 1.04 GB of disk for 24 h.
Prints a table and writes `reading.json` and `reading.md`. About three minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy: one core each

import numpy as np  # noqa: E402
import scipy  # noqa: E402
import wfdb  # noqa: E402
from scipy.signal import butter, resample_poly, sosfiltfilt  # noqa: E402

from anyecg_hf import AnyECGFeatureExtractor, read_record  # noqa: E402
from anyecg_hf.simulate import simulate_record  # noqa: E402

RATE, SECONDS, MODEL_RATE = 500, 10, 300
PIECE_SECONDS = 600
BATCH = 10  # records that one route takes before the other has its turn
ENDS = 2 * MODEL_RATE  # samples at each end where the plain route's filter rings; ours is compared everywhere
BAND = np.concatenate(
    [butter(2, 0.5, "high", fs=MODEL_RATE, output="sos"), butter(8, 40, "low", fs=MODEL_RATE, output="sos")]
)


def write_record(folder):
    """Write the record that is read, with drift and an offset, and return its path."""
    record = simulate_record(1, sampling_rate=RATE, duration_seconds=SECONDS)
    drift = 0.3 * np.sin(2 * np.pi * 0.2 * np.arange(record.signal.shape[1]) / RATE)
    signal = (record.signal + drift + 0.5).T.astype(np.float64)
    leads = record.lead_names
    wfdb.wrsamp("r", RATE, ["mV"] * 12, leads, signal, fmt=["16"] * 12, write_dir=str(folder))
    return str(folder / "r")


def plain(path):
    """The route of most scripts: `(samples, leads)`, float64, 300 Hz, the same band."""
    signal, _ = wfdb.rdsamp(path)
    return sosfiltfilt(BAND, resample_poly(signal, 3, 5, axis=0), axis=0)


@cache
def _extractor():
    return AnyECGFeatureExtractor()


def ours(path):
    return _extractor()(read_record(path))["input_values"]


def reference(path):
    """The extractor's definition in float64: the signal and its mirror image, Fourier terms times Butterworth squared, summed at
    the new times one by one."""
    signal = wfdb.rdsamp(path)[0].T
    terms = np.fft.rfft(np.concatenate([signal, signal[:, ::-1]], axis=1), axis=1)
    frequencies = np.fft.rfftfreq(2 * signal.shape[1], 1 / RATE)
    terms *= (frequencies / 0.5) ** 4 / (1 + (frequencies / 0.5) ** 4) / (1 + (frequencies / 40) ** 16)
    used = slice(1, np.searchsorted(frequencies, MODEL_RATE / 2))
    times = np.arange(SECONDS * MODEL_RATE) / MODEL_RATE
    waves = np.exp(2j * np.pi * np.outer(frequencies[used], times))
    return (terms[:, used] @ waves).real / signal.shape[1]


def one_record(path, repeats):
    """Return seconds of each route, taken in turns, and their differences from the reference."""
    times = {plain: [], ours: [], read_record: []}
    for turn in range(1 + repeats // BATCH):  # the first warms up
        for route, each in times.items():
            start = time.perf_counter()
            for _ in range(BATCH):
                route(path)
            if turn:
                each.append((time.perf_counter() - start) / BATCH)
    exact = reference(path)
    inside = slice(ENDS, -ENDS)
    return {
        "plain_ms": 1e3 * statistics.median(times[plain]),
        "ours_ms": 1e3 * statistics.median(times[ours]),
        "of_that_reading_ms": 1e3 * statistics.median(times[read_record]),
        "ratio": statistics.median(p / o for p, o in zip(times[plain], times[ours], strict=True)),
        "ours_difference_mv": float(np.abs(ours(path)[0] - exact).max()),
        "plain_difference_inside_mv": float(np.abs(plain(path).T - exact)[:, inside].max()),
    }


def _many(path, count):
    for _ in range(count):
        ours(path)


def workers(path, count):
    """Return how many times as fast two processes get through the same number of records as one."""
    rates = []
    for _ in range(5):
        seconds = []
        for number in (1, 2):
            with ProcessPoolExecutor(number, mp_context=get_context("spawn")) as pool:
                list(pool.map(_many, [path] * number, [20] * number))  # imports and caches
                start = time.perf_counter()
                list(pool.map(_many, [path] * number, [count // number] * number))
                seconds.append(time.perf_counter() - start)
        rates.append(seconds[0] / seconds[1])
    return {"two_workers": statistics.median(rates)}


def write_long(folder, hours):
    """Write one 12-lead record of that length, an hour repeated, and return its path and size."""
    record = simulate_record(2, sampling_rate=RATE, duration_seconds=3600)
    samples = np.round(record.signal.T * 1000).astype("<i2").tobytes()
    with open(folder / "long.dat", "wb") as file:
        for _ in range(hours):
            file.write(samples)
    lines = [f"long 12 {RATE} {hours * 3600 * RATE}"]
    lines += [
        f"long.dat 16 1000/mV 16 0 {int(record.signal[row, 0] * 1000)} 0 0 {name}"
        for row, name in enumerate(record.lead_names)
    ]
    (folder / "long.hea").write_text("\n".join(lines) + "\n")
    return str(folder / "long"), os.path.getsize(folder / "long.dat")


def _peak_gb():
    """Return the peak memory of this process; `ru_maxrss` would count that of the process it was forked from."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e6


def long_file(path, hours):
    """Read and extract a long record in pieces; return seconds and the peak memory of this process."""
    start, windows, imports = time.perf_counter(), 0, _peak_gb()
    for begin in range(0, hours * 3600, PIECE_SECONDS):
        record = read_record(path, start_seconds=begin, duration_seconds=PIECE_SECONDS)
        windows += len(_extractor().windows(record)[0])
    return {
        "seconds": time.perf_counter() - start,
        "windows": windows,
        "imports_gb": imports,
        "peak_gb": _peak_gb(),
    }


def _alone(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def table(results):
    one, long = results["one_record"], results["long_file"]
    error, peak = one["ours_difference_mv"], long["peak_gb"]
    rows = [
        ("read + extract, plain route / ours", ">= 4", f"{one['ratio']:.2f}", one["ratio"] >= 4),
        ("largest difference from float64, mV", "<= 0.001", f"{error:.1e}", error <= 1e-3),
        ("two workers / one", ">= 1.8", f"{results['two_workers']:.2f}", results["two_workers"] >= 1.8),
        (f"peak memory, {long['hours']} h, GB", "< 1", f"{peak:.2f}", peak < 1),
    ]
    lines = ["| what | wanted | measured | |", "|---|---|---|---|"]
    lines += [f"| {what} | {wanted} | {got} | {'reached' if ok else '**missed**'} |" for what, wanted, got, ok in rows]
    lines += [
        "",
        f"Plain route {one['plain_ms']:.2f} ms, ours {one['ours_ms']:.2f} ms, of which reading "
        f"{one['of_that_reading_ms']:.2f} ms. The plain route differs from the reference by "
        f"{one['plain_difference_inside_mv']:.1e} mV, 2 s from its ends.",
        f"{long['hours']} h in pieces of {PIECE_SECONDS // 60} min: {long['seconds']:.0f} s, {long['windows']} windows "
        f"of 10 s, a file of {long['gb']:.2f} GB; the imports alone take {long['imports_gb']:.2f} GB.",
        results["machine"],
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--hours", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        path = write_record(folder)
        results = {"one_record": _alone(one_record, path, options.repeats), **workers(path, 2 * options.repeats)}
        path, size = write_long(folder, options.hours)
        results["long_file"] = {"hours": options.hours, "gb": size / 1e9, **_alone(long_file, path, options.hours)}
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in (wfdb, np, scipy))
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores; {versions}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "reading.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "reading.md").write_text(f"# Reading\n\n`python -m benchmarks.reading`\n\n{table(results)}\n")
    print(table(results))


if __name__ == "__main__":
    main()
