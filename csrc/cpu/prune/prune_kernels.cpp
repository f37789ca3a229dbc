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

enum Level { kScalar, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};

Level best() {
#if ISSP_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512) return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return kAvx2;
#endif
  return kScalar;
}

std::atomic<Level>& level() {
  static std::atomic<Level> current{best()};
  return current;
}

}  // namespace

std::string cpu_capability(std::string want) {
  for (const Level known : {kScalar, kAvx2, kAvx512}) {
    if (want != kNames[known]) continue;
    if (known > best()) throw std::runtime_error("this CPU has no " + want);
    level() = known;
    return want;
  }
  if (!want.empty()) throw std::runtime_error(want + " is none of scalar, avx2, avx512");
  return kNames[level()];
}

#define ISSP_PASSES(isa)                                                                        \
  {isa::speculate<T>, isa::restore<T>, isa::settle<T>, isa::count_less<Key<T>>, isa::census<T>, \
   isa::histogram<T>, isa::apply<T>,   isa::clear<T>,  isa::shrink_groups<T>}

template <typename T>
const Passes<T>& passes(bool exact) {
  static const Passes<T> plain = ISSP_PASSES(scalar);
#if ISSP_X86
  static const Passes<T> vectors[] = {ISSP_PASSES(avx2), ISSP_PASSES(avx512)};
  if (!exact && level() != kScalar) return vectors[level() - 1];
#endif
  return plain;
}

template const Passes<Float32>& passes<Float32>(bool);
template const Passes<Float16>& passes<Float16>(bool);
template const Passes<BFloat16>& passes<BFloat16>(bool);

// float64 is for checking; it does not pay for lanes of its own.
template <>
const Passes<Float64>& passes<Float64>(bool) {
  using T = Float64;
  static const Passes<T> plain = ISSP_PASSES(scalar);
  return plain;
}

const UpdatePasses& update_passes() {
  static const UpdatePasses plain = {scalar::update};
#if ISSP_X86
  static const UpdatePasses vectors[] = {{avx2::update}, {avx512::update}};
  if (level() != kScalar) return vectors[level() - 1];
#endif
  return plain;
}

}  // namespace issp
