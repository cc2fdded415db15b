"""A finished run and its measured results -> a complete checkpoint folder with its card:

    python -m training.publish hub_cards/NAME.yaml --run runs/RUN --output checkpoints/NAME

The facts file names the card's template, what the text says, and the result files (`benchmarks/results/NAME.json`) that its
figures come from. A fact or figure that is missing is an error: no card has an empty field.

    python -m training.publish --refresh checkpoints/NAME

writes the code that travels with a checkpoint anew, after a change of `anyecg_hf`, and its card, after a change of the template,
of `hub_cards/NAME.yaml` or of a result; weights and reference pair stay, and the new code must give what the pair says.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoConfig

import anyecg_hf
from anyecg_hf.hub import export_checkpoint
from anyecg_hf.reference_pair import REFERENCE

from .checkpointing import ARGUMENTS, FINISHED, load_extractor, write_json
from .commands import run_command
from .labels import SINGLE
from .number_text import FILTERS

logger = logging.getLogger(__name__)

TEMPLATES = Path("hub_cards")
RESULTS = Path("benchmarks/results")
RUN = "run.json"  # in a checkpoint: what its card says of the run
MAY_BE_EMPTY = {"rates"}  # facts
MAX_MEGABYTES = 30


def load_model(folder: str | Path):
    """Return the model of a run's folder as the class that its configuration names, and its feature extractor."""
    config = AutoConfig.from_pretrained(folder)
    model = getattr(anyecg_hf, config.architectures[0]).from_pretrained(folder)
    if config.model_type == "anyecg_quantizer":
        return model, anyecg_hf.AnyECGRhythmFeatureExtractor.from_pretrained(folder, quantizer=model)
    return model, load_extractor(folder)


def describe_run(folder: str | Path) -> dict:
    """Return seed, steps, batch size and records seen of a finished run.

    Raises:
        ValueError: the run in `folder` is not finished.
    """
    folder = Path(folder)
    if not (folder / FINISHED).is_file():
        raise ValueError(
            f"{folder} holds no finished run: run its training command again until it says it is finished."
        )
    arguments = json.loads((folder / ARGUMENTS).read_text())
    steps = json.loads((folder / FINISHED).read_text())["steps"]
    batch_size = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    batch_size *= arguments["num_processes"]
    return {"seed": arguments["seed"], "steps": steps, "batch_size": batch_size, "records_seen": steps * batch_size}


def render_card(facts: dict, *, model, extractor, run: dict, results: dict) -> str:
    """Return the text of the card.

    Raises:
        jinja2.UndefinedError: the template asks for a fact or figure that is not there.
        ValueError: a fact is empty, or the evaluation that the facts name is of other labels or thresholds than the model's.
    """
    empty = [name for name, fact in facts.items() if fact is None or not str(fact).strip()]
    if set(empty) - MAY_BE_EMPTY:
        raise ValueError(
            f"{facts['name']}: no {', '.join(sorted(set(empty) - MAY_BE_EMPTY))} in the facts of its card."
        )
    if "evaluation" in facts:
        _refuse_other_labels(model.config, results[facts["evaluation"]], facts["evaluation"])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= FILTERS
    return environment.get_template(facts["template"]).render(
        metadata=metadata_of(facts, results),
        facts=facts,
        run=run,
        results=results,
        extractor=extractor,
        config=model.config,
        num_parameters=model.num_parameters(),
    )


def metadata_of(facts: dict, results: dict) -> str:
    """Return what the Hub reads of a card, as YAML: licence, task, data, base model, and an index of results.

    Raises:
        ValueError: a figure that the index names is not in the results.
    """
    where = {f"dataset_{name}": value for name, value in facts["evaluated_on"].items()}
    index = [
        EvalResult(
            task_type=row["task"],
            metric_type=row["type"],
            metric_name=row["name"],
            metric_value=round(_figure(results, row["figure"]), 4),
            **where,
        )
        for row in facts["index"]
    ]
    return ModelCardData(
        license=facts["licence_of_weights"],
        library_name="transformers",
        pipeline_tag=facts["pipeline_tag"],
        tags=["ecg", "electrocardiogram", "anyecg", *facts["tags"]],
        datasets=facts["datasets"],
        base_model=facts.get("base_model"),
        model_name=facts["name"],
        eval_results=index,
    ).to_yaml()


def _figure(results: dict, path: str) -> float:
    """Return the figure at `path`, "FILE.key.key", of the result files."""
    found = results
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, (int, float)):
        raise ValueError(f"The index of results names {path}, where no number is.")
    return found


def _refuse_other_labels(config, evaluation: dict, name: str) -> None:
    measured = {label: figures["threshold"] for label, figures in evaluation["labels"].items()}
    names = [config.id2label[index] for index in range(config.num_labels)]
    thresholds = [None] * len(names) if config.problem_type == SINGLE else config.thresholds or [0.5] * len(names)
    if measured != dict(zip(names, thresholds, strict=True)):
        raise ValueError(
            f"{RESULTS / name}.json is of other labels or thresholds than this checkpoint's: run training.evaluate anew, with "
            "--bootstrap and --by sex age leads."
        )


def card_of(facts_file: str | Path, *, model, extractor, run: dict) -> str:
    """Return the text of the card that a facts file describes, with the results that it names; see `render_card`."""
    facts = yaml.safe_load(Path(facts_file).read_text())
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in facts["results"]}
    return render_card(facts, model=model, extractor=extractor, run=run, results=results)


def publish(facts_file: str | Path, *, run: str | Path, output: str | Path) -> Path:
    """Write the checkpoint folder of a finished run and return it.

    Raises:
        ValueError: the run is not finished, or the folder would be larger than 30 MB.
    """
    described = describe_run(run)
    model, extractor = load_model(run)
    card = card_of(facts_file, model=model, extractor=extractor, run=described)
    folder = export_checkpoint(model, extractor, output, card=card)
    write_json(folder / RUN, described)
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    if megabytes > MAX_MEGABYTES:
        raise ValueError(
            f"{folder} holds {megabytes:.0f} MB; at most {MAX_MEGABYTES} MB may ship. Save in bfloat16 or train smaller."
        )
    return folder


def refresh(folder: str | Path) -> None:
    """Save a checkpoint over itself, with the code and the card as they are now; weights and reference pair do not change.

    Raises:
        ValueError: with the code as it is now the checkpoint does not give what its reference pair says. Where that is meant,
            delete reference.safetensors first: then a new one is written.
        FileNotFoundError: there are no facts of this name in `hub_cards`, or the folder was not written by `publish`.
    """
    folder = Path(folder)
    model, extractor = load_model(folder)
    run = json.loads((folder / RUN).read_text())
    card = card_of(TEMPLATES / f"{folder.resolve().name}.yaml", model=model, extractor=extractor, run=run)
    pair = folder / REFERENCE
    kept = pair.read_bytes() if pair.is_file() else None
    if kept:
        anyecg_hf.verify(folder)
    export_checkpoint(model, extractor, folder, card=card)
    if kept:
        pair.write_bytes(kept)  # rounding differs between machines: it would drift


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", nargs="?", help="facts file in hub_cards/")
    parser.add_argument("--run", help="output folder of the training command")
    parser.add_argument("--output", help="folder of the checkpoint to write")
    parser.add_argument(
        "--refresh", nargs="+", default=[], help="checkpoints whose code and card are to be written anew"
    )
    args = parser.parse_args(argv)
    if not args.refresh and not (args.facts and args.run and args.output):
        parser.error("give a facts file with --run and --output, or --refresh with checkpoints")
    for folder in args.refresh:
        refresh(folder)
        logger.info("refreshed: %s", folder)
    if args.facts:
        logger.info("written: %s", publish(args.facts, run=args.run, output=args.output))


if __name__ == "__main__":
    run_command(main)
