// Where the tokens and inputs of a matrix product lie: the features of a token are neighbours in
// memory, while a warp's lanes are 32 tokens. Both ways lead through shared memory, whose pitch is
// odd: inputs are turned as they are staged, results (and gradients) are exchanged half of a
// thread's tokens at a time, so that the lanes of a warp write 32 neighbouring features.
#pragma once

#include <stdexcept>

#include "product.cuh"

namespace issp {

struct TokenTile {
  uint64_t first;
};

struct Tokens {
  uint64_t tokens;
  uint32_t inputs, rows, tile_tokens;
  uint32_t units, chunk, columns_per_unit;  // a unit is a feature

  template <typename Wide>
  ISSP_DEVICE TokenTile tile(uint32_t number) const {
    return {uint64_t(number) * kTilePixels<Wide>};
  }
  ISSP_DEVICE void prepare(Shared, uint32_t) const {}
  template <typename Wide>
  ISSP_DEVICE Staged<Wide> staged(Shared shared) const {
    return {shared};
  }
  ISSP_DEVICE uint32_t pitch() const { return tile_tokens + 1; }
  ISSP_DEVICE uint32_t offset(Shared, uint32_t column, uint32_t first) const {
    return (column - first) * pitch();
  }
  ISSP_DEVICE uint32_t base() const { return lane(); }
  ISSP_DEVICE static uint32_t step(uint32_t) { return 0; }
  ISSP_DEVICE static constexpr uint32_t side_step(uint32_t j) { return 32 * j; }

  // Neighbouring threads load neighbouring features, and the next token behind the last of them.
  template <typename T>
  ISSP_DEVICE void stage(Staged<typename T::Wide> to, const void* x, TokenTile tile, uint32_t first,
                         uint32_t count, uint32_t threads) const {
    const uint32_t tokens_on = threads / count, features_on = threads - tokens_on * count;
    uint32_t token = thread() / count, feature = thread() - token * count;
    while (token < tile_tokens) {
      const uint64_t at = tile.first + token;
      fetch<T>(to.from(feature * pitch() + token), x, at * inputs + first + feature, at < tokens);
      token += tokens_on;
      feature += features_on;
      if (feature >= count) feature -= count, ++token;
    }
  }
};

// Tokens of a thread that are exchanged at a time.
template <typename Wide>
constexpr uint32_t kRound = kPixels<Wide> / 2;
template <typename Wide>
constexpr uint32_t kExchangePitch = 32 * kRound<Wide> + 1;

// Four tokens of a row, which a thread exchanges at a time: loads of several are on their way.
struct Exchanged {
  uint32_t place[4];  // in shared memory
  uint64_t at[4];     // among the results
  bool inside[4];
};

// Calls body(row, its elements) for every row and token of a round; the lanes of a warp have
// neighbouring rows.
template <typename Wide, typename Body>
ISSP_DEVICE void each_exchanged(const Tokens& place, TokenTile tile, uint32_t first_row,
                                uint32_t rows, uint32_t round, const Team& team, const Body& body) {
  for (uint32_t token = warp(); token < 32 * kRound<Wide>; token += 4 * team.warps) {
    for (uint32_t row = lane(); row < rows; row += 32) {
      Exchanged found;
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) {
        const uint32_t mine = token + k * team.warps;
        const uint64_t at = tile.first + round * 32 * kRound<Wide> + mine;
        found.place[k] = row * kExchangePitch<Wide> + mine;
        found.at[k] = at * place.rows + first_row + row;
        found.inside[k] = at < place.tokens && first_row + row < place.rows;
      }
      body(first_row + row, found);
    }
  }
}

template <typename Wide>
Tokens place_tokens(uint64_t tokens, uint32_t inputs, uint32_t rows, uint32_t bytes) {
  const uint32_t room = bytes / ((kTilePixels<Wide> + 1) * uint32_t(sizeof(Wide)));
  return {tokens, inputs, rows, kTilePixels<Wide>, inputs, even_chunk(inputs, room), 1};
}

}  // namespace issp
