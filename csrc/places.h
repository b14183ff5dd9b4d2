// Where the rows lay at the last call: addresses to compare, never to follow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace pyreg {

class Places {
 public:
  explicit Places(size_t rows) : data_(rows) {}

  bool at(size_t row, const void* data) const { return data_[row] == data; }

  void note(size_t row, const void* data) {
    data_[row] = data;
    compared_ = false;
  }

  // Rows that share memory with another row, in ascending order; bytes[row] is a row's size, and
  // rows at no address are left out.
  const std::vector<int64_t>& overlapping(const std::vector<int64_t>& bytes) {
    if (compared_) return overlapping_;
    std::vector<int64_t> order;
    for (size_t row = 0; row < data_.size(); ++row)
      if (data_[row] != nullptr && bytes[row] > 0) order.push_back(static_cast<int64_t>(row));
    const auto before = [&](int64_t a, int64_t b) { return begin(a) < begin(b); };
    if (!std::is_sorted(order.begin(), order.end(), before))
      std::sort(order.begin(), order.end(), before);
    overlapping_.clear();
    int64_t last = -1;  // of the rows so far, the one that reaches farthest
    for (int64_t row : order) {
      if (last >= 0 && begin(row) < begin(last) + bytes[last]) {
        overlapping_.push_back(last);
        overlapping_.push_back(row);
      }
      if (last < 0 || begin(row) + bytes[row] > begin(last) + bytes[last]) last = row;
    }
    std::sort(overlapping_.begin(), overlapping_.end());
    overlapping_.erase(std::unique(overlapping_.begin(), overlapping_.end()), overlapping_.end());
    compared_ = true;
    return overlapping_;
  }

 private:
  int64_t begin(int64_t row) const { return reinterpret_cast<intptr_t>(data_[row]); }

  std::vector<const void*> data_;  // [rows] first element
  std::vector<int64_t> overlapping_;
  bool compared_ = false;
};

}  // namespace pyreg
