"""AnyECG for records of minutes to a day: the backbone on each window, a small Transformer over the windows of a record.

Data flow: windows of one record -> frozen backbone, one vector a window (W, F) -> two layers of attention to the windows near
in time -> findings and beats of each window; attention pooling over the windows -> findings of the record.

Source: the "hierarchical" scheme for ultra-long signals that AnyECG (arXiv 2411.17711) names and leaves open; layers are ours.
Attention pooling after Ilse, Tomczak, Welling 2018 (arXiv 1802.04712), without the gate.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .configuration_anyecg import AnyECGConfig
from .modeling_anyecg import AnyECGEncoder, AnyECGModel, AnyECGPreTrainedModel
from .modeling_anyecg_heads import pool_tokens
from .modeling_outputs_anyecg import AnyECGLongRecordOutput

BEAT_KINDS = ("beats", "ventricular_beats")  # the columns of `counts`
COUNT_WEIGHT = 0.1  # in the loss: a count's likelihood is in tens of nats where a finding's is in tenths


class AnyECGRecordHead(nn.Module):
    """From the vectors of a record's windows to findings of each window, its beats, and findings of the record.

    What a window says by itself goes straight to the findings; the Transformer adds what the windows around it say. It has no
    positions but a reach: windows at most `config.record_reach` before or after. So a day is as good as a minute.
    """

    def __init__(self, config):
        super().__init__()
        width, size = config.pooled_size, config.record_hidden_size
        self.register_buffer("feature_mean", torch.zeros(width))
        self.register_buffer("feature_scale", torch.ones(width))
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.projection = nn.Linear(width, size)
        self.encoder = AnyECGEncoder(_encoder_config(config), config.record_layers)
        self.window_classifier = nn.Linear(width + size, config.num_labels)
        self.counter = nn.Linear(width + size, len(BEAT_KINDS))
        self.attention = nn.Linear(size, config.num_labels)
        self.record_classifier = nn.Linear(size, config.num_labels)

    def forward(self, features, window_mask):
        """Return `(logits (B, W, C), counts (B, W, 2), record logits (B, C))` for `features` (B, W, F), `window_mask` (B, W)."""
        own = self.dropout((features - self.feature_mean) / self.feature_scale) * window_mask[..., None]
        states = self.encoder(self.projection(own)[:, None], window_mask[:, None]).last_hidden_state[:, 0]  # (B, W, H)
        both = torch.cat([own, states], dim=-1)
        counts = nn.functional.softplus(self.counter(both)) * window_mask[..., None]
        weights = self.attention(states).masked_fill(~window_mask[..., None], torch.finfo(states.dtype).min).softmax(1)
        record_logits = (weights * self.record_classifier(states)).sum(1)
        return self.window_classifier(both), counts, record_logits

    @torch.no_grad()
    def standardise(self, features):
        """Let the head see `features` (N, F) of the windows to train on with mean 0 and deviation 1."""
        self.feature_mean.copy_(features.mean(0))
        self.feature_scale.copy_(features.std(0).clamp(min=1e-3))


def _encoder_config(config):
    return AnyECGConfig(
        hidden_size=config.record_hidden_size,
        num_hidden_layers=config.record_layers,
        num_attention_heads=2,
        mlp_ratio=2,
        hidden_dropout=config.classifier_dropout,
        layer_norm_eps=config.layer_norm_eps,
        sparse_attention_config={"lead_window": config.record_reach},
    )


class AnyECGForLongRecords(AnyECGPreTrainedModel):
    """Findings over time, beats, and findings of the whole, for a record of any length cut into windows.

    A batch of inputs is ONE record: its windows in the order of time, as `feature_extractor.windows` and `pad` give them. The
    vectors of windows (`embed_windows`) can be kept and given as `window_features`, then of several records at once.

    Example:
        >>> items, start_seconds = extractor.windows(record)  # doctest: +SKIP
        >>> outputs = model(**extractor.pad(items, return_tensors="pt"))  # doctest: +SKIP
        >>> outputs.logits.sigmoid().shape  # doctest: +SKIP
        torch.Size([1, 181, 2])
    """

    def __init__(self, config: AnyECGConfig):
        super().__init__(config)
        self.anyecg = AnyECGModel(config)
        self.record_head = AnyECGRecordHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AnyECGRecordHead):
            init.zeros_(module.feature_mean)
            init.ones_(module.feature_scale)

    def embed_windows(self, input_values, lead_ids, attention_mask=None):
        """Return one vector a window, `(W, F)`: its tokens pooled as `config.pooling` says; arguments as for `forward`."""
        outputs = self.anyecg(input_values, lead_ids, attention_mask, return_dict=True)
        return pool_tokens(outputs, lead_ids, attention_mask, self.config.pooling)

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        lead_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        window_features: torch.Tensor | None = None,
        window_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        **kwargs,
    ) -> AnyECGLongRecordOutput:
        """Return findings of windows and record, and the loss where `labels` are given.

        Args:
            input_values (`torch.Tensor` of shape `(W, L, T)`): the windows of one record in the order of time, millivolt.
            lead_ids (`torch.LongTensor` of shape `(W, L)`), attention_mask (`torch.Tensor` of shape `(W, L, P)`): of these.
            window_features (`torch.Tensor` of shape `(B, W, F)`): what `embed_windows` gave, instead of the above.
            window_mask (`torch.Tensor` of shape `(B, W)`, *optional*): 1 real, 0 padded; with `window_features`.
            labels (`torch.Tensor` of shape `(B, W, C)`, *optional*): share of the window, 0 to 1, for which a finding holds;
                NaN where that is not known. A record holds a finding where one of its windows does by half.
            counts (`torch.Tensor` of shape `(B, W, 2)`, *optional*): see `BEAT_KINDS`; NaN where not known.

        Raises:
            ValueError: neither or both of `input_values` and `window_features`, or shapes that do not fit.
        """
        if (input_values is None) == (window_features is None):
            raise ValueError("Pass either input_values with lead_ids (the windows of one record), or window_features.")
        if window_features is None:
            window_features = self.embed_windows(input_values, lead_ids, attention_mask)[None]
        window_mask = self._checked_mask(window_features, window_mask)
        logits, expected, record_logits = self.record_head(window_features, window_mask)
        loss = None
        if labels is not None:
            of_record = findings_loss(record_logits[:, None], _of_record(labels)[:, None], window_mask[:, :1])
            loss = findings_loss(logits, labels, window_mask) + of_record
            if counts is not None:
                loss = loss + COUNT_WEIGHT * counts_loss(expected, counts, window_mask)
        return AnyECGLongRecordOutput(loss=loss, logits=logits, record_logits=record_logits, counts=expected)

    def _checked_mask(self, window_features, window_mask):
        shape, width = tuple(window_features.shape), self.config.pooled_size
        if len(shape) != 3 or shape[2] != width or shape[1] == 0:
            raise ValueError(
                f"window_features has shape {shape}; accepted is (batch, windows, {width}), of embed_windows."
            )
        if window_mask is None:
            return torch.ones(shape[:2], dtype=torch.bool, device=window_features.device)
        if tuple(window_mask.shape) != shape[:2]:
            raise ValueError(
                f"window_mask has shape {tuple(window_mask.shape)}; with these features it must be {shape[:2]}."
            )
        return window_mask.bool()


def findings_loss(logits, labels, mask):
    """Return the cross-entropy of `logits` against shares `labels`, both (B, W, C), where known and real; see `_mean`."""
    loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.nan_to_num(), reduction="none")
    return _mean(loss, labels.isfinite() & mask[..., None])


def counts_loss(expected, counts, mask):
    """Return the negative log-likelihood of `counts` under Poisson laws of mean `expected`, both (B, W, 2); see `_mean`."""
    loss = nn.functional.poisson_nll_loss(expected.float(), counts.nan_to_num(), log_input=False, reduction="none")
    return _mean(loss, counts.isfinite() & mask[..., None])


def _mean(loss, known):
    """Return the mean over records of each one's mean over what is known: a minute counts as much as an hour."""
    of_records = (loss * known).sum((1, 2)) / known.sum((1, 2)).clamp(min=1)
    return of_records.sum() / known.any((1, 2)).sum().clamp(min=1)


def _of_record(labels):
    """Return whether a window of each record holds a finding by half, `(B, C)`; NaN where no window is known."""
    holds = (labels >= 0.5).any(1).to(labels.dtype)  # NaN, also that of padding, is not
    return torch.where(labels.isfinite().any(1), holds, torch.nan)
