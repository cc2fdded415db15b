"""A finished run and its measured results -> a complete checkpoint folder with its card:

    python -m training.publish hub_cards/NAME.yaml --run runs/RUN --output checkpoints/NAME

The facts file names the card's template, what the text says, and the result files (`benchmarks/results/NAME.json`) that its
figures come from. A fact or figure that is missing is an error: no card has an empty field.

    python -m training.publish --refresh checkpoints/NAME

writes the code that travels with a checkpoint anew, after a change of `anyecg_hf`; weights and card stay as they are.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import jinja2
import yaml
from transformers import AutoConfig

import anyecg_hf
from anyecg_hf.hub import export_checkpoint

from .checkpointing import ARGUMENTS, FINISHED, load_extractor
from .commands import run_command

logger = logging.getLogger(__name__)

TEMPLATES = Path("hub_cards")
RESULTS = Path("benchmarks/results")
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
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template(facts["template"]).render(
        facts=facts,
        run=run,
        results=results,
        extractor=extractor,
        num_parameters=model.num_parameters(),
        thresholds=getattr(model.config, "thresholds", None),
    )


def publish(facts_file: str | Path, *, run: str | Path, output: str | Path) -> Path:
    """Write the checkpoint folder of a finished run and return it.

    Raises:
        ValueError: the run is not finished, or the folder would be larger than 30 MB.
    """
    facts = yaml.safe_load(Path(facts_file).read_text())
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in facts["results"]}
    model, extractor = load_model(run)
    card = render_card(facts, model=model, extractor=extractor, run=describe_run(run), results=results)
    folder = export_checkpoint(model, extractor, output, card=card)
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    if megabytes > MAX_MEGABYTES:
        raise ValueError(
            f"{folder} holds {megabytes:.0f} MB; at most {MAX_MEGABYTES} MB may ship. Save in bfloat16 or train smaller."
        )
    return folder


def refresh(folder: str | Path) -> None:
    """Save a checkpoint over itself, so that it carries the code as it is now; its weights do not change."""
    model, extractor = load_model(folder)
    export_checkpoint(model, extractor, folder)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", nargs="?", help="facts file in hub_cards/")
    parser.add_argument("--run", help="output folder of the training command")
    parser.add_argument("--output", help="folder of the checkpoint to write")
    parser.add_argument("--refresh", nargs="+", default=[], help="checkpoints whose code is to be written anew")
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
