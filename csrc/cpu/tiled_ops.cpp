// The tiled ops on the CPU: convolutions of bfloat16 images in the layout of tiles/layout.h, by the
// kernels of tiles/tile_kernels.h. Semantics: issp/ops/schemas/tiles.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "cpu/tiles/run_taps.h"

namespace issp {
namespace {

Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

PlainImage plain_image(void* data, const Tensor& x) {
  const auto strides = x.strides();
  return {static_cast<char*>(data), strides[0], strides[1], strides[2], strides[3],
          x.scalar_type()};
}

Tensor to_tiles(const Tensor& x) {
  const TileLayout layout = check_plain(x);
  const Tensor data = empty(x, tiled_shape(layout), ScalarType::BFloat16);
  char* const out = static_cast<char*>(data.mutable_data_ptr());
  const PlainImage from = plain_image(const_cast<void*>(x.const_data_ptr()), x);
  const TileKernels& kernels = tile_kernels();
  const ZeroFrame frame(layout, out);
  for (int64_t image = 0; image < layout.batch; ++image) frame.outer_rows(image);
  for_each_row(layout, kernels, [&](int64_t image, int64_t y) {
    frame.row(image, y);
    kernels.to_tiles(from, layout, image, y, out);
  });
  return data;
}

Tensor from_tiles(const Tensor& data, int64_t channels, int64_t width, ScalarType dtype) {
  const TileLayout layout = check_tiled(data, "data", channels, width);
  require(is_weight_dtype(dtype) && dtype != ScalarType::Double, "dtype");
  const Tensor y = empty(data, {layout.batch, channels, layout.height, width}, dtype);
  const PlainImage to = plain_image(y.mutable_data_ptr(), y);
  const char* const from = static_cast<const char*>(data.const_data_ptr());
  const TileKernels& kernels = tile_kernels();
  for_each_row(layout, kernels, [&](int64_t image, int64_t row) {
    kernels.from_tiles(from, layout, image, row, to);
  });
  return y;
}

struct ConvTensors {
  const Tensor& x;
  const Tensor& values;
  const Tensor& positions;
  const Tensor& starts;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& residual;
};

std::vector<int32_t> translate(const TileKernels& kernels, const TiledConvArgs& args,
                               const Tensor& positions) {
  const int64_t entries = args.tiles * kTileEntries;
  // Zeros: what is read ahead of the last K tile is plane 0.
  std::vector<int32_t> offsets(size_t(entries + kReadAhead * kTileEntries));
  require(kernels.translate(static_cast<const int32_t*>(positions.const_data_ptr()), entries,
                            args.from.planes(), args.taps, int32_t(args.from.plane_bytes()),
                            int32_t(args.from.row_bytes()), offsets.data()),
          "positions");
  return offsets;
}

// For `size` rows, zeros behind those that `bias` has, and in the place of denormals.
std::vector<float> padded(const std::optional<Tensor>& bias, int64_t size) {
  std::vector<float> all(static_cast<size_t>(size));
  if (!bias) return all;
  const auto* from = static_cast<const float*>(bias->const_data_ptr());
  std::transform(from, from + bias->numel(), all.begin(),
                 [](float x) { return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; });
  return all;
}

// frame: whether `out` has no zeros around its pixels yet.
void convolve(const TiledConvArgs& args, const ConvTensors& t, float scale, const Tensor& out,
              bool frame) {
  const TileKernels& kernels = tile_kernels();
  const std::vector<int32_t> offsets = translate(kernels, args, t.positions);
  const std::vector<float> bias = padded(t.bias, args.blocks * args.v);
  const TiledConv conv = {
      args.from,
      static_cast<const uint16_t*>(t.values.const_data_ptr()),
      offsets.data(),
      static_cast<const int32_t*>(t.starts.const_data_ptr()),
      args.blocks,
      args.v,
      {args.to.planes(), args.to.plane_bytes(), args.to.row_bytes(),
       static_cast<char*>(out.mutable_data_ptr()),
       t.residual ? static_cast<const char*>(t.residual->const_data_ptr()) : nullptr, bias.data(),
       args.activation, scale, args.rows, args.shuffle}};
  TiledConvRun(kernels, conv, static_cast<const char*>(t.x.const_data_ptr()), args.to, frame)();
}

Tensor tiled_conv2d(const Tensor& x, const Tensor& values, const Tensor& positions,
                    const Tensor& starts, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& residual, const std::vector<int64_t>& geometry,
                    std::string activation, double scale) {
  const TiledConvArgs args =
      check_tiled_conv2d(x, values, positions, starts, bias, residual, geometry, activation);
  const Tensor out = empty(x, tiled_shape(args.to), ScalarType::BFloat16);
  convolve(args, {x, values, positions, starts, bias, residual}, float(scale), out, true);
  return out;
}

void tiled_conv2d_out(const Tensor& x, const Tensor& values, const Tensor& positions,
                      const Tensor& starts, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, const std::vector<int64_t>& geometry,
                      std::string activation, double scale, const Tensor& out) {
  const TiledConvArgs args =
      check_tiled_conv2d(x, values, positions, starts, bias, residual, geometry, activation);
  check_tiled(out, "out", args.to.channels, args.to.width);
  require(out.size(0) == args.to.batch && out.size(1) == args.to.height + 2, "out");
  const std::vector<const Tensor*> read = {&x, &values, &positions, &starts};
  for (const Tensor* tensor : read) check_no_overlap({byte_range(*tensor), byte_range(out)});
  if (bias) check_no_overlap({byte_range(*bias), byte_range(out)});
  // Every pixel of the residual is read by the tile that replaces it.
  if (residual && residual->const_data_ptr() != out.const_data_ptr()) {
    check_no_overlap({byte_range(*residual), byte_range(out)});
  }
  convolve(args, {x, values, positions, starts, bias, residual}, float(scale), out, false);
}

Tensor tiled_conv2d_by_taps(const Tensor& x, const Tensor& values, const Tensor& positions,
                            const Tensor& starts, const std::optional<Tensor>& bias,
                            const std::vector<int64_t>& geometry) {
  require(geometry.size() == 4 && (geometry[3] == 1 || geometry[3] == 3), "geometry");
  const int64_t channels = geometry[2], kernel = geometry[3];
  require(channels >= 1 && channels <= kMaxTiledSize, "geometry");
  const TiledConvArgs args =
      check_tiled_conv2d(x, values, positions, starts, std::nullopt, std::nullopt,
                         {geometry[0], geometry[1], channels * kernel * kernel, 1, 1}, "none");
  if (bias) check_bias(*bias, channels);
  const TileKernels& kernels = tile_kernels();
  const std::vector<int32_t> offsets = translate(kernels, args, positions);
  const std::vector<float> added = padded(bias, channels);
  const TileLayout& from = args.from;
  const Tensor y = empty(x, {from.batch, channels, from.height, from.width}, ScalarType::Float);
  TiledConv conv = {from,
                    static_cast<const uint16_t*>(values.const_data_ptr()),
                    offsets.data(),
                    static_cast<const int32_t*>(starts.const_data_ptr()),
                    args.blocks,
                    args.v,
                    {}};
  conv.epilogue.rows = args.rows;
  const TapRow row = {{},
                      0,
                      added.data(),
                      channels,
                      kernel,
                      from.width,
                      static_cast<float*>(y.mutable_data_ptr()),
                      from.height * from.width};
  TapConvRun(kernels, conv, static_cast<const char*>(x.const_data_ptr()), row)();
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("to_tiles", TORCH_BOX(&to_tiles));
  m.impl("from_tiles", TORCH_BOX(&from_tiles));
  m.impl("tiled_conv2d", TORCH_BOX(&tiled_conv2d));
  m.impl("tiled_conv2d_out", TORCH_BOX(&tiled_conv2d_out));
  m.impl("tiled_conv2d_by_taps", TORCH_BOX(&tiled_conv2d_by_taps));
}

STABLE_TORCH_LIBRARY_IMPL(issp, CompositeExplicitAutograd, m) {
  m.impl("_tile_capability", TORCH_BOX(&tile_capability));
}

}  // namespace issp
