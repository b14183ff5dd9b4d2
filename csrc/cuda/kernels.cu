// The sweeps on NVIDIA GPUs: each one kernel, one launch, for any number of tensors. Compiled
// once for each family of penalties (PYREG_FAMILY names it).
//
// What moves, in N, the parameters' bytes: value and stats read N; gradient and prox read N and
// write N; accumulate and prox_in_metric read 2 N and write N. An optimizer's step
// reads and writes what it would without a penalty. Besides: 16 to 40 bytes for each
// segment, of which there are at most 16,384 and one more for each tensor. Nothing comes from
// the host, for the tensors' addresses are in the launch itself.
//
// What limits it: memory. An H200 does some 40 operations in the time that it moves the 6 bytes of
// one bfloat16 element of accumulate, and the sweep needs about 20. So all that counts is to have
// enough bytes asked for, and to ask for neighbours. By Little's law 4.8 TB/s at some 800 ns of
// latency are 3.8 MB in flight, 29 KB for each of 132 multiprocessors. A thread asks for 128 bytes
// at a time, in loads of 16, and with at most 80 registers 768 threads are resident: 96 KB, three
// times that, since a thread that computes asks for nothing. Measured there, of 4.30 TB/s that a
// copy moves and 4.37 that `dst.add_(src)` does: accumulate 3.98 and 4.05, value 4.40 and 4.48.
//
// Why this shape:
// - A warp takes a chunk of 4,096 elements, for then a thread has 8 of the chunk's 256 lanes,
//   whatever the dtype, and no warp waits for another until 64 chunks are done.
// - More blocks than run at a time, each with 16 neighbouring chunks or a segment: one search
//   over the tensors, then increments. Blocks begin in the order of memory, so what is under way
//   lies in one stretch of it. A persistent grid, each block with a stretch of its own, took 8 %
//   longer on an H200, for 8e9 bfloat16 elements; segments of a quarter of their number, 5 %. A
//   model too small for that is shared out equally among the blocks that run at a time.
// - The order of additions is the CPU's (totals.h), so value, sums and stats are the CPU's to the
//   bit, whatever the grid. Products and sums stay apart (-fmad=false), divisions are IEEE's, and
//   so gradients and proximal steps are the CPU's too. Only a NaN's payload may differ.
// - The last block to finish adds up the partials: no second kernel, no atomic additions of
//   numbers. It also sets the counter back for the next launch: nothing needs to clear it. That is
//   a call, not inlined: registers of its own let it have 16 loads of a thread under way.
// - One kernel for all dtypes and penalties of a pack, chosen for each chunk. L1, L2 and elastic
//   net have kernels of their own, in which each has a loop for each dtype: 24 bodies share 80
//   registers. A pack with any other penalty goes through kernels that know all nine. There, and in
//   prox_in_metric, all dtypes share a penalty's body (rows.h): a loop for each would take minutes
//   to compile. It takes 80 to 116 registers, so 512 to 768 threads are resident, and a thread asks
//   for 16 to 64 bytes of each of its streams at a time. More threads are worth more than more
//   bytes of each: on an H200 a step took 12.8 ms with 384 threads and 11.3 with 512, torch's 12.4.
// - prox_in_metric reads the value off the new weights before they leave the registers. So does an
//   optimizer's step (step.h), which has 160 bytes of a thread in flight for a float32 Adam.

#include <cuda_runtime.h>

#include "block.h"
#include "launch.h"

namespace pyreg::cuda {
namespace {

// As many blocks as run at a time without a register being spilled, as
// tests/test_cuda_machine_code.py shows. Where each penalty and dtype has a loop of its own, 80
// registers a thread on sm_90, 96 before it, 128 after it, where the compiler takes more; where
// they share one, 80 before sm_100 and 128 from there on, but 96 to 128 in a metric and in a step.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksOfOwnLoops = 4, kBlocksOfShared = 4, kBlocksInMetric = 4;
constexpr int kBlocksOfStep = __CUDA_ARCH__ < 1200 ? 4 : 3;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kBlocksOfOwnLoops = 6, kBlocksOfShared = 6, kBlocksInMetric = 5, kBlocksOfStep = 4;
#else
constexpr int kBlocksOfOwnLoops = 5, kBlocksOfShared = 6, kBlocksInMetric = 5, kBlocksOfStep = 3;
#endif
template <Sweep S, Family F>
constexpr int kBlocks = kHasOwnLoops<S, F>          ? kBlocksOfOwnLoops
                        : S == Sweep::kStep         ? kBlocksOfStep
                        : S != Sweep::kProxInMetric ? kBlocksOfShared
                        : F == Family::kElementary  ? 4
                                                    : kBlocksInMetric;

// The executor of block.h: a thread runs each phase once.
struct Device {
  template <class F>
  __device__ __forceinline__ void each_warp(F f) {
    f(static_cast<int>(threadIdx.x / kWarp));
  }
  template <class F>
  __device__ __forceinline__ void each_lane(F f) {
    int lane = threadIdx.x % kWarp;
    forget(lane);
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

template <Sweep S, Family F>
__global__ void __launch_bounds__(kThreads, kBlocks<S, F>)
    sweep(const __grid_constant__ Parameter p) {
  __shared__ Shared<S> shared;
  Device run;
  run_block<S, F>(run, p, blockIdx.x, gridDim.x, shared);
}

template <Family F>
const void* kernel(Sweep s) {
  switch (s) {
    case Sweep::kValue:
      return reinterpret_cast<const void*>(&sweep<Sweep::kValue, F>);
    case Sweep::kGradient:
      return reinterpret_cast<const void*>(&sweep<Sweep::kGradient, F>);
    case Sweep::kAccumulate:
      return reinterpret_cast<const void*>(&sweep<Sweep::kAccumulate, F>);
    case Sweep::kProx:
      return reinterpret_cast<const void*>(&sweep<Sweep::kProx, F>);
    case Sweep::kProxInMetric:
      return reinterpret_cast<const void*>(&sweep<Sweep::kProxInMetric, F>);
    case Sweep::kStats:
      if constexpr (F == Family::kElementary)
        return reinterpret_cast<const void*>(&sweep<Sweep::kStats, F>);
      break;
    case Sweep::kStep:
      if constexpr (F == Family::kElementary)
        return reinterpret_cast<const void*>(&sweep<Sweep::kStep, F>);
  }
  return nullptr;
}
template const void* kernel<Family::PYREG_FAMILY>(Sweep);

}  // namespace pyreg::cuda
