// How an image is divided into tiles, and where in a tile a tap finds its pixel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "checks_sparse.h"
#include "cpu/sparse/sparse_kernels.h"

namespace issp {

// A register block is `rows` x `segment` vectors of output pixels. A work unit is one register
// block of the result. A tile serves a few work units that are vertically adjacent, so that the
// rows which two of them read are copied once. Tile rows and columns that are `stride` apart are
// stored together, phase by phase: the pixels that a register block reads for one tap are then
// contiguous.
struct Tiling {
  // kSegments: lane l of vector j holds column segment * l + j. kFlat: for a single tap rows have
  // no meaning; an image is a sequence of pixels, divided into rows of `lanes`. kTokens: the same
  // sequence with the channels innermost in memory.
  enum Order { kSegments, kFlat, kTokens } order;
  int64_t lanes, segment, rows;
  int64_t max_rows;      // `rows` for one thread; the result may depend on it, not on `rows`
  int64_t across, down;  // work_units over the width and the height of an image
  int64_t work_units_per_tile;
  int64_t channels;    // of x in a tile: all, or one block of them
  Pair phases, reach;  // per axis: the stride; how far taps reach beyond the work unit
  int64_t row_stride, phase_rows, channel_stride;  // in elements; phase_rows in rows

  int64_t work_units(const Geometry& by) const { return by.batch * across * down; }
  int64_t tile_size() const { return channels * channel_stride; }
  int64_t block_size() const { return rows * segment * lanes; }

  // Rows of the register block of a work unit: the last block of an image may have fewer.
  int64_t rows_of(const Geometry& by, int64_t work_unit) const {
    return std::min(rows, height(by) - work_unit % down * rows);
  }
  int64_t height(const Geometry& by) const {
    return order == kSegments ? by.size[0] : (pixels(by) + lanes - 1) / lanes;
  }
  static int64_t pixels(const Geometry& by) { return by.size[0] * by.size[1]; }

  // Limits a tile to `max_channels` channels and `max_work_units` work units, and sets the strides.
  void limit(const Geometry& by, int64_t max_channels, int64_t max_work_units) {
    channels = std::max<int64_t>(1, std::min(max_channels, by.channels));
    work_units_per_tile = max_work_units;
    phase_rows = work_units_per_tile * rows + reach[0];
    // An odd number of cache lines: channels whose planes are a multiple of 4 KB apart would map to
    // the same few sets of L1.
    channel_stride = phases[0] * phase_rows * row_stride;
    if (channel_stride / lanes % 2 == 0) channel_stride += lanes;
  }

  // Offset into the tile of position (channel * kh + ky) * kw + kx of a row of the weight.
  int64_t offset(const Geometry& by, int64_t position) const {
    const int64_t tap = position % by.taps(), channel = position / by.taps();
    const Pair at = {tap / by.kernel[1] * by.dilation[0], tap % by.kernel[1] * by.dilation[1]};
    const int64_t row = at[0] % phases[0] * phase_rows + at[0] / phases[0];
    const int64_t column = at[1] % phases[1] * (segment + reach[1]) + at[1] / phases[1];
    return channel % channels * channel_stride + row * row_stride + column * lanes;
  }
};

constexpr int64_t kTileBudget = 256 << 10;  // of 2 MB of L2: x, weights and results need L2 too
// Tile budget 64 KB, above the 48 KB of L1: a quarter of the loads then come from L2. That costs
// less than a smaller tile, whose sums are stored and loaded more often.
constexpr int64_t kL1Budget = 64 << 10;

inline bool is_pointwise(const Geometry& by) {
  return by.taps() == 1 && by.stride == Pair{1, 1} && by.padding == Pair{0, 0} &&
         by.upsample == Pair{1, 1} && by.size == by.input;
}

// The segment whose work units cover the width with the fewest vectors; the halo counts a quarter.
template <typename Real>
int64_t choose_segment(const SparseKernels<Real>& kernels, int log, const Geometry& by,
                       int64_t reach) {
  int64_t best = 1;
  double least = 1e300;
  for (int64_t s = 1; s <= kernels.segment[log]; ++s) {
    const int64_t across = (by.size[1] + s * kernels.lanes - 1) / (s * kernels.lanes);
    const double cost = double(across) * (double(s) + 0.25 * double(reach));
    if (cost <= least) least = cost, best = s;
  }
  return best;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Rows of a register block: about as many as the registers allow, such that the last block of an
// image is not much shorter than the others and there are at least `wanted` blocks.
inline int64_t choose_rows(int64_t height, int64_t limit, int64_t wanted) {
  height = std::max<int64_t>(1, height);
  limit = std::min({limit, height, ceil_div(height, std::max<int64_t>(1, wanted))});
  int64_t best = limit;
  for (int64_t rows = limit; rows >= 1 && rows >= limit * 3 / 4; --rows) {
    if (ceil_div(height, rows) * rows < ceil_div(height, best) * best) best = rows;
  }
  return best;
}

// A pointwise tile may have any number of rows. A tile of fewer rows that holds all channels in L1
// is faster than a full register block that loads from L2 (1.4 times for 256 channels at 90 %
// sparsity). Below three rows, loading weights costs more than loading pixels.
template <typename Real>
int64_t pointwise_rows(const Geometry& by, int64_t limit, int64_t lanes) {
  const int64_t row = std::max<int64_t>(1, by.channels * lanes * int64_t(sizeof(Real)));
  const int64_t fit = kL1Budget / row;
  return fit >= 3 ? std::min(fit, limit) : limit;
}

// Refuses windows so wide that their tiles, full of zeros, take more memory or time than all of x
// and y. In double: the products may leave 64 bits.
inline void check_window_fits(const Geometry& by, const Tiling& t, double tiles, double rows) {
  const double row = double(t.phases[1]) * double(t.segment + t.reach[1]) * double(t.lanes);
  const double plane = double(t.phases[0]) * (rows + double(t.reach[0])) * row;
  const double copied = tiles * double(std::max<int64_t>(1, by.channels)) * plane;
  const double used =
      double(by.batch) * (double(by.channels) * double(by.input[0]) * double(by.input[1]) +
                          double(by.rows) * double(Tiling::pixels(by)));
  if (plane > double(1 << 30) || copied > std::max(double(1 << 30), 4096 * used)) {
    refuse("the window of the convolution is too wide for its image: use a smaller kernel, stride ",
           "or dilation, or a dense layer");
  }
}

inline Tiling::Order pixel_order(const Geometry& by, bool tokens) {
  return tokens ? Tiling::kTokens : is_pointwise(by) ? Tiling::kFlat : Tiling::kSegments;
}

// log: log2 of the rows of the weight that share a load (0, 1, 2). num_threads: threads that need
// work; 1 where the tiling must not depend on them.
template <typename Real>
Tiling choose_tiling(const SparseKernels<Real>& kernels, const Geometry& by, int log,
                     Tiling::Order order, int64_t num_threads) {
  Tiling t;
  t.lanes = kernels.lanes;
  t.order = order;
  t.phases = by.stride;
  for (int i = 0; i < 2; ++i) t.reach[i] = (by.kernel[i] - 1) * by.dilation[i] / by.stride[i];
  t.segment = t.order == Tiling::kSegments ? choose_segment(kernels, log, by, t.reach[1]) : 1;
  const int64_t height = t.height(by);
  t.across = t.order != Tiling::kSegments ? 1 : ceil_div(by.size[1], t.segment * t.lanes);
  check_window_fits(by, t, 0, 1);
  t.row_stride = t.phases[1] * (t.segment + t.reach[1]) * t.lanes;
  const int64_t wanted = ceil_div(num_threads, std::max<int64_t>(1, by.batch * t.across));
  int64_t max_rows = kernels.rows[log][t.segment - 1];
  if (t.order != Tiling::kSegments) max_rows = pointwise_rows<Real>(by, max_rows, t.lanes);
  t.max_rows = choose_rows(height, max_rows, 1);
  t.rows = choose_rows(height, t.max_rows, wanted);
  t.down = ceil_div(height, t.rows);
  const int64_t row_bytes =
      std::max<int64_t>(1, by.channels * t.phases[0] * t.row_stride) * int64_t(sizeof(Real));
  // Several work units in a tile save copies of the rows that two of them read. Without such rows
  // they would only fill L2.
  const int64_t rows_left = t.reach[0] ? kTileBudget / row_bytes - t.reach[0] : 0;
  t.limit(by, by.channels,
          std::clamp<int64_t>(rows_left / t.rows, 1, std::max<int64_t>(1, t.down)));
  const double columns = double(by.batch) * double(t.across);
  check_window_fits(by, t, columns * double(ceil_div(t.down, t.work_units_per_tile)),
                    double(t.work_units_per_tile * t.rows));
  if (t.tile_size() > INT32_MAX) {
    refuse("a tile of ", by.channels, " channels does not fit 2^31 elements: split the channels");
  }
  return t;
}

}  // namespace issp
