"""Checkpoints as flat folders that need nothing else: weights, configuration, feature extractor, code, card.

`carry_code`, called by `import anyecg_hf`, makes a plain `save_pretrained` or `push_to_hub` bring the code along.
`export_checkpoint` writes model and feature extractor together, with a reference pair, and checks the folder.
"""

import json
import re
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import is_torch_available

from .checkpoint_code import extractor_class
from .configuration_anyecg import AnyECGConfig, AnyECGQuantizerConfig
from .feature_extraction_anyecg import AnyECGFeatureExtractor
from .feature_extraction_anyecg_rhythm import AnyECGRhythmFeatureExtractor
from .training_files import PICKLES

if is_torch_available():
    from .modeling_anyecg import AnyECGForMaskedCodeModeling, AnyECGModel
    from .modeling_anyecg_heads import AnyECGForLeadReconstruction, AnyECGForSequenceClassification
    from .modeling_anyecg_long import AnyECGForLongRecords
    from .modeling_anyecg_quantizer import AnyECGRhythmQuantizer
    from .reference_pair import REFERENCE, write_reference

_ABSOLUTE_IMPORT = re.compile(r"^\s*(?:from|import)\s+anyecg_hf\b", re.MULTILINE)


def carry_code():
    """Make saved models and extractors bring their code: `trust_remote_code=True` loads them without this package."""
    for each in (AnyECGConfig, AnyECGQuantizerConfig, AnyECGFeatureExtractor, AnyECGRhythmFeatureExtractor):
        each.register_for_auto_class()
    if is_torch_available():
        AnyECGModel.register_for_auto_class("AutoModel")
        AnyECGRhythmQuantizer.register_for_auto_class("AutoModel")
        AnyECGForMaskedCodeModeling.register_for_auto_class("AutoModelForPreTraining")
        AnyECGForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
        AnyECGForLeadReconstruction.register_for_auto_class("AutoModelForMaskedImageModeling")
        AnyECGForLongRecords.register_for_auto_class("AutoModelForAudioFrameClassification")


def export_checkpoint(model, feature_extractor, folder, *, card=None):
    """Write a complete checkpoint: what `pipeline`, the Auto classes, a reader and `verify` need, in one flat folder.

    Args:
        model (`AnyECGPreTrainedModel`): the quantizer, the backbone or a head.
        feature_extractor (`AnyECGFeatureExtractor`): of the model; for the quantizer the
            `AnyECGRhythmFeatureExtractor` with it.
        folder (`str` or `os.PathLike`): made if absent.
        card (`str`, *optional*): text of the README.md, with the Hub's YAML block on top. An old README.md is kept
            without it.

    Returns:
        `pathlib.Path`: the folder.

    Raises:
        ValueError: model and feature extractor do not belong together, the model's outputs are not finite, or
            `check_checkpoint` finds something amiss.
    """
    folder = Path(folder)
    _refuse_strangers(model, feature_extractor)
    model.save_pretrained(folder)
    feature_extractor.save_pretrained(folder)
    write_reference(model, feature_extractor, folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    check_checkpoint(folder)
    return folder


def check_checkpoint(folder):
    """Raise unless a folder holds all that loads it where this package is not installed.

    Looked for: config.json, preprocessor_config.json, weights as safetensors and none as pickle; every module that the
    two JSON files name, with its class; every module that those import; no import of this package by name.

    Raises:
        ValueError: lists all that is amiss.
    """
    folder = Path(folder)
    amiss = [
        f"{name} is missing" for name in ("config.json", "preprocessor_config.json") if not (folder / name).is_file()
    ]
    if not list(folder.glob("model*.safetensors")):
        amiss.append("weights are missing (model.safetensors)")
    amiss += [f"{path.name} may hold a pickle" for pattern in PICKLES for path in sorted(folder.glob(pattern))]
    if not amiss:
        amiss += _code_amiss(folder)
    if amiss:
        raise ValueError(f"{folder} is no complete checkpoint: {'; '.join(amiss)}. Write it with export_checkpoint.")


def checkpoint_files(folder):
    """Return the names of the files of a checkpoint that belong to it, sorted; whatever else lies in its folder does not.

    These are README.md, LICENSE, config.json, preprocessor_config.json, the weights, the reference pair, run.json of
    training.publish, and the modules that the two JSON files name, with all that those import.

    Args:
        folder (`str` or `os.PathLike`): that `check_checkpoint` has passed.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if not (folder / "model.safetensors").is_file():  # else it is what loads, and shards are left over
        weights = {index.name, *json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    modules, waiting = set(), {module for module, _ in _entries(folder)}
    while waiting:
        modules |= waiting
        waiting = {name for module in waiting for name in get_relative_imports(folder / f"{module}.py")} - modules
    names = {"README.md", "LICENSE", "config.json", "preprocessor_config.json", REFERENCE, "run.json"} | weights
    return sorted(name for name in names | {f"{module}.py" for module in modules} if (folder / name).is_file())


def _refuse_strangers(model, feature_extractor):
    needed = extractor_class(model.config.model_type)
    is_rhythm = isinstance(feature_extractor, AnyECGRhythmFeatureExtractor)
    fits = isinstance(feature_extractor, needed) and is_rhythm == (needed is AnyECGRhythmFeatureExtractor)
    if not fits or (is_rhythm and feature_extractor.quantizer is not model):
        raise ValueError(
            f"{type(model).__name__} was given with {type(feature_extractor).__name__}; it goes with {needed.__name__}"
            f"{', the one that holds this quantizer' if fits else ''}."
        )
    for name in ("sampling_rate", "patch_size"):
        own, needed = getattr(feature_extractor, name), getattr(model.config, name)
        if own != needed:
            raise ValueError(
                f"The feature extractor gives {name} {own}, the model needs {needed}; they do not belong together."
            )


def _entries(folder):
    """Return the pairs `(module, class name)` that config.json and preprocessor_config.json name."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entries = [*_auto_map(folder).values(), *(each["impl"] for each in config.get("custom_pipelines", {}).values())]
    return sorted({tuple(entry.split(".")) for entry in entries})


def _auto_map(folder):
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("config.json", "preprocessor_config.json")]
    return {name: entry for text in texts for name, entry in json.loads(text).get("auto_map", {}).items()}


def _code_amiss(folder):
    auto_map = _auto_map(folder)
    amiss = [
        f"no auto_map entry for {name}"
        for name in ("AutoConfig", "AutoModel", "AutoFeatureExtractor")
        if name not in auto_map
    ]
    for module, class_name in _entries(folder):
        path = folder / f"{module}.py"
        if not path.is_file() or f"class {class_name}(" not in path.read_text(encoding="utf-8"):
            amiss.append(f"{module}.py with {class_name} is missing")
    for path in sorted(folder.glob("*.py")):
        amiss += [
            f"{path.name} imports {name}.py, which is missing"
            for name in get_relative_imports(path)
            if not (folder / f"{name}.py").is_file()
        ]
        if _ABSOLUTE_IMPORT.search(path.read_text(encoding="utf-8")):
            amiss.append(f"{path.name} imports anyecg_hf by name")
    return amiss
