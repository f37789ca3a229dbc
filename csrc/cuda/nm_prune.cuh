// nm_prune: keeps n of every m, out of place, with the packed mask, all of whose bits are 0 on
// entry: one launch, one read and one write of the weights, see nm_shrink.cuh.
#pragma once

#include "nm_shrink.cuh"

namespace issp {

template <typename T>
void nm_prune(const typename T::Bits* weight, int64_t numel, const Pattern& pattern, double shrink,
              typename T::Bits* pruned_weight, uint32_t* mask, Stream stream) {
  GroupCall<T> call = {};
  call.masks = mask;
  call.shrink = typename T::Wide(shrink);
  call.source = weight;
  const std::vector<Item> items = {{pruned_weight, numel, 0, kScratchHeader}};
  launch_grouped<T>(items, {pattern}, {0}, call, NoUpdate{}, [](Entry&, size_t) {}, stream);
}

}  // namespace issp
