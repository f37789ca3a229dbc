#include "cpu/streaming/streaming_kernels.h"

#include <cstring>

#include "regularize.h"

#define ISSP_ISA scalar
#define ISSP_TARGET
#include "cpu/streaming/streaming_kernels.inc.h"
#undef ISSP_ISA
#undef ISSP_TARGET

#if defined(__x86_64__) && defined(__GNUC__)
#define ISSP_X86 1
#define ISSP_ISA avx2
#define ISSP_TARGET __attribute__((target("avx2,f16c")))
#include "cpu/streaming/streaming_kernels.inc.h"
#undef ISSP_ISA
#undef ISSP_TARGET

#define ISSP_ISA avx512
#define ISSP_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#include "cpu/streaming/streaming_kernels.inc.h"
#undef ISSP_ISA
#undef ISSP_TARGET
#endif

namespace issp {

#define ISSP_STREAMING_KERNELS(isa) {isa::regularize<T>, isa::zeros<T>, isa::sums<T>}

template <typename T>
const StreamingKernels<T>& streaming_kernels() {
  static const StreamingKernels<T> plain = ISSP_STREAMING_KERNELS(scalar);
#if ISSP_X86
  static const StreamingKernels<T> narrow = ISSP_STREAMING_KERNELS(avx2),
                                   wide = ISSP_STREAMING_KERNELS(avx512);
  const std::string in_use = cpu_capability({});
  if (in_use != "scalar") return in_use == "avx2" ? narrow : wide;
#endif
  return plain;
}

template const StreamingKernels<Float32>& streaming_kernels<Float32>();
template const StreamingKernels<Float16>& streaming_kernels<Float16>();
template const StreamingKernels<BFloat16>& streaming_kernels<BFloat16>();
template const StreamingKernels<Float64>& streaming_kernels<Float64>();

}  // namespace issp
