"""Placeholder."""


def read_muse(path, stated):
    raise ValueError(f"{path}: not read yet.")


def read_cardiosoft(path, stated):
    raise ValueError(f"{path}: not read yet.")
