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

bool& issp::keep_resident() {
  static bool resident = true;
  return resident;
}

#pragma GCC visibility push(default)
extern "C" {

void emulator_options(uint64_t seed, uint32_t resident, int removed, uint32_t processors,
                      uint32_t shared_bytes, int streamed) {
  emulator::options() = {seed, resident, removed, processors, shared_bytes};
  keep_resident() = !streamed;
}
uint64_t emulator_launches() {
  return emulator::launch_count();
}
int emulator_sites() {
  return emulator::site_count();
}
const char* emulator_site_name(int number) {
  static std::string name;
  name = emulator::site_name(number);
  return name.c_str();
}
uint64_t emulator_switches() {
  return emulator::switch_count();
}

// The shapes the kernels were built with.
void emulator_shapes(uint32_t* tile, uint32_t* bins, uint32_t* tables) {
  *tile = kTile;
  *bins = kBins;
  *tables = kLargeTable;
}

const char* emulated_soft_shrink(int dtype, int count, void** data, const int64_t* numels, void* k,
                                 double shrink, void* thresholds, void* masks, void* flips,
                                 void* scratch, void* found_inf, int bracket) {
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
      soft_shrink<T>(items, call, nullptr, keep_resident());
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

const char* emulated_nm_prune(int dtype, void* weight, int64_t numel, int64_t channels,
                              int64_t positions, int64_t n, int64_t m, int64_t v, double shrink,
                              void* pruned, void* mask) {
  return guarded([&] {
    const Groups groups = {uint32_t(channels), uint32_t(positions), uint32_t(m),
                           uint32_t(v),        uint32_t(m - n),     uint32_t(numel)};
    std::vector<uint32_t> cuts;
    if (needs_cuts(groups)) cuts.resize(size_t(group_count(groups)) * kCutWords, 0xdeadbeefu);
    with_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      nm_prune<T>(allowed<const typename T::Bits>(weight, numel), groups, shrink,
                  allowed<typename T::Bits>(pruned, numel),
                  allowed<uint32_t>(mask, mask_words(numel)),
                  cuts.empty() ? nullptr : allowed<uint32_t>(cuts.data(), cuts.size()), nullptr);
    });
  });
}

}  // extern "C"
#pragma GCC visibility pop
