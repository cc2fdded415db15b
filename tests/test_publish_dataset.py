"""training/publish_dataset.py against a local server that speaks the Hub's protocol, as `load_dataset` reads from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import TOKEN, asked_by_this_process
from huggingface_hub import constants

from training.publish_dataset import dataset_files, push_dataset

ROOT = Path(__file__).resolve().parent.parent
REPO = "clinic/ecgs"
SIZES = {"ptb-xl": {"train": 5, "validation": 2, "test": 3}, "incart": {"train": 2, "validation": 1, "test": 1}}


@pytest.fixture
def folder(tmp_path):
    return write_dataset(tmp_path / "built")


def write_dataset(folder, shards=1):
    """Write what a finished build leaves: two corpora, three splits, card, reports."""
    lines = ["---", "license: cc-by-4.0", "configs:"]
    for corpus, sizes in SIZES.items():
        lines += [f"- config_name: {corpus}", "  data_files:"]
        for split, size in sizes.items():
            lines += [f"  - split: {split}", f"    path: data/{corpus}/{split}-*.parquet"]
            for shard in range(shards):
                rows = [f"{corpus}-{split}-{row}" for row in range(size)][shard::shards]
                write_shard(folder / f"data/{corpus}/{split}-{shard:05}-of-{shards:05}.parquet", rows)
        write_report(folder, corpus, sum(sizes.values()))
        (folder / "cards").mkdir(exist_ok=True)
        (folder / f"cards/{corpus}.md").write_text(f"# {corpus}\n")
    (folder / "README.md").write_text("\n".join([*lines, "---", "# ECGs", ""]))
    return folder


def write_shard(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"record": rows, "signal": [b"\0" * 1000] * len(rows)}), path)


def write_report(folder, corpus, out, rejected=1):
    (folder / "reports").mkdir(exist_ok=True)
    counts = {"records_in": out + rejected, "records_out": out, "records_rejected": rejected, "rejected": {}}
    (folder / f"reports/{corpus}.json").write_text(json.dumps(counts))


@pytest.fixture
def hub(monkeypatch):
    with asked_by_this_process(monkeypatch) as hub:
        yield hub


def push(folder, **options):
    return push_dataset(folder, REPO, **{"token": TOKEN} | options)


def on_disk(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What a push leaves on the Hub


def test_a_push_brings_the_whole_dataset_in_one_commit(hub, folder):
    address = push(folder)
    assert hub.files(REPO) == on_disk(folder)
    assert len(hub.repos[REPO].commits) == 2  # the first makes the repository
    assert address == f"{hub.url}/datasets/{REPO}/commit/{hub.repos[REPO].commits[-1][0]}"


def test_many_shards_are_still_one_commit(hub, tmp_path):
    push(write_dataset(tmp_path / "many", shards=60))
    assert len(hub.files(REPO)) == 2 * (3 * 60 + 2) + 1
    assert len(hub.repos[REPO].commits) == 2


def test_a_second_push_of_the_same_sends_and_commits_nothing(hub, folder):
    first = push(folder)
    hub.requests.clear()
    assert push(folder) == first
    assert len(hub.repos[REPO].commits) == 2 and not hub.asked("PUT", "") and not hub.asked("POST", "/commit/")


def test_only_what_has_changed_is_sent(hub, folder):
    push(folder)
    hub.requests.clear()
    write_shard(folder / "data/incart/test-00000-of-00001.parquet", ["other"])
    push(folder)
    assert len(hub.asked("PUT", "/lfs/")) == 1
    assert hub.files(REPO) == on_disk(folder) and len(hub.repos[REPO].commits) == 3


def test_files_that_vanished_from_the_folder_vanish_from_the_hub(hub, folder):
    for file in ("LICENSE", "notes/data/x.parquet"):
        push(folder)
        hub.commit(REPO, hub.files(REPO) | {file: b"by hand"})
    write_dataset(folder, shards=2)
    for old in folder.glob("data/*/*-of-00001.parquet"):
        old.unlink()
    (folder / "cards/incart.md").unlink()
    push(folder)
    others = {"LICENSE": b"by hand", "notes/data/x.parquet": b"by hand"}
    assert hub.files(REPO) == on_disk(folder) | others
    assert len(hub.repos[REPO].commits) == 5  # deleted and added at once


def test_hidden_and_foreign_files_stay_at_home(hub, folder):
    whole = on_disk(folder)
    for name in (
        ".git/x",
        ".DS_Store",
        "cards/.DS_Store",
        "data/ptb-xl/.cache/a.parquet",
        "data/ptb-xl/a.txt",
        "log.txt",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    push(folder)
    assert hub.files(REPO) == whole


# Who may read


@pytest.mark.parametrize("private", [False, True])
def test_a_new_repository_is_as_private_as_asked_for(hub, folder, private):
    push(folder, private=private)
    assert hub.repos[REPO].private is private
    push(folder, private=private)


def test_a_private_push_to_a_public_repository_is_refused(hub, folder):
    hub.add_repo(REPO)
    with pytest.raises(ValueError, match=f"{REPO} is public: make it private"):
        push(folder, private=True)
    assert not hub.files(REPO) and not hub.uploaded


def test_a_private_repository_stays_private(hub, folder):
    hub.add_repo(REPO, private=True)
    push(folder)
    assert hub.repos[REPO].private and hub.files(REPO) == on_disk(folder)


# A Hub in trouble


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/repos/create"),
        ("GET", f"/datasets/{REPO}/revision/main$"),
        ("GET", "/tree/"),
        ("POST", "/validate-yaml"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/lfs/"),
        ("POST", "/commit/"),
    ],
)
def test_trouble_that_passes_is_waited_for(hub, folder, method, path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults = [(method, path, 500), (method, path, 503)]
    push(folder)
    assert not hub.faults and hub.files(REPO) == on_disk(folder) and len(hub.repos[REPO].commits) == 2


@pytest.mark.parametrize("path", ["/repos/create", "/commit/"])
def test_a_connection_that_breaks_is_made_again(hub, folder, path):
    hub.faults = [("POST", path, "drop")]
    push(folder)
    assert not hub.faults and hub.files(REPO) == on_disk(folder) and len(hub.repos[REPO].commits) == 2


def test_trouble_that_lasts_is_reported_and_readers_see_the_old_state(hub, folder):
    push(folder)
    old = hub.files(REPO)
    write_shard(folder / "data/incart/test-00000-of-00001.parquet", ["other"])
    hub.faults = [("POST", "/commit/", 502)] * 3
    with pytest.raises(ConnectionError, match=f"{REPO}: .*502.*Readers see the old state.*Run the same again"):
        push(folder)
    assert hub.files(REPO) == old and not hub.faults
    hub.requests.clear()
    push(folder)
    assert not hub.asked("PUT", "")  # it had arrived
    assert hub.files(REPO) == on_disk(folder)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, folder):
    def commit_and_say_nothing(hub):
        hub.commit(REPO, hub.repos[REPO].commits[-1][1] | on_disk(folder))
        return 504

    hub.faults = [("POST", "/commit/", commit_and_say_nothing)]
    assert push(folder).endswith(hub.repos[REPO].commits[-1][0])
    assert len(hub.repos[REPO].commits) == 2


def test_no_answer_at_all_is_reported(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConnectionError, match=f"{REPO}: .*Run the same again"):
        push(folder)


def test_a_token_that_may_not_write_is_reported_at_once(hub, folder):
    with pytest.raises(PermissionError, match=f"{REPO}: the Hub refuses: .*token with write access"):
        push(folder, token="hf_reads")
    assert len(hub.asked("POST", "")) == 1
    hub.add_repo(REPO)
    with pytest.raises(PermissionError, match="token with write access"):
        push(folder, token="hf_reads")
    assert not hub.files(REPO)


def test_a_push_that_broke_shows_nothing_and_goes_on_where_it_was(hub, folder):
    hub.faults = [("PUT", "/lfs/", 403)]
    with pytest.raises(PermissionError, match="data/.*parquet.*403"):
        push(folder)
    assert not hub.files(REPO)
    arrived = set(hub.uploaded)
    hub.requests.clear()
    push(folder)
    assert hub.files(REPO) == on_disk(folder)
    sent = {path.removeprefix("/lfs/") for path in hub.asked("PUT", "/lfs/")}
    assert len(sent) + len(arrived) == 6 and sent.isdisjoint(arrived)


def test_someone_elses_push_at_the_same_time_is_not_overwritten(hub, folder):
    hub.faults = [("POST", "/commit/", lambda hub: hub.commit(REPO, {"data/theirs.parquet": b"theirs"}))]
    with pytest.raises(ConnectionError, match=f"{REPO} was changed by someone else"):
        push(folder)
    assert hub.files(REPO) == {"data/theirs.parquet": b"theirs"}


# What is no whole build


def broken(folder):
    path = folder / "data/ptb-xl/train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-10])


def without(name):
    return lambda folder: (folder / name).unlink()


def with_text(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


TRAIN = "data/ptb-xl/train-00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "data/ptb-xl/.x.parquet.unfinished-7").touch(), "x.parquet.unfinished-7 is unfinished"),
        (lambda folder: (folder / "cards/a.md.unfinished").touch(), "cards/a.md.unfinished is unfinished"),
        (broken, f"{TRAIN} is no whole Parquet file"),
        (without("reports/incart.json"), "data/incart has no reports/incart.json"),
        (without(TRAIN), "reports/ptb-xl.json counts 10 records, data/ptb-xl holds 5; .*ptb-xl, train: there is no data/"),
        (lambda folder: write_report(folder, "georgia", 7), "georgia.json counts 7 records, data/georgia holds 0"),
        (with_text("reports/incart.json", '"records_in": 5', '"records_in": 6'), "6 records in, but 4 out and 1 rejected"),
        (with_text("reports/incart.json", "records_out", "out"), "incart.json lacks the numbers .*records_out"),
        (with_text("reports/incart.json", "}", ""), "incart.json lacks the numbers"),
        (without("README.md"), "README.md is missing"),
        (with_text("README.md", "configs:", "config:"), "README.md lacks `configs:`"),
        (with_text("README.md", "---", "--"), "README.md lacks `configs:`"),
        (with_text("README.md", "data_files:", "data_file:"), "README.md lacks `configs:` .*data_files"),
        (with_text("README.md", "path: data/incart", "path: /data/incart"), "README.md lacks `configs:`"),
        (with_text("README.md", "configs:", "configs: ["), "README.md lacks `configs:`"),
        (with_text("README.md", "incart/test-", "incart/tests-"), "no data/incart/tests-.*incart/test-.* is in none"),
        (lambda folder: write_shard(folder / "data/a.parquet", ["a"]), "shards lie in data/ itself"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_whole_build_is_not_pushed(hub, folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=f"is no whole dataset: .*{message}.*Nothing was pushed"):
        push(folder)
    assert not hub.requests


def test_a_folder_without_data_is_not_pushed(hub, tmp_path):
    with pytest.raises(ValueError, match="there is no data/<corpus>/.*README.md is missing"):
        push(tmp_path)
    with pytest.raises(ValueError, match="there is no data/<corpus>/"):
        push(tmp_path / "absent")


def test_a_corpus_of_which_all_was_rejected_may_be_published(folder):
    write_report(folder, "georgia", 0, rejected=9)
    assert "reports/georgia.json" in dataset_files(folder)


# From the Hub


LOAD = """
import json, sys
from datasets import load_dataset, get_dataset_config_names
found = {"configs": sorted(get_dataset_config_names(sys.argv[1]))}
for split in ("train", "validation", "test"):
    for streaming in (False, True):
        rows = load_dataset(sys.argv[1], "ptb-xl", split=split, streaming=streaming)
        found[f"{split} {streaming}"] = [row["record"] for row in rows]
print(json.dumps(found))
"""


def run(hub, home, *command):
    """Run Python in a process that knows nothing but the address of the Hub and, as a user's own, the token."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    env |= {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], env=env, cwd=home, capture_output=True, text=True, timeout=120)


def test_the_command_pushes_and_load_dataset_reads_it_whole_and_streaming(hub, folder, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    command = ("-m", "training.publish_dataset", "--folder", str(folder), "--repo_id", REPO, "--private")
    pushed = run(hub, home, *command)
    assert pushed.returncode == 0, pushed.stderr
    assert hub.repos[REPO].private and pushed.stdout.startswith(f"{hub.url}/datasets/{REPO}/commit/")
    loaded = run(hub, home, "-c", LOAD, REPO)
    assert loaded.returncode == 0, loaded.stderr
    expected = {"configs": ["incart", "ptb-xl"]}
    for split, size in SIZES["ptb-xl"].items():
        for streaming in (False, True):
            expected[f"{split} {streaming}"] = [f"ptb-xl-{split}-{row}" for row in range(size)]
    assert json.loads(loaded.stdout.splitlines()[-1]) == expected


def test_the_command_ends_with_one_line_where_it_cannot_push(hub, folder, tmp_path):
    (folder / "README.md").unlink()
    ended = run(hub, tmp_path, "-m", "training.publish_dataset", "--folder", str(folder), "--repo_id", REPO)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: ") and "README.md is missing" in ended.stderr
