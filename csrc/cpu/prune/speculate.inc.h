// A pruning step in one pass over memory: shrink first, verify afterwards. prune_kernels.cpp
// includes this file once per instruction set.
//
// The predictor gives a narrow range that should contain the new threshold. `speculate` reads and
// writes the weights once. It shrinks every key below the range, leaves the keys above it, and
// lists the blocks that contain candidates: keys in the range. If the counts show that rank k lies
// among the candidates, `resolve_candidates` shrinks the selected candidates, less than 1 % of the
// weights. If not, `restore` undoes the pass exactly, and the caller searches for the threshold.
//
// fl(shrink * w) maps several weights to one product, and yet the pass can be undone: for shrink >
// 1/2 at most two weights, which are neighbours, have the same product, and their lowest bits
// differ. So one logged bit per weight identifies the weight. The exception is a product that is
// flushed to zero: a block with such a weight is postponed, i.e. it is not shrunk until the
// threshold is known.
//
// Traffic per float32 weight: 4 bytes read, 4 written, and 1/8 byte of mask read and written. The
// undo log has two bits per weight: its lowest bit and its old mask bit. Every tensor reuses the
// same log memory, and only `restore` reads it. The weights of a tensor evict the log from L2, so
// its lines are prefetched as well (step of EDSR-L: 8.6 ms, without this prefetch 8.8 to 11.5 ms).

namespace issp::ISSP_ISA {

// Appends the keys of a block that lie in the range to `out`, if they fit.
template <typename T>
ISSP_TARGET inline int64_t gather(const typename T::Bits* w, int64_t numel, int64_t b,
                                  KeyRange<T> range, Key<T>* out, int64_t capacity) {
  using L = Lanes<T>;
  if (capacity < L::width || range.lo == range.hi) return 0;
  const Block64<T> block(const_cast<typename T::Bits*>(w), b, numel);
  Masks<L> less, up_to;
  for (int i = 0; i < 64; i += L::width) {
    const auto bits = L::load(block.data + i);
    less.lanes[i / L::width] = L::less(bits, range.lo);
    up_to.lanes[i / L::width] = L::up_to(bits, range.hi);
  }
  const uint64_t in = up_to.joined() & ~less.joined() & block.bits();
  // the last store writes a whole vector
  if (capacity < __builtin_popcountll(in) + L::width) return 0;
  return compress_block<T>(block, in, out);
}

// Blocks between two rounds of gathering candidates: their lines are then still in L1. Gathering
// after each block would mispredict one branch in five.
constexpr int64_t kGatherInterval = 64;

template <typename T>
ISSP_TARGET SpeculationStats speculate(typename T::Bits* w, int64_t numel, Range blocks,
                                       const TensorUpdate* update, KeyRange<T> range,
                                       Key<T> flushed_below, typename T::Wide shrink,
                                       const UndoLog& log, Key<T>* keys, int64_t capacity,
                                       uint64_t* mask) {
  using L = Lanes<T>;
  int64_t below = 0, inside = 0, listed = 0, postponed = 0, gathered = 0, stored = 0, flips = 0;
  const auto gather_listed = [&]() ISSP_TARGET {
    for (; gathered < listed; ++gathered) {
      const int64_t b = log.blocks[gathered];
      stored += gather<T>(w, numel, b, range, keys + stored, capacity - stored);
    }
  };
  for (int64_t line = blocks.begin; line < blocks.end; line += kLineBlocks) {
    const int64_t at = line - blocks.begin, end = std::min(line + kLineBlocks, blocks.end);
    __builtin_prefetch(mask + line + 8 * kLineBlocks, 1, 2);
    __builtin_prefetch(log.mask + at + 16 * kLineBlocks, 1, 3);
    __builtin_prefetch(log.lsb + at + 16 * kLineBlocks, 1, 3);
    Words lsb, kept;
    for (int64_t b = line; b < end; ++b) {
      Block64<T> block(w, b, numel);
      prefetch(w + 64 * b, 64 * sizeof(*w));
      if constexpr (std::is_same_v<T, Float32>) {
        if (update) update_block(block, b, *update);
      }
      Masks<L> less, up_to, low_bit, tiny;
      for (int i = 0; i < 64; i += L::width) {
        const auto bits = L::load(block.data + i);
        less.lanes[i / L::width] = L::less(bits, range.lo);
        up_to.lanes[i / L::width] = L::up_to(bits, range.hi);
        low_bit.lanes[i / L::width] = L::lsb(bits);
        tiny.lanes[i / L::width] = L::tiny(bits, flushed_below);
      }
      const uint64_t under = less.joined(), in = up_to.joined() ^ under, old = mask[b];
      below += __builtin_popcountll(under);
      inside += __builtin_popcountll(in);
      lsb.set(b - line, low_bit.joined());
      if (__builtin_expect(tiny.joined() != 0, 0)) {
        kept.set(b - line, old);
        log.blocks[log.capacity - ++postponed] = int32_t(b);
        if (update) block.store(w, b);
        stored += gather<T>(w, numel, b, range, keys + stored, capacity - stored);
        continue;
      }
      // a candidate keeps its mask bit until it is resolved
      const uint64_t new_mask = ((~under & ~in) | (in & old)) & block.bits();
      kept.set(b - line, new_mask);
      flips += __builtin_popcountll(new_mask ^ old);
      log.blocks[listed] = int32_t(b);  // no branch: it would be unpredictable
      listed += in != 0;
      for (int i = 0; i < 64; i += L::width) {
        L::store_scaled(block.data + i, L::load(block.data + i), less.lanes[i / L::width], shrink);
      }
      block.store(w, b);
    }
    // A whole cache line at a time: small stores to lines that are still being loaded would delay
    // the stores of the weights.
    Words::load(mask + line).store(log.mask + at);
    lsb.store(log.lsb + at);
    kept.store(mask + line);
    if (at % kGatherInterval == kGatherInterval - kLineBlocks) gather_listed();
  }
  gather_listed();
  return {below, inside, listed, postponed, stored, flips};
}

// Whether `candidate` has the product `bits` and the lowest bit `low_bit`.
template <typename T>
ISSP_TARGET inline bool fits(typename T::Bits candidate, typename T::Bits bits, bool low_bit,
                             typename T::Wide shrink) {
  const auto product = typename T::Wide(widen(T{}, candidate) * shrink);
  return narrow(T{}, product) == bits && (candidate & 1) == typename T::Bits(low_bit);
}

// Replaces the products below lo by the original weights: the quotient or one of its two
// neighbours. Postponed blocks excepted, only zero has the product zero. No branches, so that the
// compiler vectorizes the loop.
template <typename T>
ISSP_TARGET inline void unshrink_block(typename T::Bits* data, uint64_t lsb, Key<T> lo,
                                       typename T::Wide shrink) {
  using Bits = typename T::Bits;
  Bits low_bit[64];
  for (int i = 0; i < 64; ++i) low_bit[i] = lsb >> i & 1;
  for (int i = 0; i < 64; ++i) {
    const Bits bits = data[i];
    const Bits near = narrow(T{}, typename T::Wide(widen(T{}, bits) / shrink));
    Bits original = near;
    original = fits<T>(near - 1, bits, low_bit[i], shrink) ? Bits(near - 1) : original;
    original = fits<T>(near + 1, bits, low_bit[i], shrink) ? Bits(near + 1) : original;
    const bool shrunk = (key<T>(bits) < lo) & (key<T>(bits) != 0);
    data[i] = shrunk ? original : bits;
  }
}

// Undoes `speculate`. A key that is below lo now was below lo before, and only such keys have been
// shrunk.
template <typename T>
ISSP_TARGET void restore(typename T::Bits* w, int64_t numel, Range blocks, Key<T> lo,
                         typename T::Wide shrink, const UndoLog& log, const SpeculationStats& stats,
                         uint64_t* mask) {
  int64_t postponed = 0;
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    mask[b] = log.mask[b - blocks.begin];
    if (postponed < stats.postponed && log.blocks[log.capacity - 1 - postponed] == b) {
      ++postponed;
      continue;
    }
    Block64<T> block(w, b, numel);
    unshrink_block<T>(block.data, log.lsb[b - blocks.begin], lo, shrink);
    block.store(w, b);
  }
}

// Calls visit(block, postponed) for every listed and postponed block in flat order. Their lines
// have left the cache since the pass, so they are prefetched.
template <typename F>
ISSP_TARGET inline void for_listed(const void* w, size_t block_bytes, const UndoLog& log,
                                   const SpeculationStats& stats, const F& visit) {
  constexpr int64_t ahead = 16;
  int64_t i = 0, j = 0;
  while (i < stats.listed || j < stats.postponed) {
    if (i + ahead < stats.listed) {
      const char* next = static_cast<const char*>(w) + log.blocks[i + ahead] * block_bytes;
      for (size_t line = 0; line < block_bytes; line += 64) __builtin_prefetch(next + line, 1);
    }
    const int64_t with_candidates = i < stats.listed ? log.blocks[i] : INT64_MAX;
    const int64_t delayed = j < stats.postponed ? log.blocks[log.capacity - 1 - j] : INT64_MAX;
    with_candidates < delayed ? ++i : ++j;
    visit(std::min(with_candidates, delayed), delayed < with_candidates);
  }
}

// Shrinks the candidates that `threshold` selects, and in postponed blocks every element that it
// selects. Returns the change of the number of flipped mask bits, which may be negative.
template <typename T>
ISSP_TARGET int64_t resolve_candidates(typename T::Bits* w, int64_t numel, KeyRange<T> range,
                                       const Threshold<T>& threshold, typename T::Wide shrink,
                                       const UndoLog& log, const SpeculationStats& stats,
                                       uint64_t* mask) {
  using L = Lanes<T>;
  int64_t ties = threshold.ties, flips = 0;
  for_listed(w, 64 * sizeof(*w), log, stats, [&](int64_t b, bool postponed) ISSP_TARGET {
    Block64<T> block(w, b, numel);
    Masks<L> less, up_to, selected, same;
    for (int i = 0; i < 64; i += L::width) {
      const auto bits = L::load(block.data + i);
      less.lanes[i / L::width] = L::less(bits, range.lo);
      up_to.lanes[i / L::width] = L::up_to(bits, range.hi);
      selected.lanes[i / L::width] = L::less(bits, threshold.bound);
      same.lanes[i / L::width] = L::equal(bits, threshold.bound);
    }
    const uint64_t undecided = postponed ? block.bits() : up_to.joined() & ~less.joined();
    uint64_t take = selected.joined() & undecided;
    if (threshold.partial) {
      const uint64_t first = lowest(same.joined() & undecided, ties);
      ties -= __builtin_popcountll(first);
      take |= first;
    }
    for (int i = 0; i < 64; i += L::width) {
      L::store_shrunk(block.data + i, L::load(block.data + i), lanes_of<L>(take, i), shrink);
    }
    block.store(w, b);
    const uint64_t kept = (mask[b] | undecided) & ~take;
    flips += __builtin_popcountll(mask[b] ^ kept);
    mask[b] = kept;
  });
  return flips;
}

template <typename K>
ISSP_TARGET int64_t count_less(const K* keys, int64_t count, K bound) {
  int64_t less = 0;
  for (int64_t i = 0; i < count; ++i) less += keys[i] < bound;
  return less;
}

}  // namespace issp::ISSP_ISA
