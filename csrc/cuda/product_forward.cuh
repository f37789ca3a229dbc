// The products themselves: activation(W x + bias) + residual, for images and for tokens.
#pragma once

#include "product_host.cuh"

namespace issp {

template <typename T>
ISSP_DEVICE void store_result(const Ends& ends, typename T::Wide value, uint64_t i) {
  if (ends.residual) value += load_wide<T>(ends.residual, i);
  store(static_cast<typename T::Bits*>(ends.result) + i, rounded<T>(value));
}

template <typename Wide, int V, typename Place>
ISSP_DEVICE void multiply_batch(Wide (&sums)[V][kPixels<Wide>], const Place& place,
                                const Batch& batch, const Wide (&weights)[V], uint32_t offset,
                                Staged<Wide> inputs) {
#pragma unroll(V == 1 ? 4 : V == 4 ? 2 : 1)
  for (uint32_t i = 0; i < batch.count; ++i) {
    const Staged<Wide> from = inputs.from(shuffle(offset, i));
    Wide weight[V];
#pragma unroll
    for (uint32_t r = 0; r < V; ++r) weight[r] = shuffle_wide(weights[r], i);
#pragma unroll
    for (uint32_t j = 0; j < kPixels<Wide>; ++j) {
      const Wide x = from.from(place.step(j)).get(place.side_step(j));
#pragma unroll
      for (uint32_t r = 0; r < V; ++r) sums[r][j] = fused(weight[r], x, sums[r][j]);
    }
  }
}

// Rows behind the last are not there.
template <typename Wide, uint32_t kRows>
ISSP_DEVICE void finish_pixels(const Pixels& place, ImageTile tile, const uint32_t (&rows)[kRows],
                               Wide (&values)[kRows][2], const bool (&inside)[2],
                               const uint64_t (&pixels)[2], Storage storage, const Ends& ends) {
  if (ends.bias) {
    with_storage<Wide>(storage, [&](auto type) {
#pragma unroll
      for (uint32_t k = 0; k < kRows; ++k) {
        if (rows[k] == place.window.rows) continue;
        const Wide bias = load_wide<decltype(type)>(ends.bias, rows[k]);
        values[k][0] += bias, values[k][1] += bias;
      }
    });
  }
#pragma unroll
  for (uint32_t k = 0; k < kRows; ++k) {
    values[k][0] = activated(values[k][0], ends.finish);
    values[k][1] = activated(values[k][1], ends.finish);
  }
  with_storage<Wide>(storage, [&](auto type) {
#pragma unroll
    for (uint32_t k = 0; k < kRows; ++k) {
      const uint64_t start = place.row_start(tile, rows[k]);
#pragma unroll
      for (uint32_t p = 0; p < 2; ++p) {
        if (rows[k] == place.window.rows || !inside[p]) continue;
        store_result<decltype(type)>(ends, values[k][p], start + pixels[p]);
      }
    }
  });
}

// Sectors of 32 bytes are written at once: 8 neighbouring pixels of a row. Four rows and two pixels
// at a time: enough loads in flight, and the registers of few addresses.
template <typename Wide, int V>
ISSP_DEVICE void finish_block(Held<Wide, V>& sums, const Pixels& place, ImageTile tile,
                              const Team& team, uint32_t group, Storage storage, const Ends& ends,
                              Shared) {
  constexpr uint32_t kHalf = kWarpRows / 2;
  each_pair<Wide, V, false>(sums, [&](uint32_t j) {
    uint64_t pixels[2];
    const bool inside[2] = {place.find_pixel(tile, j, pixels[0]),
                            place.find_pixel(tile, j + 1, pixels[1])};
#pragma unroll 1
    for (uint32_t half = 0; half < 2; ++half) {
      Wide values[kHalf][2];
      uint32_t rows[kHalf];
#pragma unroll
      for (uint32_t k = 0; k < kHalf; ++k) {
        const uint32_t strip = (half * kHalf + k) / V, number = strip_number(team, group, strip);
        const bool there = strip < team.each && number < team.strips;
        rows[k] = there ? number * V + (half * kHalf + k) % V : place.window.rows;
#pragma unroll
        for (uint32_t p = 0; p < 2; ++p) {
          values[k][p] = half ? sums[(kHalf + k) / V][(kHalf + k) % V][p] : sums[k / V][k % V][p];
        }
      }
      finish_pixels(place, tile, rows, values, inside, pixels, storage, ends);
    }
  });
}

template <typename Wide, int V>
ISSP_DEVICE void finish_block(Held<Wide, V>& sums, const Tokens& place, TokenTile tile,
                              const Team& team, uint32_t group, Storage storage, const Ends& ends,
                              Shared shared) {
  const Staged<Wide> exchange = {shared};
  const uint32_t rows = team.warps * team.each * V, first_row = group * rows;
#pragma unroll
  for (uint32_t round = 0; round < kPixels<Wide> / kRound<Wide>; ++round) {
    barrier();  // the inputs, or the round before, are done with
#pragma unroll
    for (uint32_t s = 0; s < kWarpRows / V; ++s) {
#pragma unroll
      for (uint32_t r = 0; r < V; ++r) {
        const uint32_t row = (s * team.warps + warp()) * V + r;
#pragma unroll
        for (uint32_t j = 0; j < kRound<Wide>; ++j) {
          if (s < team.each) {
            exchange.set(row * kExchangePitch<Wide> + 32 * j + lane(),
                         sums[s][r][round * kRound<Wide> + j]);
          }
        }
      }
    }
    barrier();
    each_exchanged<Wide>(
        place, tile, first_row, rows, round, team,
        [&](uint32_t from, uint32_t row, uint32_t token, uint64_t at, bool inside) {
          if (!inside) return;
          Wide value = exchange.get(from * kExchangePitch<Wide> + token);
          with_storage<Wide>(storage, [&](auto type) {
            if (ends.bias) value += load_wide<decltype(type)>(ends.bias, row);
          });
          value = activated(value, ends.finish);
          with_storage<Wide>(storage, [&](auto type) {
            store_result<decltype(type)>(ends, value, at * place.rows + row);
          });
        });
  }
}

template <typename Wide, int V, typename Place>
ISSP_KERNEL(kProductThreads, 2)
product_kernel(const ISSP_PARAM Place place, const ISSP_PARAM Lists lists,
               const ISSP_PARAM Team team, const void* x, const void* values, Storage storage,
               const ISSP_PARAM Ends ends) {
  constexpr uint32_t kStrips = kWarpRows / V;
  const Shared shared = shared_memory();
  const Staged<Wide> staged = place.template staged<Wide>(shared);
  const Staged<Wide> inputs = staged.from(place.base());
  const uint32_t group = block() % team.groups;
  const auto tile = place.template tile<Wide>(block() / team.groups);
  Held<Wide, V> sums = {};
  // Lane s holds how far strip s is, lane 16 + s its end: registers are for sums.
  const Strip strip = find_strip<V>(lists, team, group, lane() % kStrips);
  uint32_t bound = lane() < 16 ? strip.begin : strip.end;
  place.prepare(shared, team.threads());
  for (uint32_t first = 0; first < place.units; first += place.chunk) {
    const uint32_t count = at_most(place.units - first, place.chunk);
    if (first > 0) barrier();  // all warps are done with the chunk before
    with_storage<Wide>(storage, [&](auto type) {
      place.template stage<decltype(type)>(staged, x, tile, first, count, team.threads());
    });
    barrier();
    const Columns columns = {first * place.columns_per_unit,
                             (first + count) * place.columns_per_unit};
#pragma unroll 1
    for (uint32_t s = 0; s < team.each; ++s) {
      uint32_t at = shuffle(bound, s);
      each_batch(lists, columns, at, shuffle(bound, 16 + s), [&](const Batch& batch) {
        Wide weights[V] = {};
        if (lane() < batch.count) {
          const uint64_t from =
              uint64_t(batch.entry) * lists.v + strip_number(team, group, s) * V % lists.v;
          with_storage<Wide>(storage, [&](auto type) {
#pragma unroll
            for (uint32_t r = 0; r < V; ++r) {
              weights[r] = load_wide<decltype(type)>(values, from + r);
            }
          });
        }
        const uint32_t offset = place.offset(shared, batch.column, first);
        with_strip<Wide, V>(sums, s, [&](auto& rows) {
          multiply_batch<Wide, V>(rows, place, batch, weights, offset, inputs);
        });
      });
      if (lane() == s) bound = at;
    }
  }
  finish_block<Wide, V>(sums, place, tile, team, group, storage, ends, shared);
}

}  // namespace issp
