// What one instruction set offers: a function per penalty, dtype and sweep, over one segment.
#pragma once

#include "../penalties.h"
#include "../sweeps.h"
#include "../updates.h"

namespace pyreg::cpu {

// n elements at w (and g). Strengths come as double and are rounded to the compute type.
struct PenaltyKernels {
  void (*value)(const void* w, int64_t n, const double* strengths, double* sums);
  void (*gradient)(const void* w, void* g, int64_t n, const double* strengths, double scale);
  void (*accumulate)(const void* w, void* g, int64_t n, const double* strengths, double scale,
                     double* sums);
  void (*prox)(void* w, int64_t n, const double* strengths, double step);
  // By the moment's dtype: w's own, or float32.
  void (*prox_in_metric[2])(void* w, const void* moment, int64_t n, const double* strengths,
                            const Metric& metric, double* sums);
};

// The same maths on what was widened already: at most kBlock elements x = w - origin in the compute
// type, each with its weight. y is the result.
constexpr int kBlock = 256;
template <class C>
struct WeightedMaths {
  // lanes[k][j] += weight[j] * the k-th sum's term of x[j]
  void (*sums)(const C* x, const C* weight, int n, const C* strengths, C (*lanes)[kBlock]);
  void (*grad)(const C* x, const C* weight, int n, const C* strengths, C scale, C* y);
  void (*prox)(const C* x, const C* steps, int n, const C* strengths, C* y);
};

// n elements at w (and g, and a metric's moment) from element `begin` of a row, measured from its
// anchor.
struct AnchoredKernels {
  void (*value)(int penalty, const void* w, const Anchor& anchor, int64_t begin, int64_t n,
                const double* strengths, double* sums);
  // Adds to g, and the sums to sums, unless sums is null: then g is written.
  void (*gradient)(int penalty, const void* w, void* g, const Anchor& anchor, int64_t begin,
                   int64_t n, const double* strengths, double scale, double* sums);
  // The sums of the new w, unless sums is null.
  void (*prox)(int penalty, void* w, const Anchor& anchor, int64_t begin, int64_t n,
               const double* strengths, const Metric& metric, double* sums);
};

// An optimizer's step on n elements at w, with its states, which may be null where the update has
// no use for one. By the states' dtype: w's own, or float32.
// An elastic net may join it in the same loop: nothing, its gradient, its prox.
struct Joined {
  double l1 = 0, l2 = 0;
  double by = 0;           // the gradient's factor, or the prox's step where the metric is 1
  double* sums = nullptr;  // sum |w|, sum w^2: before the gradient, after the prox
  int64_t* zeros = nullptr;
};
struct UpdateKernels {
  void (*step[2][3])(void* w, const void* g, void* const* states, int64_t n, const double* numbers,
                     const Joined& joined);
};

struct Kernels {
  PenaltyKernels penalty[kPenalties][kDTypes];
  AnchoredKernels anchored[kDTypes];
  void (*stats[kDTypes])(const void* w, int64_t n, Stats* stats);
  const UpdateKernels (*updates)[kDTypes];  // [kUpdates]
  int64_t (*zeros[kDTypes])(const void* w, int64_t n);
  // Elements of a 16-bit dtype as float32, and back: rounded to nearest, or, to bfloat16, at
  // random.
  void (*widen[kDTypes])(const void* x, int64_t n, float* y);
  void (*narrow[kDTypes])(const float* x, int64_t n, void* y);
  void (*narrow_at_random)(const float* x, int64_t begin, int64_t n, uint32_t key, void* y);
};

}  // namespace pyreg::cpu
