// A new tensor without torch::stable::new_empty, which looks up the op by name and boxes its
// arguments. That takes more than 1 us, a tenth of the time of a small sparse convolution.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace issp {

// A contiguous, uninitialized CPU tensor of the dtype of x.
inline torch::stable::Tensor empty_like(const torch::stable::Tensor& x,
                                        const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i > 1; --i) {
    // Unsigned: torch refuses sizes whose product leaves 64 bits, where a signed one is undefined.
    strides[i - 2] =
        int64_t(uint64_t(strides[i - 1]) * uint64_t(std::max<int64_t>(1, shape[i - 1])));
  }
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(),
                                                         strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &result));
  return torch::stable::Tensor(result);
}

}  // namespace issp
