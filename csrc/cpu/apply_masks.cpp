// apply_masks_ on the CPU. Traffic: 1/8 byte of mask per weight for all sets together. Dropped
// elements are written and, except in a last partial block, not read.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/dtypes.h"
#include "cpu/threads.h"

namespace issp {
namespace {

// Blocks of 64 weights per iteration: their 4 KB of mask stay in L1 from set to set.
constexpr int64_t kBlocks = 512;

void apply_masks_(const std::vector<Tensor>& tensors, const Tensor& masks, int64_t sets) {
  const std::vector<Item> items = check_apply_masks(tensors, masks, sets);
  const auto* const words = static_cast<const int32_t*>(masks.const_data_ptr());
  for_each_item(items, int64_t(sizeof(float)) * sets, [&](size_t i, int64_t, ThreadGroup threads) {
    const auto* mask = reinterpret_cast<const uint64_t*>(words + items[i].mask_start);
    const int64_t numel = items[i].numel;
    threads.run([&](int64_t p) {
      const Range range = threads.range_of(p, numel);
      for (int64_t begin = range.begin; begin < range.end; begin += kBlocks) {
        const Range blocks = {begin, std::min(range.end, begin + kBlocks)};
        for (size_t x = i; x < tensors.size(); x += items.size()) {
          for_dtype(tensors[x].scalar_type(), [&](auto type) {
            using T = decltype(type);
            auto* const data = static_cast<typename T::Bits*>(tensors[x].mutable_data_ptr());
            prune_kernels<T>().clear(data, numel, blocks, mask);
          });
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("apply_masks_", TORCH_BOX(&apply_masks_));
}

}  // namespace issp
