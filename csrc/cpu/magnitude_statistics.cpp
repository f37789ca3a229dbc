// magnitude_statistics on the CPU. Traffic: one read. The sums are taken over tiles of a fixed size
// and merged in tile order, so that the result does not depend on the number of threads or the
// instruction set.
#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "cpu/dtypes.h"
#include "cpu/streaming/streaming_kernels.h"
#include "cpu/threads.h"
#include "statistics.h"

namespace issp {
namespace {

int64_t tile_numel(int64_t numel, int64_t tile) {
  return std::min(kStatisticsTile, numel - tile * kStatisticsTile);
}

Statistics merged(std::vector<PartialSums>& tiles, int64_t numel) {
  const FloatMode mode;
  double scale = tiles[0].scale;
  for (const PartialSums& tile : tiles) scale = std::min(scale, tile.scale);
  for (PartialSums& tile : tiles) tile = rescaled(tile, scale);
  const double pivot = tiles[0].guess, n = double(numel);
  const auto size = [&](size_t i) { return double(tile_numel(numel, int64_t(i))); };
  double sum = 0, mean = 0, squares = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    sum += sum_of(tiles[i], size(i));
    mean += size(i) / n * from_pivot(tiles[i], size(i), pivot);
  }
  for (size_t i = 0; i < tiles.size(); ++i) {
    squares += squares_about(tiles[i], size(i), pivot, mean);
  }
  return statistics(sum / n, squares, n, scale);
}

Tensor magnitude_statistics(const std::vector<Tensor>& tensors) {
  const std::vector<Item> items = check_tensor_list(tensors, true);
  const Tensor result =
      torch::stable::new_empty(tensors[0], {int64_t(items.size()), 4}, ScalarType::Double);
  auto* const rows = static_cast<Statistics*>(result.mutable_data_ptr());
  for_dtype(tensors[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    const StreamingKernels<T>& kernels = streaming_kernels<T>();
    for_each_item(items, sizeof(typename T::Bits), [&](size_t i, int64_t, ThreadGroup threads) {
      const int64_t numel = items[i].numel;
      const int64_t count = (numel + kStatisticsTile - 1) / kStatisticsTile;
      const auto* const data = static_cast<const typename T::Bits*>(items[i].data);
      std::vector<PartialSums> tiles(count);
      threads.run([&](int64_t p) {
        for (int64_t t = count * p / threads.size; t < count * (p + 1) / threads.size; ++t) {
          tiles[size_t(t)] = kernels.sums(data + t * kStatisticsTile, tile_numel(numel, t));
        }
      });
      rows[i] = merged(tiles, numel);
    });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(issp, CPU, m) {
  m.impl("magnitude_statistics", TORCH_BOX(&magnitude_statistics));
}

}  // namespace issp
