// Kernels that count, select and shrink, for one instruction set. prune_kernels.cpp includes this
// file once per set, with ISSP_ISA (a namespace that holds Lanes<T>) and ISSP_TARGET (the function
// attribute of the set) defined.
//
// Every kernel works in blocks of 64 elements: one 64-bit word of the packed mask. A last, partial
// block is copied to a padded buffer, so that every loop has one body. The pads have the largest
// key of all: no kernel counts them, and `valid` removes their bits where they are selected.

namespace issp::ISSP_ISA {

template <typename T>
struct Block64 {
  using Bits = typename T::Bits;
  alignas(64) Bits padded[64];
  Bits* data;
  int64_t valid;

  Block64(Bits* w, int64_t index, int64_t numel) : data(w + 64 * index), valid(numel - 64 * index) {
    if (valid >= 64) {
      valid = 64;
      return;
    }
    for (int64_t i = 0; i < 64; ++i) padded[i] = i < valid ? data[i] : Limits<T>::magnitude;
    data = padded;
  }
  uint64_t bits() const { return valid == 64 ? ~uint64_t(0) : (uint64_t(1) << valid) - 1; }
  void store(Bits* w, int64_t index) const {
    if (data == padded) memcpy(w + 64 * index, padded, size_t(valid) * sizeof(Bits));
  }
};

// The hardware prefetcher does not follow the several memory streams of a pass, so the code
// prefetches 2 KiB ahead. Measured: one speculative pass over the weights of EDSR-L in DRAM, in 2
// MiB pages, relative to an in-place multiplication of the same memory. Without prefetch 1.5; into
// L1, 1 / 2 / 4 KiB ahead: 1.37 / 1.26 / 1.34; into L2, 2 / 4 / 12 KiB ahead: 1.32 / 1.33 / 1.44.
// In 4 KiB pages the settings range from 1.05 to 1.17; this one takes 1.08.
inline void prefetch(const void* from, size_t bytes) {
  const char* ahead = static_cast<const char*>(from) + 2048;
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line, 0, 3);
}

template <typename L>
struct Masks {
  typename L::Mask lanes[64 / L::width];
  ISSP_TARGET uint64_t joined() const { return L::join(lanes); }
};
template <typename L>
ISSP_TARGET inline uint32_t lanes_of(uint64_t word, int i) {
  return uint32_t((word >> i) & ((uint64_t(1) << L::width) - 1));
}

// Appends the keys of the lanes set in `in` and returns their number. `out` must have space for 64.
template <typename T>
ISSP_TARGET inline int64_t compress_block(const Block64<T>& block, uint64_t in, Key<T>* out) {
  using L = Lanes<T>;
  if (!in) return 0;
  int64_t stored = 0;
  for (int i = 0; i < 64; i += L::width) {
    const uint32_t lanes = lanes_of<L>(in, i);
    L::compress(out + stored, L::load(block.data + i), lanes);
    stored += __builtin_popcount(lanes);
  }
  return stored;
}

// Counts the keys below lo and those in lo..hi, and copies the latter to `out` while they fit.
template <typename T>
ISSP_TARGET RangeCount<T> count_range(const typename T::Bits* w, int64_t numel, Range blocks,
                                      Key<T> lo, Key<T> hi, Key<T>* out, int64_t capacity) {
  using L = Lanes<T>;
  // Local variables: a vector store may alias a returned struct, which would force a reload each.
  int64_t below = 0, inside = 0, stored = 0;
  const int64_t last_fit = lo == hi ? -1 : capacity - 64;
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    const Block64<T> block(const_cast<typename T::Bits*>(w), b, numel);
    prefetch(w + 64 * b, 64 * sizeof(*w));
    Masks<L> less, up_to;
    for (int i = 0; i < 64; i += L::width) {
      const auto bits = L::load(block.data + i);
      less.lanes[i / L::width] = L::less(bits, lo);
      up_to.lanes[i / L::width] = L::up_to(bits, hi);
    }
    const uint64_t under = less.joined(), in = (up_to.joined() & ~under) & block.bits();
    below += __builtin_popcountll(under);
    inside += __builtin_popcountll(in);
    if (stored <= last_fit) stored += compress_block<T>(block, in, out + stored);
  }
  return {below, inside, stored};
}

// Histogram of (key - lo) >> shift over the keys in lo..hi. Two tables: with one, consecutive keys
// of the same bin would wait for the previous store.
template <typename T>
ISSP_TARGET void histogram(const typename T::Bits* w, int64_t numel, Key<T> lo, Key<T> hi,
                           int shift, int64_t* bins) {
  int64_t second[kBins] = {};
  int64_t* const tables[2] = {bins, second};
  for (int64_t i = 0; i < numel; ++i) {
    const Key<T> k = key<T>(w[i]);
    if (k >= lo && k <= hi) ++tables[i & 1][(k - lo) >> shift];
  }
  for (int bin = 0; bin < kBins; ++bin) bins[bin] += second[bin];
}

// Shrinks the elements that `threshold` selects, writes the mask words that change, and returns how
// many mask bits changed.
template <typename T>
ISSP_TARGET int64_t apply(typename T::Bits* w, int64_t numel, Range blocks, uint64_t* mask,
                          const Threshold<T>& threshold, typename T::Wide shrink) {
  using L = Lanes<T>;
  int64_t flips = 0, ties = threshold.ties;
  const bool partial = threshold.partial;
  for (int64_t step = 0; step < blocks.end - blocks.begin; ++step) {
    // Backwards: the end of the range is still in the cache from count_range. Ties need flat order.
    const int64_t b = partial ? blocks.begin + step : blocks.end - 1 - step;
    Block64<T> block(w, b, numel);
    Masks<L> less, same{};
    for (int i = 0; i < 64; i += L::width) {
      const auto bits = L::load(block.data + i);
      less.lanes[i / L::width] = L::less(bits, threshold.bound);
      if (partial) same.lanes[i / L::width] = L::equal(bits, threshold.bound);
    }
    uint64_t take = less.joined();
    const uint64_t equal = partial ? same.joined() : 0;
    if (equal & block.bits()) {
      const uint64_t first = lowest(equal & block.bits(), ties);
      ties -= __builtin_popcountll(first);
      take |= first;
    }
    take &= block.bits();
    for (int i = 0; i < 64; i += L::width) {
      L::store_shrunk(block.data + i, L::load(block.data + i), lanes_of<L>(take, i), shrink);
    }
    block.store(w, b);
    const uint64_t kept = ~take & block.bits(), old = mask[b];
    if (old != kept) {
      flips += __builtin_popcountll(old ^ kept);
      mask[b] = kept;
    }
  }
  return flips;
}

// Writes +0 where the mask has a 0 bit. Full blocks without a 0 bit are not touched.
template <typename T>
ISSP_TARGET void clear(typename T::Bits* w, int64_t numel, Range blocks, const uint64_t* mask) {
  using L = Lanes<T>;
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    Block64<T> block(w, b, numel);
    const uint64_t drop = ~mask[b] & block.bits();
    if (!drop) continue;
    for (int i = 0; i < 64; i += L::width) {
      L::clear(block.data + i, lanes_of<L>(drop, i));
    }
    block.store(w, b);
  }
}

}  // namespace issp::ISSP_ISA
