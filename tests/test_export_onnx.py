"""training/export_onnx.py: the graph gives what the model gives, its folder says how to run it, the rest is refused."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from model_cases import CLASSIFIER, MASKED_CODES, QUANTIZER, make_batch, make_model
from tiny_checkpoints import write_record
from transformers import pipeline

import training.export_onnx
from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.hub import export_checkpoint
from anyecg_hf.leads import LEAD_IDS
from anyecg_hf.modeling_anyecg import AnyECGModel
from anyecg_hf.modeling_anyecg_heads import AnyECGForSequenceClassification
from anyecg_hf.simulate import simulate_record
from training.export_onnx import FACTS, FLOAT, INT8, PACKAGES, main, open_session, run_session
from training.inference import INPUT_NAMES

for package in PACKAGES:
    pytest.importorskip(package, reason=f'ONNX needs {package}: pip install "anyecg-hf[onnx]"')
import onnx  # noqa: E402

# the whole pattern: other leads a patch away, the own lead three patches away, so that some queries have no key
WINDOW = {"time_tolerance": 1, "lead_window": 3}
GRIDS = [(1, 1, 1), (1, 12, 10), (3, 2, 7), (5, 12, 16)]


def _save(case, folder, **overrides):
    return export_checkpoint(make_model(case, num_hidden_layers=1, **overrides), AnyECGFeatureExtractor(), folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "classifier"
    return _save(CLASSIFIER, folder, sparse_attention_config=WINDOW)


@pytest.fixture(scope="module")
def exported(classifier):
    """The folder that the command writes for the classifier, 8 bits too."""
    main(["--checkpoint", str(classifier), "--output", str(classifier.parent / "onnx"), "--int8"])
    return classifier.parent / "onnx"


def _ragged(sizes, seed):
    """A batch whose records have leads in another order each, lack leads, end early and have gaps."""
    batch, generator = make_batch(*sizes, seed=seed), torch.Generator().manual_seed(seed)
    num_records, num_leads, num_patches = sizes
    for row in range(num_records):
        batch["lead_ids"][row] = torch.randperm(12, generator=generator)[:num_leads] + 1
        batch["lead_ids"][row, num_leads - row % num_leads :] = 0
        batch["attention_mask"][row, :, num_patches - row % num_patches :] = 0
    if num_patches > 6:
        batch["attention_mask"][0, 0, :5] = 0
    batch["attention_mask"][-1, -1] = 0
    return batch


@torch.no_grad()
def _expected(folder, batch):
    outputs = AnyECGModel.from_pretrained(folder).eval()(**batch)
    expected = {"pooler_output": outputs.pooler_output, "last_hidden_state": outputs.last_hidden_state}
    if "classifier" in folder.name:
        expected["logits"] = AnyECGForSequenceClassification.from_pretrained(folder).eval()(**batch).logits
    return {name: value.numpy() for name, value in expected.items()}


def _assert_equal(session, folder, sizes):
    for seed in range(2):
        batch = _ragged(sizes, seed)
        found, expected = run_session(session, batch), _expected(folder, batch)
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.parametrize("sizes", GRIDS)
def test_onnxruntime_gives_what_the_classifier_gives_for_any_records_leads_and_lengths(exported, classifier, sizes):
    _assert_equal(open_session(exported / FLOAT), classifier, sizes)


def test_squares_of_a_long_lead_are_not_added_one_by_one(exported):
    """By onnxruntime's ReduceL2 the shipped classifier was off by 7e-5 on two minutes; records of these tests are short."""
    assert "ReduceL2" not in {node.op_type for node in onnx.load(exported / FLOAT).graph.node}


def test_of_a_backbone_the_states_and_their_mean_are_exported(exported, classifier, tmp_path, monkeypatch):
    """Its graph is cut out of the classifier's: to trace another one takes ten times as long as all tests of this file."""
    model = make_model(MASKED_CODES, num_hidden_layers=1, sparse_attention_config=WINDOW)
    model.anyecg.load_state_dict(AnyECGModel.from_pretrained(classifier).state_dict())
    folder = export_checkpoint(model, AnyECGFeatureExtractor(), tmp_path / "backbone")

    def cut_out(graph, path):
        onnx.utils.extract_model(exported / FLOAT, path, list(INPUT_NAMES), graph.output_names)

    monkeypatch.setattr(training.export_onnx, "write_graph", cut_out)
    main(["--checkpoint", str(folder), "--output", str(tmp_path / "onnx")])
    _assert_equal(open_session(tmp_path / "onnx" / FLOAT), folder, GRIDS[-1])
    facts = json.loads((tmp_path / "onnx" / FACTS).read_text())
    assert facts["class"] == "AnyECGModel" and "labels" not in facts
    assert list(facts["outputs"]) == ["pooler_output", "last_hidden_state"]


def test_eight_bits_are_close_and_take_less_room(exported):
    batch = _ragged((3, 4, 6), seed=5)
    whole, rounded = (run_session(open_session(exported / name), batch)["logits"] for name in (FLOAT, INT8))
    assert 0 < np.abs(rounded - whole).max() < 0.1 * np.abs(whole).max()
    assert (exported / INT8).stat().st_size < 0.8 * (exported / FLOAT).stat().st_size
    assert json.loads((exported / FACTS).read_text())["largest_difference_from_pytorch"][INT8]["logits"] > 0


def test_the_folder_says_what_the_graph_takes_and_gives_and_names_no_folder_of_this_machine(exported, classifier):
    facts, session = json.loads((exported / FACTS).read_text()), open_session(exported / FLOAT)
    config = AnyECGForSequenceClassification.from_pretrained(classifier).config
    assert facts["labels"] == list(config.id2label.values()) and facts["thresholds"] == config.thresholds
    assert facts["score"] == "sigmoid" and facts["inputs"]["input_values"]["sampling_rate"] == 300
    assert facts["inputs"]["lead_ids"]["values"] == {"padding": 0, **LEAD_IDS}
    assert list(facts["inputs"]) == [each.name for each in session.get_inputs()]
    for output in session.get_outputs():
        assert facts["outputs"][output.name] == output.shape
    for name, listed in facts["files"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == listed["sha256"]
    for path in exported.iterdir():
        assert str(ROOT).encode() not in path.read_bytes() and str(exported.parent).encode() not in path.read_bytes()


def test_the_lines_of_the_page_give_what_the_pipeline_gives_without_torch(exported, classifier, tmp_path):
    (block,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs/deployment.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    record = write_record(simulate_record(seed=5, sampling_rate=500, duration_seconds=14), tmp_path, "my_record")
    shutil.copytree(exported, tmp_path / "onnx")
    (tmp_path / "page.py").write_text(
        "import sys\nsys.modules['torch'] = None\nimport importlib.util as i\nfind = i.find_spec\n"
        "i.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        f"{block}\nnp.save('scores.npy', scores)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = {each["label"]: each for each in pipeline("ecg-classification", model=str(classifier))(str(record))}
    labels = json.loads((exported / FACTS).read_text())["labels"]
    found = np.load(tmp_path / "scores.npy")
    assert found == pytest.approx([expected[label]["score"] for label in labels], abs=1e-4)
    positive = [label for label in labels if expected[label]["positive"]]
    assert [line.split()[0] for line in done.stdout.splitlines()] == positive


def test_a_graph_that_differs_from_pytorch_is_refused_and_nothing_is_left(exported, tmp_path, monkeypatch):
    other = _save(CLASSIFIER, tmp_path / "classifier", seed=1, sparse_attention_config=WINDOW)
    monkeypatch.setattr(training.export_onnx, "write_graph", lambda graph, path: shutil.copy(exported / FLOAT, path))
    with pytest.raises(ValueError, match="differs from PyTorch by .*logits"):
        main(["--checkpoint", str(other), "--output", str(tmp_path / "onnx")])
    assert [path.name for path in tmp_path.iterdir()] == ["classifier"]


def test_what_cannot_be_exported_is_refused_by_name(exported, classifier, tmp_path, monkeypatch):
    make_model(QUANTIZER).save_pretrained(tmp_path / "quantizer")
    for checkpoint, output, message in (
        (classifier, exported, "--output .*onnx exists"),
        (tmp_path, tmp_path / "new", "there is no config.json"),
        (tmp_path / "quantizer", tmp_path / "new", "holds AnyECGRhythmQuantizer; exported are AnyECGForSequence"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["--checkpoint", str(checkpoint), "--output", str(output)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(ImportError, match=r"needs onnxruntime: pip install .anyecg-hf\[onnx\]"):
        main(["--checkpoint", str(classifier), "--output", str(tmp_path / "new")])
