"""Which models the page uses: those the environment names, else those of a clone's `checkpoints/`."""

import dataclasses
from pathlib import Path

from transformers import AutoFeatureExtractor, pipeline

import anyecg_hf  # noqa: F401  registers models and pipelines

CHECKPOINTS = Path(__file__).resolve().parent.parent.parent / "checkpoints"  # of a clone
CLASSIFIER, TOKENIZER, RECONSTRUCTION = "ANYECG_CLASSIFIER", "ANYECG_TOKENIZER", "ANYECG_RECONSTRUCTION"
FOLDERS = {
    CLASSIFIER: "anyecg-small-statements",
    TOKENIZER: "anyecg-small-rhythm",
    RECONSTRUCTION: "anyecg-small-reconstruction",
}


@dataclasses.dataclass(frozen=True)
class Models:
    """The classifier, and what may be absent: the extractor with rhythm codes, the pipeline that restores leads."""

    classify: object
    tokenize: object = None
    reconstruct: object = None


def load_models(environment):
    """Return the `Models` that `environment` (a mapping of names to texts) and the clone provide.

    Raises:
        OSError: there is no classifier, or a model that is named cannot be loaded.
    """
    found = {variable: find_model(variable, environment) for variable in FOLDERS}
    if found[CLASSIFIER] is None:
        raise OSError(
            f"No classifier: {CHECKPOINTS / FOLDERS[CLASSIFIER]} is absent. Set {CLASSIFIER} to a folder or to a Hub id, "
            "with @revision if one is wanted."
        )
    tokenizer, reconstruction = found[TOKENIZER], found[RECONSTRUCTION]
    return Models(
        classify=pipeline("ecg-classification", **found[CLASSIFIER]),
        tokenize=tokenizer and AutoFeatureExtractor.from_pretrained(tokenizer.pop("model"), **tokenizer),
        reconstruct=reconstruction and pipeline("ecg-reconstruction", **reconstruction),
    )


def find_model(variable, environment):
    """Return `{"model": folder or Hub id, "revision": ...}`, or None where no such model is provided."""
    named = environment.get(variable, "")
    if not named:
        folder = CHECKPOINTS / FOLDERS[variable]
        return {"model": str(folder)} if folder.is_dir() else None
    if Path(named).is_dir():
        return {"model": named}
    name, _, revision = named.partition("@")
    return {"model": name, "revision": revision or None}
