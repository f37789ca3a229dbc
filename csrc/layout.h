// Where a tensor's mask words and scratch lie: the same arithmetic as issp/schemas.py.
#pragma once

#include <cstdint>
#include <vector>

namespace issp {

constexpr int64_t kLineWords = 16;  // 64 bytes: two tensors never share a cache line of masks
constexpr int64_t kScratchHeader = 64;

constexpr int64_t mask_words(int64_t numel) {
  return (numel + 32 * kLineWords - 1) / (32 * kLineWords) * kLineWords;
}

constexpr int64_t scratch_region(int64_t numel) {
  return (numel / 10 / kLineWords + 2) * kLineWords;
}

// One tensor of a multi-tensor call, with the first word of its mask and of its scratch.
struct Item {
  void* data;
  int64_t numel;
  int64_t mask_start;
  int64_t scratch_start;
};

// How a tensor is pruned. m == 0: unstructured. Otherwise the m - n smallest of every m consecutive
// channels; element (row, channel, kernel) lies at (row * channels + channel) * inner + kernel, and
// v consecutive rows share a pattern. Layout "flat" is one row of all elements, inner = 1.
struct Pattern {
  int64_t n, m, v, rows, channels, inner;

  int64_t pruned() const { return rows * channels * inner / m * (m - n); }
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
