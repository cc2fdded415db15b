"""The committed split files, made again from what the corpora publish:

    python -m training.make_split_files --ptb-xl DIR --ptb RECORDS [--out training/split_files]

`--ptb-xl` is PTB-XL as published or packed (ids, patients and folds are read from it), `--ptb` the file RECORDS of the
PTB Diagnostic ECG Database; a file whose source is not given stays as it is. `split_files/duplicates.csv` is read, not
made: it lists what is known to be one recording, with its source, and gives the copies the patient and fold of the
first. `split_files/README.md` says where each number below comes from and how far it is to be trusted.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

from training.corpora import list_records
from training.splits import SPLIT_FILES, fold_of, load_duplicates

PTB_XL_TEST_FOLD = 10
PTB_XL_RECORDS = 21_837  # of 1.0.1, which the Challenge holds whole; 1.0.3 has 38 less
PTB_XL_REMOVED = 38
PTB_XL_ACCEPTED = (21_799, 19_601)
INCART_ABSENT = {36}  # from the Challenge; I36 itself is published
INCART_LAST_OF_PATIENT = (  # patient 1 has I01 and I02, patient 2 I03 to I05, ...
    2, 5, 7, 8, 11, 14, 15, 17, 19, 22, 24, 26, 28, 32, 34, 37, 39, 41, 43, 46, 48, 50, 53, 56, 58, 61, 64, 67, 69, 71,
    73, 75,
)  # fmt: skip
PTB_ABSENT = {  # lines of RECORDS that the Challenge left out: all records of 28 patients, none of the others
    334, 339, 349, 356, 357, 359, 368, 376, 378, 379, 383, 396, 398, 399, 407, 408, 413, 417, 418, 419, 420, 422, 424,
    430, 492, 516, 517, 520, 523, 524, 525, 531, 537,
}  # fmt: skip
CPSC_EXTRA_ABSENT = {
    8, 9, 111, 202, 213, 311, 317, 352, 361, 371, 457, 465, 503, 519, 564, 567, 600, 616, 637, 674, 689, 723, 725, 728,
    743, 807, 866, 931, 963, 1002, 1011, 1027, 1031, 1036, 1059, 1093, 1099, 1118, 1145, 1151, 1155, 1206, 1273, 1306,
    1311, 1328, 1384, 1429, 1440, 1515, 1569, 1570, 1592, 1605, 1645, 1677, 1684, 1685, 1688, 1716, 1721, 1741, 1778,
    1837, 1853, 1855, 1863, 1869, 1880, 1882, 1884, 1897, 1951, 1973, 1999, 2052, 2090, 2092, 2160, 2192, 2293, 2341,
    2398, 2407, 2415, 2425, 2441, 2548, 2592, 2598, 2627, 2657, 2664, 2673, 2691, 2695, 2725, 2768, 2812, 2830, 2863,
    2933, 2955, 2963, 2987, 3059, 3109, 3116, 3135, 3150, 3171, 3232, 3236, 3254, 3259, 3300, 3339, 3386, 3399, 3407,
    3413, 3421, 3425, 3426, 3461, 3480, 3504, 3564,
}  # fmt: skip
PATIENTS_OF_TEST_FOLD = {9823: 16921, 2507: 19468, 7783: 14850}  # known because a copy of theirs was removed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ptb-xl", type=Path, help="PTB-XL, published or packed")
    parser.add_argument("--ptb", type=Path, help="RECORDS of the PTB Diagnostic ECG Database")
    parser.add_argument("--out", type=Path, default=SPLIT_FILES)
    arguments = parser.parse_args()
    write_split(arguments.out, "cpsc-2018", one_record_each("cpsc-2018", "A{:04d}", range(1, 6878)))
    numbers = [number for number in range(1, 3582) if number not in CPSC_EXTRA_ABSENT]
    write_split(arguments.out, "cpsc-extra", one_record_each("cpsc-extra", "Q{:04d}", numbers))
    write_split(arguments.out, "georgia", one_record_each("georgia", "E{:05d}", range(1, 10345)))
    write_split(arguments.out, "chapman-ningbo", one_record_each("chapman-ningbo", "JS{:05d}", range(1, 45552)))
    write_split(arguments.out, "incart", incart_rows())
    if arguments.ptb:
        write_split(arguments.out, "ptb", ptb_rows(arguments.ptb.read_text().split()))
    if arguments.ptb_xl:
        write_split(arguments.out, "ptb-xl", ptb_xl_rows(arguments.ptb_xl))


def one_record_each(corpus: str, pattern: str, numbers: Iterable[int]) -> list[dict]:
    """Return the rows of a corpus that names no patients: each record counts as one."""
    names = [pattern.format(number) for number in numbers]
    return [{"record": name, **_placed(f"{corpus}-{name}")} for name in names]


def _placed(patient: str) -> dict:
    return {"patient": patient, "fold": fold_of(patient)}


def incart_rows() -> list[dict]:
    rows, first = [], 1
    for patient, last in enumerate(INCART_LAST_OF_PATIENT, start=1):
        for number in range(first, last + 1):
            record = "" if number in INCART_ABSENT else f"I{number:04d}"
            rows.append({"record": record, **_placed(f"incart-{patient}"), "own_record": f"I{number:02d}"})
        first = last + 1
    return rows


def ptb_rows(records: list[str]) -> list[dict]:
    """Return the rows of PTB: the Challenge's Snnnn is line nnnn of RECORDS; the folder is the patient."""
    rows = []
    for number, own_record in enumerate(records, start=1):
        record = "" if number in PTB_ABSENT else f"S{number:04d}"
        rows.append({"record": record, **_placed(f"ptb-{own_record.split('/')[0]}"), "own_record": own_record})
    return rows


def ptb_xl_rows(folder: Path) -> list[dict]:
    """Return the rows of PTB-XL: patients and folds as published.

    What `folder` lacks is fold 10 (each record then counts as a patient, as its patient is not known here), or one of
    the records removed since 1.0.1, which follow the record that they repeat.
    """
    known = {int(entry.record_id): {"patient": entry.patient_id, "fold": entry.fold} for entry in list_records(folder)}
    removed = {int(row["record"][2:]) for row in load_duplicates() if row["record"].startswith("HR")} - set(known)
    if len(known) not in PTB_XL_ACCEPTED or len(removed) != PTB_XL_REMOVED:
        raise ValueError(
            f"--ptb-xl {folder}: {len(known)} records, and {len(removed)} of the {PTB_XL_REMOVED} removed ones are "
            "absent. Accepted are PTB-XL 1.0.3 whole, 21,799 records, or its folds 1 to 9, 19,601."
        )
    rows = []
    for number in range(1, PTB_XL_RECORDS + 1):
        patient = PATIENTS_OF_TEST_FOLD.get(number, f"HR{number:05d}")
        place = known.get(number, {"patient": f"ptb-xl-{patient}", "fold": PTB_XL_TEST_FOLD})
        rows.append({"record": f"HR{number:05d}", **place, "own_record": f"{number:05d}"})
    return rows


def write_split(out: Path, corpus: str, rows: list[dict]) -> None:
    """Write OUT/<corpus>.csv; a copy gets the place of the record that it repeats, if that is known by name."""
    places = {row["record"]: {name: row[name] for name in ("patient", "fold")} for row in rows if row["record"]}
    firsts = {row["record"]: row["same_as"] for row in load_duplicates() if row["same_as_corpus"] == corpus}
    for row in rows:
        row.update(places.get(firsts.get(row["record"]), {}))
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{corpus}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
