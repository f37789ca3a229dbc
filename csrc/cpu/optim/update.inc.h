// The optimizer update, 64 weights at a time. prune_kernels.cpp includes this file once per
// instruction set.

namespace issp::ISSP_ISA {

#define ISSP_UPDATE_RULE ISSP_TARGET inline
#include "update_rule.inc.h"
#undef ISSP_UPDATE_RULE

// 64 elements of a float array. If fewer are left, they are copied to a padded buffer.
struct Padded {
  alignas(64) float copy[64];
  float* data;
  int64_t valid;

  ISSP_TARGET Padded(float* x, int64_t left) : data(x), valid(left) {
    if (left >= 64 || !x) return;
    std::fill(std::copy(x, x + left, copy), copy + 64, 1.0f);
    data = copy;
  }
  ISSP_TARGET void store(float* x) const {
    if (data == copy) std::copy(copy, copy + valid, x);
  }
};

template <bool kBFloat16>
ISSP_TARGET inline Floats load_grad(const void* grad, int64_t at) {
  if constexpr (kBFloat16) {
    return Floats::load_bfloat16(static_cast<const uint16_t*>(grad) + at);
  } else {
    return Floats::load(static_cast<const float*>(grad) + at);
  }
}

ISSP_TARGET inline Floats scaled(Floats g, const Gradient& by) {
  if (by.scaled) g = over(g, Floats(by.scale));
  return by.maximize ? -g : g;
}

// w, first, second: 64 elements each; grad: 64 elements of its dtype.
template <bool kBFloat16>
ISSP_TARGET inline void update_64(float* w, const void* grad, float* first, float* second,
                                  const TensorUpdate& by) {
  for (int i = 0; i < 64; i += Floats::width) {
    const Floats weight = Floats::load(w + i);
    const Floats g = scaled(load_grad<kBFloat16>(grad, i), by.gradient);
    Floats m = first ? Floats::load(first + i) : Floats(0.0f);
    Floats updated = weight;
    if (by.rule == TensorUpdate::kAdam) {
      Floats v = Floats::load(second + i);
      updated = ISSP_ISA::adam_updated(weight, g, m, v, by.adam);
      v.store(second + i);
    } else {
      updated = ISSP_ISA::sgd_updated(weight, g, m, by.first_step, by.sgd);
    }
    if (first) m.store(first + i);
    updated.store(w + i);
  }
}

ISSP_TARGET inline void update_block(Block64<Float32>& block, int64_t b, const TensorUpdate& by) {
  const int64_t size = by.bfloat16 ? 2 : 4;
  const char* grad = static_cast<const char*>(by.grad) + 64 * b * size;
  prefetch(grad, size_t(64 * size));
  if (by.first) prefetch(by.first + 64 * b, 256);
  if (by.second) prefetch(by.second + 64 * b, 256);
  Padded first(by.first ? by.first + 64 * b : nullptr, block.valid);
  Padded second(by.second ? by.second + 64 * b : nullptr, block.valid);
  alignas(64) char padded_grad[256];
  if (block.valid < 64) {
    std::fill(std::copy(grad, grad + block.valid * size, padded_grad), padded_grad + 64 * size,
              char(0));
    grad = padded_grad;
  }
  auto* const w = reinterpret_cast<float*>(block.data);
  if (by.bfloat16) {
    update_64<true>(w, grad, first.data, second.data, by);
  } else {
    update_64<false>(w, grad, first.data, second.data, by);
  }
  if (block.valid < 64) {
    if (by.first) first.store(by.first + 64 * b);
    if (by.second) second.store(by.second + 64 * b);
    for (int64_t i = block.valid; i < 64; ++i) block.padded[i] = Limits<Float32>::magnitude;
  }
}

// See UpdateKernels.
ISSP_TARGET inline void update(float* w, int64_t numel, Range blocks, const TensorUpdate& by,
                               const uint64_t* mask) {
  using L = Lanes<Float32>;
  auto* const bits = reinterpret_cast<uint32_t*>(w);
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    Block64<Float32> block(bits, b, numel);
    prefetch(w + 64 * b, 256);
    update_block(block, b, by);
    block.store(bits, b);
    const uint64_t drop = mask ? ~mask[b] & block.bits() : 0;
    if (!drop) continue;
    for (float* x : {w, by.first, by.second}) {
      if (!x) continue;
      Block64<Float32> cleared(reinterpret_cast<uint32_t*>(x), b, numel);
      for (int i = 0; i < 64; i += L::width) L::clear(cleared.data + i, lanes_of<L>(drop, i));
      cleared.store(reinterpret_cast<uint32_t*>(x), b);
    }
  }
}

}  // namespace issp::ISSP_ISA
