// An optimizer's step on one chunk of one tensor, by one thread.
//
// The loop is that of rows.h, with more beside a weight: its gradient, up to three states, and
// perhaps a float32 master, all asked for before the first is used. Load and widen, by the dtype;
// the penalty's gradient, or the update with the penalty's prox, which share a division; narrow and
// store. The penalty is L1, L2 or elastic net, as of an elastic net: the others would take minutes
// to compile. Elements, lanes and the order of additions are those of chunk.h, the arithmetic that
// of updates.h.
#pragma once

#include <type_traits>

#include "../updates.h"
#include "rows.h"

namespace pyreg::cuda {

template <class C>
constexpr int kStepSlots = sizeof(C) == 8 ? 2 : kOwn;

// body(U()) for one of the updates.
template <class Body>
PYREG_DEVICE void by_update(int update, const Body& body) {
  int next = 0;
#define PYREG_BODY(U) \
  if (update == next++) return body(U());
  PYREG_UPDATES(PYREG_BODY)
#undef PYREG_BODY
}

// What a row's step is told, in the compute type.
template <class C>
struct StepNumbers {
  C update[kNumbers];
  C by;             // the penalty's gradient's factor, or its prox's step where the metric is 1
  C unscaled;       // what gradients are multiplied by
  C strengths[2];   // of the elastic net
  bool only_l2;     // its sum is the net's second
  bool prox, goes;  // goes: nothing is written where a loss scaler found an overflow
};

template <class C>
PYREG_DEVICE StepNumbers<C> step_numbers(const Parameter& p, const Entry& entry,
                                         const RowStep& row) {
  const StepFacts facts = p.step_facts();
  const Rule rule = p.rule(entry.rule);
  StepNumbers<C> numbers{};
#pragma unroll
  for (int k = 0; k < kNumbers; ++k)
    numbers.update[k] = static_cast<C>(p.step_number(facts, row.set, k));
  numbers.prox = facts.prox;
  numbers.by = static_cast<C>(facts.prox ? p.step_number(facts, row.set, kNumbers)
                                         : read(p.scale, p.scale_kind));
  numbers.unscaled = static_cast<C>(1 / read(facts.grad_scale, facts.grad_scale_kind));
  const C first = static_cast<C>(read(rule.strengths[0], rule.kinds[0]));
  const C second = static_cast<C>(read(rule.strengths[1], rule.kinds[1]));
  numbers.only_l2 = rule.penalty == index_of<L2>;
  numbers.strengths[0] = numbers.only_l2 ? C(0) : first;
  numbers.strengths[1] = numbers.only_l2 ? first : rule.penalty == index_of<L1> ? C(0) : second;
  numbers.goes = read(facts.found_inf, facts.found_inf_kind) == 0;
  return numbers;
}

// N slots of float32 as bfloat16, rounded at random; `begin` is the row's element at `to`.
template <int W, int N>
PYREG_DEVICE void store_at_random(const float (&x)[N], BFloat16* to, uint32_t key, int64_t begin,
                                  int thread, int first, int left) {
#pragma unroll
  for (int k = 0; k < N; k += W) {
    Vector<BFloat16, W> y;
    const int at = offset_of<W>(thread, first + k);
#pragma unroll
    for (int e = 0; e < W; ++e) y.at[e] = to_bfloat16_at_random(x[k + e], key, begin + at + e);
    if (W > 1 || k < left) put(reinterpret_cast<Vector<BFloat16, W>*>(to + at), y);
  }
}

// The sums go to `first` and `second`, as in visit_rows; returns the zeros.
template <Sweep S, class C>
PYREG_DEVICE uint32_t visit_step(const Entry& entry, const Place& place, const RowStep& row,
                                 bool wide, int thread, const StepNumbers<C>& numbers,
                                 C* first_sums, C* second_sums) {
  constexpr int N = kStepSlots<C>;
  const DType dtype = static_cast<DType>(entry.dtype);
  const bool in_float32 = row.master != nullptr || row.at_random;  // throughout
  const bool sums_before = !numbers.prox && row.penalised, shrinks = numbers.prox && row.penalised;
  uint32_t zeros = 0;
#pragma unroll 1
  for (int slot = 0; slot * kWarp < place.n; slot += N) {
    forget(thread);
    const int64_t at = place.begin + slot / kOwn * kLanes;
    const int first = N < kOwn ? slot % kOwn : 0;
    const int left = (place.n - thread + kWarp - 1) / kWarp - slot;
    C w[N], g[N], s[kMaxStates][N];
    by_kind<S, C>(dtype, row.float32, wide, [&](auto kind) {
      using T = typename decltype(kind)::T;
      using D = typename decltype(kind)::D;
      constexpr int W = decltype(kind)::W;
      Held<T, W, N> gradient;
      gradient.load(in_device_memory<T>(entry.g) + at, thread, first, left);
      Held<D, W, N> states[kMaxStates] = {};
#pragma unroll
      for (int k = 0; k < kMaxStates; ++k)
        if (row.states[k])
          states[k].load(in_device_memory<D>(row.states[k]) + at, thread, first, left);
      bool is_copy = false;
      if constexpr (sizeof(T) == 2) {
        if (row.master) {
          is_copy = true;
          Held<float, W, N> master;
          master.load(in_device_memory<float>(row.master) + at, thread, first, left);
          master.widen_to(w);
        }
      }
      if (!is_copy) {
        Held<T, W, N> weight;
        weight.load(in_device_memory<T>(entry.w) + at, thread, first, left);
        weight.widen_to(w);
      }
      gradient.widen_to(g);
#pragma unroll
      for (int k = 0; k < kMaxStates; ++k) states[k].widen_to(s[k]);
    });

    const auto add_to_sums = [&](C x, int k) {
      const int i = place_of_sum<C>(thread, (first + k) % kOwn, wide);
      second_sums[i] = ElasticNet::add<1>(second_sums[i], x, numbers.strengths);
      first_sums[i] = numbers.only_l2 ? second_sums[i]
                                      : ElasticNet::add<0>(first_sums[i], x, numbers.strengths);
    };
    by_update(row.update, [&](auto update) {
      using U = decltype(update);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        C gradient = numbers.unscaled * g[k];
        if (sums_before) {
          if (k < left) add_to_sums(w[k], k);
          gradient = penalised(gradient, w[k], numbers.by, numbers.strengths);
        }
        if (!numbers.goes) continue;
        C q;
        w[k] = w[k] * numbers.update[1];
        const C move = U::move(w[k], gradient, s[0][k], s[1][k], s[2][k], q, numbers.update);
        w[k] = shrinks ? moved_and_shrunk<U>(w[k], move, at_least(q, kSmallest<C>), numbers.by,
                                             numbers.strengths)
                       : moved<U>(w[k], move, q);
      }
    });
    const auto count = [&] {
      if (!row.penalised) return;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (k >= left) continue;
        zeros += w[k] == C(0);
        if (shrinks) add_to_sums(w[k], k);
      }
    };
    if (in_float32) count();
    if (numbers.goes) {
      by_kind<S, C>(dtype, row.float32, wide, [&](auto kind) {
        using T = typename decltype(kind)::T;
        using D = typename decltype(kind)::D;
        constexpr int W = decltype(kind)::W;
#pragma unroll
        for (int k = 0; k < kMaxStates; ++k)
          if (row.states[k])
            store<W>(s[k], in_device_memory<D>(row.states[k]) + at, thread, first, left);
        T* to = in_device_memory<T>(entry.w) + at;
        if constexpr (sizeof(T) == 2)
          if (row.master)
            store<W>(w, in_device_memory<float>(row.master) + at, thread, first, left);
        if constexpr (std::is_same_v<T, BFloat16>)
          if (row.at_random) return store_at_random<W>(w, to, row.key, at, thread, first, left);
        store<W>(w, to, thread, first, left);
      });
    }
    if (!in_float32) count();
    load_no_further();
  }
  return zeros;
}

}  // namespace pyreg::cuda
