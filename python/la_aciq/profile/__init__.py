"""What calibration measured: statistics of every layer's input by language, in memory and as a folder.

Needs NumPy and safetensors; PyTorch is not loaded.
"""

from .profile import Profile, SiteStats
from .second_moments import SecondMoments

__all__ = ["Profile", "SecondMoments", "SiteStats"]
