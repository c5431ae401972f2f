"""Hugging Face causal language models: loading them with errors one can act on, and telling them apart."""

import hashlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from .errors import LaAciqError

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
    """
    return fingerprint_of(model, {name: sample(parameter) for name, parameter in model.named_parameters()})


def fingerprint_of(model: nn.Module, samples: Mapping[str, bytes]) -> str:
    """The fingerprint of a model of this architecture whose parameters gave these samples, by name."""
    config = getattr(model, "config", None)
    digest = hashlib.sha256(
        repr([type(model).__name__, [getattr(config, key, None) for key in _ARCHITECTURE]]).encode()
    )
    for name, sampled in sorted(samples.items()):
        digest.update(name.encode() + sampled)
    return digest.hexdigest()


def sample(parameter: torch.Tensor) -> bytes:
    """A parameter's part of the fingerprint: its shape and 64 of its values."""
    values = parameter.detach().reshape(-1)
    picked = torch.from_numpy(
        np.linspace(0, max(len(values) - 1, 0), min(_SAMPLES_PER_WEIGHT, len(values)), dtype=np.int64)
    )
    found = values[picked.to(values.device)].to("cpu", torch.float32).numpy().tobytes()
    return f" {list(parameter.shape)}".encode() + found


def linear_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight [N, K] of a linear layer: `torch.nn.Linear` itself, Falcon's, or GPT-2's Conv1D; otherwise None.

    Another subclass of Linear may compute something else, and is not taken for one.
    """
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if type(module) is nn.Linear or kind == "transformers.models.falcon.modeling_falcon.FalconLinear":
        return module.get_parameter("weight")
    return module.get_parameter("weight").T if kind == "transformers.pytorch_utils.Conv1D" else None


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a mixture's experts as transformers keeps them: gated, with the parameters `gate_up_proj`
    [E, 2 I, K] and `down_proj` [E, K, I], gate before up, without biases.
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
    """The name of the layer that makes the logits, whatever its architecture calls it."""
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name, module in model.named_modules() if module is found), None)


def is_ignored(layer: str, patterns: Iterable[str], head: str | None = None) -> bool:
    """Whether a layer of this full name is named by its full name, its last component, or a shell pattern.

    "lm_head" also names the model's output head, `head`, where it has another name.
    """
    last = "lm_head" if layer == head else layer.rpartition(".")[2]
    return any(pattern in (layer, last) or fnmatchcase(layer, pattern) for pattern in patterns)


def load_model(name: str, *, device: str = "cpu", dtype: str | None = None, causal: bool = True) -> tuple[Any, Any]:
    """A language model, in evaluation mode, and its tokenizer.

    name: a folder, a .gguf file, or a Hugging Face model id (from the cache, or the hub where it can be reached). Code
        that comes with a model is never run.
    dtype: "float32", "bfloat16", "float16" or "auto" (as stored); None is float32 on a CPU and "auto" elsewhere.
    causal: whether it must be a causal language model; otherwise any class of transformers that config.json names.

    Raises `LaAciqError` in one sentence when there is no such model, it is not causal and has to be, or it is quantized
    already.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # None, transformers' default, would ask on stdin whether to run the model's code.
    place: dict[str, Any] = {**_locate(name), "trust_remote_code": False}
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise LaAciqError(f"device {device!r} cannot be used: {_first_line(error)}") from error
    if dtype is None:
        dtype = "float32" if target.type == "cpu" else "auto"
    try:
        config = AutoConfig.from_pretrained(**place)
        _check_unquantized(name, config)
        kind = AutoModelForCausalLM
        if causal:
            _check_causal(name, config)
        elif config.architectures:
            kind = getattr(transformers, config.architectures[0])
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model = kind.from_pretrained(
            **place,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=None if "gguf_file" in place else True,  # never pickle
        )
    except LaAciqError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, ImportError, SafetensorError) as error:
        raise LaAciqError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    if "gguf_file" in place:
        # The weights are floating-point now; what the file stored them as is of no further concern, and forbids saving.
        del model.config.quantization_config
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)
    return model.to(target).eval(), tokenizer


def _locate(name: str) -> dict[str, str]:
    """Arguments of `from_pretrained` for a folder, a .gguf file or a hub id."""
    if not name:
        raise LaAciqError("model '' does not exist; expected a model folder, a .gguf file or a Hugging Face model id")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise LaAciqError(
                f"model {name!r} is a file; expected a model folder, a .gguf file or a Hugging Face model id"
            )
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LaAciqError(f"model folder {name!r} has no config.json; expected a folder made by save_pretrained")
        return {"pretrained_model_name_or_path": str(path)}
    _check_hub(name)
    return {"pretrained_model_name_or_path": name}


def _check_hub(name: str) -> None:
    """Ask once whether there is such a model, before transformers asks six times and waits in between."""
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            model_info(name, timeout=10)
    except HFValidationError as error:
        raise LaAciqError(f"model path {name!r} does not exist") from error
    except RepositoryNotFoundError as error:
        raise LaAciqError(f"model {name!r} is neither a local folder nor on the Hugging Face hub") from error
    except Exception as error:  # whatever the HTTP client of the day raises
        raise LaAciqError(
            f"model {name!r} is neither a local folder nor in the Hugging Face cache, and the hub cannot be reached"
        ) from error


def _check_causal(name: str, config: Any) -> None:
    architectures = getattr(config, "architectures", None) or []
    causal = all(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    encoder = bool(getattr(config, "is_encoder_decoder", False)) or config.model_type in (
        "bert",
        "roberta",
        "distilbert",
    )
    if not causal or encoder:
        found = architectures[0] if architectures else config.model_type
        raise LaAciqError(
            f"model {name!r} is not a causal language model: it is {found}; expected an architecture ...ForCausalLM"
        )


def is_quantized(config: Any) -> bool:
    """Whether a configuration says that the model's weights are quantized. Those of a GGUF file are floating-point once
    they are loaded.
    """
    quantization = getattr(config, "quantization_config", None)
    return quantization is not None and "gguf" not in str(quantization).lower()


def _check_unquantized(name: str, config: Any) -> None:
    if is_quantized(config):
        hint = "; evaluate it with --quantized" if "la_aciq" in str(config.quantization_config) else ""
        raise LaAciqError(f"model {name!r} is quantized already; expected floating-point weights{hint}")


def _first_line(error: BaseException) -> str:
    """The first sentence of an error from another library, which may go on for a page."""
    text = str(error).strip().splitlines()
    return text[0].rstrip() if text else type(error).__name__
