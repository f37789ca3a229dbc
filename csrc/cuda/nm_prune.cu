// torch.ops.issp.nm_prune on a GPU.
#include "nm_prune.cuh"

#include <tuple>

#include "torch_call.h"

namespace issp {

std::tuple<Tensor, Tensor> nm_prune_cuda(Tensor weight, int64_t n, int64_t m, int64_t v,
                                         std::string layout, double shrink, int64_t c) {
  const Item item = check_nm_prune(weight, n, m, v, layout, shrink, c);
  check_sizes({item});
  const Pattern pattern = check_pattern(weight, n, m, layout == "flat" ? 0 : v, c);
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  Tensor pruned = torch::stable::empty_like(weight);
  // Zeros, since blocks that share a word flip bits of it.
  Tensor mask = torch::stable::new_zeros(weight, {mask_words(item.numel)}, ScalarType::Int);
  with_dtype(weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    nm_prune<T>(pointer<const typename T::Bits>(weight), item.numel, pattern, shrink,
                pointer<typename T::Bits>(pruned), pointer<uint32_t>(mask), current_stream(weight));
  });
  return {pruned, mask};
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("nm_prune", TORCH_BOX(&issp::nm_prune_cuda));
}
