"""Methods of a model that cannot do what they say once it is quantized: they are refused in a sentence."""

from functools import partial
from typing import Any, NoReturn

from torch import nn

from ..errors import LaAciqError

_REFUSED = {
    **dict.fromkeys(
        ("generate_batch", "init_continuous_batching"),
        "its passes pack several requests in a row, and the language of each is unknown; use `generate` with "
        "`languages`, or `la-aciq serve`",
    ),
    **dict.fromkeys(
        ("merge_and_unload", "merge_adapter", "unmerge_adapter", "unload"),
        "adapters cannot be merged into INT4 codes or taken off them; merge them before calibration",
    ),
}


def refuse_methods(model: nn.Module) -> None:
    """Make methods of transformers and PEFT that a quantized model cannot have refuse their calls.

    Args:
        model: The model; PEFT's wrappers around one count as parts of it.
    """
    for part in {id(part): part for part in (model, getattr(model, "base_model", model))}.values():
        for name, reason in _REFUSED.items():
            if hasattr(part, name):
                # A partial function of a function of the module, which can be pickled.
                setattr(part, name, partial(_refuse, f"{name} of a quantized model: {reason}"))


def _refuse(reason: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise LaAciqError(reason)


def adapters(model: nn.Module) -> frozenset[str]:
    """The names of PEFT's adapters in a model: modules beside the layers that they adapt, and all inside them.

    Args:
        model: Any module.

    Returns:
        The full names.
    """
    names = set()
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.tuners.") and "base_layer" in module._modules:
            for child, _ in module.named_modules():
                if child and child.partition(".")[0] != "base_layer":
                    names.add(f"{name}.{child}" if name else child)
    return frozenset(names)
