"""A classifier or backbone as ONNX, compared with PyTorch before its folder has its name:

    python -m training.export_onnx --checkpoint checkpoints/anyecg-small-statements --output FOLDER [--int8]

`FOLDER` holds one graph, `model.onnx`, with `last_hidden_state` (batch, leads, patches, hidden size) and `pooler_output` (batch,
hidden size), and of a classifier `logits` (batch, labels); records, leads and seconds of any number. `--int8` adds
`model.int8.onnx`, whose matrix products take 8-bit weights and round their inputs to 8 bits as they come. Beside them
`model.json` (labels, thresholds, inputs and outputs with units, versions, what the comparison found) and the feature
extractor: filtering and resampling stay in Python, where they need NumPy and SciPy, no torch.

A graph that differs from PyTorch by more than 1e-4 is refused; nothing half-written is left.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.leads import LEAD_IDS
from anyecg_hf.modeling_anyecg import AnyECGModel, masked_mean
from anyecg_hf.modeling_anyecg_heads import AnyECGForSequenceClassification
from anyecg_hf.simulate import simulate_record

from .checkpointing import CONFIG, flush_and_sum, load_extractor, unfinished_folder, write_json
from .commands import run_command
from .inference import INPUT_NAMES
from .labels import MULTI, SINGLE
from .run_inputs import describe_software, model_sha256

logger = logging.getLogger(__name__)

FLOAT, INT8, FACTS = "model.onnx", "model.int8.onnx", "model.json"
TOLERANCE = 1e-4
OPSET = 20
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
CLASSES = {
    "AnyECGForSequenceClassification": AnyECGForSequenceClassification,
    "AnyECGModel": AnyECGModel,
    "AnyECGForMaskedCodeModeling": AnyECGModel,  # its codes serve pretraining alone
}
SCORES = {MULTI: "sigmoid", SINGLE: "softmax", "regression": "none: logits are values"}


class OnnxGraph(nn.Module):
    """What is exported: a model whose outputs are a tuple, in the order of `output_names`."""

    def __init__(self, model: AnyECGModel | AnyECGForSequenceClassification):
        super().__init__()
        self.model = model
        self.is_classifier = isinstance(model, AnyECGForSequenceClassification)
        self.output_names = ["logits"] * self.is_classifier + ["pooler_output", "last_hidden_state"]

    def forward(self, input_values, lead_ids, attention_mask):
        outputs = self.model(input_values, lead_ids, attention_mask, output_hidden_states=True)
        states = outputs.hidden_states[-1]  # (B, L, P, D)
        pooled = masked_mean(states, (lead_ids > 0)[..., None] & attention_mask.bool())
        return (outputs.logits, pooled, states) if self.is_classifier else (pooled, states)


def load_graph(checkpoint: str | Path, *, attn_implementation: str | None = None) -> OnnxGraph:
    """Return the graph of a checkpoint's folder, in evaluation mode.

    Raises:
        ValueError: the folder holds no model, or one of a class that is not exported.
    """
    path = Path(checkpoint) / CONFIG
    if not path.is_file():
        raise ValueError(f"--checkpoint {checkpoint}: there is no {CONFIG}. Give the folder of a checkpoint.")
    name = (json.loads(path.read_text()).get("architectures") or ["no class"])[0]
    if name not in CLASSES:
        raise ValueError(
            f"--checkpoint {checkpoint} holds {name}; exported are {', '.join(CLASSES)}. Other heads run in PyTorch, or "
            "by torch.export (docs/deployment.md)."
        )
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    return OnnxGraph(CLASSES[name].from_pretrained(checkpoint, **options)).eval()


def write_graph(graph: OnnxGraph, path: Path) -> None:
    """Write the ONNX graph, the numbers of records, leads and patches open. Its model must run "sdpa" or "eager"."""
    batch, leads = torch.export.Dim("batch", min=1), torch.export.Dim("leads", min=1)
    config = graph.model.config
    patches = torch.export.Dim("patches", min=1, max=config.max_patches)
    axes = (
        {0: batch, 1: leads, 2: config.patch_size * patches},
        {0: batch, 1: leads},
        {0: batch, 1: leads, 2: patches},
    )
    example = (  # no size 1: it would be taken for fixed
        torch.zeros(2, 3, 2 * config.patch_size),
        torch.ones(2, 3, dtype=torch.long),
        torch.ones(2, 3, 2, dtype=torch.long),
    )
    with _without_notes():
        program = torch.onnx.export(
            graph,
            example,
            dynamic_shapes=axes,
            input_names=list(INPUT_NAMES),
            output_names=graph.output_names,
            opset_version=OPSET,
            verbose=False,
            custom_translation_table={torch.ops.aten.linalg_vector_norm.default: _root_of_squares},
        )
        for node in program.model.graph:
            node.metadata_props.clear()  # the lines of code it comes from, by their paths on this machine
        program.save(path, external_data=False)


def _root_of_squares(x, ord: float = 2.0, dim: Sequence[int] = (-1,), keepdim: bool = False, dtype: int = -1):
    """The length of `x` along `dim`. onnxruntime's own, ReduceL2, adds one by one: off by 2e-5 on a lead of two minutes."""
    from onnxscript import opset20 as op

    return op.Sqrt(op.ReduceSum(op.Mul(x, x), dim, keepdims=keepdim))


def write_int8(source: Path, target: Path) -> None:
    """Write the graph with weights of matrix products in 8 bits, what they are multiplied with rounded while it runs.

    Unsigned weights: signed ones overflow, silently, on processors without VNNI. No convolutions: they hold a thirtieth of
    the weights, and are not faster so.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    del model.graph.value_info[:]  # shapes of weights that are transposed below: older versions of onnx trip over them
    onnx.save(model, target)
    with _without_notes():
        quantize_dynamic(target, target, op_types_to_quantize=["MatMul"], weight_type=QuantType.QUInt8)


def open_session(path: str | Path, *, num_threads: int = 0):
    """Return an `onnxruntime.InferenceSession` on the CPU; 0 threads: as many as there are cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_session(session, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the outputs by name for a batch of the feature extractor, as arrays."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: np.asarray(batch[name]) for name in INPUT_NAMES}), strict=True))


def ragged_batches(extractor: AnyECGFeatureExtractor, max_patches: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of simulated records: alone and together, of one lead and all, a patch and `max_patches`, with gaps."""
    leads, most = list(extractor.lead_names), max_patches
    for seed, shapes in enumerate(
        (
            [(len(leads), min(10, most))],
            [(len(leads), min(10, most)), (min(3, len(leads)), min(4, most)), (1, min(7, most))],
            [(1, 1)],
            [(min(2, len(leads)), most), (len(leads), 1)],
        )
    ):
        items = [_simulate_item(extractor, leads[:number], patches, seed) for number, patches in shapes]
        yield dict(extractor.pad(items))
    items[0]["attention_mask"][:, ::2] = 0  # gaps
    items[-1]["attention_mask"][:] = 0  # nothing usable
    items[0]["lead_ids"][-1] = 0  # a row that is padding
    yield dict(extractor.pad(items))


def _simulate_item(extractor, leads, num_patches, seed):
    """Return a simulated record cut or repeated to a number of patches, unbatched."""
    seconds = num_patches * extractor.patch_size / extractor.sampling_rate
    record = simulate_record(seed, sampling_rate=500, duration_seconds=max(seconds, 2.0), lead_names=leads)
    (item,) = extractor.items(record)
    samples = num_patches * extractor.patch_size
    return {
        "input_values": item["input_values"][:, :samples],
        "lead_ids": item["lead_ids"],
        "attention_mask": item["attention_mask"][:, :num_patches],
    }


def largest_differences(path: Path, graph: OnnxGraph, batches: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Return, for each output, by how much onnxruntime differs from PyTorch at most; infinite where it is not finite."""
    session = open_session(path)
    largest = dict.fromkeys(graph.output_names, 0.0)
    for batch in batches:
        with torch.no_grad():
            expected = graph(*(torch.from_numpy(batch[name]) for name in INPUT_NAMES))
        found = run_session(session, batch)
        for name, value in zip(graph.output_names, expected, strict=True):
            difference = np.abs(found[name] - value.numpy()).max()
            largest[name] = max(largest[name], float(np.nan_to_num(difference, nan=np.inf)))
    return largest


def describe(checkpoint: str | Path, graph: OnnxGraph, extractor: AnyECGFeatureExtractor) -> dict:
    """Return what whoever runs the graph must know: labels, thresholds, inputs and outputs, where it comes from."""
    config = graph.model.config
    facts = {
        "checkpoint": Path(checkpoint).resolve().name,
        "checkpoint_sha256": model_sha256(checkpoint),
        "class": type(graph.model).__name__,
    }
    if graph.is_classifier:
        facts |= {
            "problem_type": config.problem_type,
            "score": SCORES.get(config.problem_type),  # of the logits; a temperature is folded into their weights
            "labels": [config.id2label[index] for index in range(config.num_labels)],
            "thresholds": config.thresholds,
        }
    states = ["batch", "leads", "patches", config.hidden_size]
    outputs = {"logits": ["batch", config.num_labels], "pooler_output": ["batch", config.hidden_size]}
    return facts | {
        "inputs": {
            "input_values": {
                "shape": ["batch", "leads", f"{config.patch_size} * patches"],
                "dtype": "float32",
                "unit": "mV",
                "sampling_rate": config.sampling_rate,
                "max_patches": config.max_patches,
            },
            "lead_ids": {"shape": ["batch", "leads"], "dtype": "int64", "values": {"padding": 0, **LEAD_IDS}},
            "attention_mask": {
                "shape": ["batch", "leads", "patches"],
                "dtype": "int64",
                "values": {"real": 1, "padded, absent or unusable": 0},
            },
        },
        "outputs": {name: (outputs | {"last_hidden_state": states})[name] for name in graph.output_names},
        "preprocessing": f"preprocessor_config.json, by {type(extractor).__name__}",
        "opset": OPSET,
        "software": describe_software() | {name: version(name) for name in PACKAGES},
    }


def export(checkpoint: str | Path, output: str | Path, *, int8: bool = False) -> dict:
    """Write a folder with the graph of a checkpoint, checked, and return the facts of its `model.json`.

    Raises:
        ValueError: `output` exists, the checkpoint cannot be exported, or onnxruntime does not give what PyTorch gives.
        ImportError: the packages of the extra `onnx` are not installed.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"--output {output} exists: give the name of a new folder, or remove it.")
    _require_packages()
    graph = load_graph(checkpoint)
    extractor = load_extractor(checkpoint)
    batches = list(ragged_batches(extractor, graph.model.config.max_patches))
    needed = 2 * sum(weight.numel() * weight.element_size() for weight in graph.parameters())
    with unfinished_folder(output.parent, output.name, needed=needed) as folder:
        write_graph(load_graph(checkpoint, attn_implementation="sdpa"), folder / FLOAT)
        differences = {FLOAT: largest_differences(folder / FLOAT, graph, batches)}
        if max(differences[FLOAT].values()) > TOLERANCE:
            raise ValueError(f"onnxruntime differs from PyTorch by {differences[FLOAT]}; accepted is {TOLERANCE:g}.")
        if int8:
            write_int8(folder / FLOAT, folder / INT8)
            differences[INT8] = largest_differences(folder / INT8, graph, batches)
        extractor.save_pretrained(folder)
        sums = flush_and_sum(folder)
        facts = describe(checkpoint, graph, extractor) | {
            "largest_difference_from_pytorch": differences,
            "files": {name: sums[name] for name in differences},
        }
        write_json(folder / FACTS, facts)
        folder.rename(output)
    return facts


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'ONNX needs {", ".join(missing)}: pip install "anyecg-hf[onnx]"')


@contextmanager
def _without_notes() -> Iterator[None]:
    """Keep from the log what exporter and quantizer say of their own workings; errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a classifier or backbone")
    parser.add_argument("--output", required=True, help="folder to write; it must not exist")
    parser.add_argument("--int8", action="store_true", help="also write a graph with 8-bit weights")
    args = parser.parse_args(argv)
    facts = export(args.checkpoint, args.output, int8=args.int8)
    for name, differences in facts["largest_difference_from_pytorch"].items():
        found = ", ".join(f"{output} {value:.1e}" for output, value in differences.items())
        logger.info("%s: %.1f MB; differs from PyTorch at most: %s", name, facts["files"][name]["size"] / 1e6, found)


if __name__ == "__main__":
    run_command(main)
