// Gradients of the weight's values: for every entry and row the sum over pixels of gradient times
// input, where the input stands as in the product.
//
// The product's design turned round: a thread holds the gradients of 8 pixels and 8 rows, 64
// registers, and walks along the entries; for each it multiplies 8 staged inputs into V sums. Eight
// sums at a time (of 8 / V entries) go through the warp in 9 shuffles, each lane ending with one.
// Work per entry and warp: 8 words of shared memory, 1 + 9 V / 8 shuffles, one word to global
// memory and back, 8 V multiplications; v = 1 needs 10.4 words for 2 cycles of multiplications, v =
// 8 20 for 16. A block has one chunk of channels and one part of the tiles, and adds them up in a
// buffer of its part; sum_kernel adds the parts in order. Nothing is atomic, and how many parts
// there are depends on the shapes alone, so the bits do. The buffer is at most as large as the
// dense weight, or 1 MB.
#pragma once

#include "product_host.cuh"

namespace issp {

struct Parts {
  uint32_t chunks, splits, tiles;
};

// Four rows and two pixels at a time, as results are written.
template <typename T, int V>
ISSP_DEVICE void hold_grads(Held<typename T::Wide, V>& held, const void* grad, const Pixels& place,
                            ImageTile tile, const Team& team, uint32_t group, Shared) {
  using Wide = typename T::Wide;
  constexpr uint32_t kHalf = kWarpRows / 2;
  each_pair<Wide, V, true>(held, [&](uint32_t j) {
    uint64_t pixels[2];
    const bool inside[2] = {place.find_pixel(tile, j, pixels[0]),
                            place.find_pixel(tile, j + 1, pixels[1])};
#pragma unroll 1
    for (uint32_t half = 0; half < 2; ++half) {
      Wide values[kHalf][2];
#pragma unroll
      for (uint32_t k = 0; k < kHalf; ++k) {
        const uint32_t strip = (half * kHalf + k) / V, number = strip_number(team, group, strip);
        const bool there = strip < team.each && number < team.strips;
        const uint64_t start = place.row_start(tile, number * V + (half * kHalf + k) % V);
#pragma unroll
        for (uint32_t p = 0; p < 2; ++p) {
          values[k][p] = there && inside[p] ? load_wide<T>(grad, start + pixels[p]) : Wide(0);
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < kWarpRows; ++i) {
#pragma unroll
        for (uint32_t p = 0; p < 2; ++p) {
          if (half == i / kHalf) held[i / V][i % V][p] = values[i % kHalf][p];
        }
      }
    }
  });
}

template <typename T, int V>
ISSP_DEVICE void hold_grads(Held<typename T::Wide, V>& held, const void* grad, const Tokens& place,
                            TokenTile tile, const Team& team, uint32_t group, Shared shared) {
  using Wide = typename T::Wide;
  const Staged<Wide> exchange = {shared};
  const uint32_t rows = team.warps * team.each * V, first_row = group * rows;
#pragma unroll
  for (uint32_t round = 0; round < kPixels<Wide> / kRound<Wide>; ++round) {
    each_exchanged<Wide>(
        place, tile, first_row, rows, round, team, [&](uint32_t, const Exchanged& found) {
#pragma unroll
          for (uint32_t k = 0; k < 4; ++k) {
            fetch<T>(exchange.from(found.place[k]), grad, found.at[k], found.inside[k]);
          }
        });
    wait_for_copies();
    barrier();
#pragma unroll
    for (uint32_t s = 0; s < kWarpRows / V; ++s) {
#pragma unroll
      for (uint32_t r = 0; r < V; ++r) {
        const uint32_t row = (s * team.warps + warp()) * V + r;
#pragma unroll
        for (uint32_t j = 0; j < kRound<Wide>; ++j) {
          held[s][r][round * kRound<Wide> + j] =
              s < team.each ? exchange.get(row * kExchangePitch<Wide> + 32 * j + lane()) : Wide(0);
        }
      }
    }
    barrier();
  }
}

// Lane l gets the warp's sum of number l / 4. The order is the same in every run.
template <typename Wide>
ISSP_DEVICE Wide scatter_sums(const Wide (&sums)[8]) {
  const bool third = lane() & 16u, second = lane() & 8u, first = lane() & 4u;
  Wide four[4], two[2];
#pragma unroll
  for (uint32_t k = 0; k < 4; ++k) {
    const Wide others = shuffle_wide(third ? sums[k] : sums[k + 4], lane() ^ 16u);
    four[k] = (third ? sums[k + 4] : sums[k]) + others;
  }
#pragma unroll
  for (uint32_t k = 0; k < 2; ++k) {
    const Wide others = shuffle_wide(second ? four[k] : four[k + 2], lane() ^ 8u);
    two[k] = (second ? four[k + 2] : four[k]) + others;
  }
  Wide sum = (first ? two[1] : two[0]) + shuffle_wide(first ? two[0] : two[1], lane() ^ 4u);
  sum += shuffle_wide(sum, lane() ^ 2u);
  return sum + shuffle_wide(sum, lane() ^ 1u);
}

// totals: of the strip's first row in the first entry of the weight.
template <typename Wide, int V, typename Place>
ISSP_DEVICE void add_batch(const Wide (&held)[V][kPixels<Wide>], const Place& place,
                           const Batch& batch, uint32_t offset, Staged<Wide> inputs, uint32_t v,
                           Wide* totals) {
  constexpr uint32_t kEntries = 8 / V;
  for (uint32_t i = 0; i < batch.count; i += kEntries) {
    Wide sums[8] = {};
#pragma unroll
    for (uint32_t e = 0; e < kEntries; ++e) {
      const Staged<Wide> from = inputs.from(shuffle(offset, i + e));
#pragma unroll
      for (uint32_t j = 0; j < kPixels<Wide>; ++j) {
        const Wide x = from.from(place.step(j)).get(place.side_step(j));
#pragma unroll
        for (uint32_t r = 0; r < V; ++r) sums[e * V + r] = fused(held[r][j], x, sums[e * V + r]);
      }
    }
    const Wide sum = scatter_sums(sums);
    const uint32_t from = i + lane() / 4 / V, entry = shuffle(batch.entry, from);
    if (lane() % 4 == 0 && from < batch.count) {
      Wide* const total = totals + uint64_t(entry) * v + lane() / 4 % V;
      store(total, load(total) + sum);
    }
  }
}

// The first entry of a strip whose column is `column` or more; each lane has its own.
ISSP_DEVICE uint32_t find_column(const Lists& lists, Strip strip, uint32_t column) {
  uint32_t begin = strip.begin, end = strip.end;
  while (begin < end) {
    const uint32_t middle = begin + (end - begin) / 2;
    if (load(lists.columns + middle) < int32_t(column)) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

ISSP_DEVICE uint32_t first_tile(const Parts& parts, uint32_t split) {
  return uint32_t(uint64_t(parts.tiles) * split / parts.splits);
}

// totals: [splits, E, v], zeros before the launch.
template <typename Wide, int V, typename Place>
ISSP_KERNEL(kProductThreads, 2)
values_grad_kernel(const ISSP_PARAM Place place, const ISSP_PARAM Lists lists,
                   const ISSP_PARAM Team team, const ISSP_PARAM Parts parts, const void* x,
                   const void* grad, Storage storage, Wide* totals) {
  constexpr uint32_t kStrips = kWarpRows / V;
  const Shared shared = shared_memory();
  const Staged<Wide> staged = place.template staged<Wide>(shared);
  const Staged<Wide> inputs = staged.from(place.base());
  const uint32_t group = block() % team.groups, split = block() / team.groups / parts.chunks;
  const uint32_t first = block() / team.groups % parts.chunks * place.chunk;
  const uint32_t count = at_most(place.units - first, place.chunk);
  const Columns columns = {first * place.columns_per_unit,
                           (first + count) * place.columns_per_unit};
  const Strip strip = find_strip<V>(lists, team, group, lane() % kStrips);
  const uint32_t bound = find_column(lists, strip, lane() < 16 ? columns.begin : columns.end);
  Wide* const mine = totals + uint64_t(split) * lists.entries * lists.v;
  const uint32_t last = first_tile(parts, split + 1);
  place.prepare(shared, team.threads());
  for (uint32_t number = first_tile(parts, split); number < last; ++number) {
    const auto tile = place.template tile<Wide>(number);
    Held<Wide, V> held = {};
    barrier();  // all warps are done with the tile before
    with_storage<Wide>(storage, [&](auto type) {
      hold_grads<decltype(type), V>(held, grad, place, tile, team, group, shared);
    });
    with_storage<Wide>(storage, [&](auto type) {
      place.template stage<decltype(type)>(staged, x, tile, first, count, team.threads());
    });
    wait_for_copies();
    barrier();
#pragma unroll 1
    for (uint32_t s = 0; s < team.each; ++s) {
      uint32_t at = shuffle(bound, s);
      const uint32_t end = shuffle(bound, 16 + s);
      const uint32_t inner = strip_offset<V>(lists, team, group, s);
      const auto nothing = [](uint32_t, bool) { return 0; };
      each_batch(lists, columns, at, end, nothing, [&](const Batch& batch, int) {
        const uint32_t offset = place.offset(shared, batch.column, first);
        with_strip<Wide, V>(held, s, [&](const auto& rows) {
          add_batch<Wide, V>(rows, place, batch, offset, inputs, lists.v, mine + inner);
        });
      });
    }
  }
}

// One thread per value; totals are added in the order of the parts. Traffic: one read, one write.
template <typename T>
ISSP_KERNEL(kProductThreads, 2)
sum_kernel(const typename T::Wide* totals, uint64_t values, uint32_t splits,
           typename T::Bits* found) {
  const uint64_t i = uint64_t(block()) * kProductThreads + thread();
  if (i >= values) return;
  typename T::Wide sum = load(totals + i);
  for (uint32_t split = 1; split < splits; ++split) sum += load(totals + split * values + i);
  store(found + i, rounded<T>(sum));
}

// found: [E, v].
inline void sum_totals(const Lists& lists, uint32_t splits, Storage storage, const void* totals,
                       void* found, Stream stream) {
  const auto sum = [&](auto type) {
    using T = decltype(type);
    const uint64_t values = uint64_t(lists.entries) * lists.v;
    launch(sum_kernel<T>, parts_of_size(values, kProductThreads), kProductThreads, 0u, stream,
           static_cast<const typename T::Wide*>(totals), values, splits,
           static_cast<typename T::Bits*>(found));
  };
  if (storage == Storage::kFloat64) return sum(Float64{});
  if (storage == Storage::kFloat32) return sum(Float32{});
  if (storage == Storage::kFloat16) return sum(Float16{});
  sum(BFloat16{});
}

// Of the tiles; see above. Enough of them that a few hundred blocks have work.
inline uint32_t choose_splits(const Lists& lists, uint64_t tiles) {
  constexpr uint64_t kMost = 64, kSmall = 1u << 18;
  const uint64_t values = uint64_t(lists.entries) * lists.v;
  const uint64_t dense = uint64_t(lists.rows) * lists.length;
  const uint64_t by_memory = std::max(dense, kSmall) / std::max<uint64_t>(values, 1);
  return uint32_t(std::max<uint64_t>(1, std::min({tiles, kMost, by_memory})));
}

// The tiles of a convolution, whichever way they are staged, and of a matrix product.
inline uint64_t tiles_of(const Window& window, Storage storage) {
  const bool wide = storage == Storage::kFloat64;
  return tiles_of(wide ? place_pixels<double>(window) : place_pixels<float>(window));
}
inline uint64_t tiles_of(uint64_t tokens, Storage storage) {
  return parts_of_size(tokens,
                       storage == Storage::kFloat64 ? kTilePixels<double> : kTilePixels<float>);
}

template <typename Wide, int V, typename Place>
void launch_values_grad(const Place& place, const Capacity& capacity, const Lists& lists,
                        Storage storage, const void* x, const void* grad, void* totals,
                        Stream stream) {
  const uint64_t tiles = tiles_of(place);
  if (tiles == 0 || lists.entries == 0) return;
  const Parts parts = {parts_of_size(place.units, place.chunk), choose_splits(lists, tiles),
                       uint32_t(tiles)};
  const uint64_t shares = uint64_t(parts.chunks) * parts.splits;
  const Team team =
      choose_team<Wide>(lists.rows, V, shares, capacity.processors, exchange_room<Place>(capacity));
  launch(values_grad_kernel<Wide, V, Place>, uint32_t(shares * team.groups), team.threads(),
         shared_bytes<Wide>(place, team, V), stream, place, lists, team, parts, x, grad, storage,
         static_cast<Wide*>(totals));
}

// totals: choose_splits(lists, tiles_of(window or tokens, storage)) times as many sums as there are
// values, all zero. sum_totals follows.
inline void sparse_conv2d_values_grad(const Window& window, const Lists& lists, Storage storage,
                                      const void* x, const void* grad, void* totals,
                                      Stream stream) {
  with_strips(storage, lists.v, [&](auto zero, auto rows) {
    using Wide = decltype(zero);
    const Capacity capacity = capacity_of(values_grad_kernel<Wide, rows(), Planes>);
    const Planes place = place_planes<Wide>(window, capacity.bytes);
    if (place.chunk > 0) {
      launch_values_grad<Wide, rows()>(place, capacity, lists, storage, x, grad, totals, stream);
      return;
    }
    const Capacity other = capacity_of(values_grad_kernel<Wide, 1, Gathered>);
    launch_values_grad<Wide, 1>(place_gathered<Wide>(window, other.bytes), other, lists, storage, x,
                                grad, totals, stream);
  });
}

inline void sparse_matmul_values_grad(uint64_t tokens, const Lists& lists, Storage storage,
                                      const void* x, const void* grad, void* totals,
                                      Stream stream) {
  with_strips(storage, lists.v, [&](auto zero, auto rows) {
    using Wide = decltype(zero);
    const Capacity capacity = capacity_of(values_grad_kernel<Wide, rows(), Tokens>);
    const Tokens place = place_tokens<Wide>(tokens, lists.length, lists.rows, capacity.bytes);
    launch_values_grad<Wide, rows()>(place, capacity, lists, storage, x, grad, totals, stream);
  });
}

}  // namespace issp
