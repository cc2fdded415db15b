"""Write the health page of a rhythm tokenizer: index.html with its pictures, and report.json with all figures.

    python -m tokenization.report --checkpoint DIR --data DIR --out PAGE_DIR [--run RUN_DIR]

Usage and explained variance beside their floors and beside k-means, the most used codes as waveforms, reconstructions of
held-out records, what the codes know of age, sex and rhythm, how alike the leads' codes are, the curves of a training run,
and how stable the codes are. The page refers to nothing outside its folder. About five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np
from sklearn.cluster import KMeans

from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer
from training.checkpointing import checkpoints_in, load_extractor, write_json
from training.collate import ECGCollator
from training.commands import run_command
from training.data import DataArguments, ECGDataset, load_splits

from . import report_figures as figures
from . import report_pictures as pictures
from . import report_probes as probes
from .codebook_health import (
    KMEANS_PATCHES,
    CodedPatches,
    code_by_kmeans,
    code_shares,
    codebook_report,
    fit_kmeans,
    gather_patches,
    sample_of,
)

logger = logging.getLogger(__name__)

TEMPLATE = files("hub_cards") / "tokenizer_report.html.j2"
CODES_A_PICTURE = 8
SHOWN = {"quantizer": "quantizer", "kmeans": "k-means"}
CHECK_NAMES = {
    "usage": "share of the codes in use", "perplexity_share": "perplexity / number of codes",
    "fve_above_kmeans": "FVE above that of k-means", "fve": "FVE", "fve_low_range": "FVE, lowest third by range",
}  # fmt: skip
CODEBOOK_NAMES = {
    "usage": "share of the codes in use", "perplexity": "perplexity", "perplexity_share": "perplexity / number of codes",
    "biggest_code": "share of the most used code", "fve": "FVE", "fve_low_range": "FVE, lowest third by range",
    "fve_middle_range": "FVE, middle third", "fve_high_range": "FVE, highest third",
    "perplexity_low_range": "perplexity, lowest third by range", "perplexity_middle_range": "perplexity, middle third",
    "perplexity_high_range": "perplexity, highest third",
}  # fmt: skip
ASSOCIATIONS = {"age": ("age", "age"), "sex": ("sex", "female"), "AFIB": ("rhythm", "AFIB")}  # -> group, target
ASSOCIATION_NAMES = {"age": "age", "sex": "sex", "AFIB": "atrial fibrillation (AFIB)"}
ASSOCIATION_SIGNS = {"age": ("older", "younger"), "sex": ("female", "male"), "AFIB": ("AFIB", "no AFIB")}


class Page:
    """The folder of a page: pictures as they come, then report.json and index.html."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pictures: list[dict] = []

    def add(self, section: str, png: bytes, caption: str) -> None:
        number = 1 + sum(each["section"] == section for each in self.pictures)
        name = f"{section.lower()}-{number}.png"
        (self.folder / name).write_bytes(png)
        self.pictures.append({"section": section, "file": name, "caption": caption})

    def write(self, report: dict) -> None:
        write_json(self.folder / "report.json", report | {"pictures": self.pictures})
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        environment.filters |= {"number": _number, "fixed": _fixed, "percent": _percent}
        text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
            report=report, pictures=self.pictures, check_names=CHECK_NAMES, codebook_names=CODEBOOK_NAMES,
            association_names=ASSOCIATION_NAMES,
        )  # fmt: skip
        (self.folder / "index.html").write_text(text, encoding="utf-8")


@dataclass
class Subject:
    """A quantizer and what it made of the records: what the sections are measured on."""

    model: AnyECGRhythmQuantizer
    train: ECGDataset
    held_out: ECGDataset
    collator: ECGCollator
    coded: figures.CodedRecords  # of `held_out`
    kmeans: KMeans | None  # as many centres as codes; None where there are too few training patches
    coded_by_kmeans: CodedPatches | None

    @property
    def codebook_size(self) -> int:
        return self.model.config.codebook_size

    @property
    def encoders(self) -> dict[str, figures.Encode]:
        own = {"quantizer": figures.quantizer_encoder(self.model)}
        return own if self.kmeans is None else own | {"kmeans": figures.kmeans_encoder(self.kmeans)}

    @property
    def codes(self) -> dict[str, np.ndarray]:
        own = {"quantizer": self.coded.codes}
        return own if self.kmeans is None else own | {"kmeans": self.coded_by_kmeans.codes}


def write_report(
    model: AnyECGRhythmQuantizer,
    train: ECGDataset,
    held_out: ECGDataset,
    collator: ECGCollator,
    page: Page,
    *,
    num_codes: int = 24,
    curves: dict | None = None,
    head: dict | None = None,
) -> dict:
    """Measure, draw and write the page; return the content of report.json.

    Args:
        train, held_out: records of folds 1-8 that k-means and the probes learn from, and of fold 9 to measure on.
        num_codes (`int`): how many of the most used codes are drawn.
        curves: of `read_curves`.
        head: `command` and `sources`, for the head of the page.
    """
    subject = _code_all(model, train, held_out, collator)
    report = {"command": "", "sources": [], **(head or {}), "data": _facts(subject)}
    report["codebook"] = _codebook(page, subject)
    report["top_codes"] = _top_codes(page, subject, num_codes)
    report["reconstruction"] = _reconstructions(page, subject)
    report |= _knowledge(page, subject)
    report["lead_copy"] = _lead_copy(page, subject)
    report["training"] = curves
    if curves and curves["series"]:
        _draw_training(page, curves)
    report["stability"] = _stability(page, subject)
    page.write(report)
    return report


def _code_all(model, train: ECGDataset, held_out: ECGDataset, collator: ECGCollator) -> Subject:
    logger.info("coding %d held-out records", len(held_out))
    coded = figures.code_and_decode(model, held_out, collator)
    patches = gather_patches(train, collator, num_patches=KMEANS_PATCHES)
    kmeans = by_kmeans = None
    if len(patches) >= model.config.codebook_size:
        logger.info("k-means on %d patches of training records", len(patches))
        kmeans = fit_kmeans(patches, model.config.codebook_size)
        by_kmeans = code_by_kmeans(kmeans, coded.patches)
    return Subject(model, train, held_out, collator, coded, kmeans, by_kmeans)


def _facts(subject: Subject) -> dict:
    config = subject.model.config
    return {
        "num_held_out": len(subject.held_out), "num_train": len(subject.train),
        "patch_ms": 1000 * config.patch_size / config.sampling_rate, "sampling_rate": config.sampling_rate,
        "least_records": probes.LEAST_RECORDS, "num_resamples": probes.NUM_RESAMPLES,
    }  # fmt: skip


def _codebook(page: Page, subject: Subject) -> dict:
    coded, size = subject.coded, subject.codebook_size
    shares = {name: code_shares(codes, size) for name, codes in subject.codes.items()}
    reports = {"quantizer": codebook_report(CodedPatches(coded.patches, coded.decoded, coded.codes), size)}
    if subject.kmeans is not None:
        reports["kmeans"] = codebook_report(subject.coded_by_kmeans, size)
    page.add(
        "codebook", pictures.draw_code_shares({SHOWN[name]: values for name, values in shares.items()}),
        f"Share of the patches that each code has, sorted, on a log axis; {len(coded.codes):,} patches of "
        f"{coded.num_records:,} held-out records. The flatter the better used.",
    )  # fmt: skip
    section = figures.codebook_section(reports, shares)
    return section | {
        "codebook_size": size, "num_restarts": int(subject.model.vector_quantizer.num_restarts),
        "shares": {name: values.tolist() for name, values in shares.items()},
    }  # fmt: skip


def _top_codes(page: Page, subject: Subject, num_codes: int) -> list[dict]:
    coded = subject.coded
    described = figures.describe_codes(subject.model, coded, figures.top_codes(coded, subject.codebook_size, num_codes))
    for first in range(0, len(described), CODES_A_PICTURE):
        part = described[first : first + CODES_A_PICTURE]
        labels = [f"code {each['code']}\n{each['count']:,} ×\n{_percent(each['share'])}" for each in part]
        page.add(
            "codes", pictures.draw_codes(part, labels, sampling_rate=subject.model.config.sampling_rate),
            f"The most used codes, number {first + 1} to {first + len(part)}: millivolt over milliseconds of one patch, in "
            f"the (at most {figures.LEADS_A_CODE}) leads where each occurs most; n: patches with the code in this lead, of "
            f"{coded.num_records:,} held-out records. Patches do not begin at a beat: a wide band may be beats at different "
            "places. The scale is each row's own.",
        )  # fmt: skip
    return described


def _reconstructions(page: Page, subject: Subject) -> dict:
    coded = subject.coded
    section = figures.reconstruction_section(coded, subject.held_out.column("record_id"))
    for each in section["examples"]:
        traces = figures.traces_of(coded, each["index"])
        page.add(
            "reconstruction", pictures.draw_reconstruction(traces, sampling_rate=subject.model.config.sampling_rate),
            f"{each['rule'].capitalize()} of {coded.num_records:,} held-out records by FVE: record {each['record_id']}, FVE "
            f"{each['fve']:.2f}, r {each['r']:.3f}, RMSE {each['rmse_mv']:.3f} mV. Gaps: no usable patch.",
        )  # fmt: skip
    return section


def _knowledge(page: Page, subject: Subject) -> dict:
    """Return the figures of the probes, and the codes that go with age, sex and atrial fibrillation."""
    logger.info("coding %d training records for the probes", len(subject.train))
    train_bags = figures.count_codes(subject.encoders, subject.train, subject.collator, subject.codebook_size)
    held_out_bags = {name: subject.coded.bags(codes, subject.codebook_size) for name, codes in subject.codes.items()}
    targets = probes.probe_targets(subject.train, subject.held_out)
    associations = {}
    for name, (group, target) in ASSOCIATIONS.items():
        associations[name] = []
        if group in targets and target in targets[group].names:
            bags = train_bags["quantizer"], held_out_bags["quantizer"]
            chosen = probes.associated_codes(*bags, targets[group], target, num_each=probes.CODES_EACH_SIGN)
            associations[name] = _draw_associations(page, subject, name, chosen)
    patients = subject.held_out.column("patient_id")
    return {
        "probes": probes.probe_section(train_bags, held_out_bags, targets, patients), "associations": associations
    }  # fmt: skip


def _draw_associations(page: Page, subject: Subject, name: str, chosen: list[dict]) -> list[dict]:
    if not chosen:
        return []
    described = figures.describe_codes(subject.model, subject.coded, [each["code"] for each in chosen])
    signs = ASSOCIATION_SIGNS[name]
    labels = [f"code {each['code']}\n{signs[each['r_train'] < 0]}\nr = {each['r_train']:+.2f}" for each in chosen]
    held_out_r = ", ".join(f"{each['code']}: {each['r_held_out']:+.2f}" for each in chosen)
    page.add(
        f"association_{name}",
        pictures.draw_codes(described, labels, sampling_rate=subject.model.config.sampling_rate),
        f"The codes whose share of a record correlates most with {ASSOCIATION_NAMES[name]}, chosen on "
        f"{len(subject.train):,} training records (r beside the rows) among those that "
        f"{_percent(probes.LEAST_RECORDS_WITH_CODE)} of them have; waveforms and, as a check, r from "
        f"{subject.coded.num_records:,} held-out records: {held_out_r}.",
    )
    return [each | waveforms for each, waveforms in zip(chosen, described)]


def _lead_copy(page: Page, subject: Subject) -> dict:
    section = figures.lead_copy_section(subject.coded, subject.codebook_size)
    page.add(
        "lead_copy", pictures.draw_lead_copy(section["leads"], section["same_code"]),
        f"How often (%) the lead of the row has the same code as the lead of the column in the same patch; "
        f"{subject.coded.num_records:,} held-out records, patches usable in both leads.",
    )  # fmt: skip
    return section


def _stability(page: Page, subject: Subject) -> list[dict]:
    logger.info("coding altered records")
    rows = figures.stability_section(subject.encoders, subject.held_out, subject.collator)
    page.add(
        "stability", pictures.draw_stability(rows, {name: SHOWN[name] for name in subject.encoders}),
        f"Share of the codes that stay when the input is altered before it is coded; {rows[0]['num_patches']:,} patches of "
        f"{len(subject.held_out):,} held-out records. Noise: {figures.NOISE_SNR_DB:g} dB below the power of each lead.",
    )  # fmt: skip
    return rows


def _draw_training(page: Page, curves: dict) -> None:
    page.add(
        "training", pictures.draw_curves(curves["series"]),
        f"Everything logged more than once in the {curves['steps']:,} steps of the run given, from {curves['checkpoint']}. "
        "Blue: logged in training; yellow: in the evaluations.",
    )  # fmt: skip


def read_curves(run_dir: str | Path) -> dict:
    """Return what the newest checkpoint of a run has logged: `series` name -> steps and values, and `once` what has one value.

    Raises:
        ValueError: `run_dir` holds no checkpoint.
    """
    checkpoints = checkpoints_in(run_dir)
    if not checkpoints:
        raise ValueError(
            f"--run {run_dir} holds no checkpoint-N folder with a trainer_state.json. Give the output folder of "
            "tokenization.train, or leave --run out."
        )
    state = json.loads((checkpoints[0] / "trainer_state.json").read_text())
    series: dict[str, dict] = {}
    for entry in state["log_history"]:
        for name, value in entry.items():
            if name not in ("step", "epoch") and isinstance(value, int | float):
                line = series.setdefault(name, {"steps": [], "values": []})
                line["steps"].append(entry["step"])
                line["values"].append(float(value))
    several = {name: line for name, line in series.items() if len(line["values"]) > 1}
    once = {name: line["values"][0] for name, line in series.items() if name not in several}
    return {"checkpoint": checkpoints[0].name, "steps": state["global_step"], "series": several, "once": once}


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.4g}"


def _fixed(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a quantizer")
    parser.add_argument("--data", nargs="+", help="as for the training commands; fold 9 is measured")
    parser.add_argument("--simulate", type=int, default=0, help="number of simulated records in place of --data")
    parser.add_argument("--out", required=True, help="folder of the page")
    parser.add_argument("--run", help="output folder of tokenization.train, for the training curves")
    parser.add_argument("--num_records", type=int, default=600, help="held-out records (a fixed sample)")
    parser.add_argument("--num_train_records", type=int, default=3000, help="training records for what the codes know")
    parser.add_argument("--num_codes", type=int, default=24, help="how many of the most used codes are drawn")
    parser.add_argument("--num_proc", type=int, default=2, help="processes that prepare records")
    parser.add_argument("--cache_dir", help="of the prepared records; as for the training commands")
    args = parser.parse_args(argv)

    curves = read_curves(args.run) if args.run else None
    model = AnyECGRhythmQuantizer.from_pretrained(args.checkpoint)
    collator = ECGCollator(load_extractor(args.checkpoint))
    data = DataArguments(args.data, simulate=args.simulate, cache_dir=args.cache_dir, num_proc=args.num_proc)
    train, held_out = load_splits(data, collator.extractor, seed=0)
    head = {
        "command": shlex.join(["python", "-m", "tokenization.report", *argv]),
        "sources": args.data or [f"{args.simulate} simulated records"],
    }
    samples = sample_of(train, args.num_train_records), sample_of(held_out, args.num_records)
    write_report(model, *samples, collator, Page(args.out), num_codes=args.num_codes, curves=curves, head=head)
    print(Path(args.out) / "index.html")


if __name__ == "__main__":
    run_command(main)
