"""The rhythm quantizer: each patch of each lead -> one rhythm code, learned from three views of the signal.

Waveform -> temporal encoder -> Cardio-Sparse layers -> unit vectors -> codes -> Cardio-Sparse layers -> morphology (the
waveform), frequency (db6 wavelet bands) and demography (age, sex, weight of the record).

Source: AnyECG, Rhythm Quantizer and Multi-View Synergistic Decoder. Where the paper sums over elements, means are taken, so
that no view swamps the others; demography is predicted from the whole record, one patch cannot carry it.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .configuration_anyecg import AnyECGQuantizerConfig
from .modeling_anyecg import AnyECGEmbeddings, AnyECGEncoder, AnyECGPreTrainedModel, masked_mean
from .modeling_outputs_anyecg import AnyECGQuantizerOutput
from .vector_quantizer import CosineVectorQuantizer, code_statistics
from .wavelet import band_lengths, wavelet_bands

# Centre and spread that bring age (years) and weight (kilogram) to about unit size; sex is 0 male, 1 female.
DEMOGRAPHY_SCALES = {"age": (60.0, 20.0), "weight": (75.0, 20.0)}


class AnyECGRhythmQuantizer(AnyECGPreTrainedModel):
    """Rhythm tokenizer of the paper, stage 1. `encode` -> codes, `decode` -> waveform, `forward` -> losses."""

    config: AnyECGQuantizerConfig
    base_model_prefix = "quantizer"
    _head_modules = ()
    accepts_loss_kwargs = True  # takes `num_items_in_batch`, see `count_items`
    # Distances between codes need full precision whatever the rest runs in.
    _keep_in_fp32_modules_strict = ["vector_quantizer.codebook", "vector_quantizer.code_share"]

    def __init__(self, config: AnyECGQuantizerConfig):
        super().__init__(config)
        self.embeddings = AnyECGEmbeddings(config)
        self.encoder = AnyECGEncoder(config, config.num_hidden_layers)
        self.to_code = _bottleneck(config.hidden_size, config.hidden_size, config.codebook_dim)
        self.vector_quantizer = CosineVectorQuantizer(
            config.codebook_size,
            config.codebook_dim,
            update=config.codebook_update,
            ema_decay=config.ema_decay,
            dead_code_share=config.dead_code_share,
            dead_code_steps=config.dead_code_steps,
        )
        self.from_code = nn.Linear(config.codebook_dim, config.hidden_size)
        self.decoder_lead_embedding = nn.Embedding(config.num_lead_ids, config.hidden_size)
        self.decoder_time_embedding = nn.Embedding(config.max_patches, config.hidden_size)
        self.decoder = AnyECGEncoder(config, config.num_decoder_layers)
        lengths = band_lengths(config.patch_size, config.wavelet_levels)
        self.band_lengths = [lengths[band] for band in config.wavelet_bands]
        self.morphology_head = _bottleneck(config.hidden_size, config.hidden_size, config.patch_size)
        self.frequency_head = _bottleneck(config.hidden_size, config.hidden_size, sum(self.band_lengths))
        self.demography_head = _bottleneck(config.hidden_size, config.hidden_size, len(config.demography))
        self.register_buffer("band_mean", torch.zeros(len(config.wavelet_bands)))
        self.register_buffer("band_std", torch.ones(len(config.wavelet_bands)))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, CosineVectorQuantizer):
            module.reset_parameters()
        elif isinstance(module, AnyECGRhythmQuantizer):
            init.zeros_(module.band_mean)
            init.ones_(module.band_std)

    @torch.no_grad()
    def encode(self, input_values, lead_ids, attention_mask=None) -> torch.LongTensor:
        """Return the rhythm codes `(B, L, P)`, -100 where `attention_mask` is 0. Arguments: see `AnyECGModel.forward`."""
        vectors, token_mask = self.encode_vectors(input_values, lead_ids, attention_mask)
        return self.vector_quantizer.lookup(vectors).masked_fill(~token_mask, -100)

    @torch.no_grad()
    def decode(self, rhythm_codes, lead_ids, attention_mask=None) -> torch.Tensor:
        """Return the waveform `(B, L, T)` in millivolt of `rhythm_codes` (B, L, P); zero where they are -100 or masked.

        Raises:
            ValueError: a code outside 0 ... codebook_size - 1 that is not -100.
        """
        self._check_codes(rhythm_codes, lead_ids, attention_mask)
        if ((rhythm_codes >= self.config.codebook_size) | ((rhythm_codes < 0) & (rhythm_codes != -100))).any():
            raise ValueError(
                f"rhythm_codes run from {rhythm_codes.min()} to {rhythm_codes.max()}; this quantizer knows 0 to "
                f"{self.config.codebook_size - 1}, and -100 for no patch. Were they made by another quantizer?"
            )
        token_mask = rhythm_codes >= 0
        if attention_mask is not None:
            token_mask = token_mask & attention_mask.bool()
        quantized = self.vector_quantizer.embed(rhythm_codes.clamp(min=0))
        return self._waveform(self.decode_vectors(quantized, lead_ids, token_mask), token_mask)

    def _check_codes(self, rhythm_codes, lead_ids, attention_mask):
        shape = tuple(rhythm_codes.shape)
        if len(shape) != 3 or shape[2] > self.config.max_patches:
            raise ValueError(
                f"rhythm_codes has shape {shape}; accepted is (batch, leads, patches) with at most "
                f"{self.config.max_patches} patches. Decode a longer record in windows."
            )
        for name, value, expected in (("lead_ids", lead_ids, shape[:2]), ("attention_mask", attention_mask, shape)):
            if value is not None and tuple(value.shape) != expected:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; with these rhythm_codes it must be {expected}."
                )

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        lead_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        age: torch.Tensor | None = None,
        sex: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        return_loss: bool = True,  # there are no labels: by this name the Trainer knows that a loss comes all the same
        num_items_in_batch: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> AnyECGQuantizerOutput:
        """Return codes, reconstruction and the five losses, apart and as their weighted sum.

        Args (beyond those of `AnyECGModel.forward`):
            age, sex, weight (`torch.Tensor` of shape `(B,)`, *optional*): years; 0 male, 1 female; kilogram. NaN = unknown.
            num_items_in_batch (`dict`, *optional*): as `count_items` gives them, summed over the parts of a divided batch;
                then each loss is this part's share, and the shares add up to the loss of the whole batch.

        Source: L_T = L_morph + L_freq + L_demo + L_cb + beta * L_com, AnyECG stage 1. With `codebook_update="ema"` the
        codebook loss is reported but not summed: the moving average takes its place.
        """
        vectors, token_mask = self.encode_vectors(input_values, lead_ids, attention_mask)
        nums = num_items_in_batch or {}
        num_patches = nums.get("patches")
        quantized, codes, loss_codebook, loss_commitment = self.vector_quantizer(vectors, token_mask, num_patches)
        states = self.decode_vectors(quantized, lead_ids, token_mask)
        target = self._scaled_patches(input_values, token_mask)
        losses = {
            "loss_morphology": _patch_loss(self.morphology_head(states), target, token_mask, num_patches),
            "loss_frequency": _patch_loss(
                self.frequency_head(states), self.frequency_target(target), token_mask, num_patches
            ),
            "loss_demography": self._demography_loss(
                states, token_mask, {"age": age, "sex": sex, "weight": weight}, nums
            ),
            "loss_codebook": loss_codebook,
            "loss_commitment": loss_commitment,
        }
        usage, perplexity = code_statistics(codes, self.config.codebook_size, over_processes=self.training)
        return AnyECGQuantizerOutput(
            loss=self._weighted_sum(losses),
            **losses,
            rhythm_codes=codes,
            reconstruction=self._waveform(states, token_mask),
            usage=usage,
            perplexity=perplexity,
        )

    def count_items(self, batch) -> dict[str, torch.Tensor]:
        """Return over how many items the means of the losses of `batch` go: patches, and records of known age, sex, weight."""
        token_mask = batch["attention_mask"].bool() & (batch["lead_ids"] > 0)[..., None]
        known = {name: batch[name].isfinite().sum() for name in self.config.demography if batch.get(name) is not None}
        return {"patches": token_mask.sum(), **known}

    def encode_vectors(self, input_values, lead_ids, attention_mask=None):
        """Return `(vectors (B, L, P, C) before normalisation, token_mask (B, L, P) bool)`."""
        token_mask, _ = self._checked_inputs(input_values, lead_ids, attention_mask)
        grid = self.embeddings(input_values, lead_ids, token_mask)
        return self.to_code(self.encoder(grid, token_mask).last_hidden_state), token_mask

    def decode_vectors(self, quantized, lead_ids, token_mask):
        """Return the decoder's states `(B, L, P, D)` for unit vectors `quantized` (B, L, P, C)."""
        times = torch.arange(quantized.shape[2], device=quantized.device)
        grid = self.from_code(quantized.to(self.from_code.weight.dtype))
        grid = grid + self.decoder_lead_embedding(lead_ids)[:, :, None] + self.decoder_time_embedding(times)
        return self.decoder(grid, token_mask).last_hidden_state

    def frequency_target(self, patches):
        """Return the standardised wavelet bands `(..., coefficients)` of `patches` (..., S) in model units."""
        bands = wavelet_bands(patches, self.config.wavelet_levels)
        scaled = [
            (bands[band] - self.band_mean[i]) / self.band_std[i] for i, band in enumerate(self.config.wavelet_bands)
        ]
        return torch.cat(scaled, dim=-1)

    @torch.no_grad()
    def fit_band_statistics(self, input_values, attention_mask=None):
        """Set mean and deviation of each wavelet band from training records `(B, L, T)`; stored with the weights."""
        lead_ids = torch.ones(input_values.shape[:2], dtype=torch.long, device=input_values.device)  # any but padding
        token_mask, _ = self._checked_inputs(input_values, lead_ids, attention_mask)
        bands = wavelet_bands(self._scaled_patches(input_values, token_mask)[token_mask], self.config.wavelet_levels)
        for i, band in enumerate(self.config.wavelet_bands):
            self.band_mean[i] = bands[band].mean()
            self.band_std[i] = bands[band].std().clamp(min=1e-2)

    def _scaled_patches(self, input_values, token_mask):
        """Return the patches `(B, L, P, S)` in model units, zero where not real."""
        patches = input_values.float().view(*token_mask.shape, self.config.patch_size)
        return torch.where(token_mask[..., None], patches, torch.zeros_like(patches)) / self.config.input_scale_mv

    def _waveform(self, states, token_mask):
        patches = self.morphology_head(states).float() * self.config.input_scale_mv
        return torch.where(token_mask[..., None], patches, torch.zeros_like(patches)).flatten(2)

    def _demography_loss(self, states, token_mask, given, nums):
        """Return the mean over the attributes of the loss over the records for which each is known.

        `nums`: over how many records, by name, where that is not those of this batch.
        """
        predictions = self.demography_head(masked_mean(states, token_mask)).float()  # (B, attributes)
        losses = []
        for i, name in enumerate(self.config.demography):
            if given[name] is None:
                continue
            value = given[name].float()
            known = value.isfinite()
            value, prediction = value[known], predictions[known, i]
            if name == "sex":
                loss = nn.functional.binary_cross_entropy_with_logits(prediction, value, reduction="sum")
            else:
                center, spread = DEMOGRAPHY_SCALES[name]
                loss = nn.functional.smooth_l1_loss(prediction, (value - center) / spread, reduction="sum")
            losses.append(loss / nums.get(name, known.sum()).clamp(min=1))
        return torch.stack(losses).mean() if losses else predictions.sum() * 0.0

    def _weighted_sum(self, losses):
        config = self.config
        total = (
            config.morphology_weight * losses["loss_morphology"] + config.frequency_weight * losses["loss_frequency"]
        )
        total = total + config.demography_weight * losses["loss_demography"]
        total = total + config.commitment_weight * losses["loss_commitment"]
        return total + losses["loss_codebook"] if config.codebook_update == "gradient" else total


def _bottleneck(in_features, hidden_features, out_features):
    """Linear, tanh, linear: the projection of LaBraM's heads and code bottleneck."""
    return nn.Sequential(nn.Linear(in_features, hidden_features), nn.Tanh(), nn.Linear(hidden_features, out_features))


def _patch_loss(prediction, target, token_mask, num_patches):
    """Return the squared error over all elements of the valid patches, over `num_patches` (default: as many as there are)."""
    error = (prediction.float() - target).square().mean(-1)
    return (error * token_mask).sum() / (token_mask.sum() if num_patches is None else num_patches).clamp(min=1)
