"""The README does what it says: each Python block runs by itself, each command and each link is there."""

import importlib.util
import re
from pathlib import Path

import pytest
from transformers import pipeline

from anyecg_hf.simulate import simulate_record

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def _shell_lines(beginning):
    return [line for block in _blocks("sh") for line in block.splitlines() if line.startswith(beginning)]


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """A folder as a reader has it: the clone's checkpoints, and a recording of one's own, `my_record`."""
    wfdb = pytest.importorskip("wfdb")
    record = simulate_record(seed=5, sampling_rate=500)
    wfdb.wrsamp(
        "my_record",
        fs=record.sampling_rate,
        units=["mV"] * len(record.lead_names),
        sig_name=record.lead_names,
        p_signal=record.signal.T.astype("float64"),
        fmt=["16"] * len(record.lead_names),
        write_dir=str(tmp_path),
    )
    (tmp_path / "my_table.csv").write_text("path,label\nmy_record,normal\nmy_record.hea,abnormal\n")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "block",
    [each for each in _blocks("python") if "my_table.csv" not in each],
    ids=lambda block: block.strip().splitlines()[-1].strip()[:30],
)
def test_python_block_of_the_readme_runs_by_itself(readers_folder, block):
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_the_first_prediction_takes_at_most_ten_lines():
    assert len([line for line in _blocks("python")[0].splitlines() if line.strip()]) <= 10


def test_ones_own_table_takes_under_twenty_lines_and_ends_as_a_classifier(readers_folder):
    (block,) = (block for block in _blocks("python") if "my_table.csv" in block)
    assert len([line for line in block.splitlines() if line.strip()]) < 20
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    findings = pipeline("ecg-classification", model="my-classifier")("my_record")
    assert {finding["label"] for finding in findings} == {"normal", "abnormal"}


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert _shell_lines("make ")
    for line in _shell_lines("make "):
        assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE), line


def test_modules_and_recipes_of_the_readme_exist():
    lines = _shell_lines("python -m") + _shell_lines("accelerate launch")
    assert lines
    for line in lines:
        module, first = line.split("-m ")[1].split()[:2]
        assert importlib.util.find_spec(module) is not None, line
        assert first.startswith("--") or (ROOT / first).is_file(), line


def test_local_links_of_the_readme_and_the_docs_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
