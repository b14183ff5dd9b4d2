// The CPU sweeps: segments shared out over an OpenMP team, partials combined in segment order.

#include "../sweeps.h"

#include <atomic>
#include <cstring>
#include <string>

#include "kernels.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
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

const PenaltyKernels& kernels_for(const Kernels& kernels, const Table& table, const Row& row) {
  return kernels.penalty[table.penalties()[row.rule]][static_cast<int>(row.dtype)];
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

void combine(const Table& table, const double* partials, double* sums) {
  std::fill_n(sums, table.penalties().size() * kMaxSums, 0.0);
  for (size_t row = 0; row < table.rows().size(); ++row) {
    double* into = sums + table.rows()[row].rule * kMaxSums;
    for (int64_t s = table.first_segment(row); s < table.first_segment(row + 1); ++s)
      for (int k = 0; k < kMaxSums; ++k) into[k] += partials[s * kMaxSums + k];
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
           int threads) {
  const Kernels& kernels = *chosen().load()->kernels;
  double* partials = scratch<double>(table.segments() * kMaxSums);
  for_each_segment(table, threads, [&](int64_t segment, const Row& row, const Span& span) {
    kernels_for(kernels, table, row)
        .value(offset(w[span.row], row, span.begin), span.end - span.begin,
               strengths + row.rule * kMaxStrengths, partials + segment * kMaxSums);
  });
  combine(table, partials, sums);
}

void gradient(const Table& table, const void* const* w, void* const* g, const double* strengths,
              double scale, int threads) {
  const Kernels& kernels = *chosen().load()->kernels;
  for_each_segment(table, threads, [&](int64_t, const Row& row, const Span& span) {
    if (g[span.row] == nullptr) return;
    kernels_for(kernels, table, row)
        .gradient(offset(w[span.row], row, span.begin), offset(g[span.row], row, span.begin),
                  span.end - span.begin, strengths + row.rule * kMaxStrengths, scale);
  });
}

void accumulate(const Table& table, const void* const* w, void* const* g, const double* strengths,
                double scale, double* sums, int threads) {
  const Kernels& kernels = *chosen().load()->kernels;
  double* partials = scratch<double>(table.segments() * kMaxSums);
  for_each_segment(table, threads, [&](int64_t segment, const Row& row, const Span& span) {
    const PenaltyKernels& k = kernels_for(kernels, table, row);
    const void* from = offset(w[span.row], row, span.begin);
    const int64_t n = span.end - span.begin;
    const double* c = strengths + row.rule * kMaxStrengths;
    double* into = partials + segment * kMaxSums;
    if (g[span.row] == nullptr)
      k.value(from, n, c, into);
    else
      k.accumulate(from, offset(g[span.row], row, span.begin), n, c, scale, into);
  });
  combine(table, partials, sums);
}

void prox(const Table& table, void* const* w, const double* strengths, double step, int threads) {
  const Kernels& kernels = *chosen().load()->kernels;
  for_each_segment(table, threads, [&](int64_t, const Row& row, const Span& span) {
    if (w[span.row] == nullptr) return;
    kernels_for(kernels, table, row)
        .prox(offset(w[span.row], row, span.begin), span.end - span.begin,
              strengths + row.rule * kMaxStrengths, step);
  });
}

void prox_in_metric(const Table& table, void* const* w, const Metric* metrics,
                    const double* strengths, double* sums, int threads) {
  const Kernels& kernels = *chosen().load()->kernels;
  double* partials = scratch<double>(table.segments() * kMaxSums);
  for_each_segment(table, threads, [&](int64_t segment, const Row& row, const Span& span) {
    if (w[span.row] == nullptr) return;
    const Metric& metric = metrics[span.row];
    const void* moment = metric.moment;
    if (moment != nullptr)
      moment = static_cast<const char*>(moment) +
               span.begin * (metric.float32 ? sizeof(float) : item_size(row.dtype));
    kernels_for(kernels, table, row)
        .prox_in_metric[metric.float32](offset(w[span.row], row, span.begin), moment,
                                        span.end - span.begin, strengths + row.rule * kMaxStrengths,
                                        metric, partials + segment * kMaxSums);
  });
  combine(table, partials, sums);
}

void stats(const Table& table, const void* const* w, Stats* stats, int threads) {
  const Kernels& kernels = *chosen().load()->kernels;
  Stats* partials = scratch<Stats>(table.segments());
  for_each_segment(table, threads, [&](int64_t segment, const Row& row, const Span& span) {
    kernels.stats[static_cast<int>(row.dtype)](offset(w[span.row], row, span.begin),
                                               span.end - span.begin, partials + segment);
  });
  for (size_t row = 0; row < table.rows().size(); ++row) {
    Stats total;
    for (int64_t s = table.first_segment(row); s < table.first_segment(row + 1); ++s) {
      const Stats& part = partials[s];
      total.l1 += part.l1;
      total.l2_squared += part.l2_squared;
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

void use_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

double value_from_sums(const Table& table, const double* sums, const double* strengths) {
  using Value = double (*)(const double*, const double*);
#define PYREG_VALUE(P) [](const double* s, const double* c) { return P::value(s, c); },
  static const Value kValues[] = {PYREG_PENALTIES(PYREG_VALUE)};
#undef PYREG_VALUE
  double total = 0;
  for (size_t rule = 0; rule < table.penalties().size(); ++rule)
    total +=
        kValues[table.penalties()[rule]](sums + rule * kMaxSums, strengths + rule * kMaxStrengths);
  return total;
}

}  // namespace pyreg
