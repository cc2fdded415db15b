"""The reduced sets of leads that one checkpoint is to serve: what training draws and evaluation measures."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from anyecg_hf.leads import LEAD_IDS, LIMB_LEADS, STANDARD_LEADS

LEAD_SUBSETS = MappingProxyType(
    {
        "12": STANDARD_LEADS,
        "6 (limb leads)": tuple(LIMB_LEADS),
        "3 (I, II, V2)": ("I", "II", "V2"),
        "2 (I, II)": ("I", "II"),
        "1 (I)": ("I",),
    }
)
REDUCED_SUBSETS = tuple(leads for leads in LEAD_SUBSETS.values() if len(leads) < len(STANDARD_LEADS))
RANDOM_SIZES = (1, 2, 3, 6, 8)
NAMED_SHARE = 0.5  # of the records of which leads are dropped


def draw_leads(rows: np.ndarray, lead_ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the rows of a record that training keeps: as often one of `REDUCED_SUBSETS` as 1, 2, 3, 6 or 8 random leads.

    Random leads alone would leave a model without what it is measured on: three of twelve are I, II and V2 once in 220
    draws, six are the limb leads once in 924. Named ones alone would leave it without V5, or II by itself.

    Args:
        rows (`np.ndarray` of shape `(n,)`): rows of which something is usable, ascending.
        lead_ids (`np.ndarray` of shape `(num_leads,)`): of all rows.

    Returns:
        Some of `rows`, at least one if there is one; of a named subset those that the record has, all if it has none of it.
    """
    if generator.random() < NAMED_SHARE:
        names = REDUCED_SUBSETS[generator.integers(len(REDUCED_SUBSETS))]
        named = rows[np.isin(lead_ids[rows], [LEAD_IDS[name] for name in names])]
        return named if len(named) else rows
    return np.sort(generator.permutation(rows)[: generator.choice(RANDOM_SIZES)])
