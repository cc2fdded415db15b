"""A checkpoint folder -> a model repository on the Hugging Face Hub:

    python -m training.push_to_hub --checkpoint DIR --repo ORG/NAME [--private] [--revision BRANCH] [--tag TAG]

The folder is one that `training.publish` or `export_checkpoint` has written, with its card. Only what belongs to a checkpoint
leaves, after it was loaded by its own code, in a process that cannot import this package, and gave what its reference pair
says. Everything is one commit with a tag, which the examples of the card pin; a push that broke goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers
from huggingface_hub import CommitInfo, get_token

import anyecg_hf
from anyecg_hf import reference_pair
from anyecg_hf.hub import check_checkpoint, checkpoint_files

from .hub_push import Target, push_files, run_push

# On the Hub: weights that an earlier push has left would be loaded in the place of the new ones. All else is left alone.
OWN_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
OF_THE_HUB = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")  # beginnings of settings, tokens among them


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    branch: str = "main",
    tag: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Return the commit with which the Hub has exactly the checkpoint in `folder`; see `push_files`.

    Args:
        folder: a whole checkpoint with a card; see `anyecg_hf.hub.checkpoint_files` for what leaves of it.
        repo_id (`str`): ORG/NAME; made where absent.
        private: for the owner and those invited only; refused where the repository is public already.
        branch: made where absent.
        tag (`str`, *optional*): of the commit, new; the card's examples pin it.
        token (`str`, *optional*): with write access. Default: HF_TOKEN or the one of `hf auth login`.

    Raises:
        ValueError: the folder is no whole checkpoint, has no card, does not give what its reference pair says, or holds a
            token or a path of this machine; or the repository is public and `private` was asked for, or has the tag.
        PermissionError: the Hub does not let this token write.
        ConnectionError: no answer or trouble on the Hub, after several tries; or someone else pushed at the same time.
    """
    folder = Path(folder)
    check_checkpoint(folder)
    files = checkpoint_files(folder)
    if "README.md" not in files:
        raise ValueError(f"{folder} has no card: write README.md, with its licences, as docs/publishing.md says.")
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / "checkpoint"  # what is verified is what leaves, and is enough
        staged.mkdir()
        for name in files:
            shutil.copyfile(folder / name, staged / name)
        card = (staged / "README.md").read_text(encoding="utf-8")
        card = card_on_hub(card, name=folder.resolve().name, repo_id=repo_id, tag=tag)
        (staged / "README.md").write_text(card, encoding="utf-8")
        refuse_secrets(staged, files, token or get_token())
        verify_in_clean_process(staged, name=str(folder))
        target = Target(repo_id, "model", private, branch, tag)
        return push_files(staged, files, target, is_own=lambda path: bool(OWN_WEIGHTS.fullmatch(path)), token=token)


def card_on_hub(card: str, *, name: str, repo_id: str, tag: str | None) -> str:
    """Return a card of `training.publish` as it reads on the Hub: repository and tag in the place of the folder.

    Its examples load `"checkpoints/NAME"`, and its base model is a checkpoint beside it: on the Hub, of the same owner.
    """
    pinned = f'"{repo_id}"' + (f', revision="{tag}"' if tag else "")
    owner = repo_id.rpartition("/")[0]
    card = card.replace(f'"checkpoints/{name}"', pinned)
    return re.sub(r"^base_model: (?=[^/\s]+$)", f"base_model: {owner}/", card, count=1, flags=re.MULTILINE)


def refuse_secrets(folder: Path, files: Sequence[str], token: str | None) -> None:
    """Raise where a text file holds a Hub token, or a path below the home folder of whoever pushes.

    Raises:
        ValueError: names the file and what is in it, not the token.
    """
    home = f"{Path.home()}{os.sep}".encode()
    for name in files:
        content = b"" if name.endswith(".safetensors") else (folder / name).read_bytes()
        held = "a token of the Hub" if TOKEN.search(content) or (token and token.encode() in content) else None
        if held or home in content:
            raise ValueError(
                f"{name} holds {held or 'a path of your home folder'}: take it out, then push again. Nothing was pushed."
            )


def verify_in_clean_process(folder: Path, *, name: str) -> None:
    """Verify a checkpoint by the code in it, in a process that cannot import this package and asks no network.

    Args:
        name: of the folder, for messages.

    Raises:
        ValueError: it does not load there, or does not give what its reference pair says; or the library is too old for it.
    """
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 10):
        raise ValueError(
            f"Transformers {transformers.__version__} loads no folder by its own code; pushing needs 5.10."
        )
    with tempfile.TemporaryDirectory() as home:
        env = {key: value for key, value in os.environ.items() if not key.startswith(OF_THE_HUB)}
        env |= {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-P", reference_pair.__file__, str(folder)]
        done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stdout.strip() or done.stderr.strip()[-2000:]).replace(str(folder), name)
        raise ValueError(f"{name} does not pass where this package is not installed: {reason} Nothing was pushed.")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder written by training.publish or export_checkpoint")
    parser.add_argument("--repo", required=True, help="ORG/NAME; made where absent")
    parser.add_argument("--private", action="store_true", help="the repository is to be, or is, private")
    parser.add_argument("--revision", default="main", help="branch; made where absent")
    parser.add_argument("--tag", default=f"v{anyecg_hf.__version__}", help="of the commit; the card's examples pin it")
    args = parser.parse_args(argv)
    commit = push_checkpoint(args.checkpoint, args.repo, private=args.private, branch=args.revision, tag=args.tag)
    print(commit.commit_url)
    print(f'pin it: from_pretrained("{args.repo}", revision="{args.tag}"), or revision="{commit.oid}"')


if __name__ == "__main__":
    run_push(main)
