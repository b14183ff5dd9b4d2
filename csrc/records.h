// Torch's own record of a tensor (c10::TensorImpl, behind the Python object), read without torch's
// headers: where each tensor lies is looked at afresh at every call, so it must cost nanoseconds.
//
// Torch's libraries export plain C functions that read a tensor (torch/csrc/inductor/aoti_torch/c,
// the "stable C shim"; 2 ns each), and two of c10's that only C++ has, for what autograd keeps. All
// are found at run time. Which word of a Python object is the record's address is found too: the
// one that the object's `_cdata` says. What does not behave as Python's attributes do is not used,
// and attributes are read in its place (1 us a tensor).
#pragma once

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
  // Null where torch is not as expected, and where tests say so. Asked first while the module is
  // imported; again at later calls, some times, as what is active may hide how tensors are:
  // a transform of torch.func's, say.
  static const Records* get() {
    static std::optional<Records> found;
    static int tries = 8;
    if (!found && tries > 0) {
      --tries;
      if (std::optional<Records> now = find(); now && !found) found = now;
    }
    return found && enabled() ? &*found : nullptr;
  }

  static void use(bool yes) { enabled() = yes; }

  // Null if this is no tensor.
  const void* of(PyObject* object) const {
    return is_plain(object) || PyType_IsSubtype(Py_TYPE(object), tensor_) ? word(object, word_)
                                                                          : nullptr;
  }

  // Null if it is not of torch's own two types: an attribute of a subclass comes before what the
  // record says.
  const void* of_plain(PyObject* object) const {
    return is_plain(object) ? word(object, word_) : nullptr;
  }

  // Whether it could be read: what has no strides or no memory could not, and attributes say why.
  bool read(const void* record, TensorView& view) const {
    // (A tensor of C++ is one pointer, to its record. The functions take that pointer's address.)
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

  // Where its first element lies; null where that cannot be told.
  const void* data(const void* record) const {
    void* data = nullptr;
    return data_of_(&record, &data) == 0 ? data : nullptr;
  }

  // A tensor of C++ that keeps a record until `release`.
  const void* keep(const void* record) const {
    const void* tensor = undefined_;
    if (assign_(&record, &tensor) != 0)
      throw std::runtime_error("torch keeps no reference to a tensor");
    return tensor;
  }
  void release(const void* tensor) const { assign_(&undefined_, &tensor); }

 private:
  // Torch's functions; the integers are error codes.
  template <class T>
  using Get = int32_t (*)(const void* tensor, T* out);

  static bool& enabled() {
    static bool on = true;
    return on;
  }

  bool is_plain(PyObject* object) const {
    return Py_IS_TYPE(object, parameter_) || Py_IS_TYPE(object, tensor_);
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
        if (of_plain(tensor.ptr()) == nullptr) return false;  // a mode is active that makes others
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
    release(keep(record));
    tensor.attr("grad") = pybind11::none();
    return gradient(record) == nullptr;
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
  explicit Held(pybind11::object object) { take(std::move(object)); }
  Held(const Records& records, const void* record)
      : records_(&records), record_(records.keep(record)) {}
  Held(Held&& other) noexcept
      : object_(std::move(other.object_)),
        records_(std::exchange(other.records_, nullptr)),
        record_(std::exchange(other.record_, nullptr)) {}
  Held& operator=(Held&&) = delete;
  ~Held() {
    if (record_ != nullptr) records_->release(record_);
  }

  bool is_none() const { return record_ == nullptr && !object_; }
  // Null if it is not known.
  const void* record() const { return record_; }
  // Null if nobody gave or asked for it.
  PyObject* object() const { return object_.ptr(); }

  // Asks `tensor`, whose gradient it is, for the object. False if it has another by now.
  bool ask(PyObject* tensor) {
    static const Attribute kGrad("grad");
    if (!object_) take(kGrad(tensor));
    return record_ == nullptr || (object_ && records_->of(object_.ptr()) == record_);
  }

 private:
  void take(pybind11::object object) {
    if (!object.is_none()) object_ = std::move(object);
  }

  pybind11::object object_;
  const Records* records_ = nullptr;
  const void* record_ = nullptr;
};

}  // namespace pyreg
