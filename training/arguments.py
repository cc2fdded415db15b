"""One YAML recipe and the command line -> argument dataclasses; the command line wins, unknown names are errors.

A recipe is flat: its keys are the names of the command line without the dashes, those of `TrainingArguments` included.

    python -m tokenization.train training/recipes/small_quantizer.yaml --data DIR --output_dir OUT --max_steps 500
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor

from .checkpointing import project_path
from .options import refuse_accelerator_options, refuse_data_parallel, refuse_deepspeed_stage, refuse_options

LESS_IS_BETTER = (
    "loss",
    "cross_entropy",
    "distance",
    "mae",
    "rmse",
    "biggest_code",
)  # how the names of such figures end


@dataclass
class AnyECGTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults this project needs and three options of its own."""

    output_dir: str | None = field(default="runs/unnamed", metadata={"help": "checkpoints, the final model, results"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "a non-finite loss stops the run instead"})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "the collator makes the columns"})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "integrations to report to"})
    ddp_find_unused_parameters: bool | None = field(
        default=True, metadata={"help": "several processes: some weights (the mask token) take no part in every stage"}
    )
    layer_decay: float = field(
        default=1.0,
        metadata={"help": "learning rate of layer i is multiplied by this to the power of its distance from the head"},
    )
    weight_average_decay: float = field(
        default=0.0, metadata={"help": "0 = off; else evaluate and save an exponential average of the weights"}
    )

    keep_best: bool = field(
        default=False,
        metadata={"help": "end with the weights that had the best --metric_for_best_model, not with the last"},
    )

    def __post_init__(self):
        if not torch.cuda.is_available():
            self.use_cpu = True  # also what makes several processes on a CPU train together
        refuse_options(self)
        for name in ("layer_decay", "weight_average_decay"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"--{name} {getattr(self, name)}: accepted are numbers from 0 to 1.")
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(LESS_IS_BETTER)
        super().__post_init__()
        refuse_accelerator_options(self)
        refuse_data_parallel(self)
        refuse_deepspeed_stage(self)


@dataclass
class ModelArguments:
    """The network: a preset with overrides, and where its weights start."""

    preset: str = field(default="small", metadata={"help": "tiny, small, medium, base, large, xl"})
    config: str | None = field(
        default=None,
        metadata={"help": "overrides of single configuration fields: a mapping in YAML, JSON on the command line"},
    )
    init_from: str | None = field(
        default=None, metadata={"help": "folder of a trained model to start from; none = scratch"}
    )

    def __post_init__(self):
        if self.init_from:
            self.init_from = project_path(self.init_from)

    def overrides(self) -> dict:
        """Return the configuration overrides as a dictionary."""
        if not self.config:
            return {}
        try:
            overrides = json.loads(self.config)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--config {self.config!r} is not JSON ({error}). Example: '{{\"hidden_size\": 128}}'."
            ) from None
        if not isinstance(overrides, dict):
            raise ValueError(f"--config {self.config!r}: a mapping from field to value is needed.")
        return overrides


@dataclass
class ExtractorArguments:
    """How records are filtered; saved with the model as its feature extractor. `init_from` brings its own."""

    lowcut_hz: float | None = 0.5
    highcut_hz: float | None = 40.0
    denoise: bool = False
    clip_mv: float | None = 5.0

    def inherited(self, extractor: AnyECGFeatureExtractor, source: str) -> AnyECGFeatureExtractor:
        """Return the extractor that `source` brings.

        Raises:
            ValueError: a filter that differs from it was asked for.
        """
        for option in fields(self):
            value, own = getattr(self, option.name), getattr(extractor, option.name)
            if value != option.default and value != own:
                raise ValueError(
                    f"--{option.name} {value}: {source} brings its own extractor, with {option.name} {own}. Leave it out."
                )
        return extractor


def parse_recipe(argv: Sequence[str], argument_classes: Sequence[type]) -> tuple:
    """Return one instance of each class from `argv`: `RECIPE.yaml --name value ...`.

    Raises:
        ValueError: no recipe, a recipe that cannot be read, an unknown name in it or on the command line.
    """
    parser = HfArgumentParser(list(argument_classes), allow_abbrev=False, usage="RECIPE.yaml [--name value ...]")
    if list(argv[:1]) in (["-h"], ["--help"]):
        parser.print_help()
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise ValueError(
            "The first argument must be a recipe, as in: training/recipes/smoke_pretrain.yaml --output_dir OUT"
        )
    known = {name[2:] for name in parser._option_string_actions if name.startswith("--")}
    recipe, given = _read_recipe(Path(argv[0]), known), _names(argv[1:])
    _refuse_unknown(given, known, "the command line")
    _refuse_preset_beside_weights(given, recipe)
    *instances, rest = parser.parse_args_into_dataclasses(
        [*_as_arguments(recipe), *argv[1:]], return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ValueError(f"The command line holds {rest!r}, which belongs to no option; write --name value.")
    return tuple(instances)


def _read_recipe(path: Path, known: set[str]) -> dict:
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}. Those of the project are in training/recipes/*.yaml.")
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must hold `name: value` lines, it holds a {type(recipe).__name__}.")
    _refuse_unknown([str(name) for name in recipe], known, str(path))
    return recipe


def _refuse_unknown(names: Sequence[str], known: set[str], place: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"Unknown option {name!r} in {place}.{hint} `--help` lists all options.")


def _refuse_preset_beside_weights(given: Sequence[str], recipe: dict) -> None:
    """Refuse both in one place, and a preset on the command line; a recipe's gives way to `--init_from`."""
    has_weights = "init_from" in given or recipe.get("init_from")
    if has_weights and ("preset" in given or ("init_from" not in given and "preset" in recipe)):
        raise ValueError(
            "--preset beside --init_from: the weights to start from bring their own network. Leave one of the two out; single "
            "fields of the configuration are changed by --config."
        )


def _names(argv: Sequence[str]) -> list[str]:
    return [word[2:].split("=")[0] for word in argv if word.startswith("--")]


def _as_arguments(recipe: dict) -> list[str]:
    """Return the recipe as command-line words; a null leaves the default."""
    words = []
    for name, value in recipe.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words += [str(item) for item in value]
        else:
            words.append(str(value))
    return words
