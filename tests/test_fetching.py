"""training/fetching.py against a local server that drops, cuts, corrupts, refuses and waits."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest
from file_server import running_server

from training import fetching
from training.fetching import download_files, fetch_sums, read_sums, select_paths

ROOT = Path(__file__).resolve().parent.parent
BIG = random.Random(7).randbytes(600_000)
DIGEST = "a" * 64


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetching, "FIRST_PAUSE", 0.005)
    with running_server(monkeypatch) as server:
        yield server


def fetch(server, folder, **options):
    return download_files(server.url, folder, server.sums, **{"progress": False, "timeout": 5} | options)


def assert_whole(server, folder):
    """The folder holds the published files, what the download remembers, and nothing else."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for own in (fetching.VERIFIED, fetching.LOCK):
        found.pop(own, None)
    assert found == server.files


# What arrives


def test_many_small_files_arrive_whole_with_several_workers_at_once(server, tmp_path):
    server.files = {f"g{i % 7}/r {i}#%.hea": random.Random(i).randbytes(i) for i in range(300)}
    report = fetch(server, tmp_path / "new" / "folder", num_workers=8)
    assert_whole(server, tmp_path / "new" / "folder")
    assert len(report.fetched) == 300 and not report.kept and not report.failed
    assert report.num_bytes == sum(map(len, server.files.values())) and server.most_at_once > 1


def test_a_second_run_asks_for_nothing_and_reads_no_file_again(server, tmp_path, monkeypatch):
    server.files = {"a": BIG, "b/c": b"c"}
    fetch(server, tmp_path)
    server.requests.clear()
    monkeypatch.setattr(fetching.hashlib, "file_digest", None)
    assert fetch(server, tmp_path).kept == ["a", "b/c"]
    assert not server.requests


def test_a_file_changed_after_it_was_checked_is_fetched_again(server, tmp_path):
    server.files = {"a": BIG, "b": b"b"}
    fetch(server, tmp_path)
    (tmp_path / "a").write_bytes(BIG[:-1] + b"?")
    report = fetch(server, tmp_path)
    assert (report.fetched, report.kept) == (["a"], ["b"])
    assert_whole(server, tmp_path)


def test_a_new_publication_is_not_mistaken_for_the_old_one(server, tmp_path):
    server.files = {"a": BIG}
    fetch(server, tmp_path)
    server.files = {"a": BIG[::-1]}  # same size
    assert fetch(server, tmp_path).fetched == ["a"]
    assert_whole(server, tmp_path)


def test_files_of_another_program_are_kept_when_right_and_completed_when_cut(server, tmp_path):
    server.files = {"right": BIG, "cut": BIG[::-1], "long": b"long", "other": BIG[:1000]}
    for name, content in {"right": BIG, "cut": BIG[::-1][:400_000], "long": b"longer", "other": b"?" * 1000}.items():
        (tmp_path / name).write_bytes(content)
    report = fetch(server, tmp_path)
    assert report.kept == ["right"] and len(report.fetched) == 3
    assert server.gets("cut") == ["bytes=400000-"]
    assert_whole(server, tmp_path)


def test_memory_of_checked_files_that_a_kill_has_cut_is_no_obstacle(server, tmp_path, monkeypatch):
    server.files = {"a": b"a", "b": b"b"}
    fetch(server, tmp_path)
    memory = tmp_path / fetching.VERIFIED
    memory.write_bytes(memory.read_bytes()[:-20] + b'\n7\nnull\n"\xff"\n["a"')
    assert fetch(server, tmp_path).kept == ["a", "b"]
    monkeypatch.setattr(fetching.hashlib, "file_digest", None)  # what was cut has been written anew
    assert fetch(server, tmp_path).kept == ["a", "b"]
    assert_whole(server, tmp_path)


def test_an_empty_file_needs_no_request(server, tmp_path):
    server.files = {"empty": b""}
    assert fetch(server, tmp_path).fetched == ["empty"]
    assert_whole(server, tmp_path)


# What goes wrong on the way


def test_a_dropped_connection_is_gone_on_with_where_it_broke(server, tmp_path):
    server.files = {"a": BIG}
    server.faults = {"a": [{"drop_at": 200_000}, {"drop_at": 300_000}]}
    report = fetch(server, tmp_path)
    assert server.gets("a") == [None, "bytes=200000-", "bytes=300000-"]
    assert report.num_bytes == len(BIG)
    assert_whole(server, tmp_path)


def test_progress_resets_the_count_of_retries(server, tmp_path):
    server.files = {"a": BIG}
    server.faults = {"a": [{"drop_at": 50_000 * i} for i in range(1, 12)]}
    assert fetch(server, tmp_path, retries=2).fetched == ["a"]
    server.files = {"b": BIG}
    server.faults = {"b": [{"drop_at": 50_000}] * 12}
    assert "early" in fetch(server, tmp_path, retries=2).failed["b"]


def test_a_server_without_ranges_is_read_from_the_start(server, tmp_path):
    server.files, server.serves_ranges = {"a": BIG}, False
    server.faults = {"a": [{"drop_at": 200_000}]}
    fetch(server, tmp_path)
    assert server.gets("a") == [None, "bytes=200000-"]
    assert_whole(server, tmp_path)


def test_a_range_other_than_asked_for_is_not_appended(server, tmp_path):
    server.files = {"a": BIG}
    (tmp_path / "a.part").write_bytes(BIG[:200_000])
    server.faults = {"a": [{"shift": 1000}]}
    assert fetch(server, tmp_path, retries=0).fetched == ["a"]
    assert server.gets("a") == ["bytes=200000-", None]
    assert_whole(server, tmp_path)


def test_bytes_are_on_the_disk_before_the_file_has_its_name(server, tmp_path, monkeypatch):
    server.files, order = {"a": BIG}, []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(fetching.os, name, lambda *args, name=name, real=real: order.append(name) or real(*args))
    fetch(server, tmp_path)
    assert order == ["fsync", "replace"]


def test_corrupt_bytes_never_get_the_name_and_are_fetched_from_zero(server, tmp_path):
    server.files = {"a": BIG}
    server.faults = {"a": [{"body": b"?" + BIG[1:]}]}
    fetch(server, tmp_path)
    assert server.gets("a") == [None, None]
    assert_whole(server, tmp_path)


def test_a_file_that_stays_corrupt_is_reported_and_leaves_nothing(server, tmp_path):
    server.files = {"a": BIG, "b": b"b"}
    server.faults = {"a": [{"body": b"?" + BIG[1:]}] * 20}
    report = fetch(server, tmp_path, retries=2)
    assert report.fetched == ["b"] and "published is" in report.failed["a"]
    assert len(server.gets("a")) == 3
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.part").exists()


def test_a_corrupt_part_of_an_earlier_run_costs_one_more_fetch(server, tmp_path):
    server.files = {"a": BIG, "b": b"b"}
    (tmp_path / "a.part").write_bytes(b"?" * 1000)
    (tmp_path / "b.part").write_bytes(b"much longer than the file")
    fetch(server, tmp_path)
    assert server.gets("a") == ["bytes=1000-", None] and server.gets("b") == ["bytes=25-", None]
    assert_whole(server, tmp_path)


def test_a_whole_part_needs_no_request(server, tmp_path):
    server.files = {"a": BIG}
    (tmp_path / "a.part").write_bytes(BIG)
    fetch(server, tmp_path)
    assert not server.gets("a")
    assert_whole(server, tmp_path)


def test_a_body_of_unannounced_length_counts_only_with_the_right_sum(server, tmp_path):
    server.files = {"a": BIG}
    server.faults = {"a": [{"length": False, "drop_at": 200_000}, {"length": False}]}
    assert fetch(server, tmp_path).fetched == ["a"]
    assert_whole(server, tmp_path)


def test_a_connection_that_falls_silent_is_given_up_and_resumed(server, tmp_path):
    server.files = {"a": BIG}
    server.faults = {"a": [{"drop_at": 200_000, "hang": 600}]}
    fetch(server, tmp_path, timeout=0.2)
    assert server.at_once >= 1  # the first answer still hangs
    assert server.gets("a") == [None, "bytes=200000-"]
    assert_whole(server, tmp_path)


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_a_server_in_trouble_is_asked_again(server, tmp_path, status):
    server.files = {"a": b"a"}
    server.faults = {"a": [{"status": status}] * 2}
    fetch(server, tmp_path)
    assert_whole(server, tmp_path)


def test_pauses_grow_and_retry_after_is_honoured_up_to_a_limit(server, tmp_path, monkeypatch):
    pauses = []
    server.files = {"a": b"a"}
    soon, bad = formatdate(time.time() + 60, usegmt=True), "a while"
    replies = [{"status": 503}, {"status": 503}] + [
        {"status": 429, "headers": {"Retry-After": after}} for after in ("7", "100000", soon, bad)
    ]
    server.faults = {"a": replies}
    monkeypatch.setattr(threading.Event, "wait", _noting(pauses, threading.Event.wait))
    fetch(server, tmp_path, retries=6, num_workers=1)
    assert pauses[:4] == [0.005, 0.01, 7.0, fetching.LONGEST_PAUSE]
    assert 50 < pauses[4] <= 60 and pauses[5] == pytest.approx(0.005 * 2**5)


def _noting(pauses, wait):
    def noting(event, timeout=None):
        if sys._getframe(1).f_code.co_name != "retried":
            return wait(event, timeout)
        return pauses.append(timeout)

    return noting


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_reported_at_once_and_the_other_files_come(server, tmp_path, status):
    server.files = {"a": b"a", "b": b"b"}
    server.faults = {"a": [{"status": status}] * 9}
    report = fetch(server, tmp_path)
    assert report.fetched == ["b"] and report.failed["a"].startswith(str(status))
    assert len(server.gets("a")) == 1 and not list(tmp_path.glob("a*"))


def test_a_rerun_fetches_what_failed_before(server, tmp_path):
    server.files = {"a": b"a", "b": b"b"}
    server.faults = {"a": [{"status": 404}]}
    fetch(server, tmp_path)
    report = fetch(server, tmp_path)
    assert (report.fetched, report.kept, report.failed) == (["a"], ["b"], {})
    assert_whole(server, tmp_path)


def test_redirects_are_followed_with_their_range_but_only_over_http(server, tmp_path):
    server.files = {"a": BIG, "file": b"f", "ftp": b"f"}
    sums = server.sums
    server.files["elsewhere"] = BIG
    elsewhere = {"status": 302, "headers": {"Location": server.url + "elsewhere"}}
    server.faults = {"a": [elsewhere] * 2, "elsewhere": [{"drop_at": 200_000}]}
    for name, place in {"file": "file:///etc/hosts", "ftp": "ftp://127.0.0.1/x"}.items():
        server.faults[name] = [{"status": 302, "headers": {"Location": place}}]
    report = download_files(server.url, tmp_path, sums, progress=False, timeout=5)
    assert server.gets("elsewhere") == [None, "bytes=200000-"]
    assert report.fetched == ["a"] and set(report.failed) == {"file", "ftp"}


def test_https_is_never_redirected_to_http():
    request = SimpleNamespace(type="https", full_url="https://a/b")
    with pytest.raises(fetching.urllib.error.HTTPError, match="refused"):
        fetching._CautiousRedirects().redirect_request(request, None, 302, "", {}, "http://a/b")


def test_a_server_that_is_gone_ends_the_run_soon(server, tmp_path):
    server.files = {f"{i:03}": b"x" for i in range(100)}
    server.faults = {path: [{"drop_at": 0}] * 9 for path in server.files if path > "009"}
    report = fetch(server, tmp_path, retries=1)
    assert 10 <= len(report.fetched) < 20 and len(report.fetched) + len(report.failed) == 100
    assert "gone" in report.failed["099"] and len(server.gets("050")) == 0


# The disk


def test_too_little_room_is_said_before_anything_is_fetched(server, tmp_path, monkeypatch):
    server.files = {"a": BIG, "b": BIG[::-1]}
    (tmp_path / "b.part").write_bytes(BIG[::-1][:100_000])
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(OSError, match="1,100,000 bytes are to come, 1,000,000 are free: 100,000 are missing"):
        fetch(server, tmp_path)
    with pytest.raises(OSError, match="2,900,000 bytes are to come"):
        fetch(server, tmp_path, num_bytes=3_000_000)
    assert not server.gets("a")
    monkeypatch.setattr(fetching, "MOST_HEAD_REQUESTS", 1)  # more files than this: room is looked for on the way
    assert fetch(server, tmp_path / "other").fetched == ["a", "b"]


def test_a_disk_that_fills_up_ends_with_a_clear_message_and_keeps_the_parts(server, tmp_path, monkeypatch):
    server.files = {"a": b"a", "b": BIG, "c": b"c"}
    real_open = open

    def full(file, mode="r", **options):
        stream = real_open(file, mode, **options)
        if str(file).endswith("b.part"):
            stream.write = lambda chunk: _fill(stream.raw, chunk)
        return stream

    monkeypatch.setattr(fetching, "open", full, raising=False)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="no room.* 1,000 are free: [0-9]{3},[0-9]{3} are missing.*make room") as caught:
        fetch(server, tmp_path, num_workers=1, num_bytes=1)  # the announced size is a lower bound
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "b").exists() and (tmp_path / "b.part").stat().st_size == 200_000
    monkeypatch.undo()
    assert not server.gets("c")  # the others are not begun
    assert fetch(server, tmp_path).kept == ["a"]
    assert server.gets("b")[-1] == "bytes=200000-"
    assert_whole(server, tmp_path)


def _fill(raw, chunk, room=200_000):
    raw.write(chunk[: room - raw.tell()])
    if raw.tell() == room:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_place_that_cannot_be_written_is_reported_for_that_file(server, tmp_path):
    server.files = {"a": b"a", "b": b"b", "c": b"c", "d/e": b"e"}
    (tmp_path / "a").mkdir()
    (tmp_path / "d").write_bytes(b"no folder")
    report = fetch(server, tmp_path)
    assert report.fetched == ["b", "c"] and set(report.failed) == {"a", "d/e"}


def test_two_downloads_do_not_write_to_one_folder(server, tmp_path):
    server.files = {"a": b"a"}
    with fetching.WeakFileLock(tmp_path / fetching.LOCK), pytest.raises(OSError, match="another download"):
        fetch(server, tmp_path)
    assert fetch(server, tmp_path).fetched == ["a"]


# Stopping


CHILD = """
import json, signal, sys
from training.fetching import download_files
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background has it ignored
print("started", flush=True)
download_files(sys.argv[1], sys.argv[2], json.loads(sys.stdin.read()), num_workers=3, progress=False)
"""


def start_child(server, folder):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, server.url, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    child.stdin.write(json.dumps(server.sums).encode())
    child.stdin.close()
    child.stdout.readline()
    return child


def bytes_in(folder):
    total = 0
    for path in folder.glob("g/*"):
        with contextlib.suppress(FileNotFoundError):  # a part that has just got its name
            total += path.stat().st_size
    return total


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and Ctrl-C as on POSIX")
@pytest.mark.parametrize("signals", [(signal.SIGKILL, signal.SIGKILL), (signal.SIGINT, signal.SIGKILL)])
def test_after_kills_a_rerun_ends_with_the_same_bytes(server, tmp_path, signals):
    server.files = {f"g/{i}": random.Random(i).randbytes(400_000) for i in range(8)}
    server.bytes_per_second = 1_000_000  # each connection
    for sent in signals:
        before, child = bytes_in(tmp_path), start_child(server, tmp_path)
        while bytes_in(tmp_path) < before + 100_000:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(sent)
        assert child.wait(10) != 0
        child.stdout.close()
        whole = {f"g/{path.name}": path.read_bytes() for path in (tmp_path / "g").iterdir() if path.suffix != ".part"}
        assert all(server.files[name] == content for name, content in whole.items()) and len(whole) < 8
    assert list((tmp_path / "g").glob("*.part"))
    server.bytes_per_second, server.requests = None, []
    report = fetch(server, tmp_path)
    assert not report.failed
    assert any(asked for _, _, asked in server.requests)  # gone on with, not begun again
    assert_whole(server, tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and Ctrl-C as on POSIX")
def test_an_interrupt_does_not_wait_for_the_files_to_end(server, tmp_path):
    server.files = {f"g/{i}": BIG for i in range(6)}
    server.bytes_per_second = 60_000  # a file takes ten seconds
    child = start_child(server, tmp_path)
    while bytes_in(tmp_path) < 1000:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    assert child.wait(4) != 0
    child.stdout.close()
    server.bytes_per_second = None
    assert not fetch(server, tmp_path).failed
    assert_whole(server, tmp_path)


# The published sums


def test_the_forms_that_sha256sum_writes_are_read():
    text = f"\ufeff{DIGEST.upper()} training/g1/a.hea\r\n{DIGEST}  b c.csv\n{DIGEST} *d\n\n{DIGEST} *d\n"
    assert read_sums(text) == {"training/g1/a.hea": DIGEST, "b c.csv": DIGEST, "d": DIGEST}


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "//host/share", "../up", "a/../../up", "a/..", "./a", "a//b", "a/", "..", "C:/x", "c:x", "a\\..\\b",
     "a\0b", "a\x1bb", "a\u2028b", "a\u202eb", "a.part", "x/.verified.jsonl", ".download.lock", "a/.. /b", "a.", "n" * 300,
     "a/" * 600 + "a", "a?", "a\rb"],
)  # fmt: skip
def test_a_path_that_could_lead_astray_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match=f"{fetching.SUMS_FILE}, line 2: .*accepted"):
        read_sums(f"{DIGEST} a/b.hea\n{DIGEST} {path}\n")
    with pytest.raises(ValueError, match="no plain relative path"):
        download_files("http://127.0.0.1:1/", tmp_path / "new", {path: DIGEST})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "text",
    ["", "\n", "<html>sign in</html>", f"{DIGEST[1:]} a", f"{DIGEST}", f"{DIGEST} a\n{'b' * 64} a", "a " + DIGEST],
)
def test_what_is_no_list_of_sums_is_refused(text):
    with pytest.raises(ValueError, match=fetching.SUMS_FILE):
        read_sums(text)


def test_sums_cut_on_the_way_are_fetched_again_and_missing_ones_reported(server):
    server.files = {fetching.SUMS_FILE: "".join(f"{DIGEST} g/{i}\n" for i in range(5000)).encode()}
    server.faults = {fetching.SUMS_FILE: [{"drop_at": 70_000}, {"status": 500}]}
    assert len(fetch_sums(server.url)) == 5000
    server.faults = {fetching.SUMS_FILE: [{"status": 404}]}
    with pytest.raises(ConnectionError, match="404.*Nothing was fetched"):
        fetch_sums(server.url)


def test_a_folder_is_not_mistaken_for_one_whose_name_goes_on():
    sums = {"training/cpsc_2018/g1/A.hea": "1", "training/cpsc_2018_extra/g1/Q.hea": "2", "x.csv": "3"}
    assert list(select_paths(sums, ("training/cpsc_2018",))) == ["training/cpsc_2018/g1/A.hea"]
    assert list(select_paths(sums, ("x.csv", "training"))) == ["x.csv", *list(sums)[:2]]
    assert select_paths(sums, ("",)) == sums
    with pytest.raises(ValueError, match="nothing is published there.*training, x.csv"):
        select_paths(sums, ("records500",))


@pytest.mark.parametrize("options", [{"num_workers": 0}, {"timeout": 0}, {"retries": -1}])
def test_impossible_options_are_refused(server, tmp_path, options):
    with pytest.raises(ValueError, match="accepted are"):
        fetch(server, tmp_path, **options)


def test_only_web_addresses_are_fetched_from(tmp_path):
    with pytest.raises(ValueError, match="http"):
        download_files("file:///etc/", tmp_path, {"hosts": DIGEST})
