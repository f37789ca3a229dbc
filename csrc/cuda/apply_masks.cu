// torch.ops.issp.apply_masks_ on a GPU.
#include "apply_masks.cuh"

#include "torch_call.h"

namespace issp {

void apply_masks_cuda(std::vector<Tensor> tensors, Tensor masks, int64_t sets) {
  const std::vector<Item> items = check_apply_masks(tensors, masks, sets);
  const torch::stable::accelerator::DeviceGuard guard(tensors[0].get_device_index());
  std::vector<Place> places;
  places.reserve(tensors.size());
  for (const Tensor& x : tensors) {
    places.push_back({x.mutable_data_ptr(), uint32_t(x.element_size())});
  }
  apply_masks(items, places, pointer<const uint32_t>(masks), current_stream(tensors[0]));
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("apply_masks_", TORCH_BOX(&issp::apply_masks_cuda));
}
