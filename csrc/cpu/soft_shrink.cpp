// soft_shrink_ on the CPU. Traffic per weight in steady state: one read and one write of DRAM, 1/8
// byte of mask read and written (speculate.inc.h says how).
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/dtypes.h"
#include "cpu/nm/tensor_step.h"
#include "cpu/prune/tensor_step.h"

namespace issp {
namespace {

void soft_shrink_(const std::vector<Tensor>& weights, const Tensor& k, double shrink,
                  const Tensor& thresholds, const Tensor& masks, const Tensor& flips,
                  const Tensor& scratch, const std::optional<Tensor>& found_inf, bool bracket,
                  const std::vector<int64_t>& patterns) {
  const std::vector<Item> items =
      check_soft_shrink(weights, k, shrink, thresholds, masks, flips, scratch, found_inf);
  const auto* counts = static_cast<const int64_t*>(k.const_data_ptr());
  const std::vector<Pattern> groups = check_patterns(weights, items.size(), patterns);
  for (size_t i = 0; i < items.size(); ++i) check_rank(counts[i], items[i], at(groups, i), i);
  if (found_inf && *static_cast<const float*>(found_inf->const_data_ptr()) != 0.0f) return;

  const Scratch room(scratch.mutable_data_ptr(), scratch.numel(), items.size());
  auto* const changed = static_cast<int64_t*>(flips.mutable_data_ptr());
  Call call{shrink, bracket, static_cast<int32_t*>(masks.mutable_data_ptr())};
  for_dtype(weights[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    auto* const taus = static_cast<typename T::Bits*>(thresholds.mutable_data_ptr());
    const Split split(items, sizeof(typename T::Bits));
    for_each_item(items, split, [&](size_t i, int64_t member, Team team) {
      if (counts[i] && at(groups, i).m) {
        const NmItem<T> item(items[i], groups[i], shrink, team, nullptr);
        return item.run(nullptr, call.masks + items[i].mask_start, taus[i], changed[i]);
      }
      const Space space = team.size > 1 ? room.space : room.space.share(member, split.members());
      ShrinkItem<T>(items[i], call, team, space, nullptr)
          .run(counts[i], taus[i], changed[i], room.trends[i]);
    });
  });
  room.words[0] += call.misses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("soft_shrink_", TORCH_BOX(&soft_shrink_));
}

}  // namespace issp
