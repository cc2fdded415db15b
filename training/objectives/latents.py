"""Prediction of latents: from what is visible, predict the states that a slowly following teacher gives the hidden patches.

Source: I-JEPA (Assran et al. 2023, arXiv 2301.08243); on ECG: Weimann & Conrad 2024 (arXiv 2410.13867), Kim 2024 (arXiv
2410.08559). The student does not see hidden patches at all, a narrow predictor puts mask tokens in their place.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from anyecg_hf.configuration_anyecg import AnyECGConfig
from anyecg_hf.modeling_anyecg import AnyECGEncoder, AnyECGModel

from .base import Objective, mean_over, real_positions, scored_positions, sums_by_record


class LatentPrediction(Objective):
    """Smooth L1 distance between predicted and the teacher's normalised states of hidden patches.

    Args:
        model: the student; the teacher starts as its copy and is what the run ends with.
        predictor_size, predictor_layers (`int`): width and depth of the predictor.
        teacher_decay (`float`): share of itself that the teacher keeps in a step, at the start; rises to 1 as a cosine.
    """

    logged = ("target_deviation",)
    follows_length = True  # the teacher's decay
    floors = {
        "target_deviation": (
            0.05,
            "The teacher gives all patches one state: lower the learning rate or raise teacher_decay.",
        )
    }

    def __init__(
        self, model: AnyECGModel, *, predictor_size: int = 96, predictor_layers: int = 3, teacher_decay: float = 0.996
    ):
        super().__init__()
        self.model = model
        model.embeddings.mask_token.requires_grad_(
            False
        )  # not used: without a gradient it would have no optimizer state
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.predictor = LatentPredictor(model.config, predictor_size, predictor_layers)
        self.teacher_decay = teacher_decay

    def forward(self, num_items_in_batch=None, **batch):
        real, where = real_positions(batch), scored_positions(batch)
        with torch.no_grad():
            target = self.teacher.eval()(batch["input_values"], batch["lead_ids"], real).last_hidden_state.float()
            target = nn.functional.layer_norm(target, target.shape[-1:])
        states = self.model(batch["input_values"], batch["lead_ids"], real & ~where).last_hidden_state
        predicted = self.predictor(states, batch["lead_ids"], real, where).float()
        distance = nn.functional.smooth_l1_loss(predicted, target, reduction="none").mean(-1)  # (B, L, P)
        loss = mean_over(distance, where, num_items_in_batch and num_items_in_batch["hidden"])
        if self.training:  # deviation over positions: 0 where the teacher has collapsed onto one state
            return {"loss": loss, "target_deviation": target[where].std(0).mean()}
        return {"loss": loss, "sums": sums_by_record([distance, target.square().mean(-1)], where)}

    def figures(self, sums):
        num, distance, _ = sums.sum(0).tolist()
        return {"latent_distance": distance / num}

    @torch.no_grad()
    def after_step(self):
        decay = 1 - (1 - self.teacher_decay) * (math.cos(math.pi * self.progress) + 1) / 2
        torch._foreach_lerp_(list(self.teacher.parameters()), [p.detach() for p in self.model.parameters()], 1 - decay)

    def finished_model(self):
        return self.teacher


class LatentPredictor(nn.Module):
    """Cardio-Sparse layers over the whole grid: visible states as they are, mask tokens where patches are hidden."""

    def __init__(self, config: AnyECGConfig, size: int, num_layers: int):
        super().__init__()
        narrow = AnyECGConfig(
            **{
                **config.to_dict(),
                "hidden_size": size,
                "num_hidden_layers": num_layers,
                "num_attention_heads": max(1, size // 64),
            }
        )
        self.enter = nn.Linear(config.hidden_size, size)
        self.mask_token = nn.Parameter(torch.zeros(size))
        self.lead_embedding = nn.Embedding(config.num_lead_ids, size)
        self.time_embedding = nn.Embedding(config.max_patches, size)
        self.encoder = AnyECGEncoder(narrow, num_layers)
        self.leave = nn.Linear(size, config.hidden_size)
        self.apply(lambda module: _start(module, config.initializer_range))

    def forward(self, states, lead_ids, real, hidden):
        """Return predictions `(B, L, P, D)` for every patch from `states` (B, L, P, D) of the visible ones."""
        grid = self.enter(states)
        grid = torch.where(hidden[..., None], self.mask_token.to(grid.dtype), grid)
        times = torch.arange(grid.shape[2], device=grid.device)
        grid = grid + self.lead_embedding(lead_ids)[:, :, None] + self.time_embedding(times)
        return self.leave(self.encoder(grid, real).last_hidden_state)


def _start(module: nn.Module, std: float) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
