#include "cpu/tiles/tile_kernels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "semantics.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define ISSP_X86 1
#include <immintrin.h>
#endif
// The header tells that the compiler, and most likely its assembler, know the instructions.
#if ISSP_X86 && defined(__linux__) && __has_include(<amxbf16intrin.h>) && !defined(ISSP_WITHOUT_AMX)
#define ISSP_HAS_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Vectors of 64 bytes stay within inlined functions here.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace issp {
namespace {

using torch::headeronly::ScalarType;
typedef float F16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

// bfloat16 to the elements of an image; bfloat16 is exact in float32.
inline uint32_t narrowed(Float32, uint16_t bits) {
  return uint32_t(bits) << 16;
}
inline uint16_t narrowed(BFloat16, uint16_t bits) {
  return bits;
}
inline uint16_t narrowed(Float16, uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu, sign = bits & 0x8000u;
  if (magnitude > 0x7f80u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x4780u) return uint16_t(sign | 0x7c00u);  // from 65536 on
  return narrow(Float16{}, widen(BFloat16{}, bits));
}

// To bfloat16 in the upper half: to nearest even, denormals to zero, NaN to a quiet NaN.
inline __attribute__((always_inline)) void round_upper(U16& bits) {
  const U16 magnitude = bits & 0x7fffffffu;
  const U16 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  bits = magnitude < 0x00800000u ? bits & 0x80000000u : rounded;
  bits = magnitude > 0x7f800000u ? U16(F16(bits)) | 0x00400000u : bits;
}

}  // namespace
}  // namespace issp

#define ISSP_ISA scalar
#define ISSP_TARGET
namespace issp::scalar {
namespace {
constexpr bool kFlush = true;
constexpr float kTiny = 0x1p-126f;

inline float flushed(float x) {
  return x < kTiny && x > -kTiny ? std::copysign(0.0f, x) : x;
}
// A result is tiny if it is below 2^-126 when rounded to 24 bits, as if exponents had no limit.
inline float flushed_fma(float a, float b, float c) {
  const float sum = std::fmaf(a, b, c);
  if (!(sum <= kTiny && sum >= -kTiny)) return sum;
  const float scaled = std::fmaf(a * 0x1p60f, b, c * 0x1p60f);
  return scaled < 0x1p-66f && scaled > -0x1p-66f ? std::copysign(0.0f, sum) : sum;
}
inline void fma(float weight, const F16& pixels, F16& sum) {
  const float a = flushed(weight);
  for (int i = 0; i < 16; ++i) sum[i] = flushed_fma(a, flushed(pixels[i]), sum[i]);
}
inline void scale_by(F16& x, float scale) {
  const float a = flushed(scale);
  for (int i = 0; i < 16; ++i) {
    const float product = x[i] * a;
    const bool tiny = product <= kTiny && product >= -kTiny;
    const float scaled = tiny ? (x[i] * 0x1p60f) * a : product;
    x[i] = tiny && scaled < 0x1p-66f && scaled > -0x1p-66f ? std::copysign(0.0f, product) : product;
  }
}
inline void pack(const F16& even, const F16& odd, U16& line) {
  U16 low = U16(even), high = U16(odd);
  round_upper(low);
  round_upper(high);
  line = (low >> 16) | (high & 0xffff0000u);
}
inline void relu(F16& x) {
  x = x < F16{} ? F16{} : x;
}
inline void interleave(U16& first, U16& second) {
  U16 both[2];
  for (int i = 0; i < 16; ++i) {
    both[i / 8][2 * (i % 8)] = first[i];
    both[i / 8][2 * (i % 8) + 1] = second[i];
  }
  first = both[0];
  second = both[1];
}
template <typename T>
inline void load_some(T type, const typename T::Bits* from, int64_t count, F16& to) {
  to = F16{};
  for (int64_t i = 0; i < count; ++i) to[i] = widen(type, from[i]);
}
template <typename T>
inline void store_some(T type, const F16& from, int64_t count, typename T::Bits* to) {
  const U16 bits = U16(from);
  for (int64_t i = 0; i < count; ++i) to[i] = narrowed(type, uint16_t(bits[i] >> 16));
}
inline void pack_neighbours(const F16& low, const F16& high, U16& pairs) {
  U16 halves[2] = {U16(low), U16(high)};
  for (U16& half : halves) round_upper(half);
  for (int i = 0; i < 16; ++i) {
    const U16& half = halves[i / 8];
    pairs[i] = half[2 * (i % 8)] >> 16 | (half[2 * (i % 8) + 1] & 0xffff0000u);
  }
}
inline void transpose(U16 (&rows)[16]) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < i; ++j) {
      const uint32_t kept = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = kept;
    }
  }
}
inline void begin() {}
inline void end() {}
}  // namespace
}  // namespace issp::scalar
#include "cpu/tiles/vectors.inc.h"

#include "cpu/tiles/convert.inc.h"
#include "cpu/tiles/convolve.inc.h"
#undef ISSP_ISA
#undef ISSP_TARGET

#if ISSP_X86

#define ISSP_ISA avx512
#define ISSP_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
namespace issp::avx512 {
namespace {
constexpr bool kFlush = false;  // the processor does
constexpr unsigned kFlushingMode = 0x9fc0;

#define ISSP_INLINE ISSP_TARGET inline __attribute__((always_inline))
ISSP_INLINE void fma(float weight, const F16& pixels, F16& sum) {
  sum = F16(_mm512_fmadd_ps(_mm512_set1_ps(weight), __m512(pixels), __m512(sum)));
}
ISSP_INLINE void scale_by(F16& x, float scale) {
  x *= scale;
}
// The maximum of two zeros, or of a NaN, is the second operand: NaN and -0 stay.
ISSP_INLINE void relu(F16& x) {
  x = F16(_mm512_max_ps(_mm512_setzero_ps(), __m512(x)));
}
ISSP_INLINE void pack(const F16& even, const F16& odd, U16& line) {
  U16 low = U16(even), high = U16(odd);
  round_upper(low);
  round_upper(high);
  line = (low >> 16) | (high & 0xffff0000u);
}
ISSP_INLINE void interleave(U16& first, U16& second) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512i a = __m512i(first), b = __m512i(second);
  first = U16(_mm512_permutex2var_epi32(a, low, b));
  second = U16(_mm512_permutex2var_epi32(a, high, b));
}
ISSP_INLINE __mmask16 first_lanes(int64_t count) {
  return __mmask16(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}
ISSP_INLINE void load_some(Float32, const uint32_t* from, int64_t count, F16& to) {
  to = F16(_mm512_maskz_loadu_ps(first_lanes(count), from));
}
ISSP_INLINE void load_some(BFloat16, const uint16_t* from, int64_t count, F16& to) {
  const __m256i halves = _mm256_maskz_loadu_epi16(first_lanes(count), from);
  to = F16(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
ISSP_INLINE void load_some(Float16, const uint16_t* from, int64_t count, F16& to) {
  to = F16(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), from)));
}
ISSP_INLINE void store_some(Float32, const F16& from, int64_t count, uint32_t* to) {
  _mm512_mask_storeu_ps(to, first_lanes(count), __m512(from));
}
ISSP_INLINE void store_some(BFloat16, const F16& from, int64_t count, uint16_t* to) {
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(__m512i(from), 16));
  _mm256_mask_storeu_epi16(to, first_lanes(count), halves);
}
ISSP_INLINE void store_some(Float16, const F16& from, int64_t count, uint16_t* to) {
  const __m256i halves = _mm512_cvtps_ph(__m512(from), _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(to, first_lanes(count), halves);
}
ISSP_INLINE void pack_neighbours(const F16& low, const F16& high, U16& pairs) {
  U16 first = U16(low), second = U16(high);
  round_upper(first);
  round_upper(second);
  const __m256i a = _mm512_cvtepi32_epi16(__m512i(first >> 16));
  const __m256i b = _mm512_cvtepi32_epi16(__m512i(second >> 16));
  pairs = U16(_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}
// 32-bit numbers: first within quarters of four rows, then the quarters.
ISSP_INLINE void transpose(U16 (&rows)[16]) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(__m512i(rows[i]), __m512i(rows[i + 1]));
    a[i + 1] = _mm512_unpackhi_epi32(__m512i(rows[i]), __m512i(rows[i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i even_low = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    rows[i] = U16(_mm512_shuffle_i32x4(even_low, even_high, 0x88));
    rows[4 + i] = U16(_mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    rows[8 + i] = U16(_mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    rows[12 + i] = U16(_mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}
#undef ISSP_INLINE
inline void begin() {
  _mm_setcsr(kFlushingMode);
}
inline void end() {}
}  // namespace
}  // namespace issp::avx512
#include "cpu/tiles/vectors.inc.h"

#include "cpu/tiles/convert.inc.h"
#include "cpu/tiles/convolve.inc.h"
#undef ISSP_ISA
#undef ISSP_TARGET

#if ISSP_HAS_AMX
#define ISSP_ISA amx
#define ISSP_AMX 1
#define ISSP_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
namespace issp::amx {
namespace {
using avx512::kFlush;
using avx512::load_some;
using avx512::relu;
using avx512::scale_by;
using avx512::store_some;
using avx512::transpose;

#define ISSP_INLINE ISSP_TARGET inline __attribute__((always_inline))
ISSP_INLINE void fma(float weight, const F16& pixels, F16& sum) {
  avx512::fma(weight, pixels, sum);
}
ISSP_INLINE void pack(const F16& even, const F16& odd, U16& line) {
  const __m512i halves = __m512i(_mm512_cvtne2ps_pbh(__m512(odd), __m512(even)));
  // Lane i of the first half and lane i of the second become neighbours.
  alignas(64) static constexpr uint16_t kNeighbours[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  line = U16(_mm512_permutexvar_epi16(_mm512_load_si512(kNeighbours), halves));
}
ISSP_INLINE void pack_neighbours(const F16& low, const F16& high, U16& pairs) {
  pairs = U16(__m512i(_mm512_cvtne2ps_pbh(__m512(high), __m512(low))));
}
ISSP_INLINE void interleave(U16& first, U16& second) {
  avx512::interleave(first, second);
}
#undef ISSP_INLINE

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "as LDTILECFG reads it");

// oneDNN configures the registers as well: they are set for each call, and left unused.
inline void begin() {
  static const TileConfig config;
  avx512::begin();
  asm volatile("ldtilecfg %0" ::"m"(config));
}
inline void end() {
  asm volatile("tilerelease");
}

// Whether processor and system let this process use the tiles; Linux wants to be asked.
bool is_usable() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return false;  // AVX512_BF16
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned bf16_and_tile = 1u << 22 | 1u << 24;
  if ((d & bf16_and_tile) != bf16_and_tile) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const unsigned tile_states = 1u << 17 | 1u << 18;
  if ((low & tile_states) != tile_states) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
}  // namespace
}  // namespace issp::amx
#include "cpu/tiles/vectors.inc.h"

#include "cpu/tiles/convert.inc.h"
#include "cpu/tiles/convolve.inc.h"
#undef ISSP_ISA
#undef ISSP_AMX
#undef ISSP_TARGET
#endif

#endif

namespace issp {
namespace {

enum TileSet { kPlain, kVectors, kMatrix };
constexpr const char* kSets[] = {"scalar", "avx512", "amx"};

TileSet best_tile_set() {
#if ISSP_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if ISSP_HAS_AMX
  static const bool usable = avx512 && amx::is_usable();
  if (usable) return kMatrix;
#endif
  if (avx512) return kVectors;
#endif
  return kPlain;
}

std::atomic<TileSet>& tile_set() {
  static std::atomic<TileSet> current{best_tile_set()};
  return current;
}

}  // namespace

std::string tile_capability(std::string want) {
  for (const TileSet set : {kPlain, kVectors, kMatrix}) {
    if (want != kSets[set]) continue;
    if (set > best_tile_set()) throw std::runtime_error("this CPU has no " + want);
    tile_set() = set;
    return want;
  }
  if (!want.empty()) throw std::runtime_error("use scalar, avx512 or amx, not " + want);
  return kSets[tile_set()];
}

const TileKernels& tile_kernels() {
#define ISSP_TABLE(isa, name, few, many)                                                  \
  {                                                                                       \
    name, {few, many}, isa::begin, isa::end, isa::convolve, isa::add_taps, isa::to_tiles, \
        isa::from_tiles, isa::translate                                                   \
  }
  static const TileKernels plain = ISSP_TABLE(scalar, "scalar", 1, 1);
#if ISSP_X86
  static const TileKernels vectors = ISSP_TABLE(avx512, "avx512", 1, 1);
#if ISSP_HAS_AMX
  static const TileKernels matrix = ISSP_TABLE(amx, "amx", 4, 2);
  if (tile_set() == kMatrix) return matrix;
#endif
  if (tile_set() != kPlain) return vectors;
#endif
  return plain;
}

}  // namespace issp
