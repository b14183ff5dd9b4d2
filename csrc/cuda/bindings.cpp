// The Python module pyreg._cuda: a Layout of tensors on one GPU, and the sweeps over it.
//
// Memory for results, scratch and tables is the caller's (torch allocates it, so that it obeys
// streams and graphs); so is the stream. Nothing here waits for the device.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../look_at_step.h"
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

// Where launches go and what memory they have, results apart. `table` is called only when the
// tensors do not fit into the launch: with bytes, which it copies to the device on the launch's
// stream; or with the address of the last copy, when nothing has changed. It returns the address,
// valid on that stream.
struct Target {
  uintptr_t scratch, stream;
  py::function table;
};

constexpr int64_t kCounterBytes = 16;

class Layout {
 public:
  Layout(const py::list& tensors, const std::vector<int>& rule_of,
         const std::vector<std::string>& penalties, int device)
      : device_(device), look_(tensors, rule_of, PYREG_DEVICE_TYPE, device) {
    const std::vector<int> indices = penalty_indices(penalties);
    plans_.emplace_back(look_.rows(), indices, true);
    plans_.emplace_back(look_.rows(), indices, false);
  }

  bool by_value() const { return plans_[0].by_value(); }

  // A zeroed counter, then the partials of whichever sweep has most.
  int64_t scratch_bytes() const {
    const int64_t by_rule = int64_t{plans_[0].segments()} * kColumns<Sweep::kStep>;
    const int64_t by_row = int64_t{plans_[1].segments()} * kColumns<Sweep::kStats>;
    return kCounterBytes + std::max(by_rule, by_row) * int64_t{sizeof(double)};
  }

  // `out`, here and below: the address of the results.
  void value(const py::list& tensors, const py::list& strengths, uintptr_t out,
             const Target& target) {
    TensorReader reader;
    show(Sweep::kValue, look_.tensors(tensors, reader), nullptr);
    run(Sweep::kValue, strengths, {}, out, target, reader);
  }

  void gradient(const py::list& tensors, const py::list& grads, const py::list& strengths,
                const py::object& scale, const Target& target) {
    TensorReader reader;
    const Shown shown = look_.with_gradients(tensors, grads, reader);
    if (!shown.others.empty())
      throw py::value_error("a gradient has other strides than its tensor");
    show(Sweep::kGradient, shown.w, &shown.g);
    run(Sweep::kGradient, strengths, scale, 0, target, reader);
  }

  // Adds to each tensor's .grad. Returns how many there are, and the rows left to the caller, which
  // are counted in the value.
  py::tuple accumulate(const py::list& tensors, const py::list& strengths, const py::object& scale,
                       uintptr_t out, const Target& target) {
    TensorReader reader;
    const Shown shown = look_.with_own_gradients(tensors, reader);
    show(Sweep::kAccumulate, shown.w, &shown.g);
    run(Sweep::kAccumulate, strengths, scale, out, target, reader);
    return py::make_tuple(shown.present, shown.others);
  }

  // Returns the rows left to the caller: those that share memory with another row.
  std::vector<int64_t> prox(const py::list& tensors, const py::list& strengths,
                            const py::object& step, const Target& target) {
    TensorReader reader;
    std::vector<int64_t> others;
    show(Sweep::kProx, look_.separate_tensors(tensors, reader, others), nullptr);
    run(Sweep::kProx, strengths, step, 0, target, reader);
    return others;
  }

  // The same with a step for each element. moments are as Look::with_moments takes them; numbers is
  // [rows * 3] (numerator, factor, offset). Returns the rows left to the caller, which are not in
  // the value.
  std::vector<int64_t> prox_in_metric(const py::list& tensors, const py::list& moments,
                                      const py::list& numbers, const std::vector<bool>& root,
                                      const py::list& strengths, uintptr_t out,
                                      const Target& target) {
    const size_t rows = look_.rows().size();
    if (py::len(numbers) != 3 * rows || root.size() != rows)
      throw py::value_error("one metric per tensor");
    TensorReader reader;
    const Beside beside = look_.with_moments(tensors, moments, reader);
    std::vector<RowMetric> metrics(rows);
    for (size_t i = 0; i < rows; ++i) {
      for (int k = 0; k < 3; ++k) {
        const Number x = number(PyList_GET_ITEM(numbers.ptr(), 3 * i + k), reader);
        metrics[i].numbers[k] = x.scalar;
        metrics[i].kinds[k] = x.kind;
      }
      metrics[i].root = root[i];
      metrics[i].float32 = beside.float32[i] != 0;
    }
    show(Sweep::kProxInMetric, beside.w, &beside.moments, metrics.data());
    run(Sweep::kProxInMetric, strengths, {}, out, target, reader);
    return beside.others;
  }

  // An optimizer's step on every row, of which look_at_step.h tells. sets: [rows] which of the sets
  // of numbers is its own: [kSetNumbers], the last three its metric's numerator, factor and offset;
  // floats, or a float64 tensor. Returns whether it was taken, which a row may not allow.
  bool step(const py::list& tensors, const std::vector<py::list>& states,
            const std::vector<int>& updates, const std::vector<int>& sets,
            const py::object& numbers, const std::string& penalised, bool prox,
            const py::list& strengths, const py::object& scale, const py::list& masters,
            const std::vector<std::optional<uint32_t>>& keys, const py::object& grad_scale,
            const py::object& found_inf, uintptr_t out, const Target& target) {
    TensorReader reader;
    const Shown shown = look_.with_own_gradients(tensors, reader);
    const auto found =
        look_at_step(look_, shown, states, updates, penalised, masters, keys, reader);
    if (!found) return false;
    if (plans_[0].family() != Family::kElementary)
      throw py::value_error("expected L1, L2 and elastic net in a step");
    StepFacts facts{};
    std::vector<double> own_numbers;
    const size_t known_sets = look_at_numbers(numbers, reader, facts, own_numbers);
    if (sets.size() != found->size()) throw py::value_error("one set of numbers per tensor");
    std::vector<RowStep> steps;
    for (size_t i = 0; i < sets.size(); ++i) {
      const Update& update = (*found)[i];
      if (sets[i] < 0 || static_cast<size_t>(sets[i]) >= known_sets)
        throw py::value_error("no such set of numbers");
      steps.push_back({{update.states[0], update.states[1], update.states[2]},
                       update.master,
                       update.key,
                       static_cast<uint32_t>(sets[i]),
                       static_cast<uint8_t>(update.update),
                       update.float32,
                       update.penalised,
                       update.at_random});
    }
    const Number unscaled = number(grad_scale, reader), overflow = number(found_inf, reader);
    facts.grad_scale = grad_scale.is_none() ? Number::of(1).scalar : unscaled.scalar;
    facts.grad_scale_kind = unscaled.kind;
    facts.found_inf = overflow.scalar;
    facts.found_inf_kind = overflow.kind;
    facts.prox = prox;
    show(Sweep::kStep, shown.w, &shown.g);
    plan_of(Sweep::kStep).step(facts, steps.data(), std::move(own_numbers));
    run(Sweep::kStep, strengths, scale, out, target, reader);
    return true;
  }

  void stats(const py::list& tensors, uintptr_t out, const Target& target) {
    TensorReader reader;
    show(Sweep::kStats, look_.tensors(tensors, reader), nullptr);
    run(Sweep::kStats, py::list(), {}, out, target, reader);
  }

 private:
  // The sets of numbers of a step: how many there are.
  size_t look_at_numbers(const py::object& numbers, TensorReader& reader, StepFacts& facts,
                         std::vector<double>& own) const {
    size_t n;
    if (py::isinstance<py::list>(numbers)) {
      own = numbers.cast<std::vector<double>>();
      n = own.size();
    } else {
      const TensorView view = reader.read(numbers.ptr());
      bool contiguous = true;
      for (int64_t d = view.ndim - 1, stride = 1; d >= 0; stride *= view.shape[d--])
        contiguous = contiguous && (view.shape[d] == 1 || view.strides[d] == stride);
      if (!look_.is_here(view) || view.dtype != DType::kFloat64 || !contiguous)
        throw py::value_error(
            "expected numbers as floats, or as a contiguous float64 tensor on " PYREG_DEVICE_NAME
            ":" +
            std::to_string(device_));
      facts.numbers = static_cast<const double*>(view.data);
      n = static_cast<size_t>(view.numel());
    }
    if (n % kSetNumbers != 0) throw py::value_error("expected sets of 12 numbers");
    return n / kSetNumbers;
  }

  // A float, or a tensor of one float32 or float64 on this device.
  Number number(py::handle x, TensorReader& reader) const {
    if (!x || x.is_none()) return Number::of(0);
    if (PyFloat_Check(x.ptr()) || PyLong_Check(x.ptr())) return Number::of(x.cast<double>());
    const TensorView view = reader.read(x.ptr());
    if (!look_.is_here(view) || view.numel() != 1 ||
        (view.dtype != DType::kFloat32 && view.dtype != DType::kFloat64))
      throw py::value_error(
          "expected a strength, scale or step as a float, or as a float32 or "
          "float64 tensor of one element on " PYREG_DEVICE_NAME ":" +
          std::to_string(device_));
    return Number::at(view.data,
                      view.dtype == DType::kFloat32 ? ScalarKind::kFloat32 : ScalarKind::kFloat64);
  }

  Plan& plan_of(Sweep sweep) { return plans_[sweep == Sweep::kStats]; }

  void show(Sweep sweep, const Pointers& w, const Pointers* g, const RowMetric* metrics = nullptr) {
    plan_of(sweep).show(w.data(), g == nullptr ? nullptr : g->data(), metrics);
  }

  void run(Sweep sweep, const py::list& strengths, const py::object& scale, uintptr_t out,
           const Target& target, TensorReader& reader) {
    Plan& plan = plan_of(sweep);
    if (sweep != Sweep::kStats) {
      if (py::len(strengths) != size_t{plan.rules()} * kMaxStrengths)
        throw py::value_error("expected max_strengths strengths per rule");
      std::vector<Number> numbers;
      for (py::handle s : strengths) numbers.push_back(number(s, reader));
      plan.strengthen(numbers.data());
    }
    const char* table = nullptr;
    if (!plan.by_value()) table = table_of(plan, tables_[static_cast<int>(sweep)], target);
    static thread_local Parameter parameter;
    const int most = blocks_at_a_time(sweep, plan.family(), device_);
    const uint32_t blocks = plan.fill(parameter, table, number(scale, reader),
                                      static_cast<uint32_t>(most), has_totals(sweep));
    parameter.out = reinterpret_cast<double*>(out);
    parameter.done = reinterpret_cast<uint32_t*>(target.scratch);
    parameter.partials = reinterpret_cast<double*>(target.scratch + kCounterBytes);
    py::gil_scoped_release release;
    launch(sweep, plan.family(), parameter, blocks, device_,
           reinterpret_cast<void*>(target.stream));
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
  Look look_;
  std::vector<Plan> plans_;  // by rule; by row, for `stats`
  KnownTable tables_[kSweeps];
};

}  // namespace
}  // namespace pyreg::cuda

PYBIND11_MODULE(PYREG_MODULE, m) {
  using namespace pyreg::cuda;
  pyreg::Records::get();  // most likely nothing is active now that would hide them
  m.doc() = "pyreg's native sweeps over CUDA tensors. Use pyreg's Python functions instead.";
  m.attr("max_strengths") = pyreg::kMaxStrengths;
  m.attr("max_sums") = pyreg::kMaxSums;
  m.attr("max_by_value") = kEntries - 1;
  m.attr("max_by_value_in_metric") = kEntriesInMetric - 1;
  m.attr("device_type") = PYREG_DEVICE_NAME;
  // Tensors, and sets of numbers on the host, of a step that needs no table.
  m.def("step_fits", [](size_t rows, size_t sets) {
    return (rows + 1) * sizeof(PackedEntry) + sizeof(StepFacts) + rows * sizeof(RowStep) +
               sets * kSetNumbers * sizeof(double) <=
           sizeof(Parameter::entries);
  });
  m.attr("stepped_penalties") = py::tuple(py::cast(std::vector<std::string>(
      pyreg::kPenaltyNames.begin(), pyreg::kPenaltyNames.begin() + pyreg::kElementary)));
  m.attr("updates") = py::tuple(py::cast(pyreg::kUpdateNames));
  m.attr("numbers") = pyreg::kNumbers;
  m.attr("penalties") = py::tuple(py::cast(pyreg::kPenaltyNames));
  m.attr("built_with") = built_with();
  m.attr("architectures") = architectures();
  py::register_local_exception<pyreg::StaleLayout>(m, "StaleLayout", PyExc_RuntimeError);
  py::register_local_exception<pyreg::GradientMismatch>(m, "GradientMismatch", PyExc_RuntimeError);
  m.def("driver_serves", &driver_serves);
  m.def("unserved", &unserved, py::arg("device"));
  py::class_<Target>(m, "Target")
      .def(py::init<uintptr_t, uintptr_t, py::function>(), py::arg("scratch"), py::arg("stream"),
           py::arg("table"));
  py::class_<Layout>(m, "Layout")
      .def(py::init<const py::list&, const std::vector<int>&, const std::vector<std::string>&,
                    int>(),
           py::arg("tensors"), py::arg("rule_of"), py::arg("penalties"), py::arg("device"))
      .def_property_readonly("by_value", &Layout::by_value)
      .def("scratch_bytes", &Layout::scratch_bytes)
      .def("value", &Layout::value, py::arg("tensors"), py::arg("strengths"), py::arg("out"),
           py::arg("target"))
      .def("gradient", &Layout::gradient, py::arg("tensors"), py::arg("grads"),
           py::arg("strengths"), py::arg("scale"), py::arg("target"))
      .def("accumulate", &Layout::accumulate, py::arg("tensors"), py::arg("strengths"),
           py::arg("scale"), py::arg("out"), py::arg("target"))
      .def("prox", &Layout::prox, py::arg("tensors"), py::arg("strengths"), py::arg("step"),
           py::arg("target"))
      .def("prox_in_metric", &Layout::prox_in_metric, py::arg("tensors"), py::arg("moments"),
           py::arg("numbers"), py::arg("root"), py::arg("strengths"), py::arg("out"),
           py::arg("target"))
      .def("step", &Layout::step, py::arg("tensors"), py::arg("states"), py::arg("updates"),
           py::arg("sets"), py::arg("numbers"), py::arg("penalised"), py::arg("prox"),
           py::arg("strengths"), py::arg("scale"), py::arg("masters"), py::arg("keys"),
           py::arg("grad_scale"), py::arg("found_inf"), py::arg("out"), py::arg("target"))
      .def("stats", &Layout::stats, py::arg("tensors"), py::arg("out"), py::arg("target"));
}
