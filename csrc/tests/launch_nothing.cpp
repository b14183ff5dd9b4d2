// launch.h without a GPU, and without a sweep: what is left of a call is its time on the host.

#include "cuda/launch.h"

namespace pyreg::cuda {

int built_with() { return 0; }
const char* architectures() { return "none"; }
int driver_serves() { return 0; }
std::string unserved(int) { return ""; }
int blocks_at_a_time(Sweep, Family, int) { return 7; }
void launch(Sweep, Family, const Parameter&, uint32_t, int, void*) {}

}  // namespace pyreg::cuda
