"""The wavelet bands against PyWavelets."""

import numpy as np
import pytest
import torch

from anyecg_hf.wavelet import DB6_HIGH, DB6_LOW, band_lengths, wavelet_bands

pywt = pytest.importorskip("pywt")


def reference(x, num_levels):
    """Return `{"A1", "D1", ...}` by PyWavelets, each level decomposed from the start."""
    bands = {}
    for level in range(1, num_levels + 1):
        approximation, detail, *_ = pywt.wavedec(x, "db6", mode="periodization", level=level)
        bands[f"A{level}"], bands[f"D{level}"] = approximation, detail
    return bands


def patches_of(samples, dtype=np.float64):
    """Five patches: noise, two sines, a step and a constant, in model units (0.5 mV)."""
    generator, time = np.random.default_rng(0), np.arange(samples) / 300
    rows = [generator.normal(size=samples), 3 * np.sin(2 * np.pi * 7 * time), np.sin(2 * np.pi * 60 * time)]
    rows += [np.where(time < 0.4, 0.0, 10.0), np.full(samples, 2.0)]
    return np.stack(rows).astype(dtype)


@pytest.mark.parametrize("taps, name", [(DB6_LOW, "dec_lo"), (DB6_HIGH, "dec_hi")])
def test_the_taps_are_those_of_pywavelets(taps, name):
    np.testing.assert_allclose(taps, getattr(pywt.Wavelet("db6"), name), rtol=0, atol=1e-15)


@pytest.mark.filterwarnings("ignore:Level value")  # PyWavelets, where the patch is short for the filter
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("samples", [300, 301, 150, 75, 38, 24])
def test_every_band_agrees_with_pywavelets(samples, dtype, tolerance):
    x = patches_of(samples)
    found = wavelet_bands(torch.tensor(x, dtype=dtype), 4)
    expected = reference(x, 4)
    assert list(found) == ["A1", "D1", "A2", "D2", "A3", "D3", "A4", "D4"]
    for name, band in expected.items():
        assert found[name].dtype == dtype
        np.testing.assert_allclose(found[name].numpy(), band, rtol=1e-6, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("samples", [6, 3, 2])
def test_a_signal_shorter_than_the_filter_agrees_with_pywavelets(samples):
    x = np.random.default_rng(1).normal(size=samples)
    found = wavelet_bands(torch.tensor(x), 1)
    approximation, detail = pywt.dwt(x, "db6", mode="periodization")
    np.testing.assert_allclose(found["A1"].numpy(), approximation, atol=1e-12)
    np.testing.assert_allclose(found["D1"].numpy(), detail, atol=1e-12)


@pytest.mark.parametrize("shape", [(300,), (2, 300), (2, 3, 4, 300)])
def test_leading_axes_are_kept(shape):
    bands = wavelet_bands(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 4)
    assert {name: band.shape for name, band in bands.items()} == {
        name: torch.Size([*shape[:-1], length]) for name, length in band_lengths(300, 4).items()
    }


def test_patches_do_not_mix():
    x = torch.tensor(patches_of(300))
    together = wavelet_bands(x, 4)
    for i, patch in enumerate(x):
        for name, band in wavelet_bands(patch, 4).items():
            torch.testing.assert_close(together[name][i], band, atol=0, rtol=0)


def test_the_lengths_of_the_bands_are_halved_and_rounded_up():
    assert band_lengths(300, 4) == {"A1": 150, "D1": 150, "A2": 75, "D2": 75, "A3": 38, "D3": 38, "A4": 19, "D4": 19}


def test_the_transform_of_an_even_length_keeps_the_energy():
    x = torch.tensor(patches_of(304))
    bands = wavelet_bands(x, 4)
    energy = sum(bands[name].square().sum(-1) for name in ("A4", "D4", "D3", "D2", "D1"))
    torch.testing.assert_close(energy, x.square().sum(-1))


def test_gradients_are_those_of_a_linear_map():
    x = torch.randn(2, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: tuple(wavelet_bands(value, 2).values()), (x,))
