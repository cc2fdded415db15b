"""The AnyECG backbone: patches of an ECG -> contextual states on the grid leads x patches, and masked-code pretraining on it.

Data flow: waveform (B, L, T) -> stem, one vector a patch (B, L, P, D) -> plus lead and time embedding -> Transformer layers
with Cardio-Sparse Attention over the L * P tokens -> last hidden state (B, L, P, D).

Source: AnyECG (arXiv 2411.17711), embedding, Cardio-Sparse Attention and stage 2; block details after LaBraM.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .cardio_sparse_attention import IMPLEMENTATION, cardio_sparse_attention_forward, make_plan
from .checkpoint_code import SavesItsCode
from .configuration_anyecg import AnyECGConfig
from .modeling_outputs_anyecg import AnyECGMaskedCodeOutput, AnyECGModelOutput


class AnyECGMaskedGroupNorm(nn.GroupNorm):
    """Group normalisation over channels and time whose statistics leave masked positions out."""

    def forward(self, x, mask):
        """Return the normalised `x` (rows, channels, time), zero where `mask` (rows, 1, time) is 0."""
        mask = mask.to(x.dtype)
        x = x * mask
        count = mask.sum(-1, dtype=torch.float32).clamp(min=1) * (x.shape[1] // self.num_groups)  # (rows, 1)
        groups = x.reshape(x.shape[0], self.num_groups, -1)
        mean = groups.sum(-1, dtype=torch.float32) / count  # (rows, groups)
        square = torch.linalg.vector_norm(groups, dim=-1, dtype=torch.float32).square() / count
        inverse = torch.rsqrt((square - mean.square()).clamp(min=0) + self.eps)
        per_channel = x.shape[1] // self.num_groups
        scale = inverse.repeat_interleave(per_channel, dim=1) * self.weight  # (rows, channels)
        shift = self.bias - mean.repeat_interleave(per_channel, dim=1) * scale
        return torch.addcmul(shift[..., None].to(x.dtype), x, scale[..., None].to(x.dtype)) * mask


class AnyECGStemLayer(nn.Module):
    """Convolution, masked group normalisation, GELU; the input is added where the shapes agree."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, config):
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, padding=(kernel_size - stride) // 2)
        self.norm = AnyECGMaskedGroupNorm(config.stem_norm_groups, out_channels, eps=1e-5)
        self.activation = nn.GELU()
        self.is_residual = in_channels == out_channels and stride == 1

    def forward(self, x, mask):
        out = self.activation(self.norm(self.conv(x), mask))
        return x + out if self.is_residual else out


class AnyECGStem(nn.Module):
    """Temporal encoder: one vector a patch, from convolutions over the lead (or over each patch) and from its amplitude.

    Hidden and padded patches are zero before the first convolution and after each, and stay out of the statistics: so a
    patch is the same whatever surrounds the record in a batch, and a hidden patch does not leak into its neighbours.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        channels = [1, *config.stem_channels]
        self.layers = nn.ModuleList(
            AnyECGStemLayer(channels[i], channels[i + 1], kernel_size, stride, config)
            for i, (kernel_size, stride) in enumerate(zip(config.stem_kernel_sizes, config.stem_strides))
        )
        self.projection = nn.Linear(channels[-1] * (config.stem_bins + 1), config.hidden_size)
        self.amplitude_projection = nn.Linear(4, config.hidden_size) if config.stem_amplitude else None

    def forward(self, signal, visible):
        """Return `(B, L, P, D)` for `signal` (B, L, T) in model units, zero where `visible` (B, L, P) bool is False."""
        batch_size, num_leads, num_samples = signal.shape
        patches = signal.view(batch_size, num_leads, -1, self.config.patch_size)
        rows_shape = (-1, 1, num_samples if self.config.stem_scope == "lead" else self.config.patch_size)
        x = signal.reshape(rows_shape)
        for layer in self.layers:
            x = layer(x, self._position_mask(visible, x, layer.conv.stride[0]))
        x = x.unflatten(-1, (-1, self._positions_per_patch)).movedim(2, 1)  # (rows, patches in a row, C, positions)
        bins = x.unflatten(-1, (self.config.stem_bins, -1)).mean(-1).flatten(2)
        features = torch.cat([bins, x.amax(-1)], dim=-1).view(*patches.shape[:3], -1)
        vectors = self.projection(features)
        return (
            vectors
            if self.amplitude_projection is None
            else vectors + self.amplitude_projection(self._amplitude(patches))
        )

    @property
    def _positions_per_patch(self):
        positions = self.config.patch_size
        for stride in self.config.stem_strides:
            positions //= stride
        return positions

    def _position_mask(self, visible, x, stride):
        """Return `visible` at the resolution after this layer, `(rows, 1, positions)` in float32."""
        rows, positions = x.shape[0], x.shape[-1] // stride
        per_row = visible.reshape(rows, 1, -1, 1).float()
        return per_row.expand(-1, -1, -1, positions // per_row.shape[2]).reshape(rows, 1, positions)

    @staticmethod
    def _amplitude(patches):
        """Return mean, log deviation, least and greatest value of each patch, `(B, L, P, 4)`: the norms divide them out."""
        mean = patches.mean(-1)
        deviation = (patches - mean[..., None]).square().mean(-1).add(1e-4).sqrt()
        return torch.stack([mean, deviation.log(), patches.amin(-1), patches.amax(-1)], dim=-1)


class AnyECGEmbeddings(nn.Module):
    """Patch vectors plus learned lead and time embeddings; hidden patches get the mask token before these are added."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.stem = AnyECGStem(config)
        self.lead_embedding = nn.Embedding(config.num_lead_ids, config.hidden_size)
        self.time_embedding = nn.Embedding(config.max_patches, config.hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, input_values, lead_ids, token_mask, bool_masked_pos=None):
        """Return token embeddings `(B, L, P, D)`, see `AnyECGModel.forward`; `token_mask` (B, L, P) bool, True = real."""
        visible = token_mask if bool_masked_pos is None else token_mask & ~bool_masked_pos
        signal = self._hide(input_values, visible) / self.config.input_scale_mv
        embeddings = self.stem(signal.to(self.stem.projection.weight.dtype), visible)
        if bool_masked_pos is not None:
            embeddings = torch.where(bool_masked_pos[..., None], self.mask_token.to(embeddings.dtype), embeddings)
        times = torch.arange(embeddings.shape[2], device=embeddings.device)
        embeddings = embeddings + self.lead_embedding(lead_ids)[:, :, None] + self.time_embedding(times)
        return self.dropout(embeddings)

    def _hide(self, input_values, visible):
        """Return the waveform with zeros (also in place of NaN) in every patch that is not visible."""
        patches = input_values.view(*visible.shape, self.config.patch_size)
        return torch.where(visible[..., None], patches, torch.zeros_like(patches)).view(input_values.shape)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention by explicit matrix products; returns `(output (B, N, heads, dim), weights (B, heads, N, N))`."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    exact_enough = torch.promote_types(scores.dtype, torch.float32)
    weights = nn.functional.softmax(scores, dim=-1, dtype=exact_enough).to(query.dtype)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2), weights


class AnyECGAttention(nn.Module):
    """Multi-head attention with normalised queries and keys; the pattern comes in as a `CardioSparsePlan`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.query_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
        self.key_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, plan):
        """Return `(states (B, N, D), weights or None)` for `hidden_states` (B, N, D)."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.query_norm(self.query(hidden_states).view(heads)).transpose(1, 2)  # (B, heads, N, head_dim)
        key = self.key_norm(self.key(hidden_states).view(heads)).transpose(1, 2)
        value = self.value(hidden_states).view(heads).transpose(1, 2)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.config._attn_implementation == IMPLEMENTATION:  # not another version's, which a checkpoint registered
            attention_interface = cardio_sparse_attention_forward
        attended, weights = attention_interface(
            self,
            query,
            key,
            value,
            plan.mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            plan=plan,
        )
        if plan.empty_queries is not None:
            attended = attended.masked_fill(plan.empty_queries[..., None, None], 0)
        return self.output(attended.reshape(hidden_states.shape)), weights


class AnyECGMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class AnyECGLayer(GradientCheckpointingLayer):
    """Pre-norm Transformer layer with a learned scale on each residual branch."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = AnyECGAttention(config)
        self.attention_scale = nn.Parameter(torch.full((config.hidden_size,), float(config.layer_scale_init)))
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = AnyECGMLP(config)
        self.mlp_scale = nn.Parameter(torch.full((config.hidden_size,), float(config.layer_scale_init)))
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states, plan):
        attended, weights = self.attention(self.attention_norm(hidden_states), plan)
        hidden_states = hidden_states + self.dropout(attended * self.attention_scale)
        hidden_states = hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)) * self.mlp_scale)
        return hidden_states, weights


class AnyECGEncoder(nn.Module):
    """Stack of Cardio-Sparse Transformer layers over a grid of tokens; used by backbone and quantizer."""

    def __init__(self, config, num_layers):
        super().__init__()
        self.config = config
        self.num_global = config.sparse_attention_config.num_global_tokens
        self.layers = nn.ModuleList(AnyECGLayer(config) for _ in range(num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.global_tokens = nn.Parameter(torch.zeros(self.num_global, config.hidden_size)) if self.num_global else None

    def forward(self, grid, token_mask, output_attentions=False, output_hidden_states=False):
        """Return `AnyECGModelOutput` without pooling for `grid` (B, L, P, D) and `token_mask` (B, L, P) bool."""
        hidden_states = grid.flatten(1, 2)  # (B, L * P, D)
        if self.num_global:
            hidden_states = torch.cat(
                [self.global_tokens.expand(grid.shape[0], -1, -1).to(grid.dtype), hidden_states], dim=1
            )
        plan = make_plan(
            token_mask,
            self.config.sparse_attention_config,
            implementation=self.config._attn_implementation,
            dtype=hidden_states.dtype,
            dropout=self.config.attention_dropout if self.training else 0.0,
        )
        all_states, all_weights = [grid], []
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, plan)
            all_states.append(self._as_grid(hidden_states, grid))
            all_weights.append(weights)
        hidden_states = self.norm(hidden_states)
        last = self._as_grid(hidden_states, grid) * token_mask[..., None].to(hidden_states.dtype)
        return AnyECGModelOutput(
            last_hidden_state=last,
            global_hidden_state=hidden_states[:, : self.num_global] if self.num_global else None,
            hidden_states=(*all_states[:-1], last) if output_hidden_states else None,
            attentions=tuple(all_weights) if output_attentions else None,
        )

    def _as_grid(self, hidden_states, grid):
        return hidden_states[:, self.num_global :].reshape(grid.shape)


class AnyECGPreTrainedModel(SavesItsCode, PreTrainedModel):
    """Loading, initialisation and input checks shared by all AnyECG models."""

    config: AnyECGConfig
    base_model_prefix = "anyecg"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss of a batch is a mean: the Trainer divides it by the accumulation steps
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["AnyECGLayer", "AnyECGStem"]
    _head_modules = (
        "code_head.",
        "classifier.",
        "pooled_norm.",
        "waveform_head.",
        "record_head.",
    )  # what a new head may replace

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, new_head: bool = False, **kwargs):
        """Load a checkpoint; weights that are missing, or that this class has no place for, are an error.

        Besides the arguments of Transformers:
            new_head (`bool`): the checkpoint need not hold the head; what it does not hold starts anew. Also implied by
                `num_labels`, `id2label` and `ignore_mismatched_sizes=True`.

        Raises:
            ValueError: weights missing or left over. The backbone alone may be taken from a checkpoint with a head.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        asks_for_head = new_head or any(
            kwargs.get(name) for name in ("num_labels", "id2label", "ignore_mismatched_sizes")
        )
        # The Auto classes take the labels out of the arguments and hand over the finished configuration.
        asks_for_head = asks_for_head or getattr(kwargs.get("config"), "labels_were_given", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model._refuse_incomplete(info, str(pretrained_model_name_or_path), asks_for_head)
        return (model, info) if wants_info else model

    def _refuse_incomplete(self, info, source, asks_for_head):
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        resized = sorted(key for key, *_ in info["mismatched_keys"] if not key.startswith(self._head_modules))
        is_backbone = not hasattr(self, self.base_model_prefix)
        if is_backbone or asks_for_head:  # taking the backbone out of a model with a head is a choice, not a loss
            unexpected = [key for key in unexpected if not key.startswith(self._head_modules)]
        if asks_for_head:
            missing = [key for key in missing if not key.startswith(self._head_modules)]
        if missing or unexpected or resized:
            raise ValueError(
                f'"{source}" does not fit {type(self).__name__}: missing weights {_shorten(missing)}, '
                f"left over {_shorten(unexpected)}, of another shape {_shorten(resized)}. Accepted is a checkpoint of this "
                "class (see `architectures` in its config.json). To put a head that the checkpoint does not hold on its "
                "backbone pass new_head=True."
            )

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Embedding):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Conv1d):
            init.kaiming_normal_(module.weight)
        elif isinstance(module, AnyECGEmbeddings):
            init.trunc_normal_(module.mask_token, std=self.config.initializer_range)
        elif isinstance(module, AnyECGLayer):
            init.constant_(module.attention_scale, float(self.config.layer_scale_init))
            init.constant_(module.mlp_scale, float(self.config.layer_scale_init))
        elif isinstance(module, AnyECGEncoder) and module.global_tokens is not None:
            init.trunc_normal_(module.global_tokens, std=self.config.initializer_range)

    def get_input_embeddings(self):
        """Return None: patches are embedded by convolutions, there is no table of input tokens (FSDP asks for it)."""

    def _checked_inputs(self, input_values, lead_ids, attention_mask, bool_masked_pos=None):
        """Return `(token_mask, bool_masked_pos or None)`, bool of shape `(B, L, P)`; raise on shapes that do not fit."""
        config = self.config
        if input_values.ndim != 3 or input_values.shape[-1] == 0 or input_values.shape[-1] % config.patch_size:
            raise ValueError(
                f"input_values has shape {tuple(input_values.shape)}; accepted is (batch, leads, samples) in millivolt at "
                f"{config.sampling_rate} Hz, samples a multiple of {config.patch_size}. AnyECGFeatureExtractor makes it so."
            )
        grid = (*input_values.shape[:2], input_values.shape[-1] // config.patch_size)
        if grid[2] > config.max_patches:
            raise ValueError(
                f"The record has {grid[2]} patches; this model takes at most {config.max_patches} "
                f"({config.max_patches * config.patch_size / config.sampling_rate:g} s). Cut it into windows as pipelines do."
            )
        for name, value, shape in (
            ("lead_ids", lead_ids, grid[:2]),
            ("attention_mask", attention_mask, grid),
            ("bool_masked_pos", bool_masked_pos, grid),
        ):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; with this input_values it must be {shape}.")
        token_mask = (lead_ids > 0)[..., None].expand(grid)
        if attention_mask is not None:
            token_mask = token_mask & attention_mask.bool()
        return token_mask, None if bool_masked_pos is None else bool_masked_pos.bool()

    def _capture(self, output_attentions, output_hidden_states):
        """Return the two switches with the configuration's defaults; attention maps exist only in "eager"."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f'output_attentions=True needs attn_implementation="eager"; this model runs '
                f'"{self.config._attn_implementation}", which keeps no attention weights. Load it with '
                'from_pretrained(..., attn_implementation="eager") or call model.set_attn_implementation("eager").'
            )
        return bool(output_attentions), bool(output_hidden_states)


class AnyECGModel(AnyECGPreTrainedModel):
    """The backbone without a head."""

    def __init__(self, config: AnyECGConfig):
        super().__init__(config)
        self.embeddings = AnyECGEmbeddings(config)
        self.encoder = AnyECGEncoder(config, config.num_hidden_layers)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        lead_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> AnyECGModelOutput:
        """Return the contextual states of every patch.

        Args:
            input_values (`torch.Tensor` of shape `(B, L, T)`): millivolt at `config.sampling_rate`, T = P * patch_size.
            lead_ids (`torch.LongTensor` of shape `(B, L)`): see `leads.LEAD_IDS`; 0 marks a padded row.
            attention_mask (`torch.Tensor` of shape `(B, L, P)`, *optional*): 1 real, 0 padded, absent or unusable; without
                it every patch of a row with a lead id counts as real.
            bool_masked_pos (`torch.BoolTensor` of shape `(B, L, P)`, *optional*): True = hidden from the model.

        Raises:
            ValueError: shapes that do not fit together, or more than `config.max_patches` patches.
        """
        token_mask, bool_masked_pos = self._checked_inputs(input_values, lead_ids, attention_mask, bool_masked_pos)
        output_attentions, output_hidden_states = self._capture(output_attentions, output_hidden_states)
        grid = self.embeddings(input_values, lead_ids, token_mask, bool_masked_pos)
        outputs = self.encoder(grid, token_mask, output_attentions, output_hidden_states)
        return AnyECGModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=masked_mean(outputs.last_hidden_state, token_mask),
            global_hidden_state=outputs.global_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class AnyECGForMaskedCodeModeling(AnyECGPreTrainedModel):
    """Backbone with a softmax over rhythm codes for every patch (paper, stage 2)."""

    def __init__(self, config: AnyECGConfig):
        super().__init__(config)
        self.anyecg = AnyECGModel(config)
        self.code_head = nn.Linear(config.hidden_size, config.codebook_size)
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
    ) -> AnyECGMaskedCodeOutput:
        """Return code logits, and the loss where `labels` (B, L, P) hold codes; -100 = not predicted.

        Source: L_mask, AnyECG stage 2, as a mean over the predicted positions.
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
        logits = self.code_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 2).float(), labels.flatten(), ignore_index=-100)
        return AnyECGMaskedCodeOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def masked_mean(states: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of `states` (B, L, P, D) over the tokens where `token_mask` (B, L, P) is True, `(B, D)`."""
    weights = token_mask[..., None].to(states.dtype)
    return (states * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1)


def _shorten(names, most=4):
    shown = ", ".join(names[:most])
    return f"{len(names)} ({shown}{', ...' if len(names) > most else ''})" if names else "none"
