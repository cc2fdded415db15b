"""The figures of the health page (`tokenization.report`): what the codes of a quantizer are, keep and withstand."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans

from anyecg_hf.leads import LEAD_IDS
from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer
from training.collate import ECGCollator
from training.data import ECGDataset

from .codebook_health import batches_of, code_by_kmeans, code_shares, perplexity_of

LEAD_NAMES = {number: name for name, number in LEAD_IDS.items()}
FLOORS = (  # name of the check, figure, floor (None: what k-means reaches), comparison
    ("usage", "usage", 0.5, operator.gt),
    ("perplexity_share", "perplexity_share", 0.3, operator.gt),
    ("fve_above_kmeans", "fve", None, operator.gt),
    ("fve", "fve", 0.65, operator.ge),
    ("fve_low_range", "fve_low_range", 0.4, operator.ge),
)
RECONSTRUCTION_QUANTILES = {"best decile": 0.9, "median": 0.5, "worst decile": 0.1}
LEADS_A_CODE = 3  # are described
NOISE_SNR_DB = 12.0
GAINS = (0.9, 1.1)
SHIFTS_MS = (10, 20, 50)

Encode = Callable[[Mapping[str, torch.Tensor]], np.ndarray]  # batch -> codes (B, L, P), -100 where there is none


@dataclass
class CodedRecords:
    """One row for each usable patch of some records."""

    codes: np.ndarray  # int64 (num,)
    records: np.ndarray  # int64 (num,), place of the record in its data set
    leads: np.ndarray  # int64 (num,), ids of `LEAD_IDS`
    places: np.ndarray  # int64 (num,), place of the patch in its lead
    patches: np.ndarray  # float32 (num, patch_size), mV
    decoded: np.ndarray  # the same shape
    num_records: int

    def bags(self, codes: np.ndarray, codebook_size: int) -> np.ndarray:
        """Return how often each record has each of `codes` (num,), `(num_records, codebook_size)`."""
        counts = np.bincount(self.records * codebook_size + codes, minlength=self.num_records * codebook_size)
        return counts.reshape(self.num_records, codebook_size)


def model_inputs(model: AnyECGRhythmQuantizer, batch: Mapping) -> tuple[torch.Tensor, ...]:
    return tuple(batch[name].to(model.device) for name in ("input_values", "lead_ids", "attention_mask"))


@torch.no_grad()
def code_and_decode(model: AnyECGRhythmQuantizer, dataset: ECGDataset, collator: ECGCollator) -> CodedRecords:
    """Return every usable patch of `dataset` with its code and the waveform decoded from all codes of its record.

    Raises:
        ValueError: no record has a usable patch.
    """
    model.eval()
    parts, first = [], 0
    for batch in batches_of(dataset, collator):
        values, lead_ids, mask = model_inputs(model, batch)
        codes = model.encode(values, lead_ids, mask)
        decoded = model.decode(codes, lead_ids, mask)
        records, rows, places = (index.cpu().numpy() for index in torch.nonzero(codes >= 0, as_tuple=True))
        chosen = (codes >= 0).cpu().numpy()
        patches = [signal.view(*codes.shape, -1).cpu().numpy()[chosen] for signal in (values, decoded)]
        parts.append(
            (codes.cpu().numpy()[chosen], first + records, lead_ids.cpu().numpy()[records, rows], places, *patches)
        )
        first += len(codes)
    if not any(len(part[0]) for part in parts):
        raise ValueError(
            f"None of the {first} held-out records has a usable patch: nothing can be measured. Are the signals flat, or in "
            "another unit than stated?"
        )
    return CodedRecords(*(np.concatenate(columns) for columns in zip(*parts)), num_records=first)


def quantizer_encoder(model: AnyECGRhythmQuantizer) -> Encode:
    return lambda batch: model.encode(*model_inputs(model, batch)).cpu().numpy()


def kmeans_encoder(kmeans: KMeans) -> Encode:
    """Return the function that codes the patches of a batch by their nearest centre."""

    def encode(batch):
        usable = batch["attention_mask"].bool()
        patches = batch["input_values"].view(*usable.shape, -1)[usable].cpu().numpy()
        codes = np.full(tuple(usable.shape), -100)
        codes[usable.cpu().numpy()] = code_by_kmeans(kmeans, patches).codes
        return codes

    return encode


def count_codes(
    encoders: Mapping[str, Encode], dataset: ECGDataset, collator: ECGCollator, codebook_size: int
) -> dict[str, np.ndarray]:
    """Return for each encoder how often each record has each code, `(records, codebook_size)`."""
    found: dict[str, list] = {name: [] for name in encoders}
    for batch in batches_of(dataset, collator):
        for name, encode in encoders.items():
            found[name] += [np.bincount(codes[codes >= 0], minlength=codebook_size) for codes in encode(batch)]
    return {name: np.stack(counts) for name, counts in found.items()}


# ---- the codebook ----------------------------------------------------------------------------------------------------


def codebook_section(reports: Mapping[str, dict], shares: Mapping[str, np.ndarray]) -> dict:
    """Return the `codebook_report` of "quantizer" and, where there is one, of "kmeans", completed, and the checks.

    Args:
        shares: of each code among all patches, by the same names.
    """
    section: dict = {"kmeans": None}
    for name, report in reports.items():
        section[name] = report | {
            "perplexity_share": report["perplexity"] / len(shares[name]),
            "dead_codes": int((shares[name] == 0).sum()),
            "biggest_code_number": int(shares[name].argmax()),
        }
    section["checks"] = []
    for name, key, floor, is_met in FLOORS:
        if floor is None and section["kmeans"] is None:
            continue
        figure, floor = section["quantizer"][key], section["kmeans"][key] if floor is None else floor
        section["checks"].append({"name": name, "figure": figure, "floor": floor, "passes": is_met(figure, floor)})
    return section


def top_codes(coded: CodedRecords, codebook_size: int, num_codes: int) -> list[int]:
    """Return the `num_codes` most used codes, the most used first."""
    counts = np.bincount(coded.codes, minlength=codebook_size)
    order = np.argsort(-counts, kind="stable")[:num_codes]
    return [int(code) for code in order if counts[code]]


def describe_codes(model: AnyECGRhythmQuantizer, coded: CodedRecords, codes: Sequence[int]) -> list[dict]:
    """Return for each of `codes` its count, and its waveforms in the leads where it occurs most."""
    described = []
    for code in codes:
        rows = np.flatnonzero(coded.codes == code)
        counts = np.bincount(coded.leads[rows], minlength=1)
        leads = [int(lead) for lead in np.argsort(-counts, kind="stable")[:LEADS_A_CODE] if counts[lead]]
        described.append(
            {
                "code": int(code),
                "count": len(rows),
                "share": len(rows) / len(coded.codes),
                "num_records": len(np.unique(coded.records[rows])),
                "count_by_lead": {LEAD_NAMES[lead]: int(counts[lead]) for lead in np.flatnonzero(counts)},
                "waveforms": [_waveforms(model, coded, rows[coded.leads[rows] == lead], lead) for lead in leads],
            }
        )
    return described


def _waveforms(model: AnyECGRhythmQuantizer, coded: CodedRecords, rows: np.ndarray, lead: int) -> dict:
    """Return the waveforms in millivolt of one code in one lead: of the real patches `rows`, and what is decoded."""
    low, median, high = np.percentile(coded.patches[rows], (10, 50, 90), axis=0)
    return {
        "lead": LEAD_NAMES[lead],
        "count": len(rows),
        "median": _rounded(median),
        "low": _rounded(low),
        "high": _rounded(high),
        "decoded_in_records": _rounded(np.median(coded.decoded[rows], axis=0)),
        "decoded_alone": _rounded(decode_alone(model, int(coded.codes[rows[0]]), lead)),
    }


def _rounded(waveform: np.ndarray) -> list[float]:
    """Return a waveform in millivolt to a tenth of a microvolt: report.json holds hundreds of them."""
    return np.round(waveform.astype(np.float64), 4).tolist()


@torch.no_grad()
def decode_alone(model: AnyECGRhythmQuantizer, code: int, lead: int) -> np.ndarray:
    """Return what the decoder makes of a record that is nothing but this code in this lead, `(patch_size,)` mV."""
    lead_ids = torch.tensor([[lead]], device=model.device)
    return model.decode(torch.tensor([[[code]]], device=model.device), lead_ids)[0, 0].cpu().numpy()


# ---- reconstructions -------------------------------------------------------------------------------------------------


@dataclass
class _Fit:
    """How well sums of patches are decoded; all arrays `(groups,)`, NaN where a group is empty or constant."""

    count: np.ndarray  # samples
    r: np.ndarray
    rmse: np.ndarray  # mV
    fve: np.ndarray


def _fit_by(groups: np.ndarray, coded: CodedRecords) -> _Fit:
    """Return r, RMSE and explained variance over all samples of the patches of each group; `groups` (num,) from 0."""
    x, y = coded.patches.astype(np.float64), coded.decoded.astype(np.float64)

    def add(values):
        return np.bincount(groups, weights=values.sum(axis=1))

    with np.errstate(invalid="ignore", divide="ignore"):
        count = np.bincount(groups) * float(x.shape[1])
        mean_x, mean_y = add(x) / count, add(y) / count
        x, y = x - mean_x[groups, None], y - mean_y[groups, None]
        squares_x, squares_y, products = add(x * x), add(y * y), add(x * y)
        errors = add(np.square(coded.patches.astype(np.float64) - coded.decoded))
        return _Fit(count, products / np.sqrt(squares_x * squares_y), np.sqrt(errors / count), 1 - errors / squares_x)


def reconstruction_section(coded: CodedRecords, record_ids: Sequence[str]) -> dict:
    """Return how well each lead is decoded over all records, and the records to draw, chosen by their rank."""
    by_record = _fit_by(coded.records, coded)
    by_lead, pooled = _fit_by(coded.leads, coded), _fit_by(np.zeros_like(coded.records), coded)
    both = _fit_by(coded.records * (max(LEAD_NAMES) + 1) + coded.leads, coded)
    lead_of = np.arange(len(both.count)) % (max(LEAD_NAMES) + 1)
    rows = [_lead_row(LEAD_NAMES[lead], both, (lead_of == lead) & (both.count > 0), by_lead, lead)
            for lead in np.unique(coded.leads)]  # fmt: skip
    rows.append(_lead_row("all", both, both.count > 0, pooled, 0))
    order = np.argsort(by_record.fve)
    order = order[np.isfinite(by_record.fve[order])]
    shown = {name: int(order[round(share * (len(order) - 1))]) for name, share in RECONSTRUCTION_QUANTILES.items()}
    examples = [
        {"rule": name, "record_id": record_ids[index], "index": index, "r": float(by_record.r[index]),
         "rmse_mv": float(by_record.rmse[index]), "fve": float(by_record.fve[index])}
        for name, index in shown.items()
    ]  # fmt: skip
    return {"by_lead": rows, "examples": examples}


def _lead_row(name: str, both: _Fit, chosen: np.ndarray, pooled: _Fit, place: int) -> dict:
    correlations = both.r[chosen & np.isfinite(both.r)]
    low, median = np.percentile(correlations, (10, 50)) if len(correlations) else (float("nan"),) * 2
    return {
        "lead": name, "num_traces": int(chosen.sum()), "median_r": float(median), "low_r": float(low),
        "median_rmse_mv": float(np.median(both.rmse[chosen])), "pooled_r": float(pooled.r[place]),
        "pooled_rmse_mv": float(pooled.rmse[place]), "pooled_fve": float(pooled.fve[place]),
    }  # fmt: skip


def traces_of(coded: CodedRecords, record: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return lead name -> (original, decoded) of one record in millivolt, NaN where there is no usable patch."""
    rows = np.flatnonzero(coded.records == record)
    num_patches, patch_size = coded.places[rows].max() + 1, coded.patches.shape[1]
    traces = {}
    for lead in np.unique(coded.leads[rows]):
        own = rows[coded.leads[rows] == lead]
        pair = np.full((2, num_patches, patch_size), np.nan)
        pair[:, coded.places[own]] = coded.patches[own], coded.decoded[own]
        traces[LEAD_NAMES[int(lead)]] = tuple(pair.reshape(2, -1))
    return traces


# ---- neighbours ------------------------------------------------------------------------------------------------------


def lead_copy_section(coded: CodedRecords, codebook_size: int) -> dict:
    """Return how often two leads have the same code in the same patch, and how often they would by chance alone."""
    leads = np.unique(coded.leads)
    grid = np.full((len(leads), coded.num_records, coded.places.max() + 1), -100)  # (L, R, P)
    grid[np.searchsorted(leads, coded.leads), coded.records, coded.places] = coded.codes
    shares = np.stack([code_shares(codes[codes >= 0], codebook_size) for codes in grid])
    same = np.full((len(leads), len(leads)), np.nan)
    for i, first in enumerate(grid):
        for j, second in enumerate(grid):
            both = (first >= 0) & (second >= 0)
            same[i, j] = (first == second)[both].mean() if both.any() else np.nan
    names = [LEAD_NAMES[int(lead)] for lead in leads]
    others = np.where(np.eye(len(leads), dtype=bool), np.nan, same)
    best = {}
    for i, name in enumerate(names):
        if np.isfinite(others[i]).any():
            best[name] = {"lead": names[int(np.nanargmax(others[i]))], "share": float(np.nanmax(others[i]))}
    chance = shares @ shares.T
    off = ~np.eye(len(leads), dtype=bool) & np.isfinite(same)
    return {
        "leads": names, "same_code": same.tolist(), "by_chance": chance.tolist(), "best_neighbour": best,
        "mean_same_code": float(same[off].mean()) if off.any() else None,
        "mean_by_chance": float(chance[off].mean()) if off.any() else None,
        "perplexity": [perplexity_of(each) for each in shares],
    }  # fmt: skip


# ---- stability -------------------------------------------------------------------------------------------------------


def stability_section(
    encoders: Mapping[str, Encode], dataset: ECGDataset, collator: ECGCollator, *, seed: int = 0
) -> list[dict]:
    """Return for each alteration of the input the share of codes that stay, by each encoder.

    Counted are patches whose neighbour before is usable, too: at a shift its samples come in.
    """
    alterations = _alterations(collator.extractor.sampling_rate, seed)
    kept = {name: dict.fromkeys(encoders, 0) for name in alterations}
    total = 0
    for batch in batches_of(dataset, collator):
        usable = batch["attention_mask"].bool().cpu().numpy()
        counted = usable & np.concatenate([np.zeros_like(usable[..., :1]), usable[..., :-1]], axis=-1)
        total += int(counted.sum())
        before = {name: encode(batch) for name, encode in encoders.items()}
        for alteration, alter in alterations.items():
            altered = {**batch, "input_values": alter(batch["input_values"], batch["attention_mask"])}
            for name, encode in encoders.items():
                kept[alteration][name] += int((encode(altered) == before[name])[counted].sum())
    return [
        {"alteration": name, "num_patches": total} | {each: count / max(total, 1) for each, count in counts.items()}
        for name, counts in kept.items()
    ]


def _alterations(sampling_rate: float, seed: int) -> dict[str, Callable]:
    """Return name -> function of `input_values` (B, L, T) and `attention_mask` (B, L, P)."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Callable] = {f"white noise, {NOISE_SNR_DB:g} dB": lambda values, mask: add_noise(
        values, mask, NOISE_SNR_DB, generator)}  # fmt: skip
    found |= {f"gain {gain:g}": lambda values, mask, gain=gain: values * gain for gain in GAINS}
    for shift in SHIFTS_MS:
        samples = round(shift / 1000 * sampling_rate)
        found[f"{shift} ms later"] = lambda values, mask, samples=samples: delay(values, samples)
    return found


def add_noise(values: torch.Tensor, mask: torch.Tensor, snr_db: float, generator: torch.Generator) -> torch.Tensor:
    """Return `values` (B, L, T) with white noise so far below the power of each lead about its mean over usable patches."""
    patches = values.view(*mask.shape, -1)
    weights = mask.to(values.dtype)[..., None]
    count = (weights.sum((-1, -2), keepdim=True) * patches.shape[-1]).clamp(min=1)
    mean = (patches * weights).sum((-1, -2), keepdim=True) / count
    power = ((patches - mean).square() * weights).sum((-1, -2)) / count[..., 0, 0]
    noise = torch.randn(values.shape, generator=generator).to(values)
    return values + noise * (power / 10 ** (snr_db / 10)).sqrt()[..., None]


def delay(values: torch.Tensor, samples: int) -> torch.Tensor:
    """Return `values` (B, L, T) that many samples later; the start repeats its first value."""
    if samples == 0:
        return values
    return torch.cat([values[..., :1].expand(*values.shape[:-1], samples), values[..., :-samples]], dim=-1)
