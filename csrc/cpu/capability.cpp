// _cpu_capability: reports the instruction set that the CPU ops use, or selects a lower one for
// tests.
#include <torch/csrc/stable/library.h>

#include "cpu/prune/prune_kernels.h"

namespace issp {

STABLE_TORCH_LIBRARY_IMPL(issp, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace issp
