// The kernels of csrc/cuda behind a C interface. Every function returns null or what went wrong.
#include <cmath>
#include <string>

#include "apply_masks.cuh"
#include "count_zeros.cuh"
#include "emulator.h"
#include "entries.h"
#include "magnitude_statistics.cuh"
#include "magnitude_threshold.cuh"
#include "nm_prune.cuh"
#include "regularize.cuh"
#include "soft_shrink.cuh"

namespace {

using namespace issp;

// dtype: 0 float32, 1 float16, 2 bfloat16, 3 float64.
template <typename Body>
void with_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case 0: return body(Float32{});
    case 1: return body(Float16{});
    case 2: return body(BFloat16{});
    default: return body(Float64{});
  }
}

uint64_t bytes_of(int dtype) {
  return dtype == 0 ? 4 : dtype == 3 ? 8 : 2;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The shapes the kernels were built with.
void emulator_shapes(uint32_t* tile, uint32_t* chunk, uint32_t* tables, uint32_t* strip) {
  *tile = kTile;
  *chunk = kChunkSize;
  *strip = kStripSize;
  *tables = kLargeTable;
}
// Tiles of an N:M tensor, and columns of one; 0: its groups have no room in a tile.
void emulator_nm_tiles(int dtype, const int64_t* pattern, int64_t numel, uint32_t* tiles,
                       uint32_t* columns) {
  with_dtype(dtype, [&](auto type) {
    const NmLayout layout = nm_layout<decltype(type)>(patterns_of(pattern, 1)[0], numel);
    *tiles = layout.tiles;
    *columns = layout.tile_width.divisor * layout.tile_row_blocks;
  });
}

const char* emulated_soft_shrink(int dtype, int count, void** data, const int64_t* numels, void* k,
                                 double shrink, void* thresholds, void* masks, void* flips,
                                 void* scratch, void* found_inf, int bracket,
                                 const int64_t* patterns) {
  return guarded([&] {
    const std::vector<Item> items = items_of(data, numels, count);
    for (const Item& item : items) emulator::allow(item.data, item.numel * bytes_of(dtype));
    with_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      const Call<T> call = {allowed<const int64_t>(k, count),
                            allowed<typename T::Bits>(thresholds, count),
                            allowed<uint32_t>(masks, mask_total(items)),
                            allowed<int64_t>(flips, count),
                            allowed<uint32_t>(scratch, scratch_total(items)),
                            found_inf ? allowed<const float>(found_inf, 1) : nullptr,
                            typename T::Wide(shrink),
                            uint32_t(bracket)};
      soft_shrink<T>(items, patterns_of(patterns, items.size()), call, nullptr);
    });
  });
}

const char* emulated_magnitude_threshold(int dtype, int count, void** data, const int64_t* numels,
                                         const int64_t* k, void* found) {
  return guarded([&] {
    const std::vector<Item> items = items_of(data, numels, count);
    for (const Item& item : items) emulator::allow(item.data, item.numel * bytes_of(dtype));
    const std::vector<uint32_t> ranks(k, k + count);
    with_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      magnitude_threshold<T>(items, ranks, allowed<typename T::Bits>(found, count), nullptr);
    });
  });
}

// count: of all sets together.
const char* emulated_apply_masks(const int* dtypes, int count, void** data, const int64_t* numels,
                                 void* masks, int sets) {
  return guarded([&] {
    const std::vector<Item> items = items_of(data, numels, count / sets);
    std::vector<Place> places;
    for (int i = 0; i < count; ++i) {
      places.push_back({data[i], uint32_t(bytes_of(dtypes[i]))});
      emulator::allow(data[i], numels[i] * bytes_of(dtypes[i]));
    }
    apply_masks(items, places, allowed<const uint32_t>(masks, mask_total(items)), nullptr);
  });
}

// data, numels: of the gradients, then of the weights.
const char* emulated_regularize(int dtype, int count, void** data, const int64_t* numels,
                                void* factors, void* masks) {
  return guarded([&] {
    const std::vector<Item> items = items_of(data, numels, count / 2);
    std::vector<Place> places;
    for (int i = 0; i < count; ++i) {
      places.push_back({data[i], 0});
      emulator::allow(data[i], numels[i] * bytes_of(dtype));
    }
    with_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      regularize<T>(items, places, allowed<const typename T::Wide>(factors, items.size()),
                    allowed<const uint32_t>(masks, mask_total(items)), nullptr);
    });
  });
}

const char* emulated_magnitude_statistics(int dtype, int count, void** data, const int64_t* numels,
                                          void* found) {
  return guarded([&] {
    const std::vector<Item> items = items_of(data, numels, count);
    for (const Item& item : items) emulator::allow(item.data, item.numel * bytes_of(dtype));
    const std::vector<uint32_t> before = tiles_before(items);
    std::vector<double> sums(size_t(statistics_words(before)), NAN);
    with_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      magnitude_statistics<T>(items, before, allowed<double>(sums.data(), sums.size()),
                              allowed<double>(found, 4 * items.size()), nullptr);
    });
  });
}

const char* emulated_count_zeros(const int* dtypes, int count, void** data, const int64_t* numels,
                                 void* zeros) {
  return guarded([&] {
    const std::vector<Item> items = items_of(data, numels, count);
    std::vector<uint32_t> bytes;
    for (int i = 0; i < count; ++i) {
      bytes.push_back(uint32_t(bytes_of(dtypes[i])));
      emulator::allow(data[i], numels[i] * bytes.back());
    }
    count_zeros(items, bytes, allowed<int64_t>(zeros, items.size()), nullptr);
  });
}

const char* emulated_nm_prune(int dtype, void* weight, int64_t numel, const int64_t* pattern,
                              double shrink, void* pruned, void* mask) {
  return guarded([&] {
    with_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      nm_prune<T>(allowed<const typename T::Bits>(weight, numel), numel, patterns_of(pattern, 1)[0],
                  shrink, allowed<typename T::Bits>(pruned, numel),
                  allowed<uint32_t>(mask, mask_words(numel)), nullptr);
    });
  });
}

}  // extern "C"
#pragma GCC visibility pop
