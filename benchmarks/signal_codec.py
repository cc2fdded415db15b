"""Size and decoding time of `training.signal_codec`, by corpus, against the 16-bit size, other encodings and wfdb.

    python -m benchmarks.signal_codec [--data $ANYECG_DATA] [--records 500] [--timed 20] [--out benchmarks/results]

Sizes: up to `--records` records of each corpus, each checked bit for bit. Times: the first `--timed` of them, written as WFDB
(format 16) to a temporary folder, read with `wfdb.rdrecord(physical=False)` in turns with `decode_signal` of bytes in memory;
one thread, the median over the records of the best of five. Prints and writes `signal_codec.md`. About two minutes.
"""

from __future__ import annotations

import argparse
import bz2
import importlib.util
import io
import itertools
import lzma
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy: one core each

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import wfdb  # noqa: E402
from scipy.io import loadmat  # noqa: E402

from anyecg_hf.leads import LIMB_LEADS_FROM_I_AND_II, STANDARD_LEADS, derive_limb_leads  # noqa: E402
from anyecg_hf.simulate import simulate_record  # noqa: E402
from training.signal_codec import decode_signal, encode_signal  # noqa: E402

CHALLENGE = ("ptb-xl", "chapman_shaoxing_ningbo", "georgia", "cpsc_2018", "cpsc_2018_extra", "ptb")
WINDOW = 5000  # samples from the middle of a record
PACKS = ("ptb-xl-500", "ptb-xl-100", "cinc-2011")


def flac(samples):
    """Plain FLAC, as `soundfile` writes it if nothing is chosen: as many streams of 8 leads as are needed."""
    size = 0
    for at in range(0, len(samples), 8):
        with io.BytesIO() as file:
            soundfile.write(file, np.ascontiguousarray(samples[at : at + 8].T, np.int16), 500, "PCM_16", format="FLAC")
            size += len(file.getvalue())
    return size


def differences(samples, order):
    """Differences in time as two planes of bytes, low and high: what general compressors do best with."""
    found = np.ascontiguousarray(np.diff(samples, order, prepend=np.zeros((len(samples), order), int)), "<i2")
    return np.moveaxis(found.view(np.uint8).reshape(*samples.shape, 2), 2, 0).tobytes()


OTHERS = {
    "FLAC": flac,
    "differences, FLAC": lambda samples: flac(np.diff(samples, prepend=0)),
    "differences, xz": lambda samples: len(lzma.compress(differences(samples, 1))),
    "second differences, bz2": lambda samples: len(bz2.compress(differences(samples, 2))),
}


def corpora(data):
    """Yield the name of a corpus and an iterator over its `(samples, lead_names)`."""
    specification = importlib.util.spec_from_file_location("unpack", data / "unpack.py")
    unpack = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(unpack)
    for pack in PACKS:
        yield f"{pack} (pack)", ((samples, unpack.LEADS) for _, samples in unpack.read_pack(pack))
    for corpus in CHALLENGE:
        paths = sorted((data / "challenge-2021" / corpus).rglob("*.mat"))
        yield corpus, ((loadmat(path)["val"].astype(int), STANDARD_LEADS) for path in paths)
    paths = sorted((data / "mitdb").glob("*.hea"))
    records = (wfdb.rdrecord(path.with_suffix(""), physical=False) for path in paths)
    yield "mitdb (2 leads, 30 min)", ((record.d_signal.T, record.sig_name) for record in records)
    yield "simulated, as INCART", [half_an_hour()]


def half_an_hour():
    """A record as INCART's are: 257 Hz, some 300 steps to a millivolt, each lead rounded by itself."""
    names = [name for name in STANDARD_LEADS if name not in LIMB_LEADS_FROM_I_AND_II]
    signal = simulate_record(1, sampling_rate=257, duration_seconds=1800, lead_names=names).signal * 306.0
    signal += np.random.default_rng(0).normal(0, 2, signal.shape)
    signal, names = derive_limb_leads(signal, names)
    return np.rint(signal).astype(int), names


def best_of(repeats, *functions):
    """Return the shortest time of each function, run in turns, in ms."""
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, found in zip(functions, times):
            start = time.perf_counter()
            function()
            found.append((time.perf_counter() - start) * 1000)
    return [min(found) for found in times]


def measure(records, timed, folder):
    """Return the sizes in bytes by encoding, and the times of the first `timed` records, one row for each."""
    sizes, times = dict.fromkeys(["16 bit", *OTHERS, "ours"], 0), []
    for samples, names in records:
        data = encode_signal(samples, names)
        if not np.array_equal(decode_signal(data), samples):
            raise RuntimeError("the samples are not the same after decoding")
        sizes["16 bit"] += samples.size * 2
        sizes["ours"] += len(data)
        for name, size in OTHERS.items():
            sizes[name] += size(samples)
        if len(times) < timed:
            times.append(time_record(samples, list(names), data, folder))
    return sizes, np.array(times)


def time_record(samples, names, data, folder):
    count = len(samples)
    options = {"fmt": ["16"] * count, "adc_gain": [1000.0] * count, "baseline": [0] * count, "write_dir": str(folder)}
    wfdb.wrsamp("r", 500, ["mV"] * count, names, d_signal=np.ascontiguousarray(samples.T), **options)
    path = str(folder / "r")
    length = samples.shape[1]
    start = max(length - WINDOW, 0) // 2
    window = (start, min(start + WINDOW, length))
    [encode] = best_of(1, lambda: encode_signal(samples, names))
    whole = best_of(5, lambda: decode_signal(data), lambda: wfdb.rdrecord(path, physical=False))
    part = best_of(5, lambda: decode_signal(data, *window), lambda: wfdb.rdrecord(path, *window, physical=False))
    return encode, *whole, *part


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ANYECG_DATA", "../shared/ecg"))
    parser.add_argument("--records", type=int, default=500, help="of each corpus")
    parser.add_argument("--timed", type=int, default=20, help="of these")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()

    columns = ["corpus", "16 bit, MB", *OTHERS, "ours", "encode, ms", "decode, ms", "wfdb, ms", "wfdb / ours"]
    columns += [f"{WINDOW} samples: ours, ms", "wfdb, ms"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    print(*lines, sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        for corpus, records in corpora(args.data):
            sizes, times = measure(itertools.islice(records, args.records), args.timed, Path(folder))
            percent = [f"{100 * size / sizes['16 bit']:.1f} %" for size in list(sizes.values())[1:]]
            encode, decode, read, *window = (statistics.median(column) for column in times.T)
            ratio = statistics.median(times[:, 2] / times[:, 1])
            milliseconds = [
                f"{encode:.1f}",
                f"{decode:.2f}",
                f"{read:.2f}",
                f"{ratio:.1f}",
                *(f"{ms:.2f}" for ms in window),
            ]
            lines.append("| " + " | ".join([corpus, f"{sizes['16 bit'] / 1e6:.1f}", *percent, *milliseconds]) + " |")
            print(lines[-1], flush=True)

    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, one used; wfdb {wfdb.__version__}, numpy {np.__version__}, "
    )
    machine += f"soundfile {soundfile.__version__} ({soundfile.__libsndfile_version__})"
    head = [
        "# A record's samples as bytes",
        "",
        "`python -m benchmarks.signal_codec`: % of the 16-bit size; median ms a record, wfdb reading format 16.",
        "",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "signal_codec.md").write_text("\n".join([*head, *lines, "", machine]) + "\n")


if __name__ == "__main__":
    main()
