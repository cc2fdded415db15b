"""Which fold a record belongs to: PTB-XL keeps its own, others get one from a hash of the patient."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

NUM_FOLDS = 10
TRAIN_FOLDS = tuple(range(1, 9))
VALIDATION_FOLDS = (9,)
TEST_FOLDS = (10,)
DEALING_ORDER = (1, 9, 2, 3, 4, 5, 6, 7, 8, 10)


def fold_of(patient_id: str) -> int:
    """Return a fold, 1 to 10, that depends on nothing but `patient_id`: all records of a patient share it.

    Folds 1-8 train, 9 validates, 10 tests, as in PTB-XL. Adding records to a corpus moves no other record.
    """
    digest = hashlib.sha256(patient_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % NUM_FOLDS + 1


def folds_of(patient_ids: Sequence[str]) -> dict[str, int]:
    """Return the fold of each patient by `fold_of`.

    Where that leaves nothing to train on or nothing to validate on, the corpus is small: its patients are then dealt
    out in turn, in the order of their hashes, so that two of them are enough.
    """
    folds = {patient: fold_of(patient) for patient in patient_ids}
    if set(folds.values()) & set(TRAIN_FOLDS) and set(folds.values()) & set(VALIDATION_FOLDS):
        return folds
    ordered = sorted(folds, key=spread_order)
    return {patient: DEALING_ORDER[place % NUM_FOLDS] for place, patient in enumerate(ordered)}


def spread_order(record_id: str) -> bytes:
    """Return a sort key that spreads records evenly: the first N of this order are a fixed random sample."""
    return hashlib.sha256(b"sample:" + record_id.encode()).digest()
