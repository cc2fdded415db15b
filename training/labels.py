"""From a record's diagnosis codes to a training target. `label_maps/` is the only place where a code is written.

Tasks (`--task`):
    statements        71 PTB-XL statements, multi label; every key counts whatever its likelihood (Strodthoff et al.)
    superclass        NORM, MI, STTC, CD, HYP, multi label; records without a diagnostic statement are dropped
    superclass_single the same five, single label: only records with exactly one of them
    diagnostic, form, rhythm, subclass   the other PTB-XL groupings, multi label, records without any dropped
    challenge         24 classes of PhysioNet's Challenge 2020, multi label, for `Dx` codes (SNOMED CT): RBBB, PAC and PVC
                      each merge two codes that the Challenge counts as one; records without any code are dropped
    anomaly           one label, "abnormal", multi label: see `_anomaly_task`
    codes             multi label over all codes that occur in at least `min_positives` training records: for the `Dx`
                      codes of any WFDB folder
    age               regression, years (standardised for training, folded back into the head afterwards)
    sex               single label: male, female
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

LABEL_MAPS = Path(__file__).parent / "label_maps"
SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")
WINDOW_LABELS = ("AF", "V")  # of a window of a long record: fibrillation or flutter, a ventricular beat
MULTI, SINGLE, REGRESSION = "multi_label_classification", "single_label_classification", "regression"
NO_LABEL = -100


@dataclass(frozen=True)
class Statement:
    code: str
    description: str
    kinds: tuple[str, ...]  # of "diagnostic", "form", "rhythm"
    superclass: str | None
    subclass: str | None
    snomed_code: str | None  # what the Challenge translated it to


@cache
def ptb_xl_statements() -> tuple[Statement, ...]:
    """Return the 71 statements of PTB-XL in the order of `label_maps/ptb_xl_statements.csv`: that of the labels."""
    with open(LABEL_MAPS / "ptb_xl_statements.csv", newline="") as file:
        return tuple(
            Statement(
                row["code"],
                row["description"],
                tuple(row["kinds"].split("+")),
                row["superclass"] or None,
                row["subclass"] or None,
                row["snomed_code"] or None,
            )
            for row in csv.DictReader(file)
        )


@dataclass(frozen=True)
class SnomedCode:
    code: str
    abbreviation: str
    description: str
    challenge_class: str | None  # of the 24


@cache
def snomed_codes() -> dict[str, SnomedCode]:
    """Return the SNOMED CT codes of `label_maps/snomed_codes.csv`, by code: those of the Challenges' corpora.

    From the tables of PhysioNet's Challenge 2021 (133 codes; a corpus may use others) and Chapman-Shaoxing's own (4 more).
    """
    with open(LABEL_MAPS / "snomed_codes.csv", newline="") as file:
        rows = [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]
    return {row["code"]: SnomedCode(**row) for row in rows}


@cache
def groups_of(kind: str) -> dict[str, tuple[str, ...]]:
    """Return for each PTB-XL code the labels it stands for when labels are "superclass" or "subclass"."""
    return {
        statement.code: (getattr(statement, kind),) if getattr(statement, kind) else ()
        for statement in ptb_xl_statements()
    }


@dataclass(frozen=True)
class Task:
    """What is predicted: `names` in the order of the logits, and the target of a record.

    `encode(row)` takes a dictionary with `codes`, `age`, `sex` and returns the target, or None for a record that the
    task drops. Targets are float32 `(num_labels,)` for multi label and regression, an int for single label.
    `threshold_figure`, "f1" or "youden", is what a multi-label task's thresholds make as high as possible.
    """

    name: str
    problem_type: str
    names: tuple[str, ...]
    encode: Callable[[dict], np.ndarray | int | None]
    threshold_figure: str = "f1"

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names))

    def reordered(self, names: Sequence[str]) -> Task:
        """Return the task with its labels in this order.

        Raises:
            ValueError: `names` are not the task's.
        """
        if sorted(names) != sorted(self.names):
            raise ValueError(f"Task {self.name!r} has the labels {self.names}, not {tuple(names)}.")
        columns = [self.names.index(name) for name in names]

        def encode(row: dict) -> np.ndarray | int | None:
            target = self.encode(row)
            if target is None:
                return None
            return columns.index(target) if self.problem_type == SINGLE else target[columns]

        return replace(self, names=tuple(names), encode=encode)

    @property
    def label2id(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}


def build_task(name: str, train_codes: Sequence[Sequence[str]] = (), *, min_positives: int = 20) -> Task:
    """Return the task called `name`.

    Args:
        train_codes: codes of the training records; only "codes" looks at them, to find out which labels there are.
        min_positives (`int`): for "codes", how many training records a label needs.

    Raises:
        ValueError: unknown task, or no code occurs often enough.
    """
    if name == "codes":
        return _codes_task(train_codes, min_positives)
    if name not in FIXED_TASKS:
        raise ValueError(f"--task {name!r} is unknown. Accepted: {', '.join([*FIXED_TASKS, 'codes'])}.")
    return FIXED_TASKS[name]()


def encode_all(task: Task, rows: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return `(targets, kept)`: targets of the records that the task keeps, and their indices among `rows`.

    Raises:
        ValueError: the task keeps no record at all (other codes than the task knows).
    """
    encoded = [task.encode(row) for row in rows]
    kept = np.array([index for index, target in enumerate(encoded) if target is not None], dtype=int)
    if len(kept) == 0:
        seen = Counter(code for row in rows for code in row["codes"]).most_common(5)
        raise ValueError(
            f"Task {task.name!r}: none of {len(rows)} records has a target. Its labels are {task.names[:5]}..., the "
            f"records carry {[code for code, _ in seen]}. For other corpora use --task codes."
        )
    return np.stack([np.asarray(encoded[index]) for index in kept]), kept


def _multi_hot_task(
    name: str, names: Sequence[str], labels_of: Callable[[str], Sequence[str]], *, keep_empty: bool
) -> Task:
    index = {label: position for position, label in enumerate(names)}

    def encode(row: dict) -> np.ndarray | None:
        target = np.zeros(len(names), dtype=np.float32)
        for code in row["codes"]:
            for label in labels_of(code):
                if label in index:
                    target[index[label]] = 1.0
        return target if keep_empty or target.any() else None

    return Task(name, MULTI, tuple(names), encode)


def _statements_task() -> Task:
    names = [statement.code for statement in ptb_xl_statements()]
    return _multi_hot_task("statements", names, lambda code: (code,), keep_empty=False)


def _kind_task(kind: str) -> Task:
    names = [statement.code for statement in ptb_xl_statements() if kind in statement.kinds]
    return _multi_hot_task(kind, names, lambda code: (code,), keep_empty=False)


def _group_task(kind: str) -> Task:
    groups = groups_of(kind)
    names = SUPERCLASSES if kind == "superclass" else sorted({label for labels in groups.values() for label in labels})
    return _multi_hot_task(kind, names, lambda code: groups.get(code, ()), keep_empty=False)


def _single_superclass_task() -> Task:
    group = _group_task("superclass")

    def encode(row: dict) -> int | None:
        target = group.encode(row)
        return int(target.argmax()) if target is not None and target.sum() == 1 else None

    return Task("superclass_single", SINGLE, SUPERCLASSES, encode)


def _challenge_task() -> Task:
    classes = {code: each.challenge_class for code, each in snomed_codes().items() if each.challenge_class}
    names = list(dict.fromkeys(classes.values()))
    marked = _multi_hot_task("challenge", names, lambda code: (classes.get(code),), keep_empty=True)
    return Task("challenge", MULTI, marked.names, lambda row: marked.encode(row) if len(row["codes"]) else None)


def _windows_task() -> Task:
    """Return the task of telling `WINDOW_LABELS` of a short record by its PTB-XL statements; without any it is dropped."""
    findings = {"AFIB": ("AF",), "AFLT": ("AF",), "PVC": ("V",)}
    marked = _multi_hot_task("windows", WINDOW_LABELS, lambda code: findings.get(code, ()), keep_empty=True)
    known = {statement.code for statement in ptb_xl_statements()}
    return Task(
        "windows", MULTI, marked.names, lambda row: marked.encode(row) if known.intersection(row["codes"]) else None
    )


def is_normal(codes: Sequence[str]) -> bool | None:
    """Return whether a record's codes call it normal; None where they leave it open.

    PTB-XL's statements: normal is NORM and no statement of MI, STTC, CD, HYP, abnormal any of these; open without a
    diagnostic statement. SNOMED CT codes, which count where there is no statement: normal is sinus rhythm as the only
    code, abnormal any other code, known or not; open without a code, and where besides sinus rhythm there is only what is
    no SNOMED CT code.
    """
    if any(code in groups_of("superclass") for code in codes):
        found = {label for code in codes for label in groups_of("superclass").get(code, ())}
        return found == {"NORM"} if found else None
    sinus_rhythm = next(code for code, each in snomed_codes().items() if each.challenge_class == "NSR")
    others = set(codes) - {sinus_rhythm}
    if any(code.isdecimal() for code in others):
        return False
    return True if len(codes) and not others else None


def _anomaly_task() -> Task:
    """Return the task of telling normal records from all others: 1 where `is_normal` is False; open records are dropped.

    One label of a multi-label task, not one of two classes: "no finding" is then an answer of the pipeline (`positive` False),
    and the threshold is a point on one score that a user may move. It is chosen by Youden's J, not F1: where nearly all
    records are abnormal, calling all of them abnormal has a high F1.
    """

    def encode(row: dict) -> np.ndarray | None:
        normal = is_normal(row["codes"])
        return None if normal is None else np.float32([not normal])

    return Task("anomaly", MULTI, ("abnormal",), encode, threshold_figure="youden")


def _age_task() -> Task:
    return Task("age", REGRESSION, ("age",), lambda row: None if row["age"] is None else np.float32([row["age"]]))


def _sex_task() -> Task:
    return Task("sex", SINGLE, ("male", "female"), lambda row: {"male": 0, "female": 1}.get(row["sex"]))


FIXED_TASKS: dict[str, Callable[[], Task]] = {  # those whose labels do not depend on the records
    "statements": _statements_task,
    "superclass": lambda: _group_task("superclass"),
    "superclass_single": _single_superclass_task,
    "subclass": lambda: _group_task("subclass"),
    "diagnostic": lambda: _kind_task("diagnostic"),
    "form": lambda: _kind_task("form"),
    "rhythm": lambda: _kind_task("rhythm"),
    "challenge": _challenge_task,
    "anomaly": _anomaly_task,
    "windows": _windows_task,
    "age": _age_task,
    "sex": _sex_task,
}


def _codes_task(train_codes: Sequence[Sequence[str]], min_positives: int) -> Task:
    counts = Counter(code for codes in train_codes for code in set(codes))
    names = sorted(code for code, count in counts.items() if count >= min_positives)
    if not names:
        raise ValueError(
            f"--task codes: no code occurs in {min_positives} training records (seen: {counts.most_common(3)}). "
            "Lower --min_positives or give more records."
        )
    return _multi_hot_task("codes", names, lambda code: (code,), keep_empty=True)


def build_choice_task(names: Sequence[str]) -> Task:
    """Return the single-label task of telling `names`, codes of a corpus, apart; records with none or several are dropped."""

    def encode(row: dict) -> int | None:
        found = [index for index, name in enumerate(names) if name in row["codes"]]
        return found[0] if len(found) == 1 else None

    return Task("choice", SINGLE, tuple(names), encode)


def superclass_members(names: Sequence[str]) -> dict[str, list[int]]:
    """Return for each superclass the positions in `names` (statement codes) of its diagnostic statements."""
    groups = groups_of("superclass")
    return {
        group: [position for position, code in enumerate(names) if group in groups.get(code, ())]
        for group in SUPERCLASSES
    }
