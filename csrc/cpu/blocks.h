// Blocks of kLanes elements, and asking for the next ones.
#pragma once

#include "elements.h"
#include "kernels.h"

namespace pyreg::cpu::PYREG_ISA {
namespace {

constexpr int kLanes = kBlock;

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
template <int write = 0, int n = kLanes, class T>
PYREG_FN void prefetch(const T* row) {
  const char* p = reinterpret_cast<const char*>(row) + kAhead;
  for (int i = 0; i < n * static_cast<int>(sizeof(T)); i += 64) __builtin_prefetch(p + i, write);
}

// Where the arithmetic is long, rows are asked for piece by piece as it goes on: a core has some 16
// lines on their way at a time, and would wait for a whole row's before it begins to compute.
constexpr int kPiece = 64;

PYREG_FN int at_most(int64_t n, int64_t limit) { return static_cast<int>(n < limit ? n : limit); }

}  // namespace
}  // namespace pyreg::cpu::PYREG_ISA
