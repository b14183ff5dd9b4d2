// What a kernel is told: one parameter of at most 32,764 bytes, passed by value.
//
// It holds the tensors themselves, 24 bytes each, as long as they fit: no copy to the device, no
// memory to keep. Beyond that it points to a table in device memory. Either way a kernel sees the
// same entries. Host code fills it in (layout.h), so g++ compiles this file too.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../table.h"
#include "../updates.h"

#if defined(__CUDACC__)
#define PYREG_DEVICE __device__ __forceinline__
#define PYREG_DEVICE_CALL __device__ __noinline__  // with registers of its own
#else
#define PYREG_DEVICE inline
#define PYREG_DEVICE_CALL inline
#endif

namespace pyreg::cuda {

enum class Sweep : int {
  kValue,
  kGradient,
  kAccumulate,
  kProx,
  kProxInMetric,
  kStats,
  kStep  // an optimizer's
};
constexpr int kSweeps = 7;

// The penalties that a kernel knows: those of PYREG_ELEMENTARY, or all.
enum class Family : int { kElementary, kAll };
constexpr int kFamilies = 2;

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarps * kWarp;

template <Sweep S>
constexpr bool kWritesGradient = S == Sweep::kGradient || S == Sweep::kAccumulate;
template <Sweep S>
constexpr bool kReadsBeside = S == Sweep::kAccumulate || S == Sweep::kProxInMetric;
template <Sweep S>
constexpr bool kWritesTensor = S == Sweep::kProx || S == Sweep::kProxInMetric;
constexpr bool has_totals(Sweep s) { return s != Sweep::kGradient && s != Sweep::kProx; }
template <Sweep S>
constexpr bool kHasTotals = has_totals(S);
// Numbers in a partial: the sums of a rule, after a step its zeros too; or what `stats` tells of a
// row.
template <Sweep S>
constexpr int kColumns = S == Sweep::kStats  ? 5
                         : S == Sweep::kStep ? kMaxSums + 1
                                             : kMaxSums;

// Tells the compiler what a pointer out of a table points to: else it loads by a slower way.
template <class T>
PYREG_DEVICE T* in_device_memory(std::conditional_t<std::is_const_v<T>, const void*, void*> p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return static_cast<T*>(p);
}

template <class T>
PYREG_DEVICE T load(const T* p) {
#if defined(__CUDA_ARCH__)
  return __ldca(p);
#else
  return *p;
#endif
}

// A number, or the address of one in device memory: so a graph's replay reads it anew.
enum class ScalarKind : uint8_t { kNumber, kFloat32, kFloat64 };
struct Scalar {
  uint64_t bits;
};
PYREG_DEVICE double read(Scalar s, ScalarKind kind) {
  if (kind == ScalarKind::kFloat64) return load(reinterpret_cast<const double*>(s.bits));
  if (kind == ScalarKind::kFloat32) return load(reinterpret_cast<const float*>(s.bits));
  double number;
  __builtin_memcpy(&number, &s.bits, sizeof number);
  return number;
}

constexpr uint32_t kNone = ~0u;  // no chunk, no segment

// A rule's segments are [first_segment, the next rule's first_segment).
struct Rule {
  Scalar strengths[kMaxStrengths];
  ScalarKind kinds[kMaxStrengths];
  uint8_t penalty;
  uint32_t first_segment;
};

// A tensor. Its chunks and segments are numbered from first_chunk and first_segment up to the next
// entry's; `last` is the number of elements in its last chunk, less one.
struct Entry {
  void* w;  // null: a prox leaves the tensor out
  void* g;  // its gradient or moment; null: none
  uint32_t first_chunk;
  uint32_t first_segment;
  uint32_t rule;
  uint16_t last;
  uint8_t dtype;
};
static_assert(sizeof(Entry) == 32);

// A tensor's metric, as pyreg::Metric of sweeps.h.
struct RowMetric {
  Scalar numbers[3];  // numerator, factor, offset
  ScalarKind kinds[3];
  bool root;
  bool float32;  // the moment's dtype: float32, or else the tensor's own
};
static_assert(sizeof(RowMetric) == 32);

// What an optimizer's step does to a tensor, as pyreg::Update of sweeps.h.
struct RowStep {
  void* states[kMaxStates];  // null: none
  void* master;              // float32; null: none
  uint32_t key;              // where random roundings begin
  uint32_t set;              // which of the numbers are its own
  uint8_t update;
  bool float32;  // the states' dtype: float32, or else the tensor's own
  bool penalised;
  bool at_random;
};
static_assert(sizeof(RowStep) == 48);

// What it is told of all.
constexpr int kSetNumbers = kNumbers + 3;  // the last three: the metric's, as in RowMetric
struct StepFacts {
  const double* numbers;  // [sets * kSetNumbers] in device memory; null: they lie behind the rows
  Scalar grad_scale;      // what gradients are divided by
  Scalar found_inf;       // where it is not 0, nothing is written
  ScalarKind grad_scale_kind, found_inf_kind;
  bool prox;  // or else the penalty's gradient
};
static_assert(sizeof(StepFacts) == 32);

// The same in 24 bytes, where the numbers are small enough.
struct PackedEntry {
  static constexpr int kChunkBits = 27, kSegmentBits = 15, kRuleBits = 8, kLastBits = 12;
  static_assert(kChunkBits + kSegmentBits + kRuleBits + kLastBits + 2 == 64);
  static_assert((1 << kLastBits) >= kChunk && kDTypes <= 4);

  void* w;
  void* g;
  uint64_t bits;  // from the lowest: dtype, last, rule, first segment, first chunk

  PYREG_DEVICE uint32_t first_chunk() const {
    return static_cast<uint32_t>(bits >> (2 + kLastBits + kRuleBits + kSegmentBits));
  }
  PYREG_DEVICE Entry unpack() const {
    Entry e;
    e.w = w;
    e.g = g;
    e.first_chunk = first_chunk();
    e.first_segment = field(2 + kLastBits + kRuleBits, kSegmentBits);
    e.rule = field(2 + kLastBits, kRuleBits);
    e.last = static_cast<uint16_t>(field(2, kLastBits));
    e.dtype = static_cast<uint8_t>(field(0, 2));
    return e;
  }
  static bool fits(const Entry& e) {
    return e.first_chunk < 1u << kChunkBits && e.first_segment < 1u << kSegmentBits &&
           e.rule < 1u << kRuleBits;
  }
  static PackedEntry pack(const Entry& e) {
    uint64_t bits = e.first_chunk;
    bits = bits << kSegmentBits | e.first_segment;
    bits = bits << kRuleBits | e.rule;
    bits = bits << kLastBits | e.last;
    bits = bits << 2 | e.dtype;
    return {e.w, e.g, bits};
  }

 private:
  PYREG_DEVICE uint32_t field(int at, int width) const {
    return static_cast<uint32_t>(bits >> at) & ((1u << width) - 1);
  }
};

constexpr int kParameterBytes = 32764;
constexpr int kRules = 32;        // by value
constexpr int kEntries = 1329;    // by value, a last one included that only ends the one before
constexpr int kEntriesInMetric =  // with a metric each
    1 + (kEntries - 1) * sizeof(PackedEntry) / (sizeof(PackedEntry) + sizeof(RowMetric));

struct Parameter {
  const Entry* table;      // [rows + 1] in device memory; null: `entries` below
  const Rule* rule_table;  // [rules + 1]
  // value, accumulate, prox_in_metric, steps: the value, the sums [rules * columns], each rule's
  // value [rules], the value as float32; after a step the zeros, int64.
  // stats: [rows * columns].
  double* out;
  double* partials;  // [segments * columns]
  uint32_t* done;    // blocks that have finished; 0 between launches
  Scalar scale;      // of gradients, or the step of prox
  ScalarKind scale_kind;
  uint32_t rows, rules, chunks;
  uint32_t run;    // chunks in a segment
  uint32_t share;  // chunks that a block takes, to within a segment
  Rule rule_entries[kRules + 1];
  PackedEntry entries[kEntries];

  PYREG_DEVICE Entry entry(uint32_t i) const { return table ? table[i] : entries[i].unpack(); }
  PYREG_DEVICE uint32_t first_chunk(uint32_t i) const {
    return table ? table[i].first_chunk : entries[i].first_chunk();
  }
  PYREG_DEVICE Rule rule(uint32_t i) const { return rule_table ? rule_table[i] : rule_entries[i]; }
  // prox_in_metric: [rows], behind all else.
  PYREG_DEVICE RowMetric metric(uint32_t i) const {
    return table ? reinterpret_cast<const RowMetric*>(rule_table + rules + 1)[i]
                 : reinterpret_cast<const RowMetric*>(entries + rows + 1)[i];
  }
  // Steps: the facts, [rows], and the numbers, if they are not elsewhere.
  PYREG_DEVICE StepFacts step_facts() const { return table ? *table_facts() : *own_facts(); }
  PYREG_DEVICE RowStep step(uint32_t i) const {
    return table ? steps_of(table_facts())[i] : steps_of(own_facts())[i];
  }
  PYREG_DEVICE double step_number(const StepFacts& facts, uint32_t set, int k) const {
    const uint32_t i = set * kSetNumbers + k;
    if (facts.numbers != nullptr) return load(in_device_memory<const double>(facts.numbers) + i);
    return table ? numbers_of(table_facts())[i] : numbers_of(own_facts())[i];
  }

 private:
  PYREG_DEVICE const StepFacts* table_facts() const {
    return reinterpret_cast<const StepFacts*>(rule_table + rules + 1);
  }
  PYREG_DEVICE const StepFacts* own_facts() const {
    return reinterpret_cast<const StepFacts*>(entries + rows + 1);
  }
  PYREG_DEVICE static const RowStep* steps_of(const StepFacts* facts) {
    return reinterpret_cast<const RowStep*>(facts + 1);
  }
  PYREG_DEVICE const double* numbers_of(const StepFacts* facts) const {
    return reinterpret_cast<const double*>(steps_of(facts) + rows);
  }
};
static_assert(sizeof(Parameter) <= kParameterBytes, "passed by value");
static_assert(sizeof(Parameter) + sizeof(PackedEntry) > kParameterBytes, "room for one more");

}  // namespace pyreg::cuda
