"""Coverage-guided fuzzing of `read_record`, a family of formats at a time: no bytes may get anything wrong through.

    python -m benchmarks.fuzz_readers FAMILY ... [--minutes 10] [--corpus DIR]
    python -m benchmarks.fuzz_readers FAMILY --replay FILE ...

Needs `pip install "anyecg-hf[dev,fuzz]"` and Linux. The corpus begins with the files that the tests of the family write,
and with small files of $ANYECG_DATA where there are any; it stays in DIR/FAMILY (default: runs/fuzz, which git ignores).
A fault does not stop the run: inputs go to DIR/FAMILY-faults, a line for each to its `faults.jsonl`. A fault is

- an exception that is neither a ValueError, OSError or ImportError that a `raise` of anyecg_hf made and that names the
  file, nor an error of the operating system;
- more than 10 s, a GB, or `MEMORY_MB` and `MEMORY_TIMES` the input's size; a process that dies;
- a record that cannot be: infinite values, names that do not fit, an impossible rate; a part that differs from the whole;
- a file opened outside the record's folder or for writing, a socket, a process. What C libraries open is not seen (HDF5).

Prints runs, runs a second, edges of anyecg_hf covered, processes that died and kinds of fault for each family.
"""

import argparse
import contextlib
import dis
import hashlib
import importlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # for the files that are read: one for each run
SECONDS, GIGABYTE = 10, 10**9
MEMORY_MB, MEMORY_TIMES = (
    200,
    100,
)  # WFDB's gaps of 30 million values are read; a document's tree takes 50 times its text
KEPT_INPUTS = 3  # of each kind of fault
SEPARATOR = b"\n--8<--\n"  # between the files of an input, for formats that spread a record over several
ARRAY = {"sampling_rate": 500, "lead_names": ["I", "II", "V1"], "units": "mV"}


class Family(NamedTuple):
    """What is fuzzed together.

    Args:
        files: the names that the parts of an input get. A record of WFDB is read by the last header that is there.
        tests: modules of tests/ whose files begin the corpus.
        longest: bytes of an input.
        real: patterns of files below $ANYECG_DATA.
        suffixes: of the files that begin the corpus; those of `files` where none are given.
        begin: what a file begins with, kept so that no other format is read.
        stated: what the caller may state, tried in this order until something is read.
        beside: files that are always there.
    """

    files: tuple
    tests: tuple
    longest: int = 16_384
    real: tuple = ()
    suffixes: tuple = ()
    begin: bytes = b""
    stated: tuple = ({},)
    beside: dict = {}


_SEGMENTS = ("r.hea", "r.dat", "a.hea", "a.dat", "b.hea", "b.dat", "lay.hea", "m.hea")
_OF_ATR = {"r.dat": bytes(4000), "r.hea": b"r 1 360 2000\nr.dat 16 200/mV 16 0 0 0 0 II\n"}
FAMILIES = {
    "wfdb": Family(
        _SEGMENTS, ("wfdb_hostile", "wfdb_segments"), 16_384, ("wfdb_samples/*.hea", "challenge-2021/*/*.hea")
    ),
    "annotations": Family(("r.atr",), ("wfdb_annotations",), 1024, ("mitdb/*.atr", "cpsc_2021/*.atr"), beside=_OF_ATR),
    "mat": Family(("r.mat",), ("mat_reader", "records"), begin=b"MATLAB 5.0"),
    "edf": Family(("r.edf",), ("edf_reader",), 65_536, ("formats/edf/*.edf",)),
    "dicom": Family(("r.dcm",), ("dicom_reader",)),
    "aecg": Family(("r.xml",), ("aecg_reader", "xml_readers")),
    "sierra": Family(("r.xml",), ("sierra_reader", "xml_readers")),
    "muse": Family(("r.xml",), ("muse_reader", "xml_readers")),  # and CardioSoft
    "scp": Family(("r.scp",), ("scp_reader",), 4096),
    "ishne": Family(("r.ecg",), ("ishne_reader",), begin=b"ISHNE1.0"),
    "csv": Family(("r.csv",), ("csv_reader",), stated=({}, ARRAY)),
    "numpy": Family(("r.npy",), ("array_reader",), suffixes=(".npy", ".npz", ".zip"), stated=({}, ARRAY)),
    "hdf5": Family(("r.h5",), (), begin=b"\x89HDF\r\n\x1a\n", stated=(ARRAY, {**ARRAY, "record_index": 0})),
}


# The corpus


def collect_seeds(family, corpus):
    """Fill an empty corpus with the files that the tests write, and with real ones."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        tests = [ROOT / "tests" / f"test_{name}.py" for name in family.tests]
        options = ["-q", "-p", "no:cacheprovider", "-k", "not mutants", f"--basetemp={folder}/tests"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        without_data = {name: value for name, value in os.environ.items() if name != "ANYECG_DATA"}
        if tests:  # of which one that fails leaves files all the same
            subprocess.run(command, cwd=ROOT, env=without_data, capture_output=True)
        write_hdf5(Path(folder, "hdf5"))
        folders = sorted(place for place in Path(folder).rglob("*") if place.is_dir() and not place.is_symlink())
        inputs = [content for place in folders for content in inputs_in(place, family)]
    real = Path(os.environ.get("ANYECG_DATA", ROOT.parent / "shared" / "ecg"))
    inputs += [real_input(file, family) for pattern in family.real for file in sorted(real.glob(pattern))]
    for content in inputs:
        if 0 < len(content) <= family.longest:
            (corpus / hashlib.sha1(content).hexdigest()).write_bytes(content)


def write_hdf5(folder):
    """Write small HDF5 files of several layouts; those of the tests are too large to damage by chance."""
    folder.mkdir()
    with contextlib.suppress(ImportError):
        import h5py

        for number, (shape, options) in enumerate(
            [((3, 20), {}), ((2, 20, 3), {}), ((3, 20), {"chunks": (3, 5), "compression": "gzip", "shuffle": True})]
        ):
            with h5py.File(folder / f"{number}.h5", "w", libver=("earliest", "latest")[number % 2]) as file:
                file.create_dataset("tracings", data=np.arange(60 * len(shape) - 60.0).reshape(shape), **options)
                file["exam_id"] = np.arange(2)


def inputs_in(folder, family):
    """Return the inputs that a folder of a test holds: one of all files where a record has several, else each file."""
    small = {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.is_file() and not file.is_symlink() and file.stat().st_size <= family.longest
    }
    if len(family.files) > 1:
        return [join([small.get(name, b"") for name in family.files])]
    suffixes = family.suffixes or tuple(Path(name).suffix for name in family.files)
    return [content for name, content in small.items() if name.endswith(suffixes)]


def real_input(file, family):
    """Return a real file as an input; of a WFDB record the header and the begin of its data, renamed."""
    if file.suffix == ".atr":
        return file.read_bytes()[: family.longest]
    if file.suffix != ".hea":
        return file.read_bytes()
    names = re.compile(re.escape(file.stem).encode() + rb"(\.mat|\.dat)?")
    header = names.sub(lambda found: b"r.dat" if found[1] else b"r", file.read_bytes())
    data = [file.with_suffix(suffix) for suffix in (".mat", ".dat") if file.with_suffix(suffix).exists()]
    return join([header, *(file.read_bytes()[:2000] for file in data[:1])])


def join(parts):
    """Return the files of a record as one input."""
    while parts and not parts[-1]:
        parts = parts[:-1]
    return SEPARATOR.join(parts)


def write_dictionary(corpus, path):
    """Write the most frequent words of the corpus for libFuzzer: lead names, elements, units, numbers."""
    words = Counter()
    for file in corpus.iterdir():
        words.update(set(re.findall(rb"[A-Za-z_]{2,24}|[-+\d.]{2,12}|[^\w\s]{2,4}", file.read_bytes())))
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word, _ in words.most_common(400))
    path.write_text("".join(f'"{word}"\n' for word in escaped))


# The rule


class TooLong(BaseException):
    """Raised into a run that takes more than `SECONDS` of processor time; no reader catches it."""


class Watch:
    """While armed, notes files opened elsewhere or for writing, sockets, processes and changes of folders."""

    _CHANGES = ("remove", "rename", "rmdir", "mkdir", "link", "symlink", "truncate", "chmod", "chown", "utime")
    _PROCESSES = ("system", "exec", "fork", "forkpty", "posix_spawn")
    _EVENTS = ("socket.", "subprocess.", "shutil.", "urllib.", *(f"os.{name}" for name in (*_CHANGES, *_PROCESSES)))

    def __init__(self, folder):
        self.armed, self.seen, self.folder = False, [], os.path.realpath(folder)
        libraries = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]  # modules imported late
        libraries += [str(ROOT / "anyecg_hf"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self.places = (self.folder + os.sep, *libraries)
        sys.addaudithook(self)

    def __call__(self, event, args):
        if not self.armed:
            return
        if event == "open" and not isinstance(args[0], int):
            place, flags = os.path.realpath(os.fsdecode(args[0])), args[2] or 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not place.startswith(self.places):
                self.seen.append(f"open {place}")
        elif event.startswith(self._EVENTS):
            self.seen.append(event)


class Target:
    """Reads an input as a file and judges how that ends. The first inputs of each kind of fault are kept."""

    def __init__(self, family, folder, faults):
        from anyecg_hf import records, signal_ops

        self.family, self.folder, self.faults, self.records = family, Path(folder), faults, records
        self.highest_rate, self.package = signal_ops.HIGHEST_RATE, os.path.dirname(records.__file__) + os.sep
        self.watch, self.kinds, self.written = Watch(folder), Counter(), {}
        for module in ("h5py", "soundfile"):  # readers import them late; what that opens is no input's fault
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        for name, content in family.beside.items():
            (self.folder / name).write_bytes(content)
        signal.signal(signal.SIGVTALRM, self._ring)

    def __call__(self, data):
        """Return what is wrong about an input, or None."""
        path = self.write(data)
        begin, memory = time.perf_counter(), reset_peak()
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            fault = self.fault(path)
        except TooLong as error:
            fault = f"more than {SECONDS} s: {self.where(error)}"
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        seconds, memory = time.perf_counter() - begin, peak() - memory
        if fault is None and seconds > SECONDS:
            fault = f"more than {SECONDS} s"
        if fault is None and memory > MEMORY_MB * 10**6 + MEMORY_TIMES * len(data):
            fault = "memory out of proportion"
        if self.watch.seen:
            fault, self.watch.seen = self.watch.seen[0], []
        if fault:
            self.keep(fault, data, seconds=round(seconds, 2), memory_mb=memory // 10**6, size=len(data))
        return fault

    @staticmethod
    def _ring(*_):
        raise TooLong

    def write(self, data):
        """Write the parts of an input; return the path of the record."""
        data = self.family.begin + data[len(self.family.begin) :]
        parts = data.split(SEPARATOR) if len(self.family.files) > 1 else [data]
        for name, content in itertools.zip_longest(self.family.files, parts[: len(self.family.files)], fillvalue=b""):
            if self.written.get(name, b"") != content:
                file = self.folder / name
                file.write_bytes(content) if content else file.unlink()
                self.written[name] = content
        there = [*self.family.beside, *(name for name in self.family.files if self.written.get(name))]
        headers = [name for name in there if name.endswith(".hea")]
        return self.folder / (headers or self.family.files)[-1]

    def fault(self, path):
        """Return what is wrong about reading a file and then the middle third of it, or None."""
        for stated in self.family.stated:
            record, fault = self.read(path, **stated)
            if record is not None or fault:
                break
        fault = fault if record is None else self.impossible(record)
        if fault or record is None or record.signal.shape[1] < 6:
            return fault
        third, rate, num_samples = record.duration_seconds / 3, record.sampling_rate, record.signal.shape[1]
        part = {"start_seconds": third, "duration_seconds": third}
        start, stop = self.records.part_to_read(self.records.Stated(**part), rate, num_samples)
        piece, fault = self.read(path, **stated, **part)
        if piece is None:
            is_sound = not record.warnings  # of a damaged file a part may be refused
            return fault or ("a part of a record that is read whole is refused" if is_sound else None)
        same = np.array_equal(piece.signal, record.signal[:, start:stop], equal_nan=True)
        return None if same and piece.lead_names == record.lead_names else "a part differs from the whole"

    def read(self, path, **stated):
        """Return `(record, None)`, or `(None, what is wrong about the error or None)`."""
        self.watch.armed = True
        try:
            return self.records.read_record(path, **stated), None
        except TooLong:
            raise
        except BaseException as error:  # every way to end is judged
            self.watch.armed = False
            return None, self.unclear(error)
        finally:
            self.watch.armed = False

    def unclear(self, error):
        """Return why an exception is no clear error, or None: the innermost frame has to be a `raise` of anyecg_hf."""
        if isinstance(error, OSError) and error.errno:
            return None
        innermost = error.__traceback__
        while innermost.tb_next:
            innermost = innermost.tb_next
        code = innermost.tb_frame.f_code
        raises = code.co_code[innermost.tb_lasti] == dis.opmap["RAISE_VARARGS"]
        ours = code.co_filename.startswith(self.package) and raises
        if not isinstance(error, (ValueError, OSError, ImportError)) or isinstance(error, UnicodeError) or not ours:
            return f"{type(error).__name__}: {self.where(error)}"
        return None if str(self.folder) in str(error) else f"names no file: {self.where(error)}"

    def where(self, error):
        """Return the innermost line of anyecg_hf that an exception came through."""
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(self.package)]
        return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line[:80]}" if frames else "outside"

    def impossible(self, record):
        """Return what cannot be about a record, or None."""
        values, rate, marks = record.signal, record.sampling_rate, [mark.sample for mark in record.annotations]
        texts = [*record.lead_names, *record.warnings, *record.statements, *record.comments]
        texts += [text for mark in record.annotations for text in (mark.symbol, mark.note)]
        good = {
            "no float32 leads x samples": values.dtype == np.float32 and values.ndim == 2 and values.size,
            "infinite values": not np.isinf(values).any(),
            "names that do not fit": len(record.lead_names) == len(values),
            "impossible rate": 0 < rate < np.inf and (rate <= self.highest_rate or record.warnings),
            "not mV": record.units == "mV",
            "impossible age": record.age is None or 0 <= record.age <= 120,
            "impossible sex": record.sex in (None, "male", "female"),
            "marks in no order": marks == sorted(marks) and all(type(mark) is int for mark in marks),
            "text that cannot be written": not any("\ud800" <= sign <= "\udfff" for text in texts for sign in text),
        }
        return next((f"a record with {name}" for name, is_good in good.items() if not is_good), None)

    def keep(self, fault, data, **details):
        self.kinds[fault] += 1
        if self.kinds[fault] <= KEPT_INPUTS:
            name = hashlib.sha1(data).hexdigest()[:12]
            (self.faults / name).write_bytes(data)
            with open(self.faults / "faults.jsonl", "a") as log:
                log.write(json.dumps({"fault": fault, "input": name, **details}) + "\n")


def reset_peak():
    """Begin a new peak of this process's memory; return what it has, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak():
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


# Processes


def work(name, corpus, faults, seconds):
    """Fuzz in this process until the time is over or the process dies."""
    import atheris

    with atheris.instrument_imports(include=["anyecg_hf"]):
        import anyecg_hf.file_formats  # noqa: F401 - with all readers
    target = Target(FAMILIES[name], tempfile.mkdtemp(), faults)  # TMPDIR is cleared by `fuzz`
    for file in sorted(corpus.iterdir())[:300]:  # so that what is imported late counts as no input's memory
        target(file.read_bytes())
    write_dictionary(corpus, faults / "words")
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + GIGABYTE,) * 2)
    options = [f"-max_total_time={seconds}", f"-max_len={FAMILIES[name].longest}", f"-dict={faults / 'words'}"]
    options += ["-timeout=60", "-rss_limit_mb=0", f"-artifact_prefix={faults}/died-", str(corpus)]

    def test_one_input(data):
        target(data)

    atheris.Setup([sys.argv[0], *options], test_one_input)
    atheris.Fuzz()


def fuzz(name, minutes, folder):
    """Fuzz a family, in a new process each time one dies; return its figures."""
    corpus, faults = folder / name, folder / f"{name}-faults"
    shutil.rmtree(faults, ignore_errors=True)
    for place in (corpus, faults):
        place.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        collect_seeds(FAMILIES[name], corpus)
    figures = {"seeds": len(list(corpus.iterdir())), "runs": 0, "runs/s": 0, "edges": 0, "deaths": 0}
    begin = time.monotonic()
    while (left := int(begin + 60 * minutes - time.monotonic())) > 0:
        command = [
            sys.executable,
            "-m",
            "benchmarks.fuzz_readers",
            name,
            "--worker",
            str(left),
            "--corpus",
            str(folder),
        ]
        with open(faults / "log", "a+") as log, tempfile.TemporaryDirectory(dir=IN_MEMORY) as scratch:
            start = log.tell()
            environment = {**os.environ, "TMPDIR": scratch}
            status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=environment).returncode
            log.seek(start)
            steps = re.findall(r"^#(\d+)\s.*?cov: (\d+).*?exec/s: (\d+)", log.read(), re.MULTILINE)
        if not steps:
            sys.exit(f"{name}: the process died before its first run; see {faults / 'log'}")
        figures["runs"] += int(steps[-1][0])
        figures["edges"] = max(figures["edges"], *(int(edges) for _, edges, _ in steps))
        figures["runs/s"] = int(steps[-1][2])
        figures["deaths"] += bool(status)
    found = faults / "faults.jsonl"
    lines = found.read_text().splitlines() if found.exists() else []
    return figures, sorted({json.loads(line)["fault"] for line in lines})


def replay(name, files):
    """Read inputs once, and say how each ends."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder, tempfile.TemporaryDirectory() as faults:
        target = Target(FAMILIES[name], folder, Path(faults))
        for file in files:
            print(f"{file}: {target(file.read_bytes()) or 'ends well'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", choices=FAMILIES, metavar=f"FAMILY ({', '.join(FAMILIES)})")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each family")
    parser.add_argument("--corpus", type=Path, default=ROOT / "runs" / "fuzz")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="read inputs once and say how each ends")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder, first = args.corpus.resolve(), args.families[0]
    if args.worker:
        return work(first, folder / first, folder / f"{first}-faults", args.worker)
    if args.replay:
        return replay(first, args.replay)
    print("| family | seeds | runs | runs/s | edges | deaths | kinds of fault |\n|---|--:|--:|--:|--:|--:|--:|")
    for name in args.families:
        figures, kinds = fuzz(name, args.minutes, folder)
        print(f"| {name} | {' | '.join(map(str, figures.values()))} | {len(kinds)} |")
        print("".join(f"    {kind}\n" for kind in kinds), end="", flush=True)


if __name__ == "__main__":
    main()
