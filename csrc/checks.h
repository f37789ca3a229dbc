// Argument checks of every op, CPU and CUDA. All checks precede all writes. They protect memory and
// name the argument; issp/ops/validation says what is wrong with it and what to do, and the public
// functions of issp.ops run it after a refusal.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"

namespace issp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Refuses what only native code knows, with a sentence of its own.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// Refuses an argument that issp/ops/validation refuses as well.
inline void require(bool fits, const char* argument) {
  if (!fits) {
    refuse(argument, " cannot be used: the function of this op in issp.ops says why");
  }
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

// Whether the elements of a tensor lie one behind the other in memory that is there, aligned to
// `alignment` bytes, or to their size. FSDP frees the memory of a parameter that keeps its shape.
inline bool is_in_memory(const Tensor& x, int64_t alignment = 0) {
  if (!x.is_contiguous()) return false;
  const int64_t size = int64_t(x.element_size()), numel = x.numel();
  if (numel == 0) return true;
  int64_t held = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &held));
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  return held / size - numel >= x.storage_offset() &&
         address % uintptr_t(std::max(size, alignment)) == 0;
}

constexpr const char* kOverlap = "two tensors that overlap in memory";

inline void check_no_overlap(std::vector<ByteRange> ranges) {
  const auto before = [](const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; };
  if (!std::is_sorted(ranges.begin(), ranges.end(), before)) {
    std::sort(ranges.begin(), ranges.end(), before);
  }
  for (size_t i = 1; i < ranges.size(); ++i) {
    require(ranges[i].begin >= ranges[i - 1].end, kOverlap);
  }
}

inline std::vector<Item> check_tensor_list(const std::vector<Tensor>& tensors, bool same_dtype) {
  require(!tensors.empty(), "the list of tensors");
  const ScalarType dtype = tensors[0].scalar_type();
  const auto device = tensors[0].device();
  std::vector<Item> items;
  items.reserve(tensors.size());
  for (const Tensor& x : tensors) {
    require(is_weight_dtype(x.scalar_type()), "the dtype of a tensor");
    require(!same_dtype || x.scalar_type() == dtype, "the dtype of a tensor");
    require(x.device() == device, "the device of a tensor");
    require(x.numel() != 0, "an empty tensor");
    require(is_in_memory(x), "the memory of a tensor");
    append(items, x.mutable_data_ptr(), x.numel());
  }
  return items;
}

inline void check_state(const Tensor& x, const char* name, ScalarType dtype, int64_t length,
                        const Tensor& like) {
  require(x.scalar_type() == dtype && x.device() == like.device() && x.numel() == length &&
              is_in_memory(x),
          name);
}

// The packed masks, or the scratch memory: the kernels read them in words of 64 bits.
inline void check_words(const Tensor& x, const char* name, int64_t length, const Tensor& like) {
  check_state(x, name, ScalarType::Int, length, like);
  require(is_in_memory(x, 8), name);
}

inline void check_shrink(double shrink) {
  require(shrink >= 0.0 && shrink <= 1.0, "shrink");
}

inline void check_rank(int64_t k, const Item& item) {
  require(k >= 0 && k <= item.numel, "k");
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
  check_words(masks, "masks", mask_total(items), weights[0]);
  check_state(flips, "flips", ScalarType::Long, count, weights[0]);
  check_words(scratch, "scratch", scratch_total(items), weights[0]);
  if (found_inf) check_state(*found_inf, "found_inf", ScalarType::Float, 1, weights[0]);
  std::vector<ByteRange> ranges;
  ranges.reserve(items.size() + 6);
  for (const Tensor& w : weights) ranges.push_back(byte_range(w));
  if (found_inf) ranges.push_back(byte_range(*found_inf));
  for (const Tensor* x : {&k, &thresholds, &masks, &flips, &scratch})
    ranges.push_back(byte_range(*x));
  check_no_overlap(std::move(ranges));
  return items;
}

inline std::vector<Item> check_magnitude_threshold(const std::vector<Tensor>& weights,
                                                   const std::vector<int64_t>& k) {
  const std::vector<Item> items = check_tensor_list(weights, true);
  require(k.size() == items.size(), "k");
  for (size_t i = 0; i < items.size(); ++i) check_rank(k[i], items[i]);
  return items;
}

// Returns the items of the first set; the tensors of the other sets have the same sizes.
inline std::vector<Item> check_apply_masks(const std::vector<Tensor>& tensors, const Tensor& masks,
                                           int64_t sets) {
  std::vector<Item> items = check_tensor_list(tensors, false);
  require(sets >= 1 && int64_t(items.size()) % sets == 0, "the number of sets of tensors");
  const size_t count = items.size() / size_t(sets);
  for (size_t i = 0; i < items.size(); ++i) {
    require(items[i].numel == items[i % count].numel, "a tensor of another size than its mask");
  }
  items.resize(count);
  check_words(masks, "masks", mask_total(items), tensors[0]);
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
  const ScalarType dtype = weights[0].scalar_type();
  require(items.size() == others.size() && grads[0].scalar_type() == dtype &&
              grads[0].device() == weights[0].device(),
          "grads");
  for (size_t i = 0; i < items.size(); ++i) require(items[i].numel == others[i].numel, "grads");
  const bool wide = dtype == ScalarType::Double;
  check_state(factors, "factors", wide ? ScalarType::Double : ScalarType::Float,
              int64_t(items.size()), weights[0]);
  check_words(masks, "masks", mask_total(items), weights[0]);
  std::vector<ByteRange> ranges;
  ranges.reserve(2 * items.size() + 2);
  for (const Tensor& g : grads) ranges.push_back(byte_range(g));
  for (const Tensor& w : weights) ranges.push_back(byte_range(w));
  for (const Tensor* x : {&factors, &masks}) ranges.push_back(byte_range(*x));
  check_no_overlap(std::move(ranges));
  return items;
}

// v == 0 means layout "flat".
inline Pattern check_pattern(const Tensor& weight, int64_t n, int64_t m, int64_t v, int64_t c) {
  require(v >= 0 && c >= 1, "a pattern");
  if (m != 0) require(n >= 1 && n <= m && n % c == 0 && m % c == 0, "a pattern");
  if (v == 0) {
    require(c == 1 && m > 0 && weight.numel() % m == 0, "a pattern");
    return {n, m, 1, 1, weight.numel(), 1, 1};
  }
  require(weight.dim() >= 2, "a pattern");
  const int64_t rows = weight.size(0), channels = weight.size(1);
  require(channels % (m ? m : c) == 0 && rows % v == 0, "a pattern");
  return {m ? n : 0, m, v, rows, channels, weight.numel() / (rows * channels), c};
}

// One pattern per pruned weight (the first `count` weights); empty if all are unstructured.
inline std::vector<Pattern> check_patterns(const std::vector<Tensor>& weights, size_t count,
                                           const std::vector<int64_t>& patterns) {
  require(patterns.empty() || patterns.size() == 4 * count, "patterns");
  std::vector<Pattern> result;
  for (size_t i = 0; i < patterns.size() / 4; ++i) {
    const int64_t* const by = &patterns[4 * i];
    const bool plain = by[1] == 0 && by[2] == 0;
    result.push_back(plain ? Pattern{} : check_pattern(weights[i], by[0], by[1], by[2], by[3]));
  }
  return result;
}

// The CUDA ops have none; `share_units` of issp/ops/backends.py sends such calls elsewhere.
inline std::vector<Pattern> without_units(std::vector<Pattern> patterns) {
  for (const Pattern& by : patterns) {
    if (by.is_units()) {
      refuse(
          "the CUDA library selects no units of weights: make an issp.ops.ShrinkState with them, ",
          "then Triton does");
    }
  }
  return patterns;
}

inline Pattern at(const std::vector<Pattern>& patterns, size_t i) {
  return patterns.empty() ? Pattern{} : patterns[i];
}

inline void check_rank(int64_t k, const Item& item, const Pattern& by) {
  if (by.m) return require(k == 0 || k == by.pruned(), "k");
  check_rank(k, item);
  require(!by.is_units() || k % (by.v * by.c) == 0, "k");
}

inline Item check_nm_prune(const Tensor& weight, int64_t n, int64_t m, int64_t v,
                           const std::string& layout, double shrink, int64_t c) {
  const std::vector<Item> items = check_tensor_list({weight}, true);
  check_shrink(shrink);
  require(v >= 1, "v");
  const bool flat = layout == "flat";
  require(flat ? v == 1 : layout == "channels", "layout");
  require(m >= 1, "m");
  check_pattern(weight, n, m, flat ? 0 : v, c);
  return items[0];
}

}  // namespace issp
