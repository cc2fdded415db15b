"""Why a finding: what a classifier's score owes to each second of each lead.

    explanation = explain(classify, "path/to/record", label="AFIB")
    explanation.plot().savefig("why.png")

docs/explaining.md says what relevance means and what it does not; benchmarks/results/explanations.md how faithful it is.
"""

import dataclasses

import numpy as np
import torch

from .leads import LEAD_IDS
from .pipelines_anyecg import (
    MARKS,
    ECGClassificationPipeline,
    as_many,
    join_windows,
    marked_patches,
    marks_of,
    read_any,
)
from .record_input import check_record, in_millivolt
from .records import Record

_LEAD_NAMES = {lead_id: name for name, lead_id in LEAD_IDS.items()}


@dataclasses.dataclass(frozen=True, eq=False)  # arrays cannot be compared to one truth
class Explanation:
    """What the score of one finding owes to each patch (one second of one lead).

    Args:
        label (`str`), score (`float`), threshold (`float`, *optional*), positive (`bool`, *optional*): the finding, as the
            pipeline gives it.
        relevance (`np.ndarray` of shape `(num_leads, num_patches)`): float32; what is lost if the patch is hidden, in `unit`.
            Above 0 it speaks for the finding, below 0 against it. NaN where there is no evidence: a patch that the model
            did not see, or one that was restored and not measured.
        unit (`str`): `"log-odds"` of the finding (natural logarithm), for a regression `"value"`.
        lead_names (`list[str]`): one per row. Leads that the record lacks have none.
        start_seconds (`np.ndarray` of shape `(num_patches,)`): where each patch begins in the record.
        patch_seconds (`float`): how long each is.
        record (`Record`): what was explained: the leads that the model takes, unfiltered, in millivolt.
    """

    label: str
    score: float
    threshold: float | None
    positive: bool | None
    relevance: np.ndarray
    unit: str
    lead_names: list[str]
    start_seconds: np.ndarray
    patch_seconds: float
    record: Record = dataclasses.field(repr=False)

    def plot(self, **options):
        """Return the record on ECG paper with its relevance behind the traces, a `matplotlib.figure.Figure`.

        `options` are those of `anyecg_hf.plotting.plot_record`: `start_seconds` and `seconds` choose the part.
        """
        from .plotting import plot_record  # not above: matplotlib would be loaded with the package

        return plot_record(self.record, explanation=self, **options)


def explain(pipe, record, *, label=None, **options):
    """Return the `Explanation` of one finding in one record.

    Each usable patch is hidden from the model by itself, just as an absent one is (`attention_mask` 0); its relevance is
    what the finding's log-odds lose by that. It takes one pass of the model a patch: 120 for 10 s of 12 leads.

    Of a long record each window is explained by itself; what two windows say of a patch is averaged. A window without a
    usable patch is left out.

    Args:
        pipe (`ECGClassificationPipeline`): `pipeline("ecg-classification", model=...)`.
        record: one record in any form that the pipeline takes. Of a result of `ecg-reconstruction`, what was `restored`
            is seen by the model as the pipeline sees it, but is no evidence: its relevance is NaN.
        label (`str`, *optional*): a label of the model; by default that of the highest score.
        **options: of the pipeline: `sampling_rate`, `lead_names`, `units`, `lead_aliases`, `thresholds`, ...;
            `windows_per_batch` (32) also bounds how many copies with a hidden patch go through the model together.

    Raises:
        TypeError: `pipe` is another object, or an option is unknown.
        ValueError: `label` is none of the model's; several records; else as the pipeline says of the record.

    Source: occlusion sensitivity, Zeiler and Fergus 2014 (arXiv 1311.2901), section 4.2, with the model's own mask as cover.
    """
    _refuse_unfit(pipe, record, label)
    record = read_any(record)
    stages = zip(pipe._stages_at_init, pipe._sanitize_parameters(**options), strict=True)
    read_options, run_options, result_options = ({**at_init, **at_call} for at_init, at_call in stages)
    (prepared,) = pipe.forward([pipe.preprocess(record, **read_options)], **run_options)
    findings = pipe.postprocess(prepared, **{**result_options, "top_k": None, "return_quality": False})
    finding = next(each for each in findings if label in (None, each["label"]))
    function = result_options.get("function_to_apply") or pipe._default_function()
    index = {name: index for index, name in pipe.model.config.id2label.items()}[finding["label"]]
    relevance, start_seconds = join_windows(
        [_relevance(pipe, item, index, function, **run_options) for item in prepared["items"]],
        prepared["start_seconds"],
        pipe.feature_extractor,
    )
    explanation = Explanation(
        **finding,
        relevance=relevance,
        unit="value" if function == "none" else "log-odds",
        lead_names=[_LEAD_NAMES[int(lead_id)] for lead_id in prepared["items"][0]["lead_ids"]],
        start_seconds=start_seconds,
        patch_seconds=pipe.feature_extractor.patch_size / pipe.feature_extractor.sampling_rate,
        record=_as_record(record, pipe.feature_extractor, **read_options),
    )
    restored = explanation.record.restored
    if restored is not None:
        places = explanation.start_seconds, explanation.patch_seconds
        relevance[marked_patches(restored, explanation.record.sampling_rate, *places)] = np.nan
    return explanation


def _refuse_unfit(pipe, record, label):
    # by name: a pipeline that a checkpoint brought has a class of its own
    if ECGClassificationPipeline.__name__ not in [each.__name__ for each in type(pipe).__mro__]:
        raise TypeError(
            f"explain was given a {type(pipe).__name__} for pipe; it explains findings of "
            'pipeline("ecg-classification", model=...).'
        )
    labels = list(pipe.model.config.id2label.values())
    if label is not None and label not in labels:
        raise ValueError(f"label is {label!r}, which this model does not know; its labels are {', '.join(labels)}.")
    if as_many(record) is not None:
        raise ValueError("explain was given several records; it takes one. Call it for each.")


@torch.no_grad()
def _relevance(pipe, item, index, function, *, windows_per_batch=32):
    """Return what hiding each patch of one window takes off the log-odds (or value), `(leads, patches)`, NaN if unusable."""
    window = pipe._model_inputs([item])
    mask = window.pop("attention_mask")  # (1, leads, patches)
    lead, patch = mask[0].nonzero(as_tuple=True)
    masks = mask.repeat(len(lead) + 1, 1, 1)  # the last one hides nothing
    masks[torch.arange(len(lead), device=mask.device), lead, patch] = 0
    scores = []
    for part in masks.split(windows_per_batch):
        copies = {name: value.expand(len(part), *value.shape[1:]) for name, value in window.items()}
        scores.append(_log_odds(pipe.model(**copies, attention_mask=part).logits.float(), index, function))
    scores = torch.cat(scores).cpu().numpy()
    relevance = np.full(mask.shape[1:], np.nan, np.float32)
    relevance[mask[0].bool().cpu().numpy()] = scores[-1] - scores[:-1]
    return relevance


def _log_odds(logits, index, function):
    """Return log(p / (1 - p)) of one label from `logits` (rows, labels); without a function, the output itself."""
    if function != "softmax":
        return logits[:, index]
    others = torch.cat([logits[:, :index], logits[:, index + 1 :]], dim=1)
    return logits[:, index] - others.logsumexp(1)


def _as_record(record, extractor, *, lead_aliases=None, **given):
    """Return the record in millivolt, with the leads that the extractor takes."""
    checked = check_record(record, extractor.lead_names, given, lead_aliases)
    comments = list(getattr(record, "comments", None) or [])  # a picture says from them that a record is simulated
    signal = in_millivolt([checked])[0]
    read = Record(signal, checked.sampling_rate, checked.lead_names, record_name=checked.name, comments=comments)
    read.restored, read.derived = (marks_of(record, mark, read.lead_names, lead_aliases) for mark in MARKS)
    return read
