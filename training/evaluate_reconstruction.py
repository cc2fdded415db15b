r"""Figures of lead generation on a fold of a corpus, beside what needs no network:

    python -m training.evaluate_reconstruction --data DIR --output benchmarks/results/reconstruction_baselines
    python -m training.evaluate_reconstruction --data DIR --output OUT --checkpoint head DIR [--checkpoint U-Net DIR2] \
        [--codes_from DIR --quantizer DIR] [--folds 10]

Writes `OUT.json` and `OUT.md`. Cases: G1 one precordial lead missing, each in turn; G2 V1 to V6 missing, I and II are there;
G3 as G2 with V2 or V5 there; G4 only I, or only II, is there; G5 one to three leads gone for 1 to 5 s; G6 the same spans under
noise; G7 one limb lead missing. Only what is missing is scored, and of it only what does not follow by algebra from two limb
leads; that is G7. In G5 it is known where the damage is. What is restored there does not see it, so it is the same in G6: there
the question is from which noise on restoring is better than leaving the lead as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.signal import butter, sosfiltfilt
from torch.utils.data import DataLoader
from tqdm import tqdm

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import LEAD_IDS, LIMB_LEADS, STANDARD_LEADS, fill_limb_leads

from .checkpointing import load_extractor, without_nan, write_json
from .collate import ECGCollator
from .commands import run_command
from .data import DataArguments, ECGDataset, list_sources, load_folds
from .ecg_metrics.classification_metrics import mean_of_scored
from .ecg_metrics.patient_bootstrap import intervals_of
from .ecg_metrics.reconstruction_metrics import by_lead, lead_metrics, mean_and_median, record_means
from .lead_generation import CASES, MAX_SPAN_LEADS, MAX_SPAN_SECONDS, PRECORDIAL_LEADS, SPANS, without_derivable
from .reconstruct import lead_covariance
from .reconstruction_methods import LEAST_SQUARES, Method, baselines, by_codes, by_head
from .splits import TRAIN_FOLDS, spread_order

SPAN_SEED = 20_260_301  # spans and noise are the same whatever is evaluated
NOISE_DB = (12, 6, 0, -6)
NOISE_BANDS_HZ = {"base line": (0.5, 1.0), "electrode": (1.0, 10.0), "muscle": (20.0, 40.0)}  # like bw, em, ma of NSTDB
AS_IT_IS, ALGEBRA = "left as it is", "algebra"
SHOWN = ("psnr_range_db", "psnr_fixed_db", "ssim_61", "mae_mv", "rmse_mv", "pearson_r")
ROWS = list(STANDARD_LEADS)


# ---- cases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What of one record is taken away and scored."""

    hidden: np.ndarray  # bool (12, patches): not seen and not derivable
    scored: np.ndarray  # bool (12,): leads with figures
    span: slice  # of samples that are scored

    @classmethod
    def of_case(cls, case: str, real: np.ndarray, size: int) -> Trial:
        lost = np.isin(ROWS, CASES[case])[:, None] & real
        hidden = without_derivable(lost, real, ROWS)
        scored = hidden.any(axis=1) & (hidden == lost).all(axis=1) & real.all(axis=1)
        return cls(hidden, scored, slice(0, real.shape[1] * size))

    @classmethod
    def of_span(cls, index: int, real: np.ndarray, size: int, rate: float) -> Trial:
        """One to three leads, one to five seconds, anywhere: every patch that the span touches is hidden."""
        generator = np.random.default_rng((SPAN_SEED, index))
        samples = real.shape[1] * size
        length = min(int(generator.integers(rate, MAX_SPAN_SECONDS * rate + 1)), samples)
        first = int(generator.integers(samples - length + 1))
        lost = np.zeros(real.shape, dtype=bool)
        leads = generator.permutation(len(ROWS))[: int(generator.integers(1, MAX_SPAN_LEADS + 1))]
        lost[leads, first // size : -(-(first + length) // size)] = True
        hidden = without_derivable(lost & real, real, ROWS)
        scored = hidden.any(axis=1) & (hidden == lost).all(axis=1)
        return cls(hidden, scored, slice(first, first + length))


def noise_like(kind: str, shape: tuple[int, int], rate: float, generator: np.random.Generator) -> np.ndarray:
    """Return noise of standard deviation 1 in the band of one of `NOISE_BANDS_HZ`, `(leads, samples)`."""
    sections = butter(2, NOISE_BANDS_HZ[kind], btype="bandpass", fs=rate, output="sos")
    noise = sosfiltfilt(sections, generator.standard_normal((shape[0], shape[1] + 2 * int(rate) * 2)), axis=1)
    noise = noise[:, 2 * int(rate) : 2 * int(rate) + shape[1]]
    return noise / noise.std(axis=1, keepdims=True)


def twelve_rows(item: dict, collator: ECGCollator) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the signal `(12, samples)` in millivolt and which patches are real, in standard order; None without all leads."""
    batch = collator([item])
    ids = batch["lead_ids"][0].tolist()
    if not all(LEAD_IDS[name] in ids for name in ROWS):
        return None
    rows = [ids.index(LEAD_IDS[name]) for name in ROWS]
    return batch["input_values"][0].numpy()[rows], batch["attention_mask"][0].numpy()[rows].astype(bool)


def as_batch(signals: Sequence[np.ndarray], reals: Sequence[np.ndarray], trials: Sequence[Trial]) -> dict:
    """Return records of one length as the models take them."""
    ids = torch.tensor([LEAD_IDS[name] for name in ROWS])
    return {
        "input_values": torch.from_numpy(np.stack(signals)).float(),
        "lead_ids": ids.repeat(len(signals), 1),
        "attention_mask": torch.from_numpy(np.stack(reals)).long(),
        "bool_masked_pos": torch.from_numpy(np.stack([trial.hidden for trial in trials])),
    }


# ---- figures -------------------------------------------------------------------------------------------------------


class Table:
    """Figures of every case and method, by record and lead: `values[case][method][figure]` is a list of `(12,)`."""

    def __init__(self):
        self.values: dict[str, dict[str, dict[str, list[np.ndarray]]]] = {}

    def add(
        self, case: str, method: str, predicted: np.ndarray, reference: np.ndarray, trial: Trial, size: int
    ) -> None:
        """Note the figures of one record; in case `G1 V3` those of lead V3 only, which `report` joins."""
        rows, span = np.flatnonzero(trial.scored), trial.span
        figures = {name: np.full(len(ROWS), np.nan) for name in (*SHOWN, "ssim_11", "edge_jump")}
        if len(rows):
            pair = predicted[rows], reference[rows]
            found = lead_metrics(*(leads[:, span] for leads in pair), np.ptp(reference[rows], axis=1))
            if span == slice(0, reference.shape[1]):
                found["edge_jump"] = edge_jump(*pair, size=size)
            for name, values in found.items():
                figures[name][rows] = values
        into = self.values.setdefault(case, {}).setdefault(method, {name: [] for name in figures})
        for name, values in figures.items():
            into[name].append(values)

    def joined(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        """Return the figures as arrays `(records, 12)`, the six cases G1 as one and the six G7 as one."""
        result: dict = {}
        for case, methods in self.values.items():
            group = case.split()[0] if case.startswith(("G1", "G7")) else case
            for method, figures in methods.items():
                into = result.setdefault(group, {}).setdefault(method, {})
                for name, values in figures.items():
                    values = np.stack(values)
                    into[name] = np.where(np.isnan(values), into[name], values) if name in into else values
        return result


def edge_jump(predicted: np.ndarray, reference: np.ndarray, *, size: int) -> np.ndarray:
    """Return how much more the error changes over an edge of patches than elsewhere, `(leads,)`: 1 is no step at all."""
    changes = np.abs(np.diff(predicted - reference, axis=1))
    at_edge = np.arange(1, changes.shape[1] + 1) % size == 0
    elsewhere = changes[:, ~at_edge].mean(axis=1)
    return changes[:, at_edge].mean(axis=1) / np.where(elsewhere > 0, elsewhere, np.nan)


def measure(
    records: ECGDataset, extractor: AnyECGFeatureExtractor, methods: dict[str, Method], *, batch_size: int = 16
) -> tuple[Table, list[str]]:
    """Return the figures of all cases, and the patient of each record, of the records that have all twelve leads."""
    table, collator, size = Table(), ECGCollator(extractor), int(extractor.patch_size)
    patients, all_patients = [], records.column("patient_id")
    for batch in _batches(records, collator, batch_size):
        patients += [all_patients[index] for index, _, _ in batch]
        _measure_batch(table, batch, methods, size=size, rate=extractor.sampling_rate)
    return table, patients


def _batches(records: ECGDataset, collator: ECGCollator, batch_size: int) -> Iterator[list[tuple]]:
    """Yield lists of (index, signal, real) of records of one length."""
    waiting: dict[int, list[tuple]] = {}
    loader = DataLoader(records, batch_size=1, collate_fn=lambda items: items[0])
    for index, item in enumerate(tqdm(loader, desc="records", mininterval=5.0, leave=False)):
        found = twelve_rows(item, collator)
        if found is None:
            continue
        same = waiting.setdefault(found[0].shape[1], [])
        same.append((index, *found))
        if len(same) == batch_size:
            yield waiting.pop(found[0].shape[1])
    yield from waiting.values()


@torch.no_grad()
def _measure_batch(table: Table, batch: Sequence[tuple], methods: dict[str, Method], *, size: int, rate: float) -> None:
    indices, signals, reals = zip(*batch)
    spans = [Trial.of_span(index, real, size, rate) for index, real in zip(indices, reals)]
    trials = {case: [Trial.of_case(case, real, size) for real in reals] for case in CASES} | {SPANS: spans}
    for case, each in trials.items():
        inputs = as_batch(signals, reals, each)
        for name, method in methods.items():
            for predicted, reference, trial in zip(method(inputs), signals, each):
                table.add(case, name, predicted, reference, trial, size)
    for index, reference, real, trial in zip(indices, signals, reals, spans):
        _add_noise(table, index, reference, trial, size=size, rate=rate)
        _add_limb_leads(table, reference, real, size=size)


def _add_noise(table: Table, index: int, reference: np.ndarray, trial: Trial, *, size: int, rate: float) -> None:
    """Note what it is to leave a lead under noise as it is; SNR over the span of each lead."""
    generator = np.random.default_rng((SPAN_SEED, index, 1))
    kind = str(generator.choice(list(NOISE_BANDS_HZ)))
    noise = noise_like(kind, reference[:, trial.span].shape, rate, generator)
    power = reference[:, trial.span].std(axis=1, keepdims=True)
    for decibel in NOISE_DB:
        noisy = reference.copy()
        noisy[:, trial.span] += noise * power * 10 ** (-decibel / 20)
        table.add(f"G6 {decibel} dB", AS_IT_IS, noisy, reference, trial, size)


def _add_limb_leads(table: Table, reference: np.ndarray, real: np.ndarray, *, size: int) -> None:
    for lead in LIMB_LEADS:
        lost = real & np.isin(ROWS, lead)[:, None]
        trial = Trial(lost, lost.all(axis=1), slice(0, reference.shape[1]))
        known = np.repeat(real & ~lost, size, axis=1)
        table.add(f"G7 {lead}", ALGEBRA, fill_limb_leads(reference, ROWS, known), reference, trial, size)


def report(table: Table, patients: Sequence[str], *, num_resamples: int) -> dict:
    """Return by case and method: mean and median over records (precordial leads in the cases of which they are part, and all
    that are scored), intervals, gain on least squares, and figures by lead."""
    cases = {}
    for case, methods in table.joined().items():
        cases[case] = {
            method: _summary(figures, methods.get(LEAST_SQUARES), patients, num_resamples)
            for method, figures in methods.items()
        }
    return cases


def _summary(figures: dict, of_least_squares: dict | None, patients: Sequence[str], num_resamples: int) -> dict:
    chest = np.isin(ROWS, PRECORDIAL_LEADS)
    means = {"all": record_means(figures)}
    means["precordial"] = record_means({name: values[:, chest] for name, values in figures.items()})
    result = {}
    for leads, of_records in means.items():
        if of_least_squares is not None:
            part = of_least_squares["psnr_range_db"][:, chest if leads == "precordial" else slice(None)]
            of_records["gain_db"] = of_records["psnr_range_db"] - record_means({"psnr": part})["psnr"]
        kept = np.flatnonzero(np.isfinite(of_records["mae_mv"]))
        if not len(kept):
            continue
        result[leads] = {"records": len(kept), **mean_and_median(of_records)}
        if num_resamples:
            result[leads]["intervals_95"] = intervals_of(
                [patients[index] for index in kept],
                lambda drawn, kept=kept, of_records=of_records: {
                    name: mean_of_scored(values[kept[drawn]]) for name, values in of_records.items()
                },
                num_resamples=num_resamples,
            )
    rows = by_lead(figures, ROWS)
    return result | {"leads": {lead: row for lead, row in rows.items() if row["records"]}}


def as_markdown(content: dict) -> str:
    """Return the report as a page: a table of the cases, and one of precordial leads."""
    lines = ["# Lead generation", "", content["what"], "", "## By case", ""]
    names = ["leads", "records", *SHOWN, "gain_db", "edge_jump"]
    lines += [f"| case | method | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for case, methods in content["cases"].items():
        for method, found in methods.items():
            both = ("precordial", "all") if set(found["leads"]) & set(LIMB_LEADS) else ("precordial",)
            for leads in (each for each in both if each in found):
                lines.append(f"| {case} | {method} | {leads} | {found[leads]['records']} | {_cells(found[leads])} |")
    lines += ["", "## psnr_range_db by lead", ""]
    lines += [f"| case | method | {' | '.join(ROWS)} |", "|---|---|" + "---|" * len(ROWS)]
    for case, methods in content["cases"].items():
        for method, found in methods.items():
            values = [found["leads"].get(lead, {}).get("psnr_range_db") for lead in ROWS]
            cells = ["" if value is None else f"{value:.2f}" for value in values]
            lines.append(f"| {case} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(found: dict) -> str:
    digits = {"psnr_range_db": 2, "psnr_fixed_db": 2, "gain_db": 2, "edge_jump": 2}
    cells = []
    for name in (*SHOWN, "gain_db", "edge_jump"):
        value, interval = found.get(name, float("nan")), found.get("intervals_95", {}).get(name)
        text = "" if np.isnan(value) else f"{value:.{digits.get(name, 4)}f}"
        if interval and text and name in ("psnr_range_db", "gain_db"):
            text += f" ({interval[0]:.2f} to {interval[1]:.2f})"
        cells.append(text)
    return " | ".join(cells)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="as for the training commands")
    parser.add_argument("--output", required=True, help="OUT.json and OUT.md are written")
    parser.add_argument(
        "--checkpoint", nargs=2, action="append", default=[], metavar=("NAME", "DIR"),
        help="a folder that training.reconstruct has written, and its name in the tables; may be given several times",
    )  # fmt: skip
    parser.add_argument("--codes_from", help="folder of a model of masked codes, with --quantizer")
    parser.add_argument("--quantizer", help="folder of the rhythm quantizer")
    parser.add_argument("--folds", nargs="+", type=int, default=[9], help="9 validation, 10 test")
    parser.add_argument("--records", type=int, help="a fixed sample of so many; default: all")
    parser.add_argument("--covariance_records", type=int, default=4000, help="of folds 1-8, for least squares")
    parser.add_argument(
        "--bootstrap", type=int, default=1000, help="resamples of patients for 95 %% intervals; 0 = none"
    )
    parser.add_argument("--cache_dir", help="as for the training commands")
    args = parser.parse_args(argv)
    if bool(args.codes_from) != bool(args.quantizer):
        parser.error("--codes_from and --quantizer belong together: give both or neither")

    folders = [folder for _, folder in args.checkpoint] + ([args.codes_from] if args.codes_from else [])
    extractor = _one_extractor(folders)
    data_args = DataArguments(data=args.data, cache_dir=args.cache_dir)
    sources = list_sources(data_args)
    train = load_folds(sources, extractor, TRAIN_FOLDS, args=data_args)
    records = load_folds(sources, extractor, args.folds, args=data_args)
    names = records.column("record_id")
    order = sorted(range(len(records)), key=lambda index: spread_order(names[index]))
    methods = baselines(lead_covariance(train, num_records=args.covariance_records))
    methods |= {name: by_head(folder) for name, folder in args.checkpoint}
    if args.codes_from:
        methods["codes"] = by_codes(args.codes_from, args.quantizer)
    table, patients = measure(records.take(sorted(order[: args.records])), extractor, methods)
    content = {
        "what": _describe(args, extractor, len(patients)),
        "num_records": len(patients),
        "folds": args.folds,
        "cases": report(table, patients, num_resamples=args.bootstrap),
    }
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output.with_name(output.name + ".json"), without_nan(content))
    page = as_markdown(content)
    output.with_name(output.name + ".md").write_text(page)
    print(page)


def _one_extractor(folders: Sequence[str]) -> AnyECGFeatureExtractor:
    """Return the extractor of all models, or the default one where there is none.

    Raises:
        ValueError: two models take other signals, so that their figures cannot stand beside each other.
    """
    extractors = [load_extractor(folder) for folder in folders] or [AnyECGFeatureExtractor()]
    for folder, other in zip(folders[1:], extractors[1:]):
        if other.to_dict() != extractors[0].to_dict():
            raise ValueError(
                f"{folder} takes records filtered in another way than {folders[0]}: measure it in a run of its own."
            )
    return extractors[0]


def _describe(args: argparse.Namespace, extractor: AnyECGFeatureExtractor, num_records: int) -> str:
    """Return what a reader of the tables has to know."""
    band = f"{extractor.lowcut_hz:g} to {extractor.highcut_hz:g} Hz, {extractor.sampling_rate:g} Hz"
    interval = f" (95 % interval of {args.bootstrap} resamples of patients)" if args.bootstrap else ""
    return (
        f"{num_records} records with twelve leads of fold {', '.join(map(str, args.folds))}; {band}, millivolt. Least squares "
        f"from {args.covariance_records} records of folds 1-8. Means over records{interval}, of each the mean over the leads "
        "that are missing; those with a range under 0.1 mV are left out. psnr_range_db: peak = range of the reference lead in "
        "its record; psnr_fixed_db: peak = 4 mV. gain_db: psnr_range_db beyond that of least squares on the same records. "
        "edge_jump: change of the error over an edge of one-second patches, over that elsewhere; 1 = no step. In G4 all leads "
        "but one are missing, and all are scored. Of spans (G5) the place is known; the noise of G6 is simulated (base line 0.5 "
        "to 1 Hz, electrode 1 to 10 Hz, muscle 20 to 40 Hz, one kind a record), the NSTDB was not at hand. G7 is algebra and in "
        "no other figure."
    )


if __name__ == "__main__":
    run_command(main)
