"""Clips for integer quantizers: laws, objectives and optima. NumPy and SciPy only."""

from .adapt import AdaptationRule, Adapted
from .families import Gaussian, GeneralizedGaussian, Laplace, Logistic, StudentT, Uniform
from .histogram import HistogramLaw
from .histogram_optimum import histogram_mse, optimal_histogram
from .kurtosis import KurtosisFit, fit_kurtosis_rule, kurtosis_rule
from .languages import ParetoFront, SharedOptimum, pareto, shared
from .law import Law
from .mixture import Mixture
from .objectives import curvature, mse, slope
from .optimal import Certificate, Octav, Optimum, minimum_samples, octav, optimal, samples_for_interval
from .samples import Empirical
from .table import ClipTable, table

__all__ = [
    "AdaptationRule",
    "Adapted",
    "Certificate",
    "ClipTable",
    "Empirical",
    "Gaussian",
    "GeneralizedGaussian",
    "HistogramLaw",
    "KurtosisFit",
    "Laplace",
    "Law",
    "Logistic",
    "Mixture",
    "Octav",
    "Optimum",
    "ParetoFront",
    "SharedOptimum",
    "StudentT",
    "Uniform",
    "curvature",
    "fit_kurtosis_rule",
    "histogram_mse",
    "kurtosis_rule",
    "minimum_samples",
    "mse",
    "octav",
    "optimal",
    "optimal_histogram",
    "pareto",
    "samples_for_interval",
    "shared",
    "slope",
    "table",
]
