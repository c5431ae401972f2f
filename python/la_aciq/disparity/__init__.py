"""What quantization costs each language: effective laws, limits, bounds and regret. NumPy and SciPy only."""

from .effective import EffectiveLaw, effective
from .regret import RegretTable, regret

__all__ = ["EffectiveLaw", "RegretTable", "effective", "regret"]
