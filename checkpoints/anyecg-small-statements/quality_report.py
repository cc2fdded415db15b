"""What of a record a model could not use, or only with doubt, by lead, time and reason: part of pipelines' results."""

import logging

import numpy as np

from .leads import LEAD_IDS
from .signal_quality import ACCEPTABLE, UNUSABLE, QualityFlag, acceptability

logger = logging.getLogger(__name__)

_REASONS = {
    QualityFlag.MISSING: "missing",
    QualityFlag.FLAT: "flat",
    QualityFlag.DISCONNECTED: "disconnected",
    QualityFlag.SATURATED: "saturated",
    QualityFlag.LIMITED: "limited",
    QualityFlag.INCONSISTENT: "limb leads contradict",
    QualityFlag.NOISE: "noise",
    QualityFlag.DRIFT: "drift",
    QualityFlag.MAINS: "mains",
}
_LEAD_NAMES = {lead_id: name for name, lead_id in LEAD_IDS.items()}
_ALL_LEADS = "all"


def quality_report(items, start_seconds, *, patch_seconds, duration_seconds, model_leads, notes=()):
    """Return what is said of the quality of one record that was cut into windows.

    Args:
        items (`list[dict]`): as `AnyECGFeatureExtractor.windows` gives them, with `quality`.
        start_seconds (sequence of `float`): where each window begins.
        patch_seconds, duration_seconds (`float`): length of a patch; of the record.
        model_leads (sequence of `str`): leads that the model could take.
        notes (sequence of `str`): what the reader of the file had to say.

    Returns:
        `dict`:
        - `lead_names`: leads that were read; `absent_leads`: those of the model that the record lacks.
        - `masked`: stretches that the model did not see, as dicts of `lead` (`"all"`: no lead was usable there),
          `start_seconds`, `end_seconds`, `reason` ("missing", "flat", "disconnected", "nothing usable").
        - `doubtful`: stretches that it did see, likewise ("saturated", "limited" to the extractor's range, "noise", "drift",
          "mains", "limb leads contradict").
        - `usable_share`: 0 to 1, of lead-seconds. `num_windows`, `duration_seconds`, `notes`.
        - `acceptability`: 0 to 1, see `anyecg_hf.signal_quality.acceptability`; `is_acceptable`: 0.92 and more.
    """
    lead_names = [_LEAD_NAMES[int(lead_id)] for lead_id in items[0]["lead_ids"]]
    found = _by_lead_and_reason(items, start_seconds, patch_seconds, duration_seconds, lead_names)
    ends = [start + item["attention_mask"].shape[1] * patch_seconds for item, start in zip(items, start_seconds)]
    found[_ALL_LEADS, "nothing usable"] = _gaps(_merged(zip(start_seconds, ends)), duration_seconds, patch_seconds)
    doubtful = {reason for flag, reason in _REASONS.items() if not flag & UNUSABLE}
    masked = {key: found[key] for key in found if key[1] not in doubtful}
    score = acceptability(np.concatenate([item["quality"] for item in items], axis=1))
    return {
        "lead_names": lead_names,
        "absent_leads": [name for name in model_leads if name not in lead_names],
        "masked": _as_list(masked),
        "doubtful": _as_list({key: found[key] for key in found if key not in masked}),
        "usable_share": _usable_share(masked, lead_names, duration_seconds),
        "acceptability": round(score, 4),
        "is_acceptable": score >= ACCEPTABLE,
        "num_windows": len(items),
        "duration_seconds": float(duration_seconds),
        "notes": list(notes),
    }


def warn_of_masks(report, record_name=None):
    """Log a warning that names what the model did not see of this record, if anything."""
    if not report["masked"]:
        return
    stretches = "; ".join(
        f"{'all leads' if each['lead'] == _ALL_LEADS else each['lead']} {each['reason']} "
        f"{each['start_seconds']:g}-{each['end_seconds']:g} s"
        for each in report["masked"]
    )
    where = f'Record "{record_name}": ' if record_name else ""
    logger.warning(f"{where}masked, so the result rests on {report['usable_share']:.0%} of the signal: {stretches}.")


def _by_lead_and_reason(items, start_seconds, patch_seconds, duration_seconds, lead_names):
    """Return `{(lead, reason): merged intervals in seconds}`; a patch is masked for the first of its reasons."""
    found = {}
    for item, start in zip(items, start_seconds):
        for row, patch in np.argwhere(item["quality"] != 0):
            flags = QualityFlag(int(item["quality"][row, patch]))
            for reason in _reasons(flags):
                begin = float(start) + int(patch) * patch_seconds
                end = min(begin + patch_seconds, duration_seconds)
                found.setdefault((lead_names[row], reason), []).append((begin, end))
    return {key: _merged(intervals) for key, intervals in found.items()}


def _reasons(flags):
    unusable = [reason for flag, reason in _REASONS.items() if flag & flags & UNUSABLE]
    return unusable[:1] or [reason for flag, reason in _REASONS.items() if flag & flags]


def _merged(intervals):
    """Return overlapping and touching intervals as one, in order."""
    merged = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1] + 1e-6:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _gaps(covered, duration_seconds, patch_seconds):
    """Return what of the record lies in no window; less than half a patch at its end is no part of the grid."""
    edges = [(0.0, 0.0), *covered, (duration_seconds, duration_seconds)]
    gaps = [(left[1], right[0]) for left, right in zip(edges, edges[1:]) if right[0] - left[1] > 1e-6]
    return [(begin, end) for begin, end in gaps if end < duration_seconds or end - begin > patch_seconds / 2 + 1e-6]


def _as_list(found):
    order = {_ALL_LEADS: -1, **LEAD_IDS}
    rows = [(lead, begin, end, reason) for (lead, reason), each in found.items() for begin, end in each]
    return [
        {"lead": lead, "start_seconds": round(float(begin), 3), "end_seconds": round(float(end), 3), "reason": reason}
        for lead, begin, end, reason in sorted(rows, key=lambda row: (order[row[0]], row[1]))
    ]


def _usable_share(masked, lead_names, duration_seconds):
    everywhere = [interval for (lead, _), each in masked.items() if lead == _ALL_LEADS for interval in each]
    lost = 0.0
    for name in lead_names:
        own = [interval for (lead, _), each in masked.items() if lead == name for interval in each]
        lost += sum(end - begin for begin, end in _merged(own + everywhere))
    return round(1 - lost / (duration_seconds * len(lead_names)), 4)
