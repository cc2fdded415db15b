"""What is installed and what is committed: the wheel, the version bounds, and the tracked files."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("anyecg_hf", "hub_cards", "tokenization", "training")
SIGNAL_FILE = re.compile(r"\.(dat|mat|hea|atr|qrs|dcm|edf|bdf|scp|parquet|arrow|npy|npz|h5|hdf5)$", re.IGNORECASE)
PICKLE_FILE = re.compile(r"\.(bin|pt|pth|pkl|pickle|ckpt|joblib)$", re.IGNORECASE)
MACHINE_PATH = re.compile(rb"(?<![\w.~-])/(?:work|root|farm|home|Users)/\w|(?<![\w.])/(?:tmp/bash_jobs|opt/wheels)\b")
REGISTRY_HOST = re.compile(rb"\b(?:pypi|pythonhosted|npmjs|debian)\.org")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    """Names of the files in a wheel built from a copy of the sources (the checkout stays clean), without a network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(target)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(target.glob("anyecg_hf-*-py3-none-any.whl"))) as wheel:
        return wheel.namelist()


@pytest.fixture(scope="module")
def tracked_files() -> list[Path]:
    """Committed files, and those added but not yet committed."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("not a git checkout: there are no tracked files to look at")
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel_names):
    folders = {name.split("/")[0] for name in wheel_names}
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.parametrize("pattern", ["*.py", "py.typed", "*.yaml", "*.csv", "*.j2"])
def test_every_source_and_data_file_is_in_the_wheel(wheel_names, pattern):
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob(pattern)]
    sources = [
        path for path in sources if ROOT / "hub_cards" / "space" not in path.parents
    ]  # a page of its own, not installed
    assert sources, f"no {pattern} in {PACKAGES}"
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= set(wheel_names)


def test_the_wheel_holds_no_tests_and_no_recordings(wheel_names):
    assert [name for name in wheel_names if "test" in Path(name).name or SIGNAL_FILE.search(name)] == []


def test_all_places_state_the_same_version():
    init = (ROOT / "anyecg_hf" / "__init__.py").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f'__version__ = "{PROJECT["version"]}"' in init
    assert f"\nversion: {PROJECT['version']}\n" in citation


def test_the_wheel_carries_its_licence(wheel_names):
    assert [name for name in wheel_names if name.endswith(".dist-info/licenses/LICENSE")]


def _requirements(*extras) -> dict[str, Requirement]:
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    found = {canonicalize_name(line.name): line for line in map(Requirement, lines)}
    found.pop("anyecg-hf", None)  # the dev extra names the other extras
    return found


def _pins(file_name) -> dict[str, Version]:
    lines = (ROOT / file_name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("name, requirement", _requirements(*PROJECT["optional-dependencies"]).items())
def test_every_requirement_has_a_lower_and_an_upper_bound(name, requirement):
    assert {clause.operator for clause in requirement.specifier} == {">=", "<"}


@pytest.mark.parametrize("file_name", ["constraints.txt", "constraints-floor.txt"])
def test_pinned_versions_lie_inside_the_declared_ranges(file_name):
    pins = _pins(file_name)
    ranges = _requirements(*PROJECT["optional-dependencies"])
    assert [name for name, version in pins.items() if name in ranges and version not in ranges[name].specifier] == []


def test_all_that_the_tests_need_is_pinned():
    assert set(_requirements("formats", "onnx", "plot", "train", "dev")) <= set(_pins("constraints.txt"))


def test_the_floor_is_the_declared_lower_bounds():
    ranges, floor = _requirements("denoise", "plot", "space", "train", "cluster"), _pins("constraints-floor.txt")
    assert set(floor) == set(ranges)
    for name in set(floor) - {"torch"}:  # torch: see constraints-floor.txt
        bound = next(clause.version for clause in ranges[name].specifier if clause.operator == ">=")
        assert floor[name] == Version(bound), name


@pytest.mark.parametrize("package, extras", [
    ("anyecg_hf", ("denoise", "formats", "plot")),
    ("tokenization", ("train", "formats", "plot")),
    ("training", ("train", "formats", "plot", "cluster", "deepspeed", "onnx")),
])  # fmt: skip
def test_every_import_is_a_declared_requirement(package, extras):
    declared, known = _requirements(*extras), packages_distributions()
    for path in (ROOT / package).rglob("*.py"):
        for module in _imported_modules(path) - set(sys.stdlib_module_names) - set(PACKAGES):
            names = {canonicalize_name(name) for name in known.get(module, [module])}
            assert names & set(declared), (
                f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not name"
            )


def _imported_modules(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_the_models_import_neither_tokenization_nor_training():
    for path in (ROOT / "anyecg_hf").glob("*.py"):
        assert not _imported_modules(path) & {"tokenization", "training"}, path.name


def test_no_tracked_file_is_over_30_megabytes(tracked_files):
    assert [str(path) for path in tracked_files if path.stat().st_size > 30_000_000] == []


def test_no_recording_and_no_pickle_is_tracked(tracked_files):
    assert [str(path) for path in tracked_files if SIGNAL_FILE.search(path.name) or PICKLE_FILE.search(path.name)] == []


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["machine path", "registry host"])
def test_no_tracked_text_names_this_machine_or_a_registry(tracked_files, pattern):
    texts = [path for path in tracked_files if path.suffix not in (".safetensors", ".png")]
    hits = [f"{path.name}: {hit[0].decode()}" for path in texts if (hit := pattern.search(path.read_bytes()))]
    assert hits == []


def test_the_pre_commit_hooks_refuse_the_same_files():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for pattern in (SIGNAL_FILE, PICKLE_FILE):
        assert f"(?i){pattern.pattern}" in hooks
