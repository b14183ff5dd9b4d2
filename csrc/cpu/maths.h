// What each penalty does to a block of elements in a compute type, by pointer.
#pragma once

#include "blocks.h"

namespace pyreg::cpu::PYREG_ISA {
namespace {

// (The maths copies them: what is behind a pointer might change with every element written.)
template <class C>
struct Strengths {
  C c[kMaxStrengths];
  template <class From>
  PYREG_FN explicit Strengths(const From* strengths) {
    for (int k = 0; k < kMaxStrengths; ++k) c[k] = static_cast<C>(strengths[k]);
  }
};

// What a penalty does to at most kBlock elements x in the compute type. y is the result, which may
// be x itself; lanes[k][j] gains the k-th sum's term of x[j].
template <class C>
struct Maths {
  int sums_of_value;
  void (*sums)(const C* x, int n, const C* c, Lanes<C> lanes);
  void (*sums_beside_roots)(const C* x, const C* c, Lanes<C> lanes, const C* d, C factor, C offset,
                            C* q);
  void (*grad)(const C* x, int n, const C* c, C scale, C* y);
  void (*add)(const C* x, const C* old, int n, const C* c, C scale, C* y, Lanes<C> lanes);
  void (*prox)(const C* x, C step, int n, const C* c, C* y);
  void (*prox_ratio)(const C* x, C numerator, const C* q, int n, const C* c, C* y);
  // Anchored penalties: x is measured from the anchor, and each element has its weight, or step.
  void (*weighted_sums)(const C* x, const C* weight, int n, const C* c, Lanes<C> lanes);
  void (*weighted_grad)(const C* x, const C* weight, int n, const C* c, C scale, C* y);
  void (*stepwise_prox)(const C* x, const C* steps, int n, const C* c, C* y);
};

template <class P, class C>
void sums(const C* x, int n, const C* strengths, Lanes<C> lanes) {
  const Strengths<C> s(strengths);
#pragma omp simd
  for (int j = 0; j < n; ++j) add_to<P>(lanes, j, x[j], s.c);
}
// Beside it q = factor * sqrt(d) + offset of another block: a root keeps the divider busy for
// longer than the sums take.
template <class P, class C>
void sums_beside_roots(const C* x, const C* strengths, Lanes<C> lanes, const C* d, C factor,
                       C offset, C* q) {
  const Strengths<C> s(strengths);
#pragma omp simd
  for (int j = 0; j < kBlock; ++j) {
    q[j] = denominator(factor * square_root(d[j]) + offset);
    add_to<P>(lanes, j, x[j], s.c);
  }
}
template <class P, class C>
void grad(const C* x, int n, const C* strengths, C scale, C* y) {
  const Strengths<C> s(strengths);
#pragma omp simd
  for (int j = 0; j < n; ++j) y[j] = scale * P::grad(x[j], s.c);
}
template <class P, class C>
void add(const C* x, const C* old, int n, const C* strengths, C scale, C* y, Lanes<C> lanes) {
  const Strengths<C> s(strengths);
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    add_to<P>(lanes, j, x[j], s.c);
    y[j] = old[j] + scale * P::grad(x[j], s.c);
  }
}
template <class P, class C>
void prox(const C* x, C step, int n, const C* strengths, C* y) {
  const Strengths<C> s(strengths);
#pragma omp simd
  for (int j = 0; j < n; ++j) y[j] = P::prox(x[j], step, s.c);
}
// (Each loop out of line: GCC vectorizes neither of two that it finds in one function.)
template <class P, class C>
__attribute__((noinline)) void prox_ratio(const C* x, C numerator, const C* q, int n,
                                          const C* strengths, C* y) {
  const Strengths<C> s(strengths);
#pragma omp simd
  for (int j = 0; j < n; ++j) y[j] = P::prox_ratio(x[j], numerator, q[j], s.c);
}
template <class P, class C>
__attribute__((noinline)) void prox_if_short(const C* x, C numerator, const C* q, int n,
                                             const C* strengths, C* y) {
  const Strengths<C> s(strengths);
#pragma omp simd
  for (int j = 0; j < n; ++j) y[j] = P::prox_if_short(x[j], numerator, q[j], s.c);
}
// Where all of a block's steps are short there may be less to do. (A NaN among q is passed over:
// both give 0.)
template <class P, class C>
void prox_by_length(const C* x, C numerator, const C* q, int n, const C* strengths, C* y) {
  C least = q[0];
#pragma omp simd reduction(min : least)
  for (int j = 0; j < n; ++j) least = q[j] < least ? q[j] : least;
  const bool is_short = P::is_short(numerator, least, strengths);
  (is_short ? prox_if_short<P, C> : prox_ratio<P, C>)(x, numerator, q, n, strengths, y);
}
template <class P, class C, class = void>
constexpr auto kProxRatio = prox_ratio<P, C>;
template <class P, class C>
constexpr auto kProxRatio<P, C, std::void_t<decltype(&P::template is_short<C>)>> =
    prox_by_length<P, C>;

template <class P, class C>
void weighted_sums(const C* x, const C* weight, int n, const C* strengths, Lanes<C> lanes) {
  const Strengths<C> s(strengths);
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    lanes[0][j] += weight[j] * P::template add<0>(C(0), x[j], s.c);
    if constexpr (P::kSums > 1) lanes[1][j] += weight[j] * P::template add<1>(C(0), x[j], s.c);
  }
}
template <class P, class C>
void weighted_grad(const C* x, const C* weight, int n, const C* strengths, C scale, C* y) {
  const Strengths<C> s(strengths);
#pragma omp simd
  for (int j = 0; j < n; ++j) y[j] = scale * (weight[j] * P::grad(x[j], s.c));
}
template <class P, class C>
void stepwise_prox(const C* x, const C* steps, int n, const C* strengths, C* y) {
  const Strengths<C> s(strengths);
#pragma omp simd
  for (int j = 0; j < n; ++j) y[j] = P::prox(x[j], steps[j], s.c);
}

template <class P, class C>
constexpr Maths<C> maths_of() {
  return {P::kSums,           sums<P, C>,          sums_beside_roots<P, C>,
          grad<P, C>,         add<P, C>,           prox<P, C>,
          kProxRatio<P, C>,   weighted_sums<P, C>, weighted_grad<P, C>,
          stepwise_prox<P, C>};
}
#define PYREG_MATHS(P) maths_of<P, C>(),
template <class C>
const Maths<C> maths[kPenalties] = {PYREG_PENALTIES(PYREG_MATHS)};
#undef PYREG_MATHS

}  // namespace
}  // namespace pyreg::cpu::PYREG_ISA
