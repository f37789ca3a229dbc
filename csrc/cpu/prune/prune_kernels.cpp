#include "cpu/prune/prune_kernels.h"

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "cpu/simd/scalar.h"
#if defined(__x86_64__) && defined(__GNUC__)
#define ISSP_X86 1
#include "cpu/simd/avx2.h"
#include "cpu/simd/avx512.h"
#include "cpu/simd/avx512fp16.h"
#endif
#include "cpu/nm/scores.h"

namespace issp {

// The lowest `count` set bits of `bits`.
static inline uint64_t lowest(uint64_t bits, int64_t count) {
  uint64_t taken = 0;
  for (; count > 0 && bits; --count) {
    taken |= bits & (~bits + 1);
    bits &= bits - 1;
  }
  return taken;
}

}  // namespace issp

// Each file uses the ones before it; update.inc.h and nm/select.inc.h need select.inc.h.
#define ISSP_ISA scalar
#define ISSP_TARGET
#include "cpu/prune/select.inc.h"
#include "cpu/prune/speculate.inc.h"

#include "cpu/optim/update.inc.h"

#include "cpu/nm/select.inc.h"
#undef ISSP_ISA
#undef ISSP_TARGET

#if ISSP_X86
#define ISSP_ISA avx2
#define ISSP_TARGET ISSP_AVX2
#include "cpu/prune/select.inc.h"
#include "cpu/prune/speculate.inc.h"

#include "cpu/optim/update.inc.h"

#include "cpu/nm/select.inc.h"
#undef ISSP_ISA
#undef ISSP_TARGET

#define ISSP_ISA avx512
#define ISSP_TARGET ISSP_AVX512
#include "cpu/prune/select.inc.h"
#include "cpu/prune/speculate.inc.h"

#include "cpu/optim/update.inc.h"

#include "cpu/nm/select.inc.h"
#undef ISSP_ISA
#undef ISSP_TARGET
#endif

namespace issp {
namespace {

// AVX512-FP16 has kernels of its own for float16 convolutions alone.
enum InstructionSet { kScalar, kAvx2, kAvx512, kAvx512Fp16 };
constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512fp16"};

InstructionSet best_supported() {
#if ISSP_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if ISSP_AVX512FP16
  if (avx512 && __builtin_cpu_supports("avx512fp16")) return kAvx512Fp16;
#endif
  if (avx512) return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return kAvx2;
#endif
  return kScalar;
}

std::atomic<InstructionSet>& instruction_set() {
  static std::atomic<InstructionSet> current{best_supported()};
  return current;
}

// The set of the kernels of pruning: 0 scalar, 1 AVX2, 2 AVX-512.
int vector_level() {
  return std::min<int>(instruction_set(), kAvx512);
}

}  // namespace

std::string cpu_capability(std::string want) {
  for (const InstructionSet set : {kScalar, kAvx2, kAvx512, kAvx512Fp16}) {
    if (want != kNames[set]) continue;
    if (set > best_supported()) throw std::runtime_error("this CPU has no " + want);
    instruction_set() = set;
    return want;
  }
  if (!want.empty())
    throw std::runtime_error("use scalar, avx2, avx512 or avx512fp16, not " + want);
  return kNames[instruction_set()];
}

#define ISSP_PRUNE_KERNELS(isa)                                              \
  {isa::speculate<T>,       isa::restore<T>,     isa::resolve_candidates<T>, \
   isa::count_less<Key<T>>, isa::count_range<T>, isa::histogram<T>,          \
   isa::apply<T>,           isa::clear<T>,       isa::nm_shrink<T>,          \
   isa::unit_scores<T>,     isa::shrink_units<T>}

template <typename T>
const PruneKernels<T>& prune_kernels(bool exact) {
  static const PruneKernels<T> plain = ISSP_PRUNE_KERNELS(scalar);
#if ISSP_X86
  static const PruneKernels<T> vectors[] = {ISSP_PRUNE_KERNELS(avx2), ISSP_PRUNE_KERNELS(avx512)};
  if (!exact && vector_level()) return vectors[vector_level() - 1];
#endif
  return plain;
}

template const PruneKernels<Float32>& prune_kernels<Float32>(bool);
template const PruneKernels<Float16>& prune_kernels<Float16>(bool);
template const PruneKernels<BFloat16>& prune_kernels<BFloat16>(bool);

// float64 is supported for tests and has no vector kernels.
template <>
const PruneKernels<Float64>& prune_kernels<Float64>(bool) {
  using T = Float64;
  static const PruneKernels<T> plain = ISSP_PRUNE_KERNELS(scalar);
  return plain;
}

const UpdateKernels& update_kernels() {
  static const UpdateKernels plain = {scalar::update};
#if ISSP_X86
  static const UpdateKernels vectors[] = {{avx2::update}, {avx512::update}};
  if (vector_level()) return vectors[vector_level() - 1];
#endif
  return plain;
}

}  // namespace issp
