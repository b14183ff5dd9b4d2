// How elements of each dtype become the compute type and back: exactly, and rounded to nearest
// even.
//
// widen() gives n elements in the compute type, target() says where to put results before narrow()
// stores them. For float and double the two types are one: all three are free.
#pragma once

#include <cstdint>

#include "../penalties.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace pyreg::cpu::PYREG_ISA {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Element {
  using Compute = T;
};
template <>
struct Element<BFloat16> {
  using Compute = float;
};
template <>
struct Element<Float16> {
  using Compute = float;
};

PYREG_FN float as_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
PYREG_FN uint32_t as_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof bits);
  return bits;
}

PYREG_FN float to_float(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

PYREG_FN BFloat16 to_bfloat16(float f) {
  const uint32_t b = as_bits(f);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(f != f ? 0x7fc0u : rounded)};
}

PYREG_FN float to_float(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // The exponent is rebiased by a product, which also makes subnormals right.
  const uint32_t finite = as_bits(as_float(magnitude << 13) * 0x1p112f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  return as_float((magnitude >= 0x7c00u ? special : finite) | sign);
}

PYREG_FN Float16 to_float16(float f) {
  const uint32_t b = as_bits(f) & 0x7fffffffu;
  const uint32_t sign = (as_bits(f) >> 16) & 0x8000u;
  // Rebias the exponent and round the 13 bits that go; a carry may make the exponent infinite.
  const uint32_t normal = (b - 0x38000000u + 0xfffu + ((b >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the half's last bit as the float's last bit, rounded.
  const uint32_t subnormal = as_bits(as_float(b) + 0.5f) - 0x3f000000u;
  const uint32_t special = b > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t h = b >= 0x47800000u ? special : b < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>(h | sign)};
}

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
