// Torch's own record of a tensor (c10::TensorImpl, behind the Python object), read without torch's
// headers: where each tensor lies is looked at afresh at every call, so it must cost nanoseconds.
//
// Torch's libraries export plain C functions that read a tensor (torch/csrc/inductor/aoti_torch/c,
// the "stable C shim"; 2 ns each), and two of c10's that only C++ has, for what autograd keeps. All
// are found at run time. Which word of a Python object is the record's address is found too: the
// one that the object's `_cdata` says. What does not behave as Python's attributes do is not used,
// and attributes are read in its place (1 us a tensor).
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

#include "tensor_view.h"

namespace pyreg {

class Records {
 public:
  // Null where torch is not as expected, and where tests say so.
  static const Records* get() {
    PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<std::optional<Records>> kept;
    const auto& found = kept.call_once_and_store_result(find).get_stored();
    return found && enabled() ? &*found : nullptr;
  }

  static void use(bool yes) { enabled() = yes; }

  // Null if this is no tensor.
  const void* of(PyObject* object) const {
    return is_plain(object) || PyType_IsSubtype(Py_TYPE(object), tensor_) ? word(object, word_)
                                                                          : nullptr;
  }

  // Of torch's own two types, so that no attribute of a subclass stands before the record's.
  bool is_plain(PyObject* object) const {
    return Py_IS_TYPE(object, parameter_) || Py_IS_TYPE(object, tensor_);
  }

  // Whether it could be read: what has no strides or no memory could not, and attributes say why.
  bool read(const void* record, TensorView& view) const {
    // (To C++ a tensor is a reference that is counted: an address. The functions take its own.)
    const void* const tensor = &record;
    int32_t layout, dtype, type, index;
    int64_t ndim;
    if (layout_of_(tensor, &layout) != 0 || layout != strided_ || dtype_of_(tensor, &dtype) != 0 ||
        device_type_of_(tensor, &type) != 0 || device_index_of_(tensor, &index) != 0 ||
        ndim_of_(tensor, &ndim) != 0 || shape_of_(tensor, &view.shape) != 0 ||
        strides_of_(tensor, &view.strides) != 0 || data_of_(tensor, &view.data) != 0)
      return false;
    view.ndim = static_cast<int>(ndim);
    view.device_type = type == cpu_ ? 1 : type == cuda_ ? 2 : -1;
    view.device_index = index < 0 ? 0 : index;
    view.dtype.reset();
    if (dtype == float32_) view.dtype = DType::kFloat32;
    if (dtype == float64_) view.dtype = DType::kFloat64;
    if (dtype == float16_) view.dtype = DType::kFloat16;
    if (dtype == bfloat16_) view.dtype = DType::kBFloat16;
    return true;
  }

  // The record of a tensor's gradient; null without one.
  const void* gradient(const void* record) const {
    const void* const found = *gradient_of_(record);
    return found == undefined_ ? nullptr : found;
  }

  bool requires_grad(const void* record) const { return is_required_of_(record); }

  // A reference to nothing, for `refer`, and with that to let go of what it refers to.
  const void* nothing() const { return undefined_; }

  // Makes `reference` one to this record, which is kept until it is made another.
  void refer(const void*& reference, const void* record) const {
    if (assign_(&record, &reference) != 0)
      throw std::runtime_error("torch keeps no reference to a tensor");
  }

 private:
  // Torch's functions; the integers are error codes.
  template <class T>
  using Get = int32_t (*)(const void* tensor, T* out);

  static bool& enabled() {
    static bool on = true;
    return on;
  }

  static const void* word(PyObject* object, int k) {
    return reinterpret_cast<const void* const*>(object)[k];
  }

  static std::optional<Records> find() {
    try {
      Records records;
      if (records.find_functions() && records.find_word() && records.behaves()) return records;
    } catch (const std::exception&) {  // an attribute that is not there, or of another type
    }
    return {};
  }

  bool find_functions() {
#if defined(__linux__) || defined(__APPLE__)
    namespace py = pybind11;
    py::module_ torch = py::module_::import("torch");
    const auto type = [](const py::object& found) {
      return reinterpret_cast<PyTypeObject*>(py::object(found).release().ptr());
    };
    tensor_ = type(torch.attr("Tensor"));
    parameter_ = type(py::module_::import("torch.nn").attr("Parameter"));
    // (A search through a library goes on through those that it was linked with.)
    const auto file = torch.attr("_C").attr("__file__").cast<std::string>();
    void* const library = dlopen(file.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) return false;
    bool all = true;
    const auto search = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      all = all && function != nullptr;
    };
    const auto search_constant = [&](int32_t& constant, const char* name) {
      int32_t (*function)() = nullptr;
      search(function, name);
      if (function != nullptr) constant = function();
    };
    search(layout_of_, "aoti_torch_get_layout");
    search(dtype_of_, "aoti_torch_get_dtype");
    search(device_type_of_, "aoti_torch_get_device_type");
    search(device_index_of_, "aoti_torch_get_device_index");
    search(ndim_of_, "aoti_torch_get_dim");
    search(shape_of_, "aoti_torch_get_sizes");
    search(strides_of_, "aoti_torch_get_strides");
    search(data_of_, "aoti_torch_get_data_ptr");
    search(assign_, "aoti_torch_assign_tensors");
    search_constant(strided_, "aoti_torch_layout_strided");
    search_constant(cpu_, "aoti_torch_device_type_cpu");
    search_constant(cuda_, "aoti_torch_device_type_cuda");
    search_constant(float32_, "aoti_torch_dtype_float32");
    search_constant(float64_, "aoti_torch_dtype_float64");
    search_constant(float16_, "aoti_torch_dtype_float16");
    search_constant(bfloat16_, "aoti_torch_dtype_bfloat16");
    search(gradient_of_, "_ZNK3c1010TensorImpl4gradEv");
    search(is_required_of_, "_ZNK3c1010TensorImpl13requires_gradEv");
    return all;
#else
    return false;
#endif
  }

  bool find_word() {
    const pybind11::object tensor = make("float32");
    const void* const record = cdata(tensor);
    const int n = static_cast<int>(tensor_->tp_basicsize / sizeof(void*));
    word_ = 2;
    while (word_ < n && word(tensor.ptr(), word_) != record) ++word_;
    return word_ < n;
  }

  // Whether all that is read of some tensors is what their attributes say.
  bool behaves() {
    for (const char* dtype : {"float32", "float64", "float16", "bfloat16", "int32"}) {
      const pybind11::object whole = make(dtype);
      for (const pybind11::object& tensor :
           {whole, pybind11::object(whole.attr("t")().attr("narrow")(0, 1, 2))}) {
        AttributeReader attributes;
        const TensorView expected = attributes.read(tensor.ptr());
        if (of(tensor.ptr()) != cdata(tensor)) return false;
        TensorView found;
        if (!read(of(tensor.ptr()), found) || found.data != expected.data ||
            found.dtype != expected.dtype || found.device_type != expected.device_type ||
            !found.same_shape(expected) || found.device_index != expected.device_index ||
            !equal(found.strides, expected.strides, expected.ndim))
          return false;
      }
    }
    const pybind11::object tensor = make("float32"), grad = make("float32");
    const void* const record = of(tensor.ptr());
    if (requires_grad(record)) return false;
    tensor.attr("requires_grad") = true;
    undefined_ = *gradient_of_(record);
    tensor.attr("grad") = grad;
    if (!requires_grad(record) || gradient(record) != cdata(grad)) return false;
    const void* reference = nothing();
    refer(reference, record);
    const bool refers = reference == record;
    refer(reference, nothing());
    tensor.attr("grad") = pybind11::none();
    return refers && reference == nothing() && gradient(record) == nullptr;
  }

  // [3][4] of any such dtype.
  static pybind11::object make(const char* dtype) {
    namespace py = pybind11;
    using namespace py::literals;
    py::module_ torch = py::module_::import("torch");
    return torch.attr("zeros")(3, 4, "dtype"_a = torch.attr(dtype), "device"_a = "cpu");
  }

  static const void* cdata(const pybind11::object& tensor) {
    return reinterpret_cast<const void*>(tensor.attr("_cdata").cast<uintptr_t>());
  }

  PyTypeObject *tensor_ = nullptr, *parameter_ = nullptr;  // kept for good
  int word_ = 0;
  Get<int32_t> layout_of_, dtype_of_, device_type_of_, device_index_of_;
  Get<int64_t> ndim_of_;
  Get<const int64_t*> shape_of_, strides_of_;
  Get<void*> data_of_;
  int32_t (*assign_)(const void* from, const void* to);
  int32_t strided_, cpu_, cuda_, float32_, float64_, float16_, bfloat16_;
  const void* const* (*gradient_of_)(const void* record);  // c10::TensorImpl::grad() const
  bool (*is_required_of_)(const void* record);             // c10::TensorImpl::requires_grad() const
  const void* undefined_ = nullptr;                        // where there is no gradient
};

// Reads views. One reader per call: it owns what attributes need.
class TensorReader {
 public:
  TensorView read(PyObject* tensor) {
    TensorView view;
    const void* const record = records_ != nullptr ? records_->of(tensor) : nullptr;
    if (record == nullptr || !records_->read(record, view)) view = attributes_.read(tensor);
    return view;
  }

  // Null where attributes are read.
  const Records* records() const { return records_; }

 private:
  const Records* const records_ = Records::get();
  AttributeReader attributes_;
};

// A gradient, or none, that is kept whoever else lets go of it: by its Python object, or by torch,
// which spares the making of an object that nobody asked for (100 ns).
class Held {
 public:
  Held() = default;
  explicit Held(pybind11::object object) {
    if (!object.is_none()) object_ = std::move(object);
  }
  Held(const Records& records, const void* record)
      : records_(&records), reference_(records.nothing()) {
    records.refer(reference_, record);
  }
  Held(Held&& other) noexcept
      : object_(std::move(other.object_)),
        records_(std::exchange(other.records_, nullptr)),
        reference_(other.reference_) {}
  Held& operator=(Held&&) = delete;
  ~Held() {
    if (records_ != nullptr) records_->refer(reference_, records_->nothing());
  }

  // A tensor's .grad.
  static Held gradient_of(PyObject* tensor, const Records* records) {
    if (records == nullptr || !records->is_plain(tensor)) return Held(attribute(tensor));
    const void* const record = records->gradient(records->of(tensor));
    return record == nullptr ? Held() : Held(*records, record);
  }

  bool is_none() const { return records_ == nullptr && !object_; }
  // Null if it is not known.
  const void* record() const { return records_ != nullptr ? reference_ : nullptr; }

  // The Python object, of a gradient of `tensor`'s.
  PyObject* object(PyObject* tensor) {
    if (!object_) object_ = attribute(tensor);
    if (records_ != nullptr && records_->of(object_.ptr()) != reference_)
      throw std::runtime_error("a gradient was replaced by another thread");
    return object_.ptr();
  }

 private:
  static pybind11::object attribute(PyObject* tensor) {
    static const Attribute kGrad("grad");
    return kGrad(tensor);
  }

  pybind11::object object_;
  const Records* records_ = nullptr;
  const void* reference_ = nullptr;
};

}  // namespace pyreg
