// torch.ops.issp.regularize_ on a GPU.
#include "regularize.cuh"

#include "torch_call.h"

namespace issp {

void regularize_cuda(std::vector<Tensor> grads, std::vector<Tensor> weights, Tensor factors,
                     Tensor masks) {
  const std::vector<Item> items = check_regularize(grads, weights, factors, masks);
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  std::vector<Place> places;
  places.reserve(2 * items.size());
  for (const Tensor& g : grads) places.push_back({g.mutable_data_ptr(), 0});
  for (const Tensor& w : weights) places.push_back({const_cast<void*>(w.const_data_ptr()), 0});
  with_dtype(grads[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    regularize<T>(items, places, pointer<const typename T::Wide>(factors),
                  pointer<const uint32_t>(masks), current_stream(grads[0]));
  });
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("regularize_", TORCH_BOX(&issp::regularize_cuda));
}
