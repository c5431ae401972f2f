"""Quantized models on disk: config.json, model.safetensors and la_aciq.json, nothing that executes.

la_aciq.json (schema 1) says what the tensors of model.safetensors are: the quantization settings, the rows of the clip
tables, the names of the quantized layers, the SHA-256 of config.json and model.safetensors, and a checksum of its own
content and thereby of all three, so that an edited or truncated one is refused.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from .. import __version__
from .._files import new_folder
from ..calibration.profile import SINK
from ..calibration.profile import _checksum as checksum
from ..errors import LaAciqError
from ..tags import UND, canonical
from .config import QuantConfig
from .context import LanguageState
from .kv import RoundedProjection
from .linear import LanguageAwareLinear, check_clips
from .quantize import Quantization

SCHEMA = 1
SETTINGS = "la_aciq.json"
ARCHITECTURE = "config.json"
TENSORS = "model.safetensors"


def save_quantized(
    model: nn.Module, folder: str | os.PathLike[str], tokenizer: Any = None, *, force: bool = False
) -> None:
    """Write a quantized Hugging Face model (and its tokenizer) into a new folder, complete or not at all.

    Raises `LaAciqError` when the model is not a quantized one, or the folder exists (`force` replaces one of this
    kind).
    """
    done = getattr(model, "la_aciq", None)
    if not isinstance(done, Quantization):
        raise LaAciqError("save_quantized needs a model that quantize_model or load_quantized returned")
    if not hasattr(model, "config") or not hasattr(model.config, "save_pretrained"):
        raise LaAciqError(f"save_quantized needs a Hugging Face model with a config, got a {type(model).__name__}")
    hugging_face: Any = model
    with new_folder(folder, SETTINGS, force) as temporary:
        # Tied tensors are written once, under the first name; loading ties them again.
        tensors: dict[str, torch.Tensor] = {}
        seen: set[tuple[torch.device, int]] = set()
        for name, tensor in model.state_dict().items():
            if tensor.numel() and (tensor.device, tensor.data_ptr()) in seen:
                continue
            seen.add((tensor.device, tensor.data_ptr()))
            tensors[name] = tensor.detach().contiguous()
        safetensors.torch.save_file(tensors, temporary / TENSORS, metadata={"format": "pt"})
        hugging_face.config.save_pretrained(temporary)
        settings = {
            "schema": SCHEMA,
            "version": __version__,
            "config": done.config.to_dict(),
            "rows": list(done.state.rows),
            "layers": list(done.layers),
            "projections": done.projections,
            "skipped": done.skipped,
            "fingerprint": done.fingerprint,
            "calibration_tokens": done.calibration_tokens,
            "sha256": {name: _sha256(temporary / name) for name in (ARCHITECTURE, TENSORS)},
        }
        settings["checksum"] = checksum(settings, b"")
        (temporary / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if getattr(model, "generation_config", None) is not None:
            hugging_face.generation_config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def load_quantized(folder: str | os.PathLike[str]) -> nn.Module:
    """The model `save_quantized` wrote, on the CPU and in evaluation mode.

    Everything is checked before the model is returned: a file that is missing, truncated, edited or from a newer
    version of the format, tensors that do not fit the model, and clips that are not finite and positive are each a
    `LaAciqError`.
    """
    path = Path(folder)
    done, sha256 = _read_settings(path)
    for file in (ARCHITECTURE, TENSORS):
        _check_file(path / file, sha256.get(file))
    tensors = _read_tensors(path / TENSORS)
    model = _skeleton(path)
    for name in dict.fromkeys([*done.layers, *done.projections]):
        _replace(model, name, done)
    _fill(model, tensors, path)
    for name, module in model.named_modules():
        if isinstance(module, LanguageAwareLinear | RoundedProjection):
            _check_layer(name, module)
    hugging_face: Any = model
    hugging_face.la_aciq = done
    done.state.attach(model)
    return model.eval()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_file(file: Path, sha256: str | None) -> None:
    try:
        found = _sha256(file)
    except OSError as error:
        raise LaAciqError(f"{str(file)!r} cannot be read: {error.strerror}") from error
    if found != sha256:
        raise LaAciqError(f"{str(file)!r} was edited or cut short: its SHA-256 is {found}, and {SETTINGS} has {sha256}")


def _read_settings(path: Path) -> tuple[Quantization, dict[str, str]]:
    """What la_aciq.json says, and the SHA-256 of the other two files by name."""
    file = path / SETTINGS
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaAciqError(
            f"{str(path)!r} is not a model quantized by LA-ACIQ: {SETTINGS} cannot be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise LaAciqError(f"{str(file)!r} is not valid JSON: {error}") from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if not isinstance(schema, int) or schema < 1:
        raise LaAciqError(f"{str(file)!r} has no schema number; expected {SCHEMA}")
    if schema > SCHEMA:
        raise LaAciqError(
            f"{str(file)!r} has schema {schema}, made by a newer LA-ACIQ ({values.get('version')}); "
            f"this one reads up to {SCHEMA}"
        )
    if values.pop("checksum", None) != checksum(values, b""):
        raise LaAciqError(f"{str(file)!r} does not match its checksum: it was edited or cut short")
    # Per field its type, and that of its entries.
    kinds: dict[str, tuple[type, Any]] = {
        "config": (dict, object), "rows": (list, str), "layers": (list, str), "projections": (dict, int),
        "skipped": (dict, str), "fingerprint": (str, str), "calibration_tokens": (dict, int), "sha256": (dict, str),
    }  # fmt: skip
    for name, (kind, entry) in kinds.items():
        value: Any = values.get(name)
        if not isinstance(value, kind):
            raise LaAciqError(f"{str(file)!r}: {name!r} is missing or not a JSON {kind.__name__}")
        entries: Any = values[name].values() if kind is dict else values[name]
        if not all(isinstance(one, entry) for one in entries):
            raise LaAciqError(f"{str(file)!r}: {name!r} has an entry that is not a JSON {entry.__name__}")
    rows = values["rows"]
    languages = [row for row in rows[1:] if row != SINK]
    if rows[:1] != [UND] or len(set(rows)) != len(rows) or languages != [canonical(tag) for tag in languages]:
        raise LaAciqError(
            f"{str(file)!r}: 'rows' is {rows!r}; expected {UND!r} and then the rows of the tables, each once"
        )
    config = QuantConfig.from_dict(values["config"])
    done = Quantization(
        config=config,
        state=LanguageState(rows, config.by_language),
        layers=tuple(values["layers"]),
        projections=values["projections"],
        skipped=values["skipped"],
        fingerprint=values["fingerprint"],
        calibration_tokens=values["calibration_tokens"],
    )
    return done, values["sha256"]


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(file)
        return tensors
    except OSError as error:
        raise LaAciqError(f"{str(file)!r} cannot be read: {error.strerror}") from error
    except safetensors.SafetensorError as error:
        raise LaAciqError(f"{str(file)!r} is not a valid safetensors file: {error}") from error


def _skeleton(path: Path) -> nn.Module:
    """The unquantized architecture of the folder's config.json, with whatever values its constructor gives."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    except ImportError as error:
        raise LaAciqError("loading a quantized model needs transformers; install la-aciq[demo]") from error
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if (path / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LaAciqError(f"{str(path)!r} does not describe a causal language model: {reason}") from error
    skeleton: nn.Module = model
    return skeleton


def _replace(model: nn.Module, name: str, done: Quantization) -> None:
    try:
        original = model.get_submodule(name)
    except AttributeError:
        original = None
    if not isinstance(original, nn.Linear):
        raise LaAciqError(
            f"{SETTINGS} names the layer {name!r}, and the model of config.json has no linear layer of that name"
        )
    new: Any = original
    if name in done.layers:
        new = LanguageAwareLinear(
            original.in_features,
            original.out_features,
            original.bias is not None,
            done.config,
            done.state,
            device="meta",
        )
    if name in done.projections:
        head_dim = done.projections[name]
        if not isinstance(head_dim, int) or head_dim < 2 or original.out_features % head_dim:
            raise LaAciqError(
                f"{SETTINGS} gives {name!r} heads of {head_dim!r} outputs; it has {original.out_features} in all"
            )
        new = RoundedProjection(new, original.out_features // head_dim, head_dim, done.config, done.state)
    model.set_submodule(name, new)


def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    expected = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(expected) - set(tensors) - tied)
    unknown = sorted(set(tensors) - set(expected))
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the model has not"
        raise LaAciqError(f"{str(path / TENSORS)!r} does not fit the model of config.json: it {what}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise LaAciqError(
                f"{str(path / TENSORS)!r}: {name!r} has shape {list(tensor.shape)}, expected "
                f"{list(expected[name].shape)}"
            )
        integer = not expected[name].is_floating_point()
        if integer != (not tensor.is_floating_point()) or (integer and tensor.dtype != expected[name].dtype):
            raise LaAciqError(f"{str(path / TENSORS)!r}: {name!r} is {tensor.dtype}, expected {expected[name].dtype}")
    model.load_state_dict(tensors, strict=False, assign=True)
    if tied:
        model.tie_weights()  # type: ignore[operator]


def _check_layer(name: str, module: LanguageAwareLinear | RoundedProjection) -> None:
    for buffer in ("clip", "weight_scale"):
        table = getattr(module, buffer, None)
        if table is not None and table.dtype != torch.float32:
            raise LaAciqError(f"layer {name!r}: {buffer} is {table.dtype}, expected torch.float32")
    if module.clip is not None:
        check_clips(module.clip, tuple(module.clip.shape), name)
    scale = getattr(module, "weight_scale", None)
    if scale is not None and not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        raise LaAciqError(f"layer {name!r}: the clips of its weight are not all finite and at least 0")
    signs = getattr(module, "signs", None)
    if signs is not None and not bool((signs.abs() == 1).all()):
        raise LaAciqError(f"layer {name!r}: the signs of its rotation are not all +1 or -1")
