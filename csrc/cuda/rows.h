// Some rows of a chunk, in the compute type: one body for each penalty, whatever the dtype.
//
// Where nine penalties share a kernel, a loop for each of them, each dtype and each width, as in
// chunk.h, would be nine times eight. Here the loop is one: load and widen, by the dtype; compute,
// by the penalty; narrow and store, by the dtype. All threads of a warp take the same branches.
// Elements, lanes and the order of additions are those of chunk.h.
#pragma once

#include "chunk.h"
#include "walk.h"

namespace pyreg::cuda {

// Elements that a thread has at a time, its slots: slot k lies in the k / kOwn-th row. As many as
// let enough blocks run (kernels.cu): two rows, one where something lies beside the weights and the
// maths may be long.
template <Sweep S, Family F, class C>
constexpr int kSlots = sizeof(C) == 8                         ? kReadsBeside<S> ? 2 : 4
                       : kReadsBeside<S> && F == Family::kAll ? kOwn
                                                              : 2 * kOwn;

template <int W>
PYREG_DEVICE int offset_of(int thread, int slot) {
  return slot / kOwn * kLanes + lane_of<W>(thread, slot % kOwn);
}

// N slots of dtype T from `first` on, W elements of a row next to each other, in loads of at most
// 16 bytes. Those from `left` on are behind the end, if W = 1.
template <class T, int W, int N>
struct Held {
  static constexpr int kEach = W < kWide<T> ? W : kWide<T>;
  using V = Vector<T, kEach>;
  V at[N / kEach];

  PYREG_DEVICE void load(const T* from, int thread, int first, int left) {
#pragma unroll
    for (int k = 0; k < N; k += kEach)
      at[k / kEach] = W > 1 || k < left
                          ? *reinterpret_cast<const V*>(from + offset_of<W>(thread, first + k))
                          : V{};
  }
  template <class C>
  PYREG_DEVICE void widen_to(C* x) const {
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = static_cast<C>(widen(at[k / kEach].at[k % kEach]));
  }
};

// *to = x in one piece: the compiler takes it apart where the elements come out of branches.
template <class V>
PYREG_DEVICE void put(V* to, const V& x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof x == sizeof(uint4)) {
    uint4 bits;
    __builtin_memcpy(&bits, &x, sizeof x);
    __stwb(reinterpret_cast<uint4*>(to), bits);
    return;
  }
#endif
  *to = x;
}

// Stores N slots, and leaves in x what was stored.
template <int W, class T, class C, int N>
PYREG_DEVICE void store(C (&x)[N], T* to, int thread, int first, int left) {
  using V = typename Held<T, W, N>::V;
  constexpr int kEach = Held<T, W, N>::kEach;
#pragma unroll
  for (int k = 0; k < N; k += kEach) {
    V y;
#pragma unroll
    for (int e = 0; e < kEach; ++e) narrow(x[k + e], y.at[e]);
    if (W > 1 || k < left) put(reinterpret_cast<V*>(to + offset_of<W>(thread, first + k)), y);
#pragma unroll
    for (int e = 0; e < kEach; ++e) x[k + e] = widen(y.at[e]);
  }
}

// A row's dtype, that of what lies beside it, and how many elements move at a time.
template <class T_, class D_, int W_>
struct Kind {
  using T = T_;
  using D = D_;
  static constexpr int W = W_;
};

// body(Kind), for compute type C. (Exactly one of the bodies runs, as the compiler sees it too:
// else it would keep what they set, as it was before, in registers of its own.)
template <class T, class D, class Body>
PYREG_DEVICE void by_width(bool wide, const Body& body) {
  if (wide)
    body(Kind<T, D, kWide<T>>());
  else
    body(Kind<T, D, 1>());
}
template <Sweep S, class T, class Body>
PYREG_DEVICE void by_moment(bool float32, bool wide, const Body& body) {
  if constexpr ((S == Sweep::kProxInMetric || S == Sweep::kStep) && sizeof(T) != sizeof(float))
    if (float32) return by_width<T, float>(wide, body);
  by_width<T, T>(wide, body);
}
template <Sweep S, class C, class Body>
PYREG_DEVICE void by_kind(DType dtype, bool float32, bool wide, const Body& body) {
  if constexpr (sizeof(C) == sizeof(double)) {
    by_moment<S, double>(float32, wide, body);
  } else {
    if (dtype == DType::kFloat32)
      by_moment<S, float>(float32, wide, body);
    else if (dtype == DType::kBFloat16)
      by_moment<S, BFloat16>(float32, wide, body);
    else
      by_moment<S, Float16>(float32, wide, body);
  }
}

// body(P()) for one of a family's penalties.
template <Family F, class Body>
PYREG_DEVICE void by_penalty(int penalty, const Body& body) {
  int next = 0;
#define PYREG_BODY(P) \
  if (penalty == next++) return body(P());
  if constexpr (F == Family::kElementary) {
    PYREG_ELEMENTARY(PYREG_BODY)
  } else {
    PYREG_PENALTIES(PYREG_BODY)
  }
#undef PYREG_BODY
}

// Where the sums of a thread's lane v are while it visits a chunk. For float they are in registers;
// for double, of which those would not be enough, in the block's memory, as at the end of a chunk.
template <class C>
constexpr bool kSumsInRegisters = sizeof(C) == sizeof(float);
template <class C>
PYREG_DEVICE int place_of_sum(int thread, int v, bool wide) {
  if (kSumsInRegisters<C>) return v;
  return wide ? lane_of<kWide<C>>(thread, v) : lane_of<1>(thread, v);
}

// One chunk of one tensor, by one thread.
template <Sweep S, Family F, class C>
PYREG_DEVICE void visit_rows(const Entry& entry, const Place& place, bool float32, bool wide,
                             int penalty, int thread, Numbers<C> numbers, C* first_sums,
                             C* second_sums) {
  constexpr int N = kSlots<S, F, C>;
  constexpr bool kSumsOfOld = S == Sweep::kValue || S == Sweep::kAccumulate;
  const DType dtype = static_cast<DType>(entry.dtype);
#pragma unroll 1
  for (int slot = 0; slot * kWarp < place.n; slot += N) {
    forget(thread);
    for (C& strength : numbers.strengths) forget(strength);
    const int64_t row = place.begin + slot / kOwn * kLanes;
    const int first = N < kOwn ? slot % kOwn : 0;
    const int left = (place.n - thread + kWarp - 1) / kWarp - slot;
    const auto add_to_sums = [&](auto penalty, C x, int k) {
      const int at = place_of_sum<C>(thread, (first + k) % kOwn, wide);
      add<decltype(penalty)>(x, numbers.strengths, first_sums[at], second_sums[at]);
    };
    C x[N], beside[N];
    by_kind<S, C>(dtype, float32, wide, [&](auto kind) {
      using T = typename decltype(kind)::T;
      using D = typename decltype(kind)::D;
      constexpr int W = decltype(kind)::W;
      Held<T, W, N> held;
      Held<D, W, N> other;
      held.load(in_device_memory<T>(entry.w) + row, thread, first, left);
      // (Without any, w is read in its place: no load waits for a branch.)
      if (kReadsBeside<S>)
        other.load(in_device_memory<D>(entry.g ? entry.g : entry.w) + row, thread, first, left);
      held.widen_to(x);
      if (kReadsBeside<S>) other.widen_to(beside);
    });
    if (S == Sweep::kProxInMetric) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const C root = numbers.root ? square_root(beside[k]) : beside[k];
        beside[k] = entry.g ? denominator(numbers.factor * root + numbers.offset) : C(1);
      }
    }
    by_penalty<F>(penalty, [&](auto penalty) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (kSumsOfOld && k < left) add_to_sums(penalty, x[k], k);
        if (S != Sweep::kValue)
          x[k] = result<S, decltype(penalty)>(x[k], kReadsBeside<S> ? beside[k] : x[k], numbers);
      }
    });
    if (kWritesTensor<S> || (kWritesGradient<S> && entry.g)) {
      by_kind<S, C>(dtype, false, wide, [&](auto kind) {
        using T = typename decltype(kind)::T;
        T* to = in_device_memory<T>(kWritesTensor<S> ? entry.w : entry.g) + row;
        store<decltype(kind)::W>(x, to, thread, first, left);
      });
    }
    if (S == Sweep::kProxInMetric) {
      by_penalty<F>(penalty, [&](auto penalty) {
#pragma unroll
        for (int k = 0; k < N; ++k)
          if (k < left) add_to_sums(penalty, x[k], k);
      });
    }
    load_no_further();
  }
}

}  // namespace pyreg::cuda
