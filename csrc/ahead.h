// Fetches what a loop over tensors is about to look at. Objects, torch's records of them, and what
// those point to are spread over memory, and a sweep or a training step drives them out of the
// caches: each is asked for some turns before the next is found in it. Hints: nothing depends on
// what is where.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "records.h"

namespace pyreg {

inline void fetch(const void* address, int lines) {
  for (int line = 0; line < lines; ++line)
    __builtin_prefetch(static_cast<const char*>(address) + 64 * line);
}

inline void fetch_record(const void* record) { fetch(record, 3); }

// A record's storage, and what autograd keeps: behind a table and counts.
inline const void* storage_of(const void* record) {
  return static_cast<const void* const*>(record)[2];
}
inline void fetch_contents(const void* record) {
  fetch(storage_of(record), 2);
  fetch(static_cast<const void* const*>(record)[3], 2);
}

class Ahead {
 public:
  static constexpr size_t kObjects = 16, kRecords = 8, kContents = 4;  // turns ahead

  Ahead(const pybind11::list& tensors, const Records* records)
      : tensors_(reinterpret_cast<PyListObject*>(tensors.ptr())->ob_item),
        n_(pybind11::len(tensors)),
        records_(records) {}

  // To be called in the i-th turn.
  void turn(size_t i) const {
    if (records_ == nullptr) return;
    if (i + kObjects < n_) fetch(tensors_[i + kObjects], 2);
    if (i + kRecords < n_)
      if (const void* const record = records_->of_plain(tensors_[i + kRecords]))
        fetch_record(record);
    if (i + kContents < n_)
      if (const void* const record = records_->of_plain(tensors_[i + kContents]))
        fetch_contents(record);
  }

 private:
  PyObject* const* tensors_;
  size_t n_;
  const Records* records_;
};

// The same for records that nobody has yet: from where those of the last call, and their storages,
// were found.
class Known {
 public:
  explicit Known(size_t rows) : at_(rows) {}
  void note(size_t row, const void* record) {
    at_[row] = {record, record == nullptr ? nullptr : storage_of(record)};
  }

  // To be called in the turn of a row.
  void turn(size_t row) const {
    if ((row += Ahead::kRecords) >= at_.size()) return;
    fetch_record(at_[row].record);
    fetch(at_[row].storage, 2);
  }

 private:
  struct Place {  // never followed: who was there may be gone
    const void *record = nullptr, *storage = nullptr;
  };
  std::vector<Place> at_;
};

}  // namespace pyreg
