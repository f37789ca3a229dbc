// sparse_matmul_values_grad; see product_grad.cuh.
#pragma once

#include "product_grad.cuh"

namespace issp {

inline uint64_t token_tiles(uint64_t tokens, Storage storage) {
  return parts_of_size(tokens,
                       storage == Storage::kFloat64 ? kTilePixels<double> : kTilePixels<float>);
}

// totals: choose_splits(lists, token_tiles(tokens, storage)) times as many sums as there are
// values, all zero. sum_totals follows.
inline void sparse_matmul_values_grad(uint64_t tokens, const Lists& lists, Storage storage,
                                      const void* x, const void* grad, void* totals,
                                      Stream stream) {
  if (tokens == 0 || lists.entries == 0) return;
  const uint32_t splits = choose_splits(lists, token_tiles(tokens, storage));
  with_strips(storage, lists.v, [&](auto zero, auto strip_rows) {
    using Wide = decltype(zero);
    constexpr int kRows = strip_rows();
    const Capacity capacity = capacity_of(values_grad_kernel<Wide, kRows, Tokens>);
    const Tokens place = place_tokens<Wide>(tokens, lists.length, lists.rows, capacity.bytes);
    const Parts parts = {parts_of_size(place.units, place.chunk), splits,
                         uint32_t(tiles_of(place))};
    const uint64_t shares = uint64_t(parts.chunks) * splits;
    const Team team =
        choose_team<Wide>(lists.rows, kRows, shares, capacity.processors, capacity.bytes);
    const uint32_t bytes = std::max(staged_bytes<Wide>(place), exchange_bytes<Wide>(team, kRows));
    launch(values_grad_kernel<Wide, kRows, Tokens>, uint32_t(shares * team.groups), team.threads(),
           bytes, stream, place, lists, team, parts, x, grad, storage, static_cast<Wide*>(totals));
  });
}

}  // namespace issp
