"""Calls each operation of a backend, cuda or triton, for the first time inside the capture of a CUDA graph.

A program of its own (see test_gpu.py): in the tests' process the kernels are already loaded. Prints what happened, by
operation, as JSON: "worked", or the message of the error. Stops with a traceback if a result is wrong, of a replay or
of the eager call that follows, whether the capture worked or not.
"""

import json
import sys

import torch

from la_aciq.ops import backends, reference


def calls(device: str) -> dict:
    """Calls by operation, each of a namespace that has it. Tensors are made on the CPU: no kernel of PyTorch's runs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 192, generator=generator)
    table = 2 + torch.rand(3, 3, generator=generator)
    ids = torch.tensor([0, 2, 1, 1, 0, 2], dtype=torch.int32)
    signs = (1 - 2 * torch.randint(0, 2, (192,), generator=generator)).to(torch.int8)
    weight = torch.randint(0, 256, (40, 96), generator=generator, dtype=torch.uint8)
    weight_clip = 0.1 + torch.rand(40, 3, generator=generator)
    narrow = x.bfloat16()
    x, table, ids, signs, weight, weight_clip, narrow = (
        t.to(device) for t in (x, table, ids, signs, weight, weight_clip, narrow)
    )
    return {
        "moments": lambda ops: ops.moments(x, ids, 3, True),
        "quantize": lambda ops: ops.quantize(x, table, ids, 64, tail_sums=True),
        "quantize_dynamic": lambda ops: ops.quantize_dynamic(x, table, ids, 64, "rms", "midrise", signs),
        "dequantize": lambda ops: (
            ops.dequantize(weight, weight_clip, k=192, group_size=64, per_row=True, dtype=x.dtype),
        ),
        "rotate": lambda ops: (ops.rotate(x, signs),),
        "linear": lambda ops: (ops.linear(narrow, weight, weight_clip, group_size=64),),
    }


def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
    if wanted.dtype == torch.uint8:  # but for decisions at boundaries
        assert (got.cpu() != wanted).double().mean() < 0.01
    else:
        torch.testing.assert_close(got.cpu().double(), wanted.double(), rtol=1e-2, atol=2e-2)


def first_call(call, namespace, expected) -> str:
    graph, outcome, stream = torch.cuda.CUDAGraph(), "worked", torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            captured = call(namespace)
    except RuntimeError as error:
        outcome = str(error) or repr(error)
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
    torch.cuda.synchronize()
    if outcome == "worked":
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        torch.cuda.synchronize()
    eager = call(namespace)
    for index, wanted in enumerate(expected):
        check(eager[index], wanted)
        assert outcome != "worked" or torch.equal(captured[index], eager[index]), "a replay is not what a call gives"
    return outcome


def main(backend: str) -> None:
    if (reason := backends.why_unavailable(backend)) is not None:
        sys.exit(reason)
    namespace = torch.ops.la_aciq_triton if backend == "triton" else torch.ops.la_aciq
    expected = {name: call(reference) for name, call in calls("cpu").items()}
    outcomes = {name: first_call(call, namespace, expected[name]) for name, call in calls("cuda").items()}
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1])
