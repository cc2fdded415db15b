"""The seven corpora as one data set of Parquet files, ready for `load_dataset`:

    python -m training.build_dataset --corpus ptb-xl --source DIR --out DIR [--num_proc 2] [--push-to-hub ORG/NAME]
    python -m training.build_dataset --corpus all --source DIR --out DIR      every corpus that is found below DIR
    python -m training.build_dataset --corpus incart --download --source DIR --out DIR     fetch to DIR first

A source is a corpus's folder of the Challenge 2021, or its own release (PTB-XL, PTB, INCART), at any depth; source and output
may be addresses of an object store. Bad records are listed with their reasons in OUT/reports/<corpus>.json, where records
in = records out + rejected. The same command goes on after a break; shards that are whole and unchanged are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from .corpora import CORPORA
from .corpora.sources import Source, SourceRecord, absolute, one_side
from .dataset_card import write_cards
from .download import download_corpus
from .engines import ENGINES, map_shards
from .shards import SPLITS, Output, ShardPlan, finished_report, plan_shards
from .splits import load_duplicates, shared_records, split_of

logger = logging.getLogger(__name__)

SHARD_MEGABYTES = 128  # of source files; a quarter of it as Parquet


def build_corpus(
    corpus: str,
    source: str | Path,
    out: str | Path,
    *,
    num_proc: int = 1,
    engine: str = "local",
    shard_megabytes: float = SHARD_MEGABYTES,
    sampling_rate: int | None = None,
    duplicates: Sequence[Mapping[str, str]] = (),
) -> dict:
    """Build one corpus into `out` and return its report, as OUT/reports/<corpus>.json holds it.

    Args:
        corpus: a key of `CORPORA`.
        source, out: folders, or addresses that fsspec knows.
        num_proc, engine: see `engines.map_shards`.
        shard_megabytes: of source files in one Parquet file.
        sampling_rate (`int`, *optional*): of PTB-XL's own release, 500 or 100; default: each record's highest.
        duplicates: found by `training.duplicates`, besides those of split_files/duplicates.csv: rows as `load_duplicates` gives
            them. A copy gets patient and fold of what it repeats.

    Raises:
        ValueError: no record of the corpus is there.
        FileNotFoundError: there is no such source.
        OSError: another build writes to `out`.
    """
    records = list_corpus(corpus, source, sampling_rate=sampling_rate)
    if not records:
        raise ValueError(
            f"--source {source}: no records of {corpus}. Accepted: {CORPORA[corpus].accepted}, at any depth below it."
        )
    duplicates = [*load_duplicates(), *duplicates]
    readable = one_side([record for record in records if not record.problem], duplicates)
    source, out = absolute(source), absolute(out)
    places = {"source": source, "out": out, "shard_bytes": int(shard_megabytes * 1e6)}
    plans = plan_shards(readable, shared=shared_records(corpus, duplicates), **places)
    output = Output(out)
    with output.alone():
        return _build(output, corpus, records, plans, engine=engine, num_proc=num_proc)


def _build(output: Output, corpus: str, records: Sequence[SourceRecord], plans: Sequence[ShardPlan], **options) -> dict:
    _begin(output, corpus, plans)
    reports = {}
    with tqdm(total=sum(len(plan.records) for plan in plans), desc=corpus, unit="record", mininterval=1.0) as bar:
        for plan, report in map_shards(plans, **options):
            reports[plan.name] = report
            bar.update(len(plan.records))
    report = summarise(corpus, records, plans, reports)
    _keep_only({*report["shards"], *(plan.report for plan in plans)}, output, corpus)
    output.write(f"reports/{corpus}.json", json.dumps(report, indent=1).encode())
    write_cards(output)
    return report


def list_corpus(corpus: str, source: str | Path, *, sampling_rate: int | None = None) -> list[SourceRecord]:
    """Return the published records of a corpus below `source`, those with a problem included; of its own release where
    that is there, else of the Challenge's. None where there are neither.
    """
    place = Source(source)
    for listing in CORPORA[corpus].listings:
        options = {"sampling_rate": sampling_rate} if corpus == "ptb-xl" and sampling_rate else {}
        if records := listing(place, **options):
            return records
    return []


def summarise(
    corpus: str, records: Sequence[SourceRecord], plans: Sequence[ShardPlan], reports: dict[str, dict]
) -> dict:
    """Return the report of a corpus: counts that add up, what was rejected and why, kinds of nulls, and its shards.

    Raises:
        RuntimeError: a record is neither in the data set nor among the rejected.
    """
    rejected = [{"record_id": record.record_id, "reason": record.problem} for record in records if record.problem]
    rejected += [each for plan in plans for each in reports[plan.name]["rejected"]]
    by_split: Counter = Counter()
    nulls: Counter = Counter()
    for plan in plans:
        by_split[split_of(plan.records[0].fold)] += reports[plan.name]["records_out"]
        nulls.update(reports[plan.name]["nulls"])
    num_out = sum(by_split.values())
    if len(records) != num_out + len(rejected):
        raise RuntimeError(
            f"{corpus}: {len(records)} records in, {num_out} out and {len(rejected)} rejected do not add up."
        )
    return {
        "corpus": corpus,
        "records_in": len(records),
        "records_out": num_out,
        "records_rejected": len(rejected),
        "rejected": rejected,
        "splits": {split: by_split[split] for split in SPLITS},
        "nulls": dict(sorted(nulls.items())),
        "shards": {
            plan.parquet: {name: reports[plan.name][name] for name in ("records_out", "num_bytes", "sha256")}
            for plan in plans
            if reports[plan.name]["sha256"]
        },
    }


def _begin(output: Output, corpus: str, plans: Sequence[ShardPlan]) -> None:
    """Take the corpus out of the data set until it is whole again, and remove what the new plan does not have.

    Nothing changes where all is there already. Else files of an older build would be read beside the new ones.
    """
    planned = {name for plan in plans for name in (plan.parquet, plan.report)}
    if _present(output, corpus) <= planned and all(finished_report(plan, output) for plan in plans):
        return
    report = f"reports/{corpus}.json"
    if output.fs.exists(output.path(report)):
        output.remove(report)
        write_cards(output)
    _keep_only(planned, output, corpus)


def _present(output: Output, corpus: str) -> set[str]:
    return {f"{kind}/{corpus}/{name}" for kind in ("data", "reports") for name in output.names(f"{kind}/{corpus}")}


def _keep_only(names: set[str], output: Output, corpus: str) -> None:
    """Remove the corpus's other files: of an older plan, half-written by a worker that died, or with no record left."""
    for name in sorted(_present(output, corpus) - names):
        output.remove(name)


def main(argv: list[str]) -> int:
    """Build what the command line asks for; return the exit code: 0 where every corpus asked for was built."""
    args = _parse(argv)
    names = list(CORPORA) if "all" in args.corpus else args.corpus
    built = []
    for name in names:
        if args.download:
            downloaded = download_corpus(name, args.source, base_url=args.base_url)
            if downloaded.failed:
                print(
                    f"{name}: {len(downloaded.failed):,} files are missing; run the same command again to fetch them."
                )
                return 1
        source = f"{args.source}/{name}" if args.download else args.source
        if "all" in args.corpus and not args.download and not list_corpus(name, source):
            print(f"{name}: nothing of it is below {args.source}; left out.")
            continue
        report = build_corpus(
            name,
            source,
            args.out,
            num_proc=args.num_proc,
            engine=args.engine,
            shard_megabytes=args.shard_megabytes,
            sampling_rate=args.sampling_rate,
            duplicates=load_duplicates(args.duplicates) if args.duplicates else (),
        )
        _print(report)
        built.append(name)
    if not built:
        raise ValueError(f"--source {args.source}: no records of any corpus.")
    if args.push_to_hub:
        from .publish_dataset import push_dataset

        print(f"pushed: {push_dataset(args.out, args.push_to_hub, private=args.private)}")
    return 0


def _print(report: dict) -> None:
    splits = ", ".join(f"{count:,} {split}" for split, count in report["splits"].items())
    print(
        f"{report['corpus']}: {report['records_in']:,} records in = {report['records_out']:,} out ({splits}) + "
        f"{report['records_rejected']:,} rejected"
    )
    for each in report["rejected"][:5]:
        print(f"  {each['record_id']}: {each['reason'][:200]}")
    if len(report["rejected"]) > 5:
        print(f"  ... all in reports/{report['corpus']}.json")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="+", required=True, choices=[*CORPORA, "all"])
    parser.add_argument("--source", required=True, help="folder of the published files, or where --download puts them")
    parser.add_argument("--out", required=True, help="folder of the data set; several corpora share it")
    parser.add_argument("--download", action="store_true", help="fetch the published files to SOURCE/<corpus> first")
    parser.add_argument("--base_url", "--base-url", help="a mirror of https://physionet.org/files/")
    parser.add_argument("--num_proc", "--num-proc", type=int, default=1)
    parser.add_argument(
        "--engine", choices=ENGINES, default="local", help="ray: the cluster of RAY_ADDRESS, else a local one"
    )
    parser.add_argument("--shard_megabytes", "--shard-megabytes", type=float, default=SHARD_MEGABYTES)
    parser.add_argument(
        "--sampling_rate", "--sampling-rate", type=int, choices=(500, 100), help="of PTB-XL's own release"
    )
    parser.add_argument(
        "--duplicates", help="more records that are one recording, as `training.duplicates --out` writes them"
    )
    parser.add_argument("--push-to-hub", "--push_to_hub", metavar="ORG/NAME")
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args(argv)
    if args.num_proc < 1 or not 0 < args.shard_megabytes < math.inf:
        parser.error("--num_proc must be at least 1, --shard_megabytes a number above 0")
    if args.push_to_hub and "://" in args.out or args.download and "://" in args.source:
        parser.error("--push-to-hub and --download need a folder on this machine, not an address")
    return args


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it was")
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
