// sparse_matmul on the CPU: the convolution with one tap, channels innermost; see product.h.
#include <torch/csrc/stable/library.h>

#include "cpu/empty_like.h"
#include "cpu/sparse/forward.h"

namespace issp {
namespace {

Tensor sparse_matmul(const Tensor& x, const Tensor& values, const Tensor& columns,
                     const Tensor& starts, const std::vector<Tensor>& transposed,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                     std::string activation) {
  const Convolution conv =
      check_sparse_matmul(x, values, columns, starts, transposed, bias, residual, activation);
  const Tensor y = empty_like(x, token_shape(x, conv.geometry.rows));
  multiply(conv, true, x, values, columns, starts, bias, residual, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("sparse_matmul", TORCH_BOX(&sparse_matmul));
}

}  // namespace issp
