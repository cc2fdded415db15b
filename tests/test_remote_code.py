"""`trust_remote_code=True` where the package cannot be imported: every Auto class, both extractors, every pipeline,
offline.

Real processes, isolated (`python -I`), in which importing `anyecg_hf` fails, with a Hub cache of their own. The first
loads what was exported here, and saves it again; the second loads what the first has saved.
"""

import numpy as np
import pytest
import torch
import transformers
from elsewhere import LOCAL_FOLDERS_ARE_WHOLE, run_elsewhere
from tiny_checkpoints import put_into_hub_cache, tiny_model, tiny_quantizer, write_record
from transformers import AutoFeatureExtractor, pipeline

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.feature_extraction_anyecg_rhythm import AnyECGRhythmFeatureExtractor
from anyecg_hf.hub import check_checkpoint, export_checkpoint
from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling, AnyECGModel
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction, AnyECGForSequenceClassification
from anyecg_hf.modeling_anyecg_long import AnyECGForLongRecords
from anyecg_hf.simulate import simulate_record

MODELS = {  # name: (model class, Auto class, output compared)
    "backbone": (AnyECGModel, "AutoModel", "last_hidden_state"),
    "pretraining": (AnyECGForMaskedCodeModeling, "AutoModelForPreTraining", "logits"),
    "classifier": (AnyECGForSequenceClassification, "AutoModelForSequenceClassification", "logits"),
    "reconstruction": (AnyECGForLeadReconstruction, "AutoModelForMaskedImageModeling", "reconstruction"),
    "long records": (AnyECGForLongRecords, "AutoModelForAudioFrameClassification", "logits"),
    "quantizer": (None, "AutoModel", "reconstruction"),
    "backbone of the classifier": (None, "AutoModel", "last_hidden_state"),
}
TASKS = {
    "ecg-classification": "classifier",
    "ecg-reconstruction": "reconstruction",
    "ecg-feature-extraction": "backbone",
    "ecg-long-record": "long records",
}
HUB_ID = "someone/any-ecg.tiny"  # a hyphen and a dot: both are rewritten in the name of the module


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def folders(root):
    """Exported checkpoints, by name."""
    found = {}
    for name, (model_class, *_) in MODELS.items():
        if model_class is not None:
            found[name] = export_checkpoint(tiny_model(model_class), AnyECGFeatureExtractor(), root / name)
    quantizer = tiny_quantizer()
    extractor = AnyECGRhythmFeatureExtractor(quantizer=quantizer)
    found["quantizer"] = export_checkpoint(quantizer, extractor, root / "quantizer")
    return {**found, "backbone of the classifier": found["classifier"]}


@pytest.fixture(scope="module")
def record():
    return simulate_record(1, duration_seconds=12)


@pytest.fixture(scope="module")
def path(record, root):
    return str(write_record(record, root, "r1"))


@pytest.fixture(scope="module")
def expected(folders, record, path):
    """What the same folders give here, by the classes of the package."""
    found = {}
    for name, (_, auto_class, output) in MODELS.items():
        model = getattr(transformers, auto_class).from_pretrained(folders[name])
        assert type(model).__module__.startswith("anyecg_hf.")
        batch = AutoFeatureExtractor.from_pretrained(folders[name])(record, return_tensors="pt")
        codes = batch.pop("rhythm_codes", None)
        found |= {"codes": codes.numpy()} if codes is not None else {}
        with torch.no_grad():
            found[name] = getattr(model(**batch), output).numpy()
    for task, name in TASKS.items():
        result = pipeline(task, model=str(folders[name]))(path)
        found[task] = {
            "ecg-classification": lambda it: np.array([each["score"] for each in it]),
            "ecg-reconstruction": lambda it: it["signal"],
            "ecg-long-record": lambda it: np.stack(list(it["second_scores"].values())),
        }.get(task, np.asarray)(result)
    return found


def source(folder, home, name):
    """Return what loads `folder` in the process whose cache is in `home`: its path, with an old library a Hub id."""
    if LOCAL_FOLDERS_ARE_WHOLE:
        return str(folder)
    repo_id = f"someone/{name.replace(' ', '-')}"
    put_into_hub_cache(folder, home / "hub", repo_id)
    return repo_id


@pytest.fixture(scope="module")
def record_file(record, root):
    arrays = {"signal": record.signal, "sampling_rate": record.sampling_rate, "lead_names": record.lead_names}
    np.savez(root / "record.npz", **arrays)
    return str(root / "record.npz")


@pytest.fixture(scope="module")
def loaded(root, folders, path, record_file):
    """Results of the process that loads the exports by folder, the classifier also by Hub id; it saves some again."""
    home = root / "first home"
    put_into_hub_cache(folders["classifier"], home / "hub", HUB_ID)
    sources = {name: source(folders[name], home, name) for name in MODELS}
    models = {
        name: {"folder": sources[name], "auto_class": auto_class, "output": output}
        for name, (_, auto_class, output) in MODELS.items()
    }
    models["classifier by Hub id"] = {**models["classifier"], "folder": HUB_ID}
    pipelines = {task: {"task": task, "folder": sources[name], "input": path} for task, name in TASKS.items()}
    pipelines["pipeline by Hub id"] = {**pipelines["ecg-classification"], "folder": HUB_ID}
    job = {
        "record": record_file,
        "models": models,
        "extractors": {"codes": {"folder": sources["quantizer"]}},
        "pipelines": pipelines,
        "save_models_to": {name: str(root / f"again {name}") for name in ("classifier", "classifier by Hub id")},
        "save_extractors_to": {"codes": str(root / "again codes")},
        "save_pipelines_to": {"ecg-classification": str(root / "again pipeline")},
    }
    return run_elsewhere(root, "first", job)


@pytest.fixture(scope="module")
def loaded_again(root, loaded, path, record_file):
    """Results of a second process, without wfdb, that loads what the first has saved."""
    home = root / "second home"
    sources = {name: source(root / name, home, name) for name in ("again classifier", "again codes", "again pipeline")}
    from_model = {"folder": sources["again classifier"], "task": "ecg-classification", "input": path}
    job = {
        "record": record_file,
        "models": {"classifier": {**from_model, "auto_class": MODELS["classifier"][1], "output": "logits"}},
        "extractors": {"codes": {"folder": sources["again codes"]}},
        "pipelines": {
            "saved as a model": from_model,
            "saved as a pipeline": {**from_model, "folder": sources["again pipeline"]},
        },
    }
    return run_elsewhere(root, "second", job, blocked=["wfdb", "matplotlib"])


@pytest.mark.parametrize("name", [*MODELS, "codes", *TASKS])
def test_results_are_the_packages_own_bit_for_bit(loaded, expected, name):
    assert np.array_equal(loaded[name], expected[name], equal_nan=name in TASKS)


@pytest.mark.parametrize(
    ("name", "like"), [("classifier by Hub id", "classifier"), ("pipeline by Hub id", "ecg-classification")]
)
def test_a_hub_id_in_the_cache_gives_the_same(loaded, expected, name, like):
    assert np.array_equal(loaded[name], expected[like])


@pytest.mark.parametrize("name", ["again classifier", "again classifier by Hub id", "again codes", "again pipeline"])
def test_what_is_saved_there_is_complete_again(root, loaded, name):
    check_checkpoint(root / name)


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("classifier", "classifier"),
        ("codes", "codes"),
        ("saved as a model", "ecg-classification"),
        ("saved as a pipeline", "ecg-classification"),
    ],
)
def test_what_was_saved_there_gives_the_same(loaded_again, expected, name, like):
    assert np.array_equal(loaded_again[name], expected[like])
