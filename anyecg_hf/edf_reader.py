"""Placeholder."""


def read_edf(path, stated):
    raise ValueError(f"{path}: not read yet.")
