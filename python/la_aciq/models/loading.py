"""Loading Hugging Face language models, with errors that say what to do."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import LaAciqError
from .architecture import is_quantized

_LOADING_ERRORS = (OSError, ValueError, KeyError, AttributeError, ImportError, SafetensorError)


def load_model(
    name: str, *, device: str = "cpu", dtype: str | None = None, causal: bool = True, quantized: bool = False
) -> tuple[Any, Any]:
    """A language model in evaluation mode, and its tokenizer.

    Args:
        name: a folder, a .gguf file, or a Hugging Face model id (from the cache, or from the hub where it can be
            reached). Code that comes with a model is never run.
        device: a device of PyTorch, such as "cpu" or "cuda:0".
        dtype: "float32", "bfloat16", "float16" or "auto" (as stored). None is float32 on a CPU and "auto" elsewhere.
        causal: whether the model must be a causal language model. If not, config.json names the class of transformers.
        quantized: also load quantized models, in the dtype of the file where `dtype` is None. The package of the
            quantization method must be installed.

    Returns:
        The model and its tokenizer.

    Raises:
        LaAciqError: there is no such model, it is not causal and must be, it is quantized already and must not be, or
            the device cannot be used.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    place = _place(name)
    target = usable_device(device)
    config = load_config(name)
    if not quantized:
        _check_unquantized(name, config)
    if causal:
        _check_causal(name, config)
    if dtype is None:
        dtype = "float32" if target.type == "cpu" and not is_quantized(config) else "auto"
    tokenizer = load_tokenizer(name)
    # Weights of other packages' formats cannot be moved: transformers puts them where they belong.
    mapped = {"device_map": {"": target}} if is_quantized(config) and target.type != "cpu" else {}
    try:
        kind = AutoModelForCausalLM
        if not causal and config.architectures:
            kind = getattr(transformers, config.architectures[0])
        model = kind.from_pretrained(
            **place,
            **mapped,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=None if "gguf_file" in place else True,  # never pickle
        )
    except LaAciqError:
        raise
    except _LOADING_ERRORS as error:
        raise LaAciqError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    except RuntimeError as error:  # how a quantization method says that it needs another device
        if not is_quantized(config) or "memory" in str(error):
            raise
        raise LaAciqError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    if "gguf_file" in place:
        # The weights are floating-point now. The file's own quantization is of no use any more, and forbids saving.
        del model.config.quantization_config
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.remove_quantization_config(model)
    return (model if mapped else model.to(target)).eval(), tokenizer


def usable_device(device: str) -> torch.device:
    """A device of PyTorch.

    Args:
        device: its name, such as "cpu" or "cuda:0".

    Returns:
        The device.

    Raises:
        LaAciqError: there is no such device here.
    """
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise LaAciqError(f"device {device!r} cannot be used: {_first_line(error)}") from error
    return target


def load_config(name: str) -> Any:
    """The configuration of a model.

    Args:
        name: as for `load_model`.

    Returns:
        A configuration of transformers.

    Raises:
        LaAciqError: there is no such model.
    """
    from transformers import AutoConfig

    return _loaded(AutoConfig, name, "model")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Args:
        name: as for `load_model`.

    Returns:
        A tokenizer of transformers.

    Raises:
        LaAciqError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer, name, "the tokenizer of")


def _loaded(kind: Any, name: str, subject: str) -> Any:
    """A configuration or a tokenizer; `subject` is what the error says cannot be loaded."""
    place = _place(name)
    try:
        return kind.from_pretrained(**place)
    except _LOADING_ERRORS as error:
        raise LaAciqError(f"{subject} {name!r} cannot be loaded: {_first_line(error)}") from error


def _place(name: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`. None for trust_remote_code would ask on stdin whether to run the model's code."""
    return {**_locate(name), "trust_remote_code": False}


def _locate(name: str) -> dict[str, str]:
    """Arguments of `from_pretrained` for a folder, a .gguf file or a hub id."""
    if not name:
        raise LaAciqError("model '' does not exist; expected a model folder, a .gguf file or a Hugging Face model id")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
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
        architecture = architectures[0] if architectures else config.model_type
        raise LaAciqError(
            f"model {name!r} is not a causal language model: it is {architecture}; "
            "expected an architecture ...ForCausalLM"
        )


def _check_unquantized(name: str, config: Any) -> None:
    if is_quantized(config):
        hint = "; evaluate it with --quantized" if "la_aciq" in str(config.quantization_config) else ""
        raise LaAciqError(f"model {name!r} is quantized already; expected floating-point weights{hint}")


def _first_line(error: BaseException) -> str:
    """The first sentence of an error from another library, which may go on for a page."""
    text = str(error).strip().splitlines()
    return text[0].rstrip() if text else type(error).__name__
