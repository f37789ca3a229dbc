// apply_masks_ on the CPU. Traffic: 1/8 byte of mask per element; elements are written where they
// are dropped and never read, except in the last, partial group.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "dtypes.h"
#include "team.h"

namespace issp {
namespace {

void apply_masks_(const std::vector<Tensor>& tensors, const Tensor& masks) {
  const std::vector<Item> items = check_apply_masks(tensors, masks);
  const auto* const words = static_cast<const int32_t*>(masks.const_data_ptr());
  for_each_item(items, sizeof(float), [&](size_t i, int64_t, Team team) {
    const Item& item = items[i];
    const auto* mask = reinterpret_cast<const uint64_t*>(words + item.mask_start);
    for_dtype(tensors[i].scalar_type(), [&](auto type) {
      using T = decltype(type);
      team.each([&](int64_t p) {
        passes<T>().clear(static_cast<typename T::Bits*>(item.data), item.numel,
                          team.share(p, item.numel), mask);
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("apply_masks_", TORCH_BOX(&apply_masks_));
}

}  // namespace issp
