"""Placeholder."""


def read_ishne(path, stated):
    raise ValueError(f"{path}: not read yet.")
