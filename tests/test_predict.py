"""training/predict.py: an archive from the command line, in one process or many, to the end however often it is killed."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from published_files import files_of, steps, write_challenge
from tiny_checkpoints import tiny_model
from transformers import pipeline

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from training import predict
from training.build_dataset import build_corpus
from training.commands import run_command
from training.dataset_rows import read_row
from training.engines import WorkersDiedError
from training.shards import UNFINISHED

ROOT = Path(__file__).resolve().parent.parent
NUM_RECORDS = 11


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    AnyECGFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    for number in range(NUM_RECORDS):
        write_challenge(folder, f"A{number + 1:04d}", samples=steps(number % 3, seconds=3 + number % 2))
    for number in (4, 7):
        (folder / f"A{number:04d}.mat").write_bytes(b"1" * number)
    (folder / "letter.txt").write_text("Dear colleague\n")
    return folder


def argv(checkpoint, data, out, *options):
    return ["--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out), "--shard_records", "1", *options]


def written(out):
    """Return what a run has written, its lock aside."""
    return {name: content for name, content in files_of(out).items() if not name.startswith(".")}


@pytest.fixture(scope="module")
def expected(checkpoint, archive, tmp_path_factory):
    """Return the files that one undisturbed process writes."""
    out = tmp_path_factory.mktemp("expected")
    predict.main(argv(checkpoint, archive, out))
    return written(out)


def test_the_summary_counts_records_and_reasons_and_lists_the_shards(expected, checkpoint, archive, tmp_path, caplog):
    summary = json.loads(expected["summary.json"])
    assert (summary["records"], summary["errors"]) == (NUM_RECORDS + 1, 3)
    assert summary["reasons"][0]["records"] == 2 and summary["reasons"][0]["first"] == "A0004.hea"
    assert "N bytes" in summary["reasons"][0]["reason"] and summary["reasons"][1]["first"] == "letter.txt"
    assert summary["shards"].keys() == {name for name in expected if name.endswith(".parquet")}
    with caplog.at_level("INFO"):
        predict.main(argv(checkpoint, archive, tmp_path, "--shard_records", "5", "--batch_size", "3"))
    assert "12 records, 3 of them with an error; 12 predicted in" in caplog.text and "records/s, 0 kept" in caplog.text
    assert "2 x no sample" in caplog.text
    assert [len(pq.read_table(path)) for path in sorted(tmp_path.glob("predictions/*.parquet"))] == [5, 5, 2]


def test_two_launched_processes_write_what_one_writes(expected, checkpoint, archive, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "-m", "training.predict", *argv(checkpoint, archive, tmp_path)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "12 records, 12 shards; 2 process(es) on" in done.stderr and "12 predicted in" in done.stderr
    assert written(tmp_path) == expected


def test_ray_writes_what_one_process_writes(expected, checkpoint, archive, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else a busy machine lets it wait for minutes
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    predict.main(argv(checkpoint, archive, tmp_path, "--engine", "ray"))
    assert written(tmp_path) == expected


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(expected, checkpoint, archive, tmp_path):
    run = multiprocessing.get_context("fork").Process(target=predict.main, args=(argv(checkpoint, archive, tmp_path),))
    run.start()
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("reports/*.json"))) < 3:
        assert run.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    assert not (tmp_path / "summary.json").exists()
    whole = {path: path.stat().st_mtime_ns for path in tmp_path.glob("predictions/*.parquet")}
    last = f"predictions/predictions-{NUM_RECORDS:05d}-of-{NUM_RECORDS + 1:05d}.parquet"
    (tmp_path / f"{last}{UNFINISHED}-1").write_bytes(b"PAR1")
    first = tmp_path / "predictions" / f"predictions-00000-of-{NUM_RECORDS + 1:05d}.parquet"
    first.write_bytes(first.read_bytes()[:-9])  # cut short by a disk
    predict.main(argv(checkpoint, archive, tmp_path))
    assert written(tmp_path) == expected
    kept = [path for path, stamp in whole.items() if path.stat().st_mtime_ns == stamp]
    assert first not in kept and len(kept) >= 2


def test_a_data_set_gives_a_row_a_record_with_the_scores_of_the_pipeline(checkpoint, archive, tmp_path):
    build_corpus("cpsc-2018", archive, tmp_path / "built")
    predict.main(argv(checkpoint, tmp_path / "built", tmp_path / "out", "--shard_records", "100"))
    rows = {row["record_id"]: row for row in pq.read_table(tmp_path / "out" / "predictions").to_pylist()}
    assert len(rows) == NUM_RECORDS - 2
    classifier = pipeline("ecg-classification", model=str(checkpoint), device="cpu")
    for path in (tmp_path / "built" / "data").rglob("*.parquet"):
        for built in pq.read_table(path).to_pylist():
            row = rows.pop(f"cpsc-2018/{built['record_id']}")
            assert row["path"] == path.relative_to(tmp_path / "built").as_posix() and row["error"] is None
            for finding in classifier(read_row(built)):
                assert row[finding["label"]] == pytest.approx(finding["score"], abs=1e-6)
    assert rows == {}


def test_records_of_several_archives_are_told_apart(checkpoint, archive, tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        for suffix in (".hea", ".mat"):
            shutil.copy(archive / f"A000{number}{suffix}", tmp_path / str(number))
    predict.main(argv(checkpoint, tmp_path / "1", tmp_path / "out", "--data", *(str(tmp_path / each) for each in "12")))
    table = pq.read_table(tmp_path / "out" / "predictions")
    assert table.select(["source", "path"]).to_pylist() == [
        {"source": 0, "path": "A0001.hea"}, {"source": 1, "path": "A0002.hea"}
    ]  # fmt: skip


@pytest.fixture
def begun(checkpoint, tmp_path):
    """Return archive and output of a finished run of one record."""
    write_challenge(tmp_path / "data", "A0001")
    predict.main(argv(checkpoint, tmp_path / "data", tmp_path / "out"))
    return tmp_path / "data", tmp_path / "out"


def test_a_finished_run_is_left_as_it_is(begun, checkpoint, caplog):
    before = {path: path.stat().st_mtime_ns for path in begun[1].glob("predictions/*")}
    with caplog.at_level("INFO"):
        predict.main(argv(checkpoint, *begun))
    assert {path: path.stat().st_mtime_ns for path in begun[1].glob("predictions/*")} == before
    assert "0 predicted in" in caplog.text and "1 kept" in caplog.text


@pytest.mark.parametrize(("change", "message"), [
    ("batch_size", "batch_size 32, now 8"),
    ("data", "the files of --data were others, or have changed since"),
    ("checkpoint", 'checkpoint {.*}, now {"name": "other"'),
])  # fmt: skip
def test_another_run_in_the_same_folder_is_refused(begun, checkpoint, tmp_path, change, message):
    options = ["--batch_size", "8"] if change == "batch_size" else []
    if change == "data":
        (begun[0] / "A0001.mat").write_bytes(b"changed")
    if change == "checkpoint":
        tiny_model(seed=1).save_pretrained(tmp_path / "other")
        AnyECGFeatureExtractor().save_pretrained(tmp_path / "other")
        checkpoint = tmp_path / "other"
    before = written(begun[1])
    with pytest.raises(ValueError, match=f"was begun with other arguments: .*{message}.*or another --out"):
        predict.main(argv(checkpoint, *begun, *options))
    assert written(begun[1]) == before


def test_other_software_is_told_and_goes_on(begun, checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(predict, "describe_software", lambda: {"torch": "1"})
    predict.main(argv(checkpoint, *begun))
    assert "begun with other software" in caplog.text


def test_a_folder_with_other_files_is_refused(archive, checkpoint, tmp_path):
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "mine.parquet").touch()
    with pytest.raises(ValueError, match="holds other files in predictions/ or reports/"):
        predict.main(argv(checkpoint, archive, tmp_path))


@pytest.mark.parametrize(("options", "message"), [
    (["--batch_size", "0"], "--batch_size 0: accepted are 1 and above"),
    (["--out", "{data}/out"], "lies in --data"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(archive, checkpoint, tmp_path, capsys, options, message):
    options = [option.format(data=archive) for option in options]
    with pytest.raises(SystemExit):
        predict.main(argv(checkpoint, archive, tmp_path, *options))
    assert message in capsys.readouterr().err


def test_launched_processes_start_no_more(archive, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "PartialState", lambda **_: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="2 processes were launched: --engine and --num_proc would start more"):
        predict.main(argv(checkpoint, archive, tmp_path, "--num_proc", "2"))


def test_workers_that_die_end_the_command_with_a_message(monkeypatch):
    def die(_):
        raise WorkersDiedError("Worker processes died 3 times")

    monkeypatch.setattr(sys, "argv", ["predict"])
    with pytest.raises(SystemExit, match="error: Worker processes died 3 times"):
        run_command(die)
