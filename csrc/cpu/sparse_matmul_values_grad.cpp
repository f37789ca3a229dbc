// sparse_matmul_values_grad on the CPU; see product_grad.h for how.
#include <torch/csrc/stable/library.h>

#include "cpu/empty_like.h"
#include "cpu/sparse/values_grad.h"

namespace issp {
namespace {

Tensor sparse_matmul_values_grad(const Tensor& x, const Tensor& grad, const Tensor& columns,
                                 const Tensor& starts, int64_t v) {
  const Convolution conv = check_sparse_matmul_values_grad(x, grad, columns, starts, v);
  const Tensor sums = empty_like(x, {conv.product.entries, v});
  values_grad(conv, true, x, grad, columns, starts, sums);
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("sparse_matmul_values_grad", TORCH_BOX(&sparse_matmul_values_grad));
}

}  // namespace issp
