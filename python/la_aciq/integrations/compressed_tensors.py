"""Export to compressed-tensors' pack-quantized format: INT4 weights that stock kernels load (transformers, vLLM).

What such kernels compute fixes what can be exported: the mid-tread codebook, one step per group along K, no rotation,
16-bit activations; the clips of the weights may still have been chosen under any objective. Per layer the file holds

    weight_packed  int32 [N, K / 8], code j of eight at bits 4j: our own nibbles, read as 32-bit words
    weight_scale   [N, K / group], the step Delta = 2 clip / 15 in the model's dtype: value = (code - 8) Delta
    weight_shape   int64 [2], N and K

`weight_scale` is that format's name; a layer of ours calls its clips `weight_clip`.

The clips of the activations by language, which stock kernels do not read, travel beside them in
`la_aciq/clip_table.safetensors` (`load_table`): in a folder of their own, because vLLM takes every safetensors file
beside config.json for weights.
"""

import copy
import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from .. import __version__
from .._files import new_folder
from ..checkpoint.folder import stored_tensors
from ..clipping import ClipTable
from ..errors import LaAciqError
from ..nn.config import QuantConfig
from ..nn.linear import LanguageAwareLinear
from ..nn.quantize import Quantization

TABLE_FILE = "la_aciq/clip_table.safetensors"
_METADATA = "clip_table"
_WORD = 8  # codes in an int32


def export_compressed_tensors(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    table: ClipTable | None = None,
    force: bool = False,
) -> None:
    """Write a quantized Hugging Face model in compressed-tensors' pack-quantized format into a new folder.

    The steps are rounded to the model's dtype.

    Args:
        model: of `quantize_model` with weights = 4, activations = 16, kv = 16, codebook "midtread", rotate = False and
            center = False, groups of a fixed size that divides every layer's K, and torch.nn.Linear layers only.
        folder: to be made.
        tokenizer: saved with the model.
        table: of clips, written beside the model.
        force: replace an existing folder, if it is one of this kind.

    Raises:
        LaAciqError: another configuration, a layer that the format cannot hold, or a folder that exists.
    """
    quantization = getattr(model, "la_aciq", None)
    if not isinstance(quantization, Quantization) or not hasattr(model, "save_pretrained"):
        raise LaAciqError("export_compressed_tensors needs a Hugging Face model that quantize_model returned")
    check_configuration(quantization.config)
    hugging_face: Any = model
    tensors = stored_tensors(model)
    for name in quantization.layers:
        layer = model.get_submodule(name)
        if not isinstance(layer, LanguageAwareLinear) or layer.weight_clip is None:
            raise LaAciqError(
                f"layer {name!r} is a {type(layer).__name__}; compressed-tensors holds linear layers only"
            )
        group, k = quantization.config.group_size, layer.in_features
        if k % group or k % _WORD:
            raise LaAciqError(
                f"layer {name!r} has {k} inputs; compressed-tensors needs a multiple of {_WORD} and of "
                f"group_size = {group}"
            )
        tensors[f"{name}.weight_packed"] = tensors.pop(f"{name}.weight_codes").view(torch.int32)
        tensors[f"{name}.weight_scale"] = (tensors.pop(f"{name}.weight_clip") * (2 / 15)).to(hugging_face.dtype)
        tensors[f"{name}.weight_shape"] = torch.tensor([layer.out_features, k])
    config = copy.deepcopy(hugging_face.config)
    config.quantization_config = _description(model, quantization)
    config.dtype, config.architectures = hugging_face.dtype, [type(model).__name__]
    # Where it comes from; also tells our own folder from another's when it is to be replaced.
    config.la_aciq = {
        "version": __version__,
        "fingerprint": quantization.fingerprint,
        "calibration_tokens": quantization.calibration_tokens,
    }
    from huggingface_hub import save_torch_state_dict

    with new_folder(folder, "config.json", force) as temporary:
        save_torch_state_dict(tensors, temporary, metadata={"format": "pt"})
        config.save_pretrained(temporary)
        if getattr(model, "generation_config", None) is not None:
            hugging_face.generation_config.save_pretrained(temporary)
        if table is not None:
            (temporary / TABLE_FILE).parent.mkdir()
            save_table(table, temporary / TABLE_FILE)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def save_table(table: ClipTable, file: str | os.PathLike[str]) -> None:
    """Write a table of clips as one safetensors file: its arrays, and the rest as JSON in the header."""
    arrays, metadata = table.to_arrays()
    save_file(arrays, file, metadata={_METADATA: json.dumps(metadata)})


def load_table(file: str | os.PathLike[str]) -> ClipTable:
    """The table in a file that `save_table` wrote; raises `LaAciqError` for anything else, and for clips that are not
    finite and positive.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = json.loads((opened.metadata() or {})[_METADATA])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return ClipTable.from_arrays(arrays, metadata)
    except OSError as error:
        raise LaAciqError(f"{str(file)!r} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise LaAciqError(f"{str(file)!r} is not a table of clips: {error}") from error


def check_configuration(config: QuantConfig) -> None:
    """Raises `LaAciqError` for a configuration that the format cannot hold."""
    expected = {"weights": 4, "activations": 16, "kv": 16, "codebook": "midtread", "rotate": False, "center": False}
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise LaAciqError(f"compressed-tensors needs {name} = {value!r}, got {getattr(config, name)!r}")
    if config.group_size == 0:
        raise LaAciqError("compressed-tensors needs a group_size such as 64, got 0, one group per row")


def _description(model: nn.Module, quantization: Quantization) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": quantization.config.group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [name for name, module in model.named_modules() if type(module) is nn.Linear],
    }
