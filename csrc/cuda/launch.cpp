// The kernels' launch, by CUDA's runtime.

#include "launch.h"

#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>

namespace pyreg::cuda {
namespace {

const void* kernel_of(Sweep sweep, Family family) {
  return family == Family::kAll ? kernel<Family::kAll>(sweep) : kernel<Family::kElementary>(sweep);
}

void check(cudaError_t status, const char* what, int device) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // this error is told here, and not again by somebody else's call
  throw std::runtime_error("pyreg " + std::string(what) + " on cuda:" + std::to_string(device) +
                           ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                           ")");
}

// Makes a device the current one, and the one before it again.
class Current {
 public:
  Current(int device, const char* what) {
    check(cudaGetDevice(&before_), what, device);
    if (before_ == device) return;
    check(cudaSetDevice(device), what, device);
    moved_ = true;
  }
  ~Current() {
    if (moved_) cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool moved_ = false;
};

constexpr int kDevices = 64;
std::mutex mutex;
int known_blocks[kDevices][kFamilies][kSweeps];

}  // namespace

int built_with() { return CUDART_VERSION; }

const char* architectures() { return PYREG_CUDA_ARCHITECTURES; }

int driver_serves() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string unserved(int device) {
  try {
    for (Family family : {Family::kElementary, Family::kAll})
      for (int s = 0; s < kSweeps; ++s)
        if (kernel_of(static_cast<Sweep>(s), family) != nullptr)
          blocks_at_a_time(static_cast<Sweep>(s), family, device);
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

int blocks_at_a_time(Sweep sweep, Family family, int device) {
  const int s = static_cast<int>(sweep);
  if (device < 0 || device >= kDevices)
    throw std::runtime_error("device " + std::to_string(device) + " is out of range");
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known_blocks[device][static_cast<int>(family)][s];
  if (blocks == 0) {
    const Current current(device, kSweepNames[s]);
    int each = 0, multiprocessors = 0;
    check(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel_of(sweep, family), kThreads, 0),
        kSweepNames[s], device);
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
          kSweepNames[s], device);
    if (each == 0) throw std::runtime_error("a block does not fit into a multiprocessor");
    blocks = each * multiprocessors;
  }
  return blocks;
}

void launch(Sweep sweep, Family family, const Parameter& parameter, uint32_t blocks, int device,
            void* stream) {
  const int s = static_cast<int>(sweep);
  const Current current(device, kSweepNames[s]);
  void* arguments[] = {const_cast<Parameter*>(&parameter)};
  check(cudaLaunchKernel(kernel_of(sweep, family), dim3(blocks), dim3(kThreads), arguments, 0,
                         static_cast<cudaStream_t>(stream)),
        kSweepNames[s], device);
}

}  // namespace pyreg::cuda
