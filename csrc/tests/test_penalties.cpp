// log_1_plus against the C library's in a longer type: every 1,009th of the non-negative float32,
// and float64 at random, half of them where x is around 1.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>

#include "check.h"
#include "penalties.h"

namespace {

using namespace pyreg;

template <class C, class Longer>
void check_log(C x, Longer unit) {
  const Longer expected = std::log1p(static_cast<Longer>(x));
  const Longer off = std::fabs(static_cast<Longer>(log_1_plus(x)) - expected);
  CHECK(off <= unit * expected, "x = %.17g: off by %.2Lg units", static_cast<double>(x),
        static_cast<long double>(off / (unit * expected)));
}

void test_log_of_floats() {
  const uint32_t infinity = 0x7f800000;
  for (uint32_t bits = 0; bits < infinity; bits += 1009) check_log(from_bits<float>(bits), 0x1p-23);
  // Where 1 + x passes 3/4 of a power of two, the sum's two terms are as large as they get.
  for (int k = 1; k < 24; ++k) {
    const float x = std::ldexp(0.75f, k) - 1;
    uint32_t around;
    std::memcpy(&around, &x, sizeof x);
    for (uint32_t bits = around - 2000; bits < around + 2000; ++bits)
      check_log(from_bits<float>(bits), 0x1p-23);
  }
}

void test_log_of_doubles() {
  std::mt19937_64 generator(1);
  for (int i = 0; i < 2000000; ++i) {
    const uint64_t any = generator() % 0x7ff0000000000000;
    const uint64_t near = 0x3f00000000000000 + generator() % 0x0200000000000000;
    check_log<double, long double>(from_bits<double>(i % 2 ? any : near), 0x1p-52L);
  }
}

template <class C>
void test_ends_of_log() {
  const C infinity = static_cast<C>(INFINITY);
  CHECK(log_1_plus(C(0)) == C(0), "%g", static_cast<double>(log_1_plus(C(0))));
  CHECK(log_1_plus(infinity) == infinity, "%g", static_cast<double>(log_1_plus(infinity)));
  CHECK(std::isnan(log_1_plus(static_cast<C>(NAN))), "NaN is lost");
}

}  // namespace

int main() {
  test_log_of_floats();
  test_log_of_doubles();
  test_ends_of_log<float>();
  test_ends_of_log<double>();
  if (failures) std::printf("%d checks failed\n", failures);
  return failures ? 1 : 0;
}
