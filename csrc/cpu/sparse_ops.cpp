// sparse_conv2d on the CPU; see product.h for how.
#include <torch/csrc/stable/library.h>

#include "cpu/empty_like.h"
#include "cpu/sparse/forward.h"

namespace issp {
namespace {

Tensor sparse_conv2d(const Tensor& x, const Tensor& values, const Tensor& columns,
                     const Tensor& starts, const std::vector<Tensor>& transposed,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                     const std::vector<int64_t>& geometry, std::string activation) {
  const Convolution conv = check_sparse_conv2d(x, values, columns, starts, transposed, bias,
                                               residual, geometry, activation);
  const Tensor y = empty_like(x, image_shape(conv.geometry));
  multiply(conv, false, x, values, columns, starts, bias, residual, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d));
}

}  // namespace issp
