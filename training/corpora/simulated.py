"""Simulated records, their statements known from how they were made: for smoke runs and tests, never for results."""

from __future__ import annotations

from anyecg_hf.simulate import simulate_record
from training.splits import TRAIN_FOLDS, VALIDATION_FOLDS

from .entry import RecordEntry

STATEMENTS = {"sinus": ("NORM", "SR"), "af": ("AFIB", "ABQRS"), "pvc": ("SR", "PVC")}
NUM_FOLDS = len(TRAIN_FOLDS) + len(VALIDATION_FOLDS)


def list_simulated(num_records: int, *, seed: int = 0) -> list[RecordEntry]:
    """Return `num_records` entries: rhythm, heart rate and noise differ, folds 1 to 9 in turn."""
    return [_entry(index, seed) for index in range(num_records)]


def _entry(index: int, seed: int) -> RecordEntry:
    rhythm = tuple(STATEMENTS)[index // NUM_FOLDS % len(STATEMENTS)]
    heart_rate = 50 + (index * 37) % 60  # beats a minute
    codes = STATEMENTS[rhythm] + (("SBRAD",) if heart_rate < 60 else ("STACH",) if heart_rate > 100 else ())
    payload = {"seed": seed * 1_000_003 + index, "rhythm": rhythm, "heart_rate": heart_rate}
    name = f"simulated-{seed}-{index:05d}"
    return RecordEntry(
        name, name, index % NUM_FOLDS + 1, read_simulated, payload,
        age=30.0 + index % 50, sex="male" if index % 2 else "female", codes=codes,
    )  # fmt: skip


def read_simulated(payload: dict):
    """Return the simulated record of one entry: 12 leads, 10 s, 250 Hz, mild noise."""
    return simulate_record(
        seed=payload["seed"], rhythm=payload["rhythm"], heart_rate=payload["heart_rate"], noise_mv=0.01,
        duration_seconds=10.0, sampling_rate=250,
    )  # fmt: skip
