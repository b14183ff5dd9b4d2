// The Python module pyreg._native: a Layout of CPU tensors, and the sweeps over it. And a Look at
// tensors of any device, for sweeps that are not compiled here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "look_at_step.h"
#include "sweeps.h"

namespace py = pybind11;

namespace pyreg {
namespace {

#define PYREG_MOMENT(U) U::kMoment,
constexpr int kMomentOf[] = {PYREG_UPDATES(PYREG_MOMENT)};
#undef PYREG_MOMENT

class Layout {
 public:
  Layout(const py::list& tensors, const std::vector<int>& rule_of,
         const std::vector<std::string>& penalties, Pairs anchors)
      : look_(tensors, rule_of, /*CPU*/ 1, 0, std::move(anchors)),
        table_(look_.rows(), penalty_indices(penalties)) {}

  py::tuple value(const py::list& tensors, const std::vector<double>& strengths, int threads) {
    check_strengths(strengths);
    TensorReader reader;
    const Pointers w = look_.tensors(tensors, reader);
    const std::vector<Anchor> anchors = look_.anchors(reader);
    std::vector<double> sums = make_sums();
    {
      py::gil_scoped_release release;
      cpu::value(table_, w.data(), strengths.data(), sums.data(), threads, pointer(anchors));
    }
    return py::make_tuple(value_from_sums(table_, sums.data(), strengths.data()), sums);
  }

  void gradient(const py::list& tensors, const py::list& grads,
                const std::vector<double>& strengths, double scale, int threads) {
    check_strengths(strengths);
    TensorReader reader;
    const Shown shown = look_.with_gradients(tensors, grads, reader);
    if (!shown.others.empty())
      throw py::value_error("a gradient has other strides than its tensor");
    const std::vector<Anchor> anchors = look_.anchors(reader);
    py::gil_scoped_release release;
    cpu::gradient(table_, shown.w.data(), shown.g.data(), strengths.data(), scale, threads,
                  pointer(anchors));
  }

  // Adds to each tensor's .grad. Returns the value, each rule's, how many gradients there were, and
  // the rows left to the caller, which are counted in the values.
  py::tuple accumulate(const py::list& tensors, const std::vector<double>& strengths, double scale,
                       int threads, bool keep_gil) {
    check_strengths(strengths);
    TensorReader reader;
    const Shown shown = look_.with_own_gradients(tensors, reader);
    const std::vector<Anchor> anchors = look_.anchors(reader);
    std::vector<double> sums = make_sums();
    {
      std::optional<py::gil_scoped_release> release;
      if (!keep_gil) release.emplace();
      cpu::accumulate(table_, shown.w.data(), shown.g.data(), strengths.data(), scale, sums.data(),
                      threads, pointer(anchors));
    }
    return py::make_tuple(value_from_sums(table_, sums.data(), strengths.data()),
                          values_from_sums(table_, sums.data(), strengths.data()), shown.present,
                          shown.others);
  }

  // Returns the rows left to the caller: those that share memory with another row.
  std::vector<int64_t> prox(const py::list& tensors, const std::vector<double>& strengths,
                            double step, int threads) {
    check_strengths(strengths);
    TensorReader reader;
    std::vector<int64_t> others;
    const Pointers w = look_.separate_tensors(tensors, reader, others);
    const std::vector<Anchor> anchors = look_.anchors(reader);
    {
      py::gil_scoped_release release;
      cpu::prox(table_, w.data(), strengths.data(), step, threads, pointer(anchors));
    }
    return others;
  }

  // The same with a step for each element. moments are as Look::with_moments takes them; numbers is
  // [rows][3] (numerator, factor, offset). Returns the value of the new weights, each rule's, and
  // the rows left to the caller, which are not in the values.
  py::tuple prox_in_metric(const py::list& tensors, const py::list& moments,
                           const std::vector<double>& numbers, const std::vector<bool>& root,
                           const std::vector<double>& strengths, int threads) {
    check_strengths(strengths);
    const size_t rows = table_.rows().size();
    if (numbers.size() != 3 * rows || root.size() != rows)
      throw py::value_error("one metric per tensor");
    TensorReader reader;
    const Beside beside = look_.with_moments(tensors, moments, reader);
    std::vector<Metric> metrics(rows);
    for (size_t i = 0; i < rows; ++i)
      metrics[i] = {beside.moments[i], beside.float32[i] != 0, root[i],
                    numbers[3 * i],    numbers[3 * i + 1],     numbers[3 * i + 2]};
    const std::vector<Anchor> anchors = look_.anchors(reader);
    std::vector<double> sums = make_sums();
    {
      py::gil_scoped_release release;
      cpu::prox_in_metric(table_, beside.w.data(), metrics.data(), strengths.data(), sums.data(),
                          threads, pointer(anchors));
    }
    return py::make_tuple(value_from_sums(table_, sums.data(), strengths.data()),
                          values_from_sums(table_, sums.data(), strengths.data()), beside.others);
  }

  // An optimizer's step on every row, of which look_at_step.h tells. sets: [rows] which of the sets
  // of numbers is its own: [kNumbers + 3], the last three its metric's numerator, factor and
  // offset. Returns the value, each rule's, and the zeros of penalised weights; or None where a row
  // cannot be visited so, or its prox asks for a metric that is no state's root.
  py::object step(const py::list& tensors, const std::vector<py::list>& states,
                  const std::vector<int>& updates, const std::vector<int>& sets,
                  const std::vector<double>& numbers, const std::string& penalised, bool prox,
                  const std::vector<double>& strengths, double scale, int threads,
                  const py::list& masters, const std::vector<std::optional<uint32_t>>& keys) {
    check_strengths(strengths);
    constexpr size_t kSet = kNumbers + 3;
    TensorReader reader;
    const Shown shown = look_.with_own_gradients(tensors, reader);
    auto found = look_at_step(look_, shown, states, updates, penalised, masters, keys, reader);
    if (!found) return py::none();
    if (sets.size() != found->size()) throw py::value_error("one set of numbers per tensor");
    for (size_t i = 0; i < found->size(); ++i) {
      Update& update = (*found)[i];
      if (sets[i] < 0 || static_cast<size_t>(sets[i]) >= numbers.size() / kSet)
        throw py::value_error("no such set of numbers");
      update.numbers = numbers.data() + sets[i] * kSet;
      update.metric.numerator = update.numbers[kNumbers];
      update.metric.factor = update.numbers[kNumbers + 1];
      update.metric.offset = update.numbers[kNumbers + 2];
      update.metric.float32 = update.float32;
      const int moment = kMomentOf[update.update];
      if (moment >= 0) update.metric.moment = update.states[moment];
      const int penalty = table_.penalties()[table_.rows()[i].rule];
      if (prox && update.penalised && penalty >= kElementary && moment == kOfSeveral)
        return py::none();
    }
    std::vector<double> sums = make_sums();
    int64_t zeros = 0;
    {
      py::gil_scoped_release release;
      zeros = cpu::step(table_, shown.w.data(), shown.g.data(), found->data(), prox,
                        strengths.data(), scale, sums.data(), threads);
    }
    return py::make_tuple(value_from_sums(table_, sums.data(), strengths.data()),
                          values_from_sums(table_, sums.data(), strengths.data()), zeros);
  }

  // [(l1, l2_squared, max_abs, zeros, non_finite), ...], one per row.
  std::vector<std::tuple<double, double, double, int64_t, int64_t>> stats(const py::list& tensors,
                                                                          int threads) {
    TensorReader reader;
    const Pointers w = look_.tensors(tensors, reader);
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
  void check_strengths(const std::vector<double>& strengths) const {
    if (strengths.size() != table_.penalties().size() * kMaxStrengths)
      throw py::value_error("expected max_strengths strengths per rule");
  }

  std::vector<double> make_sums() const {
    return std::vector<double>(table_.penalties().size() * kMaxSums);
  }

  static const Anchor* pointer(const std::vector<Anchor>& anchors) {
    return anchors.empty() ? nullptr : anchors.data();
  }

  Look look_;
  Table table_;
};

// Of a tensor of one number that can be read here and now: 0-dim on the CPU, float32 or float64.
bool is_number(const TensorView& view) {
  return view.ndim == 0 && view.device_type == 1 && view.data != nullptr &&
         (view.dtype == DType::kFloat64 || view.dtype == DType::kFloat32);
}

// Each one's number, or None: of a float, an int, or such a tensor.
py::list read_numbers(const py::list& given) {
  TensorReader reader;
  py::list found;
  const Ahead ahead(given, reader.records());
  for (size_t i = 0; i < py::len(given); ++i) {
    ahead.turn(i);
    PyObject* const x = PyList_GET_ITEM(given.ptr(), i);
    py::object number = py::none();
    if (PyFloat_Check(x) || PyLong_Check(x)) {
      number = py::float_(py::handle(x).cast<double>());
    } else if (x != Py_None) {
      try {
        if (const TensorView view = reader.read(x); is_number(view))
          number = py::float_(view.dtype == DType::kFloat64 ? *static_cast<double*>(view.data)
                                                            : *static_cast<float*>(view.data));
      } catch (const std::exception&) {  // no tensor, or one without memory
      }
    }
    found.append(number);
  }
  return found;
}

// Adds 1 to each of these tensors, and returns them as numbers; or None, and adds nothing, where
// one is no such tensor.
std::optional<std::vector<double>> count(const py::list& steps) {
  TensorReader reader;
  std::vector<TensorView> views;
  views.reserve(py::len(steps));
  for (py::handle tensor : steps) {
    const TensorView view = reader.read(tensor.ptr());
    if (!is_number(view)) return {};
    views.push_back(view);
  }
  std::vector<double> counts;
  counts.reserve(views.size());
  for (const TensorView& view : views)
    counts.push_back(view.dtype == DType::kFloat64 ? ++*static_cast<double*>(view.data)
                                                   : ++*static_cast<float*>(view.data));
  return counts;
}

// Addresses as int64 in one piece, to be compared and copied at once.
static_assert(sizeof(void*) == sizeof(int64_t));
py::bytes as_bytes(const Pointers& pointers) {
  return py::bytes(reinterpret_cast<const char*>(pointers.data()), pointers.size() * sizeof(void*));
}

// Tensors of the first one's device.
Look look_at(const py::list& tensors, Pairs anchors) {
  TensorReader reader;
  const TensorView first = reader.read(py::object(tensors[0]).ptr());
  return {tensors, std::vector<int>(py::len(tensors)), first.device_type, first.device_index,
          std::move(anchors)};
}

py::bytes tensors(Look& look, const py::list& tensors) {
  TensorReader reader;
  return as_bytes(look.tensors(tensors, reader));
}

py::tuple separate_tensors(Look& look, const py::list& tensors) {
  TensorReader reader;
  std::vector<int64_t> others;
  const Pointers w = look.separate_tensors(tensors, reader, others);
  return py::make_tuple(as_bytes(w), others);
}

// [(origin, weight), ...] of each row, or nothing.
py::bytes anchors(Look& look) {
  TensorReader reader;
  Pointers pointers;
  for (const Anchor& anchor : look.anchors(reader))
    for (const void* place : {anchor.origin, anchor.weight})
      pointers.push_back(const_cast<void*>(place));
  return as_bytes(pointers);
}

py::tuple with_moments(Look& look, const py::list& tensors, const py::list& moments) {
  TensorReader reader;
  const Beside beside = look.with_moments(tensors, moments, reader);
  return py::make_tuple(as_bytes(beside.w), as_bytes(beside.moments), py::bytes(beside.float32),
                        beside.others);
}

// (states, float32, masters), or None where no sweep can walk them.
py::object states(Look& look, const std::vector<py::list>& given, const py::list& masters) {
  const size_t rows = look.rows().size();
  const auto one_each = [rows](const py::list& list) { return py::len(list) == rows; };
  if (given.size() > kMaxStates || !std::all_of(given.begin(), given.end(), one_each) ||
      !(masters.empty() || one_each(masters)))
    throw py::value_error("at most three states, and a master, per tensor");
  TensorReader reader;
  std::vector<Pointers> found(kMaxStates + 1, Pointers(rows));
  std::string flags(rows, 0);
  for (size_t i = 0; i < rows; ++i) {
    void* pointers[kMaxStates] = {};
    bool float32 = false;
    if (!look.states(i, given, masters, reader, pointers, &found[kMaxStates][i], float32))
      return py::none();
    for (int k = 0; k < kMaxStates; ++k) found[k][i] = pointers[k];
    flags[i] = float32;
  }
  if (!look.states_are_apart()) return py::none();
  py::list lists;
  for (size_t k = 0; k < given.size(); ++k) lists.append(as_bytes(found[k]));
  return py::make_tuple(lists, py::bytes(flags), as_bytes(found[kMaxStates]));
}

Shown with_gradients(Look& look, const py::list& tensors, const py::list& grads) {
  TensorReader reader;
  return look.with_gradients(tensors, grads, reader);
}

Shown with_own_gradients(Look& look, const py::list& tensors) {
  TensorReader reader;
  return look.with_own_gradients(tensors, reader);
}

}  // namespace
}  // namespace pyreg

PYBIND11_MODULE(_native, m) {
  using pyreg::Layout, pyreg::Look, pyreg::Shown;
  pyreg::Records::get();  // most likely nothing is active now that would hide them
  m.doc() = "pyreg's native sweeps over CPU tensors. Use pyreg's Python functions instead.";
  m.attr("max_strengths") = pyreg::kMaxStrengths;
  m.attr("max_sums") = pyreg::kMaxSums;
  m.attr("numbers") = pyreg::kNumbers;
  m.attr("updates") = py::tuple(py::cast(pyreg::kUpdateNames));
  m.attr("penalties") = py::tuple(py::cast(pyreg::kPenaltyNames));
  py::register_local_exception<pyreg::StaleLayout>(m, "StaleLayout", PyExc_RuntimeError);
  py::register_local_exception<pyreg::GradientMismatch>(m, "GradientMismatch", PyExc_RuntimeError);
  m.def("instruction_set", &pyreg::cpu::instruction_set);
  m.def("instruction_sets", &pyreg::cpu::instruction_sets);
  m.def("use_instruction_set", &pyreg::cpu::use_instruction_set, py::arg("name"));
  m.def("has_openmp", &pyreg::cpu::has_openmp);
  m.def("reads_records", [] { return pyreg::Records::get() != nullptr; });
  m.def("use_records", &pyreg::Records::use, py::arg("yes"));
  m.def("require_grad", &pyreg::require_grad, py::arg("tensors"));
  m.def("count", &pyreg::count, py::arg("steps"));
  m.def("read_numbers", &pyreg::read_numbers, py::arg("given"));
  m.def("unchanged", &pyreg::unchanged, py::arg("slots"));
  py::class_<Layout>(m, "Layout", py::module_local())
      .def(py::init<const py::list&, const std::vector<int>&, const std::vector<std::string>&,
                    pyreg::Pairs>(),
           py::arg("tensors"), py::arg("rule_of"), py::arg("penalties"),
           py::arg("anchors") = pyreg::Pairs{})
      .def("value", &Layout::value, py::arg("tensors"), py::arg("strengths"), py::arg("threads"))
      .def("gradient", &Layout::gradient, py::arg("tensors"), py::arg("grads"),
           py::arg("strengths"), py::arg("scale"), py::arg("threads"))
      .def("accumulate", &Layout::accumulate, py::arg("tensors"), py::arg("strengths"),
           py::arg("scale"), py::arg("threads"), py::arg("keep_gil") = false)
      .def("prox", &Layout::prox, py::arg("tensors"), py::arg("strengths"), py::arg("step"),
           py::arg("threads"))
      .def("prox_in_metric", &Layout::prox_in_metric, py::arg("tensors"), py::arg("moments"),
           py::arg("numbers"), py::arg("root"), py::arg("strengths"), py::arg("threads"))
      .def("step", &Layout::step, py::arg("tensors"), py::arg("states"), py::arg("updates"),
           py::arg("sets"), py::arg("numbers"), py::arg("penalised"), py::arg("prox"),
           py::arg("strengths"), py::arg("scale"), py::arg("threads"),
           py::arg("masters") = py::list(),
           py::arg("keys") = std::vector<std::optional<uint32_t>>{})
      .def("stats", &Layout::stats, py::arg("tensors"), py::arg("threads"));
  py::class_<Shown>(m, "Shown", py::module_local())
      .def_property_readonly("tensors", [](const Shown& s) { return pyreg::as_bytes(s.w); })
      .def_property_readonly("gradients", [](const Shown& s) { return pyreg::as_bytes(s.g); })
      .def_readonly("present", &Shown::present)
      .def_readonly("others", &Shown::others);
  py::class_<Look>(m, "Look", py::module_local())
      .def(py::init(&pyreg::look_at), py::arg("tensors"), py::arg("anchors") = pyreg::Pairs{})
      .def("tensors", &pyreg::tensors, py::arg("tensors"))
      .def("separate_tensors", &pyreg::separate_tensors, py::arg("tensors"))
      .def("anchors", &pyreg::anchors)
      .def("with_moments", &pyreg::with_moments, py::arg("tensors"), py::arg("moments"))
      .def("states", &pyreg::states, py::arg("states"), py::arg("masters"))
      .def("with_gradients", &pyreg::with_gradients, py::arg("tensors"), py::arg("grads"))
      .def("with_own_gradients", &pyreg::with_own_gradients, py::arg("tensors"));
}
