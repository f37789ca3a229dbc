#include "cpu/sparse/sparse_kernels.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/prune/prune_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define ISSP_X86 1
#include <immintrin.h>
#endif

namespace issp {

// x * Phi(x) = 0.5 x (1 + erf(x / sqrt 2)). In float, erf is a rational function on |x| <= 4 with
// an error below 3e-7 (the coefficients of generic_fast_erf of Eigen).
inline __attribute__((always_inline)) float gelu(float x) {
  float t = x * 0.70710678118654752f;
  t = t < -4.0f ? -4.0f : t > 4.0f ? 4.0f : t;
  const float s = t * t;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return 0.5f * x * (1.0f + t * p / q);
}
inline double gelu(double x) {
  return 0.5 * x * (1.0 + std::erf(x * 0.70710678118654752440));
}

}  // namespace issp

// Sixteen-byte vectors are SSE2 on x86-64 and NEON on Arm. The baseline instruction set may have no
// fused multiply-add, so this version rounds the product before the addition.
#define ISSP_ISA scalar
#define ISSP_TARGET
#define ISSP_BYTES 16
#define ISSP_REGISTERS 12
namespace issp::scalar {
template <typename Vector>
inline __attribute__((always_inline)) Vector fma(const Vector& a, const Vector& b,
                                                 const Vector& c) {
  return a * b + c;
}
}  // namespace issp::scalar
#include "cpu/sparse/multiply.inc.h"
#undef ISSP_ISA
#undef ISSP_TARGET
#undef ISSP_BYTES
#undef ISSP_REGISTERS

#if ISSP_X86
#define ISSP_ISA avx2
#define ISSP_TARGET __attribute__((target("avx2,fma")))
#define ISSP_BYTES 32
#define ISSP_REGISTERS 12
namespace issp::avx2 {
typedef float Vec8 __attribute__((vector_size(32)));
typedef double Vec4 __attribute__((vector_size(32)));
ISSP_TARGET inline __attribute__((always_inline)) Vec8 fma(Vec8 a, Vec8 b, Vec8 c) {
  return Vec8(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
}
ISSP_TARGET inline __attribute__((always_inline)) Vec4 fma(Vec4 a, Vec4 b, Vec4 c) {
  return Vec4(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c)));
}
}  // namespace issp::avx2
#include "cpu/sparse/multiply.inc.h"
#undef ISSP_ISA
#undef ISSP_TARGET
#undef ISSP_BYTES
#undef ISSP_REGISTERS

#define ISSP_ISA avx512
#define ISSP_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")))
#define ISSP_BYTES 64
#define ISSP_REGISTERS 24
namespace issp::avx512 {
typedef float Vec16 __attribute__((vector_size(64)));
typedef double Vec8 __attribute__((vector_size(64)));
ISSP_TARGET inline __attribute__((always_inline)) Vec16 fma(Vec16 a, Vec16 b, Vec16 c) {
  return Vec16(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
}
ISSP_TARGET inline __attribute__((always_inline)) Vec8 fma(Vec8 a, Vec8 b, Vec8 c) {
  return Vec8(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c)));
}
}  // namespace issp::avx512
#include "cpu/sparse/multiply.inc.h"
#undef ISSP_ISA
#undef ISSP_TARGET
#undef ISSP_BYTES
#undef ISSP_REGISTERS
#endif

namespace issp {

template <typename Real>
const SparseKernels<Real>& sparse_kernels() {
  static const SparseKernels<Real> plain = scalar::kernels<Real>();
#if ISSP_X86
  static const SparseKernels<Real> narrow = avx2::kernels<Real>();
  static const SparseKernels<Real> wide = avx512::kernels<Real>();
  const std::string in_use = cpu_capability({});
  if (in_use != "scalar") return in_use == "avx2" ? narrow : wide;
#endif
  return plain;
}

template const SparseKernels<float>& sparse_kernels<float>();
template const SparseKernels<double>& sparse_kernels<double>();

}  // namespace issp
