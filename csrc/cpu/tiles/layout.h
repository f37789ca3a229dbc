// The tile layout of an image: bfloat16 [batch, height + 2, planes + 1, pitch, 2]. Channels lie in
// pairs, a plane is a row of pixels of one pair, and the image row is outermost, so that a stripe
// of rows is contiguous. Plane 0 of every row, the rows above and below the image and the pixels
// from `width` on are zeros: they are the padding of a convolution and what padded entries read.
#pragma once

#include <cstdint>

namespace issp {

constexpr int64_t kTilePixels = 16;   // pixels of a tile, one 64-byte line of a plane
constexpr int64_t kTileEntries = 16;  // entries of a K tile

inline int64_t tiles_of(int64_t width) {
  return (width + kTilePixels - 1) / kTilePixels;
}

struct TileLayout {
  int64_t batch, channels, height, width;

  int64_t planes() const { return (channels + 1) / 2; }
  // At least one line of zeros behind the pixels: the right halo of a plane and the left halo of
  // the next. A number of lines that 8 divides would map the planes to few sets of a cache.
  int64_t pitch() const {
    const int64_t lines = tiles_of(width) + 1;
    return kTilePixels * (lines % 8 ? lines : lines + 1);
  }
  int64_t plane_bytes() const { return 4 * pitch(); }
  int64_t row_bytes() const { return plane_bytes() * (planes() + 1); }
  int64_t image_bytes() const { return row_bytes() * (height + 2); }
  // Of pixel 0 of plane 0 in row y, -1 <= y <= height.
  int64_t row(int64_t image, int64_t y) const {
    return image * image_bytes() + (y + 1) * row_bytes();
  }
  bool operator==(const TileLayout& other) const {
    return batch == other.batch && channels == other.channels && height == other.height &&
           width == other.width;
  }
};

}  // namespace issp
