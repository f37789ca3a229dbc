// A sparse product on the CPU: lists become offsets into a tile, threads take units of the result.
#pragma once

#include <atomic>
#include <vector>

#include "cpu/dtypes.h"
#include "cpu/sparse/tile_io.h"
#include "cpu/threads.h"

namespace issp {

// The sparse weight as the kernels read it; Entry says where an entry finds its pixels.
template <typename Entry>
struct Lists {
  std::unique_ptr<Entry[]> entries;  // [E]
  const int32_t* starts;             // [blocks + 1]
};

// Offsets into a tile of all positions of a row of the weight.
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

// Runs work(member) on `members` threads in the caller's floating-point mode: whether denormals
// are flushed is the caller's choice, but the same on every thread.
template <typename F>
void for_members(int64_t members, const F& work) {
  if (members <= 1) return work(int64_t(0));
  const FloatMode::State mode = FloatMode::current();
  torch::stable::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
    const FloatMode scope(mode);
    for (int64_t member = begin; member < end; ++member) work(member);
  });
}

// Work on the weight blocks first..last, shared by threads where there are many entries.
template <typename F>
void for_blocks(const Product& product, const F& work) {
  const int64_t members = std::clamp<int64_t>(product.entries / 8192, 1, whole_team().size);
  for_members(members, [&](int64_t member) {
    work(product.blocks * member / members, product.blocks * (member + 1) / members);
  });
}

enum Fault { kNone, kOutside, kUnordered };

// Checks the positions of entries begin..end, of which the blocks first..last consist, and
// translates them by the table `at`. Plain loops, which the compiler can turn into vectors.
template <typename Entry>
Fault translate_blocks(const int32_t* column, const int32_t* starts, int64_t first, int64_t last,
                       const std::vector<Entry>& at, Entry* to) {
  const auto length = uint32_t(at.size());
  const int64_t begin = starts[first], end = starts[last];
  bool inside = true, ascending = true;
  for (int64_t e = begin; e < end; ++e) inside &= uint32_t(column[e]) < length;
  if (!inside) return kOutside;
  for (int64_t b = first; b < last; ++b) {
    for (int32_t e = starts[b] + 1; e < starts[b + 1]; ++e) ascending &= column[e] > column[e - 1];
  }
  for (int64_t e = begin; e < end; ++e) to[e] = at[uint32_t(column[e])];
  return ascending ? kNone : kUnordered;
}

template <typename Entry>
Lists<Entry> translate(const Product& product, const Tensor& columns, const Tensor& starts,
                       const std::vector<Entry>& at) {
  const auto* const column = static_cast<const int32_t*>(columns.const_data_ptr());
  Lists<Entry> lists;
  lists.starts = static_cast<const int32_t*>(starts.const_data_ptr());
  lists.entries.reset(new Entry[size_t(product.entries) + 1]);
  bool ascending = lists.starts[0] == 0 && lists.starts[product.blocks] == product.entries;
  for (int64_t b = 0; b < product.blocks; ++b) {
    ascending &= lists.starts[b] <= lists.starts[b + 1];
  }
  if (!ascending) {
    refuse("starts must ascend from 0 to the ", product.entries, " entries of columns");
  }
  std::atomic<int> fault{kNone};
  for_blocks(product, [&](int64_t first, int64_t last) {
    const Fault found =
        translate_blocks(column, lists.starts, first, last, at, lists.entries.get());
    if (found != kNone) fault = found;
  });
  if (fault == kOutside) {
    refuse("columns must lie in 0..", int64_t(at.size()) - 1,
           ": do the weight and x have the same number of channels?");
  }
  if (fault) refuse("columns must ascend strictly within each block: sort the entries");
  return lists;
}

// The tensor's numbers in the type of the sums: its own memory, or a widened copy.
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
    widen_run<T>(from, x.numel(), copy_.data());
    data_ = copy_.data();
  }
  Widened(Widened&&) = default;
  Widened& operator=(Widened&&) = default;

  const Real* data() const { return data_; }

 private:
  const Real* data_ = nullptr;
  std::vector<Real> copy_;
};

// Rows of a block that go through a kernel together: 4 as long as there are, then 2, then 1.
inline int rows_log(int64_t left) {
  return left >= 4 ? 2 : left >= 2 ? 1 : 0;
}

// What a call costs, in multiply-adds: a pixel that is copied, or turned over, costs about four.
inline double multiply_adds(const Convolution& call) {
  const Geometry& by = call.geometry;
  const double products = double(call.product.entries) * double(call.product.v);
  return (products + 4.0 * double(by.channels + by.rows)) * double(by.batch * Tiling::pixels(by));
}

// Threads worth waking for a number of multiply-adds: each has some 10 us to do.
inline int64_t worthy_members(double work) {
  return std::max<int64_t>(1, std::min<int64_t>(whole_team().size, int64_t(work / 2e5)));
}

// Whether a pixel of x is loaded so rarely that filling a tile costs more than loads that straddle
// cache lines. Measured on 60 and 256 channels: with 4 to 6 loads up to 1.3 times faster without a
// tile, with 7 to 9 equal, with 27 half as fast; pointwise, with 3 loads 1.3 times faster, with 8
// slower.
inline bool few_uses(const Convolution& call) {
  const double uses = double(call.product.entries) * double((call.product.v + 3) / 4) /
                      double(std::max<int64_t>(1, call.geometry.channels));
  return uses <= (call.geometry.taps() == 1 ? 6 : 8);
}

// Cuts tiles to runs of channels that stay in the L1 cache while all rows of the weight pass by: a
// tile of many channels is written to L2 and every load of it comes from there, which halves the
// speed of v = 1. With more rows to a load (v >= 4) the multiply-adds are the limit, and with few
// entries in a run carrying sums from run to run costs more than it saves.
template <typename Real>
void cut_to_runs(const Convolution& call, Tiling& t) {
  constexpr int64_t kLeastEntries = 6;
  const Geometry& by = call.geometry;
  const int64_t seen =
      t.phases[0] * (t.most_rows + t.reach[0]) * t.row_stride * int64_t(sizeof(Real));
  const int64_t most = std::max<int64_t>(1, kNearBytes / seen), runs = parts_of(by.channels, most);
  const bool many = call.product.entries >= kLeastEntries * call.product.blocks * runs;
  if (call.product.v < 4 && runs > 1 && many && !few_uses(call)) {
    t.cut(by, parts_of(by.channels, runs), 1);
  }
}

// Which entries belong to a run of channels.
struct ChannelRuns {
  int64_t count;
  std::vector<int32_t> bounds;  // [count + 1][blocks] entries; empty for a single run

  ChannelRuns(const Convolution& call, const Tiling& t, const Tensor& columns,
              const int32_t* starts)
      : count(parts_of(call.geometry.channels, std::max<int64_t>(1, t.channels))) {
    if (count <= 1) return;
    const int64_t blocks = call.product.blocks;
    bounds.resize(size_t((count + 1) * blocks));
    const auto* const column = static_cast<const int32_t*>(columns.const_data_ptr());
    for_blocks(call.product, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        int32_t e = starts[b];
        for (int64_t run = 0; run <= count; ++run) {
          bounds[size_t(run * blocks + b)] = e;
          const int64_t limit = (run + 1) * t.channels * call.geometry.taps();
          while (e < starts[b + 1] && column[e] < limit) ++e;
        }
      }
    });
  }
};

template <typename T>
struct ProductRun {
  using Real = typename T::Wide;
  const ProductKernels<Real>& kernels;
  const Convolution& call;
  const Tiling& tiling;
  const Lists<int32_t>& lists;
  const ChannelRuns& runs;
  const Real* values;
  const Real* bias;  // null: none

  // What a unit is worked on with: a tile, sums that are kept from run to run [O][block], and
  // register blocks of a few rows that the writer must finish.
  struct Memory {
    Real *tile, *kept, *scratch;
  };
  int64_t scratch_rows() const { return std::max<int64_t>(16, call.product.v); }

  // Whether sums of all rows are kept until the last run, or until all can be written together.
  bool keeps() const { return tiling.order == Tiling::kTokens || runs.count > 1; }

  // Rows of a block go through the kernels 4, 2 or 1 at a time.
  void multiply(const Real* tile, int64_t rows, Work<Real> work) const {
    for (int64_t i = 0; i < work.v;) {
      const int log = rows_log(work.v - i);
      kernels.multiply[log][tiling.segment - 1][rows - 1](tile, tiling.row_stride, work);
      const int64_t done = int64_t(1) << log;
      i += done, work.values += done, work.to += done * work.to_stride;
      if (work.bias) work.bias += done;
      if (work.from) work.from += done * work.from_stride;
    }
  }

  // The entries first..last of all blocks in one run of channels; after the last run into the
  // result, by way of scratch memory where the kernels cannot write it themselves.
  void blocks(const Memory& memory, const Real* tile, int64_t rows, const Place& at,
              const TileWriter<T>& writer, int64_t run, const int32_t* first,
              const int32_t* last) const {
    const int64_t v = call.product.v, size = rows * tiling.segment * tiling.lanes;
    const bool finish = run + 1 == runs.count && tiling.order != Tiling::kTokens;
    Real* const direct = finish ? writer.direct(at, rows) : nullptr;
    Work<Real> work = {
        lists.entries.get(),         values, v,           first, last, call.product.blocks, bias,
        run ? memory.kept : nullptr, size,   memory.kept, size,  0};
    if (direct) {
      work.to = direct, work.to_stride = Tiling::pixels(call.geometry), work.line = writer.line();
    }
    if (direct || !finish) return multiply(tile, rows, work);
    const int64_t turn = scratch_rows() / v;
    for (int64_t b = 0; b < call.product.blocks; b += turn) {
      work.blocks = std::min(turn, call.product.blocks - b);
      work.first = first + b, work.last = last + b, work.to = memory.scratch;
      if (bias) work.bias = bias + b * v;
      if (run) work.from = memory.kept + b * v * size;
      multiply(tile, rows, work);
      for (int64_t o = 0; o < work.blocks * v; ++o) {
        writer.write(at, b * v + o, rows, memory.scratch + o * size);
      }
    }
  }

  // One register block of the result, all rows of the weight. tile: where its first row lies.
  void unit(const Memory& memory, const Real* tile, int64_t rows, const Place& at,
            const TileReader<T>& reader, const TileWriter<T>& writer) const {
    const int64_t channels = call.geometry.channels;
    for (int64_t run = 0; run < runs.count; ++run) {
      const bool whole = runs.count == 1;
      const int32_t* const first =
          whole ? lists.starts : &runs.bounds[size_t(run * call.product.blocks)];
      const int32_t* const last = first + (whole ? 1 : call.product.blocks);
      if (!whole) {
        const int64_t from = run * tiling.channels;
        reader.fill(at, rows, from, std::min(channels, from + tiling.channels), memory.tile);
      }
      blocks(memory, tile, rows, at, writer, run, first, last);
    }
    if (tiling.order == Tiling::kTokens) writer.write_tokens(at, rows, memory.kept);
  }

  void operator()(const void* x, const void* residual, void* y, int64_t members) const {
    const Geometry& by = call.geometry;
    const int64_t units = tiling.units(by);
    for_members(std::min(members, units), [&](int64_t member) {
      static thread_local Workspace<Real> workspace;
      const int64_t tile_size = tiling.tile_size() + kMaxSegment * tiling.lanes;
      const int64_t kept_size = keeps() ? by.rows * tiling.block_size() : 0;
      const int64_t scratch_size = scratch_rows() * tiling.block_size();
      const int64_t read = TileReader<T>::line_size(by, tiling);
      Real* const tile = workspace.get(tile_size + kept_size + scratch_size + read +
                                       TileWriter<T>::line_size(by, tiling));
      const Memory memory = {tile, tile + tile_size, tile + tile_size + kept_size};
      Real* const lines = memory.scratch + scratch_size;
      const TileReader<T> reader(kernels, by, tiling, x, lines);
      const TileWriter<T> writer(kernels, by, tiling, call.product.activation, residual, y,
                                 lines + read);
      const int64_t count = std::min(members, units);
      for_each_tile(
          tiling, by, units * member / count, units * (member + 1) / count,
          [&](const Place& at, int64_t rows) {
            if (runs.count == 1) reader.fill(at, rows, 0, by.channels, tile);
          },
          [&](const Place& at, int64_t rows, int64_t below) {
            unit(memory, tile + below * tiling.row_stride, rows, at, reader, writer);
          });
    });
  }
};

// Units first..last in order: fill(place, rows) once per tile, then use(place, rows, rows of the
// tile above it) for each of its units.
template <typename Fill, typename Use>
void for_each_tile(const Tiling& tiling, const Geometry& by, int64_t first, int64_t last,
                   const Fill& fill, const Use& use) {
  while (first < last) {
    const int64_t column_end = (first / tiling.down + 1) * tiling.down;
    const int64_t end = std::min({last, column_end, first + tiling.units_per_tile});
    const Place top = place(tiling, first);
    fill(top, place(tiling, end - 1).row - top.row + tiling.rows_of(by, end - 1));
    for (; first < end; ++first) {
      const Place at = place(tiling, first);
      use(at, tiling.rows_of(by, first), at.row - top.row);
    }
  }
}

}  // namespace issp
