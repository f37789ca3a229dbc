// The positions of mask words and scratch memory of a tensor. issp/ops/schemas/pruning.py computes
// the same.
#pragma once

#include <cstdint>
#include <vector>

namespace issp {

// int32 words of a cache line. No cache line of masks belongs to two tensors.
constexpr int64_t kLineWords = 16;
constexpr int64_t kScratchHeader = 64;

constexpr int64_t mask_words(int64_t numel) {
  return (numel + 32 * kLineWords - 1) / (32 * kLineWords) * kLineWords;
}

constexpr int64_t scratch_region(int64_t numel) {
  return (numel / 10 / kLineWords + 2) * kLineWords;
}

// One tensor of a multi-tensor call, with the index of its first mask word and of its first scratch
// word.
struct Item {
  void* data;
  int64_t numel;
  int64_t mask_start;
  int64_t scratch_start;
};

// The pattern of a tensor: N:M, units, or (m == 0, v * c <= 1) neither. v consecutive rows x c
// consecutive channels at one kernel position are a unit, whose weights are selected together. N:M:
// of every m consecutive channels the m - n of the units of the smallest scores are pruned. Element
// (row, channel, kernel) is at (row * channels + channel) * inner + kernel. Layout "flat" is one
// row of all elements with inner = 1.
struct Pattern {
  int64_t n, m, v, rows, channels, inner, c;

  int64_t pruned() const { return rows * channels * inner / m * (m - n); }
  bool is_units() const { return m == 0 && v * c > 1; }
};

inline int64_t mask_total(const std::vector<Item>& items) {
  return items.back().mask_start + mask_words(items.back().numel);
}

inline int64_t scratch_total(const std::vector<Item>& items) {
  return items.back().scratch_start + scratch_region(items.back().numel);
}

inline void append(std::vector<Item>& items, void* data, int64_t numel) {
  const bool first = items.empty();
  items.push_back(
      {data, numel, first ? 0 : mask_total(items), first ? kScratchHeader : scratch_total(items)});
}

}  // namespace issp
