"""From a table of files and labels to a model for `pipeline("ecg-classification")`, by the library's own Trainer:

    python examples/own_table.py TABLE.csv [--kind one|several|value] [--output FOLDER]

TABLE.csv has the columns `path` (a file that `read_record` knows, seen from the table's folder), `label` and, where patients have
several records, `patient`. `one`: one of several labels; `several`: any number of them, "AFIB;PVC"; `value`: a number, e.g. age.
A fifth of the patients is held out and told of in the last line. All that `training.finetune` does beyond this: docs/training.md.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForSequenceClassification, Trainer, TrainingArguments, pipeline

from anyecg_hf import read_record
from training.splits import TRAIN_FOLDS, folds_of
from training.thresholds import fold_in_scale

BACKBONE = Path(__file__).resolve().parent.parent / "checkpoints" / "anyecg-small"
KINDS = {"one": "single_label_classification", "several": "multi_label_classification", "value": "regression"}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="one")
    parser.add_argument("--output", default="my-model", help="folder of the model")
    parser.add_argument("--checkpoint", default=str(BACKBONE), help="folder or Hub name of a backbone")
    parser.add_argument("--epochs", type=float, default=5)
    args = parser.parse_args(arguments)
    train, held_out = read_table(args.table)
    names = names_of(train, args.kind)
    targets = np.stack([target_of(row, names, args.kind) for row in train])
    mean, std = (targets.mean(axis=0), targets.std(axis=0)) if args.kind == "value" else (0, 1)
    targets = torch.as_tensor((targets - mean) / std, dtype=torch.long if args.kind == "one" else torch.float32)

    extractor = AutoFeatureExtractor.from_pretrained(args.checkpoint)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    model = AutoModelForSequenceClassification.from_pretrained(
        args.checkpoint, new_head=True, problem_type=KINDS[args.kind], **labels
    )

    def collate(places):  # files are read when their turn comes
        inputs = extractor([read_record(train[place]["path"]) for place in places], return_tensors="pt")
        return {**inputs, "labels": targets[places]}

    options = TrainingArguments(
        args.output, num_train_epochs=args.epochs, learning_rate=5e-4, report_to="none", remove_unused_columns=False
    )
    Trainer(model, options, train_dataset=range(len(train)), data_collator=collate).train()
    if args.kind == "value":
        fold_in_scale(model.classifier, mean=mean, std=std)  # it learned standard deviations, and says years
    model.save_pretrained(args.output)
    extractor.save_pretrained(args.output)
    print(tell(pipeline("ecg-classification", model=args.output), held_out, args.kind))


def read_table(path):
    """Return the rows to train on and those held out, paths made whole; no patient is in both."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"path", "label"} <= set(rows[0]):
        raise SystemExit(f"{path} has the columns {list(rows[0]) if rows else []}; needed are path and label.")
    patients = [row.get("patient") or row["path"] for row in rows]
    folds = folds_of(patients)
    parts = [], []
    for row, patient in zip(rows, patients):
        parts[folds[patient] not in TRAIN_FOLDS].append({**row, "path": path.parent / row["path"]})
    return parts


def names_of(rows, kind):
    if kind == "value":
        return ["value"]
    return sorted(set().union(*({row["label"]} if kind == "one" else labels_of(row) for row in rows)))


def labels_of(row):
    return set(row["label"].split(";")) - {""}


def target_of(row, names, kind):
    if kind == "one":
        return names.index(row["label"])
    return [float(row["label"])] if kind == "value" else [float(name in labels_of(row)) for name in names]


def tell(classify, rows, kind):
    """Return a line on how near the model comes to the labels of `rows`."""
    results = classify([row["path"] for row in rows])
    if kind == "value":
        errors = [abs(result[0]["score"] - float(row["label"])) for result, row in zip(results, rows)]
        return f"held out: {len(rows)} records, values missed by {np.mean(errors):.3g} on average"
    found = [{finding["label"] for finding in result if finding["positive"]} for result in results]
    right = [labels == labels_of(row) for labels, row in zip(found, rows)]
    return f"held out: {len(rows)} records, all labels right for {np.mean(right):.0%}"


if __name__ == "__main__":
    main()
