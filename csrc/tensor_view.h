// What a sweep must know of a torch tensor, read without torch's headers.
//
// Torch (from 2.10) publishes a C function table, DLPack's exchange API, as an attribute of its
// Tensor type: one call fills a DLTensor in about 50 ns, without an allocation or a reference. That
// makes it cheap to look at every tensor afresh at every call. Where the table is missing, the same
// facts are read as Python attributes (about 1 us).
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <utility>
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

// Torch's own two types of tensors. Made once, by whoever is first, though an import may let other
// threads run meanwhile.
struct TensorTypes {
  PyObject *tensor, *parameter;  // kept for good

  static const TensorTypes& get() {
    PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<TensorTypes> kept;
    return kept
        .call_once_and_store_result([] {
          namespace py = pybind11;
          py::object tensor = py::module_::import("torch").attr("Tensor");
          py::object parameter = py::module_::import("torch.nn").attr("Parameter");
          return TensorTypes{tensor.release().ptr(), parameter.release().ptr()};
        })
        .get_stored();
  }

  bool has(PyObject* object) const {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == parameter || type == tensor;
  }
};

// An attribute that torch computes, read without a search for its name where the tensor is of one
// of torch's own two types.
class TensorAttribute {
 public:
  explicit TensorAttribute(const char* name)
      : name_(PyUnicode_InternFromString(name)), types_(TensorTypes::get()) {
    PyObject* const found = PyObject_GetAttr(types_.tensor, name_);
    PyObject* const inherited = PyObject_GetAttr(types_.parameter, name_);
    PyErr_Clear();
    if (found != nullptr && found == inherited && Py_IS_TYPE(found, &PyGetSetDescr_Type))
      getter_ = reinterpret_cast<PyGetSetDescrObject*>(found)->d_getset;
  }

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
    PyObject* const value = getter_ != nullptr && types_.has(tensor)
                                ? getter_->get(tensor, getter_->closure)
                                : PyObject_GetAttr(tensor, name_);
    if (value == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(value);
  }

 private:
  PyObject* name_;  // kept for good
  const TensorTypes& types_;
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

// Fetches what a loop over tensors is about to look at. Objects, torch's records of them, and what
// those point to are spread over memory, and a sweep or a training step drives them out of the
// caches: each is asked for some turns before the next is found in it. Hints: nothing depends on
// what is where, and a tensor of another type than torch's two is left alone.
class Ahead {
 public:
  Ahead(PyObject* const* tensors, size_t n)
      : tensors_(tensors), n_(n), word_(n > kRecords ? word_of_record(tensors[0]) : -1) {}
  explicit Ahead(const pybind11::list& tensors)
      : Ahead(reinterpret_cast<PyListObject*>(tensors.ptr())->ob_item, pybind11::len(tensors)) {}

  // To be called in the i-th turn.
  void turn(size_t i) const {
    if (word_ < 0) return;
    if (i + kObjects < n_) fetch(tensors_[i + kObjects], 2);
    if (i + kRecords < n_)
      if (const char* record = record_of(tensors_[i + kRecords])) fetch(record, 3);
    if (i + kContents < n_)
      if (const char* record = record_of(tensors_[i + kContents]))
        for (int word : {2, 3})  // its storage, and what autograd keeps (behind a table and counts)
          fetch(reinterpret_cast<const char* const*>(record)[word], 2);
  }

 private:
  static constexpr size_t kObjects = 16, kRecords = 8, kContents = 4;  // turns ahead

  static void fetch(const void* address, int lines) {
    for (int line = 0; line < lines; ++line)
      __builtin_prefetch(static_cast<const char*>(address) + 64 * line);
  }

  const char* record_of(PyObject* tensor) const {
    return types_.has(tensor) ? words(tensor)[word_] : nullptr;
  }

  static const char* const* words(PyObject* tensor) {
    return reinterpret_cast<const char* const*>(tensor);
  }

  // Which word of a Python tensor is the address of torch's record: the one shortly before the
  // shape, which is a part of it where there are few dimensions. -1 as long as it is not known.
  static int word_of_record(PyObject* tensor) {
    static int known = -1;
    if (known >= 0 || !TensorReader::has_exchange_api() || !TensorTypes::get().has(tensor))
      return known;
    TensorView view;
    try {
      view = TensorReader().read(tensor);
    } catch (pybind11::error_already_set&) {
      return known;
    }
    if (view.ndim > 4) return known;
    const char* const shape = reinterpret_cast<const char*>(view.shape);
    const int n = static_cast<int>(Py_TYPE(tensor)->tp_basicsize / sizeof(void*));
    for (int k = 2; k < n && known < 0; ++k)
      if (words(tensor)[k] < shape && shape < words(tensor)[k] + 256) known = k;
    return known;
  }

  const TensorTypes& types_ = TensorTypes::get();
  PyObject* const* tensors_;
  size_t n_;
  int word_;
};

// The same for tensors that nobody has yet: from where those of the last call were found.
class Known {
 public:
  explicit Known(size_t rows) : at_(rows) {}
  void note(size_t row, const void* object, const void* shape) { at_[row] = {object, shape}; }

  // To be called in the turn of a row.
  void turn(size_t row) const {
    if ((row += kAhead) >= at_.size()) return;
    __builtin_prefetch(at_[row].first);
    for (int line : {-64, 0, 64})  // of the record, about the shape
      __builtin_prefetch(static_cast<const char*>(at_[row].second) + line);
  }

 private:
  static constexpr size_t kAhead = 8;

  std::vector<std::pair<const void*, const void*>> at_;
};

}  // namespace pyreg
