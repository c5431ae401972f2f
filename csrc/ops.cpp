// The schema of every operation, once. Kernels attach to it per device (cpu/aten/*.cpp, cuda/ops.cpp).
// python/la_aciq/ops/fakes.py adds the fakes; python/la_aciq/ops/reference.py defines each operation.
#include <torch/library.h>

TORCH_LIBRARY(la_aciq, m) {
  m.def(
      "moments(Tensor x, Tensor? language_ids=None, int num_entries=1, bool histogram=False) -> (Tensor, "
      "Tensor)");
  m.def(
      "quantize(Tensor x, Tensor clips, Tensor? language_ids=None, int group_size=0, str "
      "codebook=\"midrise\", "
      "Tensor? signs=None, int block_size=0, bool tail_sums=False) -> (Tensor, Tensor)");
  m.def(
      "quantize_dynamic(Tensor x, Tensor clip_factor, Tensor? language_ids=None, int group_size=0, "
      "str statistic=\"rms\", str codebook=\"midrise\", Tensor? signs=None, int block_size=0) -> (Tensor, "
      "Tensor)");
  m.def(
      "dequantize(Tensor codes, Tensor clips, Tensor? language_ids=None, *, int k, int group_size=0, "
      "str codebook=\"midrise\", bool per_row=False, ScalarType dtype=float) -> Tensor");
  m.def("rotate(Tensor x, Tensor signs, int block_size=0) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor weight_clip, Tensor? bias=None, *, int group_size=0, "
      "str weight_codebook=\"midrise\", Tensor? signs=None, int block_size=0, int activation_bits=16, "
      "str activation_clip=\"static\", Tensor? clips=None, Tensor? language_ids=None, int "
      "activation_group_size=0, "
      "str activation_codebook=\"midrise\") -> Tensor");
  m.def(
      "round_weights(Tensor weight, Tensor second_moments, Tensor factor, int group_size=0, "
      "str codebook=\"midrise\") -> (Tensor, Tensor)");
}
