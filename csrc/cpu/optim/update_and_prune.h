// The common part of the optimizer ops: every weight of a parameter group is updated and, if it is
// pruned, shrunk or masked, in one pass over its memory.
#pragma once

#include "checks_update.h"
#include "cpu/dtypes.h"
#include "cpu/nm/tensor_step.h"
#include "cpu/nm/unit_step.h"
#include "cpu/prune/tensor_step.h"

namespace issp {

// Bytes per element of weight, moments and gradient; decides how many threads are useful.
constexpr size_t kUpdateBytes = 16;

inline bool stopped(const std::optional<Tensor>& found_inf) {
  return found_inf && !(*static_cast<const float*>(found_inf->const_data_ptr()) == 0.0f);
}

// The learning rate, or the value of its tensor if there is one.
inline double rate(double lr, const std::optional<Tensor>& tensor) {
  if (!tensor) return lr;
  double value = lr;
  for_dtype(tensor->scalar_type(), [&](auto type) {
    using T = decltype(type);
    value = double(widen(T{}, *static_cast<const typename T::Bits*>(tensor->const_data_ptr())));
  });
  return value;
}

inline Gradient gradient_rule(const std::optional<Tensor>& grad_scale, bool maximize) {
  if (!grad_scale) return {1.0f, false, maximize};
  return {*static_cast<const float*>(grad_scale->const_data_ptr()), true, maximize};
}

// The pruning arguments of an optimizer op, as in soft_shrink_.
struct Pruning {
  const Tensor& k;
  double shrink;
  const Tensor& thresholds;
  const Tensor& masks;
  const Tensor& flips;
  const Tensor& scratch;
  bool frozen, bracket;
  std::vector<Pattern> patterns;
};

inline void check_ranks(const Update& update, const Pruning& pruning) {
  if (pruning.frozen) return;
  const auto* const k = static_cast<const int64_t*>(pruning.k.const_data_ptr());
  for (size_t i = 0; i < update.pruned.size(); ++i) {
    check_rank(k[i], update.pruned[i], at(pruning.patterns, i));
  }
}

// Updates without a selection. masks: null, or the fixed masks of the items.
inline void update_items(const std::vector<Item>& items, const TensorUpdate* updates,
                         const int32_t* masks) {
  if (items.empty()) return;
  for_each_item(items, kUpdateBytes, [&](size_t i, int64_t, ThreadGroup threads) {
    const Item& item = items[i];
    const auto* mask = reinterpret_cast<const uint64_t*>(masks + item.mask_start);
    threads.run([&](int64_t p) {
      update_kernels().update(static_cast<float*>(item.data), item.numel,
                              threads.range_of(p, item.numel), updates[i], masks ? mask : nullptr);
    });
  });
}

inline void shrink_updated(const std::vector<Item>& items, const TensorUpdate* updates,
                           const Pruning& pruning) {
  if (items.empty()) return;
  const StateBuffer state(pruning.scratch.mutable_data_ptr(), pruning.scratch.numel(),
                          items.size());
  const auto* const k = static_cast<const int64_t*>(pruning.k.const_data_ptr());
  auto* const taus = static_cast<uint32_t*>(pruning.thresholds.mutable_data_ptr());
  auto* const flips = static_cast<int64_t*>(pruning.flips.mutable_data_ptr());
  StepParams params{pruning.shrink, pruning.bracket,
                    static_cast<int32_t*>(pruning.masks.mutable_data_ptr())};
  const Split split(items, sizeof(float));
  for_each_item(items, split, [&](size_t i, int64_t thread, ThreadGroup threads) {
    const Pattern by = at(pruning.patterns, i);
    int32_t* const mask = params.masks + items[i].mask_start;
    if (k[i] && by.m) {
      const NmTensorStep<Float32> item(items[i], by, pruning.shrink, threads, updates + i);
      return item.run(nullptr, mask, taus[i], flips[i]);
    }
    const Scratch scratch =
        threads.size > 1 ? state.scratch : state.scratch.slice(thread, split.num_threads());
    if (k[i] && by.is_units()) {
      return UnitTensorStep<Float32>(items[i], by, pruning.shrink, threads, scratch, updates + i)
          .run(k[i], mask, taus[i], flips[i]);
    }
    TensorStep<Float32>(items[i], params, threads, scratch, updates + i)
        .run(k[i], taus[i], flips[i], state.predictors[i]);
  });
  state.count_misses(params.misses);
}

// updates: those of the pruned weights, then those of the other weights.
inline void update_and_prune(const Update& update, const std::vector<TensorUpdate>& updates,
                             const Pruning& pruning) {
  if (pruning.frozen) {
    update_items(update.pruned, updates.data(),
                 static_cast<const int32_t*>(pruning.masks.const_data_ptr()));
    auto* const flips = static_cast<int64_t*>(pruning.flips.mutable_data_ptr());
    std::fill(flips, flips + update.pruned.size(), 0);
  } else {
    shrink_updated(update.pruned, updates.data(), pruning);
  }
  update_items(update.rest, updates.data() + update.pruned.size(), nullptr);
}

}  // namespace issp
