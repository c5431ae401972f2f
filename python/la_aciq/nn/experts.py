"""Quantized experts of a mixture: each token's rows keep the language of their token through the routing."""

from typing import Any

import torch
from torch import nn

from ..models import EXPERT_WEIGHTS
from .config import QuantConfig
from .forward_pass import LanguageState
from .linear import LanguageAwareLinear
from .weights import Rounding


class LanguageAwareExperts(nn.Module):
    """A mixture's experts, each a gated pair of `LanguageAwareLinear`: `<i>.gate_up_proj` and `<i>.down_proj`.

    All experts share the clips of their layer's inputs, which are chosen on the tokens routed to any of them; each has
    its own weights.
    """

    layout: str | None = None  # of the input (nn/layout.py); None: by its shape

    def __init__(self, act_fn: Any, state: LanguageState) -> None:
        super().__init__()
        self.act_fn = act_fn
        self.state = state

    @classmethod
    def empty(cls, experts: Any, config: QuantConfig, state: LanguageState) -> "LanguageAwareExperts":
        """Make empty experts of the shapes of trained ones, for a checkpoint to fill.

        Args:
            experts: as in `from_experts`; only shapes and dtypes are read.
            config: how the layers are quantized.
            state: the model's language ids.

        Returns:
            The experts, on the meta device.
        """
        quantized = cls(experts.act_fn, state)
        for index in range(len(experts.gate_up_proj)):
            for name in EXPERT_WEIGHTS:
                weight = getattr(experts, name)
                n, k = weight.shape[1:]
                layer = LanguageAwareLinear(k, n, False, config, state, dtype=weight.dtype, device="meta")
                quantized._put(index, name, layer)
        return quantized

    @classmethod
    def from_experts(
        cls,
        experts: Any,
        config: QuantConfig,
        state: LanguageState,
        clips: dict[str, torch.Tensor | None],
        *,
        centers: dict[str, torch.Tensor | None],
        seed: int = 0,
        name: str = "experts",
        second_moments: dict[str, Rounding | None] | None = None,
        like: "LanguageAwareExperts | None" = None,
    ) -> "LanguageAwareExperts":
        """Quantize trained experts (see `models.is_experts`), which are left as they are.

        All experts are rounded by the same second moments, those of the tokens routed to any of them.

        Args:
            experts: with parameters `gate_up_proj` [E, 2 I, K] and `down_proj` [E, K, I], of any float dtype.
            config: as in `LanguageAwareLinear.from_linear`.
            state: as in `LanguageAwareLinear.from_linear`.
            seed: as in `LanguageAwareLinear.from_linear`.
            name: as in `LanguageAwareLinear.from_linear`.
            clips: by the name of the weight, "gate_up_proj" and "down_proj", as
            centers: by the name of the weight, "gate_up_proj" and "down_proj", as
            second_moments: by the name of the weight, "gate_up_proj" and "down_proj", as
                `LanguageAwareLinear.from_linear` takes each.
            like: these experts as they were quantized before.

        Returns:
            The quantized experts, on the device of the trained ones.

        Raises:
            LaAciqError: as `LanguageAwareLinear.from_linear`.
        """
        quantized = cls(experts.act_fn, state)
        for index in range(len(experts.gate_up_proj)):
            for weight in EXPERT_WEIGHTS:
                layer_name = f"{index}.{weight}"
                linear = nn.Linear(1, 1, bias=False, device="meta")
                linear.weight = nn.Parameter(getattr(experts, weight)[index], requires_grad=False)
                before: Any = None if like is None else like.get_submodule(layer_name)
                layer = LanguageAwareLinear.from_linear(
                    linear,
                    config,
                    state,
                    clips.get(weight),
                    center=centers.get(weight),
                    seed=seed,
                    name=f"{name}.{layer_name}",
                    second_moments=(second_moments or {}).get(weight),
                    like=before,
                )
                quantized._put(index, weight, layer)
        return quantized

    def _put(self, index: int, name: str, layer: LanguageAwareLinear) -> None:
        if str(index) not in self._modules:
            self.add_module(str(index), nn.Module())
        self.get_submodule(str(index)).add_module(name, layer)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, K], top_k_index int64 [T, k] (each token's experts), top_k_weights [T, k] -> [T, K]."""
        output = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            expert = self._modules.get(str(index))
            if expert is None:  # another process's
                continue
            tokens, place = torch.where(top_k_index == index)
            with self.state.picked(hidden_states, tokens, self.layout):
                gate, up = expert.get_submodule("gate_up_proj")(hidden_states[tokens]).chunk(2, dim=-1)
                y = expert.get_submodule("down_proj")(self.act_fn(gate) * up)
            output.index_add_(0, tokens, (y * top_k_weights[tokens, place, None]).to(output.dtype))
        return output
