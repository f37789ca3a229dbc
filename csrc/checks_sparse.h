// Argument checks of sparse convolutions and matrix products, CPU and CUDA. See checks.h.
// The CPU ops also check the columns, which they can read without waiting for a device.
#pragma once

#include "checks.h"

namespace issp {

// Height and width. std::array would compare two of them with a call of memcmp, for every plane of
// a tile.
struct Pair {
  int64_t height, width;

  int64_t& operator[](size_t axis) { return axis == 0 ? height : width; }
  const int64_t& operator[](size_t axis) const { return axis == 0 ? height : width; }
  friend bool operator==(const Pair& a, const Pair& b) {
    return a.height == b.height && a.width == b.width;
  }
  friend bool operator!=(const Pair& a, const Pair& b) { return !(a == b); }
};

// The sizes and the window of a convolution; see sparse_conv2d in issp/ops/schemas/sparse.py.
struct Geometry {
  int64_t batch, channels, rows;
  Pair input, kernel, stride, padding, dilation, upsample, size;

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t length() const { return channels * taps(); }
};

enum class Activation { kNone, kRelu, kGelu };

// Limits that keep products of sizes in 64 bits and tables of positions in memory. Also in
// issp/ops/validation/sparse.py.
constexpr int64_t kMaxSize = INT32_MAX;
constexpr int64_t kMaxPositions = 1 << 24;  // of a row of the weight

// The checked arguments that all sparse ops share. entries: number of columns, with v values each.
// blocks: number of blocks of v rows.
struct Product {
  ScalarType dtype;
  int64_t v, entries, blocks;
  Activation activation = Activation::kNone;
  double scale = 1;     // of activated sums
  int64_t shuffle = 1;  // the factor of a PixelShuffle of the result
};

inline void check_data(const Tensor& x, const char* name) {
  require(is_weight_dtype(x.scalar_type()) && is_in_memory(x), name);
}

inline void check_image(const Tensor& x, const char* name) {
  check_data(x, name);
  require(x.dim() == 4, name);
  for (const int64_t size : x.sizes()) require(size <= kMaxSize, name);
}

inline void check_like(const Tensor& x, const Tensor& other, const char* name,
                       const std::vector<int64_t>& shape) {
  check_data(other, name);
  bool same = other.scalar_type() == x.scalar_type() && other.device() == x.device() &&
              other.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = other.size(int64_t(i)) == shape[i];
  require(same, name);
}

inline void check_integers(const Tensor& x, const Tensor& list, const char* name) {
  require(list.scalar_type() == ScalarType::Int && list.device() == x.device() && list.dim() == 1 &&
              is_in_memory(list),
          name);
}

inline Product check_row_pattern(const Tensor& x, const Tensor& columns, const Tensor& starts,
                                 int64_t v) {
  require(v >= 1, "v");
  check_integers(x, columns, "columns");
  check_integers(x, starts, "starts");
  require(starts.numel() >= 2, "starts");
  require(v <= kMaxSize / (starts.numel() - 1), "v");
  return {x.scalar_type(), v, columns.numel(), starts.numel() - 1};
}

inline Product check_weight(const Tensor& x, const Tensor& values, const Tensor& columns,
                            const Tensor& starts, const std::vector<Tensor>& transposed,
                            int64_t inputs, const std::string& activation) {
  check_data(values, "values");
  require(
      values.dim() == 2 && values.scalar_type() == x.scalar_type() && values.device() == x.device(),
      "values");
  Product product = check_row_pattern(x, columns, starts, values.size(1));
  require(values.size(0) == product.entries, "values");
  if (!transposed.empty()) {
    require(transposed.size() == 3, "transposed");
    const int64_t all = product.entries * product.v;
    for (size_t i = 0; i < 3; ++i) {
      check_integers(x, transposed[i], "transposed");
      require(transposed[i].numel() == (i == 1 ? inputs + 1 : all), "transposed");
    }
  }
  if (activation == "relu") {
    product.activation = Activation::kRelu;
  } else if (activation == "gelu") {
    product.activation = Activation::kGelu;
  } else {
    require(activation == "none", "activation");
  }
  return product;
}

inline Pair check_pair(const int64_t* pair, const char* name, int64_t least = 1) {
  for (int i = 0; i < 2; ++i) require(pair[i] >= least && pair[i] <= kMaxSize, name);
  return {pair[0], pair[1]};
}

inline void check_positions(int64_t channels, int64_t taps) {
  require(taps <= kMaxPositions && channels <= kMaxPositions / taps, "the number of positions");
}

inline std::vector<int64_t> image_shape(const Geometry& by) {
  return {by.batch, by.rows, by.size[0], by.size[1]};
}

// The numbers with which both geometry lists begin: kernel, stride, padding, dilation.
inline Geometry check_window(const Tensor& x, int64_t rows, const std::vector<int64_t>& numbers) {
  const auto sizes = x.sizes();
  const Geometry by = {sizes[0],
                       sizes[1],
                       rows,
                       {sizes[2], sizes[3]},
                       check_pair(&numbers[0], "kernel"),
                       check_pair(&numbers[2], "stride"),
                       check_pair(&numbers[4], "padding", -kMaxSize),
                       check_pair(&numbers[6], "dilation"),
                       {1, 1},
                       {1, 1}};
  check_positions(by.channels, by.taps());
  return by;
}

struct Convolution {
  Product product;
  Geometry geometry;
};

inline Convolution check_sparse_conv2d(const Tensor& x, const Tensor& values, const Tensor& columns,
                                       const Tensor& starts, const std::vector<Tensor>& transposed,
                                       const std::optional<Tensor>& bias,
                                       const std::optional<Tensor>& residual,
                                       const std::vector<int64_t>& numbers,
                                       const std::string& activation) {
  check_image(x, "x");
  const Product product =
      check_weight(x, values, columns, starts, transposed, x.size(1), activation);
  require(numbers.size() == 12, "geometry");
  Geometry geometry = check_window(x, product.blocks * product.v, numbers);
  geometry.upsample = check_pair(&numbers[8], "upsample");
  geometry.size = check_pair(&numbers[10], "size");
  if (bias) check_like(x, *bias, "bias", {geometry.rows});
  if (residual) check_like(x, *residual, "residual", image_shape(geometry));
  return {product, geometry};
}

// Adds what sparse_conv2d_fused does beyond sparse_conv2d.
inline Convolution check_sparse_conv2d_fused(Convolution conv, bool has_residual, double scale,
                                             int64_t shuffle) {
  require(shuffle >= 1 && shuffle <= kMaxSize / shuffle, "shuffle");
  require(conv.geometry.rows % (shuffle * shuffle) == 0, "shuffle");
  require(shuffle == 1 || !has_residual, "residual");
  conv.product.scale = scale;
  conv.product.shuffle = shuffle;
  return conv;
}

inline std::vector<int64_t> shuffled_shape(const Convolution& conv) {
  const int64_t by = conv.product.shuffle;
  const std::vector<int64_t> shape = image_shape(conv.geometry);
  return {shape[0], shape[1] / (by * by), shape[2] * by, shape[3] * by};
}

inline Convolution check_sparse_conv2d_values_grad(const Tensor& x, const Tensor& grad,
                                                   const Tensor& columns, const Tensor& starts,
                                                   int64_t v, const std::vector<int64_t>& numbers) {
  check_image(x, "x");
  check_image(grad, "grad");
  const Product product = check_row_pattern(x, columns, starts, v);
  require(numbers.size() == 8, "geometry");
  Geometry geometry = check_window(x, product.blocks * v, numbers);
  geometry.size = {grad.size(2), grad.size(3)};
  check_like(x, grad, "grad", image_shape(geometry));
  return {product, geometry};
}

// A matrix product as a convolution with one tap over an image of one row, channels innermost.
inline Geometry token_geometry(const Tensor& x, int64_t rows) {
  const int64_t inputs = x.size(x.dim() - 1);
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens *= x.size(i);
  check_positions(inputs, 1);
  return {1, inputs, rows, {1, tokens}, {1, 1}, {1, 1}, {0, 0}, {1, 1}, {1, 1}, {1, tokens}};
}

inline std::vector<int64_t> token_shape(const Tensor& x, int64_t rows) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(rows);
  return shape;
}

inline Convolution check_sparse_matmul(const Tensor& x, const Tensor& values, const Tensor& columns,
                                       const Tensor& starts, const std::vector<Tensor>& transposed,
                                       const std::optional<Tensor>& bias,
                                       const std::optional<Tensor>& residual,
                                       const std::string& activation) {
  check_data(x, "x");
  require(x.dim() >= 1, "x");
  const Product product =
      check_weight(x, values, columns, starts, transposed, x.size(x.dim() - 1), activation);
  const int64_t rows = product.blocks * product.v;
  if (bias) check_like(x, *bias, "bias", {rows});
  if (residual) check_like(x, *residual, "residual", token_shape(x, rows));
  return {product, token_geometry(x, rows)};
}

inline Convolution check_sparse_matmul_values_grad(const Tensor& x, const Tensor& grad,
                                                   const Tensor& columns, const Tensor& starts,
                                                   int64_t v) {
  check_data(x, "x");
  require(x.dim() >= 1, "x");
  const Product product = check_row_pattern(x, columns, starts, v);
  check_like(x, grad, "grad", token_shape(x, product.blocks * v));
  return {product, token_geometry(x, product.blocks * v)};
}

}  // namespace issp
