"""The cards of a built data set: what `load_dataset` finds by them, and that every figure is what the files hold."""

import csv
import json
import logging
import re
import shutil
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import wfdb
import yaml
from datasets import get_dataset_config_names, load_dataset
from huggingface_hub import DatasetCard

from anyecg_hf.signal_quality import QualityFlag
from anyecg_hf.simulate import simulate_record
from training import build_dataset, dataset_card, dataset_pictures
from training.build_dataset import build_corpus
from training.corpora import CORPORA
from training.dataset_card import configurations, write_cards
from training.dataset_rows import SCHEMA
from training.dataset_statistics import count_corpus
from training.labels import snomed_codes
from training.shards import SPLITS, Output
from training.splits import load_split, split_of

PER_SPLIT = {"train": 3, "validation": 2, "test": 2}
CODES = (
    ["426783006"],
    ["164889003", "59118001"],
    ["713427006"],
    ["999999999", "427172004"],
    ["17338001"],
    [],
    ["10370003"],
)
AGES, SEXES = ("61", "NaN", "61", "-1", "88", "47", "5"), ("Male", "Female", "Unknown", "Female", "Male", "F", "M")
PTB_XL = (  # ecg_id, patient, fold, statements
    (1, 11, 3, "{'NORM': 100.0, 'SR': 0.0}"),
    (2, 11, 3, "{'IMI': 50.0, 'AFIB': 0.0}"),
    (3, 12, 9, "{'SR': 0.0}"),
    (4, 13, 10, "{'CRBBB': 100.0}"),
)
RATE = 100


def write_record(folder, name, seed, *, seconds=3, comments=()):
    """Write a simulated record as WFDB files and return its length in samples."""
    record = simulate_record(seed=seed, sampling_rate=RATE, duration_seconds=seconds)
    folder.mkdir(parents=True, exist_ok=True)
    num_leads = len(record.lead_names)
    wfdb.wrsamp(
        name, fs=RATE, units=["mV"] * num_leads, sig_name=record.lead_names, fmt=["16"] * num_leads,
        d_signal=np.round(record.signal.T * 1000).astype(np.int16), adc_gain=[1000.0] * num_leads,
        baseline=[0] * num_leads, comments=list(comments), write_dir=str(folder),
    )  # fmt: skip
    return record.signal.shape[1]


def write_challenge(folder, corpus):
    """Write records of a corpus in the Challenge's form, some of each split, and one header without its samples."""
    names = {split: [] for split in SPLITS}
    for name, (_, fold) in load_split(corpus).items():
        names[split_of(fold)].append(name)
    chosen = [name for split, number in PER_SPLIT.items() for name in names[split][:number]]
    for seed, (name, codes, age, sex) in enumerate(zip(chosen, CODES, AGES, SEXES)):
        comments = [f"Age: {age}", f"Sex: {sex}", f"Dx: {','.join(codes)}"]
        write_record(folder, name, seed, seconds=3 + seed % 2, comments=comments)
    (folder / f"{names['train'][-1]}.hea").write_text(f"{names['train'][-1]} 12 500 5000\n")


def write_ptb_xl(folder):
    columns = ["ecg_id", "patient_id", "age", "sex", "height", "weight", "scp_codes", "heart_axis", "strat_fold"]
    columns += ["filename_lr", "filename_hr"]
    folder.mkdir()
    with open(folder / "ptbxl_database.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for ecg_id, patient, fold, statements in PTB_XL:
            names = [f"{place}/00000/{ecg_id:05d}_{end}" for place, end in (("records100", "lr"), ("records500", "hr"))]
            table.writerow([ecg_id, f"{patient}.0", 300.0, 0, "", 70.0, statements, "LAD", fold, *names])
            write_record(folder / "records100/00000", f"{ecg_id:05d}_lr", ecg_id)


def write_incart(folder):
    """Write I01 with five beats and two rhythms, and nothing but the header of I02."""
    length = write_record(
        folder, "I01", 1, seconds=10, comments=["<age>: 65 <sex>: F <diagnoses> Coronary artery disease"]
    )
    marks = ([0, 50, 150, 250, 400, 450, 600], ["+", "N", "N", "V", "+", "N", "N"])
    notes = ["(N", "", "", "", "(AFIB", "", ""]
    wfdb.wrann("I01", "atr", np.array(marks[0]), symbol=marks[1], aux_note=notes, fs=RATE, write_dir=str(folder))
    assert length == 1000
    (folder / "I02.hea").write_text("I02 12 257 462600\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for corpus in ("cpsc-2018", "georgia"):
        write_challenge(folder / corpus, corpus)
    write_ptb_xl(folder / "ptb-xl")
    write_incart(folder / "incart")
    (folder / "cpsc-extra").mkdir()
    for number in range(1, 26):  # none of them can be read
        (folder / "cpsc-extra" / f"Q{number:04d}.hea").write_text(f"Q{number:04d} 12 500 5000\n")
    return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """A data set of five corpora; do not change it."""
    out = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:  # the last one writes the cards of all
        patch.setattr(build_dataset, "write_cards", lambda output: None)
        for corpus in ("cpsc-2018", "cpsc-extra", "incart", "ptb-xl"):
            build_corpus(corpus, source / corpus, out)
    build_corpus("georgia", source / "georgia", out)
    return out


@pytest.fixture
def copied(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "copied"))


def rows_of(folder, *columns):
    """Return the rows of all Parquet files, with what their paths say: (corpus, split)."""
    found = []
    for path in sorted(folder.glob("data/*/*.parquet")):
        place = (path.parent.name, path.name.split("-")[0])
        found += [(place, row) for row in pq.read_table(path, columns=list(columns)).to_pylist()]
    return found


def header_of(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def table_of(text, first_cell):
    """Return the rows of a Markdown table by their first cells, as text."""
    lines = text.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith(f"| {first_cell} |".replace("  ", " ")))
    found = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        found[cells[0].replace("\\", "")] = cells[1:]
    return found


def expected_records(folder, config, split):
    """Return the record ids of a configuration, from the rows alone."""
    rows = [row for _, row in rows_of(folder, "record_id", "corpus", "split")]
    if config.startswith("without-"):
        left_out = config.removeprefix("without-")
        rows = [row for row in rows if (row["corpus"] == left_out) == (split == "test")]
        return sorted(row["record_id"] for row in rows if split == "test" or row["split"] == split)
    return sorted(row["record_id"] for row in rows if row["split"] == split and config in ("all", row["corpus"]))


def test_each_corpus_and_each_left_out_is_a_configuration_and_those_without_rows_are_not(built):
    with_rows = ["cpsc-2018", "incart", "ptb-xl", "georgia"]
    assert get_dataset_config_names(str(built)) == ["all", *with_rows, *(f"without-{name}" for name in with_rows)]


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "whole"])
def test_every_configuration_gives_exactly_its_rows(built, tmp_path, streaming):
    for config in get_dataset_config_names(str(built)):
        loaded = load_dataset(str(built), config, streaming=streaming, cache_dir=str(tmp_path))
        for split in SPLITS:
            records = sorted(row["record_id"] for row in loaded[split]) if split in loaded else []
            assert records == expected_records(built, config, split), (config, split)


def test_without_a_name_all_corpora_are_loaded(built):
    rows = load_dataset(str(built), split="train", streaming=True)
    assert sorted(row["record_id"] for row in rows) == expected_records(built, "all", "train")


def test_no_patient_of_a_corpus_left_out_is_trained_on(built):
    for config in get_dataset_config_names(str(built)):
        loaded = load_dataset(str(built), config, streaming=True)
        patients = {split: {row["patient_id"] for row in loaded[split]} for split in loaded}
        assert not patients.get("test", set()) & (patients.get("train", set()) | patients.get("validation", set())), (
            config
        )


def test_the_hub_reads_the_header(built):
    data = DatasetCard.load(built / "README.md").data
    assert data.license == ["cc-by-4.0", "odc-by"] and data.size_categories == ["n<1K"]
    assert [config["config_name"] for config in header_of(built)["configs"] if config.get("default")] == ["all"]


def test_the_code_of_every_card_runs(built):
    ran = 0
    for card in [built / "README.md", *sorted(built.glob("cards/*.md"))]:
        for block in re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL):
            names = {}
            exec(block.replace("ORG/NAME", str(built)), names)
            assert names["window"].signal.shape == (12, 2 * RATE) and names["samples"].dtype == np.int32
            ran += 1
    assert ran == 5  # the whole, and the four corpora that have rows


@pytest.mark.parametrize("corpus", ["cpsc-2018", "georgia"])
def test_classes_and_codes_are_those_of_the_headers(built, source, corpus):
    classes, codes = Counter(), Counter()
    for path in (source / corpus).glob("*.hea"):
        found = re.search(r"#\s*Dx: ([\d,]+)", path.read_text())
        own = set(found[1].split(",")) if found else set()
        codes.update(own)
        classes.update({snomed_codes()[code].challenge_class for code in own if code in snomed_codes()} - {None})
    assert classes["RBBB"] == 2 and classes["PVC"] == 2  # of two codes that count as one
    text = (built / f"cards/{corpus}.md").read_text()
    assert {name: int(cells[-1]) for name, cells in table_of(text, "class").items() if cells[-1].isdecimal()} == classes
    assert table_of(text, "SNOMED CT")["999999999"] == ["in no table", "1"] and codes["999999999"] == 1
    whole = table_of((built / "README.md").read_text(), "class")
    column = whole["class"].index(corpus)
    assert {name: int(cells[column]) for name, cells in whole.items() if cells[column].isdecimal()} == (
        {name: classes[name] for name in whole if name not in ("class", "---")}
    )


def test_counts_of_the_corpora_are_those_of_the_files(built):
    table = table_of((built / "README.md").read_text(), "corpus")
    rows = rows_of(built, "patient_id")
    for corpus in ("cpsc-2018", "cpsc-extra", "incart", "ptb-xl", "georgia"):
        own = [(split, row["patient_id"]) for (name, split), row in rows if name == corpus]
        cells = table[f"[{corpus}](cards/{corpus}.md)"]
        assert cells[:4] == [str(len(own)), *(str(sum(split == each for each, _ in own)) for split in SPLITS)]
        assert cells[4] == str(len({patient for _, patient in own}))
        assert cells[-1] == str(json.loads((built / f"reports/{corpus}.json").read_text())["records_rejected"])
    assert table["**all**"][0] == str(len(rows)) == "19" and table["**all**"][-1] == "28"


def test_statements_and_superclasses_are_counted_by_split(built):
    text = (built / "cards/ptb-xl.md").read_text()
    assert table_of(text, "superclass")["MI"] == ["myocardial infarction", "1", "0", "0", "1"]
    assert table_of(text, "statement")["SR"] == ["sinus rhythm", "1", "1", "0", "2"]
    assert table_of(text.split("## Counts")[1], "")["normal or not: unknown"] == [
        "0",
        "1",
        "0",
        "1",
    ]  # sinus rhythm alone says nothing


def test_ages_sexes_and_lengths_are_those_of_the_rows(built):
    cells = table_of((built / "README.md").read_text().split("## Patients and signals")[1], "corpus")["georgia"]
    assert cells[0] == "5 / 47 / 61 / 61 / 88" and cells[1] == "2"  # NaN and -1 are no ages
    assert cells[2:5] == ["3", "3", "1"]
    assert cells[5] == "3.0 / 3.0 / 3.0 / 4.0 / 4.0"
    assert table_of((built / "README.md").read_text(), "null")["age: impossible"][-1] == "2"


def test_unusable_seconds_are_counted_by_flag_and_padding_is_none_of_them(copied):
    path = next(copied.glob("data/georgia/test-*.parquet"))
    table = pq.read_table(path)
    quality = [[[0, int(QualityFlag.FLAT | QualityFlag.DRIFT), int(QualityFlag.PADDING)], []]] + [[]] * (len(table) - 1)
    place = table.column_names.index("quality")
    pq.write_table(table.set_column(place, "quality", pa.array(quality, table.schema.field("quality").type)), path)
    report = {"shards": {path.relative_to(copied).as_posix(): {"num_bytes": 0}}}
    statistics = count_corpus(Output(copied), report)
    assert statistics.of("lead_seconds") == {"": 2, "flat": 1, "drift": 1, "unusable": 1}
    assert statistics.of("has_quality") == {True: 1, False: len(table) - 1}


def test_beats_and_rhythms_are_counted(built):
    text = (built / "cards/incart.md").read_text()
    assert "annotated in 1 records (WFDB's symbols): N 4, V 1." in text
    assert "in seconds: AFIB 6, N 4." in text


def test_rejected_records_are_counted_by_kind_and_the_first_twenty_named(built):
    text = (built / "cards/cpsc-extra.md").read_text()
    kinds = {name: cells[0] for name, cells in table_of(text, "reason").items() if name not in ("reason", "---")}
    assert list(kinds.values()) == ["25"]
    assert [name for name in table_of(text, "record") if name.startswith("Q")] == [f"Q{n:04d}" for n in range(1, 21)]
    assert "there is nothing to load" in text and not (built / "cards/cpsc-extra.png").exists()


def test_every_picture_is_there_and_named_by_its_card(built):
    shown = {"README.md": "cards/all.png"} | {
        f"cards/{name}.md": f"{name}.png" for name in ("incart", "ptb-xl", "georgia")
    }
    for card, picture in shown.items():
        assert f"]({picture})" in (built / card).read_text()
        assert ((built / card).parent / picture).read_bytes().startswith(b"\x89PNG")


def cards_in(folder):
    return {path.name: path.read_bytes() for path in [folder / "README.md", *folder.glob("cards/*")]}


def test_the_same_data_give_the_same_bytes_whatever_matplotlib_is_set_to(built, copied):
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"figure.dpi": 30, "font.size": 30, "axes.grid": True}):
        write_cards(Output(copied))
    assert cards_in(copied) == cards_in(built)


def test_an_object_store_gets_the_same_cards(built):
    out = Output("memory://cards")
    for path in built.rglob("*"):
        if path.is_file() and path.parts[len(built.parts)] in ("data", "reports"):
            out.write(path.relative_to(built).as_posix(), path.read_bytes())
    write_cards(out)
    assert {
        name.rpartition("/")[2]: out.read(name)
        for name in out.names("")
        if "data/" not in name and "reports/" not in name
    } == cards_in(built)
    out.fs.rm(out.root, recursive=True)


def test_a_corpus_that_is_not_finished_is_in_no_card_and_no_configuration(copied):
    (copied / "reports/georgia.json").unlink()
    write_cards(Output(copied))
    assert "georgia" not in get_dataset_config_names(str(copied))
    assert "data/georgia" not in (copied / "README.md").read_text() and not list(copied.glob("cards/georgia.*"))


def test_of_a_single_corpus_nothing_is_left_out(copied):
    for name in ("cpsc-2018", "cpsc-extra", "incart", "georgia"):
        (copied / f"reports/{name}.json").unlink()
    write_cards(Output(copied))
    assert get_dataset_config_names(str(copied)) == ["all", "ptb-xl"]
    assert "1 public corpus\n" in (copied / "README.md").read_text() and header_of(copied)["license"] == "cc-by-4.0"


def test_nothing_finished_leaves_no_card(copied):
    for path in copied.glob("reports/*.json"):
        path.unlink()
    write_cards(Output(copied))
    assert not (copied / "README.md").exists() and not list(copied.glob("cards/*"))


def test_without_matplotlib_cards_have_no_pictures_and_the_log_says_so(copied, monkeypatch, caplog):
    monkeypatch.setattr(dataset_pictures, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        write_cards(Output(copied))
    assert not list(copied.glob("cards/*.png")) and "![" not in (copied / "README.md").read_text()
    assert "anyecg-hf[plot]" in caplog.text


def test_text_from_a_record_stays_text(copied):
    path = copied / "reports/georgia.json"
    report = json.loads(path.read_text())
    report["rejected"] = [{"record_id": "E1|x", "reason": 'ValueError: lead "<script>|`a`\n# Title" [x](y)\x1b\ud800'}]
    path.write_text(json.dumps(report))
    write_cards(Output(copied))
    text = (copied / "cards/georgia.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| E1"))
    assert len(re.split(r"(?<!\\)\|", row)) == 4 and "\n# Title" not in text
    assert not re.search(r"(?<!\\)(<script|\[x\])|\x1b", text)


def test_a_split_without_a_file_is_not_named():
    reports = {"ptb": {"shards": {"data/ptb/test-00000-of-00001.parquet": {}}}, "incart": {"shards": {}}}
    assert configurations(reports) == [
        {"config_name": name, "data_files": [{"split": "test", "path": ["data/ptb/test-*.parquet"]}]} | default
        for name, default in (("all", {"default": True}), ("ptb", {}))
    ]


def test_the_columns_of_the_card_are_those_of_a_row():
    columns = yaml.safe_load((dataset_card.TEMPLATES / "columns.yaml").read_text())
    assert list(columns) == SCHEMA.names


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_corpus_has_its_licence_sources_and_limits(corpus):
    facts = yaml.safe_load((files("hub_cards") / "datasets" / f"{corpus}.yaml").read_text(encoding="utf-8"))
    assert {licence["id"] for licence in facts["licences"]} <= {"cc-by-4.0", "odc-by"}
    assert all(facts[name] for name in ("name", "published", "summary", "licences", "links", "labels", "limits"))
