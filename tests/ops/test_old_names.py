"""The arguments' names of 0.1, which work until 0.3 with a warning that names the new ones."""

import inspect
import warnings

import numpy as np
import pytest
import torch

import la_aciq
from la_aciq.ops import moments_state, use_backend, why_unavailable

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
TABLE = torch.tensor([[1.0], [2.0]])
CODES, ROW_CLIPS = la_aciq.quantize_dynamic(X, TABLE, IDS)

# By function and old name: the new name, and the arguments of a call by their new names.
WITH_IDS = {"x": X, "clips": TABLE, "language_ids": IDS}
DEQUANTIZE = {"codes": CODES, "k": 16, "clips": TABLE, "language_ids": IDS}
LINEAR = {"x": X, "weight": CODES, "weight_clip": ROW_CLIPS, "activation_bits": 8, "clips": TABLE, "language_ids": IDS}
COUNTS = {"x": X, "language_ids": IDS, "num_entries": 2}
CALLS = [
    (la_aciq.moments, "language", "language_ids", COUNTS),
    (la_aciq.moments, "languages", "num_entries", COUNTS),
    (moments_state, "language", "language_ids", COUNTS),
    (moments_state, "languages", "num_entries", COUNTS),
    (la_aciq.quantize, "alpha", "clips", WITH_IDS),
    (la_aciq.quantize, "language", "language_ids", WITH_IDS),
    (la_aciq.quantize_dynamic, "shape", "clip_factor", {"x": X, "clip_factor": TABLE, "language_ids": IDS}),
    (la_aciq.quantize_dynamic, "language", "language_ids", {"x": X, "clip_factor": TABLE, "language_ids": IDS}),
    (la_aciq.dequantize, "alpha", "clips", DEQUANTIZE),
    (la_aciq.dequantize, "language", "language_ids", DEQUANTIZE),
    (la_aciq.dequantize, "scales", "row_clips", {"codes": CODES, "k": 16, "row_clips": ROW_CLIPS}),
    (la_aciq.linear, "weight_scale", "weight_clip", LINEAR),
    (la_aciq.linear, "clip", "clips", LINEAR),
    (la_aciq.linear, "language", "language_ids", LINEAR),
]
each_name = pytest.mark.parametrize(
    ("function", "old", "new", "arguments"), CALLS, ids=[f"{function.__name__}-{old}" for function, old, *_ in CALLS]
)


def tensors_of(result):
    if isinstance(result, la_aciq.Moments):
        return [torch.from_numpy(result.state)]
    return list(result) if isinstance(result, tuple) else [result]


@each_name
def test_an_old_name_gives_the_same_result_and_one_warning(function, old, new, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = tensors_of(function(**arguments))
    before = {name: value for name, value in arguments.items() if name != new}
    with pytest.warns(DeprecationWarning, match=rf"{function.__name__}\({new}=\.\.\.\)") as caught:
        result = tensors_of(function(**before, **{old: arguments[new]}))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@each_name
def test_both_names_are_an_error(function, old, new, arguments):
    with pytest.raises(TypeError, match=f"{new!r} and its old name {old!r}"):
        function(**arguments, **{old: arguments[new]})


@each_name
def test_a_position_and_the_old_name_are_an_error(function, old, new, arguments):
    names = list(inspect.signature(function).parameters)
    before = [arguments.get(name) for name in names[: names.index(new) + 1]]
    if inspect.signature(function).parameters[new].kind is inspect.Parameter.KEYWORD_ONLY:
        pytest.skip("has no position")
    rest = {name: value for name, value in arguments.items() if name not in names[: names.index(new) + 1]}
    with (
        pytest.warns(DeprecationWarning, match="is now"),
        pytest.raises(TypeError, match=f"multiple values for argument {new!r}"),
    ):
        function(*before, **rest, **{old: arguments[new]})


@each_name
def test_an_unknown_name_is_an_error_beside_an_old_one_or_alone(function, old, new, arguments):
    with pytest.raises(TypeError, match="unexpected keyword argument 'center'"):
        function(**arguments, center=1)
    before = {name: value for name, value in arguments.items() if name != new}
    with (
        pytest.warns(DeprecationWarning, match="is now"),
        pytest.raises(TypeError, match="unexpected keyword argument 'center'"),
    ):
        function(**before, **{old: arguments[new]}, center=1)


def test_several_old_names_at_once():
    with pytest.warns(DeprecationWarning, match="is now") as caught:
        codes = la_aciq.quantize(X, alpha=TABLE, language=IDS)
    assert [str(warning.message).split("(")[1].split("=")[0] for warning in caught] == ["alpha", "language"]
    assert torch.equal(codes, la_aciq.quantize(X, TABLE, IDS))


def test_a_value_that_does_not_fit_is_named_by_the_new_name():
    with (
        pytest.warns(DeprecationWarning, match="is now"),
        pytest.raises(TypeError, match="clips: expected a tensor or a number, got list"),
    ):
        la_aciq.quantize(X, alpha=[1.0])


def test_the_missing_argument_is_named():
    with pytest.raises(TypeError, match="clips"):
        la_aciq.quantize(X, language_ids=IDS)


def test_old_names_work_on_the_reference_too():
    with use_backend("reference"), pytest.warns(DeprecationWarning, match="is now"):
        codes = la_aciq.quantize(X, alpha=2.0)
    assert np.array_equal(codes.numpy(), la_aciq.quantize(X, 2.0).numpy())


@pytest.mark.skipif(why_unavailable("cpu") is not None, reason="needs the compiled core")
def test_torch_compile_takes_new_and_old_names_in_one_graph():
    def new(x):
        return la_aciq.quantize(x, clips=TABLE, language_ids=IDS)

    def old(x):
        return la_aciq.quantize(x, alpha=TABLE, language=IDS)

    expected = la_aciq.quantize(X, TABLE, IDS)
    assert torch.equal(torch.compile(new, fullgraph=True, backend="eager")(X), expected)
    assert torch.equal(torch.compile(old, fullgraph=True, backend="eager")(X), expected)
