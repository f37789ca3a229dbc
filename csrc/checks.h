// Argument checks of every op, CPU and CUDA. All checks precede all writes. issp/checks.py makes
// the same checks and raises the Python exception; see issp/ops.py.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"

namespace issp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

inline bool is_weight_dtype(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
         type == ScalarType::Double;
}

struct ByteRange {
  const char* begin;
  const char* end;
};

inline ByteRange byte_range(const Tensor& x) {
  const char* begin = static_cast<const char*>(x.const_data_ptr());
  return {begin, begin + x.numel() * int64_t(x.element_size())};
}

inline void check_no_overlap(std::vector<ByteRange> ranges) {
  const auto before = [](const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; };
  if (!std::is_sorted(ranges.begin(), ranges.end(), before)) {
    std::sort(ranges.begin(), ranges.end(), before);
  }
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin < ranges[i - 1].end) {
      refuse("two of the tensors overlap in memory: pass shared weights once");
    }
  }
}

inline std::vector<Item> check_tensor_list(const std::vector<Tensor>& tensors, bool same_dtype) {
  if (tensors.empty()) refuse("the list of tensors is empty: pass at least one");
  const ScalarType dtype = tensors[0].scalar_type();
  const auto device = tensors[0].device();
  std::vector<Item> items;
  items.reserve(tensors.size());
  for (const Tensor& x : tensors) {
    const size_t i = items.size();
    if (!is_weight_dtype(x.scalar_type())) {
      refuse("tensor ", i, " must be float32, float16, bfloat16 or float64");
    }
    if (same_dtype && x.scalar_type() != dtype) {
      refuse("tensor ", i, " has another dtype than tensor 0: group by dtype");
    }
    if (x.device() != device) refuse("tensor ", i, " is on another device than tensor 0");
    if (!x.is_contiguous()) refuse("tensor ", i, " is not contiguous: pass .contiguous()");
    if (x.numel() == 0) refuse("tensor ", i, " is empty: leave it out");
    append(items, x.mutable_data_ptr(), x.numel());
  }
  return items;
}

inline void check_state(const Tensor& x, const char* name, ScalarType dtype, int64_t length,
                        const Tensor& like) {
  if (x.scalar_type() != dtype) refuse(name, " has the wrong dtype: build it with ShrinkState");
  if (x.device() != like.device()) refuse(name, " is on another device than the weights");
  if (x.numel() != length || !x.is_contiguous()) {
    refuse(name, " must be contiguous with ", length, " elements: build it with ShrinkState");
  }
}

inline void check_shrink(double shrink) {
  if (!(shrink >= 0.0 && shrink <= 1.0)) refuse("shrink is ", shrink, ": it must lie in 0..1");
}

inline void check_rank(int64_t k, const Item& item, size_t i) {
  if (k < 0 || k > item.numel) {
    refuse("k[", i, "] is ", k, " but tensor ", i, " has ", item.numel, " elements");
  }
}

// The values of k are checked by the CPU op, which can read them without waiting for a device.
inline std::vector<Item> check_soft_shrink(const std::vector<Tensor>& weights, const Tensor& k,
                                           double shrink, const Tensor& thresholds,
                                           const Tensor& masks, const Tensor& flips,
                                           const Tensor& scratch,
                                           const std::optional<Tensor>& found_inf) {
  const std::vector<Item> items = check_tensor_list(weights, true);
  check_shrink(shrink);
  const int64_t count = int64_t(items.size());
  check_state(k, "k", ScalarType::Long, count, weights[0]);
  check_state(thresholds, "thresholds", weights[0].scalar_type(), count, weights[0]);
  check_state(masks, "masks", ScalarType::Int, mask_total(items), weights[0]);
  check_state(flips, "flips", ScalarType::Long, count, weights[0]);
  check_state(scratch, "scratch", ScalarType::Int, scratch_total(items), weights[0]);
  if (found_inf) check_state(*found_inf, "found_inf", ScalarType::Float, 1, weights[0]);
  std::vector<ByteRange> ranges;
  ranges.reserve(items.size() + 5);
  for (const Tensor& w : weights) ranges.push_back(byte_range(w));
  for (const Tensor* x : {&k, &thresholds, &masks, &flips, &scratch})
    ranges.push_back(byte_range(*x));
  check_no_overlap(std::move(ranges));
  return items;
}

inline std::vector<Item> check_magnitude_threshold(const std::vector<Tensor>& weights,
                                                   const std::vector<int64_t>& k) {
  const std::vector<Item> items = check_tensor_list(weights, true);
  if (k.size() != items.size())
    refuse("k has ", k.size(), " entries for ", items.size(), " tensors");
  for (size_t i = 0; i < items.size(); ++i) check_rank(k[i], items[i], i);
  return items;
}

// Returns the items of the first set; the tensors of the other sets have the same sizes.
inline std::vector<Item> check_apply_masks(const std::vector<Tensor>& tensors, const Tensor& masks,
                                           int64_t sets) {
  std::vector<Item> items = check_tensor_list(tensors, false);
  if (sets < 1 || int64_t(items.size()) % sets) {
    refuse(items.size(), " tensors do not make ", sets, " sets: give one per weight and set");
  }
  const size_t count = items.size() / size_t(sets);
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].numel != items[i % count].numel) {
      refuse("tensor ", i, " shares the mask of tensor ", i % count, " but not its size");
    }
  }
  items.resize(count);
  check_state(masks, "masks", ScalarType::Int, mask_total(items), tensors[0]);
  std::vector<ByteRange> ranges;
  for (const Tensor& x : tensors) ranges.push_back(byte_range(x));
  ranges.push_back(byte_range(masks));
  check_no_overlap(std::move(ranges));
  return items;
}

// Returns the items of the gradients.
inline std::vector<Item> check_regularize(const std::vector<Tensor>& grads,
                                          const std::vector<Tensor>& weights, const Tensor& factors,
                                          const Tensor& masks) {
  const std::vector<Item> items = check_tensor_list(grads, true);
  const std::vector<Item> others = check_tensor_list(weights, true);
  if (items.size() != others.size()) {
    refuse("there are ", items.size(), " gradients for ", others.size(), " weights");
  }
  const ScalarType dtype = weights[0].scalar_type();
  if (grads[0].scalar_type() != dtype) refuse("gradients and weights have different dtypes");
  if (!(grads[0].device() == weights[0].device())) refuse("grads and weights: several devices");
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i].numel != others[i].numel) refuse("gradient ", i, " has not its weight's size");
  }
  const bool wide = dtype == ScalarType::Double;
  check_state(factors, "factors", wide ? ScalarType::Double : ScalarType::Float,
              int64_t(items.size()), weights[0]);
  check_state(masks, "masks", ScalarType::Int, mask_total(items), weights[0]);
  std::vector<ByteRange> ranges;
  ranges.reserve(2 * items.size() + 2);
  for (const Tensor& g : grads) ranges.push_back(byte_range(g));
  for (const Tensor& w : weights) ranges.push_back(byte_range(w));
  for (const Tensor* x : {&factors, &masks}) ranges.push_back(byte_range(*x));
  check_no_overlap(std::move(ranges));
  return items;
}

// v == 0 means layout "flat".
inline Pattern check_pattern(const Tensor& weight, int64_t n, int64_t m, int64_t v) {
  if (n < 1 || n > m) refuse("keep n = ", n, " of m = ", m, ": n must lie in 1..m");
  if (v < 0) refuse("v is ", v, ": it must be at least 1");
  if (v == 0) {
    if (weight.numel() % m) refuse("m = ", m, " does not divide ", weight.numel(), " elements");
    return {n, m, 1, 1, weight.numel(), 1};
  }
  if (weight.dim() < 2) refuse("layout \"channels\" needs a weight [O, I, ...]");
  const int64_t rows = weight.size(0), channels = weight.size(1);
  if (channels % m || rows % v) {
    refuse("m = ", m, " and v = ", v, " do not divide a weight of ", rows, " rows and ", channels,
           " channels: choose others or leave the layer dense");
  }
  return {n, m, v, rows, channels, weight.numel() / (rows * channels)};
}

// One pattern per pruned weight (the first `count` weights); empty if all are unstructured.
inline std::vector<Pattern> check_patterns(const std::vector<Tensor>& weights, size_t count,
                                           const std::vector<int64_t>& patterns) {
  if (!patterns.empty() && patterns.size() != 3 * count) {
    refuse("patterns has ", patterns.size(), " numbers for ", count, " pruned weights");
  }
  std::vector<Pattern> result;
  for (size_t i = 0; i < patterns.size() / 3; ++i) {
    const int64_t n = patterns[3 * i], m = patterns[3 * i + 1], v = patterns[3 * i + 2];
    result.push_back(m ? check_pattern(weights[i], n, m, v) : Pattern{});
  }
  return result;
}

inline Pattern at(const std::vector<Pattern>& patterns, size_t i) {
  return patterns.empty() ? Pattern{} : patterns[i];
}

inline void check_rank(int64_t k, const Item& item, const Pattern& by, size_t i) {
  if (!by.m) return check_rank(k, item, i);
  if (k != 0 && k != by.pruned()) {
    refuse("k[", i, "] is ", k, " but tensor ", i, " keeps ", by.n, " of ", by.m, ": use 0 or ",
           by.pruned());
  }
}

inline Item check_nm_prune(const Tensor& weight, int64_t n, int64_t m, int64_t v,
                           const std::string& layout, double shrink) {
  const std::vector<Item> items = check_tensor_list({weight}, true);
  check_shrink(shrink);
  if (v < 1) refuse("v is ", v, ": it must be at least 1");
  if (layout == "flat") {
    if (v != 1) refuse("layout \"flat\" has no rows to share a pattern: use v = 1");
  } else if (layout != "channels") {
    refuse("layout is \"", layout, "\": use \"channels\" or \"flat\"");
  }
  check_pattern(weight, n, m, layout == "flat" ? 0 : v);
  return items[0];
}

}  // namespace issp
