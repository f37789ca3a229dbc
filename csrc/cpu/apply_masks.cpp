// apply_masks_ on the CPU. Traffic: 1/8 byte of mask per weight, whatever the number of sets, and
// the elements that are dropped, which are written and never read, except in the last, partial
// group.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/dtypes.h"
#include "cpu/threads.h"

namespace issp {
namespace {

// Groups of 64 weights whose words of the mask (4 KB) stay in the L1 cache from set to set.
constexpr int64_t kBlock = 512;

void apply_masks_(const std::vector<Tensor>& tensors, const Tensor& masks, int64_t sets) {
  const std::vector<Item> items = check_apply_masks(tensors, masks, sets);
  const auto* const words = static_cast<const int32_t*>(masks.const_data_ptr());
  for_each_item(items, int64_t(sizeof(float)) * sets, [&](size_t i, int64_t, Team team) {
    const auto* mask = reinterpret_cast<const uint64_t*>(words + items[i].mask_start);
    const int64_t numel = items[i].numel;
    team.each([&](int64_t p) {
      const Range mine = team.share(p, numel);
      for (int64_t begin = mine.begin; begin < mine.end; begin += kBlock) {
        const Range block = {begin, std::min(mine.end, begin + kBlock)};
        for (size_t x = i; x < tensors.size(); x += items.size()) {
          for_dtype(tensors[x].scalar_type(), [&](auto type) {
            using T = decltype(type);
            auto* const data = static_cast<typename T::Bits*>(tensors[x].mutable_data_ptr());
            passes<T>().clear(data, numel, block, mask);
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
