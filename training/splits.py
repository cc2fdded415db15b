"""Which fold a record belongs to: PTB-XL keeps its own, others get one from a hash of the patient."""

from __future__ import annotations

import hashlib

NUM_FOLDS = 10
TRAIN_FOLDS = tuple(range(1, 9))
VALIDATION_FOLDS = (9,)
TEST_FOLDS = (10,)


def fold_of(patient_id: str) -> int:
    """Return a fold, 1 to 10, that depends on nothing but `patient_id`: all records of a patient share it.

    Folds 1-8 train, 9 validates, 10 tests, as in PTB-XL. Adding records to a corpus moves no other record.
    """
    digest = hashlib.sha256(patient_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % NUM_FOLDS + 1


def spread_order(record_id: str) -> bytes:
    """Return a sort key that spreads records evenly: the first N of this order are a fixed random sample."""
    return hashlib.sha256(b"sample:" + record_id.encode()).digest()
