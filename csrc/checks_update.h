// Argument checks of the optimizer ops, CPU and CUDA. See checks.h.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "checks.h"

namespace issp {

// The gradient and the optimizer state of one weight. first and second: exp_avg and exp_avg_sq of
// Adam; momentum buffer and null of SGD. step: the step counter. A pointer is null where the op has
// no such state.
struct OptimState {
  const void* grad;
  float* first;
  float* second;
  float* step;
  bool bfloat16;  // the gradient's dtype; float32 otherwise
};

// The pruned weights, the other weights, and the states of all: those of the pruned weights first.
struct Update {
  std::vector<Item> pruned, rest;
  std::vector<OptimState> states;
};

// The ranges of memory that a call writes, checked for overlaps. An optimizer passes the same
// several hundred tensors in every step, so the ranges of recent calls are cached and not sorted
// again.
class WrittenMemory {
 public:
  explicit WrittenMemory(std::vector<ByteRange> ranges) {
    static thread_local std::vector<std::pair<std::vector<ByteRange>, std::vector<ByteRange>>> seen;
    static thread_local size_t oldest = 0;
    constexpr size_t kept = 8;
    for (const auto& [original, sorted] : seen) {
      if (original.size() == ranges.size() &&
          std::memcmp(original.data(), ranges.data(), ranges.size() * sizeof(ByteRange)) == 0) {
        sorted_ = &sorted;
        return;
      }
    }
    std::vector<ByteRange> sorted = ranges;
    std::sort(sorted.begin(), sorted.end(), before);
    check_no_overlap(sorted);
    auto& entry = seen.size() < kept ? seen.emplace_back() : seen[oldest++ % kept];
    entry = {std::move(ranges), std::move(sorted)};
    sorted_ = &entry.second;
  }

  void check_read(const ByteRange& x) const {
    const auto after =
        std::lower_bound(sorted_->begin(), sorted_->end(), ByteRange{x.end, x.end}, before);
    require(after == sorted_->begin() || (after - 1)->end <= x.begin, kOverlap);
  }

 private:
  static bool before(const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; }
  const std::vector<ByteRange>* sorted_;
};

inline void check_not_negative(double value, const char* name) {
  require(value >= 0.0 && value <= std::numeric_limits<double>::max(), name);
}

// Checks a list with one entry per weight; numel -1: of the size of the weight.
inline void check_matching(const std::vector<Tensor>& weights, const std::vector<Tensor>& values,
                           const char* name, bool gradient, int64_t numel = -1) {
  require(values.size() == weights.size(), name);
  const auto device = weights[0].device();
  for (size_t i = 0; i < values.size(); ++i) {
    const Tensor& x = values[i];
    const ScalarType dtype = x.scalar_type();
    require(dtype == ScalarType::Float || (gradient && dtype == ScalarType::BFloat16), name);
    require(x.device() == device && is_in_memory(x) &&
                x.numel() == (numel < 0 ? weights[i].numel() : numel),
            name);
  }
}

inline void check_scalar(const std::optional<Tensor>& x, const char* name, bool any_float,
                         const Tensor& like) {
  if (!x) return;
  const ScalarType dtype = x->scalar_type();
  require(is_weight_dtype(dtype), name);
  check_state(*x, name, any_float ? dtype : ScalarType::Float, 1, like);
}

// The checks that the optimizer ops share. A list of moments or steps may be null.
inline Update check_update(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                           const std::vector<Tensor>* first, const std::vector<Tensor>* second,
                           const std::vector<Tensor>* steps, double lr, double weight_decay,
                           const std::optional<Tensor>& lr_tensor,
                           const std::optional<Tensor>& grad_scale, const Tensor& k, double shrink,
                           const Tensor& thresholds, const Tensor& masks, const Tensor& flips,
                           const Tensor& scratch, const std::optional<Tensor>& found_inf) {
  check_not_negative(lr, "lr");
  check_not_negative(weight_decay, "weight_decay");
  check_shrink(shrink);
  std::vector<Item> items = check_tensor_list(weights, true);
  require(weights[0].scalar_type() == ScalarType::Float, "the dtype of the weights");
  check_matching(weights, grads, "grads", true);
  if (first) check_matching(weights, *first, second ? "exp_avgs" : "momentum_buffers", false);
  if (second) check_matching(weights, *second, "exp_avg_sqs", false);
  if (steps) check_matching(weights, *steps, "steps", false, 1);
  check_scalar(lr_tensor, "lr_tensor", true, weights[0]);
  check_scalar(grad_scale, "grad_scale", false, weights[0]);
  check_scalar(found_inf, "found_inf", false, weights[0]);
  const int64_t count = k.numel();
  require(count <= int64_t(items.size()), "k");
  const bool none = count == 0;
  const Item last = none ? Item{nullptr, 0, 0, kScratchHeader} : items[size_t(count) - 1];
  check_state(k, "k", ScalarType::Long, count, weights[0]);
  check_state(thresholds, "thresholds", ScalarType::Float, count, weights[0]);
  check_words(masks, "masks", last.mask_start + mask_words(last.numel), weights[0]);
  check_state(flips, "flips", ScalarType::Long, count, weights[0]);
  check_words(scratch, "scratch", last.scratch_start + (none ? 0 : scratch_region(last.numel)),
              weights[0]);

  Update update;
  update.states.reserve(items.size());
  std::vector<ByteRange> written;
  written.reserve(4 * items.size() + 4);
  std::vector<ByteRange> read;
  read.reserve(items.size() + 4);
  const auto bytes_at = [](const void* begin, int64_t bytes) {
    return ByteRange{static_cast<const char*>(begin), static_cast<const char*>(begin) + bytes};
  };
  for (size_t i = 0; i < items.size(); ++i) {
    const int64_t bytes = items[i].numel * int64_t(sizeof(float));
    const auto written_at = [&](const std::vector<Tensor>* list, int64_t size) -> float* {
      if (!list) return nullptr;
      void* const data = (*list)[i].mutable_data_ptr();
      written.push_back(bytes_at(data, size));
      return static_cast<float*>(data);
    };
    written.push_back(bytes_at(items[i].data, bytes));
    const bool bfloat16 = grads[i].scalar_type() == ScalarType::BFloat16;
    const void* const grad = grads[i].const_data_ptr();
    read.push_back(bytes_at(grad, bfloat16 ? bytes / 2 : bytes));
    update.states.push_back({grad, written_at(first, bytes), written_at(second, bytes),
                             written_at(steps, sizeof(float)), bfloat16});
  }
  for (const Tensor* x : {&thresholds, &masks, &flips, &scratch}) written.push_back(byte_range(*x));
  read.push_back(byte_range(k));
  for (const auto* x : {&lr_tensor, &grad_scale, &found_inf}) {
    if (*x) read.push_back(byte_range(**x));
  }
  const WrittenMemory memory(std::move(written));
  for (const ByteRange& x : read) memory.check_read(x);

  const auto middle = items.begin() + count;
  update.rest.assign(middle, items.end());
  items.erase(middle, items.end());
  update.pruned = std::move(items);
  return update;
}

inline Update check_adam_soft_shrink(
    const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
    const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
    const std::vector<Tensor>& steps, double lr, double beta1, double beta2, double eps,
    double weight_decay, const std::optional<Tensor>& lr_tensor,
    const std::optional<Tensor>& grad_scale, const Tensor& k, double shrink,
    const Tensor& thresholds, const Tensor& masks, const Tensor& flips, const Tensor& scratch,
    const std::optional<Tensor>& found_inf) {
  require(beta1 >= 0.0 && beta1 < 1.0, "beta1");
  require(beta2 >= 0.0 && beta2 < 1.0, "beta2");
  check_not_negative(eps, "eps");
  return check_update(weights, grads, &exp_avgs, &exp_avg_sqs, &steps, lr, weight_decay, lr_tensor,
                      grad_scale, k, shrink, thresholds, masks, flips, scratch, found_inf);
}

inline Update check_sgd_soft_shrink(
    const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
    const std::vector<Tensor>& momentum_buffers, const std::vector<bool>& first, double lr,
    double momentum, double dampening, double weight_decay, bool nesterov,
    const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_scale,
    const Tensor& k, double shrink, const Tensor& thresholds, const Tensor& masks,
    const Tensor& flips, const Tensor& scratch, const std::optional<Tensor>& found_inf) {
  check_not_negative(momentum, "momentum");
  require(std::isfinite(dampening), "dampening");
  require(!nesterov || momentum != 0.0, "nesterov");
  require(first.size() == momentum_buffers.size(), "first");
  require(momentum != 0.0 || momentum_buffers.empty(), "momentum_buffers");
  const std::vector<Tensor>* buffers = momentum == 0.0 ? nullptr : &momentum_buffers;
  return check_update(weights, grads, buffers, nullptr, nullptr, lr, weight_decay, lr_tensor,
                      grad_scale, k, shrink, thresholds, masks, flips, scratch, found_inf);
}

}  // namespace issp
