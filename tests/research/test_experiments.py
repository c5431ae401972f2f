"""The rounding that benchmarks/research/experiments.py does by itself, and how it chooses clips."""

import numpy as np
import pytest
import torch
from nearest_value import nearest
from torch import nn

from benchmarks.research import baselines
from benchmarks.research.experiments import SHARES, Entry, Simulated, experiments, least, rounded

K = 128


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(K, 32, bias=False)

    def forward(self, x):
        return self.layer(x)


def an_entry(seed=0, **how):
    random = torch.Generator().manual_seed(seed)
    clips, first = (0.5 + torch.rand(2, generator=random) for _ in range(2))
    return Entry({"layer": clips}, {"layer": first}, {"layer": torch.randn(K, generator=random)}, **how)


@pytest.mark.parametrize("bits", [3, 4])
def test_values_are_the_nearest_of_the_codebook(bits):
    x = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(1))
    clip = torch.tensor([[0.7], [2.5]])
    expected = np.stack([nearest(x[:, i].double().numpy(), float(clip[i]), bits, "midrise") for i in range(2)], axis=1)
    np.testing.assert_allclose(rounded(x, clip, bits).numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", [{}, {"bits": 3}, {"absmax": 0.9}, {"absmax": 0.9, "cap": 1.2}])
def test_a_simulated_layer_rounds_what_its_row_says(how):
    torch.manual_seed(2)
    model, x, entry = OneLayer(), torch.randn(1, 10, K), an_entry(**how)
    simulated = Simulated(model, {"layer": "layer"}, seed=0)
    simulated.entry = entry
    with torch.no_grad():
        y = simulated.model(x)[0].double().numpy()
    turn = simulated.rotated(torch.eye(K)).double().numpy()  # x @ turn is the rotated x
    weight, center = model.layer.weight.detach().double().numpy() @ turn, entry.centers["layer"].double().numpy()
    values = x[0].double().numpy() @ turn
    for t, value in enumerate(values):
        less = center if t else np.zeros(K)
        parts = []
        for g in range(2):
            group = (value - less)[g * 64 : g * 64 + 64]
            clip = float((entry.clips if t else entry.first)["layer"][g])
            if entry.absmax:
                most = entry.absmax * np.abs(group).max()
                clip = min(most, entry.cap * clip) if entry.cap and t else most
            parts.append(nearest(group, clip, entry.bits, "midrise"))
        np.testing.assert_allclose(y[t], weight @ (np.concatenate(parts) + less), rtol=1e-4, atol=1e-4)


def test_the_least_of_a_parabola_is_found():
    best = np.array([-0.61, 0.0, 0.43])
    errors = (np.log2(SHARES) - best[:, None]) ** 2 + 3
    np.testing.assert_allclose(least(errors), best, atol=1e-12)
    assert least(np.arange(len(SHARES), dtype=float)) == np.log2(SHARES[1])  # the end of the grid


def test_every_row_is_compared_with_rows_there_are():
    table = experiments()
    assert all(other in table for one in table.values() for other in one.against)


@pytest.mark.parametrize("name", baselines.PACKAGES)
def test_another_package_rounds_to_sixteen_values_a_group(name):
    pytest.importorskip(baselines.PACKAGES[name][1])
    torch.manual_seed(3)
    model = OneLayer().to(torch.bfloat16)
    candidate, bits = baselines.package_copy(model, name)
    with torch.no_grad():
        weight = candidate(torch.eye(K, dtype=torch.bfloat16)[None])[0].T.float()
    assert bits == 4.5
    assert max(len(torch.unique(group)) for group in weight.reshape(-1, 64)) <= 16
    error = (weight - model.layer.weight.float()).norm() / model.layer.weight.float().norm()
    assert 0.03 < error < 0.15
