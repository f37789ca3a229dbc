// torch.ops.issp.sparse_conv2d_values_grad and sparse_matmul_values_grad on a GPU.
#include "product_call.h"
#include "product_grad.cuh"

namespace issp {

// The gradient of the values: add(totals) adds up `splits` parts of it, which become one.
template <typename Add>
Tensor summed_values(const Tensor& x, const Lists& lists, uint32_t splits, const Add& add) {
  const int64_t values = int64_t(lists.entries) * lists.v;
  const Storage storage = storage_of(x.scalar_type());
  const bool wide = x.element_size() >= 4;
  if (values == 0 || (wide && splits == 1)) {
    Tensor found = torch::stable::new_zeros(x, {lists.entries, lists.v});
    if (values > 0) add(pointer<void>(found));
    return found;
  }
  const ScalarType sums = wide ? x.scalar_type() : ScalarType::Float;
  Tensor totals = torch::stable::new_zeros(x, {splits, values}, sums);
  Tensor found = torch::stable::new_empty(x, {lists.entries, lists.v});
  add(pointer<void>(totals));
  sum_totals(lists, splits, storage, pointer<const void>(totals), pointer<void>(found),
             current_stream(x));
  return found;
}

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

Tensor sparse_matmul_values_grad_cuda(Tensor x, Tensor grad, Tensor columns, Tensor starts,
                                      int64_t v) {
  const Convolution call = check_sparse_matmul_values_grad(x, grad, columns, starts, v);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const uint64_t tokens = uint64_t(grad.numel() / call.geometry.rows);
  const Lists lists = lists_of(call, columns, starts);
  const Storage storage = storage_of(x.scalar_type());
  const uint32_t splits = choose_splits(lists, tiles_of(tokens, storage));
  return summed_values(x, lists, splits, [&](void* totals) {
    sparse_matmul_values_grad(tokens, lists, storage, pointer<const void>(x),
                              pointer<const void>(grad), totals, current_stream(x));
  });
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("sparse_conv2d_values_grad", TORCH_BOX(&issp::sparse_conv2d_values_grad_cuda));
  m.impl("sparse_matmul_values_grad", TORCH_BOX(&issp::sparse_matmul_values_grad_cuda));
}
