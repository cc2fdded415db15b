"""A training command from outside: its log, one line for what a user can meet, exit codes, signals."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from transformers.utils import logging as transformers_logging

from .checkpointing import SaveError
from .engines import WorkersDiedError
from .health import CollapseError
from .stopping import Terminated, stop_on_signals
from .trainer import NonFiniteError


def start_logging() -> None:
    """Log progress to standard error: this project's messages (of the first process), and the libraries' warnings."""
    level = logging.INFO if int(os.environ.get("LOCAL_RANK", "0")) == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for package in ("training", "tokenization", "anyecg_hf", "__main__"):
        logging.getLogger(package).setLevel(level)
    transformers_logging.set_verbosity_warning()


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Run `main` on the command line. What a user can meet ends with one line and code 1; a signal with its own code."""
    start_logging()
    try:
        with stop_on_signals():
            main(sys.argv[1:])
    except (KeyboardInterrupt, Terminated) as stop:
        name, code = ("SIGTERM", 143) if isinstance(stop, Terminated) else ("Ctrl-C", 130)
        print(f"stopped by {name}: the same command goes on where it was", file=sys.stderr)
        sys.exit(code)
    except (ValueError, OSError, ImportError, NonFiniteError, CollapseError, SaveError, WorkersDiedError) as error:
        _exit_with(error, str(error))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        _exit_with(
            error,
            f"A process that reads records died ({error}). Most often memory ran out: lower --dataloader_num_workers "
            "(0: none). What is written is kept: the same command goes on where it was.",
        )


def _exit_with(error: Exception, text: str) -> None:
    if os.environ.get("ANYECG_TRACEBACK"):
        raise error
    if text.startswith("Caught "):  # from a worker, with its traceback: the last line is the message
        text = text.strip().rpartition("\n")[2]
    sys.exit(f"error: {text} (ANYECG_TRACEBACK=1 shows where)")
