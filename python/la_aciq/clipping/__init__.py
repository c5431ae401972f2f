"""Clips for integer quantizers: laws, objectives and optima. NumPy and SciPy only."""

from .histogram import HistogramLaw, histogram_mse, optimal_histogram
from .laws import (
    Empirical,
    Gaussian,
    GeneralizedGaussian,
    Laplace,
    Law,
    Logistic,
    Mixture,
    StudentT,
    Uniform,
)
from .objectives import curvature, mse, slope
from .optimal import Certificate, Octav, Optimum, minimum_samples, octav, optimal, samples_for_interval
from .table import ClipTable, table

__all__ = [
    "Certificate",
    "Octav",
    "Optimum",
    "minimum_samples",
    "octav",
    "optimal",
    "samples_for_interval",
    "ClipTable",
    "Empirical",
    "Gaussian",
    "GeneralizedGaussian",
    "HistogramLaw",
    "Laplace",
    "Law",
    "Logistic",
    "Mixture",
    "StudentT",
    "Uniform",
    "curvature",
    "histogram_mse",
    "mse",
    "optimal_histogram",
    "slope",
    "table",
]
