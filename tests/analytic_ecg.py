"""An ECG given by formulas, so that it can be sampled at any rate without a resampler: for tests only."""

import numpy as np

WAVES = ((-0.20, 0.025, 0.12), (-0.03, 0.010, -0.10), (0.0, 0.011, 1.1), (0.03, 0.012, -0.25), (0.28, 0.055, 0.30))
STANDARD = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")


def analytic_ecg(sampling_rate=500.0, seconds=10.0, num_leads=12, beat_seconds=0.83):
    """Return float64 `(num_leads, num_samples)` in mV: P, Q, R, S, T as Gaussians, other amplitudes in each lead."""
    time = np.arange(round(seconds * sampling_rate)) / sampling_rate
    lead = np.zeros((num_leads, time.size))
    for beat in np.arange(0.4, seconds + 1, beat_seconds):
        for number, (place, width, height) in enumerate(WAVES):
            wave = np.exp(-0.5 * ((time - beat - place) / width) ** 2)
            lead += height * (0.5 + 0.1 * np.cos(np.arange(num_leads) * (number + 1)))[:, None] * wave
    signs = np.where(np.arange(num_leads) == 3, -1.0, 1.0)[:, None]
    return signs * lead


def four_source_ecg(seed=0, samples=900):
    """Return twelve leads of four sources in which Einthoven's law holds, float32 millivolt."""
    generator = np.random.default_rng(seed)
    sources = np.cumsum(generator.normal(size=(4, samples)), axis=1) * 0.05
    chest = generator.normal(size=(6, 4)) @ sources + 0.02 * generator.normal(size=(6, samples))
    one, two = sources[0], sources[1]
    limbs = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    return np.concatenate([limbs, chest]).astype(np.float32)
