// torch.ops.issp.nm_prune on a GPU.
#include "nm_prune.cuh"

#include <tuple>

#include "table.cuh"
#include "torch_call.h"

namespace issp {

Groups groups_of(const Tensor& weight, int64_t n, int64_t m, int64_t v, const std::string& layout) {
  const bool flat = layout == "flat";
  const int64_t channels = flat ? weight.numel() : weight.size(1);
  const int64_t rows = flat ? 1 : weight.size(0);
  return {uint32_t(channels), uint32_t(weight.numel() / rows / channels),
          uint32_t(m),        uint32_t(v),
          uint32_t(m - n),    uint32_t(weight.numel())};
}

std::tuple<Tensor, Tensor> nm_prune_cuda(Tensor weight, int64_t n, int64_t m, int64_t v,
                                         std::string layout, double shrink) {
  const Item item = check_nm_prune(weight, n, m, v, layout, shrink);
  check_sizes({item});
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const Groups groups = groups_of(weight, n, m, v, layout);
  Tensor pruned = torch::stable::empty_like(weight);
  Tensor mask = torch::stable::new_empty(weight, {mask_words(item.numel)}, ScalarType::Int);
  std::optional<Tensor> cuts;
  if (needs_cuts(groups)) {
    const int64_t words = int64_t(group_count(groups)) * kCutWords;
    cuts = torch::stable::new_empty(weight, {words}, ScalarType::Int);
  }
  with_dtype(weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    nm_prune<T>(pointer<const typename T::Bits>(weight), groups, shrink,
                pointer<typename T::Bits>(pruned), pointer<uint32_t>(mask),
                cuts ? pointer<uint32_t>(*cuts) : nullptr, current_stream(weight));
  });
  return {pruned, mask};
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("nm_prune", TORCH_BOX(&issp::nm_prune_cuda));
}
