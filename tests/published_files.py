"""The seven corpora in the forms in which they are published, a few short simulated records each.

Challenge 2021: `A0001.{hea,mat}`, a MAT file of level 4 with the codes in the header. Own releases: PTB-XL's table beside
`records500/` and `records100/`, `patient001/s0010_re.{hea,dat,xyz}` of PTB, `I01.{hea,dat,atr}` of INCART.
"""

import csv
import functools
import re
import struct
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
from wfdb_files import annotation_words, check_sum, note, skip

from anyecg_hf.leads import FRANK_LEADS, STANDARD_LEADS
from anyecg_hf.simulate import simulate_record
from training.corpora.challenge import NAMES
from training.splits import load_split, split_of

SECONDS = 3
RATES = {"ptb": 1000, "incart": 257}  # Hz; others 500
GAINS = {"ptb": "1000/mv", "ptb-xl": "1000/mv", "incart": "306000/mV"}  # others 1000/mV; all three as published
TABLE = (
    "ecg_id", "patient_id", "age", "sex", "height", "weight", "report", "scp_codes", "heart_axis", "strat_fold",
    "filename_lr", "filename_hr",
)  # fmt: skip
PTB_COMMENTS = (
    "age: 81", "sex: female", "ECG date: 01/10/1990", "", "Diagnose:", "Reason for admission: Myocardial infarction",
    "Additional diagnoses: Diabetes mellitus", "Smoker: no", "", "Therapy:", "Infarction date: 29-Sep-90",
)  # fmt: skip
BEAT, VENTRICULAR, RHYTHM = 1, 5, 28  # N, V, + as the annotation format numbers them


def names_of(corpus, pattern=None):
    """Return one name of each split, `{"train": ..., "validation": ..., "test": ...}`: in the Challenge, or as `pattern`."""
    names = {}
    for name, (_, fold) in load_split(corpus).items():
        if re.fullmatch(pattern or NAMES[corpus], name):
            names.setdefault(split_of(fold), name)
    return names


@functools.cache
def steps(seed=0, *, rate=500, seconds=SECONDS, leads=tuple(STANDARD_LEADS), gain=1000, baseline=0):
    """Return a simulated record as a device would store it, int16 `(leads, samples)`."""
    record = simulate_record(seed, sampling_rate=rate, duration_seconds=seconds, lead_names=leads)
    return np.round(record.signal * gain + baseline).astype("<i2")


def mat_bytes(samples):
    """Return int16 samples as a MAT file of level 4 that holds "val"."""
    return struct.pack("<5i", 30, *samples.shape, 0, 4) + b"val\0" + samples.astype("<i2").tobytes("F")


def signal_lines(file, layout, gain, samples, leads):
    """Return the signal lines of a header."""
    rows = zip(samples.tolist(), leads)
    return [f"{file} {layout} {gain} 16 0 {row[0]} {check_sum(row)} 0 {lead}" for row, lead in rows]


def write_header(path, first_line, lines, comments):
    """Write a header and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([first_line, *lines, *(f"#{comment}" for comment in comments)]) + "\n")
    return path


def write_challenge(folder, name, *, corpus="cpsc-2018", age="57", sex="Male", dx="426783006", seed=0, **options):
    """Write one record of the Challenge and return its header.

    Args:
        age, sex, dx: what the header says; `None` leaves the line out.
        options: `announced_leads`, `announced_samples`: what the header says of them; `samples`: instead of simulated ones.
    """
    rate, gain = RATES.get(corpus, 500), GAINS.get(corpus, "1000/mV")
    samples = options.get("samples", steps(seed, rate=rate))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.mat").write_bytes(mat_bytes(samples))
    num_leads = options.get("announced_leads", len(samples))
    num_samples = options.get("announced_samples", samples.shape[1])
    recorded = f"{name}.mat" if corpus == "georgia" else name  # so most of Georgia's headers begin
    lines = signal_lines(f"{name}.mat", "16+24", gain, samples, STANDARD_LEADS)[:num_leads]
    stated = {"Age": age, "Sex": sex, "Dx": dx, "Rx": "Unknown", "Hx": "Unknown", "Sx": "Unknown"}
    comments = [f"{key}: {value}" for key, value in stated.items() if value is not None]
    first_line = f"{recorded} {num_leads} {rate} {num_samples} 12-May-2020 12:33:59"
    return write_header(folder / f"{name}.hea", first_line, lines, comments)


def write_challenge_corpus(folder, corpus, **options):
    """Write a record of each split of a corpus and return `{split: name}`."""
    names = names_of(corpus)
    for seed, name in enumerate(names.values()):
        write_challenge(folder, name, corpus=corpus, seed=seed, **options)
    return names


def write_ptb(folder, name, *, seed=0, comments=PTB_COMMENTS):
    """Write a record of PTB, `patient001/s0010_re`: 12 leads in `.dat`, Frank's X, Y, Z in `.xyz`; return its header."""
    path = folder / f"{name}.hea"
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = steps(seed, rate=1000, leads=(*STANDARD_LEADS, *FRANK_LEADS), gain=2000)
    names = [lead.lower() for lead in STANDARD_LEADS] + ["vx", "vy", "vz"]
    lines = []
    for suffix, part in ((".dat", slice(0, 12)), (".xyz", slice(12, 15))):
        lines += signal_lines(f"{path.stem}{suffix}", "16", "2000", samples[part], names[part])
        path.with_suffix(suffix).write_bytes(samples[part].tobytes("F"))
    return write_header(path, f"{path.stem} 15 1000 {samples.shape[1]}", lines, [f" {line}" for line in comments])


def write_incart(folder, name, *, seed=0, seconds=SECONDS, marks=((40, BEAT, ""),)):
    """Write a record of INCART with beats, and return its header.

    Args:
        marks: `(sample, kind, note)` in the order of time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = steps(seed, rate=257, seconds=seconds, gain=306, baseline=-40)
    (folder / f"{name}.dat").write_bytes(samples.tobytes("F"))
    (folder / f"{name}.atr").write_bytes(annotation_bytes(marks))
    lines = signal_lines(f"{name}.dat", "16", "306(-40)/mV", samples, STANDARD_LEADS)
    comments = ["<age>: 65 <sex>: F <diagnoses> Coronary artery disease, arterial hypertension", "patient 1", "PVCs"]
    return write_header(folder / f"{name}.hea", f"{name} 12 257 {samples.shape[1]}", lines, comments)


def files_of(out):
    """Return `{path: bytes}` of what a build wrote."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def rows_of(out):
    """Return `{record_id: row}` of what was built."""
    files = sorted(out.glob("data/*/*.parquet"))
    return {row["record_id"]: row for file in files for row in pq.read_table(file).to_pylist()}


def annotation_bytes(marks):
    """Return an annotation file in the MIT format."""
    data = b""
    for (before, _, _), (sample, kind, text) in pairwise([(0, 0, ""), *marks]):
        data += skip(sample - before) + annotation_words((kind, 0)) + (note(text.encode()) if text else b"")
    return data + annotation_words((0, 0))


def table_row(ecg_id, fold, /, **values):
    """Return a line of PTB-XL's table, as `{column: text}`."""
    place = f"{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}"
    row = {
        "ecg_id": str(ecg_id), "patient_id": f"{10000 + ecg_id}.0", "age": "56.0", "sex": "1", "height": "", "weight": "63.0",
        "report": "sinusrhythmus, periphere niedervoltage - für alle", "scp_codes": "{'NORM': 100.0, 'SR': 0.0}",
        "heart_axis": "", "strat_fold": str(fold), "filename_lr": f"records100/{place}_lr",
        "filename_hr": f"records500/{place}_hr",
    }  # fmt: skip
    return row | values


def write_table(folder, rows):
    """Write PTB-XL's table."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "ptbxl_database.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, TABLE)
        writer.writeheader()
        writer.writerows(rows)


def write_ptb_xl(folder, rows, rates=(500, 100)):
    """Write PTB-XL's own release: the table, and the files that it names at these rates."""
    write_table(folder, rows)
    for row in rows:
        for rate in rates:
            write_ptb_xl_signal(folder, row["filename_hr" if rate == 500 else "filename_lr"], rate, int(row["ecg_id"]))


def write_ptb_xl_signal(folder, place, rate, seed=0):
    """Write the files that a line of PTB-XL's table names, and return the header."""
    path, samples = folder / f"{place}.hea", steps(seed, rate=rate)
    lines = signal_lines(f"{path.stem}.dat", "16", "1000.0(0)/mV", samples, [lead.upper() for lead in STANDARD_LEADS])
    write_header(path, f"{path.stem} 12 {rate} {samples.shape[1]}", lines, [])
    path.with_suffix(".dat").write_bytes(samples.tobytes("F"))
    return path
