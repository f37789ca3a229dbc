// soft_shrink_: exact per-tensor selection, shrinkage, packed mask and flips for the whole model
// (issp/ops/schemas/pruning.py has the semantics). One launch for all tensors that fit in the
// shared memory of the blocks that run at a time (resident.cuh), two more if there are others
// (streamed.cuh), one for all that have an N:M pattern (nm_shrink.cuh). Nothing waits on the host:
// k, thresholds, found_inf are read on the device.
#pragma once

#include "nm_shrink.cuh"
#include "resident.cuh"
#include "streamed.cuh"

namespace issp {

inline uint32_t parts_of(int64_t numel, uint32_t slots) {
  return slots ? (tiles_of(numel) + slots - 1) / slots : UINT32_MAX;
}

// complete(entry, i) adds to an entry what the update wants to know, and to `extra` what it is.
template <typename T, typename Update, typename Complete>
void launch_resident(const std::vector<Item>& items, const std::vector<uint32_t>& chosen,
                     const Call<T>& call, const Update& update, const Complete& complete,
                     const Residency& room, Stream stream) {
  const uint32_t slots = room.slots ? room.slots : 1;
  const auto write = [&](typename Update::Entry& entry, size_t i, uint32_t first_part) {
    fill(entry, items[chosen[i]], chosen[i], first_part);
    complete(entry, chosen[i]);
    return parts_of(items[chosen[i]].numel, slots);
  };
  for_tables_of<typename Update::Entry>(chosen.size(), write, [&](const auto& table) {
    constexpr int capacity = std::decay_t<decltype(table)>::kCapacity;
    const uint32_t blocks = table.tiles < room.blocks ? table.tiles : room.blocks;
    const bool several = table.tiles > blocks || table.tiles > table.count;
    const Plan plan = {slots, Update::kUpdates || several};
    launch_together(resident_kernel<T, Update, capacity>, blocks, kThreads, room.shared_bytes,
                    stream, table, call, update, plan);
  });
}

template <typename T, typename Update, typename Complete>
void launch_streamed(const std::vector<Item>& items, const std::vector<uint32_t>& chosen,
                     const Call<T>& call, const Update& update, const Complete& complete,
                     Stream stream) {
  const auto write = [&](typename Update::Entry& entry, size_t i, uint32_t first_tile) {
    fill(entry, items[chosen[i]], chosen[i], first_tile);
    complete(entry, chosen[i]);
    return tiles_of(items[chosen[i]].numel);
  };
  for_tables_of<typename Update::Entry>(chosen.size(), write, [&](const auto& table) {
    constexpr int capacity = std::decay_t<decltype(table)>::kCapacity;
    launch(count_kernel<T, Update, capacity>, table.tiles, kThreads, kSharedBytes, stream, table,
           call, update);
    if (Update::kUpdates || table.tiles > table.count) {
      launch(apply_kernel<T, Update, capacity>, table.tiles, kThreads, kSharedBytes, stream, table,
             call, update);
    }
  });
}

// The first `pruned` items are selected from, the others only updated. patterns: of the pruned
// items, or empty. `resident`: where it fits.
template <typename T, typename Update, typename Complete>
void shrink_model(const std::vector<Item>& items, const std::vector<Pattern>& patterns,
                  size_t pruned, const Call<T>& call, const Update& update,
                  const Complete& complete, Stream stream, bool resident) {
  check_sizes(items);
  const Residency room = residency<T, Update>();
  std::vector<uint32_t> grouped, stay, stream_through;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i < pruned && i < patterns.size() && patterns[i].m) {
      grouped.push_back(uint32_t(i));
      continue;
    }
    const bool fits = resident && parts_of(items[i].numel, room.slots) <= room.blocks;
    (fits || i >= pruned ? stay : stream_through).push_back(uint32_t(i));
  }
  launch_grouped<T>(items, patterns, grouped, {call, nullptr}, update, complete, stream);
  launch_resident(items, stay, call, update, complete, room, stream);
  launch_streamed(items, stream_through, call, update, complete, stream);
}

template <typename T>
void soft_shrink(const std::vector<Item>& items, const std::vector<Pattern>& patterns,
                 const Call<T>& call, Stream stream, bool resident = true) {
  const auto complete = [](Entry&, size_t) {};
  shrink_model(items, patterns, items.size(), call, NoUpdate{}, complete, stream, resident);
}

}  // namespace issp
