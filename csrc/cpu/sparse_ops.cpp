// The sparse ops on the CPU. A matrix product is a convolution with one tap, channels innermost.
// See sparse/sparse_kernels.h for the method, and sparse/values_grad.h for that of the gradients.
#include <torch/csrc/stable/library.h>

#include "cpu/empty_like.h"
#include "cpu/sparse/forward.h"
#include "cpu/sparse/values_grad.h"

namespace issp {
namespace {

Tensor sparse_conv2d(const Tensor& x, const Tensor& values, const Tensor& columns,
                     const Tensor& starts, const std::vector<Tensor>& transposed,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                     const std::vector<int64_t>& geometry, std::string activation) {
  const Convolution conv = check_sparse_conv2d(x, values, columns, starts, transposed, bias,
                                               residual, geometry, activation);
  const Tensor y = empty_like(x, image_shape(conv.geometry));
  forward(conv, false, {x, values, columns, starts, bias, residual, y});
  return y;
}

Tensor sparse_conv2d_fused(const Tensor& x, const Tensor& values, const Tensor& columns,
                           const Tensor& starts, const std::vector<Tensor>& transposed,
                           const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                           const std::vector<int64_t>& geometry, std::string activation,
                           double scale, int64_t shuffle) {
  const Convolution conv =
      check_sparse_conv2d_fused(check_sparse_conv2d(x, values, columns, starts, transposed, bias,
                                                    residual, geometry, activation),
                                residual.has_value(), scale, shuffle);
  const Tensor y = empty_like(x, shuffled_shape(conv));
  forward(conv, false, {x, values, columns, starts, bias, residual, y});
  return y;
}

Tensor sparse_matmul(const Tensor& x, const Tensor& values, const Tensor& columns,
                     const Tensor& starts, const std::vector<Tensor>& transposed,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                     std::string activation) {
  const Convolution conv =
      check_sparse_matmul(x, values, columns, starts, transposed, bias, residual, activation);
  const Tensor y = empty_like(x, token_shape(x, conv.geometry.rows));
  forward(conv, true, {x, values, columns, starts, bias, residual, y});
  return y;
}

Tensor sparse_conv2d_values_grad(const Tensor& x, const Tensor& grad, const Tensor& columns,
                                 const Tensor& starts, int64_t v,
                                 const std::vector<int64_t>& geometry) {
  const Convolution conv = check_sparse_conv2d_values_grad(x, grad, columns, starts, v, geometry);
  const Tensor values_grad = empty_like(x, {conv.product.entries, v});
  compute_values_grad(conv, false, {x, grad, columns, starts, values_grad});
  return values_grad;
}

Tensor sparse_matmul_values_grad(const Tensor& x, const Tensor& grad, const Tensor& columns,
                                 const Tensor& starts, int64_t v) {
  const Convolution conv = check_sparse_matmul_values_grad(x, grad, columns, starts, v);
  const Tensor values_grad = empty_like(x, {conv.product.entries, v});
  compute_values_grad(conv, true, {x, grad, columns, starts, values_grad});
  return values_grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d));
  m.impl("sparse_conv2d_fused", TORCH_BOX(&sparse_conv2d_fused));
  m.impl("sparse_matmul", TORCH_BOX(&sparse_matmul));
  m.impl("sparse_conv2d_values_grad", TORCH_BOX(&sparse_conv2d_values_grad));
  m.impl("sparse_matmul_values_grad", TORCH_BOX(&sparse_matmul_values_grad));
}

}  // namespace issp
