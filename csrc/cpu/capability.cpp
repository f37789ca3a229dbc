// _cpu_capability: which instruction set the CPU ops use, and choosing a lower one for tests.
#include <torch/csrc/stable/library.h>

#include "cpu/prune/prune_kernels.h"

namespace issp {

STABLE_TORCH_LIBRARY_IMPL(issp, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace issp
