// torch.ops.la_aciq_emulated: the schemas of csrc/ops.cpp with the implementation in csrc/cuda/ops.cpp, on
// CPU tensors. The two files are included unchanged; only the macros that would register them for la_aciq on
// CUDA tensors mean something else here.
#include <torch/library.h>

#pragma push_macro("TORCH_LIBRARY")
#pragma push_macro("TORCH_LIBRARY_IMPL")
#undef TORCH_LIBRARY
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY(ns, m) void define_schemas(torch::Library& m)
#define TORCH_LIBRARY_IMPL(ns, key, m) void register_kernels(torch::Library& m)
#include "cuda/ops.cpp"
#include "ops.cpp"
#pragma pop_macro("TORCH_LIBRARY")
#pragma pop_macro("TORCH_LIBRARY_IMPL")

TORCH_LIBRARY(la_aciq_emulated, m) {
  define_schemas(m);
}
TORCH_LIBRARY_IMPL(la_aciq_emulated, CPU, m) {
  la_aciq::register_kernels(m);
}
