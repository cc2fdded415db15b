"""The reference pair of a checkpoint: two made-up records, and what extractor and model made of them when it was exported.

`export_checkpoint` writes it as reference.safetensors; `verify` runs the records again and compares. So weights that are
random in part, another filter or another order of labels are noticed before anybody relies on them.

In the file: `signal`, int16 `(2, leads, samples)`, with its rate, unit and leads in the metadata; `extractor.*` and `model.*`,
the outputs by name, see `_outputs`. Of an output of more than 1,024 values every n-th is kept, see `_thinned`. The metadata
also hold the settings that decide what the numbers mean.

    python -P anyecg_hf/reference_pair.py FOLDER

verifies a folder as someone without this package loads it, by the code in the folder: nothing of the package is imported.
"""

import copy
import inspect
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoFeatureExtractor

REFERENCE = "reference.safetensors"
# Greatest deviation of an output, as a share of its greatest value. All is computed in float32 on the CPU from the weights as
# stored, so neither their type nor an accelerator matters. Other processors and libraries round differently: measured, with
# other vector instructions and with eager attention, by at most 0.000001, in the checkpoints that ship and in 24 layers.
# Weights rounded to bfloat16 after the export differ by 0.002, a corner of the band moved by 0.5 Hz by 0.003.
TOLERANCE = 1e-4
# A patch as near to one code as to another gets either, by the last bit of rounding: one patch in fifty may.
CODES_TOLERANCE = 0.02
_FORMAT = "anyecg reference pair 1"
_SIGNAL, _CODES = "signal", "extractor.rhythm_codes"
_RATE, _UNITS = 250, "uV"  # another rate and unit than any model's: both conversions are checked
_MOST_VALUES = 1024
_MOST_BYTES = 2_000_000
_NEEDED_FILES = ("*.json", "*.py", "model*.safetensors", REFERENCE)
_OF_THE_LIBRARY = ("auto_map", "feature_extractor_type", "processor_class", "_name_or_path", "name_or_path")
_HOW_TO_GET_ONE = "Write one with export_checkpoint(model, feature_extractor, folder) of anyecg_hf.hub"


def write_reference(model, feature_extractor, folder):
    """Write the reference pair of `model` and `feature_extractor` into a checkpoint's folder; see the head of this file.

    Raises:
        ValueError: an output of the model is not finite.
    """
    records = _made_up_records(model.config, feature_extractor)
    # a copy, since the caller's may be in training, on an accelerator, in another type
    whole = copy.deepcopy(model).to("cpu", torch.float32).eval()
    if hasattr(feature_extractor, "quantizer"):
        feature_extractor = copy.copy(feature_extractor)
        feature_extractor.quantizer = whole
    outputs = _outputs(whole, feature_extractor, records)
    amiss = [name for name, values in outputs.items() if not np.isfinite(values).all()]
    if amiss:
        raise ValueError(
            f"{type(model).__name__} gives {', '.join(amiss)} that are not finite: not worth a checkpoint."
        )
    samples = np.stack([record["signal"] for record in records])
    metadata = {
        "format": _FORMAT,
        "sampling_rate": json.dumps(_RATE),
        "units": json.dumps(_UNITS),
        "lead_names": json.dumps(list(feature_extractor.lead_names)),
        "settings": json.dumps(_settings(model.config, feature_extractor), sort_keys=True),
    }
    kept = {name: _thinned(values) for name, values in outputs.items()}
    save_file({_SIGNAL: samples, **kept}, Path(folder) / REFERENCE, metadata=metadata)


def verify(checkpoint, *, revision=None, token=None, cache_dir=None, local_files_only=False):
    """Load a checkpoint, run its reference records through its extractor and model, and compare with what it gave at export.

    Args:
        checkpoint (`str` or `os.PathLike`): folder, or Hub id.
        revision (`str`, *optional*): commit, branch or tag, of a Hub id.
        token, cache_dir, local_files_only: as for `from_pretrained`, of a Hub id.

    Returns:
        `dict[str, float]`: for each output its greatest deviation, as a share of its greatest value; of codes, masks and lead
        ids the share that differs. Allowed are `TOLERANCE` and, of codes, `CODES_TOLERANCE`; of masks and lead ids none.

    Raises:
        FileNotFoundError: there is no reference pair in the checkpoint.
        ValueError: something differs, with what, by how much, and what to do; or the pair cannot be read; or weights are
            missing.
        OSError: the Hub does not give the checkpoint.
    """
    if not Path(checkpoint).is_dir():
        where = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        checkpoint = snapshot_download(str(checkpoint), allow_patterns=_NEEDED_FILES, **where)  # all of one commit
    return verify_folder(checkpoint)


def verify_folder(folder, *, trust_remote_code=False):
    """Do as `verify` does, for a folder; with `trust_remote_code` by the code in it, where this package is not imported."""
    folder = Path(folder)
    records, expected, settings = _read_reference(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    model_class = getattr(transformers, _auto_class(config))
    model = model_class.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    amiss = _settings_amiss(settings, _settings(config, extractor))
    found = {name: _thinned(values) for name, values in _found(model, extractor, records, expected, folder).items()}
    if {name: values.shape for name, values in found.items()} != {
        name: values.shape for name, values in expected.items()
    }:
        amiss.append(f"its outputs are {_shapes(found)}, those of the reference pair {_shapes(expected)}")
        raise _refused(folder, amiss)
    deviations = {name: _deviation(values, expected[name]) for name, values in found.items()}
    amiss += [
        _explained(name, value, expected[name]) for name, value in deviations.items() if not value <= _allowed(name)
    ]
    if amiss:
        raise _refused(folder, amiss)
    return deviations


def _made_up_records(config, extractor):
    """Return two simulated records, of at least 4 s and 4 patches where the model takes as many, as stored samples.

    The second has wide beats and a greatest value beyond `clip_mv`.
    """
    from .simulate import simulate_record

    patch_seconds = config.patch_size / config.sampling_rate
    num_patches = min(config.max_patches, max(4, math.ceil(4 / patch_seconds)))
    options = {"sampling_rate": _RATE, "duration_seconds": num_patches * patch_seconds, "noise_mv": 0.03}
    options |= {"lead_names": extractor.lead_names}
    signals = [
        simulate_record(1, **options).signal,
        4 * simulate_record(2, rhythm="ventricular beats", **options).signal,
    ]
    stored = [np.round(1000 * signal).astype(np.int16) for signal in signals]
    return [_record(samples, _RATE, _UNITS, list(extractor.lead_names)) for samples in stored]


def _record(signal, sampling_rate, units, lead_names):
    return {"signal": signal, "sampling_rate": sampling_rate, "units": units, "lead_names": lead_names}


@torch.no_grad()
def _outputs(model, extractor, records, codes=None):
    """Return what extractor and model make of the records as one batch, by name: all tensors that a model returns.

    Every third patch is hidden from models that rebuild hidden patches. Of the quantizer, what leads to the codes, and what
    its heads make of `codes` (default: its own), so that one code more or less changes nothing else.
    """
    batch = extractor(records, return_tensors="pt")
    found = {f"extractor.{name}": values.numpy() for name, values in batch.items()}
    own_codes = batch.pop("rhythm_codes", None)
    if own_codes is not None:
        outputs = _quantizer_outputs(model, batch, own_codes if codes is None else torch.from_numpy(codes))
    else:
        if "bool_masked_pos" in inspect.signature(model.forward).parameters:
            places = torch.arange(batch["attention_mask"].numel()).view(batch["attention_mask"].shape)
            batch["bool_masked_pos"] = places % 3 == 0
        outputs = model(**batch)
    tensors = {name: values for name, values in outputs.items() if isinstance(values, torch.Tensor)}
    return found | {f"model.{name}": values.float().numpy() for name, values in tensors.items()}


def _quantizer_outputs(model, batch, codes):
    vectors, token_mask = model.encode_vectors(**batch)
    quantized = model.vector_quantizer.embed(codes.clamp(min=0))
    states = model.decode_vectors(quantized, batch["lead_ids"], token_mask)
    heads = {name: getattr(model, f"{name}_head")(states) for name in ("morphology", "frequency", "demography")}
    return {"vectors": vectors, **heads}


def _found(model, extractor, records, expected, folder):
    codes = expected.get(_CODES)
    if codes is not None:
        grid, size = (
            expected.get("extractor.attention_mask", np.empty(0)).shape,
            getattr(model.config, "codebook_size", 0),
        )
        if codes.shape != grid or codes.dtype != np.int64 or codes.min() < -100 or codes.max() >= size:
            raise ValueError(f"{folder / REFERENCE}: {_CODES} are no codes of this quantizer. {_HOW_TO_GET_ONE}.")
    return _outputs(model.eval(), extractor, records, codes)


def _thinned(values):
    """Return `values`, or of more than 1,024 every n-th in row-major order, as a vector.

    n has no factor in common with the last axis: all channels are among them.
    """
    if values.size <= _MOST_VALUES:
        return values
    step = math.ceil(values.size / _MOST_VALUES)
    while math.gcd(step, values.shape[-1]) > 1:
        step += 1
    return np.ascontiguousarray(values.reshape(-1)[::step])


def _settings(config, extractor):
    """Return the own settings of model and extractor by file and name, as JSON gives them back."""
    own = _own_fields(config) | {"id2label": config.id2label, "problem_type": config.problem_type}
    options = {name: value for name, value in extractor.to_dict().items() if name not in _OF_THE_LIBRARY}
    return json.loads(json.dumps({"config.json": own, "preprocessor_config.json": options}))


def _own_fields(config):
    values = {name: getattr(config, name) for name in type(config).__annotations__}
    return {name: _own_fields(value) if hasattr(value, "to_dict") else value for name, value in values.items()}


def _settings_amiss(expected, found):
    return [
        f"{file}: {name} is {_short(found[file].get(name))}, at export it was {_short(value)}"
        for file, options in expected.items()
        for name, value in options.items()
        if found[file].get(name) != value
    ]


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _read_reference(folder):
    """Return `(records, expected outputs by name, settings)` of a folder; nothing in the file is trusted."""
    path = folder / REFERENCE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no reference pair ({REFERENCE}), so it cannot be verified. {_HOW_TO_GET_ONE}, where the model "
            "is known to be right; training.publish does."
        )
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes, at most {_MOST_BYTES} are read")
        with safe_open(path, framework="np") as file:
            metadata, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        return _checked_reference(metadata, arrays)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is no reference pair that can be read: {reason}. {_HOW_TO_GET_ONE}.") from error


def _checked_reference(metadata, arrays):
    if metadata.get("format") != _FORMAT:
        raise ValueError(f'its format is "{metadata.get("format")}", accepted is "{_FORMAT}"')
    samples, settings = arrays.pop(_SIGNAL), json.loads(metadata["settings"])
    rate, units, leads = (json.loads(metadata[name]) for name in ("sampling_rate", "units", "lead_names"))
    if samples.dtype != np.int16 or samples.ndim != 3 or samples.shape[:2] != (2, len(leads)):
        raise ValueError(f"signal is {samples.dtype} {samples.shape}, needed is int16 (2, {len(leads)} leads, samples)")
    if set(settings) != {"config.json", "preprocessor_config.json"} or not all(
        isinstance(each, dict) for each in settings.values()
    ):
        raise ValueError("its settings are not those of config.json and preprocessor_config.json")
    for name, values in arrays.items():
        if values.dtype not in (np.float32, np.int64) or not values.size or not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite numbers of float32 or int64 ({values.dtype}, {values.shape})")
    return [_record(signal, rate, units, leads) for signal in samples], arrays, settings


def _auto_class(config):
    """Return the name of the Auto class that loads the class which the configuration names."""
    architecture = (config.architectures or ["none"])[0]
    for auto_class, path in (getattr(config, "auto_map", None) or {}).items():
        if path.rpartition(".")[2] == architecture:
            return auto_class
    raise ValueError(
        f"config.json names {architecture} in `architectures`, which is in none of its `auto_map`: the checkpoint was not "
        f"saved by this package. {_HOW_TO_GET_ONE}."
    )


def _deviation(found, expected):
    if expected.dtype == np.int64:
        return float(np.mean(found != expected))
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(found.astype(np.float64) - expected).max()) / scale


def _allowed(name):
    return {_CODES: CODES_TOLERANCE, "extractor.attention_mask": 0, "extractor.lead_ids": 0}.get(name, TOLERANCE)


def _explained(name, deviation, expected):
    if expected.dtype == np.int64:
        return f"{name}: {deviation:.1%} of the values differ, allowed are {_allowed(name):.0%}"
    greatest = np.abs(expected).max()
    return f"{name} differs by up to {deviation:.2g} of its greatest value ({greatest:.3g}), allowed is {TOLERANCE:g} of it"


def _shapes(outputs):
    return ", ".join(f"{name} {tuple(values.shape)}" for name, values in sorted(outputs.items()))


def _refused(folder, amiss):
    if any(".json: " in each for each in amiss):
        cause = "its settings were changed after the export"
    elif any("extractor." in each for each in amiss):
        cause = "its feature extractor is another one, or other code runs it"
    else:
        cause = "its weights are not those that were exported: damaged, random in part, or trained on"
    return ValueError(
        f"{folder} does not give what it gave when it was exported: {'; '.join(amiss)}. Most likely {cause}. Do not use it: "
        "load the commit or copy that was exported; or, if you made the change, export it again with export_checkpoint."
    )


if __name__ == "__main__":
    for name in ("anyecg_hf", "tokenization", "training"):
        sys.modules[name] = None  # importing it is an error from here on, also where it is installed
    try:
        print(json.dumps(verify_folder(sys.argv[1], trust_remote_code=True)))
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: weights of another shape
        print(error)
        sys.exit(1)
