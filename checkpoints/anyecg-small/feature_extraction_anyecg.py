"""AnyECGFeatureExtractor: records of any rate, unit and order of leads to `input_values`, `lead_ids`, `attention_mask`.

Needs no torch. Saved beside every checkpoint (`preprocessor_config.json`), it owns rate, band, units, leads and window.
"""

import dataclasses
import difflib
import functools
import inspect
import math

import numpy as np
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from .leads import LEAD_IDS, STANDARD_LEADS, resolve_lead_names
from .record_input import CheckedRecord, as_list_of_records, check_record, in_millivolt
from .signal_ops import check_band, check_sampling_rate, denoise, fill_gaps, lead_ranges, resample, warn_once
from .signal_quality import (
    FLAT_STD_MV,
    UNUSABLE,
    QualityFlag,
    beat_flags,
    explain_contradiction,
    line_flags,
    sample_flags,
    saturated_samples,
)
from .training_files import keep_training_files_home

# Keys that the library writes into preprocessor_config.json or hands to the constructor on its own account.
_LIBRARY_KEYS = {
    "feature_extractor_type",
    "auto_map",
    "processor_class",
    "custom_pipelines",
    "_name_or_path",
    "name_or_path",
}
# Samples of all leads that are worked on at once: 8 records of 12 leads, 10 s, 500 Hz. Fewer calls for each record than of
# one by one, and still in the cache.
_MOST_STACKED = 2**19
_FILL = {
    "lead_ids": 0,
    "attention_mask": 0,
    "quality": int(QualityFlag.PADDING),
    "rhythm_codes": -100,
    "bool_masked_pos": 0,
}


class NothingUsableError(ValueError):
    """Every patch of a record is missing or flat.

    Raised by `AnyECGFeatureExtractor.windows` it has `items` and `start_seconds`, as that returns them, without samples.
    """


@dataclasses.dataclass
class _Prepared:
    """Records of one kind in the model's leads, filtered whole at the model's rate; what their samples say of quality.

    Rows are the leads of the first record, then those of the second, and so on.
    """

    records: list[CheckedRecord]
    values: np.ndarray  # (rows, samples at the model's rate), mV, filtered
    filled: np.ndarray  # (rows, samples at the records' rate), mV, gaps bridged
    missing: np.ndarray  # bool, as `filled`

    @functools.cached_property
    def saturated(self):
        """Where a lead is at its rail: bool, as `filled`."""
        return saturated_samples(self.filled, self.sampling_rate)

    @functools.cached_property
    def is_flat(self):
        """Which leads are flat from end to end: bool (rows,)."""
        power = np.vecdot(self.filled, self.filled) / self.filled.shape[1]  # its mean is 0
        return (power < FLAT_STD_MV**2) & ~self.missing.any(axis=1)

    @property
    def sampling_rate(self):
        return self.records[0].sampling_rate

    @property
    def lead_names(self):
        return self.records[0].lead_names


@dataclasses.dataclass
class _Patches:
    """A record, or a stretch of it, in patches; unusable ones are emptied."""

    record: CheckedRecord
    values: np.ndarray  # (leads, patches, patch_size)
    flags: np.ndarray  # int64 (leads, patches)
    usable: np.ndarray  # bool (leads, patches)


class AnyECGFeatureExtractor(FeatureExtractionMixin):
    """Turns ECG records into the input of the AnyECG models.

    Order of work: units to mV; gaps (NaN) bridged for the filters only; resampled to the model's rate; zero-phase
    band-pass; limited to `±clip_mv`; cut into patches of `patch_size`. Patches with a gap, flat ones, and those without the
    heartbeats that the other leads show, are masked (`attention_mask` 0, samples 0). A last patch of which less than half
    is there is left out, else filled up with 0.

    Args:
        sampling_rate (`int` or `float`): Hz, the model's rate.
        patch_size (`int`): samples of a patch at that rate.
        lowcut_hz, highcut_hz (`float` or `None`): corners of the band-pass; `None` leaves a side open. 40 Hz makes
            records of 100 Hz and of 500 Hz look the same to a model.
        lowcut_order, highcut_order (`int`): orders of the Butterworth filter at the corners.
        denoise (`bool`): take the noise floor of each db6 wavelet band out (needs PyWavelets), as the paper does.
        clip_mv (`float` or `None`): larger values are limited to this (mV).
        window_seconds, hop_seconds (`float`): how `windows` cuts long records; `hop_seconds=None` is half a window.
        lead_names (sequence of `str`): standard names of the leads that the model takes; others are left out and
            a warning says so.
        padding_value (`float`): value of absent leads and times; masked in any case.

    Raises:
        ValueError: an option is out of range. TypeError: an option is unknown.

    Example:
        >>> extractor = AnyECGFeatureExtractor()
        >>> signal = np.random.default_rng(0).normal(0, 100, (2, 2500))
        >>> batch = extractor(signal, sampling_rate=250, lead_names=["I", "V5"], units="uV")
        >>> batch["input_values"].shape, batch["lead_ids"].tolist(), batch["attention_mask"].shape
        ((1, 2, 3000), [[1, 11]], (1, 2, 10))
    """

    model_input_names = ["input_values", "lead_ids", "attention_mask"]

    def __init__(
        self,
        sampling_rate=300,
        patch_size=300,
        lowcut_hz=0.5,
        highcut_hz=40.0,
        lowcut_order=2,
        highcut_order=8,
        denoise=False,
        clip_mv=5.0,
        window_seconds=10.0,
        hop_seconds=None,
        lead_names=STANDARD_LEADS,
        padding_value=0.0,
        **kwargs,
    ):
        self._refuse_unknown(kwargs)
        super().__init__(**kwargs)
        self.sampling_rate = sampling_rate
        self.patch_size = patch_size
        self.lowcut_hz = lowcut_hz
        self.highcut_hz = highcut_hz
        self.lowcut_order = lowcut_order
        self.highcut_order = highcut_order
        self.denoise = denoise
        self.clip_mv = clip_mv
        self.window_seconds = window_seconds
        self.hop_seconds = hop_seconds
        self.lead_names = resolve_lead_names(lead_names)
        self.padding_value = padding_value
        self._check_options()

    def __call__(
        self,
        record,
        *,
        sampling_rate=None,
        lead_names=None,
        units=None,
        lead_aliases=None,
        return_tensors=None,
        return_quality=False,
    ):
        """Return the model's input for one record or several.

        Args:
            record: `np.ndarray` or nested list `(num_leads, num_samples)`, a `Record`, a dict with `"signal"` (or
                `"array"`), `"sampling_rate"`, `"lead_names"`, `"units"`, or a list of any of these. NaN is "no value".
                Those of a list that share rate, length and leads are worked on together: faster, with the same result.
            sampling_rate (`float`): Hz, 50 to 100,000; for records that do not bring it.
            lead_names (list of `str`): one per row; for records that do not bring them.
            units (`str` or list of `str`): `"mV"`, `"uV"`, `"V"`, `"nV"`; for records that do not bring them.
            lead_aliases (`dict[str, str]`, *optional*): your names to standard names.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`; NumPy arrays without it.
            return_quality (`bool`): adds `quality`: `int64 (batch, leads, patches)`, sums of `QualityFlag`.

        Returns:
            `BatchFeature`: `input_values` float32 `(batch, leads, samples)` in mV, `lead_ids` int64 `(batch, leads)`,
            `attention_mask` int64 `(batch, leads, patches)`, 1 real, 0 absent or unusable. Rows keep the order given.

        Raises:
            ValueError: rate, lead names or units missing, unknown, impossible or contradictory; a shape that does not
                fit; infinite values; shorter than one patch; nothing usable.
            TypeError: `record` is none of the above.
        """
        given = {"sampling_rate": sampling_rate, "lead_names": lead_names, "units": units}
        items = self.items(record, lead_aliases=lead_aliases, return_quality=return_quality, **given)
        return self.pad(items, return_tensors=return_tensors)

    def items(self, record, *, lead_aliases=None, return_quality=False, **given):
        """Return what `__call__` makes a batch of: a list of one unbatched item per record, as `windows` gives them."""
        records, refusal = [], None
        for one in as_list_of_records(record):
            try:
                records.append(self._checked(one, lead_aliases, given))
            except (ValueError, TypeError) as error:
                refusal = error  # raised when it is its turn: one before it may be refused for its samples
                break
        patches = {}
        for places in _alike(records):
            patches |= zip(places, self._in_patches([records[place] for place in places], return_quality), strict=True)
        items = []
        for place, one in enumerate(records):
            one.say()
            items.append(_item(patches[place], return_quality))
        if refusal:
            raise refusal
        return items

    def windows(
        self, record, *, sampling_rate=None, lead_names=None, units=None, lead_aliases=None, return_quality=False
    ):
        """Return a long record cut into overlapping windows of `window_seconds`: `(items, start_seconds)`.

        The record is filtered whole, then cut every `hop_seconds`; the last window ends where the record ends. A record
        no longer than a window is one item. Windows in which nothing is usable are left out, with a warning.

        Args: as for `__call__`, for one record.

        Returns:
            items (`list[dict]`): each `input_values (leads, samples)`, `lead_ids (leads,)`, `attention_mask (leads,
                patches)` and, if asked for, `quality`; `pad(items)` makes a batch.
            start_seconds (`np.ndarray` of shape `(len(items),)`): where each window begins in the record.

        Raises:
            As `__call__`; `NothingUsableError` where all windows would be left out.
        """
        given = {"sampling_rate": sampling_rate, "lead_names": lead_names, "units": units}
        record = self._checked(record, lead_aliases, given)
        record.quality = None  # of windows that need not begin with a patch
        prepared = self._prepare([record])
        record.say()
        items, kept, left_out = [], [], []
        for start in self._window_starts(prepared.values.shape[1]):
            (patches,) = self._cut(prepared, start, self._window_samples, return_quality)
            if not patches.usable.any():
                where, since = _where(record.name), start / self.sampling_rate
                warn_once("window", f"{where}nothing usable from {since:g} s on; window left out.")
                left_out.append(_without_samples(patches))
                continue
            items.append(_item(patches, return_quality))
            kept.append(start)
        if not items:
            error = _nothing_usable(prepared, 0)
            starts = self._window_starts(prepared.values.shape[1])
            error.items, error.start_seconds = left_out, np.array(starts) / self.sampling_rate
            raise error
        return items, np.array(kept) / self.sampling_rate

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Write preprocessor_config.json and the code to a folder; arguments as for `FeatureExtractionMixin.save_pretrained`."""
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        keep_training_files_home(save_directory)
        return files

    def pad(self, features, return_tensors=None):
        """Return a batch of items: leads filled up to the largest count (`lead_ids` 0), time to the longest, masks too.

        Args:
            features (list of dicts): unbatched items as `windows` gives them, or rows of a data set; `attention_mask`
                may be absent. `quality`, `rhythm_codes`, `bool_masked_pos` are padded too, all else is stacked.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`; NumPy arrays without it.

        Returns:
            `BatchFeature` with a first axis `batch` for every key.

        Raises:
            ValueError: no items, a key that only some have, or samples that do not fill whole patches.
        """
        if not features:
            raise ValueError("No items to pad; pass a list of at least one.")
        items = [self._complete(dict(item)) for item in features]
        keys = list(items[0])
        for item in items:
            if set(item) != set(keys):
                raise ValueError(
                    f"Items of one batch have different keys: {sorted(keys)} and {sorted(item)}; extract them alike."
                )
        num_leads = max(len(item["lead_ids"]) for item in items)
        num_patches = max(item["attention_mask"].shape[1] for item in items)
        sizes = {"lead_ids": (num_leads,), "input_values": (num_leads, num_patches * self.patch_size)}
        batch = {}
        for key in keys:
            arrays = [np.asarray(item[key]) for item in items]
            if key == "input_values" or key in _FILL:
                fill = self.padding_value if key == "input_values" else _FILL[key]
                arrays = [_filled_up(array, sizes.get(key, (num_leads, num_patches)), fill) for array in arrays]
            batch[key] = np.stack(arrays)
        return BatchFeature(batch, tensor_type=return_tensors)

    def _checked(self, record, lead_aliases, given):
        """Check one record, all but its samples."""
        record = check_record(record, self.lead_names, given, lead_aliases)
        self._refuse_short(record)
        if record.quality is not None and record.quality.shape[1] != self._num_patches(record):
            raise ValueError(
                f"{_where(record.name)}quality of {record.quality.shape[1]} patches for a record of "
                f"{self._num_patches(record)}; leave it out where it is of another extractor or part."
            )
        return record

    def _num_patches(self, record):
        """Return how many patches a record has; the last one may be filled up by half."""
        num_samples = math.floor(record.signal.shape[1] * self.sampling_rate / record.sampling_rate + 0.5)
        return max(1, math.floor(num_samples / self.patch_size + 0.5))

    def _in_patches(self, records, return_quality):
        """Return the `_Patches` of each of records of one kind, whole. What is wrong with a record is noted in it."""
        prepared = self._prepare(records)
        patches = self._cut(prepared, 0, prepared.values.shape[1], return_quality)
        for place, (record, one) in enumerate(zip(records, patches, strict=True)):
            if not record.fault and not one.usable.any():
                record.fault = _nothing_usable(prepared, place)
        return patches

    def _prepare(self, records):
        """Filter records of one kind whole."""
        filled = in_millivolt(records)
        filled = filled.reshape(-1, filled.shape[-1])  # (rows, samples)
        missing = np.isnan(filled)
        filled = fill_gaps(filled)  # under the same name, so that no copy stays behind
        return _Prepared(records, self._in_band(filled, records[0].sampling_rate), filled, missing)

    def _in_band(self, filled, sampling_rate):
        """Return `filled` at the model's rate and in its band."""
        values = resample(
            filled,
            sampling_rate,
            self.sampling_rate,
            self.lowcut_hz,
            self.highcut_hz,
            lowcut_order=self.lowcut_order,
            highcut_order=self.highcut_order,
        )
        return denoise(values) if self.denoise else values

    def _cut(self, prepared, start, num_samples, return_quality):
        """Return the `_Patches` of each record, at most `num_samples` of the model's from `start` on."""
        stop = min(prepared.values.shape[1], start + num_samples)
        num_patches = max(1, math.floor((stop - start) / self.patch_size + 0.5))
        stop = min(stop, start + num_patches * self.patch_size)
        values = np.zeros((len(prepared.values), num_patches * self.patch_size), np.float32)
        values[:, : stop - start] = prepared.values[:, start:stop]
        largest = np.maximum.reduceat(np.abs(values), np.arange(num_patches) * self.patch_size, axis=1)
        values = values.reshape(len(prepared.records), -1, num_patches, self.patch_size)
        flags = self._flags(prepared, values, start, stop, return_quality)
        if self.clip_mv is not None and largest.max() > self.clip_mv:
            flags |= (largest.reshape(flags.shape) > self.clip_mv) * int(QualityFlag.LIMITED)
            np.clip(values, -self.clip_mv, self.clip_mv, out=values)
        usable = (flags & int(UNUSABLE)) == 0
        values[~usable] = 0.0
        return [_Patches(*one) for one in zip(prepared.records, values, flags, usable, strict=True)]

    def _flags(self, prepared, values, start, stop, return_quality):
        """Return the quality flags `(records, leads, patches)` from `start` to `stop` (samples of the model).

        Where they are known they are not looked for; those that neither mask nor warn, only if somebody asks for them.
        """
        num_patches = values.shape[2]
        if prepared.records[0].quality is not None:
            return np.stack([record.quality for record in prepared.records])
        edges = start + np.arange(num_patches + 1) * self.patch_size
        step = prepared.sampling_rate / self.sampling_rate
        edges = np.ceil(np.minimum(edges, stop) * step - 1e-6).astype(np.int64)
        edges = np.minimum(edges, prepared.filled.shape[1])
        rate = prepared.sampling_rate
        flags = sample_flags(prepared.filled, prepared.missing, prepared.saturated, rate, edges)
        flags[prepared.is_flat] |= int(QualityFlag.FLAT)
        usable = (flags & int(UNUSABLE)) == 0
        if return_quality:
            flags |= line_flags(prepared.filled, usable, rate, edges)
        flags, usable = flags.reshape(values.shape[:3]), usable.reshape(values.shape[:3])
        return flags | beat_flags(values, usable, self.sampling_rate, prepared.lead_names)

    def _refuse_short(self, record):
        num_samples, rate = record.signal.shape[1], record.sampling_rate
        if math.floor(num_samples * self.sampling_rate / rate + 0.5) < self.patch_size:
            raise ValueError(
                f"{_where(record.name)}{num_samples} samples at {rate:g} Hz last {num_samples / rate:.3g} s; at least "
                f"one patch of {self.patch_size / self.sampling_rate:g} s is needed. Check sampling_rate, or give more."
            )

    @property
    def _window_samples(self):
        return round(self.window_seconds * self.sampling_rate)

    def _window_starts(self, num_samples):
        last = num_samples - self._window_samples
        if last <= 0:
            return [0]
        hop_seconds = self.window_seconds / 2 if self.hop_seconds is None else self.hop_seconds
        starts = list(range(0, last + 1, round(hop_seconds * self.sampling_rate)))
        return starts if starts[-1] == last else starts + [last]

    def _complete(self, item):
        """Return one item for `pad` with arrays in place and its samples and masks checked against each other."""
        values = np.asarray(item["input_values"], np.float32)
        num_patches, rest = divmod(values.shape[-1], self.patch_size)
        if values.ndim != 2 or rest or len(item["lead_ids"]) != len(values):
            raise ValueError(
                f"Item with input_values {values.shape} and {len(item['lead_ids'])} lead_ids; needed: (leads, "
                f"samples), samples a multiple of {self.patch_size}, one id per lead. Pass unbatched items."
            )
        item["input_values"] = values
        item["lead_ids"] = np.asarray(item["lead_ids"], np.int64)
        mask = item.get("attention_mask")
        item["attention_mask"] = np.asarray(np.ones((len(values), num_patches)) if mask is None else mask, np.int64)
        if item["attention_mask"].shape != (len(values), num_patches):
            raise ValueError(
                f"Item with attention_mask {item['attention_mask'].shape} for input_values {values.shape}; "
                f"needed: {(len(values), num_patches)}, one entry per lead and patch of {self.patch_size} samples."
            )
        return item

    def _refuse_unknown(self, kwargs):
        unknown = [key for key in kwargs if key not in _LIBRARY_KEYS]
        if unknown:
            classes = type(self).__mro__[: type(self).__mro__.index(FeatureExtractionMixin)]
            signatures = [inspect.signature(each.__init__) for each in classes if "__init__" in vars(each)]
            parameters = [each for signature in signatures for each in signature.parameters.values()]
            options = [each.name for each in parameters if each.name != "self" and each.kind is not each.VAR_KEYWORD]
            close = difflib.get_close_matches(unknown[0], options, n=1)
            hint = f' Did you mean "{close[0]}"?' if close else ""
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(map(repr, unknown))}.{hint} "
                f"Options: {', '.join(options)}."
            )

    def _check_options(self):
        check_sampling_rate(self.sampling_rate)
        check_band(self.sampling_rate, self.lowcut_hz, self.highcut_hz)
        for name in ("patch_size", "lowcut_order", "highcut_order"):
            _require(
                isinstance(getattr(self, name), int) and getattr(self, name) > 0, self, name, "a whole number above 0"
            )
        _require(isinstance(self.denoise, bool), self, "denoise", "True or False")
        _require(self.clip_mv is None or self.clip_mv > 0, self, "clip_mv", "millivolt above 0, or None")
        _require(bool(self.lead_names), self, "lead_names", "at least one lead")
        whole = self._window_samples > 0 and self._window_samples % self.patch_size == 0
        _require(whole, self, "window_seconds", f"a multiple of the patch, {self.patch_size / self.sampling_rate:g} s")
        hop_is_ok = self.hop_seconds is None or 1 / self.sampling_rate <= self.hop_seconds <= self.window_seconds
        _require(hop_is_ok, self, "hop_seconds", "None, or above 0 and no longer than window_seconds")


def _require(condition, extractor, name, accepted):
    if not condition:
        raise ValueError(f"{type(extractor).__name__}: {name}={getattr(extractor, name)!r}; accepted: {accepted}.")


def _alike(records):
    """Yield lists of places: those of records of one kind, no more than are worked on at once."""
    kinds = {}
    for place, record in enumerate(records):
        kinds.setdefault(record.kind, []).append(place)
    for places in kinds.values():
        most = max(1, _MOST_STACKED // records[places[0]].signal.size)
        for first in range(0, len(places), most):
            yield places[first : first + most]


def _item(patches, return_quality):
    """Return one unbatched item, after a warning of what is odd about it."""
    _warn_of_flags(patches)
    item = {"input_values": patches.values.reshape(len(patches.values), -1), **_without_samples(patches)}
    if not return_quality:
        del item["quality"]
    return item


def _without_samples(patches):
    """Return what an item says of a record beside its samples."""
    return {
        "lead_ids": np.array([LEAD_IDS[name] for name in patches.record.lead_names], np.int64),
        "attention_mask": patches.usable.astype(np.int64),
        "quality": patches.flags,
    }


def _warn_of_flags(patches):
    """Warn of leads that are masked from end to end, and of limb leads that contradict each other."""
    record, flags, usable = patches.record, patches.flags, patches.usable
    if not flags.any():
        return
    for lead in np.flatnonzero(~usable.any(axis=1)):
        reasons = ((QualityFlag.MISSING, "missing"), (QualityFlag.DISCONNECTED, "disconnected"))
        found = [reason for flag, reason in reasons if (flags[lead] & int(flag)).any()]
        reason = found[0] if found else "flat"
        warn_once(
            ("lead", reason),
            f"{_where(record.name)}lead {record.lead_names[lead]} is {reason} and masked. "
            "(Said once; attention_mask and quality name every such lead.)",
        )
    contradicts = ((flags & int(QualityFlag.INCONSISTENT)) != 0) & usable
    leads = [name for name, each, used in zip(record.lead_names, contradicts, usable) if each.sum() > used.sum() / 2]
    if leads:
        change = explain_contradiction(patches.values, usable, record.lead_names)
        hint = (
            f"They would agree if {change}"
            if change
            else "No exchange of two explains it; perhaps they were not recorded at one time"
        )
        warn_once(
            ("limb leads", change),
            f"{_where(record.name)}limb leads {', '.join(leads)} contradict each other (I + III = II, and what follows "
            f"for aVR, aVL, aVF): possibly swapped. {hint}. Check lead_names. (Said once; quality names every such lead.)",
        )


def _nothing_usable(prepared, place):
    record = prepared.records[place]
    rows = slice(place * len(record.lead_names), (place + 1) * len(record.lead_names))
    leads = [
        f"{name} {np.mean(missing):.0%} missing, range {span:.3g} mV"
        for name, missing, span in zip(
            record.lead_names, prepared.missing[rows], lead_ranges(prepared.filled[rows]), strict=True
        )
    ]
    return NothingUsableError(
        f"{_where(record.name)}nothing usable: every patch is missing or flat ({'; '.join(leads)}). "
        "Check the file and its units."
    )


def _filled_up(array, shape, fill):
    """Return `array` with `fill` added at the ends of its axes up to `shape`."""
    if array.shape == shape:
        return array
    if array.ndim != len(shape) or any(have > want for have, want in zip(array.shape, shape, strict=True)):
        raise ValueError(
            f"An array of shape {array.shape} in a batch of {shape} (leads, patches or samples); they do not fit."
        )
    out = np.full(shape, fill, array.dtype)
    out[tuple(slice(size) for size in array.shape)] = array
    return out


def _where(record):
    return f'Record "{record}": ' if record else ""
