"""Runs are watched: what is logged, TensorBoard, and the stop at a collapse."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training_commands import QUANTIZER, _argv, _rewind

import tokenization.train
from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer
from training.checkpointing import last_checkpoint
from training.health import CollapseError, refuse_collapse


def _train(output_dir, cache, *options):
    quick = [
        "--codebook_start_step",
        "2",
        "--codebook_start_vectors",
        "500",
        "--health_records",
        "0",
        "--logging_steps",
        "1",
    ]
    options = [*quick, *options]
    argv = _argv("smoke_quantizer.yaml", output_dir, cache, *options, network=QUANTIZER)
    tokenization.train.main(argv)


def test_a_run_logs_the_codebooks_state_losses_gradient_norm_and_speed_to_tensorboard(tmp_path):
    _train(tmp_path / "run", tmp_path / "cache", "--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    wanted = {
        "loss", "loss_morphology", "loss_frequency", "loss_demography", "loss_commitment", "grad_norm",
        "codebook_perplexity", "dead_codes", "restarted_codes", "patches_per_second",
    }  # fmt: skip
    assert {f"train/{name}" for name in wanted} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    use = [event.value for event in events.Scalars("train/codebook_perplexity")]
    _rewind(tmp_path / "run", 4)
    _train(tmp_path / "run", tmp_path / "cache", "--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("train/codebook_perplexity")] == use


def test_a_collapsed_codebook_stops_the_run_says_why_and_keeps_the_checkpoints(tmp_path):
    with pytest.raises(
        CollapseError, match="Collapse at step 3: codebook_perplexity is .* the floor is 15.* few codes"
    ):
        _train(tmp_path / "run", tmp_path / "cache", "--min_perplexity_share", "0.999")
    assert last_checkpoint(tmp_path / "run").endswith("checkpoint-2")
    assert not (tmp_path / "run" / "run_finished.json").exists()


def _three_vectors(model, input_values, lead_ids, attention_mask=None):
    """Return what a collapsed encoder gives: one of three vectors for every patch."""
    token_mask = attention_mask.bool() & (lead_ids > 0)[..., None]
    which = torch.arange(token_mask.numel()).view(token_mask.shape) % 3
    vectors = torch.eye(3, model.config.codebook_dim)[which]
    return vectors + 0 * next(model.to_code.parameters()).sum(), token_mask


def test_an_encoder_that_gives_three_codes_is_a_collapse_although_dead_codes_are_restarted(tmp_path, monkeypatch):
    monkeypatch.setattr(AnyECGRhythmQuantizer, "encode_vectors", _three_vectors)
    network = {**QUANTIZER, "codebook_size": 64, "dead_code_steps": 1, "dead_code_share": 0.9, "ema_decay": 0.5}
    with pytest.raises(CollapseError, match="Collapse at step .*: codebook_perplexity is 3.* the floor is 3.2"):
        _train(tmp_path / "run", tmp_path / "cache", "--max_steps", "30", "--config", json.dumps(network))


@pytest.mark.parametrize("logging", [("--logging_steps", "100"), ("--logging_strategy", "no")])
def test_a_collapse_is_noticed_at_the_last_step_whatever_is_logged_and_again_after_a_restart(tmp_path, logging):
    for _ in range(2):
        with pytest.raises(CollapseError, match="Collapse at step 6: codebook_perplexity"):
            _train(tmp_path / "run", tmp_path / "cache", "--min_perplexity_share", "0.999", *logging)
        assert last_checkpoint(tmp_path / "run").endswith("checkpoint-4")


def test_a_figure_below_its_floor_or_not_a_number_is_a_collapse_and_one_on_it_is_not():
    floors = {"spread": (0.1, "All is one.")}
    refuse_collapse(floors, {"spread": 0.1, "loss": 0.0}, step=1)
    for value in (0.09, float("nan")):
        with pytest.raises(CollapseError, match="step 7: spread.*All is one"):
            refuse_collapse(floors, {"spread": value}, step=7)
