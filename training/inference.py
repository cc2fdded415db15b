"""Outputs of a model over a data set, in full precision: what calibration, thresholds and reported figures rest on."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .collate import ECGCollator
from .data import ECGDataset

INPUT_NAMES = ("input_values", "lead_ids", "attention_mask")


def predict_logits(model: nn.Module, records: ECGDataset, collator: ECGCollator, *, batch_size: int = 32) -> np.ndarray:
    """Return the logits of all records in order, float32 `(records, labels)`."""
    return _run(model, records, collator, "logits", batch_size)


def embed_records(model: nn.Module, records: ECGDataset, collator: ECGCollator, *, batch_size: int = 32) -> np.ndarray:
    """Return one vector a record from a backbone, float32 `(records, hidden_size)`: the mean of its valid tokens."""
    return _run(model, records, collator, "pooler_output", batch_size)


@torch.no_grad()
def _run(model: nn.Module, records: ECGDataset, collator: ECGCollator, field: str, batch_size: int) -> np.ndarray:
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    results = []
    loader = DataLoader(records, batch_size=batch_size, collate_fn=collator)
    for batch in tqdm(loader, desc=field, unit="batch", mininterval=1.0, leave=False):
        outputs = model(**{name: batch[name].to(device) for name in INPUT_NAMES})
        results.append(getattr(outputs, field).float().cpu().numpy())
    model.train(was_training)
    return np.concatenate(results)
