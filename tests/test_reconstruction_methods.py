"""training/reconstruction_methods.py: baselines against numpy, a head and codes against the models themselves."""

import numpy as np
import torch
from analytic_ecg import four_source_ecg
from tiny_checkpoints import tiny_model, tiny_quantizer

from anyecg_hf.modeling_anyecg import AnyECGForMaskedCodeModeling
from anyecg_hf.modeling_anyecg_heads import AnyECGForLeadReconstruction
from training.evaluate_reconstruction import Trial, as_batch
from training.reconstruction_methods import LEAST_SQUARES, baselines, by_codes, by_head

REAL = np.ones((12, 3), dtype=bool)


def test_least_squares_is_that_of_numpy_for_each_pattern_of_four_source_ecg():
    signal = four_source_ecg().astype(np.float64)
    method = baselines(signal @ signal.T / signal.shape[1])[LEAST_SQUARES]
    for case, seen in (("G1 V3", [0, 1, 6, 7, 9, 10, 11]), ("G2", [0, 1]), ("G3 V5", [0, 1, 10]), ("G4 II", [1])):
        trial = Trial.of_case(case, REAL, 300)
        found = method(as_batch([signal], [REAL], [trial]))[0]
        for row in np.flatnonzero(trial.scored):
            weights, *_ = np.linalg.lstsq(signal[seen].T, signal[row], rcond=None)
            np.testing.assert_allclose(found[row], weights @ signal[seen], atol=0.02 * np.ptp(signal[row]))


def test_the_nearest_lead_is_that_with_the_highest_correlation_among_those_seen():
    signal = four_source_ecg()
    covariance = np.eye(12)
    covariance[6, 7] = covariance[7, 6] = 0.9
    covariance[6, 1] = covariance[1, 6] = 0.5
    copy = baselines(covariance)["nearest lead copied"]
    alone, all_six = (copy(as_batch([signal], [REAL], [Trial.of_case(case, REAL, 300)]))[0] for case in ("G1 V1", "G2"))
    assert np.array_equal(alone[6], signal[7]) and np.array_equal(all_six[6], signal[1])


def test_a_head_gives_the_reconstruction_of_its_checkpoint(tmp_path):
    model = tiny_model(AnyECGForLeadReconstruction)
    model.save_pretrained(tmp_path)
    batch = as_batch([four_source_ecg()], [REAL], [Trial.of_case("G2", REAL, 300)])
    with torch.no_grad():
        expected = model(**batch).reconstruction
        np.testing.assert_allclose(by_head(str(tmp_path))(batch), expected, atol=1e-5)


def test_codes_do_not_see_what_is_hidden_and_are_decoded_by_the_quantizer(tmp_path):
    """The code of a hidden patch is the most probable one, those of seen patches are the quantizer's own."""
    model, quantizer = tiny_model(AnyECGForMaskedCodeModeling, codebook_size=64), tiny_quantizer()
    model.save_pretrained(tmp_path / "model")
    quantizer.save_pretrained(tmp_path / "quantizer")
    method = by_codes(str(tmp_path / "model"), str(tmp_path / "quantizer"))
    signal, trial = four_source_ecg(), Trial.of_case("G3 V2", REAL, 300)
    other = signal.copy()
    other[trial.scored] = 1.0
    with torch.no_grad():
        batch = as_batch([signal], [REAL], [trial])
        found = method(batch)
        assert np.array_equal(found, method(as_batch([other], [REAL], [trial])))
        codes = quantizer.encode(batch["input_values"], batch["lead_ids"], (~batch["bool_masked_pos"]).long())
        codes[batch["bool_masked_pos"]] = model(**batch).logits.argmax(-1)[batch["bool_masked_pos"]]
        np.testing.assert_allclose(found, quantizer.decode(codes, batch["lead_ids"]), atol=1e-5)
