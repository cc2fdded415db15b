"""The windows of long records as vectors of a frozen backbone, kept in a cache.

A cache file is named by the SHA-256 of all that its vectors follow from: samples, rate, leads, extractor, weights and
configuration of the backbone. It is written under another name and renamed, and holds the SHA-256 of its vectors: a file that is
not as it was written is made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.modeling_anyecg_long import AnyECGForLongRecords
from anyecg_hf.records import Record

from .record_store import default_cache_dir

logger = logging.getLogger(__name__)

FORMAT = 1  # of what is computed; raise it where the same content would give other vectors
WINDOWS_PER_BATCH = 32


def state_sha256(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's weights and buffers, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def embed_windows(
    model: AnyECGForLongRecords, extractor: AnyECGFeatureExtractor, record: Record
) -> dict[str, np.ndarray]:
    """Return `features` float32 `(windows, F)` of a record and `start_seconds` `(windows,)`.

    Raises:
        ValueError: the record is shorter than a window, or as the extractor says.
    """
    if record.duration_seconds < extractor.window_seconds:
        raise ValueError(
            f'Record "{record.record_name}" lasts {record.duration_seconds:.3g} s; a window takes '
            f"{extractor.window_seconds:g} s. Leave it out: for short records there is `ecg-classification`."
        )
    items, start_seconds = extractor.windows(record)
    vectors = []
    for first in range(0, len(items), WINDOWS_PER_BATCH):
        batch = extractor.pad(items[first : first + WINDOWS_PER_BATCH], return_tensors="pt")
        vectors.append(model.embed_windows(**batch).float().cpu().numpy())
    return {"features": np.concatenate(vectors), "start_seconds": start_seconds}


class FeatureCache:
    """Vectors of windows by what they follow from.

    Args:
        model, extractor: that make them; the model's backbone must not change while this is in use.
        folder: where the files are; default: as that of prepared records, see `record_store.default_cache_dir`.
    """

    def __init__(
        self, model: AnyECGForLongRecords, extractor: AnyECGFeatureExtractor, folder: str | Path | None = None
    ):
        self.model, self.extractor = model.eval(), extractor
        self.folder = default_cache_dir(folder) / "windows"
        options = json.dumps(extractor.to_dict(), sort_keys=True, default=str)
        self._of_all = f"{FORMAT} {state_sha256(model.anyecg)} {model.config.pooling} {options}"

    def of_record(self, record: Record) -> dict[str, np.ndarray]:
        """Return what `embed_windows` gives of a record, from the cache where it is there."""
        signal = np.ascontiguousarray(record.signal)
        facts = json.dumps(
            [signal.shape, str(signal.dtype), float(record.sampling_rate), record.lead_names, record.units]
        )
        content = hashlib.sha256(facts.encode() + signal.tobytes()).hexdigest()
        return self.get(content, lambda: embed_windows(self.model, self.extractor, record))

    def get(self, content: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the arrays that `make` returns for `content`, any text that tells it from other content."""
        name = hashlib.sha256(f"{self._of_all} {content}".encode()).hexdigest()[:32]
        path = self.folder / f"{name}.safetensors"
        arrays = _read(path)
        if arrays is None:
            arrays = make()
            _write(path, arrays)
        return arrays


def _sum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} {arrays[name].dtype}".encode() + arrays[name].tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """Return what a file holds, None where there is none or it is not as it was written."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            if (file.metadata() or {}).get("sha256") == _sum(arrays):
                return arrays
    except (SafetensorError, OSError) as error:
        logger.warning("%s: %s", path.name, error)
    logger.warning("%s is damaged: its windows are embedded anew", path.name)
    return None


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    try:
        save_file(arrays, str(unfinished), metadata={"sha256": _sum(arrays)})
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
