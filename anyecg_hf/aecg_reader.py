"""Placeholder."""


def read_aecg(path, stated):
    raise ValueError(f"{path}: not read yet.")
