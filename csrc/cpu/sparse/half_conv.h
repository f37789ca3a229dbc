// The float16 convolution of AVX512-FP16: fills tiles of pairs, and its loop over the work units.
// See half_kernels.h for the method.
#pragma once

#include "cpu/sparse/half_kernels.h"
#include "cpu/sparse/tiled_conv.h"

namespace issp {

// The convolution whose pixels are pairs.
inline Geometry paired(const Geometry& by) {
  Geometry pairs = by;
  if (is_pointwise(by)) {
    pairs.input = pairs.size = {1, ceil_div(Tiling::pixels(by), 2)};
  } else {
    pairs.size[0] = ceil_div(by.size[0], 2);
  }
  return pairs;
}

// The numbers of a float16 tensor, each of them twice.
inline std::vector<uint32_t> twice(const Tensor& x) {
  const auto* const from = static_cast<const uint16_t*>(x.const_data_ptr());
  std::vector<uint32_t> to(size_t(x.numel()));
  for (size_t i = 0; i < to.size(); ++i) to[i] = from[i] * 0x10001u;
  return to;
}

// Fills tiles from x.
class HalfReader {
 public:
  // scratch has line_size() elements.
  HalfReader(const HalfKernels& kernels, const Geometry& by, const Tiling& tiling, const void* x,
             uint16_t* scratch)
      : kernels_(kernels),
        by_(by),
        t_(tiling),
        x_(static_cast<const uint16_t*>(x)),
        line_(scratch),
        lower_half_(ceil_div(by.size[0], 2) * by.stride[0]) {}

  static int64_t line_size(const Tiling& t) { return 4 * (line_count(t) + 2 * kPairs); }

  // As TileReader::fill.
  void fill(const TileCoord& at, int64_t rows, int64_t first, int64_t last, uint32_t* tile) const {
    const int64_t plane = by_.input[0] * by_.input[1];
    const uint16_t* from = x_ + (at.image * by_.channels + first) * plane;
    std::fill(line_, line_ + line_size(t_), uint16_t(0));
    if (t_.order == Tiling::kFlat) return fill_flat(from, at.row, rows, last - first, tile);
    if (is_dense()) return fill_planes(from, at, rows, last - first, tile);
    for (int64_t c = first; c < last; ++c, from += plane, tile += t_.channel_stride) {
      fill_plane(from, at, rows, tile);
    }
  }

 private:
  // Columns of a tile row, in image order.
  static int64_t line_count(const Tiling& t) {
    return (t.segment * kPairs + t.reach[1]) * t.phases[1];
  }

  bool is_dense() const { return t_.phases == Pair{1, 1} && by_.upsample == Pair{1, 1}; }

  static uint64_t bits_below(int64_t count) {
    return count >= 64 ? ~uint64_t(0) : count <= 0 ? 0 : (uint64_t(1) << count) - 1;
  }

  // The columns of a row of pairs that begins at column `left` of the image.
  HalfColumns columns_from(int64_t left) const {
    const int64_t width = by_.input[1], size = t_.segment * kPairs;
    const uint64_t inside = bits_below(std::min(width - left, size)) & ~bits_below(-left);
    return {inside, -left - size, width - left - size};
  }

  // A vector of pairs is 32 pixels: one after the other, like rows.
  void fill_flat(const uint16_t* from, int64_t row, int64_t rows, int64_t channels,
                 uint32_t* to) const {
    constexpr int64_t lanes = 2 * kPairs;
    const HalfColumns all = {bits_below(kPairs), 0, 0};
    const int64_t plane = Tiling::pixels(by_), whole = std::min(rows, plane / lanes - row);
    from += row * lanes;
    const HalfRows pixels = {from, from + kPairs, lanes, plane, 0, whole, 0, whole, line_};
    kernels_.to_pairs[0](pixels, all, whole, channels, 0, to, kPairs, t_.channel_stride);
    if (whole == rows) return;
    for (int64_t c = 0; c < channels; ++c) {
      const uint16_t* const rest = from + c * plane + whole * lanes;
      std::copy(rest, rest + plane % lanes, line_);
      kernels_.to_pairs[0](lines(line_, line_ + kPairs), all, 1, 1, 0,
                           to + c * t_.channel_stride + whole * kPairs, 0, 0);
    }
  }

  // Neither stride nor upsampling: reads rows directly from x.
  void fill_planes(const uint16_t* from, const TileCoord& at, int64_t rows, int64_t channels,
                   uint32_t* to) const {
    const int64_t top = at.row - by_.padding[0], left = at.column - by_.padding[1];
    const int64_t height = by_.input[0], width = by_.input[1], second = top + lower_half_;
    from += left;
    const HalfRows pixels = {from + top * width,
                             from + second * width,
                             width,
                             height * width,
                             -top,
                             height - top,
                             -second,
                             height - second,
                             line_};
    kernels_.to_pairs[t_.segment - 1](pixels, columns_from(left), rows + t_.reach[0], channels,
                                      t_.reach[1], to, t_.row_stride, t_.channel_stride);
  }

  static HalfRows lines(const uint16_t* first, const uint16_t* second) {
    return {first, second, 0, 0, 0, 1, 0, 1, nullptr};
  }

  void fill_plane(const uint16_t* plane, const TileCoord& at, int64_t rows, uint32_t* to) const {
    const int64_t top = at.row * by_.stride[0] - by_.padding[0], height = rows + t_.reach[0];
    const int64_t left = at.column * by_.stride[1] - by_.padding[1];
    for (int64_t phase = 0; phase < t_.phases[0]; ++phase) {
      for (int64_t i = 0; i < height; ++i) {
        const int64_t u = top + i * t_.phases[0] + phase;
        fill_phases(row_of(plane, u), row_of(plane, u + lower_half_), left,
                    to + (phase * t_.phase_rows + i) * t_.row_stride);
      }
    }
  }

  // Row u of the upsampled image; null: zeros.
  const uint16_t* row_of(const uint16_t* plane, int64_t u) const {
    if (u < 0 || u % by_.upsample[0] || u / by_.upsample[0] >= by_.input[0]) return nullptr;
    return plane + u / by_.upsample[0] * by_.input[1];
  }

  // The general case: lays out rows as the taps read them, then converts each phase.
  void fill_phases(const uint16_t* first, const uint16_t* second, int64_t left,
                   uint32_t* out) const {
    const int64_t count = line_count(t_), phases = t_.phases[1];
    const HalfColumns all = {bits_below(t_.segment * kPairs), 0, t_.reach[1]};
    uint16_t *const line = line_ + count, *const each[2] = {line + count, line + 2 * count};
    for (int64_t phase = 0; phase < phases; ++phase) {
      for (int i = 0; i < 2; ++i) {
        const uint16_t* const row = i ? second : first;
        if (row) read_line(row, left, line);
        for (int64_t k = 0; row && k * phases + phase < count; ++k) {
          each[i][k] = line[k * phases + phase];
        }
      }
      kernels_.to_pairs[t_.segment - 1](lines(first ? each[0] : line_, second ? each[1] : line_),
                                        all, 1, 1, t_.reach[1],
                                        out + phase * (t_.segment + t_.reach[1]) * kPairs, 0, 0);
    }
  }

  // line[i] = the pixel at column left + i of the upsampled row. Columns outside the image stay 0:
  // all rows of a tile have the same columns.
  void read_line(const uint16_t* row, int64_t left, uint16_t* line) const {
    const int64_t up = by_.upsample[1];
    const int64_t begin = std::max<int64_t>(0, ceil_div(std::max<int64_t>(0, left), up));
    const int64_t end = std::min(by_.input[1], (left + line_count(t_) + up - 1) / up);
    for (int64_t i = begin; i < end; ++i) line[i * up - left] = row[i];
  }

  const HalfKernels& kernels_;
  const Geometry& by_;
  const Tiling& t_;
  const uint16_t* x_;
  uint16_t* line_;
  int64_t lower_half_;  // rows of the upsampled image between those of a pair
};

// Writes rows of the weight from their totals.
class HalfWriter {
 public:
  HalfWriter(const HalfKernels& kernels, const SparseKernels<float>& wide, const Convolution& conv,
             const Tiling& tiling, const void* residual, void* y)
      : kernels_(kernels),
        by_(conv.geometry),
        t_(tiling),
        epilogue_{int(conv.product.activation), wide.activate, 0, 0, nullptr},
        scale_(float(conv.product.scale)),
        residual_(static_cast<const uint16_t*>(residual)),
        y_(static_cast<uint16_t*>(y)),
        shuffled_{by_, conv.product.shuffle, y_} {}

  // totals: [rows][segment][2][kPairs] of row o of the weight; they are overwritten.
  void write(const TileCoord& at, int64_t o, int64_t rows, float* totals) const {
    const int64_t pixels = Tiling::pixels(by_), plane = (at.image * by_.rows + o) * pixels;
    const int64_t lower_half = ceil_div(by_.size[0], 2);
    HalfEpilogue epilogue = epilogue_;
    if (scale_ != 1) {
      epilogue.activate(totals, rows * t_.segment * 2 * kPairs, epilogue.activation, scale_,
                        nullptr);
      epilogue.activation = 0;
    }
    for (int64_t r = at.row; r < at.row + rows; ++r, totals += t_.segment * 2 * kPairs) {
      int64_t first = r * 2 * kPairs, second = first + kPairs;
      if (t_.order == Tiling::kFlat) {
        epilogue.first = std::min(kPairs, pixels - first);
        epilogue.second = std::min(kPairs, pixels - second);
      } else {
        first = r * by_.size[1] + at.column, second = first + lower_half * by_.size[1];
        epilogue.first = std::min(t_.segment * kPairs, by_.size[1] - at.column);
        epilogue.second = r + lower_half < by_.size[0] ? epilogue.first : 0;
      }
      if (residual_) epilogue.residual = residual_ + plane + first;
      const auto store = kernels_.store_pairs[t_.segment - 1];
      if (shuffled_.factor == 1) {
        store(totals, epilogue, y_ + plane + first, y_ + plane + second);
      } else {
        uint16_t line[2][kMaxSegment * kPairs];
        store(totals, epilogue, line[0], line[1]);
        shuffle(plane + first, epilogue.first, line[0]);
        shuffle(plane + second, epilogue.second, line[1]);
      }
    }
  }

 private:
  void shuffle(int64_t to, int64_t count, const uint16_t* line) const {
    shuffled_.store(to, count, [&](int64_t i) { return line[i]; });
  }

  const HalfKernels& kernels_;
  const Geometry& by_;
  const Tiling& t_;
  HalfEpilogue epilogue_;
  float scale_;
  const uint16_t* residual_;
  uint16_t* y_;
  ShuffledResult<uint16_t> shuffled_;
};

struct HalfConv {
  const HalfKernels& kernels;
  const SparseKernels<float>& wide;
  const Convolution& conv;
  const Geometry& pairs;
  const Tiling& tiling;
  const RowPattern<int32_t>& pattern;
  const ChannelBlocks& channel_blocks;
  const uint32_t* values;  // [E, v], each twice
  const float* bias;       // null: none

  // Memory for one work unit: a tile, and a row of the weight's totals and sums. For all rows if
  // there are several blocks of channels, else for a few.
  struct Memory {
    uint32_t *tile, *sums;
    float* totals;
  };
  bool keeps_sums() const { return channel_blocks.count > 1; }
  int64_t rows_kept() const {
    const int64_t few = std::max<int64_t>(4, conv.product.v);
    return keeps_sums() ? conv.geometry.rows : few;
  }

  // The kernels process 4, 2 or 1 rows of a block at a time.
  void multiply(const uint32_t* tile, int64_t rows, HalfParams params) const {
    const int64_t size = rows * tiling.segment * kPairs;
    for (int64_t i = 0; i < params.v;) {
      const int log = log2_rows(params.v - i);
      kernels.multiply[log][tiling.segment - 1][rows - 1](tile, tiling.row_stride, params);
      const int64_t done = int64_t(1) << log;
      i += done, params.values += done, params.totals += done * 2 * size;
      params.sums += done * size;
      if (params.bias) params.bias += done;
    }
  }

  HalfParams params_of(const Memory& memory, int64_t block) const {
    HalfParams params;
    params.offsets = pattern.entries.get();
    params.values = values;
    params.v = conv.product.v;
    params.starts = params.first = pattern.row_ptr + block;
    params.ends = params.last = pattern.row_ptr + block + 1;
    params.blocks = conv.product.blocks - block;
    params.bias = bias ? bias + block * params.v : nullptr;
    params.totals = memory.totals;
    params.sums = memory.sums;
    return params;
  }

  void write(const HalfWriter& writer, const TileCoord& at, int64_t rows, int64_t block,
             int64_t blocks, float* totals) const {
    const int64_t v = conv.product.v, size = rows * tiling.segment * kPairs;
    for (int64_t o = block * v; o < (block + blocks) * v; ++o, totals += 2 * size) {
      writer.write(at, o, rows, totals);
    }
  }

  // The register blocks of the work units first..last - 1, whose tile holds all channels, row by
  // row of the weight: the results of a row are written together.
  void process(const Memory& memory, int64_t first, int64_t last, const HalfWriter& writer) const {
    const int64_t step = rows_kept() / conv.product.v, top = tile_coord(tiling, first).row;
    for (int64_t b = 0; b < conv.product.blocks; b += step) {
      HalfParams params = params_of(memory, b);
      params.blocks = std::min(step, params.blocks);
      for (int64_t u = first; u < last; ++u) {
        const TileCoord at = tile_coord(tiling, u);
        const int64_t rows = tiling.rows_of(pairs, u);
        multiply(memory.tile + (at.row - top) * tiling.row_stride, rows, params);
        write(writer, at, rows, b, params.blocks, memory.totals);
      }
    }
  }

  // The same, one block of channels after the other.
  void process_channels(const Memory& memory, const WorkUnit<uint32_t>& unit,
                        const HalfReader& reader, const HalfWriter& writer) const {
    const int64_t channels = conv.geometry.channels, blocks = conv.product.blocks;
    for (int64_t c = 0; c < channel_blocks.count; ++c) {
      const int64_t from = c * tiling.channels;
      reader.fill(unit.at, unit.rows, from, std::min(channels, from + tiling.channels),
                  memory.tile);
      HalfParams params = params_of(memory, 0);
      params.first = &channel_blocks.bounds[size_t(c * blocks)];
      params.last = params.first + blocks;
      multiply(unit.tile, unit.rows, params);
    }
    write(writer, unit.at, unit.rows, 0, blocks, memory.totals);
  }

  void operator()(const void* x, const void* residual, void* y, int64_t num_threads) const {
    const int64_t work_units = tiling.work_units(pairs), count = std::min(num_threads, work_units);
    for_threads(count, [&](int64_t thread) {
      static thread_local ThreadScratch<uint32_t> integers;
      static thread_local ThreadScratch<float> floats;
      const int64_t tile_size = tiling.tile_size() + kMaxSegment * kPairs;
      const int64_t sums_size = rows_kept() * tiling.block_size();
      const int64_t line_size = ceil_div(HalfReader::line_size(tiling), 2);
      uint32_t* const tile = integers.get(tile_size + sums_size + line_size);
      const Memory memory = {tile, tile + tile_size,
                             floats.get(rows_kept() * 2 * tiling.block_size())};
      auto* const line = reinterpret_cast<uint16_t*>(tile + tile_size + sums_size);
      const HalfReader reader(kernels, conv.geometry, tiling, x, line);
      const HalfWriter writer(kernels, wide, conv, tiling, residual, y);
      int64_t first = work_units * thread / count;
      const int64_t last = work_units * (thread + 1) / count;
      for (int64_t end; first < last; first = end) {
        end = tile_end(tiling, first, last);
        const TileCoord at = tile_coord(tiling, first);
        if (keeps_sums()) {
          process_channels(memory, {tile, tiling.rows_of(pairs, first), at}, reader, writer);
          continue;
        }
        const int64_t rows =
            tile_coord(tiling, end - 1).row - at.row + tiling.rows_of(pairs, end - 1);
        reader.fill(at, rows, 0, conv.geometry.channels, tile);
        process(memory, first, end, writer);
      }
    });
  }
};

}  // namespace issp
