// The library's face: one function per sweep. No torch, no Python.
//
// w[i] and g[i] point at row i's elements, in storage order. strengths is [rules][kMaxStrengths].
// sums is [rules][kMaxSums], written in full: what Penalty::value needs, in double. Results are
// bitwise the same for any number of threads. N is the parameters' size in bytes.
#pragma once

#include "table.h"
#include "updates.h"

namespace pyreg {

struct Stats {
  double l1 = 0, l2_squared = 0, max_abs = 0;
  int64_t zeros = 0, non_finite = 0;
};

// A row's metric: the step of element i is numerator / (factor * root(moment_i) + offset), where
// root is the square root or nothing; without a moment it is the numerator.
struct Metric {
  const void* moment = nullptr;
  bool float32 = false;  // the moment's dtype: float32, or else the row's own
  bool root = true;
  double numerator = 0, factor = 1, offset = 0;
};

// What an optimizer's step does to a row.
struct Update {
  int update = 0;        // of updates.h
  bool float32 = false;  // the states' dtype: float32, or else the row's own
  bool penalised = false;
  // A 16-bit row whose states are float32 may be stepped in float32 throughout: its weights are the
  // master's, and the row their rounded copy; or they are the row's (bfloat16), rounded at random.
  void* master = nullptr;
  bool at_random = false;
  uint32_t key = 0;  // where that begins
  void* states[kMaxStates] = {};
  const double* numbers = nullptr;  // [kNumbers]
  Metric metric;                    // whose moment is one of the states
};

namespace cpu {

// The instruction set that the sweeps use on this machine, e.g. "x86-64-v4".
const char* instruction_set();

// Those compiled in, widest first, and a way to choose a narrower one (for tests and comparisons).
// Raises std::invalid_argument for a name that is not compiled in or that this machine lacks.
std::vector<const char*> instruction_sets();
void use_instruction_set(const char* name);

// Whether the sweeps were compiled with OpenMP.
bool has_openmp();

// In all of these but stats, anchors is [rows], or null for none; an anchor is read too.

// Reads N.
void value(const Table& table, const void* const* w, const double* strengths, double* sums,
           int threads, const Anchor* anchors = nullptr);

// g = scale * grad(w). Reads N, writes N. Rows with a null g are left out.
void gradient(const Table& table, const void* const* w, void* const* g, const double* strengths,
              double scale, int threads, const Anchor* anchors = nullptr);

// g += scale * grad(w), and the sums. Reads 2 N, writes N. Rows with a null g add to the sums only.
void accumulate(const Table& table, const void* const* w, void* const* g, const double* strengths,
                double scale, double* sums, int threads, const Anchor* anchors = nullptr);

// w = prox(w, step). Reads N, writes N. Rows with a null w are left out.
void prox(const Table& table, void* const* w, const double* strengths, double step, int threads,
          const Anchor* anchors = nullptr);

// w = prox(w, the steps of metrics[row]), and the sums of the new w. Reads 2 N, writes N. Rows with
// a null w are left out.
void prox_in_metric(const Table& table, void* const* w, const Metric* metrics,
                    const double* strengths, double* sums, int threads,
                    const Anchor* anchors = nullptr);

// An optimizer's step on each row, and the penalty's gradient before it, or its prox after it, in
// the same visit: reads w, g and the states, writes w and the states. The sums are those of w
// before a gradient, or after a prox; in a step in float32, before w is rounded. Rows with a null w
// are left out. Returns the zeros of the new w in penalised rows.
int64_t step(const Table& table, void* const* w, const void* const* g, const Update* updates,
             bool prox, const double* strengths, double scale, double* sums, int threads);

// stats is [rows]. Reads N.
void stats(const Table& table, const void* const* w, Stats* stats, int threads);

}  // namespace cpu

// Each rule's value from an earlier sweep's sums.
std::vector<double> values_from_sums(const Table& table, const double* sums,
                                     const double* strengths);
// The value: theirs added up, in order.
double value_from_sums(const Table& table, const double* sums, const double* strengths);

}  // namespace pyreg
