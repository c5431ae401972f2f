"""What quantization costs each language: evaluation, the report, and its plots."""

from .comparison import compare
from .measure import evaluate, evaluate_configurations
from .report import Comparison, Configuration, Curve, Difference, LanguageResult, Layers, Report
from .summary import summarize

__all__ = [
    "Comparison",
    "Configuration",
    "Curve",
    "Difference",
    "LanguageResult",
    "Layers",
    "Report",
    "compare",
    "evaluate",
    "evaluate_configurations",
    "summarize",
]
