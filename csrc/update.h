// The scalar rule of the optimizers, for host and device: Adam and SGD, which run before the
// selection. issp/ops/reference/updates.py implements the same rule in the same order.
//
// Every operation rounds once. Where torch's fused kernels use a fused multiply-add, the rule uses
// `fused`. A compiler must not fuse other operations: host files are compiled with
// -ffp-contract=off, and on the device `times` is an instruction that is never contracted. The rule
// itself is in update_rule.inc.h. Scalars are computed in float64, once per tensor, and rounded to
// float32 once.
#pragma once

#include <cmath>

#include "semantics.h"

namespace issp {

#if defined(__CUDA_ARCH__)
ISSP_RULE float fused(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
ISSP_RULE float times(float a, float b) {
  return __fmul_rn(a, b);
}
ISSP_RULE double times(double a, double b) {
  return __dmul_rn(a, b);
}
ISSP_RULE float over(float a, float b) {
  return __fdiv_rn(a, b);
}
ISSP_RULE float root(float x) {
  return __fsqrt_rn(x);
}
ISSP_RULE float flushed(float x) {
  float product;
  asm("mul.rn.ftz.f32 %0, %1, 0f3F800000;" : "=f"(product) : "f"(x));
  return product;
}
#else
ISSP_RULE float fused(float a, float b, float c) {
  return std::fma(a, b, c);
}
ISSP_RULE float times(float a, float b) {
  return a * b;
}
ISSP_RULE double times(double a, double b) {
  return a * b;
}
ISSP_RULE float over(float a, float b) {
  return a / b;
}
ISSP_RULE float root(float x) {
  return std::sqrt(x);
}
ISSP_RULE float flushed(float x) {
  const uint32_t bits = bit_as<uint32_t>(x);
  return bit_as<float>((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}
#endif

// base^n by squaring, lowest bit of n first. The pow() of different libraries differ in the last
// bit; products in a fixed order do not.
ISSP_RULE double power(double base, uint32_t n) {
  double result = 1.0;
  for (; n != 0; n >>= 1) {
    if (n & 1u) result = times(result, base);
    base = times(base, base);
  }
  return result;
}

// The preparation of a gradient: `scale` is the factor of a gradient scaler.
struct Gradient {
  float scale;
  bool scaled, maximize;

  ISSP_RULE float operator()(float g) const {
    if (scaled) g = over(g, scale);
    return maximize ? -g : g;
  }
};

// The arguments of an adam_soft_shrink_ call; an lr tensor may replace lr.
struct Adam {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;
};

// The same for one tensor and its step, rounded to float32.
struct AdamStep {
  float coupled_decay, decoupled_decay;  // decoupled_decay multiplies the weight
  float lerp, beta2, rest2, eps;         // lerp: 1 - beta1; rest2: 1 - beta2
  float bias2_root, step_size;
  bool couple, decouple;
};

// `step` includes this update: 1 for the first.
ISSP_RULE AdamStep adam_step(const Adam& adam, double lr, float step) {
  // NaN and what is below 1 count as 0; 2^32 - 256 is the largest float below 2^32.
  const uint32_t t = step > 0.0f ? (step < 4294967040.0f ? uint32_t(step) : 4294967040u) : 0u;
  const bool decay = adam.weight_decay != 0.0;
  AdamStep to;
  to.coupled_decay = float(adam.weight_decay);
  to.decoupled_decay = float(1.0 - times(lr, adam.weight_decay));
  to.lerp = float(1.0 - adam.beta1);
  to.beta2 = float(adam.beta2);
  to.rest2 = float(1.0 - adam.beta2);
  to.eps = float(adam.eps);
  to.bias2_root = float(sqrt(1.0 - power(adam.beta2, t)));
  to.step_size = float(lr / (1.0 - power(adam.beta1, t)));
  to.couple = decay && !adam.decoupled;
  to.decouple = decay && adam.decoupled;
  return to;
}

// The arguments of an sgd_soft_shrink_ call, and below the same rounded to float32.
struct Sgd {
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
};
struct SgdStep {
  float decay, momentum, rest, minus_lr;  // rest: 1 - dampening
  bool decays, has_momentum, nesterov;
};

ISSP_RULE SgdStep sgd_step(const Sgd& sgd, double lr) {
  SgdStep to;
  to.decay = float(sgd.weight_decay);
  to.momentum = float(sgd.momentum);
  to.rest = float(1.0 - sgd.dampening);
  to.minus_lr = float(-lr);
  to.decays = sgd.weight_decay != 0.0;
  to.has_momentum = sgd.momentum != 0.0;
  to.nesterov = sgd.nesterov;
  return to;
}

#define ISSP_UPDATE_RULE ISSP_RULE
#include "update_rule.inc.h"
#undef ISSP_UPDATE_RULE

}  // namespace issp
