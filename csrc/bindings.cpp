// The Python module pyreg._native: a Layout of tensors, and the sweeps over it.
//
// A Layout records what the tensors were (dtype, shape, strides, device) when it was made, never
// where they were (but to notice that one moved): every call shows the tensors again, every tensor
// is looked at again, and a pointer is used only in the call that brought it. A tensor that changed
// raises StaleLayout before anything is written.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "penalties.h"
#include "places.h"
#include "sweeps.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace pyreg {
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

class Layout {
 public:
  Layout(const py::list& tensors, const std::vector<int>& rule_of,
         const std::vector<std::string>& penalties)
      : table_(make(tensors, rule_of, penalties)),
        weights_(table_.rows().size()),
        gradients_(table_.rows().size()),
        moments_(table_.rows().size()) {
    for (const Row& row : table_.rows()) bytes_.push_back(row.numel * item_size(row.dtype));
  }

  py::tuple value(const py::list& tensors, const std::vector<double>& strengths, int threads) {
    check_strengths(strengths);
    TensorReader reader;
    const Pointers w = show(tensors, reader);
    std::vector<double> sums = make_sums();
    {
      py::gil_scoped_release release;
      cpu::value(table_, w.data(), strengths.data(), sums.data(), threads);
    }
    return py::make_tuple(value_from_sums(table_, sums.data(), strengths.data()), sums);
  }

  // grads[i] is a tensor like tensors[i], or None to leave the row out.
  void gradient(const py::list& tensors, const py::list& grads,
                const std::vector<double>& strengths, double scale, int threads) {
    check_strengths(strengths);
    if (py::len(grads) != py::len(tensors)) throw py::value_error("one gradient per tensor");
    TensorReader reader;
    Pointers w, g;
    std::vector<int64_t> others;
    for (size_t i = 0; i < table_.rows().size(); ++i) {
      const TensorView view = show(tensors, i, reader);
      w.push_back(view.data);
      g.push_back(show_gradient(view, PyList_GET_ITEM(grads.ptr(), i), i, reader, others));
    }
    if (!others.empty()) throw py::value_error("a gradient has other strides than its tensor");
    py::gil_scoped_release release;
    cpu::gradient(table_, w.data(), g.data(), strengths.data(), scale, threads);
  }

  // Adds to each tensor's .grad. Returns the value, how many gradients there were, and the rows
  // left to the caller: their gradient has other strides than its tensor, or shares memory with
  // another row's. Those are counted in the value.
  py::tuple accumulate(const py::list& tensors, const std::vector<double>& strengths, double scale,
                       int threads) {
    check_strengths(strengths);
    static PyObject* const kGrad = PyUnicode_InternFromString("grad");
    TensorReader reader;
    Pointers w, g;
    w.reserve(table_.rows().size());
    g.reserve(table_.rows().size());
    std::vector<int64_t> others;
    int64_t present = 0;
    for (size_t i = 0; i < table_.rows().size(); ++i) {
      gradients_.prefetch(i + kAhead);
      const TensorView view = show(tensors, i, reader);
      const auto grad = py::reinterpret_steal<py::object>(
          PyObject_GetAttr(PyList_GET_ITEM(tensors.ptr(), i), kGrad));
      if (!grad) throw py::error_already_set();
      w.push_back(view.data);
      g.push_back(show_gradient(view, grad.ptr(), i, reader, others));
      present += !grad.is_none();
    }
    for (int64_t i : gradients_.overlapping(bytes_)) {
      if (g[i] != nullptr) others.push_back(i);
      g[i] = nullptr;
    }
    std::vector<double> sums = make_sums();
    {
      py::gil_scoped_release release;
      cpu::accumulate(table_, w.data(), g.data(), strengths.data(), scale, sums.data(), threads);
    }
    return py::make_tuple(value_from_sums(table_, sums.data(), strengths.data()), present, others);
  }

  // Returns the rows left to the caller: those that share memory with another row.
  std::vector<int64_t> prox(const py::list& tensors, const std::vector<double>& strengths,
                            double step, int threads) {
    check_strengths(strengths);
    TensorReader reader;
    Pointers w = show(tensors, reader);
    const std::vector<int64_t> others = weights_.overlapping(bytes_);
    for (int64_t i : others) w[i] = nullptr;
    {
      py::gil_scoped_release release;
      cpu::prox(table_, w.data(), strengths.data(), step, threads);
    }
    return others;
  }

  // The same with a step for each element. moments[i] is a tensor like tensors[i], of its dtype or
  // float32, or None; numbers is [rows][3] (numerator, factor, offset). Returns the value of the
  // new weights, and the rows left to the caller: those that share memory with another row, or
  // whose moment lies otherwise than the tensor. Those are not in the value.
  py::tuple prox_in_metric(const py::list& tensors, const py::list& moments,
                           const std::vector<double>& numbers, const std::vector<bool>& root,
                           const std::vector<double>& strengths, int threads) {
    check_strengths(strengths);
    const size_t rows = table_.rows().size();
    if (py::len(moments) != rows || numbers.size() != 3 * rows || root.size() != rows)
      throw py::value_error("one metric per tensor");
    TensorReader reader;
    Pointers w;
    std::vector<Metric> metrics(rows);
    std::vector<int64_t> others;
    for (size_t i = 0; i < rows; ++i) {
      const TensorView view = show(tensors, i, reader);
      w.push_back(view.data);
      metrics[i] = {nullptr,           false, root[i], numbers[3 * i], numbers[3 * i + 1],
                    numbers[3 * i + 2]};
      PyObject* const moment = PyList_GET_ITEM(moments.ptr(), i);
      if (moment == Py_None) continue;
      const TensorView m = reader.read(moment);
      if (m.device_type != 1 || !m.dtype || !m.same_shape(view) ||
          !in_memory(m, moment, i, moments_))
        throw py::value_error("row " + std::to_string(i) + ": a moment unlike its tensor");
      metrics[i].moment = m.data;
      metrics[i].float32 = m.dtype == DType::kFloat32;
      if (!m.same_strides(view) || !(metrics[i].float32 || m.dtype == view.dtype))
        others.push_back(static_cast<int64_t>(i));
    }
    for (int64_t i : weights_.overlapping(bytes_)) others.push_back(i);
    for (int64_t i : others) w[i] = nullptr;
    std::vector<double> sums = make_sums();
    {
      py::gil_scoped_release release;
      cpu::prox_in_metric(table_, w.data(), metrics.data(), strengths.data(), sums.data(), threads);
    }
    return py::make_tuple(value_from_sums(table_, sums.data(), strengths.data()), others);
  }

  // [(l1, l2_squared, max_abs, zeros, non_finite), ...], one per row.
  std::vector<std::tuple<double, double, double, int64_t, int64_t>> stats(const py::list& tensors,
                                                                          int threads) {
    TensorReader reader;
    const Pointers w = show(tensors, reader);
    std::vector<Stats> stats(table_.rows().size());
    {
      py::gil_scoped_release release;
      cpu::stats(table_, w.data(), stats.data(), threads);
    }
    std::vector<std::tuple<double, double, double, int64_t, int64_t>> rows;
    rows.reserve(stats.size());
    for (const Stats& s : stats)
      rows.emplace_back(s.l1, s.l2_squared, s.max_abs, s.zeros, s.non_finite);
    return rows;
  }

 private:
  using Pointers = std::vector<void*>;

  // What a row must still be. Sizes and strides lie in geometry_: [shape..., strides...].
  struct Recorded {
    DType dtype;
    int ndim;
    size_t geometry;
  };

  Table make(const py::list& tensors, const std::vector<int>& rule_of,
             const std::vector<std::string>& penalties) {
    if (rule_of.size() != py::len(tensors)) throw py::value_error("one rule per tensor");
    std::vector<int> indices;
    for (const std::string& name : penalties) indices.push_back(penalty_index(name));
    TensorReader reader;
    std::vector<Row> rows;
    for (size_t i = 0; i < rule_of.size(); ++i) {
      const TensorView view = reader.read(PyList_GET_ITEM(tensors.ptr(), i));
      if (view.device_type != 1 || !view.dtype)
        throw py::value_error("row " + std::to_string(i) + ": not a CPU tensor of a swept dtype");
      recorded_.push_back({*view.dtype, view.ndim, geometry_.size()});
      geometry_.insert(geometry_.end(), view.shape, view.shape + view.ndim);
      geometry_.insert(geometry_.end(), view.strides, view.strides + view.ndim);
      rows.push_back({view.numel(), *view.dtype, rule_of[i]});
    }
    return Table(std::move(rows), std::move(indices));
  }

  // How many rows ahead of the look a tensor's record is fetched.
  static constexpr size_t kAhead = 8;

  TensorView show(const py::list& tensors, size_t i, TensorReader& reader) {
    weights_.prefetch(i + kAhead);
    if (PyList_GET_SIZE(tensors.ptr()) != static_cast<Py_ssize_t>(recorded_.size()))
      throw StaleLayout("the number of tensors changed");
    const TensorView view = reader.read(PyList_GET_ITEM(tensors.ptr(), i));
    const Recorded& was = recorded_[i];
    const int64_t* geometry = geometry_.data() + was.geometry;
    const bool same = view.device_type == 1 && view.dtype == was.dtype && view.ndim == was.ndim &&
                      std::equal(view.shape, view.shape + view.ndim, geometry) &&
                      std::equal(view.strides, view.strides + view.ndim, geometry + was.ndim) &&
                      in_memory(view, PyList_GET_ITEM(tensors.ptr(), i), i, weights_);
    if (!same) throw StaleLayout("row " + std::to_string(i) + " changed");
    return view;
  }

  Pointers show(const py::list& tensors, TensorReader& reader) {
    Pointers pointers;
    pointers.reserve(recorded_.size());
    for (size_t i = 0; i < recorded_.size(); ++i) pointers.push_back(show(tensors, i, reader).data);
    return pointers;
  }

  // Whether memory holds every element, as it is. Torch is asked only about a row that moved: a
  // storage that is freed or resized moves.
  static bool in_memory(const TensorView& view, PyObject* tensor, size_t i, Places& places) {
    places.note_metadata(i, view.shape);
    if (view.data != nullptr && places.at(i, view.data)) return true;
    if (view.numel() > 0) {
      const py::object storage = py::handle(tensor).attr("untyped_storage")();
      const auto base = storage.attr("data_ptr")().cast<uintptr_t>();
      const auto size = storage.attr("nbytes")().cast<uintptr_t>();
      const auto begin = reinterpret_cast<uintptr_t>(view.data);
      if (py::handle(tensor).attr("is_neg")().cast<bool>()) return false;
      if (base == 0 || begin + view.span() * item_size(*view.dtype) > base + size) return false;
    }
    places.note(i, view.data);
    return true;
  }

  // The gradient's address; null for None and for one with other strides than its tensor.
  void* show_gradient(const TensorView& tensor, PyObject* grad, size_t i, TensorReader& reader,
                      std::vector<int64_t>& others) {
    if (grad == Py_None) {
      if (!gradients_.at(i, nullptr)) gradients_.note(i, nullptr);
      return nullptr;
    }
    TensorView view;
    try {
      view = reader.read(grad);
    } catch (py::error_already_set&) {  // sparse, say
      throw GradientMismatch(std::to_string(i));
    }
    if (view.device_type != 1 || view.dtype != tensor.dtype || !view.same_shape(tensor) ||
        view.expanded() || !in_memory(view, grad, i, gradients_))
      throw GradientMismatch(std::to_string(i));
    if (view.same_strides(tensor)) return view.data;
    others.push_back(static_cast<int64_t>(i));
    return nullptr;
  }

  void check_strengths(const std::vector<double>& strengths) const {
    if (strengths.size() != table_.penalties().size() * kMaxStrengths)
      throw py::value_error("expected max_strengths strengths per rule");
  }

  std::vector<double> make_sums() const {
    return std::vector<double>(table_.penalties().size() * kMaxSums);
  }

  std::vector<Recorded> recorded_;
  std::vector<int64_t> geometry_;
  Table table_;
  std::vector<int64_t> bytes_;  // [rows]
  Places weights_, gradients_, moments_;
};

}  // namespace
}  // namespace pyreg

PYBIND11_MODULE(_native, m) {
  using pyreg::Layout;
  m.doc() = "pyreg's native sweeps over CPU tensors. Use pyreg's Python functions instead.";
  m.attr("max_strengths") = pyreg::kMaxStrengths;
  m.attr("max_sums") = pyreg::kMaxSums;
  m.attr("penalties") = py::tuple(py::cast(pyreg::penalty_names()));
  py::register_exception<pyreg::StaleLayout>(m, "StaleLayout", PyExc_RuntimeError);
  py::register_exception<pyreg::GradientMismatch>(m, "GradientMismatch", PyExc_RuntimeError);
  m.def("instruction_set", &pyreg::cpu::instruction_set);
  m.def("instruction_sets", &pyreg::cpu::instruction_sets);
  m.def("use_instruction_set", &pyreg::cpu::use_instruction_set, py::arg("name"));
  m.def("has_openmp", &pyreg::cpu::has_openmp);
  m.def("has_exchange_api", &pyreg::TensorReader::has_exchange_api);
  m.def("use_exchange_api", &pyreg::TensorReader::use_exchange_api, py::arg("yes"));
  py::class_<Layout>(m, "Layout")
      .def(py::init<const py::list&, const std::vector<int>&, const std::vector<std::string>&>(),
           py::arg("tensors"), py::arg("rule_of"), py::arg("penalties"))
      .def("value", &Layout::value, py::arg("tensors"), py::arg("strengths"), py::arg("threads"))
      .def("gradient", &Layout::gradient, py::arg("tensors"), py::arg("grads"),
           py::arg("strengths"), py::arg("scale"), py::arg("threads"))
      .def("accumulate", &Layout::accumulate, py::arg("tensors"), py::arg("strengths"),
           py::arg("scale"), py::arg("threads"))
      .def("prox", &Layout::prox, py::arg("tensors"), py::arg("strengths"), py::arg("step"),
           py::arg("threads"))
      .def("prox_in_metric", &Layout::prox_in_metric, py::arg("tensors"), py::arg("moments"),
           py::arg("numbers"), py::arg("root"), py::arg("strengths"), py::arg("threads"))
      .def("stats", &Layout::stats, py::arg("tensors"), py::arg("threads"));
}
