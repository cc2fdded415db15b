import hashlib
import http.server
import importlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install anyecg-hf[plot]")

from anyecg_hf import read_record
from anyecg_hf.records import is_simulated
from anyecg_hf.simulate import simulate_record

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FINDINGS = [
    {"label": "normal ECG", "score": 0.81, "threshold": 0.5, "positive": True},
    {"label": "sinus rhythm", "score": 0.97, "threshold": 0.6, "positive": True},
    *({"label": f"statement {i}", "score": i / 100, "threshold": 0.3, "positive": False} for i in range(10)),
]
SIGNAL = np.random.default_rng(0).integers(-2000, 2000, (5000, 12)).astype("<i2")
CONTENT = SIGNAL.tobytes()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "/files/00001_hr.dat"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("physionet_record", "demo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("physionet_record"), importlib.import_module("demo")


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        content, claimed_length, pause = self.server.answers.get(self.path, (None, 0, 0))
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(claimed_length))
        self.end_headers()
        time.sleep(pause)
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine: `answers` is path -> (content, the length it claims, seconds before it sends)."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.answers, server.requests = {NAME: (CONTENT, len(CONTENT), 0)}, []
    server.url = f"http://127.0.0.1:{server.server_port}{NAME}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(modules, server, folder):
    return modules[0].fetch_record(folder, url=server.url, sha256=SHA256)


def left_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def unused_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_the_fetched_record_is_what_the_server_has(modules, server, tmp_path):
    record = read_record(fetch(modules, server, tmp_path / "cache"))
    assert np.abs(record.signal - SIGNAL.T / 1000).max() < 1e-6
    assert record.sampling_rate == 500 and record.lead_names[3:6] == ["aVR", "aVL", "aVF"]
    assert left_in(tmp_path / "cache") == ["00001_hr.dat", "00001_hr.hea"]


def test_a_second_run_asks_nobody(modules, server, tmp_path):
    first, second = (fetch(modules, server, tmp_path) for _ in range(2))
    assert first == second and server.requests == [NAME]


def test_a_cached_file_that_was_damaged_is_fetched_again(modules, server, tmp_path):
    header = fetch(modules, server, tmp_path)
    header.with_suffix(".dat").write_bytes(CONTENT[:-1])
    fetch(modules, server, tmp_path)
    assert len(server.requests) == 2 and header.with_suffix(".dat").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "answer",
    {
        "corrupt": (CONTENT[:-1] + b"\0", len(CONTENT), 0),
        "short": (CONTENT[:5000], len(CONTENT), 0),
        "long": (CONTENT + b"\0" * 50, len(CONTENT) + 50, 0),
        "empty": (b"", 0, 0),
        "another page": (b"<html>log in</html>", 19, 0),
    }.items(),
    ids=lambda answer: answer[0],
)
def test_what_is_not_the_published_file_is_refused_and_not_kept(modules, server, tmp_path, answer):
    server.answers[NAME] = answer[1]
    with pytest.raises(modules[0].FetchError):
        fetch(modules, server, tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_a_file_that_is_not_there_is_an_error(modules, server, tmp_path):
    server.answers.clear()
    with pytest.raises(modules[0].FetchError, match="404"):
        fetch(modules, server, tmp_path)


def test_no_server_is_an_error(modules, tmp_path):
    with pytest.raises(modules[0].FetchError):
        modules[0].fetch_record(tmp_path, url=f"http://127.0.0.1:{unused_port()}{NAME}")


@pytest.mark.parametrize("limit", ["CONNECT_SECONDS", "FETCH_SECONDS"])
def test_a_server_that_is_silent_is_given_up(modules, server, tmp_path, monkeypatch, limit):
    server.answers[NAME] = (CONTENT, len(CONTENT), 600)  # in the end it would have all come
    monkeypatch.setattr(modules[0], limit, 0.3)
    with pytest.raises(modules[0].FetchError):
        fetch(modules, server, tmp_path)


def test_the_cache_is_the_users_cache_folder(modules, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert modules[0].cache_folder() == tmp_path / "anyecg-hf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert modules[0].cache_folder() == Path.home() / ".cache" / "anyecg-hf"


def test_the_expected_hash_is_that_of_the_record_in_ptb_xl(modules, real_ecg, monkeypatch):
    if not (real_ecg / "ptb-xl-500").is_dir():
        pytest.skip("ptb-xl-500 not present")
    for module in ("pyarrow", "soundfile"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(str(real_ecg))
    unpack = importlib.import_module("unpack")
    signal = next(signal for meta, signal in unpack.read_pack("ptb-xl-500") if meta["ecg_id"] == 18124)
    assert hashlib.sha256(signal.T.astype("<i2").tobytes()).hexdigest() == modules[0].SHA256
    assert modules[0].URL.endswith("/ptb-xl/1.0.3/records500/18000/18124_hr.dat")


def test_without_a_network_one_line_says_so_and_a_record_is_simulated(modules, monkeypatch, capsys, tmp_path):
    _, demo = modules
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = f"http://127.0.0.1:{unused_port()}{NAME}"
    monkeypatch.setattr(demo, "fetch_record", lambda folder: modules[0].fetch_record(folder, url=url))
    record = demo.choose_record(None)
    lines = capsys.readouterr().out.splitlines()
    assert is_simulated(record) and len(record.lead_names) == 12
    assert len(lines) == 1 and "simulated" in lines[0] and "PhysioNet" in lines[0]


def test_with_a_network_the_record_is_physionets_and_its_source_is_named(
    modules, server, monkeypatch, capsys, tmp_path
):
    _, demo = modules
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "fetch_record", lambda folder: fetch(modules, server, folder))
    record = demo.choose_record(None)
    assert not is_simulated(record) and left_in(tmp_path / "anyecg-hf")
    assert "PTB-XL 1.0.3" in capsys.readouterr().out


def test_the_table_shows_all_positive_findings_first_and_some_others(modules):
    lines = modules[1].table(FINDINGS).splitlines()
    assert lines[2].split() == ["*", "sinus", "rhythm", "0.97", "0.60"]
    assert lines[3].split() == ["*", "normal", "ECG", "0.81", "0.50"]
    assert lines[4].split() == ["statement", "9", "0.09", "0.30"]
    assert len([line for line in lines if "statement" in line]) == 4
    assert len({len(line) for line in lines[1:-1]}) == 1
    positive = [{**finding, "positive": True} for finding in FINDINGS]
    assert modules[1].table(positive).count("*") == 12 + 1


def test_a_threshold_may_be_unknown(modules):
    assert "-" in modules[1].table([{"label": "x", "score": 0.2, "threshold": None, "positive": False}])


def write_wfdb(folder):
    """A simulated record as a WFDB record of 12 leads on disk."""
    samples = (simulate_record(3).signal.T * 1000).astype("<i2")
    (folder / "mine.dat").write_bytes(samples.tobytes())
    names = "I II III aVR aVL aVF V1 V2 V3 V4 V5 V6".split()
    lines = ["mine 12 500 5000", *(f"mine.dat 16 1000/mV 16 0 0 0 0 {name}" for name in names)]
    (folder / "mine.hea").write_text("\n".join(lines) + "\n")
    return folder / "mine"


@pytest.mark.parametrize("form", ["{}", "--record={}", "{}.hea"])
def test_a_record_of_the_users_is_classified_and_drawn(modules, monkeypatch, capsys, tmp_path, form):
    given = []
    classify = lambda task, model: lambda record: given.append((task, record)) or FINDINGS  # noqa: E731
    monkeypatch.setattr("transformers.pipeline", classify)
    picture = tmp_path / "out.png"
    modules[1].main([form.format(write_wfdb(tmp_path)), "--output", str(picture), "--checkpoint", "some/model"])
    ((task, record),) = given
    out = capsys.readouterr().out
    assert task == "ecg-classification" and record.record_name == "mine"
    assert "sinus rhythm" in out and str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="session")
def untrained_checkpoint(tmp_path_factory):
    """A classifier as it is saved, of the smallest size and without training."""
    torch = pytest.importorskip("torch")
    from anyecg_hf import AnyECGConfig, AnyECGFeatureExtractor, AnyECGForSequenceClassification

    names = ["normal ECG", "atrial fibrillation", "ventricular premature complex"]
    config = AnyECGConfig.from_preset(
        "tiny",
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type="multi_label_classification",
        thresholds=[0.0, 0.5, 1.0],
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untrained")
    AnyECGForSequenceClassification(config).save_pretrained(folder)
    AnyECGFeatureExtractor().save_pretrained(folder)
    return folder


def test_the_whole_way_without_a_network(modules, untrained_checkpoint, monkeypatch, capsys, tmp_path):
    _, demo = modules
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"http://127.0.0.1:{unused_port()}{NAME}"
    monkeypatch.setattr(demo, "fetch_record", lambda folder: modules[0].fetch_record(folder, url=url))
    demo.main(["--checkpoint", str(untrained_checkpoint), "--output", str(tmp_path / "demo.png")])
    out = capsys.readouterr().out
    assert "simulated" in out.splitlines()[0]
    assert "* normal ECG" in out and "  ventricular premature complex" in out
    assert (tmp_path / "demo.png").stat().st_size > 50_000


def test_a_record_that_is_not_there_is_one_line_and_not_a_traceback(modules, capsys):
    with pytest.raises(SystemExit) as stop:
        modules[1].main(["no/such/record", "--checkpoint", "some/model"])
    assert stop.value.code == 1 and len(capsys.readouterr().err.splitlines()) == 1


def test_an_absent_checkpoint_is_one_line_and_not_a_traceback(modules, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(modules[1], "CHECKPOINT", tmp_path / "absent")
    with pytest.raises(SystemExit):
        modules[1].main([])
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / 'absent'} is absent: name another classifier with --checkpoint."
    ]


def test_help_answers_without_loading_the_library():
    code = "import sys, demo\ntry: demo.main(['--help'])\nfinally: assert 'transformers' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "RECORD" in done.stdout, done.stderr
