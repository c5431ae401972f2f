"""Use two parts alone, on NumPy arrays: the moments of a stream, and the clip with the least squared error.

python examples/numpy_moments_and_clips.py
"""

import numpy as np

import la_aciq
from la_aciq import clipping

random = np.random.default_rng(0)

# The moments of chunks add up to those of the whole stream, except for rounding.
total = sum((la_aciq.moments(random.standard_t(6, size=50_000)) for _ in range(19)), la_aciq.moments(np.zeros(0)))
print(f"{int(total.count):,} values: standard deviation {float(total.std):.3f}, kurtosis {float(total.kurtosis):.2f}")

# The clip with the least squared error at 16 levels, and a bound on how much better another clip could be.
for law in (clipping.Gaussian(sigma=1.0), clipping.Laplace(sigma=1.0), clipping.StudentT(nu=6, sigma=1.0)):
    best = clipping.optimal(law, bits=4)
    print(f"{law}: clip {best.alpha:.4f}, normalized MSE {best.normalized_mse:.5f} (+-{best.certificate.gap:.0e})")

# A clip chosen from the kurtosis alone, and the optimal one.
rule = float(clipping.kurtosis_rule(float(total.kurtosis), bits=4)) * float(total.std)
best = clipping.optimal(clipping.StudentT(nu=6, sigma=float(total.std)), bits=4)
print(f"Student t by the kurtosis rule {rule:.3f}, exact {best.alpha:.3f}")
