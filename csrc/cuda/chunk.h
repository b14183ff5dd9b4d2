// One chunk of one tensor, visited by one warp: what a thread does where a penalty and a dtype have
// a loop of their own. (rows.h: where they share it.)
//
// A chunk is kDepth rows of kLanes elements, as in cpu/kernels.cpp: lane j adds the elements
// j, j + kLanes, ... in the compute type. A thread keeps kOwn lanes. Which ones depends on how many
// elements it moves at a time, W: 16 bytes of them where the chunk is whole and lies at multiples
// of 16 bytes, else one, with a check of each. The sums know nothing of that, so their bits are the
// CPU's.
#pragma once

#include "../half.h"
#include "parameter.h"

namespace pyreg::cuda {

constexpr int kLanes = 256;
constexpr int kDepth = static_cast<int>(kChunk) / kLanes;
constexpr int kOwn = kLanes / kWarp;

template <class T, int W>
struct alignas(sizeof(T) * W) Vector {
  T at[W];
};
template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));

PYREG_DEVICE float widen(float x) { return x; }
PYREG_DEVICE double widen(double x) { return x; }
PYREG_DEVICE float widen(BFloat16 x) { return to_float(x); }
PYREG_DEVICE float widen(Float16 x) { return to_float(x); }
PYREG_DEVICE void narrow(float x, float& y) { y = x; }
PYREG_DEVICE void narrow(double x, double& y) { y = x; }
PYREG_DEVICE void narrow(float x, BFloat16& y) { y = to_bfloat16(x); }
PYREG_DEVICE void narrow(float x, Float16& y) { y = to_float16(x); }

// A rule's strengths and the sweep's scale or a row's metric, rounded to the compute type.
template <class C>
struct Numbers {
  C strengths[kMaxStrengths];
  C scale;  // or the metric's numerator
  C factor, offset;
  bool root;
};

// What a thread has added up in one chunk: its kOwn lanes of two sums, and of `stats` the rest.
template <class C>
struct Totals {
  C first[kOwn] = {}, second[kOwn] = {};
  C top = 0;
  uint32_t zeros = 0, non_finite = 0;
};

// The lane of a thread's slot v, and so the place of its element in each row of the chunk.
template <int W>
PYREG_DEVICE int lane_of(int thread, int v) {
  return v / W * (kWarp * W) + thread * W + v % W;
}

// One element's part of the sums.
template <class P, class C>
PYREG_DEVICE void add(C w, const C* c, C& first, C& second) {
  first = P::template add<0>(first, w, c);
  if (P::kSums > 1) second = P::template add<1>(second, w, c);
}

// What is written for an element w; beside it the old gradient, or what its metric divides by.
template <Sweep S, class P, class C>
PYREG_DEVICE C result(C w, C beside, const Numbers<C>& numbers) {
  const C* c = numbers.strengths;
  if (S == Sweep::kGradient) return numbers.scale * P::grad(w, c);
  if (S == Sweep::kAccumulate) return beside + numbers.scale * P::grad(w, c);
  if (S == Sweep::kProx) return P::prox(w, numbers.scale, c);
  return P::prox_ratio(w, numbers.scale, beside, c);
}

// Vectors that a thread asks for before it uses the first: 64 bytes of each of two streams, or 128
// of one; half of that for float64, whose lanes take twice the registers, and for single elements.
template <Sweep S, class T, int W>
constexpr int kInFlight = (S == Sweep::kAccumulate ? 4 : 8) / (sizeof(T) == 8 || W == 1 ? 2 : 1);

// Keeps the compiler from asking for more of them: registers decide how many warps run at a time.
PYREG_DEVICE void load_no_further() { asm volatile("" ::: "memory"); }

// The compiler must not know x again: it would keep what follows from it in registers, addresses
// and factors for every penalty and dtype.
template <class X>
PYREG_DEVICE void forget(X& x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(X) == sizeof(double))
    asm volatile("" : "+d"(x));
  else if constexpr (X(0.5) != X(0))
    asm volatile("" : "+f"(x));
  else
    asm volatile("" : "+r"(x));
#else
  (void)x;
#endif
}

// n elements at w (and g), n = kChunk if W > 1. Without `write`, g is only read.
template <Sweep S, class P, class T, int W>
PYREG_DEVICE void visit(T* w, T* g, bool write, int n, int thread,
                        const Numbers<typename Element<T>::Compute>& numbers,
                        Totals<typename Element<T>::Compute>& totals) {
  using C = typename Element<T>::Compute;
  using V = Vector<T, W>;
  constexpr int kLoads = kInFlight<S, T, W>;
  constexpr int kVectors = kOwn / W;  // of a thread in a row
  constexpr int kRows = kLoads > kVectors ? kLoads / kVectors : 1;
  static_assert(kDepth % kRows == 0 && kRows * kVectors % kLoads == 0);
  if (W > 1) n = static_cast<int>(kChunk);
#pragma unroll 1
  for (int begin = 0; begin < n; begin += kRows * kLanes) {
#pragma unroll
    for (int first = 0; first < kRows * kVectors; first += kLoads) {
      int at[kLoads];
      V x[kLoads], old[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        at[i] = begin + (first + i) / kVectors * kLanes +
                lane_of<W>(thread, (first + i) % kVectors * W);
        // (A vector of zeros, not one that is left as it was: that would keep registers.)
        x[i] = W > 1 || at[i] < n ? *reinterpret_cast<const V*>(w + at[i]) : V{};
      }
      if (S == Sweep::kAccumulate) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
          old[i] = W > 1 || at[i] < n ? *reinterpret_cast<const V*>(g + at[i]) : V{};
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (W == 1 && at[i] >= n) continue;
        V y;
#pragma unroll
        for (int e = 0; e < W; ++e) {
          const int v = (first + i) % kVectors * W + e;
          const C a = widen(x[i].at[e]);
          if (S == Sweep::kValue || S == Sweep::kAccumulate)
            add<P>(a, numbers.strengths, totals.first[v], totals.second[v]);
          if (S == Sweep::kStats) {
            const C size = absolute(a);
            totals.first[v] += size;
            totals.second[v] = mul_add(size, size, totals.second[v]);
            totals.top = size > totals.top ? size : totals.top;  // passes over NaN
            totals.zeros += size == C(0);
            totals.non_finite += !(size < static_cast<C>(__builtin_inf()));
          }
          if (kWritesGradient<S> || S == Sweep::kProx) {
            const C beside = S == Sweep::kAccumulate ? widen(old[i].at[e]) : a;
            narrow(result<S, P>(a, beside, numbers), y.at[e]);
          }
        }
        if (kWritesGradient<S> && write) *reinterpret_cast<V*>(g + at[i]) = y;
        if (S == Sweep::kProx) *reinterpret_cast<V*>(w + at[i]) = y;
      }
      load_no_further();
    }
  }
}

}  // namespace pyreg::cuda
