"""training/precision.py: float32 proper inside, and afterwards all as it was, by whichever of torch's names it was set."""

import types

import pytest
import torch

from training.precision import full_precision

BACKENDS = torch.backends
new_names = pytest.mark.skipif(not hasattr(BACKENDS.cudnn, "conv"), reason="torch has these names from 2.9")


def test_autocast_is_off_inside_and_on_again_after():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision("cpu"):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


@new_names
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_tf32_is_off_inside_and_as_it_was_after(precision):
    owners = BACKENDS.cudnn.conv, BACKENDS.cuda.matmul
    before = [owner.fp32_precision for owner in owners]
    try:
        for owner in owners:
            owner.fp32_precision = precision
        with pytest.raises(KeyError), full_precision("cpu"):
            assert [owner.fp32_precision for owner in owners] == ["ieee", "ieee"]
            raise KeyError
        assert [owner.fp32_precision for owner in owners] == [precision, precision]
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.fp32_precision = value


def test_what_was_set_by_the_old_names_can_be_read_by_them_after():
    before = BACKENDS.cudnn.allow_tf32, BACKENDS.cuda.matmul.allow_tf32
    try:
        for value in (False, True):
            BACKENDS.cudnn.allow_tf32 = BACKENDS.cuda.matmul.allow_tf32 = value
            with full_precision("cpu"):
                pass
            assert BACKENDS.cudnn.allow_tf32 is BACKENDS.cuda.matmul.allow_tf32 is value
    finally:
        BACKENDS.cudnn.allow_tf32, BACKENDS.cuda.matmul.allow_tf32 = before


def test_a_torch_without_the_new_names_is_told_by_the_old_ones(monkeypatch):
    cudnn, matmul = types.SimpleNamespace(allow_tf32=True), types.SimpleNamespace(allow_tf32=False)
    monkeypatch.setattr(BACKENDS, "cudnn", cudnn)
    monkeypatch.setattr(BACKENDS.cuda, "matmul", matmul)
    with full_precision("cpu"):
        assert not cudnn.allow_tf32 and not matmul.allow_tf32
    assert cudnn.allow_tf32 and not matmul.allow_tf32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: TF32 is theirs")
def test_a_convolution_on_a_gpu_is_that_of_a_cpu():
    torch.manual_seed(0)
    conv, x = torch.nn.Conv1d(64, 64, 15), torch.randn(8, 64, 300)
    with torch.no_grad(), full_precision("cuda"):
        found = conv.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(found, conv.cpu()(x), rtol=1e-5, atol=1e-5)
