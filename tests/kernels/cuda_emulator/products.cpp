// The sparse products of csrc/cuda behind a C interface.
#include <vector>

#include "emulator.h"
#include "entries.h"
#include "product_forward.cuh"
#include "product_grad.cuh"

namespace {

using namespace issp;

uint64_t bytes_of(Storage storage) {
  return storage == Storage::kFloat32 ? 4 : storage == Storage::kFloat64 ? 8 : 2;
}

const void* allowed_values(const void* data, uint64_t count, Storage storage) {
  if (data != nullptr) emulator::allow(data, count * bytes_of(storage));
  return data;
}

Lists allowed_lists(const Lists& lists) {
  emulator::allow(lists.columns, uint64_t(lists.entries) * 4);
  emulator::allow(lists.starts, (uint64_t(lists.rows) / lists.v + 1) * 4);
  return lists;
}

// Numbers of each kind of tensor.
struct Extent {
  uint64_t x, y;
};

Extent extent_of(const Window& window) {
  const auto image = [](const uint32_t (&sides)[2]) { return uint64_t(sides[0]) * sides[1]; };
  return {window.batch * window.channels * image(window.input),
          window.batch * window.rows * image(window.output)};
}

Ends allowed_ends(const Ends& ends, const Lists& lists, uint64_t y, Storage storage) {
  allowed_values(ends.bias, lists.rows, storage);
  allowed_values(ends.residual, y, storage);
  allowed_values(ends.result, y, storage);
  return ends;
}

// As summed_values() in sparse_values_grad.cu.
template <typename Add>
void sum_values(const Lists& lists, uint32_t splits, Storage storage, void* found, const Add& add) {
  const uint64_t values = uint64_t(lists.entries) * lists.v;
  const bool wide = bytes_of(storage) >= 4;
  allowed_values(found, values, storage);
  if (values == 0 || (wide && splits == 1)) {
    memset(found, 0, values * bytes_of(storage));
    if (values > 0) add(found);
    return;
  }
  std::vector<double> totals(values * splits, 0.0);  // large enough for either kind of sum
  emulator::allow(totals.data(), totals.size() * (storage == Storage::kFloat64 ? 8 : 4));
  add(totals.data());
  sum_totals(lists, splits, storage, totals.data(), found, nullptr);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* emulated_sparse_conv2d(const Window* window, const Lists* lists, uint32_t storage,
                                   const void* x, const void* values, const Ends* ends) {
  return guarded([&] {
    const auto kind = Storage(storage);
    const Extent extent = extent_of(*window);
    allowed_values(x, extent.x, kind);
    allowed_values(values, uint64_t(lists->entries) * lists->v, kind);
    sparse_conv2d(*window, allowed_lists(*lists), kind, x, values,
                  allowed_ends(*ends, *lists, extent.y, kind), nullptr);
  });
}

const char* emulated_sparse_matmul(uint64_t tokens, const Lists* lists, uint32_t storage,
                                   const void* x, const void* values, const Ends* ends) {
  return guarded([&] {
    const auto kind = Storage(storage);
    allowed_values(x, tokens * lists->length, kind);
    allowed_values(values, uint64_t(lists->entries) * lists->v, kind);
    sparse_matmul(tokens, allowed_lists(*lists), kind, x, values,
                  allowed_ends(*ends, *lists, tokens * lists->rows, kind), nullptr);
  });
}

const char* emulated_sparse_conv2d_values_grad(const Window* window, const Lists* lists,
                                               uint32_t storage, const void* x, const void* grad,
                                               void* found) {
  return guarded([&] {
    const auto kind = Storage(storage);
    const Extent extent = extent_of(*window);
    allowed_values(x, extent.x, kind);
    allowed_values(grad, extent.y, kind);
    allowed_lists(*lists);
    const uint32_t splits = choose_splits(*lists, tiles_of(*window, kind));
    sum_values(*lists, splits, kind, found, [&](void* totals) {
      sparse_conv2d_values_grad(*window, *lists, kind, x, grad, totals, nullptr);
    });
  });
}

const char* emulated_sparse_matmul_values_grad(uint64_t tokens, const Lists* lists,
                                               uint32_t storage, const void* x, const void* grad,
                                               void* found) {
  return guarded([&] {
    const auto kind = Storage(storage);
    allowed_values(x, tokens * lists->length, kind);
    allowed_values(grad, tokens * lists->rows, kind);
    allowed_lists(*lists);
    const uint32_t splits = choose_splits(*lists, tiles_of(tokens, kind));
    sum_values(*lists, splits, kind, found, [&](void* totals) {
      sparse_matmul_values_grad(tokens, *lists, kind, x, grad, totals, nullptr);
    });
  });
}

}  // extern "C"
#pragma GCC visibility pop
