// From the checked tensors of a sparse op to the direct or the tiled convolution.
#pragma once

#include "cpu/sparse/direct_conv.h"
#include "cpu/sparse/half_conv.h"

namespace issp {

struct ForwardTensors {
  const Tensor& x;
  const Tensor& values;
  const Tensor& columns;
  const Tensor& starts;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& residual;
  const Tensor& y;
};

// Uses the direct convolution if it supports the call; returns whether it does.
inline bool try_direct(const Convolution& conv, const ForwardTensors& t) {
  const DirectKernels* const direct = direct_kernels();
  if (!direct || conv.product.dtype != ScalarType::Float || !t.y.numel()) return false;
  if (std::max(conv.geometry.kernel[0], conv.geometry.kernel[1]) > kMaxDirectKernel) return false;
  const int64_t num_threads = num_threads_for(multiply_adds(conv));
  const DirectConv direct_conv(*direct, sparse_kernels<float>(), conv, num_threads);
  if (!direct_conv.supports()) return false;
  const RowPattern<DirectEntry> pattern =
      translate(conv.product, t.columns, t.starts, direct_conv.positions());
  const auto data = [](const std::optional<Tensor>& x) {
    return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr;
  };
  direct_conv({pattern, data(t.x), data(t.values), data(t.bias), data(t.residual),
               static_cast<float*>(t.y.mutable_data_ptr())},
              num_threads);
  return true;
}

// Uses the float16 convolution if the CPU has it and the call is one; returns whether it does.
inline bool try_half(const Convolution& conv, const ForwardTensors& t) {
  const HalfKernels* const half = half_kernels();
  if (!half || conv.product.dtype != ScalarType::Half) return false;
  const int64_t num_threads = num_threads_for(multiply_adds(conv) / 2);
  const SparseKernels<float>& wide = sparse_kernels<float>();
  const Geometry pairs = paired(conv.geometry);
  Tiling tiling = choose_tiling(wide, pairs, log2_rows(conv.product.v),
                                pixel_order(conv.geometry, false), num_threads);
  split_channels<float>(conv, tiling);
  const RowPattern<int32_t> pattern =
      translate(conv.product, t.columns, t.starts, tile_offsets(conv.geometry, tiling));
  if (!t.y.numel()) return true;
  const Widened<Float16> bias = t.bias ? Widened<Float16>(*t.bias) : Widened<Float16>();
  const std::vector<uint32_t> values = twice(t.values);
  const ChannelBlocks channel_blocks(conv, tiling, t.columns, pattern.row_ptr);
  const HalfConv half_conv = {*half,   wide,           conv,          pairs,      tiling,
                              pattern, channel_blocks, values.data(), bias.data()};
  half_conv(t.x.const_data_ptr(), t.residual ? t.residual->const_data_ptr() : nullptr,
            t.y.mutable_data_ptr(), num_threads);
  return true;
}

inline void forward(const Convolution& conv, bool tokens, const ForwardTensors& t) {
  if (!tokens && (try_direct(conv, t) || try_half(conv, t))) return;
  const int64_t num_threads = num_threads_for(multiply_adds(conv));
  for_dtype(conv.product.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = typename T::Wide;
    const SparseKernels<Real>& kernels = sparse_kernels<Real>();
    Tiling tiling = choose_tiling(kernels, conv.geometry, log2_rows(conv.product.v),
                                  pixel_order(conv.geometry, tokens), num_threads);
    split_channels<Real>(conv, tiling);
    const RowPattern<int32_t> pattern =
        translate(conv.product, t.columns, t.starts, tile_offsets(conv.geometry, tiling));
    if (!t.y.numel()) return;
    const Widened<T> values(t.values), bias = t.bias ? Widened<T>(*t.bias) : Widened<T>();
    const ChannelBlocks channel_blocks(conv, tiling, t.columns, pattern.row_ptr);
    const TiledConv<T> tiled_conv = {kernels,        conv,          tiling,     pattern,
                                     channel_blocks, values.data(), bias.data()};
    tiled_conv(t.x.const_data_ptr(), t.residual ? t.residual->const_data_ptr() : nullptr,
               t.y.mutable_data_ptr(), num_threads);
  });
}

}  // namespace issp
