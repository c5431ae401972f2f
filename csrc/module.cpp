// The Python module la_aciq._C. Importing it registers the operations; its functions say what was built and
// what runs.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels/kernels.h"

namespace py = pybind11;
using namespace la_aciq::cpu;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled core of LA-ACIQ.";

  m.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = TORCH_VERSION;
        info["compiler"] = __VERSION__;
#ifdef LA_ACIQ_CUDA
        info["cuda"] = true;
#else
        info["cuda"] = false;
#endif
        return info;
      },
      "The torch version the core was compiled against, the compiler, and whether it has CUDA kernels.");

  m.def(
      "cpu_info",
      [] {
        py::dict info;
        py::list available;
        for (const Kernels* kernels : available_kernels()) available.append(kernels->isa);
        info["isa"] = active_kernels().isa;
        info["available"] = available;
#if defined(_OPENMP)
        info["threads"] = at::get_num_threads();
#else
        info["threads"] = 1;  // at::parallel_for works on the calling thread
#endif
        return info;
      },
      "The instruction set in use, those this CPU has kernels for, and the number of threads.");

  m.def(
      "force_isa",
      [](const std::string& isa) {
        if (!activate_kernels(isa.c_str())) {
          throw std::invalid_argument("isa: expected one of cpu_info()['available'], got '" + isa + "'");
        }
      },
      py::arg("isa"), "Makes every later call of this process use the kernels of one instruction set.");
}
