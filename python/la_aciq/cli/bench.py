"""`la-aciq bench`: the speed of operations, layers and servers on this machine."""

import argparse
from pathlib import Path

from ..errors import LaAciqError
from .arguments import EMBEDDED, VLLM_OPTIONS, Commands, add_texts, positive
from .inputs import load_texts
from .machine import core, threads


def add_to(commands: Commands) -> None:
    """Add the three commands."""
    benches = commands.group("bench", "time operations, layers and servers on this machine", "{ops,layer,serve}")
    operations = benches.add(
        "ops", run_operations, "time each operation beside PyTorch's fastest read of memory (half a minute)"
    )
    operations.add_argument(
        "--size_mib",
        type=positive,
        help="size of the input in MiB (without this option: 256 with the compiled core, 4 without it)",
    )
    layer = benches.add(
        "layer", run_layer, "time one quantized linear layer beside PyTorch's, by number of rows (a minute)"
    )
    layer.add_argument("--in_features", type=positive, default=4096, help="inputs of the layer")
    layer.add_argument("--out_features", type=positive, default=4096, help="outputs of the layer")
    for parser in (operations, layer):
        parser.add_argument(
            "--threads", type=positive, help="number of threads (without this option: as PyTorch chooses)"
        )
    serve = benches.add(
        "serve",
        run_serve,
        "measure latencies of models that vLLM serves, by language",
        "Each model has a server. The servers take turns under the same load, of one language or of all "
        "languages mixed.",
    )
    serve.add_argument("model", help="folder that quantize wrote")
    serve.add_argument(
        "--against",
        nargs="*",
        default=[],
        metavar="FOLDER",
        help="folders of other models to measure under the same load",
    )
    add_texts(serve, EMBEDDED)
    serve.add_argument("--num_prompts", type=positive, default=24, help="prompts of a run")
    serve.add_argument("--input_len", type=positive, default=128, help="tokens of a prompt")
    serve.add_argument("--output_len", type=positive, default=32, help="tokens of an answer")
    serve.add_argument("--max_concurrency", type=positive, default=8, help="requests at a time")
    serve.add_argument("--output", help="JSON file to write, with a plot beside it")
    serve.epilog = VLLM_OPTIONS


def run_operations(arguments: argparse.Namespace) -> None:
    """Time the operations, and print a table."""
    import torch
    from tqdm import tqdm

    from ..bench import ops

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    nbytes = None if arguments.size_mib is None else arguments.size_mib << 20
    with tqdm(total=7, desc="Timing", unit="op", leave=False) as bar:
        timings = ops.measure(nbytes, step=bar.update)
    print(f"{timings[0].nbytes >> 20} MiB of float32, {threads()}; {core()}")
    print(ops.table(timings))


def run_layer(arguments: argparse.Namespace) -> None:
    """Time a layer, and print a table."""
    import torch
    from tqdm import tqdm

    from ..bench import layer

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with tqdm(total=len(layer.ROWS), desc="Timing", unit="size", leave=False) as bar:
        timings = layer.measure(arguments.in_features, arguments.out_features, step=bar.update)
    print(f"{arguments.in_features} to {arguments.out_features}, {threads()}; {core()}")
    print(layer.table(timings))


def run_serve(arguments: argparse.Namespace) -> None:
    """Serve the models, measure them, print tables, and write the results."""
    import importlib.util
    import json

    from tqdm import tqdm

    from ..bench import data_plane, serve

    if importlib.util.find_spec("vllm") is None:
        raise LaAciqError(
            "bench serve needs vLLM, which is not installed here; in a checkout, make bench-serve installs it"
        )
    output = None if arguments.output is None else Path(arguments.output)
    if output is not None and not output.parent.is_dir():
        raise LaAciqError(f"--output {str(output)!r} is in a folder that does not exist")
    if output is not None and output.is_dir():
        raise LaAciqError(f"--output {str(output)!r} is a folder; expected a file to write")
    load = serve.Load(arguments.num_prompts, arguments.input_len, arguments.output_len, arguments.max_concurrency)
    texts = load_texts(arguments)
    folders = [arguments.model, *arguments.against]
    with tqdm(total=len(folders) * (len(texts) + 1), desc="Serving", unit="run", leave=False) as bar:
        results = serve.measure(folders, texts, load, arguments.vllm, step=bar.update)
    print(serve.table(results))
    print(f"\n{data_plane.table(results['data_plane'])}")
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        print(f"\nResults  {output}")
        if importlib.util.find_spec("matplotlib"):
            serve.plot(results).savefig(output.with_suffix(".png"), dpi=120)
            print(f"Plot     {output.with_suffix('.png')}")
