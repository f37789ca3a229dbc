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

#define ISSP_STREAMS(isa) {isa::regularize<T>, isa::zeros<T>, isa::sums<T>}

template <typename T>
const Streams<T>& streams() {
  static const Streams<T> plain = ISSP_STREAMS(scalar);
#if ISSP_X86
  static const Streams<T> narrow = ISSP_STREAMS(avx2), wide = ISSP_STREAMS(avx512);
  const std::string in_use = cpu_capability({});
  if (in_use != "scalar") return in_use == "avx2" ? narrow : wide;
#endif
  return plain;
}

template const Streams<Float32>& streams<Float32>();
template const Streams<Float16>& streams<Float16>();
template const Streams<BFloat16>& streams<BFloat16>();
template const Streams<Float64>& streams<Float64>();

}  // namespace issp
