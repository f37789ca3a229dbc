// torch.ops.issp.sparse_conv2d on a GPU.
#include "sparse_conv2d.cuh"

#include "product_call.h"

namespace issp {

Tensor sparse_conv2d_cuda(Tensor x, Tensor values, Tensor columns, Tensor starts,
                          std::vector<Tensor> transposed, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, std::vector<int64_t> kernel,
                          std::vector<int64_t> stride, std::vector<int64_t> padding,
                          std::vector<int64_t> dilation, std::vector<int64_t> upsample,
                          std::vector<int64_t> size, std::string activation) {
  const Convolution call =
      check_sparse_conv2d(x, values, columns, starts, transposed, bias, residual, kernel, stride,
                          padding, dilation, upsample, size, activation);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Geometry& geometry = call.geometry;
  Tensor y = torch::stable::new_empty(
      x, {geometry.batch, geometry.rows, geometry.size[0], geometry.size[1]});
  sparse_conv2d(window_of(geometry), lists_of(call, columns, starts), storage_of(x.scalar_type()),
                pointer<const void>(x), pointer<const void>(values),
                ends_of(call, bias, residual, y), current_stream(x));
  return y;
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&issp::sparse_conv2d_cuda));
}
