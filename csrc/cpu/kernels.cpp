// The CPU kernels, compiled once per instruction set (PYREG_ISA names the namespace).
//
// A segment is walked chunk by chunk, a chunk in kDepth rows of kLanes elements. Lane j adds the
// elements j, j + kLanes, ... of the chunk in the compute type, at most kDepth of them, and then
// the lanes are added in double in a fixed order. So the bits do not depend on the vector width,
// and a float32 sum of non-negative terms is within (kDepth + 1) * 2^-24 < 1.02e-6 of the exact one
// in the worst case (additions and one multiplication per term), a hundred times closer in the
// typical.
//
// Every inner loop runs over at most kLanes elements of plain arrays, which the compiler
// vectorizes; the lanes (1 KiB) and the widened 16-bit elements live in the first-level cache, so
// each element is read from memory once and written at most once.

#include "kernels.h"

#include <cstring>

#include "blocks.h"

namespace pyreg::cpu::PYREG_ISA {
namespace {

constexpr int kDepth = kChunk / kLanes;
static_assert(kDepth == 16, "the error bound above assumes it");

// How many lanes n elements touch, in whole groups of 16. (Small tensors are many.)
PYREG_FN int lanes_used(int64_t n) { return at_most((n + 15) / 16 * 16, kLanes); }

template <class C>
struct Strengths {
  C c[kMaxStrengths];
  PYREG_FN explicit Strengths(const double* strengths) {
    for (int k = 0; k < kMaxStrengths; ++k) c[k] = static_cast<C>(strengths[k]);
  }
};

// The lanes of up to two sums. (Two plain pointers: a loop over k inside the loop over elements
// does not vectorize.)
template <class P, class C>
struct Lanes {
  C first[kLanes], second[P::kSums > 1 ? kLanes : 1];
  int used;

  PYREG_FN explicit Lanes(int64_t elements) : used(lanes_used(elements)) {
    for (int j = 0; j < used; ++j) first[j] = C(0);
    if constexpr (P::kSums > 1)
      for (int j = 0; j < used; ++j) second[j] = C(0);
  }
  PYREG_FN void add(int j, C x, const C* c) {
    first[j] = P::template add<0>(first[j], x, c);
    if constexpr (P::kSums > 1) second[j] = P::template add<1>(second[j], x, c);
  }
  PYREG_FN void flush(double* sums) const {
    sums[0] += reduce(first, used);
    if constexpr (P::kSums > 1) sums[1] += reduce(second, used);
  }
};

template <class P, class T>
void value(const void* w_, int64_t n, const double* strengths, double* sums) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  const Strengths<C> s(strengths);
  C buffer[kLanes];
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = chunk + at_most(n - chunk, kChunk);
    Lanes<P, C> lanes(end - chunk);
    for (int64_t i = chunk; i < end; i += kLanes) {
      const int m = at_most(end - i, kLanes);
      if (n - i > kLanes) prefetch(w + i);
      const C* x = widen(w + i, m, buffer);
#pragma omp simd
      for (int j = 0; j < m; ++j) lanes.add(j, x[j], s.c);
    }
    lanes.flush(sums);
  }
}

template <class P, class T>
void gradient(const void* w_, void* g_, int64_t n, const double* strengths, double scale_) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  T* g = static_cast<T*>(g_);
  const Strengths<C> s(strengths);
  const C scale = static_cast<C>(scale_);
  C buffer[kLanes], result[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const int m = at_most(n - i, kLanes);
    const C* x = widen(w + i, m, buffer);
    C* y = target(g + i, result);
#pragma omp simd
    for (int j = 0; j < m; ++j) y[j] = scale * P::grad(x[j], s.c);
    narrow(y, m, g + i);
  }
}

template <class P, class T>
void accumulate(const void* w_, void* g_, int64_t n, const double* strengths, double scale_,
                double* sums) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  T* g = static_cast<T*>(g_);
  const Strengths<C> s(strengths);
  const C scale = static_cast<C>(scale_);
  C w_buffer[kLanes], g_buffer[kLanes], result[kLanes];
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = chunk + at_most(n - chunk, kChunk);
    Lanes<P, C> lanes(end - chunk);
    for (int64_t i = chunk; i < end; i += kLanes) {
      const int m = at_most(end - i, kLanes);
      if (n - i > kLanes) {
        prefetch(w + i);
        prefetch<1>(g + i);
      }
      const C* x = widen(w + i, m, w_buffer);
      const C* old = widen(g + i, m, g_buffer);
      C* y = target(g + i, result);
#pragma omp simd
      for (int j = 0; j < m; ++j) {
        lanes.add(j, x[j], s.c);
        y[j] = old[j] + scale * P::grad(x[j], s.c);
      }
      narrow(y, m, g + i);
    }
    lanes.flush(sums);
  }
}

template <class P, class T>
void prox(void* w_, int64_t n, const double* strengths, double step_) {
  using C = typename Element<T>::Compute;
  T* w = static_cast<T*>(w_);
  const Strengths<C> s(strengths);
  const C step = static_cast<C>(step_);
  C buffer[kLanes], result[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const int m = at_most(n - i, kLanes);
    const C* x = widen(static_cast<const T*>(w + i), m, buffer);
    C* y = target(w + i, result);
#pragma omp simd
    for (int j = 0; j < m; ++j) y[j] = P::prox(x[j], step, s.c);
    narrow(y, m, w + i);
  }
}

// D: the moment's dtype.
template <class P, class T, class D>
void prox_in_metric(void* w_, const void* moment_, int64_t n, const double* strengths,
                    const Metric& metric, double* sums) {
  using C = typename Element<T>::Compute;
  T* w = static_cast<T*>(w_);
  const D* moment = static_cast<const D*>(moment_);
  const Strengths<C> s(strengths);
  const C numerator = static_cast<C>(metric.numerator), factor = static_cast<C>(metric.factor),
          offset = static_cast<C>(metric.offset);
  C w_buffer[kLanes], result[kLanes], q[kLanes];
  typename Element<D>::Compute moment_buffer[kLanes];
  if (moment == nullptr)
    for (C& x : q) x = C(1);
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = chunk + at_most(n - chunk, kChunk);
    Lanes<P, C> lanes(end - chunk);
    for (int64_t i = chunk; i < end; i += kLanes) {
      const int m = at_most(end - i, kLanes);
      if (moment != nullptr) {
        if (n - i > kLanes) prefetch(moment + i);
        const auto* d = widen(moment + i, m, moment_buffer);
        if (metric.root) {
#pragma omp simd
          for (int j = 0; j < m; ++j)
            q[j] = denominator(factor * square_root(static_cast<C>(d[j])) + offset);
        } else {
#pragma omp simd
          for (int j = 0; j < m; ++j) q[j] = denominator(factor * static_cast<C>(d[j]) + offset);
        }
      }
      if (n - i > kLanes) prefetch<1>(w + i);
      const C* x = widen(static_cast<const T*>(w + i), m, w_buffer);
      C* y = target(w + i, result);
#pragma omp simd
      for (int j = 0; j < m; ++j) y[j] = P::prox_ratio(x[j], numerator, q[j], s.c);
      narrow(y, m, w + i);
      const C* stored = widen(static_cast<const T*>(w + i), m, w_buffer);
#pragma omp simd
      for (int j = 0; j < m; ++j) lanes.add(j, stored[j], s.c);
    }
    lanes.flush(sums);
  }
}

template <class T>
void stats(const void* w_, int64_t n, Stats* stats) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  constexpr C kInfinity = static_cast<C>(__builtin_inf());
  C buffer[kLanes];
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = chunk + at_most(n - chunk, kChunk);
    C l1[kLanes] = {}, l2[kLanes] = {}, top[kLanes] = {};
    int32_t zeros[kLanes] = {}, non_finite[kLanes] = {};
    for (int64_t i = chunk; i < end; i += kLanes) {
      const int m = at_most(end - i, kLanes);
      if (n - i > kLanes) prefetch(w + i);
      const C* x = widen(w + i, m, buffer);
#pragma omp simd
      for (int j = 0; j < m; ++j) {
        const C a = absolute(x[j]);
        l1[j] += a;
        l2[j] = mul_add(a, a, l2[j]);
        top[j] = a > top[j] ? a : top[j];  // passes over NaN, which l1 keeps
        zeros[j] += a == C(0);
        non_finite[j] += !(a < kInfinity);
      }
    }
    stats->l1 += reduce(l1, kLanes);
    stats->l2_squared += reduce(l2, kLanes);
    C highest = 0;
    int32_t zero = 0, not_finite = 0;
#pragma omp simd reduction(max : highest) reduction(+ : zero, not_finite)
    for (int j = 0; j < kLanes; ++j) {
      highest = top[j] > highest ? top[j] : highest;
      zero += zeros[j];
      not_finite += non_finite[j];
    }
    if (highest > stats->max_abs) stats->max_abs = static_cast<double>(highest);
    stats->zeros += zero;
    stats->non_finite += not_finite;
  }
}

template <class T>
int64_t zeros(const void* w_, int64_t n) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  C buffer[kLanes];
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int m = at_most(n - i, kLanes);
    const C* x = widen(w + i, m, buffer);
    int32_t zero = 0;
#pragma omp simd reduction(+ : zero)
    for (int j = 0; j < m; ++j) zero += x[j] == C(0);
    count += zero;
  }
  return count;
}

// A 16-bit dtype and float32, all elements at once: for steps in float32.
template <class T>
void widen_all(const void* x_, int64_t n, float* y) {
  const T* x = static_cast<const T*>(x_);
  for (int64_t i = 0; i < n; i += kLanes) widen(x + i, at_most(n - i, kLanes), y + i);
}
template <class T>
void narrow_all(const float* x, int64_t n, void* y_) {
  T* y = static_cast<T*>(y_);
  for (int64_t i = 0; i < n; i += kLanes) narrow(x + i, at_most(n - i, kLanes), y + i);
}
void narrow_at_random(const float* x, int64_t begin, int64_t n, uint32_t key, void* y_) {
  BFloat16* y = static_cast<BFloat16*>(y_);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int m = at_most(n - i, kLanes);
#pragma omp simd
    for (int j = 0; j < m; ++j) y[i + j] = to_bfloat16_at_random(x[i + j], key, begin + i + j);
  }
}

// Anchored penalties: the drivers widen, subtract, weigh and add back; the maths comes by pointer.
// (Kernels of their own for each penalty and dtype would double the library.)

template <class P, class C>
void weighted_sums(const C* x, const C* weight, int n, const C* c, C (*lanes)[kBlock]) {
#pragma omp simd
  for (int j = 0; j < n; ++j) lanes[0][j] += weight[j] * P::template add<0>(C(0), x[j], c);
  if constexpr (P::kSums > 1) {
#pragma omp simd
    for (int j = 0; j < n; ++j) lanes[1][j] += weight[j] * P::template add<1>(C(0), x[j], c);
  }
}
template <class P, class C>
void weighted_grad(const C* x, const C* weight, int n, const C* c, C scale, C* y) {
#pragma omp simd
  for (int j = 0; j < n; ++j) y[j] = scale * (weight[j] * P::grad(x[j], c));
}
template <class P, class C>
void stepwise_prox(const C* x, const C* steps, int n, const C* c, C* y) {
#pragma omp simd
  for (int j = 0; j < n; ++j) y[j] = P::prox(x[j], steps[j], c);
}

#define PYREG_MATHS(P) {weighted_sums<P, C>, weighted_grad<P, C>, stepwise_prox<P, C>},
template <class C>
const WeightedMaths<C> maths[kPenalties] = {PYREG_PENALTIES(PYREG_MATHS)};
#undef PYREG_MATHS

// n elements from the i-th, of any dtype, in the compute type; `absent` where there is no tensor.
template <class C, class D>
PYREG_FN void load_as(const void* from, int64_t i, int n, C* to) {
  typename Element<D>::Compute buffer[kBlock];
  const auto* x = widen(static_cast<const D*>(from) + i, n, buffer);
#pragma omp simd
  for (int j = 0; j < n; ++j) to[j] = static_cast<C>(x[j]);
}
template <class C>
void load(const void* from, DType dtype, int64_t i, int n, C absent, C* to) {
  if (from == nullptr) {
    for (int j = 0; j < n; ++j) to[j] = absent;
    return;
  }
  switch (dtype) {
    case DType::kFloat32:
      return load_as<C, float>(from, i, n, to);
    case DType::kFloat64:
      return load_as<C, double>(from, i, n, to);
    case DType::kBFloat16:
      return load_as<C, BFloat16>(from, i, n, to);
    case DType::kFloat16:
      return load_as<C, Float16>(from, i, n, to);
  }
}

template <class T>
constexpr DType kOwn = std::is_same_v<T, float>      ? DType::kFloat32
                       : std::is_same_v<T, double>   ? DType::kFloat64
                       : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                                     : DType::kFloat16;

// The elements of one block, measured from the anchor: x = w - origin, and their weights.
template <class T>
struct Measured {
  using C = typename Element<T>::Compute;
  C x[kBlock], origin[kBlock], weight[kBlock];

  PYREG_FN void read(const T* w, const Anchor& anchor, int64_t i, int n) {
    C buffer[kBlock];
    load(anchor.origin, anchor.origin_dtype, i, n, C(0), origin);
    load(anchor.weight, anchor.weight_dtype, i, n, C(1), weight);
    const C* from = widen(w, n, buffer);
#pragma omp simd
    for (int j = 0; j < n; ++j) x[j] = from[j] - origin[j];
  }
};

// Blocks of a segment, with the lanes of each chunk flushed into the sums (none if they are null).
template <class C, class Body>
PYREG_FN void for_each_block(int64_t n, int sums_of_penalty, double* sums, const Body& body) {
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = chunk + at_most(n - chunk, kChunk);
    C lanes[kMaxSums][kBlock] = {};
    for (int64_t i = chunk; i < end; i += kBlock) body(i, at_most(end - i, kBlock), lanes);
    if (sums == nullptr) continue;
    for (int k = 0; k < sums_of_penalty; ++k) sums[k] += reduce(lanes[k], kBlock);
  }
}

#define PYREG_SUMS(P) P::kSums,
constexpr int kSumsOf[kPenalties] = {PYREG_PENALTIES(PYREG_SUMS)};
#undef PYREG_SUMS

template <class T>
void anchored_value(int penalty, const void* w_, const Anchor& anchor, int64_t begin, int64_t n,
                    const double* strengths, double* sums) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  const Strengths<C> s(strengths);
  Measured<T> m;
  for_each_block<C>(n, kSumsOf[penalty], sums, [&](int64_t i, int block, C(*lanes)[kBlock]) {
    m.read(w + i, anchor, begin + i, block);
    maths<C>[penalty].sums(m.x, m.weight, block, s.c, lanes);
  });
}

template <class T>
void anchored_gradient(int penalty, const void* w_, void* g_, const Anchor& anchor, int64_t begin,
                       int64_t n, const double* strengths, double scale, double* sums) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  T* g = static_cast<T*>(g_);
  const Strengths<C> s(strengths);
  Measured<T> m;
  C result[kBlock], buffer[kBlock], added[kBlock];
  for_each_block<C>(n, kSumsOf[penalty], sums, [&](int64_t i, int block, C(*lanes)[kBlock]) {
    m.read(w + i, anchor, begin + i, block);
    maths<C>[penalty].grad(m.x, m.weight, block, s.c, static_cast<C>(scale), added);
    C* y = target(g + i, result);
    if (sums == nullptr) {
      for (int j = 0; j < block; ++j) y[j] = added[j];
    } else {
      maths<C>[penalty].sums(m.x, m.weight, block, s.c, lanes);
      const C* old = widen(static_cast<const T*>(g + i), block, buffer);
#pragma omp simd
      for (int j = 0; j < block; ++j) y[j] = old[j] + added[j];
    }
    narrow(y, block, g + i);
  });
}

// What the prox leaves where it is stays exactly, however far the origin.
template <class T>
void anchored_prox(int penalty, void* w_, const Anchor& anchor, int64_t begin, int64_t n,
                   const double* strengths, const Metric& metric, double* sums) {
  using C = typename Element<T>::Compute;
  T* w = static_cast<T*>(w_);
  const Strengths<C> s(strengths);
  const C numerator = static_cast<C>(metric.numerator), factor = static_cast<C>(metric.factor),
          offset = static_cast<C>(metric.offset);
  const DType moment_dtype = metric.float32 ? DType::kFloat32 : kOwn<T>;
  Measured<T> m;
  C result[kBlock], buffer[kBlock], steps[kBlock], shrunk[kBlock];
  for_each_block<C>(n, kSumsOf[penalty], sums, [&](int64_t i, int block, C(*lanes)[kBlock]) {
    m.read(w + i, anchor, begin + i, block);
    load(metric.moment, moment_dtype, i, block, C(0), steps);
    if (metric.moment == nullptr) {
      for (int j = 0; j < block; ++j) steps[j] = numerator;
    } else if (metric.root) {
#pragma omp simd
      for (int j = 0; j < block; ++j)
        steps[j] = numerator / (factor * square_root(steps[j]) + offset);
    } else {
#pragma omp simd
      for (int j = 0; j < block; ++j) steps[j] = numerator / (factor * steps[j] + offset);
    }
#pragma omp simd
    for (int j = 0; j < block; ++j) steps[j] *= m.weight[j];
    maths<C>[penalty].prox(m.x, steps, block, s.c, shrunk);
    const C* old = widen(static_cast<const T*>(w + i), block, buffer);
    C* y = target(w + i, result);
#pragma omp simd
    for (int j = 0; j < block; ++j) y[j] = shrunk[j] == m.x[j] ? old[j] : m.origin[j] + shrunk[j];
    narrow(y, block, w + i);
    if (sums != nullptr) {
      m.read(w + i, anchor, begin + i, block);
      maths<C>[penalty].sums(m.x, m.weight, block, s.c, lanes);
    }
  });
}

template <class T>
constexpr AnchoredKernels anchored() {
  return {anchored_value<T>, anchored_gradient<T>, anchored_prox<T>};
}

template <class P, class T>
constexpr PenaltyKernels of() {
  return {value<P, T>,
          gradient<P, T>,
          accumulate<P, T>,
          prox<P, T>,
          {prox_in_metric<P, T, T>, prox_in_metric<P, T, float>}};
}

}  // namespace

extern const UpdateKernels updates[kUpdates][kDTypes];
extern const Kernels kernels;
#define PYREG_ROW(P) {of<P, float>(), of<P, double>(), of<P, BFloat16>(), of<P, Float16>()},
const Kernels kernels = {
    {PYREG_PENALTIES(PYREG_ROW)},
    {anchored<float>(), anchored<double>(), anchored<BFloat16>(), anchored<Float16>()},
    {stats<float>, stats<double>, stats<BFloat16>, stats<Float16>},
    updates,
    {zeros<float>, zeros<double>, zeros<BFloat16>, zeros<Float16>},
    {nullptr, nullptr, widen_all<BFloat16>, widen_all<Float16>},
    {nullptr, nullptr, narrow_all<BFloat16>, narrow_all<Float16>},
    narrow_at_random};
#undef PYREG_ROW

}  // namespace pyreg::cpu::PYREG_ISA
