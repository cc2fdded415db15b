"""The cards of a built data set, rendered from what is in it: README.md with the configurations that `load_dataset` knows,
and for each finished corpus cards/<corpus>.md with a picture.

Corpora that have a reports/<corpus>.json are finished; others do not appear. Same data, same bytes.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files

import jinja2
import yaml

from anyecg_hf.signal_quality import UNUSABLE, QualityFlag

from .corpora import CORPORA, are_related
from .dataset_pictures import draw_all, draw_corpus, has_matplotlib
from .dataset_rows import SCHEMA
from .dataset_statistics import Statistics, add_up, count_corpus
from .labels import ptb_xl_statements, snomed_codes
from .shards import SPLITS, Output
from .splits import load_duplicates

logger = logging.getLogger(__name__)

TEMPLATES = files("hub_cards") / "datasets"
SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))
LARGEST = "10M<n<100M"
TAGS = ("ecg", "electrocardiogram", "electrocardiography", "medical", "time-series", "physionet", "anyecg")


def write_cards(output: Output) -> None:
    """Write the cards of what is finished below `output`, and remove those of what is not."""
    reports = _finished_reports(output)
    statistics = {corpus: count_corpus(output, report) for corpus, report in reports.items()}
    cards = _cards(reports, statistics) if reports else {}
    for name in ["README.md", *(f"cards/{name}" for name in output.names("cards"))]:
        if name not in cards and output.fs.exists(output.path(name)):
            output.remove(name)
    for name, data in cards.items():
        output.write(name, data)


def configurations(reports: Mapping[str, dict]) -> list[dict]:
    """Return the configurations of the header: each corpus, `all` of them, and each left out.

    `without-<corpus>` trains and validates on all others and tests on the whole of the one left out; left out with it are
    corpora and shards that share recordings with others. Splits and configurations that would be empty are not named:
    `load_dataset` takes a pattern without a file for an error.
    """
    patterns = {corpus: _patterns(corpus, report) for corpus, report in reports.items() if report["shards"]}
    unshared = {corpus: _patterns(corpus, report, "-[0-9]*") for corpus, report in reports.items() if report["shards"]}
    found = [_configuration("all", {split: _join(patterns.values(), split) for split in SPLITS}) | {"default": True}]
    found += [
        _configuration(corpus, {split: [path] for split, path in own.items()}) for corpus, own in patterns.items()
    ]
    for corpus, own in patterns.items():
        others = [each for other, each in unshared.items() if each and not are_related(other, corpus)]
        if others:
            splits = {"train": _join(others, "train"), "validation": _join(others, "validation")}
            found.append(_configuration(f"without-{corpus}", splits | {"test": list(own.values())}))
    return found if patterns else []


def _finished_reports(output: Output) -> dict[str, dict]:
    present = set(output.names("reports"))
    return {
        corpus: json.loads(output.read(f"reports/{corpus}.json")) for corpus in CORPORA if f"{corpus}.json" in present
    }


def _patterns(corpus: str, report: dict, numbers: str = "-*") -> dict[str, str]:
    """Return split -> pattern of its files, for the splits that have some; `numbers` follows the name of the split."""
    paths = {split: f"data/{corpus}/{split}{numbers}.parquet" for split in SPLITS}
    return {split: path for split, path in paths.items() if fnmatch.filter(report["shards"], path)}


def _join(patterns, split: str) -> list[str]:
    return [each[split] for each in patterns if split in each]


def _configuration(name: str, splits: Mapping[str, list[str]]) -> dict:
    files_of = [{"split": split, "path": paths} for split, paths in splits.items() if paths]
    return {"config_name": name, "data_files": files_of}


def _cards(reports: Mapping[str, dict], statistics: Mapping[str, Statistics]) -> dict[str, bytes]:
    """Return the text and pictures of all cards, by file name."""
    environment, configs = _environment(), configurations(reports)
    facts = {corpus: yaml.safe_load((TEMPLATES / f"{corpus}.yaml").read_text(encoding="utf-8")) for corpus in reports}
    total = add_up(statistics.values())
    pictures = _pictures(facts, statistics, total)
    nulls = sum((Counter(report["nulls"]) for report in reports.values()), Counter())
    shared = {
        "reports": reports,
        "configs": {each["config_name"] for each in configs},
        "facts": facts,
        "statistics": statistics,
        "total": total,
        "pictures": pictures,
        "total_nulls": dict(sorted(nulls.items())),
        "num_shared_patients": sum(each.num_patients() for each in statistics.values()) - total.num_patients(),
        "citations": list(dict.fromkeys(text for each in facts.values() for text in each["citations"])),
    }
    cards = {"README.md": environment.get_template("all.md.j2").render(shared, header=_header(configs, facts, total))}
    for corpus in reports:
        cards[f"cards/{corpus}.md"] = environment.get_template("corpus.md.j2").render(shared, corpus=corpus)
    return {name: re.sub(r"\n{3,}", "\n\n", text).encode() for name, text in cards.items()} | pictures


def _header(configs: list[dict], facts: Mapping[str, dict], total: Statistics) -> str:
    """Return the YAML header: what the Hub shows, and what `load_dataset` reads."""
    licences = sorted({licence["id"] for each in facts.values() for licence in each["licences"]})
    size = next((name for limit, name in SIZES if total.num_records() < limit), LARGEST)
    header = {
        "pretty_name": "12-lead ECGs of the PhysioNet Challenges and PTB-XL",
        "license": licences[0] if len(licences) == 1 else licences,
        "task_categories": ["other"],
        "tags": list(TAGS),
        "size_categories": [size],
    }
    if configs:
        header["configs"] = configs
    return yaml.safe_dump(header, sort_keys=False, default_flow_style=None, width=120)


def _pictures(facts: Mapping[str, dict], statistics: Mapping[str, Statistics], total: Statistics) -> dict[str, bytes]:
    if not has_matplotlib():
        logger.warning('the cards are written without pictures, which need matplotlib: pip install "anyecg-hf[plot]"')
        return {}
    pictures = {
        f"cards/{corpus}.png": draw_corpus(facts[corpus]["name"], each, each.ordered("challenge_classes"))
        for corpus, each in statistics.items()
        if each.num_records()
    }
    if total.num_records():
        pictures["cards/all.png"] = draw_all("All corpora", statistics, total, total.ordered("challenge_classes"))
    return pictures


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (TEMPLATES / name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "count": "{:,}".format, "general": "{:g}".format, "percent": _percent, "cell": _cell, "reason_kinds": _reason_kinds
    }  # fmt: skip
    unknown = [each for each in load_duplicates() if not each["same_as"]]
    environment.globals |= {
        "SPLITS": SPLITS,
        "COLUMNS": yaml.safe_load((TEMPLATES / "columns.yaml").read_text(encoding="utf-8")),
        "TYPES": {each.name: str(each.type).replace("item: ", "") for each in SCHEMA},
        "FLAGS": [flag.name.lower() for flag in QualityFlag if flag in UNUSABLE and flag is not QualityFlag.PADDING],
        "code_names": {code: each.description for code, each in snomed_codes().items()},
        "codes_with_class": [code for code, each in snomed_codes().items() if each.challenge_class],
        "class_names": _class_names(),
        "statement_names": {each.code: each.description for each in ptb_xl_statements()},
        "num_unknown_duplicates": Counter(each["corpus"] for each in unknown),
    }
    return environment


def _class_names() -> dict[str, str]:
    """Return what each of the Challenge's classes stands for; of merged codes, all of them."""
    names: dict[str, list[str]] = {}
    for each in snomed_codes().values():
        if each.challenge_class:
            names.setdefault(each.challenge_class, []).append(each.description)
    return {name: ", ".join(descriptions) for name, descriptions in names.items()}


def _cell(value: object) -> str:
    """Return a value from the data as the text of a table cell: on one line, and no Markdown or HTML of its own."""
    text = "".join(each if each.isprintable() else "?" for each in " ".join(str(value).split()))
    return re.sub(r"([\\`*_\[\]<>|#~!&])", r"\\\1", text)


def _percent(share: float | None) -> str:
    if share is None:
        return "–"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _reason_kinds(rejected: list[dict]) -> list[tuple[str, int]]:
    """Return how often each kind of reason occurs: names of files and numbers taken out, the most frequent first."""
    kinds: Counter = Counter()
    for each in rejected:
        name = each["record_id"].rpartition("/")[2] or each["reason"]
        text = re.sub(r"\S*" + re.escape(name) + r"[^\s:,;]*", "…", each["reason"])
        kinds[re.sub(r"\d+(?:[.,]\d+)*", "N", text)[:160]] += 1
    return sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
