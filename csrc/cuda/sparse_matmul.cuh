// sparse_matmul: a convolution's product with one tap, the features innermost in memory.
#pragma once

#include "product_forward.cuh"

namespace issp {

inline void sparse_matmul(uint64_t tokens, const Lists& lists, Storage storage, const void* x,
                          const void* values, const Ends& ends, Stream stream) {
  if (tokens == 0) return;
  with_strips(storage, lists.v, [&](auto zero, auto strip_rows) {
    using Wide = decltype(zero);
    constexpr int kRows = strip_rows();
    const Capacity capacity = capacity_of(product_kernel<Wide, kRows, Tokens>);
    const Tokens place = place_tokens<Wide>(tokens, lists.length, lists.rows, capacity.bytes);
    const uint64_t tiles = tiles_of(place);
    const Team team =
        choose_team<Wide>(lists.rows, kRows, tiles, capacity.processors, capacity.bytes);
    const uint32_t bytes = std::max(staged_bytes<Wide>(place), exchange_bytes<Wide>(team, kRows));
    launch(product_kernel<Wide, kRows, Tokens>, uint32_t(tiles * team.groups), team.threads(),
           bytes, stream, place, lists, team, x, values, storage, ends);
  });
}

}  // namespace issp
