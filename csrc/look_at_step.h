// What a module's `step` is told of its rows, looked at as look.h does.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "look.h"
#include "sweeps.h"

namespace pyreg {

#define PYREG_STATES(U) U::kStates,
constexpr int kStatesOf[] = {PYREG_UPDATES(PYREG_STATES)};
#undef PYREG_STATES

// `states` is a list of tensors for each kind of state, `updates` and `penalised` (1 or 0) are
// [rows]. `masters` is empty, or for each row its float32 master weights or None; `keys` is empty,
// or for each row what its random roundings begin with, or nothing where it is rounded to nearest.
//
// Returns the rows' updates, without numbers and metric; or nothing where no sweep can visit a row:
// it shares memory with another, or what lies beside it does or has other strides or dtypes.
inline std::optional<std::vector<Update>> look_at_step(
    Look& look, const Shown& shown, const std::vector<pybind11::list>& states,
    const std::vector<int>& updates, const std::string& penalised, const pybind11::list& masters,
    const std::vector<std::optional<uint32_t>>& keys, TensorReader& reader) {
  const size_t rows = look.rows().size();
  const auto one_each = [rows](const auto& list) { return list.size() == rows; };
  if (!one_each(updates) || !one_each(penalised) || states.size() > kMaxStates ||
      !(keys.empty() || one_each(keys)) || !(masters.empty() || one_each(masters)))
    throw pybind11::value_error("one update, flag, master and key per tensor");
  for (const pybind11::list& state : states)
    if (!one_each(state)) throw pybind11::value_error("one state per tensor");
  if (shown.present != static_cast<int64_t>(rows))
    throw pybind11::value_error("a gradient is missing");
  if (!shown.others.empty() || !look.overlapping().empty()) return {};
  std::vector<Update> found(rows);
  for (size_t i = 0; i < rows; ++i) {
    Update& update = found[i];
    const Row& row = look.rows()[i];
    update.update = updates[i];
    update.penalised = penalised[i] != 0;
    if (update.update < 0 || update.update >= kUpdates)
      throw pybind11::value_error("no such update");
    if (!look.states(i, states, masters, reader, update.states, &update.master, update.float32))
      return {};
    if (!keys.empty() && keys[i]) {
      update.at_random = true;
      update.key = *keys[i];
    }
    const int kept = kStatesOf[update.update];
    if (update.master != nullptr || update.at_random) {  // in float32 throughout
      if (kept == 0) update.float32 = true;
      if (!update.float32 || item_size(row.dtype) != 2) return {};
      if (update.at_random && (row.dtype != DType::kBFloat16 || update.master != nullptr))
        return {};
    }
    for (int k = 0; k < kept; ++k)
      if (update.states[k] == nullptr && row.numel > 0)
        throw pybind11::value_error("row " + std::to_string(i) + ": a state is missing");
  }
  if (!look.states_are_apart()) return {};
  return found;
}

}  // namespace pyreg
