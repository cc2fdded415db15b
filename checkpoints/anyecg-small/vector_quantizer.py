"""Vector quantisation on the unit sphere: lookup by cosine, codebook kept by moving averages or by a gradient loss.

Knows nothing about ECG. Sources: van den Oord et al. 2017 (arXiv 1711.00937) for losses, straight-through gradient and moving
averages; BEiT v2 (arXiv 2208.06366) for the low-dimensional normalised codes; AnyECG, stage 1, for the cosine lookup.
"""

import torch
from torch import distributed, nn
from transformers import initialization as init


class CosineVectorQuantizer(nn.Module):
    """Codebook of unit vectors (K, C).

    Args:
        codebook_size (`int`): K. codebook_dim (`int`): C.
        update (`str`): "ema": moving averages of the vectors assigned to a code; "gradient": the codebook loss.
        ema_decay (`float`): also the decay of the usage statistics in "gradient" mode.
        dead_code_share, dead_code_steps: a code used less than `dead_code_share / K` of the time for `dead_code_steps`
            training steps is moved onto a random vector of the batch.
    """

    def __init__(self, codebook_size, codebook_dim, *, update, ema_decay, dead_code_share, dead_code_steps):
        super().__init__()
        self.update, self.ema_decay = update, ema_decay
        self.dead_code_share, self.dead_code_steps = dead_code_share, dead_code_steps
        self.codebook = nn.Parameter(torch.empty(codebook_size, codebook_dim), requires_grad=update == "gradient")
        self.register_buffer(
            "code_share", torch.full((codebook_size,), 1.0 / codebook_size)
        )  # moving share of the tokens
        self.register_buffer("steps_unused", torch.zeros(codebook_size, dtype=torch.int64))
        self.register_buffer("num_restarts", torch.zeros((), dtype=torch.int64))

    @property
    def codebook_size(self) -> int:
        return self.codebook.shape[0]

    def reset_parameters(self):
        """Fill parameters and buffers as at the start; called by the model's `_init_weights`."""
        init.normal_(self.codebook)
        init.constant_(self.code_share, 1.0 / self.codebook_size)
        init.zeros_(self.steps_unused)
        init.zeros_(self.num_restarts)

    def forward(self, vectors, valid, num_valid=None):
        """Quantise `vectors` (..., C); `valid` (...) bool says which count.

        Args:
            num_valid (`torch.Tensor`, *optional*): over how many vectors the means of the losses go, where a batch is divided
                over processes; default: those of `valid`.

        Returns:
            `tuple`: quantised unit vectors (..., C) with the straight-through gradient, codes (...) int64 with -100 where not
            valid, codebook loss, commitment loss: means over valid vectors of the squared distance.
        """
        vectors = nn.functional.normalize(vectors.float(), dim=-1)
        codes = self.lookup(vectors)
        quantized = self.embed(codes)
        codebook_loss = _valid_mean((quantized - vectors.detach()).square().sum(-1), valid, num_valid)
        commitment_loss = _valid_mean((vectors - quantized.detach()).square().sum(-1), valid, num_valid)
        if self.training:
            self._track(vectors.detach()[valid], codes[valid])
        quantized = vectors + (quantized - vectors).detach()
        return quantized, codes.masked_fill(~valid, -100), codebook_loss, commitment_loss

    def lookup(self, vectors):
        """Return the code with the greatest cosine for each of `vectors` (..., C): argmin_i || h/|h| - v_i/|v_i| ||."""
        directions = nn.functional.normalize(self.codebook.float(), dim=-1)
        with torch.autocast(
            vectors.device.type, enabled=False
        ):  # else mixed precision finds other codes than inference
            return (vectors.float() @ directions.T).argmax(-1)

    def embed(self, codes):
        """Return the unit vectors (..., C) of `codes` (...)."""
        # A copy: the codebook may be moved before the backward pass of this step needs its value.
        return nn.functional.normalize(self.codebook.float().clone(), dim=-1)[codes]

    @torch.no_grad()
    def initialize(self, vectors, *, generator, num_iterations=10):
        """Start the codebook by spherical k-means on `vectors` (num, C); at least K of them, better 10 K.

        Raises:
            ValueError: fewer vectors than codes.
        """
        if len(vectors) < self.codebook_size:
            raise ValueError(
                f"{len(vectors)} vectors cannot start {self.codebook_size} codes; give at least as many vectors as codes, "
                "better ten times as many, from many records."
            )
        vectors = nn.functional.normalize(vectors.float(), dim=-1)
        centers = vectors[torch.randperm(len(vectors), generator=generator)[: self.codebook_size]]
        for _ in range(num_iterations):
            codes = torch.cat([(chunk @ centers.T).argmax(-1) for chunk in vectors.split(8192)])
            sums, counts = _sum_by_code(vectors, codes, len(centers))
            centers = torch.where(counts[:, None] > 0, nn.functional.normalize(sums, dim=-1), centers)
        self.codebook.copy_(centers)
        self.code_share.copy_(counts / counts.sum())
        self.steps_unused.zero_()
        self.num_restarts.zero_()

    @torch.no_grad()
    def _track(self, vectors, codes):
        """Update usage, codebook ("ema") and dead codes from the valid `vectors` (num, C) of one training step."""
        sums, counts = _sum_by_code(vectors, codes, self.codebook_size)
        _sum_over_processes(sums, counts)
        total = counts.sum()
        self.code_share.lerp_(torch.where(total > 0, counts / total.clamp(min=1), self.code_share), 1 - self.ema_decay)
        if self.update == "ema":
            self._move_codes(sums, counts)
        self._restart_dead_codes(vectors)

    def _move_codes(self, sums, counts):
        """Move each used code towards the mean direction of its vectors; unused codes stay where they are."""
        target = nn.functional.normalize(sums, dim=-1)
        moved = nn.functional.normalize(self.codebook.lerp(target, 1 - self.ema_decay), dim=-1)
        self.codebook.copy_(torch.where(counts[:, None] > 0, moved, self.codebook))

    def _restart_dead_codes(self, vectors):
        """Move codes that were hardly used for long onto random vectors of this batch, the same on every process."""
        unused = self.code_share < self.dead_code_share / self.codebook_size
        self.steps_unused.copy_(torch.where(unused, self.steps_unused + 1, 0))
        dead = self.steps_unused >= self.dead_code_steps
        if not dead.any():
            return
        picked = self._pick(vectors)
        if picked is None:
            return
        self.codebook.copy_(torch.where(dead[:, None], picked, self.codebook))
        self.code_share.copy_(torch.where(dead, 1.0 / self.codebook_size, self.code_share))
        self.steps_unused.masked_fill_(dead, 0)
        self.num_restarts += dead.sum()

    def _pick(self, vectors):
        """Return K random vectors of the whole batch, the same on every process, or None where no process has one.

        They follow from the number of restarts so far and from the order of the vectors over all processes: so they are the
        same for any number of processes, and after a resume.
        """
        rank, num_processes = _place()
        nums = torch.zeros(num_processes, dtype=torch.int64, device=vectors.device)
        nums[rank] = len(vectors)
        _sum_over_processes(nums)
        total = int(nums.sum())
        if total == 0:
            return None
        generator = torch.Generator().manual_seed(int(self.num_restarts))
        places = torch.randint(total, (self.codebook_size,), generator=generator).to(vectors.device) - nums[:rank].sum()
        is_here = (places >= 0) & (places < len(vectors))
        picked = vectors.new_zeros(self.codebook_size, vectors.shape[-1])
        picked[is_here] = vectors[places[is_here]]
        _sum_over_processes(picked)
        return picked


def code_statistics(
    codes: torch.Tensor, codebook_size: int, *, over_processes: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(usage, perplexity)` of `codes` (negative ones are left out): share of codes used, exp of their entropy.

    With `over_processes` of those of all processes, which must all call it.
    """
    counts = torch.zeros(codebook_size, device=codes.device).index_add_(
        0, codes.clamp(min=0).flatten(), (codes >= 0).float().flatten()
    )
    if over_processes:
        _sum_over_processes(counts)
    shares = counts / counts.sum().clamp(min=1)
    return (counts > 0).float().mean(), torch.exp(-torch.xlogy(shares, shares).sum())


def _valid_mean(values, valid, num_valid):
    return (values * valid).sum() / (valid.sum() if num_valid is None else num_valid).clamp(min=1)


def _place() -> tuple[int, int]:
    """Return the number of this process and how many train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _sum_over_processes(*values: torch.Tensor) -> None:
    """Put the sum over all processes into each of `values`."""
    if _place()[1] > 1:
        for value in values:
            distributed.all_reduce(value)


def _sum_by_code(vectors, codes, num_codes):
    sums = vectors.new_zeros(num_codes, vectors.shape[-1]).index_add_(0, codes, vectors)
    counts = vectors.new_zeros(num_codes).index_add_(0, codes, torch.ones_like(codes, dtype=vectors.dtype))
    return sums, counts
