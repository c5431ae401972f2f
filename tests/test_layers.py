"""Imports point one way: a module imports from its own layer or a lower one, and modules do not import in circles.

Imports inside functions and under TYPE_CHECKING count. Two modules are exempt, because what they import is a table of
names for others: the package's `__init__`, which imports its names at first use, and `_deprecated`, which imports by
string where a name has moved.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    {"_C", "_deprecated", "_files", "choices", "errors", "tags"},
    {"kernels", "ops"},
    {"clipping", "disparity"},
    {"embedded", "models", "profile", "udhr"},
    {"nn"},
    {"calibration", "checkpoint"},
    {"evaluation"},
    {"integrations"},
    {"bench", "cli", "demo"},
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
# Imports by a computed name: the tables of the exempt modules, and the backend that imports the Triton kernels.
IMPORT_BY_STRING = {"la_aciq", "la_aciq._deprecated", "la_aciq.ops.backends"}


def _modules() -> dict[str, Path]:
    modules = {}
    for folder, package in ((ROOT / "python" / "la_aciq", "la_aciq"), (ROOT / "kernels", "la_aciq.kernels")):
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


MODULES = _modules()


def _imports(module: str, file: Path) -> set[str]:
    """The modules of ours that a module imports, wherever in its text."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: len(module.split(".")) - node.level + (file.name == "__init__.py")]
            source = ".".join([*(package if node.level else []), *([node.module] if node.module else [])])
            names |= {name if (name := f"{source}.{alias.name}") in MODULES else source for alias in node.names}
    return {name for name in names if name.partition(".")[0] == "la_aciq"} - {"la_aciq", module}


GRAPH = {module: _imports(module, file) for module, file in MODULES.items() if module != "la_aciq"}


def _layer(module: str) -> int:
    return LAYER_OF[module.split(".")[1]]


def _reachable(module: str) -> set[str]:
    """The modules that a module leads to, by imports from its own layer or lower ones."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        importer = waiting.pop()
        for name in GRAPH.get(importer, ()):
            if name not in reached and _layer(name) <= _layer(importer):
                reached.add(name)
                waiting.append(name)
    return reached


def test_every_module_belongs_to_a_layer():
    top = {module.split(".")[1] for module in MODULES if module != "la_aciq"}
    assert top == set(LAYER_OF) - {"_C"}
    assert len(LAYER_OF) == sum(map(len, LAYERS))


def test_modules_import_from_their_own_layer_or_a_lower_one():
    upward = {(module, name) for module, names in GRAPH.items() for name in names if _layer(name) > _layer(module)}
    assert not upward


def test_modules_do_not_import_in_circles():
    reachable = {module: _reachable(module) for module in GRAPH}
    circles = {(module, name) for module in GRAPH for name in GRAPH[module] if module in reachable.get(name, ())}
    assert circles == set()


def test_imports_by_string_are_only_in_the_exempt_modules():
    """The check above cannot see them."""
    by_string = {
        module
        for module, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Name | ast.Attribute)
        and (node.id if isinstance(node, ast.Name) else node.attr) in ("import_module", "__import__")
    }
    assert by_string == IMPORT_BY_STRING


def _loaded(module: str) -> set[str]:
    """The modules in a new process after this import."""
    code = f"import {module}, json, sys; print(json.dumps(list(sys.modules)))"
    return set(json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout))


@pytest.mark.parametrize("module", ["clipping", "disparity", "profile", "errors", "tags", "choices"])
def test_what_needs_no_pytorch_does_not_load_it(module):
    assert "torch" not in _loaded(f"la_aciq.{module}")


def test_a_configuration_loads_at_most_five_modules():
    ours = {module for module in _loaded("la_aciq.nn.config") if module.partition(".")[0] == "la_aciq"}
    assert ours == {"la_aciq", "la_aciq.nn", "la_aciq.nn.config", "la_aciq.errors", "la_aciq.choices"}
