// The penalties: one struct each, scalar maths only, shared by every driver and device.
//
// A struct has
//   name        the key of its formula in pyreg/reference.py
//   kStrengths  how many strengths it takes, in the order of its Python class
//   kSums       how many running sums its value needs
//   add<k>      s + the k-th sum's term of one element
//   value       the penalty's value from the finished sums, in double
//   grad        its gradient at one element (sign(0) = 0, NaN stays NaN)
//   prox        argmin_u step * Omega(u) + (u - w)^2 / 2 for one element
// C is the compute type: float, or double for float64 parameters. Strengths are rounded to it.
//
// To add a penalty: write its struct and append it to PYREG_PENALTIES.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define PYREG_FN __host__ __device__ __forceinline__
#else
// Always inlined: the CPU drivers compile this file once per instruction set, and an out-of-line
// copy of a wide set must never be linked into a narrow one.
#define PYREG_FN inline __attribute__((always_inline))
#endif

namespace pyreg {

constexpr int kMaxStrengths = 2;
constexpr int kMaxSums = 2;

PYREG_FN float absolute(float x) { return __builtin_fabsf(x); }
PYREG_FN double absolute(double x) { return __builtin_fabs(x); }

PYREG_FN float square_root(float x) { return __builtin_sqrtf(x); }
PYREG_FN double square_root(double x) { return __builtin_sqrt(x); }

// a * b + c with one rounding.
#if defined(__CUDACC__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
PYREG_FN float mul_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PYREG_FN double mul_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
// Without the instruction: exact product in double; a float result then has one rounding but for
// double rounding at ties (once in 2^29), a double result has two.
PYREG_FN float mul_add(float a, float b, float c) {
  return static_cast<float>(static_cast<double>(a) * b + c);
}
PYREG_FN double mul_add(double a, double b, double c) { return a * b + c; }
#endif

// sign(0) = sign(-0) = +0; w - w keeps NaN.
template <class C>
PYREG_FN C sign(C w) {
  return w > C(0) ? C(1) : w < C(0) ? C(-1) : w - w;
}

// S(x, t) = sign(x) max(|x| - t, 0).
template <class C>
PYREG_FN C soft_threshold(C x, C t) {
  return x > t ? x - t : x < -t ? x + t : x - x;
}

// lam * sum |w|
struct L1 {
  static constexpr const char* name = "l1";
  static constexpr int kStrengths = 1;
  static constexpr int kSums = 1;

  template <int k, class C>
  PYREG_FN static C add(C s, C w, const C*) {
    return s + absolute(w);
  }
  PYREG_FN static double value(const double* s, const double* c) { return c[0] * s[0]; }
  template <class C>
  PYREG_FN static C grad(C w, const C* c) {
    return c[0] * sign(w);
  }
  template <class C>
  PYREG_FN static C prox(C w, C step, const C* c) {
    return soft_threshold(w, step * c[0]);
  }
};

// lam * sum w^2
struct L2 {
  static constexpr const char* name = "l2";
  static constexpr int kStrengths = 1;
  static constexpr int kSums = 1;

  template <int k, class C>
  PYREG_FN static C add(C s, C w, const C*) {
    return mul_add(w, w, s);
  }
  PYREG_FN static double value(const double* s, const double* c) { return c[0] * s[0]; }
  template <class C>
  PYREG_FN static C grad(C w, const C* c) {
    return (C(2) * c[0]) * w;
  }
  template <class C>
  PYREG_FN static C prox(C w, C step, const C* c) {
    return w / (C(1) + C(2) * step * c[0]);
  }
};

// l1 * sum |w| + l2 * sum w^2
struct ElasticNet {
  static constexpr const char* name = "elastic_net";
  static constexpr int kStrengths = 2;
  static constexpr int kSums = 2;

  template <int k, class C>
  PYREG_FN static C add(C s, C w, const C*) {
    return k == 0 ? s + absolute(w) : mul_add(w, w, s);
  }
  PYREG_FN static double value(const double* s, const double* c) {
    return c[0] * s[0] + c[1] * s[1];
  }
  template <class C>
  PYREG_FN static C grad(C w, const C* c) {
    return mul_add(C(2) * c[1], w, c[0] * sign(w));
  }
  template <class C>
  PYREG_FN static C prox(C w, C step, const C* c) {
    return soft_threshold(w, step * c[0]) / (C(1) + C(2) * step * c[1]);
  }
};

#define PYREG_PENALTIES(X) X(L1) X(L2) X(ElasticNet)

#define PYREG_COUNT(P) +1
constexpr int kPenalties = 0 PYREG_PENALTIES(PYREG_COUNT);
#undef PYREG_COUNT

}  // namespace pyreg
