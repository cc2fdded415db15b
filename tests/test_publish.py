"""training/publish.py: what a card says of the run that it is made from."""

import json

import pytest

from training.publish import describe_run


def test_the_records_seen_are_those_of_all_processes(tmp_path):
    arguments = {
        "seed": 3,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "num_processes": 2,
    }
    (tmp_path / "run_arguments.json").write_text(json.dumps(arguments))
    (tmp_path / "run_finished.json").write_text(json.dumps({"steps": 10, "files": {}}))
    assert describe_run(tmp_path) == {"seed": 3, "steps": 10, "batch_size": 64, "records_seen": 640}


def test_a_run_that_is_not_finished_gets_no_card(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        describe_run(tmp_path)
