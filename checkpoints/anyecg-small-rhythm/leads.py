"""Lead names: their one spelling, their ids, the aliases understood, and the limb leads that follow from any two others."""

import functools
import re
import unicodedata

import numpy as np

STANDARD_LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
FRANK_LEADS = ("X", "Y", "Z")
LEAD_IDS = {name: index for index, name in enumerate(STANDARD_LEADS + FRANK_LEADS, start=1)}  # 0 is padding
_LONGEST_NAME = 64  # of a lead that can be known
LIMB_LEADS_FROM_I_AND_II = {"III": (-1.0, 1.0), "aVR": (-0.5, -0.5), "aVL": (1.0, -0.5), "aVF": (-0.5, 1.0)}
LIMB_LEADS = {"I": (1.0, 0.0), "II": (0.0, 1.0), **LIMB_LEADS_FROM_I_AND_II}  # in standard order

_PREFIX = re.compile(r"^(?:(?:ecg|ekg)(?=[\s_:.]|lead))?[\s_:.]*(?:lead)?[\s_:.]*")
# ML: modified limb leads of Holter recorders. D: derivation, usual in French, Spanish and Portuguese.
# No C1 ... C6 for V1 ... V6: polysomnograms call EEG electrodes so.
_BUILT_IN_ALIASES = {
    **{prefix + number: number.upper() for prefix in ("ml", "d") for number in ("i", "ii", "iii")},
    **{f"d{digit}": name for digit, name in zip("123", ("I", "II", "III"), strict=True)},
    **{f"v{axis.lower()}": axis for axis in FRANK_LEADS},
    **{name.lower(): name for name in LEAD_IDS},
}


def resolve_lead_name(name, lead_aliases=None, record=None):
    """Return the standard spelling of a lead's name.

    Args:
        name (`str`): as found: `"II"`, `"AVR"`, `"avr"`, `"Lead II"`, `"ECG lead II"`, `"MLII"`, `"DII"`, `"vx"` ...
        lead_aliases (`dict[str, str]`, *optional*): names of yours to standard names; looked at first.
        record (`str`, *optional*): the record's name, for the error message.

    Returns:
        `str`: a key of `LEAD_IDS`, i.e. one of the 12 standard leads or Frank's X, Y, Z.

    Raises:
        TypeError: `name` is not a string.
        ValueError: no such lead is known, or its sign is reversed (`"-aVR"`).

    >>> resolve_lead_name("Lead II"), resolve_lead_name("chest 1", {"chest 1": "V1"})
    ('II', 'V1')
    """
    if not isinstance(name, str):
        raise TypeError(f"{_where(record)}a lead's name is {name!r} ({type(name).__name__}); lead names are strings.")
    normalised = _normalise(name)
    found = _normalised_aliases(lead_aliases, record).get(normalised) or _BUILT_IN_ALIASES.get(normalised)
    if found is None:
        raise ValueError(_unknown_lead_message(name, record))
    return found


def resolve_lead_names(names, lead_aliases=None, record=None):
    """Return the standard spellings of a record's lead names, in the order given.

    Args:
        names (sequence of `str`): one name per row of the signal.
        lead_aliases (`dict[str, str]`, *optional*): names of yours to standard names.
        record (`str`, *optional*): the record's name, for the error message.

    Returns:
        `list[str]` of the length of `names`, without duplicates.

    Raises:
        TypeError: `names` is one string, or holds something that is not a string.
        ValueError: a lead is unknown, or two names mean the same lead.
    """
    if isinstance(names, str):
        raise TypeError(f"{_where(record)}lead_names is the single string {names!r}; pass a list, one name per row.")
    resolved = [resolve_lead_name(name, lead_aliases, record) for name in names]
    first_with = {}
    for given, name in zip(names, resolved, strict=True):
        if name in first_with:
            raise ValueError(
                f'{_where(record)}leads "{first_with[name]}" and "{given}" are both lead {name}; each may occur once. '
                "Leave one of the two rows out, or rename it with lead_aliases={...} if it is another lead."
            )
        first_with[name] = given
    return resolved


def derive_limb_leads(signal, lead_names):
    """Return the record with those of the six limb leads added that it lacks, computed from two that it has.

    From I and II where both are there, else from the first two in standard order.

    Args:
        signal (`np.ndarray` of shape `(num_leads, num_samples)`): millivolt; missing values (NaN) stay missing.
        lead_names (`list[str]`): standard names, one per row.

    Returns:
        `(signal, lead_names)`: the given rows first, unchanged, then the added ones in standard order.

    Raises:
        ValueError: fewer than two limb leads are there, or names and rows do not match.

    Source: Einthoven's law, Goldberger's definitions: III = II - I, aVR = -(I + II)/2, aVL = I - II/2, aVF = II - I/2.
    """
    signal, lead_names = np.asarray(signal), list(lead_names)
    _refuse_rows(signal, lead_names)
    given = [name for name in LIMB_LEADS if name in lead_names]
    if len(given) < 2:
        raise ValueError(
            f"Limb leads are derived from two others; there is {' and '.join(given) or 'none'} in {lead_names}. "
            "Pass standard names (see resolve_lead_names), or leave the absent leads out: the model takes fewer, too."
        )
    added = [name for name in LIMB_LEADS if name not in lead_names]
    if not added:
        return signal, lead_names
    pair = np.stack([signal[lead_names.index(name)] for name in given[:2]])
    rows = [_weights(name, given[:2]) for name in added]
    rows = [first * pair[0] + second * pair[1] for first, second in rows]
    return np.concatenate([signal, np.stack(rows).astype(signal.dtype)]), lead_names + added


def derivable(lead_names, known):
    """Return where a limb lead that is not known follows from two that are, bool of the shape of `known`.

    Args:
        lead_names (`list[str]`): standard names, one per row.
        known (`np.ndarray` of shape `(num_leads, n)`): True where a lead is known, by sample or by patch.
    """
    is_limb = np.array([name in LIMB_LEADS for name in lead_names], dtype=bool)
    known = np.asarray(known, dtype=bool)
    return is_limb[:, None] & ~known & (known[is_limb].sum(axis=0) >= 2)


def fill_limb_leads(signal, lead_names, known):
    """Return a copy of `signal` in which limb leads that are not known are computed wherever two others are.

    Args:
        signal (`np.ndarray` of shape `(num_leads, num_samples)`): millivolt.
        lead_names (`list[str]`): standard names, one per row.
        known (`np.ndarray` of shape `(num_leads, num_samples)`): True where the lead was measured.

    Returns:
        `np.ndarray` like `signal`; what `derivable` does not name is as it was.

    Raises:
        ValueError: names and rows do not match.

    Source: see `derive_limb_leads`.
    """
    _refuse_rows(signal, lead_names)
    filled, known, where = signal.copy(), np.asarray(known, dtype=bool), derivable(lead_names, known)
    limbs = [name for name in LIMB_LEADS if name in lead_names]
    rows = [lead_names.index(name) for name in limbs]
    for pattern in np.unique(known[rows][:, where.any(axis=0)], axis=1).T:  # which limb leads are known together
        here = where.any(axis=0) & (known[rows] == pattern[:, None]).all(axis=0)
        first, second = np.flatnonzero(pattern)[:2]
        for place in np.flatnonzero(~pattern):
            weights = _weights(limbs[place], (limbs[first], limbs[second]))
            filled[rows[place], here] = weights[0] * signal[rows[first], here] + weights[1] * signal[rows[second], here]
    return filled


def _weights(name, pair):
    """Return what of each of the two limb leads `pair` makes up limb lead `name`."""
    return np.linalg.solve(np.array([LIMB_LEADS[given] for given in pair]).T, LIMB_LEADS[name]).tolist()


def _refuse_rows(signal, lead_names):
    if signal.ndim != 2 or len(lead_names) != len(signal):
        raise ValueError(
            f"{len(lead_names)} lead names for a signal of shape {signal.shape}; "
            "pass (num_leads, num_samples) and one name per row."
        )


def _normalise(name):
    return (
        _normalise_short(name) if len(name) <= _LONGEST_NAME else name
    )  # names of hostile files do not fill the memory


@functools.lru_cache(maxsize=1024)
def _normalise_short(name):
    """`" ECG lead_II "` -> `"ii"`: what two spellings of a lead have in common. A leading sign is kept."""
    text = unicodedata.normalize("NFKC", name).strip().casefold()
    return re.sub(r"[\s_]+", "", _PREFIX.sub("", text))


def _normalised_aliases(lead_aliases, record):
    if not lead_aliases:
        return {}
    aliases = {}
    for given, target in lead_aliases.items():
        if not isinstance(target, str) or _normalise(target) not in _BUILT_IN_ALIASES:
            raise ValueError(
                f'{_where(record)}lead_aliases names {target!r} for "{given}", which is no lead. '
                f"Known: {', '.join(LEAD_IDS)}."
            )
        aliases[_normalise(given)] = _BUILT_IN_ALIASES[_normalise(target)]
    return aliases


def _unknown_lead_message(name, record):
    known = ", ".join(STANDARD_LEADS)
    message = f'{_where(record)}lead "{name}" is not one of the 12 standard leads. Known: {known} (and Frank X, Y, Z). '
    positive = _BUILT_IN_ALIASES.get(_normalise(name.strip().lstrip("-−")))
    if positive is not None:
        return (
            message + f"It looks like {positive} with its sign reversed: multiply the row by -1 and name it {positive}."
        )
    return message + f'If it is lead II, say so with lead_aliases={{"{name}": "II"}}; otherwise leave the row out.'


def _where(record):
    return f'Record "{record}": ' if record else ""
