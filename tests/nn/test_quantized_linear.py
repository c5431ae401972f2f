"""LanguageAwareLinear, and weight quantization against float64 arithmetic written out here."""

import copy
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from la_aciq.errors import LaAciqError
from la_aciq.nn import LanguageAwareLinear, LanguageState, QuantConfig, languages
from la_aciq.nn.weights import quantize_weight, weight_clips
from la_aciq.ops import rotation

ROWS = ("und", "en", "sw", "sink")


def to_levels(x, clip, codebook, bits=4):
    """x after quantization, float64, by the definition of the codebooks; clip broadcasts against x."""
    half = 2 ** (bits - 1)
    step = 2 * np.asarray(clip, dtype=np.float64) / (2 * half - 1)
    if codebook == "midrise":
        return (np.clip(np.floor(x / step), -half, half - 1) + 0.5) * step
    return np.clip(np.rint(x / step), -half, half - 1) * step


def by_element(table, k, group):
    """A table [..., groups] spread over k elements."""
    return np.repeat(np.asarray(table, dtype=np.float64), group or k, axis=-1)[..., :k]


def rotated(x, seed):
    """x [..., k] after the randomized block Hadamard transform, as a matrix product."""
    k = x.shape[-1]
    block = rotation.block_size(k)
    matrix = scipy.linalg.block_diag(*[scipy.linalg.hadamard(block) / np.sqrt(block)] * (k // block))
    return (x * rotation.signs(k, seed)) @ matrix.T


def unpacked(codes, k):
    codes = codes.numpy()
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)[..., :k].astype(np.float64)


def weight_values(layer):
    """The weights the layer's codes stand for, float64 [N, K]."""
    k, config = layer.in_features, layer.config
    step = by_element(layer.weight_clip.numpy(), k, config.group_size) * 2 / 15
    return (unpacked(layer.portable_weight, k) - (7.5 if config.codebook == "midrise" else 8)) * step


class Running:
    """A state in the middle of a pass over the given ids."""

    common_entry = None

    def __init__(self, entries, ids):
        self.entries, self.ids = entries, ids

    def ids_for(self, x, layout=None):
        return self.ids


def make(k, n, config, seed=0, bias=True):
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias=bias)
    clip = None
    if config.activations < 16:
        clip = 0.5 + 2.5 * torch.rand(len(ROWS), config.groups(k))
    ids = torch.tensor([[3, 1, 1], [3, 2, 2]], dtype=torch.int32)
    center = torch.full((len(ROWS), k), 0.1) if config.center else None
    layer = LanguageAwareLinear.from_linear(linear, config, Running(ROWS, ids), clip, center=center, seed=11)
    return linear, layer, torch.randn(2, 3, k), ids.numpy()


def expected_output(linear, layer, x, ids):
    config, k = layer.config, layer.in_features
    x = x.double().numpy()
    if config.rotate:
        x = rotated(x, 11)
    if config.activations < 16:
        group = config.activation_group_size or k
        table = layer.clips.double().numpy()[ids]  # [2, 3, groups]
        if config.clip != "static":
            groups = [x[..., i : i + group] for i in range(0, k, group)]
            if config.clip == "rms":
                table = table * np.stack([np.sqrt(np.mean(g**2, axis=-1)) for g in groups], axis=-1)
            else:
                table = table * np.stack([np.abs(g).max(axis=-1) for g in groups], axis=-1)
        x = to_levels(x, by_element(table, k, group), config.codebook, config.activations)
    weight = layer_weight(layer, linear)
    bias = 0 if linear.bias is None else linear.bias.detach().double().numpy()
    return x @ weight.T + bias


def layer_weight(layer, linear):
    """The weight that a layer made of `linear` multiplies by, float64 [N, K]."""
    if layer.config.weights == 4:
        return weight_values(layer)
    weight = linear.weight.detach().double().numpy()
    return rotated(weight, 11) if layer.config.rotate else weight


CONFIGS = [
    QuantConfig(activations=16, group_size=16),
    QuantConfig(activations=16, group_size=16, codebook="midtread", rotate=False),
    QuantConfig(activations=8, group_size=16),
    QuantConfig(activations=8, clip="absmax", granularity="token", group_size=32),
    QuantConfig(group_size=16),
    QuantConfig(group_size=16, codebook="midtread"),
    QuantConfig(group_size=16, rotate=False, granularity="layer"),
    QuantConfig(group_size=16, clip="rms"),
    QuantConfig(group_size=16, clip="absmax", codebook="midtread"),
    QuantConfig(group_size=0, clip="rms", granularity="token"),
    QuantConfig(weights=16, group_size=16),
    QuantConfig(weights=16, group_size=16, clip="rms", granularity="token"),
    QuantConfig(weights=16, group_size=16, clip="absmax", rotate=False),
]


@pytest.mark.parametrize("shape", [(64, 24), (48, 7), (33, 5), (50, 1)], ids=str)
@pytest.mark.parametrize(
    "config",
    CONFIGS,
    ids=lambda c: (
        f"W{c.weights}A{c.activations}-{c.clip}-{c.granularity}-{c.codebook}-{'rot' if c.rotate else 'as-is'}"
    ),
)
def test_forward(shape, config):
    k, n = shape
    linear, layer, x, ids = make(k, n, config, seed=k, bias=n != 5)
    out = layer(x)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), expected_output(linear, layer, x, ids), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(activations=16, group_size=16, center=True),
        QuantConfig(activations=8, group_size=16, center=True, rotate=False),
        QuantConfig(group_size=16, center=True),
        QuantConfig(group_size=16, center=True, clip="absmax"),
        QuantConfig(weights=16, group_size=16, center=True, clip="rms", granularity="token"),
    ],
    ids=lambda c: f"W{c.weights}A{c.activations}-{c.clip}",
)
def test_the_mean_input_of_a_row_keeps_its_exact_output(config):
    k, n = 48, 20
    torch.manual_seed(3)
    linear = nn.Linear(k, n)
    mean = 4 * torch.randn(len(ROWS), k)
    clip = 0.5 + 2.5 * torch.rand(len(ROWS), config.groups(k)) if config.activations < 16 else None
    ids = torch.tensor([[3, 1, 1], [3, 2, 2]], dtype=torch.int32)
    layer = LanguageAwareLinear.from_linear(linear, config, Running(ROWS, ids), clip, center=mean, seed=11)
    x = mean[ids] + 0.3 * torch.randn(2, 3, k)
    # The sink's inputs are quantized as they are, the others less the mean of their row.
    center = torch.where(ids[..., None] == 3, 0, mean[ids]) if config.activations < 16 else torch.zeros(2, 3, k)
    bare = nn.Linear(k, n, bias=False)
    bare.weight = linear.weight
    of_difference = expected_output(bare, layer, x - center, ids.numpy())
    weight = layer_weight(layer, linear)
    difference = (mean[ids] - center).double().numpy()
    exact = mean[ids].double().numpy() @ linear.weight.detach().double().numpy().T
    correction = exact - (rotated(difference, 11) if config.rotate else difference) @ weight.T
    expected = of_difference + correction + linear.bias.detach().double().numpy()
    with torch.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("center", [None, torch.zeros(4, 7), torch.full((4, 8), torch.nan)])
def test_centers_that_do_not_fit(center):
    config = QuantConfig(activations=16, group_size=8, center=True)
    with pytest.raises(LaAciqError, match=r"'fc1'.*mean inputs"):
        LanguageAwareLinear.from_linear(nn.Linear(8, 4), config, LanguageState(ROWS), None, center=center, name="fc1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_in_16_bits(dtype):
    linear, layer, x, ids = make(64, 24, QuantConfig(activations=8, group_size=16))
    layer = layer.to(dtype)
    assert layer.clips.dtype == layer.weight_clip.dtype == torch.float32
    assert layer.bias.dtype == dtype
    x = x.to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    expected = expected_output(linear, layer, x, ids)
    assert np.abs(out.double().numpy() - expected).max() < 0.03 * np.abs(expected).max()


def test_the_clips_survive_a_change_of_dtype_bit_for_bit():
    _, layer, _, _ = make(64, 24, QuantConfig(group_size=16))
    before = layer.clips.clone(), layer.weight_clip.clone()
    layer.to(torch.bfloat16).float()
    assert torch.equal(layer.clips, before[0])
    assert torch.equal(layer.weight_clip, before[1])


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
@pytest.mark.parametrize(("group", "excess"), [(16, 0.01), (64, 0.002), (128, 0.002)])
def test_the_error_of_weight_clips_is_that_of_a_fine_scan(group, excess, codebook):
    torch.manual_seed(0)
    weight = torch.randn(1000, group)
    clips, w = weight_clips(weight, 0, codebook)[:, 0].double().numpy(), weight.double().numpy()

    def error(clip):
        return ((to_levels(w, clip[:, None], codebook) - w) ** 2).sum(axis=1)

    largest = np.abs(w).max(axis=1)
    best = np.min([error(largest * share) for share in np.linspace(0.3, 1.3, 1001)], axis=0)
    assert best.sum() <= error(clips).sum() <= best.sum() * (1 + excess)


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
@pytest.mark.parametrize("shape", [(5, 64, 16), (3, 50, 16), (4, 33, 0), (300, 2048, 64)], ids=str)
def test_weight_clips_are_near_the_best_of_a_fine_scan(shape, codebook):
    n, k, group = shape
    torch.manual_seed(1)
    weight = torch.randn(n, k) * torch.rand(n, 1)
    clips = weight_clips(weight, group, codebook)
    some = slice(0, 5)  # the long case is about chunks of rows; its last rows are looked at below
    for rows in (some, slice(n - 2, n)):
        w = weight[rows].double().numpy()
        sizes = [(i, min(i + (group or k), k)) for i in range(0, k, group or k)]
        total = np.zeros(2)
        for g, (start, stop) in enumerate(sizes):
            part = w[:, start:stop]

            def error(clip, part=part):
                return ((to_levels(part, clip[:, None], codebook) - part) ** 2).sum(axis=1)

            largest = np.abs(part).max(axis=1)
            best = np.min([error(largest * share) for share in np.linspace(0.3, 1.2, 901)], axis=0)
            found = error(clips[rows, g].double().numpy())
            assert (found <= error(largest) * 1.001).all()
            total += found.sum(), best.sum()
        assert total[0] <= total[1] * 1.03  # few groups: the scatter of single ones is larger than that of the mean


def test_weight_codes_are_those_of_the_clips():
    torch.manual_seed(2)
    weight = torch.randn(6, 50)
    codes, clips = quantize_weight(weight, 16, "midrise")
    step = by_element(clips.numpy(), 50, 16) * 2 / 15
    values = (unpacked(codes, 50) - 7.5) * step
    np.testing.assert_allclose(values, to_levels(weight.double().numpy(), step * 7.5, "midrise"), atol=1e-6)


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
def test_zero_weights_stay_zero(codebook):
    linear = nn.Linear(32, 4, bias=False)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[0, 16:] = 1.0
    config = QuantConfig(activations=16, group_size=16, codebook=codebook, rotate=False)
    layer = LanguageAwareLinear.from_linear(linear, config, LanguageState(ROWS), None)
    out = layer(torch.ones(2, 32))
    assert torch.equal(out[:, 1:], torch.zeros(2, 3))
    assert (out[:, 0] - 16).abs().max() < 1.0


def test_zero_rows_of_input():
    _, layer, _, _ = make(64, 24, QuantConfig(group_size=16))
    layer.state = LanguageState(ROWS)
    assert layer(torch.zeros(0, 64)).shape == (0, 24)
    assert layer(torch.zeros(2, 0, 64)).shape == (2, 0, 24)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(bad):
    linear = nn.Linear(8, 4)
    with torch.no_grad():
        linear.weight[1, 2] = bad
    with pytest.raises(LaAciqError, match=r"model\.layers\.3\.up_proj.*1 of its 32 weights"):
        LanguageAwareLinear.from_linear(
            linear, QuantConfig(activations=16), LanguageState(ROWS), None, name="model.layers.3.up_proj"
        )


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (None, "got none"),
        (torch.ones(4, 3), r"\[4, 2\], got one of shape \[4, 3\]"),
        (torch.tensor([[1.0, 1.0]] * 3 + [[1.0, 0.0]]), "not finite and positive"),
        (torch.tensor([[1.0, 1.0]] * 3 + [[1.0, float("nan")]]), "not finite and positive"),
    ],
)
def test_clip_tables_that_do_not_fit(clip, message):
    with pytest.raises(LaAciqError, match=message):
        LanguageAwareLinear.from_linear(
            nn.Linear(8, 4), QuantConfig(group_size=4), LanguageState(ROWS), clip, name="up"
        )


def test_a_layer_with_nothing_to_quantize_is_refused():
    with pytest.raises(LaAciqError, match="nothing to quantize"):
        LanguageAwareLinear(8, 4, True, QuantConfig(weights=16, activations=16), LanguageState(ROWS))


def test_each_row_of_a_mixed_batch_gets_its_own_clip():
    config = QuantConfig(group_size=16)
    torch.manual_seed(4)
    linear = nn.Linear(32, 8)
    state = LanguageState(ROWS)
    clip = torch.tensor([[1.0], [0.2], [3.0], [1.0]]).expand(4, 2)
    model = nn.Sequential(LanguageAwareLinear.from_linear(linear, config, state, clip))
    state.attach(model)
    x = torch.randn(2, 5, 32)
    with languages(["en", "sw"]):
        mixed = model(x)
    for row, tag in enumerate(["en", "sw"]):
        with languages([tag]):
            alone = model(x[row : row + 1])
        torch.testing.assert_close(mixed[row], alone[0], rtol=0, atol=1e-6)
    with languages(["sw", "en"]):
        assert not torch.allclose(model(x)[0, 1:], mixed[0, 1:])


def test_a_deep_copy_computes_the_same():
    _, layer, x, _ = make(64, 24, QuantConfig(group_size=16))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("clip", ["static", "rms", "absmax"])
@pytest.mark.parametrize(("weights", "activations"), [(4, 4), (4, 8), (4, 16), (16, 4)])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_pass_warns(clip, weights, activations, center, compiled):
    config = QuantConfig(weights=weights, activations=activations, clip=clip, group_size=16, center=center)
    _, layer, x, _ = make(64, 24, config)
    if compiled:
        torch._dynamo.reset()
        layer = torch.compile(layer, backend="aot_eager")
    for again in range(2):
        inputs = x.clone().requires_grad_()
        before = torch.nn.Parameter(torch.ones(64))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            y = layer(inputs * before)
            assert not [one for one in seen if "autograd" in str(one.message)]
            assert y.requires_grad  # or the pass would stop before it could warn
            y.sum().backward()
        assert [one for one in seen if "autograd" in str(one.message)], again
        assert inputs.grad is None or not bool(inputs.grad.any())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer(x), y)
        assert not layer(x).requires_grad


def test_the_output_can_be_written_in_place_where_gradients_are_on():
    _, layer, x, _ = make(64, 24, QuantConfig(group_size=16))
    y = layer(x.requires_grad_())
    assert torch.equal(y.clone().add_(1), y.add_(1))
