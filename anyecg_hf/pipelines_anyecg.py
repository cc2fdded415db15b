"""Pipelines `ecg-classification`, `ecg-reconstruction`, `ecg-feature-extraction`, `ecg-long-record`: from a record to a result.

A record is one item, however long: it is filtered whole and cut into overlapping windows (`window_seconds`,
`hop_seconds` of its feature extractor); the windows of a batch of records go through the model together and are merged
record by record.
"""

import collections.abc
import os

import numpy as np
import torch
from scipy.special import expit, softmax
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForAudioFrameClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForSequenceClassification,
    Pipeline,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .checkpoint_code import InstalledPipelines, pipelines_in_config
from .configuration_anyecg import AnyECGConfig
from .feature_extraction_anyecg import NothingUsableError
from .leads import LEAD_IDS, derivable, fill_limb_leads, resolve_lead_names
from .long_record import by_second, own_share, share_of_beats, share_of_time, stretches
from .quality_report import quality_report, warn_of_masks
from .record_input import as_list_of_records
from .records import SIMULATED, is_simulated, read_record

_LIBRARY_OPTIONS = {"local_files_only"}  # the library hands these on to every pipeline
_PREPROCESS, _FORWARD, _POSTPROCESS = range(3)
_FUNCTIONS = {
    "multi_label_classification": "sigmoid",
    "single_label_classification": "softmax",
    "regression": "none",
}
MARKS = ("restored", "derived")
_MEASURED, _DERIVED, _RESTORED, _UNKNOWN = range(4)  # where a sample of a reconstruction comes from


class ECGPipeline(Pipeline):
    """What the pipelines share: forms of input, windows, batches, what is said of quality.

    Calling it takes one record or many, and `batch_size` (records at a time, 1), `num_workers`, and the options below.

    - One record gives its result: the path of a record (with or without suffix), a `Record`, an array `(num_leads,
      num_samples)` or nested list with `sampling_rate=`, `lead_names=`, `units=`, or a dict of `"signal"` (or
      `"array"`), `"sampling_rate"`, `"lead_names"`, `"units"`, or of `"path"`.
    - A list or tuple of these gives a list of results. A generator, a `datasets.Dataset` with such rows, one of its
      columns or a torch dataset gives an iterator: records are read when their turn comes.

    Options:
        sampling_rate (`float`, Hz), lead_names (list of `str`), units (`str`): for records that do not bring them.
        lead_aliases (`dict[str, str]`): your names of leads to standard names.
        windows_per_batch (`int`): windows that go through the model together, 32; bounds the memory.
        return_quality (`bool`): see each pipeline. What was masked is logged as a warning in any case.

    Raises:
        ValueError, TypeError, OSError: as `read_record` and `AnyECGFeatureExtractor` say of the record.
    """

    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_processor = False
    _load_feature_extractor = True
    _options = {
        "sampling_rate": _PREPROCESS,
        "lead_names": _PREPROCESS,
        "units": _PREPROCESS,
        "lead_aliases": _PREPROCESS,
        "windows_per_batch": _FORWARD,
        "return_quality": _POSTPROCESS,
    }
    _needs = None  # the module that a fitting model has: (attribute, class to name in the error)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._refuse_unfit()
        self.model.eval()  # a model that was just built or trained still drops out at random

    def __call__(self, inputs, *, num_workers=None, batch_size=None, **options):
        """Return the result for one record, a list of results for a list, an iterator for what is read as it goes."""
        stages = zip(self._stages_at_init, self._sanitize_parameters(**options), strict=True)
        parameters = [{**at_init, **at_call} for at_init, at_call in stages]
        many = as_many(inputs)
        results = self.get_iterator(
            [inputs] if many is None else many,
            num_workers or self._num_workers or 0,
            batch_size or self._batch_size or 1,
            *parameters,
        )
        if many is None:
            return next(iter(results))
        return list(results) if isinstance(many, list) else results

    @property
    def _stages_at_init(self):
        return self._preprocess_params, self._forward_params, self._postprocess_params

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        return next(iter(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params)))

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        """Return an iterable over results. The library's pads along the leads; here the extractor pads windows."""
        is_sized = isinstance(inputs, collections.abc.Sized)
        if not is_sized:
            num_workers = min(num_workers, 1)  # two would each read the whole stream
        dataset = (PipelineDataset if is_sized else PipelineIterator)(inputs, self.preprocess, preprocess_params)
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=list)
        return _Results(self, loader, forward_params, postprocess_params, len(inputs) if is_sized else None)

    def _sanitize_parameters(self, **given):
        unknown = set(given) - set(self._options) - _LIBRARY_OPTIONS
        if unknown:
            raise TypeError(
                f'Pipeline "{self.task}" has no option {", ".join(sorted(unknown))}. '
                f"Options: {', '.join(self._options)}, batch_size, num_workers."
            )
        _refuse_count(given, "windows_per_batch")
        stages = ({}, {}, {})
        for name, value in given.items():
            if name in self._options:
                stages[self._options[name]][name] = value
        return stages

    def preprocess(self, record, *, lead_aliases=None, **given):
        """Return the windows of one record and what is known about it."""
        record = read_any(record)
        items, start_seconds = self.feature_extractor.windows(
            record, lead_aliases=lead_aliases, return_quality=True, **given
        )
        return self._described(record, items, start_seconds, given.get("sampling_rate"))

    def _described(self, record, items, start_seconds, sampling_rate):
        """Return the windows of a record with its name and the report on its quality."""
        report = quality_report(
            items,
            start_seconds,
            patch_seconds=self.feature_extractor.patch_size / self.feature_extractor.sampling_rate,
            duration_seconds=_duration_seconds(record, sampling_rate),
            model_leads=self.feature_extractor.lead_names,
            notes=[*getattr(record, "warnings", ()), *_notes_on_restored(record)],
        )
        name = _field(record, "record_name")
        return {"items": items, "start_seconds": start_seconds, "record_name": name, "quality": report}

    def _forward(self, prepared, *, windows_per_batch=32, **options):
        """Return the prepared records with `windows`, the model's results for the windows of each."""
        items = [item for record in prepared for item in record["items"]]
        results = []
        for start in range(0, len(items), windows_per_batch):
            results += self._run(items[start : start + windows_per_batch], **options)
        results = iter(results)
        return [{**record, "windows": [next(results) for _ in record["items"]]} for record in prepared]

    def _model_inputs(self, items):
        """Return the items as one batch of tensors on the model's device, in its precision."""
        items = [{key: value for key, value in item.items() if key not in ("quality", "source")} for item in items]
        batch = self.feature_extractor.pad(items, return_tensors="pt").to(self.device)
        # copied: results differ in the last digit with where an array happens to begin in memory
        batch["input_values"] = batch["input_values"].to(self.model.dtype, copy=True)
        return batch

    def _run(self, items):
        """Return one result, a dict of arrays, for each of `items`."""
        raise NotImplementedError

    def _refuse_unfit(self):
        config, extractor = self.model.config, self.feature_extractor
        attribute, needed = self._needs
        if getattr(config, "model_type", None) != "anyecg" or not hasattr(self.model, attribute):
            raise ValueError(
                f'Pipeline "{self.task}" got a {type(self.model).__name__}; it needs a model like {needed}. '
                "Take another checkpoint, or the pipeline that fits this one."
            )
        if extractor is None:
            raise ValueError(f'Pipeline "{self.task}" needs the model\'s feature extractor: pass feature_extractor=...')
        for name in ("sampling_rate", "patch_size"):
            given, needed = getattr(extractor, name), getattr(config, name)
            if given != needed:
                raise ValueError(
                    f"The feature extractor gives {name} {given}, the model needs {needed}. "
                    "Pass the feature extractor that was saved with the model."
                )

    def save_pretrained(self, save_directory, **kwargs):
        """Save model, feature extractor and code; `kwargs` as for `PreTrainedModel.save_pretrained`."""
        os.makedirs(save_directory, exist_ok=True)
        self.model.config.custom_pipelines = pipelines_in_config()
        custom_object_save(self, save_directory)
        self.model.save_pretrained(save_directory, **kwargs)
        self.feature_extractor.save_pretrained(save_directory, **kwargs)


class ECGClassificationPipeline(ECGPipeline):
    """Findings of a record, for any head made by `AutoModelForSequenceClassification`.

    Options (beyond those of `ECGPipeline`):
        top_k (`int`): only the `top_k` labels with the highest scores; `None` (default) is all.
        function_to_apply (`str`): from logits to scores: "sigmoid", "softmax" or "none". By default as
            `config.problem_type` says: multi label sigmoid, single label softmax, regression none.
        merge (`str`): how the scores of a long record's windows become one: "mean" (default) of the scores, or their
            "max", for what is there at times only. Windows without a usable patch are left out.
        thresholds (`float`, list in the order of `id2label`, or `dict` of some labels): instead of `config.thresholds`.
        return_quality (`bool`): give a dict of `answer`, `findings`, `quality` (see `quality_report`) and `record_name`.
            `answer` is "findings"; "no finding", where no label is positive; or "signal unusable", where every patch of the
            record is missing or flat, with `findings` empty: without `return_quality` that is an error.

    Returns:
        list of dicts, highest score first: `label`; `score`; `threshold` from which it counts as positive (multi
        label: 0.5 where none is stored); `positive`. Single label without thresholds: `threshold` None, the highest
        score is positive. Regression: `score` is the value, `threshold` and `positive` are None. Stored thresholds
        belong to the default function.

    Example:
        >>> pipe = pipeline("ecg-classification", model="checkpoints/anyecg-small-statements")  # doctest: +SKIP
        >>> pipe("records/A0001", top_k=1)  # doctest: +SKIP
        [{'label': 'NORM', 'score': 0.93, 'threshold': 0.41, 'positive': True}]
    """

    _options = ECGPipeline._options | dict.fromkeys(("top_k", "function_to_apply", "merge", "thresholds"), _POSTPROCESS)
    _needs = ("classifier", "AnyECGForSequenceClassification")

    def _sanitize_parameters(self, **given):
        _refuse_value(given, "merge", ("mean", "max"))
        _refuse_value(given, "function_to_apply", ("sigmoid", "softmax", "none", None))
        _refuse_count(given, "top_k")
        if given.get("thresholds") is not None:
            self._refuse_thresholds(given["thresholds"])
        stages = super()._sanitize_parameters(**given)
        if "return_quality" in given:  # there is room then for an answer in place of an error
            stages[_PREPROCESS]["return_quality"] = given["return_quality"]
        return stages

    def preprocess(self, record, *, return_quality=False, **given):
        """Return the windows of one record and what is known about it; no windows of one with nothing usable, if asked."""
        record = read_any(record)
        try:
            return super().preprocess(record, **given)
        except NothingUsableError as error:
            if not return_quality:
                raise
            unusable = self._described(record, error.items, error.start_seconds, given.get("sampling_rate"))
            return {**unusable, "items": [], "quality": {**unusable["quality"], "num_windows": 0}}

    def _run(self, items):
        logits = self.model(**self._model_inputs(items)).logits
        return list(logits.float().cpu().numpy().astype(np.float64))

    def postprocess(
        self, record, *, top_k=None, function_to_apply=None, merge="mean", thresholds=None, return_quality=False
    ):
        """Return the findings of one record from the logits of its windows."""
        findings = self._findings(record["windows"], function_to_apply, merge, thresholds) if record["windows"] else []
        warn_of_masks(record["quality"], record["record_name"])
        if not return_quality:
            return findings[:top_k]
        is_without = all(finding["positive"] is False for finding in findings)
        answer = "signal unusable" if not findings else "no finding" if is_without else "findings"
        kept = {name: record[name] for name in ("quality", "record_name")}
        return {"answer": answer, "findings": findings[:top_k], **kept}

    def _findings(self, windows, function_to_apply, merge, thresholds):
        """Return one finding a label, highest score first."""
        function = function_to_apply or self._default_function()
        logits = np.stack(windows)  # (windows, labels)
        scores = {"sigmoid": expit, "softmax": lambda x: softmax(x, axis=-1), "none": np.asarray}[function](logits)
        scores = scores.mean(axis=0) if merge == "mean" else scores.max(axis=0)
        thresholds, positive = self._decide(scores, function, thresholds)
        labels = self.model.config.id2label
        return [
            {"label": labels[i], "score": float(scores[i]), "threshold": thresholds[i], "positive": positive[i]}
            for i in np.argsort(-scores, kind="stable")
        ]

    def _default_function(self):
        """Return the function that belongs to `config.problem_type`; an error where that is not stored."""
        config = self.model.config
        if config.problem_type not in _FUNCTIONS:
            raise ValueError(
                f"config.problem_type is {config.problem_type!r}: the scores of {config.num_labels} labels may mean "
                'several findings at once, one of several, or values. Pass function_to_apply="sigmoid", "softmax" or '
                f'"none", or store one of {", ".join(_FUNCTIONS)} in the configuration.'
            )
        return _FUNCTIONS[config.problem_type]

    def _decide(self, scores, function, given):
        """Return `(thresholds, positive)`, each with one entry a label: None where no threshold applies."""
        thresholds = self._thresholds(function, given)
        if function == "softmax" and all(threshold is None for threshold in thresholds):
            return thresholds, [i == int(scores.argmax()) for i in range(len(scores))]
        pairs = zip(scores, thresholds, strict=True)
        return thresholds, [None if threshold is None else bool(score >= threshold) for score, threshold in pairs]

    def _thresholds(self, function, given):
        """Return one threshold a label: given; else stored, if for this function; else 0.5 for sigmoid, or None."""
        config, labels = self.model.config, self.model.config.id2label
        thresholds = [0.5 if function == "sigmoid" else None] * len(labels)
        if config.thresholds is not None and _FUNCTIONS.get(config.problem_type) == function:
            thresholds = [float(threshold) for threshold in config.thresholds]
        if isinstance(given, dict):
            return [float(given[labels[i]]) if labels[i] in given else thresholds[i] for i in range(len(labels))]
        if given is None:
            return thresholds
        return [float(given)] * len(labels) if np.isscalar(given) else [float(threshold) for threshold in given]

    def _refuse_thresholds(self, given):
        labels = list(self.model.config.id2label.values())
        unknown = sorted(set(given) - set(labels)) if isinstance(given, dict) else []
        if unknown:
            raise ValueError(f"thresholds names {', '.join(unknown)}; the labels are {', '.join(labels)}.")
        if not np.isscalar(given) and not isinstance(given, dict) and len(given) != len(labels):
            raise ValueError(
                f"{len(given)} thresholds for {len(labels)} labels; pass one for all, one each in the order of "
                "id2label, or a dict of some."
            )


class ECGFeatureExtractionPipeline(ECGPipeline):
    """The model's view of a record as vectors of `hidden_size` D, for the backbone of any AnyECG model.

    Options (beyond those of `ECGPipeline`):
        pooling (`str`): what gets one vector.
            "record" (default): mean over the usable patches of all leads, `np.ndarray (D,)`.
            "lead": mean over the usable patches of each lead, `{lead name: np.ndarray (D,)}`; leads without are left
            out.
            "patch": dict of `features` `(leads, patches, D)`, NaN where masked; `lead_names`; `start_seconds`
            `(patches,)`.
        return_quality (`bool`): give a dict of `features` (the above), `quality` (see `quality_report`), `record_name`.

    Features are float32. A long record's means are over the patches of all its windows. With "patch", a patch that two
    windows hold is their mean; of the last window, which ends with the record, only those that end beyond the others
    are taken.
    """

    _options = ECGPipeline._options | {"pooling": _FORWARD}
    _needs = ("base_model", "AnyECGModel")

    def _sanitize_parameters(self, **given):
        _refuse_value(given, "pooling", ("record", "lead", "patch"))
        return super()._sanitize_parameters(**given)

    def _run(self, items, *, pooling="record"):
        batch = self._model_inputs(items)
        states = self.model.base_model(**batch).last_hidden_state.float()  # (windows, leads, patches, D)
        mask = batch["attention_mask"][..., None].float()
        if pooling == "patch":
            states = states.masked_fill(mask == 0, torch.nan).cpu().numpy()
            shapes = [item["attention_mask"].shape for item in items]
            return [{"states": each[:leads, :patches]} for each, (leads, patches) in zip(states, shapes)]
        sums, counts = (states * mask).sum(2).cpu().numpy(), mask.sum(2).cpu().numpy()  # (windows, leads, D or 1)
        rows = [len(item["lead_ids"]) for item in items]
        return [{pooling: (sums[i, :n], counts[i, :n])} for i, n in enumerate(rows)]

    def postprocess(self, record, *, return_quality=False):
        """Return the pooled vectors of one record."""
        names = record["quality"]["lead_names"]
        pooling = next(iter(record["windows"][0]))
        if pooling == "states":
            features = self._patch_features(record, names)
        else:
            sums, counts = (sum(parts) for parts in zip(*(window[pooling] for window in record["windows"])))
            if pooling == "record":
                features = sums.sum(0) / counts.sum()
            else:
                features = {name: sums[i] / counts[i] for i, name in enumerate(names) if counts[i] > 0}
        warn_of_masks(record["quality"], record["record_name"])
        if return_quality:
            return {"features": features, "quality": record["quality"], "record_name": record["record_name"]}
        return features

    def _patch_features(self, record, names):
        states = [window["states"] for window in record["windows"]]
        features, start_seconds = join_windows(states, record["start_seconds"], self.feature_extractor)
        return {"features": features, "lead_names": list(names), "start_seconds": start_seconds}


class ECGReconstructionPipeline(ECGPipeline):
    """The record with its absent leads and unusable stretches filled in, by a model with a lead reconstruction head.

    Measured leads come back as the model gets them: millivolt at its rate, filtered. Where two limb leads are there, the other
    four follow by algebra and are called derived, not restored. Of a result of this pipeline, what was restored is made anew.

    Options (beyond those of `ECGPipeline`):
        leads (list of `str`): what to make: absent leads, or measured ones, which are then hidden from the model and
            made anew. By default every lead of the model that is absent. Unusable patches of the other leads are
            restored in any case.

    Returns:
        `dict`, itself a record that pipelines, extractor and `plot_record` take:
        - `signal` `(leads, samples)` float32, NaN where it is none of measured, derived, restored; `sampling_rate`;
          `lead_names` in standard order; `units` ("mV"); `record_name`.
        - `restored`, `derived`: bool `(leads, samples)`: the model's work; algebra on two limb leads.
        - `comments`: those of the record are left out; of one that was simulated, that it was.
        - `quality`: see `quality_report`, of the record as it was given (not with `return_quality=False`).
    """

    _options = ECGPipeline._options | {"leads": _PREPROCESS}
    _needs = ("waveform_head", "AnyECGForLeadReconstruction")

    def preprocess(self, record, *, leads=None, lead_aliases=None, **given):
        """Return the windows of one record, with rows for the leads to be made."""
        record = read_any(record)
        prepared = super().preprocess(record, lead_aliases=lead_aliases, **given)
        measured = prepared["quality"]["lead_names"]
        wanted = self._wanted_leads(leads, measured, lead_aliases)
        kept = [name for name in measured if name not in wanted]
        if not kept:
            raise ValueError(
                f"All leads of the record ({', '.join(measured)}) are to be made anew; leave at least one to make them "
                "from."
            )
        names = _in_standard_order(
            self.feature_extractor.lead_names
        )  # a result does not depend on what else is asked for
        items = zip(prepared["items"], prepared["start_seconds"])
        prepared["items"] = [
            _with_rows_to_make(
                item, measured, kept, names, self._made_before(record, measured, item, start, lead_aliases)
            )
            for item, start in items
        ]
        prepared["lead_names"], prepared["asked"] = names, _in_standard_order({*kept, *wanted})
        prepared["comments"] = [SIMULATED] if is_simulated(record) else []
        return prepared

    def _made_before(self, record, lead_names, item, start, lead_aliases):
        """Return which patches of a window an earlier call restored or derived, bool `(leads, patches)`."""
        made = np.zeros(item["attention_mask"].shape, dtype=bool)
        seconds = self.feature_extractor.patch_size / self.feature_extractor.sampling_rate
        starts = start + seconds * np.arange(made.shape[1])
        for mark in MARKS:
            marks = marks_of(record, mark, lead_names, lead_aliases)
            if marks is not None:
                made |= marked_patches(marks, float(_field(record, "sampling_rate")), starts, seconds)
        return made

    def _wanted_leads(self, leads, measured, lead_aliases):
        known = self.feature_extractor.lead_names
        if leads is None:
            return [name for name in known if name not in measured]
        wanted = resolve_lead_names(leads, lead_aliases)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise ValueError(f"The model does not know lead {', '.join(unknown)}; it can make {', '.join(known)}.")
        return wanted

    def _run(self, items):
        made = self.model(**self._model_inputs(items)).reconstruction.float().cpu().numpy()
        shapes = [item["input_values"].shape for item in items]
        return [each[:leads, :samples] for each, (leads, samples) in zip(made, shapes)]

    def postprocess(self, record, *, return_quality=True):
        """Return the windows of one record joined: measured and derived samples as they are, restored ones cross-faded."""
        rate = self.feature_extractor.sampling_rate
        shape = (len(record["lead_names"]), int(record["quality"]["duration_seconds"] * rate + 0.5))
        signal, source = np.full(shape, np.nan, np.float32), np.full(shape, _UNKNOWN, np.int8)
        total, weights = np.zeros(shape), np.zeros(shape)
        for start, item, made in zip(record["start_seconds"], record["items"], record["windows"]):
            span = slice(round(start * rate), min(round(start * rate) + made.shape[1], shape[1]))
            here = np.repeat(item["source"], self.feature_extractor.patch_size, axis=1)[:, : span.stop - span.start]
            weight = np.where(here == _RESTORED, _fade(made.shape[1])[: here.shape[1]], 0)
            total[:, span] += weight * made[:, : here.shape[1]]
            weights[:, span] += weight
            better = here < source[:, span]  # measured in one window is measured
            signal[:, span] = np.where(better, item["input_values"][:, : here.shape[1]], signal[:, span])
            source[:, span] = np.minimum(source[:, span], here)
        restored = source == _RESTORED
        signal[restored] = total[restored] / weights[restored]
        warn_of_masks(record["quality"], record["record_name"])
        rows = [record["lead_names"].index(name) for name in record["asked"]]
        result = {
            "signal": signal[rows],
            "sampling_rate": rate,
            "lead_names": record["asked"],
            "units": "mV",
            "record_name": record["record_name"],
            "restored": restored[rows],
            "derived": (source == _DERIVED)[rows],
            "comments": record["comments"],
        }
        return {**result, "quality": record["quality"]} if return_quality else result


class ECGLongRecordPipeline(ECGPipeline):
    """Findings over time of a record of minutes to a day, its beats, and its burdens; for a model with a record head.

    Options: those of `ECGPipeline`.

    Returns:
        `dict`. W windows that could be read, S seconds of the record:
        - `record_name`, `duration_seconds`; `analysed_seconds`: how many whole seconds a window holds.
        - `findings`: does the record hold a finding at all? List of dicts as of `ecg-classification`, highest score first;
          `threshold` is that of `config.record_thresholds`, 0.5 where none is stored.
        - `burden`: `{label: 0 to 1}`. Of a rhythm the share of analysed seconds whose score reaches the label's threshold
          (`config.thresholds`). Of "V" the share of ventricular beats among all beats. NaN where nothing can be said.
        - `stretches`: `{label: [(start_seconds, end_seconds), ...]}`: where the score of a second reaches the threshold.
        - `window_start_seconds` (W,), `window_seconds`; `window_scores` `{label: (W,)}`; `beats`, `ventricular_beats` (W,): the
          expected number in each window.
        - `second_scores` `{label: (S,)}`: mean over the windows that hold a second, NaN where none does.
        - `quality`: see `quality_report`, with `return_quality=True`.

    Example:
        >>> long = pipeline("ecg-long-record", model="checkpoints/anyecg-small-long")  # doctest: +SKIP
        >>> long("records/holter")["burden"]  # doctest: +SKIP
        {'AF': 0.34, 'V': 0.02}
    """

    _needs = ("record_head", "AnyECGForLongRecords")

    def _run(self, items):
        return list(self.model.embed_windows(**self._model_inputs(items)))

    def _forward(self, prepared, **options):
        """Return the prepared records with `outputs`, what the model says of the windows of each, in float64."""
        results = super()._forward(prepared, **options)
        for record in results:
            outputs = self.model(window_features=torch.stack(record.pop("windows"))[None])
            record["outputs"] = {name: value[0].double().cpu().numpy() for name, value in outputs.items()}
        return results

    def postprocess(self, record, *, return_quality=False):
        """Return the findings of one record from what the model says of its windows."""
        config, quality = self.model.config, record["quality"]
        labels = [config.id2label[index] for index in range(config.num_labels)]
        scores, counts = expit(record["outputs"]["logits"]), record["outputs"]["counts"]  # (W, C), (W, 2)
        spans = (record["start_seconds"], self.feature_extractor.window_seconds, quality["duration_seconds"])
        seconds = by_second(scores, *spans)  # (S, C)
        is_known = np.isfinite(seconds).all(1)
        is_there = seconds >= np.array(config.thresholds or [0.5] * len(labels))  # NaN never is
        beats, ventricular_beats = (counts * own_share(*spans)[:, None]).sum(0)
        burden = {label: share_of_time(is_there[:, i], is_known) for i, label in enumerate(labels)}
        if "V" in burden:
            burden["V"] = share_of_beats(ventricular_beats, beats)
        warn_of_masks(quality, record["record_name"])
        result = {
            "record_name": record["record_name"],
            "duration_seconds": quality["duration_seconds"],
            "analysed_seconds": int(is_known.sum()),
            "findings": self._findings(expit(record["outputs"]["record_logits"]), labels),
            "burden": burden,
            "stretches": {label: stretches(is_there[:, i]) for i, label in enumerate(labels)},
            "window_start_seconds": record["start_seconds"],
            "window_seconds": self.feature_extractor.window_seconds,
            "window_scores": dict(zip(labels, scores.T, strict=True)),
            "beats": counts[:, 0],
            "ventricular_beats": counts[:, 1],
            "second_scores": dict(zip(labels, seconds.T, strict=True)),
        }
        return {**result, "quality": quality} if return_quality else result

    def _findings(self, scores, labels):
        thresholds = self.model.config.record_thresholds or [0.5] * len(labels)
        findings = [
            {"label": label, "score": float(score), "threshold": threshold, "positive": bool(score >= threshold)}
            for label, score, threshold in zip(labels, scores, thresholds, strict=True)
        ]
        return sorted(findings, key=lambda finding: -finding["score"])


TASKS = {
    "ecg-classification": (ECGClassificationPipeline, AutoModelForSequenceClassification),
    "ecg-reconstruction": (ECGReconstructionPipeline, AutoModelForMaskedImageModeling),
    "ecg-feature-extraction": (ECGFeatureExtractionPipeline, AutoModel),
    "ecg-long-record": (ECGLongRecordPipeline, AutoModelForAudioFrameClassification),
}


def register_pipelines():
    """Make `transformers.pipeline` know the tasks; done by `import anyecg_hf`, and once only."""
    for task, (pipeline_class, auto_class) in TASKS.items():
        if PIPELINE_REGISTRY.supported_tasks.get(task, {}).get("impl") is not pipeline_class:
            PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=pipeline_class, pt_model=auto_class)
    AnyECGConfig.custom_pipelines = InstalledPipelines()


class _Results(collections.abc.Iterable):
    """The results for a stream of records, one after another, made as they are asked for."""

    def __init__(self, pipeline, loader, forward_params, postprocess_params, num_records):
        self._pipeline, self._loader, self._num_records = pipeline, loader, num_records
        self._forward_params, self._postprocess_params = forward_params, postprocess_params

    def __len__(self):
        if self._num_records is None:
            raise TypeError("The number of records in a stream is not known before its end.")
        return self._num_records

    def __iter__(self):
        for prepared in self._loader:
            for record in self._pipeline.forward(prepared, **self._forward_params):
                yield self._pipeline.postprocess(record, **self._postprocess_params)


def join_windows(windows, start_seconds, feature_extractor):
    """Return what the overlapping windows of a record hold of each patch as one array, and where each patch begins.

    A patch that two windows hold is their mean; of the last window, which ends with the record, only those that end beyond
    the others are taken.

    Args:
        windows (list of `np.ndarray` of shape `(leads, patches, ...)`): values by patch.
        start_seconds (sequence of `float`): where each window begins.
        feature_extractor (`AnyECGFeatureExtractor`): that cut the windows.

    Returns:
        `(values (leads, patches of the record, ...), start_seconds (patches of the record,))`
    """
    rate, size = feature_extractor.sampling_rate, feature_extractor.patch_size
    by_start, end = {}, 0  # sample at which a patch begins -> its values in each window
    for start, window in zip(start_seconds, windows):
        first = round(start * rate)
        for patch in range(window.shape[1]):
            begin = first + patch * size
            if begin in by_start or begin + size > end:
                by_start.setdefault(begin, []).append(window[:, patch])
        end = max(end, first + window.shape[1] * size)
    starts = sorted(by_start)
    return np.stack([np.mean(by_start[begin], axis=0) for begin in starts], axis=1), np.array(starts) / rate


def as_many(inputs):
    """Return `inputs` if they are several records - a list for one in memory -, None if they are one."""
    if isinstance(inputs, (list, tuple)):
        records = as_list_of_records(inputs) if len(inputs) else []
        return None if records and records[0] is inputs else records
    is_one = isinstance(inputs, (str, bytes, os.PathLike, dict, np.ndarray, torch.Tensor))
    if (
        is_one
        or hasattr(inputs, "lead_names")
        or not (isinstance(inputs, collections.abc.Iterable) or hasattr(inputs, "__getitem__"))
    ):
        return None
    return inputs


def read_any(record):
    """Return a record that the extractor takes: paths are read, a tensor becomes an array."""
    if isinstance(record, dict) and record.get("path") is not None and not {"signal", "array"} & set(record):
        record = record["path"]
    if isinstance(record, (str, os.PathLike)):
        return read_record(record)
    return record.detach().cpu().numpy() if isinstance(record, torch.Tensor) else record


def _duration_seconds(record, sampling_rate):
    """Return the length in seconds of a record that the extractor has accepted."""
    if isinstance(record, dict):
        signal, own_rate = record.get("signal", record.get("array")), record.get("sampling_rate")
    else:
        signal, own_rate = getattr(record, "signal", record), getattr(record, "sampling_rate", None)
    return np.shape(signal)[1] / float(sampling_rate if own_rate is None else own_rate)


def _in_standard_order(names):
    return sorted(names, key=LEAD_IDS.get)


def _with_rows_to_make(item, measured, kept, names, made_before):
    """Return the window with the rows of `names`, and the `source` of each patch; what is not in `kept` has to be made.

    What can be derived from two limb leads is; all else that is not measured is hidden from the model, to be predicted.
    """
    patches = item["attention_mask"].shape[1]
    values = np.zeros((len(names), item["input_values"].shape[1]), np.float32)
    known = np.zeros((len(names), patches), dtype=bool)
    for row, name in enumerate(names):
        if name in kept:
            given = measured.index(name)
            values[row] = item["input_values"][given]
            known[row] = (item["attention_mask"][given] == 1) & ~made_before[given]
    is_derived = derivable(names, known)
    values = fill_limb_leads(values, names, np.repeat(known, values.shape[1] // patches, axis=1))
    source = np.select([known, is_derived], [_MEASURED, _DERIVED], _RESTORED).astype(np.int8)
    return {
        "input_values": values,
        "lead_ids": np.array([LEAD_IDS[name] for name in names], np.int64),
        "attention_mask": np.ones(source.shape, np.int64),
        "bool_masked_pos": source == _RESTORED,
        "source": source,
    }


def _fade(num_samples):
    """Return weights of a window's samples that fall to its ends: what two windows hold passes from one to the other."""
    rising = np.arange(1.0, num_samples + 1)
    return np.minimum(rising, rising[::-1])


def marks_of(record, mark, lead_names, lead_aliases=None):
    """Return which samples a result of `ecg-reconstruction` says a model made, or algebra.

    Args:
        record: in any form.
        mark (`str`): "restored" or "derived".
        lead_names (sequence of `str`): the rows of the answer, standard names of leads of the record.
        lead_aliases (`dict[str, str]`, *optional*): names of yours to standard names.

    Returns:
        bool `(leads, samples)`, None for a record without marks.
    """
    marks = _field(record, mark)
    if marks is None:
        return None
    rows = resolve_lead_names(_field(record, "lead_names"), lead_aliases)
    return np.asarray(marks, dtype=bool)[[rows.index(name) for name in lead_names]]


def marked_patches(marks, sampling_rate, start_seconds, patch_seconds):
    """Return in which patches there is a mark, bool `(leads, patches)`, from those of samples, bool `(leads, samples)`."""
    starts = np.round(np.asarray(start_seconds) * sampling_rate).astype(int)
    ends = np.round((np.asarray(start_seconds) + patch_seconds) * sampling_rate).astype(int)
    return np.stack([marks[:, start:end].any(axis=1) for start, end in zip(starts, ends)], axis=1)


def _field(record, name):
    return record.get(name) if isinstance(record, dict) else getattr(record, name, None)


def _notes_on_restored(record):
    """Return a note that names the leads of which a model made something, none for a record that was measured."""
    marks = _field(record, "restored")
    if marks is None or not np.any(marks):
        return []
    names = [name for name, lead in zip(_field(record, "lead_names"), np.asarray(marks)) if lead.any()]
    return [f"restored by a model in whole or in part, not measured: {', '.join(names)}"]


def _refuse_value(given, name, accepted):
    if name in given and given[name] not in accepted:
        raise ValueError(f"{name} is {given[name]!r}; accepted are {', '.join(map(repr, accepted))}.")


def _refuse_count(given, name):
    value = given.get(name)
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} is {value!r}; accepted are whole numbers above 0.")
