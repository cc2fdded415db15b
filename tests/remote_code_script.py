"""Run by `test_remote_code.py` in a process that cannot import `anyecg_hf`: loads checkpoints by the code in their
folders.

    python -I remote_code_script.py job.json

The job names the sources to load and where to write results; results are arrays in one .npz file.
"""

import importlib.abc
import json
import sys

JOB = json.load(open(sys.argv[1], encoding="utf-8"))


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("anyecg_hf", *JOB["blocked"]):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoFeatureExtractor, pipeline  # noqa: E402

RESULTS = {}


def main():
    torch.set_num_threads(JOB["num_threads"])
    with np.load(JOB["record"]) as arrays:
        record = {"signal": arrays["signal"], "sampling_rate": float(arrays["sampling_rate"]), "units": "mV"}
        record["lead_names"] = arrays["lead_names"].tolist()
    for name, source in JOB["refused"].items():
        try:
            AutoConfig.from_pretrained(source["folder"], **how_to_load(source))
        except (OSError, ValueError) as error:
            RESULTS[name] = np.array(str(error))
    for name, source in JOB["models"].items():
        model = run_model(name, source, record)
        if name in JOB["save_models_to"]:
            target = JOB["save_models_to"][name]
            model.save_pretrained(target)
            extractor(source).save_pretrained(target)
    for name, source in JOB["extractors"].items():
        RESULTS[name] = extractor(source)(record)["rhythm_codes"]
        if name in JOB["save_extractors_to"]:
            extractor(source).save_pretrained(JOB["save_extractors_to"][name])
    for name, source in JOB["pipelines"].items():
        pipe = pipeline(source["task"], model=source["folder"], **how_to_load(source))
        RESULTS[name] = numbers(pipe(source["input"]))
        if name in JOB["save_pipelines_to"]:
            pipe.save_pretrained(JOB["save_pipelines_to"][name])
    assert not any(module.split(".")[0] == "anyecg_hf" for module in sys.modules)
    np.savez(JOB["results"], **RESULTS)


def how_to_load(source):
    return {"trust_remote_code": True, **{name: source[name] for name in ("revision", "token") if name in source}}


def extractor(source):
    return AutoFeatureExtractor.from_pretrained(source["folder"], **how_to_load(source))


def run_model(name, source, record):
    config = AutoConfig.from_pretrained(source["folder"], **how_to_load(source))
    auto_class = getattr(transformers, source["auto_class"])
    model = auto_class.from_pretrained(source["folder"], **how_to_load(source))
    assert type(model).__module__.startswith("transformers_modules.") and config.model_type == model.config.model_type
    batch = extractor(source)(record, return_tensors="pt")
    batch.pop("rhythm_codes", None)
    with torch.no_grad():
        RESULTS[name] = getattr(model(**batch), source["output"]).numpy()
    return model


def numbers(result):
    if isinstance(result, dict):
        return result["signal"] if "signal" in result else np.stack(list(result["second_scores"].values()))
    return np.array([each["score"] for each in result]) if isinstance(result, list) else result


if __name__ == "__main__":
    main()
