// An optimizer op's torch arguments as the kernels take them.
#pragma once

#include "checks_update.h"
#include "optimizer.cuh"
#include "torch_call.h"

namespace issp {

inline const float* float_or_null(const std::optional<Tensor>& x) {
  return x ? pointer<const float>(*x) : nullptr;
}

inline Rate rate_of(double lr, const std::optional<Tensor>& lr_tensor) {
  if (!lr_tensor) return {lr, nullptr, 0};
  const ScalarType dtype = lr_tensor->scalar_type();
  const uint32_t number = dtype == ScalarType::Float      ? 0
                          : dtype == ScalarType::Half     ? 1
                          : dtype == ScalarType::BFloat16 ? 2
                                                          : 3;
  return {lr, lr_tensor->const_data_ptr(), number};
}

inline std::vector<Item> items_of(const Update& update) {
  std::vector<Item> items = update.pruned;
  items.insert(items.end(), update.rest.begin(), update.rest.end());
  return items;
}

inline Call<Float32> call_of(const Tensor& k, double shrink, const Tensor& thresholds,
                             const Tensor& masks, const Tensor& flips, const Tensor& scratch,
                             const std::optional<Tensor>& found_inf, bool bracket) {
  return {pointer<const int64_t>(k),
          pointer<uint32_t>(thresholds),
          pointer<uint32_t>(masks),
          pointer<int64_t>(flips),
          pointer<uint32_t>(scratch),
          float_or_null(found_inf),
          float(shrink),
          bracket};
}

}  // namespace issp
