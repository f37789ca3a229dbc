// soft_shrink_ on the CPU. Traffic per weight when the threshold prediction holds: one read and one
// write, 1/8 byte of mask read and written (see prune/speculate.inc.h).
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/dtypes.h"
#include "cpu/nm/tensor_step.h"
#include "cpu/nm/unit_step.h"
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
  const std::vector<Pattern> checked = check_patterns(weights, items.size(), patterns);
  for (size_t i = 0; i < items.size(); ++i) check_rank(counts[i], items[i], at(checked, i));
  if (found_inf && *static_cast<const float*>(found_inf->const_data_ptr()) != 0.0f) return;

  const StateBuffer state(scratch.mutable_data_ptr(), scratch.numel(), items.size());
  auto* const changed = static_cast<int64_t*>(flips.mutable_data_ptr());
  StepParams params{shrink, bracket, static_cast<int32_t*>(masks.mutable_data_ptr())};
  for_dtype(weights[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    auto* const taus = static_cast<typename T::Bits*>(thresholds.mutable_data_ptr());
    const Split split(items, sizeof(typename T::Bits));
    for_each_item(items, split, [&](size_t i, int64_t thread, ThreadGroup threads) {
      const Pattern by = at(checked, i);
      int32_t* const mask = params.masks + items[i].mask_start;
      if (counts[i] && by.m) {
        const NmTensorStep<T> item(items[i], by, shrink, threads, nullptr);
        return item.run(nullptr, mask, taus[i], changed[i]);
      }
      const Scratch scratch =
          threads.size > 1 ? state.scratch : state.scratch.slice(thread, split.num_threads());
      if (counts[i] && by.is_units()) {
        return UnitTensorStep<T>(items[i], by, shrink, threads, scratch, nullptr)
            .run(counts[i], mask, taus[i], changed[i]);
      }
      TensorStep<T>(items[i], params, threads, scratch, nullptr)
          .run(counts[i], taus[i], changed[i], state.predictors[i]);
    });
  });
  state.count_misses(params.misses);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("soft_shrink_", TORCH_BOX(&soft_shrink_));
}

}  // namespace issp
