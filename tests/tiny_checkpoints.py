"""Tiny seeded models and records on disk, for the tests of extractors, pipelines and exported checkpoints."""

import shutil
from types import SimpleNamespace

import torch
import wfdb
from huggingface_hub import ModelCard
from transformers.utils import hub

from anyecg_hf.configuration_anyecg import AnyECGConfig, AnyECGQuantizerConfig
from anyecg_hf.modeling_anyecg_heads import AnyECGForSequenceClassification
from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer

LABELS = {0: "NORM", 1: "AFIB", 2: "PVC", 3: "LVH"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tiny_model(model_class=AnyECGForSequenceClassification, seed=0, **overrides):
    """Return a model of about 0.1 M parameters in evaluation mode, its weights large enough for records to differ."""
    options = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
        "layer_scale_init": 1.0,
        "stem_channels": [8, 8, 8, 8],
        "waveform_channels": [8, 8],
    }
    if model_class is AnyECGForSequenceClassification:
        options |= {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
        options |= {"problem_type": "multi_label_classification"}
    return _built(model_class, AnyECGConfig.from_preset("tiny", **{**options, **overrides}), seed)


def tiny_quantizer(seed=0, **overrides):
    options = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "codebook_size": 64,
        "initializer_range": 0.2,
        "layer_scale_init": 1.0,
    }
    return _built(AnyECGRhythmQuantizer, AnyECGQuantizerConfig.from_preset("tiny", **{**options, **overrides}), seed)


def _built(model_class, config, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def write_record(record, folder, name):
    """Write a `Record` as WFDB files and return its path without suffix."""
    wfdb.wrsamp(
        name,
        fs=record.sampling_rate,
        units=["mV"] * len(record.lead_names),
        sig_name=list(record.lead_names),
        p_signal=record.signal.T.astype("float64"),
        fmt=["16"] * len(record.lead_names),
        write_dir=str(folder),
    )
    return folder / name


def put_into_hub_cache(folder, cache, repo_id, commit=COMMIT, branch="main"):
    """Lay a saved checkpoint into a Hub cache as a download would leave it there."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / branch).write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)


def catch_pushes(monkeypatch, folder):
    """Let `push_to_hub` write into `folder` what it would upload. Cut at the client's two calls; no server is asked."""

    def create_repo(repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(repo_id, operations, **kwargs):
        target = folder / repo_id
        target.mkdir(parents=True, exist_ok=True)
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, target / operation.path_in_repo)

    client = SimpleNamespace(create_repo=create_repo, create_commit=create_commit)
    if hasattr(hub, "hf_api"):
        monkeypatch.setattr(hub, "hf_api", lambda: client)
    else:  # older Transformers imports the functions
        monkeypatch.setattr(hub, "create_repo", create_repo)
        monkeypatch.setattr(hub, "create_commit", create_commit)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("---\ntags: []\n---\n"))
