"""Simulated 12-lead records, for demonstrations and tests: a heart dipole in three dimensions, seen from the leads.

The dipole is the model of McSharry, Clifford, Tarassenko, Smith ("A dynamical model for generating synthetic
electrocardiogram signals", IEEE Trans Biomed Eng 50:289-294, 2003), taken to three dimensions by Sameni, Clifford,
Jutten, Shamsollahi ("Multichannel ECG and Noise Modeling: Application to Maternal and Fetal ECG Signals", EURASIP J Adv
Signal Process 2007:43407). Each of Frank's components X (to the left), Y (to the feet), Z (to the back) is a sum of
Gaussians. The leads follow by the transform of Dower, Machado, Osborne (Clin Cardiol 3:87-95, 1980), except that III,
aVR, aVL and aVF are made from I and II.

Where this departs from the publications, and why:
- the Gaussians are laid out in seconds around each R wave, not in phase: a fast heart does not narrow its QRS;
- `WAVE_GAINS` and `FRONTAL_AXIS_DEGREES`: with the published values alone P is 0.05 mV in II, T 1.3 mV in V3 and the
  axis near 0 degrees; the changed ones give an adult's ordinary ECG;
- no published Gaussians were found for ventricular beats in these coordinates: `VENTRICULAR_GAUSSIANS` are ours.
"""

from dataclasses import dataclass
from numbers import Real

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.signal import firwin, oaconvolve

from .leads import FRANK_LEADS, STANDARD_LEADS, derive_limb_leads, resolve_lead_names
from .records import SIMULATED, Annotation, Record

RHYTHMS = {
    "sinus": "sinus",
    "atrial fibrillation": "atrial fibrillation",
    "af": "atrial fibrillation",
    "ventricular beats": "ventricular beats",
    "pvc": "ventricular beats",
}
DEFAULT_HEART_RATES = {"sinus": 70.0, "atrial fibrillation": 95.0, "ventricular beats": 70.0}

# Sameni et al. 2007, the adult heart; digits as in the authors' own toolbox (OSET, example of multichannel synthesis).
# (amplitude mV, width rad, place rad): one beat of one second is 2 pi, its R wave at 0.
DIPOLE_GAUSSIANS = {
    "X": (
        (0.03, 0.0906, -1.09),
        (0.08, 0.1057, -0.83),
        (-0.13, 0.0453, -0.19),
        (0.85, 0.0378, -0.07),
        (1.11, 0.0332, 0.0),
        (0.75, 0.0302, 0.06),
        (0.06, 0.0378, 0.22),
        (0.1, 0.6040, 1.2),
        (0.17, 0.3020, 1.42),
        (0.39, 0.1812, 1.68),
        (0.03, 0.5, 2.9),
    ),
    "Y": (
        (0.035, 0.07, -1.1),
        (0.015, 0.07, -0.9),
        (-0.019, 0.04, -0.76),
        (0.32, 0.055, -0.11),
        (0.51, 0.037, -0.01),
        (-0.32, 0.0604, 0.065),
        (0.04, 0.450, 0.8),
        (0.08, 0.3, 1.58),
        (0.014, 0.5, 2.9),
    ),
    "Z": (
        (-0.03, 0.03, -1.1),
        (-0.14, 0.12, -0.93),
        (-0.035, 0.04, -0.7),
        (0.045, 0.4, -0.4),
        (-0.4, 0.045, -0.15),
        (0.46, 0.05, 0.095),
        (-0.12, 0.8, 1.05),
        (-0.2, 0.4, 1.25),
        (-0.35, 0.2, 1.55),
        (-0.035, 0.4, 2.8),
    ),
}
# Ours: a beat from the right ventricle's outflow tract: QRS of 150 ms, as in left bundle branch block but with its axis
# to the feet, T opposite.
VENTRICULAR_GAUSSIANS = {
    "X": ((0.60, 0.16, -0.14), (0.75, 0.18, 0.22), (-0.40, 0.40, 1.80)),
    "Y": ((0.75, 0.18, -0.12), (0.55, 0.18, 0.20), (-0.40, 0.45, 1.75)),
    "Z": ((-0.15, 0.10, -0.29), (0.65, 0.20, 0.12), (-0.34, 0.40, 1.75)),
}
# Dower et al. 1980: I, II, V1-V6 of Frank's X, Y, Z. Digits as in Bailon, Laguna, Sornmo, chapter 8 of "Advanced
# Methods and Tools for ECG Data Analysis" (2006), and in two public implementations.
DOWER_TRANSFORM = {
    "I": (0.632, -0.235, 0.059),
    "II": (0.235, 1.066, -0.132),
    "V1": (-0.515, 0.157, -0.917),
    "V2": (0.044, 0.164, -1.387),
    "V3": (0.882, 0.098, -1.277),
    "V4": (1.213, 0.127, -0.601),
    "V5": (1.125, 0.127, -0.086),
    "V6": (0.831, 0.076, 0.230),
}
WAVE_GAINS = {"P": (1.3, 2.0, 0.7), "QRS": (1.0, 1.0, 1.0), "T": (0.75, 0.9, 0.42)}  # on X, Y, Z
FRONTAL_AXIS_DEGREES = 18.0  # the heart turned towards the feet; Sameni et al. have such a rotation too, of 0 degrees

# Exponents of the RR interval for a wave's place and width: T as in Fridericia's rule (QT ~ RR^(1/3)), PR hardly.
_RATE_EXPONENTS = {"P": (0.15, 0.0), "QRS": (0.0, 0.0), "T": (1 / 3, 1 / 3)}
_BASE_RATE = 1000.0  # Hz: everything is made at this rate, low-passed, and read off at the rate asked for
_MARGIN_SECONDS = 2.0  # made before and after what is returned, for the filters and the waves of neighbouring beats
_NOISE_BAND_HZ = 150.0  # an electrocardiograph's usual upper limit


@dataclass(frozen=True)
class SimulationOptions:
    """What may be chosen beside the seed; the keyword arguments of `simulate_record`.

    Args:
        rhythm (`str`): `"sinus"`; `"atrial fibrillation"` or `"af"` (no P, f waves, irregular); `"ventricular beats"`
            or `"pvc"` (sinus rhythm with early wide beats).
        heart_rate (`float`, *optional*): mean of the basic rhythm in beats a minute, 20 to 250; 70, fibrillation 95.
        heart_rate_variability (`float`, *optional*): standard deviation of the RR interval in seconds; 3 % of it,
            in fibrillation 22 %.
        ventricular_share (`float`): share of ventricular beats in that rhythm, 0.05 to 0.5.
        noise_mv (`float`): root mean square of white noise of 0 to 150 Hz, millivolt.
        baseline_wander_mv (`float`, *optional*): its amplitude, millivolt; four times `noise_mv`.
        mains_mv (`float`), mains_hz (`float`): amplitude and frequency of the hum.
        lead_names (sequence of `str`): any of the 12 leads and Frank's X, Y, Z, in any order; aliases are understood.
        duration_seconds (`float`): above zero.
        sampling_rate (`float`): Hz, 50 to 10,000; need not be an integer.

    Raises:
        ValueError: a value is outside its range, or a lead or rhythm is unknown.
    """

    rhythm: str = "sinus"
    heart_rate: float | None = None
    heart_rate_variability: float | None = None
    ventricular_share: float = 0.15
    noise_mv: float = 0.01
    baseline_wander_mv: float | None = None
    mains_mv: float = 0.0
    mains_hz: float = 50.0
    lead_names: tuple = STANDARD_LEADS
    duration_seconds: float = 10.0
    sampling_rate: float = 500.0

    def __post_init__(self):
        if self.rhythm not in RHYTHMS:
            known = ", ".join(map(repr, RHYTHMS))
            raise ValueError(f"rhythm={self.rhythm!r} cannot be simulated; choose one of {known}.")
        self._set(rhythm=RHYTHMS[self.rhythm], lead_names=tuple(resolve_lead_names(self.lead_names)))
        if not self.lead_names:
            raise ValueError("lead_names is empty; name at least one lead.")
        if self.heart_rate is None:
            self._set(heart_rate=DEFAULT_HEART_RATES[self.rhythm])
        self._check(heart_rate=(20, 250, "beats a minute"), noise_mv=(0, 5, "millivolt"))
        if self.heart_rate_variability is None:
            share = 0.22 if self.rhythm == "atrial fibrillation" else 0.03
            self._set(heart_rate_variability=share * 60 / self.heart_rate)
        if self.baseline_wander_mv is None:
            self._set(baseline_wander_mv=4 * self.noise_mv)
        self._check(
            heart_rate_variability=(0, 0.4 * 60 / self.heart_rate, "seconds at this heart rate"),
            ventricular_share=(0.05, 0.5, "of all beats"),
            baseline_wander_mv=(0, 20, "millivolt"),
            mains_mv=(0, 5, "millivolt"),
            mains_hz=(1, 100, "Hz"),
            duration_seconds=(0.01, 172_800, "seconds"),
            sampling_rate=(50, 10_000, "Hz"),
        )

    def _set(self, **values):
        for field, value in values.items():
            object.__setattr__(self, field, value)  # the class is frozen for everybody else

    def _check(self, **ranges):
        for field, (low, high, unit) in ranges.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{field}={value!r} is no number; pass {low:g} to {high:g} {unit}.")
            if not low <= value <= high:
                raise ValueError(f"{field}={value!r} cannot be simulated; pass {low:g} to {high:g} {unit}.")


def simulate_record(seed=0, **options):
    """Return a simulated record, marked as such.

    The same seed and options give the same record. Another sampling rate gives the same beats and the same noise, as
    far as the rate can show them; a longer duration only adds to the end; other noise leaves the beats where they are.

    Args:
        seed (`int`): not negative; chooses this heart's position, size and rhythm, and the noise.
        options: the fields of `SimulationOptions`.

    Returns:
        `Record`: `signal` float32 `(num_leads, round(duration_seconds * sampling_rate))` in millivolt, `record_name`
        `"simulated-<seed>"`, comments that begin with `"simulated"`, age and sex `None`. `annotations` as in the `.atr` files
        of MIT-BIH: the rhythm (`"(N"` or `"(AFIB"`), then each beat (`"N"` or `"V"`).

    Raises:
        TypeError: `seed` is no integer, or an option has another name.
        ValueError: an option is outside its range.

    Source: McSharry et al. 2003, Sameni et al. 2007, Dower et al. 1980; see the head of this file.

    >>> simulate_record(7, rhythm="atrial fibrillation", lead_names=["II", "V1"], sampling_rate=250).signal.shape
    (2, 2500)
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise TypeError(f"seed={seed!r}; pass an integer of at least 0.")
    options = SimulationOptions(**options)
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(int(seed)).spawn(4)]
    heart, rhythm, atrium, noise = streams  # apart, so that no choice moves the random numbers of another
    time = np.arange(-_MARGIN_SECONDS, options.duration_seconds + _MARGIN_SECONDS, 1 / _BASE_RATE)
    beats = _beats(options, rhythm)
    dipole = _dipole(time, beats, options, _Heart.draw(heart))
    if options.rhythm == "atrial fibrillation":
        dipole += _fibrillatory_waves(time, atrium)
    dipole = _low_pass(dipole, 0.45 * options.sampling_rate)
    return Record(
        signal=_see_from_leads(time, dipole, options, noise),
        sampling_rate=float(options.sampling_rate),
        lead_names=list(options.lead_names),
        record_name=f"simulated-{int(seed)}",
        annotations=_annotations(options, beats),
        comments=[SIMULATED, f"{options.rhythm}, {options.heart_rate:g} beats a minute, seed {int(seed)}"],
    )


def _annotations(options, beats):
    """Return the rhythm and the beats of a record as marks on it."""
    rhythm = "(AFIB" if options.rhythm == "atrial fibrillation" else "(N"
    num_samples = round(options.duration_seconds * options.sampling_rate)
    places = [(round(moment * options.sampling_rate), "V" if is_v else "N") for moment, is_v in beats]
    marks = [Annotation(sample, symbol) for sample, symbol in sorted(places) if 0 <= sample < num_samples]
    return [Annotation(0, "+", rhythm), *marks]


# ---- when the heart beats ------------------------------------------------------------------------------------------


def _beats(options, generator):
    """Return a list of (time of the R wave in seconds, is it ventricular), past both ends of the record."""
    end = options.duration_seconds + _MARGIN_SECONDS
    intervals = _rr_intervals(options, generator)
    if options.rhythm == "ventricular beats":
        return _with_ventricular_beats(intervals, end, options, generator)
    beats, now = [], -_MARGIN_SECONDS - 1.0
    while now < end:
        now += next(intervals)
        beats.append((now, False))
    return beats


def _rr_intervals(options, generator):
    """Yield RR intervals in seconds: irregular in fibrillation, else swinging with breath and blood pressure."""
    mean, spread = 60 / options.heart_rate, options.heart_rate_variability
    if options.rhythm == "atrial fibrillation":
        while True:  # gamma: independent, skewed to long pauses; the node lets nothing pass within 0.25 s
            shape = (mean / spread) ** 2 if spread else np.inf
            yield max(generator.gamma(shape, mean / shape), 0.25) if spread else mean
    phases = generator.uniform(0, 2 * np.pi, 2)
    now = 0.0
    while True:  # 0.1 Hz and 0.25 Hz as in McSharry et al. 2003; variances 0.4, 0.4 and 0.2
        waves = np.sin(2 * np.pi * np.array([0.1, 0.25]) * now + phases).sum()
        interval = mean + spread * (0.894 * waves + 0.447 * generator.standard_normal())
        now += max(interval, 0.5 * mean)
        yield max(interval, 0.5 * mean)


def _with_ventricular_beats(intervals, end, options, generator):
    """Return beats of which some come early and wide, each followed by a full compensatory pause."""
    usual_gap = 1 / options.ventricular_share - 1  # sinus beats between two ventricular ones
    now, beats, until_next = -_MARGIN_SECONDS - 1.0, [], None
    while now < end:
        interval = next(intervals)
        if until_next is None and now > 0:
            until_next = int(generator.integers(1, 4))  # soon after the start: the shortest record shows one
        if until_next == 0:
            beats.append((now + generator.uniform(0.55, 0.66) * interval, True))
            now += interval  # the sinus node keeps its time; the beat it now gives finds the chambers resting
            until_next = max(1, round(usual_gap + generator.uniform(-1, 1)))
            interval = next(intervals)
        now += interval
        beats.append((now, False))
        until_next = None if until_next is None else until_next - 1
    return beats


# ---- what a beat looks like ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heart:
    """How this heart lies and how large its waves are."""

    rotation: np.ndarray  # (3, 3)
    gains: dict  # wave -> factor

    @classmethod
    def draw(cls, generator):
        tilt, turn, axis = np.deg2rad(np.clip(generator.normal(0, [6, 6, 12]), -20, 20) + [0, 0, FRONTAL_AXIS_DEGREES])
        gains = {wave: float(generator.uniform(0.8, 1.25)) for wave in ("P", "QRS", "T")}
        return cls(_rotation("YZ", tilt) @ _rotation("XZ", turn) @ _rotation("XY", axis), gains)


def _rotation(plane, angle):
    """Return the (3, 3) rotation by `angle` (radians) that takes the first axis of `plane` towards the second."""
    first, second = ("XYZ".index(axis) for axis in plane)
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[second, first], matrix[first, second] = np.sin(angle), -np.sin(angle)
    return matrix


def _wave(place):
    """Return the wave that a Gaussian at `place` (radians) belongs to."""
    if place < -0.3:
        return "P"
    return "QRS" if place < 0.5 else "T"


def _dipole(time, beats, options, heart):
    """Return the dipole `(3, num_samples)` in millivolt at `time`: the sum over beats of their Gaussians."""
    dipole = np.zeros((3, time.size))
    normal = list(_gaussians(DIPOLE_GAUSSIANS, heart, 60 / options.heart_rate))
    if options.rhythm == "atrial fibrillation":
        normal = [gaussian for gaussian in normal if gaussian[3] != "P"]
    ventricular = list(_gaussians(VENTRICULAR_GAUSSIANS, heart, 60 / options.heart_rate))
    for moment, is_ventricular in beats:
        for vector, width, place, _ in ventricular if is_ventricular else normal:
            centre = moment + place
            first, last = np.searchsorted(time, [centre - 6 * width, centre + 6 * width])
            bump = np.exp(-0.5 * ((time[first:last] - centre) / width) ** 2)
            dipole[:, first:last] += vector[:, None] * bump
    return dipole


def _gaussians(table, heart, mean_rr):
    """Yield (vector (3,) in mV, width in seconds, place in seconds, wave) of a beat's Gaussians at that rate."""
    for axis, rows in enumerate(table.values()):
        for amplitude, width, place in rows:
            wave = _wave(place)
            gain = heart.gains[wave] * (WAVE_GAINS[wave][axis] if table is DIPOLE_GAUSSIANS else 1.0)
            place_stretch, width_stretch = (mean_rr**exponent for exponent in _RATE_EXPONENTS[wave])
            seconds = np.array([width * width_stretch, place * place_stretch]) / (2 * np.pi)
            yield heart.rotation[:, axis] * amplitude * gain, *seconds, wave


def _fibrillatory_waves(time, generator):
    """Return the dipole `(3, num_samples)` of fibrillating atria in millivolt, largest in V1 and II.

    Source: the sawtooth of Stridh, Sornmo (IEEE Trans Biomed Eng 48:105-111, 2001): three harmonics whose frequency and
    amplitude swing slowly. The direction, up from the floor of the right atrium, is ours.
    """
    frequency, size = generator.uniform(5.0, 7.5), generator.uniform(0.07, 0.11)  # Hz, mV
    phases = generator.uniform(0, 2 * np.pi, 3)
    turns = 2 * np.pi * time
    angle = frequency * turns + 1.2 * np.sin(0.2 * turns + phases[0])
    swing = size * (1 + 0.35 * np.sin(0.45 * turns + phases[1]) * np.sin(0.13 * turns + phases[2]))
    dipole = np.empty((3, time.size))
    for row, (share, lag) in enumerate([(-0.25, 0.5), (0.75, 0.0), (-0.80, 0.4)]):  # X, Y, Z
        dipole[row] = share * swing * sum(2 / (np.pi * k) * np.sin(k * (angle + lag)) for k in (1, 2, 3))
    return dipole


# ---- from the dipole to the leads ----------------------------------------------------------------------------------


def _see_from_leads(time, dipole, options, generator):
    """Return float32 `(num_leads, num_samples)`; limb leads from I and II: Einthoven's law holds with noise too."""
    views = DOWER_TRANSFORM | dict(zip(FRANK_LEADS, np.eye(3), strict=True))
    # one stream for each lead there is: its noise does not depend on which others are asked for
    streams = dict(zip(views, generator.spawn(len(views)), strict=True))
    derived = [name for name in options.lead_names if name not in views]
    rows = {}
    for name in dict.fromkeys((["I", "II"] if derived else []) + [n for n in options.lead_names if n in views]):
        row = views[name] @ dipole + _noise(time, options, streams[name])
        rows[name] = _read_off(time, row, options).astype(np.float32)
    if derived:
        signal, names = derive_limb_leads(np.stack([rows["I"], rows["II"]]), ["I", "II"])
        rows |= dict(zip(names, signal, strict=True))
    return np.stack([rows[name] for name in options.lead_names])


def _noise(time, options, generator):
    """Return one lead's noise `(num_samples,)` in millivolt."""
    white = generator.standard_normal(time.size) * np.sqrt(_BASE_RATE / 2 / _NOISE_BAND_HZ)  # 1 after the low pass
    noise = _low_pass(options.noise_mv * white, min(_NOISE_BAND_HZ, 0.45 * options.sampling_rate))
    # a stream of its own: how long the record is must not change it
    slow = generator.spawn(1)[0]
    frequencies = slow.uniform([0.05, 0.15, 0.22], [0.12, 0.22, 0.35])  # Hz: the electrode shifts, the chest breathes
    sizes, phases = slow.dirichlet([2, 2, 2]) * slow.uniform(0.5, 1), slow.uniform(0, 2 * np.pi, 4)
    for frequency, size, phase in zip(frequencies, sizes, phases, strict=False):
        noise += options.baseline_wander_mv * size * np.sin(2 * np.pi * frequency * time + phase)
    if options.mains_mv and options.mains_hz < 0.45 * options.sampling_rate:
        noise += options.mains_mv * np.sin(2 * np.pi * options.mains_hz * time + phases[3])
    return noise


def _low_pass(signal, cutoff_hz):
    """Return `signal` `(..., num_samples)` at the base rate without what lies above `cutoff_hz`; zero phase."""
    if cutoff_hz >= 225:  # the dipole has nothing there: its narrowest Gaussian is 10^-9 at 225 Hz
        return signal
    taps = firwin(2 * int(1.65 * _BASE_RATE / (0.2 * cutoff_hz)) + 1, cutoff_hz, fs=_BASE_RATE)
    return oaconvolve(signal, taps.reshape((1,) * (signal.ndim - 1) + (-1,)), mode="same", axes=-1)


def _read_off(time, row, options):
    """Return one lead `(num_samples,)` at the sampling rate asked for, from 0 seconds on."""
    wanted = np.arange(round(options.duration_seconds * options.sampling_rate)) / options.sampling_rate
    return CubicSpline(time, row)(wanted)
