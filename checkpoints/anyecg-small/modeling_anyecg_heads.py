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
        pooled = self._pool(outputs, lead_ids, attention_mask)
        logits = self.classifier(self.dropout(self.pooled_norm(pooled)))
        return AnyECGClassifierOutput(
            loss=None if labels is None else self._loss(logits.float(), labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _pool(self, outputs, lead_ids, attention_mask):
        """Return mean, or mean and maximum, of the valid tokens: `(B, D)` or `(B, 2 * D)`."""
        if self.config.pooling == "mean":
            return outputs.pooler_output
        states = outputs.last_hidden_state
        valid = (lead_ids > 0)[..., None].expand(states.shape[:3])
        if attention_mask is not None:
            valid = valid & attention_mask.bool()
        greatest = states.masked_fill(~valid[..., None], torch.finfo(states.dtype).min).amax((1, 2))
        greatest = greatest.masked_fill(~valid.flatten(1).any(1, keepdim=True), 0)  # a record without a real patch
        return torch.cat([outputs.pooler_output, greatest], dim=-1)

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


class AnyECGForLeadReconstruction(AnyECGPreTrainedModel):
    """Waveform of hidden patches: absent leads, damaged spans.

    A lead to be generated is given as a row of any content with its `lead_id`, `attention_mask` 1 and `bool_masked_pos` True.
    """

    def __init__(self, config: AnyECGConfig):
        super().__init__(config)
        self.anyecg = AnyECGModel(config)
        self.waveform_head = nn.Linear(config.hidden_size, config.patch_size)
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
        patches = self.waveform_head(outputs.last_hidden_state) * self.config.input_scale_mv  # (B, L, P, S)
        token_mask, hidden = self._checked_inputs(input_values, lead_ids, attention_mask, bool_masked_pos)
        patches = patches * token_mask[..., None].to(patches.dtype)
        loss = None
        if labels is not None:
            scored = token_mask if hidden is None else token_mask & hidden
            loss = self._loss(patches.float(), labels.view(patches.shape).float(), scored)
        return AnyECGReconstructionOutput(
            loss=loss,
            reconstruction=patches.reshape(input_values.shape),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, patches, target, scored):
        """Return L1 + 0.5 * MSE + L1 of the first difference, in model units, as a mean over the scored patches."""
        error = (patches - target) / self.config.input_scale_mv
        error = torch.where(scored[..., None], error, torch.zeros_like(error))  # (B, L, P, S)
        per_patch = error.abs().mean(-1) + 0.5 * error.square().mean(-1) + error.diff(dim=-1).abs().mean(-1)
        return per_patch.sum() / scored.sum().clamp(min=1)
