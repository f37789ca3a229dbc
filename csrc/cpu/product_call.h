// From checked tensors to a run of the kernels.
#pragma once

#include "product_run.h"

namespace issp {

inline void multiply(const Convolution& call, bool tokens, const Tensor& x, const Tensor& values,
                     const Tensor& columns, const Tensor& starts, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, const Tensor& y) {
  const int64_t members = worthy_members(multiply_adds(call));
  for_dtype(call.product.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = typename T::Wide;
    const ProductKernels<Real>& kernels = product_kernels<Real>();
    const Tiling tiling =
        choose_tiling(kernels, call.geometry, rows_log(call.product.v), tokens, members);
    const Lists<Real> lists = translate<Real>(call.geometry, tiling, call.product, columns, starts);
    if (!y.numel()) return;
    const Widened<T> wide(values), first = bias ? Widened<T>(*bias) : Widened<T>();
    const ProductRun<T> run = {kernels, call, tiling, lists, wide.data(), first.data()};
    run(x.const_data_ptr(), residual ? residual->const_data_ptr() : nullptr, y.mutable_data_ptr(),
        members);
  });
}

}  // namespace issp
