// The scheduler behind cuda_runtime.h in this folder: a fiber per CUDA thread, one block at a time.
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr size_t kStackSize = 256 << 10;
constexpr size_t kDefaultSharedMemory = 48 << 10;
constexpr size_t kMostSharedMemory = 99 << 10;
constexpr int kMostThreads = 1024;

// What the lanes of a warp hand each other. Two sets take turns: a lane can be at most one exchange ahead of
// the others, since it waits in the next one for all of them.
struct Warp {
  alignas(16) unsigned char values[2][32][32];
  int waiting = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  uint3 index;
  int number;
  int exchanges;
  enum { kReady, kAtBlockBarrier, kInExchange, kDone } state;
};

struct Machine {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMostThreads);
  std::vector<Warp> warps = std::vector<Warp>(kMostThreads / 32);
  alignas(128) unsigned char shared[kMostSharedMemory + 64];
  std::map<const void*, size_t> allowed_shared_memory;
  ucontext_t scheduler;
  void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  Fiber* current = nullptr;
  int threads = 0, at_barrier = 0, done = 0;
  Body body;
  void* closure;
  unsigned order = 0;
  std::exception_ptr error;
};

Machine machine;

void leave_to_scheduler(bool forever) {
  Fiber* self = machine.current;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_size);
  swapcontext(&self->context, &machine.scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  (void)forever;
  swapcontext(&self->context, &machine.scheduler);
#endif
}

void resume(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = fiber.index;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackSize);
  swapcontext(&machine.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  swapcontext(&machine.scheduler, &fiber.context);
#endif
}

// A thread that has returned no longer takes part.
bool open_block_barrier_if_complete() {
  if (machine.at_barrier < machine.threads - machine.done) return false;
  machine.at_barrier = 0;
  for (int i = 0; i < machine.threads; i++) {
    if (machine.fibers[i].state == Fiber::kAtBlockBarrier) machine.fibers[i].state = Fiber::kReady;
  }
  return true;
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  const void* from;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &from, &size);
  machine.scheduler_stack = const_cast<void*>(from);
  machine.scheduler_stack_size = size;
#endif
  try {
    machine.body(machine.closure);
  } catch (...) {
    machine.error = std::current_exception();
  }
  machine.current->state = Fiber::kDone;
  machine.done++;
  open_block_barrier_if_complete();
  leave_to_scheduler(true);
}

std::vector<unsigned> ordered(unsigned count, unsigned salt) {
  std::vector<unsigned> result(count);
  std::iota(result.begin(), result.end(), 0u);
  if (machine.order == 1) std::reverse(result.begin(), result.end());
  if (machine.order > 1) std::shuffle(result.begin(), result.end(), std::mt19937(machine.order + salt));
  return result;
}

void start(Fiber& fiber, int number) {
  if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackSize]);
  const unsigned i = static_cast<unsigned>(number), x = blockDim.x, y = blockDim.y;
  fiber.number = number;
  fiber.exchanges = 0;
  fiber.index = {i % x, i / x % y, i / (x * y)};
  fiber.state = Fiber::kReady;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackSize;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

void run_block(size_t shared_size) {
  memset(machine.shared, 0xFF, sizeof(machine.shared));
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(machine.shared + shared_size, sizeof(machine.shared) - shared_size);
#endif
  machine.at_barrier = machine.done = 0;
  for (Warp& warp : machine.warps) warp.waiting = 0;
  for (int i = 0; i < machine.threads; i++) start(machine.fibers[i], i);
  const unsigned salt = blockIdx.x + 7919 * blockIdx.y;
  const auto order = ordered(static_cast<unsigned>(machine.threads), salt);
  while (machine.done < machine.threads) {
    bool progress = false;
    for (const unsigned i : order) {
      if (machine.fibers[i].state != Fiber::kReady) continue;
      resume(machine.fibers[i]);
      progress = true;
    }
    if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
    if (!progress) {
      throw std::runtime_error("emulated kernel: " + std::to_string(machine.at_barrier) +
                               " threads wait at a barrier of the block and " +
                               std::to_string(machine.threads - machine.at_barrier - machine.done) +
                               " in a warp operation that others never reach");
    }
  }
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(machine.shared, sizeof(machine.shared));
#endif
  for (size_t i = shared_size; i < sizeof(machine.shared); i++) {
    if (machine.shared[i] != 0xFF)
      throw std::runtime_error("emulated kernel: wrote beyond its shared memory");
  }
}

}  // namespace

cudaError_t run_grid(const cudaLaunchConfig_t& config, const void* kernel, Body body, void* closure) {
  const auto allowed = machine.allowed_shared_memory.find(kernel);
  const size_t limit =
      allowed == machine.allowed_shared_memory.end() ? kDefaultSharedMemory : allowed->second;
  const dim3 grid = config.gridDim, block = config.blockDim;
  const unsigned threads = block.x * block.y * block.z;
  if (config.dynamicSmemBytes > limit || threads == 0 || threads > kMostThreads || threads % 32 ||
      grid.x == 0 || grid.x > 0x7FFFFFFFu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = block;
  machine.threads = static_cast<int>(threads);
  machine.body = body;
  machine.closure = closure;
  for (const unsigned i : ordered(grid.x * grid.y * grid.z, 1)) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block(config.dynamicSmemBytes);
  }
  return cudaSuccess;
}

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kMostSharedMemory) return cudaErrorInvalidValue;
  machine.allowed_shared_memory[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

int lane() {
  return machine.current->number % 32;
}

void* shared_memory() {
  return machine.shared;
}

void block_barrier() {
  Fiber* self = machine.current;
  machine.at_barrier++;
  if (open_block_barrier_if_complete()) return;
  self->state = Fiber::kAtBlockBarrier;
  leave_to_scheduler(false);
}

const unsigned char* exchange(const void* value, size_t size) {
  Fiber* self = machine.current;
  Warp& warp = machine.warps[self->number / 32];
  auto& set = warp.values[self->exchanges++ & 1];
  memcpy(set[self->number % 32], value, size);
  if (++warp.waiting < 32) {
    self->state = Fiber::kInExchange;
    leave_to_scheduler(false);
  } else {
    warp.waiting = 0;
    const int first = self->number / 32 * 32;
    for (int i = first; i < first + 32; i++) {
      if (machine.fibers[i].state == Fiber::kInExchange) machine.fibers[i].state = Fiber::kReady;
    }
  }
  return set[0];
}

void require_full_mask(unsigned mask) {
  if (mask != 0xFFFFFFFFu)
    throw std::runtime_error("emulated kernel: only warp operations of all 32 lanes are covered");
}

extern "C" void la_aciq_emulation_order(unsigned order) {
  machine.order = order;
}

}  // namespace emulation
