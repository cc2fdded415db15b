"""Placeholder."""


def read_scp(path, stated):
    raise ValueError(f"{path}: not read yet.")
