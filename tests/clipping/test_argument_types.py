"""What is not a number, a choice or a law is a TypeError that names the argument, in every public function."""

import inspect

import numpy as np
import pytest

from la_aciq import clipping, disparity
from la_aciq.clipping import Gaussian, HistogramLaw, Laplace

WRONG = {
    "text": "a",
    "none": None,
    "complex": 1 + 2j,
    "bool": True,
    "object": object(),
    "complex array": np.array([1 + 2j]),
    "text array": np.array(["a"]),
    "object array": np.array([object()]),
    "bool array": np.array([True]),
    "list of none": [None],
    "bytes": b"x",
    "dict": {"a": 1},
    "masked": np.ma.masked_array([1.0, 2.0], mask=[True, False]),
}
HISTOGRAM = HistogramLaw(np.ones((258, 2), int))
EFFECTIVE = disparity.EffectiveLaw([[0, 1, 0, 3.0]], [1.0])
FUNCTIONS = {
    "Empirical": {"samples": np.arange(100.0)},
    "Gaussian": {"sigma": 1.0, "mean": 0.0},
    "GeneralizedGaussian": {"beta": 1.0, "sigma": 1.0},
    "StudentT": {"nu": 3.0, "mean": 0.0},
    "HistogramLaw": {"histogram": np.ones((258, 2), int)},
    "Mixture": {"laws": [Gaussian(), Laplace()], "weights": [0.5, 0.5]},
    "histogram_mse": {"histogram": np.ones((258, 2), int), "alpha": 1.0},
    "optimal_histogram": {"histogram": np.ones((258, 2), int), "bits": 4},
    "kurtosis_rule": {"kappa": 1.0, "bits": 4, "coefficients": "fitted", "codebook": "midrise", "objective": "exact"},
    "mse": {"law": Gaussian(), "alpha": 1.0, "bits": 4, "codebook": "midrise", "objective": "exact"},
    "slope": {"law": Gaussian(), "alpha": 1.0},
    "curvature": {"law": Gaussian(), "alpha": 1.0},
    "optimal": {"law": Gaussian(), "bits": 4, "codebook": "midrise", "objective": "exact"},
    "minimum_samples": {"bits": 4},
    "octav": {"law": Gaussian(), "tolerance": 1e-3, "max_steps": 5},
    "samples_for_interval": {"law": Gaussian(), "relative_half_width": 0.1},
    "shared": {"laws": [Gaussian()], "penalty": 1.0, "language_objective": "mean"},
    "pareto": {"laws": [Gaussian()], "points": 3},
    "AdaptationRule": {"minimum": 10, "damping": 0.5},
    "family_bound": {"kappas": [0.0, 1.0], "slope": 1.0},
    "family_slope": {"law_of_kurtosis": lambda k: Gaussian(), "kappas": [0.0, 1.0]},
    "kurtosis_bound": {"law": Gaussian()},
    "total_variation_bound": {"p": [1.0], "q": [1.0], "losses": [1.0]},
    "two_point_kurtoses": {"languages": 3, "center": 0.0, "distance": 1.0},
    "wasserstein2": {"p": HISTOGRAM, "q": HISTOGRAM},
    "wasserstein_bound": {"error_p": 1.0, "distance": 1.0},
    "entropy_power": {"law": Gaussian()},
    "gaussian_distortion": {"law": Gaussian(), "bits": 4},
    "shannon_lower_bound": {"law": Gaussian(), "bits": 4},
    "limits": {"law": Gaussian(), "bits": 4},
    "lloyd_max": {"law": Gaussian(), "bits": 2},
    "panter_dite": {"law": Gaussian(), "bits": 4},
    "panter_dite_constant": {"law": Gaussian()},
    "rate_distortion": {"law": Gaussian(), "bits": 2, "tolerance": 0.01},
    "source_clip": {"law": EFFECTIVE, "bits": 4, "coefficients": "published"},
    "EffectiveLaw": {"moments": [[0, 1, 0, 3.0]], "weights": [1.0]},
}
# Text is of the right type where the argument is a choice, and an ordinary value where the sequence may be anything.
CHOICES = {"codebook", "objective", "coefficients", "language_objective"}
CASES = [
    (name, argument, kind)
    for name, arguments in FUNCTIONS.items()
    for argument in arguments
    for kind in WRONG
    if argument != "law_of_kurtosis" and not (argument in CHOICES and kind == "text")
]


def function(name):
    return getattr(clipping, name, None) or getattr(disparity, name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_types_are_named(name):
    call, arguments = function(name), FUNCTIONS[name]
    call(**arguments)
    for _, argument, kind in (case for case in CASES if case[0] == name):
        with pytest.raises(TypeError, match=rf"^{argument}: expected") as error:
            call(**{**arguments, argument: WRONG[kind]})
        assert "\n" not in str(error.value), (argument, kind)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_is_named(name):
    call, arguments = function(name), FUNCTIONS[name]
    for argument, value in arguments.items():
        if isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float)):
            nan = np.nan if isinstance(value, float) else [np.nan] * len(value)
            with pytest.raises(ValueError, match=rf"^{argument}: expected"):
                call(**{**arguments, argument: nan})


def test_no_public_function_is_left_out():
    takes_profiles = {"table", "regret", "effective", "deployment_bounds", "language_limits"}
    others = {"Laplace", "Logistic", "Uniform", "Law", "fit_kurtosis_rule", "equal_kurtosis_examples"}
    public = {
        name
        for module in (clipping, disparity)
        for name in module.__all__
        if inspect.isfunction(getattr(module, name)) or issubclass(getattr(module, name), clipping.Law)
    }
    assert public - takes_profiles - others <= set(FUNCTIONS)
