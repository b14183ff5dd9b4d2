// From a thread's lanes to a sweep's results, in an order that depends on sizes alone.
//
//   chunk    a warp's: 16 additions at most in a lane, then the lanes in double (cpu/kernels.cpp)
//   segment  a block's: its chunks in order; one partial each
//   rule     the last block's: its segments' partials in the order of combine.h
//
// A block owns whole segments, and nothing depends on which block that is: so the bits depend
// neither on the grid nor on the order of events, and they are the CPU's.
#pragma once

#include "../combine.h"
#include "rows.h"

namespace pyreg::cuda {

constexpr int kBatch = 64;   // chunks between two barriers
constexpr int kGroups = 16;  // of lanes, in the reduction of a chunk

// Memory of a block. The halves of `sums` alternate: while one is added up, warps fill the other.
template <Sweep S>
struct Shared {
  struct Warp {
    alignas(16) double lanes[2][kLanes];  // (or float)
    double groups[2][kGroups];
    double top[kWarp];
    uint32_t zeros[kWarp], non_finite[kWarp];
  };
  Warp warps[kWarps];
  double sums[2][kBatch][kColumns<S>];
  uint32_t segment[2][kBatch];
  double carry[2][kColumns<S>];  // of a segment that the next batch may go on with
  uint32_t carry_segment[2];
  uint32_t begin[kThreads], count[kThreads];  // of the partials that the last block adds up
};
template <>
struct Shared<Sweep::kGradient> {
  struct Warp {};
};
template <>
struct Shared<Sweep::kProx> {
  struct Warp {};
};

template <int half>
PYREG_DEVICE void halve(double* sum) {
#pragma unroll
  for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
}

// A chunk's lanes become its sums: kGroups strided sums in double, then one, as in
// cpu/kernels.cpp.
template <Sweep S, class Executor>
PYREG_DEVICE void reduce_lanes(Executor& run, typename Shared<S>::Warp* keep, bool in_double,
                               double* sums) {
  run.each_lane([&](int lane) {
    const int k = lane / kGroups, j = lane % kGroups;
    const float* narrow_lanes = reinterpret_cast<const float*>(keep->lanes[k]) + j;
    const double* wide_lanes = keep->lanes[k] + j;
    double sum = in_double ? *wide_lanes : *narrow_lanes;
#pragma unroll
    for (int i = kGroups; i < kLanes; i += kGroups)
      sum += in_double ? wide_lanes[i] : narrow_lanes[i];
    keep->groups[k][j] = sum;
  });
  run.each_lane([&](int lane) {
    if (lane < 2) {
      double sum[kGroups];
#pragma unroll
      for (int j = 0; j < kGroups; ++j) sum[j] = keep->groups[lane][j];
      halve<8>(sum), halve<4>(sum), halve<2>(sum), halve<1>(sum);
      sums[lane] = sum[0];
    }
    if (kColumns<S> > 2 && lane == 2) {
      double top = 0;
      uint32_t zeros = 0, non_finite = 0;
      for (int i = 0; i < kWarp; ++i) {
        zeros += keep->zeros[i];
        if (S != Sweep::kStats) continue;
        top = keep->top[i] > top ? keep->top[i] : top;
        non_finite += keep->non_finite[i];
      }
      sums[2] = S == Sweep::kStats ? top : zeros;
      if constexpr (S == Sweep::kStats) {
        sums[3] = zeros;
        sums[4] = non_finite;
      }
    }
  });
}

// Column 2 of `stats` is a maximum.
template <Sweep S>
PYREG_DEVICE double join(int column, double a, double b) {
  return S == Sweep::kStats && column == 2 ? (b > a ? b : a) : a + b;
}

// The sums of n chunks, in order, into the partials of the segments that end; the last one is
// carried on.
template <Sweep S>
PYREG_DEVICE void add_chunks(const Parameter& p, Shared<S>& shared, int parity, int n, int thread) {
  const uint32_t* segment = shared.segment[parity];
  for (int t = thread; t < n * kColumns<S>; t += kThreads) {
    const int k = t % kColumns<S>;
    int i = t / kColumns<S>;
    const uint32_t own = segment[i];
    if (i > 0 && segment[i - 1] == own) continue;
    double total = shared.sums[parity][i][k];
    if (i == 0) {
      const uint32_t carried = shared.carry_segment[!parity];
      const double carry = shared.carry[!parity][k];
      if (carried == own)
        total = join<S>(k, carry, total);
      else if (carried != kNone)
        p.partials[static_cast<int64_t>(carried) * kColumns<S> + k] = carry;
    }
    while (++i < n && segment[i] == own) total = join<S>(k, total, shared.sums[parity][i][k]);
    if (i < n) {
      p.partials[static_cast<int64_t>(own) * kColumns<S> + k] = total;
    } else {
      shared.carry[parity][k] = total;
      if (k == 0) shared.carry_segment[parity] = own;
    }
  }
}

// Past the first-level cache: other multiprocessors wrote it.
PYREG_DEVICE double read_partial(const double* p) {
#if defined(__CUDA_ARCH__)
  return __ldcg(p);
#else
  return *p;
#endif
}

// What gets totals of its own: a rule, or for `stats` a row.
template <Sweep S>
PYREG_DEVICE uint32_t first_segment(const Parameter& p, uint32_t unit) {
  return S == Sweep::kStats ? p.entry(unit).first_segment : p.rule(unit).first_segment;
}

// A warp adds up n >= 2 partials, all columns at a time: it waits for memory, not for arithmetic.
// The first two need the order of combine.h; a maximum and counts do not.
template <Sweep S, class Executor>
PYREG_DEVICE void add_partials(Executor& run, const double* partials, uint32_t n, double* stripes,
                               double* totals) {
  constexpr int kOrdered = 2, kEach = kStripes / kWarp;
  run.each_lane([&](int lane) {
    double first[kEach] = {}, second[kEach] = {}, rest[kColumns<S>] = {};
#pragma unroll 1
    for (uint32_t begin = 0; begin < n; begin += kStripes)
#pragma unroll
      for (int m = 0; m < kEach; ++m) {
        const uint32_t i = begin + m * kWarp + lane;
        if (i >= n) continue;
        const double* own = partials + static_cast<int64_t>(i) * kColumns<S>;
        first[m] += read_partial(own);
        second[m] += read_partial(own + 1);
#pragma unroll
        for (int k = kOrdered; k < kColumns<S>; ++k)
          rest[k] = join<S>(k, rest[k], read_partial(own + k));
      }
    halve<4>(first), halve<2>(first), halve<1>(first);
    halve<4>(second), halve<2>(second), halve<1>(second);
    rest[0] = first[0], rest[1] = second[0];
#pragma unroll
    for (int k = 0; k < kColumns<S>; ++k) stripes[k * kWarp + lane] = rest[k];
  });
#pragma unroll 1
  for (int half = kWarp / 2; half > 0; half /= 2)
    run.each_lane([&](int lane) {
      for (int k = 0; k < kColumns<S> && lane < half; ++k) {
        double* own = stripes + k * kWarp + lane;
        *own = join<S>(k, own[0], own[half]);
      }
    });
  run.each_lane([&](int lane) {
    if (lane < kColumns<S>) totals[lane] = stripes[lane * kWarp];
  });
}

constexpr uint32_t kMany = 4 * kStripes;  // partials that all warps add up together

// The same by all threads of the block, in the same order; more of a thread's loads are under way.
template <Sweep S, class Executor>
PYREG_DEVICE void add_many_partials(Executor& run, const double* partials, uint32_t n,
                                    double* stripes, double* totals) {
  constexpr int kColumn = kColumns<S>, kEach = kStripes / kThreads;
  constexpr int kAhead = kColumn > 2 ? 1 : 4;  // rounds whose loads are under way
  static_assert(kEach == 2 && 2 * kBatch >= kThreads);
  run.each_thread([&](int thread) {
    double sums[kColumn][kEach] = {};
#pragma unroll 1
    for (uint32_t begin = 0; begin < n; begin += kAhead * kStripes) {
      double own[kAhead][kEach][kColumn];
#pragma unroll
      for (int r = 0; r < kAhead; ++r)
#pragma unroll
        for (int m = 0; m < kEach; ++m) {
          const uint32_t i = begin + r * kStripes + m * kThreads + thread;
#pragma unroll
          for (int k = 0; k < kColumn; ++k)
            own[r][m][k] =
                i < n ? read_partial(partials + static_cast<int64_t>(i) * kColumn + k) : 0;
        }
#pragma unroll
      for (int r = 0; r < kAhead; ++r)
#pragma unroll
        for (int m = 0; m < kEach; ++m)
#pragma unroll
          for (int k = 0; k < kColumn; ++k)
            if (begin + r * kStripes + m * kThreads + thread < n)
              sums[k][m] = join<S>(k, sums[k][m], own[r][m][k]);
    }
#pragma unroll
    for (int k = 0; k < kColumn; ++k)
      stripes[k * kThreads + thread] = join<S>(k, sums[k][0], sums[k][1]);
  });
#pragma unroll 1
  for (int half = kThreads / 2; half > 0; half /= 2) {
    run.sync();
    run.each_thread([&](int thread) {
      for (int k = 0; k < kColumn && thread < half; ++k) {
        double* own = stripes + k * kThreads + thread;
        *own = join<S>(k, own[0], own[half]);
      }
    });
  }
  run.sync();
  run.each_thread([&](int thread) {
    if (thread < kColumn) totals[thread] = stripes[thread * kThreads];
  });
}

// The last block's: from partials to results.
template <Sweep S, Family F, class Executor>
PYREG_DEVICE_CALL void finish(Executor& run, const Parameter& p, Shared<S>& shared) {
  const uint32_t units = S == Sweep::kStats ? p.rows : p.rules;
  double* totals = S == Sweep::kStats ? p.out : p.out + 1;
  // Many rows of `stats` are one segment: threads do those, and find the others for the warps.
  for (uint32_t base = 0; base < units; base += kThreads) {
    run.each_thread([&](int thread) {
      const uint32_t u = base + thread;
      uint32_t begin = 0, n = 0;
      if (u < units) {
        begin = first_segment<S>(p, u);
        n = first_segment<S>(p, u + 1) - begin;
        for (int k = 0; k < kColumns<S> && n <= 1; ++k)
          totals[static_cast<int64_t>(u) * kColumns<S> + k] =
              n == 0 ? 0 : read_partial(p.partials + static_cast<int64_t>(begin) * kColumns<S> + k);
      }
      shared.begin[thread] = begin;
      shared.count[thread] = n;
    });
    run.sync();
    run.each_warp([&](int warp) {
      for (int i = warp; i < kThreads; i += kWarps)
        if (shared.count[i] > 1 && shared.count[i] <= kMany)
          add_partials<S>(run, p.partials + static_cast<int64_t>(shared.begin[i]) * kColumns<S>,
                          shared.count[i], shared.warps[warp].lanes[0],
                          totals + static_cast<int64_t>(base + i) * kColumns<S>);
    });
    run.sync();
    for (uint32_t i = 0; i < kThreads && base + i < units; ++i) {
      if (shared.count[i] <= kMany) continue;
      add_many_partials<S>(run, p.partials + static_cast<int64_t>(shared.begin[i]) * kColumns<S>,
                           shared.count[i], &shared.sums[0][0][0],
                           totals + static_cast<int64_t>(base + i) * kColumns<S>);
      run.sync();
    }
    run.sync();  // all have read the counts
  }
  run.each_thread([&](int thread) {
    if (S == Sweep::kStats) {
      for (uint32_t u = thread; u < units; u += kThreads) {
        double* own = totals + static_cast<int64_t>(u) * kColumns<S>;
        if (own[0] != own[0]) own[2] = own[0];  // a NaN among the elements
      }
    } else if (thread == 0) {
      double value = 0;
      double* values = totals + units * kColumns<S>;
      for (uint32_t u = 0; u < units; ++u) {
        const Rule rule = p.rule(u);
        double strengths[kMaxStrengths];
        for (int k = 0; k < kMaxStrengths; ++k)
          strengths[k] = read(rule.strengths[k], rule.kinds[k]);
        by_penalty<F>(rule.penalty, [&](auto p) {
          values[u] = decltype(p)::value(totals + u * kColumns<S>, strengths);
        });
        value += values[u];
      }
      *p.out = value;
      *reinterpret_cast<float*>(values + units) = static_cast<float>(value);
      if constexpr (S == Sweep::kStep) {
        int64_t zeros = 0;
        for (uint32_t u = 0; u < units; ++u)
          zeros += static_cast<int64_t>(totals[u * kColumns<S> + 2]);
        *reinterpret_cast<int64_t*>(values + units + 1) = zeros;
      }
    }
  });
}

}  // namespace pyreg::cuda
