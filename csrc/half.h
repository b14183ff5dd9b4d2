// The 16-bit elements, and every element's compute type. Widening is exact; narrowing rounds to
// nearest even. A GPU's own instructions do the same, but for the bits of a NaN.
#pragma once

#include <cstdint>

#include "scalars.h"

namespace pyreg {

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
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(f));
  return y;
#else
  const uint32_t b = as_bits(f);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(f != f ? 0x7fc0u : rounded)};
#endif
}

// 32 bits in which each of x's counts. Source: Wellons (2018), hash-prospector, "lowbias32".
PYREG_FN uint32_t scrambled(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Away from zero or towards it, the nearer one the likelier, so that its mean is f; what is
// representable stays. The bits are those of a row's key and the element's place in it.
PYREG_FN BFloat16 to_bfloat16_at_random(float f, uint32_t key, int64_t element) {
  const uint32_t low = static_cast<uint32_t>(element), high = static_cast<uint32_t>(element >> 32);
  const uint32_t random = scrambled(low ^ key ^ (high * 0x9e3779b9u)) & 0xffffu;
  const uint32_t b = as_bits(f), rounded = (b + random) >> 16;
  const bool finite = (b & 0x7f800000u) != 0x7f800000u;
  return finite ? BFloat16{static_cast<uint16_t>(rounded)} : to_bfloat16(f);
}

PYREG_FN float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // The exponent is rebiased by a product, which also makes subnormals right.
  const uint32_t finite = as_bits(as_float(magnitude << 13) * 0x1p112f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  return as_float((magnitude >= 0x7c00u ? special : finite) | sign);
#endif
}

PYREG_FN Float16 to_float16(float f) {
#if defined(__CUDA_ARCH__)
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(f));
  return y;
#else
  const uint32_t b = as_bits(f) & 0x7fffffffu;
  const uint32_t sign = (as_bits(f) >> 16) & 0x8000u;
  // Rebias the exponent and round the 13 bits that go; a carry may make the exponent infinite.
  const uint32_t normal = (b - 0x38000000u + 0xfffu + ((b >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 leaves the half's last bit as the float's last bit, rounded.
  const uint32_t subnormal = as_bits(as_float(b) + 0.5f) - 0x3f000000u;
  const uint32_t special = b > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t h = b >= 0x47800000u ? special : b < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>(h | sign)};
#endif
}

}  // namespace pyreg
