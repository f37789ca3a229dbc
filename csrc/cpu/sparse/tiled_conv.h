// The tiled sparse convolution: entries become offsets into a tile, and threads divide the work
// units of the result.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/dtypes.h"
#include "cpu/sparse/tile_io.h"
#include "cpu/threads.h"

namespace issp {

// The positions of the sparse weight as the kernels read them: Entry says where the pixels of an
// entry are.
template <typename Entry>
struct RowPattern {
  std::unique_ptr<Entry[]> entries;  // [E]
  const int32_t* row_ptr;            // [blocks + 1]
};

// Offsets into a tile, for all positions of a row of the weight.
inline std::vector<int32_t> tile_offsets(const Geometry& by, const Tiling& tiling) {
  std::vector<int32_t> at(size_t(by.length()));
  for (int64_t tap = 0; tap < by.taps(); ++tap) {
    const int64_t first = tiling.offset(by, tap);
    for (int64_t c = 0; c < by.channels; ++c) {
      const int64_t plane = c % tiling.channels * tiling.channel_stride;
      at[size_t(c * by.taps() + tap)] = int32_t(first + plane);
    }
  }
  return at;
}

// Calls body(thread) on `num_threads` threads in the floating-point mode of the caller. The caller
// decides whether denormals are flushed, and all threads do the same.
template <typename F>
void for_threads(int64_t num_threads, const F& body) {
  if (num_threads <= 1) return body(int64_t(0));
  const FloatMode::State mode = FloatMode::current();
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    const FloatMode scope(mode);
    for (int64_t thread = begin; thread < end; ++thread) body(thread);
  });
}

// Calls body(first, last) for ranges of blocks of the weight; several threads if there are many
// entries.
template <typename F>
void for_blocks(const Product& product, const F& body) {
  const int64_t num_threads = std::clamp<int64_t>(product.entries / 8192, 1, all_threads().size);
  for_threads(num_threads, [&](int64_t thread) {
    body(product.blocks * thread / num_threads, product.blocks * (thread + 1) / num_threads);
  });
}

// Translates the columns of the blocks first..last - 1 with the table `at`; false: a column is out
// of range or does not ascend within its block. Simple loops, so that the compiler vectorizes them.
template <typename Entry>
bool translate_blocks(const int32_t* column, const int32_t* starts, int64_t first, int64_t last,
                      const std::vector<Entry>& at, Entry* to) {
  const auto length = uint32_t(at.size());
  const int64_t begin = starts[first], end = starts[last];
  bool inside = true, ascending = true;
  for (int64_t e = begin; e < end; ++e) inside &= uint32_t(column[e]) < length;
  if (!inside) return false;
  for (int64_t b = first; b < last; ++b) {
    for (int32_t e = starts[b] + 1; e < starts[b + 1]; ++e) ascending &= column[e] > column[e - 1];
  }
  for (int64_t e = begin; e < end; ++e) to[e] = at[uint32_t(column[e])];
  return ascending;
}

template <typename Entry>
RowPattern<Entry> translate(const Product& product, const Tensor& columns, const Tensor& starts,
                            const std::vector<Entry>& at) {
  const auto* const column = static_cast<const int32_t*>(columns.const_data_ptr());
  RowPattern<Entry> pattern;
  pattern.row_ptr = static_cast<const int32_t*>(starts.const_data_ptr());
  pattern.entries.reset(new Entry[size_t(product.entries) + 1]);
  bool ascending = pattern.row_ptr[0] == 0 && pattern.row_ptr[product.blocks] == product.entries;
  for (int64_t b = 0; b < product.blocks; ++b) {
    ascending &= pattern.row_ptr[b] <= pattern.row_ptr[b + 1];
  }
  require(ascending, "starts");
  std::atomic<bool> valid{true};
  for_blocks(product, [&](int64_t first, int64_t last) {
    if (!translate_blocks(column, pattern.row_ptr, first, last, at, pattern.entries.get())) {
      valid = false;
    }
  });
  require(valid, "columns");
  return pattern;
}

// The numbers of a tensor in the type of the sums: its own memory, or a widened copy.
template <typename T>
class Widened {
 public:
  using Real = typename T::Wide;

  Widened() = default;
  explicit Widened(const Tensor& x) {
    const auto* const from = static_cast<const typename T::Bits*>(x.const_data_ptr());
    if (sizeof(*from) == sizeof(Real)) {
      data_ = reinterpret_cast<const Real*>(from);
      return;
    }
    copy_.resize(size_t(x.numel()));
    widen_array<T>(from, x.numel(), copy_.data());
    data_ = copy_.data();
  }
  Widened(Widened&&) = default;
  Widened& operator=(Widened&&) = default;

  const Real* data() const { return data_; }

 private:
  const Real* data_ = nullptr;
  std::vector<Real> copy_;
};

// log2 of the rows of the weight that one kernel call processes: 4 while at least 4 are left, then
// 2, then 1.
inline int log2_rows(int64_t left) {
  return left >= 4 ? 2 : left >= 2 ? 1 : 0;
}

// The cost of a call in multiply-adds: copying or transposing a pixel costs about four.
inline double multiply_adds(const Convolution& conv) {
  const Geometry& by = conv.geometry;
  const double products = double(conv.product.entries) * double(conv.product.v);
  return (products + 4.0 * double(by.channels + by.rows)) * double(by.batch * Tiling::pixels(by));
}

// The number of threads for a number of multiply-adds: each thread gets at least about 10 us of
// work.
inline int64_t num_threads_for(double count) {
  return int64_t(std::max(1.0, std::min(double(all_threads().size), count / 2e5)));
}

// Whether each pixel of x is loaded so rarely that filling a tile costs more than loads that cross
// cache lines. Measured with 60 and 256 channels, direct relative to tiled: 4 to 6 loads per pixel
// up to 1.3 times as fast, 7 to 9 equal, 27 half as fast; pointwise, 3 loads 1.3 times as fast, 8
// slower.
inline bool is_low_reuse(const Convolution& conv) {
  const double uses = double(conv.product.entries) * double((conv.product.v + 3) / 4) /
                      double(std::max<int64_t>(1, conv.geometry.channels));
  return uses <= (conv.geometry.taps() == 1 ? 6 : 8);
}

// Limits tiles to blocks of channels that stay in L1 while all rows of the weight are processed. A
// tile of many channels stays in L2 only, which halves the speed for v = 1. Tiles are not limited
// for v >= 4, where multiply-adds are the bottleneck, or with few entries per block, where storing
// and loading the sums costs more than it saves.
template <typename Real>
void split_channels(const Convolution& conv, Tiling& t) {
  constexpr int64_t kMinEntries = 6;
  const Geometry& by = conv.geometry;
  const int64_t channel_bytes =
      t.phases[0] * (t.max_rows + t.reach[0]) * t.row_stride * int64_t(sizeof(Real));
  const int64_t max_channels = std::max<int64_t>(1, kL1Budget / channel_bytes);
  const int64_t blocks = ceil_div(by.channels, max_channels);
  const bool enough = conv.product.entries >= kMinEntries * conv.product.blocks * blocks;
  if (conv.product.v < 4 && blocks > 1 && enough && !is_low_reuse(conv)) {
    t.limit(by, ceil_div(by.channels, blocks), 1);
  }
}

// The entries that belong to each block of channels.
struct ChannelBlocks {
  int64_t count;
  std::vector<int32_t> bounds;  // [count + 1][blocks] entries; empty if count is 1

  ChannelBlocks(const Convolution& conv, const Tiling& t, const Tensor& columns,
                const int32_t* starts)
      : count(ceil_div(std::max<int64_t>(1, conv.geometry.channels), t.channels)) {
    if (count <= 1) return;
    const int64_t blocks = conv.product.blocks;
    bounds.resize(size_t((count + 1) * blocks));
    const auto* const column = static_cast<const int32_t*>(columns.const_data_ptr());
    for_blocks(conv.product, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        int32_t e = starts[b];
        for (int64_t channel_block = 0; channel_block <= count; ++channel_block) {
          bounds[size_t(channel_block * blocks + b)] = e;
          const int64_t limit = (channel_block + 1) * t.channels * conv.geometry.taps();
          while (e < starts[b + 1] && column[e] < limit) ++e;
        }
      }
    });
  }
};

template <typename T>
struct TiledConv {
  using Real = typename T::Wide;
  const SparseKernels<Real>& kernels;
  const Convolution& conv;
  const Tiling& tiling;
  const RowPattern<int32_t>& pattern;
  const ChannelBlocks& channel_blocks;
  const Real* values;
  const Real* bias;  // null: none

  // Memory for one work unit: a tile; sums of all rows of the weight that are kept between blocks
  // of channels, [O][block]; and a few register blocks for sums that need an epilogue.
  struct Memory {
    Real *tile, *sums, *scratch;
  };
  int64_t scratch_rows() const { return std::max<int64_t>(16, conv.product.v); }

  // Whether the sums of all rows of the weight are kept until the last block of channels, or until
  // all are written together.
  bool keeps_sums() const { return tiling.order == Tiling::kTokens || channel_blocks.count > 1; }

  // The kernels process 4, 2 or 1 rows of a block at a time.
  void multiply(const Real* tile, int64_t rows, MultiplyParams<Real> params) const {
    for (int64_t i = 0; i < params.v;) {
      const int log = log2_rows(params.v - i);
      kernels.multiply[log][tiling.segment - 1][rows - 1](tile, tiling.row_stride, params);
      const int64_t done = int64_t(1) << log;
      i += done, params.values += done, params.to += done * params.to_stride;
      if (params.bias) params.bias += done;
      if (params.from) params.from += done * params.from_stride;
    }
  }

  // Processes the entries first[b]..last[b] - 1 of every block b in one block of channels. After
  // the last block of channels it writes the result, through scratch memory where the kernels
  // cannot write it directly.
  void multiply_blocks(const Memory& memory, const WorkUnit<Real>& unit,
                       const TileWriter<T>& writer, int64_t channel_block, const int32_t* first,
                       const int32_t* last) const {
    const int64_t v = conv.product.v, size = unit.rows * tiling.segment * tiling.lanes;
    const bool last_block =
        channel_block + 1 == channel_blocks.count && tiling.order != Tiling::kTokens;
    Real* const direct = last_block ? writer.direct(unit.at, unit.rows) : nullptr;
    MultiplyParams<Real> params;
    params.offsets = pattern.entries.get();
    params.values = values;
    params.v = v;
    params.first = first;
    params.last = last;
    params.blocks = conv.product.blocks;
    params.bias = bias;
    params.from = channel_block ? memory.sums : nullptr;
    params.from_stride = size;
    params.to = direct ? direct : memory.sums;
    params.to_stride = direct ? Tiling::pixels(conv.geometry) : size;
    params.line = direct ? writer.line() : 0;
    if (direct || !last_block) return multiply(unit.tile, unit.rows, params);
    const int64_t step = scratch_rows() / v;
    for (int64_t b = 0; b < conv.product.blocks; b += step) {
      params.blocks = std::min(step, conv.product.blocks - b);
      params.first = first + b, params.last = last + b, params.to = memory.scratch;
      if (bias) params.bias = bias + b * v;
      if (channel_block) params.from = memory.sums + b * v * size;
      multiply(unit.tile, unit.rows, params);
      for (int64_t o = 0; o < params.blocks * v; ++o) {
        writer.write(unit.at, b * v + o, unit.rows, memory.scratch + o * size);
      }
    }
  }

  // One register block of the result for all rows of the weight.
  void process(const Memory& memory, const WorkUnit<Real>& unit, const TileReader<T>& reader,
               const TileWriter<T>& writer) const {
    const int64_t channels = conv.geometry.channels, blocks = conv.product.blocks;
    for (int64_t channel_block = 0; channel_block < channel_blocks.count; ++channel_block) {
      const bool single = channel_blocks.count == 1;
      const int32_t* const first =
          single ? pattern.row_ptr : &channel_blocks.bounds[size_t(channel_block * blocks)];
      const int32_t* const last = first + (single ? 1 : blocks);
      if (!single) {
        const int64_t from = channel_block * tiling.channels;
        reader.fill(unit.at, unit.rows, from, std::min(channels, from + tiling.channels),
                    memory.tile);
      }
      multiply_blocks(memory, unit, writer, channel_block, first, last);
    }
    if (tiling.order == Tiling::kTokens) writer.write_tokens(unit.at, unit.rows, memory.sums);
  }

  void operator()(const void* x, const void* residual, void* y, int64_t num_threads) const {
    const Geometry& by = conv.geometry;
    const int64_t work_units = tiling.work_units(by);
    for_threads(std::min(num_threads, work_units), [&](int64_t thread) {
      static thread_local ThreadScratch<Real> scratch;
      const int64_t tile_size = tiling.tile_size() + kMaxSegment * tiling.lanes;
      const int64_t sums_size = keeps_sums() ? by.rows * tiling.block_size() : 0;
      const int64_t scratch_size = scratch_rows() * tiling.block_size();
      const int64_t read = TileReader<T>::line_size(by, tiling);
      Real* const tile = scratch.get(tile_size + sums_size + scratch_size + read +
                                     TileWriter<T>::line_size(by, tiling));
      const Memory memory = {tile, tile + tile_size, tile + tile_size + sums_size};
      Real* const lines = memory.scratch + scratch_size;
      const TileReader<T> reader(kernels, by, tiling, x, lines);
      const Product& product = conv.product;
      const Epilogue epilogue = {product.activation, product.scale, residual, product.shuffle};
      const TileWriter<T> writer(kernels, by, tiling, epilogue, y, lines + read);
      const int64_t count = std::min(num_threads, work_units);
      for_each_tile(
          tiling, by, work_units * thread / count, work_units * (thread + 1) / count,
          [&](const TileCoord& at, int64_t rows) {
            if (channel_blocks.count == 1) reader.fill(at, rows, 0, by.channels, tile);
          },
          [&](const TileCoord& at, int64_t rows, int64_t below) {
            process(memory, {tile + below * tiling.row_stride, rows, at}, reader, writer);
          });
    });
  }
};

// The end of the tile that begins with work unit `first`.
inline int64_t tile_end(const Tiling& tiling, int64_t first, int64_t last) {
  const int64_t column_end = (first / tiling.down + 1) * tiling.down;
  return std::min({last, column_end, first + tiling.work_units_per_tile});
}

// Visits the work units first..last - 1 in order: fill(at, rows) once per tile, then use(at, rows,
// rows of the tile above it) for each of its work units.
template <typename Fill, typename Use>
void for_each_tile(const Tiling& tiling, const Geometry& by, int64_t first, int64_t last,
                   const Fill& fill, const Use& use) {
  while (first < last) {
    const int64_t end = tile_end(tiling, first, last);
    const TileCoord top = tile_coord(tiling, first);
    fill(top, tile_coord(tiling, end - 1).row - top.row + tiling.rows_of(by, end - 1));
    for (; first < end; ++first) {
      const TileCoord at = tile_coord(tiling, first);
      use(at, tiling.rows_of(by, first), at.row - top.row);
    }
  }
}

}  // namespace issp
