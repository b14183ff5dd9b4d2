// The optimizers' updates, compiled once per instruction set (PYREG_ISA names the namespace). As in
// kernels.cpp: a driver for each dtype, and the maths on a block by pointer.

#include "blocks.h"

namespace pyreg::cpu::PYREG_ISA {
namespace {

// Elements at a time, of up to five rows: see kBlock.
constexpr int kStep = 64;
static_assert(kBlock % kStep == 0);

// At most kStep elements and their states in the compute type: as they were, and where their new
// values go, which may be the same place.
template <class C>
struct Block {
  int n;
  const C *w, *g, *was[kMaxStates];
  C *to, *now[kMaxStates];
};

// An update's numbers and the elastic net's strengths, in the compute type.
template <class C>
struct Constants {
  C numbers[kNumbers], strengths[2], by;
};

// Returns how many of the new weights are 0.
//
// A loop for the gradient, one for the states, one for the weight, one for the prox's sums: a core
// renames some 160 registers, three iterations of the whole, which are too few to hide a root
// and a division after each other. What lies between the loops stays in the first-level cache.
template <class U, class C, With with>
int32_t update(const Block<C>& block, const Constants<C>& given, Lanes<C> lanes) {
  const Constants<C> constants = given;  // what is behind a pointer might change with every element
  const C* const c = constants.numbers;
  const C* const strengths = constants.strengths;
  const C *x = block.w, *y = block.g, by = constants.by;
  C* z = block.to;
  const C *was0 = block.was[0], *was1 = block.was[1], *was2 = block.was[2];
  C *now0 = block.now[0], *now1 = block.now[1], *now2 = block.now[2];
  C gradients[kStep], moves[kStep], metrics[kStep];
  const int n = block.n;
  int32_t zero = 0;
  if (with == With::kGradient) {
#pragma omp simd
    for (int j = 0; j < n; ++j) {
      add_to<ElasticNet>(lanes, j, x[j], strengths);
      gradients[j] = penalised(y[j], x[j], by, strengths);
    }
    y = gradients;
  }
#pragma omp simd
  for (int j = 0; j < n; ++j) {
    C a = U::kStates > 0 ? was0[j] : C(0);
    C b = U::kStates > 1 ? was1[j] : C(0);
    C d = U::kStates > 2 ? was2[j] : C(0);
    C q;
    moves[j] = U::move(x[j] * c[1], y[j], a, b, d, q, c);
    metrics[j] = q;
    if (U::kStates > 0) now0[j] = a;
    if (U::kStates > 1) now1[j] = b;
    if (U::kStates > 2) now2[j] = d;
  }
#pragma omp simd reduction(+ : zero)
  for (int j = 0; j < n; ++j) {
    const C from = x[j] * c[1], move = moves[j], q = metrics[j];
    const C to = with == With::kProx
                     ? moved_and_shrunk<U>(from, move, at_least(q, kSmallest<C>), by, strengths)
                     : moved<U>(from, move, q);
    if (with == With::kGradient) zero += to == C(0);
    z[j] = to;
  }
  if (with == With::kProx) {
#pragma omp simd reduction(+ : zero)
    for (int j = 0; j < n; ++j) {
      add_to<ElasticNet>(lanes, j, z[j], strengths);
      zero += z[j] == C(0);
    }
  }
  return zero;
}

template <class C>
struct Maths {
  int states;
  int32_t (*update[3])(const Block<C>& block, const Constants<C>& constants, Lanes<C> lanes);
};
#define PYREG_MATHS(U) \
  {U::kStates,         \
   {update<U, C, With::kNothing>, update<U, C, With::kGradient>, update<U, C, With::kProx>}},
template <class C>
const Maths<C> maths[kUpdates] = {PYREG_UPDATES(PYREG_MATHS)};
#undef PYREG_MATHS

// S: the states' dtype.
template <class T, class S>
void step(int update, void* w_, const void* g_, void* const* states, int64_t n,
          const double* numbers, const Joined& joined) {
  using C = typename Element<T>::Compute;
  constexpr bool kExact = std::is_same_v<T, C>;
  T* w = static_cast<T*>(w_);
  const T* g = static_cast<const T*>(g_);
  const Maths<C>& of = maths<C>[update];
  const auto maths_of_block = of.update[static_cast<int>(joined.with)];
  Constants<C> c;
  for (int k = 0; k < kNumbers; ++k) c.numbers[k] = static_cast<C>(numbers[k]);
  c.strengths[0] = static_cast<C>(joined.l1), c.strengths[1] = static_cast<C>(joined.l2);
  c.by = static_cast<C>(joined.by);
  C w_buffer[kStep], g_buffer[kStep], result[kStep];
  C was[kMaxStates][kStep], now[kMaxStates][kStep];
  C sums[kMaxSums][kLanes] = {}, unused[kMaxSums][kLanes];  // of the weights as they are stored
  auto& found = kExact || joined.with == With::kGradient ? sums : unused;
  int64_t zeros = 0;
  Block<C> block;
  for (int64_t i = 0; i < n; i += kStep) {
    const int m = block.n = at_most(n - i, kStep);
    prefetch<1>(w + i, kStep);
    prefetch(g + i, kStep);
    block.w = widen(static_cast<const T*>(w + i), m, w_buffer);
    block.g = widen(g + i, m, g_buffer);
    block.to = target(w + i, result);
    for (int k = 0; k < of.states; ++k) {
      S* s = static_cast<S*>(states[k]) + i;
      prefetch<1>(s, kStep);
      block.was[k] = widen_to(static_cast<const S*>(s), m, was[k]);
      block.now[k] = target_of(s, now[k]);
    }
    const int32_t zero = maths_of_block(block, c, lanes_from(found, i));
    narrow(block.to, m, w + i);
    for (int k = 0; k < of.states; ++k)
      narrow_from(block.now[k], m, static_cast<S*>(states[k]) + i);
    if (joined.with == With::kNothing) continue;
    if (kExact) {
      zeros += zero;
      continue;
    }
    const C* stored = widen(static_cast<const T*>(w + i), m, w_buffer);
    int32_t zero_stored = 0;
#pragma omp simd reduction(+ : zero_stored)
    for (int j = 0; j < m; ++j) zero_stored += stored[j] == C(0);
    zeros += zero_stored;
    if (joined.with == With::kGradient) continue;
    const Lanes<C> lanes = lanes_from(sums, i);
#pragma omp simd
    for (int j = 0; j < m; ++j) add_to<ElasticNet>(lanes, j, stored[j], c.strengths);
  }
  if (joined.with == With::kNothing) return;
  for (int k = 0; k < 2; ++k) joined.sums[k] += reduce(sums[k], kLanes);
  *joined.zeros += zeros;
}

}  // namespace

extern const StepKernel steps[kDTypes][2];
const StepKernel steps[kDTypes][2] = {{step<float, float>, step<float, float>},
                                      {step<double, double>, step<double, float>},
                                      {step<BFloat16, BFloat16>, step<BFloat16, float>},
                                      {step<Float16, Float16>, step<Float16, float>}};

}  // namespace pyreg::cpu::PYREG_ISA
