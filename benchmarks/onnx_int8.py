"""What 8-bit weights cost a classifier: AUROC on fold 9 of PTB-XL in PyTorch, in onnxruntime, in onnxruntime with 8 bits.

    python -m benchmarks.onnx_int8 --checkpoint checkpoints/anyecg-small-statements --data DIR [--out benchmarks/results]

The same batches of 32 go through all three on one thread, in turns; milliseconds are of processor time, of the pass alone. The
loss has a 95 % interval of a paired bootstrap over patients. Needs the extra `onnx`. Writes `onnx_int8.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from training.checkpointing import load_extractor, write_json
from training.classifier_report import Predictions
from training.collate import ECGCollator
from training.data import DataArguments, ECGDataset, list_sources, load_folds, with_task
from training.ecg_metrics.patient_bootstrap import intervals_of
from training.evaluate import task_of
from training.export_onnx import FLOAT, INT8, export, open_session, run_session
from training.inference import INPUT_NAMES
from training.splits import VALIDATION_FOLDS

PYTORCH = "pytorch"
FIGURES = ("macro_auroc", "superclass_auroc")


@torch.inference_mode()
def predict_all(runs: dict, loader: DataLoader) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return the logits `(records, labels)` and the milliseconds of processor time a record, each by the name of the run."""
    logits, seconds = {name: [] for name in runs}, dict.fromkeys(runs, 0.0)
    for batch in tqdm(loader, mininterval=10):
        inputs = {name: batch[name] for name in INPUT_NAMES}
        for name, run in runs.items():
            start = time.process_time()
            logits[name].append(np.asarray(run(inputs)))
            seconds[name] += time.process_time() - start
    logits = {name: np.concatenate(parts) for name, parts in logits.items()}
    return logits, {name: 1e3 * spent / len(logits[name]) for name, spent in seconds.items()}


def losses(before: Predictions, after: Predictions, num_resamples: int) -> dict:
    """Return by how much figures fall from `before` to `after`, of the same records, with 95 % intervals over patients."""

    def differences(indices):
        first, second = before.take(indices).figures(), after.take(indices).figures()
        return {name: first[name] - second[name] for name in FIGURES}

    return {
        **differences(np.arange(len(before))),
        "intervals_95": intervals_of(before.patients, differences, num_resamples=num_resamples),
    }


def compare(model, records: ECGDataset, logits: dict[str, np.ndarray], num_resamples: int) -> dict:
    """Return the figures of each run, how far its scores and findings are from PyTorch's, and what 8 bits lose."""
    task, patients, thresholds = task_of(model.config), records.column("patient_id"), model.config.thresholds
    predictions = {
        name: Predictions(task, each, records.targets, patients, thresholds) for name, each in logits.items()
    }
    scores = {name: each.probabilities for name, each in predictions.items()}
    findings = {name: each >= np.array(thresholds) for name, each in scores.items()}
    runs = {}
    for name, each in predictions.items():
        figures = each.figures()
        runs[name] = {
            **{figure: figures[figure] for figure in FIGURES},
            "largest_difference_of_logits": float(np.abs(logits[name] - logits[PYTORCH]).max()),
            "mean_difference_of_scores": float(np.abs(scores[name] - scores[PYTORCH]).mean()),
            "findings": int(findings[name].sum()),
            "findings_changed": int((findings[name] != findings[PYTORCH]).sum()),
        }
    loss = losses(predictions[FLOAT], predictions[INT8], num_resamples)
    return {"num_records": len(records), "num_resamples": num_resamples, "runs": runs, "loss_by_8_bits": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a classifier of statements")
    parser.add_argument("--data", nargs="+", required=True, help="PTB-XL, as for the training commands")
    parser.add_argument("--bootstrap", type=int, default=200, help="resamples of patients")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForSequenceClassification.from_pretrained(args.checkpoint).eval()
    extractor, data_args = load_extractor(args.checkpoint), DataArguments(data=args.data)
    records = load_folds(list_sources(data_args), extractor, VALIDATION_FOLDS, args=data_args)
    records = with_task(records, task_of(model.config))
    loader = DataLoader(records, batch_size=32, collate_fn=ECGCollator(extractor))
    with tempfile.TemporaryDirectory() as folder:
        files = export(args.checkpoint, Path(folder) / "onnx", int8=True)["files"]
        sessions = {name: open_session(Path(folder) / "onnx" / name, num_threads=1) for name in (FLOAT, INT8)}
        runs = {PYTORCH: lambda batch: model(**batch).logits}
        runs |= {name: lambda batch, s=session: run_session(s, batch)["logits"] for name, session in sessions.items()}
        logits, milliseconds = predict_all(runs, loader)
    report = compare(model, records, logits, args.bootstrap)
    for name, run in report["runs"].items():
        run |= {"milliseconds_a_record": milliseconds[name], "bytes": files.get(name, {}).get("size")}
    report["command"] = f"python -m benchmarks.onnx_int8 --checkpoint {Path(args.checkpoint).as_posix()} --data DIR"
    write_json(args.out / "onnx_int8.json", report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
