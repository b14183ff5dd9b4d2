// What a block does: its chunks, a warp each (chunk.h, rows.h), and their totals (totals.h).
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

#include "rows.h"
#include "step.h"
#include "totals.h"
#include "walk.h"

namespace pyreg::cuda {

PYREG_DEVICE bool at_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A thread's lanes of a chunk, W of them next to each other.
template <Sweep S, int W, class C>
PYREG_DEVICE void keep_totals(const Totals<C>& totals, int thread, typename Shared<S>::Warp* keep) {
  C* first = reinterpret_cast<C*>(keep->lanes[0]);
  C* second = reinterpret_cast<C*>(keep->lanes[1]);
#pragma unroll
  for (int v = 0; v < kOwn; ++v) {
    first[lane_of<W>(thread, v)] = totals.first[v];
    second[lane_of<W>(thread, v)] = totals.second[v];
  }
  if constexpr (kColumns<S> > 2) keep->zeros[thread] = totals.zeros;
  if constexpr (S == Sweep::kStats) {
    keep->top[thread] = totals.top;
    keep->non_finite[thread] = totals.non_finite;
  }
}

// What a chunk's maths needs to know.
template <Sweep S, class C>
PYREG_DEVICE Numbers<C> numbers_of(const Parameter& p, const Entry& entry, const Place& place) {
  Numbers<C> numbers{};
  if (S == Sweep::kStats) return numbers;
  const Rule rule = p.rule(entry.rule);
#pragma unroll
  for (int k = 0; k < kMaxStrengths; ++k)
    numbers.strengths[k] = static_cast<C>(read(rule.strengths[k], rule.kinds[k]));
  if constexpr (S == Sweep::kProxInMetric) {
    const RowMetric metric = p.metric(place.row);
    numbers.scale = static_cast<C>(read(metric.numbers[0], metric.kinds[0]));
    numbers.factor = static_cast<C>(read(metric.numbers[1], metric.kinds[1]));
    numbers.offset = static_cast<C>(read(metric.numbers[2], metric.kinds[2]));
    numbers.root = metric.root;
  } else if (S != Sweep::kValue) {
    numbers.scale = static_cast<C>(read(p.scale, p.scale_kind));
  }
  return numbers;
}

// One thread's part of a chunk, and its lanes into `keep`.
template <Sweep S, class P, class T, int W, class C>
PYREG_DEVICE void visit_and_keep(const Entry& entry, const Place& place, const Numbers<C>& numbers,
                                 int thread, typename Shared<S>::Warp* keep) {
  T* w = in_device_memory<T>(entry.w) + place.begin;
  // Without a gradient w is read in its place: no load waits for a branch.
  T* g = in_device_memory<T>(kWritesGradient<S> && entry.g ? entry.g : entry.w) + place.begin;
  Totals<C> totals;
  visit<S, P, T, W>(w, g, entry.g != nullptr, place.n, thread, numbers, totals);
  if constexpr (kHasTotals<S>) keep_totals<S, W>(totals, thread, keep);
}

template <Sweep S, class P, class T>
PYREG_DEVICE void visit_own(const Parameter& p, const Entry& entry, const Place& place, int thread,
                            typename Shared<S>::Warp* keep) {
  using C = typename Element<T>::Compute;
  const Numbers<C> numbers = numbers_of<S, C>(p, entry, place);
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
      return visit_own<S, P, float>(p, entry, place, thread, keep);
    case DType::kFloat64:
      return visit_own<S, P, double>(p, entry, place, thread, keep);
    case DType::kBFloat16:
      return visit_own<S, P, BFloat16>(p, entry, place, thread, keep);
    case DType::kFloat16:
      return visit_own<S, P, Float16>(p, entry, place, thread, keep);
  }
}

// A thread's sums where they are not in registers.
template <class C, class Lanes>
PYREG_DEVICE void clear_sums(Lanes& lanes, int thread, bool wide) {
#pragma unroll
  for (int v = 0; v < kOwn; ++v)
    for (double* of : lanes) of[place_of_sum<C>(thread, v, wide)] = 0;
}

// The same by the loop that all penalties and dtypes of a compute type share.
template <Sweep S, Family F, class C>
PYREG_DEVICE void visit_shared(const Parameter& p, const Entry& entry, const Place& place,
                               int thread, typename Shared<S>::Warp* keep) {
  const Numbers<C> numbers = numbers_of<S, C>(p, entry, place);
  const bool float32 = S == Sweep::kProxInMetric && p.metric(place.row).float32;
  // (An absent gradient or moment is at 16 bytes too.)
  const bool wide = place.n == kChunk && at_16_bytes(entry.w) && at_16_bytes(entry.g);
  const int penalty = p.rule(entry.rule).penalty;
  const auto visit = [&](C* first, C* second) {
    visit_rows<S, F, C>(entry, place, float32, wide, penalty, thread, numbers, first, second);
  };
  if constexpr (!kHasTotals<S>) {
    visit(nullptr, nullptr);
  } else if constexpr (kSumsInRegisters<C>) {
    Totals<C> totals;
    visit(totals.first, totals.second);
    by_kind<S, C>(static_cast<DType>(entry.dtype), false, wide,
                  [&](auto kind) { keep_totals<S, decltype(kind)::W>(totals, thread, keep); });
  } else {
    clear_sums<C>(keep->lanes, thread, wide);
    visit(keep->lanes[0], keep->lanes[1]);
  }
}

// (The loops of prox_in_metric would be twice as many: a moment may be float32.)
template <Sweep S, Family F>
constexpr bool kHasOwnLoops =
    S == Sweep::kStats ||
    (F == Family::kElementary && S != Sweep::kProxInMetric && S != Sweep::kStep);

template <Sweep S, class C>
PYREG_DEVICE void visit_step_of(const Parameter& p, const Entry& entry, const Place& place,
                                int thread, typename Shared<S>::Warp* keep) {
  const RowStep row = p.step(place.row);
  const StepNumbers<C> numbers = step_numbers<C>(p, entry, row);
  bool wide = place.n == kChunk && at_16_bytes(entry.w) && at_16_bytes(entry.g) &&
              at_16_bytes(row.master);  // (an absent one is at 16 bytes too)
#pragma unroll
  for (int k = 0; k < kMaxStates; ++k) wide = wide && at_16_bytes(row.states[k]);
  const auto visit = [&](C* first, C* second) {
    return visit_step<S, C>(entry, place, row, wide, thread, numbers, first, second);
  };
  if constexpr (kSumsInRegisters<C>) {
    Totals<C> totals;
    totals.zeros = visit(totals.first, totals.second);
    by_kind<S, C>(static_cast<DType>(entry.dtype), false, wide,
                  [&](auto kind) { keep_totals<S, decltype(kind)::W>(totals, thread, keep); });
  } else {
    clear_sums<C>(keep->lanes, thread, wide);
    keep->zeros[thread] = visit(keep->lanes[0], keep->lanes[1]);
  }
}

template <Sweep S, Family F>
PYREG_DEVICE void visit_any(const Parameter& p, const Entry& entry, const Place& place, int thread,
                            typename Shared<S>::Warp* keep) {
  if constexpr (S == Sweep::kStep) {
    if (static_cast<DType>(entry.dtype) == DType::kFloat64)
      visit_step_of<S, double>(p, entry, place, thread, keep);
    else
      visit_step_of<S, float>(p, entry, place, thread, keep);
  } else if constexpr (S == Sweep::kStats) {
    visit_dtype<S, L1>(p, entry, place, thread, keep);  // (any penalty: it is not asked)
  } else if constexpr (kHasOwnLoops<S, F>) {
    by_penalty<F>(p.rule(entry.rule).penalty, [&](auto penalty) {
      visit_dtype<S, decltype(penalty)>(p, entry, place, thread, keep);
    });
  } else if (static_cast<DType>(entry.dtype) == DType::kFloat64) {
    visit_shared<S, F, double>(p, entry, place, thread, keep);
  } else {
    visit_shared<S, F, float>(p, entry, place, thread, keep);
  }
}

// A sweep's chunks [begin, end), a warp each by turns.
template <Sweep S, Family F, class Executor>
PYREG_DEVICE void visit_chunks(Executor& run, const Parameter& p, Shared<S>& shared, int warp,
                               uint32_t row, uint32_t begin, uint32_t end, int parity) {
  uint32_t next = p.first_chunk(row + 1);
  for (uint32_t chunk = begin + warp; chunk < end; chunk += kWarps) {
    while (chunk >= next) next = p.first_chunk(++row + 1);
    const Entry entry = p.entry(row);
    if (S == Sweep::kGradient && entry.g == nullptr) continue;
    if (S == Sweep::kProx && entry.w == nullptr) continue;
    Place place = place_of(p, entry, row, next, chunk);
    if (S == Sweep::kProxInMetric && entry.w == nullptr) place.n = 0;
    if constexpr (kHasTotals<S>) {
      typename Shared<S>::Warp* keep = &shared.warps[warp];
      run.each_lane([&](int lane) { visit_any<S, F>(p, entry, place, lane, keep); });
      const int i = static_cast<int>(chunk - begin);
      reduce_lanes<S>(run, keep, static_cast<DType>(entry.dtype) == DType::kFloat64,
                      shared.sums[parity][i]);
      run.each_lane([&](int lane) {
        if (lane == 0) shared.segment[parity][i] = place.segment;
      });
    } else {
      (void)shared, (void)parity;
      run.each_lane([&](int lane) { visit_any<S, F>(p, entry, place, lane, nullptr); });
    }
  }
}

template <Sweep S, Family F, class Executor>
PYREG_DEVICE void run_block(Executor& run, const Parameter& p, uint32_t block, uint32_t blocks,
                            Shared<S>& shared) {
  const uint32_t begin = begin_of(p, block), end = begin_of(p, block + 1);
  uint32_t row = find_row(p, begin);
  if constexpr (!kHasTotals<S>) {
    run.each_warp([&](int warp) { visit_chunks<S, F>(run, p, shared, warp, row, begin, end, 0); });
  } else {
    int parity = 0;
    run.each_thread([&](int thread) {
      if (thread == 0) shared.carry_segment[1] = kNone;
    });
    for (uint32_t batch = begin; batch < end; batch += kBatch, parity = !parity) {
      const uint32_t stop = end - batch < kBatch ? end : batch + kBatch;
      while (batch >= p.first_chunk(row + 1)) ++row;
      run.each_warp(
          [&](int warp) { visit_chunks<S, F>(run, p, shared, warp, row, batch, stop, parity); });
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
    if (run.is_last(p.done, blocks)) finish<S, F>(run, p, shared);
  }
}

}  // namespace pyreg::cuda
