// What a sweep must know of a torch tensor, and how its Python attributes tell it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "table.h"

namespace pyreg {

// Of so few numbers that a call of memcmp would cost more.
inline bool equal(const int64_t* a, const int64_t* b, int n) {
  for (int i = 0; i < n; ++i)
    if (a[i] != b[i]) return false;
  return true;
}

struct TensorView {
  void* data = nullptr;
  int device_type = 0, device_index = 0;  // 1: the CPU, 2: CUDA and ROCm, -1: others
  std::optional<DType> dtype;
  int ndim = 0;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;

  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }

  // Elements from the first to the last in memory.
  int64_t span() const {
    int64_t last = 0;
    for (int d = 0; d < ndim; ++d) {
      if (shape[d] == 0) return 0;
      last += (shape[d] - 1) * strides[d];
    }
    return last + 1;
  }

  // Whether several elements share one place.
  bool expanded() const {
    bool found = false;
    for (int d = 0; d < ndim; ++d) {
      if (shape[d] == 0) return false;
      found = found || (shape[d] > 1 && strides[d] == 0);
    }
    return found;
  }

  bool same_shape(const TensorView& other) const {
    return ndim == other.ndim && equal(shape, other.shape, ndim);
  }

  // Equal strides wherever they matter: the stride of a dimension of size 1 is never used.
  bool same_strides(const TensorView& other) const {
    for (int d = 0; d < ndim; ++d)
      if (shape[d] > 1 && strides[d] != other.strides[d]) return false;
    return true;
  }
};

// An attribute of Python objects.
class Attribute {
 public:
  explicit Attribute(const char* name) : name_(PyUnicode_InternFromString(name)) {}

  pybind11::object operator()(PyObject* self) const {
    PyObject* const value = PyObject_GetAttr(self, name_);
    if (value == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(value);
  }

 private:
  PyObject* name_;  // kept for good
};

// A Python method without arguments.
class Method {
 public:
  explicit Method(const char* name) : name_(PyUnicode_InternFromString(name)) {}

  pybind11::object operator()(PyObject* self) const {
    PyObject* const result = PyObject_CallMethodNoArgs(self, name_);
    if (result == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(result);
  }

 private:
  PyObject* name_;  // kept for good
};

// Reads views from attributes, about 1 us each. One reader per call: it owns sizes and strides.
class AttributeReader {
 public:
  TensorView read(PyObject* object) {
    namespace py = pybind11;
    py::handle tensor(object);
    TensorView view;
    view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    py::object device = tensor.attr("device");
    const auto type = device.attr("type").cast<std::string>();
    view.device_type = type == "cpu" ? 1 : type == "cuda" ? 2 : -1;
    py::object index = device.attr("index");
    view.device_index = index.is_none() ? 0 : index.cast<int>();
    const auto dtype = py::str(tensor.attr("dtype")).cast<std::string>();
    if (dtype == "torch.float32") view.dtype = DType::kFloat32;
    if (dtype == "torch.float64") view.dtype = DType::kFloat64;
    if (dtype == "torch.float16") view.dtype = DType::kFloat16;
    if (dtype == "torch.bfloat16") view.dtype = DType::kBFloat16;
    auto sizes = tensor.attr("shape").cast<std::vector<int64_t>>();
    const auto strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
    view.ndim = static_cast<int>(sizes.size());
    sizes.insert(sizes.end(), strides.begin(), strides.end());
    owned_.push_back(std::make_unique<std::vector<int64_t>>(std::move(sizes)));
    view.shape = owned_.back()->data();
    view.strides = view.shape + view.ndim;
    return view;
  }

 private:
  std::vector<std::unique_ptr<std::vector<int64_t>>> owned_;
};

}  // namespace pyreg
