"""The files of the Space that are made from others, and a folder that can be uploaded as a Space:

    python -m training.space                                          # README.md, requirements.txt, label_names.csv anew
    python -m training.space --output DIR --models you/one you/two    # and all that the Space needs, with the models named

A Space installs no package of ours: `anyecg_hf` is copied into its folder. See docs/space.md.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import re
import shutil
import tomllib
from pathlib import Path

import jinja2
import yaml

from .commands import run_command

logger = logging.getLogger(__name__)

CARDS = Path("hub_cards")
SPACE = CARDS / "space"
LABELS = Path("training/label_maps/ptb_xl_statements.csv")
EXTRAS = ("formats", "plot")
NOT_UPLOADED = shutil.ignore_patterns("__pycache__", "*.pyc")


def made_files(models: list[str] | None = None) -> dict[str, str]:
    """Return the texts of the Space's files that are made from others, by name.

    Args:
        models (list of `str`): Hub ids that the README's header names.
    """
    return {"README.md": _readme(models or []), "requirements.txt": _requirements(), "label_names.csv": _label_names()}


def write_space(output: Path | None = None, models: list[str] | None = None) -> None:
    """Write the made files into `hub_cards/space`, or all that a Space needs into the folder `output`.

    Raises:
        FileExistsError: `output` is there already.
    """
    if output is not None:
        shutil.copytree(SPACE, output, ignore=NOT_UPLOADED)
        shutil.copytree("anyecg_hf", output / "anyecg_hf", ignore=NOT_UPLOADED)
    for name, text in made_files(models).items():
        (output or SPACE).joinpath(name).write_text(text, encoding="utf-8")


def _readme(models: list[str]) -> str:
    facts = yaml.safe_load((CARDS / "space.yaml").read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(CARDS), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    pinned = re.search(r"^gradio==(.+)$", Path("constraints.txt").read_text(), re.MULTILINE)
    return environment.get_template(facts["template"]).render(facts=facts, models=models, gradio_version=pinned[1])


def _requirements() -> str:
    """Return what the package and the page need; the Hub installs Gradio itself, by the README's `sdk_version`."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return (
        "# Made by `python -m training.space` from pyproject.toml.\n"
        + "\n".join(project["dependencies"] + extras)
        + "\n"
    )


def _label_names() -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["code", "description"])
    with LABELS.open(encoding="utf-8", newline="") as file:
        writer.writerows([row["code"], row["description"]] for row in csv.DictReader(file))
    return text.getvalue()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder to make, for `hf upload ... --repo-type space`")
    parser.add_argument("--models", nargs="*", default=[], help="Hub ids that the README names")
    args = parser.parse_args(argv)
    write_space(args.output, args.models)
    logger.info("written: %s", args.output or SPACE)


if __name__ == "__main__":
    run_command(main)
