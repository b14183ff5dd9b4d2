// The CPU sweeps: segments shared out over an OpenMP team, partials combined in segment order.

#include "../sweeps.h"

#include <atomic>
#include <cstring>
#include <numeric>
#include <string>

#include "../combine.h"
#include "kernels.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace pyreg::cpu {

#define PYREG_DECLARE(isa)      \
  namespace isa {               \
  extern const Kernels kernels; \
  }
PYREG_DECLARE(baseline)
#if defined(PYREG_X86_LEVELS)
PYREG_DECLARE(x86_64_v3)
PYREG_DECLARE(x86_64_v4)
#endif
#undef PYREG_DECLARE

namespace {

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

// Widest first.
const InstructionSet kInstructionSets[] = {
#if defined(PYREG_X86_LEVELS)
    {"x86-64-v4", &x86_64_v4::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi2");
     }},
    {"x86-64-v3", &x86_64_v3::kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
     }},
#endif
    {"baseline", &baseline::kernels, [] { return true; }},
};

const InstructionSet* widest() {
#if defined(PYREG_X86_LEVELS)
  __builtin_cpu_init();
#endif
  for (const InstructionSet& set : kInstructionSets)
    if (set.supported()) return &set;
  return nullptr;  // not reached: the last one always is
}

std::atomic<const InstructionSet*>& chosen() {
  static std::atomic<const InstructionSet*> set{widest()};
  return set;
}

int penalty_of(const Table& table, const Row& row) { return table.penalties()[row.rule]; }

const DTypeKernels& kernels_for(const Kernels& kernels, const Row& row) {
  return kernels.of[static_cast<int>(row.dtype)];
}

template <class Pointer>
Pointer offset(Pointer base, const Row& row, int64_t elements) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  return static_cast<Byte*>(base) + elements * item_size(row.dtype);
}

// Below this many elements a team costs more than it saves. Results do not depend on it.
constexpr int64_t kSerial = 32768;

// body(segment, row, span) for every segment. A worker takes a few neighbouring segments at a time:
// one binary search, then increments.
template <class Body>
void for_each_segment(const Table& table, int threads, const Body& body) {
  const int64_t segments = table.segments();
  if (table.numel() <= kSerial) threads = 1;
  const int64_t take = std::clamp<int64_t>(segments / (16 * std::max(threads, 1)), 1, 32);
  const int64_t takes = (segments + take - 1) / take;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
#endif
  for (int64_t i = 0; i < takes; ++i) {
    const int64_t begin = i * take, end = std::min(begin + take, segments);
    Span span = table.locate(begin);
    for (int64_t segment = begin; segment < end; ++segment) {
      span = table.next(span, segment);
      body(segment, table.rows()[span.row], span);
    }
  }
}

// One partial per segment, reused from call to call by each calling thread.
template <class T>
T* scratch(int64_t n) {
  thread_local std::vector<T> memory;
  memory.assign(n, T{});
  return memory.data();
}

// [rules][kMaxSums]: each rule's partials, in the order of its rows.
void combine_by_rule(const Table& table, const double* partials, double* sums) {
  const std::vector<int32_t>& order = table.rows_by_rule();
  std::vector<double> gathered;
  auto begin = order.begin();
  for (size_t rule = 0; rule < table.penalties().size(); ++rule) {
    const auto end = std::find_if(begin, order.end(), [&](int32_t row) {
      return table.rows()[row].rule != static_cast<int>(rule);
    });
    const double* own = partials;
    int64_t n = 0;
    if (begin != end && *(end - 1) - *begin == end - begin - 1) {  // they lie together
      own += table.first_segment(*begin) * kMaxSums;
      n = table.first_segment(*(end - 1) + 1) - table.first_segment(*begin);
    } else {
      gathered.clear();
      for (auto row = begin; row != end; ++row)
        gathered.insert(gathered.end(), partials + table.first_segment(*row) * kMaxSums,
                        partials + table.first_segment(*row + 1) * kMaxSums);
      own = gathered.data();
      n = static_cast<int64_t>(gathered.size()) / kMaxSums;
    }
    for (int k = 0; k < kMaxSums; ++k) sums[rule * kMaxSums + k] = combine(own + k, n, kMaxSums);
    begin = end;
  }
}

}  // namespace

const char* instruction_set() { return chosen().load()->name; }

std::vector<const char*> instruction_sets() {
  std::vector<const char*> names;
  for (const InstructionSet& set : kInstructionSets) names.push_back(set.name);
  return names;
}

void use_instruction_set(const char* name) {
  for (const InstructionSet& set : kInstructionSets) {
    if (std::strcmp(set.name, name) != 0) continue;
    if (!set.supported())
      throw std::invalid_argument(std::string("this machine lacks instruction set ") + name);
    chosen().store(&set);
    return;
  }
  throw std::invalid_argument(std::string("unknown instruction set ") + name);
}

bool has_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

void value(const Table& table, const void* const* w, const double* strengths, double* sums,
           int threads, const Anchor* anchors) {
  const Kernels& kernels = *chosen().load()->kernels;
  double* partials = scratch<double>(table.segments() * kMaxSums);
  for_each_segment(table, threads, [&](int64_t segment, const Row& row, const Span& span) {
    const void* from = offset(w[span.row], row, span.begin);
    const int64_t n = span.end - span.begin;
    const double* c = strengths + row.rule * kMaxStrengths;
    double* into = partials + segment * kMaxSums;
    const DTypeKernels& k = kernels_for(kernels, row);
    const int penalty = penalty_of(table, row);
    if (anchors != nullptr)
      k.anchored_value(penalty, from, anchors[span.row], span.begin, n, c, into);
    else
      k.value(penalty, from, n, c, into);
  });
  combine_by_rule(table, partials, sums);
}

void gradient(const Table& table, const void* const* w, void* const* g, const double* strengths,
              double scale, int threads, const Anchor* anchors) {
  const Kernels& kernels = *chosen().load()->kernels;
  for_each_segment(table, threads, [&](int64_t, const Row& row, const Span& span) {
    if (g[span.row] == nullptr) return;
    const void* from = offset(w[span.row], row, span.begin);
    void* into = offset(g[span.row], row, span.begin);
    const int64_t n = span.end - span.begin;
    const double* c = strengths + row.rule * kMaxStrengths;
    const DTypeKernels& k = kernels_for(kernels, row);
    const int penalty = penalty_of(table, row);
    if (anchors != nullptr)
      k.anchored_gradient(penalty, from, into, anchors[span.row], span.begin, n, c, scale, nullptr);
    else
      k.gradient(penalty, from, into, n, c, scale);
  });
}

void accumulate(const Table& table, const void* const* w, void* const* g, const double* strengths,
                double scale, double* sums, int threads, const Anchor* anchors) {
  const Kernels& kernels = *chosen().load()->kernels;
  double* partials = scratch<double>(table.segments() * kMaxSums);
  for_each_segment(table, threads, [&](int64_t segment, const Row& row, const Span& span) {
    const DTypeKernels& k = kernels_for(kernels, row);
    const int penalty = penalty_of(table, row);
    const void* from = offset(w[span.row], row, span.begin);
    void* add_to = g[span.row];
    if (add_to != nullptr) add_to = offset(add_to, row, span.begin);
    const int64_t n = span.end - span.begin;
    const double* c = strengths + row.rule * kMaxStrengths;
    double* into = partials + segment * kMaxSums;
    if (anchors == nullptr && add_to == nullptr)
      k.value(penalty, from, n, c, into);
    else if (anchors == nullptr)
      k.accumulate(penalty, from, add_to, n, c, scale, into);
    else if (add_to == nullptr)
      k.anchored_value(penalty, from, anchors[span.row], span.begin, n, c, into);
    else
      k.anchored_gradient(penalty, from, add_to, anchors[span.row], span.begin, n, c, scale, into);
  });
  combine_by_rule(table, partials, sums);
}

void prox(const Table& table, void* const* w, const double* strengths, double step, int threads,
          const Anchor* anchors) {
  const Kernels& kernels = *chosen().load()->kernels;
  Metric metric;
  metric.numerator = step;
  for_each_segment(table, threads, [&](int64_t, const Row& row, const Span& span) {
    if (w[span.row] == nullptr) return;
    void* at = offset(w[span.row], row, span.begin);
    const int64_t n = span.end - span.begin;
    const double* c = strengths + row.rule * kMaxStrengths;
    const DTypeKernels& k = kernels_for(kernels, row);
    const int penalty = penalty_of(table, row);
    if (anchors != nullptr)
      k.anchored_prox(penalty, at, anchors[span.row], span.begin, n, c, metric, nullptr);
    else
      k.prox(penalty, at, n, c, step);
  });
}

void prox_in_metric(const Table& table, void* const* w, const Metric* metrics,
                    const double* strengths, double* sums, int threads, const Anchor* anchors) {
  const Kernels& kernels = *chosen().load()->kernels;
  double* partials = scratch<double>(table.segments() * kMaxSums);
  for_each_segment(table, threads, [&](int64_t segment, const Row& row, const Span& span) {
    if (w[span.row] == nullptr) return;
    void* at = offset(w[span.row], row, span.begin);
    const int64_t n = span.end - span.begin;
    const double* c = strengths + row.rule * kMaxStrengths;
    double* into = partials + segment * kMaxSums;
    Metric metric = metrics[span.row];
    if (metric.moment != nullptr)
      metric.moment = static_cast<const char*>(metric.moment) +
                      span.begin * (metric.float32 ? sizeof(float) : item_size(row.dtype));
    const DTypeKernels& k = kernels_for(kernels, row);
    const int penalty = penalty_of(table, row);
    if (anchors != nullptr)
      k.anchored_prox(penalty, at, anchors[span.row], span.begin, n, c, metric, into);
    else
      k.prox_in_metric[metric.float32](penalty, at, metric.moment, n, c, metric, into);
  });
  combine_by_rule(table, partials, sums);
}

namespace {

// The strengths of L1, L2 and elastic net as of one penalty, and their sums back.
Joined as_elastic_net(int penalty, const double* c) {
  Joined joined;
  if (penalty != index_of<L2>) joined.l1 = c[0];
  if (penalty != index_of<L1>) joined.l2 = c[penalty == index_of<ElasticNet> ? 1 : 0];
  return joined;
}
void add_sums(int penalty, const double* from, double* sums) {
  sums[0] += from[penalty == index_of<L2> ? 1 : 0];
  if (penalty == index_of<ElasticNet>) sums[1] += from[1];
}

}  // namespace

int64_t step(const Table& table, void* const* w, const void* const* g, const Update* updates,
             bool prox, const double* strengths, double scale, double* sums, int threads) {
  const Kernels& kernels = *chosen().load()->kernels;
  double* partials = scratch<double>(table.segments() * kMaxSums);
  std::atomic<int64_t> zeros{0};
  for_each_segment(table, threads, [&](int64_t segment, const Row& row, const Span& span) {
    if (w[span.row] == nullptr) return;
    const Update& update = updates[span.row];
    const bool wide = update.master != nullptr || update.at_random;
    const int own = static_cast<int>(row.dtype), penalty = penalty_of(table, row);
    const int dtype = wide ? static_cast<int>(DType::kFloat32) : own;
    const bool float32 = update.float32 && !wide;  // and not what the kernels' own dtype is
    const StepKernel step = kernels.step[dtype][float32];
    const DTypeKernels& k = kernels.of[dtype];
    const size_t state_bytes = update.float32 ? sizeof(float) : item_size(row.dtype);
    const double* c = strengths + row.rule * kMaxStrengths;
    double* into = partials + segment * kMaxSums;
    alignas(64) char with_gradient[kChunk * sizeof(double)];
    alignas(64) float wide_weights[kChunk], wide_gradient[kChunk];
    int64_t zero = 0;
    for (int64_t at = span.begin; at < span.end; at += kChunk) {
      const int64_t n = std::min<int64_t>(kChunk, span.end - at);
      void* weights = offset(w[span.row], row, at);
      const void* gradient = offset(g[span.row], row, at);
      void* const stored = weights;
      if (wide) {
        kernels.widen[own](gradient, n, wide_gradient);
        gradient = wide_gradient;
        if (update.master == nullptr) kernels.widen[own](weights, n, wide_weights);
        weights = update.master == nullptr ? wide_weights : static_cast<float*>(update.master) + at;
      }
      void* states[kMaxStates] = {};
      for (int s = 0; s < kMaxStates; ++s)
        if (update.states[s] != nullptr)
          states[s] = static_cast<char*>(update.states[s]) + at * state_bytes;
      Metric metric = update.metric;
      metric.float32 = float32;
      if (metric.moment != nullptr)
        metric.moment = static_cast<const char*>(metric.moment) + at * state_bytes;
      Joined joined;
      if (update.penalised && penalty < kElementary) {
        double found[2] = {};
        joined = as_elastic_net(penalty, c);
        joined.with = prox ? With::kProx : With::kGradient;
        joined.by = prox ? metric.numerator : scale;
        joined.sums = found;
        joined.zeros = &zero;
        step(update.update, weights, gradient, states, n, update.numbers, joined);
        add_sums(penalty, found, into);
      } else if (update.penalised) {  // before or after it: they find the chunk in the cache
        if (!prox) {
          std::memcpy(with_gradient, gradient, n * item_size(static_cast<DType>(dtype)));
          gradient = with_gradient;
          k.accumulate(penalty, weights, with_gradient, n, c, scale, into);
        }
        step(update.update, weights, gradient, states, n, update.numbers, joined);
        if (prox) k.prox_in_metric[float32](penalty, weights, metric.moment, n, c, metric, into);
        zero += k.zeros(weights, n);
      } else {
        step(update.update, weights, gradient, states, n, update.numbers, joined);
      }
      if (!wide) continue;
      const float* result = static_cast<const float*>(weights);
      if (update.at_random)
        kernels.narrow_at_random(result, at, n, update.key, stored);
      else
        kernels.narrow[own](result, n, stored);
    }
    if (update.penalised) zeros += zero;
  });
  combine_by_rule(table, partials, sums);
  return zeros;
}

void stats(const Table& table, const void* const* w, Stats* stats, int threads) {
  const Kernels& kernels = *chosen().load()->kernels;
  Stats* partials = scratch<Stats>(table.segments());
  for_each_segment(table, threads, [&](int64_t segment, const Row& row, const Span& span) {
    kernels_for(kernels, row)
        .stats(offset(w[span.row], row, span.begin), span.end - span.begin, partials + segment);
  });
  constexpr int64_t kStatsStep = sizeof(Stats) / sizeof(double);
  for (size_t row = 0; row < table.rows().size(); ++row) {
    const int64_t begin = table.first_segment(row), n = table.first_segment(row + 1) - begin;
    Stats total;
    if (n > 0) total.l1 = combine(&partials[begin].l1, n, kStatsStep);
    if (n > 0) total.l2_squared = combine(&partials[begin].l2_squared, n, kStatsStep);
    for (int64_t s = begin; s < begin + n; ++s) {
      const Stats& part = partials[s];
      total.max_abs = std::max(total.max_abs, part.max_abs);
      total.zeros += part.zeros;
      total.non_finite += part.non_finite;
    }
    if (total.l1 != total.l1) total.max_abs = total.l1;  // a NaN among the elements
    stats[row] = total;
  }
}

}  // namespace pyreg::cpu

namespace pyreg {

std::vector<double> values_from_sums(const Table& table, const double* sums,
                                     const double* strengths) {
  using Value = double (*)(const double*, const double*);
#define PYREG_VALUE(P) [](const double* s, const double* c) { return P::value(s, c); },
  static const Value kValues[] = {PYREG_PENALTIES(PYREG_VALUE)};
#undef PYREG_VALUE
  std::vector<double> values;
  for (size_t rule = 0; rule < table.penalties().size(); ++rule)
    values.push_back(
        kValues[table.penalties()[rule]](sums + rule * kMaxSums, strengths + rule * kMaxStrengths));
  return values;
}

double value_from_sums(const Table& table, const double* sums, const double* strengths) {
  const std::vector<double> values = values_from_sums(table, sums, strengths);
  return std::accumulate(values.begin(), values.end(), 0.0);
}

}  // namespace pyreg
