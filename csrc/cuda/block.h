// What a block does: its chunks, a warp each (chunk.h), and their totals (totals.h).
//
// Written as phases between barriers, over an Executor that says who runs them: on a GPU every
// thread runs each phase once, in the C++ tests a loop over the threads does. So the same code is
// tested where no GPU is.
//
// An Executor has
//   each_warp(f)    f(warp) in every warp, with no barrier
//   each_lane(f)    f(lane) in every thread of this warp, then a barrier of the warp
//   each_thread(f)  f(thread) in every thread
//   sync()          a barrier of the block
//   is_last(done, blocks)  whether this block is the last to get here; then what the others wrote
//                          before can be read, and `done` is 0 again
#pragma once

#include "chunk.h"
#include "totals.h"
#include "walk.h"

namespace pyreg::cuda {

PYREG_DEVICE bool at_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// One thread's part of a chunk, and its lanes into `lanes`.
template <Sweep S, class P, class T, int W, class C>
PYREG_DEVICE void visit_and_keep(const Entry& entry, const Place& place, const Numbers<C>& numbers,
                                 int thread, typename Shared<S>::Warp* keep) {
  T* w = in_device_memory<T>(entry.w) + place.begin;
  // Without a gradient w is read in its place: no load waits for a branch.
  T* g = in_device_memory<T>(kWritesGradient<S> && entry.g ? entry.g : entry.w) + place.begin;
  Totals<C> totals;
  visit<S, P, T, W>(w, g, entry.g != nullptr, place.n, thread, numbers, totals);
  if constexpr (kHasTotals<S>) {
    C* first = reinterpret_cast<C*>(keep->lanes[0]);
    C* second = reinterpret_cast<C*>(keep->lanes[1]);
#pragma unroll
    for (int v = 0; v < kOwn; ++v) {
      first[lane_of<W>(thread, v)] = totals.first[v];
      second[lane_of<W>(thread, v)] = totals.second[v];
    }
    if constexpr (S == Sweep::kStats) {
      keep->top[thread] = totals.top;
      keep->zeros[thread] = totals.zeros;
      keep->non_finite[thread] = totals.non_finite;
    }
  }
}

template <Sweep S, class P, class T>
PYREG_DEVICE void visit_as(const Parameter& p, const Entry& entry, const Place& place, int thread,
                           typename Shared<S>::Warp* keep) {
  using C = typename Element<T>::Compute;
  Numbers<C> numbers{};
  if (S != Sweep::kValue && S != Sweep::kStats) {
    const Rule rule = p.rule(entry.rule);
#pragma unroll
    for (int k = 0; k < kMaxStrengths; ++k)
      numbers.strengths[k] = static_cast<C>(read(rule.strengths[k], rule.kinds[k]));
    numbers.scale = static_cast<C>(read(p.scale, p.scale_kind));
  }
  const bool wide =
      place.n == kChunk && at_16_bytes(entry.w) && (!kWritesGradient<S> || at_16_bytes(entry.g));
  if (wide)
    visit_and_keep<S, P, T, kWide<T>>(entry, place, numbers, thread, keep);
  else
    visit_and_keep<S, P, T, 1>(entry, place, numbers, thread, keep);
}

template <Sweep S, class P>
PYREG_DEVICE void visit_dtype(const Parameter& p, const Entry& entry, const Place& place,
                              int thread, typename Shared<S>::Warp* keep) {
  switch (static_cast<DType>(entry.dtype)) {
    case DType::kFloat32:
      return visit_as<S, P, float>(p, entry, place, thread, keep);
    case DType::kFloat64:
      return visit_as<S, P, double>(p, entry, place, thread, keep);
    case DType::kBFloat16:
      return visit_as<S, P, BFloat16>(p, entry, place, thread, keep);
    case DType::kFloat16:
      return visit_as<S, P, Float16>(p, entry, place, thread, keep);
  }
}

template <Sweep S>
PYREG_DEVICE void visit_any(const Parameter& p, const Entry& entry, const Place& place, int thread,
                            typename Shared<S>::Warp* keep) {
  if constexpr (S == Sweep::kStats) {
    visit_dtype<S, L1>(p, entry, place, thread, keep);  // (any penalty: it is not asked)
  } else {
    int penalty = 0;
    const int own = p.rule(entry.rule).penalty;
#define PYREG_VISIT(P) \
  if (own == penalty++) return visit_dtype<S, P>(p, entry, place, thread, keep);
    PYREG_ELEMENTARY(PYREG_VISIT)
#undef PYREG_VISIT
  }
}

// A sweep's chunks [begin, end), a warp each by turns.
template <Sweep S, class Executor>
PYREG_DEVICE void visit_chunks(Executor& run, const Parameter& p, Shared<S>& shared, int warp,
                               uint32_t row, uint32_t begin, uint32_t end, int parity) {
  uint32_t next = p.first_chunk(row + 1);
  for (uint32_t chunk = begin + warp; chunk < end; chunk += kWarps) {
    while (chunk >= next) next = p.first_chunk(++row + 1);
    const Entry entry = p.entry(row);
    if (S == Sweep::kGradient && entry.g == nullptr) continue;
    if (S == Sweep::kProx && entry.w == nullptr) continue;
    const Place place = place_of(p, entry, next, chunk);
    if constexpr (kHasTotals<S>) {
      typename Shared<S>::Warp* keep = &shared.warps[warp];
      run.each_lane([&](int lane) { visit_any<S>(p, entry, place, lane, keep); });
      const int i = static_cast<int>(chunk - begin);
      reduce_lanes<S>(run, keep, static_cast<DType>(entry.dtype) == DType::kFloat64,
                      shared.sums[parity][i]);
      run.each_lane([&](int lane) {
        if (lane == 0) shared.segment[parity][i] = place.segment;
      });
    } else {
      (void)shared, (void)parity;
      run.each_lane([&](int lane) { visit_any<S>(p, entry, place, lane, nullptr); });
    }
  }
}

template <Sweep S, class Executor>
PYREG_DEVICE void run_block(Executor& run, const Parameter& p, uint32_t block, uint32_t blocks,
                            Shared<S>& shared) {
  const uint32_t begin = begin_of(p, block), end = begin_of(p, block + 1);
  uint32_t row = find_row(p, begin);
  if constexpr (!kHasTotals<S>) {
    run.each_warp([&](int warp) { visit_chunks<S>(run, p, shared, warp, row, begin, end, 0); });
  } else {
    int parity = 0;
    run.each_thread([&](int thread) {
      if (thread == 0) shared.carry_segment[1] = kNone;
    });
    for (uint32_t batch = begin; batch < end; batch += kBatch, parity = !parity) {
      const uint32_t stop = end - batch < kBatch ? end : batch + kBatch;
      while (batch >= p.first_chunk(row + 1)) ++row;
      run.each_warp(
          [&](int warp) { visit_chunks<S>(run, p, shared, warp, row, batch, stop, parity); });
      run.sync();
      run.each_thread([&](int thread) {
        add_chunks<S>(p, shared, parity, static_cast<int>(stop - batch), thread);
      });
    }
    run.sync();
    run.each_thread([&](int thread) {
      const uint32_t carried = shared.carry_segment[!parity];
      if (thread < kColumns<S> && carried != kNone)
        p.partials[static_cast<int64_t>(carried) * kColumns<S> + thread] =
            shared.carry[!parity][thread];
    });
    if (run.is_last(p.done, blocks)) finish<S>(run, p, shared);
  }
}

}  // namespace pyreg::cuda
