// torch.ops.issp.sparse_conv2d and sparse_matmul on a GPU.
#include "product_call.h"
#include "product_forward.cuh"

namespace issp {

Tensor sparse_conv2d_cuda(Tensor x, Tensor values, Tensor columns, Tensor starts,
                          std::vector<Tensor> transposed, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, std::vector<int64_t> geometry,
                          std::string activation) {
  const Convolution call = check_sparse_conv2d(x, values, columns, starts, transposed, bias,
                                               residual, geometry, activation);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::new_empty(x, image_shape(call.geometry));
  sparse_conv2d(window_of(call.geometry), lists_of(call, columns, starts),
                storage_of(x.scalar_type()), pointer<const void>(x), pointer<const void>(values),
                ends_of(call, bias, residual, y), current_stream(x));
  return y;
}

Tensor sparse_matmul_cuda(Tensor x, Tensor values, Tensor columns, Tensor starts,
                          std::vector<Tensor> transposed, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, std::string activation) {
  const Convolution call =
      check_sparse_matmul(x, values, columns, starts, transposed, bias, residual, activation);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const int64_t rows = call.geometry.rows;
  Tensor y = torch::stable::new_empty(x, token_shape(x, rows));
  sparse_matmul(uint64_t(y.numel() / rows), lists_of(call, columns, starts),
                storage_of(x.scalar_type()), pointer<const void>(x), pointer<const void>(values),
                ends_of(call, bias, residual, y), current_stream(x));
  return y;
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&issp::sparse_conv2d_cuda));
  m.impl("sparse_matmul", TORCH_BOX(&issp::sparse_matmul_cuda));
}
