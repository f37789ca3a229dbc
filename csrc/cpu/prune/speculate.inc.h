// The step in one pass over memory: shrink first, verify afterwards. Included once per instruction
// set by passes.cpp.
//
// The previous threshold foretells a narrow range that holds the new one. `speculate` shrinks, in
// its one read and one write of the weights, every key below the range; those above stay, and the
// groups of 64 elements that hold candidates, keys inside, are listed. If the counts show that the
// rank lies among the candidates, `settle` shrinks those of them that are selected, less than a per
// cent of the weights. If not, `restore` undoes the pass bit by bit and the search starts over.
//
// Undoing is possible although fl(shrink * w) is many-to-one: for shrink > 1/2 at most two weights,
// neighbours, have the same product, so that one bit per weight, its lowest, tells them apart. The
// exception are products that are flushed to zero: a group that holds such a weight is postponed,
// which means left alone until the threshold is known.
//
// Traffic per float32 weight: 4 bytes read, 4 written; 1/8 byte of mask read and written. The
// ledger (two bits: the lowest bit and the old mask's) is written again and again in the same place
// and read only to restore; since a tensor's worth of weights goes through the second-level cache
// in between, its lines too are fetched ahead (EDSR-L: 8.6 instead of 8.8 to 11.5 ms).

namespace issp::ISSP_ISA {

// Appends the keys of a group that lie in the range to out, if there is room for them.
template <typename T>
ISSP_TARGET inline int64_t gather(const typename T::Bits* w, int64_t numel, int64_t g,
                                  KeyRange<T> range, Key<T>* out, int64_t room) {
  using L = Lanes<T>;
  if (room < L::width || range.lo == range.hi) return 0;
  const Group<T> group(const_cast<typename T::Bits*>(w), g, numel);
  Masks<L> less, up_to;
  for (int i = 0; i < 64; i += L::width) {
    const auto bits = L::load(group.data + i);
    less.lanes[i / L::width] = L::less(bits, range.lo);
    up_to.lanes[i / L::width] = L::less(bits, range.hi + 1);
  }
  const uint64_t in = up_to.joined() & ~less.joined() & group.bits();
  // the last store writes whole lanes
  if (room < __builtin_popcountll(in) + L::width) return 0;
  return compress_group<T>(group, in, out);
}

// Candidates are gathered block by block, while their lines are in the first-level cache; group by
// group, one branch in five would be mispredicted.
constexpr int64_t kBlock = 64;

template <typename T>
ISSP_TARGET Sight speculate(typename T::Bits* w, int64_t numel, Range groups,
                            const TensorUpdate* update, KeyRange<T> range, Key<T> flushed_below,
                            typename T::Wide shrink, const Ledger& ledger, Key<T>* keys,
                            int64_t room, uint64_t* mask) {
  using L = Lanes<T>;
  int64_t below = 0, inside = 0, listed = 0, postponed = 0, gathered = 0, stored = 0, flips = 0;
  const auto gather_listed = [&]() ISSP_TARGET {
    for (; gathered < listed; ++gathered) {
      const int64_t g = ledger.groups[gathered];
      stored += gather<T>(w, numel, g, range, keys + stored, room - stored);
    }
  };
  for (int64_t line = groups.begin; line < groups.end; line += kLineGroups) {
    const int64_t at = line - groups.begin, end = std::min(line + kLineGroups, groups.end);
    __builtin_prefetch(mask + line + 8 * kLineGroups, 1, 2);
    __builtin_prefetch(ledger.mask + at + 16 * kLineGroups, 1, 3);
    __builtin_prefetch(ledger.odd + at + 16 * kLineGroups, 1, 3);
    Words odds, kept;
    for (int64_t g = line; g < end; ++g) {
      Group<T> group(w, g, numel);
      prefetch(w + 64 * g, 64 * sizeof(*w));
      if constexpr (std::is_same_v<T, Float32>) {
        if (update) update_group(group, g, *update);
      }
      Masks<L> less, up_to, odd, tiny;
      for (int i = 0; i < 64; i += L::width) {
        const auto bits = L::load(group.data + i);
        less.lanes[i / L::width] = L::less(bits, range.lo);
        up_to.lanes[i / L::width] = L::less(bits, range.hi + 1);
        odd.lanes[i / L::width] = L::odd(bits);
        tiny.lanes[i / L::width] = L::tiny(bits, flushed_below);
      }
      const uint64_t under = less.joined(), in = up_to.joined() ^ under, old = mask[g];
      below += __builtin_popcountll(under);
      inside += __builtin_popcountll(in);
      odds.set(g - line, odd.joined());
      if (__builtin_expect(tiny.joined() != 0, 0)) {
        kept.set(g - line, old);
        ledger.groups[ledger.room - ++postponed] = int32_t(g);
        if (update) group.store(w, g);
        stored += gather<T>(w, numel, g, range, keys + stored, room - stored);
        continue;
      }
      // candidates keep their bits for now
      const uint64_t fresh = ((~under & ~in) | (in & old)) & group.bits();
      kept.set(g - line, fresh);
      flips += __builtin_popcountll(fresh ^ old);
      ledger.groups[listed] = int32_t(g);  // no branch: candidates come at random
      listed += in != 0;
      for (int i = 0; i < 64; i += L::width) {
        L::store_scaled(group.data + i, L::load(group.data + i), less.lanes[i / L::width], shrink);
      }
      group.store(w, g);
    }
    // A line at a time: small stores to lines on their way would hold up those of the weights.
    Words::load(mask + line).store(ledger.mask + at);
    odds.store(ledger.odd + at);
    kept.store(mask + line);
    if (at % kBlock == kBlock - kLineGroups) gather_listed();
  }
  gather_listed();
  return {below, inside, listed, postponed, stored, flips};
}

// Whether `candidate` has the product `bits` and the lowest bit `odd`.
template <typename T>
ISSP_TARGET inline bool fits(typename T::Bits candidate, typename T::Bits bits, bool odd,
                             typename T::Wide shrink) {
  const auto product = typename T::Wide(widen(T{}, candidate) * shrink);
  return narrow(T{}, product) == bits && (candidate & 1) == typename T::Bits(odd);
}

// Replaces the products below lo by the weights they came from: the quotient or one of its
// neighbours. Zero is the product of zero alone here. No branches: the loop becomes vectors.
template <typename T>
ISSP_TARGET inline void unshrink_group(typename T::Bits* data, uint64_t odds, Key<T> lo,
                                       typename T::Wide shrink) {
  using Bits = typename T::Bits;
  Bits odd[64];
  for (int i = 0; i < 64; ++i) odd[i] = odds >> i & 1;
  for (int i = 0; i < 64; ++i) {
    const Bits bits = data[i];
    const Bits near = narrow(T{}, typename T::Wide(widen(T{}, bits) / shrink));
    Bits found = near;
    found = fits<T>(near - 1, bits, odd[i], shrink) ? Bits(near - 1) : found;
    found = fits<T>(near + 1, bits, odd[i], shrink) ? Bits(near + 1) : found;
    const bool shrunk = (key<T>(bits) < lo) & (key<T>(bits) != 0);
    data[i] = shrunk ? found : bits;
  }
}

// Undoes `speculate`: what is below lo now was below it before, and only that has been shrunk.
template <typename T>
ISSP_TARGET void restore(typename T::Bits* w, int64_t numel, Range groups, Key<T> lo,
                         typename T::Wide shrink, const Ledger& ledger, const Sight& sight,
                         uint64_t* mask) {
  int64_t postponed = 0;
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    mask[g] = ledger.mask[g - groups.begin];
    if (postponed < sight.postponed && ledger.groups[ledger.room - 1 - postponed] == g) {
      ++postponed;
      continue;
    }
    Group<T> group(w, g, numel);
    unshrink_group<T>(group.data, ledger.odd[g - groups.begin], lo, shrink);
    group.store(w, g);
  }
}

// Calls visit(group, postponed) for every group to settle, in flat order; their lines, which have
// left the cache since the pass, are fetched ahead.
template <typename F>
ISSP_TARGET inline void for_listed(const void* w, size_t group_bytes, const Ledger& ledger,
                                   const Sight& sight, const F& visit) {
  constexpr int64_t ahead = 16;
  int64_t i = 0, j = 0;
  while (i < sight.listed || j < sight.postponed) {
    if (i + ahead < sight.listed) {
      const char* next = static_cast<const char*>(w) + ledger.groups[i + ahead] * group_bytes;
      for (size_t line = 0; line < group_bytes; line += 64) __builtin_prefetch(next + line, 1);
    }
    const int64_t plain = i < sight.listed ? ledger.groups[i] : INT64_MAX;
    const int64_t late = j < sight.postponed ? ledger.groups[ledger.room - 1 - j] : INT64_MAX;
    plain < late ? ++i : ++j;
    visit(std::min(plain, late), late < plain);
  }
}

// Shrinks the candidates that are selected (Selection: as in `apply`), and in postponed groups
// whatever is; returns how many more bits of the mask changed, which may be fewer.
template <typename T>
ISSP_TARGET int64_t settle(typename T::Bits* w, int64_t numel, KeyRange<T> range,
                           const Selection<T>& chosen, typename T::Wide shrink,
                           const Ledger& ledger, const Sight& sight, uint64_t* mask) {
  using L = Lanes<T>;
  int64_t ties = chosen.ties, flips = 0;
  for_listed(w, 64 * sizeof(*w), ledger, sight, [&](int64_t g, bool postponed) ISSP_TARGET {
    Group<T> group(w, g, numel);
    Masks<L> less, up_to, selected, same;
    for (int i = 0; i < 64; i += L::width) {
      const auto bits = L::load(group.data + i);
      less.lanes[i / L::width] = L::less(bits, range.lo);
      up_to.lanes[i / L::width] = L::less(bits, range.hi + 1);
      selected.lanes[i / L::width] = L::less(bits, chosen.bound);
      same.lanes[i / L::width] = L::equal(bits, chosen.bound);
    }
    const uint64_t open = postponed ? group.bits() : up_to.joined() & ~less.joined();
    uint64_t take = selected.joined() & open;
    if (chosen.partial) {
      const uint64_t first = lowest(same.joined() & open, ties);
      ties -= __builtin_popcountll(first);
      take |= first;
    }
    for (int i = 0; i < 64; i += L::width) {
      L::store_shrunk(group.data + i, L::load(group.data + i), lanes_of<L>(take, i), shrink);
    }
    group.store(w, g);
    const uint64_t kept = (mask[g] | open) & ~take;
    flips += __builtin_popcountll(mask[g] ^ kept);
    mask[g] = kept;
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
