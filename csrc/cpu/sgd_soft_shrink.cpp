// sgd_soft_shrink_ on the CPU. Traffic per float32 weight with a float32 gradient and momentum: 12
// bytes read (weight, gradient, buffer), 8 written, 1/8 byte of mask. SGD without pruning has the
// same traffic except for the mask.
#include <torch/csrc/stable/library.h>

#include "cpu/optim/update_and_prune.h"

namespace issp {
namespace {

void sgd_soft_shrink_(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                      const std::vector<Tensor>& momentum_buffers, const std::vector<bool>& first,
                      double lr, double momentum, double dampening, double weight_decay,
                      bool nesterov, bool maximize, const std::optional<Tensor>& lr_tensor,
                      const std::optional<Tensor>& grad_scale, const Tensor& k, double shrink,
                      const Tensor& thresholds, const Tensor& masks, const Tensor& flips,
                      const Tensor& scratch, const std::optional<Tensor>& found_inf, bool frozen,
                      bool bracket, const std::vector<int64_t>& patterns) {
  const Update update = check_sgd_soft_shrink(
      weights, grads, momentum_buffers, first, lr, momentum, dampening, weight_decay, nesterov,
      lr_tensor, grad_scale, k, shrink, thresholds, masks, flips, scratch, found_inf);
  const Pruning pruning{k,      shrink,  thresholds,
                        masks,  flips,   scratch,
                        frozen, bracket, check_patterns(weights, update.pruned.size(), patterns)};
  check_ranks(update, pruning);
  if (stopped(found_inf)) return;

  const SgdStep step =
      sgd_step({lr, momentum, dampening, weight_decay, nesterov}, rate(lr, lr_tensor));
  const Gradient gradient = gradient_rule(grad_scale, maximize);
  std::vector<TensorUpdate> updates;
  updates.reserve(update.states.size());
  for (size_t i = 0; i < update.states.size(); ++i) {
    const OptimState& state = update.states[i];
    TensorUpdate& tensor = updates.emplace_back();
    tensor.rule = TensorUpdate::kSgd;
    tensor.grad = state.grad;
    tensor.bfloat16 = state.bfloat16;
    tensor.first = state.first;
    tensor.first_step = !first.empty() && first[i];
    tensor.gradient = gradient;
    tensor.sgd = step;
  }
  update_and_prune(update, updates, pruning);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("sgd_soft_shrink_", TORCH_BOX(&sgd_soft_shrink_));
}

}  // namespace issp
