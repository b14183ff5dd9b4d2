// The CPU's sweeps through their public face: no torch, no Python, no framework.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "penalties.h"
#include "sweeps.h"

namespace {

using namespace pyreg;

constexpr DType kAllDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                                DType::kFloat16};
constexpr int kThreads[] = {1, 2, 3, 8};

// The place of a penalty in PYREG_PENALTIES.
int index_of(const std::string& name) {
#define NAME(P) P::name,
  const char* names[] = {PYREG_PENALTIES(NAME)};
#undef NAME
  for (int i = 0; i < kPenalties; ++i)
    if (name == names[i]) return i;
  std::printf("no penalty %s\n", name.c_str());
  std::exit(1);
}

// A 16-bit pattern as a number, by the definition of its fields.
double decode_fields(DType dtype, uint16_t bits) {
  const int mantissa_bits = dtype == DType::kBFloat16 ? 7 : 10;
  const int exponent_bits = 15 - mantissa_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  const double fraction = std::ldexp(mantissa, -mantissa_bits) + (exponent ? 1 : 0);
  return sign * std::ldexp(fraction, std::max(exponent, 1) - bias);
}

double decode(DType dtype, uint16_t bits) {
  static const std::vector<std::vector<double>> tables = [] {
    std::vector<std::vector<double>> made(kDTypes);
    for (DType d : {DType::kBFloat16, DType::kFloat16})
      for (int i = 0; i < 65536; ++i)
        made[static_cast<int>(d)].push_back(decode_fields(d, static_cast<uint16_t>(i)));
    return made;
  }();
  return tables[static_cast<int>(dtype)][bits];
}

// The pattern nearest to x, ties to even: by bisection over the positive patterns, which are in
// order.
uint16_t encode(DType dtype, double x) {
  const uint16_t infinity = dtype == DType::kBFloat16 ? 0x7f80 : 0x7c00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double a = std::fabs(x);
  if (std::isnan(x)) return infinity | 1;
  if (std::isinf(x)) return sign | infinity;
  uint16_t low = 0, high = infinity;  // decode(low) <= a < decode(high)
  while (high - low > 1) {
    const uint16_t middle = (low + high) / 2;
    (decode(dtype, middle) <= a ? low : high) = middle;
  }
  // Infinity stands where the next number would be.
  const double below = decode(dtype, low);
  const double above = high == infinity ? 2 * below - decode(dtype, low - 1) : decode(dtype, high);
  const double up = above - a, down = a - below;
  return sign | (up < down || (up == down && low % 2 == 1) ? high : low);
}

// Elements of one row, with room on both sides that no sweep may touch.
struct Elements {
  static constexpr int kGuard = 64;
  DType dtype;
  int64_t n;
  std::vector<unsigned char> bytes;

  Elements(DType dtype, int64_t n)
      : dtype(dtype), n(n), bytes((n + 2 * kGuard) * item_size_of(dtype), 0xa5) {}

  static size_t item_size_of(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  }
  unsigned char* place(int64_t i) { return bytes.data() + (i + kGuard) * item_size_of(dtype); }
  void* data() { return place(0); }

  void set(int64_t i, double x) {
    const float f = static_cast<float>(x);
    const uint16_t h = item_size_of(dtype) == 2 ? encode(dtype, x) : 0;
    const void* from = dtype == DType::kFloat64   ? static_cast<const void*>(&x)
                       : dtype == DType::kFloat32 ? static_cast<const void*>(&f)
                                                  : static_cast<const void*>(&h);
    std::memcpy(place(i), from, item_size_of(dtype));
  }
  double get(int64_t i) {
    if (dtype == DType::kFloat64) {
      double x;
      std::memcpy(&x, place(i), 8);
      return x;
    }
    if (dtype == DType::kFloat32) {
      float x;
      std::memcpy(&x, place(i), 4);
      return x;
    }
    uint16_t h;
    std::memcpy(&h, place(i), 2);
    return decode(dtype, h);
  }
  bool guards_are_whole() const {
    const size_t room = kGuard * item_size_of(dtype);
    for (size_t i = 0; i < room; ++i)
      if (bytes[i] != 0xa5 || bytes[bytes.size() - 1 - i] != 0xa5) return false;
    return true;
  }
};

bool is_double(DType dtype) { return dtype == DType::kFloat64; }

// A number rounded to the compute type.
long double rounded(double x, DType dtype) {
  return is_double(dtype) ? x : static_cast<double>(static_cast<float>(x));
}

// Half of the distance between neighbours at x, in the dtype.
long double half_ulp(DType dtype, long double x) {
  const int digits = dtype == DType::kFloat64    ? 53
                     : dtype == DType::kFloat32  ? 24
                     : dtype == DType::kBFloat16 ? 8
                                                 : 11;
  const int lowest = dtype == DType::kFloat64 ? -1074 : dtype == DType::kFloat16 ? -24 : -149;
  const int least = dtype == DType::kBFloat16 ? -133 : lowest;
  return std::max(std::ldexp(std::fabs(x), -digits), std::ldexp(1.0L, least - 1));
}

int sgn(long double x) { return (x > 0) - (x < 0); }

// The three penalties as l1 * sum |w| + l2 * sum w^2, in long double.
struct Strengths {
  long double l1, l2;
};
Strengths strengths_of(const std::string& name, const double* c, DType dtype) {
  const long double first = rounded(c[0], dtype), second = rounded(c[1], dtype);
  if (name == "l1") return {first, 0};
  if (name == "l2") return {0, first};
  return {first, second};
}
long double gradient(Strengths s, long double w) { return s.l1 * sgn(w) + 2 * s.l2 * w; }
long double prox(Strengths s, long double w, long double t) {
  return sgn(w) * std::max(std::fabs(w) - t * s.l1, 0.0L) / (1 + 2 * t * s.l2);
}

// Rows of many sizes and dtypes, under all three penalties; empties between.
struct Model {
  std::vector<Elements> w, g;
  std::vector<Row> rows;
  std::vector<std::string> names = {"l1", "elastic_net", "l2"};
  std::vector<double> strengths = {0.3, 0, 1e-3, 0.2, 0.7, 0};  // [rules][kMaxStrengths]

  explicit Model(uint64_t seed = 2) {
    static_assert(kMaxStrengths == 2, "the strengths above are laid out in pairs");
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    int rule = 0;
    for (DType dtype : kAllDTypes)
      for (int64_t n : {int64_t{0}, int64_t{1}, int64_t{15}, int64_t{17}, int64_t{255},
                        int64_t{256}, int64_t{257}, kChunk - 1, kChunk, kChunk + 1, 3 * kChunk + 5})
        for (int k = 0; k < 3; ++k) {
          rows.push_back({n, dtype, rule++ % 3});
          w.emplace_back(dtype, n);
          g.emplace_back(dtype, n);
          for (int64_t i = 0; i < n; ++i) {
            w.back().set(i, i % 7 == 3 ? 0.0 : i % 11 == 5 ? -0.0 : normal(random));
            g.back().set(i, normal(random));
          }
        }
  }
  Table table() const {
    return Table(rows, {index_of(names[0]), index_of(names[1]), index_of(names[2])});
  }
  std::vector<void*> pointers(std::vector<Elements>& of) {
    std::vector<void*> all;
    for (Elements& e : of) all.push_back(e.n ? e.data() : nullptr);
    return all;
  }
  std::string name(size_t row) const { return names[rows[row].rule]; }
  Strengths own(size_t row) const {
    return strengths_of(name(row), strengths.data() + rows[row].rule * kMaxStrengths,
                        rows[row].dtype);
  }
  bool guards_are_whole() const {
    for (const auto* all : {&w, &g})
      for (const Elements& e : *all)
        if (!e.guards_are_whole()) return false;
    return true;
  }
};

// A fresh copy of the model, which is made once.
Model fresh() {
  static const Model model;
  return model;
}

// 16 additions and a product in float32: 17 roundings of 2^-24, and little in double.
constexpr long double kSumBound = 17 * 0x1p-24L + 0x1p-40L;

long double exact_value(Model& m, std::vector<long double>* sums = nullptr) {
  long double total = 0;
  std::vector<long double> by_rule(3 * kMaxSums, 0.0L);
  for (size_t r = 0; r < m.rows.size(); ++r) {
    long double l1 = 0, l2 = 0;
    for (int64_t i = 0; i < m.w[r].n; ++i) {
      const long double x = m.w[r].get(i);
      l1 += std::fabs(x);
      l2 += x * x;
    }
    const double* c = m.strengths.data() + m.rows[r].rule * kMaxStrengths;
    long double* s = by_rule.data() + m.rows[r].rule * kMaxSums;
    if (m.name(r) == "l2") {
      s[0] += l2;
      total += c[0] * l2;
    } else {
      s[0] += l1;
      total += c[0] * l1;
    }
    if (m.name(r) == "elastic_net") {
      s[1] += l2;
      total += c[1] * l2;
    }
  }
  if (sums) *sums = by_rule;
  return total;
}

void check_sums(Model& m, const Table& table, const std::vector<double>& sums, const char* sweep) {
  std::vector<long double> exact;
  const long double value = exact_value(m, &exact);
  for (size_t i = 0; i < sums.size(); ++i)
    CHECK(std::fabs(sums[i] - exact[i]) <= kSumBound * exact[i], "%s: sum %zu: %.17g, exact %.17Lg",
          sweep, i, sums[i], exact[i]);
  const double got = value_from_sums(table, sums.data(), m.strengths.data());
  CHECK(std::fabs(got - value) <= kSumBound * value, "%s: %.17g, exact %.17Lg", sweep, got, value);
}

void test_value() {
  Model m = fresh();
  const Table table = m.table();
  const auto w = m.pointers(m.w);
  std::vector<double> first;
  for (int threads : kThreads) {
    std::vector<double> sums(3 * kMaxSums, std::nan(""));
    cpu::value(table, w.data(), m.strengths.data(), sums.data(), threads);
    check_sums(m, table, sums, "value");
    if (first.empty()) first = sums;
    CHECK(std::memcmp(first.data(), sums.data(), sums.size() * sizeof(double)) == 0,
          "%d threads give other bits", threads);
  }
}

// scale * gradient (+ old): the gradient, the product and the sum are each rounded in the compute
// type C, by half a unit of their own; then the result in the dtype.
long double step_bound(DType dtype, long double result, long double term, long double old,
                       long double scale, Strengths s) {
  const DType c = is_double(dtype) ? DType::kFloat64 : DType::kFloat32;
  // Without a fused product, l1 sign(w) + 2 l2 w has one rounding more, of the product.
  const long double product = std::fabs(term) + std::fabs(scale) * s.l1;
  return 1.01L * (2 * half_ulp(c, term) + half_ulp(c, product) + half_ulp(c, result) +
                  half_ulp(dtype, result) + half_ulp(c, old));
}

void test_gradient_and_accumulate() {
  for (double scale : {1.0, -0.3}) {
    std::vector<std::vector<unsigned char>> first, first_added;
    for (int threads : kThreads) {
      Model m = fresh();
      const Table table = m.table();
      const auto w = m.pointers(m.w);
      auto g = m.pointers(m.g);
      const size_t left_out = 20;
      std::vector<Elements> old = m.g;
      // accumulate, with one row without a gradient
      auto some = g;
      some[left_out] = nullptr;
      std::vector<double> sums(3 * kMaxSums, std::nan(""));
      cpu::accumulate(table, w.data(), some.data(), m.strengths.data(), scale, sums.data(),
                      threads);
      check_sums(m, table, sums, "accumulate");
      std::vector<std::vector<unsigned char>> added, written;
      for (size_t r = 0; r < m.rows.size(); ++r) {
        const DType dtype = m.rows[r].dtype;
        const Strengths s = m.own(r);
        added.push_back(m.g[r].bytes);
        if (!first.empty()) continue;  // the bits are compared with checked ones below
        for (int64_t i = 0; i < m.g[r].n; ++i) {
          const long double before = old[r].get(i);
          const long double term = rounded(scale, dtype) * gradient(s, m.w[r].get(i));
          const long double exact = r == left_out ? before : before + term;
          const long double bound =
              r == left_out ? 0 : step_bound(dtype, exact, term, before, scale, s);
          CHECK(std::fabs(m.g[r].get(i) - exact) <= bound, "row %zu [%lld]: %.17g, exact %.17Lg", r,
                (long long)i, m.g[r].get(i), exact);
        }
      }
      // gradient, over memory full of NaN
      for (Elements& e : m.g)
        for (int64_t i = 0; i < e.n; ++i) e.set(i, std::nan(""));
      cpu::gradient(table, w.data(), some.data(), m.strengths.data(), scale, threads);
      for (size_t r = 0; r < m.rows.size(); ++r) {
        const DType dtype = m.rows[r].dtype;
        written.push_back(m.g[r].bytes);
        if (!first.empty()) continue;
        for (int64_t i = 0; i < m.g[r].n; ++i) {
          const long double exact = rounded(scale, dtype) * gradient(m.own(r), m.w[r].get(i));
          const double got = m.g[r].get(i);
          const bool good = r == left_out ? std::isnan(got)
                                          : std::fabs(got - exact) <=
                                                step_bound(dtype, exact, exact, 0, scale, m.own(r));
          CHECK(good, "row %zu [%lld]: %.17g, exact %.17Lg", r, (long long)i, got, exact);
        }
      }
      CHECK(m.guards_are_whole(), "memory beside a row was written");
      if (first.empty()) first = written, first_added = added;
      CHECK(first == written && first_added == added, "%d threads give other bits", threads);
    }
  }
}

void test_prox() {
  for (double step : {0.0, 1e-3, 0.9, 1e5}) {
    std::vector<std::vector<unsigned char>> first;
    for (int threads : kThreads) {
      Model m = fresh();
      const Table table = m.table();
      auto w = m.pointers(m.w);
      std::vector<Elements> old = m.w;
      cpu::prox(table, w.data(), m.strengths.data(), step, threads);
      std::vector<std::vector<unsigned char>> written;
      for (size_t r = 0; r < m.rows.size(); ++r) {
        const DType dtype = m.rows[r].dtype;
        const Strengths s = m.own(r);
        written.push_back(m.w[r].bytes);
        if (!first.empty()) continue;
        const long double u = is_double(dtype) ? 0x1p-53L : 0x1p-24L, t = rounded(step, dtype);
        for (int64_t i = 0; i < m.w[r].n; ++i) {
          const long double x = old[r].get(i), exact = prox(s, x, t);
          // fl(step * strength) is a step off by u, the divisor by another: the result moves
          // monotonically. Numerator and quotient: 2 u; then the dtype's own rounding.
          const long double spread =
              std::fabs(prox(s, x, t * (1 - 3 * u)) - prox(s, x, t * (1 + 3 * u)));
          const long double bound =
              1.01L * (spread + 2 * u * std::fabs(exact) + half_ulp(dtype, exact));
          CHECK(std::fabs(m.w[r].get(i) - exact) <= bound,
                "step %g row %zu [%lld]: %.17g, exact %.17Lg", step, r, (long long)i, m.w[r].get(i),
                exact);
        }
      }
      CHECK(m.guards_are_whole(), "memory beside a row was written");
      if (first.empty()) first = written;
      CHECK(first == written, "%d threads give other bits", threads);
    }
  }
}

void test_stats() {
  Model m = fresh();
  m.w[30].set(0, std::nan(""));
  m.w[31].set(m.w[31].n - 1, -std::numeric_limits<double>::infinity());
  const Table table = m.table();
  const auto w = m.pointers(m.w);
  for (int threads : kThreads) {
    std::vector<Stats> stats(m.rows.size());
    cpu::stats(table, w.data(), stats.data(), threads);
    for (size_t r = 0; r < m.rows.size(); ++r) {
      long double l1 = 0, l2 = 0, top = 0;
      int64_t zeros = 0, non_finite = 0;
      for (int64_t i = 0; i < m.w[r].n; ++i) {
        const long double x = m.w[r].get(i);
        l1 += std::fabs(x);
        l2 += x * x;
        top = std::isnan(x) || std::isnan(top) ? std::nanl("") : std::max(top, std::fabs(x));
        zeros += x == 0;
        non_finite += !std::isfinite(x);
      }
      const Stats& s = stats[r];
      CHECK(s.zeros == zeros && s.non_finite == non_finite, "row %zu: %lld zeros, %lld non-finite",
            r, (long long)s.zeros, (long long)s.non_finite);
      if (std::isfinite(l1)) {
        CHECK(s.max_abs == top, "row %zu: max %.17g, exact %.17Lg", r, s.max_abs, top);
        CHECK(std::fabs(s.l1 - l1) <= kSumBound * l1, "row %zu: l1 %.17g, exact %.17Lg", r, s.l1,
              l1);
        CHECK(std::fabs(s.l2_squared - l2) <= kSumBound * l2, "row %zu: l2 %.17g, exact %.17Lg", r,
              s.l2_squared, l2);
      } else {
        CHECK(std::isnan(s.max_abs) == std::isnan(top), "row %zu: max %.17g", r, s.max_abs);
        CHECK(std::isnan(s.l1) == std::isnan(l1), "row %zu: l1 %.17g", r, s.l1);
        CHECK(!std::isfinite(s.l1) && !std::isfinite(s.max_abs), "row %zu: l1 %.17g", r, s.l1);
      }
    }
  }
}

// Every 16-bit pattern, and around every midpoint of neighbours, through prox with step 0 and
// through accumulate of a float32 addend.
void test_conversions() {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    constexpr int64_t n = 65536;
    const Table table({{n, dtype, 0}}, {index_of("l2")});
    std::vector<uint16_t> w(n);
    for (int64_t i = 0; i < n; ++i) w[i] = static_cast<uint16_t>(i);
    void* pointer = w.data();
    const double strengths[kMaxStrengths] = {0};
    cpu::prox(table, &pointer, strengths, 0.0, 1);
    for (int64_t i = 0; i < n; ++i) {
      const double before = decode(dtype, static_cast<uint16_t>(i)), after = decode(dtype, w[i]);
      const bool same = std::isnan(before) ? std::isnan(after) : before == after;
      CHECK(same, "dtype %d pattern %04llx became %04x", static_cast<int>(dtype),
            static_cast<unsigned long long>(i), w[i]);
    }
    // w / (1 + 2 step lam) with a divisor that makes many different float32 results.
    for (double step : {0.25, 0.1, 1.0, 511.5, 2e-3, 1e-2}) {
      for (int64_t i = 0; i < n; ++i) w[i] = static_cast<uint16_t>(i);
      const double lam[kMaxStrengths] = {1.0};
      cpu::prox(table, &pointer, lam, step, 1);
      const float divisor = 1.0f + 2.0f * static_cast<float>(step);
      for (int64_t i = 0; i < n; ++i) {
        const double x = decode(dtype, static_cast<uint16_t>(i));
        const float quotient = static_cast<float>(x) / divisor;
        const uint16_t expected = encode(dtype, quotient);
        const bool same = std::isnan(x) ? std::isnan(decode(dtype, w[i])) : w[i] == expected;
        CHECK(same, "dtype %d: %04llx / %g: %04x, expected %04x", static_cast<int>(dtype),
              static_cast<unsigned long long>(i), divisor, w[i], expected);
      }
    }
    // 1 + an addend: halfway cases (ties to even) and their neighbours, and overflow to infinity.
    const double gap = dtype == DType::kBFloat16 ? 0x1p-7 : 0x1p-10;
    for (double addend : {gap / 2, gap * 1.5, gap / 2 - 0x1p-24, gap / 2 + 0x1p-23, gap * 0.75}) {
      uint16_t g = encode(dtype, 1.0), one = g;
      const Table single({{1, dtype, 0}}, {index_of("l1")});
      const void* from = &one;
      void* to = &g;
      const double lam[kMaxStrengths] = {addend};
      double sums[kMaxSums];
      cpu::accumulate(single, &from, &to, lam, 1.0, sums, 1);
      const uint16_t expected = encode(dtype, static_cast<float>(1.0 + addend));
      CHECK(g == expected, "dtype %d: 1 + %g: %04x, expected %04x", static_cast<int>(dtype), addend,
            g, expected);
    }
  }
}

// Scratch memory is reused between calls of different sizes, and by several calling threads.
void test_one_table_after_another() {
  for (int64_t n : {int64_t{1}, 50 * kChunk, int64_t{3}, 9 * kChunk + 1}) {
    std::vector<float> w(n, 0.5f);
    const Table table({{n, DType::kFloat32, 0}}, {index_of("l1")});
    const void* pointer = w.data();
    const double lam[kMaxStrengths] = {2.0};
    double sums[kMaxSums];
    cpu::value(table, &pointer, lam, sums, 4);
    CHECK(value_from_sums(table, sums, lam) == static_cast<double>(n), "%lld elements",
          (long long)n);
  }
  const Table empty(std::vector<Row>{}, {index_of("l1")});
  const double lam[kMaxStrengths] = {2.0};
  double sums[kMaxSums] = {7, 7};
  cpu::value(empty, nullptr, lam, sums, 2);
  CHECK(sums[0] == 0 && sums[1] == 0, "sums of nothing: %g, %g", sums[0], sums[1]);
}

void test_instruction_sets() {
  const auto sets = cpu::instruction_sets();
  CHECK(!sets.empty() && std::string(sets.back()) == "baseline", "%zu sets", sets.size());
  bool thrown = false;
  try {
    cpu::use_instruction_set("none of them");
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  CHECK(thrown, "an unknown set is accepted");
}

}  // namespace

int main() {
  test_instruction_sets();
  for (const char* name : cpu::instruction_sets()) {
    try {
      cpu::use_instruction_set(name);
    } catch (const std::invalid_argument& error) {
      std::printf("%s: skipped, %s\n", name, error.what());
      continue;
    }
    const int before = failures;
    test_value();
    test_gradient_and_accumulate();
    test_prox();
    test_stats();
    test_conversions();
    test_one_table_after_another();
    std::printf("%s: %d failures\n", name, failures - before);
  }
  if (failures) std::printf("%d checks failed\n", failures);
  return failures ? 1 : 0;
}
