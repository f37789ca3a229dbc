// How a product is shared out over a device.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "launch.cuh"
#include "product_image.cuh"
#include "product_tokens.cuh"

namespace issp {

// Bytes of shared memory that let two blocks run on a processor.
struct Capacity {
  uint32_t bytes, processors;
};

template <typename Kernel>
Capacity capacity_of(Kernel kernel) {
  return once_per_device(kernel, [](auto asked) -> Capacity {
    const Room room = room_of_device();
    const uint32_t half = room.per_processor / 2;
    const uint32_t own = half > room.reserved_per_block ? half - room.reserved_per_block : 0;
    const uint32_t bytes = std::min(own, room.per_block);
    if (blocks_per_processor(asked, kProductThreads, bytes) == 0) {
      throw std::runtime_error("the device has not the registers or the shared memory of a block");
    }
    return {bytes, room.processors};
  });
}

// Bytes of shared memory that a block of a team exchanges tokens through.
template <typename Wide>
uint32_t exchange_bytes(const Team& team, uint32_t strip_rows) {
  return team.warps * team.each * strip_rows * kExchangePitch<Wide> * uint32_t(sizeof(Wide));
}

// As many rows per block as leave three blocks for every two processors, which have room for four:
// inputs are staged once per block.
// exchanged: bytes within which a block's rows must be exchanged.
template <typename Wide>
Team choose_team(uint32_t rows, uint32_t strip_rows, uint64_t tiles, uint32_t processors,
                 uint32_t exchanged) {
  Team team = {kProductWarps, kWarpRows / strip_rows, 0, rows / strip_rows};
  const auto groups = [&] { return parts_of_size(team.strips, uint64_t(team.warps) * team.each); };
  const auto idle = [&] { return 2 * tiles * groups() < 3 * uint64_t(processors); };
  const auto crowded = [&] { return exchange_bytes<Wide>(team, strip_rows) > exchanged; };
  while (team.each > 1 && (idle() || crowded() || team.strips <= team.warps * team.each / 2)) {
    team.each /= 2;
  }
  while (team.warps > 1 && (crowded() || (idle() && team.strips > team.warps / 2))) team.warps /= 2;
  team.groups = groups();
  if (tiles * team.groups > 2147483647u) {
    throw std::runtime_error("the product has more than 2^31 tiles: cut the batch into parts");
  }
  return team;
}

// Calls body(wide, strip rows) with the sums' type and the number of rows per strip, as constants:
// 8 or 4 where they divide v, else 1; so 16 rows are two strips that share positions, staged inputs
// and cache lines. float64 has strips of one row alone.
template <typename Body>
void with_strips(Storage storage, uint32_t v, const Body& body) {
  if (storage == Storage::kFloat64) return body(double(), std::integral_constant<int, 1>());
  if (v % 8 == 0) return body(float(), std::integral_constant<int, 8>());
  if (v % 4 == 0) return body(float(), std::integral_constant<int, 4>());
  return body(float(), std::integral_constant<int, 1>());
}

inline uint64_t tiles_of(const Pixels& place) {
  return uint64_t(place.window.batch) * place.tiles[0] * place.tiles[1];
}
inline uint64_t tiles_of(const Tokens& place) {
  return (place.tokens + place.tile_tokens - 1) / place.tile_tokens;
}

// Bytes of shared memory that a chunk of inputs takes.
template <typename Wide>
uint32_t staged_bytes(const Planes& place) {
  return place.taps * 4 + place.chunk * place.plane * uint32_t(sizeof(Wide));
}
template <typename Wide>
uint32_t staged_bytes(const Gathered& place) {
  return place.chunk * place.tile_pixels * uint32_t(sizeof(Wide));
}
template <typename Wide>
uint32_t staged_bytes(const Tokens& place) {
  return place.chunk * (place.tile_tokens + 1) * uint32_t(sizeof(Wide));
}

// Of a kernel; tokens are exchanged through what the inputs leave.
template <typename Wide, typename Place>
uint32_t shared_bytes(const Place& place, const Team& team, uint32_t strip_rows) {
  const uint32_t staged = staged_bytes<Wide>(place);
  if (!std::is_same_v<Place, Tokens>) return staged;
  return std::max(staged, exchange_bytes<Wide>(team, strip_rows));
}
template <typename Place>
uint32_t exchange_room(const Capacity& capacity) {
  return std::is_same_v<Place, Tokens> ? capacity.bytes : ~0u;
}

}  // namespace issp
