"""Quantized models on disk: what transformers' `save_pretrained` writes, nothing that executes.

    config.json        the model's configuration, with the field `quantization_config` described below
    model.safetensors  the tensors under the names of the quantized model's `state_dict`, tied ones once; several shards
                       with model.safetensors.index.json when it is large

`quantization_config` (schema 3), whose `quant_method` makes transformers and vLLM choose LA-ACIQ:

    quant_method        "la_aciq"
    schema, version     3, and the version of LA-ACIQ that wrote it
    config              `QuantConfig.to_dict()`
    entries             of every table of clips: "und", the languages where each has one, "sink"
    layers              names of the modules that became `LanguageAwareLinear`, or `LanguageAwareExperts`, whose
                        layers are `<name>.<expert>.gate_up_proj` and `<name>.<expert>.down_proj`
    joined              those of them that read the very same tensor, by groups
    cache               by attention layer the clips per entry of its INT4 cache's table, when that has one
    skipped             other layers with a weight matrix, and why they were left alone
    fingerprint         of the unquantized model
    calibration_tokens  by language
    layouts             by layer how the rows of its input belong to tokens (`nn/layout.py`); may be absent
    sha256              of the names, dtypes, shapes and bytes of all tensors (`digest`)
    checksum            of all of the above

The tensors of a layer, with N outputs, K inputs and groups of `config.group_size` along K (0: one group), in the
portable layout whatever the layer holds in memory:

    <layer>.weight_codes  uint8 [N, ceil(K / 2)], the even index in the low nibble; with 16-bit weights instead
                          <layer>.weight, float [N, K]
    <layer>.weight_clip   float32 [N, groups], the clip of each group: value = codebook[code], which spans +-clip;
                          absent with 16-bit weights
    <layer>.bias          float [N]; with `config.center` [entries, N], which makes up for the mean input of each entry
    <layer>.center        float [entries, K], the mean input of each entry; with `config.center`, absent with 16-bit
                          activations
    <layer>.clips         float32 [entries, groups], clips (`config.clip` "static") or factors of the inputs; absent
                          with 16-bit activations
    <layer>.signs         int8 [K], signs of the rotation; absent without rotation. The block is the largest power of
                          two that divides K.

and of the INT4 cache with `kv_clip` "static" or "rms":

    la_aciq_cache.<n>_clip  float32 [entries, groups], attention layer n's clips or factors of the keys' heads, then of
                            the values'

and one empty tensor, under the name that the first layer's weight had before it was quantized (`unfit_tensor`).

Schema 2, of LA-ACIQ 0.1, is read too. It calls `entries` "rows", `joined` "shared", and a layer's tensors
`weight_codes`, `weight_clip` and `clips` "weight", "weight_scale" and "clip"; its digest is over those names.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from .. import __version__
from .._files import new_folder
from ..errors import LaAciqError
from ..models import EXPERT_WEIGHTS
from ..nn.config import QuantConfig
from ..nn.experts import LanguageAwareExperts
from ..nn.forward_pass import LanguageState
from ..nn.linear import RENAMED_BUFFERS, LanguageAwareLinear, LanguageAwareModule, check_clips
from ..nn.quantize import Quantization
from ..tags import SINK, UND, canonical
from .card import EvaluationReport, model_card

METHOD = "la_aciq"
SCHEMA = 3
OLDEST_SCHEMA = 2
ARCHITECTURE = "config.json"

_OLD_FIELDS = {"rows": "entries", "shared": "joined"}  # of schema 2

# Fields of a description: per field its type, and that of its elements.
_FIELDS: dict[str, tuple[type, Any]] = {
    "config": (dict, object), "entries": (list, str), "layers": (list, str), "joined": (list, list),
    "cache": (dict, int), "skipped": (dict, str), "calibration_tokens": (dict, int),
}  # fmt: skip


def save_quantized(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    report: EvaluationReport | None = None,
    force: bool = False,
) -> None:
    """Write a quantized Hugging Face model (and its tokenizer) into a new folder, complete or not at all.

    `model.save_pretrained(folder)` writes the same model, into an existing folder too. Beside it comes a README.md with
    the table by language (`model_card`).

    Args:
        model: of `quantize_model` or `load_quantized`, on any device.
        folder: to be made.
        tokenizer: saved with the model.
        report: of `la_aciq.evaluate`, for the README.md.
        force: replace an existing folder, if it is one of this kind.

    Raises:
        LaAciqError: the model is not a quantized Hugging Face model or has tensors that are offloaded, the folder
            exists, or the report is of another model or other configurations.
    """
    if not isinstance(getattr(model, "la_aciq", None), Quantization):
        raise LaAciqError("save_quantized needs a model that quantize_model or load_quantized returned")
    if not hasattr(model, "hf_quantizer"):  # what PEFT's wrappers save is their adapters
        raise LaAciqError(
            f"save_quantized needs a model of transformers, got a {type(model).__name__}; merge adapters before "
            "calibration"
        )
    hugging_face: Any = model
    with new_folder(folder, ARCHITECTURE, force) as temporary:
        hugging_face.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(model, report), "utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def load_quantized(folder: str | os.PathLike[str], **settings: Any) -> nn.Module:
    """The model in a folder that `save_quantized` or `save_pretrained` wrote, in evaluation mode.

    The same as `from_pretrained` of the model's class, which is looked up, with one kind of error. Everything is
    checked before a tensor is loaded.

    Args:
        folder: the model's.
        settings: as in transformers' `from_pretrained`; by default on the CPU, in the dtype it was saved in.

    Returns:
        The model that was saved: the same logits, bit for bit, on the same device.

    Raises:
        LaAciqError: a file is missing, truncated, edited or from a newer version of the format, tensors do not fit the
            model, clips are not finite and positive, or transformers is not installed.
    """
    path = Path(folder)
    config, _ = read_folder(path)
    try:
        import transformers  # which makes `import la_aciq` register the method with it
    except ImportError as error:
        raise LaAciqError("loading a quantized model needs transformers; install la-aciq[demo]") from error
    names = config.get("architectures")
    architecture: Any = getattr(transformers, names[0], None) if isinstance(names, list) and len(names) == 1 else None
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise LaAciqError(
            f"{str(path)!r}: architectures = {names!r} in {ARCHITECTURE}; expected one class of transformers"
        )
    settings = {"dtype": "auto", "local_files_only": True} | settings | {"use_safetensors": True}
    try:
        loading: Any = architecture
        model: nn.Module = loading.from_pretrained(path, **settings)
    except LaAciqError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        safetensors.SafetensorError,
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise LaAciqError(f"{str(path)!r} cannot be loaded as a {architecture.__name__}: {reason}") from error
    return model


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    """The config.json of a quantized model's folder, as far as it can be checked, and its tensors' digest.

    Raises:
        LaAciqError: there is no such model, or as `read_description` says.
    """
    path = Path(folder)
    try:
        config: Any = json.loads((path / ARCHITECTURE).read_text("utf-8"))
    except OSError as error:
        raise LaAciqError(
            f"{str(path)!r} is not a model quantized by LA-ACIQ: {ARCHITECTURE} cannot be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise LaAciqError(f"{str(path / ARCHITECTURE)!r} is not valid JSON: {error}") from error
    description = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(description, dict) or description.get("quant_method") != METHOD:
        raise LaAciqError(f"{str(path)!r} is not a model quantized by LA-ACIQ: its {ARCHITECTURE} does not say so")
    _, sha256 = read_description(description)
    return config, sha256


def describe(quantization: Quantization, sha256: str) -> dict[str, Any]:
    """The `quantization_config` of a quantized model whose tensors have this digest."""
    description = {
        "quant_method": METHOD,
        "schema": SCHEMA,
        "version": __version__,
        "config": quantization.config.to_dict(),
        "entries": list(quantization.state.entries),
        "layers": list(quantization.layers),
        "joined": [list(names) for names in quantization.joined],
        "cache": quantization.cache,
        "skipped": quantization.skipped,
        "fingerprint": quantization.fingerprint,
        "calibration_tokens": quantization.calibration_tokens,
        "layouts": quantization.layouts,
        "sha256": sha256,
    }
    return description | {"checksum": _checksum(description)}


def read_description(description: Mapping[str, Any]) -> tuple[Quantization, str]:
    """What a `quantization_config` says, and the digest its tensors must have.

    Raises:
        LaAciqError: it was edited, is incomplete, or was written by a newer version of the format.
    """
    where = "quantization_config"
    schema = description.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < OLDEST_SCHEMA:
        raise LaAciqError(f"{where}: schema: expected {OLDEST_SCHEMA} or {SCHEMA}, got {schema!r}")
    if schema > SCHEMA:
        raise LaAciqError(
            f"{where} has schema {schema}, made by a newer LA-ACIQ ({description.get('version')}); "
            f"this one reads up to {SCHEMA}"
        )
    content = dict(description)
    if content.pop("checksum", None) != _checksum(content):
        raise LaAciqError(f"{where} does not match its checksum: it was edited or cut short")
    values = content
    if schema < 3:
        values = {_OLD_FIELDS.get(name, name): value for name, value in content.items()}
    for name, (kind, member_type) in _FIELDS.items():
        value: Any = values.get(name)
        if not isinstance(value, kind):
            raise LaAciqError(f"{where}: {name!r} is missing or not a JSON {kind.__name__}")
        members: Any = values[name].values() if kind is dict else values[name]
        if not all(isinstance(member, member_type) for member in members):
            raise LaAciqError(f"{where}: {name!r} has an element that is not a JSON {member_type.__name__}")
    for name in ("fingerprint", "sha256"):
        if not isinstance(values.get(name), str):
            raise LaAciqError(f"{where}: {name!r} is missing or not a JSON str")
    entries = values["entries"]
    languages = [entry for entry in entries[1:] if entry != SINK]
    if entries[:1] != [UND] or len(set(entries)) != len(entries) or languages != [canonical(tag) for tag in languages]:
        raise LaAciqError(
            f"{where}: 'entries': expected {UND!r} and then the entries of the tables, each once, got {entries!r}"
        )
    if not {name for names in values["joined"] for name in names} <= set(values["layers"]):
        raise LaAciqError(f"{where}: 'joined' has a layer that 'layers' has not")
    if unknown := [layer for layer, count in values["cache"].items() if not layer.isdecimal() or count < 1]:
        raise LaAciqError(f"{where}: 'cache' has the layer {unknown[0]!r} with {values['cache'][unknown[0]]!r} clips")
    config = QuantConfig.from_dict(values["config"])
    quantization = Quantization(
        config=config,
        state=LanguageState(entries, config.by_language),
        layers=tuple(values["layers"]),
        joined=tuple(tuple(names) for names in values["joined"]),
        cache=dict(values["cache"]),
        skipped=dict(values["skipped"]),
        fingerprint=values["fingerprint"],
        calibration_tokens=dict(values["calibration_tokens"]),
        layouts=dict(values.get("layouts", {})),  # folders of schema 2 have none
    )
    return quantization, values["sha256"]


def old_names(model: nn.Module) -> dict[str, str]:
    """By the names that the tensors of a quantized model have in a folder of schema 2, where they differ, their own."""
    names: dict[str, str] = {}
    for layer, module in model.named_modules():
        if isinstance(module, LanguageAwareLinear):
            for old, new in RENAMED_BUFFERS.items():
                if module._buffers.get(new) is not None:
                    names[f"{layer}.{old}"] = f"{layer}.{new}"
    return names


def unfit_tensor(model: nn.Module, quantization: Quantization) -> dict[str, torch.Tensor]:
    """A tensor by its name, uint8 [0], that does not fit the unquantized model; none with 16-bit weights.

    transformers without LA-ACIQ warns of an unknown method, goes on, and would draw at random the weights that it does
    not find. Such a tensor makes it refuse the folder.
    """
    if quantization.config.weights == 16 or not quantization.layers:
        return {}
    first = quantization.layers[0]
    experts = isinstance(model.get_submodule(first), LanguageAwareExperts)
    return {f"{first}.{EXPERT_WEIGHTS[0] if experts else 'weight'}": torch.empty(0, dtype=torch.uint8)}


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint of the model holds, by name: tied ones under the name the others are tied to."""
    state = model.state_dict()
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for target, source in tied.items():
        if target in state and source in state and _same_memory(state[target], state[source]):
            unsaved.add(target)
    return {name: tensor for name, tensor in state.items() if name not in unsaved}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors' names, dtypes, shapes and bytes; the order, and what file each is in, make no difference."""

    def one(name: str) -> bytes:
        tensor = tensors[name].detach().cpu().contiguous()
        header = f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} ".encode()
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
        return hashlib.sha256(header + hashlib.sha256(data).digest()).digest()

    with ThreadPoolExecutor() as threads:  # hashing does not hold Python's lock
        return hashlib.sha256(b"".join(threads.map(one, sorted(tensors)))).hexdigest()


def check_files(
    model: nn.Module,
    files: Iterable[str | os.PathLike[str]],
    sha256: str,
    *,
    renamed: Mapping[str, str],
    unfit: Iterable[str],
) -> None:
    """Check the tensors in safetensors files against a model with its quantized layers installed, before any is loaded.

    Args:
        model: on any device, the meta device too.
        files: of one folder.
        sha256: the digest that the tensors must have.
        renamed: names in the files that the model has others for (`old_names`).
        unfit: names in the files that the model has no tensor for, by intention (`unfit_tensor`).

    Raises:
        LaAciqError: a tensor is missing, unknown, of another shape or kind, a clip is not finite and positive, or the
            digest is another.
    """
    with _opened(files) as stored:
        tensors = {renamed.get(name, name): tensor for name, tensor in stored.items() if name not in set(unfit)}
        expected = stored_tensors(model)
        missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        if missing or unknown:
            misfit = f"lack {missing[0]!r}" if missing else f"have {unknown[0]!r}, which the model has not"
            raise LaAciqError(f"the tensors of the checkpoint do not fit the model of {ARCHITECTURE}: they {misfit}")
        for name, tensor in tensors.items():
            like = expected[name]
            if tensor.shape != like.shape:
                raise LaAciqError(
                    f"tensor {name!r} of the checkpoint has shape {list(tensor.shape)}, expected {list(like.shape)}"
                )
            floating = tensor.is_floating_point() and like.is_floating_point()
            if not floating and tensor.dtype != like.dtype:
                raise LaAciqError(f"tensor {name!r} of the checkpoint is {tensor.dtype}, expected {like.dtype}")
        for name, module in model.named_modules():
            if isinstance(module, LanguageAwareModule):
                _check_layer(
                    name, {key: tensors[f"{name}.{key}"] for key in module._buffers if f"{name}.{key}" in tensors}
                )
        _check_digest(stored, sha256)


def check_tensors(folder: str | os.PathLike[str], sha256: str) -> None:
    """Raises `LaAciqError` unless the safetensors files of a folder hold, together, the tensors of this digest."""
    with _opened(sorted(Path(folder).glob("*.safetensors"))) as tensors:
        _check_digest(tensors, sha256)


def _check_digest(tensors: Mapping[str, torch.Tensor], sha256: str) -> None:
    if digest(tensors) != sha256:
        raise LaAciqError("the tensors of the checkpoint do not match their SHA-256: a file was edited or cut short")


def _checksum(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    # On the meta device there are no addresses; there the declaration has to do.
    return one.is_meta or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)


@contextmanager
def _opened(files: Iterable[str | os.PathLike[str]]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of safetensors files, mapped into memory as long as the block lasts."""
    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for file in files:
            try:
                opened = stack.enter_context(safetensors.safe_open(file, framework="pt"))
                tensors.update((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118
            except (OSError, safetensors.SafetensorError) as error:
                raise LaAciqError(
                    f"{str(file)!r} is not a safetensors file: it was edited or cut short ({error})"
                ) from error
        yield tensors


def _check_layer(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check the values of a quantized module's tensors by their names: clips, centers, biases and signs."""
    for key, tensor in tensors.items():
        if key.endswith(("clip", "clips")) and tensor.dtype != torch.float32:
            raise LaAciqError(f"layer {name!r}: {key} is {tensor.dtype}, expected torch.float32")
        if key == "weight_clip":  # 0 for a group of zeros
            if not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
                raise LaAciqError(f"layer {name!r}: the clips of its weight are not all finite and at least 0")
        elif key.endswith(("clip", "clips")):
            check_clips(tensor, tuple(tensor.shape), name)
        if key.endswith(("center", "bias")) and not bool(torch.isfinite(tensor).all()):
            raise LaAciqError(f"layer {name!r}: its {key} is not all finite")
        if key.endswith("signs") and not bool((tensor.abs() == 1).all()):
            raise LaAciqError(f"layer {name!r}: the signs of its rotation are not all +1 or -1")
