// torch.ops.issp.sparse_conv2d_values_grad on a GPU.
#include "sparse_conv2d_values_grad.cuh"

#include "product_grad_call.h"

namespace issp {

Tensor sparse_conv2d_values_grad_cuda(Tensor x, Tensor grad, Tensor columns, Tensor starts,
                                      int64_t v, std::vector<int64_t> geometry) {
  const Convolution call = check_sparse_conv2d_values_grad(x, grad, columns, starts, v, geometry);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Window window = window_of(call.geometry);
  const Lists lists = lists_of(call, columns, starts);
  const Storage storage = storage_of(x.scalar_type());
  const uint32_t splits = choose_splits(lists, tiles_of(window, storage));
  return summed_values(x, lists, splits, [&](void* totals) {
    sparse_conv2d_values_grad(window, lists, storage, pointer<const void>(x),
                              pointer<const void>(grad), totals, current_stream(x));
  });
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("sparse_conv2d_values_grad", TORCH_BOX(&issp::sparse_conv2d_values_grad_cuda));
}
