// torch.ops.issp.sgd_soft_shrink_ on a GPU.
#include "sgd_soft_shrink.cuh"

#include "optimizer_call.h"

namespace issp {

void sgd_soft_shrink_cuda(std::vector<Tensor> weights, std::vector<Tensor> grads,
                          std::vector<Tensor> momentum_buffers, std::vector<bool> first, double lr,
                          double momentum, double dampening, double weight_decay, bool nesterov,
                          bool maximize, std::optional<Tensor> lr_tensor,
                          std::optional<Tensor> grad_scale, Tensor k, double shrink,
                          Tensor thresholds, Tensor masks, Tensor flips, Tensor scratch,
                          std::optional<Tensor> found_inf, bool frozen, bool bracket,
                          std::vector<int64_t> patterns) {
  const Update update = check_sgd_soft_shrink(
      weights, grads, momentum_buffers, first, lr, momentum, dampening, weight_decay, nesterov,
      lr_tensor, grad_scale, k, shrink, thresholds, masks, flips, scratch, found_inf);
  const std::vector<Pattern> checked =
      without_units(check_patterns(weights, update.pruned.size(), patterns));
  const torch::stable::accelerator::DeviceGuard guard(weights[0].get_device_index());
  const Optimizer<SgdRule> sgd = {{{lr, momentum, dampening, weight_decay, nesterov}},
                                  rate_of(lr, lr_tensor),
                                  float_or_null(grad_scale),
                                  maximize,
                                  frozen};
  const auto complete = [&](SgdRule::Entry& entry, size_t i) {
    complete_entry<SgdRule>(entry, update.states[i], i < update.pruned.size(),
                            !first.empty() && first[i]);
  };
  update_and_shrink(items_of(update), checked, update.pruned.size(),
                    call_of(k, shrink, thresholds, masks, flips, scratch, found_inf, bracket), sgd,
                    complete, current_stream(weights[0]));
}

}  // namespace issp

STABLE_TORCH_LIBRARY_IMPL(issp, CUDA, m) {
  m.impl("sgd_soft_shrink_", TORCH_BOX(&issp::sgd_soft_shrink_cuda));
}
