"""Placeholder."""


def read_sierra(path, stated):
    raise ValueError(f"{path}: not read yet.")
