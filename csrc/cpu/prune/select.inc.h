// The passes over a tensor's memory, for one instruction set. Included once per set by passes.cpp,
// with ISSP_ISA (a namespace holding Lanes<T>) and ISSP_TARGET (its function attribute) defined.
//
// All work in groups of 64 elements, one 64-bit word of the packed mask. A last, partial group is
// copied to a padded buffer, so that every loop has one body. The pads' keys are the largest of
// all: they are counted nowhere, and selected at most in bits that `valid` removes.

namespace issp::ISSP_ISA {

template <typename T>
struct Group {
  using Bits = typename T::Bits;
  alignas(64) Bits padded[64];
  Bits* data;
  int64_t valid;

  Group(Bits* w, int64_t index, int64_t numel) : data(w + 64 * index), valid(numel - 64 * index) {
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

// The hardware prefetcher loses its way among the passes' several streams, so lines are fetched by
// hand, 2 KiB ahead. Time of a speculative pass over EDSR-L out of DRAM, in-place multiplication of
// the same memory = 1, in huge pages: without 1.5; into the first-level cache 1, 2, 4 KiB ahead
// 1.37, 1.26, 1.34; into the second 2, 4, 12 KiB ahead 1.32, 1.33, 1.44. In 4 KiB pages: 1.05 to
// 1.17, and 1.08 as it stands.
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

// Appends the keys of the lanes set in `in` and returns their number; out has room for 64.
template <typename T>
ISSP_TARGET inline int64_t compress_group(const Group<T>& group, uint64_t in, Key<T>* out) {
  using L = Lanes<T>;
  if (!in) return 0;
  int64_t stored = 0;
  for (int i = 0; i < 64; i += L::width) {
    const uint32_t lanes = lanes_of<L>(in, i);
    L::compress(out + stored, L::load(group.data + i), lanes);
    stored += __builtin_popcount(lanes);
  }
  return stored;
}

// Counts the keys below lo and those in lo..hi, and keeps copies of the latter while they fit.
template <typename T>
ISSP_TARGET Census<T> census(const typename T::Bits* w, int64_t numel, Range groups, Key<T> lo,
                             Key<T> hi, Key<T>* out, int64_t capacity) {
  using L = Lanes<T>;
  // Plain locals: vector stores may alias a struct that is returned, which would cost a reload
  // each.
  int64_t below = 0, inside = 0, stored = 0;
  const int64_t room = lo == hi ? -1 : capacity - 64;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const Group<T> group(const_cast<typename T::Bits*>(w), g, numel);
    prefetch(w + 64 * g, 64 * sizeof(*w));
    Masks<L> less, up_to;
    for (int i = 0; i < 64; i += L::width) {
      const auto bits = L::load(group.data + i);
      less.lanes[i / L::width] = L::less(bits, lo);
      up_to.lanes[i / L::width] = L::less(bits, hi + 1);
    }
    const uint64_t under = less.joined(), in = (up_to.joined() & ~under) & group.bits();
    below += __builtin_popcountll(under);
    inside += __builtin_popcountll(in);
    if (stored <= room) stored += compress_group<T>(group, in, out + stored);
  }
  return {below, inside, stored};
}

// Histogram of (key - lo) >> shift over the keys in lo..hi. Two tables, so that runs of equal bins
// do not wait for one another's store.
template <typename T>
ISSP_TARGET void histogram(const typename T::Bits* w, int64_t numel, Key<T> lo, Key<T> hi,
                           int shift, int64_t* bins) {
  int64_t odd[kBins] = {};
  int64_t* const tables[2] = {bins, odd};
  for (int64_t i = 0; i < numel; ++i) {
    const Key<T> k = key<T>(w[i]);
    if (k >= lo && k <= hi) ++tables[i & 1][(k - lo) >> shift];
  }
  for (int b = 0; b < kBins; ++b) bins[b] += odd[b];
}

// Shrinks the keys below `bound`; of those equal to `partial`, only the first `ties`. Refreshes the
// mask words, writing only those that change, and returns how many bits changed.
template <typename T>
ISSP_TARGET int64_t apply(typename T::Bits* w, int64_t numel, Range groups, uint64_t* mask,
                          const Selection<T>& chosen, typename T::Wide shrink) {
  using L = Lanes<T>;
  int64_t flips = 0, ties = chosen.ties;
  const bool partial = chosen.partial;
  for (int64_t step = 0; step < groups.end - groups.begin; ++step) {
    // Backwards, the end of the range is still in the cache from the census; ties need order.
    const int64_t g = partial ? groups.begin + step : groups.end - 1 - step;
    Group<T> group(w, g, numel);
    Masks<L> less, same{};
    for (int i = 0; i < 64; i += L::width) {
      const auto bits = L::load(group.data + i);
      less.lanes[i / L::width] = L::less(bits, chosen.bound);
      if (partial) same.lanes[i / L::width] = L::equal(bits, chosen.bound);
    }
    uint64_t take = less.joined();
    const uint64_t equal = partial ? same.joined() : 0;
    if (equal & group.bits()) {
      const uint64_t first = lowest(equal & group.bits(), ties);
      ties -= __builtin_popcountll(first);
      take |= first;
    }
    take &= group.bits();
    for (int i = 0; i < 64; i += L::width) {
      L::store_shrunk(group.data + i, L::load(group.data + i), lanes_of<L>(take, i), shrink);
    }
    group.store(w, g);
    const uint64_t kept = ~take & group.bits(), old = mask[g];
    if (old != kept) {
      flips += __builtin_popcountll(old ^ kept);
      mask[g] = kept;
    }
  }
  return flips;
}

// Writes +0 where the mask has a 0 bit; full groups that are kept whole are not touched.
template <typename T>
ISSP_TARGET void clear(typename T::Bits* w, int64_t numel, Range groups, const uint64_t* mask) {
  using L = Lanes<T>;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    Group<T> group(w, g, numel);
    const uint64_t drop = ~mask[g] & group.bits();
    if (!drop) continue;
    for (int i = 0; i < 64; i += L::width) {
      L::clear(group.data + i, lanes_of<L>(drop, i));
    }
    group.store(w, g);
  }
}

}  // namespace issp::ISSP_ISA
