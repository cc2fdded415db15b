"""Records that hold the same recording, found by comparing their signals:

    python -m training.duplicates --data DIR [DIR ...] [--out duplicates.csv] [--num_workers 2]
    python -m training.build_dataset ... --duplicates duplicates.csv         puts them on one side

A folder may be a built data set: its corpora are compared with each other.

The same recording is found at another sampling rate, in another unit or scale, with another filter, with its leads in
another order or some of them left out, and cut shorter at its end. Not found: a copy that begins at another moment, one
upside down, one with no two limb leads, and what is shorter than `WINDOW_SECONDS`; how many were left out is printed.

First, leads I and II of all records are compared with those of all others, roughly: the first 5 seconds from 2 to 10 Hz
at 25 Hz, 250 numbers of unit length, so that one matrix product gives all correlations. 65,000 records are 2.1 x 10^9
pairs of 250 products each, 5 x 10^11 multiplications (34 s on two cores). Then each pair that looks alike is read again
and compared in full: all leads that both have, the common length, up to 25 Hz, two seconds by two seconds.

Where the line is: in PTB-XL (folds 1-9), copies at another rate agree by 0.989 or more, different recordings by 0.970
or less, and the nearest of these are paced hearts that begin at the same moment of a beat (some of one age and sex,
under two patients). So look at what is found, the lowest first.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from anyecg_hf.leads import LEAD_IDS, LIMB_LEADS
from anyecg_hf.records import Record
from anyecg_hf.signal_ops import fill_gaps, resample
from training.corpora import RecordEntry, list_records

WINDOW_SECONDS = 5.0  # of the first look: the shortest records of the Challenge (Georgia) have 5
MARGIN_SECONDS = 2.0  # read beyond it, for the filter
ROUGH_RATE, ROUGH_BAND = 25.0, (2.0, 10.0)  # Hz
FULL_RATE, FULL_BAND = 250.0, (2.0, 25.0)  # Hz; below and above, devices filter differently
PIECE_SECONDS = 2.0  # a heart at rest beats at least once
DELAY_SECONDS = 0.02  # of a filter that ran in real time
FULL_SECONDS = 60.0  # at most; records last up to half an hour
ALIKE = 0.85  # correlation at the first look from which a pair is looked at again
SAME = 0.98  # `agreement` in full from which a pair is one recording
BLOCK = 1024  # records a matrix product
COLUMNS = ("record", "corpus", "same_as", "same_as_corpus", "found_how")


@dataclass(frozen=True)
class Pair:
    """Two records by their places in the list, first < second, and the correlation of their signals in full."""

    first: int
    second: int
    agreement: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders as `training.corpora` reads them")
    parser.add_argument("--out", type=Path, help="a file in the columns of training/split_files/duplicates.csv")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that read")
    arguments = parser.parse_args()
    listed = [(entry, entry.corpus or folder.name) for folder in arguments.data for entry in list_records(folder)]
    entries = [entry for entry, _ in listed]
    prints, left_out = fingerprints(entries, num_workers=arguments.num_workers, progress=True)
    for reason, number in left_out.items():
        print(f"{number} records left out: {reason}")
    pairs = compare(entries, alike_pairs(prints))
    same = [pair for pair in pairs if pair.agreement >= SAME]
    others = [pair.agreement for pair in pairs if pair.agreement < SAME]
    print(f"{len(prints)} records, {len(pairs)} pairs alike at first look, {len(same)} of them the same recording")
    print(f"agreement of these: from {min((p.agreement for p in same), default=np.nan):.4f}; of the others: up to "
          f"{max(others, default=np.nan):.4f}")  # fmt: skip
    rows = list(copies(listed, same))
    if arguments.out:
        write_copies(arguments.out, rows)
    else:
        for row in rows:
            print(", ".join(row.values()))


def fingerprints(
    entries: Sequence[RecordEntry], *, num_workers: int = 1, progress: bool = False
) -> tuple[dict[int, np.ndarray], Counter]:
    """Return place -> fingerprint for the records that have one, and how many have none, by reason."""
    options = {"total": len(entries), "desc": "reading", "disable": not progress}
    if num_workers > 1:
        context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
        with context.Pool(num_workers) as pool:
            found = list(tqdm(pool.imap(_read_fingerprint, entries, chunksize=32), **options))
    else:
        found = [_read_fingerprint(entry) for entry in tqdm(entries, **options)]
    left_out = Counter(reason for reason in found if isinstance(reason, str))
    return {place: print_ for place, print_ in enumerate(found) if not isinstance(print_, str)}, left_out


def _read_fingerprint(entry: RecordEntry) -> np.ndarray | str:
    try:
        record = entry.read()
    except (ValueError, OSError) as error:
        return f"cannot be read ({type(error).__name__})"
    return fingerprint(record)


def fingerprint(record: Record) -> np.ndarray | str:
    """Return leads I and II at the first look: float32 of unit length; or, in words, why there is none.

    Filter, rate, unit and scale of the record are taken out; what is left depends on the beats alone.
    """
    limb = [row for row, name in enumerate(record.lead_names) if name in LIMB_LEADS]
    weights = np.array([LIMB_LEADS[record.lead_names[row]] for row in limb]).reshape(-1, 2)
    if np.linalg.matrix_rank(weights) < 2:
        return "leads I and II are absent and do not follow from others"
    if record.duration_seconds < WINDOW_SECONDS:
        return f"shorter than {WINDOW_SECONDS:g} seconds"
    part = record.signal[limb, : round((WINDOW_SECONDS + MARGIN_SECONDS) * record.sampling_rate)]
    leads = np.linalg.pinv(weights) @ fill_gaps(part)  # I and II; by least squares where more is there
    if not np.ptp(leads):
        return "flat in the limb leads"
    rough = resample(leads, record.sampling_rate, ROUGH_RATE, *ROUGH_BAND)[:, : round(WINDOW_SECONDS * ROUGH_RATE)]
    return (rough / np.linalg.norm(rough)).astype(np.float32).ravel()


def alike_pairs(prints: dict[int, np.ndarray], threshold: float = ALIKE) -> list[tuple[int, int]]:
    """Return the pairs of places, (smaller, larger), whose fingerprints correlate at least by `threshold`."""
    if not prints:
        return []
    places, matrix = np.array(list(prints)), np.stack(list(prints.values()))
    pairs = []
    for row in range(0, len(matrix), BLOCK):
        for column in range(row, len(matrix), BLOCK):
            found = matrix[row : row + BLOCK] @ matrix[column : column + BLOCK].T >= threshold
            firsts, seconds = np.nonzero(np.triu(found, 1) if row == column else found)
            pairs += zip(places[firsts + row].tolist(), places[seconds + column].tolist(), strict=True)
    return sorted(pairs)


def compare(entries: Sequence[RecordEntry], pairs: Sequence[tuple[int, int]]) -> list[Pair]:
    """Return `pairs` with the agreement of their records in full."""

    @functools.lru_cache(maxsize=512)  # 60 s of 12 leads are 720 kB, 10 s are 120 kB
    def leads_of(place: int) -> dict[str, np.ndarray]:
        return full_detail(entries[place].read())

    return [Pair(first, second, agreement(leads_of(first), leads_of(second))) for first, second in pairs]


def full_detail(record: Record) -> dict[str, np.ndarray]:
    """Return the leads by name, band-limited, at `FULL_RATE`; those that are flat are left out."""
    known = [row for row, name in enumerate(record.lead_names) if name in LEAD_IDS]
    part = fill_gaps(record.signal[known, : round(FULL_SECONDS * record.sampling_rate)])
    leads = resample(part, record.sampling_rate, FULL_RATE, *FULL_BAND)
    return {record.lead_names[row]: lead for row, lead in zip(known, leads, strict=True) if np.ptp(lead)}


def agreement(leads: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    """Return the correlation over the length that both have: piece by piece the median of the leads that both have, and
    of the pieces the lower quartile. So a few bad leads or seconds do not part what is one recording (PTB-XL at 500 Hz
    ends with a value held, at 100 Hz it does not), but three quarters of the time have to agree."""
    names = [name for name in leads if name in others]
    if not names:
        return 0.0
    ours, theirs = (np.stack([some[name] for name in names]) for some in (leads, others))
    ours, theirs = _aligned(ours, theirs)
    return float(np.quantile(np.median((_unit_pieces(ours) * _unit_pieces(theirs)).sum(axis=2), axis=0), 0.25))


def _aligned(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both over the time they share, one of them later by up to `DELAY_SECONDS`."""
    weights = 1 / (ours.std(axis=1, keepdims=True) * theirs.std(axis=1, keepdims=True))  # all leads count the same

    def shifted(delay: int) -> tuple[np.ndarray, np.ndarray]:
        first, second = ours[:, max(0, -delay) :], theirs[:, max(0, delay) :]
        num_samples = min(first.shape[1], second.shape[1])
        return first[:, :num_samples], second[:, :num_samples]

    def covariance(delay: int) -> float:
        first, second = shifted(delay)
        return np.vdot(weights * first, second) / first.shape[1]

    most = round(DELAY_SECONDS * FULL_RATE)
    return shifted(max(range(-most, most + 1), key=covariance))


def _unit_pieces(leads: np.ndarray) -> np.ndarray:
    """Return `leads` in pieces of mean zero and unit length, `(num_leads, num_pieces, piece)`; flat ones are zero."""
    piece = round(PIECE_SECONDS * FULL_RATE)
    pieces = leads[:, : leads.shape[1] // piece * piece].reshape(len(leads), -1, piece)
    pieces = pieces - pieces.mean(axis=2, keepdims=True)
    length = np.linalg.norm(pieces, axis=2, keepdims=True)
    return pieces / np.where(length > 0, length, 1)


def copies(listed: Sequence[tuple[RecordEntry, str]], same: Sequence[Pair]) -> Iterator[dict[str, str]]:
    """Yield one row for each record but the first of those that are one recording, in the order of the list."""
    firsts, seconds = [pair.first for pair in same], [pair.second for pair in same]
    graph = coo_matrix((np.ones(len(same)), (firsts, seconds)), shape=(len(listed), len(listed)))
    groups = connected_components(graph, directed=False)[1]
    best = {}
    for place, pair in itertools.chain(zip(firsts, same), zip(seconds, same)):
        best[place] = max(best.get(place, 0.0), pair.agreement)
    first_of_group = {}
    for place, (entry, corpus) in enumerate(listed):
        first, first_corpus = first_of_group.setdefault(groups[place], (entry, corpus))
        if first is not entry:
            how = f"signals agree, {best[place]:.4f}"
            names = [each.record_id.removeprefix(f"{each.corpus}/") for each in (entry, first)]
            yield dict(zip(COLUMNS, (names[0], corpus, names[1], first_corpus, how), strict=True))


def write_copies(path: Path, rows: Sequence[dict[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
