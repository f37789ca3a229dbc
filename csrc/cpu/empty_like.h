// New tensors without the detour of torch::stable::new_empty, which looks torch's op up by its name
// and boxes the arguments: more than a microsecond, a tenth of a small product's call.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace issp {

// Contiguous, uninitialised, on the CPU, of x's dtype.
inline torch::stable::Tensor fresh_like(const torch::stable::Tensor& x,
                                        const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i > 1; --i) {
    strides[i - 2] = strides[i - 1] * std::max<int64_t>(1, shape[i - 1]);
  }
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(),
                                                         strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return torch::stable::Tensor(made);
}

}  // namespace issp
