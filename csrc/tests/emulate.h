// The CUDA kernels' code on the host: loops stand for blocks, warps and threads.
#pragma once

#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#include "check.h"
#include "cuda/block.h"
#include "cuda/layout.h"

namespace pyreg::cuda {

using Random = std::mt19937_64;

// Runs each phase of block.h over all of its threads, in random order: what one phase needs of
// another must have gone through a barrier.
struct Host {
  Random& random;

  template <class F>
  void shuffled(int n, F f) {
    const int stride = 2 * static_cast<int>(random() % (n / 2)) + 1;  // n is a power of two
    const int start = static_cast<int>(random() % n);
    for (int i = 0; i < n; ++i) f((start + i * stride) % n);
  }
  template <class F>
  void each_warp(F f) {
    shuffled(kWarps, f);
  }
  template <class F>
  void each_lane(F f) {
    shuffled(kWarp, f);
  }
  template <class F>
  void each_thread(F f) {
    shuffled(kThreads, f);
  }
  void sync() {}
  bool is_last(uint32_t* done, uint32_t blocks) {
    if (++*done < blocks) return false;
    *done = 0;
    return true;
  }
};

template <Sweep S, Family F>
void run_grid(const Parameter& p, uint32_t blocks, Random& random) {
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  Host host{random};
  auto shared = std::make_unique<Shared<S>>();
  for (uint32_t block : order) {
    std::memset(static_cast<void*>(shared.get()), 0xff, sizeof *shared);  // NaN
    run_block<S, F>(host, p, block, blocks, *shared);
  }
}

template <Family F>
void run_sweep(Sweep sweep, const Parameter& p, uint32_t blocks, Random& random) {
  switch (sweep) {
    case Sweep::kValue:
      return run_grid<Sweep::kValue, F>(p, blocks, random);
    case Sweep::kGradient:
      return run_grid<Sweep::kGradient, F>(p, blocks, random);
    case Sweep::kAccumulate:
      return run_grid<Sweep::kAccumulate, F>(p, blocks, random);
    case Sweep::kProx:
      return run_grid<Sweep::kProx, F>(p, blocks, random);
    case Sweep::kProxInMetric:
      return run_grid<Sweep::kProxInMetric, F>(p, blocks, random);
    case Sweep::kStats:
      return run_grid<Sweep::kStats, F>(p, blocks, random);
    case Sweep::kStep:
      if constexpr (F == Family::kElementary) run_grid<Sweep::kStep, F>(p, blocks, random);
  }
}

inline void run_sweep(Sweep sweep, Family family, const Parameter& p, uint32_t blocks,
                      Random& random) {
  if (family == Family::kAll)
    run_sweep<Family::kAll>(sweep, p, blocks, random);
  else
    run_sweep<Family::kElementary>(sweep, p, blocks, random);
}

}  // namespace pyreg::cuda
