"""Fixtures shared by all tests: where the real recordings are, and records made at run time."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_data() -> Path:
    """Folder of real recordings: `ANYECG_DATA`, or `../shared/ecg` beside the project."""
    return Path(os.environ.get("ANYECG_DATA", ROOT.parent / "shared" / "ecg"))


@pytest.fixture(scope="session")
def real_ecg() -> Path:
    folder = shared_data()
    if not folder.is_dir():
        pytest.skip(
            "real recordings not present: set ANYECG_DATA to the folder that holds ptb-xl-100, challenge-2021, ..."
        )
    return folder
