// Divides the pixel tiles of a convolution, or the rows of a conversion, among the threads. Every
// tile is computed by one thread in an order of its own: the bits do not depend on their number.
#pragma once

#include <cstring>

#include "cpu/threads.h"
#include "cpu/tiles/checks.h"

namespace issp {

// Begins and ends the use of the kernels on this thread.
class TileScope {
 public:
  explicit TileScope(const TileKernels& kernels) : kernels_(kernels) { kernels_.begin(); }
  ~TileScope() { kernels_.end(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  const TileKernels& kernels_;
};

// Each thread gets about 10 us of work at least.
inline ThreadGroup tile_threads(double microseconds, int64_t parts) {
  const double most = std::min(double(all_threads().size), microseconds / 10);
  return {std::max<int64_t>(1, std::min(int64_t(most), parts))};
}

// Sets what the kernels do not write in a new image: the rows above and below, plane 0, and the
// pixels behind the last of every plane.
class ZeroFrame {
 public:
  ZeroFrame(const TileLayout& layout, char* data) : layout_(layout), data_(data) {}

  void outer_rows(int64_t image) const {
    std::memset(data_ + layout_.row(image, -1), 0, size_t(layout_.row_bytes()));
    std::memset(data_ + layout_.row(image, layout_.height), 0, size_t(layout_.row_bytes()));
  }
  void row(int64_t image, int64_t y) const {
    char* const row = data_ + layout_.row(image, y);
    std::memset(row, 0, size_t(layout_.plane_bytes()));
    const int64_t used = 4 * layout_.width, plane_bytes = layout_.plane_bytes();
    for (int64_t plane = 1; plane <= layout_.planes(); ++plane) {
      std::memset(row + plane * plane_bytes + used, 0, size_t(plane_bytes - used));
    }
  }
  // The last plane has a channel that no kernel writes pixel by pixel.
  void last_plane(int64_t image, int64_t y, int64_t x, int64_t count) const {
    std::memset(data_ + layout_.row(image, y) + layout_.planes() * layout_.plane_bytes() + 4 * x, 0,
                size_t(4 * count));
  }

 private:
  const TileLayout layout_;
  char* const data_;
};

class TiledConvRun {
 public:
  // frame: whether `out` is new and needs its zeros.
  TiledConvRun(const TileKernels& kernels, const TiledConv& conv, const char* x,
               const TileLayout& to, bool frame)
      : kernels_(kernels),
        conv_(conv),
        x_(x),
        to_(to),
        frame_(frame),
        row_(tiles_of(conv.from.width)) {}

  void operator()() const {
    const int64_t tiles = conv_.from.batch * conv_.from.height * row_;
    if (frame_) frame_outer_rows();
    if (!tiles) return;
    const double steps = double(tiles) * double(conv_.starts[conv_.blocks] + 2 * conv_.blocks);
    const ThreadGroup threads = tile_threads(steps * conv_.v / 16 * 0.02, tiles);
    threads.run([&](int64_t thread) {
      const TileScope scope(kernels_);
      run(tiles * thread / threads.size, tiles * (thread + 1) / threads.size);
    });
  }

 private:
  void frame_outer_rows() const {
    const ZeroFrame frame(to_, conv_.epilogue.out);
    for (int64_t image = 0; image < conv_.from.batch; ++image) frame.outer_rows(image);
  }

  void run(int64_t begin, int64_t end) const {
    const int group = kernels_.group[conv_.v / 32];
    PixelTile tiles[kMaxGroup];
    while (begin < end) {
      const int count = int(std::min<int64_t>(group, end - begin));
      for (int i = 0; i < count; ++i) tiles[i] = tile(begin + i);
      kernels_.convolve(conv_, tiles, count);
      begin += count;
    }
  }

  // Also writes the zeros behind the tile, in a new image.
  PixelTile tile(int64_t index) const {
    const int64_t x = index % row_ * kTilePixels, y = index / row_ % conv_.from.height;
    const int64_t image = index / row_ / conv_.from.height;
    const int64_t count = std::min(kTilePixels, conv_.from.width - x);
    const int64_t shuffle = conv_.epilogue.shuffle;
    if (frame_) frame_tile(image, y, x, count);
    return {x_ + conv_.from.row(image, y) + 4 * x, to_.row(image, y * shuffle) + 4 * x * shuffle,
            int(count)};
  }

  void frame_tile(int64_t image, int64_t y, int64_t x, int64_t count) const {
    const ZeroFrame frame(to_, conv_.epilogue.out);
    const int64_t shuffle = conv_.epilogue.shuffle;
    for (int64_t row = y * shuffle; row < (y + 1) * shuffle; ++row) {
      if (x + count == conv_.from.width) frame.row(image, row);
      if (shuffle > 1 && to_.channels % 2)
        frame.last_plane(image, row, x * shuffle, count * shuffle);
    }
  }

  const TileKernels& kernels_;
  const TiledConv& conv_;
  const char* const x_;
  const TileLayout to_;
  const bool frame_;
  const int64_t row_;  // tiles in a row
};

// Calls body(image, y) for every row, in parallel.
template <typename F>
void for_each_row(const TileLayout& layout, const TileKernels& kernels, const F& body) {
  const int64_t rows = layout.batch * layout.height;
  const double bytes = double(rows) * double(layout.row_bytes());
  const ThreadGroup threads = tile_threads(bytes * 1e-4, rows);
  threads.run([&](int64_t thread) {
    const TileScope scope(kernels);
    const int64_t end = rows * (thread + 1) / threads.size;
    for (int64_t row = rows * thread / threads.size; row < end; ++row) {
      body(row / layout.height, row % layout.height);
    }
  });
}

}  // namespace issp
