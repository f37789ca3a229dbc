// soft_shrink_: exact per-tensor selection, shrinkage, packed mask and flips for the whole model
// (issp/ops/schemas/pruning.py has the semantics). Two launches (speculate.cuh, settle.cuh), and
// one for all tensors that have an N:M pattern (nm_shrink.cuh). Nothing waits on the host: k,
// thresholds, found_inf are read on the device.
#pragma once

#include <algorithm>

#include "nm_shrink.cuh"
#include "settle.cuh"

namespace issp {

// Rounds of 64 ns or more that a block waits for another one in debug mode: some seconds. Blocks of
// the first launch that a processor should have before they take several chunks.
#if defined(ISSP_SMALL_SHAPES)
constexpr uint32_t kPatience = 1000, kBlocksWanted = 1;
#else
constexpr uint32_t kPatience = 1u << 26, kBlocksWanted = 8;
#endif

// All that a step may launch, before it launches anything.
template <typename T, typename Update>
void require_kernels() {
  using E = typename Update::Entry;
  using G = GroupEntry<E>;
  require_kernel(speculate_kernel<T, Update, kSmall<E>>, kStepThreads);
  require_kernel(speculate_kernel<T, Update, kLarge<E>>, kStepThreads);
  require_kernel(settle_kernel<T, Update, kSmall<E>>, kStepThreads);
  require_kernel(settle_kernel<T, Update, kLarge<E>>, kStepThreads);
  require_kernel(group_kernel<T, Update, true, kSmall<G>>, kThreads);
  require_kernel(group_kernel<T, Update, true, kLarge<G>>, kThreads);
  require_kernel(group_kernel<T, Update, false, kSmall<G>>, kThreads);
  require_kernel(group_kernel<T, Update, false, kLarge<G>>, kThreads);
}

// Chunks of a block of the first launch: more of them cost less per weight, fewer leave no
// processor idle while a small model is pruned.
template <typename T, typename Update>
uint32_t chunks_of_block(const std::vector<Item>& items, const std::vector<uint32_t>& chosen) {
  const auto ask = [](auto) { return room_of_device().processors; };
  using E = typename Update::Entry;
  const uint64_t processors = once_per_device(speculate_kernel<T, Update, kSmall<E>>, ask);
  uint64_t chunks = 0;
  for (const uint32_t i : chosen) chunks += pieces_of(uint32_t(items[i].numel), kChunkSize);
  return uint32_t(std::clamp<uint64_t>(chunks / (kBlocksWanted * processors), 1, kMostChunks));
}

// complete(entry, i) adds to an entry what the update wants to know, and to `extra` what it is.
// The tensors from number `pruned` on are only updated.
template <typename T, typename Update, typename Complete>
void launch_step(const std::vector<Item>& items, const std::vector<uint32_t>& chosen, size_t pruned,
                 const Call<T>& call, const Update& update, const Complete& complete,
                 Stream stream) {
  using E = typename Update::Entry;
  const uint32_t chunks = chunks_of_block<T, Update>(items, chosen);
  const auto write = [&](E& entry, size_t i, uint32_t first) {
    fill(entry, items[chosen[i]], chosen[i], first);
    complete(entry, chosen[i]);
    return pieces_of(pieces_of(entry.numel, kChunkSize), chunks);
  };
  for_tables_of<E>(chosen.size(), write, [&](auto table) {
    constexpr int capacity = decltype(table)::kCapacity;
    table.chunks = chunks;
    launch(speculate_kernel<T, Update, capacity>, table.tiles, kStepThreads, kSharedBytes, stream,
           table, call, update);
    table.tiles = 0;
    for (uint32_t t = 0; t < table.count; ++t) {
      table.entries[t].first_tile = table.tiles;
      const bool selects = (table.entries[t].extra & kTensorBits) < pruned;
      table.tiles += selects ? pieces_of(table.entries[t].numel, kStripSize) : 0;
    }
    launch(settle_kernel<T, Update, capacity>, std::max(table.tiles, 1u), kStepThreads,
           kSharedBytes, stream, table, call, update);
  });
}

// The first `pruned` items are selected from, the others only updated. patterns: of the pruned
// items, or empty.
template <typename T, typename Update, typename Complete>
void shrink_model(const std::vector<Item>& items, const std::vector<Pattern>& patterns,
                  size_t pruned, Call<T> call, const Update& update, const Complete& complete,
                  Stream stream) {
  check_sizes(items);
  require_kernels<T, Update>();
  call.undoable = can_be_undone(T{}, call.shrink);
  call.patience = debugs() ? kPatience : 0;
  std::vector<uint32_t> grouped, single;
  for (size_t i = 0; i < items.size(); ++i) {
    const bool has_pattern = i < pruned && i < patterns.size() && patterns[i].m;
    (has_pattern ? grouped : single).push_back(uint32_t(i));
  }
  // The last block of a tensor selects alone: while it does, the others read smaller tensors.
  std::stable_sort(single.begin(), single.end(),
                   [&](uint32_t a, uint32_t b) { return items[a].numel > items[b].numel; });
  launch_grouped<T>(items, patterns, grouped, {call, nullptr}, update, complete, stream);
  launch_step(items, single, pruned, call, update, complete, stream);
}

template <typename T>
void soft_shrink(const std::vector<Item>& items, const std::vector<Pattern>& patterns,
                 const Call<T>& call, Stream stream) {
  const auto complete = [](Entry&, size_t) {};
  shrink_model(items, patterns, items.size(), call, NoUpdate{}, complete, stream);
}

}  // namespace issp
