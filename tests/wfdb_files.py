"""WFDB files made from the specification (header(5), signal(5), annot(5)), one small function for each storage format."""

import struct

BITS = {8: 16, 16: 16, 24: 24, 32: 32, 61: 16, 80: 8, 160: 16, 212: 12, 310: 10, 311: 10}


def encode(form, samples):
    """Return the bytes of `samples` (list of int, in the order of the file; for format 8 the differences)."""
    if form in (212, 310, 311):
        return _packed(form, samples)
    codes = {8: "<b", 16: "<h", 61: ">h", 80: "<B", 160: "<H", 32: "<i"}
    shift = {80: 128, 160: 32768}.get(form, 0)
    if form == 24:
        return b"".join(struct.pack("<i", value)[:3] for value in samples)
    return b"".join(struct.pack(codes[form], value + shift) for value in samples)


def _packed(form, samples):
    size = 2 if form == 212 else 3
    groups = [samples[start : start + size] for start in range(0, len(samples), size)]
    out = b""
    for group in groups:
        a, b, c = (list(group) + [0, 0])[:3]
        if form == 212:
            full = bytes([a & 0xFF, (a >> 8 & 0xF) | (b >> 8 & 0xF) << 4, b & 0xFF])
            out += full[: len(group) + 1]
        elif form == 310:
            full = struct.pack("<HH", (a & 0x3FF) << 1 | (c & 0x1F) << 11, (b & 0x3FF) << 1 | (c >> 5 & 0x1F) << 11)
            out += full[: {1: 2, 2: 4, 3: 4}[len(group)]]
        else:
            out += struct.pack("<I", (a & 0x3FF) | (b & 0x3FF) << 10 | (c & 0x3FF) << 20)[: len(group) + 1]
    return out


def check_sum(samples):
    """Return the check sum of a signal, 16 bits without sign."""
    return sum(samples) & 0xFFFF


def write_record(
    folder, rows, *, name="r", form=16, rate=500, gain="100/mV", leads=("I", "V1", "II", "V6"), per_frame=1
):
    """Write a record of one data file, all signals alike, and return the path of its header.

    Args:
        rows: one list of int for each signal, `per_frame` samples in a frame.
    """
    num_frames, lines, frames = len(rows[0]) // per_frame, [], []
    for row, lead in zip(rows, leads):
        layout = f"{form}x{per_frame}" if per_frame > 1 else str(form)
        lines.append(f"{name}.dat {layout} {gain} {BITS[form]} 0 {row[0]} {check_sum(row)} 0 {lead}")
    for frame in range(num_frames):
        for row in rows:
            stop = (frame + 1) * per_frame
            before = row[:1] + row  # differences begin with 0
            values = [b - a for a, b in zip(before, row)] if form == 8 else row
            frames += values[frame * per_frame : stop]
    (folder / f"{name}.dat").write_bytes(encode(form, frames))
    path = folder / f"{name}.hea"
    path.write_text("\n".join([f"{name} {len(rows)} {rate} {num_frames}", *lines]) + "\n")
    return path


def annotation_words(*words):
    """Return the bytes of `(kind, value)` pairs; a kind of `None` is a word as it is."""
    return b"".join(struct.pack("<H", value if kind is None else kind << 10 | value) for kind, value in words)


def skip(interval):
    """Return the bytes of a SKIP: the high half of the interval first."""
    return annotation_words((59, 0)) + struct.pack("<HH", interval >> 16 & 0xFFFF, interval & 0xFFFF)


def note(raw):
    """Return the bytes of an AUX text."""
    return annotation_words((63, len(raw))) + raw + b"\0" * (len(raw) % 2)
