"""What quantization costs each language: effective laws, limits, bounds and regret. NumPy and SciPy only."""

from .bounds import (
    DeploymentBounds,
    deployment_bounds,
    equal_kurtosis_examples,
    family_bound,
    family_slope,
    kurtosis_bound,
    total_variation_bound,
    two_point_kurtoses,
    wasserstein2,
    wasserstein_bound,
)
from .effective import EffectiveLaw, effective, source_clip
from .limits import (
    Limits,
    LloydMax,
    entropy_power,
    gaussian_distortion,
    language_limits,
    limits,
    lloyd_max,
    panter_dite,
    panter_dite_constant,
    shannon_lower_bound,
)
from .rate_distortion import RateDistortion, rate_distortion
from .regret import RegretTable, regret

__all__ = [
    "DeploymentBounds",
    "EffectiveLaw",
    "Limits",
    "LloydMax",
    "RateDistortion",
    "RegretTable",
    "deployment_bounds",
    "effective",
    "entropy_power",
    "equal_kurtosis_examples",
    "family_bound",
    "family_slope",
    "gaussian_distortion",
    "kurtosis_bound",
    "language_limits",
    "limits",
    "lloyd_max",
    "panter_dite",
    "panter_dite_constant",
    "rate_distortion",
    "regret",
    "shannon_lower_bound",
    "source_clip",
    "total_variation_bound",
    "two_point_kurtoses",
    "wasserstein2",
    "wasserstein_bound",
]
