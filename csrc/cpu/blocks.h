// Blocks of kBlock elements, and asking for the next ones.
#pragma once

#include "elements.h"
#include "kernels.h"

namespace pyreg::cpu::PYREG_ISA {
namespace {

// Elements that are worked on at a time. Before their arithmetic as many are asked for, of which a
// core has some 16 lines on their way: it waits for the others. So narrow registers, whose
// arithmetic takes long, have smaller blocks (on Zen 3 a tenth faster than 256, or 64 with the
// calls that those cost). Results do not depend on it.
#if defined(__AVX512F__)
constexpr int kBlock = kLanes;
#else
constexpr int kBlock = 128;
#endif
static_assert(kLanes % kBlock == 0);

// widen, target and narrow for at most kBlock elements of any dtype in either compute type.
template <class C, class T>
constexpr bool kOwn = std::is_same_v<C, typename Element<T>::Compute>;
template <class C, class T>
PYREG_FN const C* widen_to(const T* x, int n, C* buffer) {
  if constexpr (kOwn<C, T>) {
    return widen(x, n, buffer);
  } else {
    typename Element<T>::Compute own[kBlock];
    const auto* from = widen(x, n, own);
#pragma omp simd
    for (int j = 0; j < n; ++j) buffer[j] = static_cast<C>(from[j]);
    return buffer;
  }
}
template <class C, class T>
PYREG_FN C* target_of(T* x, C* buffer) {
  if constexpr (kOwn<C, T>) return target(x, buffer);
  return buffer;
}
template <class C, class T>
PYREG_FN void narrow_from(const C* y, int n, T* x) {
  if constexpr (kOwn<C, T>) {
    narrow(y, n, x);
  } else {
#pragma omp simd
    for (int j = 0; j < n; ++j) x[j] = static_cast<T>(y[j]);
  }
}

// The lanes of each sum, from that of a block's first element on.
template <class C>
using Lanes = C (*)[kLanes];

// Those of a block that begins at the i-th element of a chunk.
template <class C>
PYREG_FN Lanes<C> lanes_from(C (&lanes)[kMaxSums][kLanes], int64_t i) {
  return reinterpret_cast<Lanes<C>>(lanes[0] + i % kLanes);
}

// Adds a term to each. (A sum after the other: a loop over them inside the loop over elements does
// not vectorize.)
template <class P, class C>
PYREG_FN void add_to(Lanes<C> lanes, int j, C x, const C* c) {
  lanes[0][j] = P::template add<0>(lanes[0][j], x, c);
  if constexpr (P::kSums > 1) lanes[1][j] = P::template add<1>(lanes[1][j], x, c);
}

// The first `used` lanes (a multiple of 16; the others are zero) in double: 16 strided sums, then
// one, always in this order.
template <class C>
PYREG_FN double reduce(const C* lanes, int used) {
  double d[16];
  for (int j = 0; j < 16; ++j) d[j] = static_cast<double>(lanes[j]);
  for (int i = 16; i < used; i += 16)
    for (int j = 0; j < 16; ++j) d[j] += static_cast<double>(lanes[i + j]);
  for (int j = 0; j < 8; ++j) d[j] += d[j + 8];
  for (int j = 0; j < 4; ++j) d[j] += d[j + 4];
  return (d[0] + d[2]) + (d[1] + d[3]);
}

// Asks for the row that comes kAhead bytes later: the hardware's own prefetch stops at pages. (The
// best of those tried from 640 to 8,192 bytes; multiples of 1,024 are worse, nobody knows why.)
constexpr int kAhead = 1344;
template <int write = 0, class T>
PYREG_FN void prefetch(const T* row, int n = kBlock) {
  const char* p = reinterpret_cast<const char*>(row) + kAhead;
  for (int i = 0; i < n * static_cast<int>(sizeof(T)); i += 64) __builtin_prefetch(p + i, write);
}

PYREG_FN int at_most(int64_t n, int64_t limit) { return static_cast<int>(n < limit ? n : limit); }

}  // namespace
}  // namespace pyreg::cpu::PYREG_ISA
