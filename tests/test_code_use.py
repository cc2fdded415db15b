"""tokenization/code_use.py: the use of a codebook is what patches were given, not where dead codes were put."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from anyecg_hf.vector_quantizer import CosineVectorQuantizer
from tokenization.code_use import CodeUse


def _same(counts):
    return counts  # the sum over one process


def _quantizer(num_codes=32):
    quantizer = CosineVectorQuantizer(num_codes, 2, update="ema", ema_decay=0.8, dead_code_share=0.5, dead_code_steps=1)
    quantizer.reset_parameters()
    return quantizer.train()


def test_three_codes_in_use_are_three_however_often_the_dead_ones_are_moved():
    torch.manual_seed(0)
    quantizer = _quantizer()
    use = CodeUse(quantizer)
    three = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).repeat(40, 1)
    for _ in range(60):
        _, codes, _, _ = quantizer(three, torch.ones(120, dtype=torch.bool))
        use.note(codes, sum_up=_same)
    figures = use.figures()
    assert figures["codebook_perplexity"] == pytest.approx(3, abs=0.1)
    assert figures["dead_codes"] == 29 and figures["restarted_codes"] == int(quantizer.num_restarts) > 100


def test_the_figures_follow_from_the_shares():
    use = CodeUse(_quantizer(4))
    shares = np.array([0.5, 0.3, 0.19, 0.01])
    use.values["share"].copy_(torch.tensor(shares))
    figures = use.figures()
    assert figures["codebook_perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert figures["dead_codes"] == 1 and figures["restarted_codes"] == 0
    json.dumps(figures)


def test_steps_without_a_code_change_nothing_and_the_start_is_that_of_k_means():
    quantizer = _quantizer(4)
    use = CodeUse(quantizer)
    quantizer.code_share.copy_(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    use.begin()
    use.note(torch.full((2, 3), -100), sum_up=_same)
    assert use.figures()["codebook_perplexity"] == pytest.approx(2)
    use.note(torch.tensor([[2, -100], [2, 2]]), sum_up=_same)
    torch.testing.assert_close(use.values["share"], torch.tensor([0.4, 0.4, 0.2, 0.0]))


def test_counts_are_added_up_over_processes():
    use = CodeUse(_quantizer(2))
    use.note(torch.tensor([0]), sum_up=lambda counts: counts + torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(use.values["share"], torch.tensor([0.5, 0.5]))


def test_the_use_survives_a_checkpoint_and_one_without_it_is_told(tmp_path, caplog):
    use, other = CodeUse(_quantizer(4)), CodeUse(_quantizer(4))
    use.note(torch.tensor([3, 3]), sum_up=_same)
    use.save(tmp_path / "use.safetensors")
    other.load(tmp_path / "use.safetensors")
    assert torch.equal(other.values["share"], load_file(tmp_path / "use.safetensors")["share"])
    assert other.figures() == use.figures()
    other.load(tmp_path / "absent.safetensors")
    assert "absent.safetensors is missing" in caplog.text and other.figures()["codebook_perplexity"] == pytest.approx(4)
