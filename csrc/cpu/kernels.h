// What one instruction set offers: a function per penalty, dtype and sweep, over one segment.
#pragma once

#include "../penalties.h"
#include "../sweeps.h"

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

struct Kernels {
  PenaltyKernels penalty[kPenalties][kDTypes];
  void (*stats[kDTypes])(const void* w, int64_t n, Stats* stats);
};

}  // namespace pyreg::cpu
