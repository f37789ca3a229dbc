// sparse_conv2d_values_grad; see product_grad.cuh.
#pragma once

#include "product_grad.cuh"

namespace issp {

template <typename Wide, int V, typename Place>
void launch_conv2d_values_grad(const Place& place, const Capacity& capacity, const Lists& lists,
                               uint32_t splits, Storage storage, const void* x, const void* grad,
                               void* totals, Stream stream) {
  const Parts parts = {parts_of_size(place.units, place.chunk), splits, uint32_t(tiles_of(place))};
  const uint64_t shares = uint64_t(parts.chunks) * splits;
  const Team team = choose_team<Wide>(lists.rows, V, shares, capacity.processors, ~0u);
  launch(values_grad_kernel<Wide, V, Place>, uint32_t(shares * team.groups), team.threads(),
         staged_bytes<Wide>(place), stream, place, lists, team, parts, x, grad, storage,
         static_cast<Wide*>(totals));
}

// The tiles of a convolution, whichever way they are staged.
inline uint64_t tiles_of(const Window& window, Storage storage) {
  const bool wide = storage == Storage::kFloat64;
  return tiles_of(wide ? place_pixels<double>(window) : place_pixels<float>(window));
}

// totals: choose_splits(lists, tiles_of(window, storage)) times as many sums as there are values,
// all zero. sum_totals follows.
inline void sparse_conv2d_values_grad(const Window& window, const Lists& lists, Storage storage,
                                      const void* x, const void* grad, void* totals,
                                      Stream stream) {
  const uint64_t tiles = tiles_of(window, storage);
  if (tiles == 0 || lists.entries == 0) return;
  const uint32_t splits = choose_splits(lists, tiles);
  with_strips(storage, lists.v, [&](auto zero, auto rows) {
    using Wide = decltype(zero);
    const Capacity capacity = capacity_of(values_grad_kernel<Wide, rows(), Planes>);
    const Planes place = place_planes<Wide>(window, capacity.bytes);
    if (place.chunk > 0) {
      launch_conv2d_values_grad<Wide, rows()>(place, capacity, lists, splits, storage, x, grad,
                                              totals, stream);
      return;
    }
    const Capacity other = capacity_of(values_grad_kernel<Wide, 1, Gathered>);
    launch_conv2d_values_grad<Wide, 1>(place_gathered<Wide>(window, other.bytes), other, lists,
                                       splits, storage, x, grad, totals, stream);
  });
}

}  // namespace issp
