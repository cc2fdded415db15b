"""What the AnyECG models return. B batch, L leads, P patches, S samples in a patch, T = P * S, D width, K codes."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class AnyECGModelOutput(ModelOutput):
    """Output of `AnyECGModel`.

    Attributes:
        last_hidden_state (`torch.Tensor` of shape `(B, L, P, D)`): zero where `attention_mask` is 0.
        pooler_output (`torch.Tensor` of shape `(B, D)`): mean of the valid tokens of each record.
        global_hidden_state (`torch.Tensor` of shape `(B, G, D)`, *optional*): the global tokens, where there are any.
        hidden_states (`tuple`, *optional*): embeddings and the output of each layer, each `(B, L, P, D)`.
        attentions (`tuple`, *optional*): weights of each layer, each `(B, heads, G + L * P, G + L * P)`, lead-major.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    global_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AnyECGMaskedCodeOutput(ModelOutput):
    """Output of `AnyECGForMaskedCodeModeling`.

    Attributes:
        loss (`torch.Tensor`, *optional*): cross-entropy over the positions whose label is not -100.
        logits (`torch.Tensor` of shape `(B, L, P, K)`): before the softmax over codes.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AnyECGClassifierOutput(ModelOutput):
    """Output of `AnyECGForSequenceClassification`.

    Attributes:
        loss (`torch.Tensor`, *optional*): given when `labels` are.
        logits (`torch.Tensor` of shape `(B, num_labels)`): before sigmoid or softmax; the value itself in regression.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AnyECGReconstructionOutput(ModelOutput):
    """Output of `AnyECGForLeadReconstruction`.

    Attributes:
        loss (`torch.Tensor`, *optional*): given when `labels` are.
        reconstruction (`torch.Tensor` of shape `(B, L, T)`): millivolt, every patch, zero where `attention_mask` is 0.
        linear_estimate (`torch.Tensor` of shape `(B, L, T)`): millivolt, what `reconstruction` starts from: where a patch was
            seen itself, where it was hidden its estimate by least squares from the leads seen at that time.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    linear_estimate: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AnyECGLongRecordOutput(ModelOutput):
    """Output of `AnyECGForLongRecords`. W windows, C labels.

    Attributes:
        loss (`torch.Tensor`, *optional*): given when `labels` are.
        logits (`torch.Tensor` of shape `(B, W, C)`): findings of each window, before the sigmoid.
        record_logits (`torch.Tensor` of shape `(B, C)`): whether a record holds a finding at all, before the sigmoid.
        counts (`torch.Tensor` of shape `(B, W, 2)`): expected number of beats, and of ventricular beats, of each window.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    record_logits: torch.FloatTensor | None = None
    counts: torch.FloatTensor | None = None


@dataclass
class AnyECGQuantizerOutput(ModelOutput):
    """Output of `AnyECGRhythmQuantizer`. All losses are means over valid elements, before their weights.

    Attributes:
        loss (`torch.Tensor`): weighted sum of the five below.
        loss_morphology, loss_frequency, loss_demography, loss_codebook, loss_commitment (`torch.Tensor`): paper, stage 1.
        rhythm_codes (`torch.Tensor` of shape `(B, L, P)`): -100 where `attention_mask` is 0.
        reconstruction (`torch.Tensor` of shape `(B, L, T)`): millivolt, decoded from the codes.
        usage (`torch.Tensor`): share of the codes that this batch used.
        perplexity (`torch.Tensor`): exp of the entropy of the codes in this batch, 1 to K.
    """

    loss: torch.FloatTensor | None = None
    loss_morphology: torch.FloatTensor | None = None
    loss_frequency: torch.FloatTensor | None = None
    loss_demography: torch.FloatTensor | None = None
    loss_codebook: torch.FloatTensor | None = None
    loss_commitment: torch.FloatTensor | None = None
    rhythm_codes: torch.LongTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    usage: torch.FloatTensor | None = None
    perplexity: torch.FloatTensor | None = None
