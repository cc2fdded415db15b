"""The notebooks of `examples/`: each is run, and what is committed with it is what a run gives."""

import base64
import json
import os
import re
from pathlib import Path

import pytest
from elsewhere import LOCAL_FOLDERS_ARE_WHOLE

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install anyecg-hf[plot]")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install anyecg-hf[dev]")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
MAX_BYTES = 1_000_000
PNG = b"\x89PNG\r\n\x1a\n"


def outputs_of(notebook):
    return [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kinds(outputs):
    """What kind of output a cell has; text that is printed piece by piece is one."""
    return list(dict.fromkeys((each["output_type"], *sorted(each.get("data", ()))) for each in outputs))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_run_gives_outputs_as_they_are_committed(monkeypatch, path):
    if path.stem == "push_to_hub" and not LOCAL_FOLDERS_ARE_WHOLE:
        pytest.skip("pushing needs Transformers 5.10")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from execute_notebooks import execute

    committed = json.loads(path.read_text())
    for found, expected in zip(outputs_of(execute(path)), outputs_of(committed), strict=True):
        assert kinds(found) == kinds(expected)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_of_one_run_with_pictures_and_names_no_folder_of_a_machine(path):
    text = path.read_text()
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not any(output.get("name") == "stderr" or output["output_type"] == "error" for output in outputs)
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures and all(base64.b64decode(picture).startswith(PNG) for picture in pictures)
    shown = json.dumps([output for output in outputs if "image/png" not in output.get("data", {})])
    assert not re.search(r"/(home|root|tmp|work|Users)/|[A-Z]:\\\\", shown)
    assert os.path.getsize(path) < MAX_BYTES


def test_each_notebook_says_what_it_shows_and_that_records_are_simulated():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        words = [
            "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"
        ]
        assert words[0].startswith("# ") and "simulated" in " ".join(words)
