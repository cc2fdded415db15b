"""The rhythm quantizer: encode, decode, forward; each loss against NumPy and PyWavelets in float64; training state."""

import inspect
import multiprocessing
from datetime import timedelta

import numpy as np
import pytest
import torch
from model_cases import (
    NUM_CODES,
    PATCH_SIZE,
    QUANTIZER,
    add_targets,
    assert_same_state,
    make_batch,
    make_model,
    spread_codes,
    state_of,
)
from torch import distributed
from transformers import AutoModel

from anyecg_hf.modeling_anyecg_quantizer import AnyECGRhythmQuantizer

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LOSSES = ["loss_morphology", "loss_frequency", "loss_demography", "loss_codebook", "loss_commitment"]


def uneven_batch(num_records=3):
    batch = make_batch(num_records, 3, 4)
    batch["attention_mask"][0, 1, 2] = 0
    batch["attention_mask"][1, :, 3] = 0
    batch["lead_ids"][-1, 2] = 0
    batch["attention_mask"][-1, 2] = 0
    return batch


# encode, decode, forward


def test_forward_gives_the_codes_of_encode():
    model, batch = make_model(QUANTIZER), uneven_batch()
    codes = spread_codes(model, batch)(**batch).rhythm_codes
    assert codes.dtype == torch.int64 and codes.shape == (3, 3, 4)
    assert torch.equal(codes, model.encode(**batch))
    assert len(codes.unique()) > 5


def test_decoding_the_codes_gives_the_reconstruction_of_forward():
    model, batch = make_model(QUANTIZER), uneven_batch()
    outputs = spread_codes(model, batch)(**batch)
    decoded = model.decode(outputs.rhythm_codes, batch["lead_ids"], batch["attention_mask"])
    torch.testing.assert_close(decoded, outputs.reconstruction, **TOLERANCE)
    assert decoded.shape == batch["input_values"].shape and decoded.dtype == torch.float32


def test_decoding_needs_no_mask_because_the_codes_say_what_is_absent():
    model, batch = make_model(QUANTIZER), uneven_batch()
    codes = spread_codes(model, batch).encode(**batch)
    with_mask = model.decode(codes, batch["lead_ids"], batch["attention_mask"])
    assert torch.equal(model.decode(codes, batch["lead_ids"]), with_mask)


def test_masked_patches_have_the_code_minus_100_and_only_they():
    batch = uneven_batch()
    codes = make_model(QUANTIZER).encode(**batch)
    assert torch.equal(codes == -100, batch["attention_mask"] == 0)
    assert codes.max() < NUM_CODES and codes[codes != -100].min() >= 0


def test_a_row_with_lead_id_0_has_no_codes():
    batch = make_batch(1, 3, 2)
    batch["lead_ids"][0, 1] = 0
    codes = make_model(QUANTIZER).encode(**batch)
    assert (codes[0, 1] == -100).all() and (codes[0, [0, 2]] >= 0).all()


def test_absent_patches_decode_to_zero_and_do_not_disturb_the_others():
    model, batch = make_model(QUANTIZER), make_batch(1, 3, 4)
    codes = model.encode(**batch)
    some = codes.clone()
    some[:, 1] = -100
    decoded = model.decode(some, batch["lead_ids"])
    assert (decoded[:, 1] == 0).all() and (decoded[:, 0] != 0).any()
    torch.testing.assert_close(
        decoded[:, [0, 2]], model.decode(codes[:, [0, 2]], batch["lead_ids"][:, [0, 2]]), **TOLERANCE
    )


def test_encode_and_decode_keep_no_graph():
    model, batch = make_model(QUANTIZER), make_batch()
    assert not model.decode(model.encode(**batch), batch["lead_ids"]).requires_grad


@pytest.mark.parametrize("code", [NUM_CODES, 1023, -1, -99])
def test_codes_of_another_quantizer_are_an_error(code):
    codes = torch.zeros(1, 2, 3, dtype=torch.int64)
    codes[0, 1, 1] = code
    with pytest.raises(ValueError, match=f"0 to {NUM_CODES - 1}.*another quantizer"):
        make_model(QUANTIZER).decode(codes, torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    "codes, lead_ids, attention_mask",
    [
        ((1, 2, 17), (1, 2), None),  # longer than max_patches
        ((1, 2, 3), (1, 1), None),
        ((1, 2, 3), (1, 3), None),
        ((1, 2, 3), (1, 2), (1, 1, 3)),
        ((1, 2, 3), (1, 2), (1, 2, 900)),
        ((2, 3), (1, 2), None),
    ],
)
def test_decoding_shapes_that_do_not_fit_is_an_error(codes, lead_ids, attention_mask):
    mask = None if attention_mask is None else torch.ones(attention_mask, dtype=torch.int64)
    with pytest.raises(ValueError):
        make_model(QUANTIZER).decode(
            torch.zeros(codes, dtype=torch.int64), torch.ones(lead_ids, dtype=torch.int64), mask
        )


def test_half_precision_gives_nearly_all_patches_the_same_codes(tmp_path):
    model, batch = make_model(QUANTIZER), make_batch(4, 3, 4)
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (half.encode(**batch) == model.encode(**batch)).float().mean() > 0.9
    assert half.decode(model.encode(**batch), batch["lead_ids"]).isfinite().all()


# Losses


@pytest.fixture
def seen():
    """A batch run once in eval mode: model, batch, outputs, outputs of the parts that the losses are made of."""
    model, batch = make_model(QUANTIZER), add_targets(QUANTIZER, uneven_batch())
    batch["age"][1], batch["weight"][0] = float("nan"), float("nan")
    spread_codes(model, {name: batch[name] for name in ("input_values", "lead_ids", "attention_mask")})
    outputs_of = {}
    for name in ("to_code", "decoder", "morphology_head", "frequency_head", "demography_head"):
        model.get_submodule(name).register_forward_hook(lambda _, __, output, n=name: outputs_of.update({n: output}))
    with torch.no_grad():
        outputs = model(**batch)
    parts = {name: as_float64(getattr(value, "last_hidden_state", value)) for name, value in outputs_of.items()}
    return model, batch, outputs, parts, batch["attention_mask"].bool().numpy()


def as_float64(tensor):
    return tensor.detach().double().numpy()


def patches_in_model_units(batch):
    return as_float64(batch["input_values"]).reshape(*batch["attention_mask"].shape, PATCH_SIZE) / 0.5


def test_the_morphology_loss_is_the_mean_squared_error_of_the_real_patches(seen):
    _, batch, outputs, parts, real = seen
    expected = ((parts["morphology_head"] - patches_in_model_units(batch))[real] ** 2).mean()
    assert outputs.loss_morphology.item() == pytest.approx(expected, rel=1e-5)
    in_millivolt = as_float64(outputs.reconstruction).reshape(*real.shape, PATCH_SIZE)[real]
    np.testing.assert_allclose(in_millivolt, 0.5 * parts["morphology_head"][real], atol=1e-5)


def test_the_frequency_loss_is_the_mean_squared_error_of_the_scaled_wavelet_bands(seen):
    pywt = pytest.importorskip("pywt")
    model, batch, outputs, parts, real = seen
    patches, columns = patches_in_model_units(batch)[real], []
    for i, band in enumerate(model.config.wavelet_bands):
        level = int(band[1])
        decomposition = pywt.wavedec(patches, "db6", mode="periodization", level=level)
        coefficients = decomposition[0] if band[0] == "A" else decomposition[1]
        columns.append((coefficients - model.band_mean[i].item()) / model.band_std[i].item())
    target = np.concatenate(columns, axis=-1)
    assert target.shape[-1] == parts["frequency_head"].shape[-1] == 75 + 38 + 19 + 19
    expected = ((parts["frequency_head"][real] - target) ** 2).mean()
    assert outputs.loss_frequency.item() == pytest.approx(expected, rel=1e-5)


def test_every_wavelet_band_can_be_asked_for():
    pywt = pytest.importorskip("pywt")
    bands = ["A1", "D1", "A2", "D2", "A3", "D3", "A4", "D4"]
    model = make_model(QUANTIZER, wavelet_bands=bands)
    with torch.no_grad():
        model.band_mean.zero_()
        model.band_std.fill_(1)
    patches = torch.randn(5, PATCH_SIZE, generator=torch.Generator().manual_seed(0))
    expected = []
    for band in bands:
        approximation, detail, *_ = pywt.wavedec(
            patches.double().numpy(), "db6", mode="periodization", level=int(band[1])
        )
        expected.append(approximation if band[0] == "A" else detail)
    np.testing.assert_allclose(model.frequency_target(patches).numpy(), np.concatenate(expected, -1), atol=1e-5)


def test_the_demography_loss_leaves_out_what_is_unknown(seen):
    _, batch, outputs, parts, real = seen
    states, predictions = parts["decoder"], parts["demography_head"]
    assert states.shape[:3] == real.shape and predictions.shape == (3, 3)
    losses = []
    for i, (name, center, spread) in enumerate([("age", 60, 20), ("sex", None, None), ("weight", 75, 20)]):
        value, prediction = as_float64(batch[name]), predictions[:, i]
        known = np.isfinite(value)
        if name == "sex":
            probability = 1 / (1 + np.exp(-prediction))
            loss = -np.where(value == 1, np.log(probability), np.log(1 - probability))
        else:
            error = np.abs(prediction - (value - center) / spread)
            loss = np.where(error < 1, 0.5 * error**2, error - 0.5)
        losses.append(loss[known].mean())
    assert outputs.loss_demography.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_demography_is_predicted_from_the_mean_of_the_real_patches(seen):
    model, _, _, parts, real = seen
    for i in range(3):
        mean = torch.tensor(parts["decoder"][i][real[i]].mean(0), dtype=torch.float32)
        expected = model.demography_head(mean).detach().numpy()
        np.testing.assert_allclose(parts["demography_head"][i], expected, atol=1e-5)


def test_codebook_and_commitment_loss_are_mean_squared_distances_of_unit_vectors(seen):
    model, _, outputs, parts, real = seen
    vectors, codebook = parts["to_code"][real], as_float64(model.vector_quantizer.codebook)
    vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    codebook = codebook / np.linalg.norm(codebook, axis=-1, keepdims=True)
    distances = ((vectors[:, None] - codebook[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(outputs.rhythm_codes.numpy()[real], distances.argmin(-1))
    expected = distances.min(-1).mean()
    assert outputs.loss_codebook.item() == pytest.approx(expected, rel=1e-4)
    assert outputs.loss_commitment.item() == pytest.approx(expected, rel=1e-4)


def test_usage_and_perplexity_are_those_of_the_real_patches(seen):
    _, _, outputs, _, real = seen
    counts = np.bincount(outputs.rhythm_codes.numpy()[real], minlength=NUM_CODES)
    shares = counts[counts > 0] / counts.sum()
    assert outputs.usage.item() == pytest.approx((counts > 0).mean())
    assert outputs.perplexity.item() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_the_loss_is_the_weighted_sum_of_the_five(update):
    weights = {"morphology_weight": 2.0, "frequency_weight": 3.0, "demography_weight": 5.0, "commitment_weight": 7.0}
    model = make_model(QUANTIZER, codebook_update=update, **weights)
    outputs = model(**add_targets(QUANTIZER, uneven_batch()))
    factors = [2.0, 3.0, 5.0, 1.0 if update == "gradient" else 0.0, 7.0]
    expected = sum(factor * outputs[name].item() for factor, name in zip(factors, LOSSES))
    assert all(outputs[name].item() > 0 for name in LOSSES)
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "given", [{}, {"age": [float("nan")] * 3}, {"age": [float("nan")] * 3, "sex": [float("nan")] * 3}]
)
def test_without_any_known_demography_its_loss_is_zero_and_can_be_differentiated(given):
    model = make_model(QUANTIZER)
    outputs = model(**uneven_batch(), **{name: torch.tensor(value) for name, value in given.items()})
    assert outputs.loss_demography.item() == 0
    outputs.loss.backward()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


def test_unknown_demography_gives_finite_gradients():
    model, batch = make_model(QUANTIZER), add_targets(QUANTIZER, uneven_batch())
    batch["age"][1] = float("nan")
    model(**batch).loss.backward()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


def test_only_the_configured_demography_is_predicted():
    model = make_model(QUANTIZER, demography=["sex"])
    batch = add_targets(QUANTIZER, uneven_batch())
    other = {**batch, "age": batch["age"] + 30}
    assert model.demography_head[-1].out_features == 1
    assert torch.equal(model(**other).loss_demography, model(**batch).loss_demography)


def test_the_band_statistics_are_those_of_the_real_patches():
    pywt = pytest.importorskip("pywt")
    model, batch = make_model(QUANTIZER), uneven_batch()
    model.fit_band_statistics(batch["input_values"], batch["attention_mask"])
    patches = patches_in_model_units(batch)[batch["attention_mask"].bool().numpy()]
    for i, band in enumerate(model.config.wavelet_bands):
        decomposition = pywt.wavedec(patches, "db6", mode="periodization", level=int(band[1]))
        coefficients = decomposition[0] if band[0] == "A" else decomposition[1]
        assert model.band_mean[i].item() == pytest.approx(coefficients.mean(), abs=1e-5)
        assert model.band_std[i].item() == pytest.approx(coefficients.std(ddof=1), rel=1e-4)


def test_the_band_statistics_need_no_mask():
    model, batch = make_model(QUANTIZER), make_batch()
    model.fit_band_statistics(batch["input_values"])
    found = model.band_std.clone()
    model.fit_band_statistics(batch["input_values"], batch["attention_mask"])
    assert torch.equal(model.band_std, found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")
@pytest.mark.parametrize("with_mask", [True, False])
def test_the_band_statistics_are_fitted_on_the_accelerator(with_mask):
    model, batch = make_model(QUANTIZER), make_batch()
    model.fit_band_statistics(batch["input_values"])
    expected = model.band_std.clone()
    mask = batch["attention_mask"].to("cuda") if with_mask else None
    model.to("cuda").fit_band_statistics(batch["input_values"].to("cuda"), mask)
    torch.testing.assert_close(model.band_std.cpu(), expected)


# Training state


def training_step(model, batch):
    torch.manual_seed(11)
    return model(**batch)


def test_a_training_step_moves_the_codebook_by_its_moving_average():
    model, batch = make_model(QUANTIZER, ema_decay=0.9), uneven_batch()
    spread_codes(model, batch)
    noise = torch.randn(batch["input_values"].shape, generator=torch.Generator().manual_seed(1))
    batch["input_values"] = batch["input_values"] + 0.2 * noise  # k-means may have converged on the batch as it was
    before = state_of(model.vector_quantizer)
    codes = training_step(model.train(), batch).rhythm_codes
    after = state_of(model.vector_quantizer)
    used = torch.zeros(NUM_CODES).bool().index_fill_(0, codes[codes >= 0].unique(), True)
    counts = torch.bincount(codes[codes >= 0], minlength=NUM_CODES)
    torch.testing.assert_close(
        after["code_share"], 0.9 * before["code_share"] + 0.1 * counts / counts.sum(), **TOLERANCE
    )
    assert torch.equal(after["codebook"][~used], before["codebook"][~used])
    assert (after["codebook"] - before["codebook"])[used].abs().amax(-1).gt(1e-4).all()


def test_eval_mode_changes_no_state():
    model, batch = make_model(QUANTIZER, dead_code_steps=1), uneven_batch()
    before = state_of(model)
    model(**batch)
    model.encode(**batch)
    assert_same_state(model, before)


def test_encoding_in_training_mode_changes_no_state():
    model, batch = make_model(QUANTIZER, dead_code_steps=1).train(), uneven_batch()
    before = state_of(model)
    model.encode(**batch)
    assert_same_state(model, before)


def test_masked_patches_do_not_enter_the_codebook():
    states = []
    for content in (0.0, 1e6, float("nan")):
        model, batch = make_model(QUANTIZER).train(), uneven_batch()
        patches = batch["input_values"].view(3, 3, 4, PATCH_SIZE)
        patches[batch["attention_mask"] == 0] = content
        training_step(model, {**batch, "input_values": patches.flatten(2)})
        states.append(state_of(model))
    assert_same_state(states[1], states[0])
    assert_same_state(states[2], states[0])


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_quantizer_learns_a_handful_of_records(update):
    model = make_model(QUANTIZER, codebook_update=update, initializer_range=0.02, layer_scale_init=0.1)
    batch = add_targets(QUANTIZER, uneven_batch())
    batch["input_values"] = 5 * torch.nn.functional.avg_pool1d(batch["input_values"], 61, stride=1, padding=30)
    model.train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(45):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_the_training_state_is_saved_and_training_goes_on_as_if_never_stopped(tmp_path):
    model, batch = make_model(QUANTIZER, ema_decay=0.5, dead_code_steps=3, dead_code_share=0.5).train(), uneven_batch()
    for _ in range(4):
        training_step(model, batch)
    assert model.vector_quantizer.num_restarts > 0 and (model.vector_quantizer.code_share != 1 / NUM_CODES).any()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_same_state(loaded, model)
    for twin in (model, loaded.train()):
        for _ in range(3):
            training_step(twin, batch)
    assert_same_state(loaded, model)


def test_a_quantizer_saved_in_half_precision_keeps_its_counters(tmp_path):
    model = make_model(QUANTIZER, ema_decay=0.5, dead_code_share=0.5).train()
    for _ in range(3):
        training_step(model, uneven_batch())
    model.save_pretrained(tmp_path / "first")
    AutoModel.from_pretrained(tmp_path / "first", dtype=torch.bfloat16).save_pretrained(tmp_path / "second")
    loaded = AutoModel.from_pretrained(tmp_path / "second")
    for name in ("codebook", "code_share", "steps_unused", "num_restarts"):
        found, expected = (state_of(each.vector_quantizer)[name] for each in (loaded, model))
        assert found.dtype == expected.dtype and torch.equal(found, expected), name
    assert loaded.dtype == torch.bfloat16


def test_the_quantizer_takes_its_own_configuration_class():
    assert AnyECGRhythmQuantizer.config_class.model_type == "anyecg_quantizer"


def test_the_trainer_can_tell_that_the_quantizer_needs_no_labels_for_its_loss():
    """The library asks for a parameter `return_loss` whose default is True; without it `evaluate` gives no loss."""
    assert inspect.signature(AnyECGRhythmQuantizer.forward).parameters["return_loss"].default is True


# Two processes


def training_run(path, case, rank=None):
    """Train four steps on every second of four records (`rank` None: on all) and write the codebook's state."""
    restarts = {"dead_code_steps": 2, "dead_code_share": 0.5} if case == "restarts" else {}
    model = make_model(QUANTIZER, ema_decay=0.5, **restarts).train()
    rows = slice(rank, None, None if rank is None else 2)
    for step in range(4):
        batch = {name: value[rows] for name, value in make_batch(4, 2, 3, seed=step).items()}
        if case == "nothing in one" and rank == 1:
            batch["attention_mask"][:] = 0
        model(**batch)
    torch.save(model.vector_quantizer.state_dict(), path)


def process_main(rank, folder, case):
    torch.set_num_threads(1)  # forked: the parent's threads are not there
    meeting_place = f"file://{folder}/meeting place of {case}"
    distributed.init_process_group(
        "gloo", init_method=meeting_place, rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    torch.manual_seed(rank)  # each process has random numbers of its own
    training_run(folder / f"{rank}.pt", case, rank)
    distributed.destroy_process_group()


def run_in_two_processes(folder, case):
    """Return the codebook's state in each of two processes; forked, as data loaders are: nothing is imported again."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process_main, args=(rank, folder, case)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_keep_the_codebook_of_one_with_the_whole_batch(tmp_path):
    training_run(tmp_path / "alone.pt", "plain")
    alone = torch.load(tmp_path / "alone.pt")
    for state in run_in_two_processes(tmp_path, "plain"):
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, atol=1e-6, rtol=1e-5)


def test_two_processes_restart_the_same_codes_on_the_same_vectors(tmp_path):
    first, second = run_in_two_processes(tmp_path, "restarts")
    assert first["num_restarts"] > 0
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_process_without_a_real_patch_does_not_stop_the_other(tmp_path):
    first, second = run_in_two_processes(tmp_path, "nothing in one")
    assert all(torch.equal(first[name], second[name]) for name in first)
