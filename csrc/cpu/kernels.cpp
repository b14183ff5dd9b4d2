// The CPU kernels, compiled once per instruction set (PYREG_ISA names the namespace).
//
// A driver for each dtype walks a segment in blocks of kBlock elements; the maths on a block comes
// by pointer (maths.h), compiled for each penalty in the two compute types. (Drivers of their own
// for each penalty would take three times as long to compile, and run no faster: a block takes a
// hundred times as long as a call.)
//
// Lane j of a chunk adds its elements j, j + kLanes, ... in the compute type, at most kDepth of
// them, and then the lanes are added in double in a fixed order. So the bits do not depend on the
// vector width, and a float32 sum of non-negative terms is within (kDepth + 1) * 2^-24 < 1.02e-6 of
// the exact one in the worst case (additions and one multiplication per term), a hundred times
// closer in the typical.
//
// Every inner loop runs over at most kBlock elements of plain arrays, which the compiler
// vectorizes; the lanes (1 KiB) and the widened 16-bit elements live in the first-level cache, so
// each element is read from memory once and written at most once.

#include "kernels.h"

#include "maths.h"

namespace pyreg::cpu::PYREG_ISA {
namespace {

constexpr int kDepth = kChunk / kLanes;
static_assert(kDepth == 16, "the error bound above assumes it");

// body(i, m, lanes) for each block of m elements from the i-th; the `count` sums of each chunk's
// lanes are added to `sums`.
template <class C, class Body>
PYREG_FN void for_each_block(int64_t n, int count, double* sums, const Body& body) {
  C lanes[kMaxSums][kLanes];
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = chunk + at_most(n - chunk, kChunk);
    const int used = at_most((end - chunk + 15) / 16 * 16, kLanes);  // (Small tensors are many.)
    for (int k = 0; k < count; ++k)
      for (int j = 0; j < used; ++j) lanes[k][j] = C(0);
    for (int64_t i = chunk; i < end; i += kBlock)
      body(i, at_most(end - i, kBlock), lanes_from(lanes, i - chunk));
    for (int k = 0; k < count; ++k) sums[k] += reduce(lanes[k], used);
  }
}

template <class T>
void value(int penalty, const void* w_, int64_t n, const double* strengths, double* sums) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  const Strengths<C> s(strengths);
  const Maths<C>& of = maths<C>[penalty];
  C buffer[kBlock];
  for_each_block<C>(n, of.sums_of_value, sums, [&](int64_t i, int m, Lanes<C> lanes) {
    if (n - i > kBlock) prefetch(w + i);
    of.sums(widen(w + i, m, buffer), m, s.c, lanes);
  });
}

template <class T>
void gradient(int penalty, const void* w_, void* g_, int64_t n, const double* strengths,
              double scale) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  T* g = static_cast<T*>(g_);
  const Strengths<C> s(strengths);
  const Maths<C>& of = maths<C>[penalty];
  C buffer[kBlock], result[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int m = at_most(n - i, kBlock);
    C* y = target(g + i, result);
    of.grad(widen(w + i, m, buffer), m, s.c, static_cast<C>(scale), y);
    narrow(y, m, g + i);
  }
}

template <class T>
void accumulate(int penalty, const void* w_, void* g_, int64_t n, const double* strengths,
                double scale, double* sums) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  T* g = static_cast<T*>(g_);
  const Strengths<C> s(strengths);
  const Maths<C>& of = maths<C>[penalty];
  C w_buffer[kBlock], g_buffer[kBlock], result[kBlock];
  for_each_block<C>(n, of.sums_of_value, sums, [&](int64_t i, int m, Lanes<C> lanes) {
    if (n - i > kBlock) {
      prefetch(w + i);
      prefetch<1>(g + i);
    }
    const C* x = widen(w + i, m, w_buffer);
    const C* old = widen(static_cast<const T*>(g + i), m, g_buffer);
    C* y = target(g + i, result);
    of.add(x, old, m, s.c, static_cast<C>(scale), y, lanes);
    narrow(y, m, g + i);
  });
}

template <class T>
void prox(int penalty, void* w_, int64_t n, const double* strengths, double step) {
  using C = typename Element<T>::Compute;
  T* w = static_cast<T*>(w_);
  const Strengths<C> s(strengths);
  const Maths<C>& of = maths<C>[penalty];
  C buffer[kBlock], result[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int m = at_most(n - i, kBlock);
    C* y = target(w + i, result);
    of.prox(widen(static_cast<const T*>(w + i), m, buffer), static_cast<C>(step), m, s.c, y);
    narrow(y, m, w + i);
  }
}

// D: the moment's dtype.
template <class T, class D>
void prox_in_metric(int penalty, void* w_, const void* moment_, int64_t n, const double* strengths,
                    const Metric& metric, double* sums) {
  using C = typename Element<T>::Compute;
  T* w = static_cast<T*>(w_);
  const D* moment = static_cast<const D*>(moment_);
  const Strengths<C> s(strengths);
  const Maths<C>& of = maths<C>[penalty];
  const C numerator = static_cast<C>(metric.numerator), factor = static_cast<C>(metric.factor),
          offset = static_cast<C>(metric.offset);
  C w_buffer[kBlock], result[kBlock], q[kBlock], moment_buffer[kBlock], stored_buffer[kBlock];
  if (moment == nullptr)
    for (C& x : q) x = C(1);
  const C* stored = nullptr;  // the block before, if its sums are still to be added
  Lanes<C> stored_lanes;
  for_each_block<C>(n, of.sums_of_value, sums, [&](int64_t i, int m, Lanes<C> lanes) {
    const bool more = n - i > kBlock;
    if (moment != nullptr) {
      if (more) prefetch(moment + i);
      const C* d = widen_to(moment + i, m, moment_buffer);
      if (metric.root && stored != nullptr && m == kBlock) {
        of.sums_beside_roots(stored, s.c, stored_lanes, d, factor, offset, q);
        stored = nullptr;
      } else if (metric.root) {
#pragma omp simd
        for (int j = 0; j < m; ++j) q[j] = denominator(factor * square_root(d[j]) + offset);
      } else {
#pragma omp simd
        for (int j = 0; j < m; ++j) q[j] = denominator(factor * d[j] + offset);
      }
    }
    if (stored != nullptr) of.sums(stored, kBlock, s.c, stored_lanes);
    if (more) prefetch<1>(w + i);
    C* y = target(w + i, result);
    of.prox_ratio(widen(static_cast<const T*>(w + i), m, w_buffer), numerator, q, m, s.c, y);
    narrow(y, m, w + i);
    stored = widen(static_cast<const T*>(w + i), m, stored_buffer);
    stored_lanes = lanes;
    if (!more || (i + kBlock) % kChunk == 0) {  // the chunk's last
      of.sums(stored, m, s.c, lanes);
      stored = nullptr;
    }
  });
}

template <class T>
void stats(const void* w_, int64_t n, Stats* stats) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  constexpr C kInfinity = static_cast<C>(__builtin_inf());
  C buffer[kBlock];
  for (int64_t chunk = 0; chunk < n; chunk += kChunk) {
    const int64_t end = chunk + at_most(n - chunk, kChunk);
    C l1[kLanes] = {}, l2[kLanes] = {}, top[kLanes] = {};
    int32_t zeros[kLanes] = {}, non_finite[kLanes] = {};
    for (int64_t i = chunk; i < end; i += kBlock) {
      const int m = at_most(end - i, kBlock), first = static_cast<int>(i - chunk) % kLanes;
      if (n - i > kBlock) prefetch(w + i);
      const C* x = widen(w + i, m, buffer);
#pragma omp simd
      for (int j = 0; j < m; ++j) {
        const C a = absolute(x[j]);
        const int lane = first + j;
        l1[lane] += a;
        l2[lane] = mul_add(a, a, l2[lane]);
        top[lane] = a > top[lane] ? a : top[lane];  // passes over NaN, which l1 keeps
        zeros[lane] += a == C(0);
        non_finite[lane] += !(a < kInfinity);
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
  C buffer[kBlock];
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const int m = at_most(n - i, kBlock);
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
  for (int64_t i = 0; i < n; i += kBlock) widen(x + i, at_most(n - i, kBlock), y + i);
}
template <class T>
void narrow_all(const float* x, int64_t n, void* y_) {
  T* y = static_cast<T*>(y_);
  for (int64_t i = 0; i < n; i += kBlock) narrow(x + i, at_most(n - i, kBlock), y + i);
}
void narrow_at_random(const float* x, int64_t begin, int64_t n, uint32_t key, void* y_) {
  BFloat16* y = static_cast<BFloat16*>(y_);
  for (int64_t i = 0; i < n; i += kBlock) {
    const int m = at_most(n - i, kBlock);
#pragma omp simd
    for (int j = 0; j < m; ++j) y[i + j] = to_bfloat16_at_random(x[i + j], key, begin + i + j);
  }
}

// Anchored penalties: the drivers widen, subtract, weigh and add back.

// n elements from the i-th, of any dtype, in the compute type; `absent` where there is no tensor.
template <class C, class D>
PYREG_FN void load_as(const void* from, int64_t i, int n, C* to) {
  const C* x = widen_to(static_cast<const D*>(from) + i, n, to);
  for (int j = 0; j < n && x != to; ++j) to[j] = x[j];
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
constexpr DType kDType = std::is_same_v<T, float>      ? DType::kFloat32
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

template <class T>
void anchored_value(int penalty, const void* w_, const Anchor& anchor, int64_t begin, int64_t n,
                    const double* strengths, double* sums) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  const Strengths<C> s(strengths);
  const Maths<C>& of = maths<C>[penalty];
  Measured<T> from;
  for_each_block<C>(n, of.sums_of_value, sums, [&](int64_t i, int m, Lanes<C> lanes) {
    from.read(w + i, anchor, begin + i, m);
    of.weighted_sums(from.x, from.weight, m, s.c, lanes);
  });
}

template <class T>
void anchored_gradient(int penalty, const void* w_, void* g_, const Anchor& anchor, int64_t begin,
                       int64_t n, const double* strengths, double scale, double* sums) {
  using C = typename Element<T>::Compute;
  const T* w = static_cast<const T*>(w_);
  T* g = static_cast<T*>(g_);
  const Strengths<C> s(strengths);
  const Maths<C>& of = maths<C>[penalty];
  Measured<T> from;
  C result[kBlock], buffer[kBlock], added[kBlock];
  const int count = sums == nullptr ? 0 : of.sums_of_value;
  for_each_block<C>(n, count, sums, [&](int64_t i, int m, Lanes<C> lanes) {
    from.read(w + i, anchor, begin + i, m);
    of.weighted_grad(from.x, from.weight, m, s.c, static_cast<C>(scale), added);
    C* y = target(g + i, result);
    if (sums == nullptr) {
      for (int j = 0; j < m; ++j) y[j] = added[j];
    } else {
      of.weighted_sums(from.x, from.weight, m, s.c, lanes);
      const C* old = widen(static_cast<const T*>(g + i), m, buffer);
#pragma omp simd
      for (int j = 0; j < m; ++j) y[j] = old[j] + added[j];
    }
    narrow(y, m, g + i);
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
  const DType moment_dtype = metric.float32 ? DType::kFloat32 : kDType<T>;
  const Maths<C>& of = maths<C>[penalty];
  Measured<T> from;
  C result[kBlock], buffer[kBlock], steps[kBlock], shrunk[kBlock];
  const int count = sums == nullptr ? 0 : of.sums_of_value;
  for_each_block<C>(n, count, sums, [&](int64_t i, int m, Lanes<C> lanes) {
    from.read(w + i, anchor, begin + i, m);
    load(metric.moment, moment_dtype, i, m, C(0), steps);
    if (metric.moment == nullptr) {
      for (int j = 0; j < m; ++j) steps[j] = numerator;
    } else if (metric.root) {
#pragma omp simd
      for (int j = 0; j < m; ++j) steps[j] = numerator / (factor * square_root(steps[j]) + offset);
    } else {
#pragma omp simd
      for (int j = 0; j < m; ++j) steps[j] = numerator / (factor * steps[j] + offset);
    }
#pragma omp simd
    for (int j = 0; j < m; ++j) steps[j] *= from.weight[j];
    of.stepwise_prox(from.x, steps, m, s.c, shrunk);
    const C* old = widen(static_cast<const T*>(w + i), m, buffer);
    C* y = target(w + i, result);
#pragma omp simd
    for (int j = 0; j < m; ++j) y[j] = shrunk[j] == from.x[j] ? old[j] : from.origin[j] + shrunk[j];
    narrow(y, m, w + i);
    if (sums != nullptr) {
      from.read(w + i, anchor, begin + i, m);
      of.weighted_sums(from.x, from.weight, m, s.c, lanes);
    }
  });
}

template <class T>
constexpr DTypeKernels of() {
  return {value<T>,
          gradient<T>,
          accumulate<T>,
          prox<T>,
          {prox_in_metric<T, T>, prox_in_metric<T, float>},
          anchored_value<T>,
          anchored_gradient<T>,
          anchored_prox<T>,
          stats<T>,
          zeros<T>};
}

}  // namespace

extern const StepKernel steps[kDTypes][2];
extern const Kernels kernels;
const Kernels kernels = {{of<float>(), of<double>(), of<BFloat16>(), of<Float16>()},
                         steps,
                         {nullptr, nullptr, widen_all<BFloat16>, widen_all<Float16>},
                         {nullptr, nullptr, narrow_all<BFloat16>, narrow_all<Float16>},
                         narrow_at_random};

}  // namespace pyreg::cpu::PYREG_ISA
