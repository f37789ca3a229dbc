// Conversions between pixel orders for one instruction set: image rows and segments, tokens and
// planes. multiply.inc.h includes this file under the same definitions.

namespace issp::ISSP_ISA {

template <typename Real>
struct Simd {
  typedef Real Vector __attribute__((vector_size(ISSP_BYTES)));
  static constexpr int lanes = ISSP_BYTES / int(sizeof(Real));
};

#define ISSP_INLINE ISSP_TARGET inline __attribute__((always_inline))

template <typename Real>
ISSP_INLINE void load(const Real* from, typename Simd<Real>::Vector& to) {
  memcpy(&to, from, ISSP_BYTES);
}
template <typename Real>
ISSP_INLINE void store(const typename Simd<Real>::Vector& from, Real* to) {
  memcpy(to, &from, ISSP_BYTES);
}

// For each lane the index of its element in two concatenated vectors. A table in memory: computing
// the indices at run time would cost more than the shuffle.
template <typename Real>
struct LaneTable {
  using Index = std::conditional_t<sizeof(Real) == 8, int64_t,
                                   std::conditional_t<sizeof(Real) == 4, int32_t, int16_t>>;
  typedef Index Indices __attribute__((vector_size(ISSP_BYTES)));
  alignas(ISSP_BYTES) Index from[Simd<Real>::lanes];
};

template <typename Real, typename From>
constexpr LaneTable<Real> lane_table(From from) {
  LaneTable<Real> table = {};
  for (int l = 0; l < Simd<Real>::lanes; ++l)
    table.from[l] = typename LaneTable<Real>::Index(from(l));
  return table;
}

template <typename Real>
ISSP_INLINE typename LaneTable<Real>::Indices indices(const LaneTable<Real>& table) {
  typename LaneTable<Real>::Indices loaded;
  memcpy(&loaded, table.from, ISSP_BYTES);
  return loaded;
}

// A vector whose lane l is element from(l) of S < 4 concatenated vectors. A shuffle has two
// operands: the first two vectors, then that result and the third.
template <typename Real, int S, typename From>
ISSP_INLINE typename Simd<Real>::Vector select(const typename Simd<Real>::Vector (&v)[S], From) {
  constexpr int lanes = Simd<Real>::lanes;
  static constexpr From from = {};
  static constexpr auto kFirst =
      lane_table<Real>([](int l) { return from(l) < 2 * lanes ? from(l) : 0; });
  static constexpr auto kSecond =
      lane_table<Real>([](int l) { return from(l) < 2 * lanes ? l : from(l) - lanes; });
  if constexpr (S == 1) {
    return v[0];
  } else {
    auto out = __builtin_shuffle(v[0], v[1], indices<Real>(kFirst));
    if constexpr (S == 3) out = __builtin_shuffle(out, v[2], indices<Real>(kSecond));
    return out;
  }
}

template <int S, int J>
struct ToSegmentIndex {
  constexpr int operator()(int l) const { return S * l + J; }
};

template <int S, int K, int Lanes>
struct FromSegmentIndex {
  constexpr int operator()(int l) const {
    return (K * Lanes + l) % S * Lanes + (K * Lanes + l) / S;
  }
};

// Converts four vectors in two rounds of four shuffles; one vector after the other would take
// twelve. The first round moves columns j and j + 1 of every segment, j = 0 or 2, to the lower and
// the upper half.
template <typename Real>
ISSP_INLINE void to_segments_of_four(typename Simd<Real>::Vector (&v)[4]) {
  constexpr int half = Simd<Real>::lanes / 2;
  static constexpr auto kPair = [](int j) {
    return lane_table<Real>([j](int l) { return l % half * 4 + j + l / half; });
  };
  static constexpr auto kLow = kPair(0), kHigh = kPair(2);
  static constexpr auto kLower = lane_table<Real>([](int l) { return l + l / half * half; });
  static constexpr auto kUpper = lane_table<Real>([](int l) { return l + l / half * half + half; });
  const auto a = __builtin_shuffle(v[0], v[1], indices<Real>(kLow));
  const auto b = __builtin_shuffle(v[2], v[3], indices<Real>(kLow));
  const auto c = __builtin_shuffle(v[0], v[1], indices<Real>(kHigh));
  const auto d = __builtin_shuffle(v[2], v[3], indices<Real>(kHigh));
  v[0] = __builtin_shuffle(a, b, indices<Real>(kLower));
  v[1] = __builtin_shuffle(a, b, indices<Real>(kUpper));
  v[2] = __builtin_shuffle(c, d, indices<Real>(kLower));
  v[3] = __builtin_shuffle(c, d, indices<Real>(kUpper));
}

// The inverse: the first round puts columns 0 and 1, or 2 and 3, of every segment next to each
// other.
template <typename Real>
ISSP_INLINE void from_segments_of_four(typename Simd<Real>::Vector (&v)[4]) {
  constexpr int lanes = Simd<Real>::lanes, half = lanes / 2;
  static constexpr auto kZip = [](int first) {
    return lane_table<Real>([first](int l) { return first + l / 2 + l % 2 * lanes; });
  };
  static constexpr auto kJoin = [](int first) {
    return lane_table<Real>([first](int l) {
      const int column = first + l;
      return column / 4 * 2 + column % 2 + column % 4 / 2 * lanes;
    });
  };
  static constexpr auto kLow = kZip(0), kHigh = kZip(half);
  static constexpr auto kLower = kJoin(0), kUpper = kJoin(lanes);
  const auto a = __builtin_shuffle(v[0], v[1], indices<Real>(kLow));
  const auto b = __builtin_shuffle(v[2], v[3], indices<Real>(kLow));
  const auto c = __builtin_shuffle(v[0], v[1], indices<Real>(kHigh));
  const auto d = __builtin_shuffle(v[2], v[3], indices<Real>(kHigh));
  v[0] = __builtin_shuffle(a, b, indices<Real>(kLower));
  v[1] = __builtin_shuffle(a, b, indices<Real>(kUpper));
  v[2] = __builtin_shuffle(c, d, indices<Real>(kLower));
  v[3] = __builtin_shuffle(c, d, indices<Real>(kUpper));
}

template <typename Real, int S, int... J>
ISSP_INLINE void load_segments(const Real* row, typename Simd<Real>::Vector (&to)[S],
                               std::integer_sequence<int, J...>) {
  constexpr int lanes = Simd<Real>::lanes;
  typename Simd<Real>::Vector v[S];
  (load<Real>(row + J * lanes, v[J]), ...);
  if constexpr (S == 4) {
    to_segments_of_four<Real>(v);
    ((to[J] = v[J]), ...);
  } else {
    ((to[J] = select<Real, S>(v, ToSegmentIndex<S, J>{})), ...);
  }
}

template <typename Real, int S, int... K>
ISSP_INLINE void store_each(const typename Simd<Real>::Vector (&v)[S], Real* line,
                            std::integer_sequence<int, K...>) {
  constexpr int lanes = Simd<Real>::lanes;
  if constexpr (S == 4) {
    typename Simd<Real>::Vector four[4] = {v[0], v[1], v[2], v[3]};
    from_segments_of_four<Real>(four);
    (store<Real>(four[K], line + K * lanes), ...);
  } else {
    (store<Real>(select<Real, S>(v, FromSegmentIndex<S, K, lanes>{}), line + K * lanes), ...);
  }
}

template <typename Real, int S>
ISSP_INLINE void from_segment_order(const typename Simd<Real>::Vector (&v)[S], Real* line) {
  store_each<Real, S>(v, line, std::make_integer_sequence<int, S>{});
}

// Converts one row. The columns left and right of the segments are those of the adjacent lane. So
// their vector is another vector shifted by one lane, with one new pixel.
template <typename Real, int S>
ISSP_INLINE void row_to_segments(const Real* row, int64_t left, bool before, int64_t right,
                                 bool after, Real* to) {
  constexpr int lanes = Simd<Real>::lanes;
  static constexpr auto kUp = lane_table<Real>([](int l) { return l ? l - 1 : lanes; });
  static constexpr auto kDown = lane_table<Real>([](int l) { return l + 1; });
  using Vector = typename Simd<Real>::Vector;
  Vector v[S];
  load_segments<Real, S>(row, v, std::make_integer_sequence<int, S>{});
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) store<Real>(v[s], to + s * lanes);
  Vector near = v[S - 1];
  for (int64_t h = 1; h <= left; ++h) {
    if (h > 1) load<Real>(to + (S - h) * lanes, near);
    const Real neighbour = before ? row[-h] : Real(0);
    near = __builtin_shuffle(near, neighbour - Vector{}, indices<Real>(kUp));
    store<Real>(near, to - h * lanes);
  }
  near = v[0];
  for (int64_t h = 0; h < right; ++h) {
    if (h) load<Real>(to + h * lanes, near);
    const Real neighbour = after ? row[S * lanes + h] : Real(0);
    near = __builtin_shuffle(near, neighbour - Vector{}, indices<Real>(kDown));
    store<Real>(near, to + (S + h) * lanes);
  }
}

template <typename Real, int S>
ISSP_TARGET void rows_to_segments(const Real* in, int64_t stride, int64_t plane_stride,
                                  int64_t rows, int64_t planes, int64_t left, bool before,
                                  int64_t right, bool after, Real* out, int64_t out_stride,
                                  int64_t out_plane) {
  constexpr int lanes = Simd<Real>::lanes;
  // The reach is one on both sides for every 3x3 kernel: this case needs no loops.
  const bool near = left == 1 && right == 1;
  for (int64_t p = 0; p < planes; ++p, in += plane_stride, out += out_plane) {
    for (int64_t r = 0; r < rows; ++r) {
      const Real* const row = in + r * stride;
      Real* const to = out + r * out_stride + left * lanes;
      if (near) {
        row_to_segments<Real, S>(row, 1, before, 1, after, to);
      } else {
        row_to_segments<Real, S>(row, left, before, right, after, to);
      }
    }
  }
}

template <typename Real, int S>
ISSP_TARGET void segments_to_rows(const Real* acc, int64_t rows, Real* line, int64_t stride) {
  constexpr int lanes = Simd<Real>::lanes;
  for (int64_t r = 0; r < rows; ++r, acc += S * lanes, line += stride) {
    typename Simd<Real>::Vector v[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) load<Real>(acc + s * lanes, v[s]);
    from_segment_order<Real, S>(v, line);
  }
}

template <typename Real>
ISSP_TARGET void copy(const Real* in, int64_t in_stride, int64_t count, int64_t vectors, Real* out,
                      int64_t out_stride) {
  constexpr int lanes = Simd<Real>::lanes;
  for (int64_t c = 0; c < count; ++c, in += in_stride, out += out_stride) {
    for (int64_t i = 0; i < vectors; ++i) {
      typename Simd<Real>::Vector v;
      load<Real>(in + i * lanes, v);
      store<Real>(v, out + i * lanes);
    }
  }
}

// One round of the transposition of a square of lanes x lanes numbers: swaps the numbers that are H
// rows and H lanes apart.
template <typename Real, int H>
ISSP_INLINE void transpose_round(typename Simd<Real>::Vector (&v)[Simd<Real>::lanes]) {
  constexpr int lanes = Simd<Real>::lanes;
  static constexpr auto kLow = lane_table<Real>([](int l) { return l & H ? lanes + l - H : l; });
  static constexpr auto kHigh = lane_table<Real>([](int l) { return l & H ? lanes + l : l + H; });
#pragma GCC unroll 16
  for (int l = 0; l < lanes; ++l) {
    if (l & H) continue;
    const typename Simd<Real>::Vector a = v[l], b = v[l + H];
    v[l] = __builtin_shuffle(a, b, indices<Real>(kLow));
    v[l + H] = __builtin_shuffle(a, b, indices<Real>(kHigh));
  }
  if constexpr (2 * H < lanes) transpose_round<Real, 2 * H>(v);
}

template <typename Real>
ISSP_INLINE void transpose(const Real* in, int64_t in_stride, Real* out, int64_t out_stride) {
  constexpr int lanes = Simd<Real>::lanes;
  typename Simd<Real>::Vector v[lanes];
#pragma GCC unroll 16
  for (int l = 0; l < lanes; ++l) load<Real>(in + l * in_stride, v[l]);
  transpose_round<Real, 1>(v);
#pragma GCC unroll 16
  for (int l = 0; l < lanes; ++l) store<Real>(v[l], out + l * out_stride);
}

// The last square overlaps the one before it; the shared numbers are written twice with the same
// values.
template <typename Real>
ISSP_TARGET void gather_tokens(const Real* in, int64_t in_stride, int64_t count, Real* out,
                               int64_t out_stride) {
  constexpr int lanes = Simd<Real>::lanes;
  if (count < lanes) {
    for (int64_t c = 0; c < count; ++c) {
      for (int l = 0; l < lanes; ++l) out[c * out_stride + l] = in[l * in_stride + c];
    }
    return;
  }
  for (int64_t c = 0; c < count; c += lanes) {
    const int64_t at = c + lanes <= count ? c : count - lanes;
    transpose<Real>(in + at, in_stride, out + at * out_stride, out_stride);
  }
}

template <typename Real>
ISSP_TARGET void scatter_tokens(const Real* in, int64_t in_stride, int64_t count, Real* out,
                                int64_t out_stride) {
  constexpr int lanes = Simd<Real>::lanes;
  if (count < lanes) {
    for (int64_t c = 0; c < count; ++c) {
      for (int l = 0; l < lanes; ++l) out[l * out_stride + c] = in[c * in_stride + l];
    }
    return;
  }
  for (int64_t c = 0; c < count; c += lanes) {
    const int64_t at = c + lanes <= count ? c : count - lanes;
    transpose<Real>(in + at * in_stride, in_stride, out + at, out_stride);
  }
}

}  // namespace issp::ISSP_ISA
