// How elements of each dtype become the compute type and back: exactly, and rounded to nearest
// even.
//
// widen() gives n elements in the compute type, target() says where to put results before narrow()
// stores them. For float and double the two types are one: all three are free.
#pragma once

#include "../half.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace pyreg::cpu::PYREG_ISA {
namespace {

template <class T>
PYREG_FN const T* widen(const T* x, int, T*) {
  return x;
}
template <class T>
PYREG_FN T* target(T* x, T*) {
  return x;
}
template <class T>
PYREG_FN void narrow(const T*, int, T*) {}

PYREG_FN const float* widen(const BFloat16* x, int n, float* buffer) {
#pragma omp simd
  for (int j = 0; j < n; ++j) buffer[j] = to_float(x[j]);
  return buffer;
}
PYREG_FN float* target(BFloat16*, float* buffer) { return buffer; }
PYREG_FN void narrow(const float* y, int n, BFloat16* x) {
#pragma omp simd
  for (int j = 0; j < n; ++j) x[j] = to_bfloat16(y[j]);
}

PYREG_FN const float* widen(const Float16* x, int n, float* buffer) {
  int j = 0;
#if defined(__AVX512F__)
  for (; j + 16 <= n; j += 16)
    _mm512_storeu_ps(buffer + j,
                     _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + j))));
#elif defined(__F16C__)
  for (; j + 8 <= n; j += 8)
    _mm256_storeu_ps(buffer + j,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + j))));
#endif
  for (; j < n; ++j) buffer[j] = to_float(x[j]);
  return buffer;
}
PYREG_FN float* target(Float16*, float* buffer) { return buffer; }
PYREG_FN void narrow(const float* y, int n, Float16* x) {
  int j = 0;
#if defined(__AVX512F__)
  for (; j + 16 <= n; j += 16)
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(x + j),
        _mm512_cvtps_ph(_mm512_loadu_ps(y + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  for (; j + 8 <= n; j += 8)
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(x + j),
        _mm256_cvtps_ph(_mm256_loadu_ps(y + j), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; j < n; ++j) x[j] = to_float16(y[j]);
}

}  // namespace
}  // namespace pyreg::cpu::PYREG_ISA
