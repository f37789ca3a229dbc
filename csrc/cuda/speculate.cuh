// First launch of soft_shrink_: one pass that shrinks first and is verified afterwards. A block
// takes a chunk of 4096 weights of one tensor, or several in a large model.
//
// The predictor gives a narrow range that should contain the new threshold. Keys below the range
// are shrunk, keys above it stay, and keys inside it are listed as candidates. The last block of a
// tensor selects exactly among its candidates and so learns whether the threshold was in the range.
// The second launch (settle.cuh) shrinks the selected candidates, or undoes this pass and searches.
//
// fl(shrink * w) maps several weights to one product, and yet the pass can be undone: for shrink >
// 0.6 at most two weights, which are neighbours, have the same product, and their lowest bits
// differ (cpu/prune/speculate.inc.h). So one logged bit per weight identifies the weight. The
// exception is a product that is flushed to zero: a row of a warp with such a weight is postponed,
// i.e. the second launch shrinks it. Where the shrink cannot be undone, every row is.
//
// Traffic per float32 weight: 4 bytes read and 4 written, 1/8 byte of mask read and, where it
// changes, written, and 1/4 byte of undo log written. An optimizer adds its gradient and moments.
#pragma once

#include "prologue.cuh"
#include "thread_tile.cuh"
#include "threshold_predictor.cuh"

namespace issp {

// A row with a smaller key, zero excepted, is postponed: its product might be flushed to zero.
template <typename T>
constexpr Key<T> kSafe = 1;
template <>
constexpr uint32_t kSafe<Float32> = 0x01000000u;  // 2^-125 * 0.6 is a normal number
template <>
constexpr uint32_t kSafe<BFloat16> = 0x0100u;

inline bool can_be_undone(Float64, double) {
  return false;
}
template <typename T>
bool can_be_undone(T, double shrink) {
  return shrink > 0.6;
}

// The range of a call, and what is done with keys below it.
template <typename T>
struct Pass {
  Key<T> lo, above;  // candidates are at least lo and below `above`
  Key<T> safe;       // rows with keys of at most this are postponed, zero excepted
  typename T::Wide shrink;
  bool speculates;  // or only updates
  bool updated;     // weights that stay must be written as well

  ISSP_DEVICE Pass(const KeyRange<Key<T>>& range, const Call<T>& call, bool was_updated)
      : lo(range.lo),
        above(range.hi + 1),
        safe((call.undoable ? kSafe<T> : ~Key<T>(0)) - 1),
        shrink(call.shrink),
        speculates(range.usable),
        updated(was_updated) {}
};

// What a thread has found among its 16 weights: a bit each, and a bit per postponed row.
struct Found {
  uint32_t below = 0, up_to = 0, lsb = 0, postponed = 0;
};

// One vector, which becomes its products; the lowest bits enter at the top of found.lsb. Lowers
// `smallest`, where zero, whose product is exact, counts as the largest.
template <typename T>
ISSP_DEVICE void speculate_row(WeightVector<T>& weights, uint32_t row, const Pass<T>& pass,
                               Found& found, Key<T>& smallest) {
  using Bits = typename T::Bits;
  constexpr uint32_t kTopBit = 8 * sizeof(Key<T>) - 1;
  uint32_t below = 0, up_to = 0;
#pragma unroll
  for (uint32_t j = kWidth<T>; j-- > 0;) {  // the sign of a difference is a bit, and no predicate
    up_to = up_to << 1 | uint32_t((key<T>(weights.x[j]) - pass.above) >> kTopBit);
  }
#pragma unroll
  for (uint32_t j = 0; j < kWidth<T>; ++j) {
    const Bits bits = weights.x[j];
    const Key<T> magnitude = key<T>(bits);
    const bool under = magnitude < pass.lo;
    if (under) below |= 1u << j;
    found.lsb = found.lsb >> 1 | uint32_t(bits) << 31;
    if (magnitude - 1 < smallest) smallest = magnitude - 1;
    const Bits product = narrow(T{}, widen(T{}, bits) * pass.shrink);
    weights.x[j] = under ? product : bits;
  }
  found.below |= below << (row * kWidth<T>);
  found.up_to |= up_to << (row * kWidth<T>);
}

// kAtOnce rows from `first` on, of which a warp stores all or postpones all. rows(row): the weights
// of this thread's vector, updated if there is an update.
template <uint32_t kAtOnce, typename T, typename Tile, typename Rows>
ISSP_DEVICE void speculate_rows(const Tile& tile, uint32_t first, const Rows& rows,
                                const Pass<T>& pass, Found& found) {
  WeightVector<T> weights[kAtOnce], products[kAtOnce];
  Key<T> smallest = ~Key<T>(0) - 1;
#pragma unroll
  for (uint32_t i = 0; i < kAtOnce; ++i) {
    weights[i] = products[i] = rows(first + i);
    speculate_row<T>(products[i], first + i, pass, found, smallest);
  }
  const bool postponed = any(smallest < pass.safe);
  if (postponed) found.postponed |= ((1u << kAtOnce) - 1u) << first;
#pragma unroll
  for (uint32_t i = 0; i < kAtOnce; ++i) {
    if (!postponed) tile.store_row(first + i, products[i]);
    if (postponed && pass.updated) tile.store_row(first + i, weights[i]);
  }
}

// Words of shared memory where a block adds up: candidates; keys below the range and, in the upper
// half, flips; postponed rows of each chunk. The indices of candidates lie where the bins will be.
constexpr uint32_t kInsideArea = kNoteArea + 1, kSumsArea = kNoteArea + 2,
                   kPostponedArea = kNoteArea + 3, kSums = 2 + kMostChunks;
static_assert(1 + kSums <= kNotes, "words for notes");
static_assert(kMostChunks * kChunkSize < 1u << 16, "both sums of a block fit a word");

// Where a thread's words of a chunk lie: of the mask, and of the undo log.
template <typename T>
struct ChunkWords {
  uint32_t row;
  bool high;  // see WordOfThread
  uint32_t* mask;
  uint32_t* log;

  ISSP_DEVICE ChunkWords(const TensorView<T>& tensor, uint32_t chunk) {
    const WordOfThread<T> word(chunk);
    row = word.row;
    high = word.high;
    mask = tensor.mask + word.number;
    log = tensor.lsb() + (high ? 0 : tensor.words()) + word.number;
  }
  ISSP_DEVICE void advance() {
    mask += kChunkSize / 32;
    log += kChunkSize / 32;
  }
  ISSP_DEVICE uint32_t number(const TensorView<T>& tensor) const {
    return uint32_t(mask - tensor.mask);
  }
};

// Refreshes the mask, writes the undo log, and returns the number of flips of this thread.
template <typename T, bool kWhole>
ISSP_DEVICE uint32_t write_words(const TensorView<T>& tensor, const ThreadTile<T, kWhole>&,
                                 const ChunkWords<T>& words, uint32_t old, const Found& found) {
  const uint32_t gone = transpose_bits<T>((found.lsb & 0xffff0000u) | found.below);
  if (found.postponed >> words.row & 1u) return 0;
  uint32_t valid = ~0u;
  if constexpr (!kWhole) {
    const uint32_t number = words.number(tensor);
    if (number >= tensor.padded_words()) return 0;
    valid = valid_bits(32 * number, tensor.numel);
  }
  // The log ends with the tensor's last weight, the mask with its line.
  if (valid) store(words.log, words.high ? gone : old);
  return words.high ? 0 : refresh_mask(words.mask, valid, old, gone);
}

// A candidate for which the block has no room.
template <typename T>
ISSP_DEVICE void list_candidate(const TensorView<T>& tensor, uint32_t i) {
  const uint32_t place = add(tensor.header + kInside, 1u);
  if (place < tensor.capacity()) store(tensor.candidates() + place, i);
}

template <typename T, typename Tile>
ISSP_DEVICE void gather_candidates(const TensorView<T>& tensor, const Tile& tile,
                                   uint32_t candidates, Shared shared) {
  if (!candidates) return;
  uint32_t next = shared.claim(kInsideArea, popcount(candidates));
  for (; candidates; candidates &= candidates - 1, ++next) {
    const uint32_t i = tile.index_of(uint32_t(bit_length(candidates & (0u - candidates))) - 1);
    if (next < kBins) {
      shared.set(next, i);
    } else {
      list_candidate(tensor, i);
    }
  }
}

// Adds a block's sums to those of the tensor and lists its candidates; true in the last block.
template <typename T>
ISSP_DEVICE bool hand_in(const TensorView<T>& tensor, uint32_t sums, uint32_t first,
                         uint32_t chunks, Shared shared) {
  const uint32_t of_warp = sum_warp(sums);
  if (lane() == 0) shared.add(kSumsArea, of_warp);
  barrier();
  const uint32_t all = shared.get(kInsideArea), inside = all < kBins ? all : kBins;
  if (thread() == 0) {
    const uint32_t total = shared.get(kSumsArea);
    shared.set(kNoteArea, inside ? add(tensor.header + kInside, inside) : 0u);
    add(tensor.header + kBelow, total & 0xffffu);
    if (total >> 16) add(tensor.header + kFlips, total >> 16);
    for (uint32_t i = 0; i < chunks && first + i < tensor.chunks(); ++i) {
      store(tensor.postponed() + first + i, shared.get(kPostponedArea + i));
    }
  }
  barrier();
  const uint32_t base = shared.get(kNoteArea);
  for (uint32_t i = thread(); i < inside && base + i < tensor.capacity(); i += kStepThreads) {
    store(tensor.candidates() + base + i, shared.get(i));
  }
  return last_to_arrive(tensor.header + kArrived, pieces_of(tensor.chunks(), chunks), shared);
}

// One thread writes a tensor's threshold and learns from it.
template <typename T>
ISSP_DEVICE void finalize_tensor(const TensorView<T>& tensor, const Call<T>& call,
                                 const Threshold<Key<T>>& threshold) {
  const typename T::Bits tau = typename T::Bits(threshold.tau);
  if (threshold.end) update_predictor(tensor, call, load(call.thresholds + tensor.tensor), tau);
  store_pair(tensor.header + kTau, threshold.tau);
  store(tensor.header + kEnd, threshold.end);
  store(call.thresholds + tensor.tensor, tau);
}

// One thread: the second launch searches the tensor.
template <typename T>
ISSP_DEVICE void leave_to_search(const TensorView<T>& tensor, const Call<T>& call, uint32_t state) {
  store(tensor.header + kState, state);
  store(tensor.header + kPhase, 0u);
  store(call.flips + tensor.tensor, int64_t(0));
  if (tensor.strips() > 1) add(call.scratch + kSearched, 1u);
}

// The last block of a tensor: selects among the candidates.
template <typename T>
ISSP_DEVICE void verify(const TensorView<T>& tensor, const Call<T>& call,
                        const KeyRange<Key<T>>& range, Shared shared) {
  const uint32_t k = uint32_t(load(call.k + tensor.tensor));
  uint32_t* const header = tensor.header;
  const uint32_t below = load_fresh(header + kBelow), inside = load_fresh(header + kInside);
  const bool holds = below < k && k - below <= inside && inside <= tensor.capacity();
  barrier();
  if (thread() == 0) {
    store(call.flips + tensor.tensor, int64_t(load_fresh(header + kFlips)));
    for (const uint32_t counter : {kBelow, kInside, kArrived, kFlips}) store(header + counter, 0u);
  }
  if (k > 0 && !holds) {
    if (thread() != 0) return;
    store_pair(header + kBase, range.lo);
    leave_to_search(tensor, call, kMissed);
    add(call.scratch + kMisses, 1u);
    return;
  }
  Threshold<Key<T>> threshold = {0, 0};
  if (k > 0) {
    const Search<Key<T>> search = {range.lo, bit_length(Key<T>(range.hi - range.lo)), k - below, 0};
    const CandidateSource<T> source = {tensor.data, tensor.candidates(), inside};
    threshold = find_threshold(search, source, tensor.numel, shared);
  }
  if (thread() == 0) {
    store(header + kState, kSettled);
    store(header + kCandidates, k > 0 ? inside : 0u);
    finalize_tensor(tensor, call, threshold);
  }
}

// The range of a tensor's next threshold. Without one the tensor is left to the second launch.
template <typename T>
ISSP_DEVICE KeyRange<Key<T>> range_of(const TensorView<T>& tensor, const Call<T>& call,
                                      bool first_block) {
  const int64_t k = load(call.k + tensor.tensor);
  const typename T::Bits previous = load(call.thresholds + tensor.tensor);
  const ThresholdPredictor predictor = load_predictor(tensor, call);
  if (!in_range(k, tensor.numel)) return {0, 0, false};
  if (k == 0) return {0, 0, true};
  const KeyRange<Key<T>> range = predict_threshold(previous, predictor, call);
  if (!range.usable && first_block && thread() == 0) leave_to_search(tensor, call, kUnknown);
  return range;
}

// Chunk i of a block, kAtOnce rows at a time. Returns the thread's keys below the range and, in the
// upper half, its flips.
template <uint32_t kAtOnce, typename T, typename Tile, typename Rows>
ISSP_DEVICE uint32_t speculate_chunk(const TensorView<T>& tensor, const Tile& tile,
                                     const ChunkWords<T>& words, uint32_t i, const Pass<T>& pass,
                                     const Rows& rows, Shared shared) {
  const auto load_old = [&] {
    const bool there = Tile::kVectorized || words.number(tensor) < tensor.padded_words();
    return there && !words.high ? load(words.mask) : 0u;
  };
  Found found;
  uint32_t old = 0;
  if constexpr (kAtOnce == kRowsOfChunk<T>) {
    old = load_old();
    speculate_rows<kAtOnce>(tile, 0, rows, pass, found);
  } else {
#pragma unroll 1
    for (uint32_t row = 0; row < kRowsOfChunk<T>; row += kAtOnce) {
      speculate_rows<kAtOnce>(tile, row, rows, pass, found);
    }
    old = load_old();  // late: an update needs the registers
  }
  const uint32_t flips = write_words(tensor, tile, words, old, found);
  gather_candidates(tensor, tile, found.up_to & ~found.below, shared);
  if (found.postponed && lane() == 0) {
    shared.add(kPostponedArea + i, found.postponed << (warp() * kRowsOfChunk<T> % 32));
  }
  return popcount(found.below) | flips << 16;
}

// What is done with a chunk without an optimizer. All loads of a whole one are on their way before
// the first is waited for.
template <typename T, typename Tile>
ISSP_DEVICE uint32_t shrink_chunk(const TensorView<T>& tensor, const Tile& tile,
                                  const ChunkWords<T>& words, uint32_t i, const Pass<T>& pass,
                                  Shared shared) {
  if constexpr (Tile::kVectorized) {
    WeightVector<T> held[kRowsOfChunk<T>];
#pragma unroll
    for (uint32_t row = 0; row < kRowsOfChunk<T>; ++row) held[row] = tile.load_row(row);
    const auto rows = [&](uint32_t row) { return held[row]; };
    return speculate_chunk<kRowsOfChunk<T>>(tensor, tile, words, i, pass, rows, shared);
  } else {
    const auto rows = [&](uint32_t row) { return tile.load_row(row); };
    return speculate_chunk<1>(tensor, tile, words, i, pass, rows, shared);
  }
}

// With an optimizer: the updated weights of a row are shrunk while they are in registers. The end
// of a tensor, and one without alignment, is updated in memory first.
template <typename T, typename Tile, typename Update>
ISSP_DEVICE uint32_t update_chunk(const TensorView<T>& tensor, const Tile& tile,
                                  const typename Update::Entry& entry, const Update& update,
                                  const ChunkWords<T>& words, uint32_t i, const Pass<T>& pass,
                                  Shared shared) {
  const uint32_t* const mask = update.freezes(entry) ? tensor.mask : nullptr;
  if constexpr (!Tile::kVectorized) {
    update.update_span(entry, mask, tile.first - thread() * kWidth<T>, kChunkSize, shared);
    if (!pass.speculates) return 0;
    barrier();
    return shrink_chunk(tensor, tile, words, i, pass, shared);
  } else if (pass.speculates) {
    const auto rows = [&](uint32_t row) {
      const auto weights = tile.load_row(row);
      return update.template update_vector<false>(entry, mask, tile.index(row), weights, shared);
    };
    return speculate_chunk<1>(tensor, tile, words, i, pass, rows, shared);
  } else {
#pragma unroll 1
    for (uint32_t row = 0; row < kRowsOfChunk<T>; ++row) {
      const auto weights = tile.load_row(row);
      const uint32_t at = tile.index(row);
      tile.store_row(row, update.template update_vector<true>(entry, mask, at, weights, shared));
    }
    return 0;
  }
}

// Blocks whose registers a processor has.
template <typename T, typename Update>
constexpr uint32_t kStepBlocks = sizeof(typename T::Bits) == 8                       ? 2
                                 : Update::kUpdates || sizeof(typename T::Bits) == 2 ? 3
                                                                                     : 4;

template <typename T, typename Update, int Capacity>
ISSP_KERNEL(kStepThreads, (kStepBlocks<T, Update>))
speculate_kernel(const ISSP_PARAM Table<Capacity, typename Update::Entry> table,
                 const ISSP_PARAM Call<T> call, const ISSP_PARAM Update update) {
  if (stopped(call)) return;
  const Shared shared = shared_memory();
  const auto& entry = table.entries[locate(table, block())];
  const TensorView<T> tensor(entry, call);
  const uint32_t first = (block() - entry.first_tile) * table.chunks;
  KeyRange<Key<T>> range = {0, 0, false};
  if (update.selects(entry)) range = range_of(tensor, call, first == 0);
  if (!Update::kUpdates && !range.usable) return;
  update.prepare(entry, shared);
  if (thread() < kSums) shared.set(kInsideArea + thread(), 0);
  barrier();
  const Pass<T> pass(range, call, Update::kUpdates);
  const uint32_t whole = whole_chunks(tensor, update.is_aligned(entry));
  const uint32_t left = tensor.chunks() - first;
  const uint32_t chunks = left < table.chunks ? left : table.chunks;
  ThreadTile<T, true> tile(tensor, first);
  ChunkWords<T> words(tensor, first);
  uint32_t sums = 0;
#pragma unroll 1
  for (uint32_t i = 0; i < chunks; ++i, tile.advance(), words.advance()) {
    const auto work = [&](const auto& own, const ChunkWords<T>& its) {
      if constexpr (Update::kUpdates) {
        return update_chunk(tensor, own, entry, update, its, i, pass, shared);
      } else {
        return shrink_chunk(tensor, own, its, i, pass, shared);
      }
    };
    const uint32_t chunk = first + i;
    if (chunk >= whole) {
      sums += work(ThreadTile<T, false>(tensor, chunk), ChunkWords<T>(tensor, chunk));
    } else if (Update::kUpdates) {  // which needs the registers of what would be carried along
      sums += work(ThreadTile<T, true>(tensor, chunk), ChunkWords<T>(tensor, chunk));
    } else {
      sums += work(tile, words);
    }
  }
  if (!pass.speculates) return;
  // Looked up again, since registers are scarce in between.
  const TensorView<T> again(table.entries[locate(table, block())], call);
  if (hand_in(again, sums, first, table.chunks, shared)) {
    verify(again, call, {pass.lo, pass.above - 1, true}, shared);
  }
}

}  // namespace issp
