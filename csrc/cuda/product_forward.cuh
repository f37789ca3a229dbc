// The products themselves: activation(W x + bias) + residual, for images and for tokens.
#pragma once

#include "product_host.cuh"

namespace issp {

// An entry's values in the rows of a strip.
template <typename Wide, int V>
struct Weights {
  Wide of[V];
};

struct alignas(16) FourFloats {
  float of[4];
};

// 16 bytes at a time where that is possible: v is a multiple of V, and V of four.
template <typename Wide, int V>
ISSP_DEVICE Weights<Wide, V> load_weights(const void* values, uint64_t from, Storage storage,
                                          bool there) {
  Weights<Wide, V> weights = {};
  if (!there) return weights;
  if constexpr (V % 4 == 0) {
    if (storage == Storage::kFloat32 && reinterpret_cast<uintptr_t>(values) % 16 == 0) {
      const auto* const four = static_cast<const FourFloats*>(values) + from / 4;
#pragma unroll
      for (uint32_t i = 0; i < V / 4; ++i) {
        const FourFloats some = load(four + i);
#pragma unroll
        for (uint32_t k = 0; k < 4; ++k) weights.of[4 * i + k] = some.of[k];
      }
      return weights;
    }
  }
  with_storage<Wide>(storage, [&](auto type) {
#pragma unroll
    for (uint32_t r = 0; r < V; ++r) weights.of[r] = load_wide<decltype(type)>(values, from + r);
  });
  return weights;
}

template <typename Wide, int V, typename Place>
ISSP_DEVICE void multiply_batch(Wide (&sums)[V][kPixels<Wide>], const Place& place,
                                const Batch& batch, const Weights<Wide, V>& weights,
                                uint32_t offset, Staged<Wide> inputs) {
#pragma unroll(V == 1 ? 4 : V == 4 ? 2 : 1)
  for (uint32_t i = 0; i < batch.count; ++i) {
    const Staged<Wide> from = inputs.from(shuffle(offset, i));
    Wide weight[V];
#pragma unroll
    for (uint32_t r = 0; r < V; ++r) weight[r] = shuffle_wide(weights.of[r], i);
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
    using T = decltype(type);
    // A store might change what a later load reads, as far as a compiler knows: loads come first.
    const auto each = [&](const auto& body) {
#pragma unroll
      for (uint32_t k = 0; k < kRows; ++k) {
        const uint64_t start = place.row_start(tile, rows[k]);
#pragma unroll
        for (uint32_t p = 0; p < 2; ++p) {
          if (rows[k] < place.window.rows && inside[p]) body(values[k][p], start + pixels[p]);
        }
      }
    };
    if (ends.residual) {
      each([&](Wide& value, uint64_t i) { value += load_wide<T>(ends.residual, i); });
    }
    each([&](Wide& value, uint64_t i) {
      store(static_cast<typename T::Bits*>(ends.result) + i, rounded<T>(value));
    });
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

template <typename Wide>
ISSP_DEVICE void finish_tokens(uint32_t row, const Exchanged& found, Staged<Wide> exchange,
                               Storage storage, const Ends& ends) {
  Wide values[4], bias = 0;
  with_storage<Wide>(storage, [&](auto type) {
    if (ends.bias) bias = load_wide<decltype(type)>(ends.bias, row);
  });
#pragma unroll
  for (uint32_t k = 0; k < 4; ++k) {
    values[k] = activated(exchange.get(found.place[k]) + bias, ends.finish);
  }
  with_storage<Wide>(storage, [&](auto type) {
    using T = decltype(type);
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) {
      if (ends.residual && found.inside[k]) values[k] += load_wide<T>(ends.residual, found.at[k]);
    }
#pragma unroll
    for (uint32_t k = 0; k < 4; ++k) {
      if (!found.inside[k]) continue;
      store(static_cast<typename T::Bits*>(ends.result) + found.at[k], rounded<T>(values[k]));
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
    each_exchanged<Wide>(place, tile, first_row, rows, round, team,
                         [&](uint32_t row, const Exchanged& found) {
                           if (row < place.rows) finish_tokens(row, found, exchange, storage, ends);
                         });
  }
}

// Calls body(r, p, place of a total) for the totals of this thread's pixels j and j + 1 in strip s,
// which wait between runs where results will be.
template <int V, typename Body>
ISSP_DEVICE void each_total(const Pixels& place, ImageTile tile, const Team& team, uint32_t group,
                            uint32_t s, uint32_t j, const Body& body) {
  uint64_t at, behind;
  const bool inside[2] = {place.find_pixel(tile, j, at), place.find_pixel(tile, j + 1, behind)};
  at += place.row_start(tile, strip_number(team, group, s) * V);
#pragma unroll
  for (uint32_t r = 0; r < V; ++r) {
    if (inside[0]) body(r, 0, at);
    if (inside[1]) body(r, 1, at + place.pixel_column(0, 1));
    at += place.result_pixels();
  }
}

// The results of a warp's tokens in one row are far apart. So what the block will write is taken
// for an array [its rows, its tokens]; finish_block has a barrier between the last total that is
// read and the first result.
template <int V, typename Body>
ISSP_DEVICE void each_total(const Tokens& place, TokenTile tile, const Team& team, uint32_t group,
                            uint32_t s, uint32_t j, const Body& body) {
  const uint32_t most = team.warps * team.each * V, first_row = group * most;
  const uint32_t rows = at_most(place.rows - first_row, most);
  const uint64_t behind = place.tokens - tile.first;
  const uint32_t tokens = behind < place.tile_tokens ? uint32_t(behind) : place.tile_tokens;
  // Divides by the rows: for fewer than 2^14 numbers and 2^6 rows the error stays below one.
  const uint32_t inverse = ((1u << 20) + rows - 1) / rows;
#pragma unroll
  for (uint32_t r = 0; r < V; ++r) {
#pragma unroll
    for (uint32_t p = 0; p < 2; ++p) {
      const uint32_t token = 32 * (j + p) + lane();
      const uint32_t number = ((s * team.warps + warp()) * V + r) * tokens + token;
      const uint32_t line = number * inverse >> 20;
      const uint64_t at = (tile.first + line) * place.rows + first_row + (number - line * rows);
      if (token < tokens) body(r, p, at);
    }
  }
}

enum class Run : uint32_t { kFirst, kMiddle, kLast };

// Adds the sums of a run of strip s to the totals; of the last run, the totals to them. Two pixels
// at a time, as in finish_block.
template <typename Wide, int V, typename Place, typename Tile>
ISSP_DEVICE void end_run(Wide (&sums)[V][kPixels<Wide>], const Place& place, Tile tile,
                         const Team& team, uint32_t group, uint32_t s, Run run, void* result) {
  Wide* const totals = static_cast<Wide*>(result);
#pragma unroll 1
  for (uint32_t j = 0; j < kPixels<Wide>; j += 2) {
    each_total<V>(place, tile, team, group, s, j, [&](uint32_t r, uint32_t p, uint64_t at) {
      if (run != Run::kFirst) sums[r][p] = load(totals + at) + sums[r][p];
      if (run != Run::kLast) store(totals + at, sums[r][p]);
    });
#pragma unroll
    for (uint32_t r = 0; r < V; ++r) {
      if (run != Run::kLast) sums[r][0] = sums[r][1] = 0;
      move_up<Wide, true>(sums[r]);
    }
  }
}

// How far a warp is in its strips: lanes s, 8 + s, 16 + s and 24 + s hold of strip s the next
// entry, the end of its run, its end and its beginning. Registers are for sums.
struct Progress {
  uint32_t own;

  ISSP_DEVICE Progress(Strip strip, uint32_t run) {
    const uint32_t kind = lane() / 8;
    const uint32_t run_end = strip.begin + at_most(strip.end - strip.begin, run);
    own = kind == 1 ? run_end : kind == 2 ? strip.end : strip.begin;
  }
  ISSP_DEVICE uint32_t next(uint32_t s) const { return shuffle(own, s); }
  ISSP_DEVICE uint32_t run_end(uint32_t s) const { return shuffle(own, 8 + s); }
  ISSP_DEVICE uint32_t end(uint32_t s) const { return shuffle(own, 16 + s); }
  ISSP_DEVICE uint32_t begin(uint32_t s) const { return shuffle(own, 24 + s); }
  ISSP_DEVICE void set(uint32_t s, uint32_t next, uint32_t run_end) {
    if (lane() == s) own = next;
    if (lane() == 8 + s) own = run_end;
  }
};

template <typename Wide, int V, typename Place>
ISSP_KERNEL(kProductThreads, 2)
product_kernel(const ISSP_PARAM Place place, const ISSP_PARAM Lists lists,
               const ISSP_PARAM Team team, const void* x, const void* values, Storage storage,
               const ISSP_PARAM Ends ends) {
  const Shared shared = shared_memory();
  const Staged<Wide> staged = place.template staged<Wide>(shared);
  const Staged<Wide> inputs = staged.from(place.base());
  const uint32_t group = block() % team.groups;
  const auto tile = place.template tile<Wide>(block() / team.groups);
  const uint32_t run = storage == Storage::kFloat16 || storage == Storage::kBFloat16 ? ~0u : kRun;
  Held<Wide, V> sums = {};
  Progress progress(find_strip<V>(lists, team, group, lane() % (kWarpRows / V)), run);
  const auto end_run_of = [&](uint32_t s, Run which) {
    with_strip<Wide, V>(sums, s, [&](auto& rows) {
      end_run<Wide, V>(rows, place, tile, team, group, s, which, ends.result);
    });
  };
  place.prepare(shared, team.threads());
  for (uint32_t first = 0; first < place.units; first += place.chunk) {
    const uint32_t count = at_most(place.units - first, place.chunk);
    if (first > 0) barrier();  // all warps are done with the chunk before
    with_storage<Wide>(storage, [&](auto type) {
      place.template stage<decltype(type)>(staged, x, tile, first, count, team.threads());
    });
    wait_for_copies();
    barrier();
    const Columns columns = {first * place.columns_per_unit,
                             (first + count) * place.columns_per_unit};
#pragma unroll 1
    for (uint32_t s = 0; s < team.each; ++s) {
      uint32_t next = progress.next(s), run_end = progress.run_end(s);
      const uint32_t inner = strip_offset<V>(lists, team, group, s);
      const auto load_entry = [&](uint32_t entry, bool there) {
        return load_weights<Wide, V>(values, uint64_t(entry) * lists.v + inner, storage, there);
      };
      while (true) {
        each_batch(lists, columns, next, run_end, load_entry,
                   [&](const Batch& batch, const Weights<Wide, V>& weights) {
                     const uint32_t offset = place.offset(shared, batch.column, first);
                     with_strip<Wide, V>(sums, s, [&](auto& rows) {
                       multiply_batch<Wide, V>(rows, place, batch, weights, offset, inputs);
                     });
                   });
        if (next < run_end || run_end == progress.end(s)) break;
        end_run_of(s, run_end - progress.begin(s) == kRun ? Run::kFirst : Run::kMiddle);
        run_end = at_most(run_end + kRun, progress.end(s));
      }
      progress.set(s, next, run_end);
    }
  }
#pragma unroll 1
  for (uint32_t s = 0; s < team.each; ++s) {
    if (progress.end(s) - progress.begin(s) > run) end_run_of(s, Run::kLast);
  }
  finish_block<Wide, V>(sums, place, tile, team, group, storage, ends, shared);
}

template <typename Wide, int V, typename Place>
void launch_product(const Place& place, const Capacity& capacity, const Lists& lists,
                    Storage storage, const void* x, const void* values, const Ends& ends,
                    Stream stream) {
  const uint64_t tiles = tiles_of(place);
  if (tiles == 0) return;
  const Team team =
      choose_team<Wide>(lists.rows, V, tiles, capacity.processors, exchange_room<Place>(capacity));
  launch(product_kernel<Wide, V, Place>, uint32_t(tiles * team.groups), team.threads(),
         shared_bytes<Wide>(place, team, V), stream, place, lists, team, x, values, storage, ends);
}

// An implicit product: nothing of the unfolded input is ever in global memory.
inline void sparse_conv2d(const Window& window, const Lists& lists, Storage storage, const void* x,
                          const void* values, const Ends& ends, Stream stream) {
  with_strips(storage, lists.v, [&](auto zero, auto rows) {
    using Wide = decltype(zero);
    const Capacity capacity = capacity_of(product_kernel<Wide, rows(), Planes>);
    const Planes place = place_planes<Wide>(window, capacity.bytes);
    if (place.chunk > 0) {
      launch_product<Wide, rows()>(place, capacity, lists, storage, x, values, ends, stream);
      return;
    }
    const Capacity other = capacity_of(product_kernel<Wide, 1, Gathered>);
    launch_product<Wide, 1>(place_gathered<Wide>(window, other.bytes), other, lists, storage, x,
                            values, ends, stream);
  });
}

// A convolution's product with one tap, the features innermost in memory.
inline void sparse_matmul(uint64_t tokens, const Lists& lists, Storage storage, const void* x,
                          const void* values, const Ends& ends, Stream stream) {
  with_strips(storage, lists.v, [&](auto zero, auto rows) {
    using Wide = decltype(zero);
    const Capacity capacity = capacity_of(product_kernel<Wide, rows(), Tokens>);
    const Tokens place = place_tokens<Wide>(tokens, lists.length, lists.rows, capacity.bytes);
    launch_product<Wide, rows()>(place, capacity, lists, storage, x, values, ends, stream);
  });
}

}  // namespace issp
