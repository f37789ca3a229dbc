// The gradient of the values of a sparse convolution: sums over pixels, for the kept positions
// only.
//
// The gradient's pixels of a work unit stay in registers while every entry of their rows reads its
// pixels of x from the tile: one load per multiply-add for v = 1, a quarter for v = 4.
#pragma once

#include "cpu/sparse/tiled_conv.h"

namespace issp {

// The pixels are divided into at most this many parts. Each part is summed separately and the parts
// are added in order, so that the result does not depend on the number of threads. The sums of all
// parts take at most the memory of the dense weight.
constexpr int64_t kMaxSplits = 8;

template <typename T>
struct ValuesGrad {
  using Real = typename T::Wide;
  const SparseKernels<Real>& kernels;
  const Convolution& conv;
  const Tiling& tiling;
  const RowPattern<int32_t>& pattern;

  // The gradient as an image, tiled like the result of the convolution.
  Geometry grad_geometry() const {
    Geometry g = conv.geometry;
    g.channels = g.rows;
    g.input = g.size;
    g.kernel = g.stride = g.dilation = g.upsample = {1, 1};
    g.padding = {0, 0};
    return g;
  }

  Tiling grad_tiling() const {
    Tiling t = tiling;
    t.phases = {1, 1};
    t.reach = {0, 0};
    t.work_units_per_tile = 1;
    t.channels = conv.geometry.rows;
    t.row_stride = t.segment * t.lanes;
    t.phase_rows = t.rows;
    t.channel_stride = t.block_size();
    return t;
  }

  // A mask with all bits set in the lanes of a work unit that lie in the result; empty if all do.
  std::vector<Real> within(const TileCoord& at) const {
    const int64_t left = conv.geometry.size[1] - at.column, size = tiling.segment * tiling.lanes;
    if (tiling.order != Tiling::kSegments || left >= size) return {};
    std::vector<Real> mask(size_t(size), Real(0));
    for (int64_t j = 0; j < tiling.segment; ++j) {
      for (int64_t lane = 0; lane < tiling.lanes; ++lane) {
        if (tiling.segment * lane + j < left) {
          std::memset(&mask[size_t(j * tiling.lanes + lane)], 0xff, sizeof(Real));
        }
      }
    }
    return mask;
  }

  // sums[e * v + i] += the contribution of one register block; grad: [O][rows][segment][lanes].
  void dot(const WorkUnit<Real>& unit, const Real* grad, int64_t stride, Real* packed,
           double* sums) const {
    const std::vector<Real> mask = within(unit.at);
    const auto& table = mask.empty() ? kernels.dot : kernels.partial_dot;
    const int64_t v = conv.product.v, size = unit.rows * tiling.segment * tiling.lanes;
    for (int64_t b = 0; b < conv.product.blocks; ++b) {
      const int64_t first = pattern.row_ptr[b], count = pattern.row_ptr[b + 1] - first;
      for (int64_t i = 0; count && i < v;) {
        const int log = log2_rows(v - i);
        for (int64_t k = 0; k < 1 << log; ++k) {
          std::memcpy(packed + k * size, grad + (b * v + i + k) * stride,
                      size_t(size) * sizeof(Real));
        }
        table[log][tiling.segment - 1][unit.rows - 1](unit.tile, tiling.row_stride,
                                                      pattern.entries.get() + first, count, packed,
                                                      mask.data(), sums + first * v + i, v);
        i += int64_t(1) << log;
      }
    }
  }

  // Adds the contributions of the work units first..last - 1 to sums [E, v].
  void add_split(const void* x, const void* grad, int64_t first, int64_t last, double* sums) const {
    static thread_local ThreadScratch<Real> memory;
    const Geometry& by = conv.geometry;
    const Geometry grad_by = grad_geometry();
    const Tiling grad_tiles = grad_tiling();
    const int64_t tile_size = tiling.tile_size(), grad_size = grad_tiles.tile_size();
    const int64_t line = TileReader<T>::line_size(by, tiling);
    Real* const tile = memory.get(tile_size + grad_size + 4 * tiling.block_size() + line +
                                  TileReader<T>::line_size(grad_by, grad_tiles));
    Real* const pixels = tile + tile_size;
    Real* const packed = pixels + grad_size;
    const TileReader<T> reader(kernels, by, tiling, x, packed + 4 * tiling.block_size());
    const TileReader<T> grads(kernels, grad_by, grad_tiles, grad,
                              packed + 4 * tiling.block_size() + line);
    for_each_tile(
        tiling, by, first, last,
        [&](const TileCoord& at, int64_t rows) { reader.fill(at, rows, 0, by.channels, tile); },
        [&](const TileCoord& at, int64_t rows, int64_t below) {
          grads.fill(at, rows, 0, by.rows, pixels);
          dot({tile + below * tiling.row_stride, rows, at}, pixels, grad_tiles.channel_stride,
              packed, sums);
        });
  }

  void operator()(const void* x, const void* grad, typename T::Bits* to,
                  int64_t num_threads) const {
    const int64_t numel = conv.product.entries * conv.product.v;
    const int64_t work_units = tiling.work_units(conv.geometry);
    const int64_t dense = conv.geometry.rows * conv.geometry.length() * int64_t(sizeof(Real));
    const int64_t bytes = std::max<int64_t>(1, numel) * int64_t(sizeof(double));
    const int64_t splits = std::clamp<int64_t>(
        dense / bytes, 1, std::min(kMaxSplits, std::max<int64_t>(1, work_units)));
    std::vector<double> sums(size_t(numel * splits));
    num_threads = std::min(num_threads, splits);
    for_threads(num_threads, [&](int64_t thread) {
      for (int64_t p = thread; p < splits; p += num_threads) {
        add_split(x, grad, work_units * p / splits, work_units * (p + 1) / splits,
                  sums.data() + p * numel);
      }
    });
    for (int64_t p = 1; p < splits; ++p) {
      for (int64_t e = 0; e < numel; ++e) sums[size_t(e)] += sums[size_t(p * numel + e)];
    }
    for (int64_t e = 0; e < numel; ++e) to[e] = rounded<T>(Real(sums[size_t(e)]));
  }
};

struct ValuesGradTensors {
  const Tensor& x;
  const Tensor& grad;
  const Tensor& columns;
  const Tensor& starts;
  const Tensor& values_grad;
};

inline void compute_values_grad(const Convolution& conv, bool tokens, const ValuesGradTensors& t) {
  for_dtype(conv.product.dtype, [&](auto type) {
    using T = decltype(type);
    using Real = typename T::Wide;
    const SparseKernels<Real>& kernels = sparse_kernels<Real>();
    const Tiling tiling = choose_tiling(kernels, conv.geometry, log2_rows(conv.product.v),
                                        pixel_order(conv.geometry, tokens), 1);
    const RowPattern<int32_t> pattern =
        translate(conv.product, t.columns, t.starts, tile_offsets(conv.geometry, tiling));
    const ValuesGrad<T> values_grad = {kernels, conv, tiling, pattern};
    values_grad(t.x.const_data_ptr(), t.grad.const_data_ptr(),
                static_cast<typename T::Bits*>(t.values_grad.mutable_data_ptr()),
                num_threads_for(2 * multiply_adds(conv)));
  });
}

}  // namespace issp
