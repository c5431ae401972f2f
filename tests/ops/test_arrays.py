"""`moments` of the arrays that people have: masks and missing values are honored, or the call is refused."""

import decimal

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch

import la_aciq
from la_aciq import Moments

VALUES = [1.0, 2.0, 3.0, 100.0]
MASK = [False, False, False, True]
THREE = la_aciq.moments(np.array([1.0, 2.0, 3.0]))


def assert_three(m):
    """The moments of 1, 2, 3, with nothing else counted in any way."""
    assert m.count == 3
    assert m.nonfinite == 0
    assert np.array_equal(m.state, THREE.state)


class TestMaskedArrays:
    def test_scipy_says_the_same(self):
        x = np.ma.masked_array(np.random.default_rng(0).laplace(size=500), mask=np.arange(500) % 7 == 0)
        m = la_aciq.moments(x)
        assert m.count == x.count()
        assert m.mean == pytest.approx(x.mean(), rel=1e-13)
        assert m.kurtosis == pytest.approx(float(scipy.stats.kurtosis(x)), rel=1e-12)
        assert m.skewness == pytest.approx(float(scipy.stats.skew(x)), rel=1e-10)

    @pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int8, np.uint64, ">f4", np.longdouble])
    @pytest.mark.parametrize("hard", [False, True])
    def test_every_dtype_and_hardness(self, dtype, hard):
        assert_three(la_aciq.moments(np.ma.masked_array(np.array(VALUES).astype(dtype), MASK, hard_mask=hard)))

    def test_booleans(self):
        m = la_aciq.moments(np.ma.masked_array([True, False, True], mask=[0, 0, 1]))
        assert (m.count, m.mean) == (2, 0.5)

    def test_masks_that_are_shared_changed_or_absent(self):
        x = np.ma.masked_array(VALUES, MASK)
        assert_three(la_aciq.moments(x[:]))
        assert_three(la_aciq.moments(x.reshape(2, 2).T))
        assert_three(la_aciq.moments(np.ma.concatenate([x, x[3:]])))
        y = np.ma.masked_array(VALUES)
        assert y.mask is np.ma.nomask
        assert la_aciq.moments(y).count == 4
        y[3] = np.ma.masked
        assert_three(la_aciq.moments(y))
        assert_three(la_aciq.moments(np.ma.masked_invalid([1.0, np.nan, 2.0, np.inf, 3.0])))
        assert la_aciq.moments(np.ma.masked_array([1.0, np.nan], mask=[1, 0])).nonfinite == 1

    def test_without_dimensions_and_all_masked(self):
        assert la_aciq.moments(np.ma.masked_array(5.0, mask=True)).count == 0
        assert la_aciq.moments(np.ma.masked_array(5.0, mask=False)).mean == 5
        assert la_aciq.moments(np.ma.masked).count == 0
        assert la_aciq.moments(np.ma.masked_all((3, 4))).count == 0
        assert la_aciq.moments(np.ma.masked_array([], mask=[])).count == 0

    def test_lists_of_them(self):
        x = np.ma.masked_array([1.0, 100.0], mask=[0, 1])
        assert_three(la_aciq.moments([x, np.array([2.0, 3.0])]))
        assert_three(la_aciq.moments([1.0, 2.0, 3.0, np.ma.masked]))
        assert_three(la_aciq.moments([[[1.0, np.ma.masked], [2.0, 3.0]]]))
        with pytest.raises(TypeError, match="x: expected a tensor or an array of real numbers"):
            la_aciq.moments([x, np.array([1.0])])

    @pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["NumPy", "PyTorch"])
    @pytest.mark.parametrize("shape", [(3,), (3, 2), (1, 2), (3, 2, 4)])
    def test_ids_go_with_the_elements(self, make, shape):
        rng = np.random.default_rng(1)
        x = np.ma.masked_array(rng.normal(size=(3, 2, 4, 5)), mask=rng.random((3, 2, 4, 5)) < 0.4)
        ids = rng.integers(0, 3, shape)
        m = la_aciq.moments(x, make(ids), 3, histogram=True)
        each = np.broadcast_to(ids.reshape(*shape, *[1] * (4 - ids.ndim)), x.shape)
        for entry in range(3):
            alone = la_aciq.moments(x.data[(each == entry) & ~x.mask], histogram=True)
            assert m.count[entry] == alone.count
            np.testing.assert_allclose(m.state[entry], alone.state, rtol=1e-10, atol=1e-12)
            assert np.array_equal(m.histogram[entry], alone.histogram)

    def test_an_entry_count_without_ids(self):
        m = la_aciq.moments(np.ma.masked_array(VALUES, MASK), num_entries=2)
        assert m.count.tolist() == [3, 0]

    def test_ids_that_do_not_fit_are_an_error_all_the_same(self):
        x = np.ma.masked_array(np.ones((4, 2)), mask=False)
        x[0, 0] = np.ma.masked
        with pytest.raises(ValueError, match=r"language_ids: expected a shape that matches .*\[4\]"):
            la_aciq.moments(x, np.zeros(3, int), 1)
        with pytest.raises(ValueError, match="language_ids: expected ids from 0 to 1, got 2"):
            la_aciq.moments(x, np.full(4, 2), 2)


class TestTables:
    def test_pandas(self):
        pd = pytest.importorskip("pandas")
        assert_three(la_aciq.moments(pd.Series([1, 2, None, 3], dtype="Int64")))
        assert_three(la_aciq.moments(pd.Series([1, 2, pd.NA, 3], dtype="Float32")))
        assert_three(la_aciq.moments(pd.array([1, 2, pd.NA, 3], dtype="UInt8")))
        assert_three(la_aciq.moments(pd.Index([1, 2, 3])))
        assert_three(la_aciq.moments(pd.Series([1.0, 2.0, 3.0]).astype("Sparse[float64]")))
        assert la_aciq.moments(pd.Series([True, None, False], dtype="boolean")).mean == 0.5
        assert la_aciq.moments(pd.Series([1.0, np.nan])).nonfinite == 1
        frame = pd.DataFrame({"a": pd.array([1, None], dtype="Int8"), "b": [2.0, 3.0]})
        assert_three(la_aciq.moments(frame))
        assert la_aciq.moments(frame, np.array([0, 1]), 2).count.tolist() == [2, 1]
        for refused in (
            pd.Series(["1", "2"]),
            pd.Series(["1", "2"], dtype="string"),
            pd.Series(pd.to_datetime(["2020-01-01"])),
            pd.Series([pd.Timedelta(1, "s")]),
            pd.Series([1.0, "a"], dtype=object),
            pd.Series([1 + 2j]),
            pd.Series([1, 2]).astype("category"),
            pd.DataFrame({"a": [1.0], "b": ["x"]}),
        ):
            with pytest.raises(TypeError, match="x: expected"):
                la_aciq.moments(refused)

    def test_polars(self):
        pl = pytest.importorskip("polars")
        assert_three(la_aciq.moments(pl.Series([1, 2, None, 3])))
        assert_three(la_aciq.moments(pl.Series([1.0, 2.0, None, 3.0], dtype=pl.Float32)))
        assert la_aciq.moments(pl.Series([True, None, False])).mean == 0.5
        assert la_aciq.moments(pl.Series([1.0, float("nan"), None])).nonfinite == 1
        assert_three(la_aciq.moments(pl.DataFrame({"a": [1, None], "b": [2.0, 3.0]})))
        for refused in (pl.Series(["1"]), pl.DataFrame({"a": ["1"]}), pl.LazyFrame({"a": [1.0]})):
            with pytest.raises(TypeError, match="x: expected"):
                la_aciq.moments(refused)

    def test_pyarrow(self):
        pa = pytest.importorskip("pyarrow")
        assert_three(la_aciq.moments(pa.array([1, 2, None, 3])))
        assert_three(la_aciq.moments(pa.array([1.0, 2.0, None, 3.0], pa.float32())))
        assert_three(la_aciq.moments(pa.chunked_array([[1, None], [2, 3]])))
        assert_three(la_aciq.moments(pa.table({"a": [1, None], "b": [2.0, 3.0]})))
        assert la_aciq.moments(pa.array([True, None, False])).mean == 0.5
        for refused in (pa.array(["1"]), pa.array([[1.0]]), pa.array([0], pa.timestamp("s"))):
            with pytest.raises(TypeError, match="x: expected"):
                la_aciq.moments(refused)

    def test_xarray(self):
        xr = pytest.importorskip("xarray")
        assert_three(la_aciq.moments(xr.DataArray([[1.0, 2.0, 3.0]], dims=("a", "b"))))
        with pytest.raises(TypeError, match="x: expected"):
            la_aciq.moments(xr.Dataset({"a": ("x", [1.0])}))


class DlpackAlone:
    """What has no other interface than DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **arguments):
        return self.array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_dlpack():
    assert_three(la_aciq.moments(DlpackAlone(np.array([1.0, 2.0, 3.0]))))
    assert_three(la_aciq.moments(DlpackAlone(np.array([1, 2, 3], dtype=np.int16))))
    with pytest.raises(TypeError, match="x: "):
        la_aciq.moments(DlpackAlone(np.array([1j])))


@pytest.mark.filterwarnings("ignore:.*prototype stage.*")
def test_masked_tensors():
    from torch.masked import masked_tensor

    x = masked_tensor(torch.tensor(VALUES), ~torch.tensor(MASK))
    assert_three(la_aciq.moments(x))


@pytest.mark.filterwarnings("ignore:.*(prototype stage|beta state|deprecated).*")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), r"x: expected a dense tensor, got layout torch.sparse_coo; call to_dense"),
        (lambda: torch.eye(3).to_sparse_csr(), "x: expected a dense tensor, got layout torch.sparse_csr"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "x: .* nested tensor"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "x: .* nested tensor",
        ),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "x: .* call dequantize"),
        (lambda: torch.ones(3, device="meta"), "x: expected a tensor with data, got one on the meta device"),
        (lambda: torch.ones(3, dtype=torch.complex64), "x: expected real numbers, got torch.complex64"),
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), "x: expected float32, .* got float8_e4m3fn"),
        (lambda: scipy.sparse.eye(3).tocsr(), "x: .* got scipy.sparse.* of dtype object; call toarray"),
        (lambda: scipy.sparse.eye_array(3), "x: .* call toarray"),
        (lambda: np.array([1, None], dtype=object), "x: .* got numpy.ndarray of dtype object"),
        (lambda: np.array(["1", "2"]), "x: .* of dtype <U1"),
        (lambda: np.array([b"1"]), r"x: .* of dtype \|S1"),
        (lambda: np.array(["2020-01-01"], dtype="datetime64[D]"), "x: .* of dtype datetime64"),
        (lambda: np.array([1], dtype="timedelta64[s]"), "x: .* of dtype timedelta64"),
        (lambda: np.array([1j]), "x: .* of dtype complex128"),
        (lambda: np.ma.masked_array([1j], mask=[0]), "x: .* of dtype complex128"),
        (lambda: np.array([(1.0, 2)], dtype="f8,i4"), "x: expected a tensor or an array of real numbers"),
        (lambda: [[1.0], [1.0, 2.0]], "x: expected a tensor or an array of real numbers"),
        (lambda: [decimal.Decimal(1)], "x: .* got list of dtype object"),
        (lambda: [None, 1.0], "x: .* got list of dtype object"),
        (lambda: "1", "x: .* got str of dtype"),
        (lambda: None, "x: .* got NoneType of dtype object"),
        (lambda: {"a": 1.0}, "x: .* got dict of dtype object"),
        (lambda: (v for v in VALUES), "x: .* got generator of dtype object"),
    ],
)
def test_what_is_no_dense_array_of_real_numbers_is_refused_by_name(make, message):
    with pytest.raises(TypeError, match=message):
        la_aciq.moments(make())


@pytest.mark.parametrize(
    "call",
    [
        lambda x: la_aciq.quantize(x, 1.0),
        lambda x: la_aciq.quantize_dynamic(x, 1.0),
        lambda x: la_aciq.rotate(x, torch.ones(4)),
        lambda x: la_aciq.ops.moments_state(x),
        lambda x: la_aciq.linear(x, torch.zeros(3, 2, dtype=torch.uint8), torch.ones(3, 1)),
    ],
    ids=["quantize", "quantize_dynamic", "rotate", "moments_state", "linear"],
)
def test_the_other_operations_name_a_sparse_tensor_too(call):
    with pytest.raises(TypeError, match=r"x: expected a dense tensor, got layout torch\.sparse_coo"):
        call(torch.eye(4).to_sparse())


@pytest.mark.parametrize("x", [[1, 2, 3], (1.0, 2.0, 3.0), [[1.0], [2.0], [3.0]], range(1, 4), torch.arange(1, 4)])
def test_sequences_of_numbers(x):
    assert_three(la_aciq.moments(x))


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_other_arrays():
    assert_three(la_aciq.moments(np.asmatrix([[1.0, 2.0, 3.0]])))
    assert_three(la_aciq.moments([torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)]))
    assert_three(la_aciq.moments(memoryview(np.array([1.0, 2.0, 3.0]))))
    assert la_aciq.moments(3.5).mean == 3.5
    read_only = np.array([1.0, 2.0, 3.0])
    read_only.flags.writeable = False
    assert_three(la_aciq.moments(read_only))


class TestIds:
    X = np.arange(12.0).reshape(4, 3)

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64, ">i4"])
    def test_numpy_integers(self, dtype):
        m = la_aciq.moments(self.X, np.array([0, 1, 1, 0]).astype(dtype), 2)
        expected = la_aciq.moments(self.X, torch.tensor([0, 1, 1, 0]), 2)
        assert np.array_equal(m.state, expected.state)

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (np.zeros(4), "language_ids: expected integers, got float64"),
            (np.zeros(4, bool), "language_ids: expected integers, got bool"),
            (np.array(["en"] * 4), "language_ids: expected integers, got <U2"),
            (np.ma.masked_array([0, 1, 1, 0], mask=[1, 0, 0, 0]), "language_ids: .* masked array"),
            (torch.zeros(4), "language_ids: expected int32 or int64, got float32"),
            (["en"] * 4, "language_ids: expected a tensor or an array or None, got list"),
        ],
    )
    def test_others_are_refused(self, ids, message):
        with pytest.raises(TypeError, match=message):
            la_aciq.moments(self.X, ids, 2)
        with pytest.raises(TypeError, match=message):
            la_aciq.moments(np.ma.masked_array(self.X, mask=self.X > 5), ids, 2)

    def test_one_beyond_int64(self):
        with pytest.raises(ValueError, match="language_ids: expected ids"):
            la_aciq.moments(self.X, np.full(4, 2**63, np.uint64), 2)

    @pytest.mark.parametrize("count", [True, False, np.True_])
    def test_a_truth_value_is_no_number_of_entries(self, count):
        with pytest.raises(TypeError, match="num_entries: expected an int or None, got"):
            la_aciq.moments(self.X, num_entries=count)


def test_truth_values_are_no_numbers_elsewhere():
    with pytest.raises(TypeError, match="clips: expected a tensor or a number, got True"):
        la_aciq.quantize(torch.ones(2, 4), True)
    with pytest.raises(TypeError, match="block_size: expected an int or None, got True"):
        la_aciq.rotate(torch.ones(2, 4), torch.ones(4), True)
    with pytest.raises(TypeError, match="k: expected an int, got True"):
        la_aciq.dequantize(torch.zeros(2, 1, dtype=torch.uint8), 1.0, k=True)


class TestSums:
    PARTS = tuple(la_aciq.moments(np.arange(n, n + 5.0) ** 2, histogram=True) for n in range(3))

    def test_sum_is_the_union(self):
        total = sum(self.PARTS)
        expected = self.PARTS[0] + self.PARTS[1] + self.PARTS[2]
        assert isinstance(total, Moments)
        assert np.array_equal(total.state, expected.state)
        assert np.array_equal(total.histogram, expected.histogram)
        assert sum([self.PARTS[0]]).count == 5
        assert sum(la_aciq.moments(np.ones((4, 2)), torch.tensor([0, 1, 1, 0]), 2)).count == 8

    @pytest.mark.parametrize("other", [1, 0.5, None, False, 1j])
    def test_nothing_else_can_be_added(self, other):
        with pytest.raises(TypeError, match="unsupported operand"):
            other + self.PARTS[0]
        with pytest.raises(TypeError, match="unsupported operand"):
            self.PARTS[0] + other


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (np.zeros(8, complex), "state: expected real numbers, got complex128"),
        (["a"] * 8, "state: expected real numbers, got <U1"),
        (np.zeros(8, object), "state: expected real numbers, got object"),
        (np.ma.masked_array(np.zeros(8), mask=True), "state: .* masked array"),
    ],
)
def test_a_state_that_is_not_real_numbers_is_refused(state, message):
    with pytest.raises(TypeError, match=message):
        Moments.from_state(state)
