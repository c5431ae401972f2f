"""Triton kernels of LA-ACIQ, one file per operation; installed as `la_aciq.kernels`.

Each file registers its operation with `torch.library.triton_op` as `torch.ops.la_aciq_triton.<name>`, with the
arguments of the schema in csrc/ops.cpp. A namespace of its own, and not kernels for the schemas of the compiled core,
because then a machine without a compiler still has them, both GPU implementations can be called side by side, and
torch.compile sees the kernels themselves and not an opaque call. The price is triton_op's dispatch in Python on every
eager call, which disappears under torch.compile and CUDA graphs. la_aciq.ops.backends decides when these run.

No call times another: sizes of tiles follow from shapes and from a table of what was measured (tuning.py), so a first
call compiles its kernel and no more, also while a CUDA graph is captured. Kernels launch on the current stream of the
tensors' device, allocate through PyTorch alone, and never wait for the device.

Nothing is imported here: `moments`, `quantize` and the other names are the modules, and importing la_aciq does not
import Triton where there is no GPU. benchmarks/triton_compile.py compiles every kernel without one.
"""
