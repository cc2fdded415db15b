"""Configurations of the AnyECG backbone and of its rhythm quantizer, and the named sizes (presets).

Every decision is a field; what follows from the fields is a property. A configuration is strict: a wrong type or an
impossible combination raises when it is built, not in the middle of a forward pass.
"""

from dataclasses import fields

import numpy as np
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .leads import STANDARD_LEADS


@strict
class AnyECGSparseAttentionConfig(PreTrainedConfig):
    """Which tokens attend to which: Cardio-Sparse Attention (paper: CSA, `A(i)`).

    A token sees its own lead over all time and all leads at its own time.

    Args:
        time_tolerance (`int`): "own time" means `|k_i - k_j| <= time_tolerance` patches (the paper's mask width `w`).
        lead_window (`int`, *optional*): limits the own lead to `|k_i - k_j| <= lead_window` patches; `None` is all time.
        num_global_tokens (`int`): learned tokens that see, and are seen by, every token.
    """

    model_type = "anyecg_sparse_attention"
    base_config_key = "sparse_attention_config"

    time_tolerance: int = 0
    lead_window: int | None = None
    num_global_tokens: int = 0

    def validate_pattern(self):
        _check_at_least(self, 0, "time_tolerance", "num_global_tokens")
        if self.lead_window is not None:
            _check_at_least(self, 0, "lead_window")


class _PresetMixin:
    """Named sizes: `Config.from_preset("small", codebook_size=2048)`."""

    @classmethod
    def presets(cls) -> dict[str, dict]:
        raise NotImplementedError

    @classmethod
    def from_preset(cls, name: str, **overrides):
        """Return the configuration called `name`, with `overrides` of single fields.

        Raises:
            ValueError: unknown preset, or an override that is no field of this configuration.
        """
        presets = cls.presets()
        if name not in presets:
            raise ValueError(f'Unknown preset "{name}" for {cls.__name__}. Known presets: {", ".join(presets)}.')
        known = {field.name for field in fields(cls)} | {"num_labels", "attn_implementation"}
        unknown = sorted(set(overrides) - known)
        pattern = overrides.get("sparse_attention_config")
        if isinstance(pattern, dict):
            unknown += sorted(set(pattern) - {field.name for field in fields(AnyECGSparseAttentionConfig)})
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(unknown)}. Known fields: {', '.join(sorted(known))}."
            )
        return cls(**{**presets[name], **overrides})


@strict
class AnyECGConfig(_PresetMixin, PreTrainedConfig):
    """Configuration of the AnyECG backbone and of the heads on it.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio (`int`): size of the Transformer.
        sampling_rate, patch_size (`int`): the grid of the input: Hz, and samples in a patch (paper: 300 and 300).
        max_patches (`int`): rows of the learned time table, hence the longest input in patches.
        num_lead_ids (`int`): rows of the learned lead table (0 padding, 1-12 standard leads, then Frank X, Y, Z).
        input_scale_mv (`float`): millivolt that become 1 inside the model; fixed, so that amplitude survives.
        stem_scope (`str`): "lead": convolutions run over the whole lead, patches see across their edges; "patch": each patch
            on its own, as in the paper.
        stem_channels, stem_kernel_sizes, stem_strides (`list[int]`): the convolutions; their strides must divide the patch.
        stem_norm_groups, stem_bins (`int`): groups of the normalisation; time bins of a patch that are kept apart.
        stem_amplitude (`bool`): add mean, deviation and extremes of each patch, which the normalisation divides out.
        layer_scale_init (`float`): start of the learned scale on each residual branch.
        codebook_size (`int`): number of rhythm codes that masked-code modelling predicts.
        pooling (`str`): "mean" or "mean_max" of the valid tokens, for the classification head.
        thresholds (`list[float]`, *optional*): score from which a label counts as positive, in the order of `id2label`.
        record_hidden_size, record_layers (`int`): Transformer over the windows of a long record; an even width.
        record_reach (`int`): how many windows before and after its own one a window attends to there.
        record_thresholds (`list[float]`, *optional*): as `thresholds`, which there are of windows, of the whole long record.
        waveform_channels, waveform_strides (`list[int]`): of the two levels of the reconstruction head, fine and coarse; the
            product of the strides must divide the patch.
        waveform_kernel_size, waveform_blocks, waveform_state_channels (`int`): its convolutions (odd), residual blocks of the
            coarse level, and channels in which the backbone's state of each lead reaches that level; 0 = a U-Net by itself.
        lead_covariance (`list[list[float]]`, *optional*): mean products of the 12 standard leads in the training records, mV^2:
            what hidden leads are estimated from by least squares. None: they are estimated as 0.
        sparse_attention_config (`AnyECGSparseAttentionConfig` or `dict`): the attention pattern.
    """

    model_type = "anyecg"
    sub_configs = {"sparse_attention_config": AnyECGSparseAttentionConfig}

    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 3
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-6
    layer_scale_init: float | int = 0.1
    initializer_range: float = 0.02
    sampling_rate: int = 300
    patch_size: int = 300
    max_patches: int = 128
    num_lead_ids: int = 16
    input_scale_mv: float | int = 0.5
    stem_scope: str = "lead"
    stem_channels: list[int] | tuple[int, ...] = (32, 64, 96, 96)
    stem_kernel_sizes: list[int] | tuple[int, ...] = (25, 6, 6, 5)
    stem_strides: list[int] | tuple[int, ...] = (5, 2, 2, 1)
    stem_norm_groups: int = 4
    stem_bins: int = 5
    stem_amplitude: bool = True
    codebook_size: int = 1024
    pooling: str = "mean"
    thresholds: list[float] | None = None
    record_hidden_size: int = 64
    record_layers: int = 2
    record_reach: int = 6
    record_thresholds: list[float] | None = None
    waveform_channels: list[int] | tuple[int, ...] = (64, 192)
    waveform_strides: list[int] | tuple[int, ...] = (3, 5)
    waveform_kernel_size: int = 7
    waveform_blocks: int = 3
    waveform_state_channels: int = 8
    lead_covariance: list[list[float]] | None = None
    sparse_attention_config: dict | PreTrainedConfig | None = None

    @classmethod
    def presets(cls):
        deep_stem = {"stem_channels": (64, 128, 192, 192)}
        return {
            "tiny": _size(
                128, 4, 2, stem_channels=(32, 48, 64, 64), waveform_channels=(32, 64), initializer_range=0.05
            ),  # under 1 M parameters
            "small": _size(192, 6, 3, initializer_range=0.05),  # about 3 M
            "medium": _size(384, 8, 6, **deep_stem),
            "base": _size(768, 12, 12, **deep_stem),
            "large": _size(1024, 24, 16, **deep_stem),
            "xl": _size(1600, 48, 25, **deep_stem),
        }

    def __post_init__(self, **kwargs):
        self.sparse_attention_config = _as_sparse_attention_config(self.sparse_attention_config)
        super().__post_init__(**kwargs)
        if self._attn_implementation is None:
            self._attn_implementation = "cardio_sparse"  # the library would take "sdpa", and does not store the choice

    @property
    def intermediate_size(self) -> int:
        return self.mlp_ratio * self.hidden_size

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in the library; but other labels than the stored ones drop the stored thresholds, which belong to those."""
        given = {name: kwargs[name] for name in ("num_labels", "id2label") if kwargs.get(name) is not None}
        if given:
            names = ("id2label", "label2id", "thresholds", "record_thresholds")
            labels = {name: kwargs.pop(name) for name in names if name in kwargs}
            if not _same_labels(config_dict, given):
                config_dict = {**config_dict, "thresholds": None, "record_thresholds": None, "label2id": None}
            config_dict = {**config_dict, **labels}
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        config.labels_were_given = bool(given)
        return result

    def to_dict(self):
        content = super().to_dict()
        content.pop("labels_were_given", None)
        return content

    @property
    def pooled_size(self) -> int:
        return self.hidden_size * len(self.pooling.split("_"))

    def validate_architecture_anyecg(self):
        _validate_transformer(self)
        _validate_stem(self)
        if self.problem_type not in (None, "regression", "single_label_classification", "multi_label_classification"):
            raise ValueError(
                f'problem_type is "{self.problem_type}"; accepted are "regression", "single_label_classification", '
                '"multi_label_classification", or None to guess it from the labels.'
            )
        if self.pooling not in ("mean", "mean_max"):
            raise ValueError(f'pooling is "{self.pooling}"; accepted are "mean" and "mean_max".')
        _validate_waveform_head(self)
        _check_at_least(self, 1, "record_hidden_size", "record_layers")
        _check_at_least(self, 0, "record_reach")
        if self.record_hidden_size % 2:
            raise ValueError(f"record_hidden_size is {self.record_hidden_size}; it must be even, for two heads.")

    def validate_thresholds(self):
        for name in ("thresholds", "record_thresholds"):
            values = getattr(self, name)
            if values is not None and (len(values) != self.num_labels or not all(0 <= t <= 1 for t in values)):
                raise ValueError(
                    f"{name} holds {len(values)} values for {self.num_labels} labels; needed is one score between "
                    "0 and 1 for each label, in the order of id2label (or None)."
                )


@strict
class AnyECGQuantizerConfig(_PresetMixin, PreTrainedConfig):
    """Configuration of the rhythm quantizer: temporal encoder, codebook, and the decoder with three views.

    Args (beyond those of `AnyECGConfig`):
        num_hidden_layers, num_decoder_layers (`int`): Cardio-Sparse Transformer layers before and after the codebook.
        codebook_size, codebook_dim (`int`): number of rhythm codes, and dimension in which they are compared.
        codebook_update (`str`): "ema" (default), or "gradient", the paper's codebook loss.
        commitment_weight (`float`): the paper's beta; measured: 0.05 to 0.25, at 1.0 small patches merge.
        ema_decay, dead_code_share, dead_code_steps: a code used less than `dead_code_share` of an even share for
            `dead_code_steps` training steps is moved to a random patch.
        wavelet_levels (`int`), wavelet_bands (`list[str]`): db6 bands that the frequency head predicts; the paper takes all,
            but D1 (75-150 Hz) lies outside the filtered band and the coarser approximations repeat each other.
        demography (`list[str]`): what the demography head predicts, from `age`, `sex`, `weight`.
        morphology_weight, frequency_weight, demography_weight (`float`): factors of the losses in the sum.
    """

    model_type = "anyecg_quantizer"
    sub_configs = {"sparse_attention_config": AnyECGSparseAttentionConfig}

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_decoder_layers: int = 3
    num_attention_heads: int = 2
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-6
    layer_scale_init: float | int = 0.1
    initializer_range: float = 0.02
    sampling_rate: int = 300
    patch_size: int = 300
    max_patches: int = 128
    num_lead_ids: int = 16
    input_scale_mv: float | int = 0.5
    stem_scope: str = "patch"
    stem_channels: list[int] | tuple[int, ...] = (32, 32, 32)
    stem_kernel_sizes: list[int] | tuple[int, ...] = (25, 6, 5)
    stem_strides: list[int] | tuple[int, ...] = (5, 2, 1)
    stem_norm_groups: int = 4
    stem_bins: int = 30
    stem_amplitude: bool = True
    codebook_size: int = 1024
    codebook_dim: int = 32
    codebook_update: str = "ema"
    ema_decay: float = 0.99
    dead_code_share: float = 0.1
    dead_code_steps: int = 40
    commitment_weight: float | int = 0.25
    morphology_weight: float | int = 1.0
    frequency_weight: float | int = 1.0
    demography_weight: float | int = 0.1
    wavelet_levels: int = 4
    wavelet_bands: list[str] | tuple[str, ...] = ("D2", "D3", "D4", "A4")
    demography: list[str] | tuple[str, ...] = ("age", "sex", "weight")
    sparse_attention_config: dict | PreTrainedConfig | None = None

    @classmethod
    def presets(cls):
        return {
            "tiny": _size(64, 2, 1, num_decoder_layers=1, codebook_size=256, initializer_range=0.05),
            "small": _size(128, 4, 2, num_decoder_layers=2, initializer_range=0.05),
            "medium": _size(384, 4, 6, codebook_size=4096, codebook_dim=64),
            "base": _size(768, 4, 12, codebook_size=8192, codebook_dim=64),
            "large": _size(1024, 4, 16, codebook_size=8192, codebook_dim=64),
            "xl": _size(1600, 4, 25, codebook_size=8192, codebook_dim=64),
        }

    def __post_init__(self, **kwargs):
        self.sparse_attention_config = _as_sparse_attention_config(self.sparse_attention_config)
        super().__post_init__(**kwargs)
        if self._attn_implementation is None:
            self._attn_implementation = "cardio_sparse"  # the library would take "sdpa", and does not store the choice

    @property
    def intermediate_size(self) -> int:
        return self.mlp_ratio * self.hidden_size

    def validate_architecture_quantizer(self):
        _validate_transformer(self)
        _validate_stem(self)
        _check_at_least(
            self, 1, "num_decoder_layers", "codebook_size", "codebook_dim", "wavelet_levels", "dead_code_steps"
        )
        if self.codebook_update not in ("ema", "gradient"):
            raise ValueError(f'codebook_update is "{self.codebook_update}"; accepted are "ema" and "gradient".')
        if not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it must lie between 0 and 1, both excluded.")
        known = [f"{kind}{level}" for level in range(1, self.wavelet_levels + 1) for kind in "DA"]
        _check_members("wavelet_bands", self.wavelet_bands, known)
        _check_members("demography", self.demography, ["age", "sex", "weight"])


def _same_labels(stored, given):
    names = {int(key): name for key, name in (stored.get("id2label") or {}).items()}
    if "id2label" in given:
        return names == {int(key): name for key, name in given["id2label"].items()}
    return len(names) == given["num_labels"]


def _size(hidden_size, num_hidden_layers, num_attention_heads, **others):
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        **others,
    }


def _as_sparse_attention_config(value):
    if value is None:
        return AnyECGSparseAttentionConfig()
    if getattr(value, "model_type", AnyECGSparseAttentionConfig.model_type) != AnyECGSparseAttentionConfig.model_type:
        raise ValueError(
            f"sparse_attention_config is a {type(value).__name__}; give an AnyECGSparseAttentionConfig or a dict of its fields."
        )
    return AnyECGSparseAttentionConfig(**value) if isinstance(value, dict) else value


def _validate_transformer(config):
    _check_at_least(
        config, 1, "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "patch_size", "sampling_rate",
        "max_patches", "codebook_size",
    )  # fmt: skip
    for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
        if not 0 <= getattr(config, name, 0) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 0 and under 1.")
    _check_at_least(config, 13, "num_lead_ids")  # padding and the twelve standard leads
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is no multiple of num_attention_heads {config.num_attention_heads}; "
            "choose the number of heads so that it divides the width."
        )
    if config.input_scale_mv <= 0:
        raise ValueError(f"input_scale_mv is {config.input_scale_mv}; it must be above 0 (millivolt).")


def _validate_stem(config):
    _check_at_least(config, 1, "stem_bins", "stem_norm_groups")
    if any(channels < 1 for channels in config.stem_channels):
        raise ValueError(f"stem_channels is {list(config.stem_channels)}; each must be at least 1.")
    lengths = {len(config.stem_channels), len(config.stem_kernel_sizes), len(config.stem_strides)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "stem_channels, stem_kernel_sizes and stem_strides must have the same, non-zero length; got "
            f"{len(config.stem_channels)}, {len(config.stem_kernel_sizes)} and {len(config.stem_strides)}."
        )
    if config.stem_scope not in ("lead", "patch"):
        raise ValueError(f'stem_scope is "{config.stem_scope}"; accepted are "lead" and "patch".')
    for kernel_size, stride in zip(config.stem_kernel_sizes, config.stem_strides):
        if stride < 1 or kernel_size < stride or (kernel_size - stride) % 2:
            raise ValueError(
                f"stem kernel {kernel_size} with stride {stride}: the kernel must be at least the stride and differ from it "
                "by an even number, so that every patch keeps its own positions."
            )
    positions = config.patch_size
    for stride in config.stem_strides:
        positions = positions / stride
    if positions % config.stem_bins:
        raise ValueError(
            f"A patch of {config.patch_size} samples has {positions:g} positions after strides {tuple(config.stem_strides)}, "
            f"which do not divide into stem_bins = {config.stem_bins}."
        )
    for channels in config.stem_channels:
        if channels % config.stem_norm_groups:
            raise ValueError(f"stem_channels {channels} is no multiple of stem_norm_groups {config.stem_norm_groups}.")


def _validate_waveform_head(config):
    _check_at_least(config, 1, "waveform_kernel_size", "waveform_blocks")
    _check_at_least(config, 0, "waveform_state_channels")
    sizes = [*config.waveform_channels, *config.waveform_strides]
    if len(config.waveform_channels) != 2 or len(config.waveform_strides) != 2 or min(sizes) < 1:
        raise ValueError(
            f"waveform_channels is {list(config.waveform_channels)} and waveform_strides {list(config.waveform_strides)}; each "
            "must hold two numbers above 0, for the fine and the coarse level."
        )
    if config.waveform_kernel_size % 2 == 0:
        raise ValueError(f"waveform_kernel_size is {config.waveform_kernel_size}; it must be odd.")
    if config.lead_covariance is not None:
        _validate_covariance(np.array(config.lead_covariance, dtype=float))


def _validate_covariance(products):
    size = len(STANDARD_LEADS)
    if products.shape != (size, size) or not np.isfinite(products).all() or not np.allclose(products, products.T):
        raise ValueError(
            f"lead_covariance has shape {products.shape}; it must be a symmetric {size} x {size} matrix of finite numbers, mV^2, "
            "in the order of STANDARD_LEADS."
        )
    if np.linalg.eigvalsh(products).min() < -1e-6 * np.trace(products) or not np.trace(products) > 0:
        raise ValueError("lead_covariance has a negative eigenvalue or is zero: these are no mean products of leads.")


def _check_at_least(config, least, *names):
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {least}.")


def _check_members(name, values, known):
    unknown = [value for value in values if value not in known]
    if unknown or not values or len(set(values)) != len(values):
        raise ValueError(f"{name} is {list(values)}; it must hold some of {known}, each once.")
