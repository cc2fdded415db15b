"""training.stopping: SIGTERM and Ctrl-C end a run, also where Python swallows the exception that they raise."""

import os
import signal
import sys

import pytest
import torch
from line_model import Line, Ones
from transformers import TrainerCallback

from training import commands
from training.arguments import AnyECGTrainingArguments
from training.stopping import Terminated, stop_if_asked, stop_on_signals
from training.trainer import AnyECGTrainer

BOTH = [(signal.SIGTERM, Terminated, 143), (signal.SIGINT, KeyboardInterrupt, 130)]
pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def usual_handlers():
    """A suite that runs in the background has Ctrl-C ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class _KillsInItsFinalizer:
    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        list(range(3))  # Python looks for signals between its instructions


class _SignalInAFinalizer(TrainerCallback):
    def __init__(self, number):
        self.number = number

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            _KillsInItsFinalizer(self.number)


def _trainer(folder, number):
    args = AnyECGTrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True
    )
    trainer = AnyECGTrainer(
        Line(), args, train_dataset=Ones(), data_collator=lambda items: {"x": torch.stack([i["x"] for i in items])}
    )
    trainer.add_callback(_SignalInAFinalizer(number))
    return trainer


@pytest.mark.parametrize(("number", "exception", "code"), BOTH)
def test_a_signal_in_a_finalizer_stops_the_run_at_the_next_step(tmp_path, number, exception, code):
    trainer = _trainer(tmp_path, number)
    with pytest.raises(exception), stop_on_signals():
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(("number", "exception", "code"), BOTH)
def test_a_signal_that_was_swallowed_before_the_first_step_gives_the_usual_end(
    tmp_path, monkeypatch, capsys, number, exception, code
):
    def main(argv):
        _KillsInItsFinalizer(number)
        _trainer(tmp_path, number).train()

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as stop:
        commands.run_command(main)
    assert stop.value.code == code
    assert "stopped by" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("number", "exception", "code"), BOTH)
def test_an_error_that_follows_from_a_signal_counts_as_the_signal(number, exception, code):
    def wrap():
        try:
            os.kill(os.getpid(), number)
            list(range(3))
        except BaseException as error:
            raise RuntimeError("an import failed") from error

    with pytest.raises(exception), stop_on_signals():
        wrap()


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        stop_if_asked()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_handlers_are_given_back_and_nothing_is_remembered():
    with pytest.raises(Terminated), stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    stop_if_asked()
