"""What a model's modules are: which are linear layers, experts or the output head, and the fingerprint of a model."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import LaAciqError

# What makes two configurations the same network; the rest of a config.json varies with versions and habits of saving.
_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "tie_word_embeddings",
)
_SAMPLES_PER_WEIGHT = 64


def fingerprint(model: nn.Module) -> str:
    """A hash of what a model is: architecture, names and shapes of its parameters, and 64 values of each.

    Cheap and deterministic. The same weights in another dtype, or dequantized differently, are another model.

    Args:
        model: a model with parameters on any device but meta.

    Returns:
        A SHA-256 as 64 hexadecimal digits.
    """
    return fingerprint_of(model, {name: sample(parameter) for name, parameter in model.named_parameters()})


def fingerprint_of(model: nn.Module, samples: Mapping[str, bytes]) -> str:
    """The fingerprint of a model from samples of its parameters.

    Args:
        model: a model of the architecture; its parameters are not read.
        samples: by the name of a parameter, its `sample`.

    Returns:
        A SHA-256 as 64 hexadecimal digits.
    """
    config = getattr(model, "config", None)
    digest = hashlib.sha256(repr([type(model).__name__, [_setting(config, key) for key in _ARCHITECTURE]]).encode())
    for name, sampled in sorted(samples.items()):
        digest.update(name.encode() + sampled)
    return digest.hexdigest()


def _setting(config: Any, key: str) -> Any:
    """A value of a configuration; None where there is none, or where each layer has its own."""
    try:
        return getattr(config, key, None)
    except Exception as error:
        if type(error).__name__ != "AmbiguousGlobalPerLayerAttributeError":
            raise
        return None


def sample(parameter: torch.Tensor) -> bytes:
    """A parameter's part of the fingerprint: its shape and 64 of its values.

    Args:
        parameter: a tensor of any shape and floating dtype.

    Returns:
        The shape as text, then up to 64 values as float32.
    """
    values = parameter.detach().reshape(-1)
    picked = torch.from_numpy(
        np.linspace(0, max(len(values) - 1, 0), min(_SAMPLES_PER_WEIGHT, len(values)), dtype=np.int64)
    )
    sampled = values[picked.to(values.device)].to("cpu", torch.float32).numpy().tobytes()
    return f" {list(parameter.shape)}".encode() + sampled


def linear_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight [N, K] of a linear layer: `torch.nn.Linear` itself, Falcon's, or GPT-2's Conv1D; otherwise None.

    Another subclass of Linear may compute something else, so it does not count as a linear layer, and neither does a
    layer whose weight is no parameter of its own.

    Args:
        module: any module.

    Returns:
        The weight [N, K], a view of the module's parameter, or None.
    """
    if module._parameters.get("weight") is None:  # computed of other parameters, by pruning or weight normalization
        return None
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if type(module) is nn.Linear or kind == "transformers.models.falcon.modeling_falcon.FalconLinear":
        return module.get_parameter("weight")
    return module.get_parameter("weight").T if kind == "transformers.pytorch_utils.Conv1D" else None


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a mixture's experts as transformers keeps them: gated, with the parameters `gate_up_proj`
    [E, 2 I, K] and `down_proj` [E, K, I], gate before up, without biases.

    Args:
        module: any module.

    Returns:
        True for experts that can be quantized.
    """
    flags = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    gate = getattr(type(module), "_apply_gate", None)
    return (
        all(getattr(module, name, None) is value for name, value in flags.items())
        and not getattr(module, "has_post_expert_norm", False)
        and getattr(gate, "__name__", None) == "_default_apply_gate"
        and set(module._parameters) == set(EXPERT_WEIGHTS)
        and not module._modules.keys() - {"act_fn"}
    )


# The parameters of experts, each [E, N, K], and names of what is measured and quantized of them.
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


def output_head(model: nn.Module) -> str | None:
    """The name of the layer that computes the logits, whatever its architecture calls it.

    Args:
        model: any module; models of transformers have an output head.

    Returns:
        The full name of the layer, or None where there is none.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name, module in model.named_modules() if module is head), None)


def is_quantized(config: Any) -> bool:
    """Whether a configuration says that the model's weights are quantized.

    The weights of a GGUF file are floating-point once they are loaded, so they do not count.

    Args:
        config: a configuration of transformers.

    Returns:
        True where it has a `quantization_config` other than GGUF's.
    """
    quantization = getattr(config, "quantization_config", None)
    return quantization is not None and "gguf" not in str(quantization).lower()


def check_constant_weights(model: nn.Module) -> None:
    """Check that a model's forward pass leaves its weights as they are.

    Args:
        model: any module.

    Raises:
        LaAciqError: it is an RWKV model that rescales weights in place in its first pass.
    """
    for module in model.modules():
        every = getattr(getattr(module, "config", None), "rescale_every", 0)
        if hasattr(module, "layers_are_rescaled") and every > 0:
            raise LaAciqError(
                f"{type(model).__name__} divides weights in place when it first runs (rescale_every = {every}), which "
                "quantized weights cannot follow; load it with rescale_every=0, which computes the same"
            )
