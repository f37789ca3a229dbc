#include "cpu/sparse/direct_kernels.h"

#include "cpu/prune/prune_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define ISSP_X86 1
#include "cpu/sparse/direct_avx512.h"
#endif

namespace issp {

#if ISSP_X86
namespace {

template <int I, int S, int R>
void fill(DirectKernels& kernels, int log) {
  if constexpr (R > 0) {
    kernels.inner[log][S - 1][R - 1] = avx512::multiply_direct<I, S, R, false>;
    kernels.edge[log][S - 1][R - 1] = avx512::multiply_direct<I, S, R, true>;
    fill<I, S, R - 1>(kernels, log);
  }
}

template <int I>
void fill(DirectKernels& kernels, int log) {
  fill<I, 1, max_rows(I, 1, 24)>(kernels, log);
  fill<I, 2, max_rows(I, 2, 24)>(kernels, log);
  fill<I, 3, max_rows(I, 3, 24)>(kernels, log);
  fill<I, 4, max_rows(I, 4, 24)>(kernels, log);
}

DirectKernels table() {
  DirectKernels kernels = {};
  fill<1>(kernels, 0), fill<2>(kernels, 1), fill<4>(kernels, 2);
  return kernels;
}

}  // namespace
#endif

const DirectKernels* direct_kernels() {
#if ISSP_X86
  static const DirectKernels kernels = table();
  if (cpu_capability({}) == "avx512") return &kernels;
#endif
  return nullptr;
}

}  // namespace issp
