// torch.ops.issp.adam_soft_shrink_ on a GPU.
#include "adam_soft_shrink.cuh"

#include "optimizer_call.h"

namespace issp {

void adam_soft_shrink_cuda(std::vector<Tensor> weights, std::vector<Tensor> grads,
                           std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                           std::vector<Tensor> steps, double lr, double beta1, double beta2,
                           double eps, double weight_decay, bool decoupled, bool maximize,
                           std::optional<Tensor> lr_tensor, std::optional<Tensor> grad_scale,
                           Tensor k, double shrink, Tensor thresholds, Tensor masks, Tensor flips,
                           Tensor scratch, std::optional<Tensor> found_inf, bool frozen,
                           bool bracket, std::vector<int64_t> patterns) {
  const Update update = check_adam_soft_shrink(
      weights, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, lr_tensor,
      grad_scale, k, shrink, thresholds, masks, flips, scratch, found_inf);
  const std::vector<Pattern> checked =
      without_units(check_patterns(weights, update.pruned.size(), patterns));
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  const Optimizer<AdamRule> adam = {{{lr, beta1, beta2, eps, weight_decay, decoupled}},
                                    rate_of(lr, lr_tensor),
                                    float_or_null(grad_scale),
                                    maximize,
                                    frozen};
  const auto complete = [&](AdamRule::Entry& entry, size_t i) {
    const OptimState& state = update.states[i];
    complete_entry<AdamRule>(entry, state, i < update.pruned.size(), false);
    entry.second = state.second;
    entry.step = state.step;
  };
  update_and_shrink(items_of(update), checked, update.pruned.size(),
                    call_of(k, shrink, thresholds, masks, flips, scratch, found_inf, bracket), adam,
                    complete, current_stream(weights[0]));
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("adam_soft_shrink_", TORCH_BOX(&issp::adam_soft_shrink_cuda));
}
