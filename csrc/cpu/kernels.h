// What one instruction set offers: a function per dtype and sweep, over a segment of one row.
#pragma once

#include "../penalties.h"
#include "../sweeps.h"
#include "../updates.h"

namespace pyreg::cpu {

// The running sums of a chunk, side by side: the same on every machine.
constexpr int kLanes = 256;

// n elements at w (and g, and a metric's moment), of one dtype. Strengths come as double and are
// rounded to the compute type; what is found is added to sums.
struct DTypeKernels {
  void (*value)(int penalty, const void* w, int64_t n, const double* strengths, double* sums);
  void (*gradient)(int penalty, const void* w, void* g, int64_t n, const double* strengths,
                   double scale);
  void (*accumulate)(int penalty, const void* w, void* g, int64_t n, const double* strengths,
                     double scale, double* sums);
  void (*prox)(int penalty, void* w, int64_t n, const double* strengths, double step);
  // By the moment's dtype: w's own, or float32.
  void (*prox_in_metric[2])(int penalty, void* w, const void* moment, int64_t n,
                            const double* strengths, const Metric& metric, double* sums);

  // Measured from the row's anchor; w is at element `begin`. Without sums the gradient is written
  // to g, with them it is added, and a prox finds the sums of the new w.
  void (*anchored_value)(int penalty, const void* w, const Anchor& anchor, int64_t begin, int64_t n,
                         const double* strengths, double* sums);
  void (*anchored_gradient)(int penalty, const void* w, void* g, const Anchor& anchor,
                            int64_t begin, int64_t n, const double* strengths, double scale,
                            double* sums);
  void (*anchored_prox)(int penalty, void* w, const Anchor& anchor, int64_t begin, int64_t n,
                        const double* strengths, const Metric& metric, double* sums);

  void (*stats)(const void* w, int64_t n, Stats* stats);
  int64_t (*zeros)(const void* w, int64_t n);
};

// What joins an optimizer's update in the same loop: nothing; elastic net's gradient; its prox.
enum class With { kNothing, kGradient, kProx };
struct Joined {
  With with = With::kNothing;
  double l1 = 0, l2 = 0;
  double by = 0;           // the gradient's factor, or the prox's step where the metric is 1
  double* sums = nullptr;  // sum |w|, sum w^2: before the gradient, after the prox
  int64_t* zeros = nullptr;
};

// An optimizer's step on n elements at w, with its states, which may be null where the update has
// no use for one.
using StepKernel = void (*)(int update, void* w, const void* g, void* const* states, int64_t n,
                            const double* numbers, const Joined& joined);

struct Kernels {
  DTypeKernels of[kDTypes];
  const StepKernel (*step)[2];  // [kDTypes], by the states' dtype: w's own, or float32
  // Elements of a 16-bit dtype as float32, and back: rounded to nearest, or, to bfloat16, at
  // random.
  void (*widen[kDTypes])(const void* x, int64_t n, float* y);
  void (*narrow[kDTypes])(const float* x, int64_t n, void* y);
  void (*narrow_at_random)(const float* x, int64_t begin, int64_t n, uint32_t key, void* y);
};

}  // namespace pyreg::cpu
