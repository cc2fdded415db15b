"""hub_cards/space: what the page computes and holds; and the page itself, driven in a browser without a window."""

import importlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from tiny_checkpoints import LABELS, tiny_model, tiny_quantizer, write_record

pytest.importorskip("gradio", reason="gradio is not installed: pip install anyecg-hf[space]")

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

import anyecg_hf
from anyecg_hf import (
    AnyECGFeatureExtractor,
    AnyECGForLeadReconstruction,
    AnyECGRhythmFeatureExtractor,
    Record,
    read_record,
)
from anyecg_hf.simulate import simulate_record
from training.space import made_files, write_space

SPACE = ROOT / "hub_cards" / "space"
MODULES = ("analysis", "fragments", "models", "page", "visits")
TOKEN = "0123456789abcdef" * 2
PLANTED = "PLANTED Jane"  # in the names of files and in their text
SECRET = "hf_PlantedSecret"
START_SECONDS, WAIT_SECONDS = 300, 120  # at most; a busy machine takes its time


@pytest.fixture(scope="module")
def space():
    """The modules of the Space by name; it is a folder, not a package."""
    sys.path.insert(0, str(SPACE))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(SPACE))
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of tiny models without training, by the variable that names them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, kind in (("classifier", tiny_model()), ("reconstruction", tiny_model(AnyECGForLeadReconstruction))):
        kind.save_pretrained(folder / name)
        AnyECGFeatureExtractor().save_pretrained(folder / name)
    AnyECGRhythmFeatureExtractor(tiny_quantizer()).save_pretrained(folder / "tokenizer")
    return {f"ANYECG_{name.upper()}": str(folder / name) for name in ("classifier", "tokenizer", "reconstruction")}


@pytest.fixture(scope="module")
def models(space, checkpoints):
    return space.models.load_models(checkpoints)


@pytest.fixture(scope="module")
def without_a_model(space, models):
    return space.models.Models(models.classify)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder that temporary files go to."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def record_of(seconds=12, **options):
    return simulate_record(5, duration_seconds=seconds, **options)


def wfdb_files(folder, record, name="mine", comment=""):
    """Write a record as WFDB files and return their paths, header first."""
    folder.mkdir(exist_ok=True)
    write_record(record, folder, "mine")
    header = (folder / "mine.hea").read_text().replace("mine", name) + (f"# {comment}\n" if comment else "")
    (folder / "mine.hea").unlink()
    (folder / "mine.dat").rename(folder / f"{name}.dat")
    (folder / f"{name}.hea").write_text(header)
    return [folder / f"{name}.hea", folder / f"{name}.dat"]


def contents(paths):
    return {path.name: path.read_bytes() for path in paths}


# The files that are made from others


def test_the_checked_in_files_are_what_the_command_makes(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, text in made_files().items():
        assert (SPACE / name).read_text(encoding="utf-8") == text, f"{name}: python -m training.space"


def test_a_folder_to_upload_holds_the_page_the_package_and_the_models_names(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    write_space(tmp_path / "out", ["you/one", "you/two"])
    assert (tmp_path / "out" / "app.py").is_file() and (tmp_path / "out" / "anyecg_hf" / "__init__.py").is_file()
    assert "models:\n  - you/one\n  - you/two\n---" in (tmp_path / "out" / "README.md").read_text()
    assert not list((tmp_path / "out").rglob("__pycache__"))


# Reading


def test_a_part_of_an_upload_is_what_the_reader_gives_and_nothing_about_the_patient(space, tmp_path, temporary):
    paths = wfdb_files(tmp_path / "in", record_of(25), name="PLANTED", comment=f"Age: 71 Sex: F {PLANTED}")
    page, goes_on = space.analysis.read_upload(contents(paths), 4.0)
    expected = read_record(paths[0], start_seconds=4, duration_seconds=10)
    assert np.array_equal(page.signal, expected.signal) and page.sampling_rate == 500 and goes_on
    assert expected.age == 71 and PLANTED in str(expected.comments)
    assert (page.age, page.sex, page.record_name, page.comments) == (None, None, None, [])
    assert list(temporary.iterdir()) == []


def test_the_last_part_does_not_go_on(space, tmp_path):
    files = contents(wfdb_files(tmp_path / "in", record_of(25)))
    page, goes_on = space.analysis.read_upload(files, 17.0)
    assert page.duration_seconds == 8 and not goes_on


def test_a_bad_file_gets_the_readers_message_without_the_folder(space, temporary):
    with pytest.raises(ValueError) as refusal:
        space.analysis.read_upload({"night.edf": b"0       " + b"x" * 600}, 0.0)
    assert str(refusal.value).startswith("night.edf: the field") and str(temporary) not in str(refusal.value)
    with pytest.raises(ValueError, match=r"mine\.dat") as refusal:
        space.analysis.read_upload({"mine.hea": b"mine 1 500 5000\nmine.dat 16 1000/mV 16 0 0 0 0 II\n"}, 0.0)
    assert str(temporary) not in str(refusal.value) and list(temporary.iterdir()) == []


def test_what_a_file_does_not_say_is_said_by_the_visitor(space, tmp_path):
    np.save(tmp_path / "bare.npy", record_of(lead_names=["I", "II"]).signal * 1000)
    files = contents([tmp_path / "bare.npy"])
    with pytest.raises(ValueError, match="sampling_rate"):
        space.analysis.read_upload(files, 0.0, **space.page.stated_by("", space.page.UNITS[0], "", "", ""))
    stated = space.page.stated_by("500", "uV", "", "one, two", "one=I, two=lead ii")
    page, _ = space.analysis.read_upload(files, 0.0, **stated)
    assert page.lead_names == ["I", "II"] and np.abs(page.signal).max() < 5
    for given, said in (
        (("fast", "mV", "", "", ""), "sampling_rate is 'fast'"),
        (("", "mV", "1.5", "", ""), "whole number"),
    ):
        with pytest.raises(ValueError, match=said):
            space.page.stated_by(*given)


def test_of_several_files_the_main_header_is_read(space):
    first = space.analysis.first_file
    segments = {"a.hea": b"a 2 500 100\n", "whole.hea": b"whole/2 2 500 200\n", "b.hea": b"b 2 500 100\n", "a.dat": b""}
    assert first(segments) == "whole.hea"
    assert first({"x.dat": b"", "x.hea": b"x 1 500 10\n"}) == "x.hea"
    with pytest.raises(ValueError, match=r"x\.hea, y\.hea: several"):
        first({"y.hea": b"y 1 500 10\n", "x.hea": b"x 1 500 10\n"})
    with pytest.raises(ValueError, match="no WFDB headers"):
        first({"x.edf": b"", "y.edf": b""})


def test_every_example_is_read_and_marked_as_simulated(space, models):
    for name in space.analysis.EXAMPLES:
        page, goes_on = space.analysis.read_example(name, 0.0)
        assert page.duration_seconds == 10 and goes_on and page.comments == ["simulated"]
    _, result = space.analysis.examine(models, page)  # the last: an electrode off
    assert {each["lead"] for each in result["quality"]["masked"]} == {"V2"}
    with pytest.raises(ValueError, match="ends at 60 s"):
        space.analysis.read_example(name, 60.0)


# What is computed


def test_only_leads_that_the_classifier_knows_are_shown(space, models):
    record = record_of(10, lead_names=["II", "V1"])
    odd = Record(np.vstack([record.signal, record.signal[:1]]), 500.0, ["V1", "II", "PLANTED"])
    known, result = space.analysis.examine(models, odd)
    assert known.lead_names == ["V1", "II"] and np.array_equal(known.signal, odd.signal[:2])
    assert sorted(finding["label"] for finding in result["findings"]) == sorted(LABELS.values())


def test_a_signal_that_cannot_be_read_is_an_answer(space, models):
    flat = Record(np.zeros((2, 5000), np.float32), 500.0, ["I", "II"])
    _, result = space.analysis.examine(models, flat)
    assert "Signal unusable" in space.fragments.answer(result, 0.0, False, False)
    assert space.fragments.findings(result["findings"]) == ""


def test_without_a_model_limb_leads_follow_by_algebra_and_others_are_refused(space, without_a_model):
    record = record_of(10)
    assert space.analysis.removable_leads(without_a_model, record) == ["I", "II", "III", "aVR", "aVL", "aVF"]
    both, figures = space.analysis.restore(without_a_model, record, ["III", "aVR"])
    rows = dict(zip(record.lead_names, record.signal))
    assert both.lead_names == ["III (measured)", "III", "aVR (measured)", "aVR"]
    assert np.abs(both.signal[1] - (rows["II"] - rows["I"])).max() < 1e-6 and both.derived[1].all()
    assert not both.derived[[0, 2]].any() and not both.restored.any()
    assert [(lead, how) for lead, how, *_ in figures] == [("III", "derived"), ("aVR", "derived")]
    for leads in (["V1"], list(record.lead_names), []):
        with pytest.raises(ValueError):
            space.analysis.restore(without_a_model, record, leads)
    two = record_of(10, lead_names=["I", "II"])
    assert space.analysis.removable_leads(without_a_model, two) == []


def test_with_a_model_a_removed_lead_is_restored_from_the_others_beside_the_measured_one(space, models):
    record = record_of(10)
    changed = Record(record.signal.copy(), 500.0, list(record.lead_names))
    changed.signal[record.lead_names.index("V3")] *= -2
    (one, figures), (other, _) = (space.analysis.restore(models, each, ["V3", "III"]) for each in (record, changed))
    assert one.restored.any(axis=1).tolist() == [False, True, False, False] and one.derived[3].all()
    assert [how for _, how, *_ in figures] == ["restored", "derived"]
    assert np.array_equal(one.signal[1], other.signal[1])  # the model did not see V3
    assert np.allclose(other.signal[0], -2 * one.signal[0], atol=1e-3) and figures[1][2] > 0.99
    assert space.analysis.removable_leads(models, record) == record.lead_names


def test_the_codes_under_the_trace_are_the_tokenizers(space, models):
    record = record_of(10)
    record.signal[record.lead_names.index("V1"), 2000:3500] = np.nan
    figure = space.analysis.draw_codes(models, record, "V1")
    expected = models.tokenize(record)["rhythm_codes"][0][record.lead_names.index("V1")]
    shown = [text for text in figure.axes[0].texts if text.get_gid() == "code"]
    assert [text.get_text() for text in shown] == ["none" if code == -100 else str(code) for code in expected]
    assert 2 <= (expected == -100).sum() <= 4 and len({text.get_text() for text in shown}) > 3
    trace = next(line for line in figure.axes[0].lines if line.get_gid() == "trace-V1")
    assert [text.get_position()[0] - trace.get_xdata()[0] for text in shown] == pytest.approx(
        [12.5 + 25 * i for i in range(10)]
    )
    low, height = figure.axes[0].get_ylim()[0], figure.get_size_inches()[1] * 25.4
    assert figure.axes[0].get_ylim()[1] - low == pytest.approx(height)  # still true to scale


def test_the_reasons_in_words_are_the_strongest_of_the_explanation(space, models):
    explanation = anyecg_hf.explain(models.classify, record_of(10, lead_names=["I", "II"]), label="AFIB")
    supporting, opposing = space.analysis.strongest_reasons(explanation)
    lead, second = np.unravel_index(np.nanargmax(explanation.relevance), explanation.relevance.shape)
    assert supporting[0] == (["I", "II"][lead], second, explanation.relevance[lead, second])
    lowest = np.sort(explanation.relevance[explanation.relevance < 0])[:3]
    assert [value for *_, value in opposing] == lowest.tolist()
    assert f"{supporting[0][0]} from second {second} (+" in space.fragments.reasons(explanation, supporting, opposing)


# Which models


def test_models_are_named_by_folder_or_hub_id_and_revision(space, checkpoints, monkeypatch, tmp_path):
    find = space.models.find_model
    name = "ANYECG_CLASSIFIER"
    assert find(name, {name: "you/net@v1"}) == {"model": "you/net", "revision": "v1"}
    assert find(name, {name: "you/net"}) == {"model": "you/net", "revision": None}
    assert find(name, checkpoints) == {"model": checkpoints[name]}
    assert find(name, {})["model"] == str(ROOT / "checkpoints" / "anyecg-small-statements")
    monkeypatch.setattr(space.models, "CHECKPOINTS", tmp_path)
    with pytest.raises(OSError, match=name):
        space.models.load_models({})
    alone = space.models.load_models({name: checkpoints[name]})
    assert alone.tokenize is None and alone.reconstruct is None


# What is held


def test_an_upload_is_held_for_the_session_that_claims_it_and_for_no_other(space):
    visits = space.visits.Visits()
    visits.append(TOKEN, "a.hea", b"ab")
    visits.append(TOKEN, "a.hea", b"c")
    assert visits.claim(TOKEN, "one").files == {"a.hea": b"abc"}
    assert visits.of("one").files == {"a.hea": b"abc"}
    for lost in (lambda: visits.claim(TOKEN, "two"), lambda: visits.of("two")):
        with pytest.raises(ValueError, match="drop the record again"):
            lost()
    visits.forget("one")
    with pytest.raises(ValueError):
        visits.of("one")


def test_the_oldest_make_room_and_what_is_not_used_expires(space, monkeypatch):
    monkeypatch.setattr(space.visits, "ROOM", 10)
    visits = space.visits.Visits()
    for session in ("one", "two", "three"):
        visits.append(TOKEN, "a", b"1234")
        visits.claim(TOKEN, session)
        now = time.monotonic()
        visits.of(session).last_used = now - {"one": 100, "two": 50, "three": 0}[session]
    with pytest.raises(ValueError):
        visits.of("one")
    visits._visits["two"].last_used = time.monotonic() - space.visits.SECONDS_HELD - 1
    visits.expire()
    assert list(visits._visits) == ["three"]


def test_the_endpoint_takes_files_and_refuses_large_ones_and_odd_names(space, monkeypatch):
    monkeypatch.setattr(space.visits, "LARGEST_UPLOAD", 1000)
    visits = space.visits.Visits()
    route = Route("/received/{token}/{name}", space.visits.receive(visits), methods=["PUT"])
    client = TestClient(Starlette(routes=[route]))
    assert client.put(f"/received/{TOKEN}/a%20b.hea", content=b"x" * 600).status_code == 200
    refused = client.put(f"/received/{TOKEN}/b.dat", content=b"x" * 600)
    assert refused.status_code == 413 and "64 MB" in refused.text and visits._visits == {}
    for path in (f"{TOKEN}/..%00", f"{TOKEN}/%2e%2e", "no-token/a.hea", f"{TOKEN}/{'n' * 300}"):
        assert client.put(f"/received/{path}", content=b"x").status_code in (400, 404), path
    assert visits._visits == {}


# What is said


def test_words_from_a_file_are_shown_as_words(space):
    hostile = "<script>alert(1)</script>"
    report = {"is_acceptable": True, "acceptability": 1.0, "absent_leads": [], "masked": [], "doubtful": []}
    for html in (
        space.fragments.error(hostile),
        space.fragments.quality(report, [hostile]),
        space.fragments.findings([{"label": hostile, "score": 0.5, "threshold": 0.4, "positive": True}]),
    ):
        assert "<script" not in html and "&lt;script&gt;" in html


def test_positive_findings_come_first_and_the_rest_is_folded_away(space):
    found = [{"label": f"L{i}", "score": i / 10, "threshold": 0.95 - i / 10, "positive": i == 3} for i in range(9)]
    head, rest = space.fragments.findings(found).split("<details>")
    places = [head.index(f"<b>L{i}</b>") for i in (3, 8, 7, 6, 5, 4)]
    assert places == sorted(places) and "0.30</td><td>0.65" in head and "3 more" in rest


def test_of_an_error_of_the_program_only_its_kind_and_place_are_logged(space, caplog):
    def fail():
        raise KeyError(PLANTED)

    with caplog.at_level(logging.DEBUG):
        result, message = space.page.answered(fail)
    assert result is None and "KeyError" in message and PLANTED not in message
    assert "KeyError at" in caplog.text and "test_space.py" in caplog.text and PLANTED not in caplog.text


# The page in a browser


class Server:
    """The Space as a process of its own, from a clone by its one command; all it writes goes below `folder`."""

    def __init__(self, folder, checkpoints):
        self.folder, self.log = folder, folder / "log.txt"
        (folder / "temporary").mkdir()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        environment = {**os.environ, **checkpoints, "GRADIO_SERVER_PORT": str(port), "HF_TOKEN": SECRET}
        environment |= {"TMPDIR": str(folder / "temporary"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}
        command = [sys.executable, str(SPACE / "app.py")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
        wait_for(self.is_up, START_SECONDS, self.log.read_text)

    def is_up(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.ask(self.url)[0] == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    def ask(self, url, **options):
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(url, **options), timeout=WAIT_SECONDS) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read()

    def written(self):
        """Return all that the server has written, by path below its folder."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}


def wait_for(condition, seconds=WAIT_SECONDS, what=lambda: ""):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain: {what()}"
        time.sleep(0.25)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install anyecg-hf[dev]")
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in programs:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = programs[0]
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking no-proxy-server "
    flags += (
        f"disable-component-update disable-sync disable-dev-shm-usage user-data-dir={tmp_path_factory.mktemp('user')}"
    )
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoints, browser):
    server = Server(tmp_path_factory.mktemp("server"), checkpoints)
    yield server
    server.process.kill()
    server.process.wait()


class Visitor:
    """One who looks at the page, in a tab of its own."""

    def __init__(self, browser, url):
        browser.switch_to.new_window("tab")
        self.browser, self.tab = browser, browser.current_window_handle
        browser.get(url)
        wait_for(lambda: self.all("#show-example") and self.all(".drop input"))
        time.sleep(0.5)  # until the listeners are set, which nothing shows

    def all(self, selector):
        self.browser.switch_to.window(self.tab)
        return self.browser.find_elements("css selector", selector)

    def text(self, selector):
        self.browser.switch_to.window(self.tab)
        script = "return Array.from(document.querySelectorAll(arguments[0]), each => each.innerText).join(' ')"
        return self.browser.execute_script(script, selector)

    def click(self, selector, text=None):
        element = next(each for each in self.all(selector) if text in (None, each.text))
        self.browser.execute_script("arguments[0].click()", element)

    def fill(self, selector, text):
        (field,) = self.all(selector)
        self.browser.execute_script("arguments[0].focus(); arguments[0].select()", field)
        field.send_keys(text, "\t")

    def drop(self, *paths):
        """Choose files, as a drop does, once what the page showed before is marked as old."""
        self.mark_as_old()
        self.all(".drop input")[0].send_keys("\n".join(map(str, paths)))

    def mark_as_old(self):
        script = "document.querySelectorAll('#answer h2, #message .refusal').forEach(e => e.classList.add('old'))"
        self.browser.execute_script(script)

    def answered(self):
        """Wait for a new answer or refusal and return its text."""
        fresh = "#answer h2:not(.old), #message .refusal:not(.old)"
        wait_for(lambda: self.text(fresh), what=lambda: self.text("body"))
        return self.text("#answer") + self.text("#message")

    def show_example(self):
        self.mark_as_old()
        self.click("#show-example")
        return self.answered()


@pytest.fixture
def visit(server, browser):
    """Return a function that opens the page in a tab; all are closed afterwards."""
    first, visitors = browser.current_window_handle, []

    def open_page():
        visitors.append(Visitor(browser, server.url))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        browser.switch_to.window(visitor.tab)
        browser.close()
    browser.switch_to.window(first)


def test_a_dropped_record_is_shown_with_findings_quality_and_picture(visit, tmp_path):
    visitor = visit()
    assert "Not a medical device" in visitor.text(".warning")
    visitor.drop(*wfdb_files(tmp_path / "in", record_of(10, lead_names=["II", "V1", "V5"])))
    answer = visitor.answered()
    assert "Analysed: second 0 to 10, leads II, V1, V5." in answer and "goes on" not in answer
    assert all(label in visitor.text("#findings") for label in LABELS.values())
    assert "Absent: I, III, aVR" in visitor.text("#quality")
    (image,) = visitor.all("#trace img")
    assert image.get_attribute("src").startswith("data:image/png;base64,") and image.size["width"] >= 1100
    assert "Not a medical device" in visitor.text(".warning")


def test_a_bad_file_gets_the_readers_message_and_no_old_result_stays(visit, server, tmp_path):
    visitor = visit()
    visitor.show_example()
    (tmp_path / "night.edf").write_bytes(b"0       " + b"x" * 600)
    visitor.drop(tmp_path / "night.edf")
    assert visitor.answered() == "night.edf: the field 'number of signals' is no whole number; the header is damaged."
    assert not visitor.all("img") and "SR" not in visitor.text("body") and "Traceback" not in server.log.read_text()


def test_twenty_megabytes_are_read_and_any_part_of_them_is_shown(visit, tmp_path):
    long = record_of(10)
    long.signal = np.tile(long.signal, 168)
    paths = wfdb_files(tmp_path / "in", long)
    assert paths[1].stat().st_size > 20e6
    visitor = visit()
    visitor.drop(*paths)
    assert "The recording goes on" in visitor.answered()
    visitor.fill("#start input", "1675")
    visitor.mark_as_old()
    visitor.click("#again")
    assert "Analysed: second 1675 to 1680" in visitor.answered()
    visitor.fill("#start input", "1700")
    visitor.mark_as_old()
    visitor.click("#again")
    assert "the recording ends at 1680 s" in visitor.answered()


def test_two_visitors_at_once_each_see_their_own(visit, tmp_path):
    mine = wfdb_files(tmp_path / "one", record_of(10, lead_names=["I", "II"]))
    yours = wfdb_files(tmp_path / "two", record_of(10, lead_names=["V1", "V2"]))
    one, two = visit(), visit()
    one.drop(*mine)
    two.drop(*yours)  # of the same name, before the first is answered
    assert "leads V1, V2." in two.answered() and "leads I, II." in one.answered()
    one.drop(*yours)
    two.drop(*yours)
    assert "leads V1, V2." in one.answered() and "leads V1, V2." in two.answered()


def test_what_a_file_lacks_is_asked_for_and_taken_from_the_options(visit, tmp_path):
    np.save(tmp_path / "bare.npy", record_of(10, lead_names=["I", "II"]).signal)
    visitor = visit()
    visitor.drop(tmp_path / "bare.npy")
    assert visitor.answered().startswith("bare.npy: ") and "sampling_rate" in visitor.text("#message")
    visitor.click("button.label-wrap")  # opens the options
    wait_for(lambda: visitor.all("#rate input, #rate textarea"))
    visitor.fill("#rate input, #rate textarea", "500")
    visitor.click("#units label", "mV")
    visitor.fill("#leads input, #leads textarea", "I, II")
    visitor.mark_as_old()
    visitor.click("#again")
    assert "leads I, II." in visitor.answered()


def test_why_a_removed_lead_and_codes_are_shown_and_go_with_the_record(visit, tmp_path):
    visitor = visit()
    assert "Simulated, not a patient." in visitor.show_example()
    visitor.click("#ask-why")
    wait_for(lambda: visitor.all("#why img"))
    assert "Blue, for " in visitor.text("#why")
    for tab, press, shown in (("Remove a lead", "#ask-restore", "#restored"), ("Codes", "#ask-codes", "#codes")):
        visitor.click("button[role=tab]", tab)
        wait_for(lambda press=press: visitor.all(press))
        if press == "#ask-restore":
            visitor.click("#removed label", "V2")
        visitor.click(press)
        wait_for(lambda shown=shown: visitor.all(f"{shown} img"))
        if press == "#ask-restore":
            assert "V2\trestored" in visitor.text("#restored")
    visitor.drop(*wfdb_files(tmp_path / "in", record_of(10, lead_names=["I", "II"])))
    visitor.answered()
    wait_for(lambda: len(visitor.all("img")) == 1)  # the new trace and nothing of the old record


def test_a_phone_shows_the_picture_at_a_readable_size_in_a_page_no_wider_than_itself(visit, browser):
    visitor = visit()
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    visitor.show_example()
    width = browser.execute_script("return document.documentElement.scrollWidth")
    sizes = [image.size["width"] for image in visitor.all("#trace img")]
    visitor.click("#trace input.large")
    larger = [image.size["width"] for image in visitor.all("#trace img")]
    frame = visitor.all("#trace .frame")[0].size["width"]
    assert width <= 390 and frame <= 390 and sizes == [1100] and larger == [2200]


def test_the_page_asks_no_other_server(visit, server, browser):
    visit().show_example()
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked = [url for url in asked if url.startswith(("http", "ws"))]
    assert len(asked) > 5 and [url for url in asked if not url.startswith(server.url)] == []


def test_gradios_own_upload_takes_nothing(server):
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="PLANTED.txt"\r\n\r\nPLANTED\r\n--b--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    status, _ = server.ask(f"{server.url}gradio_api/upload", data=body, headers=headers, method="POST")
    assert status in (400, 413) and "PLANTED" not in str(server.written())


def test_nothing_of_a_patient_stays_in_temporary_files_or_the_log_and_nothing_at_all_after_the_end(
    visit, server, tmp_path
):
    paths = wfdb_files(tmp_path / "in", record_of(10), name="PLANTED_Jane", comment=f"Patient: {PLANTED}")
    visitor = visit()
    visitor.drop(*paths)
    visitor.answered()
    bad = tmp_path / "PLANTED_Jane.xml"
    bad.write_text(f"<AnnotatedECG><name>{PLANTED}</name></AnnotatedECG>")
    visitor.drop(bad)
    assert "PLANTED_Jane.xml" in visitor.answered()  # the visitor's own name of the file, to the visitor only
    samples = paths[1].read_bytes()[1200:1264]
    for name, data in server.written().items():
        for secret in (b"planted", b"jane", SECRET.lower().encode(), samples.lower()):
            assert secret not in name.lower().encode() + data.lower(), name
    assert "Running on" in server.log.read_text() and "Traceback" not in server.log.read_text()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(WAIT_SECONDS)
    assert list(server.written()) == ["log.txt"] and list((server.folder / "temporary").iterdir()) == []
