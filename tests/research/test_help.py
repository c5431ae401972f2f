"""Every command of benchmarks/research explains itself."""

import importlib
import sys

import pytest


@pytest.mark.parametrize("name", ["baselines", "clip_intervals", "evaluation", "experiments"])
def test_help_names_the_command_and_its_subject(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.research.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m benchmarks.research.{name} ")
    assert module.__doc__.splitlines()[0] in text
