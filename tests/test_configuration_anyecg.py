"""The configurations: strict, complete in JSON, and of the sizes that their presets promise."""

import json
import math

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig

import anyecg_hf  # noqa: F401  (registers the configurations with AutoConfig)
from anyecg_hf.configuration_anyecg import AnyECGConfig, AnyECGQuantizerConfig, AnyECGSparseAttentionConfig
from anyecg_hf.modeling_anyecg import AnyECGModel
from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer

both = pytest.mark.parametrize("config_class", [AnyECGConfig, AnyECGQuantizerConfig])

PATTERN = {"time_tolerance": 2, "lead_window": 7, "num_global_tokens": 3}


def own_fields(config):
    """Return the configuration as a dictionary, without what depends on where and by what it was loaded."""
    content = json.loads(json.dumps(config.to_dict()))
    for part in (content, content["sparse_attention_config"]):
        for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
            part.pop(name, None)
    return content


# Strictness


@both
@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", "192"),
        ("hidden_size", 192.0),
        ("hidden_size", True),
        ("hidden_size", None),
        ("hidden_size", np.int64(192)),
        ("patch_size", 300.0),
        ("hidden_dropout", "0.1"),
        ("hidden_dropout", np.float32(0.1)),
        ("stem_strides", 5),
        ("stem_strides", [5.0, 2.0, 2.0]),
        ("stem_scope", 1),
        ("sparse_attention_config", "dense"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(config_class, field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        config_class(**{field: value})


@both
def test_a_value_of_the_wrong_type_is_refused_on_assignment_too(config_class):
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        config_class().hidden_size = "wide"


@both
@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"max_patches": -1}, "max_patches is -1"),
        ({"codebook_size": 0}, "codebook_size is 0"),
        ({"sampling_rate": 0}, "sampling_rate is 0"),
        ({"num_lead_ids": 12}, "num_lead_ids is 12"),
        ({"hidden_size": 64, "num_attention_heads": 3}, "hidden_size 64 is no multiple of num_attention_heads 3"),
        ({"input_scale_mv": 0}, "input_scale_mv is 0"),
        ({"input_scale_mv": -0.5}, "input_scale_mv is -0.5"),
        ({"stem_strides": (5, 2)}, "same, non-zero length"),
        ({"stem_channels": (), "stem_kernel_sizes": (), "stem_strides": ()}, "same, non-zero length"),
        ({"stem_scope": "record"}, 'stem_scope is "record"'),
        ({"stem_bins": 7}, "stem_bins = 7"),
        ({"patch_size": 301}, "A patch of 301 samples"),
    ],
)
def test_values_that_make_no_model_are_refused_with_the_reason(config_class, options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        config_class(**options)


@both
@pytest.mark.parametrize(
    "kernel_sizes, strides, message",
    [
        ((25, 6, 6), (5, 2, 0), "kernel 6 with stride 0"),
        ((25, 6, 6), (5, 2, -2), "kernel 6 with stride -2"),
        ((25, 6, 2), (5, 2, 3), "kernel 2 with stride 3"),
        ((25, 6, 5), (5, 2, 2), "kernel 5 with stride 2"),
        ((25, 6, 7), (5, 2, 7), "do not divide into stem_bins"),
    ],
)
def test_bad_strides_are_refused(config_class, kernel_sizes, strides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        config_class(stem_channels=(32, 64, 64), stem_kernel_sizes=kernel_sizes, stem_strides=strides)


@both
@pytest.mark.parametrize("field, value", [("stem_bins", 0), ("stem_norm_groups", 0), ("stem_norm_groups", 5)])
def test_bins_and_groups_that_do_not_divide_are_refused_with_their_name(config_class, field, value):
    with pytest.raises(StrictDataclassClassValidationError, match=field):
        config_class(**{field: value})


@both
def test_a_stem_without_channels_is_refused(config_class):
    with pytest.raises(StrictDataclassClassValidationError, match="stem_channels"):
        config_class(stem_channels=(32, 0, 64), stem_kernel_sizes=(25, 6, 6), stem_strides=(5, 2, 2), stem_bins=5)


@both
@pytest.mark.parametrize("field, value", [("hidden_dropout", 1.5), ("attention_dropout", -0.1)])
def test_a_setting_that_no_layer_takes_is_refused(config_class, field, value):
    with pytest.raises(StrictDataclassClassValidationError, match=field):
        config_class(**{field: value})


@pytest.mark.parametrize("field", ["time_tolerance", "lead_window", "num_global_tokens"])
def test_a_negative_number_in_the_attention_pattern_is_refused(field):
    with pytest.raises(StrictDataclassClassValidationError, match=f"{field} is -1"):
        AnyECGSparseAttentionConfig(**{field: -1})
    with pytest.raises(StrictDataclassClassValidationError, match=f"{field} is -1"):
        AnyECGConfig(sparse_attention_config={field: -1})


@both
def test_a_misspelt_name_in_the_attention_pattern_of_a_preset_is_refused(config_class):
    with pytest.raises(ValueError, match="time_tolerence"):
        config_class.from_preset("small", sparse_attention_config={"time_tolerence": 1})


@both
def test_another_configuration_in_place_of_the_attention_pattern_is_refused(config_class):
    with pytest.raises((ValueError, TypeError), match="sparse_attention_config"):
        config_class(sparse_attention_config=AnyECGQuantizerConfig())


def test_an_unknown_pooling_is_refused():
    with pytest.raises(StrictDataclassClassValidationError, match='"max"'):
        AnyECGConfig(pooling="max")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codebook_update": "both"}, '"both"'),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"ema_decay": 0.0}, "ema_decay is 0.0"),
        ({"wavelet_levels": 0}, "wavelet_levels is 0"),
        ({"wavelet_bands": ("D2", "D5")}, "D5"),
        ({"wavelet_bands": ("D2", "D2")}, "each once"),
        ({"wavelet_bands": ()}, "wavelet_bands"),
        ({"demography": ("age", "height")}, "height"),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0"),
        ({"codebook_dim": 0}, "codebook_dim is 0"),
        ({"dead_code_steps": 0}, "dead_code_steps is 0"),
    ],
)
def test_a_quantizer_that_cannot_be_is_refused(options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        AnyECGQuantizerConfig(**options)


# Thresholds and labels


@pytest.mark.parametrize(
    "thresholds", [[0.5, 0.5], [0.5] * 4, [], [0.5, 0.5, 1.5], [0.5, -0.1, 0.5], [0.5, math.nan, 0.5]]
)
def test_thresholds_must_be_one_score_a_label(thresholds):
    with pytest.raises(StrictDataclassClassValidationError, match="3 labels"):
        AnyECGConfig(num_labels=3, thresholds=thresholds)


def test_thresholds_are_saved_beside_the_labels(tmp_path):
    labels = {0: "AF", 1: "NORM"}
    AnyECGConfig(id2label=labels, label2id={"AF": 0, "NORM": 1}, thresholds=[0.25, 0.75]).save_pretrained(tmp_path)
    config = AnyECGConfig.from_pretrained(tmp_path)
    assert config.id2label == labels and config.thresholds == [0.25, 0.75]
    assert config.label2id == {"AF": 0, "NORM": 1} and config.num_labels == 2


def test_thresholds_that_no_longer_fit_are_refused_when_saving(tmp_path):
    config = AnyECGConfig(num_labels=3, thresholds=[0.1, 0.2, 0.3])
    config.num_labels = 2
    with pytest.raises(StrictDataclassClassValidationError, match="3 values for 2 labels"):
        config.save_pretrained(tmp_path)


# JSON


@both
def test_the_json_gives_the_same_configuration_back(config_class, tmp_path):
    config = config_class(
        hidden_size=96,
        num_attention_heads=4,
        stem_channels=[16, 24],
        stem_kernel_sizes=(15, 6),
        stem_strides=(3, 2),
        stem_bins=5,
        sparse_attention_config=PATTERN,
    )
    config.save_pretrained(tmp_path)
    for loaded in (config_class.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is config_class
        assert own_fields(loaded) == own_fields(config)


@both
def test_the_attention_pattern_survives_the_json_as_its_own_class(config_class, tmp_path):
    config_class(sparse_attention_config=PATTERN).save_pretrained(tmp_path)
    loaded = config_class.from_pretrained(tmp_path).sparse_attention_config
    assert type(loaded) is AnyECGSparseAttentionConfig
    assert {name: getattr(loaded, name) for name in PATTERN} == PATTERN


@both
def test_the_attention_pattern_may_be_given_in_each_form(config_class):
    as_object = config_class(sparse_attention_config=AnyECGSparseAttentionConfig(**PATTERN))
    assert own_fields(as_object) == own_fields(config_class(sparse_attention_config=PATTERN))
    plain = config_class().sparse_attention_config
    assert (plain.time_tolerance, plain.lead_window, plain.num_global_tokens) == (0, None, 0)


def test_the_attention_pattern_is_loaded_alone_from_a_whole_configuration(tmp_path):
    AnyECGConfig(sparse_attention_config=PATTERN).save_pretrained(tmp_path)
    assert AnyECGSparseAttentionConfig.from_pretrained(tmp_path).lead_window == 7


@both
def test_two_configurations_do_not_share_their_attention_pattern(config_class):
    first, second = config_class(), config_class()
    first.sparse_attention_config.time_tolerance = 1
    assert second.sparse_attention_config.time_tolerance == 0


@both
def test_every_field_is_in_the_json_also_at_its_default(config_class):
    content = json.loads(config_class().to_json_string(use_diff=False))
    missing = set(config_class.__annotations__) - set(content) - {"model_type"}
    assert missing == set()


@both
def test_the_json_of_a_default_configuration_freezes_what_the_presets_may_change(config_class, tmp_path):
    config_class.from_preset("small").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert {"hidden_size", "num_hidden_layers", "stem_channels", "sampling_rate", "patch_size"} <= content.keys()


@both
def test_single_fields_are_overridden_on_loading(config_class, tmp_path):
    config_class().save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path, hidden_dropout=0.2).hidden_dropout == 0.2


@both
def test_an_unknown_key_on_loading_is_handed_back_and_does_not_stick(config_class, tmp_path):
    config_class().save_pretrained(tmp_path)
    config, unused = config_class.from_pretrained(tmp_path, return_unused_kwargs=True, zzz=1)
    assert unused == {"zzz": 1} and not hasattr(config, "zzz")


@both
def test_the_configuration_of_the_other_model_is_not_taken_in_silence(config_class, tmp_path):
    other = AnyECGQuantizerConfig if config_class is AnyECGConfig else AnyECGConfig
    other().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is other


# Presets


@both
def test_an_unknown_preset_is_an_error_that_lists_the_known_ones(config_class):
    with pytest.raises(ValueError, match='"huge".*tiny, small, medium, base, large, xl'):
        config_class.from_preset("huge")


@both
def test_a_misspelt_override_of_a_preset_is_an_error(config_class):
    with pytest.raises(ValueError, match="codebok_size"):
        config_class.from_preset("small", codebok_size=2048)


@both
def test_an_override_of_a_preset_wins(config_class):
    config = config_class.from_preset("small", codebook_size=2048, sparse_attention_config={"time_tolerance": 1})
    assert config.codebook_size == 2048 and config.sparse_attention_config.time_tolerance == 1
    assert config.hidden_size == config_class.from_preset("small").hidden_size


@both
@pytest.mark.parametrize("name", ["tiny", "small", "medium", "base", "large", "xl"])
def test_every_preset_survives_the_json(config_class, name, tmp_path):
    config = config_class.from_preset(name)
    config.save_pretrained(tmp_path)
    assert own_fields(AutoConfig.from_pretrained(tmp_path)) == own_fields(config)


def test_the_published_sizes_have_the_published_shapes():
    shapes = {name: AnyECGConfig.from_preset(name) for name in ("base", "large", "xl")}
    assert [(c.num_hidden_layers, c.hidden_size) for c in shapes.values()] == [(12, 768), (24, 1024), (48, 1600)]


# Backbone and quantizer; counted here, stated in the documents. The large ones are built on the meta device.
PARAMETERS = {
    "tiny": (911_888, 304_038),
    "small": (2_906_432, 1_533_734),
    "medium": (15_080_064, 14_006_342),
    "base": (86_434_816, 53_950_278),
    "large": (304_011_520, 94_822_726),
    "xl": (1_477_966_144, 228_958_150),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_exactly_this_many_parameters(name):
    with torch.device("meta"):
        backbone = AnyECGModel(AnyECGConfig.from_preset(name))
        quantizer = AnyECGRhythmQuantizer(AnyECGQuantizerConfig.from_preset(name))
    assert (count(backbone), count(quantizer)) == PARAMETERS[name]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_tiny_is_under_one_million_and_small_between_two_and_five():
    assert PARAMETERS["tiny"][0] < 1_000_000
    assert 2_000_000 < PARAMETERS["small"][0] < 5_000_000
