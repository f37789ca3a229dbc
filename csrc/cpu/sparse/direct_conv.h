// The direct sparse convolution: for which calls it is used, and its loop over the work units.
#pragma once

#include <unistd.h>

#include <numeric>

#include "cpu/sparse/direct_kernels.h"
#include "cpu/sparse/tiled_conv.h"

namespace issp {

// Bytes of x that a group of work units reads; L2 also holds their results.
constexpr int64_t kL2Budget = 512 << 10;

constexpr int64_t kMaxDirectKernel = 256;  // height and width; there are masks for every tap

struct DirectOperands {
  const RowPattern<DirectEntry>& pattern;
  const float* x;
  const float* values;
  const float* bias;      // null: none
  const float* residual;  // null: none
  float* y;
};

class DirectConv {
 public:
  // A pointwise convolution has no rows: its pixels are treated as rows of one vector.
  static Geometry as_rows(const Geometry& by, int64_t lanes) {
    Geometry g = by;
    if (is_pointwise(by) && Tiling::pixels(by) % lanes == 0) {
      g.input = g.size = {Tiling::pixels(by) / lanes, lanes};
    }
    return g;
  }

  DirectConv(const DirectKernels& direct, const SparseKernels<float>& kernels,
             const Convolution& conv, int64_t num_threads)
      : direct_(direct),
        kernels_(kernels),
        product_(conv.product),
        low_reuse_(is_low_reuse(conv)),
        shape_(conv.geometry),
        by_(as_rows(conv.geometry, kernels.lanes)) {
    const int log = log2_rows(product_.v);
    segment_ = choose_segment(kernels, log, by_, 0);
    across_ = ceil_div(by_.size[1], segment_ * kernels.lanes);
    const int64_t wanted = ceil_div(num_threads, std::max<int64_t>(1, by_.batch * across_));
    max_rows_ = choose_rows(by_.size[0], kernels.rows[log][segment_ - 1], 1);
    rows_ = choose_rows(by_.size[0], max_rows_, wanted);
    down_ = ceil_div(by_.size[0], rows_);
    const int64_t row = std::max<int64_t>(1, by_.channels * width() * int64_t(sizeof(float)));
    group_size_ = std::clamp<int64_t>(kL2Budget / row / rows_, 1, down_);
    for (int64_t a = 0; a < across_; ++a) {
      for (int64_t kx = 0; kx < by_.kernel[1]; ++kx) {
        const int64_t first = a * width() + shift(1, kx);
        const int64_t last = first + (segment_of(a) - 1) * kernels_.lanes;
        columns_.push_back({lanes_within(first, by_.input[1]), lanes_within(last, by_.input[1])});
      }
    }
  }

  // Whether the direct kernels are correct and fast for this call: pixels are loaded rarely, masks
  // at both ends of a row suffice for the borders, and what a work unit reads stays in L2. Planes
  // that are a large power of two apart map to a few sets of L2.
  bool supports() const {
    if (!low_reuse_) return false;
    const int64_t plane = by_.input[0] * by_.input[1];
    if (by_.stride != Pair{1, 1} || by_.upsample != Pair{1, 1}) return false;
    if (by_.channels * plane + plane > INT32_MAX) return false;
    for (int64_t a = 0; a < across_; ++a) {
      for (int64_t kx = 0; kx < by_.kernel[1]; ++kx) {
        const int64_t begin = a * width() + kernels_.lanes + shift(1, kx);
        const int64_t end = begin + (segment_of(a) - 2) * kernels_.lanes;
        if (begin < end && (begin < 0 || end > by_.input[1])) return false;
      }
    }
    const long reported = sysconf(_SC_LEVEL2_CACHE_SIZE);
    const int64_t cache = reported > 0 ? reported : 1 << 20, sets = cache / 16;
    const int64_t stride = std::gcd(plane * int64_t(sizeof(float)), sets);
    const double rows = double(max_rows_ + (by_.kernel[0] - 1) * by_.dilation[0]);
    const double rows_bytes = rows * double(by_.input[1]) * sizeof(float);
    return double(by_.channels) * rows_bytes <=
           std::min(double(sets), double(sets / stride) * rows_bytes) * 8;
  }

  // Offset and masks of every position of a row of the weight.
  std::vector<DirectEntry> positions() const {
    std::vector<DirectEntry> at;
    at.reserve(size_t(by_.length()));
    for (int64_t c = 0; c < by_.channels; ++c) {
      for (int64_t ky = 0; ky < by_.kernel[0]; ++ky) {
        for (int64_t kx = 0; kx < by_.kernel[1]; ++kx) {
          const int64_t row = c * by_.input[0] + shift(0, ky);
          at.push_back({int32_t(row * by_.input[1] + shift(1, kx)), uint16_t(kx), uint16_t(ky)});
        }
      }
    }
    return at;
  }

  void operator()(const DirectOperands& operands, int64_t num_threads) const {
    // Threads divide the pixels, so that each has its part of x in its own L2. For pointwise
    // convolutions they divide the rows of the weight: two threads that write to one page would
    // take cache lines from each other, because prefetchers run ahead within a page.
    const int64_t work_units = by_.batch * across_ * down_, blocks = product_.blocks;
    const bool by_rows = blocks >= num_threads && by_.taps() == 1;
    const int64_t count = std::min(num_threads, by_rows ? blocks : work_units);
    for_threads(count, [&](int64_t thread) {
      const int64_t total = by_rows ? blocks : work_units;
      const int64_t first = total * thread / count, last = total * (thread + 1) / count;
      const int64_t end = by_rows ? work_units : last;
      for (int64_t u = by_rows ? 0 : first; u < end; u += group_size_) {
        run_group(operands, u, std::min(end, u + group_size_), by_rows ? first : 0,
                  by_rows ? last : blocks);
      }
    });
  }

 private:
  int64_t width() const { return segment_ * kernels_.lanes; }
  int64_t segment_of(int64_t a) const {
    return std::min(segment_, ceil_div(by_.size[1] - a * width(), kernels_.lanes));
  }
  int64_t shift(int axis, int64_t tap) const {
    return tap * by_.dilation[size_t(axis)] - by_.padding[size_t(axis)];
  }

  // Lanes of the vector at `column` that lie in 0..limit - 1.
  uint16_t lanes_within(int64_t column, int64_t limit) const {
    unsigned mask = 0;
    for (int l = 0; l < kernels_.lanes; ++l) {
      mask |= unsigned(column + l >= 0 && column + l < limit) << l;
    }
    return uint16_t(mask);
  }

  // A register block: its position and masks.
  struct RegisterBlock {
    DirectParams params;
    int64_t segment, rows, columns, from, to;
    bool edge;
    std::vector<uint16_t> row_masks;
  };

  RegisterBlock register_block(int64_t u) const {
    const int64_t image = u / (across_ * down_), a = u / down_ % across_, top = u % down_ * rows_;
    const int64_t left = a * width(), plane = by_.size[0] * by_.size[1];
    RegisterBlock at;
    at.segment = segment_of(a);
    at.rows = std::min(rows_, by_.size[0] - top);
    at.columns = std::min(width(), by_.size[1] - left);
    at.from = (image * by_.channels * by_.input[0] + top) * by_.input[1] + left;
    at.to = image * by_.rows * plane + top * by_.size[1] + left;
    const int64_t first = top + shift(0, 0), last = top + at.rows - 1 + shift(0, by_.kernel[0] - 1);
    at.edge = first < 0 || last >= by_.input[0];
    at.row_masks.resize(at.edge ? size_t(by_.kernel[0] * kMaxRows) : 0);
    for (int64_t ky = 0; at.edge && ky < by_.kernel[0]; ++ky) {
      for (int64_t r = 0; r < at.rows; ++r) {
        const int64_t row = top + r + shift(0, ky);
        at.row_masks[size_t(ky * kMaxRows + r)] = row >= 0 && row < by_.input[0] ? 0xffff : 0;
      }
    }
    const int64_t tail = left + (at.segment - 1) * kernels_.lanes;
    at.params = {
        &columns_[size_t(a * by_.kernel[1])], at.row_masks.data(), by_.input[1], by_.size[1], plane,
        lanes_within(tail, by_.size[1])};
    return at;
  }

  // Processes vertically adjacent work units, row by row of the weight: the entries are read once
  // for all, and the results of a row are written together.
  void run_group(const DirectOperands& operands, int64_t first, int64_t last, int64_t first_block,
                 int64_t last_block) const {
    const auto& [pattern, x, values, bias, residual, y] = operands;
    std::vector<RegisterBlock> work_units;
    for (int64_t u = first; u < last; ++u) work_units.push_back(register_block(u));
    const int64_t v = product_.v, plane = by_.size[0] * by_.size[1];
    const bool shuffles = product_.shuffle > 1;
    std::vector<float> sums(shuffles ? size_t(4 * rows_ * width()) : 0);
    for (int64_t b = first_block; b < last_block; ++b) {
      const int64_t begin = pattern.row_ptr[b], count = pattern.row_ptr[b + 1] - begin;
      for (int64_t i = 0; i < v;) {
        const int log = log2_rows(v - i);
        const int64_t o = b * v + i;
        for (const RegisterBlock& at : work_units) {
          const auto& table = at.edge ? direct_.edge : direct_.inner;
          const int64_t to = at.to + o * plane;
          DirectParams params = at.params;
          if (shuffles) params.y_row = width(), params.y_plane = at.rows * width();
          float* const direct = shuffles ? sums.data() : y + to;
          table[log][at.segment - 1][at.rows - 1](
              params, x + at.from, pattern.entries.get() + begin, values + begin * v + i, v, count,
              bias ? bias + o : nullptr, direct);
          const int64_t planes = int64_t(1) << log;
          if (product_.activation != Activation::kNone || residual || product_.scale != 1) {
            apply_epilogue(planes, at, params, residual ? residual + to : nullptr, direct);
          }
          if (shuffles) shuffle(planes, at, params, to, direct, y);
        }
        i += int64_t(1) << log;
      }
    }
  }

  void apply_epilogue(int64_t planes, const RegisterBlock& at, const DirectParams& params,
                      const float* residual, float* sums) const {
    for (int64_t i = 0; i < planes; ++i) {
      for (int64_t r = 0; r < at.rows; ++r) {
        const int64_t from = i * params.y_plane + r * params.y_row;
        kernels_.activate(sums + from, at.columns, int(product_.activation), float(product_.scale),
                          residual ? residual + from : nullptr);
      }
    }
  }

  void shuffle(int64_t planes, const RegisterBlock& at, const DirectParams& params, int64_t to,
               const float* sums, float* y) const {
    const ShuffledResult<float> result = {shape_, product_.shuffle, y};
    for (int64_t i = 0; i < planes; ++i) {
      for (int64_t r = 0; r < at.rows; ++r) {
        const float* const line = sums + i * params.y_plane + r * params.y_row;
        result.store(to + i * by_.size[0] * by_.size[1] + r * by_.size[1], at.columns,
                     [&](int64_t column) { return line[column]; });
      }
    }
  }

  const DirectKernels& direct_;
  const SparseKernels<float>& kernels_;
  const Product product_;
  const bool low_reuse_;  // of pixels
  const Geometry shape_;  // also of a pointwise convolution
  const Geometry by_;
  int64_t segment_, across_, max_rows_, rows_, down_;
  int64_t group_size_;                 // work units of a group
  std::vector<DirectColumn> columns_;  // [across][kernel width]
};

}  // namespace issp
