// sparse_conv2d: an implicit product, nothing of the unfolded input is ever in global memory.
#pragma once

#include "product_forward.cuh"

namespace issp {

template <typename Wide, int V, typename Place>
void launch_conv2d(const Place& place, const Capacity& capacity, const Lists& lists,
                   Storage storage, const void* x, const void* values, const Ends& ends,
                   Stream stream) {
  const uint64_t tiles = tiles_of(place);
  if (tiles == 0) return;
  const Team team = choose_team<Wide>(lists.rows, V, tiles, capacity.processors, ~0u);
  launch(product_kernel<Wide, V, Place>, uint32_t(tiles * team.groups), team.threads(),
         staged_bytes<Wide>(place), stream, place, lists, team, x, values, storage, ends);
}

inline void sparse_conv2d(const Window& window, const Lists& lists, Storage storage, const void* x,
                          const void* values, const Ends& ends, Stream stream) {
  with_strips(storage, lists.v, [&](auto zero, auto rows) {
    using Wide = decltype(zero);
    const Capacity capacity = capacity_of(product_kernel<Wide, rows(), Planes>);
    const Planes place = place_planes<Wide>(window, capacity.bytes);
    if (place.chunk > 0) {
      launch_conv2d<Wide, rows()>(place, capacity, lists, storage, x, values, ends, stream);
      return;
    }
    const Capacity other = capacity_of(product_kernel<Wide, 1, Gathered>);
    launch_conv2d<Wide, 1>(place_gathered<Wide>(window, other.bytes), other, lists, storage, x,
                           values, ends, stream);
  });
}

}  // namespace issp
