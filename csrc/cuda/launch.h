// The CUDA library's face: what the bindings call. No CUDA header is needed to read it.
//
// Every function raises std::runtime_error if a CUDA call fails, with the sweep, the device and
// CUDA's own words.
#pragma once

#include <string>

#include "parameter.h"

namespace pyreg::cuda {

constexpr const char* kSweepNames[kSweeps] = {"value",          "gradient", "accumulate", "prox",
                                              "prox_in_metric", "stats",    "step"};

// What it was built with: CUDA's version (13000 for 13.0), and architectures as CMake lists them.
int built_with();
const char* architectures();

// CUDA's version that the driver serves; 0 without a driver. Touches no device.
int driver_serves();

// Why the kernels cannot run on this device, or an empty string. Loads all of them, so that no
// later launch does: a stream that is being captured forbids it.
std::string unserved(int device);

// The address of a family's kernel (kernels.cu); null for `stats` and a step, but of the
// elementary.
template <Family F>
const void* kernel(Sweep sweep);

// Blocks of a kernel that a device runs at a time.
int blocks_at_a_time(Sweep sweep, Family family, int device);

// One launch on a stream of the device. Does not wait for it.
void launch(Sweep sweep, Family family, const Parameter& parameter, uint32_t blocks, int device,
            void* stream);

}  // namespace pyreg::cuda
