// adam_soft_shrink_ on the CPU. Traffic per float32 weight with a float32 gradient: 16 bytes read
// (weight, gradient, two moments), 12 written, 1/8 byte of mask. Adam without pruning has the same
// traffic except for the mask: the shrink works on values in registers and L1.
#include <torch/csrc/stable/library.h>

#include "cpu/optim/update_and_prune.h"

namespace issp {
namespace {

void adam_soft_shrink_(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                       const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                       const std::vector<Tensor>& steps, double lr, double beta1, double beta2,
                       double eps, double weight_decay, bool decoupled, bool maximize,
                       const std::optional<Tensor>& lr_tensor,
                       const std::optional<Tensor>& grad_scale, const Tensor& k, double shrink,
                       const Tensor& thresholds, const Tensor& masks, const Tensor& flips,
                       const Tensor& scratch, const std::optional<Tensor>& found_inf, bool frozen,
                       bool bracket, const std::vector<int64_t>& patterns) {
  const Update update = check_adam_soft_shrink(
      weights, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, lr_tensor,
      grad_scale, k, shrink, thresholds, masks, flips, scratch, found_inf);
  const Pruning pruning{k,      shrink,  thresholds,
                        masks,  flips,   scratch,
                        frozen, bracket, check_patterns(weights, update.pruned.size(), patterns)};
  check_ranks(update, pruning);
  if (stopped(found_inf)) return;

  const Adam adam{lr, beta1, beta2, eps, weight_decay, decoupled};
  const Gradient gradient = gradient_rule(grad_scale, maximize);
  const double current = rate(lr, lr_tensor);
  std::vector<TensorUpdate> updates;
  updates.reserve(update.states.size());
  float last_step = -1;
  AdamStep step{};
  for (const OptimState& state : update.states) {
    *state.step += 1;
    if (*state.step != last_step) step = adam_step(adam, current, last_step = *state.step);
    TensorUpdate& tensor = updates.emplace_back();
    tensor.rule = TensorUpdate::kAdam;
    tensor.grad = state.grad;
    tensor.bfloat16 = state.bfloat16;
    tensor.first = state.first;
    tensor.second = state.second;
    tensor.gradient = gradient;
    tensor.adam = step;
  }
  update_and_prune(update, updates, pruning);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("adam_soft_shrink_", TORCH_BOX(&adam_soft_shrink_));
}

}  // namespace issp
