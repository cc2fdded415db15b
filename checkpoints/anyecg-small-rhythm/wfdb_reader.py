"""WFDB records of one or several segments, with annotations: `read_wfdb(header, stated) -> Record`. Needs no wfdb package."""

from .record_fields import standard_lead_names
from .records import Record, parse_comments, part_to_read
from .wfdb_annotations import read_annotations
from .wfdb_header import read_header
from .wfdb_segments import ManySegments
from .wfdb_signals import SingleSegment

MOST_WARNINGS = 100  # of a record; a header can hold ten thousand lines that are each wrong


def read_wfdb(path, stated):
    """Return the `Record` of the record with the header file `path` (`pathlib.Path`).

    Signals that are no voltage are left out, as are those of another rate than the leads, and `warnings` says so. Leads
    with several samples per frame are read at their full rate; a skew is taken out. Of the data files only the part that
    is asked for is read; check sums are compared where that is all. Annotations are those of the `.atr` file beside the
    header, all of them, counted from the part's first sample.

    Raises:
        ValueError: the header or a data file is damaged, contradictory, or of a kind that is not read.
        OSError: a file is missing or is no regular file in the record's folder.
        ImportError: a data file is compressed with FLAC, and soundfile is not installed.
    """
    header = read_header(path)
    source = ManySegments(path, header) if header.segments else SingleSegment(path, header)
    per_frame = source.samples_per_frame
    rate = header.frame_rate * per_frame
    num_samples = source.num_frames * per_frame
    start, stop = part_to_read(stated, rate, num_samples)
    first_frame, last_frame = start // per_frame, -(-stop // per_frame)
    signal = source.read(first_frame, last_frame)
    signal = signal[:, start - first_frame * per_frame : stop - first_frame * per_frame]
    names = standard_lead_names([signal.name for signal in source.signals], header.notes)
    annotations = read_annotations(path.with_suffix(".atr"), rate, per_frame, num_samples, header.notes)
    for annotation in annotations:
        annotation.sample -= start
    warnings = list(dict.fromkeys(header.notes))
    if len(warnings) > MOST_WARNINGS:
        warnings[MOST_WARNINGS:] = [f"{path}: {len(warnings) - MOST_WARNINGS} more warnings, not listed."]
    return Record(signal, rate, names, **parse_comments(header.comments), annotations=annotations, warnings=warnings)
