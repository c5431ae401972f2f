"""llama.cpp's matrix product, called in the ggml libraries that llama-cpp-python brings."""

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

F32, Q4_0 = 0, 2
GROUP = 32  # of Q4_0


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The functions used here; raises where llama-cpp-python is not installed or its libraries do not load."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("No module named 'llama_cpp'")
        folder = Path(spec.origin).parent / "lib"
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
        for name, result, arguments in [
            ("ggml_init", pointer, [InitParams]),
            ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, number, number]),
            ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
            ("ggml_new_graph", pointer, [pointer]),
            ("ggml_build_forward_expand", None, [pointer, pointer]),
            ("ggml_quantize_chunk", size, [ctypes.c_int, pointer, pointer, number, number, number, pointer]),
            ("ggml_backend_alloc_ctx_tensors_from_buft", pointer, [pointer, pointer]),
            ("ggml_backend_get_default_buffer_type", pointer, [pointer]),
            ("ggml_backend_tensor_set", None, [pointer, pointer, size, size]),
            ("ggml_get_data", pointer, [pointer]),
            ("ggml_backend_graph_compute", ctypes.c_int, [pointer, pointer]),
        ]:
            function = getattr(self.base, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.cpu.ggml_backend_cpu_init.restype = pointer
        self.cpu.ggml_backend_cpu_set_n_threads.argtypes = [pointer, ctypes.c_int]
        self.backend = pointer(self.cpu.ggml_backend_cpu_init())
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
        # Weights are kept in the order its fast kernels want, as llama.cpp does when it loads a model.
        repack = self.cpu._Z35ggml_backend_cpu_repack_buffer_typev
        repack.restype = pointer
        self.repack = pointer(repack())

    def context(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.ggml_init(InitParams(1 << 20, None, True)))

    def weight(self, w: Tensor) -> int:
        """w [N, K] as Q4_0, in memory of its own."""
        n, k = w.shape
        packed = torch.empty(n * k // GROUP * 18, dtype=torch.uint8)
        self.ggml_quantize_chunk(Q4_0, w.data_ptr(), packed.data_ptr(), 0, n, k, None)
        context = self.context()
        weight = self.ggml_new_tensor_2d(context, Q4_0, k, n)
        self.ggml_backend_alloc_ctx_tensors_from_buft(context, self.repack)
        self.ggml_backend_tensor_set(weight, packed.data_ptr(), 0, packed.nbytes)
        return weight

    def linear(self, weight: int, n: int, x: Tensor) -> Callable[[], Tensor]:
        """x [rows, K] times the transpose of a weight [n, K]: a function that multiplies and returns the result."""
        rows, k = x.shape
        context = self.context()
        activations = self.ggml_new_tensor_2d(context, F32, k, rows)
        out = self.ggml_mul_mat(context, weight, activations)
        graph = self.ggml_new_graph(context)
        self.ggml_build_forward_expand(graph, out)
        self.ggml_backend_alloc_ctx_tensors_from_buft(context, self.ggml_backend_get_default_buffer_type(self.backend))
        self.ggml_backend_tensor_set(activations, x.data_ptr(), 0, x.nbytes)
        result = (ctypes.c_float * (rows * n)).from_address(self.ggml_get_data(out))
        y = torch.frombuffer(result, dtype=torch.float32).view(rows, n)

        def product() -> Tensor:
            self.ggml_backend_graph_compute(self.backend, graph)
            return y

        return product
