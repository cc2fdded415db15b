"""What a run starts from, as SHA-256 of its content: a run that is taken up again must find the same under the same names.

And the software it runs on, of which a change is only told: newer software is often the reason to take a run up again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import transformers

from .checkpointing import CONFIG, EXTRACTOR_FILE
from .code_shards import weights_sha256
from .data import ECGDataset

PACKAGES = ("anyecg_hf", "tokenization", "training")
NO_CONTENT = ("transformers_version", "_name_or_path")  # of a configuration: who wrote it and where


def digest_inputs(train: ECGDataset, held_out: ECGDataset, **folders: str | None) -> dict[str, str]:
    """Return SHA-256 by name: of the records, of the stored codes where there are some, of the models in `folders` by option."""
    digests = {"training records": train.sha256(), "records of fold 9": held_out.sha256()}
    if train.codes is not None:
        digests["--codes"] = train.codes.sha256()
    return digests | {f"--{option}": model_sha256(folder) for option, folder in folders.items() if folder}


def model_sha256(folder: str | Path) -> str:
    """Return the SHA-256 of the weights, the configuration and the extractor of a model's folder; other files do not count.

    Raises:
        ValueError: it holds no weights.
    """
    digest = hashlib.sha256(weights_sha256(folder).encode())
    for path in (Path(folder) / CONFIG, Path(folder) / EXTRACTOR_FILE):
        if path.is_file():
            content = {name: value for name, value in json.loads(path.read_text()).items() if name not in NO_CONTENT}
            digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def describe_software() -> dict[str, str]:
    """Return the versions of the libraries that compute, and the SHA-256 of this project's code."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parent.parent
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(path.read_bytes())
    libraries = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    return libraries | {"code of the project": digest.hexdigest()[:12]}
