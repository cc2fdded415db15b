"""training/download.py: the corpora, their places and the command, against a local server."""

import re
from dataclasses import replace

import pytest
from file_server import running_server

from training import download
from training.download import CORPORA, PHYSIONET, Published, download_corpus


@pytest.fixture
def server(monkeypatch):
    with running_server(monkeypatch) as server:
        yield server


def test_the_command_fetches_a_corpus_into_a_folder_of_its_name(server, tmp_path, monkeypatch, capsys):
    server.files = {"p/training/x/g1/A.hea": b"A", "p/training/x/g1/A.mat": b"M", "p/training/y/B.hea": b"B"}
    lines = [f"{sha256} {path.removeprefix('p/')}\n" for path, sha256 in server.sums.items()]
    server.files["p/SHA256SUMS.txt"] = "".join(lines).encode()
    monkeypatch.setitem(CORPORA, "georgia", Published(server.url + "p/", ("training/x",)))
    command = ["--corpus", "georgia", "--out", str(tmp_path)]
    server.faults = {"p/training/x/g1/A.hea": [{"status": 404}]}
    assert download.main(command) == 1
    assert "404" in capsys.readouterr().out
    assert download.main(command) == 0
    assert sorted(path.name for path in (tmp_path / "georgia/training/x/g1").iterdir()) == ["A.hea", "A.mat"]
    assert not (tmp_path / "georgia/training/y").exists()
    assert download.main([*command, "--only", "training/x/g1/A.mat"]) == 0
    assert "0 fetched" in capsys.readouterr().out.splitlines()[-1]


def test_the_seven_corpora_have_a_place_over_https():
    assert list(CORPORA) == ["cpsc-2018", "cpsc-extra", "incart", "ptb", "ptb-xl", "georgia", "chapman-ningbo"]
    for place in CORPORA.values():
        assert re.fullmatch(r"https://physionet\.org/files/[a-z0-9-]+/\d\.\d\.\d/", place.base_url)
        assert place.gigabytes > 0


@pytest.mark.parametrize("slash", ["", "/"])
def test_every_corpus_comes_from_a_mirror_under_its_published_path(server, tmp_path, monkeypatch, slash):
    for name, place in list(CORPORA.items()):
        monkeypatch.setitem(
            CORPORA, name, replace(place, gigabytes=0.0)
        )  # whatever room there is: these files are small
        paths = [f"{folder}/{name}.hea".lstrip("/") for folder in place.folders]
        project = "mirror/" + place.base_url.removeprefix(PHYSIONET)
        server.files = {project + path: name.encode() for path in paths}
        sums = "".join(f"{sha256} {path.removeprefix(project)}\n" for path, sha256 in server.sums.items())
        server.files[project + "SHA256SUMS.txt"] = sums.encode()
        report = download_corpus(name, tmp_path, base_url=f"{server.url}mirror{slash}", progress=False)
        assert report.fetched == sorted(paths) and not report.failed
        assert all((tmp_path / name / path).read_bytes() == name.encode() for path in paths)


def test_the_command_fetches_from_a_mirror(server, tmp_path):
    server.files = {"m/ptbdb/1.0.0/RECORDS": b"patient001/s0010_re"}
    sha256 = server.sums["m/ptbdb/1.0.0/RECORDS"]
    server.files["m/ptbdb/1.0.0/SHA256SUMS.txt"] = f"{sha256} RECORDS\n".encode()
    command = ["--corpus", "ptb", "--out", str(tmp_path), "--only", "RECORDS", "--base_url", server.url + "m"]
    assert download.main(command) == 0
    assert (tmp_path / "ptb" / "RECORDS").read_bytes() == b"patient001/s0010_re"


def test_a_mirror_that_is_no_web_address_is_refused(tmp_path):
    with pytest.raises(ValueError, match="base_url 'mirror/ptbdb/1.0.0/': accepted are addresses"):
        download_corpus("ptb", tmp_path, base_url="mirror")
