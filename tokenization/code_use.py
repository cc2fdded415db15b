"""How much of the codebook the patches of a training run really use: what the floor of a collapse is held against."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from anyecg_hf.vector_quantizer import CosineVectorQuantizer

logger = logging.getLogger(__name__)


class CodeUse:
    """Moving share of each code among the codes given to patches, with the quantizer's own decay; kept in checkpoints.

    The quantizer's `code_share` does not tell: a dead code that is moved starts there as if it had been used like the others,
    so three codes for all patches, and the rest moved again and again, would pass for a codebook in use.
    """

    def __init__(self, quantizer: CosineVectorQuantizer):
        self._quantizer = quantizer
        self.values = {"share": quantizer.code_share.detach().clone()}  # by name, as a checkpoint holds them

    def begin(self) -> None:
        """Start from the quantizer's shares: right after k-means they are counts of vectors."""
        self.values["share"].copy_(self._quantizer.code_share)

    @torch.no_grad()
    def note(self, codes: torch.Tensor, *, sum_up: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take in the codes of one training step, of any shape, negative where there is none.

        Args:
            sum_up: adds a tensor up over all processes.
        """
        share = self.values["share"]
        counts = sum_up(torch.bincount(codes[codes >= 0], minlength=len(share)).to(share.dtype))
        total = counts.sum()
        share.lerp_(torch.where(total > 0, counts / total.clamp(min=1), share), 1 - self._quantizer.ema_decay)

    def figures(self) -> dict[str, float | int]:
        """Return what is logged of the codebook.

        Its perplexity, exp of the entropy of the shares: the number of equally used codes that would carry as much; codes that
        are dead by the quantizer's measure, those that were moved and not taken since among them; codes moved so far.
        """
        share, quantizer = self.values["share"], self._quantizer
        normalised = share.double() / share.double().sum()
        return {
            "codebook_perplexity": float(torch.exp(-torch.xlogy(normalised, normalised).sum())),
            "dead_codes": int((share < quantizer.dead_code_share / len(share)).sum()),
            "restarted_codes": int(quantizer.num_restarts),
        }

    def save(self, path: Path) -> None:
        save_file(self.values, str(path))

    def load(self, path: Path) -> None:
        if not path.is_file():
            logger.warning("%s is missing (an earlier version wrote none): use is counted from here on", path)
            self.begin()
            return
        self.values["share"].copy_(load_file(str(path))["share"])
