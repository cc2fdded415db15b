"""Placeholder."""


def read_cpsc_mat(path, stated):
    raise ValueError(f"{path}: not read yet.")


def read_hdf5(path, stated):
    raise ValueError(f"{path}: not read yet.")


def read_numpy(path, stated):
    raise ValueError(f"{path}: not read yet.")
