// torch.ops.issp.magnitude_threshold on a GPU.
#include "magnitude_threshold.cuh"

#include "torch_call.h"

namespace issp {

Tensor magnitude_threshold_cuda(std::vector<Tensor> weights, std::vector<int64_t> k) {
  const std::vector<Item> items = check_magnitude_threshold(weights, k);
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  check_sizes(items);
  const std::vector<uint32_t> ranks(k.begin(), k.end());
  Tensor found = torch::stable::new_empty(weights[0], {int64_t(items.size())});
  with_dtype(weights[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    magnitude_threshold<T>(items, ranks, pointer<typename T::Bits>(found),
                           current_stream(weights[0]));
  });
  return found;
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("magnitude_threshold", TORCH_BOX(&issp::magnitude_threshold_cuda));
}
