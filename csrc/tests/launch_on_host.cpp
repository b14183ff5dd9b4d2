// launch.h without a GPU: the kernels' code in loops over threads, on CPU tensors. With
// cuda/bindings.cpp it makes a Python module for tests of what lies above the kernels.

#include <mutex>

#include "cuda/launch.h"
#include "emulate.h"

namespace pyreg::cuda {

int built_with() { return 0; }
const char* architectures() { return "the host"; }
int driver_serves() { return 0; }
std::string unserved(int) { return ""; }
int blocks_at_a_time(Sweep, Family, int) { return 7; }

void launch(Sweep sweep, Family family, const Parameter& parameter, uint32_t blocks, int, void*) {
  static std::mutex mutex;
  static Random random(1);
  const std::lock_guard<std::mutex> lock(mutex);
  run_sweep(sweep, family, parameter, blocks, random);
}

}  // namespace pyreg::cuda
