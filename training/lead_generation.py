"""Lead generation: which leads are hidden in the cases of an evaluation, and which in training.

Cases G1 to G7: one precordial lead; all six, from I and II; five, from I, II and V2 or V5; all but I, or but II; spans of one to
three leads (G5, and G6 with noise in place of nothing); one limb lead. Limb leads follow by algebra wherever two are seen, so
there they are never hidden: the model has nothing to learn and is not asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anyecg_hf.leads import LEAD_IDS, LIMB_LEADS, STANDARD_LEADS, derivable

PRECORDIAL_LEADS = tuple(name for name in STANDARD_LEADS if name not in LIMB_LEADS)
CASES = {
    **{f"G1 {name}": (name,) for name in PRECORDIAL_LEADS},
    "G2": PRECORDIAL_LEADS,
    **{f"G3 {kept}": tuple(name for name in PRECORDIAL_LEADS if name != kept) for kept in ("V2", "V5")},
    **{f"G4 {kept}": tuple(name for name in STANDARD_LEADS if name != kept) for kept in ("I", "II")},
}  # case -> the leads that are hidden
SPANS = "G5"
KINDS = {"one": 0.15, "few": 0.15, "limbs": 0.2, "limbs and one": 0.2, "single": 0.15, "spans": 0.15}  # in training
MAX_SPAN_LEADS = 3
MAX_SPAN_SECONDS = 5
_NAMES = {lead_id: name for name, lead_id in LEAD_IDS.items()}


def hide_leads(
    attention_mask: np.ndarray, lead_ids: np.ndarray, generator: np.random.Generator, case: str | None = None
) -> np.ndarray:
    """Return what is hidden of one record: bool `(num_leads, num_patches)`, True = hidden, real and not derivable.

    Args:
        attention_mask (`np.ndarray` of shape `(num_leads, num_patches)`): 1 real, 0 absent or unusable.
        lead_ids (`np.ndarray` of shape `(num_leads,)`): see `LEAD_IDS`.
        generator: the only source of randomness.
        case (`str`, *optional*): of `CASES`, or "G5"; None draws one of the kinds of training.

    Raises:
        ValueError: an unknown `case`.
    """
    real, names = attention_mask.astype(bool), [_NAMES[int(lead_id)] for lead_id in lead_ids]
    if case in CASES:
        hidden = np.repeat(np.isin(names, CASES[case])[:, None], real.shape[1], axis=1)
    elif case in (None, SPANS):
        hidden = _draw(
            names, real, generator, SPANS if case else str(generator.choice(list(KINDS), p=[*KINDS.values()]))
        )
    else:
        raise ValueError(f"Case {case!r} is unknown. Accepted: {', '.join(CASES)}, {SPANS}.")
    return without_derivable(hidden & real, real, names)


def without_derivable(hidden: np.ndarray, real: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return `hidden` without the patches that follow by algebra from two limb leads that are seen."""
    return hidden & ~derivable(list(names), real & ~hidden)


def _draw(names: Sequence[str], real: np.ndarray, generator: np.random.Generator, kind: str) -> np.ndarray:
    """Return what one kind hides, bool `(num_leads, num_patches)`; a record without the leads it needs gets another kind."""
    there = [name for name, patches in zip(names, real, strict=True) if patches.any()]
    chest = [name for name in there if name in PRECORDIAL_LEADS]
    if kind in ("spans", SPANS) or len(there) < 2 or (kind != "single" and not chest):
        return _draw_spans(real, generator)
    if kind == "single":
        kept = [name for name in ("I", "II") if name in there] if generator.random() < 0.7 else there
        visible = {str(generator.choice(kept or there))}
        return np.repeat(~np.isin(names, list(visible))[:, None], real.shape[1], axis=1)
    most = {"one": 1, "few": min(4, len(chest)), "limbs": len(chest), "limbs and one": max(1, len(chest) - 1)}[kind]
    num_hidden = int(generator.integers(1, most + 1)) if kind == "few" else most
    hidden = generator.permutation(chest)[:num_hidden]
    return np.repeat(np.isin(names, hidden)[:, None], real.shape[1], axis=1)


def _draw_spans(real: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return one to three leads hidden over one to five neighbouring patches, the same for all of them."""
    num_leads, num_patches = real.shape
    length = int(generator.integers(1, min(MAX_SPAN_SECONDS, max(1, num_patches - 1)) + 1))
    first = int(generator.integers(num_patches - length + 1))
    most = max(1, min(MAX_SPAN_LEADS, num_leads - 1))
    leads = generator.permutation(num_leads)[: int(generator.integers(1, most + 1))]
    hidden = np.zeros(real.shape, dtype=bool)
    hidden[leads, first : first + length] = True
    return hidden
