"""What the feature extractor is given (array, nested list, dict, `Record`), taken apart and checked."""

import dataclasses
import logging

import numpy as np

from .leads import LEAD_IDS, resolve_lead_name, resolve_lead_names
from .signal_ops import check_sampling_rate, implausible_ranges, lead_extremes, unit_to_mv, warn_once

logger = logging.getLogger(__name__)

LARGEST_MV = 1e7  # 10 kV: no amplifier gives this, and no filter in single precision has room for it
_PARTS = ("sampling_rate", "lead_names", "units")


@dataclasses.dataclass
class CheckedRecord:
    """One record in leads that the model takes; once `in_millivolt` has looked at its samples, what is wrong with them."""

    signal: np.ndarray  # (num_leads, num_samples), as given
    sampling_rate: float
    lead_names: list[str]
    to_mv: list[float]  # factor of each lead
    name: str | None
    quality: np.ndarray | None = None  # (num_leads, num_patches), where it is known already
    doubt: str | None = None  # what a warning says in its turn
    fault: ValueError | None = None  # what is raised in its turn

    @property
    def kind(self):
        """What records have in common that are worked on at once."""
        return self.sampling_rate, self.signal.shape, *self.lead_names, self.sample_type, self.quality is None

    @property
    def sample_type(self):
        """The type of its samples in millivolt."""
        return np.float32 if self.signal.dtype == np.float32 else np.float64

    def say(self):
        """Log what is doubtful about its samples; raise what makes it impossible to use them."""
        if self.doubt:
            logger.warning(f"{_where(self.name)}{self.doubt}")
        if self.fault:
            raise self.fault


@dataclasses.dataclass
class _Given:
    """One record as handed over."""

    signal: np.ndarray
    name: str | None
    sampling_rate: float | None
    lead_names: list[str] | None
    units: str | list[str] | None
    quality: np.ndarray | None
    may_hold_other_signals: bool  # a Record may: respiration ...; in an array an unknown name is a slip


def as_list_of_records(record):
    """Return a list: the records of a list of records, or the one record that was given."""
    if not isinstance(record, (list, tuple)) or _is_rows(record):
        return [record]
    if not len(record):
        raise ValueError("An empty list of records; pass at least one record.")
    return list(record)


def check_record(record, accepted_leads, given, lead_aliases=None):
    """Return one record as a `CheckedRecord`: all that can be said without looking at its samples is in order.

    Args:
        record: array or nested list `(num_leads, num_samples)`, dict, or `Record`.
        accepted_leads (`list[str]`): standard names of the leads that the model takes.
        given (`dict`): `sampling_rate`, `lead_names`, `units` as named in the call, each possibly `None`.
        lead_aliases (`dict[str, str]`, *optional*): names of yours to standard names.

    Raises:
        ValueError, TypeError: see `AnyECGFeatureExtractor.__call__`.
    """
    record = _take_apart(record, given)
    _check_shape(record)
    rate = check_sampling_rate(record.sampling_rate, record.name)
    rows, names = _choose_leads(record, accepted_leads, lead_aliases)
    units = _one_unit_per_row(record)
    to_mv = [unit_to_mv(units[row], record.name) for row in rows]
    signal = record.signal if len(rows) == len(record.signal) else record.signal[rows]
    quality = None if record.quality is None else _known_quality(record)[rows]
    return CheckedRecord(signal, rate, names, to_mv, record.name, quality)


def in_millivolt(records):
    """Return the samples of records of one kind in mV, `(num_records, num_leads, num_samples)`; NaN is "no value".

    What is doubtful or impossible about those of a record is noted in it, not said: it is not yet its turn. Impossible
    ones become 0. float32 stays float32, all else becomes float64.
    """
    signal = np.empty((len(records), *records[0].signal.shape), records[0].sample_type)
    for record, out in zip(records, signal, strict=True):
        out[:] = record.signal
    lowest, highest = lead_extremes(signal)
    for place in np.flatnonzero(((lowest == -np.inf) | (highest == np.inf)).any(axis=1)):
        records[place].fault = _infinite(signal[place], records[place])
        signal[place] = lowest[place] = highest[place] = 0.0
    to_mv = np.array([record.to_mv for record in records])[..., None]
    if (to_mv != 1.0).any():
        np.multiply(signal, to_mv, out=signal, casting="same_kind")
        lowest, highest = lead_extremes(signal)
    ranges = np.where(highest >= lowest, highest - lowest, 0.0)
    largest = np.maximum(highest, -lowest)
    for place, record in enumerate(records):
        record.doubt = implausible_ranges(ranges[place])
        if largest[place].max() > LARGEST_MV:
            record.fault = _impossible(largest[place], record)
            signal[place] = 0.0
    return signal


def _is_rows(record):
    """Whether a list is one record, its elements being rows of numbers, and not a list of records."""
    first = record[0] if len(record) else None
    if isinstance(first, (list, tuple)):
        return not len(first) or not isinstance(first[0], (list, tuple, np.ndarray))
    return first is not None and not isinstance(first, str) and (np.isscalar(first) or getattr(first, "ndim", 2) == 1)


def _take_apart(record, given):
    """Return the parts of one record, from itself or from the call; a contradiction is an error."""
    is_record = all(hasattr(record, part) for part in ("signal", *_PARTS))
    if isinstance(record, dict):
        signal, name = record.get("signal", record.get("array")), record.get("record_name")
        brought = {part: record.get(part) for part in _PARTS}
        if signal is None:
            raise ValueError(
                f"{_where(name)}a dict with keys {sorted(map(str, record))}; "
                'needed: "signal" (or "array"), "sampling_rate", "lead_names", "units".'
            )
    elif is_record:
        signal, name = record.signal, getattr(record, "record_name", None)
        brought = {part: getattr(record, part) for part in _PARTS}
    elif isinstance(record, (str, bytes)) or hasattr(record, "__fspath__"):
        raise TypeError(f"{record!r} is a path; read it first: extractor(read_record(path)). The pipelines take paths.")
    else:
        signal, name, brought = record, None, dict.fromkeys(_PARTS)
    parts = {part: _one_of(brought[part], given.get(part), part, name) for part in _PARTS}
    quality = getattr(record, "quality", None) if is_record else None
    return _Given(_as_array(signal, name), name, **parts, quality=quality, may_hold_other_signals=is_record)


def _one_of(brought, given, part, name):
    if brought is None or given is None:
        return given if brought is None else brought
    same = brought == given if np.isscalar(brought) and np.isscalar(given) else list(brought) == list(given)
    if not same:
        raise ValueError(
            f"{_where(name)}{part} is {brought!r} in the record and {given!r} in the call. "
            "Leave it out of the call, or correct one of them."
        )
    return brought


def _as_array(signal, name):
    if isinstance(signal, np.ma.MaskedArray):
        signal = signal.astype(np.float64).filled(np.nan)
    try:
        return np.asarray(signal)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{_where(name)}the signal is no array ({error}). Its rows need one length each and numbers only."
        ) from None


def _check_shape(record):
    signal, where = record.signal, _where(record.name)
    if signal.dtype.kind not in "iuf":
        raise ValueError(f"{where}the signal holds {signal.dtype}; needed: integers or floats, NaN for no value.")
    if signal.ndim != 2:
        hints = {1: " One lead: pass signal[None] with one lead name.", 3: " Several records: pass list(signal)."}
        hint = hints.get(signal.ndim, "")
        raise ValueError(f"{where}signal of shape {signal.shape}; needed: (num_leads, num_samples).{hint}")
    if signal.size == 0:
        raise ValueError(f"{where}the signal is empty, shape {signal.shape}; needed: at least one lead and one patch.")


def _choose_leads(record, accepted_leads, lead_aliases):
    """Return the rows of the record that the model takes, and their standard names."""
    names, where = record.lead_names, _where(record.name)
    _check_number_of_names(record)
    rows, resolved = range(len(names)), names
    if lead_aliases or not _are_standard(names):  # else they stay as they are: a short cut
        if record.may_hold_other_signals:
            rows = [row for row in rows if _is_lead(names[row], lead_aliases)]
        resolved = resolve_lead_names([names[row] for row in rows], lead_aliases, record.name)
    chosen = {row: name for row, name in zip(rows, resolved, strict=True) if name in accepted_leads}
    left_out = [name for row, name in enumerate(names) if row not in chosen]
    if not chosen:
        raise ValueError(
            f"{where}none of its signals ({', '.join(left_out)}) is a lead that the model takes: "
            f"{', '.join(accepted_leads)}. If one of them is, say so with lead_aliases={{...}}."
        )
    if left_out:
        warn_once(
            ("left out", record.name, *left_out),
            f"{where}left out, not among the model's leads: {', '.join(left_out)}.",
        )
    return list(chosen), list(chosen.values())


def _check_number_of_names(record):
    names, where, num_rows = record.lead_names, _where(record.name), len(record.signal)
    if names is None:
        raise ValueError(
            f"{where}no lead names given, and the order of leads is never assumed. "
            f'Pass lead_names=["I", "II", ...], one per row ({num_rows}), or a Record (read_record gives one).'
        )
    if isinstance(names, str):
        raise TypeError(f"{where}lead_names is the single string {names!r}; pass a list, one name per row.")
    if len(names) != num_rows:
        transposed = len(names) == record.signal.shape[1]
        hint = "The signal looks transposed: pass signal.T." if transposed else "Pass one name per row."
        raise ValueError(
            f"{where}{len(names)} lead names for {num_rows} rows (signal of shape {record.signal.shape}). {hint}"
        )


def _are_standard(names):
    return (
        all(isinstance(name, str) for name in names) and LEAD_IDS.keys() >= set(names) and len(set(names)) == len(names)
    )


def _known_quality(record):
    quality = np.asarray(record.quality)
    if quality.ndim != 2 or len(quality) != len(record.signal) or quality.dtype.kind not in "iu":
        raise ValueError(
            f"{_where(record.name)}quality of shape {quality.shape}, {quality.dtype}, for {len(record.signal)} leads; "
            "accepted are integers (num_leads, num_patches), or None."
        )
    return quality.astype(np.int64)


def _is_lead(name, lead_aliases):
    try:
        resolve_lead_name(name, lead_aliases)
    except ValueError:
        return False
    return True


def _one_unit_per_row(record):
    units, where, num_rows = record.units, _where(record.name), len(record.signal)
    if units is None:
        raise ValueError(
            f"{where}no units given; microvolt and millivolt differ by a factor of 1000. "
            'Pass units="mV", "uV", "V" or "nV".'
        )
    units = [units] * num_rows if isinstance(units, str) else list(units)
    if len(units) != num_rows:
        raise ValueError(f"{where}{len(units)} units for {num_rows} rows; pass one for all, or one per row.")
    return units


def _infinite(signal, record):
    infinite = np.isinf(signal)
    lead, sample = np.argwhere(infinite)[0]
    return ValueError(
        f"{_where(record.name)}lead {record.lead_names[lead]} is infinite at sample {sample} ({infinite.sum()} such "
        "values in all). Put NaN where there is no value; an infinite one means that something went wrong before."
    )


def _impossible(largest, record):
    lead = int(largest.argmax())
    return ValueError(
        f"{_where(record.name)}lead {record.lead_names[lead]} goes up to {largest[lead]:.3g} mV; at most "
        f"{LARGEST_MV:g} is taken. Check units and file."
    )


def _where(record):
    return f'Record "{record}": ' if record else ""
