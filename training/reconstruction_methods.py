"""Ways to generate a lead: what needs no network, a reconstruction head, the codes of masked-code modelling.

Each is a function from a batch with `bool_masked_pos` to the waveforms `(B, 12, T)` in millivolt, rows in standard order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from anyecg_hf.leads import STANDARD_LEADS
from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction, complete_linearly
from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer

Method = Callable[[dict[str, torch.Tensor]], np.ndarray]
LEAST_SQUARES = "least squares"


def baselines(covariance: np.ndarray) -> dict[str, Method]:
    """Return least squares from the seen leads, the copy of the seen lead most alike, and zeros.

    Args:
        covariance (`np.ndarray` of shape `(12, 12)`): mean products of the leads in training records, mV^2.
    """
    products = torch.eye(len(STANDARD_LEADS) + 1)
    products[1:, 1:] = torch.from_numpy(covariance).float()

    def least_squares(batch):
        rows = torch.nn.functional.one_hot(batch["lead_ids"], len(STANDARD_LEADS) + 1).float()
        visible = batch["attention_mask"].bool() & ~batch["bool_masked_pos"]
        waveforms, _ = complete_linearly(batch["input_values"], rows, visible, products)
        return torch.einsum("bln,bnt->blt", rows, waveforms).numpy()

    spread = np.sqrt(np.diag(covariance))
    likeness = covariance / np.outer(spread, spread)
    return {
        LEAST_SQUARES: least_squares,
        "nearest lead copied": lambda batch: _copy_nearest(batch, likeness),
        "zeros": lambda batch: np.zeros(batch["input_values"].shape, np.float32),
    }


def _copy_nearest(batch: dict[str, torch.Tensor], likeness: np.ndarray) -> np.ndarray:
    """Return each lead as that seen lead which is most correlated with it in the training records."""
    values, ids = batch["input_values"].numpy(), batch["lead_ids"].numpy() - 1
    hidden = batch["bool_masked_pos"].numpy()
    visible = batch["attention_mask"].numpy().astype(bool) & ~hidden
    size, result = values.shape[-1] // hidden.shape[-1], np.zeros_like(values)
    for record, row, patch in np.argwhere(hidden):
        alike = np.where(visible[record, :, patch], likeness[ids[record, row], ids[record]], -np.inf)
        nearest, span = int(alike.argmax()), slice(patch * size, (patch + 1) * size)
        if np.isfinite(alike[nearest]):
            result[record, row, span] = values[record, nearest, span]
    return result


def by_head(folder: str) -> Method:
    """Return the method of a checkpoint with a reconstruction head."""
    model = AnyECGForLeadReconstruction.from_pretrained(folder).eval()
    return lambda batch: model(**batch).reconstruction.float().numpy()


def by_codes(folder: str, quantizer: str) -> Method:
    """Return the method of masked-code modelling: the most probable code of each hidden patch, decoded by the quantizer."""
    model, coder = AnyECGForMaskedCodeModeling.from_pretrained(folder), AnyECGRhythmQuantizer.from_pretrained(quantizer)
    model, coder = model.eval(), coder.eval()

    def method(batch):
        hidden = batch["bool_masked_pos"]
        visible = batch["attention_mask"].bool() & ~hidden
        codes = coder.encode(batch["input_values"], batch["lead_ids"], visible)
        codes = torch.where(hidden, model(**batch).logits.argmax(-1), codes)
        return coder.decode(codes, batch["lead_ids"]).numpy()

    return method
