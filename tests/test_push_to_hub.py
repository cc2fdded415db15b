"""training/push_to_hub.py and the library's own pushes, against a local server that speaks the Hub's protocol.

Clients are processes of their own: the command, a user with the package, a user without it, the same offline afterwards.
"""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from elsewhere import LOCAL_FOLDERS_ARE_WHOLE, run_elsewhere
from hub_server import READS, TOKEN, asked_by_this_process, running_hub
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file, save_file
from tiny_checkpoints import tiny_model, write_record
from transformers import AutoFeatureExtractor, pipeline

from anyecg_hf.feature_extraction_anyecg import AnyECGFeatureExtractor
from anyecg_hf.hub import check_checkpoint, checkpoint_files, export_checkpoint
from anyecg_hf.simulate import simulate_record
from training import push_to_hub
from training.push_to_hub import card_on_hub, push_checkpoint

pytestmark = pytest.mark.skipif(not LOCAL_FOLDERS_ARE_WHOLE, reason="pushing needs Transformers 5.10")
ROOT = Path(__file__).resolve().parent.parent
REPO, USER = "clinic/any-ecg.tiny", "marta-quill"
CARD = """---
license: apache-2.0
base_model: anyecg-small
---
# A classifier

    classify = pipeline("ecg-classification", model="checkpoints/classifier")
    python -m training.evaluate --checkpoint checkpoints/classifier
"""
ON_HUB = CARD.replace("anyecg-small", "clinic/anyecg-small").replace(
    '"checkpoints/classifier"', '"clinic/any-ecg.tiny"'
)
STRANGERS = {  # what may lie in a folder and is none of a checkpoint
    "optimizer.safetensors": b"state", "results.json": b"{}", "r1.dat": b"samples", "r1.hea": b"r1 12 500", ".env": b"HF_TOKEN",
    ".cache/x": b"x", "model-00001-of-00002.safetensors": b"left over", "notes.py": b"import os\n", "recordings/r2.edf": b"0",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp(USER)


@pytest.fixture(scope="module")
def exported(root):
    folder = export_checkpoint(tiny_model(), AnyECGFeatureExtractor(), root / "classifier", card=CARD)
    for name, content in STRANGERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pushed(folder, card=ON_HUB):
    return {name: (folder / name).read_bytes() for name in checkpoint_files(folder)} | {"README.md": card.encode()}


def environment(hub, home):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "hf"), "HF_TOKEN": TOKEN}
    return env | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HOME": str(home), "USER": USER, "no_proxy": "127.0.0.1"}


def run(hub, home, *command):
    """Run Python in a process that knows nothing but the address of the Hub and, as a user's own, the token."""
    home.mkdir(exist_ok=True)
    env = environment(hub, home)
    done = subprocess.run([sys.executable, *command], env=env, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


# Clients in processes of their own, one after the other


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def user(hub, root, exported):
    """What a user with the package finds, who pushes by the command and by the library's calls, and loads by a tag.

    The connection broke once while the weights were sent.
    """
    hub.faults = [("PUT", "/lfs/", "drop")]
    refused = {
        "private": {"checkpoint": REPO, "token": False},
        "wrong token": {"checkpoint": REPO, "token": "hf_wrong"},
        "no repository": {"checkpoint": "clinic/nothing"},
        "no revision": {"checkpoint": REPO, "revision": "v2"},
        "no pair": {"checkpoint": "clinic/plain"},
    }
    command = ["--checkpoint", str(exported), "--repo", REPO, "--private", "--tag", "v1"]
    job = {"command": command, "repo": REPO, "tag": "v1", "refused": refused, "token": TOKEN}
    (root / "job.json").write_text(json.dumps(job))
    said = run(hub, root / "user", str(ROOT / "tests" / "hub_client_script.py"), str(root / "job.json")).splitlines()
    assert not hub.faults
    return json.loads(said[-1]) | {"said": said}


@pytest.fixture(scope="module")
def record(root):
    return simulate_record(1, duration_seconds=12)


@pytest.fixture(scope="module")
def path(record, root):
    return str(write_record(record, root, "r1"))


@pytest.fixture(scope="module")
def job(hub, root, record, path, user):
    """What a process without the package loads: by tag and by commit, model and pipeline."""
    np.savez(
        root / "record.npz", signal=record.signal, sampling_rate=record.sampling_rate, lead_names=record.lead_names
    )
    source = {"folder": REPO, "revision": "v1"}
    model = {**source, "auto_class": "AutoModelForSequenceClassification", "output": "logits"}
    by_commit = {**source, "revision": hub.repos[REPO].tags["v1"][0]}
    classify = {**by_commit, "task": "ecg-classification", "input": path}
    refused = {"private": {**source, "token": False}, "no repository": {"folder": "clinic/nothing"}}
    return {
        "record": str(root / "record.npz"),
        "models": {"logits": model},
        "pipelines": {"scores": classify},
        "refused": refused,
    }


@pytest.fixture(scope="module")
def without_package(hub, root, job):
    """What it finds online, where the connection breaks in the middle of the weights."""
    hub.requests.clear()
    hub.faults = [("GET", "/resolve/.*/model.safetensors", "half")]
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    found = run_elsewhere(root, "reader", job, no_proxy="127.0.0.1", **settings)
    assert not hub.faults and len(hub.asked("GET", "/resolve/.*/model.safetensors")) == 2
    return found


@pytest.fixture(scope="module")
def offline(hub, root, job, without_package):
    """What it finds afterwards, offline, from its cache."""
    hub.requests.clear()
    found = run_elsewhere(root, "reader", job | {"refused": {}}, HF_ENDPOINT=hub.url)
    assert not hub.requests
    return found


@pytest.fixture(scope="module")
def expected(exported, record, path):
    batch = AutoFeatureExtractor.from_pretrained(exported)(record, return_tensors="pt")
    with torch.no_grad():
        logits = tiny_model()(**batch).logits.numpy()
    classify = pipeline("ecg-classification", model=str(exported))
    return {"logits": logits, "scores": np.array([each["score"] for each in classify(path)])}


def test_the_command_pushes_what_belongs_to_a_checkpoint_in_one_commit(hub, exported, user):
    commit, files = hub.repos[REPO].commits[1]  # the first makes the repository
    card = ON_HUB.replace(f'"{REPO}"', f'"{REPO}", revision="v1"')
    assert {name: content for name, content in files.items() if name != ".gitattributes"} == pushed(exported, card)
    assert user["said"][:2] == [
        f"{hub.url}/{REPO}/commit/{commit}",
        f'pin it: from_pretrained("{REPO}", revision="v1"), or revision="{commit}"',
    ]
    assert hub.repos[REPO].private


def test_a_user_with_the_package_loads_it_by_tag(user, expected):
    assert np.allclose(user["logits"], expected["logits"], atol=1e-6)
    assert user["labels"] == ["AFIB", "LVH", "NORM", "PVC"]
    assert set(user["deviations"]) >= {"model.logits"} and max(user["deviations"].values()) < 1e-6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("private", "Repository Not Found"),
        ("wrong token", "401|Invalid credentials"),
        ("no repository", "Repository Not Found"),
        ("no revision", "Revision Not Found"),
        ("no pair", "no reference pair.*export_checkpoint"),
    ],
)
def test_what_cannot_be_loaded_says_why(user, name, message):
    assert re.search(message, user[name])


@pytest.mark.parametrize("name", ["logits", "scores"])
def test_a_user_without_the_package_gets_the_same_though_the_download_broke(without_package, expected, name):
    assert np.allclose(without_package[name], expected[name], atol=1e-6)


@pytest.mark.parametrize("name", ["private", "no repository"])
def test_a_user_without_the_package_is_told_what_is_not_there(without_package, name):
    assert "If this is a private repository" in str(without_package[name])


@pytest.mark.parametrize("name", ["logits", "scores"])
def test_offline_afterwards_it_is_the_same_from_the_cache(offline, without_package, name):
    assert np.array_equal(offline[name], without_package[name])


@pytest.mark.parametrize(
    ("repo", "branch"), [("plain", "main"), ("rhythm", "main"), ("pipe", "dev"), ("trained", "main")]
)
def test_what_the_librarys_own_calls_push_is_a_complete_checkpoint(hub, user, tmp_path, repo, branch):
    for name, content in hub.files(f"clinic/{repo}", branch).items():
        (tmp_path / name).write_bytes(content)
    check_checkpoint(tmp_path)
    assert "preprocessor_config.json" in checkpoint_files(tmp_path) and "README.md" in checkpoint_files(tmp_path)
    assert hub.repos[f"clinic/{repo}"].private is (repo == "pipe")


def test_the_librarys_trainer_leaves_the_pickle_with_the_token_at_home(hub, user):
    assert user["token in training_args.bin"] is True
    for commits in hub.repos["clinic/trained"].branches.values():
        assert not any(name.endswith((".bin", ".pt")) for _, files in commits for name in files)
    assert len(hub.repos["clinic/trained"].commits) >= 3  # made; at a save; at the end


def test_no_token_user_or_path_is_in_anything_that_left(hub, root, user, without_package):
    held = [
        content
        for repo in hub.repos.values()
        for commits in repo.branches.values()
        for _, f in commits
        for content in f.values()
    ]
    held += hub.uploaded.values()
    assert len(held) > 100
    for secret in (TOKEN, USER, str(root), str(ROOT)):
        assert not any(secret.encode() in content for content in held), secret
    samples = [base64.b64decode(each.get("sample", "")) for body in hub.bodies for each in asked_files(body)]
    assert len(samples) > 100
    assert not any(TOKEN.encode() in sent for sent in [*samples, *hub.bodies])


def asked_files(body):
    """Return the files that a request asks about before they are sent, each with its first bytes."""
    return json.loads(body)["files"] if body.startswith(b'{"files"') else []


# Pushes from this process, the check in a clean one taken for granted


@pytest.fixture
def own_hub(monkeypatch):
    monkeypatch.setattr(push_to_hub, "verify_in_clean_process", lambda folder, name: None)
    with asked_by_this_process(monkeypatch) as hub:
        yield hub


def push(folder, **options):
    return push_checkpoint(folder, REPO, **{"token": TOKEN} | options)


def test_an_upload_that_broke_goes_on_when_repeated(own_hub, exported):
    own_hub.faults = [("POST", "/commit/", 403)]
    with pytest.raises(PermissionError, match="token with write access.*Readers see what they saw before"):
        push(exported)
    assert not own_hub.files(REPO) and len(own_hub.uploaded) == 2  # weights and reference pair have arrived
    own_hub.requests.clear()
    push(exported)
    assert own_hub.files(REPO) == pushed(exported) and not own_hub.asked("PUT", "")


def test_a_commit_whose_answer_was_lost_is_not_made_twice(own_hub, exported):
    def commit_and_say_nothing(hub):
        hub.commit(REPO, hub.repos[REPO].commits[-1][1] | pushed(exported))
        return 504

    own_hub.faults = [("POST", "/commit/", commit_and_say_nothing)]
    commit = push(exported)
    assert commit.oid == own_hub.repos[REPO].commits[-1][0] and len(own_hub.repos[REPO].commits) == 2


def test_a_tag_is_of_one_commit_and_does_not_move(own_hub, exported):
    commit = push(exported, tag="v1")
    assert own_hub.repos[REPO].tags["v1"][0] == commit.oid
    with pytest.raises(ValueError, match=f"has a tag v1, of commit {commit.oid}.*push with another"):
        push(exported, tag="v1")
    other = push(exported, tag="v2")  # the card differs, which pins the tag
    assert {name: state[0] for name, state in own_hub.repos[REPO].tags.items()} == {"v1": commit.oid, "v2": other.oid}
    assert own_hub.files(REPO)["README.md"] == ON_HUB.replace(f'"{REPO}"', f'"{REPO}", revision="v2"').encode()


def test_a_tag_whose_answer_was_lost_is_no_error(own_hub, exported):
    def tag_and_say_nothing(hub):
        hub.repos[REPO].tags["v1"] = hub.repos[REPO].commits[-1]
        return 504

    own_hub.faults = [("POST", "/tag/", tag_and_say_nothing)]
    commit = push(exported, tag="v1")
    assert own_hub.repos[REPO].tags["v1"][0] == commit.oid and len(own_hub.repos[REPO].commits) == 2


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "checkpoints").glob("*/README.md")), ids=lambda path: path.parent.name
)
def test_every_example_of_a_card_that_ships_pins_the_tag_on_the_hub(folder):
    card = card_on_hub(folder.read_text(), name=folder.parent.name, repo_id="org/x", tag="v1")
    examples = [line for line in card.splitlines() if '"org/x"' in line]
    assert examples and all('"org/x", revision="v1"' in line for line in examples)
    assert '"checkpoints/' not in card


def test_a_branch_is_made_and_main_stays(own_hub, exported):
    push(exported, branch="candidate")
    assert own_hub.files(REPO, "candidate") == pushed(exported) and not own_hub.files(REPO)
    push(exported, branch="candidate")
    assert len(own_hub.repos[REPO].branches["candidate"]) == 2


@pytest.mark.parametrize("branch", ["main", "candidate"])
def test_a_private_push_to_a_public_repository_is_refused(own_hub, exported, branch):
    own_hub.add_repo(REPO)
    with pytest.raises(ValueError, match=f"{REPO} is public: make it private"):
        push(exported, private=True, branch=branch)
    assert not own_hub.files(REPO) and not own_hub.uploaded and set(own_hub.repos[REPO].branches) == {"main"}


def test_a_private_repository_stays_private(own_hub, exported):
    own_hub.add_repo(REPO, private=True)
    push(exported)
    assert own_hub.repos[REPO].private and own_hub.files(REPO) == pushed(exported)


@pytest.mark.parametrize("token", [READS, "hf_wrong"])
def test_a_token_that_may_not_write_is_reported_at_once(own_hub, exported, token):
    with pytest.raises(PermissionError, match=f"{REPO}: the Hub refuses: .*token with write access"):
        push(exported, token=token)
    assert len(own_hub.asked("POST", "")) == 1


def test_weights_of_an_earlier_push_vanish_and_what_is_not_ours_stays(own_hub, exported):
    own_hub.add_repo(REPO)
    others = {
        "handler.py": b"by hand",
        "LICENSE": b"by hand",
        "sub/model.safetensors": b"by hand",
        "model_index.json": b"{}",
    }
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}"}
    own_hub.commit(REPO, own_hub.repos[REPO].commits[-1][1] | others | old)
    push(exported)
    assert own_hub.files(REPO) == pushed(exported) | others


def test_a_download_that_broke_is_resumed_where_it_was(own_hub, tmp_path, monkeypatch):
    """As `from_pretrained` downloads: by ranges, within the call."""
    content = np.random.default_rng(0).bytes(100_000)
    own_hub.add_repo(REPO)
    own_hub.commit(REPO, {"model.safetensors": content})
    own_hub.faults = [("GET", "/resolve/", "half")]
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    path = hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path, token=TOKEN)
    assert Path(path).read_bytes() == content
    assert own_hub.ranges == ["bytes=50000-"]


# What is not pushed


def spoil_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"] = weights["classifier.weight"].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def append(name, text):
    def change(folder):
        (folder / name).write_text((folder / name).read_text() + text)

    return change


@pytest.fixture
def copy(exported, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in pushed(exported, CARD).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "README.md").unlink(), "copy has no card"),
        (lambda folder: (folder / "training_args.bin").write_bytes(b""), "training_args.bin may hold a pickle"),
        (lambda folder: (folder / "leads.py").unlink(), "imports leads.py, which is missing"),
        (append("README.md", f"\nHF_TOKEN={TOKEN}\n"), "README.md holds a token of the Hub: take it out"),
        (append("README.md", "\nhf_" + "aB3" * 12), "README.md holds a token of the Hub"),
        (append("leads.py", f"\n# from {Path.home()}/work\n"), "leads.py holds a path of your home folder"),
    ],
    ids=["card", "pickle", "module", "token", "another token", "path"],
)
def test_a_folder_that_is_amiss_is_not_pushed(own_hub, copy, spoil, message):
    spoil(copy)
    with pytest.raises(ValueError, match=message):
        push(copy)
    assert not own_hub.requests


def test_a_checkpoint_that_its_own_code_does_not_reproduce_is_not_pushed(own_hub, copy, monkeypatch):
    monkeypatch.undo()
    spoil_weights(copy)
    with pytest.raises(
        ValueError, match="copy does not pass where .*copy does not give .* model.logits differs .*Nothing was"
    ):
        push(copy)


def test_older_libraries_are_refused(copy, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.9.1")
    with pytest.raises(ValueError, match="5.9.1 loads no folder by its own code; pushing needs 5.10"):
        push(copy)  # before the Hub is asked, of which there is none


def test_shards_belong_to_a_checkpoint_and_left_over_ones_do_not(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    AnyECGFeatureExtractor().save_pretrained(tmp_path)
    shards = {path.name for path in tmp_path.glob("model-*.safetensors")}
    (tmp_path / "model-00001-of-00099.safetensors").write_bytes(b"")
    files = set(checkpoint_files(tmp_path))
    assert len(shards) > 1 and {name for name in files if name.startswith("model")} - {"modeling_anyecg.py"} >= shards
    assert "model.safetensors.index.json" in files and "model-00001-of-00099.safetensors" not in files
