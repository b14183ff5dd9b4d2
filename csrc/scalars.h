// Arithmetic on one number, that of penalties and updates, with the same bits on every device. C is
// the compute type: float, or double.
//
// x - x is +0, or NaN for what is not finite.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define PYREG_FN __host__ __device__ __forceinline__
#else
// Always inlined: the CPU drivers compile this file once per instruction set, and an out-of-line
// copy of a wide set must never be linked into a narrow one.
#define PYREG_FN inline __attribute__((always_inline))
#endif

namespace pyreg {

PYREG_FN float absolute(float x) { return __builtin_fabsf(x); }
PYREG_FN double absolute(double x) { return __builtin_fabs(x); }

PYREG_FN float copy_sign(float x, float of) { return __builtin_copysignf(x, of); }
PYREG_FN double copy_sign(double x, double of) { return __builtin_copysign(x, of); }

// a * b + c with one rounding.
#if defined(__CUDACC__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(PYREG_LIBM_FMA)
PYREG_FN float mul_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
PYREG_FN double mul_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
// Without the instruction: exact product in double; a float result then has one rounding but for
// double rounding at ties (once in 2^29), a double result has two.
PYREG_FN float mul_add(float a, float b, float c) {
  return static_cast<float>(static_cast<double>(a) * b + c);
}
PYREG_FN double mul_add(double a, double b, double c) { return a * b + c; }
#endif

// (In the global namespace: std::sqrt is a function that could be linked out of line.)
PYREG_FN float square_root(float x) { return ::sqrtf(x); }
PYREG_FN double square_root(double x) { return ::sqrt(x); }

// The smaller one; NaN where a is.
template <class C>
PYREG_FN C at_most(C a, C limit) {
  return a > limit ? limit : a;
}
template <class C>
PYREG_FN C at_least(C a, C limit) {
  return a < limit ? limit : a;
}

// at_least(x, 0), where c are the strengths: a 0 that the compiler does not know, for of one that
// it does GCC makes a comparison and a move where a maximum would do.
template <class C>
PYREG_FN C positive_part(C x, const C* c) {
  return at_least(x, c[0] - c[0]);
}

// A number of which twice is one too, and the least normal one.
template <class C>
constexpr C kLargest = std::numeric_limits<C>::max() / 2;
template <class C>
constexpr C kSmallest = std::numeric_limits<C>::min();

// x / y, y >= 0, where x is 0 for many elements: a GPU divides 0 in a long way, which all threads
// of a warp go with one. The bits are the division's.
template <class C>
PYREG_FN C quotient(C x, C y) {
#if defined(__CUDA_ARCH__)
  const bool spared = x == C(0) && y > C(0);
  const C q = (spared ? C(1) : x) / y;
  return spared ? at_most(q, kLargest<C>) * x : q;
#else
  return x / y;
#endif
}

// What a metric divides by. Positive: a moment and an offset of 0 give the largest step. NaN stays.
template <class C>
PYREG_FN C denominator(C q) {
  return at_least(q, kSmallest<C>);
}

// sign(0) = sign(-0) = +0; w - w keeps NaN.
template <class C>
PYREG_FN C sign(C w) {
  return w > C(0) ? C(1) : w < C(0) ? C(-1) : w - w;
}

// S(x, t) = sign(x) max(|x| - t, 0).
template <class C>
PYREG_FN C soft_threshold(C x, C t) {
  const C u = absolute(x) - t;
  return u > C(0) ? copy_sign(u, x) : x - x;
}

template <class C, class Bits>
PYREG_FN C from_bits(Bits bits) {
  static_assert(sizeof(C) == sizeof(Bits));
  C x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// log(1 + x) for x >= 0, within 2^-23 (2^-52) of it relative. It is ours, as a library's does not
// vectorize, nor give the same bits on every device. With 1 + x = 2^k (1 + f), 1 + f in
// [least, 2 least): f = 2^-k x + (2^-k - 1) is rounded once, and exact near 0. Then
// log(1 + f) + low: for float f - f^2 / 2 + f^3 p(f), p the minimax polynomial of degree 7 (within
// 2^-27.6 of the logarithm, relative), for double fdlibm's (Sun Microsystems, 1993).
template <class C>
struct Log;
template <>
struct Log<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr Bits kOne = 0x3f800000, kLeast = 0x3f400000;                // 1 and 3/4
  static constexpr float kHigh = 6.9313812256e-01f, kLow = 9.0580006145e-06f;  // ln 2
  PYREG_FN static float log_1_plus(float f, float low) {
    const float z = f * f, w = z * z;
    const float p = ((0.333334491f - 0.250000958f * f) + z * (0.199908613f - 0.166473123f * f)) +
                    w * ((0.144783947f - 0.131611922f * f) + z * (0.10463021f - 0.0450748031f * f));
    return (z * f * p + low - 0.5f * z) + f;
  }
};
template <>
struct Log<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr Bits kOne = 0x3ff0000000000000, kLeast = 0x3fe6a09e00000000;  // 1 and sqrt(1/2)
  static constexpr double kHigh = 6.93147180369123816490e-01, kLow = 1.90821492927058770002e-10;
  PYREG_FN static double log_1_plus(double f, double low) {
    const double s = f / (2 + f), z = s * s, w = z * z, half = 0.5 * f * f;
    const double p = z * (6.666666666666735130e-01 +
                          w * (2.857142874366239149e-01 +
                               w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01))) +
                     w * (3.999999999940941908e-01 +
                          w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    return (s * (half + p) + low - half) + f;
  }
};
template <class C>
PYREG_FN C log_1_plus(C x) {
  using L = Log<C>;
  using Bits = typename L::Bits;
  constexpr Bits kBias = L::kOne >> L::kMantissa;
  const C y = C(1) + x;
  Bits bits;
  __builtin_memcpy(&bits, &y, sizeof y);
  const Bits biased = (bits + (L::kOne - L::kLeast)) >> L::kMantissa;
  const C k = static_cast<C>(static_cast<int32_t>(biased) - static_cast<int32_t>(kBias));
  // Four times 2^-k, which is normal for every k.
  const C scale = from_bits<C>((2 * kBias + 2 - biased) << L::kMantissa);
  const C f = C(0.25) * (x * scale) + (C(0.25) * scale - C(1));
  const C log = L::log_1_plus(f, k * L::kLow) + k * L::kHigh;
  return x < static_cast<C>(INFINITY) ? log : x;
}

}  // namespace pyreg
