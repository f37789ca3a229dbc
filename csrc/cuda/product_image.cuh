// Where a convolution's pixels and inputs lie: 16 x 16 pixels of the result are a block's tile.
//
// A warp's lanes are 8 x 4 pixels, its thread's further pixels follow at distances of 8 and 4:
// whole 32-byte sectors of results and gradients are written and read at once, 48 and 64 columns
// are whole tiles, and 3x3 reads 18 x 18 inputs for 256 pixels.
#pragma once

#include <stdexcept>

#include "product.cuh"

namespace issp {

// A convolution as issp/ops/schemas/sparse.py has it; [0] is y, [1] is x.
struct Window {
  uint32_t batch, channels, rows;
  uint32_t input[2], output[2], kernel[2], stride[2], dilation[2], upsample[2];
  int32_t padding[2];
};

constexpr uint32_t kTileWidth = 16, kTileSteps = 2;  // steps of 8 lanes
template <typename Wide>
constexpr uint32_t kTileHeight = kTilePixels<Wide> / kTileWidth;

// First pixel of a tile.
struct ImageTile {
  uint32_t image, top, left;
};

struct Pixels {
  Window window;
  uint32_t tiles[2];

  template <typename Wide>
  ISSP_DEVICE ImageTile tile(uint32_t number) const {
    const uint32_t line = number / tiles[1];
    return {line / tiles[0], line % tiles[0] * kTileHeight<Wide>, number % tiles[1] * kTileWidth};
  }
  ISSP_DEVICE uint64_t channel_pixels() const {
    return uint64_t(window.input[0]) * window.input[1];
  }
  // Where a position of the spread input lies in the input; false where there is a zero.
  ISSP_DEVICE bool find(uint32_t axis, int32_t at, uint32_t& found) const {
    if (at < 0) return false;
    const uint32_t spread = window.upsample[axis];
    found = spread == 1 ? uint32_t(at) : uint32_t(at) / spread;
    return found * spread == uint32_t(at) && found < window.input[axis];
  }
  ISSP_DEVICE static uint32_t pixel_row(uint32_t lane, uint32_t j) {
    return lane / 8 + 4 * (j / kTileSteps);
  }
  ISSP_DEVICE static uint32_t pixel_column(uint32_t lane, uint32_t j) {
    return lane % 8 + 8 * (j % kTileSteps);
  }
  // This thread's pixel j of the result; false behind the edges.
  ISSP_DEVICE bool find_pixel(ImageTile tile, uint32_t j, uint64_t& found) const {
    const uint32_t y = tile.top + pixel_row(lane(), j), x = tile.left + pixel_column(lane(), j);
    found = uint64_t(y) * window.output[1] + x;
    return y < window.output[0] && x < window.output[1];
  }
  ISSP_DEVICE uint64_t result_pixels() const {
    return uint64_t(window.output[0]) * window.output[1];
  }
  // First element of a row of the result.
  ISSP_DEVICE uint64_t row_start(ImageTile tile, uint32_t row) const {
    return (uint64_t(tile.image) * window.rows + row) * result_pixels();
  }
};

// The usual place: the inputs of a tile as planes with their halo, zeros written where there is no
// input, so that every kernel, padding, dilation and upsampling is an offset of a tap from a table.
// A stride sorts rows and columns by their remainder: neighbouring pixels stay neighbours and no
// two lanes want the same bank, which the pitch, an odd multiple of 8, sees to.
struct Planes : Pixels {
  uint32_t phase[2];  // rows and columns of the same remainder
  uint32_t pitch, plane, taps;
  uint32_t units, chunk, columns_per_unit;  // a unit is a channel

  ISSP_DEVICE void prepare(Shared shared, uint32_t threads) const {
    for (uint32_t tap = thread(); tap < taps; tap += threads) {
      const uint32_t y = tap / window.kernel[1] * window.dilation[0];
      const uint32_t x = tap % window.kernel[1] * window.dilation[1];
      const uint32_t row = y % window.stride[0] * phase[0] + y / window.stride[0];
      shared.set(tap, row * pitch + x % window.stride[1] * phase[1] + x / window.stride[1]);
    }
  }
  template <typename Wide>
  ISSP_DEVICE Staged<Wide> staged(Shared shared) const {
    return {shared.from(taps)};
  }
  ISSP_DEVICE uint32_t offset(Shared shared, uint32_t column, uint32_t first) const {
    const uint32_t channel = column / taps;
    return (channel - first) * plane + shared.get(column - channel * taps);
  }
  ISSP_DEVICE uint32_t base() const { return lane() / 8 * pitch + lane() % 8; }
  ISSP_DEVICE uint32_t step(uint32_t j) const { return j / kTileSteps * 4 * pitch; }
  ISSP_DEVICE static constexpr uint32_t side_step(uint32_t j) { return j % kTileSteps * 8; }

  // The distance from the tile's first line to the one that lies at `line`.
  ISSP_DEVICE uint32_t unsorted(uint32_t axis, uint32_t line) const {
    if (window.stride[axis] == 1) return line;
    return line % phase[axis] * window.stride[axis] + line / phase[axis];
  }
  // Neighbouring threads fetch neighbours; all of a chunk is on its way at once.
  template <typename T>
  ISSP_DEVICE void stage(Staged<typename T::Wide> to, const void* x, ImageTile tile, uint32_t first,
                         uint32_t count, uint32_t threads) const {
    const uint32_t across = window.stride[1] * phase[1], all = window.stride[0] * phase[0] * across;
    const int32_t top = int32_t(tile.top * window.stride[0]) - window.padding[0];
    const int32_t left = int32_t(tile.left * window.stride[1]) - window.padding[1];
    const uint64_t channel = channel_pixels();
    for (uint32_t i = thread(); i < all; i += threads) {
      const uint32_t row = i / across, column = i - row * across;
      const uint32_t down = unsorted(0, row), right = unsorted(1, column);
      uint32_t y = 0, across_x = 0;
      const bool inside =
          find(0, top + int32_t(down), y) & find(1, left + int32_t(right), across_x);
      const uint64_t from = (uint64_t(tile.image) * window.channels + first) * channel +
                            uint64_t(y) * window.input[1] + across_x;
      fetch_run<T>(to.from(row * pitch + column), plane, x, from, channel, count, inside);
    }
  }
};

// Where not even one plane has room (a stride of 16, say): for each column the 256 inputs that the
// pixels see, gathered one by one. Any geometry fits; every column is staged.
struct Gathered : Pixels {
  uint32_t units, chunk, columns_per_unit;  // a unit is a column

  ISSP_DEVICE void prepare(Shared, uint32_t) const {}
  template <typename Wide>
  ISSP_DEVICE Staged<Wide> staged(Shared shared) const {
    return {shared};
  }
  ISSP_DEVICE uint32_t offset(Shared, uint32_t column, uint32_t first) const {
    return (column - first) * tile_pixels;
  }
  ISSP_DEVICE uint32_t base() const { return lane(); }
  ISSP_DEVICE static uint32_t step(uint32_t) { return 0; }
  ISSP_DEVICE static constexpr uint32_t side_step(uint32_t j) { return 32 * j; }

  template <typename T>
  ISSP_DEVICE void stage(Staged<typename T::Wide> to, const void* x, ImageTile tile, uint32_t first,
                         uint32_t count, uint32_t threads) const {
    const uint32_t taps = window.kernel[0] * window.kernel[1];
    for (uint32_t i = thread(); i < count * tile_pixels; i += threads) {
      const uint32_t unit = first + i / tile_pixels, slot = i % tile_pixels;
      const uint32_t channel = unit / taps, tap = unit % taps;
      const uint32_t down = tile.top + pixel_row(slot % 32, slot / 32);
      const uint32_t right = tile.left + pixel_column(slot % 32, slot / 32);
      uint32_t y = 0, across = 0;
      const bool inside = find(0, position(0, down, tap / window.kernel[1]), y) &
                          find(1, position(1, right, tap % window.kernel[1]), across);
      const uint64_t from = (uint64_t(tile.image) * window.channels + channel) * channel_pixels();
      fetch<T>(to.from(i), x, from + uint64_t(y) * window.input[1] + across, inside);
    }
  }
  ISSP_DEVICE int32_t position(uint32_t axis, uint32_t pixel, uint32_t tap) const {
    return int32_t(pixel * window.stride[axis] + tap * window.dilation[axis]) -
           window.padding[axis];
  }

  uint32_t tile_pixels;
};

// Positions must fit 31 bits, also those of pixels behind the edge of a tile.
inline void check_window(const Window& window) {
  for (int axis : {0, 1}) {
    const double last = (double(window.output[axis]) + 128) * window.stride[axis] +
                        double(window.kernel[axis]) * window.dilation[axis] +
                        std::abs(double(window.padding[axis]));
    if (last >= 2147483647.0) {
      throw std::runtime_error(
          "the convolution reaches positions beyond 2^31: cut the image into parts");
    }
  }
}

template <typename Wide>
Pixels place_pixels(const Window& window) {
  check_window(window);
  return {window,
          {parts_of_size(window.output[0], kTileHeight<Wide>),
           parts_of_size(window.output[1], kTileWidth)}};
}

// bytes: of shared memory that a block may have. A chunk of 0 says that no plane has room.
template <typename Wide>
Planes place_planes(const Window& window, uint32_t bytes) {
  Planes place = {};
  static_cast<Pixels&>(place) = place_pixels<Wide>(window);
  const uint64_t tile[2] = {kTileHeight<Wide>, kTileWidth};
  uint64_t lines[2];
  for (int axis : {0, 1}) {
    const uint64_t extent = (tile[axis] - 1) * window.stride[axis] +
                            uint64_t(window.kernel[axis] - 1) * window.dilation[axis] + 1;
    place.phase[axis] = parts_of_size(extent, window.stride[axis]);
    lines[axis] = uint64_t(place.phase[axis]) * window.stride[axis];
  }
  const uint64_t pitch = (lines[1] + 7) / 16 * 16 + 8, plane = lines[0] * pitch;
  const uint64_t taps = uint64_t(window.kernel[0]) * window.kernel[1];
  const uint64_t room = taps * 4 < bytes ? (bytes - taps * 4) / (plane * sizeof(Wide)) : 0;
  if (room == 0) return place;
  place.pitch = uint32_t(pitch);
  place.plane = uint32_t(plane);
  place.taps = place.columns_per_unit = uint32_t(taps);
  place.units = window.channels;
  place.chunk = even_chunk(place.units, room);
  return place;
}

template <typename Wide>
Gathered place_gathered(const Window& window, uint32_t bytes) {
  Gathered place = {};
  static_cast<Pixels&>(place) = place_pixels<Wide>(window);
  place.tile_pixels = kTilePixels<Wide>;
  place.units = window.channels * window.kernel[0] * window.kernel[1];
  place.columns_per_unit = 1;
  const uint32_t room = bytes / uint32_t(kTilePixels<Wide> * sizeof(Wide));
  place.chunk = even_chunk(place.units, room);
  return place;
}

}  // namespace issp
