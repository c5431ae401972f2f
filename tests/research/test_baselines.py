"""The baselines for INT4 weights that evaluations compare with, against their definitions."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.research.baselines import BASELINES, GROUP, NF4, InputStatistics, quantized_copy

K = 2 * GROUP


def inputs(tokens=400, k=K, seed=0):
    """Correlated inputs with a few large channels, float32 [tokens, K]."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((tokens, k // 4)) @ random.standard_normal((k // 4, k))
    return torch.from_numpy(x * np.where(np.arange(k) % 17 == 0, 10, 1)).float()


def weights(n=12, k=K, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_t(5, (n, k))).float()


def quantized(name, weight, x):
    method, _, needs = BASELINES[name]
    return method([weight], *((x.T @ x, x.abs().mean(0)) if needs else ()))[0]


def output_error(weight, rounded, x):
    return float(((weight - rounded).double() @ x.double().T).square().sum())


@pytest.mark.parametrize("name", ["rtn_symmetric", "rtn_asymmetric", "nf4", "hqq", "gptq"])
def test_a_group_has_at_most_sixteen_values(name):
    rounded = quantized(name, weights(), inputs()).reshape(-1, GROUP)
    assert max(len(torch.unique(group)) for group in rounded) <= 16


def test_rounding_to_nearest_is_within_half_a_step():
    groups = weights().reshape(-1, GROUP)
    symmetric = (quantized("rtn_symmetric", weights(), None).reshape(-1, GROUP) - groups).abs().amax(1)
    assert (symmetric <= groups.abs().amax(1) / 7.5 * 0.5001).all()
    asymmetric = (quantized("rtn_asymmetric", weights(), None).reshape(-1, GROUP) - groups).abs()
    step = (groups.amax(1) - groups.amin(1)) / 15
    # A rounded zero point moves the ends by up to half a step.
    assert (asymmetric.amax(1) <= step * 1.0001).all()
    assert (asymmetric.median(1).values <= step / 2).all()


def test_nf4_takes_the_nearest_of_its_sixteen_values():
    assert len(NF4) == 16
    groups = weights().reshape(-1, GROUP)
    rounded = quantized("nf4", weights(), None).reshape(-1, GROUP)
    values = groups.abs().amax(1)[:, None, None] * torch.tensor(NF4)
    nearest = (groups[..., None] - values).abs().amin(-1)
    torch.testing.assert_close((groups - rounded).abs(), nearest)


def test_hqq_is_better_than_where_it_starts():
    weight = weights()
    started = quantized("rtn_asymmetric", weight, None)
    assert (weight - quantized("hqq", weight, None)).abs().mean() < (weight - started).abs().mean()


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_what_looks_at_the_output_beats_rounding_to_nearest_on_it(name):
    weight, x = weights(), inputs()
    started = output_error(weight, quantized("rtn_asymmetric", weight, None), x)
    assert output_error(weight, quantized(name, weight, x), x) < 0.7 * started


def test_gptq_of_uncorrelated_inputs_is_rounding_to_nearest():
    weight = weights()
    torch.testing.assert_close(
        BASELINES["gptq"][0]([weight], torch.eye(K), torch.ones(K))[0], quantized("rtn_asymmetric", weight, None)
    )


def test_awq_scales_are_shared_by_layers_that_read_one_input():
    """An input channel that dwarfs the others in one layer's weight decides the scales of both."""
    x, alone, large = inputs(), weights(seed=2), weights(seed=3)
    products, magnitudes = x.T @ x, x.abs().mean(0)
    apart = BASELINES["awq"][0]([alone], products, magnitudes)[0]
    together = BASELINES["awq"][0]([alone, 100 * large], products, magnitudes)
    large_alone = BASELINES["awq"][0]([100 * large], products, magnitudes)[0]
    torch.testing.assert_close(together[1], large_alone)
    assert output_error(alone, apart, x) <= output_error(alone, together[0], x) * 1.05


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, K)
        self.first, self.second = nn.Linear(K, K), nn.Linear(K, K)
        self.last, self.lm_head = nn.Linear(K, K), nn.Linear(K, 16)

    def forward(self, input_ids, use_cache=False):
        x = self.embedding(input_ids)
        return self.lm_head(self.last(self.first(x) * self.second(x)))


class TestCopies:
    def windows(self):
        return [torch.arange(5), torch.tensor([3, 8, 8, 15])]

    def test_statistics_are_those_of_the_inputs(self):
        model = Model()
        statistics = InputStatistics.measure(model, self.windows())
        assert statistics.source == {"first": "first", "second": "first", "last": "last"}
        x = torch.cat([model.embedding(ids) for ids in self.windows()]).detach()
        torch.testing.assert_close(statistics.products["first"], x.T @ x)
        torch.testing.assert_close(statistics.magnitudes["first"], x.abs().mean(0))
        inner = (model.first(x) * model.second(x)).detach()
        torch.testing.assert_close(statistics.products["last"], inner.T @ inner)

    @pytest.mark.parametrize("name", BASELINES)
    def test_only_the_weights_of_a_copy_change(self, name):
        model = Model()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        candidate, bits = quantized_copy(model, name, InputStatistics.measure(model, self.windows()))
        assert 4 < bits <= 4.5
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key])
            changed = key.endswith("weight") and not key.startswith(("lm_head", "embedding"))
            assert torch.equal(candidate.state_dict()[key], tensor) != changed
            assert torch.isfinite(candidate.state_dict()[key]).all()

    def test_what_needs_statistics_says_so(self):
        with pytest.raises(ValueError, match="statistics: 'awq' needs InputStatistics, got None"):
            quantized_copy(Model(), "awq")
