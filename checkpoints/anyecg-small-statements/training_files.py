"""What a training run leaves beside a checkpoint and must not travel with it."""

from pathlib import Path

PICKLES = ("*.bin", "*.ckpt", "*.pickle", "*.pkl", "*.pt", "*.pth")  # training_args.bin can hold a Hub token in clear
_GITIGNORE = "# Of a training run, not of a checkpoint: the Hub leaves these out of every push.\n"


def keep_training_files_home(folder):
    """Write a .gitignore into a saved checkpoint, unless there is one: the Hub heeds it, also in pushes of the `Trainer`."""
    path = Path(folder) / ".gitignore"
    if not path.exists():
        path.write_text(_GITIGNORE + "".join(f"{pattern}\n" for pattern in PICKLES), encoding="utf-8")
