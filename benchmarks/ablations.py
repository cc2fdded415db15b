"""What each choice is worth: trains a tiny network for every cell of `ablations.yaml` and tabulates codec and probe figures.

    python -m benchmarks.ablations --data DIR --runs runs/ablations [--only CELL ...] [--seeds 0 1 2]

Each cell is three commands (`tokenization.train` where its quantizer is its own, `training.pretrain`, `training.evaluate
--probe trained`), written with its figures to `benchmarks/results/ablations.json`; `ablations.md` is the table. The same
command goes on where it was stopped. Fold 9 is scored.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from training.checkpointing import write_json

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = {
    "fve": "FVE",
    "fve_low_range": "FVE, lowest third",
    "perplexity": "perplexity",
    "below_unigram_time": "nats below unigram, seconds hidden",
    "macro_auroc": "probe, 71 statements",
    "superclass_auroc": "probe, superclasses",
}


def commands_of(
    cell: dict, base: dict, *, folder: Path, base_folder: Path, data: list[str], seed: int
) -> list[list[str]]:
    """Return the commands of a cell, in their order, without the interpreter."""
    quantizer = folder / "quantizer" if "quantizer" in cell or folder == base_folder else base_folder / "quantizer"
    common = ["--data", *data, "--seed", str(seed), "--disable_tqdm", "True", "--save_strategy", "steps"]
    commands = []
    if quantizer.parent == folder:
        commands.append(_training("tokenization.train", base["quantizer"], cell.get("quantizer"), quantizer, common))
    pretrain = {**base["pretrain"], "eval_strategy": "no", "quantizer": str(quantizer)}
    commands.append(_training("training.pretrain", pretrain, cell.get("pretrain"), folder / "backbone", common))
    probe = ["training.evaluate", "--checkpoint", str(folder / "backbone"), "--data", *data, "--probe", "trained"]
    return [*commands, [*probe, "--probe_records", "3000", "--output", str(folder / "probe.json")]]


def _training(module: str, base: dict, change: dict | None, output: Path, common: list[str]) -> list[str]:
    options = {**base, **(change or {})}
    recipe = ROOT / "training" / "recipes" / options.pop("recipe")
    config = {**base.get("config", {}), **(change or {}).get("config", {})}
    if config:
        options["config"] = json.dumps(config)
    words = []
    for name, value in options.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return [module, str(recipe), *words, *common, "--output_dir", str(output)]


def figures_of(folder: Path, base_folder: Path) -> dict:
    """Return the figures that the commands of a cell have left in its folder."""
    quantizer = folder / "quantizer" if (folder / "quantizer").is_dir() else base_folder / "quantizer"
    codec = json.loads((quantizer / "results.json").read_text())["codebook_health"]
    masked = json.loads((folder / "backbone" / "results.json").read_text())["evaluation"]
    probe = json.loads((folder / "probe.json").read_text())
    figures = {name: codec["quantizer"][name] for name in ("fve", "fve_low_range", "perplexity", "usage")}
    figures["fve_kmeans"] = codec["kmeans"]["fve"]
    for pattern in ("random", "time", "lead"):
        if f"eval_{pattern}_unigram_cross_entropy" in masked:
            gain = masked[f"eval_{pattern}_unigram_cross_entropy"] - masked[f"eval_{pattern}_cross_entropy"]
            figures[f"below_unigram_{pattern}"] = gain
            figures[f"accuracy_{pattern}"] = masked[f"eval_{pattern}_accuracy"]
    return figures | {name: probe[name] for name in ("macro_auroc", "superclass_auroc")}


def table(results: dict[str, dict[str, dict]]) -> str:
    """Return the results as a Markdown table: mean over seeds, with the range where there are several."""
    lines = ["| cell | seeds | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for cell, by_seed in results.items():
        values = []
        for name in COLUMNS:
            found = [row[name] for row in by_seed.values() if name in row]
            digits = 0 if name == "perplexity" else 3
            text = f"{np.mean(found):.{digits}f}" if found else ""
            values.append(text + (f" ({min(found):.{digits}f}-{max(found):.{digits}f})" if len(found) > 1 else ""))
        lines.append(f"| {cell} | {len(by_seed)} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="as for the training commands")
    parser.add_argument("--runs", default="runs/ablations", help="folder of the runs")
    parser.add_argument("--only", nargs="+", help="names of cells; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args(argv)
    plan = yaml.safe_load((ROOT / "benchmarks" / "ablations.yaml").read_text())
    unknown = set(args.only or ()) - set(plan["cells"])
    if unknown:
        parser.error(f"unknown cells {sorted(unknown)}; known: {', '.join(plan['cells'])}")
    for seed in args.seeds:
        for name in ["base", *(args.only or [cell for cell in plan["cells"] if cell != "base"])]:
            run_cell(name, plan, runs=Path(args.runs), data=args.data, seed=seed)


def run_cell(name: str, plan: dict, *, runs: Path, data: list[str], seed: int) -> None:
    """Run what is not yet done of a cell and note its figures."""
    path = RESULTS / "ablations.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    if str(seed) in results.get(name, {}):
        return
    folders = [runs / f"{cell.replace(' ', '_')}-seed{seed}" for cell in (name, "base")]
    folders[0].mkdir(parents=True, exist_ok=True)
    commands = commands_of(
        plan["cells"][name], plan["base"], folder=folders[0], base_folder=folders[1], data=data, seed=seed
    )
    with open(folders[0] / "log.txt", "a") as log:
        for command in commands:
            logger.info("%s, seed %d: %s", name, seed, " ".join(command[:2]))
            subprocess.run([sys.executable, "-m", *command], check=True, stdout=log, stderr=log)
    results = json.loads(path.read_text()) if path.is_file() else {}  # another process may have added its own
    results.setdefault(name, {})[str(seed)] = figures_of(*folders)
    order = [cell for cell in plan["cells"] if cell in results]
    write_json(path, {cell: results[cell] for cell in order})
    (RESULTS / "ablations.md").write_text(
        "# Ablations\n\nTiny network, PTB-XL folds 1-8, fold 9 scored; made by `python -m benchmarks.ablations --data DIR` "
        "from `benchmarks/ablations.yaml`, which says what each cell changes.\n\n"
        + table({c: results[c] for c in order})
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(sys.argv[1:])
