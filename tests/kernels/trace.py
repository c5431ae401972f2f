"""Traces every Triton operation as torch.compile does, and prints the nodes of each graph as JSON.

A program of its own (see test_tracing.py): in the tests' process the kernels may be interpreted, which cannot be
traced. Nothing is launched, so CPU tensors will do: the compiler given to torch.compile looks at the graph and returns
zeros.
"""

import importlib
import json

import torch
from torch._dynamo.backends.common import aot_autograd

OPERATIONS = ("moments", "quantize", "quantize_dynamic", "dequantize", "rotate", "linear")
for name in OPERATIONS:
    importlib.import_module(f"la_aciq.kernels.{name}")
triton_ops = torch.ops.la_aciq_triton


def nodes_of(function, *arguments, dynamic: bool) -> list[str]:
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        results = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        values = [node.meta["val"] for node in results]
        shapes = [[n.node.hint if isinstance(n, torch.SymInt) else n for n in value.shape] for value in values]
        return lambda *_: [torch.zeros(shape, dtype=v.dtype) for shape, v in zip(shapes, values, strict=True)]

    torch._dynamo.reset()
    arguments = [argument.clone() for argument in arguments]
    if dynamic:
        for argument in arguments:
            torch._dynamo.mark_dynamic(argument, 0)
    torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))(*arguments)
    (graph,) = graphs
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def main() -> None:
    x = torch.randn(6, 64, dtype=torch.bfloat16)
    table, signs, ids = torch.ones(3, 4), torch.ones(64, dtype=torch.int8), torch.zeros(6, dtype=torch.int32)
    codes = torch.zeros(6, 32, dtype=torch.uint8)
    weight, weight_clip = torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 4)

    def linear(x, ids):
        return triton_ops.linear(
            x,
            weight,
            weight_clip,
            None,
            16,
            signs=signs,
            activation_bits=4,
            clips=table,
            language_ids=ids,
            activation_group_size=16,
        )

    calls = {
        "moments": (lambda x, ids: triton_ops.moments(x, ids, 3, True), x, ids),
        "quantize": (lambda x, ids: triton_ops.quantize(x, table, ids, 16, "midrise", signs, 0, True), x, ids),
        "quantize_dynamic": (lambda x, ids: triton_ops.quantize_dynamic(x, table, ids, 16), x, ids),
        "dequantize": (
            lambda codes, ids: triton_ops.dequantize(codes, table, ids, k=64, group_size=16, dtype=torch.float16),
            codes,
            ids,
        ),
        "rotate": (lambda x: triton_ops.rotate(x, signs), x),
        "linear": (linear, x, ids),
        "linear, 16-bit": (lambda x: triton_ops.linear(x, weight, weight_clip, None, 16), x),
    }
    print(
        json.dumps(
            {
                f"{name}, {'dynamic' if dynamic else 'static'}": nodes_of(*call, dynamic=dynamic)
                for name, call in calls.items()
                for dynamic in (False, True)
            }
        )
    )


if __name__ == "__main__":
    main()
