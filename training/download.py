"""The published files of a corpus, fetched over HTTP(S) and checked against the published SHA256SUMS.txt:

    python -m training.download --corpus ptb-xl incart --out DIR [--num_workers 4] [--only records500 ptbxl_database.csv]

Files come to DIR/<corpus>/ under their published paths; stopped or killed, the same command goes on where it was, see
`training.fetching`. `--base_url` fetches from a mirror instead.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from .fetching import DownloadReport, download_files, fetch_sums, select_paths

PHYSIONET = "https://physionet.org/files/"


@dataclass(frozen=True)
class Published:
    """Where a corpus is published: the folder that holds SHA256SUMS.txt, the sub-folders of the corpus ("" = all of
    it), and a lower bound of its size."""

    base_url: str
    folders: tuple[str, ...] = ("",)
    gigabytes: float = 0.0


def _gigabytes(num_records: int, *, num_leads: int = 12, sampling_rate: int = 500, seconds: float) -> float:
    """Return what the samples take, 16 bit each; headers and annotations come on top."""
    return num_records * num_leads * sampling_rate * seconds * 2 / 1e9


# Sizes are lower bounds by the published number of records and their lengths. All records last 30 minutes (INCART, 1800 s)
# or 10 s (PTB-XL, also at 100 Hz; Chapman/Ningbo). Where lengths differ, a round figure below the mean is taken: the
# Challenge's description has means of 15.8 s (CPSC), 15.9 s (CPSC-Extra), 10 s (Georgia, a few of 5 s) and 110.8 s (516 of
# PTB's 549 records: 104 s a record even if the others were empty; 12 leads + 3 of Frank).
_CHALLENGE = PHYSIONET + "challenge-2021/1.0.3/"
CORPORA = {
    "cpsc-2018": Published(_CHALLENGE, ("training/cpsc_2018",), _gigabytes(6_877, seconds=15)),
    "cpsc-extra": Published(_CHALLENGE, ("training/cpsc_2018_extra",), _gigabytes(3_453, seconds=15)),
    "incart": Published(PHYSIONET + "incartdb/1.0.0/", gigabytes=_gigabytes(75, sampling_rate=257, seconds=1800)),
    "ptb": Published(
        PHYSIONET + "ptbdb/1.0.0/", gigabytes=_gigabytes(549, num_leads=15, sampling_rate=1000, seconds=100)
    ),
    "ptb-xl": Published(PHYSIONET + "ptb-xl/1.0.3/", gigabytes=_gigabytes(21_799, sampling_rate=500 + 100, seconds=10)),
    "georgia": Published(_CHALLENGE, ("training/georgia",), _gigabytes(10_344, seconds=9)),
    "chapman-ningbo": Published(
        _CHALLENGE, ("training/chapman_shaoxing", "training/ningbo"), _gigabytes(10_247 + 34_905, seconds=10)
    ),
}


def download_corpus(
    name: str, out: str | Path, *, only: tuple[str, ...] = (), base_url: str | None = None, **options
) -> DownloadReport:
    """Return what became of the files of the corpus `name`, fetched to `out`/`name`.

    Args:
        name: a key of `CORPORA`.
        only: folders or files of the publication; the others are left out. Empty = all.
        base_url (`str`, *optional*): a mirror of https://physionet.org/files/, for instance http://127.0.0.1:8000/.
        options: `num_workers`, `timeout`, `retries`, `progress` as for `download_files`.
    """
    if name not in CORPORA:
        raise ValueError(f"corpus {name!r}: accepted are {', '.join(CORPORA)}.")
    place = CORPORA[name]
    url = place.base_url
    if base_url is not None:
        url = base_url.rstrip("/") + "/" + url.removeprefix(PHYSIONET)
    sums = select_paths(fetch_sums(url, **options), place.folders)
    num_bytes = int(place.gigabytes * 1e9)
    if only:
        sums, num_bytes = select_paths(sums, only), None
    return download_files(url, Path(out) / name, sums, num_bytes=num_bytes, **options)


def main(argv: list[str]) -> int:
    """Fetch the corpora of the command line; return the exit code: 0 where all files are whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", required=True, choices=[*CORPORA, "all"])
    parser.add_argument("--out", required=True, help="each corpus gets a folder of its own name in it")
    parser.add_argument("--only", nargs="+", default=[], help="folders or files of the publication; default: all")
    parser.add_argument("--base_url", help=f"a mirror of {PHYSIONET}, for instance http://127.0.0.1:8000/")
    parser.add_argument("--num_workers", type=int, default=4, help="files fetched at once")
    args = parser.parse_args(argv)
    options = {"only": tuple(args.only), "base_url": args.base_url, "num_workers": args.num_workers}
    num_failed = 0
    for name in CORPORA if "all" in args.corpus else args.corpus:
        report = download_corpus(name, args.out, **options)
        num_failed += len(report.failed)
        print(
            f"{name}: {len(report.fetched):,} fetched ({report.num_bytes / 1e6:,.1f} MB), {len(report.kept):,} kept, "
            f"{len(report.failed):,} failed"
        )
        for path, reason in sorted(report.failed.items())[:20]:
            print(f"  {path}: {reason}")
    if num_failed:
        print(f"{num_failed:,} files are missing. Run the same command again to fetch them.")
    return 1 if num_failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it was")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
