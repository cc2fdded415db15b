"""The page: what stands where, and what happens when a visitor does something. It keeps nothing between two visitors."""

import logging
import traceback
from html import escape
from pathlib import Path

import gradio as gr
from analysis import (
    EXAMPLES,
    PAGE_SECONDS,
    draw,
    draw_codes,
    examine,
    read_example,
    read_upload,
    removable_leads,
    restore,
    strongest_reasons,
)
from fragments import HEAD, WARNING, answer, comparison, error, findings, label_choices, picture, quality, reasons
from visits import LARGEST_UPLOAD, TOO_LARGE

import anyecg_hf
from anyecg_hf.leads import resolve_lead_name
from anyecg_hf.records import is_simulated

HERE = Path(__file__).parent
HALF = 340  # pixels that half of a row needs; on a phone the halves stand one below the other
LOOK = {
    "font": ["system-ui", "sans-serif"],
    "font_mono": ["ui-monospace", "monospace"],
}  # the visitor's own: none is fetched
UNITS = ["as in the file", "mV", "uV", "V", "nV"]
DROP_BOX = f"""
<label class="drop" data-largest="{LARGEST_UPLOAD}" data-too-large="{escape(TOO_LARGE)}">
<b>Drop a recording here</b>, or choose its files. WFDB: header and data files together. Also EDF, DICOM, HL7 aECG, Philips, GE,
SCP-ECG, ISHNE, CSV, NumPy, HDF5; {LARGEST_UPLOAD / 1e6:.0f} MB at most.
<input type="file" multiple><span class="state"></span></label>
"""
NO_RESTORING = (
    "No model for restoring leads is set up here. Only limb leads can be removed: they follow from two others."
)
NO_TOKENIZER = "No rhythm tokenizer is set up here."
logger = logging.getLogger(__name__)


class Page:
    """The components of the page and the functions behind them."""

    def __init__(self, models, visits):
        self.models, self.visits = models, visits
        gr.HTML(f'{HEAD}<div class="warning">{WARNING}</div>')
        with gr.Row():
            script = (HERE / "drop_box.js").read_text(encoding="utf-8")
            with gr.Column(min_width=HALF):
                self.drop_box = gr.HTML(html_template=DROP_BOX, js_on_load=script)
            with gr.Column(min_width=HALF):
                self.example = gr.Dropdown(
                    list(EXAMPLES), label="Or a simulated example, one minute long", elem_id="example"
                )
                self.show_example = gr.Button("Show the example", elem_id="show-example", variant="primary")
        self._lay_out_options()
        self.message = gr.HTML(elem_id="message")
        with gr.Column(visible=False) as self.results:
            self.answer = gr.HTML(elem_id="answer")
            self.trace = gr.HTML(elem_id="trace")
            with gr.Row():
                with gr.Column(min_width=HALF):
                    self.findings = gr.HTML(elem_id="findings")
                with gr.Column(min_width=HALF):
                    self.quality = gr.HTML(elem_id="quality")
            self._lay_out_questions()
        self._connect()

    def _lay_out_options(self):
        with gr.Accordion("What the file does not say (sampling rate, units, leads)", open=False):
            with gr.Row():
                narrow = {"min_width": HALF // 2}
                self.rate = gr.Textbox("", label="Sampling rate, Hz (sampling_rate)", elem_id="rate", **narrow)
                self.units = gr.Radio(UNITS, value=UNITS[0], label="Units (units)", elem_id="units", **narrow)
                self.index = gr.Textbox("", label="Record, from 0 (record_index)", **narrow)  # an empty gr.Number is 0
            self.leads = gr.Textbox(
                "", label="Leads, row by row (lead_names)", placeholder="I, II, V1", elem_id="leads"
            )
            self.aliases = gr.Textbox(
                "", label="Names that the file uses (lead_aliases)", placeholder="ECG1=II, ECG2=V5"
            )
        with gr.Row(equal_height=True):
            self.start = gr.Number(0, label="Start at second", elem_id="start", min_width=HALF // 3)
            self.again = gr.Button("Read again from there", elem_id="again", min_width=HALF // 3)

    def _lay_out_questions(self):
        with gr.Tab("Why?"):
            self.label = gr.Dropdown([], label="Finding", elem_id="label")
            self.ask_why = gr.Button("What each second of each lead does for it", elem_id="ask-why", variant="primary")
            self.why = gr.HTML(elem_id="why")
        with gr.Tab("Remove a lead"):
            gr.HTML("" if self.models.reconstruct else f"<p>{NO_RESTORING}</p>")
            self.removed = gr.CheckboxGroup([], label="Leads to remove", elem_id="removed")
            self.ask_restore = gr.Button(
                "Remove and make anew from the others", elem_id="ask-restore", variant="primary"
            )
            self.restored = gr.HTML(elem_id="restored")
        with gr.Tab("Codes"):
            has_codes = self.models.tokenize is not None
            gr.HTML("" if has_codes else f"<p>{NO_TOKENIZER}</p>")
            self.lead = gr.Dropdown([], label="Lead", elem_id="lead", visible=has_codes)
            self.ask_codes = gr.Button(
                "The code of each second", elem_id="ask-codes", variant="primary", visible=has_codes
            )
            self.codes = gr.HTML(elem_id="codes")

    def _connect(self):
        options = [self.start, self.rate, self.units, self.index, self.leads, self.aliases]
        own = {self.message, self.results, self.answer, self.trace, self.findings, self.quality}
        shown = {*own, self.start, self.label, self.why, self.removed, self.restored, self.lead, self.codes}
        connect(self.drop_box.submit, self.on_drop, options[1:], shown, trigger_mode="always_last")
        connect(self.show_example.click, self.on_example, [self.example], shown)
        connect(self.again.click, self.on_again, options, shown)
        connect(self.ask_why.click, self.on_why, [self.label], {self.why})
        connect(self.ask_restore.click, self.on_restore, [self.removed], {self.restored})
        connect(self.ask_codes.click, self.on_codes, [self.lead], {self.codes})

    # ---- a record, or another part of it ---------------------------------------------------------------------------

    def on_drop(self, event: gr.EventData, request: gr.Request, *options):
        def read():
            if event.refusal:
                self.visits.forget(request.session_hash)
                raise ValueError(event.refusal)
            return self._read(self.visits.claim(event.token, request.session_hash), 0.0, *options)

        return {self.start: 0, **self._shown_or_refused(read)}

    def on_example(self, request: gr.Request, name):
        def read():
            if not name:
                raise ValueError("Choose an example first.")
            return self._read(self.visits.begin(request.session_hash, name), 0.0)

        return {self.start: 0, **self._shown_or_refused(read)}

    def on_again(self, request: gr.Request, start, *options):
        return self._shown_or_refused(lambda: self._read(self.visits.of(request.session_hash), start or 0.0, *options))

    def _read(self, visit, start, *options):
        """Read a part of a visit's record and return the components' values."""
        visit.record, visit.findings = None, []
        if visit.example:
            record, goes_on = read_example(visit.example, start)
        else:
            record, goes_on = read_upload(visit.files, start, **stated_by(*options))
        visit.record, result = examine(self.models, record)
        labels = label_choices(result["findings"])
        removable = removable_leads(self.models, visit.record)
        notes = dict.fromkeys([*record.warnings, *result["quality"]["notes"]])
        return {
            self.answer: answer(result, start, goes_on, is_simulated(visit.record)),
            self.trace: picture(draw(visit.record), "The recording on ECG paper"),
            self.findings: findings(result["findings"]),
            self.quality: quality(result["quality"], notes),
            self.label: gr.Dropdown(labels, value=labels[0][1] if labels else None),
            self.removed: gr.CheckboxGroup(removable, value=[]),
            self.lead: gr.Dropdown(visit.record.lead_names, value=first_of(("II", "I"), visit.record.lead_names)),
        }

    def _shown_or_refused(self, read):
        """Return all components' values: those that `read` gives, or nothing but the reason why there are none."""
        empty = dict.fromkeys((self.message, self.why, self.restored, self.codes), "")
        values, message = answered(read)
        if message:
            nothing = dict.fromkeys((self.answer, self.trace, self.findings, self.quality), "")
            return {**empty, **nothing, self.message: error(message), self.results: gr.Column(visible=False)}
        return {**empty, **values, self.results: gr.Column(visible=True)}

    # ---- questions about it ----------------------------------------------------------------------------------------

    def on_why(self, request: gr.Request, label):
        def ask():
            explanation = anyecg_hf.explain(self.models.classify, self._record_of(request), label=label)
            words = reasons(explanation, *strongest_reasons(explanation))
            return words + picture(explanation.plot(seconds=PAGE_SECONDS), f"Why {label}")

        return {self.why: fragment(ask)}

    def on_restore(self, request: gr.Request, leads):
        def ask():
            both, figures = restore(self.models, self._record_of(request), leads)
            return comparison(figures) + picture(draw(both), "Leads as measured and as made from the others")

        return {self.restored: fragment(ask)}

    def on_codes(self, request: gr.Request, lead):
        def ask():
            return picture(draw_codes(self.models, self._record_of(request), lead), f"Rhythm codes of lead {lead}")

        return {self.codes: fragment(ask)}

    def _record_of(self, request):
        record = self.visits.of(request.session_hash).record
        if record is None:
            raise ValueError("There is no record to look at.")
        return record


def build_page(models, visits):
    """Return the `gr.Blocks` of the page."""
    with gr.Blocks(title="AnyECG", analytics_enabled=False) as blocks:
        Page(models, visits)

        def leave(request: gr.Request):
            visits.forget(request.session_hash)
            blocks.state_holder.session_data.pop(request.session_hash, None)  # what the page showed

        blocks.unload(leave)
    return blocks.queue(default_concurrency_limit=1, max_size=32, api_open=False)


def connect(event, function, inputs, outputs, **options):
    """Let `function` answer an event, one visitor at a time: the models and their memory are there once."""
    event(function, inputs, list(outputs), concurrency_id="models", api_visibility="private", **options)


def stated_by(rate, units, index, leads, aliases):
    """Return what a visitor says of a file as arguments of `read_upload`. Raises ValueError where that cannot be understood."""
    names = [name.strip() for name in (leads or "").split(",") if name.strip()]
    pairs = [pair.partition("=") for pair in (aliases or "").split(",") if pair.strip()]
    return {
        "sampling_rate": number_in(rate, float, "sampling_rate"),
        "units": None if units == UNITS[0] else units,
        "record_index": number_in(index, int, "record_index"),
        "lead_names": names or None,
        "lead_aliases": {given.strip(): resolve_lead_name(name.strip()) for given, _, name in pairs},
    }


def number_in(text, kind, name):
    """Return what a field holds as a number, None where it is empty."""
    if not (text or "").strip():
        return None
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, which is no {'whole ' if kind is int else ''}number.") from None


def first_of(wanted, names):
    return next((name for name in (*wanted, *names) if name in names), None)


def answered(function):
    """Return `(result, "")`, or `(None, what to tell the visitor)`.

    What is wrong with a record is told as it is said. The message of any other error may quote the record: only its kind
    and place are logged.
    """
    try:
        return function(), ""
    except (ValueError, OSError, ImportError) as refusal:
        return None, str(refusal)
    except Exception as fault:
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(fault.__traceback__)]
        logger.error("%s at %s", type(fault).__name__, " > ".join(places[-6:]))
        return None, f"An error of this program ({type(fault).__name__}), not of your record. Nothing was kept."


def fragment(ask):
    html, message = answered(ask)
    return error(message) if message else html
