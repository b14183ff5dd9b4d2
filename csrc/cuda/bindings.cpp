// The Python module pyreg._cuda: a Layout of tensors on one GPU, and the sweeps over it.
//
// As in csrc/bindings.cpp, a Layout records what the tensors were, never where: every call shows
// them again, and one that changed raises StaleLayout before anything is launched. Memory for
// results, scratch and tables is the caller's (torch allocates it, so that it obeys streams and
// graphs); so is the stream. Nothing here waits for the device.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../tensor_view.h"
#include "launch.h"
#include "layout.h"

namespace py = pybind11;

#ifndef PYREG_MODULE  // (tests build the module a second time, over the kernels' code on the host)
#define PYREG_MODULE _cuda
#define PYREG_DEVICE_TYPE 2
#define PYREG_DEVICE_NAME "cuda"
#endif

namespace pyreg::cuda {
namespace {

struct StaleLayout : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A gradient that cannot be its tensor's: another shape, dtype or device, expanded, without memory.
struct GradientMismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

const std::vector<std::string>& penalty_names() {
#define PYREG_NAME(P) P::name,
  static const std::vector<std::string> names = {PYREG_PENALTIES(PYREG_NAME)};
#undef PYREG_NAME
  return names;
}

int penalty_index(const std::string& name) {
  const auto& names = penalty_names();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) throw py::value_error("no native kernel for penalty '" + name + "'");
  return static_cast<int>(found - names.begin());
}

// Where a launch goes and what memory it has. `table` is called only when the tensors do not fit
// into the launch: with bytes, which it copies to the device on the launch's stream; or with the
// address of the last copy, when nothing has changed. It returns the address, valid on that stream.
struct Target {
  uintptr_t out, scratch, stream;
  py::function table;
};

constexpr int64_t kCounterBytes = 16;

class Layout {
 public:
  Layout(const py::list& tensors, const std::vector<int>& rule_of,
         const std::vector<std::string>& penalties, int device)
      : device_(device) {
    if (rule_of.size() != py::len(tensors)) throw py::value_error("one rule per tensor");
    std::vector<int> indices;
    for (const std::string& name : penalties) indices.push_back(penalty_index(name));
    TensorReader reader;
    std::vector<Row> rows;
    for (size_t i = 0; i < rule_of.size(); ++i) {
      const TensorView view = reader.read(PyList_GET_ITEM(tensors.ptr(), i));
      if (!is_here(view) || !view.dtype)
        throw py::value_error("row " + std::to_string(i) + ": not a tensor of a swept dtype here");
      recorded_.push_back({*view.dtype, view.ndim, geometry_.size()});
      geometry_.insert(geometry_.end(), view.shape, view.shape + view.ndim);
      geometry_.insert(geometry_.end(), view.strides, view.strides + view.ndim);
      rows.push_back({view.numel(), *view.dtype, rule_of[i]});
    }
    plans_.emplace_back(rows, indices, true);
    plans_.emplace_back(rows, indices, false);
  }

  bool by_value() const { return plans_[0].by_value(); }

  // A zeroed counter, then the partials.
  int64_t scratch_bytes(bool stats) const {
    const int columns = stats ? kColumns<Sweep::kStats> : kMaxSums;
    return kCounterBytes + int64_t{plans_[stats].segments()} * columns * int64_t{sizeof(double)};
  }

  void value(const py::list& tensors, const py::list& strengths, const Target& target) {
    TensorReader reader;
    run(Sweep::kValue, show(tensors, reader), nullptr, strengths, {}, target, reader);
  }

  // grads[i] is a tensor like tensors[i], or None to leave the row out.
  void gradient(const py::list& tensors, const py::list& grads, const py::list& strengths,
                const py::object& scale, const Target& target) {
    if (py::len(grads) != py::len(tensors)) throw py::value_error("one gradient per tensor");
    TensorReader reader;
    Pointers w, g;
    std::vector<int64_t> others;
    for (size_t i = 0; i < recorded_.size(); ++i) {
      const TensorView view = show(tensors, i, reader);
      w.push_back(view.data);
      g.push_back(show_gradient(view, PyList_GET_ITEM(grads.ptr(), i), i, reader, others));
    }
    if (!others.empty()) throw py::value_error("a gradient has other strides than its tensor");
    run(Sweep::kGradient, w, &g, strengths, scale, target, reader);
  }

  // Adds to each tensor's .grad. Returns how many there are, and the rows whose gradient has other
  // strides than its tensor: those count in the value, and the caller adds their gradient.
  py::tuple accumulate(const py::list& tensors, const py::list& strengths, const py::object& scale,
                       const Target& target) {
    static PyObject* const kGrad = PyUnicode_InternFromString("grad");
    TensorReader reader;
    Pointers w, g;
    w.reserve(recorded_.size());
    g.reserve(recorded_.size());
    std::vector<int64_t> others;
    int64_t present = 0;
    check_number(tensors);
    for (size_t i = 0; i < recorded_.size(); ++i) {
      const TensorView view = show(tensors, i, reader);
      const auto grad = py::reinterpret_steal<py::object>(
          PyObject_GetAttr(PyList_GET_ITEM(tensors.ptr(), i), kGrad));
      if (!grad) throw py::error_already_set();
      w.push_back(view.data);
      g.push_back(show_gradient(view, grad.ptr(), i, reader, others));
      present += !grad.is_none();
    }
    run(Sweep::kAccumulate, w, &g, strengths, scale, target, reader);
    return py::make_tuple(present, others);
  }

  void prox(const py::list& tensors, const py::list& strengths, const py::object& step,
            const Target& target) {
    TensorReader reader;
    run(Sweep::kProx, show(tensors, reader), nullptr, strengths, step, target, reader);
  }

  void stats(const py::list& tensors, const Target& target) {
    TensorReader reader;
    run(Sweep::kStats, show(tensors, reader), nullptr, py::list(), {}, target, reader);
  }

 private:
  using Pointers = std::vector<void*>;

  // What a row must still be. Sizes and strides lie in geometry_: [shape..., strides...].
  struct Recorded {
    DType dtype;
    int ndim;
    size_t geometry;
  };

  bool is_here(const TensorView& view) const {
    return view.device_type == PYREG_DEVICE_TYPE && view.device_index == device_;
  }

  void check_number(const py::list& tensors) const {
    if (py::len(tensors) != recorded_.size()) throw StaleLayout("the number of tensors changed");
  }

  TensorView show(const py::list& tensors, size_t i, TensorReader& reader) const {
    check_number(tensors);
    PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), i);
    const TensorView view = reader.read(tensor);
    const Recorded& was = recorded_[i];
    const int64_t* geometry = geometry_.data() + was.geometry;
    const bool same = is_here(view) && view.dtype == was.dtype && view.ndim == was.ndim &&
                      std::equal(view.shape, view.shape + view.ndim, geometry) &&
                      std::equal(view.strides, view.strides + view.ndim, geometry + was.ndim) &&
                      has_memory(view, tensor);
    if (!same) throw StaleLayout("row " + std::to_string(i) + " changed");
    return view;
  }

  Pointers show(const py::list& tensors, TensorReader& reader) const {
    check_number(tensors);
    Pointers pointers;
    pointers.reserve(recorded_.size());
    for (size_t i = 0; i < recorded_.size(); ++i) pointers.push_back(show(tensors, i, reader).data);
    return pointers;
  }

  // As in csrc/bindings.cpp: a view into a freed storage points at its own offset.
  static bool has_memory(const TensorView& view, PyObject* tensor) {
    constexpr uintptr_t kPlausible = uintptr_t{1} << 40;
    if (reinterpret_cast<uintptr_t>(view.data) >= kPlausible || view.numel() == 0) return true;
    return py::handle(tensor).attr("untyped_storage")().attr("data_ptr")().cast<uintptr_t>() != 0;
  }

  void* show_gradient(const TensorView& tensor, PyObject* grad, size_t i, TensorReader& reader,
                      std::vector<int64_t>& others) const {
    if (grad == Py_None) return nullptr;
    TensorView view;
    try {
      view = reader.read(grad);
    } catch (py::error_already_set&) {  // sparse, say
      throw GradientMismatch(std::to_string(i));
    }
    if (!is_here(view) || view.dtype != tensor.dtype || !view.same_shape(tensor) ||
        view.expanded() || !has_memory(view, grad))
      throw GradientMismatch(std::to_string(i));
    if (view.same_strides(tensor)) return view.data;
    others.push_back(static_cast<int64_t>(i));
    return nullptr;
  }

  // A float, or a tensor of one float32 or float64 on this device.
  Number number(py::handle x, TensorReader& reader) const {
    if (!x || x.is_none()) return Number::of(0);
    if (PyFloat_Check(x.ptr()) || PyLong_Check(x.ptr())) return Number::of(x.cast<double>());
    const TensorView view = reader.read(x.ptr());
    if (!is_here(view) || view.numel() != 1 ||
        (view.dtype != DType::kFloat32 && view.dtype != DType::kFloat64))
      throw py::value_error(
          "expected a strength, scale or step as a float, or as a float32 or "
          "float64 tensor of one element on " PYREG_DEVICE_NAME ":" +
          std::to_string(device_));
    return Number::at(view.data,
                      view.dtype == DType::kFloat32 ? ScalarKind::kFloat32 : ScalarKind::kFloat64);
  }

  void run(Sweep sweep, const Pointers& w, const Pointers* g, const py::list& strengths,
           const py::object& scale, const Target& target, TensorReader& reader) {
    const bool stats = sweep == Sweep::kStats;
    Plan& plan = plans_[stats];
    plan.show(w.data(), g == nullptr ? nullptr : g->data());
    if (!stats) {
      if (py::len(strengths) != size_t{plan.rules()} * kMaxStrengths)
        throw py::value_error("expected max_strengths strengths per rule");
      std::vector<Number> numbers;
      for (py::handle s : strengths) numbers.push_back(number(s, reader));
      plan.strengthen(numbers.data());
    }
    const char* table = nullptr;
    if (!plan.by_value()) table = table_of(plan, tables_[stats ? 2 : g != nullptr], target);
    static thread_local Parameter parameter;
    const uint32_t blocks = plan.fill(parameter, table, number(scale, reader),
                                      static_cast<uint32_t>(blocks_at_a_time(sweep, device_)));
    parameter.out = reinterpret_cast<double*>(target.out);
    parameter.done = reinterpret_cast<uint32_t*>(target.scratch);
    parameter.partials = reinterpret_cast<double*>(target.scratch + kCounterBytes);
    py::gil_scoped_release release;
    launch(sweep, parameter, blocks, device_, reinterpret_cast<void*>(target.stream));
  }

  // The last table that a kind of sweep used: what it holds, and where.
  struct KnownTable {
    std::string bytes;
    uintptr_t address = 0;
  };

  // The table in device memory: a new one if anything in it changed.
  const char* table_of(const Plan& plan, KnownTable& known, const Target& target) const {
    std::string bytes(plan.table_bytes(), '\0');
    plan.write_table(bytes.data());
    const bool same = known.address != 0 && bytes == known.bytes;
    const py::object given = same ? py::object(py::int_(known.address)) : py::bytes(bytes);
    known.address = target.table(given).cast<uintptr_t>();
    known.bytes = std::move(bytes);
    return reinterpret_cast<const char*>(known.address);
  }

  int device_;
  std::vector<Recorded> recorded_;
  std::vector<int64_t> geometry_;
  std::vector<Plan> plans_;  // by rule; by row, for `stats`
  KnownTable tables_[3];     // without gradients, with them, `stats`
};

}  // namespace
}  // namespace pyreg::cuda

PYBIND11_MODULE(PYREG_MODULE, m) {
  using namespace pyreg::cuda;
  m.doc() = "pyreg's native sweeps over CUDA tensors. Use pyreg's Python functions instead.";
  m.attr("max_strengths") = pyreg::kMaxStrengths;
  m.attr("max_sums") = pyreg::kMaxSums;
  m.attr("max_by_value") = kEntries - 1;
  m.attr("device_type") = PYREG_DEVICE_NAME;
  m.attr("penalties") = py::tuple(py::cast(penalty_names()));
  m.attr("built_with") = built_with();
  m.attr("architectures") = architectures();
  py::register_exception<StaleLayout>(m, "StaleLayout", PyExc_RuntimeError);
  py::register_exception<GradientMismatch>(m, "GradientMismatch", PyExc_RuntimeError);
  m.def("driver_serves", &driver_serves);
  m.def("unserved", &unserved, py::arg("device"));
  py::class_<Target>(m, "Target")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, py::function>(), py::arg("out"),
           py::arg("scratch"), py::arg("stream"), py::arg("table"));
  py::class_<Layout>(m, "Layout")
      .def(py::init<const py::list&, const std::vector<int>&, const std::vector<std::string>&,
                    int>(),
           py::arg("tensors"), py::arg("rule_of"), py::arg("penalties"), py::arg("device"))
      .def_property_readonly("by_value", &Layout::by_value)
      .def("scratch_bytes", &Layout::scratch_bytes, py::arg("stats"))
      .def("value", &Layout::value, py::arg("tensors"), py::arg("strengths"), py::arg("target"))
      .def("gradient", &Layout::gradient, py::arg("tensors"), py::arg("grads"),
           py::arg("strengths"), py::arg("scale"), py::arg("target"))
      .def("accumulate", &Layout::accumulate, py::arg("tensors"), py::arg("strengths"),
           py::arg("scale"), py::arg("target"))
      .def("prox", &Layout::prox, py::arg("tensors"), py::arg("strengths"), py::arg("step"),
           py::arg("target"))
      .def("stats", &Layout::stats, py::arg("tensors"), py::arg("target"));
}
