// torch.ops.issp.magnitude_statistics on a GPU.
#include "magnitude_statistics.cuh"

#include "torch_call.h"

namespace issp {

Tensor magnitude_statistics_cuda(std::vector<Tensor> tensors) {
  const std::vector<Item> items = check_tensor_list(tensors, true);
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  check_sizes(items);
  const std::vector<uint32_t> before = tiles_before(items);
  Tensor sums =
      torch::stable::new_empty(tensors[0], {statistics_words(before)}, ScalarType::Double);
  Tensor found =
      torch::stable::new_empty(tensors[0], {int64_t(items.size()), 4}, ScalarType::Double);
  with_dtype(tensors[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    magnitude_statistics<T>(items, before, pointer<double>(sums), pointer<double>(found),
                            current_stream(tensors[0]));
  });
  return found;
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("magnitude_statistics", TORCH_BOX(&issp::magnitude_statistics_cuda));
}
