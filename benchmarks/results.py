"""All models on the same records, in order: writes `benchmarks/results.md` from the JSON files in `benchmarks/results`.

    python -m benchmarks.results

`results.yaml` says which models there are, in which file their figures are and which commands made it; every number is read from
those files. A model whose file is not there is named as not run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROWS, FILES, PAGE = HERE / "results.yaml", HERE / "results", HERE / "results.md"
FIGURES = {
    "macro_auroc": "macro AUROC, 71 statements",
    "superclass_auroc": "macro AUROC, 5 superclasses",
    "macro_auprc": "macro AUPRC",
    "macro_f1": "macro F1",
    "ece": "calibration error",
}
HEAD = """# All models on the same records

Written by `python -m benchmarks.results` from `benchmarks/results/*.json`; do not edit. Records of fold 9 of PTB-XL, on which the
step and the thresholds of each classifier were chosen too: all are a little too good. Fold 10 was never opened. In brackets 95 %
intervals by a bootstrap of patients, of one model: they do not hold what another seed would change. Best first. The figures are
defined in [labels and thresholds](../docs/labels-and-thresholds.md)."""


def render(rows: dict[str, list[dict]], folder: Path) -> str:
    """Return the page.

    Args:
        rows: by section ("classifiers", "comparisons", "reconstructions") what is shown, as in `results.yaml`.
        folder: where the JSON files are.

    Raises:
        ValueError: two classifiers were not measured on the same records.
    """
    classifiers = [(row, _figures(folder / row["file"])) for row in rows["classifiers"]]
    _refuse_other_records([(row["file"], figures) for row, figures in classifiers if figures])
    parts = [HEAD, "## Classifiers", _classifier_table(classifiers)]
    for title, section, table in (
        ("## Paired comparisons", "comparisons", _comparison_table),
        ("## Lead generation: PSNR of the missing leads, dB, peak = range of the lead", "reconstructions", _case_table),
    ):
        parts.append(title)
        for row in rows[section]:
            content = _content(folder / row["file"])
            parts += [f"{row['what']}: `{row['file']}`", "Not run." if content is None else table(content)]
    parts += ["## Commands", *(_commands(row) for section in rows.values() for row in section)]
    return "\n\n".join(parts) + "\n"


def _content(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _figures(path: Path) -> dict | None:
    """Return the figures in the results of `training.evaluate` or `training.finetune`, None where there are none."""
    content = _content(path)
    return content and content.get("evaluation", content)


def _refuse_other_records(files: Sequence[tuple[str, dict]]) -> None:
    """Raise where two files have not as many records, or not as many positives of each label."""
    told = [(name, _facts_of_records(figures)) for name, figures in files]
    for fact in ("records", "positives of its labels"):
        known = [(name, facts[fact]) for name, facts in told if facts[fact] is not None]
        for name, value in known[1:]:
            if value != known[0][1]:
                raise ValueError(
                    f"{name} and {known[0][0]} differ in the {fact}: they were measured on other records. Measure anew."
                )


def _facts_of_records(figures: dict) -> dict:
    labels = figures.get("labels")
    return {
        "records": figures.get("num_records"),
        "positives of its labels": labels and {name: each["positives"] for name, each in labels.items()},
    }


def _classifier_table(rows: Sequence[tuple[dict, dict | None]]) -> str:
    ordered = sorted(rows, key=lambda row: -(row[1] or {}).get("macro_auroc", -1))
    lines = []
    for row, figures in ordered:
        cells = [_cell(figures, name) for name in FIGURES]
        lines.append([row["model"], *cells, (figures or {}).get("num_records", ""), f"`{row['file']}`"])
    return _table(["model", *FIGURES.values(), "records", "file"], lines)


def _cell(figures: dict | None, name: str) -> str:
    if figures is None:
        return "not run" if name == "macro_auroc" else ""
    digits = 4 if name == "ece" else 3
    return _with_interval(figures.get(name), figures.get("intervals_95", {}).get(name), digits=digits)


def _with_interval(value: float | None, interval: Sequence[float] | None, *, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else "")


def _comparison_table(content: dict) -> str:
    """Return arms, best first, with the mean over seeds, each seed, and the difference from the first arm."""
    first = next(iter(content["arms"]))
    lines = []
    for name, figures in sorted(content["arms"].items(), key=lambda arm: -arm[1]["macro_auroc"]["mean"]):
        for figure, values in figures.items():
            difference = content["differences"].get(f"{name} - {first}", {}).get(figure, {})
            seeds = ", ".join(f"{value:.3f}" for value in values["seeds"])
            cells = [
                f"{values['mean']:.3f}",
                seeds,
                _with_interval(difference.get("difference"), difference.get("interval_95")),
            ]
            lines.append([name, FIGURES.get(figure, figure), *cells])
    header = ["arm", "figure", "mean", "each seed", f"beyond {first}, in the mean"]
    return _table(header, lines) + f"\n\n{content['num_records']} records of {content['num_patients']} patients."


def _case_table(content: dict) -> str:
    """Return for each case its methods, best first."""
    lines = []
    for case, methods in content["cases"].items():
        leads = {name: each["all"] for name, each in methods.items()}
        ordered = sorted(leads, key=lambda name: -leads[name]["psnr_range_db"])
        lines.append([case, " > ".join(f"{name} {_decibel(leads[name])}" for name in ordered)])
    return _table(["case", "methods"], lines) + f"\n\n{content['what']}"


def _decibel(figures: dict) -> str:
    return _with_interval(figures["psnr_range_db"], figures.get("intervals_95", {}).get("psnr_range_db"), digits=2)


def _commands(row: dict) -> str:
    lines = [f"    {row[step]}" for step in ("train", "measure") if step in row]
    return "\n".join([f"{row.get('model') or row['what']}:", "", *lines])


def _table(header: Sequence[str], lines: Sequence[Sequence]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows)


def main() -> None:
    PAGE.write_text(render(yaml.safe_load(ROWS.read_text()), FILES))
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
