"""Placeholder."""


def read_csv(path, stated):
    raise ValueError(f"{path}: not read yet.")


def looks_like_a_table(text):
    return False
