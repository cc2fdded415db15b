"""What a built corpus holds, counted from its Parquet files without their signals: `count_corpus`, `add_up`.

Every figure is a count of values: of a column, in a split. Sums over splits and corpora follow from the counts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from anyecg_hf.signal_quality import ACCEPTABLE, UNUSABLE, QualityFlag

from .shards import SPLITS, Output

ROWS_AT_A_TIME = 1000
PLAIN_COLUMNS = ("patient_id", "age", "sex", "sampling_rate", "is_normal")
LIST_COLUMNS = ("snomed_codes", "challenge_classes", "scp_codes", "superclasses")
OTHER_COLUMNS = (
    "height", "weight", "num_samples", "lead_names", "rhythm_spans", "beats", "quality", "acceptability", "remarks",
)  # fmt: skip
SECONDS_DIGITS = 1  # lengths are told apart so far
UNUSABLE_NAME = "unusable"  # any of `UNUSABLE`


@dataclass
class Statistics:
    """Counts by column, split and value: the columns of a row, and

    seconds: lengths, rounded; hours: the sum of lengths, under ""; leads: "I II ..."; age_by_sex: pairs;
    has_height, has_weight, has_beats, has_rhythms, has_quality, has_remarks, is_acceptable: True or False;
    beats: by symbol; rhythms: seconds by rhythm; lead_seconds: all under "", others by flag.
    """

    counts: dict[str, dict[str, Counter]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Counter)))
    num_bytes: int = 0

    def of(self, column: str, split: str | None = None) -> Counter:
        """Return how often each value occurs, in a split or in all."""
        if split is not None:
            return self.counts[column][split]
        return sum((self.counts[column][name] for name in SPLITS), Counter())

    def num_records(self, split: str | None = None) -> int:
        return self.of("sex", split).total()

    def num_patients(self, split: str | None = None) -> int:
        return len(self.of("patient_id", split))

    @property
    def splits(self) -> list[str]:
        """Those that have records."""
        return [split for split in SPLITS if self.num_records(split)]

    @property
    def num_split_patients(self) -> int:
        """How many patients are in more than one split; 0 where all is well."""
        return sum(self.num_patients(split) for split in SPLITS) - self.num_patients()

    def ordered(self, column: str) -> list:
        """Return the values that occur, the most frequent first, equals in the order of their names."""
        found = self.of(column)
        return sorted((value for value in found if value is not None), key=lambda value: (-found[value], str(value)))

    def quantiles(self, column: str, at: Iterable[float] = (0, 0.25, 0.5, 0.75, 1)) -> list[float] | None:
        """Return quantiles of the values that are not null; None where all are."""
        found = self.of(column)
        values = sorted(value for value in found if value is not None)
        if not values:
            return None
        return np.quantile(np.repeat(values, [found[value] for value in values]), list(at)).tolist()

    def share_of_lead_seconds(self, name: str) -> float | None:
        found = self.of("lead_seconds")
        return found[name] / found[""] if found[""] else None


def count_corpus(output: Output, report: dict) -> Statistics:
    """Return the counts of the shards that a corpus's report names."""
    statistics = Statistics()
    for name, shard in report["shards"].items():
        statistics.num_bytes += shard["num_bytes"]
        with output.fs.open(output.path(name), "rb") as file, pq.ParquetFile(file) as parquet:
            columns = [*PLAIN_COLUMNS, *LIST_COLUMNS, *OTHER_COLUMNS, "split"]
            for batch in parquet.iter_batches(ROWS_AT_A_TIME, columns=columns):
                for split in pc.unique(batch["split"]).to_pylist():
                    _count_rows(statistics, split, batch.filter(pc.equal(batch["split"], split)))
    return statistics


def add_up(all_statistics: Iterable[Statistics]) -> Statistics:
    """Return the counts of several corpora together."""
    total = Statistics()
    for statistics in all_statistics:
        total.num_bytes += statistics.num_bytes
        for column, by_split in statistics.counts.items():
            for split, values in by_split.items():
                total.counts[column][split].update(values)
    return total


def _count_rows(statistics: Statistics, split: str, rows: pa.RecordBatch) -> None:
    def count(column: str, values: pa.Array | Iterable) -> None:
        statistics.counts[column][split].update(_occurrences(values))

    for column in PLAIN_COLUMNS:
        count(column, rows[column])
    for column in LIST_COLUMNS:
        count(column, rows[column].flatten())
    for column in ("height", "weight"):
        count(f"has_{column}", rows[column].is_valid())
    for column in ("beats", "quality", "remarks"):
        count(f"has_{column}", _is_filled(rows[column]))
    count("has_rhythms", _is_filled(rows["rhythm_spans"]))
    count("is_acceptable", pc.greater_equal(rows["acceptability"], ACCEPTABLE))
    count("beats", pc.struct_field(rows["beats"].flatten(), "symbol"))
    count("age_by_sex", [each for each in zip(rows["age"].to_pylist(), rows["sex"].to_pylist()) if each[0] is not None])
    count("leads", [" ".join(names) for names in rows["lead_names"].to_pylist()])
    seconds = pc.divide(pc.cast(rows["num_samples"], pa.float64()), rows["sampling_rate"])
    count("seconds", pc.round(seconds, SECONDS_DIGITS))
    statistics.counts["hours"][split][""] += pc.sum(seconds).as_py() / 3600
    statistics.counts["lead_seconds"][split].update(_lead_seconds(rows["quality"]))
    for rate, spans in zip(rows["sampling_rate"].to_pylist(), rows["rhythm_spans"].to_pylist()):
        for span in spans:
            statistics.counts["rhythms"][split][span["rhythm"]] += (span["stop"] - span["start"]) / rate


def _occurrences(values: pa.Array | Iterable) -> Counter:
    if not isinstance(values, pa.Array):
        return Counter(values)
    found = values.value_counts()
    return Counter(dict(zip(found.field("values").to_pylist(), found.field("counts").to_pylist())))


def _is_filled(lists: pa.ListArray) -> pa.Array:
    """Return where a list, or a list within it, has an element."""
    if not pa.types.is_list(lists.type.value_type):
        return pc.greater(pc.list_value_length(lists), 0)
    has_any = np.bincount(
        pc.list_parent_indices(lists).to_numpy(),
        weights=pc.list_value_length(lists.flatten()).to_numpy(zero_copy_only=False),
        minlength=len(lists),
    )
    return pa.array(has_any > 0)


def _lead_seconds(quality: pa.ListArray) -> Counter:
    """Return how many seconds of a lead there are, how many bear each flag, and how many are unusable by any."""
    flags = quality.flatten().flatten().to_numpy(zero_copy_only=False)
    flags = flags[flags & int(QualityFlag.PADDING) == 0]
    names = {flag.name.lower(): flag for flag in QualityFlag if flag is not QualityFlag.PADDING}
    names[UNUSABLE_NAME] = UNUSABLE
    found = Counter({name: int(np.count_nonzero(flags & int(flag))) for name, flag in names.items()})
    found[""] = len(flags)
    return found
