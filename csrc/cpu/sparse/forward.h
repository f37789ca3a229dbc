// From checked tensors to a run of the kernels.
#pragma once

#include "cpu/sparse/direct_conv.h"

namespace issp {

// Straight from x where that supports the call; whether it did.
inline bool multiply_direct(const Convolution& conv, const Tensor& x, const Tensor& values,
                            const Tensor& columns, const Tensor& starts,
                            const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& residual, const Tensor& y) {
  const DirectKernels* const direct = direct_kernels();
  if (!direct || conv.product.dtype != ScalarType::Float || !y.numel()) return false;
  const int64_t num_threads = num_threads_for(multiply_adds(conv));
  const DirectConv direct_conv(*direct, sparse_kernels<float>(), conv, num_threads);
  if (!direct_conv.supports()) return false;
  const RowPattern<DirectEntry> pattern =
      translate(conv.product, columns, starts, direct_conv.positions());
  const auto data = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  direct_conv(pattern, data(x), data(values), data(bias), data(residual),
              static_cast<float*>(y.mutable_data_ptr()), num_threads);
  return true;
}

inline void multiply(const Convolution& conv, bool tokens, const Tensor& x, const Tensor& values,
                     const Tensor& columns, const Tensor& starts, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, const Tensor& y) {
  if (!tokens && multiply_direct(conv, x, values, columns, starts, bias, residual, y)) return;
  const int64_t num_threads = num_threads_for(multiply_adds(conv));
  for_dtype(conv.product.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = typename T::Wide;
    const SparseKernels<Real>& kernels = sparse_kernels<Real>();
    Tiling tiling =
        choose_tiling(kernels, conv.geometry, log2_rows(conv.product.v), tokens, num_threads);
    split_channels<Real>(conv, tiling);
    const RowPattern<int32_t> pattern =
        translate(conv.product, columns, starts, tile_offsets(conv.geometry, tiling));
    if (!y.numel()) return;
    const Widened<T> values_wide(values), bias_values = bias ? Widened<T>(*bias) : Widened<T>();
    const ChannelBlocks channel_blocks(conv, tiling, columns, pattern.row_ptr);
    const TiledConv<T> tiled = {
        kernels, conv, tiling, pattern, channel_blocks, values_wide.data(), bias_values.data()};
    tiled(x.const_data_ptr(), residual ? residual->const_data_ptr() : nullptr, y.mutable_data_ptr(),
          num_threads);
  });
}

}  // namespace issp
