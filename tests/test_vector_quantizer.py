"""The codebook alone: lookup, losses, averages, k-means, dead codes, statistics; references in NumPy, float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from anyecg_hf.vector_quantizer import CosineVectorQuantizer, code_statistics


def make_quantizer(size=6, dim=4, seed=0, **options):
    options = {"update": "ema", "ema_decay": 0.9, "dead_code_share": 0.1, "dead_code_steps": 1000, **options}
    quantizer = CosineVectorQuantizer(size, dim, **options)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)))
    return quantizer


def some_vectors(*shape, seed=1):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(x):
    x = np.asarray(x.detach() if torch.is_tensor(x) else x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nearest(vectors, codebook):
    """The definition: the code whose direction is nearest to the vector's direction, in loops."""
    return [
        int(np.argmin([np.linalg.norm(v - c) for c in unit(codebook)]))
        for v in unit(vectors).reshape(-1, len(codebook[0]))
    ]


# Lookup


def test_the_code_is_the_nearest_direction():
    quantizer, vectors = make_quantizer(), some_vectors(2, 3, 5, 4)
    assert quantizer.lookup(vectors).flatten().tolist() == nearest(vectors, quantizer.codebook)


def test_the_length_of_a_vector_and_of_a_code_does_not_matter():
    quantizer, vectors = make_quantizer(), some_vectors(40, 4)
    codes = quantizer.lookup(vectors)
    with torch.no_grad():
        quantizer.codebook.mul_(torch.arange(1.0, 7.0)[:, None])
    assert torch.equal(quantizer.lookup(0.01 * vectors), codes)


def test_embedded_codes_are_unit_vectors_and_are_their_own_codes():
    quantizer, codes = make_quantizer(), torch.arange(6).view(2, 3)
    vectors = quantizer.embed(codes)
    np.testing.assert_allclose(vectors.detach().numpy(), unit(quantizer.codebook)[codes.numpy()], atol=1e-6)
    assert torch.equal(quantizer.lookup(vectors), codes)


def test_forward_gives_the_codes_of_lookup_and_the_vectors_of_embed():
    quantizer, vectors = make_quantizer().eval(), some_vectors(2, 7, 4)
    quantized, codes, _, _ = quantizer(vectors, torch.ones(2, 7, dtype=torch.bool))
    assert torch.equal(codes, quantizer.lookup(vectors))
    torch.testing.assert_close(quantized, quantizer.embed(codes), atol=1e-6, rtol=0)


def test_vectors_that_do_not_count_get_the_code_minus_100():
    valid = torch.tensor([[True, False, True]])
    _, codes, _, _ = make_quantizer().eval()(some_vectors(1, 3, 4), valid)
    assert ((codes == -100) == ~valid).all()


def test_half_precision_vectors_get_the_codes_of_their_own_values():
    quantizer, vectors = make_quantizer(), some_vectors(200, 4).bfloat16()
    assert quantizer.lookup(vectors).tolist() == nearest(vectors.float(), quantizer.codebook)


def test_autocast_does_not_coarsen_the_lookup():
    """Mixed-precision training must see the codes that inference sees."""
    quantizer, vectors = make_quantizer(size=256, dim=8), some_vectors(2000, 8)
    expected = quantizer.lookup(vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantizer.lookup(vectors)
    assert torch.equal(found, expected)


# Losses and gradients


def test_codebook_and_commitment_loss_are_mean_squared_distances_on_the_sphere():
    quantizer, vectors = make_quantizer().eval(), some_vectors(2, 5, 4)
    valid = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool()
    _, codes, codebook_loss, commitment_loss = quantizer(vectors, valid)
    distance = unit(vectors[valid]) - unit(quantizer.codebook)[codes[valid].numpy()]
    expected = (distance**2).sum(-1).mean()
    assert codebook_loss.item() == pytest.approx(expected, rel=1e-5)
    assert commitment_loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_commitment_loss_pulls_the_vectors_and_the_codebook_loss_the_codes():
    quantizer, vectors = make_quantizer(update="gradient").eval(), some_vectors(9, 4).requires_grad_()
    _, _, codebook_loss, commitment_loss = quantizer(vectors, torch.ones(9, dtype=torch.bool))
    to_vectors, to_codes = torch.autograd.grad(
        commitment_loss, (vectors, quantizer.codebook), allow_unused=True, retain_graph=True
    )
    assert (to_vectors != 0).any() and to_codes is None
    to_vectors, to_codes = torch.autograd.grad(codebook_loss, (vectors, quantizer.codebook), allow_unused=True)
    assert to_vectors is None and (to_codes != 0).any()


def test_the_gradient_of_the_quantised_vectors_passes_straight_through():
    quantizer, vectors = make_quantizer().eval(), some_vectors(9, 4).requires_grad_()
    weights = some_vectors(9, 4, seed=5)
    quantized, _, _, _ = quantizer(vectors, torch.ones(9, dtype=torch.bool))
    (found,) = torch.autograd.grad((quantized * weights).sum(), vectors)
    (expected,) = torch.autograd.grad((nn.functional.normalize(vectors, dim=-1) * weights).sum(), vectors)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_training_step_can_be_differentiated(update):
    quantizer, vectors = make_quantizer(update=update).train(), some_vectors(30, 4).requires_grad_()
    quantized, _, codebook_loss, commitment_loss = quantizer(vectors, torch.ones(30, dtype=torch.bool))
    loss = quantized.square().sum() + commitment_loss + (codebook_loss if update == "gradient" else 0)
    loss.backward()
    assert vectors.grad.isfinite().all()
    assert (quantizer.codebook.grad is not None) == (update == "gradient")


def test_the_gradient_of_the_codebook_is_that_of_its_loss():
    """By finite differences in float64 on the directions; the codes stay the same."""
    quantizer, vectors = make_quantizer(update="gradient").train(), some_vectors(30, 4)
    codes = np.array(nearest(vectors, quantizer.codebook))
    before = quantizer.codebook.detach().double().numpy().copy()

    def loss(codebook):
        return ((unit(vectors) - unit(codebook)[codes]) ** 2).sum(-1).mean()

    quantizer(vectors, torch.ones(30, dtype=torch.bool))[2].backward()
    expected = np.zeros_like(before)
    for place in np.ndindex(before.shape):
        step = np.zeros_like(before)
        step[place] = 1e-6
        expected[place] = (loss(before + step) - loss(before - step)) / 2e-6
    np.testing.assert_allclose(quantizer.codebook.grad.numpy(), expected, atol=1e-5)


# Moving averages


def ema_step(codebook, share, vectors, decay):
    """One step of the moving averages in float64: `(codebook, share)`."""
    codes, directions = np.array(nearest(vectors, codebook)), unit(vectors)
    codebook, counts = np.array(codebook, dtype=np.float64), np.bincount(codes, minlength=len(codebook))
    for code in np.flatnonzero(counts):
        target = unit(directions[codes == code].sum(0))
        codebook[code] = unit(decay * codebook[code] + (1 - decay) * target)
    return codebook, decay * share + (1 - decay) * counts / counts.sum()


def test_moving_averages_follow_their_definition_over_several_steps():
    quantizer = make_quantizer(ema_decay=0.9).train()
    codebook, share = quantizer.codebook.detach().double().numpy(), np.full(6, 1 / 6)
    for step in range(5):
        vectors = some_vectors(20, 4, seed=step)
        codebook, share = ema_step(codebook, share, vectors, 0.9)
        quantizer(vectors, torch.ones(20, dtype=torch.bool))
        np.testing.assert_allclose(quantizer.codebook.detach().numpy(), codebook, atol=1e-5)
        np.testing.assert_allclose(quantizer.code_share.numpy(), share, atol=1e-6)


def test_a_code_that_nothing_fell_to_stays_where_it_is():
    quantizer, vectors = make_quantizer(size=40).train(), some_vectors(10, 4)
    before, used = quantizer.codebook.detach().clone(), quantizer.lookup(vectors).unique()
    quantizer(vectors, torch.ones(10, dtype=torch.bool))
    unused = torch.ones(40).bool().index_fill_(0, used, False)
    assert torch.equal(quantizer.codebook[unused], before[unused])
    assert (quantizer.codebook[used] != before[used]).any(-1).all()


def test_vectors_that_do_not_count_do_not_move_the_codebook():
    valid = torch.arange(20) % 3 != 0
    vectors, states = some_vectors(20, 4), []
    for garbage in (1.0, -50.0):
        quantizer = make_quantizer().train()
        quantizer(torch.where(valid[:, None], vectors, torch.full_like(vectors, garbage)), valid)
        states.append(quantizer.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_nothing_moves_in_eval_mode():
    quantizer = make_quantizer(dead_code_steps=1).eval()
    before = copy.deepcopy(quantizer.state_dict())
    quantizer(some_vectors(20, 4), torch.ones(20, dtype=torch.bool))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_with_the_gradient_update_the_codebook_moves_by_the_optimiser_only():
    quantizer = make_quantizer(update="gradient").train()
    before = quantizer.codebook.detach().clone()
    quantizer(some_vectors(20, 4), torch.ones(20, dtype=torch.bool))
    assert torch.equal(quantizer.codebook, before)
    assert quantizer.codebook.requires_grad and not make_quantizer(update="ema").codebook.requires_grad


def test_a_batch_in_which_nothing_counts_changes_nothing():
    quantizer = make_quantizer().train()
    before = copy.deepcopy(quantizer.state_dict())
    quantized, codes, codebook_loss, commitment_loss = quantizer(some_vectors(5, 4), torch.zeros(5, dtype=torch.bool))
    assert (codes == -100).all() and codebook_loss == 0 and commitment_loss == 0 and quantized.isfinite().all()
    assert [name for name, value in quantizer.state_dict().items() if not torch.equal(value, before[name])] == []


# Start by k-means


def clusters(num_clusters=6, per_cluster=30, dim=8):
    generator = torch.Generator().manual_seed(0)
    centers = nn.functional.normalize(torch.randn(num_clusters, dim, generator=generator), dim=-1)
    noise = 0.02 * torch.randn(num_clusters * per_cluster, dim, generator=generator)
    return centers, 5 * (centers.repeat_interleave(per_cluster, 0) + noise)


def test_k_means_puts_every_code_among_the_vectors():
    _, vectors = clusters()
    quantizer = make_quantizer(6, 8)
    quantizer.initialize(vectors, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(np.linalg.norm(quantizer.codebook.detach().numpy(), axis=-1), 1, atol=1e-5)
    assert (unit(vectors) @ unit(quantizer.codebook).T).max(0).min() > 0.9


def test_k_means_ends_where_every_code_is_the_mean_direction_of_its_vectors():
    _, vectors = clusters()
    quantizer = make_quantizer(6, 8)
    quantizer.initialize(vectors, generator=torch.Generator().manual_seed(3), num_iterations=50)
    codes, directions = quantizer.lookup(vectors).numpy(), unit(vectors)
    for code in np.unique(codes):
        expected = unit(directions[codes == code].sum(0))
        np.testing.assert_allclose(quantizer.codebook[code].detach().numpy(), expected, atol=1e-5)


def test_k_means_lowers_the_distance_of_a_random_codebook():
    vectors = some_vectors(500, 4)
    quantizer = make_quantizer(16)
    before = 1 - (unit(vectors) @ unit(quantizer.codebook).T).max(-1).mean()
    quantizer.initialize(vectors, generator=torch.Generator().manual_seed(0))
    after = 1 - (unit(vectors) @ unit(quantizer.codebook).T).max(-1).mean()
    assert after < 0.8 * before


def test_k_means_sets_the_shares_and_forgets_what_was_unused():
    vectors = some_vectors(500, 4)
    quantizer = make_quantizer(16)
    quantizer.steps_unused.fill_(7)
    quantizer.initialize(vectors, generator=torch.Generator().manual_seed(0), num_iterations=30)
    shares = np.bincount(quantizer.lookup(vectors).numpy(), minlength=16) / 500
    np.testing.assert_allclose(quantizer.code_share.numpy(), shares, atol=0.02)
    assert quantizer.code_share.sum().item() == pytest.approx(1, abs=1e-6) and (quantizer.steps_unused == 0).all()


def test_k_means_depends_on_its_generator_alone():
    vectors, books = some_vectors(200, 4), []
    for seed in (1, 1, 2):
        torch.manual_seed(len(books))
        quantizer = make_quantizer(16)
        quantizer.initialize(vectors, generator=torch.Generator().manual_seed(seed))
        books.append(quantizer.codebook.detach().clone())
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])


def test_k_means_with_fewer_vectors_than_codes_is_an_error():
    with pytest.raises(ValueError, match="5 vectors cannot start 6 codes"):
        make_quantizer(6).initialize(some_vectors(5, 4), generator=torch.Generator())


# Dead codes


def narrow_batch(num=30):
    """Vectors around one direction: one code gets all of them."""
    return torch.tensor([1.0, 0, 0, 0]) + 0.001 * some_vectors(num, 4)


def test_a_code_out_of_use_is_moved_onto_a_vector_of_the_batch():
    quantizer = make_quantizer(6, ema_decay=0.5, dead_code_share=0.5, dead_code_steps=3).train()
    dead = torch.ones(6).bool().index_fill_(0, quantizer.lookup(narrow_batch()).unique(), False)
    before, valid = quantizer.codebook.detach().clone(), torch.ones(30, dtype=torch.bool)
    steps = 0
    while quantizer.num_restarts == 0:
        assert torch.equal(quantizer.codebook[dead], before[dead])
        quantizer(narrow_batch(), valid)
        steps += 1
        assert steps < 10
    assert quantizer.num_restarts == dead.sum() == 5
    assert steps == 4  # shares 1/12 (half of 1/6: not less), then 1/24, 1/48, 1/96: three steps in a row
    cosines = unit(quantizer.codebook[dead]) @ unit(narrow_batch()).T
    np.testing.assert_allclose(cosines.max(-1), 1, atol=1e-6)
    assert (quantizer.code_share[dead] == 1 / 6).all() and (quantizer.steps_unused[dead] == 0).all()


def test_a_code_that_comes_back_into_use_is_not_restarted():
    quantizer = make_quantizer(6, ema_decay=0.5, dead_code_share=0.5, dead_code_steps=3).train()
    everywhere = quantizer.codebook.detach().clone()
    for step in range(12):
        vectors = everywhere if step % 3 == 2 else narrow_batch(6)
        quantizer(vectors, torch.ones(6, dtype=torch.bool))
    assert quantizer.num_restarts == 0


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_codes_are_restarted_with_both_updates(update):
    quantizer = make_quantizer(6, update=update, ema_decay=0.5, dead_code_share=0.5, dead_code_steps=2).train()
    for _ in range(6):
        quantizer(narrow_batch(), torch.ones(30, dtype=torch.bool))
    assert quantizer.num_restarts > 0


# Statistics


@pytest.mark.parametrize("codes", [[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 5, 5, 2], [-100, 3, -100, 4, 4], [-100]])
def test_usage_and_perplexity_are_those_of_numpy(codes):
    usage, perplexity = code_statistics(torch.tensor(codes).view(1, -1), 8)
    kept = np.array([code for code in codes if code >= 0], dtype=int)
    shares = np.bincount(kept, minlength=8) / max(len(kept), 1)
    used = shares[shares > 0]
    assert usage.item() == pytest.approx(len(used) / 8)
    assert perplexity.item() == pytest.approx(np.exp(-(used * np.log(used)).sum()), rel=1e-5)


def test_usage_counts_large_batches_exactly():
    codes = torch.randint(0, 3, (400_000,), generator=torch.Generator().manual_seed(0))
    _, perplexity = code_statistics(codes, 3)
    shares = np.bincount(codes.numpy()) / len(codes)
    assert perplexity.item() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
