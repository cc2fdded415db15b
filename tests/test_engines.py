"""training.engines: local processes or Ray, whatever dies on the way: the same bytes as one process writes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from published_files import files_of, steps, write_challenge

from training import build_dataset, engines
from training.build_dataset import build_corpus, list_corpus
from training.engines import map_shards
from training.shards import UNFINISHED, ShardPlan

ROOT = Path(__file__).resolve().parent.parent
CORPUS, NUM_RECORDS = "cpsc-2018", 24
TINY_SHARDS = 1e-6  # of a megabyte: a record each
WITHOUT_TORCH = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hide = lambda name, *rest: None if name.partition(".")[0] == "torch" else find(name, *rest)
PathFinder.find_spec = staticmethod(hide)
"""


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without-torch")
    (folder / "sitecustomize.py").write_text(WITHOUT_TORCH)  # Python runs it at each start
    return folder


@pytest.fixture(autouse=True)
def light_processes(without_torch, monkeypatch):
    """Let all processes started here do without torch, which no build needs and whose import is most of their start."""
    places = [str(without_torch), str(ROOT), str(ROOT / "tests")]  # the latter two: `Killed`, in workers of Ray
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for number in range(NUM_RECORDS):
        write_challenge(folder, f"A{number + 1:04d}", samples=steps(number % 3, seconds=10))
    (folder / "A0007.mat").write_bytes(b"")  # rejected wherever it is read
    return folder


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """Return the files that one process writes."""
    out = tmp_path_factory.mktemp("expected")
    build_corpus(CORPUS, source, out, shard_megabytes=TINY_SHARDS)
    return files_of(out)


@dataclass(frozen=True)
class Killed(ShardPlan):
    """A plan whose first workers are killed (as by the kernel that is out of memory) with a file half-written."""

    main_process: int = 0
    times: int = 1

    @property
    def parquet(self):
        name = super().parquet
        marks = [Path(self.out).with_name(f"killed-{self.name}-{time}") for time in range(self.times)]
        left = [mark for mark in marks if not mark.exists()]
        if left and os.getpid() != self.main_process:
            left[0].touch()
            target = Path(self.out) / f"{name}{UNFINISHED}-{os.getpid()}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"PAR1")
            os.kill(os.getpid(), signal.SIGKILL)
        return name


def with_killed(monkeypatch):
    """Let the build have one shard that kills its first worker."""
    plan_shards = build_dataset.plan_shards

    def plan(*args, **kwargs):
        plans = plan_shards(*args, **kwargs)
        plans[5] = Killed(**plans[5].__dict__, main_process=os.getpid())
        return plans

    monkeypatch.setattr(build_dataset, "plan_shards", plan)


def test_two_processes_with_one_killed_give_the_same_bytes(source, expected, tmp_path, monkeypatch):
    with_killed(monkeypatch)
    build_corpus(CORPUS, source, tmp_path / "out", num_proc=2, shard_megabytes=TINY_SHARDS)
    assert files_of(tmp_path / "out") == expected
    assert len(list(tmp_path.glob("killed-*"))) == 1


def test_ray_with_two_workers_and_one_killed_gives_the_same_bytes(source, expected, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else a busy machine lets them wait for minutes
    with_killed(monkeypatch)
    build_corpus(CORPUS, source, tmp_path / "out", engine="ray", num_proc=2, shard_megabytes=TINY_SHARDS)
    assert files_of(tmp_path / "out") == expected
    assert len(list(tmp_path.glob("killed-*"))) == 1


def test_a_shard_that_kills_each_worker_ends_the_build_with_advice(source, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "MOST_ATTEMPTS", 1)
    records = tuple(list_corpus(CORPUS, source)[:1])
    plan = Killed(CORPUS, "train", str(source), str(tmp_path / "out"), records, main_process=os.getpid(), times=9)
    said = r"Worker processes died 1 times without finishing a shard.*Is there enough memory\? Lower --num_proc"
    with pytest.raises(RuntimeError, match=said):
        list(map_shards([plan], num_proc=2))


def test_a_shard_that_ray_gives_up_ends_the_build_with_advice(monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")

    def give_up(function, *, max_retries):  # without a number Ray tries for ever
        raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.data, "from_items", lambda *_, **__: SimpleNamespace(map=give_up))
    plan = ShardPlan(CORPUS, "train", "source", "out", ())
    with pytest.raises(RuntimeError, match=r"Ray gave a shard up.*Is there enough memory\? Lower --num_proc"):
        list(map_shards([plan], engine="ray"))


def test_ray_is_asked_for_gpus_where_they_are_wanted(monkeypatch):
    ray, asked = pytest.importorskip("ray"), []
    pytest.importorskip("ray.data")

    def map_blocks(function, **options):
        asked.append(options)
        return SimpleNamespace(iter_rows=lambda: ())

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.data, "from_items", lambda *_, **__: SimpleNamespace(map=map_blocks))
    plan = ShardPlan(CORPUS, "train", "source", "out", ())
    assert list(map_shards([plan], engine="ray")) == list(map_shards([plan], engine="ray", num_gpus=0.5)) == []
    assert [options.get("num_gpus") for options in asked] == [None, 0.5]


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_nothing_to_write_starts_no_workers(engine):
    assert list(map_shards([], engine=engine, num_proc=2)) == []


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="accepted are local, ray"):
        map_shards([], engine="spark")


def test_ray_that_is_not_installed_is_said_with_what_to_type(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install .anyecg-hf\[cluster\]"):
        build_corpus(CORPUS, source, tmp_path / "out", engine="ray")


def listen_to_ctrl_c():
    """A suite that runs in the background has it ignored, and so have the processes that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(source, out, *, prepare=listen_to_ctrl_c):
    """Start the command with two workers and return it once they have written two shards; `prepare` runs in it first."""
    options = ["--num_proc", "2", "--shard_megabytes", str(TINY_SHARDS)]
    command = [
        sys.executable,
        "-m",
        "training.build_dataset",
        "--corpus",
        CORPUS,
        "--source",
        str(source),
        "--out",
        str(out),
    ]
    build = subprocess.Popen(
        [*command, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("reports/*/*.json"))) < 2:
        assert build.poll() is None and time.monotonic() < deadline, build.communicate(timeout=10)
        time.sleep(0.002)
    return build


def assert_goes_on(source, out, expected):
    """Check that the build goes on with what is there, and ends with the same files."""
    assert not (out / f"reports/{CORPUS}.json").exists()  # it was cut off
    reports = {path.stem for path in out.glob("reports/*/*.json")}
    before = {path: path.stat().st_mtime_ns for path in out.glob("data/*/*.parquet") if path.stem in reports}
    assert before
    build_corpus(CORPUS, source, out, shard_megabytes=TINY_SHARDS)
    assert files_of(out) == expected
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


def test_ctrl_c_ends_a_build_at_once_and_the_next_one_goes_on(source, expected, tmp_path):
    build = started(source, tmp_path)
    os.killpg(build.pid, signal.SIGINT)  # as a terminal sends it: to the workers as well
    _, said = build.communicate(timeout=60)
    assert build.returncode == 1 and "Traceback" not in said
    assert said.strip().splitlines()[-1] == "interrupted; the same command goes on where it was"
    assert_goes_on(source, tmp_path, expected)


def ignore_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def test_a_build_in_the_background_and_its_workers_do_not_hear_ctrl_c(source, expected, tmp_path):
    build = started(source, tmp_path, prepare=ignore_ctrl_c)
    os.killpg(build.pid, signal.SIGINT)
    _, said = build.communicate(timeout=120)
    assert build.returncode == 0, said
    assert files_of(tmp_path) == expected


def test_a_killed_build_takes_its_workers_along_and_the_next_one_goes_on(source, expected, tmp_path):
    build = started(source, tmp_path)
    build.kill()
    build.communicate(timeout=60)  # waits for all who hold its pipes: the workers
    assert_goes_on(source, tmp_path, expected)
