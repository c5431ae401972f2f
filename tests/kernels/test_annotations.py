"""mypy checks the functions of kernels/ that run on the host; Triton's own cannot have Python's types."""

import ast
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))


def is_compiled_by_triton(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_function_of_the_host_is_annotated(path):
    for function in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(function, ast.FunctionDef) or is_compiled_by_triton(function):
            continue
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        assert not missing, f"{function.name}: {missing}"
        assert function.returns is not None, function.name
