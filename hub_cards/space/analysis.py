"""What the page shows, computed: a part of a record read from a visitor's files, its findings, reasons, restored leads, codes."""

import os
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle

import anyecg_hf
from anyecg_hf.leads import LEAD_IDS, LIMB_LEADS, derive_limb_leads
from anyecg_hf.plotting import MM_PER_SECOND, plot_record
from anyecg_hf.records import SIMULATED, is_simulated
from anyecg_hf.simulate import simulate_record

PAGE_SECONDS = 10.0  # what is looked at at once: what a sheet of ECG paper holds, and one window of the models
EXAMPLES = {
    "Sinus rhythm": {"seed": 1},
    "Atrial fibrillation": {"seed": 1, "rhythm": "atrial fibrillation", "heart_rate": 110},
    "Ventricular beats": {"seed": 2, "rhythm": "ventricular beats"},
    "Two leads, as of a watch or a patch": {"seed": 3, "lead_names": ["I", "II"]},
    "Electrode V2 falls off, mains hum": {"seed": 4, "mains_mv": 0.2},
}
_CODE_BAND = 8.0  # mm under the paper, where codes stand
_NO_CODE = -100


def read_example(name, start_seconds):
    """Return the part of a simulated record of one minute that begins at `start_seconds`, and whether it goes on after it."""
    record = simulate_record(duration_seconds=60.0, **EXAMPLES[name])
    if name.startswith("Electrode V2"):
        row = record.lead_names.index("V2")
        record.signal[row, int(4 * record.sampling_rate) :] = record.signal[row, 0]
    if not 0 <= start_seconds < record.duration_seconds:
        raise ValueError(f"start_seconds is {start_seconds:g}, the recording ends at {record.duration_seconds:g} s.")
    record.signal = record.signal[:, round(start_seconds * record.sampling_rate) :]
    return _page_of(record)


def read_upload(files, start_seconds, *, lead_aliases=None, **stated):
    """Return the part of a record that begins at `start_seconds`, and whether the record goes on after it.

    The files are on disk while they are read, in a folder of their own. What a file tells of the patient is not in the result.

    Args:
        files (`dict[str, bytes]`): of one record, by name.
        start_seconds (`float`): where the part begins.
        lead_aliases (`dict[str, str]`, *optional*): names of leads as in the file to standard names.
        stated: of `read_record`, what the file does not say.

    Raises:
        ValueError: what `read_record` says, with the names of the files and without that of the folder.
    """
    first = first_file(files)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, data in files.items():
                Path(folder, name).write_bytes(data)
            record = anyecg_hf.read_record(
                Path(folder, first), start_seconds=start_seconds, duration_seconds=PAGE_SECONDS + 1, **stated
            )
        except (ValueError, OSError, ImportError) as error:
            raise ValueError(str(error).replace(f"{folder}{os.sep}", "")) from None
    record.lead_names = [(lead_aliases or {}).get(name, name) for name in record.lead_names]
    return _page_of(record)


def first_file(files):
    """Return the name of the file that the record begins with: of several the WFDB header, of a record in segments its main one.

    Raises:
        ValueError: the files are of several records, or of none.
    """
    if len(files) == 1:
        return next(iter(files))
    headers = [name for name in files if name.endswith(".hea")]
    main = [name for name in headers if b"/" in bytes(files[name]).partition(b"\n")[0].partition(b" ")[0]]
    for chosen in (main, headers):
        if len(chosen) == 1:
            return chosen[0]
    raise ValueError(
        f"{', '.join(sorted(files))}: {'several' if headers else 'no'} WFDB headers (.hea). Drop one record at a time: one "
        "file, or the header and the data files of one WFDB record together."
    )


def _page_of(record):
    """Return the first `PAGE_SECONDS` of a record without anything but signal, rate, leads and warnings, and if more follows."""
    count = round(PAGE_SECONDS * record.sampling_rate)
    comments = [SIMULATED] if is_simulated(record) else []
    page = anyecg_hf.Record(
        np.ascontiguousarray(record.signal[:, :count]),
        record.sampling_rate,
        list(record.lead_names),
        warnings=list(record.warnings),
        comments=comments,
    )
    return page, record.signal.shape[1] > count


def examine(models, record):
    """Return the record with the leads that the classifier knows, and the classifier's result with its report on quality."""
    result = models.classify(record, return_quality=True)
    names = result["quality"]["lead_names"]
    rows = [record.lead_names.index(name) for name in names]
    known = anyecg_hf.Record(record.signal[rows], record.sampling_rate, names, comments=record.comments)
    return known, result


def draw(record):
    return plot_record(record, seconds=PAGE_SECONDS)


def strongest_reasons(explanation, count=3):
    """Return what speaks most for a finding and most against it, each a list of `(lead, start_seconds, relevance)`."""
    cells = [
        (lead, float(start), float(value))
        for lead, row in zip(explanation.lead_names, explanation.relevance, strict=True)
        for start, value in zip(explanation.start_seconds, row, strict=True)
    ]
    supporting = sorted((cell for cell in cells if cell[2] > 0), key=lambda cell: -cell[2])
    opposing = sorted((cell for cell in cells if cell[2] < 0), key=lambda cell: cell[2])
    return supporting[:count], opposing[:count]


def removable_leads(models, record):
    """Return the leads that can be removed and made anew: all with a model, else limb leads that follow from two others."""
    if models.reconstruct is not None:
        return list(record.lead_names) if len(record.lead_names) > 1 else []
    limbs = [name for name in LIMB_LEADS if name in record.lead_names]
    return limbs if len(limbs) > 2 else []


def restore(models, record, leads):
    """Return a record with each of `leads` as measured and as made from the others, and how far the two are apart.

    Returns:
        `(record, [(lead, how, correlation, mean difference in mV)])`, `how` being "restored" or "derived".

    Raises:
        ValueError: no lead is named, all are, or without a model one does not follow from two others.
    """
    if not leads:
        raise ValueError("Choose at least one lead to remove.")
    measured, made = _with_a_model(models, record, leads) if models.reconstruct else _by_algebra(record, leads)
    kinds = ["restored" if made["restored"][row].any() else "derived" for row in range(len(leads))]
    figures = [_compare(*pair) for pair in zip(measured, made["signal"], strict=True)]
    both = anyecg_hf.Record(
        np.stack([measured, made["signal"]], axis=1).reshape(2 * len(leads), -1),
        made["sampling_rate"],
        [name for lead in leads for name in (f"{lead} (measured)", lead)],
        comments=record.comments,
    )
    unmarked = np.zeros_like(made["restored"])
    both.restored, both.derived = (
        np.stack([unmarked, made[mark]], axis=1).reshape(both.signal.shape) for mark in ("restored", "derived")
    )
    return both, [(lead, kind, *pair) for lead, kind, pair in zip(leads, kinds, figures, strict=True)]


def _with_a_model(models, record, leads):
    """Return `leads` as the model is given them, and as it makes them from the others."""
    anew = models.reconstruct(record, leads=leads, return_quality=False)
    given = models.reconstruct(record, leads=[], return_quality=False)
    rows = [anew["lead_names"].index(lead) for lead in leads]
    measured = given["signal"][[given["lead_names"].index(lead) for lead in leads]]
    return measured, {**anew, **{name: anew[name][rows] for name in ("signal", "restored", "derived")}}


def _by_algebra(record, leads):
    kept = [row for row, name in enumerate(record.lead_names) if name not in leads]
    signal, names = derive_limb_leads(record.signal[kept], [record.lead_names[row] for row in kept])
    missing = [lead for lead in leads if lead not in names]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} does not follow from two limb leads; that takes a model, and none is set up."
        )
    made = signal[[names.index(lead) for lead in leads]]
    measured = record.signal[[record.lead_names.index(lead) for lead in leads]]
    marks = {"restored": np.zeros(made.shape, bool), "derived": np.ones(made.shape, bool)}
    return measured, {"signal": made, "sampling_rate": record.sampling_rate, **marks}


def _compare(measured, made):
    """Return the correlation and the mean absolute difference (mV) of two traces where both have values; NaN where none has."""
    both = np.isfinite(measured) & np.isfinite(made)
    if both.sum() < 2 or measured[both].std() == 0 or made[both].std() == 0:
        return float("nan"), float("nan")
    return float(np.corrcoef(measured[both], made[both])[0, 1]), float(np.abs(measured[both] - made[both]).mean())


def codes_of(models, record, lead):
    """Return the rhythm code of each second of one lead as `[(start_seconds, code or None)]`, and how long a second is."""
    items, window_starts = models.tokenize.windows(record)
    patch_seconds = models.tokenize.patch_size / models.tokenize.sampling_rate
    found = {}
    for item, window_start in zip(items, window_starts, strict=True):
        row = item["lead_ids"].tolist().index(LEAD_IDS[lead])
        for patch, code in enumerate(item["rhythm_codes"][row].tolist()):
            found[float(window_start) + patch * patch_seconds] = None if code == _NO_CODE else code
    ends = record.duration_seconds
    return [(start, code) for start, code in sorted(found.items()) if start < ends], patch_seconds


def draw_codes(models, record, lead):
    """Return the picture of one lead with the rhythm code of each second under the trace."""
    codes, patch_seconds = codes_of(models, record, lead)
    row = record.lead_names.index(lead)
    one = anyecg_hf.Record(record.signal[row : row + 1], record.sampling_rate, [lead], comments=record.comments)
    figure = draw(one)
    (axes,) = figure.axes  # in millimetres
    (trace,) = (line for line in axes.lines if line.get_gid() == f"trace-{lead}")
    (footer,) = (text for text in axes.texts if text.get_gid() == "footer")
    paper = axes.patches[0]
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _CODE_BAND / 25.4)
    axes.set_ylim(-_CODE_BAND, axes.get_ylim()[1])
    footer.set_y(footer.get_position()[1] - _CODE_BAND)
    for start, code in codes:
        left = trace.get_xdata()[0] + start * MM_PER_SECOND
        box = ((left, paper.get_y() - _CODE_BAND + 1), patch_seconds * MM_PER_SECOND, _CODE_BAND - 2)
        axes.add_patch(Rectangle(*box, facecolor="#eef1f6", edgecolor="#8a94a6", linewidth=0.6))
        middle = (left + patch_seconds * MM_PER_SECOND / 2, paper.get_y() - _CODE_BAND / 2)
        word = "none" if code is None else str(code)
        axes.text(*middle, word, ha="center", va="center", fontsize=10, family="monospace", gid="code")
    return figure
