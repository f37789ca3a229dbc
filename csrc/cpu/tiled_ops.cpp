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

// A layer that is checked: nothing is written before.
struct Layer {
  TiledConvArgs args;
  const WeightTensors& weight;
  float scale;
  std::vector<int32_t> offsets;
  std::vector<float> bias;

  Layer(const TiledConvArgs& args, const WeightTensors& weight, double scale)
      : args(args),
        weight(weight),
        scale(float(scale)),
        offsets(translate(tile_kernels(), args, weight.positions)),
        bias(padded(weight.bias, args.blocks * args.v)) {}

  // frame: whether `out` has no zeros around its pixels yet. residual: null, or in the layout of
  // `out`.
  void run(const Tensor& x, const void* residual, const Tensor& out, bool frame) const {
    const TiledConv conv = {
        args.from,
        static_cast<const uint16_t*>(weight.values.const_data_ptr()),
        offsets.data(),
        static_cast<const int32_t*>(weight.starts.const_data_ptr()),
        args.blocks,
        args.v,
        {args.to.planes(), args.to.plane_bytes(), args.to.row_bytes(),
         static_cast<char*>(out.mutable_data_ptr()), static_cast<const char*>(residual),
         bias.data(), args.activation, scale, args.rows, args.shuffle}};
    const auto* const pixels = static_cast<const char*>(x.const_data_ptr());
    TiledConvRun(tile_kernels(), conv, pixels, args.to, frame)();
  }
};

const void* data_of(const std::optional<Tensor>& x) {
  return x ? x->const_data_ptr() : nullptr;
}

// `out` may be the residual: every pixel of it is read by the tile that replaces it.
void check_place(const Tensor& out, const std::vector<const Tensor*>& read) {
  for (const Tensor* tensor : read) check_no_overlap({byte_range(*tensor), byte_range(out)});
}

Tensor tiled_conv2d(const Tensor& x, const Tensor& values, const Tensor& positions,
                    const Tensor& starts, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& residual, const std::vector<int64_t>& geometry,
                    std::string activation, double scale) {
  const WeightTensors weight = {values, positions, starts, bias};
  const Layer layer(check_tiled_conv2d(x, weight, residual, geometry, activation), weight, scale);
  const Tensor out = empty(x, tiled_shape(layer.args.to), ScalarType::BFloat16);
  layer.run(x, data_of(residual), out, true);
  return out;
}

void tiled_conv2d_out(const Tensor& x, const Tensor& values, const Tensor& positions,
                      const Tensor& starts, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, const std::vector<int64_t>& geometry,
                      std::string activation, double scale, const Tensor& out) {
  const WeightTensors weight = {values, positions, starts, bias};
  const Layer layer(check_tiled_conv2d(x, weight, residual, geometry, activation), weight, scale);
  const TileLayout& to = layer.args.to;
  check_tiled(out, "out", to.channels, to.width);
  require(out.size(0) == to.batch && out.size(1) == to.height + 2, "out");
  check_place(out, {&x, &values, &positions, &starts});
  if (bias) check_place(out, {&*bias});
  if (residual && residual->const_data_ptr() != out.const_data_ptr()) {
    check_place(out, {&*residual});
  }
  layer.run(x, data_of(residual), out, false);
}

Tensor tiled_conv2d_by_taps(const Tensor& x, const Tensor& values, const Tensor& positions,
                            const Tensor& starts, const std::optional<Tensor>& bias,
                            const std::vector<int64_t>& geometry) {
  require(geometry.size() == 4 && (geometry[3] == 1 || geometry[3] == 3), "geometry");
  const int64_t channels = geometry[2], kernel = geometry[3];
  require(channels >= 1 && channels <= kMaxTiledSize, "geometry");
  const WeightTensors weight = {values, positions, starts, {}};
  const TiledConvArgs args = check_tiled_conv2d(
      x, weight, {}, {geometry[0], geometry[1], channels * kernel * kernel, 1, 1}, "none");
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

// Layers one after the other; see tiled_chain in issp/ops/schemas/tiles.py.
class Chain {
 public:
  Chain(const std::vector<Tensor>& images, const std::vector<int64_t>& sizes,
        const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
        const std::vector<int64_t>& plan, const std::vector<double>& scales)
      : given_(images.size()) {
    const size_t layers = scales.size();
    require(layers >= 1 && !images.empty() && sizes.size() == 2 * images.size(), "images");
    require(weights.size() == 3 * layers && biases.size() == layers, "weights");
    require(plan.size() == kNumbers * layers, "plan");
    for (size_t i = 0; i < images.size(); ++i) {
      const TileLayout layout = check_tiled(images[i], "images", sizes[2 * i], sizes[2 * i + 1]);
      slots_.push_back({layout, images[i]});
    }
    weights_.reserve(layers);  // layers refer to them
    layers_.reserve(layers);
    for (size_t i = 0; i < layers; ++i) {
      std::optional<Tensor> bias;
      if (biases[i].numel()) bias = biases[i];
      weights_.push_back({weights[3 * i], weights[3 * i + 1], weights[3 * i + 2], bias});
      add_layer(&plan[kNumbers * i], scales[i]);
    }
    check_given(weights, biases);
  }

  // Gives the last layer's target, or nothing where that was given.
  Tensor run() {
    for (size_t i = 0; i < layers_.size(); ++i) {
      const auto& [layer, from, residual, to] = layers_[i];
      const bool is_new = !slots_[to].image;
      if (is_new) {
        const std::vector<int64_t> shape = tiled_shape(slots_[to].layout);
        slots_[to].image = empty(*slots_[0].image, shape, ScalarType::BFloat16);
      }
      const void* added = residual == kNone ? nullptr : slots_[residual].image->const_data_ptr();
      layer.run(*slots_[from].image, added, *slots_[to].image, is_new);
      if (i + 1 == layers_.size()) break;
      for (const size_t slot : {from, to, residual}) {
        if (slot != kNone && slot >= given_ && slots_[slot].last == i) slots_[slot].image.reset();
      }
    }
    const size_t last = layers_.back().to;
    return last < given_ ? empty(*slots_[0].image, {0}, ScalarType::BFloat16) : *slots_[last].image;
  }

 private:
  static constexpr size_t kNumbers = 7, kNone = size_t(-1);
  struct Slot {
    TileLayout layout;
    std::optional<Tensor> image;
    size_t last = 0;  // the layer that is the last to read or write it
    bool is_written = false;
  };
  struct Step {
    Layer layer;
    size_t from, residual, to;
  };

  // numbers: source, residual or -1, target, rows, kernel, shuffle, activation.
  void add_layer(const int64_t* numbers, double scale) {
    const WeightTensors& weight = weights_.back();
    const size_t from = slot(numbers[0]);
    const size_t residual = numbers[1] == -1 ? kNone : slot(numbers[1]);
    TiledConvArgs args = check_layer(slots_[from].layout, *slots_[0].image, weight, numbers[3],
                                     numbers[4], numbers[5]);
    require(numbers[6] >= 0 && numbers[6] <= 2, "activation");
    args.activation = TileActivation(numbers[6]);
    if (residual != kNone) {
      require(args.shuffle == 1 && slots_[residual].layout == args.to, "residual");
    }
    if (numbers[2] == int64_t(slots_.size())) slots_.push_back({args.to, {}});
    const size_t to = slot(numbers[2]);
    require(slots_[to].layout == args.to && to != from, "plan");
    slots_[to].is_written = true;
    for (const size_t used : {from, to, residual}) {
      if (used != kNone) slots_[used].last = layers_.size();
    }
    layers_.push_back({Layer(args, weight, scale), from, residual, to});
  }

  size_t slot(int64_t number) const {
    require(number >= 0 && number < int64_t(slots_.size()), "plan");
    return size_t(number);
  }

  // An image that is given and written overlaps no other, and no weight.
  void check_given(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) const {
    for (size_t i = 0; i < given_; ++i) {
      if (!slots_[i].is_written) continue;
      const Tensor& out = *slots_[i].image;
      for (size_t other = 0; other < given_; ++other) {
        if (other != i) check_place(out, {&*slots_[other].image});
      }
      for (const Tensor& weight : weights) check_place(out, {&weight});
      for (const Tensor& bias : biases) check_place(out, {&bias});
    }
  }

  const size_t given_;
  std::vector<Slot> slots_;
  std::vector<WeightTensors> weights_;
  std::vector<Step> layers_;
};

Tensor tiled_chain(const std::vector<Tensor>& images, const std::vector<int64_t>& sizes,
                   const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                   const std::vector<int64_t>& plan, const std::vector<double>& scales) {
  return Chain(images, sizes, weights, biases, plan, scales).run();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("to_tiles", TORCH_BOX(&to_tiles));
  m.impl("from_tiles", TORCH_BOX(&from_tiles));
  m.impl("tiled_conv2d", TORCH_BOX(&tiled_conv2d));
  m.impl("tiled_conv2d_out", TORCH_BOX(&tiled_conv2d_out));
  m.impl("tiled_conv2d_by_taps", TORCH_BOX(&tiled_conv2d_by_taps));
  m.impl("tiled_chain", TORCH_BOX(&tiled_chain));
}

STABLE_TORCH_LIBRARY_IMPL(issp, CompositeExplicitAutograd, m) {
  m.impl("_tile_capability", TORCH_BOX(&tile_capability));
}

}  // namespace issp
