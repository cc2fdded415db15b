"""A built dataset folder -> a dataset repository on the Hugging Face Hub:

    python -m training.publish_dataset --folder DIR --repo_id ORG/NAME [--private]

The folder is one that `python -m training.build_dataset` has finished: README.md with the `configs:` that `load_dataset`
reads, data/<corpus>/*.parquet, reports/<corpus>.json, cards/. What an earlier push has left in data/, cards/ and reports/
and the folder no longer has is deleted. Only what has changed is sent, and a push that broke goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import pyarrow.parquet
import yaml
from datasets.data_files import sanitize_patterns
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HTTPError

logger = logging.getLogger(__name__)

CARD = "README.md"
OWN_FOLDERS = ("data/", "cards/", "reports/")  # on the Hub, too: whatever else is there is left alone
UNFINISHED = ".unfinished"  # in the name of a file that the build is still writing
PAUSES = (2, 8, 30, 120)  # seconds before the next try where the Hub is in trouble
TEMPORARY, REFUSED, CHANGED = (408, 429, 500, 502, 503, 504), (401, 403, 404), 412


def push_dataset(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Return the address of the commit with which the Hub has exactly the dataset in `folder`.

    Readers see the state before or after, never one between: everything is one commit, with the state it was made for as
    its parent. (`upload_folder` makes several of a large folder.) Files are sent before it; a second try, or the same
    call after a break, does not send again what has arrived.

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
    folder = Path(folder)
    files = dataset_files(folder)
    api = HfApi(token=token)
    pauses = iter(PAUSES)
    while True:
        try:
            return _commit(api, folder, files, repo_id, private)
        except (HTTPError, RuntimeError, json.JSONDecodeError) as error:  # RuntimeError: one file could not be sent
            pause = next(pauses, None)
            if pause is None or not _is_temporary(error):
                raise _explained(error, repo_id) from error
            logger.warning("%s: %s; next try in %s seconds", repo_id, _in_one_line(error), pause)
            time.sleep(pause)


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
            amiss.append(f"{shard} is no whole Parquet file ({_in_one_line(error)})")
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
        reason = _in_one_line(error)
        return [f"{CARD} lacks `configs:` with config_name and data_files in its YAML head ({reason})"]
    return amiss + [f"{shard} is in none of the `configs:` of {CARD}" for shard in shards if shard not in named]


def _commit(api: HfApi, folder: Path, files: list[str], repo_id: str, private: bool) -> str:
    """Make the repository hold `files` and return the commit's address. Done again, it makes no second commit."""
    repo = {"repo_id": repo_id, "repo_type": "dataset"}
    repo["repo_id"] = api.create_repo(**repo, private=private, exist_ok=True).repo_id
    before = api.repo_info(**repo)
    if private and not before.private:
        raise ValueError(f"{repo_id} is public: make it private in its settings, or push without `private`.")
    present = api.list_repo_files(**repo, revision=before.sha)
    gone = sorted(path for path in set(present) - set(files) if path.startswith(OWN_FOLDERS))
    operations = [CommitOperationDelete(path, is_folder=False) for path in gone]
    operations += [CommitOperationAdd(path, folder / path) for path in files]
    logger.info("%s: %d files, %d to be deleted", repo_id, len(files), len(gone))
    message = f"{len(files)} files from anyecg-hf"
    return api.create_commit(**repo, operations=operations, commit_message=message, parent_commit=before.sha).commit_url


def _http_error(error: Exception) -> HTTPError | None:
    """Return what the Hub or the network answered, also where the client has wrapped it."""
    return next((each for each in (error, error.__cause__) if isinstance(each, HTTPError)), None)


def _status(error: Exception) -> int | None:
    http_error = _http_error(error)
    return http_error.response.status_code if isinstance(http_error, HfHubHTTPError) else None


def _is_temporary(error: Exception) -> bool:
    if isinstance(error, json.JSONDecodeError):  # a page of a gateway in the Hub's place
        return True
    return _http_error(error) is not None and _status(error) in (None, *TEMPORARY)  # None: no answer


def _explained(error: Exception, repo_id: str) -> OSError:
    reason, status = _in_one_line(error).rstrip(".") + ".", _status(error)
    if status in REFUSED:
        return PermissionError(
            f"{repo_id}: the Hub refuses: {reason} Accepted is a token with write access: `hf auth login`, HF_TOKEN or "
            "`token=`. Readers see what they saw before."
        )
    if status == CHANGED:
        return ConnectionError(
            f"{repo_id} was changed by someone else during this push: {reason} Look at it, then push again. Nothing of "
            "this push is seen."
        )
    return ConnectionError(
        f"{repo_id}: {reason} Readers see the old state or the whole new one. Run the same again: what has arrived is "
        "not sent again."
    )


def _in_one_line(error: Exception) -> str:
    reason = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else f"{error}"
    return " ".join(reason.split()) or type(error).__name__


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="as `python -m training.build_dataset` has left it")
    parser.add_argument("--repo_id", required=True, help="ORG/NAME; made where absent")
    parser.add_argument("--private", action="store_true", help="the repository is to be, or is, private")
    args = parser.parse_args(argv)
    print(push_dataset(args.folder, args.repo_id, private=args.private))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it was")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
