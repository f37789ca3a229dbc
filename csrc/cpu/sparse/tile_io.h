// Fills tiles from a tensor and writes results to a tensor, for every pixel order and dtype.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/sparse/tiling.h"
#include "semantics.h"

namespace issp {

// Memory of one thread that is kept from call to call, so that its pages are mapped and cached.
template <typename Real>
class ThreadScratch {
 public:
  Real* get(int64_t count) {
    if (count > capacity_) {
      memory_.reset(static_cast<Real*>(
          std::aligned_alloc(64, (size_t(count) * sizeof(Real) + 63) / 64 * 64)));
      capacity_ = memory_ ? count : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(Real* p) const { std::free(p); }
  };
  std::unique_ptr<Real[], Free> memory_;
  int64_t capacity_ = 0;
};

// Rounds to the storage type, to nearest even; handles infinities and NaN.
template <typename T>
inline typename T::Bits rounded(typename T::Wide value) {
  if constexpr (sizeof(typename T::Bits) == 2) {
    if (value != value) return typename T::Bits(kInfinity<T> | (kInfinity<T> >> 1));
    if (kInfinity<T> == kInfinity<Float16> && (value >= 65520.0f || value <= -65520.0f)) {
      return typename T::Bits(kInfinity<T> | (value < 0 ? Limits<T>::sign : 0));
    }
  }
  return narrow(T{}, value);
}

template <typename T>
inline void widen_array(const typename T::Bits* from, int64_t count, typename T::Wide* to) {
  if (count == 0) return;  // memcpy takes no null pointer, which an empty tensor has
  if constexpr (sizeof(typename T::Bits) == sizeof(typename T::Wide)) {
    std::memcpy(to, from, size_t(count) * sizeof(*to));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(T{}, from[i]);
  }
}

template <typename T>
inline void round_array(const typename T::Wide* from, int64_t count, typename T::Bits* to) {
  if (count == 0) return;
  if constexpr (sizeof(typename T::Bits) == sizeof(typename T::Wide)) {
    std::memcpy(to, from, size_t(count) * sizeof(*to));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = rounded<T>(from[i]);
  }
}

// The position of a work unit: one register block of the result.
struct TileCoord {
  int64_t image, column, row;  // row counts register rows: pixels / lanes in kFlat and kTokens
};

// A work unit in a tile: where its first row is, its rows, its position in the result.
template <typename Real>
struct WorkUnit {
  const Real* tile;
  int64_t rows;
  TileCoord at;
};

// What is applied to the sums before they are stored.
struct Epilogue {
  Activation activation;
  double scale;
  const void* residual;  // null: none
  int64_t shuffle;
};

// The result of a convolution and a PixelShuffle. `to` is where a pixel would be without the
// latter.
template <typename Bits>
struct ShuffledResult {
  const Geometry& by;
  int64_t factor;
  Bits* y;

  // Stores the consecutive pixels value(0) .. value(count - 1) of one row of the weight.
  template <typename Value>
  void store(int64_t to, int64_t count, const Value& value) const {
    const int64_t width = by.size[1], pixels = Tiling::pixels(by);
    const int64_t channel = to / pixels / (factor * factor);  // of all images
    const int64_t phase = to / pixels % (factor * factor);
    for (int64_t pixel = to % pixels, done = 0; done < count;) {
      const int64_t column = pixel % width, end = std::min(count, done + width - column);
      const int64_t row = (channel * by.size[0] + pixel / width) * factor + phase / factor;
      Bits* at = y + (row * width + column) * factor + phase % factor;
      pixel += end - done;
      for (; done < end; ++done, at += factor) *at = value(done);
    }
  }
};

inline TileCoord tile_coord(const Tiling& t, int64_t work_unit) {
  const int64_t image = work_unit / (t.across * t.down), rest = work_unit % (t.across * t.down);
  return {image, rest / t.down * t.segment * t.lanes, rest % t.down * t.rows};
}

template <typename T>
class TileReader {
 public:
  using Real = typename T::Wide;
  using Bits = typename T::Bits;

  // `by` and `tiling` describe how x is read; scratch has line_size() elements.
  TileReader(const SparseKernels<Real>& kernels, const Geometry& by, const Tiling& tiling,
             const void* x, Real* scratch)
      : kernels_(kernels),
        by_(by),
        t_(tiling),
        x_(static_cast<const Bits*>(x)),
        line_(scratch),
        dense_(tiling.phases == Pair{1, 1} && by.upsample == Pair{1, 1}) {}

  static int64_t line_size(const Geometry& by, const Tiling& t) {
    if (t.order == Tiling::kTokens) return t.lanes * by.channels;
    return 2 * line_count(t);
  }

  // Copies the pixels of channels first..last - 1 that the work units of a tile read. `at`: the
  // first work unit. `rows`: output rows of all of them.
  void fill(const TileCoord& at, int64_t rows, int64_t first, int64_t last, Real* tile) const {
    if (t_.order == Tiling::kTokens) return fill_tokens(at, rows, first, last, tile);
    const int64_t plane = by_.input[0] * by_.input[1], count = last - first;
    const Bits* const from = x_ + (at.image * by_.channels + first) * plane;
    if (t_.order == Tiling::kFlat) return fill_flat(from, at, rows, count, tile);
    if (dense_ && is_interior(at.column)) return planes_to_segments(from, at, rows, count, tile);
    std::fill(line_, line_ + line_size(by_, t_), Real(0));
    for (int64_t c = 0; c < count; ++c) {
      fill_plane(from + c * plane, at, rows, tile + c * t_.channel_stride);
    }
  }

 private:
  void fill_flat(const Bits* from, const TileCoord& at, int64_t rows, int64_t channels,
                 Real* to) const {
    const int64_t plane = Tiling::pixels(by_), first = at.row * t_.lanes, count = rows * t_.lanes;
    if (sizeof(Bits) == sizeof(Real) && first + count <= plane) {
      const auto* const in = reinterpret_cast<const Real*>(from) + first;
      return kernels_.copy(in, plane, channels, rows, to, t_.channel_stride);
    }
    const int64_t valid = std::min(count, plane - first);
    for (int64_t c = 0; c < channels; ++c, from += plane, to += t_.channel_stride) {
      widen_array<T>(from + first, valid, to);
      std::fill(to + valid, to + count, Real(0));
    }
  }

  // Number of columns of a tile row, in image order.
  static int64_t line_count(const Tiling& t) {
    return (t.segment * t.lanes + t.reach[1]) * t.phases[1];
  }

  // Reads rows directly from x; rows above and below the image are 0.
  void planes_to_segments(const Bits* from, const TileCoord& at, int64_t rows, int64_t channels,
                          Real* to) const {
    const int64_t top = at.row * by_.stride[0] - by_.padding[0], height = rows + t_.reach[0];
    const int64_t first = std::clamp<int64_t>(-top, 0, height);
    const int64_t last = std::clamp<int64_t>(by_.input[0] - top, first, height);
    for (int64_t c = 0; c < channels && last - first < height; ++c) {
      Real* const plane = to + c * t_.channel_stride;
      std::fill(plane, plane + first * t_.row_stride, Real(0));
      std::fill(plane + last * t_.row_stride, plane + height * t_.row_stride, Real(0));
    }
    const int64_t column = first_column(at.column), right = t_.reach[1] - left();
    const bool after = column + t_.segment * t_.lanes + right <= by_.input[1];
    const auto* const in = reinterpret_cast<const Real*>(from) + column;
    kernels_.to_segments[t_.segment - 1](
        in + (top + first) * by_.input[1], by_.input[1], by_.input[0] * by_.input[1], last - first,
        channels, left(), column >= left(), right, after, to + first * t_.row_stride, t_.row_stride,
        t_.channel_stride);
  }

  void fill_plane(const Bits* plane, const TileCoord& at, int64_t rows, Real* to) const {
    const int64_t top = at.row * by_.stride[0] - by_.padding[0], height = rows + t_.reach[0];
    for (int64_t phase = 0; phase < t_.phases[0]; ++phase) {
      for (int64_t i = 0; i < height; ++i) {
        const int64_t u = top + i * t_.phases[0] + phase;
        Real* const row = to + (phase * t_.phase_rows + i) * t_.row_stride;
        if (u < 0 || u % by_.upsample[0] || u / by_.upsample[0] >= by_.input[0]) {
          std::fill(row, row + t_.row_stride, Real(0));
        } else {
          fill_phases(plane + u / by_.upsample[0] * by_.input[1], at.column, row);
        }
      }
    }
  }

  // Columns left of the tile that the taps read; the rest of the reach is to the right.
  int64_t left() const { return std::clamp<int64_t>(by_.padding[1], 0, t_.reach[1]); }
  int64_t first_column(int64_t column) const { return column - by_.padding[1] + left(); }

  // Whether rows can be read directly from x: all columns of the tile exist, and on each side the
  // reach is either inside the image or all padding.
  bool is_interior(int64_t column) const {
    const int64_t first = first_column(column), last = first + t_.segment * t_.lanes;
    const int64_t right = t_.reach[1] - left();
    return sizeof(Bits) == sizeof(Real) && first >= 0 && last <= by_.input[1] &&
           (first >= left() || first == 0) &&
           (last + right <= by_.input[1] || last == by_.input[1]);
  }

  // The general case: lays out a row as the taps read it, then converts each phase.
  void fill_phases(const Bits* row, int64_t column, Real* out) const {
    const int64_t count = line_count(t_), vectors = t_.segment + t_.reach[1];
    read_line(row, column * by_.stride[1] - by_.padding[1], count);
    Real* const every = t_.phases[1] == 1 ? line_ : line_ + count;
    for (int64_t phase = 0; phase < t_.phases[1]; ++phase) {
      for (int64_t i = 0; every != line_ && i * t_.phases[1] + phase < count; ++i) {
        every[i] = line_[i * t_.phases[1] + phase];
      }
      kernels_.to_segments[t_.segment - 1](every, 0, 0, 1, 1, 0, false, t_.reach[1], true,
                                           out + phase * vectors * t_.lanes, 0, 0);
    }
  }

  // line[i] = the pixel at column left + i of the upsampled row. Columns outside the image stay 0:
  // all rows of a tile have the same columns.
  void read_line(const Bits* row, int64_t left, int64_t count) const {
    const int64_t up = by_.upsample[1];
    const int64_t begin = std::max<int64_t>(0, (left + up - 1) / up);
    const int64_t end = std::min(by_.input[1], (left + count + up - 1) / up);
    if (begin >= end || left + count <= 0) return;
    if (up == 1) return widen_array<T>(row + begin, end - begin, line_ + begin - left);
    for (int64_t i = begin; i < end; ++i) widen_array<T>(row + i, 1, line_ + i * up - left);
  }

  // Channels are innermost in x: transposes squares of tokens x channels.
  void fill_tokens(const TileCoord& at, int64_t rows, int64_t first, int64_t last,
                   Real* tile) const {
    const int64_t count = last - first, tokens = Tiling::pixels(by_);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = (at.row + r) * t_.lanes;
      const int64_t valid = std::min(t_.lanes, tokens - token);
      const Bits* const from = x_ + token * by_.channels + first;
      Real* const to = tile + r * t_.lanes;
      if (sizeof(Bits) == sizeof(Real) && valid == t_.lanes) {
        const auto* const in = reinterpret_cast<const Real*>(from);
        kernels_.gather_tokens(in, by_.channels, count, to, t_.channel_stride);
        continue;
      }
      for (int64_t l = 0; l < valid; ++l) {
        widen_array<T>(from + l * by_.channels, count, line_ + l * count);
      }
      std::fill(line_ + valid * count, line_ + t_.lanes * count, Real(0));
      kernels_.gather_tokens(line_, count, count, to, t_.channel_stride);
    }
  }

  const SparseKernels<Real>& kernels_;
  const Geometry& by_;
  const Tiling& t_;
  const Bits* x_;
  Real* line_;
  bool dense_;  // neither stride nor upsampling
};

// Writes register blocks to the result, one row of the weight after the other, or all for tokens.
template <typename T>
class TileWriter {
 public:
  using Real = typename T::Wide;
  using Bits = typename T::Bits;

  // scratch has line_size() elements.
  TileWriter(const SparseKernels<Real>& kernels, const Geometry& by, const Tiling& tiling,
             const Epilogue& epilogue, void* y, Real* scratch)
      : kernels_(kernels),
        by_(by),
        t_(tiling),
        activation_(int(epilogue.activation)),
        scale_(Real(epilogue.scale)),
        residual_(static_cast<const Bits*>(epilogue.residual)),
        y_(static_cast<Bits*>(y)),
        shuffled_{by, epilogue.shuffle, y_},
        line_(scratch) {}

  static int64_t line_size(const Geometry& by, const Tiling& t) {
    return 2 * (t.order == Tiling::kTokens ? t.lanes * by.rows : t.block_size());
  }

  // The address to which the kernel may write row 0 of the weight; the other rows are
  // Tiling::pixels apart. Null where the sums need an epilogue, rounding or clipping.
  Real* direct(const TileCoord& at, int64_t rows) const {
    const bool flat = t_.order == Tiling::kFlat;
    const bool is_full = flat ? (at.row + rows) * t_.lanes <= Tiling::pixels(by_)
                              : at.column + t_.segment * t_.lanes <= by_.size[1];
    if (t_.order == Tiling::kTokens || !has_no_epilogue() || !is_full) return nullptr;
    const int64_t pixel = flat ? at.row * t_.lanes : at.row * by_.size[1] + at.column;
    return reinterpret_cast<Real*>(y_ + at.image * by_.rows * Tiling::pixels(by_) + pixel);
  }
  // Elements between rows of a register block at that address; 0 where the rows are contiguous.
  int64_t line() const { return t_.order == Tiling::kFlat ? 0 : by_.size[1]; }

  // acc: [rows][segment][lanes] of row o of the weight. Not for kTokens.
  void write(const TileCoord& at, int64_t o, int64_t rows, const Real* acc) const {
    const int64_t plane = (at.image * by_.rows + o) * Tiling::pixels(by_);
    if (t_.order == Tiling::kFlat) {
      const int64_t first = at.row * t_.lanes;
      return apply_epilogue(acc, std::min(rows * t_.lanes, Tiling::pixels(by_) - first),
                            plane + first);
    }
    const int64_t width = t_.segment * t_.lanes;
    const int64_t count = std::min(width, by_.size[1] - at.column);
    const auto from_segments = kernels_.from_segments[t_.segment - 1];
    const int64_t to = plane + at.row * by_.size[1] + at.column;
    for (int64_t r = 0; r < rows; ++r) {
      from_segments(acc + r * width, 1, line_, 0);
      apply_epilogue(line_, count, to + r * by_.size[1]);
    }
  }

  // acc: [O][rows][lanes], all rows of the weight.
  void write_tokens(const TileCoord& at, int64_t rows, const Real* acc) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = (at.row + r) * t_.lanes, to = first * by_.rows;
      const int64_t valid = std::min(t_.lanes, Tiling::pixels(by_) - first);
      const bool direct = has_no_epilogue() && valid == t_.lanes;
      Real* const out = direct ? reinterpret_cast<Real*>(y_ + to) : line_;
      kernels_.scatter_tokens(acc + r * t_.lanes, rows * t_.lanes, by_.rows, out, by_.rows);
      if (!direct) apply_epilogue(line_, valid * by_.rows, to);
    }
  }

 private:
  bool has_no_epilogue() const {
    return sizeof(Bits) == sizeof(Real) && !changes_sums() && shuffled_.factor == 1;
  }
  bool changes_sums() const { return activation_ || residual_ || scale_ != 1; }

  // Applies the epilogue and rounding to `count` sums and stores them from element `to` on.
  void apply_epilogue(const Real* sums, int64_t count, int64_t to) const {
    const Real* done = sums;
    if (changes_sums()) {
      Real* const values = line_;
      if (sums != values) std::memcpy(values, sums, size_t(count) * sizeof(Real));
      Real* residual = nullptr;
      if (residual_) {
        residual = line_ + line_size(by_, t_) / 2;
        widen_array<T>(residual_ + to, count, residual);
      }
      kernels_.activate(values, count, activation_, scale_, residual);
      done = values;
    }
    if (shuffled_.factor == 1) return round_array<T>(done, count, y_ + to);
    shuffled_.store(to, count, [&](int64_t i) { return rounded<T>(done[i]); });
  }

  const SparseKernels<Real>& kernels_;
  const Geometry& by_;
  const Tiling& t_;
  int activation_;
  Real scale_;
  const Bits* residual_;
  Bits* y_;
  ShuffledResult<Bits> shuffled_;
  Real* line_;
};

}  // namespace issp
