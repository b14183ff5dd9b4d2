// The pointer table: rows (one per tensor) cut into chunks, and chunks grouped into segments.
//
// A chunk has a fixed number of elements. A segment is a run of consecutive chunks of one row: the
// unit that a worker takes and the unit that leaves one partial result. The cut depends on the
// sizes alone, never on threads or grid, so partials combined in order give the same bits on every
// run. Partials stay few however large the model: at most kMostSegments plus one per row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace pyreg {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDTypes = 4;

constexpr int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

constexpr int64_t kChunk = 4096;  // elements
// A segment is 16 chunks; fewer where there would not be 4,096 of them, for threads to share out;
// more where there would be more than 16,384, whose partials somebody must add up.
constexpr int64_t kSegmentChunks = 16, kSegments = 4096, kMostSegments = 4 * kSegments;

struct Row {
  int64_t numel;
  DType dtype;
  int rule;  // which penalty and strengths: an index into Table::penalties
};

// What a row is measured from: its penalty is the sum of weight_i * rho(w_i - origin_i). Without an
// origin it is 0, without weights they are 1. Each has a dtype of its own and the row's strides.
struct Anchor {
  const void* origin = nullptr;
  const void* weight = nullptr;
  DType origin_dtype = DType::kFloat32, weight_dtype = DType::kFloat32;
};

// A segment's place: elements [begin, end) of a row.
struct Span {
  int64_t row, begin, end;
};

class Table {
 public:
  // penalties[rule] is an index into PYREG_PENALTIES.
  Table(std::vector<Row> rows, std::vector<int> penalties)
      : rows_(std::move(rows)), penalties_(std::move(penalties)), first_(rows_.size() + 1, 0) {
    int64_t chunks = 0;
    for (const Row& r : rows_) {
      if (r.numel < 0) throw std::invalid_argument("a row has a negative size");
      if (r.rule < 0 || r.rule >= static_cast<int>(penalties_.size()))
        throw std::invalid_argument("a row names a rule that does not exist");
      chunks += divide_up(r.numel, kChunk);
      numel_ += r.numel;
    }
    run_ = kChunk * std::clamp(kSegmentChunks, divide_up(chunks, kMostSegments),
                               std::max<int64_t>(1, divide_up(chunks, kSegments)));
    by_rule_.resize(rows_.size());
    for (size_t i = 0; i < rows_.size(); ++i) by_rule_[i] = static_cast<int32_t>(i);
    std::stable_sort(by_rule_.begin(), by_rule_.end(),
                     [&](int32_t a, int32_t b) { return rows_[a].rule < rows_[b].rule; });
    for (size_t i = 0; i < rows_.size(); ++i)
      first_[i + 1] = first_[i] + divide_up(rows_[i].numel, run_);
  }

  const std::vector<Row>& rows() const { return rows_; }
  const std::vector<int>& penalties() const { return penalties_; }
  // The rows' numbers, sorted by rule and in order within one.
  const std::vector<int32_t>& rows_by_rule() const { return by_rule_; }
  int64_t numel() const { return numel_; }
  int64_t run() const { return run_; }  // elements per segment
  int64_t segments() const { return first_.back(); }
  int64_t first_segment(int64_t row) const { return first_[row]; }

  // One binary search; empty rows own no segment and are never found.
  Span locate(int64_t segment) const {
    const int64_t row =
        std::upper_bound(first_.begin(), first_.end(), segment) - first_.begin() - 1;
    return at(row, segment);
  }

  // The segment after `span`, by increments; `segment` is its number.
  Span next(Span span, int64_t segment) const {
    while (segment >= first_[span.row + 1]) ++span.row;
    return at(span.row, segment);
  }

 private:
  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

  Span at(int64_t row, int64_t segment) const {
    const int64_t begin = (segment - first_[row]) * run_;
    return {row, begin, std::min(begin + run_, rows_[row].numel)};
  }

  std::vector<Row> rows_;
  std::vector<int> penalties_;
  std::vector<int32_t> by_rule_;
  std::vector<int64_t> first_;  // [rows + 1] the first segment of each row
  int64_t run_ = kChunk;
  int64_t numel_ = 0;
};

}  // namespace pyreg
