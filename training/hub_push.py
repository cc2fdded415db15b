"""Files of a folder -> one commit of a repository on the Hugging Face Hub; for checkpoints and for data sets."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

logger = logging.getLogger(__name__)

PAUSES = (2, 8, 30, 120)  # seconds before the next try where the Hub is in trouble
TEMPORARY, REFUSED, CHANGED = (408, 429, 500, 502, 503, 504), (401, 403, 404), 412


@dataclass(frozen=True)
class Target:
    """Where files go.

    Args:
        repo_id: ORG/NAME; made where absent.
        repo_type: "model" or "dataset".
        private: for the owner and those invited only; refused where the repository is public already.
        branch: made where absent, from main.
        tag: of the commit; one that is there already is refused, since what it names would change.
    """

    repo_id: str
    repo_type: str
    private: bool = False
    branch: str = "main"
    tag: str | None = None


def push_files(
    folder: Path,
    files: Sequence[str],
    target: Target,
    *,
    is_own: Callable[[str], bool],
    token: str | None = None,
) -> CommitInfo:
    """Return the commit with which the Hub has exactly `files` of `folder` among those that are its own.

    Readers see the state before or after, never one between: everything is one commit, with the state it was made for as
    its parent. (`upload_folder` makes several of a large folder.) Files are sent before it; a second try, or the same
    call after a break, does not send again what has arrived, and does not commit twice.

    Args:
        is_own: tells of a path on the Hub whether it is deleted there where it is not among `files`.
        token: with write access. Default: HF_TOKEN or the one of `hf auth login`.

    Raises:
        ValueError: the repository is public and `private` was asked for, or the tag is there already.
        PermissionError: the Hub does not let this token write.
        ConnectionError: no answer or trouble on the Hub, after several tries; or someone else pushed at the same time.
    """
    api = HfApi(token=token)
    pauses, is_tag_new = iter(PAUSES), target.tag is None
    while True:
        try:
            if not is_tag_new:  # once: a second try may find the tag that the first one has set
                _refuse_known_tag(api, target)
                is_tag_new = True
            return _commit(api, folder, files, target, is_own)
        except (HTTPError, RuntimeError, json.JSONDecodeError) as error:  # RuntimeError: one file could not be sent
            pause = next(pauses, None)
            if pause is None or not _is_temporary(error):
                raise _explained(error, target.repo_id) from error
            logger.warning("%s: %s; next try in %s seconds", target.repo_id, in_one_line(error), pause)
            time.sleep(pause)


def _refuse_known_tag(api: HfApi, target: Target) -> None:
    repo = {"repo_id": target.repo_id, "repo_type": target.repo_type}
    try:
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(**repo).tags}
    except RepositoryNotFoundError:  # it is yet to be made
        return
    if target.tag in tags:
        raise ValueError(
            f"{target.repo_id} has a tag {target.tag}, of commit {tags[target.tag]}. A tag does not move: push with another."
        )


def _commit(
    api: HfApi, folder: Path, files: Sequence[str], target: Target, is_own: Callable[[str], bool]
) -> CommitInfo:
    """Make the repository hold `files` and return the commit. Done again, it makes no second commit."""
    repo = {"repo_id": target.repo_id, "repo_type": target.repo_type}
    repo["repo_id"] = api.create_repo(**repo, private=target.private, exist_ok=True).repo_id
    if target.private and not api.repo_info(**repo).private:
        raise ValueError(f"{target.repo_id} is public: make it private in its settings, or push without `private`.")
    if target.branch != "main":
        api.create_branch(**repo, branch=target.branch, exist_ok=True)
    before = api.repo_info(**repo, revision=target.branch)
    present = api.list_repo_files(**repo, revision=before.sha)
    gone = sorted(path for path in set(present) - set(files) if is_own(path))
    operations = [CommitOperationDelete(path, is_folder=False) for path in gone]
    operations += [CommitOperationAdd(path, folder / path) for path in files]
    logger.info("%s: %d files, %d to be deleted", target.repo_id, len(files), len(gone))
    commit = api.create_commit(
        **repo,
        operations=operations,
        commit_message=f"{len(files)} files from anyecg-hf",
        revision=target.branch,
        parent_commit=before.sha,
    )
    if target.tag:
        api.create_tag(**repo, tag=target.tag, revision=commit.oid, exist_ok=True)
    return commit


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
    reason, status = in_one_line(error).rstrip(".") + ".", _status(error)
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


def in_one_line(error: Exception) -> str:
    reason = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else f"{error}"
    return " ".join(reason.split()) or type(error).__name__


def run_push(main: Callable[[Sequence[str]], None]) -> None:
    """Run a command that pushes; what a user can meet ends with one line and code 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where it was")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
