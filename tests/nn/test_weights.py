"""Rounding weights with error feedback, against float64 arithmetic on the inputs themselves."""

import numpy as np
import pytest
import torch
from torch import nn

import la_aciq
from la_aciq import embedded, ops
from la_aciq.errors import LaAciqError
from la_aciq.nn import LanguageAwareLinear, LanguageState, QuantConfig
from la_aciq.nn.weights import quantize_weight, weight_clips
from la_aciq.ops import reference

ROWS = ("und", "en", "sink")


def inputs(tokens, k, seed=0):
    """Correlated inputs float64 [tokens, K] with one that dwarfs the others, as the first token's do."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, max(k // 3, 1))) @ random.standard_normal((max(k // 3, 1), k))
    x += 0.3 * random.standard_normal((tokens, k))
    x[0] *= 100
    return x


def weights(n, k, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_t(5, (n, k)) / np.sqrt(k)).float()


def products(x):
    return torch.from_numpy(x.T @ x)


def output_error(weight, values, x):
    """sum_t |(W - Q) x_t|^2 by multiplying the inputs out, float64 [N]."""
    return (((weight.double() - values.double()).numpy() @ x.T) ** 2).sum(1)


def feedback(weight, second_moments, group, codebook="midrise"):
    """Values, float64 [N, K], and clips of weights rounded with error feedback."""
    codes, clips = quantize_weight(weight, group, codebook, second_moments)
    k = weight.shape[1]
    settings = {"k": k, "group_size": group, "codebook": codebook, "per_row": True}
    return reference.dequantize(codes, clips, **settings, dtype=torch.float64), clips


def nearest(weight, group, codebook):
    """Values of the codebook nearest the weights with the clips of the least squared error, float64."""
    k = weight.shape[1]
    clips = weight_clips(weight, group, codebook).double().numpy()
    step = np.repeat(clips, group or k, axis=1)[:, :k] * 2 / 15
    half = 0.5 if codebook == "midrise" else 0.0
    return torch.from_numpy((np.clip(np.rint(weight.double().numpy() / step - half), -8, 7) + half) * step)


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(24, 64, 16), (7, 50, 16), (3, 33, 32), (16, 300, 0), (5, 300, 200), (1, 2, 2)]
)
def test_the_error_of_the_output_is_far_below_that_of_rounding_to_nearest(n, k, group, codebook):
    x, weight = inputs(4 * k, k), weights(n, k)
    values, clips = feedback(weight, products(x), group, codebook)
    assert values.shape == (n, k)
    assert clips.shape == (n, -(-k // group) if group else 1)
    before, after = (output_error(weight, q, x).sum() for q in (nearest(weight, group, codebook), values))
    assert after <= before * (0.5 if k > 2 else 1)


@pytest.mark.parametrize("group", [16, 0])
def test_no_single_change_of_a_code_makes_the_error_much_smaller(group):
    """The descent ends near a point where each code is the best given all others: brute force over all codes."""
    k = 48
    x, weight = inputs(300, k), weights(6, k)
    values, clips = feedback(weight, products(x), group)
    error = output_error(weight, values, x)
    step = np.repeat(clips.double().numpy(), group or k, axis=1)[:, :k] * 2 / 15
    best = error.copy()
    for column in range(k):
        for code in range(16):
            changed = values.double().clone()
            changed[:, column] = torch.from_numpy((code - 7.5) * step[:, column])
            best = np.minimum(best, output_error(weight, changed, x))
    assert (best >= 0.7 * error).all()
    assert best.sum() > 0.95 * error.sum()


def test_a_clip_is_near_the_best_of_a_fine_scan():
    """With uncorrelated inputs there is nothing to feed back, and each group's clip is that of its own least error."""
    weight = weights(40, 64)
    values, _ = feedback(weight, torch.eye(64), 32)
    found = ((weight - values).double() ** 2).view(40, 2, 32).sum(-1)
    groups = weight.double().view(40, 2, 32, 1)
    step = groups.abs().amax(2, keepdim=True) * torch.linspace(0.3, 1.2, 1801, dtype=torch.float64) / 7.5
    best = (groups - (((groups / step) - 0.5).round().clamp(-8, 7) + 0.5) * step).square().sum(2).amin(-1)
    assert (found <= best * 1.05).double().mean() > 0.9
    assert found.sum() < 1.02 * best.sum()


def test_inputs_that_are_always_zero_leave_the_rest_as_it_would_be_without_them():
    k, dead = 48, slice(16, 32)
    x, weight = inputs(200, k), weights(8, k)
    x[:, dead] = 0
    values, clips = feedback(weight, products(x), 16)
    assert torch.isfinite(values).all()
    alone, alone_clips = feedback(
        weight[:, [*range(16), *range(32, 48)]], products(np.delete(x, range(16, 32), axis=1)), 16
    )
    torch.testing.assert_close(values[:, [*range(16), *range(32, 48)]], alone, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(clips[:, [0, 2]], alone_clips, rtol=1e-3, atol=1e-5)
    # Nothing is known of the others: they are rounded to nearest.
    difference = (values[:, dead] - weight[:, dead]).abs()
    inside = weight[:, dead].abs() <= clips[:, 1:2]
    assert (difference <= clips[:, 1:2] / 15 * 1.001)[inside].all()


@pytest.mark.parametrize("second_moments", [torch.zeros(32, 32), torch.diag(torch.tensor([1e-30] * 32))])
def test_without_information_every_weight_is_rounded_to_nearest(second_moments):
    weight = weights(8, 32)
    values, clips = feedback(weight, second_moments, 16)
    step = clips.repeat_interleave(16, dim=1) * 2 / 15
    expected = ((weight / step - 0.5).round().clamp(-8, 7) + 0.5) * step
    torch.testing.assert_close(values, expected.double())


def test_fewer_inputs_than_elements():
    k = 96
    x, weight = inputs(5, k), weights(12, k)
    values, _ = feedback(weight, products(x), 32)
    assert output_error(weight, values, x).sum() < 0.05 * output_error(weight, nearest(weight, 32, "midrise"), x).sum()
    # What was not seen is not spoiled: the error of the weights themselves stays within twice that of nearest.
    assert (weight - values).square().sum() < 4 * (weight - nearest(weight, 32, "midrise")).square().sum()


def test_groups_of_zeros_and_rows_of_zeros():
    x, weight = inputs(100, 32), weights(4, 32)
    weight[1] = 0
    values, clips = feedback(weight, products(x), 16)
    assert torch.isfinite(values).all()
    assert (values[1] == 0).all()
    assert (clips[1] == 0).all()
    codes, clips = quantize_weight(weight, 16, "midrise", products(x))
    back = ops.dequantize(codes, clips, torch.arange(4, dtype=torch.int32), k=32, group_size=16)
    assert (back[1] == 0).all()


def test_the_scale_of_the_inputs_does_not_matter_and_the_result_repeats():
    x, weight = inputs(100, 32), weights(4, 32)
    first = quantize_weight(weight, 16, "midrise", products(x))
    for factor in (1.0, 2.0**-40, 2.0**40):
        again = quantize_weight(weight, 16, "midrise", products(x) * factor)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


INDEFINITE = torch.eye(32)
INDEFINITE[0, 1] = INDEFINITE[1, 0] = 5


def test_second_moments_that_do_not_fit():
    with pytest.raises(ValueError, match=r"second_moments: expected finite values of shape \[32, 32\]"):
        quantize_weight(weights(4, 32), 16, "midrise", torch.eye(16))
    broken = torch.eye(32)
    broken[3, 3] = torch.nan
    with pytest.raises(ValueError, match="1 not finite"):
        quantize_weight(weights(4, 32), 16, "midrise", broken)
    with pytest.raises(ValueError, match=r"second_moments: .* not positive semidefinite"):
        quantize_weight(weights(4, 32), 16, "midrise", INDEFINITE)


@pytest.mark.model
@pytest.mark.parametrize("name", ["layers.3.self_attn.q_proj", "layers.20.mlp.gate_proj"])
def test_a_layer_of_a_real_model_loses_as_much_as_by_the_definition(name):
    model, tokenizer = embedded.load_model()
    ids = torch.tensor([tokenizer(embedded.load_texts(["en"])["en"])["input_ids"][:300]])
    layer, seen = model.model.get_submodule(name), []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()[0].double()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    (x,) = seen
    weight, second_moments = layer.weight.detach()[:96].float(), x.T @ x
    errors = []
    for backend in ("cpu", "reference"):
        with ops.use_backend(backend):
            values, _ = feedback(weight, second_moments, 64)
        errors.append(output_error(weight, values, x.numpy()).sum())
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert errors[0] < 0.5 * output_error(weight, nearest(weight, 64, "midrise"), x.numpy()).sum()


class TestLayer:
    def test_it_rounds_the_rotated_weight_by_the_second_moments(self):
        torch.manual_seed(0)
        linear = nn.Linear(48, 20)
        x = inputs(300, 48)
        config, state = QuantConfig(activations=16, group_size=16), LanguageState(ROWS)
        errors = {}
        for rounding in ("feedback", "nearest"):
            settings = QuantConfig(activations=16, group_size=16, rounding=rounding)
            signs = torch.from_numpy(la_aciq.ops.rotation.signs(48, 0))
            rotated = ops.rotate(torch.from_numpy(x).float(), signs).double()
            layer = LanguageAwareLinear.from_linear(
                linear, settings, state, None, second_moments=(rotated.T @ rotated).float()
            )
            given = torch.from_numpy(x).float()
            errors[rounding] = (layer(given) - linear(given)).square().sum().item()
        assert errors["feedback"] < 0.2 * errors["nearest"]
        assert LanguageAwareLinear.from_linear(linear, config, state, None).rounded_by is None

    def test_what_does_not_fit_is_refused_by_name(self):
        linear, state = nn.Linear(32, 4), LanguageState(ROWS)
        config = QuantConfig(activations=16, group_size=16, rounding="feedback")
        with pytest.raises(LaAciqError, match=r"layer 'a\.b': rounding = 'feedback' needs second moments"):
            LanguageAwareLinear.from_linear(linear, config, state, None, name="a.b")
        for broken in (torch.eye(16), torch.full((32, 32), torch.inf), INDEFINITE):
            with pytest.raises(
                LaAciqError, match=r"layer 'a\.b': second_moments: (expected finite values of shape|.*semidefinite)"
            ):
                LanguageAwareLinear.from_linear(linear, config, state, None, name="a.b", second_moments=broken)

    def test_weights_are_shared_only_when_rounded_by_the_same_second_moments(self):
        linear, state = nn.Linear(32, 4), LanguageState(ROWS)
        config = QuantConfig(activations=16, group_size=16)
        one, other = products(inputs(100, 32)).float(), products(inputs(100, 32, seed=5)).float()
        first = LanguageAwareLinear.from_linear(linear, config, state, None, second_moments=one)
        shared = LanguageAwareLinear.from_linear(linear, config, state, None, second_moments=one, like=first)
        assert shared._buffers["weight_codes"].data_ptr() == first._buffers["weight_codes"].data_ptr()
        for changed in (other, None):
            made = LanguageAwareLinear.from_linear(linear, config, state, None, second_moments=changed, like=first)
            assert made._buffers["weight_codes"].data_ptr() != first._buffers["weight_codes"].data_ptr()
