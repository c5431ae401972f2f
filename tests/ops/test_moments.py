"""Moments of arrays and tensors against SciPy, NumPy in long double, and each other."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import la_aciq
from la_aciq import Moments
from la_aciq.ops.functional import moments_state
from la_aciq.ops.streaming import histogram_edges, histogram_sums

ARRAYS = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=40),
    # The fourth power of smaller numbers is not a float64.
    elements=st.floats(-1e6, 1e6).map(lambda value: value if abs(value) > 1e-60 else 0.0),
)


def exact(x):
    """count, mean, variance, skewness, excess kurtosis in long double, two passes."""
    x = np.asarray(x).astype(np.longdouble).ravel()
    d = x - x.mean()
    d -= d.mean()
    m2, m3, m4 = ((d**p).mean() for p in (2, 3, 4))
    return x.size, float(x.mean()), float(m2), float(m3 / m2**1.5), float(m4 / m2**2 - 3)


def check(m, x, rtol):
    count, mean, variance, skewness, kurtosis = exact(x)
    assert m.count == count
    np.testing.assert_allclose(
        [m.mean, m.variance, m.std, m.skewness, m.kurtosis],
        [mean, variance, np.sqrt(variance), skewness, kurtosis],
        rtol=rtol,
    )
    assert m.min == np.min(x)
    assert m.max == np.max(x)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, 1e6])
def test_agrees_with_scipy_far_from_zero(offset):
    x = np.random.default_rng(0).exponential(size=50_001) + offset
    m = la_aciq.moments(x)
    check(m, x, rtol=1e-9)
    np.testing.assert_allclose(m.kurtosis, scipy.stats.kurtosis(x), rtol=1e-9)
    np.testing.assert_allclose(m.skewness, scipy.stats.skew(x), rtol=1e-9)
    np.testing.assert_allclose(m.variance, x.var(), rtol=1e-9)
    np.testing.assert_allclose(m.rms, np.sqrt(np.mean(x.astype(np.longdouble) ** 2)).astype(float), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_low_precision_input_is_summed_in_float64(dtype, offset):
    x = (torch.randn(3, 70_001, generator=torch.Generator().manual_seed(0)) * 30 + offset).to(dtype)
    check(la_aciq.moments(x), x.double().numpy(), rtol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_range_of_values_of_one_sign_is_theirs(dtype, sign):
    """What fills up the last vector is no element."""
    x = sign * (torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    for n in range(1, 41):
        m = la_aciq.moments(x[:n])
        assert (m.min, m.max) == (float(x[:n].min()), float(x[:n].max())), n


@settings(deadline=None, max_examples=60)
@given(ARRAYS)
def test_any_array(x):
    m = la_aciq.moments(x)
    assert m.count == x.size
    scale = np.abs(x).max() + 1e-300
    assert abs(m.mean - x.astype(np.longdouble).mean()) <= 1e-14 * scale
    assert abs(m.variance - x.astype(np.longdouble).var()) <= 1e-13 * scale**2
    assert (m.min, m.max) == (x.min(), x.max())
    if m.variance > 1e-6 * scale**2:
        np.testing.assert_allclose(m.kurtosis, exact(x)[4], rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(ARRAYS, st.integers(0, 2**32 - 1))
def test_merging_parts_is_the_whole(x, seed):
    flat = x.ravel()
    cut = np.random.default_rng(seed).integers(0, flat.size + 1)
    whole = la_aciq.moments(flat, histogram=True)
    merged = la_aciq.moments(flat[:cut], histogram=True) + la_aciq.moments(flat[cut:], histogram=True)
    # M_p may cancel to zero; the scale of its terms bounds the rounding.
    scale = (np.abs(flat).max() + 1e-300) ** np.array([1, 1, 2, 3, 4, 1, 1, 1]) * max(flat.size, 1)
    assert (np.abs(merged.state - whole.state) <= 1e-12 * scale + 1e-300).all()
    assert np.array_equal(merged.histogram, whole.histogram)


def test_pool_merges_an_axis():
    x = np.random.default_rng(3).standard_t(5, size=(7, 1000)) * np.arange(1, 8)[:, None] + np.arange(7)[:, None]
    rows = np.arange(7, dtype=np.int32)
    per_row = la_aciq.moments(torch.from_numpy(x), torch.from_numpy(rows), 7, histogram=True)
    assert per_row.shape == (7,)
    for i, m in enumerate(per_row):
        check(m, x[i], rtol=1e-11)
    check(per_row.pool(), x, rtol=1e-11)
    assert np.array_equal(per_row.pool().histogram, la_aciq.moments(x, histogram=True).histogram)
    empty = Moments.empty((7,), histogram=True)
    assert np.array_equal((empty + per_row).state, per_row.state)
    assert np.array_equal((per_row + empty).state, per_row.state)
    assert Moments.empty((0,)).pool().count == 0


def test_nan_policies():
    x = np.array([1.0, 2.0, np.nan, 4.0, np.inf, -np.inf])
    propagated = la_aciq.moments(x)
    assert propagated.nonfinite == 3
    assert propagated.count == 3
    for name in ("mean", "variance", "std", "skewness", "kurtosis", "min", "max", "rms"):
        assert np.isnan(getattr(propagated, name))
    omitted = la_aciq.moments(x, nan_policy="omit")
    check(omitted, [1.0, 2.0, 4.0], rtol=1e-14)
    assert omitted.nonfinite == 3
    with pytest.raises(ValueError, match="3 NaN or infinite elements"):
        la_aciq.moments(x, nan_policy="raise")
    with pytest.raises(ValueError, match="nan_policy: expected 'propagate', 'omit' or 'raise', got 'ignore'"):
        la_aciq.moments(x, nan_policy="ignore")
    only_bad = la_aciq.moments(np.full(100, np.nan), nan_policy="omit")
    assert only_bad.count == 0
    assert np.isnan(only_bad.mean)


@pytest.mark.parametrize("x", [np.zeros(0), np.zeros((3, 0)), np.full(1000, 0.1), np.array([7.0]), np.float64(3.0)])
def test_constant_and_empty_samples_follow_scipy(x):
    m = la_aciq.moments(x)
    assert m.count == np.size(x)
    assert np.isnan(m.kurtosis)
    assert np.isnan(m.skewness)
    if np.size(x):
        np.testing.assert_allclose(m.mean, np.mean(x), rtol=1e-15)
        np.testing.assert_allclose(m.variance, 0, atol=1e-30)
    else:
        assert np.isnan(m.mean)


def test_arrays_of_every_kind_are_read_in_place_or_converted():
    rng = np.random.default_rng(5)
    base = rng.normal(size=(40, 60))
    read_only = base.copy()
    read_only.flags.writeable = False
    structured = np.zeros(100, dtype=[("a", "f4"), ("b", "f8")])
    structured["b"] = rng.normal(size=100)
    for x in (
        base[::-1, ::-2],
        base.T,
        base[3:, 1::3],
        np.asfortranarray(base),
        np.broadcast_to(base[:, :1], (40, 60)),
        read_only,
        base.astype(">f8"),
        base.astype(np.longdouble),
        base.astype(np.float32),
        (base * 100).astype(np.int16),
        (base * 100).astype(np.uint64),
        base > 0,
        structured["b"],
        (base * 9).tolist(),
    ):
        check(la_aciq.moments(x), np.asarray(x), rtol=1e-9)
    assert la_aciq.moments((base).astype(np.float16)).count == base.size
    for bad in (base + 1j, np.array(["a"]), np.array([object()])):
        with pytest.raises(TypeError, match="x: expected a tensor or an array of real numbers"):
            la_aciq.moments(bad)
    with pytest.raises(TypeError, match=r"x: expected real numbers, got torch\.complex64"):
        la_aciq.moments(torch.ones(3, dtype=torch.complex64))


def test_reading_an_array_copies_nothing_and_warns_of_nothing(recwarn):
    x = np.zeros(1 << 20)
    x.flags.writeable = False
    from la_aciq.ops.arrays import tensor_of

    assert tensor_of(x)[0].data_ptr() == x.ctypes.data
    assert not recwarn.list


def test_histogram_counts_like_numpy_and_sums_exactly():
    rng = np.random.default_rng(7)
    x = (rng.standard_t(2, size=200_000) * np.exp(rng.normal(size=200_000) * 4)).astype(np.float32)
    edges = histogram_edges()
    assert edges.shape == (259,)
    assert edges[1] == 2.0**-16
    assert edges[257] == 2.0**16
    m = la_aciq.moments(x, histogram=True)
    magnitude = np.abs(x).astype(np.float64)
    counts, _ = np.histogram(magnitude, bins=edges)
    assert np.array_equal(m.histogram[:, 0], counts)
    index = np.searchsorted(edges, magnitude, side="right") - 1
    sums = np.bincount(index, weights=magnitude, minlength=258)
    np.testing.assert_allclose(histogram_sums(m.histogram)[1:-1], sums[1:-1], rtol=1e-13)
    assert histogram_sums(m.histogram)[0] == counts[0] * 2.0**-17
    assert histogram_sums(m.histogram)[257] == counts[257] * 2.0**16


def test_histogram_edges_of_the_range():
    x = np.array([0.0, -0.0, 2.0**-17, 2.0**-16, 65535.99, 65536.0, 1e300, -1e300, np.nan, np.inf, 5e-324])
    m = la_aciq.moments(x, histogram=True)
    counts = m.histogram[:, 0]
    assert (counts[0], counts[1], counts[256], counts[257]) == (4, 1, 1, 3)
    assert counts.sum() == 9
    assert m.histogram[0, 1] == m.histogram[257, 1] == 0


@pytest.mark.parametrize("n", [5, 200_000])
def test_the_first_bin_has_no_edge_to_measure_from(n):
    """Nor has it one where many elements are counted, which goes another way."""
    x = torch.full((n,), 1.9 * 2.0**-17)
    assert la_aciq.moments(x, histogram=True).histogram[0].tolist() == [n, 0]


def test_histograms_of_languages_add_up():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(50, 30, 64, generator=generator)
    language_ids = torch.randint(0, 9, (50, 30), generator=generator, dtype=torch.int32)
    _, histogram = moments_state(x, language_ids, 9, histogram=True)
    for entry in range(9):
        counts, _ = np.histogram(x[language_ids == entry].abs().double().numpy(), bins=histogram_edges())
        assert np.array_equal(histogram[entry, :, 0].numpy(), counts)


def test_pickles_and_prints():
    m = la_aciq.moments(np.random.default_rng(0).normal(size=100), histogram=True)
    again = pickle.loads(pickle.dumps(m))
    assert np.array_equal(again.state, m.state)
    assert np.array_equal(again.histogram, m.histogram)
    assert again.nan_policy == m.nan_policy
    assert "count=100" in repr(m)
    assert "shape=[2]" in repr(Moments.empty((2,)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Moments.from_state(np.zeros(7)), r"state: expected shape \[..., 8\], got \[7\]"),
        (lambda: Moments.from_state(np.zeros((2, 8)), np.zeros((3, 258, 2), int)), r"histogram: expected shape"),
        (lambda: Moments.from_state(np.zeros(8), np.zeros((258, 2))), "histogram: expected integers"),
        (lambda: Moments.empty((2,)) + Moments.empty((3,)), r"shapes \[2\] and \[3\]"),
        (lambda: Moments.empty(histogram=True) + Moments.empty(), "with a histogram and moments without"),
        (lambda: Moments.empty() + Moments.empty(nan_policy="omit"), "nan_policy 'propagate' and 'omit'"),
        (lambda: Moments.empty((2,)).pool(1), "axis: expected one of the 1 axes"),
        (lambda: histogram_sums(np.zeros((257, 2), int)), "histogram: expected integers of shape"),
        (
            lambda: la_aciq.moments(torch.ones(2, 3), torch.tensor([0, 1])),
            "num_entries: expected the number of entries",
        ),
        (lambda: la_aciq.moments(torch.ones(2, 3), num_entries=0), "num_entries: expected at least 1, got 0"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_moments_need_numpy_alone():
    code = "import sys, la_aciq; la_aciq.Moments.empty(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
