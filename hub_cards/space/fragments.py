"""Pieces of the page as HTML: pictures, tables, sentences. What comes from a file or a visitor is escaped."""

import base64
import csv
import io
import itertools
from html import escape
from pathlib import Path

DOTS_PER_INCH = 180
MEANINGS = {
    row["code"]: row["description"]
    for row in csv.DictReader((Path(__file__).with_name("label_names.csv")).read_text(encoding="utf-8").splitlines())
}
HEAD = """
<h1>AnyECG: one ECG, looked at</h1>
<p>Drop a recording or choose a simulated one: findings, quality, why, restored leads, rhythm codes. Nothing is stored: the server
holds your files in its memory, and forgets them when this page is closed or has not been used for 15 minutes.</p>
"""
WARNING = "<b>Research only. Not a medical device.</b> No diagnosis and no treatment may rest on this page."
_ZOOMS = (("whole", "Whole"), ("readable", "Readable"), ("large", "Large"))
_numbers = itertools.count()


def error(message):
    return f'<div class="refusal" role="alert">{escape(message)}</div>'


def picture(figure, title):
    """Return a figure as an image within the page (no file), in a frame that can be scrolled, with three sizes to choose from."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    data = base64.b64encode(file.getvalue()).decode()
    name = f"zoom{next(_numbers)}"
    sizes = "".join(
        f'<label><input type="radio" name="{name}" class="{size}"{" checked" if size == "readable" else ""}>{word}</label>'
        for size, word in _ZOOMS
    )
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f'<div class="ecg"><div class="sizes">Size: {sizes}</div><div class="frame" tabindex="0">{image}</div></div>'


def answer(result, start_seconds, goes_on, is_simulated):
    """Return what the classifier answers, in words, and what part of the record that is about."""
    findings, quality = result["findings"], result["quality"]
    positive = [finding for finding in findings if finding["positive"]]
    words = {
        "findings": f"{len(positive)} of {len(findings)} labels reach their threshold",
        "no finding": "No finding: no label reaches its threshold. That does not mean that the heart is healthy",
        "signal unusable": "Signal unusable: nothing in it can be read, so nothing was classified",
    }[result["answer"]]
    end = start_seconds + quality["duration_seconds"]
    part = f"Analysed: second {start_seconds:g} to {end:g}, leads {', '.join(quality['lead_names'])}."
    if goes_on:
        part += " The recording goes on; at most 10 s are looked at together. Another start shows another part."
    patient = "<b>Simulated, not a patient.</b> " if is_simulated else ""
    return f'<h2 class="answer">{words}.</h2><p>{patient}{escape(part)}</p>'


def findings(found):
    """Return the table of findings: positive ones first, then the five highest others, the rest folded away."""
    ranked = by_rank(found)
    shown = sum(bool(finding["positive"]) for finding in ranked) + 5
    head = "<tr><th>Finding</th><th>Score</th><th>Threshold</th></tr>"
    table = f"<table>{head}{''.join(map(_finding, ranked[:shown]))}</table>"
    if ranked[shown:]:
        rest = f"<table>{head}{''.join(map(_finding, ranked[shown:]))}</table>"
        table += f"<details><summary>{len(ranked[shown:])} more, none of them reaches its threshold</summary>{rest}</details>"
    return f'<h3>Findings</h3><div class="table">{table}</div>' if ranked else ""


def by_rank(found):
    return sorted(found, key=lambda finding: (not finding["positive"], -finding["score"]))


def label_choices(found):
    """Return labels to choose from, positive ones first, as `(words, label)`."""
    return [(f"{each['label']} {MEANINGS.get(each['label'], '')}".strip(), each["label"]) for each in by_rank(found)]


def _finding(finding):
    meaning = MEANINGS.get(finding["label"], "")
    threshold = "-" if finding["threshold"] is None else f"{finding['threshold']:.2f}"
    kind, mark = ("positive", "&#9632; ") if finding["positive"] else ("", "")
    label = f"{mark}<b>{escape(finding['label'])}</b> {escape(meaning)}"
    return f'<tr class="{kind}"><td>{label}</td><td>{finding["score"]:.2f}</td><td>{threshold}</td></tr>'


def quality(report, warnings):
    """Return what is said of the signal's quality: the verdict, then each lead and stretch."""
    verdict = "can be read" if report["is_acceptable"] else "is doubtful: results rest on a signal of poor quality"
    lines = [f"The recording {verdict} (acceptability {report['acceptability']:.2f} of 1)."]
    if report["absent_leads"]:
        lines.append(f"Absent: {', '.join(report['absent_leads'])}.")
    rows = [_stretch(each, "not used") for each in report["masked"]]
    rows += [_stretch(each, "used, with doubt") for each in report["doubtful"]]
    head = "<tr><th>Lead</th><th>Seconds</th><th>What</th><th></th></tr>"
    table = f'<div class="table"><table>{head}{"".join(rows)}</table></div>' if rows else "<p>No flag on any lead.</p>"
    notes = "".join(f"<li>{escape(note)}</li>" for note in warnings)
    words = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f"<h3>Quality</h3>{words}{table}" + (f"<ul>{notes}</ul>" if notes else "")


def _stretch(flag, consequence):
    seconds = f"{flag['start_seconds']:g} to {flag['end_seconds']:g}"
    cells = (flag["lead"], seconds, flag["reason"], consequence)
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def reasons(explanation, supporting, opposing):
    """Return what of a recording speaks for a finding and against it, in words, and what that means."""

    def listed(cells):
        return ", ".join(f"{lead} from second {start:g} ({value:+.2f})" for lead, start, value in cells) or "nothing"

    lines = (
        f"Blue, for {explanation.label}: most of all {listed(supporting)}.",
        f"Orange, against it: most of all {listed(opposing)}.",
        f"In brackets what the {explanation.unit} would lose without this second of this lead, counted from the start of the "
        "picture. It says what the score rests on, not whether the finding is right.",
    )
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def comparison(figures):
    """Return how far made leads are from the measured ones."""
    rows = "".join(
        f"<tr><td><b>{escape(lead)}</b></td><td>{kind}</td><td>{correlation:.3f}</td><td>{difference:.3f} mV</td></tr>"
        for lead, kind, correlation, difference in figures
    )
    head = "<tr><th>Lead</th><th>How</th><th>Correlation</th><th>Mean error</th></tr>"
    words = "Restored: a model's estimate, no measurement. Derived: computed from other limb leads. Never read a finding from it."
    return f'<p>{words}</p><div class="table"><table>{head}{rows}</table></div>'
