"""Quantized models on disk: what transformers' `save_pretrained` writes, nothing that executes.

    config.json        the model's configuration, with the field `quantization_config` described below
    model.safetensors  the tensors under the names of the quantized model's `state_dict`, tied ones once; several shards
                       with model.safetensors.index.json when it is large

`quantization_config` (schema 2), whose `quant_method` makes transformers and vLLM choose LA-ACIQ:

    quant_method        "la_aciq"
    schema, version     2, and the version of LA-ACIQ that wrote it
    config              `QuantConfig.to_dict()`
    rows                the rows of every table of clips: "und", the languages where each has its own, "sink"
    layers              names of the modules that became `LanguageAwareLinear`, or `LanguageAwareExperts`, whose
                        layers are `<name>.<expert>.gate_up_proj` and `<name>.<expert>.down_proj`
    shared              those of them that read the very same tensor, by groups
    cache               by attention layer the entries per row of its INT4 cache's table, when that has one
    skipped             other layers with a weight matrix, and why they were left alone
    fingerprint         of the unquantized model
    calibration_tokens  by language
    sha256              of the names, dtypes, shapes and bytes of all tensors (`digest`)
    checksum            of all of the above

The tensors of a layer, with N outputs, K inputs and groups of `config.group_size` along K (0: one group), in the
portable layout whatever the layer holds in memory:

    <layer>.weight        uint8 [N, ceil(K / 2)], the even index in the low nibble (float [N, K] with 16-bit weights)
    <layer>.weight_scale  float32 [N, groups], the clip alpha of each group: value = codebook[code], which spans +-alpha
    <layer>.bias          float [N]; with `config.center` [rows, N], which makes up for the mean input of each row
    <layer>.center        float [rows, K], the mean input of each row; with `config.center`, absent with 16-bit
                          activations
    <layer>.clip          float32 [rows, groups], the activations' clips or factors; absent with 16-bit activations
    <layer>.signs         int8 [K], signs of the rotation; absent without rotation. The block is the largest power of
                          two that divides K.

and of the INT4 cache with `kv_clip` "static" or "rms":

    la_aciq_cache.<n>_clip  float32 [rows, entries], attention layer n's clips or factors of the keys' heads, then of
                            the values'
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from torch import nn

from .. import __version__
from .._files import new_folder
from ..errors import LaAciqError
from ..nn.config import QuantConfig
from ..nn.forward_pass import LanguageState
from ..nn.linear import LanguageAwareModule, check_clips
from ..nn.quantize import Quantization
from ..tags import SINK, UND, canonical
from .card import model_card

if TYPE_CHECKING:
    from ..evaluation import Report

METHOD = "la_aciq"
SCHEMA = 2
ARCHITECTURE = "config.json"

# Fields of a description: per field its type, and that of its entries.
_FIELDS: dict[str, tuple[type, Any]] = {
    "config": (dict, object), "rows": (list, str), "layers": (list, str), "shared": (list, list), "cache": (dict, int),
    "skipped": (dict, str), "calibration_tokens": (dict, int),
}  # fmt: skip


def save_quantized(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    report: "Report | None" = None,
    force: bool = False,
) -> None:
    """Write a quantized Hugging Face model (and its tokenizer) into a new folder, complete or not at all.

    `model.save_pretrained(folder)` writes the same model, into an existing folder too. Beside it comes a README.md with
    the table by language (`model_card`; report is what it shows). Raises `LaAciqError` when the model is not a
    quantized one, or the folder exists (`force` replaces one of this kind).
    """
    if not isinstance(getattr(model, "la_aciq", None), Quantization):
        raise LaAciqError("save_quantized needs a model that quantize_model or load_quantized returned")
    if not hasattr(model, "save_pretrained"):
        raise LaAciqError(f"save_quantized needs a Hugging Face model, got a {type(model).__name__}")
    hugging_face: Any = model
    with new_folder(folder, ARCHITECTURE, force) as temporary:
        hugging_face.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(model, report), "utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def load_quantized(folder: str | os.PathLike[str], **settings: Any) -> nn.Module:
    """The model in a folder that `save_quantized` or `save_pretrained` wrote, in evaluation mode.

    settings: as in transformers' `from_pretrained`; by default on the CPU, in the dtype it was saved in. The same as
    `from_pretrained` of the model's class, which is looked up, with one kind of error.

    Everything is checked before a tensor is loaded: a file that is missing, truncated, edited or from a newer version
    of the format, tensors that do not fit the model, and clips that are not finite and positive are each a
    `LaAciqError`.
    """
    path = Path(folder)
    config, _ = read_folder(path)
    try:
        import transformers

        from ..integrations import transformers as _registers  # noqa: F401
    except ImportError as error:
        raise LaAciqError("loading a quantized model needs transformers; install la-aciq[demo]") from error
    names = config.get("architectures")
    architecture: Any = getattr(transformers, names[0], None) if isinstance(names, list) and len(names) == 1 else None
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise LaAciqError(
            f"{str(path)!r}: architectures = {names!r} in {ARCHITECTURE}; expected one class of transformers"
        )
    wanted = {"dtype": "auto", "local_files_only": True} | settings | {"use_safetensors": True}
    try:
        loading: Any = architecture
        model: nn.Module = loading.from_pretrained(path, **wanted)
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

    Raises `LaAciqError` where there is no such model, and as `read_description` does.
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


def describe(done: Quantization, sha256: str) -> dict[str, Any]:
    """The `quantization_config` of a quantized model whose tensors have this digest."""
    description = {
        "quant_method": METHOD,
        "schema": SCHEMA,
        "version": __version__,
        "config": done.config.to_dict(),
        "rows": list(done.state.entries),
        "layers": list(done.layers),
        "shared": [list(names) for names in done.shared],
        "cache": done.cache,
        "skipped": done.skipped,
        "fingerprint": done.fingerprint,
        "calibration_tokens": done.calibration_tokens,
        "sha256": sha256,
    }
    return description | {"checksum": _checksum(description)}


def read_description(values: Mapping[str, Any]) -> tuple[Quantization, str]:
    """What a `quantization_config` says, and the digest its tensors must have.

    Raises `LaAciqError` for one that was edited, is incomplete, or was written by a newer version of the format.
    """
    where = "quantization_config"
    schema = values.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < SCHEMA:
        raise LaAciqError(f"{where}: schema = {schema!r}; expected {SCHEMA}")
    if schema > SCHEMA:
        raise LaAciqError(
            f"{where} has schema {schema}, made by a newer LA-ACIQ ({values.get('version')}); "
            f"this one reads up to {SCHEMA}"
        )
    content = dict(values)
    if content.pop("checksum", None) != _checksum(content):
        raise LaAciqError(f"{where} does not match its checksum: it was edited or cut short")
    for name, (kind, entry) in _FIELDS.items():
        value: Any = values.get(name)
        if not isinstance(value, kind):
            raise LaAciqError(f"{where}: {name!r} is missing or not a JSON {kind.__name__}")
        entries: Any = values[name].values() if kind is dict else values[name]
        if not all(isinstance(one, entry) for one in entries):
            raise LaAciqError(f"{where}: {name!r} has an entry that is not a JSON {entry.__name__}")
    for name in ("fingerprint", "sha256"):
        if not isinstance(values.get(name), str):
            raise LaAciqError(f"{where}: {name!r} is missing or not a JSON str")
    rows = values["rows"]
    languages = [row for row in rows[1:] if row != SINK]
    if rows[:1] != [UND] or len(set(rows)) != len(rows) or languages != [canonical(tag) for tag in languages]:
        raise LaAciqError(f"{where}: 'rows' is {rows!r}; expected {UND!r} and then the rows of the tables, each once")
    if not {name for names in values["shared"] for name in names} <= set(values["layers"]):
        raise LaAciqError(f"{where}: 'shared' has a layer that 'layers' has not")
    if unknown := [layer for layer, count in values["cache"].items() if not layer.isdecimal() or count < 1]:
        raise LaAciqError(f"{where}: 'cache' has the layer {unknown[0]!r} with {values['cache'][unknown[0]]!r} entries")
    config = QuantConfig.from_dict(values["config"])
    done = Quantization(
        config=config,
        state=LanguageState(rows, config.by_language),
        layers=tuple(values["layers"]),
        shared=tuple(tuple(names) for names in values["shared"]),
        cache=dict(values["cache"]),
        skipped=dict(values["skipped"]),
        fingerprint=values["fingerprint"],
        calibration_tokens=dict(values["calibration_tokens"]),
    )
    return done, values["sha256"]


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


def check_files(model: nn.Module, files: Iterable[str | os.PathLike[str]], sha256: str) -> None:
    """Check the tensors in safetensors files against a model with its quantized layers installed, before any is loaded.

    Raises `LaAciqError` when one is missing, unknown, of another shape or kind, when a table or a scale in it is not
    finite and positive, or when their digest is another.
    """
    with _opened(files) as tensors:
        expected = stored_tensors(model)
        missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        if missing or unknown:
            what = f"lack {missing[0]!r}" if missing else f"have {unknown[0]!r}, which the model has not"
            raise LaAciqError(f"the tensors of the checkpoint do not fit the model of {ARCHITECTURE}: they {what}")
        for name, tensor in tensors.items():
            own = expected[name]
            if tensor.shape != own.shape:
                raise LaAciqError(
                    f"tensor {name!r} of the checkpoint has shape {list(tensor.shape)}, expected {list(own.shape)}"
                )
            floating = tensor.is_floating_point() and own.is_floating_point()
            if not floating and tensor.dtype != own.dtype:
                raise LaAciqError(f"tensor {name!r} of the checkpoint is {tensor.dtype}, expected {own.dtype}")
        for name, module in model.named_modules():
            if isinstance(module, LanguageAwareModule):
                _check_layer(
                    name, {key: tensors[f"{name}.{key}"] for key in module._buffers if f"{name}.{key}" in tensors}
                )
        _check_digest(tensors, sha256)


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
    """Check the values of a quantized module's own tensors: clips, scales and signs, by what their names end with."""
    for key, tensor in tensors.items():
        if key.endswith(("clip", "weight_scale")) and tensor.dtype != torch.float32:
            raise LaAciqError(f"layer {name!r}: {key} is {tensor.dtype}, expected torch.float32")
        if key.endswith("clip"):
            check_clips(tensor, tuple(tensor.shape), name)
        if key.endswith("weight_scale") and not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
            raise LaAciqError(f"layer {name!r}: the clips of its weight are not all finite and at least 0")
        if key.endswith(("center", "bias")) and not bool(torch.isfinite(tensor).all()):
            raise LaAciqError(f"layer {name!r}: its {key} is not all finite")
        if key.endswith("signs") and not bool((tensor.abs() == 1).all()):
            raise LaAciqError(f"layer {name!r}: the signs of its rotation are not all +1 or -1")
