// torch.ops.issp.count_zeros on a GPU.
#include "count_zeros.cuh"

#include "torch_call.h"

namespace issp {

Tensor count_zeros_cuda(std::vector<Tensor> tensors) {
  const std::vector<Item> items = check_tensor_list(tensors, false);
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  std::vector<uint32_t> bytes;
  for (const Tensor& x : tensors) bytes.push_back(uint32_t(x.element_size()));
  Tensor zeros = torch::stable::new_zeros(tensors[0], {int64_t(items.size())}, ScalarType::Long);
  count_zeros(items, bytes, pointer<int64_t>(zeros), current_stream(tensors[0]));
  return zeros;
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("count_zeros", TORCH_BOX(&issp::count_zeros_cuda));
}
