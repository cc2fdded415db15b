"""AnyECG with a task head: classification or regression of a record, and reconstruction of hidden leads or spans."""

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from .configuration_anyecg import AnyECGConfig
from .modeling_anyecg import AnyECGModel, AnyECGPreTrainedModel
from .modeling_outputs_anyecg import AnyECGClassifierOutput, AnyECGReconstructionOutput


class AnyECGForSequenceClassification(AnyECGPreTrainedModel):
    """One set of logits a record: pooled tokens, LayerNorm, linear.

    `config.problem_type` decides the loss, as in Transformers: "multi_label_classification" (several findings at once),
    "single_label_classification" (one of several), "regression" (values, such as age).
    """

    def __init__(self, config: AnyECGConfig):
        super().__init__(config)
        self.anyecg = AnyECGModel(config)
        self.pooled_norm = nn.LayerNorm(config.pooled_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.pooled_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        lead_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> AnyECGClassifierOutput:
        """Return logits `(B, num_labels)`, and the loss where `labels` are given.

        Args:
            labels (`torch.Tensor`, *optional*): multi label: float `(B, num_labels)` of 0 and 1; single label: int `(B,)`;
                regression: float `(B, num_labels)` or, for one value, `(B,)`.
        """
        outputs = self.anyecg(
            input_values,
            lead_ids,
            attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        pooled = pool_tokens(outputs, lead_ids, attention_mask, self.config.pooling)
        logits = self.classifier(self.dropout(self.pooled_norm(pooled)))
        return AnyECGClassifierOutput(
            loss=None if labels is None else self._loss(logits.float(), labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, logits, labels):
        problem_type = self.config.problem_type or self._guess_problem_type(labels)
        if problem_type != "single_label_classification" and labels.numel() != logits.numel():
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; {problem_type} needs one value a record and label, "
                f"{tuple(logits.shape)}. config.num_labels is {self.config.num_labels}."
            )
        if problem_type == "regression":
            return nn.functional.mse_loss(logits, labels.float().view(logits.shape))
        if problem_type == "single_label_classification":
            return nn.functional.cross_entropy(logits, labels.view(-1))
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())

    def _guess_problem_type(self, labels):
        """Return the problem type as Transformers guesses it where the configuration does not say."""
        if self.config.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def pool_tokens(outputs, lead_ids, attention_mask, pooling):
    """Return mean, or mean and maximum ("mean_max"), of the valid tokens of each record: `(B, D)` or `(B, 2 * D)`."""
    if pooling == "mean":
        return outputs.pooler_output
    states = outputs.last_hidden_state
    valid = (lead_ids > 0)[..., None].expand(states.shape[:3])
    if attention_mask is not None:
        valid = valid & attention_mask.bool()
    greatest = states.masked_fill(~valid[..., None], torch.finfo(states.dtype).min).amax((1, 2))
    greatest = greatest.masked_fill(~valid.flatten(1).any(1, keepdim=True), 0)  # a record without a real patch
    return torch.cat([outputs.pooler_output, greatest], dim=-1)


class AnyECGWaveformBlock(nn.Module):
    """Norm over channels, convolution, GELU, convolution, added to the input; zero where there is no record."""

    def __init__(self, channels, kernel_size):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2)
        self.activation = nn.GELU()
        self.output = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x, mask):
        hidden = self.norm(x.transpose(1, 2)).transpose(1, 2) * mask
        hidden = self.activation(self.conv(hidden)) * mask
        return (x + self.output(hidden)) * mask


class AnyECGWaveformHead(nn.Module):
    """What the waveform of each lead is beyond its linear estimate: a U-Net of two levels along the whole record.

    Its channels are the leads by lead id, so it sees all of them sample by sample, those that are absent as estimated. The
    states of the backbone join at the coarse level. Convolutions run across the edges of patches: none makes a step there.

    Source: U-Net (Ronneberger et al. 2015, arXiv 1505.04597), with a bridge of residual blocks.
    """

    def __init__(self, config):
        super().__init__()
        (fine, coarse), (fine_stride, coarse_stride) = config.waveform_channels, config.waveform_strides
        num_leads, kernel_size, of_states = (
            config.num_lead_ids,
            config.waveform_kernel_size,
            config.waveform_state_channels,
        )
        if config.patch_size % (fine_stride * coarse_stride):
            raise ValueError(
                f"waveform_strides {list(config.waveform_strides)} do not divide a patch of {config.patch_size} samples; set "
                "strides whose product does."
            )
        self.num_leads, self.of_states = num_leads, of_states
        self.fine_positions = config.patch_size // fine_stride  # in a patch
        self.coarse_positions = self.fine_positions // coarse_stride
        self.down_fine = _down(2 * num_leads, fine, fine_stride)
        self.fine_before = AnyECGWaveformBlock(fine, kernel_size)
        self.down_coarse = _down(fine, coarse, coarse_stride)
        if of_states:
            # without bias: nothing comes of the zero states of absent patches
            self.state_projection = nn.Linear(config.hidden_size, of_states * self.coarse_positions, bias=False)
            self.join_states = nn.Conv1d(of_states * num_leads, coarse, 1)
        self.coarse = nn.ModuleList(AnyECGWaveformBlock(coarse, kernel_size) for _ in range(config.waveform_blocks))
        self.up_coarse = _up(coarse, fine, coarse_stride)
        self.fine_after = AnyECGWaveformBlock(fine, kernel_size)
        self.up_fine = _up(fine, num_leads, fine_stride)

    def forward(self, waveforms, seen, states, rows, mask):
        """Return `(B, N, T)` in the units of `waveforms`, for the N = `config.num_lead_ids` leads.

        Args:
            waveforms (`torch.Tensor` of shape `(B, N, T)`): measured or estimated.
            seen (`torch.Tensor` of shape `(B, N, P)`): 1 where measured.
            states (`torch.Tensor` of shape `(B, L, P, D)`): of the backbone.
            rows (`torch.Tensor` of shape `(B, L, N)`): one-hot, the lead of each row.
            mask (`torch.Tensor` of shape `(B, 1, P)`): 1 where the record has a patch of any lead.
        """
        samples_per_patch = waveforms.shape[-1] // seen.shape[-1]
        fine_mask, coarse_mask = _stretch(mask, self.fine_positions), _stretch(mask, self.coarse_positions)
        x = torch.cat([waveforms, _stretch(seen, samples_per_patch)], dim=1)  # (B, 2 N, T)
        fine = self.fine_before(self.down_fine(x) * fine_mask, fine_mask)
        coarse = self.down_coarse(fine)
        if self.of_states:
            coarse = coarse + self.join_states(self._by_lead(states, rows))
        coarse = coarse * coarse_mask
        for block in self.coarse:
            coarse = block(coarse, coarse_mask)
        return self.up_fine(self.fine_after((fine + self.up_coarse(coarse)) * fine_mask, fine_mask))

    def _by_lead(self, states, rows):
        """Return the states as channels by lead, `(B, N * C, coarse positions)`."""
        projected = self.state_projection(states).unflatten(-1, (-1, self.of_states)).flatten(2, 3)  # (B, L, Q, C)
        return torch.einsum("bln,blqc->bncq", rows.to(projected.dtype), projected).flatten(1, 2)


def _down(in_channels, out_channels, stride):
    return nn.Conv1d(in_channels, out_channels, 3 * stride, stride, padding=stride)


def _up(in_channels, out_channels, stride):
    return nn.ConvTranspose1d(in_channels, out_channels, 3 * stride, stride, padding=stride)


def _stretch(mask, times):
    """Return `mask` (B, C, P) with each entry `times` times, `(B, C, P * times)`."""
    return mask[..., None].expand(-1, -1, -1, times).flatten(2)


class AnyECGForLeadReconstruction(AnyECGPreTrainedModel):
    """Waveform of hidden patches: absent leads, damaged spans.

    A lead to be generated is given as a row of any content with its `lead_id`, `attention_mask` 1 and `bool_masked_pos` True.
    Its waveform is its estimate by least squares from the leads that are seen at the time, from `config.lead_covariance`, plus
    what the network finds beyond that.
    """

    def __init__(self, config: AnyECGConfig):
        super().__init__(config)
        self.anyecg = AnyECGModel(config)
        self.waveform_head = AnyECGWaveformHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        lead_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> AnyECGReconstructionOutput:
        """Return the waveform of every patch in millivolt, and the loss over hidden patches where `labels` are given.

        Args:
            labels (`torch.Tensor` of shape `(B, L, T)`, *optional*): true waveform, millivolt; the loss takes the patches that
                are hidden and real, all real ones where nothing is hidden.
        """
        outputs = self.anyecg(
            input_values,
            lead_ids,
            attention_mask,
            bool_masked_pos,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        token_mask, hidden = self._checked_inputs(input_values, lead_ids, attention_mask, bool_masked_pos)
        rows = nn.functional.one_hot(lead_ids, self.config.num_lead_ids).float()  # (B, L, N)
        visible = token_mask if hidden is None else token_mask & ~hidden
        estimate, seen = complete_linearly(input_values, rows, visible, self._products(input_values.device))
        states = outputs.last_hidden_state
        dtype, scale = states.dtype, self.config.input_scale_mv
        mask = token_mask.any(1, keepdim=True).to(dtype)  # (B, 1, P)
        beyond = self.waveform_head((estimate / scale).to(dtype), seen.to(dtype), states, rows, mask) * scale
        shown = _stretch(token_mask, self.config.patch_size).to(dtype)  # (B, L, T)
        estimate = torch.einsum("bln,bnt->blt", rows, estimate).to(dtype) * shown
        reconstruction = estimate + torch.einsum("bln,bnt->blt", rows.to(dtype), beyond) * shown
        loss = None
        if labels is not None:
            scored = token_mask if hidden is None else token_mask & hidden
            per_patch = reconstruction_error(reconstruction, labels, scored, self.config.input_scale_mv)
            loss = per_patch.sum() / scored.sum().clamp(min=1)
        return AnyECGReconstructionOutput(
            loss=loss,
            reconstruction=reconstruction,
            linear_estimate=estimate,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _products(self, device):
        """Return the mean products by lead id, `(N, N)`; of leads without, 1 with themselves: they tell nothing of others."""
        products = torch.eye(self.config.num_lead_ids, device=device)
        if self.config.lead_covariance is not None:
            stored = torch.tensor(self.config.lead_covariance, device=device)
            products[1 : len(stored) + 1, 1 : len(stored) + 1] = stored
        return products


def complete_linearly(
    input_values: torch.Tensor, rows: torch.Tensor, visible: torch.Tensor, products: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(waveforms (B, N, T) by lead id, seen (B, N, P))`: leads as measured, where not seen as estimated from others.

    In full precision whatever the model runs in: leads are close to dependent on each other.

    Args:
        input_values (`torch.Tensor` of shape `(B, L, T)`): millivolt; of any content where not visible.
        rows (`torch.Tensor` of shape `(B, L, N)`): one-hot, the lead of each row.
        visible (`torch.Tensor` of shape `(B, L, P)`): bool.
        products (`torch.Tensor` of shape `(N, N)`): mean products of the leads, mV^2.
    """
    with torch.autocast(input_values.device.type, enabled=False):
        values = input_values.float().view(*visible.shape, -1)  # (B, L, P, S)
        values = torch.where(visible[..., None], values, torch.zeros_like(values))
        measured = torch.einsum("bln,blps->bpns", rows, values)
        seen = torch.einsum("bln,blp->bpn", rows, visible.float()).clamp(max=1)
        estimate = least_squares_weights(products, seen) @ measured
        waveforms = torch.where(seen[..., None] > 0, measured, estimate)
    return waveforms.transpose(1, 2).flatten(2), seen.transpose(1, 2)


def least_squares_weights(products: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Return the weights `(..., N, N)` with which the leads that are seen add up to the estimate of each lead.

    A ridge of 1e-4 of the mean square of a lead bounds them where leads are dependent, as limb leads are.

    Args:
        products (`torch.Tensor` of shape `(N, N)`): mean products of the leads, mV^2.
        seen (`torch.Tensor` of shape `(..., N)`): 1 where a lead is seen; the weights of others are 0.

    Source: normal equations of linear regression.
    """
    both = seen[..., :, None] * seen[..., None, :]
    ridge = 1e-4 * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype, device=products.device)
    own = torch.diag_embed(1 - seen)  # an equation of its own for each lead that is not seen
    return torch.linalg.solve(both * (products + ridge) + own, seen[..., :, None] * products).transpose(-1, -2)


def reconstruction_error(
    reconstruction: torch.Tensor, target: torch.Tensor, scored: torch.Tensor, scale_mv: float
) -> torch.Tensor:
    """Return L1 + 0.5 * MSE + L1 of the first difference of each patch, `(B, L, P)` in model units, 0 where not scored.

    The differences reach one sample beyond the patch on either side, where what is not scored is right: a step at its edge
    counts.

    Args:
        reconstruction, target (`torch.Tensor` of shape `(B, L, T)`): millivolt.
        scored (`torch.Tensor` of shape `(B, L, P)`): bool.
        scale_mv (`float`): millivolt that are 1 in model units.
    """
    where, size = _stretch(scored, reconstruction.shape[-1] // scored.shape[-1]), scored.shape[-1]
    error = (reconstruction.float() - target.view(reconstruction.shape).float()) / scale_mv
    error = torch.where(where, error, torch.zeros_like(error))
    length = error.shape[-1] // size
    steps = nn.functional.pad(error, (1, 1), mode="replicate").diff(dim=-1).unfold(-1, length + 1, length)
    patches = error.unflatten(-1, (size, length))  # (B, L, P, S)
    return (patches.abs().mean(-1) + 0.5 * patches.square().mean(-1) + steps.abs().mean(-1)) * scored
