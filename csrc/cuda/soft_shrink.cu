// torch.ops.issp.soft_shrink_ on a GPU.
#include "soft_shrink.cuh"

#include "torch_call.h"

namespace issp {

void soft_shrink_cuda(std::vector<Tensor> weights, Tensor k, double shrink, Tensor thresholds,
                      Tensor masks, Tensor flips, Tensor scratch, std::optional<Tensor> found_inf,
                      bool bracket, std::vector<int64_t> patterns) {
  const std::vector<Item> items =
      check_soft_shrink(weights, k, shrink, thresholds, masks, flips, scratch, found_inf);
  const std::vector<Pattern> checked =
      without_units(check_patterns(weights, weights.size(), patterns));
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  with_dtype(weights[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Call<T> call = {
        pointer<const int64_t>(k),  pointer<typename T::Bits>(thresholds),
        pointer<uint32_t>(masks),   pointer<int64_t>(flips),
        pointer<uint32_t>(scratch), found_inf ? pointer<const float>(*found_inf) : nullptr,
        typename T::Wide(shrink),   bracket};
    soft_shrink<T>(items, checked, call, current_stream(weights[0]));
  });
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("soft_shrink_", TORCH_BOX(&issp::soft_shrink_cuda));
}
