// Each optimizer's update, alone and with an elastic net, on every instruction set and dtype,
// against its formula in long double.

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "half.h"
#include "sweeps.h"

namespace {

using namespace pyreg;
using Exact = long double;

constexpr int64_t kElements = 2 * kChunk + 37;
constexpr double kNumber[kNumbers] = {0.5, 0.99, 0.1, 0.1, 0.9, 0.1, 0.3, 1.5, 0.1};
constexpr double kStrengths[kMaxStrengths] = {0.3, 0.2};
constexpr double kScale = 2, kNumerator = 0.4;  // 1 / kNumber[0]; of the metric

Exact get(DType dtype, const void* at, int64_t i) {
  if (dtype == DType::kFloat64) return static_cast<const double*>(at)[i];
  if (dtype == DType::kFloat32) return static_cast<const float*>(at)[i];
  if (dtype == DType::kBFloat16) return to_float(static_cast<const BFloat16*>(at)[i]);
  return to_float(static_cast<const Float16*>(at)[i]);
}

void put(DType dtype, void* at, int64_t i, double x) {
  if (dtype == DType::kFloat64) static_cast<double*>(at)[i] = x;
  const float narrow = static_cast<float>(x);
  if (dtype == DType::kFloat32) static_cast<float*>(at)[i] = narrow;
  if (dtype == DType::kBFloat16) static_cast<BFloat16*>(at)[i] = to_bfloat16(narrow);
  if (dtype == DType::kFloat16) static_cast<Float16*>(at)[i] = to_float16(narrow);
}

// The weight that the optimizer ends at, and its metric; the states are changed.
std::pair<Exact, Exact> formula(const std::string& name, Exact w, Exact g, Exact* s) {
  const double* n = kNumber;
  g = n[0] * g + n[2] * w * n[1];
  w *= n[1];
  const auto ends_with = [&](const std::string& end) {
    return name.size() >= end.size() && name.substr(name.size() - end.size()) == end;
  };
  if (name.rfind("adam", 0) == 0) {
    s[0] += n[3] * (g - s[0]);
    s[1] = n[4] * s[1] + n[5] * g * g;
    if (ends_with("amsgrad")) s[2] = std::max(s[1], s[2]);
    const Exact q = n[7] * std::sqrt(s[ends_with("amsgrad") ? 2 : 1]) + n[8];
    return {w - n[6] * s[0] / q, q};
  }
  if (name == "adagrad") {
    s[0] += g * g;
    return {w - n[3] * g / (std::sqrt(s[0]) + n[4]), std::sqrt(s[0]) + n[4]};
  }
  if (name.rfind("sgd", 0) == 0) {
    if (name == "sgd") return {w - n[3] * g, 1};
    s[0] = n[4] * s[0] + n[5] * g;
    return {w - n[3] * (ends_with("nesterov") ? g + n[4] * s[0] : s[0]), 1};
  }
  const bool centered = name.find("centered") != std::string::npos;
  s[0] = n[4] * s[0] + n[5] * g * g;
  if (centered) s[1] += n[5] * (g - s[1]);
  const Exact q = std::sqrt(s[0] - (centered ? s[1] * s[1] : 0)) + n[6];
  if (!ends_with("momentum")) return {w - n[3] * g / q, q};
  Exact& buffer = s[centered ? 2 : 1];
  buffer = n[7] * buffer + g / q;
  return {w - n[3] * buffer, q};
}

int check(int update, const std::string& name, int states, DType dtype, bool float32, int with) {
  const DType kind = float32 ? DType::kFloat32 : dtype;
  std::vector<double> w(kElements), g(kElements), s[kMaxStates];  // enough bytes for any dtype
  std::mt19937 random(7);
  std::uniform_real_distribution<double> around(-1, 1), squares(0.5, 1.5), means(-0.5, 0.5);
  Update todo;
  for (int k = 0; k < states; ++k) s[k].resize(kElements), todo.states[k] = s[k].data();
  std::vector<Exact> was[kMaxStates + 2];
  for (int64_t i = 0; i < kElements; ++i) {
    put(dtype, w.data(), i, around(random));
    put(dtype, g.data(), i, around(random));
    // A square must exceed the mean's where one is centered.
    const bool adam = name.rfind("adam", 0) == 0;
    for (int k = 0; k < states; ++k)
      put(kind, s[k].data(), i, (k > 0) == adam ? squares(random) : means(random));
    was[3].push_back(get(dtype, w.data(), i));
    was[4].push_back(get(dtype, g.data(), i));
    for (int k = 0; k < states; ++k) was[k].push_back(get(kind, s[k].data(), i));
  }
  todo.update = update, todo.float32 = float32, todo.penalised = with > 0;
  todo.numbers = kNumber, todo.metric.numerator = kNumerator;
  const Table table({{kElements, dtype, 0}}, {index_of<ElasticNet>});
  void* weights = w.data();
  const void* gradients = g.data();
  double sums[kMaxSums];
  const int64_t zeros =
      cpu::step(table, &weights, &gradients, &todo, with == 2, kStrengths, kScale, sums, 2);
  // Some 20 roundings of terms of at most 8, and the dtype's own.
  const auto limit = [&](DType of, Exact x) {
    const Exact u[] = {0x1p-24L, 0x1p-53L, 0x1p-8L, 0x1p-11L};  // of each dtype
    return 160 * u[dtype == DType::kFloat64] + u[static_cast<int>(of)] * std::abs(x);
  };
  int64_t off = 0, none = 0;
  for (int64_t i = 0; i < kElements; ++i) {
    Exact x = was[3][i], y = was[4][i], now[kMaxStates] = {};
    const Exact sign = (x > 0) - (x < 0), l1 = kStrengths[0], l2 = kStrengths[1];
    for (int k = 0; k < states; ++k) now[k] = was[k][i];
    if (with == 1) y += kScale * (l1 * sign + 2 * l2 * x);
    auto [to, q] = formula(name, x, y, now);
    const Exact t = kNumerator / q;
    if (with == 2) to = std::copysign(std::max(std::abs(to) - t * l1, 0.0L), to) / (1 + 2 * t * l2);
    const Exact found = get(dtype, w.data(), i);
    off += !(std::abs(found - to) <= limit(dtype, to));
    none += found == 0;
    for (int k = 0; k < states; ++k)
      off += !(std::abs(get(kind, s[k].data(), i) - now[k]) <= limit(kind, now[k]));
  }
  if (off == 0 && (with == 0 || zeros == none)) return 0;
  std::printf("%s, %s, dtype %d, float32 states %d, with %d: %lld off, %lld zeros, not %lld\n",
              cpu::instruction_set(), name.c_str(), int(dtype), float32, with, (long long)off,
              (long long)none, (long long)zeros);
  return 1;
}

}  // namespace

int main() {
  int failures = 0, update = 0;
  for (const char* set : cpu::instruction_sets()) {
    try {
      cpu::use_instruction_set(set);
    } catch (const std::invalid_argument&) {  // this machine lacks it
      continue;
    }
    update = 0;
#define CHECK(U)                                                                         \
  for (int dtype = 0; dtype < kDTypes; ++dtype)                                          \
    for (int of = 0; of < 6; ++of)                                                       \
      failures += check(update, U::name, U::kStates, DType(dtype), of % 2 != 0, of / 2); \
  ++update;
    PYREG_UPDATES(CHECK)
#undef CHECK
  }
  std::printf("%d of %d updates failed\n", failures, update);
  return failures > 0;
}
