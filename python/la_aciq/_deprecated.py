"""Names of 0.1 that moved or were renamed in 0.2. They work until 0.3, with a DeprecationWarning."""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)

# (package, name in it): the module that has it now, and its name there.
_MOVED = {
    ("la_aciq", "backends"): ("la_aciq.ops.backends", ""),
    ("la_aciq", "reference"): ("la_aciq.ops.reference", ""),
    ("la_aciq", "rotation"): ("la_aciq.ops.rotation", ""),
    ("la_aciq.calibration", "Profile"): ("la_aciq.profile", "Profile"),
    ("la_aciq.calibration", "SINK"): ("la_aciq.tags", "SINK"),
    ("la_aciq.calibration", "SiteStats"): ("la_aciq.profile", "SiteStats"),
    ("la_aciq.calibration", "fingerprint"): ("la_aciq.models", "fingerprint"),
    ("la_aciq.models", "is_ignored"): ("la_aciq.nn.config", "is_ignored"),
    ("la_aciq.nn", "load_quantized"): ("la_aciq", "load_quantized"),
    ("la_aciq.nn", "save_quantized"): ("la_aciq", "save_quantized"),
}


def moved(package: str, name: str) -> Any:
    """What `name` of `package` is now, with a DeprecationWarning; AttributeError when it never was."""
    if (package, name) not in _MOVED:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module, new_name = _MOVED[package, name]
    warnings.warn(
        f"{package}.{name} is now {module}{'.' if new_name else ''}{new_name}; the old name goes in 0.3",
        DeprecationWarning,
        stacklevel=3,
    )
    value = importlib.import_module(module)
    return getattr(value, new_name) if new_name else value


def renamed_arguments(
    function: str, old: dict[str, Any], renamed: dict[str, str], values: dict[str, Any], *, warn: bool = True
) -> dict[str, Any]:
    """`values` of a function's arguments, with those that were passed under their old names put in.

    function: its name, for messages. old: the surplus keyword arguments of a call, taken with `**old`, which costs a
    call without any next to nothing. renamed: old names and the new ones. values: the arguments that may be meant, by
    their new names. warn: False while torch.compile traces, which cannot trace a warning.

    Raises TypeError for a name that never was an argument, and where both names are given.
    """
    result = dict(values)
    for name, value in old.items():
        if name not in renamed:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        new = renamed[name]
        if values.get(new) is not None:
            raise TypeError(f"{function}() got {new!r} and its old name {name!r}; expected {new!r} alone")
        if warn:
            warn_renamed(f"{function}({name}=...)", f"{function}({new}=...)", stacklevel=4)
        result[new] = value
    return result


def old_arguments(**renamed: str) -> Callable[[_Function], _Function]:
    """Decorator of functions that accepts the old names of arguments, with a DeprecationWarning.

    For functions that are called rarely: it costs each call a function. `renamed_arguments` costs nothing.

    Args:
        **renamed: by old name the new one.

    Returns:
        The decorator. The function raises TypeError where both names are given.
    """

    def decorate(function: _Function) -> _Function:
        name = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def call(*args: Any, **arguments: Any) -> Any:
            old = {key: arguments.pop(key) for key in [key for key in arguments if key in renamed]}
            if old:
                arguments = renamed_arguments(name, old, renamed, arguments)
            return function(*args, **arguments)

        return call  # type: ignore[return-value]

    return decorate


def old_fields(**renamed: str) -> Callable[[_Class], _Class]:
    """Decorator of dataclasses that accepts the old names of fields, as arguments and as attributes.

    Args:
        **renamed: by old name the new one.

    Returns:
        The decorator.
    """

    def decorate(cls: _Class) -> _Class:
        def attribute(old: str, new: str) -> property:
            def read(self: Any) -> Any:
                warn_renamed(f"{cls.__name__}.{old}", f"{cls.__name__}.{new}")
                return getattr(self, new)

            return property(read, doc=f"The old name of `{new}`.")

        setattr(cls, "__init__", old_arguments(**renamed)(getattr(cls, "__init__")))  # noqa: B009, B010
        for old, new in renamed.items():
            setattr(cls, old, attribute(old, new))
        return cls

    return decorate


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """The DeprecationWarning of a name that has another one now."""
    warnings.warn(f"{old} is now {new}; the old name goes in 0.3", DeprecationWarning, stacklevel=stacklevel)
