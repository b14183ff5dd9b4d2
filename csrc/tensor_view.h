// What a sweep must know of a torch tensor, read without torch's headers.
//
// Torch (from 2.10) publishes a C function table, DLPack's exchange API, as an attribute of its
// Tensor type: one call fills a DLTensor in about 50 ns, without an allocation or a reference. That
// makes it cheap to look at every tensor afresh at every call. Where the table is missing, the same
// facts are read as Python attributes (about 1 us).
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "table.h"

namespace pyreg {

// The parts of DLPack 1.x's C ABI that are used here (dlpack.h, Apache 2.0, states the layout).
namespace dlpack {
struct Device {
  int32_t type;  // 1: CPU, 2: CUDA, 10: ROCm
  int32_t index;
};
struct DataType {
  uint8_t code;  // 2: float, 4: bfloat
  uint8_t bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct Header {
  uint32_t major, minor;
  Header* previous;
};
struct ExchangeApi {
  Header header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_from_object)(void* object, Tensor* out);  // 0, or -1 with a Python error set
};
}  // namespace dlpack

// Of so few numbers that a call of memcmp would cost more.
inline bool equal(const int64_t* a, const int64_t* b, int n) {
  for (int i = 0; i < n; ++i)
    if (a[i] != b[i]) return false;
  return true;
}

struct TensorView {
  void* data = nullptr;
  int device_type = 0, device_index = 0;
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
    for (int d = 0; d < ndim; ++d)
      if (shape[d] > 1 && strides[d] == 0) return true;
    return false;
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

// An attribute that torch computes, read without a search for its name where the tensor is of one
// of torch's own two types.
class TensorAttribute {
 public:
  explicit TensorAttribute(const char* name) : name_(PyUnicode_InternFromString(name)) {
    namespace py = pybind11;
    tensor_ = py::object(py::module_::import("torch").attr("Tensor")).release().ptr();
    parameter_ = py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
    PyObject* const found = PyObject_GetAttr(tensor_, name_);
    PyObject* const inherited = PyObject_GetAttr(parameter_, name_);
    PyErr_Clear();
    if (found != nullptr && found == inherited && Py_IS_TYPE(found, &PyGetSetDescr_Type))
      getter_ = reinterpret_cast<PyGetSetDescrObject*>(found)->d_getset;
  }

  // Made once, by whoever is first, though an import may let other threads run meanwhile.
  static const TensorAttribute& grad() {
    PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<TensorAttribute> kept;
    return kept.call_once_and_store_result([] { return TensorAttribute("grad"); }).get_stored();
  }
  static const TensorAttribute& requires_grad() {
    PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<TensorAttribute> kept;
    return kept.call_once_and_store_result([] { return TensorAttribute("requires_grad"); })
        .get_stored();
  }

  pybind11::object of(PyObject* tensor) const {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    const bool plain = getter_ != nullptr && (type == parameter_ || type == tensor_);
    PyObject* const value =
        plain ? getter_->get(tensor, getter_->closure) : PyObject_GetAttr(tensor, name_);
    if (value == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(value);
  }

 private:
  PyObject *name_, *tensor_, *parameter_;  // kept for good
  const PyGetSetDef* getter_ = nullptr;
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

// Reads views. One reader per call: it owns what the attribute path allocates.
class TensorReader {
 public:
  TensorReader() : api_(exchange_api()) {}

  TensorView read(PyObject* tensor) { return api_ ? read_dlpack(tensor) : read_attributes(tensor); }

  static bool has_exchange_api() { return exchange_api() != nullptr; }

  // For tests: read attributes even where the exchange API exists.
  static void use_exchange_api(bool yes) { enabled() = yes; }

 private:
  static bool& enabled() {
    static bool on = true;
    return on;
  }

  static const dlpack::ExchangeApi* exchange_api() {
    using Api = const dlpack::ExchangeApi*;
    PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<Api> api;
    api.call_once_and_store_result(find_exchange_api);
    return enabled() ? api.get_stored() : nullptr;
  }

  static const dlpack::ExchangeApi* find_exchange_api() {
    namespace py = pybind11;
    py::object type = py::module_::import("torch").attr("Tensor");
    py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_CheckExact(capsule.ptr())) return nullptr;
    auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
    if (api == nullptr) throw py::error_already_set();
    return api->header.major == 1 ? api : nullptr;
  }

  TensorView read_dlpack(PyObject* tensor) {
    dlpack::Tensor t{};
    if (api_->view_from_object(tensor, &t) != 0) throw pybind11::error_already_set();
    TensorView view;
    view.data = t.data == nullptr ? nullptr : static_cast<char*>(t.data) + t.byte_offset;
    view.device_type = t.device.type;
    view.device_index = t.device.index;
    if (t.dtype.lanes == 1) {
      if (t.dtype.code == 2 && t.dtype.bits == 32) view.dtype = DType::kFloat32;
      if (t.dtype.code == 2 && t.dtype.bits == 64) view.dtype = DType::kFloat64;
      if (t.dtype.code == 2 && t.dtype.bits == 16) view.dtype = DType::kFloat16;
      if (t.dtype.code == 4 && t.dtype.bits == 16) view.dtype = DType::kBFloat16;
    }
    view.ndim = t.ndim;
    view.shape = t.shape;
    view.strides = t.strides;
    return view;
  }

  TensorView read_attributes(PyObject* object) {
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

  const dlpack::ExchangeApi* api_;
  std::vector<std::unique_ptr<std::vector<int64_t>>> owned_;
};

}  // namespace pyreg
