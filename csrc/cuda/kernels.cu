// The five sweeps on NVIDIA GPUs: each one kernel, one launch, for any number of tensors.
//
// What moves, in N, the parameters' bytes: value and stats read N; gradient and prox read N and
// write N; accumulate reads 2 N and writes N. Besides: 16 or 40 bytes for each segment, of which
// there are some four thousand and one more for each tensor. Nothing comes from the host, for the
// tensors' addresses are in the launch itself.
//
// What limits it: memory. An H200 does some 40 operations in the time that it moves the 6 bytes of
// one bfloat16 element of accumulate, and the sweep needs about 20. So all that counts is to have
// enough bytes asked for. By Little's law 4.8 TB/s at some 800 ns of latency are 3.8 MB in flight,
// 29 KB for each of 132 multiprocessors. A thread asks for 128 bytes at a time, in loads of 16, and
// with at most 80 registers 768 threads are resident: 96 KB, three times that, since a thread that
// computes asks for nothing.
//
// Why this shape:
// - A warp takes a chunk of 4,096 elements, for then a thread has 8 of the chunk's 256 lanes,
//   whatever the dtype, and no warp waits for another until 64 chunks are done.
// - A persistent grid of as many blocks as are resident, each with a run of neighbouring chunks:
//   one binary search over the tensors, then increments, and one wave, so that no tail of late
//   blocks runs alone. Shares are equal to within a segment.
// - The order of additions is the CPU's (totals.h), so value, sums and stats are the CPU's to the
//   bit, whatever the grid. Products and sums stay apart (-fmad=false), divisions are IEEE's, and
//   so gradients and proximal steps are the CPU's too. Only a NaN's payload may differ.
// - The last block to finish adds up the partials: no second kernel, no atomic additions of
//   numbers. It also sets the counter back for the next launch: nothing needs to clear it.
// - One kernel for all dtypes and penalties, chosen for each chunk: 24 bodies share 80 registers.

#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>

#include "block.h"
#include "launch.h"

namespace pyreg::cuda {
namespace {

// As many blocks as run at a time without a register being spilled, as
// tests/test_cuda_machine_code.py shows: 80 registers a thread on sm_90, 96 before it, 128 after
// it, where the compiler takes more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksPerMultiprocessor = 4;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kBlocksPerMultiprocessor = 6;
#else
constexpr int kBlocksPerMultiprocessor = 5;
#endif

// The executor of block.h: a thread runs each phase once.
struct Device {
  template <class F>
  __device__ __forceinline__ void each_warp(F f) {
    f(static_cast<int>(threadIdx.x / kWarp));
  }
  template <class F>
  __device__ __forceinline__ void each_lane(F f) {
    int lane = threadIdx.x % kWarp;
    // The compiler must not know it again: it would keep addresses of all 24 bodies in registers.
    asm volatile("" : "+r"(lane));
    f(lane);
    __syncwarp();
  }
  template <class F>
  __device__ __forceinline__ void each_thread(F f) {
    f(static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  // Release: what this block wrote is there before its count. Acquire: the last one sees it all.
  __device__ __forceinline__ bool is_last(uint32_t* done, uint32_t blocks) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
      uint32_t before;
      asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                   : "=r"(before)
                   : "l"(__cvta_generic_to_global(done))
                   : "memory");
      last = before + 1 == blocks;
      if (last) *done = 0;
    }
    __syncthreads();
    return last;
  }
};

}  // namespace

template <Sweep S>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sweep(const __grid_constant__ Parameter p) {
  __shared__ Shared<S> shared;
  Device run;
  run_block<S>(run, p, blockIdx.x, gridDim.x, shared);
}

namespace {

const void* const kKernels[kSweeps] = {reinterpret_cast<const void*>(&sweep<Sweep::kValue>),
                                       reinterpret_cast<const void*>(&sweep<Sweep::kGradient>),
                                       reinterpret_cast<const void*>(&sweep<Sweep::kAccumulate>),
                                       reinterpret_cast<const void*>(&sweep<Sweep::kProx>),
                                       reinterpret_cast<const void*>(&sweep<Sweep::kStats>)};

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
int known_blocks[kDevices][kSweeps];

}  // namespace

int built_with() { return CUDART_VERSION; }

const char* architectures() { return PYREG_CUDA_ARCHITECTURES; }

int driver_serves() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string unserved(int device) {
  try {
    for (int s = 0; s < kSweeps; ++s) blocks_at_a_time(static_cast<Sweep>(s), device);
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

int blocks_at_a_time(Sweep sweep, int device) {
  const int s = static_cast<int>(sweep);
  if (device < 0 || device >= kDevices)
    throw std::runtime_error("device " + std::to_string(device) + " is out of range");
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known_blocks[device][s];
  if (blocks == 0) {
    const Current current(device, kSweepNames[s]);
    int each = 0, multiprocessors = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernels[s], kThreads, 0),
          kSweepNames[s], device);
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
          kSweepNames[s], device);
    if (each == 0) throw std::runtime_error("a block does not fit into a multiprocessor");
    blocks = each * multiprocessors;
  }
  return blocks;
}

void launch(Sweep sweep, const Parameter& parameter, uint32_t blocks, int device, void* stream) {
  const int s = static_cast<int>(sweep);
  const Current current(device, kSweepNames[s]);
  void* arguments[] = {const_cast<Parameter*>(&parameter)};
  check(cudaLaunchKernel(kKernels[s], dim3(blocks), dim3(kThreads), arguments, 0,
                         static_cast<cudaStream_t>(stream)),
        kSweepNames[s], device);
}

}  // namespace pyreg::cuda
