// Tensors laid out for the kernels, on the host: sizes once, addresses at every call.
#pragma once

#include <cstring>

#include "parameter.h"

namespace pyreg::cuda {

// Strengths or a scale as a caller has them.
struct Number {
  ScalarKind kind = ScalarKind::kNumber;
  Scalar scalar{};

  static Number of(double x) {
    Number n;
    std::memcpy(&n.scalar.bits, &x, sizeof x);
    return n;
  }
  static Number at(const void* address, ScalarKind kind) {
    return {kind, {reinterpret_cast<uintptr_t>(address)}};
  }
};

// Chunks that a block takes, where that leaves none of those idle that run at a time.
constexpr int64_t kShare = 16;

class Plan {
 public:
  // Rows in the order of their rules, so that a rule's segments follow each other; or as they come,
  // for `stats`, which has totals for each row.
  Plan(const std::vector<Row>& rows, const std::vector<int>& penalties, bool by_rule) {
    const Table given(rows, penalties);
    order_ = given.rows_by_rule();
    if (!by_rule) std::sort(order_.begin(), order_.end());
    std::vector<Row> ordered;
    for (int32_t i : order_) ordered.push_back(rows[i]);
    const Table table(ordered, penalties);

    run_ = table.run() / kChunk;
    int64_t chunks = 0;
    rules_.resize(by_rule ? penalties.size() + 1 : 1);
    for (size_t i = 0; i <= ordered.size(); ++i) {
      Entry e{};
      e.first_chunk = static_cast<uint32_t>(chunks);
      e.first_segment =
          static_cast<uint32_t>(i < ordered.size() ? table.first_segment(i) : table.segments());
      if (i < ordered.size()) {
        const Row& row = ordered[i];
        const int64_t n = (row.numel + kChunk - 1) / kChunk;
        e.rule = by_rule ? row.rule : 0;
        e.last = static_cast<uint16_t>(n == 0 ? 0 : row.numel - (n - 1) * kChunk - 1);
        e.dtype = static_cast<uint8_t>(row.dtype);
        chunks += n;
      }
      entries_.push_back(e);
    }
    if (chunks >= kNone) throw std::invalid_argument("too many elements for one launch");
    chunks_ = static_cast<uint32_t>(chunks);
    for (size_t r = 0, i = 0; r < rules_.size(); ++r) {
      while (i < ordered.size() && ordered[i].rule < static_cast<int>(r)) ++i;
      rules_[r].first_segment = by_rule ? entries_[i].first_segment : 0;
      if (by_rule && r < penalties.size()) rules_[r].penalty = static_cast<uint8_t>(penalties[r]);
    }
    fits_ = rules_.size() <= kRules + 1;
    for (const Entry& e : entries_) fits_ = fits_ && PackedEntry::fits(e);
    for (int penalty : penalties)
      if (by_rule && penalty >= kElementary) family_ = Family::kAll;
  }

  Family family() const { return family_; }
  bool by_value() const {
    return fits_ &&
           entries_.size() * sizeof(PackedEntry) + behind_bytes() <= sizeof(Parameter::entries);
  }
  uint32_t rows() const { return static_cast<uint32_t>(order_.size()); }
  uint32_t rules() const { return static_cast<uint32_t>(rules_.size()) - 1; }
  uint32_t segments() const { return entries_.back().first_segment; }
  const std::vector<Entry>& entries() const { return entries_; }

  // w[i] and g[i] are the i-th tensor's, in the caller's order, and metrics[i] is its metric, of
  // which g[i] is the moment then. Without g there are no gradients.
  void show(void* const* w, void* const* g, const RowMetric* metrics = nullptr) {
    metrics_.resize(metrics == nullptr ? 0 : order_.size());
    facts_.clear(), steps_.clear(), numbers_.clear();
    for (size_t i = 0; i < order_.size(); ++i) {
      entries_[i].w = w[order_[i]];
      entries_[i].g = g == nullptr ? nullptr : g[order_[i]];
      if (metrics != nullptr) metrics_[i] = metrics[order_[i]];
    }
  }

  // After show(): steps[i] is what a step does to the i-th tensor, in the caller's order. `numbers`
  // are all sets, unless the facts say where they are.
  void step(const StepFacts& facts, const RowStep* steps, std::vector<double> numbers) {
    facts_.assign(1, facts);
    for (int32_t i : order_) steps_.push_back(steps[i]);
    numbers_ = std::move(numbers);
  }

  // [rules][kMaxStrengths]
  void strengthen(const Number* strengths) {
    for (size_t r = 0; r + 1 < rules_.size(); ++r)
      for (int k = 0; k < kMaxStrengths; ++k) {
        rules_[r].kinds[k] = strengths[r * kMaxStrengths + k].kind;
        rules_[r].strengths[k] = strengths[r * kMaxStrengths + k].scalar;
      }
  }

  // What a table in device memory holds: the entries, the rules, the metrics or steps.
  size_t table_bytes() const {
    return entries_.size() * sizeof(Entry) + rules_.size() * sizeof(Rule) + behind_bytes();
  }
  void write_table(char* to) const { write_behind(copy(rules_, copy(entries_, to))); }

  // All of a parameter but its results and scratch, for a device that runs so many blocks at a
  // time. `table` is the table's place in device memory; null puts all into the parameter. Without
  // totals, shares need not be whole segments. Returns the grid's size.
  uint32_t fill(Parameter& p, const char* table, Number scale, uint32_t blocks,
                bool totals = true) const {
    p.table = reinterpret_cast<const Entry*>(table);
    p.rule_table = nullptr;
    if (table != nullptr) {
      p.rule_table = reinterpret_cast<const Rule*>(table + entries_.size() * sizeof(Entry));
    } else {
      if (!by_value()) throw std::logic_error("the tensors do not fit into one parameter");
      for (size_t i = 0; i < entries_.size(); ++i) p.entries[i] = PackedEntry::pack(entries_[i]);
      write_behind(reinterpret_cast<char*>(p.entries + entries_.size()));
      std::copy(rules_.begin(), rules_.end(), p.rule_entries);
    }
    p.scale = scale.scalar;
    p.scale_kind = scale.kind;
    p.rows = rows();
    p.rules = rules();
    p.chunks = chunks_;
    p.run = static_cast<uint32_t>(totals ? run_ : std::min(run_, kShare));
    // Equal shares: of kShare chunks or a segment; shorter where fewer blocks than run at a time
    // would have any.
    const int64_t segments = std::max<int64_t>(1, (int64_t{chunks_} + p.run - 1) / p.run);
    const int64_t each =
        std::min(std::max<int64_t>(1, kShare / p.run), (segments + blocks - 1) / blocks);
    p.share = static_cast<uint32_t>(each * p.run);
    return static_cast<uint32_t>((segments + each - 1) / each);
  }

 private:
  // Behind the entries, or in a table the rules.
  size_t behind_bytes() const {
    return metrics_.size() * sizeof(RowMetric) + facts_.size() * sizeof(StepFacts) +
           steps_.size() * sizeof(RowStep) + numbers_.size() * sizeof(double);
  }
  void write_behind(char* to) const {
    copy(numbers_, copy(steps_, copy(facts_, copy(metrics_, to))));
  }

  // Returns where the copy ends.
  template <class T>
  static char* copy(const std::vector<T>& from, char* to) {
    const size_t bytes = from.size() * sizeof(T);
    if (bytes > 0) std::memcpy(to, from.data(), bytes);
    return to + bytes;
  }

  std::vector<int32_t> order_;
  std::vector<Entry> entries_;      // [rows + 1]
  std::vector<Rule> rules_;         // [rules + 1]
  std::vector<RowMetric> metrics_;  // [rows], or none
  std::vector<StepFacts> facts_;    // one, or none
  std::vector<RowStep> steps_;      // [rows], or none
  std::vector<double> numbers_;     // [sets * kSetNumbers], or none
  int64_t run_ = 1;                 // chunks in a segment
  uint32_t chunks_ = 0;
  Family family_ = Family::kElementary;
  bool fits_ = false;  // into the fields of the parameter
};

}  // namespace pyreg::cuda
