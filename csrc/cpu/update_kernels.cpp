// The optimizers' updates, compiled once per instruction set (PYREG_ISA names the namespace).

#include "blocks.h"

namespace pyreg::cpu::PYREG_ISA {
namespace {

// What joins the update in the same loop: nothing; elastic net's gradient; its prox.
enum class With { kNothing, kGradient, kProx };

// S: the states' dtype.
template <class U, class T, class S, With kWith>
void update(void* w_, const void* g_, void* const* states, int64_t n, const double* numbers,
            const Joined& joined) {
  using C = typename Element<T>::Compute;
  using D = typename Element<S>::Compute;
  constexpr bool kExact = std::is_same_v<T, C>;
  T* w = static_cast<T*>(w_);
  const T* g = static_cast<const T*>(g_);
  S* s[kMaxStates] = {};
  for (int k = 0; k < U::kStates; ++k) s[k] = static_cast<S*>(states[k]);
  C c[kNumbers];
  for (int k = 0; k < kNumbers; ++k) c[k] = static_cast<C>(numbers[k]);
  const C strengths[2] = {static_cast<C>(joined.l1), static_cast<C>(joined.l2)};
  const C by = static_cast<C>(joined.by);
  C w_buffer[kLanes], g_buffer[kLanes], result[kLanes];
  D s_buffer[kMaxStates][kLanes], s_result[kMaxStates][kLanes];
  C first[kLanes] = {}, second[kLanes] = {};
  int64_t zeros = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int m = at_most(n - i, kLanes);
    const C* x = widen(static_cast<const T*>(w + i), m, w_buffer);
    const C* y = widen(g + i, m, g_buffer);
    C* z = target(w + i, result);
    const D* old[kMaxStates] = {s_buffer[0], s_buffer[1], s_buffer[2]};
    D* now[kMaxStates] = {s_result[0], s_result[1], s_result[2]};
    for (int k = 0; k < U::kStates; ++k) {
      old[k] = widen(static_cast<const S*>(s[k] + i), m, s_buffer[k]);
      now[k] = target(s[k] + i, s_result[k]);
    }
    const D *old0 = old[0], *old1 = old[1], *old2 = old[2];
    D *now0 = now[0], *now1 = now[1], *now2 = now[2];
    int32_t zero = 0;
    for (int piece = 0; piece < m; piece += kPiece) {
      prefetch<1, kPiece>(w + i + piece);
      prefetch<0, kPiece>(g + i + piece);
      for (int k = 0; k < U::kStates; ++k) prefetch<1, kPiece>(s[k] + i + piece);
      const int end = at_most(m, piece + kPiece);
#pragma omp simd reduction(+ : zero)
      for (int j = piece; j < end; ++j) {
        C a = U::kStates > 0 ? static_cast<C>(old0[j]) : C(0);
        C b = U::kStates > 1 ? static_cast<C>(old1[j]) : C(0);
        C d = U::kStates > 2 ? static_cast<C>(old2[j]) : C(0);
        C from = x[j], gradient = y[j], q;
        if (kWith == With::kGradient) {
          first[j] = ElasticNet::add<0>(first[j], from, strengths);
          second[j] = ElasticNet::add<1>(second[j], from, strengths);
          gradient = gradient + by * ElasticNet::grad(from, strengths);
        }
        from = from * c[1];
        const C move = U::move(from, gradient, a, b, d, q, c);
        const C to = kWith == With::kProx
                         ? moved_and_shrunk<U>(from, move, at_least(q, kSmallest<C>), by, strengths)
                         : moved<U>(from, move, q);
        if (kWith == With::kProx && kExact) {
          first[j] = ElasticNet::add<0>(first[j], to, strengths);
          second[j] = ElasticNet::add<1>(second[j], to, strengths);
        }
        if (kWith != With::kNothing && kExact) zero += to == C(0);
        z[j] = to;
        if (U::kStates > 0) now0[j] = static_cast<D>(a);
        if (U::kStates > 1) now1[j] = static_cast<D>(b);
        if (U::kStates > 2) now2[j] = static_cast<D>(d);
      }
    }
    narrow(z, m, w + i);
    if (kWith != With::kNothing && !kExact) {  // the rounded weights count
      const C* stored = widen(static_cast<const T*>(w + i), m, w_buffer);
#pragma omp simd reduction(+ : zero)
      for (int j = 0; j < m; ++j) {
        zero += stored[j] == C(0);
        if (kWith == With::kGradient) continue;
        first[j] = ElasticNet::add<0>(first[j], stored[j], strengths);
        second[j] = ElasticNet::add<1>(second[j], stored[j], strengths);
      }
    }
    for (int k = 0; k < U::kStates; ++k) narrow(now[k], m, s[k] + i);
    zeros += zero;
  }
  if (kWith == With::kNothing) return;
  joined.sums[0] += reduce(first, kLanes);
  joined.sums[1] += reduce(second, kLanes);
  *joined.zeros += zeros;
}

template <class U, class T>
constexpr UpdateKernels of() {
  return {{{update<U, T, T, With::kNothing>, update<U, T, T, With::kGradient>,
            update<U, T, T, With::kProx>},
           {update<U, T, float, With::kNothing>, update<U, T, float, With::kGradient>,
            update<U, T, float, With::kProx>}}};
}

}  // namespace

extern const UpdateKernels updates[kUpdates][kDTypes];
#define PYREG_ROW(U) {of<U, float>(), of<U, double>(), of<U, BFloat16>(), of<U, Float16>()},
const UpdateKernels updates[kUpdates][kDTypes] = {PYREG_UPDATES(PYREG_ROW)};
#undef PYREG_ROW

}  // namespace pyreg::cpu::PYREG_ISA
