// From checked tensors to a run of the kernels.
#pragma once

#include "cpu/sparse/direct_conv.h"

namespace issp {

// Straight from x where that suits the call; whether it did.
inline bool multiply_direct(const Convolution& call, const Tensor& x, const Tensor& values,
                            const Tensor& columns, const Tensor& starts,
                            const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& residual, const Tensor& y) {
  const DirectKernels* const direct = direct_kernels();
  if (!direct || call.product.dtype != ScalarType::Float || !y.numel()) return false;
  const int64_t members = worthy_members(multiply_adds(call));
  const DirectRun run(*direct, product_kernels<float>(), call, members);
  if (!run.suits()) return false;
  const Lists<DirectEntry> lists = translate(call.product, columns, starts, run.positions());
  const auto data = [](const std::optional<Tensor>& t) {
    return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
  };
  run(lists, data(x), data(values), data(bias), data(residual),
      static_cast<float*>(y.mutable_data_ptr()), members);
  return true;
}

inline void multiply(const Convolution& call, bool tokens, const Tensor& x, const Tensor& values,
                     const Tensor& columns, const Tensor& starts, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, const Tensor& y) {
  if (!tokens && multiply_direct(call, x, values, columns, starts, bias, residual, y)) return;
  const int64_t members = worthy_members(multiply_adds(call));
  for_dtype(call.product.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = typename T::Wide;
    const ProductKernels<Real>& kernels = product_kernels<Real>();
    Tiling tiling =
        choose_tiling(kernels, call.geometry, rows_log(call.product.v), tokens, members);
    cut_to_runs<Real>(call, tiling);
    const Lists<int32_t> lists =
        translate(call.product, columns, starts, tile_offsets(call.geometry, tiling));
    if (!y.numel()) return;
    const Widened<T> wide(values), first = bias ? Widened<T>(*bias) : Widened<T>();
    const ChannelRuns runs(call, tiling, columns, lists.starts);
    const ProductRun<T> run = {kernels, call, tiling, lists, runs, wide.data(), first.data()};
    run(x.const_data_ptr(), residual ? residual->const_data_ptr() : nullptr, y.mutable_data_ptr(),
        members);
  });
}

}  // namespace issp
