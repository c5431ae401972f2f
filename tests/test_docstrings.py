"""Public functions say what they take, return and raise, in Google's sections.

Which names are public: those of each package's `__all__`, the functions of `la_aciq.embedded` and `la_aciq.tags`, and
the public methods of public classes.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator

PACKAGES = ("ops", "clipping", "disparity", "profile", "models", "embedded", "udhr", "tags", "nn", "calibration")
PACKAGES += (
    "checkpoint",
    "evaluation",
    "integrations.transformers",
    "",
)  # the first package that has a name gives its title

# Names that still lack sections; no name is added here.
INCOMPLETE = """

"""


def public_objects() -> Iterator[tuple[str, object]]:
    """Every public object once, by the package that has it and its name there."""
    objects: dict[str, object] = {}
    seen = set()
    for package in PACKAGES:
        module = importlib.import_module(f"la_aciq.{package}".rstrip("."))
        names = getattr(module, "__all__", None)
        if names is None:
            attributes = vars(module).items()
            names = [name for name, value in attributes if getattr(value, "__module__", None) == module.__name__]
        for name in names:
            value = getattr(module, name)
            if name.startswith("_") or not callable(value) or value in seen:
                continue
            seen.add(value)
            title = f"{package}.{name}".lstrip(".")
            objects[title] = value
            if inspect.isclass(value):
                for method, member in vars(value).items():
                    function = getattr(member, "__func__", member)  # of a class method or a static one
                    overrides = any(hasattr(base, method) for base in value.__bases__)  # documented there
                    if not method.startswith("_") and inspect.isfunction(function) and not overrides:
                        objects[f"{title}.{method}"] = function
    yield from sorted(objects.items())


def sections(docstring: str) -> dict[str, str]:
    """The text of each of Google's sections."""
    parts = re.split(r"^(Args|Returns|Yields|Raises):\s*$", docstring, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def lacks(function: Callable[..., object]) -> list[str]:
    """What a function's docstring does not say: "docstring", "Args", "Args: name", "Returns", "Raises"."""
    docstring = inspect.getdoc(function)
    if not docstring:
        return ["docstring"]
    signature = inspect.signature(function)
    names = [name for name in signature.parameters if name not in ("self", "cls", "old")]
    has = sections(docstring)
    missing = []
    if names and "Args" not in has:
        missing.append("Args")
    elif names:
        described = re.findall(r"^ {2,}\*{0,2}(\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:", has["Args"], re.MULTILINE)
        described = {name for group in described for name in re.split(r", \*{0,2}", group)}
        missing += [f"Args: {name}" for name in names if name not in described]
    returns = signature.return_annotation
    if names and returns not in (None, "None", inspect.Signature.empty) and not {"Returns", "Yields"} & has.keys():
        missing.append("Returns")
    if names and re.search(r"^\s+raise \w", inspect.getsource(function), re.MULTILINE) and "Raises" not in has:
        missing.append("Raises")
    return missing


OBJECTS = dict(public_objects())


def test_every_public_class_has_a_docstring():
    classes = [value for value in OBJECTS.values() if inspect.isclass(value)]
    assert len(classes) > 30
    generated = "(".join  # a dataclass without a docstring gets its signature as one
    bare = [
        cls.__qualname__
        for cls in classes
        if not cls.__doc__ or (dataclasses.is_dataclass(cls) and cls.__doc__.startswith(generated([cls.__name__, ""])))
    ]
    assert bare == []


def test_public_functions_say_what_they_take_return_and_raise():
    functions = {name: value for name, value in OBJECTS.items() if not inspect.isclass(value)}
    assert len(functions) > 100
    lacking = {name: missing for name, value in functions.items() if (missing := lacks(value))}
    assert {name: missing for name, missing in lacking.items() if name not in INCOMPLETE.split()} == {}


def test_what_is_lacking_is_noticed():
    def complete(x: int, **options: int) -> int:
        """One line.

        Args:
            x: a number.
            **options: others.

        Returns:
            Another one.

        Raises:
            ValueError: for a negative number.
        """
        if x < 0:
            raise ValueError(options)
        return x

    def bare(x: int) -> int:
        """One line."""
        if x < 0:
            raise ValueError(x)
        return x

    assert lacks(complete) == []
    assert lacks(bare) == ["Args", "Returns", "Raises"]
    complete.__doc__ = complete.__doc__.replace("x: a number", "y: a number")
    assert lacks(complete) == ["Args: x"]
