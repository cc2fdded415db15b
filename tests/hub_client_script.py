"""Run by `test_push_to_hub.py` in a process with the package, as a user's own: pushes by the library's calls, then loads.

    python hub_client_script.py job.json

What was found is printed as JSON, in the last line.
"""

import json
import runpy
import sys

import torch
from huggingface_hub import HfApi
from tiny_checkpoints import tiny_model, tiny_quantizer
from transformers import AutoFeatureExtractor, AutoModelForSequenceClassification, Trainer, TrainingArguments, pipeline

import anyecg_hf
from anyecg_hf.simulate import simulate_record

JOB = json.load(open(sys.argv[1], encoding="utf-8"))
FOUND = {}


def main():
    extractor = anyecg_hf.AnyECGFeatureExtractor()
    command()
    tiny_model().push_to_hub("clinic/plain")
    extractor.push_to_hub("clinic/plain")
    anyecg_hf.AnyECGRhythmFeatureExtractor(quantizer=tiny_quantizer()).push_to_hub("clinic/rhythm")
    pipeline("ecg-classification", model=tiny_model(), feature_extractor=extractor).push_to_hub(
        "clinic/pipe", private=True, revision="dev"
    )
    train(extractor)
    load()


def command():
    """Push as `python -m training.push_to_hub` does, then spoil main."""
    sys.argv[1:] = JOB["command"]
    runpy.run_module("training.push_to_hub", run_name="__main__")
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=JOB["repo"])


def train(extractor):
    """Let the library's own Trainer push at a save and at the end, with the token where it ends in training_args.bin."""
    args = TrainingArguments(
        "trained", max_steps=1, save_steps=1, per_device_train_batch_size=2, push_to_hub=True, hub_model_id="clinic/trained",
        hub_token=JOB["token"], hub_always_push=True, remove_unused_columns=False, report_to="none", use_cpu=True,
    )  # fmt: skip
    batch = extractor([simulate_record(seed, duration_seconds=2) for seed in range(2)], return_tensors="pt")

    def collate(rows):
        return {**batch, "labels": torch.zeros(2, 4)}

    trainer = Trainer(
        tiny_model(), args, train_dataset=[{"row": 0}, {"row": 1}], data_collator=collate, processing_class=extractor
    )
    trainer.train()
    trainer.push_to_hub()
    with open("trained/training_args.bin", "rb") as file:
        FOUND["token in training_args.bin"] = JOB["token"].encode() in file.read()


def load():
    """Load what `training.push_to_hub` has pushed, by Auto class and pipeline, at a tag; and what is not there."""
    checkpoint = {"pretrained_model_name_or_path": JOB["repo"], "revision": JOB["tag"]}
    model, extractor = (
        each.from_pretrained(**checkpoint) for each in (AutoModelForSequenceClassification, AutoFeatureExtractor)
    )
    with torch.no_grad():
        FOUND["logits"] = model(
            **extractor(simulate_record(1, duration_seconds=12), return_tensors="pt")
        ).logits.tolist()
    classify = pipeline("ecg-classification", model=JOB["repo"], revision=JOB["tag"])
    FOUND["labels"] = sorted(each["label"] for each in classify(simulate_record(1)))
    FOUND["deviations"] = anyecg_hf.verify(JOB["repo"], revision=JOB["tag"])
    for name, options in JOB["refused"].items():
        try:
            anyecg_hf.verify(**options)
        except (OSError, ValueError) as error:
            FOUND[name] = str(error)


if __name__ == "__main__":
    main()
    print(json.dumps(FOUND))
