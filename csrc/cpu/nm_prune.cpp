// nm_prune on the CPU: the N:M step on a copy. Each work unit is copied just before it is pruned.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "checks.h"
#include "cpu/dtypes.h"
#include "cpu/nm/tensor_step.h"

namespace issp {
namespace {

std::tuple<Tensor, Tensor> nm_prune(const Tensor& weight, int64_t n, int64_t m, int64_t v,
                                    std::string layout, double shrink, int64_t c) {
  check_nm_prune(weight, n, m, v, layout, shrink, c);
  const Pattern by = check_pattern(weight, n, m, layout == "flat" ? 0 : v, c);
  Tensor out = torch::stable::empty_like(weight);
  std::vector<Item> items;
  append(items, out.mutable_data_ptr(), weight.numel());
  const Tensor mask = torch::stable::new_zeros(weight, {mask_total(items)}, ScalarType::Int);
  for_dtype(weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* const from = static_cast<const typename T::Bits*>(weight.const_data_ptr());
    const Split split(items, sizeof(typename T::Bits));
    for_each_item(items, split, [&](size_t i, int64_t, ThreadGroup threads) {
      typename T::Bits threshold;
      int64_t flips;
      NmTensorStep<T>(items[i], by, shrink, threads, nullptr)
          .run(from, static_cast<int32_t*>(mask.mutable_data_ptr()), threshold, flips);
    });
  });
  return {out, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("nm_prune", TORCH_BOX(&nm_prune));
}

}  // namespace issp
