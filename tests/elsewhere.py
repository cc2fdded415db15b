"""A process that cannot import `anyecg_hf`: `remote_code_script.py`, in an empty folder and with a Hub cache of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from packaging.version import Version

# Before 5.10 Transformers copies, of a local folder, only files that the entry file itself imports. Hub ids are whole.
LOCAL_FOLDERS_ARE_WHOLE = Version(transformers.__version__) >= Version("5.10")
SCRIPT = Path(__file__).resolve().parent / "remote_code_script.py"


def run_elsewhere(root, name, job, blocked=(), **settings):
    """Run the script on `job` in a process of its own, in an empty folder, and return its results.

    Args:
        settings: of its environment, beside or instead of those that keep it offline.
    """
    home = root / f"{name} home"
    (home / "elsewhere").mkdir(parents=True, exist_ok=True)
    kinds = ("models", "extractors", "pipelines")
    job = {**{kind: {} for kind in kinds}, **{f"save_{kind}_to": {} for kind in kinds}, "refused": {}, **job}
    job |= {"blocked": list(blocked), "num_threads": torch.get_num_threads(), "results": str(home / "results.npz")}
    (home / "job.json").write_text(json.dumps(job))
    keep = {
        key: os.environ[key] for key in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "TMPDIR") if key in os.environ
    }
    env = keep | {
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(home),
        **settings,
    }
    command = [sys.executable, "-I", str(SCRIPT), str(home / "job.json")]
    done = subprocess.run(command, cwd=home / "elsewhere", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(home / "results.npz") as arrays:
        return dict(arrays)
