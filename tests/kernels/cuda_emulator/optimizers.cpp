// The optimizer kernels behind a C interface; see kernels.cpp.
#include <string>

#include "adam_soft_shrink.cuh"
#include "emulator.h"
#include "entries.h"
#include "sgd_soft_shrink.cuh"

namespace {

using namespace issp;

// A parameter group as Python hands it over; the first `pruned` weights have a state. Pointers of
// absent tensors are null.
struct Group {
  int64_t count, pruned;
  void** weights;
  const int64_t* numels;
  void** grads;
  const int32_t* bfloat16;
  void** first;
  void** second;
  void** steps;
  const int32_t* is_first;
  double lr;
  void* lr_tensor;
  int64_t lr_dtype;
  void* grad_scale;
  int64_t maximize;
  void *k, *thresholds, *masks, *flips, *scratch, *found_inf;
  double shrink;
  int64_t frozen, bracket;
  const int64_t* patterns;
};

struct OptimState {
  void* grad;
  float* first;
  bool bfloat16;
};

OptimState optim_state(const Group& group, size_t i) {
  const uint64_t numel = uint64_t(group.numels[i]);
  emulator::allow(group.grads[i], numel * (group.bfloat16[i] ? 2 : 4));
  return {group.grads[i], group.first ? allowed<float>(group.first[i], numel) : nullptr,
          group.bfloat16[i] != 0};
}

template <typename Rule, typename Complete>
void run(const Group& group, const Rule& rule, const Complete& complete) {
  const std::vector<Item> items = items_of(group.weights, group.numels, int(group.count));
  for (const Item& item : items) emulator::allow(item.data, item.numel * 4);
  const std::vector<Item> pruned(items.begin(), items.begin() + group.pruned);
  const uint64_t count = pruned.size();
  const auto one = [](void* x) { return x ? allowed<const float>(x, 1) : nullptr; };
  const Call<Float32> call = {
      allowed<const int64_t>(group.k, count),
      allowed<uint32_t>(group.thresholds, count),
      allowed<uint32_t>(group.masks, pruned.empty() ? 0 : mask_total(pruned)),
      allowed<int64_t>(group.flips, count),
      allowed<uint32_t>(group.scratch, pruned.empty() ? kScratchHeader : scratch_total(pruned)),
      one(group.found_inf),
      float(group.shrink),
      uint32_t(group.bracket)};
  if (group.lr_tensor) emulator::allow(group.lr_tensor, 8);
  const Optimizer<Rule> optimizer = {rule,
                                     {group.lr, group.lr_tensor, uint32_t(group.lr_dtype)},
                                     one(group.grad_scale),
                                     uint32_t(group.maximize),
                                     uint32_t(group.frozen)};
  update_and_shrink(items, patterns_of(group.patterns, pruned.size()), pruned.size(), call,
                    optimizer, complete, nullptr);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* emulated_adam_soft_shrink(const Group* group, double beta1, double beta2, double eps,
                                      double weight_decay, int decoupled) {
  return guarded([&] {
    const AdamRule rule = {{group->lr, beta1, beta2, eps, weight_decay, decoupled != 0}};
    run(*group, rule, [&](AdamRule::Entry& entry, size_t i) {
      complete_entry<AdamRule>(entry, optim_state(*group, i), i < size_t(group->pruned), false);
      entry.second = allowed<float>(group->second[i], uint64_t(group->numels[i]));
      entry.step = allowed<float>(group->steps[i], 1);
    });
  });
}

const char* emulated_sgd_soft_shrink(const Group* group, double momentum, double dampening,
                                     double weight_decay, int nesterov) {
  return guarded([&] {
    const SgdRule rule = {{group->lr, momentum, dampening, weight_decay, nesterov != 0}};
    run(*group, rule, [&](SgdRule::Entry& entry, size_t i) {
      complete_entry<SgdRule>(entry, optim_state(*group, i), i < size_t(group->pruned),
                              group->is_first && group->is_first[i]);
    });
  });
}

}  // extern "C"
#pragma GCC visibility pop
