"""A built dataset folder -> a dataset repository on the Hugging Face Hub:

    python -m training.publish_dataset --folder DIR --repo_id ORG/NAME [--private]

The folder is one that `python -m training.build_dataset` has finished: README.md with the `configs:` that `load_dataset`
reads, data/<corpus>/*.parquet, reports/<corpus>.json, cards/. What an earlier push has left in data/, cards/ and reports/
and the folder no longer has is deleted. Only what has changed is sent, and a push that broke goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pyarrow.parquet
import yaml
from datasets.data_files import sanitize_patterns
from huggingface_hub import metadata_load

from .hub_push import Target, in_one_line, push_files, run_push

CARD = "README.md"
OWN_FOLDERS = ("data/", "cards/", "reports/")  # on the Hub, too: whatever else is there is left alone
UNFINISHED = ".unfinished"  # in the name of a file that the build is still writing


def push_dataset(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Return the address of the commit with which the Hub has exactly the dataset in `folder`; see `push_files`.

    Args:
        folder: a whole build, see `dataset_files`.
        repo_id (`str`): ORG/NAME; made where absent.
        private: for the owner and those invited only; refused where the repository is public already.
        token (`str`, *optional*): with write access. Default: HF_TOKEN or the one of `hf auth login`.

    Raises:
        ValueError: the folder is no whole build, or the repository is public and `private` was asked for.
        PermissionError: the Hub does not let this token write.
        ConnectionError: no answer or trouble on the Hub, after several tries; or someone else pushed at the same time.
    """
    folder, target = Path(folder), Target(repo_id, "dataset", private)
    files = dataset_files(folder)
    return push_files(folder, files, target, is_own=lambda path: path.startswith(OWN_FOLDERS), token=token).commit_url


def dataset_files(folder: Path) -> list[str]:
    """Return the files to publish, as paths below `folder`.

    Raises:
        ValueError: lists all that keeps the folder from being a whole build: unfinished files, a corpus without its
            report or with other counts than reported, broken Parquet, `configs:` that name other files than there are.
    """
    files = [
        path.relative_to(folder).as_posix()
        for pattern in (CARD, "data/**/*.parquet", "cards/**/*", "reports/**/*")
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    ]
    files = [path for path in files if not any(part.startswith(".") for part in path.split("/"))]
    shards = [path for path in files if path.startswith("data/")]
    amiss = [f"{path.relative_to(folder)} is unfinished" for path in sorted(folder.rglob(f"*{UNFINISHED}*"))]
    amiss += _counts_amiss(folder, shards) + _configs_amiss(folder, shards)
    if not shards:
        amiss.insert(0, "there is no data/<corpus>/*.parquet")
    if amiss:
        more = f"; and {len(amiss) - 10:,} more" if len(amiss) > 10 else ""
        raise ValueError(
            f"{folder} is no whole dataset: {'; '.join(amiss[:10])}{more}. Nothing was pushed. Run "
            "`python -m training.build_dataset` to its end, then push again."
        )
    return files


def _counts_amiss(folder: Path, shards: list[str]) -> list[str]:
    """Return what does not agree between the rows of each corpus and reports/<corpus>.json."""
    num_rows = {path.stem: 0 for path in folder.glob("reports/*.json") if not path.name.startswith(".")}
    amiss = []
    for shard in shards:
        corpus = shard.split("/")[1] if shard.count("/") > 1 else ""
        try:
            num_rows[corpus] = num_rows.get(corpus, 0) + pyarrow.parquet.read_metadata(folder / shard).num_rows
        except pyarrow.ArrowInvalid as error:
            amiss.append(f"{shard} is no whole Parquet file ({in_one_line(error)})")
    for corpus, rows in sorted(num_rows.items()):
        report = folder / "reports" / f"{corpus}.json"
        if not corpus:
            amiss.append("shards lie in data/ itself, accepted is data/<corpus>/")
        elif not report.is_file():
            amiss.append(f"data/{corpus} has no reports/{corpus}.json")
        else:
            amiss += _report_amiss(report, rows)
    return amiss


def _report_amiss(report: Path, rows: int) -> list[str]:
    name = f"reports/{report.name}"
    try:
        counts = json.loads(report.read_text(encoding="utf-8"))
        entered, left, rejected = (int(counts[f"records_{what}"]) for what in ("in", "out", "rejected"))
    except (ValueError, TypeError, KeyError) as error:
        return [f"{name} lacks the numbers records_in, records_out, records_rejected ({type(error).__name__}: {error})"]
    amiss = []
    if left != rows:
        amiss.append(f"{name} counts {left:,} records, data/{report.stem} holds {rows:,}")
    if entered != left + rejected:
        amiss.append(f"{name}: {entered:,} records in, but {left:,} out and {rejected:,} rejected")
    return amiss


def _configs_amiss(folder: Path, shards: list[str]) -> list[str]:
    """Return what `load_dataset` would not find by the `configs:` of the card, and which shards they leave out."""
    if not (folder / CARD).is_file():
        return [f"{CARD} is missing"]
    amiss, named = [], set()
    try:
        for config in metadata_load(folder / CARD)["configs"]:
            for split, patterns in sanitize_patterns(config["data_files"]).items():
                found = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
                named |= found
                if not found:
                    amiss.append(f"{CARD}: {config['config_name']}, {split}: there is no {', '.join(patterns)}")
    # NotImplementedError: an absolute path in data_files
    except (ValueError, KeyError, TypeError, NotImplementedError, yaml.YAMLError) as error:
        reason = in_one_line(error)
        return [f"{CARD} lacks `configs:` with config_name and data_files in its YAML head ({reason})"]
    return amiss + [f"{shard} is in none of the `configs:` of {CARD}" for shard in shards if shard not in named]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="as `python -m training.build_dataset` has left it")
    parser.add_argument("--repo_id", required=True, help="ORG/NAME; made where absent")
    parser.add_argument("--private", action="store_true", help="the repository is to be, or is, private")
    args = parser.parse_args(argv)
    print(push_dataset(args.folder, args.repo_id, private=args.private))


if __name__ == "__main__":
    run_push(main)
