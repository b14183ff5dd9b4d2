// A look at every tensor of a layout at every call: what it must still be, and where it is now.
//
// A layout records what the tensors were (dtype, shape, strides, device) when it was made; where
// they were it only compares, to notice what moved. A pointer is used only in the call that brought
// it. Shared by the Python modules _native and _cuda, and lent to sweeps in Triton.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ahead.h"
#include "penalties.h"
#include "places.h"
#include "records.h"
#include "updates.h"

namespace pyreg {

// A tensor is no longer what the layout recorded.
struct StaleLayout : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A gradient that cannot be its tensor's: another shape, dtype or device, expanded, without memory,
// or in the memory of another's.
struct GradientMismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

#define PYREG_NAME(P) P::name,
const inline std::vector<std::string> kPenaltyNames = {PYREG_PENALTIES(PYREG_NAME)};
#undef PYREG_NAME
#define PYREG_NAME(U) U::name,
const inline std::vector<std::string> kUpdateNames = {PYREG_UPDATES(PYREG_NAME)};
#undef PYREG_NAME

// Places in PYREG_PENALTIES.
inline std::vector<int> penalty_indices(const std::vector<std::string>& penalties) {
  std::vector<int> indices;
  for (const std::string& name : penalties) {
    const auto found = std::find(kPenaltyNames.begin(), kPenaltyNames.end(), name);
    if (found == kPenaltyNames.end())
      throw pybind11::value_error("no native kernel for penalty '" + name + "'");
    indices.push_back(static_cast<int>(found - kPenaltyNames.begin()));
  }
  return indices;
}

// Of each tensor, whether it requires a gradient: 1 or 0.
inline pybind11::bytes require_grad(const pybind11::list& tensors) {
  static const Attribute kRequiresGrad("requires_grad");
  const Records* const records = Records::get();
  std::string flags(pybind11::len(tensors), 0);
  const Ahead ahead(tensors, records);
  for (size_t i = 0; i < flags.size(); ++i) {
    ahead.turn(i);
    PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
    const void* const record = records != nullptr ? records->of_plain(tensor) : nullptr;
    flags[i] =
        record != nullptr ? records->requires_grad(record) : kRequiresGrad(tensor).ptr() == Py_True;
  }
  return pybind11::bytes(flags);
}

// Whether each of [(dict, keys, what they held)] still holds that; keys are in the dict's own
// order.
inline bool unchanged(const pybind11::list& slots) {
  const Py_ssize_t number = PyList_GET_SIZE(slots.ptr());
  const auto part = [&](Py_ssize_t slot, int k) {
    return PyTuple_GET_ITEM(PyList_GET_ITEM(slots.ptr(), slot), k);
  };
  for (Py_ssize_t slot = 0; slot < number; ++slot) {
    // As `Ahead` does, for the same reason.
    if (slot + 12 < number) __builtin_prefetch(PyList_GET_ITEM(slots.ptr(), slot + 12));
    if (slot + 8 < number)
      for (int k : {0, 1, 2}) __builtin_prefetch(part(slot + 8, k));
    if (slot + 4 < number) {
      const auto* dict = reinterpret_cast<const PyDictObject*>(part(slot + 4, 0));
      for (int line : {0, 64}) {
        __builtin_prefetch(reinterpret_cast<const char*>(dict->ma_keys) + line);
        __builtin_prefetch(reinterpret_cast<const char*>(dict->ma_values) + line);
      }
    }
    PyObject* const keys = part(slot, 1);
    PyObject* const held = part(slot, 2);
    const Py_ssize_t n = PyTuple_GET_SIZE(keys);
    Py_ssize_t place = 0, i = 0;
    PyObject *key, *now;
    while (i < n && PyDict_Next(part(slot, 0), &place, &key, &now)) {
      if (key != PyTuple_GET_ITEM(keys, i)) continue;
      if (now != PyTuple_GET_ITEM(held, i)) return false;
      ++i;
    }
    if (i < n) return false;
  }
  return true;
}

using Pointers = std::vector<void*>;

// What each row is measured from and weighted with, (origin, weight): tensors or None. One pair per
// row, or no pairs at all.
using Pairs = std::vector<std::pair<pybind11::object, pybind11::object>>;

// The tensors and gradients of one call.
struct Shown {
  Shown() = default;
  Shown(Shown&&) = default;  // (and so no copy)

  Pointers w, g;
  std::vector<Held> alive;      // what g points into
  int64_t present = 0;          // gradients that exist
  std::vector<int64_t> others;  // rows whose gradient the caller must see to; null in g
};

// The tensors of one call and what lies beside each: an optimizer's moment, or null.
struct Beside {
  Pointers w, moments;
  std::string float32;          // of each moment, whether it is float32 and not its row's dtype
  std::vector<int64_t> others;  // rows that the caller must see to; null in both
};

class Look {
 public:
  // The tensors of one device, each one's rule, and their anchors.
  Look(const pybind11::list& tensors, const std::vector<int>& rule_of, int device_type,
       int device_index, Pairs pairs = {})
      : device_type_(device_type),
        device_index_(device_index),
        pairs_(std::move(pairs)),
        weights_(rule_of.size()),
        gradients_(rule_of.size()),
        known_gradients_(rule_of.size()),
        gradient_bytes_(rule_of.size()),
        beside_((kMaxStates + 1) * rule_of.size()),
        beside_bytes_((kMaxStates + 1) * rule_of.size()),
        origins_(rule_of.size()),
        masses_(rule_of.size()) {
    if (rule_of.size() != pybind11::len(tensors))
      throw pybind11::value_error("one rule per tensor");
    if (!pairs_.empty() && pairs_.size() != rule_of.size())
      throw pybind11::value_error("one anchor per tensor");
    TensorReader reader;
    for (const auto& [origin, weight] : pairs_) {
      Anchor anchor;
      if (!origin.is_none()) anchor.origin_dtype = dtype_of(origin, reader);
      if (!weight.is_none()) anchor.weight_dtype = dtype_of(weight, reader);
      anchors_.push_back(anchor);
    }
    for (size_t i = 0; i < rule_of.size(); ++i) {
      const TensorView view = reader.read(PyList_GET_ITEM(tensors.ptr(), i));
      if (!is_here(view) || !view.dtype)
        throw pybind11::value_error("row " + std::to_string(i) +
                                    ": not a tensor of a swept dtype on this device");
      recorded_.push_back({*view.dtype, view.ndim, geometry_.size()});
      geometry_.insert(geometry_.end(), view.shape, view.shape + view.ndim);
      geometry_.insert(geometry_.end(), view.strides, view.strides + view.ndim);
      rows_.push_back({view.numel(), *view.dtype, rule_of[i]});
      bytes_.push_back(view.numel() * item_size(*view.dtype));
    }
  }

  const std::vector<Row>& rows() const { return rows_; }

  bool is_here(const TensorView& view) const {
    return view.device_type == device_type_ && view.device_index == device_index_;
  }

  Pointers tensors(const pybind11::list& tensors, TensorReader& reader) {
    check_number(tensors);
    Pointers pointers;
    pointers.reserve(rows_.size());
    const Ahead ahead(tensors, reader.records());
    for (size_t i = 0; i < rows_.size(); ++i) {
      ahead.turn(i);
      pointers.push_back(look(tensors, i, reader).data);
    }
    return pointers;
  }

  // The tensors, but for those that share memory with another row: null, and listed in `others`.
  // What writes them does so in turn.
  Pointers separate_tensors(const pybind11::list& given, TensorReader& reader,
                            std::vector<int64_t>& others) {
    Pointers pointers = tensors(given, reader);
    others = weights_.overlapping(bytes_);
    for (int64_t i : others) pointers[i] = nullptr;
    return pointers;
  }

  // Rows that shared memory with another one at the last look.
  const std::vector<int64_t>& overlapping() { return weights_.overlapping(bytes_); }

  // moments[i] is a tensor of the shape of tensors[i], or None. `others` are rows that share memory
  // with another row, and those whose moment has other strides or a dtype that is neither the row's
  // own nor float32.
  Beside with_moments(const pybind11::list& tensors, const pybind11::list& moments,
                      TensorReader& reader) {
    if (pybind11::len(moments) != rows_.size())
      throw pybind11::value_error("one moment per tensor");
    Beside beside;
    beside.w = separate_tensors(tensors, reader, beside.others);
    beside.moments.resize(rows_.size());
    beside.float32.resize(rows_.size());
    const Ahead ahead(moments, reader.records());
    for (size_t i = 0; i < rows_.size(); ++i) {
      ahead.turn(i);
      PyObject* const tensor = PyList_GET_ITEM(moments.ptr(), i);
      if (tensor == Py_None) continue;
      const auto found = moment(i, tensor, reader, i);
      if (beside.w[i] == nullptr) continue;
      if (found) {
        std::tie(beside.moments[i], beside.float32[i]) = *found;
      } else {
        beside.others.push_back(static_cast<int64_t>(i));
        beside.w[i] = nullptr;
      }
    }
    return beside;
  }

  // Where states[k][i] lies, the k-th state of tensors[i], and masters[i], its float32 weights;
  // null for None, and where there are no masters. Sets `float32` where the states are and the row
  // is not. False: the caller must see to the row, as what lies beside it has other strides than
  // it, or dtypes that are neither float32 nor the row's own, or, of states, are not all alike.
  bool states(size_t i, const std::vector<pybind11::list>& given, const pybind11::list& masters,
              TensorReader& reader, void** pointers, void** master, bool& float32) {
    bool fine = true;
    std::optional<bool> kind;
    for (size_t k = 0; k <= kMaxStates; ++k) {
      const size_t at = k * rows_.size() + i;
      const bool is_master = k == kMaxStates;
      const pybind11::list* const list = is_master          ? &masters
                                         : k < given.size() ? &given[k]
                                                            : nullptr;
      const bool none = list == nullptr || PyList_GET_SIZE(list->ptr()) == 0;
      PyObject* const tensor = none ? Py_None : PyList_GET_ITEM(list->ptr(), i);
      if (tensor == Py_None) {
        if (!beside_.at(at, nullptr)) beside_.note(at, nullptr);
        continue;
      }
      const auto found = moment(i, tensor, reader, at);
      fine = fine && found &&
             (is_master ? found->second : kind.value_or(found->second) == found->second);
      if (!fine) continue;
      beside_bytes_[at] = rows_[i].numel * (found->second ? 4 : item_size(rows_[i].dtype));
      *(is_master ? master : pointers + k) = found->first;
      if (!is_master) kind = found->second;
    }
    float32 = kind.value_or(false);
    return fine;
  }

  // Whether no two of the states and masters of the last look share memory.
  bool states_are_apart() { return beside_.overlapping(beside_bytes_).empty(); }

  // Where the anchors are now, if there are any: tensors of their row's shape and strides, in any
  // swept dtype. To be asked after the tensors, which must lie elsewhere.
  std::vector<Anchor> anchors(TensorReader& reader) {
    std::vector<Anchor> found = anchors_;
    for (size_t i = 0; i < found.size(); ++i) {
      Anchor& anchor = found[i];
      anchor.origin = beside(i, pairs_[i].first.ptr(), anchor.origin_dtype, origins_, reader);
      anchor.weight = beside(i, pairs_[i].second.ptr(), anchor.weight_dtype, masses_, reader);
    }
    return found;
  }

  // grads[i] is a tensor like tensors[i], or None to leave the row out.
  Shown with_gradients(const pybind11::list& tensors, const pybind11::list& grads,
                       TensorReader& reader) {
    if (pybind11::len(grads) != pybind11::len(tensors))
      throw pybind11::value_error("one gradient per tensor");
    return show(tensors, reader, [&](size_t i, const std::vector<Held>&) {
      return Held(pybind11::reinterpret_borrow<pybind11::object>(PyList_GET_ITEM(grads.ptr(), i)));
    });
  }

  // Each tensor's .grad. `others` are those with other strides than the tensor.
  Shown with_own_gradients(const pybind11::list& tensors, TensorReader& reader) {
    // By torch's records, up to a tensor whose .grad may run Python: what that does, to others
    // too, is seen by none of them.
    const Records* records = reader.records();
    Shown shown = show(tensors, reader, [&](size_t i, std::vector<Held>& before) {
      PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
      const void* const own = records != nullptr ? records->of_plain(tensor) : nullptr;
      if (own != nullptr) {
        const void* const record = records->gradient(own);
        if (record == nullptr) return Held();
        Held held(*records, record);
        // (What moved is asked about its memory, through its object.)
        if (const void* const data = records->data(record);
            data == nullptr || !gradients_.at(i, data))
          ask(held, tensor, i);
        return held;
      }
      for (size_t k = 0; records != nullptr && k < i; ++k)
        if (!before[k].is_none()) ask(before[k], PyList_GET_ITEM(tensors.ptr(), k), k);
      records = nullptr;
      Held held;
      ask(held, tensor, i);
      return held;
    });
    if (!gradients_.overlapping(gradient_bytes_).empty())
      throw GradientMismatch("gradients share memory");
    return shown;
  }

 private:
  // What a row must still be. Sizes and strides lie in geometry_: [shape..., strides...].
  struct Recorded {
    DType dtype;
    int ndim;
    size_t geometry;
  };

  TensorView row(size_t i) const {
    TensorView view;
    view.ndim = recorded_[i].ndim;
    view.shape = geometry_.data() + recorded_[i].geometry;
    view.strides = view.shape + view.ndim;
    return view;
  }

  bool lies_beside(const TensorView& view, size_t i) const {
    return is_here(view) && view.dtype && view.same_shape(row(i));
  }

  static DType dtype_of(const pybind11::object& anchor, TensorReader& reader) {
    const TensorView view = reader.read(anchor.ptr());
    if (!view.dtype) throw pybind11::value_error("an anchor is not of a swept dtype");
    return *view.dtype;
  }

  const void* beside(size_t i, PyObject* tensor, DType dtype, Places& places,
                     TensorReader& reader) {
    if (tensor == Py_None) return nullptr;
    const TensorView view = read_as<StaleLayout>(tensor, i, reader);
    const bool same = view.dtype == dtype && lies_beside(view, i) && view.same_strides(row(i)) &&
                      in_memory(view, tensor, i, places);
    if (!same || (rows_[i].numel > 0 && weights_.at(i, view.data)))
      throw StaleLayout("the anchor of row " + std::to_string(i) + " changed");
    return view.data;
  }

  void check_number(const pybind11::list& tensors) const {
    if (PyList_GET_SIZE(tensors.ptr()) != static_cast<Py_ssize_t>(rows_.size()))
      throw StaleLayout("the number of tensors changed");
  }

  template <class Gradient>
  Shown show(const pybind11::list& tensors, TensorReader& reader, const Gradient& gradient) {
    check_number(tensors);
    Shown shown;
    shown.w.reserve(rows_.size());
    shown.g.reserve(rows_.size());
    shown.alive.reserve(rows_.size());
    // First all gradients, as a subclass runs Python here; then, at once, where everything lies.
    const Ahead ahead(tensors, reader.records());
    for (size_t i = 0; i < rows_.size(); ++i) {
      ahead.turn(i);
      known_gradients_.turn(i);
      shown.alive.push_back(gradient(i, shown.alive));
      shown.present += !shown.alive.back().is_none();
    }
    for (size_t i = 0; i < rows_.size(); ++i) {
      ahead.turn(i);
      if (i + Ahead::kContents < rows_.size())
        if (const void* const record = shown.alive[i + Ahead::kContents].record())
          fetch_contents(record);
      const TensorView view = look(tensors, i, reader);
      PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
      shown.w.push_back(view.data);
      shown.g.push_back(look_at_gradient(view, tensor, shown.alive[i], i, reader, shown.others));
    }
    return shown;
  }

  // A moment's address and whether it is float32 and not the row's own dtype; or nothing, where its
  // strides are others or its dtype is neither. `place` is its own in beside_.
  std::optional<std::pair<void*, bool>> moment(size_t i, PyObject* tensor, TensorReader& reader,
                                               size_t place) {
    const TensorView view = read_as<pybind11::value_error>(tensor, i, reader);
    if (!lies_beside(view, i) || !in_memory(view, tensor, place, beside_))
      throw pybind11::value_error("row " + std::to_string(i) + ": a state unlike its tensor");
    const bool own = view.dtype == rows_[i].dtype;
    if (!view.same_strides(row(i)) || (!own && view.dtype != DType::kFloat32)) return {};
    return std::make_pair(view.data, !own);
  }

  TensorView look(const pybind11::list& tensors, size_t i, TensorReader& reader) {
    PyObject* const tensor = PyList_GET_ITEM(tensors.ptr(), i);
    const TensorView view = read_as<StaleLayout>(tensor, i, reader);
    const Recorded& was = recorded_[i];
    const int64_t* geometry = geometry_.data() + was.geometry;
    const bool same = is_here(view) && view.dtype == was.dtype && view.ndim == was.ndim &&
                      equal(view.shape, geometry, view.ndim) &&
                      equal(view.strides, geometry + was.ndim, view.ndim) &&
                      in_memory(view, tensor, i, weights_);
    if (!same) throw StaleLayout("row " + std::to_string(i) + " changed");
    return view;
  }

  template <class Error>
  static TensorView read_as(PyObject* tensor, size_t i, TensorReader& reader) {
    try {
      return reader.read(tensor);
    } catch (const std::exception&) {  // sparse, say, or nested
      throw Error("row " + std::to_string(i) + " has no memory of its own");
    }
  }

  static void ask(Held& gradient, PyObject* tensor, size_t i) {
    if (!gradient.ask(tensor))
      throw StaleLayout("the gradient of row " + std::to_string(i) + " changed");
  }

  // The gradient's address; null for None and for one with other strides than its tensor.
  void* look_at_gradient(const TensorView& tensor, PyObject* object, Held& grad, size_t i,
                         TensorReader& reader, std::vector<int64_t>& others) {
    if (grad.is_none()) {
      if (!gradients_.at(i, nullptr)) gradients_.note(i, nullptr);
      return nullptr;
    }
    known_gradients_.note(i, grad.record());
    TensorView view;
    const bool known = grad.record() != nullptr && reader.records()->read(grad.record(), view);
    const bool stayed = known && view.data != nullptr && gradients_.at(i, view.data);
    if (!stayed && grad.object() == nullptr) ask(grad, object, i);
    if (!known) view = read_as<GradientMismatch>(grad.object(), i, reader);
    if (!is_here(view) || view.dtype != tensor.dtype || !view.same_shape(tensor) ||
        view.expanded() || !in_memory(view, grad.object(), i, gradients_))
      throw GradientMismatch(std::to_string(i));
    const bool same = view.same_strides(tensor);
    // (Between the elements of one that is not dense another's may lie.)
    const bool dense = same || view.span() == view.numel();
    const int64_t bytes = dense ? bytes_[i] : item_size(*view.dtype);
    if (gradient_bytes_[i] != bytes) {
      gradient_bytes_[i] = bytes;
      gradients_.note(i, view.data);
    }
    if (same) return view.data;
    others.push_back(static_cast<int64_t>(i));
    return nullptr;
  }

  // Whether memory holds every element, as it is. Torch is asked only about a row that moved, as a
  // storage does that is freed or resized; not noticed is one that comes back to its address, but
  // too small for its tensor (torch's own operations never notice), or a lazily negated view of it.
  static bool in_memory(const TensorView& view, PyObject* tensor, size_t i, Places& places) {
    if (view.data != nullptr && places.at(i, view.data)) return true;
    if (view.numel() > 0) {
      static const Method kStorage("untyped_storage"), kData("data_ptr"), kBytes("nbytes"),
          kNegative("is_neg");
      if (kNegative(tensor).ptr() == Py_True) return false;
      const pybind11::object storage = kStorage(tensor);
      uintptr_t base = 0;
      try {
        base = kData(storage.ptr()).cast<uintptr_t>();
      } catch (pybind11::error_already_set&) {  // a wrapper, as DTensors are
      }
      const auto size = kBytes(storage.ptr()).cast<uintptr_t>();
      const auto begin = reinterpret_cast<uintptr_t>(view.data);
      if (base == 0 || begin + view.span() * item_size(*view.dtype) > base + size) return false;
    }
    places.note(i, view.data);
    return true;
  }

  int device_type_, device_index_;
  std::vector<Recorded> recorded_;
  std::vector<int64_t> geometry_;
  std::vector<Row> rows_;
  std::vector<int64_t> bytes_;  // [rows]
  Pairs pairs_;
  std::vector<Anchor> anchors_;  // [pairs] their dtypes, without addresses
  Places weights_, gradients_;
  Known known_gradients_;
  std::vector<int64_t> gradient_bytes_;  // [rows] from its address on, all its own
  Places beside_;                        // [kMaxStates + 1][rows] states, or a moment; masters
  std::vector<int64_t> beside_bytes_;
  Places origins_, masses_;
};

}  // namespace pyreg
