// A sparse product on the CPU: lists become offsets into a tile, threads take units of the result.
#pragma once

#include <atomic>
#include <vector>

#include "dtypes.h"
#include "team.h"
#include "tiles.h"

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
      at[size_t(c * by.taps() + tap)] = int32_t(first + c * tiling.channel_stride);
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

// Whether a pixel of x is loaded so rarely that filling a tile may cost more than loads that
// straddle cache lines. Measured on 256 and 60 channels, 3x3: with 6 loads 1.5 and 1.2 times faster
// without a tile, with 29 loads equal. Pointwise no load straddles a line.
inline bool few_uses(const Convolution& call) {
  const double uses = double(call.product.entries) * double((call.product.v + 3) / 4) /
                      double(std::max<int64_t>(1, call.geometry.channels));
  return uses <= (call.geometry.taps() == 1 ? 64 : 20);
}

// Runs of channels whose part of a tile stays in the L1 cache while all rows of the weight pass by:
// without them every load of a tile of many channels comes from L2, which halves the speed of v
// = 1. With more rows to a load (v >= 4) the multiply-adds are the limit, and with few entries in a
// run carrying sums from run to run costs more than it saves.
struct ChannelRuns {
  int64_t count = 1;
  std::vector<int32_t> bounds;  // [count + 1][blocks] entries; empty for a single run

  static constexpr int64_t kBytes = 56 << 10, kLeastEntries = 6;

  template <typename Real>
  ChannelRuns(const Convolution& call, const Tiling& t, const Tensor& columns,
              const int32_t* starts, Real) {
    const Geometry& by = call.geometry;
    const int64_t seen =
        t.phases[0] * (t.most_rows + t.reach[0]) * t.row_stride * int64_t(sizeof(Real));
    const int64_t channels = std::max<int64_t>(1, kBytes / seen);
    const int64_t runs = (by.channels + channels - 1) / channels;
    const int64_t blocks = call.product.blocks;
    if (call.product.v >= 4 || runs < 2 || few_uses(call) ||
        call.product.entries < kLeastEntries * blocks * runs) {
      return;
    }
    count = runs;
    bounds.resize(size_t((runs + 1) * blocks));
    const auto* const column = static_cast<const int32_t*>(columns.const_data_ptr());
    for_blocks(call.product, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        int32_t e = starts[b];
        for (int64_t run = 0; run <= runs; ++run) {
          bounds[size_t(run * blocks + b)] = e;
          const int64_t limit = (run + 1) * channels * by.taps();
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

  bool keeps() const { return tiling.order == Tiling::kTokens || runs.count > 1; }

  // The entries first..last of block b, into acc or straight into the result.
  void block(const Real* tile, int64_t rows, const Place& at, const TileWriter<T>& writer,
             Real* acc, int64_t b, int64_t first, int64_t last, bool more) const {
    const int64_t v = call.product.v, size = rows * tiling.segment * tiling.lanes;
    for (int64_t i = 0; i < v;) {
      const int log = rows_log(v - i);
      const int64_t o = b * v + i;
      Real* const direct = keeps() ? nullptr : writer.direct(at, o, rows);
      Real* const to = direct ? direct : keeps() ? acc + o * size : acc;
      kernels.multiply[log][tiling.segment - 1][rows - 1](
          tile, tiling.row_stride, lists.entries.get() + first, values + first * v + i, v,
          last - first, bias ? bias + o : nullptr, to,
          direct ? Tiling::pixels(call.geometry) : size, more);
      for (int64_t k = 0; !keeps() && !direct && k < 1 << log; ++k) {
        writer.write(at, o + k, rows, acc + k * size);
      }
      i += int64_t(1) << log;
    }
  }

  // One register block of the result, all rows of the weight.
  void multiply(const Real* tile, int64_t rows, const Place& at, const TileWriter<T>& writer,
                Real* acc) const {
    const int64_t blocks = call.product.blocks;
    for (int64_t run = 0; run < runs.count; ++run) {
      const int32_t* const first =
          runs.count > 1 ? &runs.bounds[size_t(run * blocks)] : lists.starts;
      const int32_t* const last = runs.count > 1 ? first + blocks : lists.starts + 1;
      for (int64_t b = 0; b < blocks; ++b) {
        block(tile, rows, at, writer, acc, b, first[b], last[b], run > 0);
      }
    }
    if (tiling.order == Tiling::kTokens) return writer.write_tokens(at, rows, acc);
    const int64_t size = rows * tiling.segment * tiling.lanes;
    for (int64_t o = 0; keeps() && o < call.geometry.rows; ++o) {
      writer.write(at, o, rows, acc + o * size);
    }
  }

  void operator()(const void* x, const void* residual, void* y, int64_t members) const {
    const Geometry& by = call.geometry;
    const int64_t units = tiling.units(by);
    for_members(std::min(members, units), [&](int64_t member) {
      static thread_local Workspace<Real> memory;
      const int64_t tile_size = tiling.tile_size(by) + kMaxSegment * tiling.lanes;
      const int64_t acc_size = tiling.block_size() * (keeps() ? by.rows : 4);
      const int64_t read = TileReader<T>::line_size(by, tiling);
      Real* const tile =
          memory.get(tile_size + acc_size + read + TileWriter<T>::line_size(by, tiling));
      Real* const acc = tile + tile_size;
      const TileReader<T> reader(kernels, by, tiling, x, acc + acc_size);
      const TileWriter<T> writer(kernels, by, tiling, call.product.activation, residual, y,
                                 acc + acc_size + read);
      const int64_t count = std::min(members, units);
      for_each_tile(
          tiling, by, units * member / count, units * (member + 1) / count,
          [&](const Place& at, int64_t rows) { reader.fill(at, rows, tile); },
          [&](const Place& at, int64_t rows, int64_t below) {
            multiply(tile + below * tiling.row_stride, rows, at, writer, acc);
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
