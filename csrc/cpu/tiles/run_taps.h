// Convolutions by taps: each thread computes the sums of the rows of pixels that its own rows need,
// and adds them up. A pixel is added up by one thread in an order of its own.
#pragma once

#include "cpu/tiles/run.h"

namespace issp {

class TapConvRun {
 public:
  // conv: of the weight whose rows are taps, its epilogue empty. row: without what differs by row.
  TapConvRun(const TileKernels& kernels, const TiledConv& conv, const char* x, const TapRow& row)
      : kernels_(kernels), conv_(conv), x_(x), row_(row) {
    row_.pitch = kTilePixels * (tiles_of(row.width) + 1);
    conv_.epilogue.plane_bytes = 4 * row_.pitch;
    conv_.epilogue.sums = true;
  }

  void operator()() {
    const int64_t height = conv_.from.height, rows = conv_.from.batch * height;
    if (!rows || !row_.width) return;
    const double steps = double(tiles_of(row_.width)) * conv_.starts[conv_.blocks] * conv_.v / 16;
    const ThreadGroup threads = tile_threads(double(rows) * steps * 0.02, rows);
    std::vector<float> sums(size_t(threads.size * row_.kernel * slot()));
    conv_.epilogue.out = reinterpret_cast<char*>(sums.data());
    threads.run([&](int64_t thread) {
      const TileScope scope(kernels_);
      run(rows * thread / threads.size, rows * (thread + 1) / threads.size,
          thread * row_.kernel * slot());
    });
  }

 private:
  // Floats of the sums of one row of pixels.
  int64_t slot() const { return conv_.epilogue.rows * row_.pitch; }

  // first: where the sums of this thread lie, one slot for every row of the kernel.
  void run(int64_t begin, int64_t end, int64_t first) const {
    const int64_t height = conv_.from.height, edge = row_.kernel / 2;
    int64_t image = -1, next = 0;  // the row whose sums are computed next
    for (int64_t index = begin; index < end; ++index) {
      const int64_t y = index % height;
      if (index / height != image) {
        image = index / height;
        next = std::max<int64_t>(0, y - edge);
      }
      for (; next <= std::min(height - 1, y + edge); ++next) {
        multiply(image, next, first + next % row_.kernel * slot());
      }
      TapRow row = row_;
      for (int64_t ky = 0; ky < row.kernel; ++ky) {
        const int64_t from = y + ky - edge;
        const bool inside = from >= 0 && from < height;
        const auto* sums = reinterpret_cast<const float*>(conv_.epilogue.out) + first;
        row.sums[ky] = inside ? sums + from % row.kernel * slot() : nullptr;
      }
      row.out += image * row.channels * row.plane + y * row.width;
      kernels_.add_taps(row);
    }
  }

  void multiply(int64_t image, int64_t y, int64_t to) const {
    const int group = kernels_.group[conv_.v / 32];
    PixelTile tiles[kMaxGroup];
    for (int64_t x = 0; x < row_.width;) {
      int count = 0;
      for (; count < group && x < row_.width; ++count, x += kTilePixels) {
        tiles[count] = {x_ + conv_.from.row(image, y) + 4 * x, 4 * (to + x + row_.kernel / 2),
                        int(std::min(kTilePixels, row_.width - x))};
      }
      kernels_.convolve(conv_, tiles, count);
    }
  }

  const TileKernels& kernels_;
  TiledConv conv_;
  const char* const x_;
  TapRow row_;
};

}  // namespace issp
