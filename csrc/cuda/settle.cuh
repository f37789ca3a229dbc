// Second launch of soft_shrink_: settles what the first one (speculate.cuh) left open. A block
// takes a strip of one tensor: several chunks.
//
// Where the forecast held, it shrinks the strip's share of the selected candidates, less than 1 %
// of the weights, and the rows that were postponed. Where it failed, or where there was none, the
// first pass is undone and the tensor is searched in full. A tensor of one strip is searched by its
// block alone, a larger one by all blocks of the launch, whose work is claimed in ticket order:
// phase 0 (undo) of all strips, phase 1 of all strips, ... A phase counts the digits of the keys
// that are still in the running, 11 bits at a time, then those of the indices of ties; the last
// phase shrinks. A block waits only for work of earlier tickets, which blocks that already run have
// claimed, so there is no deadlock whatever number of blocks is resident. All strips of the model
// stand between a strip's phase and its next one, so waits are rare except in a model of one
// tensor.
//
// Nothing waits on the host, nothing is uploaded, and counters are zero again at the end, so a
// captured graph can be replayed.
#pragma once

#include "speculate.cuh"

namespace issp {

template <typename T>
constexpr uint32_t kKeyPasses = (uint32_t(kKeyBits<T>) + kRadixBits - 1) / kRadixBits;
constexpr uint32_t kIndexPasses = (32 + kRadixBits - 1) / kRadixBits;
// Phase 0 undoes, then passes over keys and indices follow; the last phase shrinks.
template <typename T>
constexpr uint32_t kApplyPhase = 1 + kKeyPasses<T> + kIndexPasses;

template <typename T>
ISSP_DEVICE Threshold<Key<T>> load_threshold(const TensorView<T>& tensor) {
  return {Key<T>(load_pair(tensor.header + kTau)), load_fresh(tensor.header + kEnd)};
}

// Calls body(chunk) for the chunks of a strip.
template <typename T, typename Body>
ISSP_DEVICE void each_chunk(const TensorView<T>& tensor, uint32_t strip, const Body& body) {
  const uint32_t first = strip * kStripChunks, left = tensor.chunks() - first;
#pragma unroll 1
  for (uint32_t i = 0; i < kStripChunks && i < left; ++i) body(first + i);
}

// Shrinks what a threshold selects in those rows of this warp that `rows` names; returns
// this lane's flips.
template <typename T>
ISSP_DEVICE uint32_t shrink_rows(const TensorView<T>& tensor, uint32_t chunk, uint32_t rows,
                                 const Threshold<Key<T>>& threshold, typename T::Wide shrink) {
  uint32_t gone = 0;
  with_tile(tensor, chunk, [&](const auto& tile) {
#pragma unroll 1
    for (uint32_t row = 0; row < kRowsOfChunk<T>; ++row) {
      if (!(rows >> row & 1u)) continue;
      WeightVector<T> weights = tile.template load_row<true>(row);
      uint32_t own = 0;
#pragma unroll
      for (uint32_t j = 0; j < kWidth<T>; ++j) {
        const uint32_t i = tile.index(row, j);
        if (i >= tensor.numel || !threshold.selects(key<T>(weights.x[j]), i)) continue;
        weights.x[j] = shrunk<T>(weights.x[j], shrink);
        own |= 1u << j;
      }
      gone |= own << (row * kWidth<T>);
      if (own) tile.store_row(row, weights);
    }
  });
  const WordOfThread<T> word(chunk);
  const uint32_t bits = transpose_bits<T>(gone);
  if (word.high || !(rows >> word.row & 1u) || word.number >= tensor.padded_words()) return 0;
  uint32_t* const to = tensor.mask + word.number;
  return refresh_mask(to, valid_bits(32 * word.number, tensor.numel), load_fresh(to), bits);
}

template <typename T>
ISSP_DEVICE void add_flips(const TensorView<T>& tensor, const Call<T>& call, uint32_t of_lane,
                           Shared shared) {
  const uint32_t flips = sum_block(of_lane, shared);  // may be negative
  if (thread() == 0 && flips) add(call.flips + tensor.tensor, int64_t(int32_t(flips)));
}

// The rows of this warp that the first pass has postponed.
template <typename T>
ISSP_DEVICE uint32_t postponed_rows(const TensorView<T>& tensor, const Call<T>& call,
                                    uint32_t chunk, uint32_t of_warp) {
  const uint32_t all = (1u << kRowsOfChunk<T>)-1u;
  if (!call.undoable) return all;
  return load(tensor.postponed() + chunk) >> (of_warp * kRowsOfChunk<T>)&all;
}

// Shrinks this strip's share of the selected candidates, except those in postponed rows. Until now
// they count as kept.
template <typename T>
ISSP_DEVICE uint32_t resolve_candidates(const TensorView<T>& tensor, const Call<T>& call,
                                        uint32_t strip, const Threshold<Key<T>>& threshold) {
  const uint32_t count = load(tensor.header + kCandidates), strips = tensor.strips();
  const uint32_t share = pieces_of(count, strips), begin = strip * share;
  const uint32_t end = begin < count && count - begin > share ? begin + share : count;
  uint32_t flips = 0;
  for (uint32_t c = begin + thread(); c < end; c += kStepThreads) {
    const uint32_t i = load(tensor.candidates() + c);
    const uint32_t row = i % kChunkSize / kRowSize<T>, bit = 1u << i % 32;
    const uint32_t of_warp = i % kRowSize<T> / (32 * kWidth<T>);
    if (postponed_rows(tensor, call, i / kChunkSize, of_warp) >> row & 1u) continue;
    const typename T::Bits bits = load(tensor.data + i);
    const uint32_t old = load(tensor.old_mask() + i / 32);
    if (!threshold.selects(key<T>(bits), i)) continue;
    store(tensor.data + i, shrunk<T>(bits, call.shrink));
    flip(tensor.mask + i / 32, bit);
    flips += old & bit ? 1u : 0u - 1u;
  }
  return flips;
}

template <typename T>
ISSP_DEVICE void settle_strip(const TensorView<T>& tensor, const Call<T>& call, uint32_t strip,
                              Shared shared) {
  const Threshold<Key<T>> threshold = load_threshold(tensor);
  uint32_t flips = 0;
  if (call.undoable) flips = resolve_candidates(tensor, call, strip, threshold);
  each_chunk(tensor, strip, [&](uint32_t chunk) {
    const uint32_t rows = postponed_rows(tensor, call, chunk, warp());
    if (rows) flips += shrink_rows(tensor, chunk, rows, threshold, call.shrink);
  });
  add_flips(tensor, call, flips, shared);
}

// Whether `candidate` has the product `bits` and the lowest bit `lsb`.
template <typename T>
ISSP_DEVICE bool fits(typename T::Bits candidate, typename T::Bits bits, uint32_t lsb,
                      typename T::Wide shrink) {
  return narrow(T{}, widen(T{}, candidate) * shrink) == bits && (candidate & 1) == lsb;
}

// The weight of a product: the quotient or one of its two neighbours.
template <typename T>
ISSP_DEVICE typename T::Bits unshrunk(typename T::Bits bits, uint32_t lsb,
                                      typename T::Wide shrink) {
  using Bits = typename T::Bits;
  const Bits near = narrow(T{}, widen(T{}, bits) / shrink);
  if (fits<T>(Bits(near - 1), bits, lsb, shrink)) return Bits(near - 1);
  if (fits<T>(Bits(near + 1), bits, lsb, shrink)) return Bits(near + 1);
  return near;
}

// Undoes the first pass. A key that is below lo now was below lo before, and only such keys have
// been shrunk.
template <typename T>
ISSP_DEVICE void restore_chunk(const TensorView<T>& tensor, const Call<T>& call, uint32_t chunk) {
  const Key<T> lo = Key<T>(load_pair(tensor.header + kBase));
  const uint32_t late = postponed_rows(tensor, call, chunk, warp());
  const uint32_t lsb = load_bits<T>(tensor.lsb(), tensor.words(), chunk);
  with_tile(tensor, chunk, [&](const auto& tile) {
#pragma unroll 1
    for (uint32_t row = 0; row < kRowsOfChunk<T>; ++row) {
      if (late >> row & 1u) continue;
      WeightVector<T> weights = tile.load_row(row);
#pragma unroll
      for (uint32_t j = 0; j < kWidth<T>; ++j) {
        const Key<T> now = key<T>(weights.x[j]);
        const uint32_t own = lsb >> (row * kWidth<T> + j) & 1u;
        if (now && now < lo) weights.x[j] = unshrunk<T>(weights.x[j], own, call.shrink);
      }
      tile.store_row(row, weights);
    }
  });
  const WordOfThread<T> word(chunk);
  if (word.high || (late >> word.row & 1u) || word.number >= tensor.words()) return;
  store(tensor.mask + word.number, load(tensor.old_mask() + word.number));
}

template <typename T>
ISSP_DEVICE void restore_strip(const TensorView<T>& tensor, const Call<T>& call, uint32_t strip) {
  if (!call.undoable || load(tensor.header + kState) != kMissed) return;
  each_chunk(tensor, strip, [&](uint32_t chunk) { restore_chunk(tensor, call, chunk); });
}

template <typename T>
ISSP_DEVICE void shrink_strip(const TensorView<T>& tensor, const Call<T>& call, uint32_t strip,
                              const Threshold<Key<T>>& threshold, Shared shared) {
  uint32_t flips = 0;
  each_chunk(tensor, strip, [&](uint32_t chunk) {
    flips += shrink_rows(tensor, chunk, ~0u, threshold, call.shrink);
  });
  add_flips(tensor, call, flips, shared);
}

// A tensor of one strip.
template <typename T>
ISSP_DEVICE void search_alone(const TensorView<T>& tensor, const Call<T>& call, uint32_t k,
                              Shared shared) {
  restore_strip(tensor, call, 0);  // a search begins with a barrier
  const TensorSource<T> source = {tensor.data, tensor.numel};
  const Search<Key<T>> search = {0, kKeyBits<T>, k, 0};
  const Threshold<Key<T>> threshold = find_threshold(search, source, tensor.numel, shared);
  if (thread() == 0) finalize_tensor(tensor, call, threshold);
  shrink_strip(tensor, call, 0, threshold, shared);
}

// One thread: everything before `phase` is complete, for blocks that wait for it.
template <typename T>
ISSP_DEVICE void enter_phase(const TensorView<T>& tensor, uint32_t phase) {
  store(tensor.header + kArrived, 0u);
  store_release(tensor.header + kPhase, phase);
}

// Returns the phase that the tensor has reached, at least `phase`.
template <typename T>
ISSP_DEVICE uint32_t wait_for_phase(const TensorView<T>& tensor, const Call<T>& call,
                                    uint32_t phase, Shared shared) {
  uint32_t reached = 0;
  if (thread() == 0) {
    reached = load_acquire(tensor.header + kPhase);
    for (uint32_t rounds = 1; reached < phase; ++rounds) {
      if (call.patience && rounds == call.patience) trap();
      relax();
      reached = load_acquire(tensor.header + kPhase);
    }
  }
  return broadcast_block(reached, shared);
}

// Keys are searched as 64-bit ones, as indices are.
ISSP_DEVICE void store_search(uint32_t* header, const Search<uint64_t>& search) {
  store_pair(header + kBase, search.base);
  store(header + kRank, search.rank);
  store(header + kBitsLeft, uint32_t(search.bits));
}
ISSP_DEVICE Search<uint64_t> load_search(const uint32_t* header) {
  return {load_pair(header + kBase), int(load_fresh(header + kBitsLeft)),
          load_fresh(header + kRank), 0};
}

// The last block of phase 0: the bins take the place of the undo log.
template <typename T>
ISSP_DEVICE void begin_search(const TensorView<T>& tensor, uint32_t k) {
  for (uint32_t i = thread(); i < kBins; i += kStepThreads) store(tensor.bins() + i, 0u);
  barrier();
  if (thread() != 0) return;
  store_search(tensor.header, {0, kKeyBits<T>, k, 0});
  enter_phase(tensor, 1);
}

// Calls visit(key, index) for this thread's weights of a strip.
template <typename T, typename Visit>
ISSP_DEVICE void each_weight(const TensorView<T>& tensor, uint32_t strip, const Visit& visit) {
  each_chunk(tensor, strip, [&](uint32_t chunk) {
    with_tile(tensor, chunk, [&](const auto& tile) {
#pragma unroll 1
      for (uint32_t row = 0; row < kRowsOfChunk<T>; ++row) {
        const WeightVector<T> weights = tile.template load_row<true>(row);
        for (uint32_t j = 0; j < kWidth<T>; ++j) {
          const uint32_t i = tile.index(row, j);
          if (i < tensor.numel) visit(key<T>(weights.x[j]), i);
        }
      }
    });
  });
}

// A strip's share of a pass over keys or, once the threshold is known, over the indices of ties.
// The last block opens the next phase.
template <typename T>
ISSP_DEVICE void count_pass(const TensorView<T>& tensor, const Call<T>& call, uint32_t strip,
                            uint32_t phase, Shared shared) {
  const bool of_keys = phase <= kKeyPasses<T>;
  const Key<T> tau = of_keys ? Key<T>(0) : Key<T>(load_pair(tensor.header + kTau));
  Search<uint64_t> search = load_search(tensor.header);
  clear_bins(shared);
  each_weight(tensor, strip, [&](Key<T> magnitude, uint32_t i) {
    if (of_keys || magnitude == tau) search.count(of_keys ? uint64_t(magnitude) : i, shared);
  });
  barrier();
  for (uint32_t i = thread(); i < kBins; i += kStepThreads) {
    const uint32_t count = shared.get(i);
    if (count) add(tensor.bins() + i, count);
  }
  if (!last_to_arrive(tensor.header + kArrived, tensor.strips(), shared)) return;
  for (uint32_t i = thread(); i < kBins; i += kStepThreads) {
    shared.set(i, load_fresh(tensor.bins() + i));
    store(tensor.bins() + i, 0u);
  }
  barrier();
  search.narrow(pick_digit(search.rank, shared));
  if (thread() != 0) return;
  if (search.bits == 0 && (!of_keys || search.takes_all())) {
    const uint32_t end = of_keys ? kAllTies : uint32_t(search.base) + 1;
    finalize_tensor(tensor, call, {of_keys ? Key<T>(search.base) : tau, end});
    enter_phase(tensor, kApplyPhase<T>);
    return;
  }
  if (search.bits == 0) {
    store_pair(tensor.header + kTau, search.base);
    search = search_of_indices(tensor.numel, search.rank);
  }
  store_search(tensor.header, search);
  enter_phase(tensor, phase + 1);
}

// One strip's share of one phase.
template <typename T>
ISSP_DEVICE void search_strip(const TensorView<T>& tensor, const Call<T>& call, uint32_t strip,
                              uint32_t phase, Shared shared) {
  if (phase == 0) {
    restore_strip(tensor, call, strip);
    if (last_to_arrive(tensor.header + kArrived, tensor.strips(), shared)) {
      begin_search(tensor, uint32_t(load(call.k + tensor.tensor)));
    }
    return;
  }
  if (wait_for_phase(tensor, call, phase, shared) > phase) return;
  if (phase < kApplyPhase<T>) {
    count_pass(tensor, call, strip, phase, shared);
  } else {
    shrink_strip(tensor, call, strip, load_threshold(tensor), shared);
  }
}

// Whether the tensor is searched in this call.
template <typename T, typename Update, typename Entry>
ISSP_DEVICE bool takes_part(const TensorView<T>& tensor, const Entry& entry, const Call<T>& call,
                            const Update& update) {
  return update.selects(entry) && in_range(load(call.k + tensor.tensor), tensor.numel);
}

// Every block works through tickets until none is left.
template <typename T, typename Update, typename Table>
ISSP_DEVICE void search_by_tickets(const Table& table, const Call<T>& call, const Update& update,
                                   Shared shared) {
  const uint32_t tickets = table.tiles * (kApplyPhase<T> + 1);
  barrier();  // no claim before the whole block has read kSearched, which the last claim resets
  if (thread() == 0) fence();
  while (true) {
    uint32_t claimed = 0;
    if (thread() == 0) claimed = add(call.scratch + kTicket, 1u);
    const uint32_t ticket = broadcast_block(claimed, shared);
    if (ticket >= tickets) {
      if (ticket == tickets + blocks() - 1 && thread() == 0) {  // nobody will claim after this
        fence();
        store(call.scratch + kTicket, 0u);
        store(call.scratch + kSearched, 0u);
      }
      return;
    }
    const uint32_t strip = ticket % table.tiles;
    const auto& entry = table.entries[locate(table, strip)];
    const TensorView<T> tensor(entry, call);
    if (tensor.strips() == 1 || !takes_part(tensor, entry, call, update)) continue;
    if (load(tensor.header + kState) == kSettled) continue;
    search_strip(tensor, call, strip - entry.first_tile, ticket / table.tiles, shared);
  }
}

// What is left to do for every tensor of a call with an optimizer.
template <typename T, typename Update, typename Table>
ISSP_DEVICE void finish_update(const Table& table, const Call<T>& call, const Update& update) {
  for (uint32_t t = thread(); t < table.count; t += kStepThreads) {
    const auto& entry = table.entries[t];
    update.finish(entry);
    if (update.freezes(entry)) store(call.flips + (entry.extra & kTensorBits), int64_t(0));
  }
}

template <typename T, typename Update, int Capacity>
ISSP_KERNEL(kStepThreads, 4)
settle_kernel(const ISSP_PARAM Table<Capacity, typename Update::Entry> table,
              const ISSP_PARAM Call<T> call, const ISSP_PARAM Update update) {
  if (stopped(call)) return;
  const Shared shared = shared_memory();
  if (Update::kUpdates && block() == 0) finish_update(table, call, update);
  if (block() >= table.tiles) return;  // nothing is selected from
  const auto& entry = table.entries[locate(table, block())];
  const TensorView<T> tensor(entry, call);
  const bool searches = load(call.scratch + kSearched) != 0;
  if (takes_part(tensor, entry, call, update)) {
    if (load(tensor.header + kState) == kSettled) {
      settle_strip(tensor, call, block() - entry.first_tile, shared);
    } else if (tensor.strips() == 1) {
      search_alone(tensor, call, uint32_t(load(call.k + tensor.tensor)), shared);
    }
  }
  if (searches) search_by_tickets(table, call, update, shared);
}

}  // namespace issp
