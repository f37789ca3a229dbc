// Checks of the tiled ops that protect memory; see checks.h. issp/ops/validation/tiles.py says what
// is wrong with an argument.
#pragma once

#include "checks_sparse.h"
#include "cpu/tiles/tile_kernels.h"

namespace issp {

// Sizes below which all sizes in bytes fit 64 bits, and those within a row 31.
constexpr int64_t kMaxTiledSize = 1 << 24;
constexpr int64_t kMaxRowBytes = 1 << 29;

inline void check_layout(const TileLayout& layout, const char* name) {
  for (const int64_t size : {layout.batch, layout.channels, layout.height, layout.width}) {
    require(size >= 0 && size <= kMaxTiledSize, name);
  }
  require(layout.channels >= 1 && layout.row_bytes() <= kMaxRowBytes, name);
  require(layout.height + 2 <= INT64_MAX / 2 / kMaxRowBytes / std::max<int64_t>(1, layout.batch),
          name);
}

inline std::vector<int64_t> tiled_shape(const TileLayout& layout) {
  return {layout.batch, layout.height + 2, layout.planes() + 1, layout.pitch(), 2};
}

// The layout of a tiled image of known channels and width.
inline TileLayout check_tiled(const Tensor& data, const char* name, int64_t channels,
                              int64_t width) {
  require(data.scalar_type() == ScalarType::BFloat16 && data.dim() == 5 && is_in_memory(data) &&
              data.size(1) >= 2,
          name);
  const TileLayout layout = {data.size(0), channels, data.size(1) - 2, width};
  check_layout(layout, name);
  const std::vector<int64_t> shape = tiled_shape(layout);
  for (size_t i = 0; i < shape.size(); ++i) require(data.size(int64_t(i)) == shape[i], name);
  return layout;
}

// An image [N, C, H, W] of any strides that lies in its memory.
inline TileLayout check_plain(const Tensor& x) {
  require(is_weight_dtype(x.scalar_type()) && x.scalar_type() != ScalarType::Double && x.dim() == 4,
          "x");
  const auto sizes = x.sizes(), strides = x.strides();
  const TileLayout layout = {sizes[0], sizes[1], sizes[2], sizes[3]};
  check_layout(layout, "x");
  if (x.numel() == 0) return layout;
  int64_t held = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &held));
  const int64_t size = int64_t(x.element_size());
  int64_t room = held / size - x.storage_offset() - 1;
  for (size_t i = 0; i < 4; ++i) {
    require(strides[i] >= 0 && (sizes[i] == 1 || strides[i] <= room / (sizes[i] - 1)), "x");
    room -= strides[i] * (sizes[i] - 1);
  }
  require(room >= 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % uintptr_t(size) == 0, "x");
  return layout;
}

inline void check_bias(const Tensor& bias, int64_t rows) {
  require(bias.scalar_type() == ScalarType::Float && bias.dim() == 1 && is_in_memory(bias) &&
              bias.numel() == rows,
          "bias");
}

// geometry: channels and width of x, rows of the weight, kernel, shuffle.
struct TiledConvArgs {
  TileLayout from, to;
  int64_t blocks, tiles, rows, taps, shuffle;
  int v;
  TileActivation activation = TileActivation::kNone;
};

// The weight of a layer, in the order of the arguments of tiled_conv2d.
struct WeightTensors {
  const Tensor& values;
  const Tensor& positions;
  const Tensor& starts;
  std::optional<Tensor> bias;
};

// A layer that reads an image of this layout; x is a tensor of its device.
inline TiledConvArgs check_layer(const TileLayout& from, const Tensor& x, const WeightTensors& w,
                                 int64_t rows, int64_t kernel, int64_t shuffle) {
  TiledConvArgs args;
  args.from = from;
  args.rows = rows;
  args.shuffle = shuffle;
  require(kernel == 1 || kernel == 3, "geometry");
  args.taps = kernel * kernel;
  require(shuffle >= 1 && shuffle <= 16 && rows >= 1 && rows <= kMaxTiledSize, "geometry");
  const int64_t factor = shuffle * shuffle;
  require(rows % factor == 0, "geometry");
  require(w.values.scalar_type() == ScalarType::BFloat16 && w.values.dim() == 4 &&
              is_in_memory(w.values) && w.values.size(1) >= 1 &&
              w.values.size(1) <= kMaxBlock / 16 && w.values.size(2) == 16 &&
              w.values.size(3) == 2 * kTileEntries,
          "values");
  args.v = int(16 * w.values.size(1));
  args.tiles = w.values.size(0);
  check_integers(x, w.starts, "tile_starts");
  args.blocks = (rows + args.v - 1) / args.v;
  require(w.starts.numel() == args.blocks + 1, "tile_starts");
  require(w.positions.scalar_type() == ScalarType::Int && w.positions.dim() == 2 &&
              is_in_memory(w.positions) && w.positions.size(0) == args.tiles &&
              w.positions.size(1) == kTileEntries,
          "positions");
  const auto* start = static_cast<const int32_t*>(w.starts.const_data_ptr());
  require(start[0] == 0 && start[args.blocks] == args.tiles, "tile_starts");
  for (int64_t i = 0; i < args.blocks; ++i) require(start[i] <= start[i + 1], "tile_starts");
  if (w.bias) check_bias(*w.bias, rows);
  args.to = {from.batch, rows / factor, from.height * shuffle, from.width * shuffle};
  check_layout(args.to, "x");
  return args;
}

inline TiledConvArgs check_tiled_conv2d(const Tensor& x, const WeightTensors& w,
                                        const std::optional<Tensor>& residual,
                                        const std::vector<int64_t>& geometry,
                                        const std::string& activation) {
  require(geometry.size() == 5, "geometry");
  const TileLayout from = check_tiled(x, "x", geometry[0], geometry[1]);
  TiledConvArgs args = check_layer(from, x, w, geometry[2], geometry[3], geometry[4]);
  if (residual) {
    require(args.shuffle == 1, "residual");
    check_tiled(*residual, "residual", args.to.channels, args.to.width);
    require(residual->size(0) == args.to.batch && residual->size(1) == args.to.height + 2,
            "residual");
  }
  if (activation == "relu") {
    args.activation = TileActivation::kRelu;
  } else if (activation == "gelu") {
    args.activation = TileActivation::kGelu;
  } else {
    require(activation == "none", "activation");
  }
  return args;
}

}  // namespace issp
