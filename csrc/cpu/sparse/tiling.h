// How an image is cut into tiles, and where in a tile a tap finds its pixel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "checks_products.h"
#include "cpu/sparse/sparse_kernels.h"

namespace issp {

// A register block is `rows` x `segment` vectors of output pixels; a unit is one of them, a tile
// serves a few units that lie one below the other, so that rows which two of them see are copied
// once. Tile rows and columns whose taps are `stride` apart lie together, one phase after the
// other: what a register block reads for one tap is then contiguous.
struct Tiling {
  // kSegments: lane l of vector j holds column segment * l + j. kFlat: one tap, so rows mean
  // nothing and an image is a run of pixels, cut into rows of `lanes`. kTokens: the same run with
  // the channels innermost in memory.
  enum Order { kSegments, kFlat, kTokens } order;
  int64_t lanes, segment, rows;
  int64_t max_rows;      // `rows` if no threads waited: what bits may depend on
  int64_t across, down;  // units over the width and the height of an image
  int64_t units_per_tile;
  int64_t channels;    // of x in a tile: all of them, or those of a run
  Pair phases, reach;  // of rows and columns: stride, and how far taps go beyond the unit's own
  int64_t row_stride, phase_rows, channel_stride;  // in elements, but for phase_rows

  int64_t units(const Geometry& by) const { return by.batch * across * down; }
  int64_t tile_size() const { return channels * channel_stride; }
  int64_t block_size() const { return rows * segment * lanes; }

  // Rows of a unit's register block: the last one of an image may have fewer.
  int64_t rows_of(const Geometry& by, int64_t unit) const {
    return std::min(rows, height(by) - unit % down * rows);
  }
  int64_t height(const Geometry& by) const {
    return order == kSegments ? by.size[0] : (pixels(by) + lanes - 1) / lanes;
  }
  static int64_t pixels(const Geometry& by) { return by.size[0] * by.size[1]; }

  // Cuts a tile to `most` channels and `most_units` units, and sets the strides that follow.
  void cut(const Geometry& by, int64_t most, int64_t most_units) {
    channels = std::max<int64_t>(1, std::min(most, by.channels));
    units_per_tile = most_units;
    phase_rows = units_per_tile * rows + reach[0];
    // An odd number of lines: channels whose planes are a multiple of 4 KB apart would share the
    // same few sets of the L1 cache.
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

constexpr int64_t kTileBudget = 256 << 10;  // of 2 MB of L2; x, weights and results want the rest
// A tile that is as good as in the L1 cache. Its 48 KB lose less to a quarter of the loads from L2
// than to sums that are carried more often.
constexpr int64_t kL1Budget = 64 << 10;

inline bool is_pointwise(const Geometry& by) {
  return by.taps() == 1 && by.stride == Pair{1, 1} && by.padding == Pair{0, 0} &&
         by.upsample == Pair{1, 1} && by.size == by.input;
}

// The segment whose units cover the width with the fewest vectors, halo included in part.
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

inline int64_t parts_of(int64_t whole, int64_t part) {
  return (whole + part - 1) / part;
}

// Rows of a register block: about as many as registers allow, such that the last block of an image
// is not much shorter than the others, and that there are `wanted` blocks.
inline int64_t choose_rows(int64_t height, int64_t most, int64_t wanted) {
  height = std::max<int64_t>(1, height);
  most = std::min({most, height, parts_of(height, std::max<int64_t>(1, wanted))});
  int64_t best = most;
  for (int64_t rows = most; rows >= 1 && rows >= most * 3 / 4; --rows) {
    if (parts_of(height, rows) * rows < parts_of(height, best) * best) best = rows;
  }
  return best;
}

// Without rows and columns a tile is as narrow as one likes: where one of fewer rows holds all
// channels in L1, it beats a full register block whose every load comes from L2. Measured on 256
// channels at 90 %: 1.4 times. Below three rows the weights cost more loads than the pixels.
template <typename Real>
int64_t pointwise_rows(const Geometry& by, int64_t most, int64_t lanes) {
  const int64_t row = std::max<int64_t>(1, by.channels * lanes * int64_t(sizeof(Real)));
  const int64_t fit = kL1Budget / row;
  return fit >= 3 ? std::min(fit, most) : most;
}

// log: log2 of the rows of the weight that share a load (0, 1, 2). num_threads: threads that wait
// for work, 1 where the cut must not depend on them.
template <typename Real>
Tiling choose_tiling(const SparseKernels<Real>& kernels, const Geometry& by, int log, bool tokens,
                     int64_t num_threads) {
  Tiling t;
  t.lanes = kernels.lanes;
  t.order = tokens ? Tiling::kTokens : is_pointwise(by) ? Tiling::kFlat : Tiling::kSegments;
  t.phases = by.stride;
  for (int i = 0; i < 2; ++i) t.reach[i] = (by.kernel[i] - 1) * by.dilation[i] / by.stride[i];
  t.segment = t.order == Tiling::kSegments ? choose_segment(kernels, log, by, t.reach[1]) : 1;
  const int64_t height = t.height(by);
  t.across = t.order != Tiling::kSegments ? 1 : parts_of(by.size[1], t.segment * t.lanes);
  t.row_stride = t.phases[1] * (t.segment + t.reach[1]) * t.lanes;
  const int64_t wanted = parts_of(num_threads, std::max<int64_t>(1, by.batch * t.across));
  int64_t most = kernels.rows[log][t.segment - 1];
  if (t.order != Tiling::kSegments) most = pointwise_rows<Real>(by, most, t.lanes);
  t.max_rows = choose_rows(height, most, 1);
  t.rows = choose_rows(height, t.max_rows, wanted);
  t.down = parts_of(height, t.rows);
  const int64_t row_bytes =
      std::max<int64_t>(1, by.channels * t.phases[0] * t.row_stride) * int64_t(sizeof(Real));
  // A tile of several units saves the rows that two of them see; without such rows it only fills
  // L2.
  const int64_t rows_left = t.reach[0] ? kTileBudget / row_bytes - t.reach[0] : 0;
  t.cut(by, by.channels, std::clamp<int64_t>(rows_left / t.rows, 1, std::max<int64_t>(1, t.down)));
  if (t.tile_size() > INT32_MAX) {
    refuse("a tile of ", by.channels, " channels does not fit 2^31 elements: split the channels");
  }
  return t;
}

}  // namespace issp
