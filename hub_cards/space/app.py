"""A page for one ECG: findings, why, quality, restored leads, rhythm codes. Research only, not a medical device.

    python hub_cards/space/app.py            # from a clone, with the models in checkpoints/
    GRADIO_SERVER_PORT=8080 python hub_cards/space/app.py

The environment names other models, folders or Hub ids, with a revision if one is wanted: ANYECG_CLASSIFIER,
ANYECG_TOKENIZER, ANYECG_RECONSTRUCTION=you/anyecg-small-reconstruction@v1. See docs/space.md.
"""

import atexit
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
if (REPOSITORY / "anyecg_hf").is_dir():  # a clone needs no installation
    sys.path.insert(0, str(REPOSITORY))

# before gradio is imported, which reads them then: no call home, no history of runs, and a folder that goes with the process
TEMPORARY = tempfile.mkdtemp(prefix="anyecg-space-")
atexit.register(shutil.rmtree, TEMPORARY, ignore_errors=True)
tempfile.tempdir = os.environ["GRADIO_TEMP_DIR"] = TEMPORARY
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False", HF_HUB_DISABLE_TELEMETRY="1")

import gradio as gr  # noqa: E402
from models import load_models  # noqa: E402
from page import LOOK, build_page  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402
from visits import SECONDS_HELD, Visits, receive  # noqa: E402

SESSIONS = 64  # of which Gradio remembers what their page shows


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that what is registered above is done then, too
    logging.getLogger("anyecg_hf").setLevel(logging.ERROR)  # warnings are about a visitor's record: shown, not logged
    transformers_logging.disable_progress_bar()
    visits = Visits()
    page = build_page(load_models(os.environ), visits)
    app, _, _ = page.launch(
        prevent_thread_lock=True,
        css_paths=HERE / "page.css",
        theme=gr.themes.Default(**LOOK),
        footer_links=[],
        max_file_size=1,  # nothing is uploaded Gradio's way, which is by way of files
        state_session_capacity=SESSIONS,
        ssr_mode=False,
        pwa=False,
        share=False,
    )
    app.add_route("/received/{token}/{name}", receive(visits), methods=["PUT"])
    threading.Thread(target=forget_the_old, args=(visits,), daemon=True).start()
    page.block_thread()


def forget_the_old(visits):
    while True:
        time.sleep(SECONDS_HELD / 10)
        visits.expire()


if __name__ == "__main__":
    main()
