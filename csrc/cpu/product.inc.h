// The kernels of product.h for one instruction set. Included once per set by product.cpp, with
// ISSP_ISA (a namespace), ISSP_TARGET (its function attribute), ISSP_BYTES (of a vector),
// ISSP_REGISTERS (accumulators that leave room for operands) and fma(a, b, c) of ISSP_ISA defined.

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

// Per entry: I broadcasts, R * S loads and I * R * S multiply-adds, whose accumulators stay in
// registers. With I = 1 the loads are the limit (two per cycle, as many as multiply-adds), with
// I = 4 the multiply-adds. Sums are taken in runs of kRun entries and the runs added up.
template <typename Real, int I, int S, int R>
ISSP_TARGET void multiply(const Real* tile, int64_t row_stride, const int32_t* offsets,
                          const Real* values, int64_t value_stride, int64_t count, const Real* bias,
                          Real* acc, int64_t acc_stride, bool more) {
  using Vector = typename Simd<Real>::Vector;
  constexpr int lanes = Simd<Real>::lanes;
  Vector total[I][R][S];
#pragma GCC unroll 4
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 64
    for (int p = 0; p < R * S; ++p) {
      Vector& first = (&total[i][0][0])[p];
      first = bias ? bias[i] - Vector{} : Vector{};
      if (more) load<Real>(acc + i * acc_stride + p * lanes, first);
    }
  }
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = begin + kRun < count ? begin + kRun : count;
    Vector sum[I][R][S] = {};
    for (int64_t e = begin; e < end; ++e) {
      const Real* const at = tile + offsets[e];
      Vector weight[I];
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) weight[i] = values[e * value_stride + i] - Vector{};
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
          Vector pixels;
          load<Real>(at + r * row_stride + s * lanes, pixels);
#pragma GCC unroll 4
          for (int i = 0; i < I; ++i) sum[i][r][s] = fma(weight[i], pixels, sum[i][r][s]);
        }
      }
    }
#pragma GCC unroll 64
    for (int p = 0; p < I * R * S; ++p) (&total[0][0][0])[p] += (&sum[0][0][0])[p];
  }
#pragma GCC unroll 4
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 64
    for (int p = 0; p < R * S; ++p) {
      store<Real>((&total[i][0][0])[p], acc + i * acc_stride + p * lanes);
    }
  }
}

// Sums of `lanes` vectors, one per lane of the result, by a fixed tree: neighbours are added and
// the results of two vectors joined, level after level.
template <typename Real>
ISSP_INLINE void add_lanes(typename Simd<Real>::Vector* parts) {
  constexpr int lanes = Simd<Real>::lanes;
  using Index = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(ISSP_BYTES)));
  Indices even, odd;
  for (int l = 0; l < lanes; ++l) even[l] = 2 * l, odd[l] = 2 * l + 1;
#pragma GCC unroll 8
  for (int left = lanes / 2; left; left /= 2) {
#pragma GCC unroll 16
    for (int p = 0; p < left; ++p) {
      const typename Simd<Real>::Vector a = parts[2 * p], b = parts[2 * p + 1];
      parts[p] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    }
  }
}

// The gradient's pixels stay in registers; an entry reads its pixels once for I rows.
template <typename Real, int I, int S, int R>
ISSP_TARGET void dot(const Real* tile, int64_t row_stride, const int32_t* offsets, int64_t count,
                     const Real* grad, Real* sums, int64_t sum_stride) {
  using Vector = typename Simd<Real>::Vector;
  constexpr int lanes = Simd<Real>::lanes, kBatch = lanes > I ? lanes / I : 1;
  Vector g[I][R][S];
  memcpy(g, grad, sizeof(g));
  for (int64_t begin = 0; begin < count; begin += kBatch) {
    Vector parts[kBatch * I > lanes ? kBatch * I : lanes];
    for (int k = 0; k < kBatch; ++k) {
      const int64_t e = begin + k < count ? begin + k : count - 1;
      const Real* const at = tile + offsets[e];
      Vector sum[I] = {};
#pragma GCC unroll 64
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 64
        for (int s = 0; s < S; ++s) {
          Vector pixels;
          load<Real>(at + r * row_stride + s * lanes, pixels);
#pragma GCC unroll 64
          for (int i = 0; i < I; ++i) sum[i] = fma(g[i][r][s], pixels, sum[i]);
        }
      }
#pragma GCC unroll 64
      for (int i = 0; i < I; ++i) parts[k * I + i] = sum[i];
    }
    for (int first = 0; first < kBatch * I; first += lanes) {
      add_lanes<Real>(parts + first);
      for (int l = 0; l < lanes; ++l) {
        const int64_t e = begin + (first + l) / I;
        if (e < count) sums[e * sum_stride + (first + l) % I] += parts[first][l];
      }
    }
  }
}

// Where the lanes of a vector come from: lane l is element from(l) of a few vectors in a row. At
// most two of them are joined by a shuffle: a pair (first), then a third one (chain) or a second
// pair, of which `second` says the lanes.
template <typename Real, int S>
struct Pick {
  static constexpr int lanes = Simd<Real>::lanes;
  using Index = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(ISSP_BYTES)));
  Indices a, b, second;

  template <typename From>
  ISSP_TARGET explicit Pick(const From& from) {
    for (int l = 0; l < lanes; ++l) {
      const int source = from(l) / lanes, lane = from(l) % lanes;
      a[l] = source < 2 ? source * lanes + lane : 0;
      b[l] = S == 3 ? (source < 2 ? l : lanes + lane) : source < 2 ? 0 : from(l) - 2 * lanes;
      second[l] = source < 2 ? 0 : -1;
    }
  }
  ISSP_INLINE void operator()(const typename Simd<Real>::Vector (&v)[S],
                              typename Simd<Real>::Vector& out) const {
    if constexpr (S == 1) {
      out = v[0];
    } else {
      out = __builtin_shuffle(v[0], v[1], a);
      if constexpr (S == 3) out = __builtin_shuffle(out, v[2], b);
      if constexpr (S == 4) {
        const auto other = __builtin_shuffle(v[2], v[3], b);
        out = second ? other : out;
      }
    }
  }
};

// Rows of pixels in the tile's order. Columns left and right of the segments' own are those of the
// neighbouring lane, so a vector for them is another one moved by a lane, with one pixel from
// beside. Whole rows at a time: the orders stay in registers.
template <typename Real, int S>
ISSP_TARGET void spread_segments(const Real* own, int64_t stride, int64_t rows, int64_t left,
                                 bool before, int64_t right, bool after, Real* out,
                                 int64_t out_stride) {
  constexpr int lanes = Simd<Real>::lanes;
  using Vector = typename Simd<Real>::Vector;
  Vector v[S], chosen;
  typename Pick<Real, S>::Indices up, down;
  for (int l = 0; l < lanes; ++l) {
    up[l] = l ? l - 1 : lanes;
    down[l] = l + 1;
  }
  for (int64_t r = 0; r < rows; ++r, own += stride, out += out_stride) {
    Real* const to = out + left * lanes;
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) load<Real>(own + s * lanes, v[s]);
#pragma GCC unroll 4
    for (int j = 0; j < S; ++j) {
      const Pick<Real, S> pick([j](int l) { return S * l + j; });
      pick(v, chosen);
      store<Real>(chosen, to + j * lanes);
    }
    for (int64_t h = 1; h <= left; ++h) {
      Vector near;
      load<Real>(to + (S - h) * lanes, near);
      const Real beside = before ? own[-h] : Real(0);
      store<Real>(__builtin_shuffle(near, beside - Vector{}, up), to - h * lanes);
    }
    for (int64_t h = 0; h < right; ++h) {
      Vector near;
      load<Real>(to + h * lanes, near);
      const Real beside = after ? own[S * lanes + h] : Real(0);
      store<Real>(__builtin_shuffle(near, beside - Vector{}, down), to + (S + h) * lanes);
    }
  }
}

template <typename Real, int S>
ISSP_TARGET void collect_segments(const Real* acc, int64_t rows, Real* line, int64_t stride) {
  constexpr int lanes = Simd<Real>::lanes;
  typename Simd<Real>::Vector v[S], chosen;
  for (int64_t r = 0; r < rows; ++r, acc += S * lanes, line += stride) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) load<Real>(acc + s * lanes, v[s]);
#pragma GCC unroll 4
    for (int k = 0; k < S; ++k) {
      const Pick<Real, S> pick([k](int l) {
        const int column = k * lanes + l;
        return column % S * lanes + column / S;
      });
      pick(v, chosen);
      store<Real>(chosen, line + k * lanes);
    }
  }
}

// A square of lanes x lanes numbers turned over, in log2(lanes) rounds of shuffles.
template <typename Real>
ISSP_INLINE void turn(const Real* in, int64_t in_stride, Real* out, int64_t out_stride) {
  constexpr int lanes = Simd<Real>::lanes;
  using Indices = typename Pick<Real, 2>::Indices;
  typename Simd<Real>::Vector v[lanes];
#pragma GCC unroll 16
  for (int l = 0; l < lanes; ++l) load<Real>(in + l * in_stride, v[l]);
#pragma GCC unroll 4
  for (int h = 1; h < lanes; h *= 2) {
    Indices low, high;
    for (int l = 0; l < lanes; ++l) {
      low[l] = l & h ? lanes + l - h : l;
      high[l] = l & h ? lanes + l : l + h;
    }
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) {
      if (l & h) continue;
      const typename Simd<Real>::Vector a = v[l], b = v[l + h];
      v[l] = __builtin_shuffle(a, b, low);
      v[l + h] = __builtin_shuffle(a, b, high);
    }
  }
#pragma GCC unroll 16
  for (int l = 0; l < lanes; ++l) store<Real>(v[l], out + l * out_stride);
}

// The last square overlaps the one before it: what they share is written twice, the same.
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
    turn<Real>(in + at, in_stride, out + at * out_stride, out_stride);
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
    turn<Real>(in + at * in_stride, in_stride, out + at, out_stride);
  }
}

template <typename Real>
ISSP_TARGET void activate(Real* line, int64_t count, int activation, const Real* residual) {
  if (activation == 1) {
    for (int64_t i = 0; i < count; ++i) line[i] = line[i] < 0 ? 0 : line[i];
  } else if (activation == 2) {
    for (int64_t i = 0; i < count; ++i) line[i] = gelu(line[i]);
  }
  if (!residual) return;
  for (int64_t i = 0; i < count; ++i) line[i] += residual[i];
}

template <typename Real, int I, int S, int R>
void fill_rows(ProductKernels<Real>& kernels, int log) {
  if constexpr (R > 0) {
    kernels.multiply[log][S - 1][R - 1] = multiply<Real, I, S, R>;
    kernels.dot[log][S - 1][R - 1] = dot<Real, I, S, R>;
    fill_rows<Real, I, S, R - 1>(kernels, log);
  }
}

template <typename Real, int I, int S = 1>
void fill(ProductKernels<Real>& kernels, int log) {
  constexpr int rows = most_rows(I, S, ISSP_REGISTERS);
  if constexpr (rows > 0) {
    kernels.segment[log] = S;
    kernels.rows[log][S - 1] = rows;
    fill_rows<Real, I, S, rows>(kernels, log);
    if constexpr (S < kMaxSegment) fill<Real, I, S + 1>(kernels, log);
  }
}

template <typename Real>
ProductKernels<Real> kernels() {
  ProductKernels<Real> table = {};
  table.lanes = Simd<Real>::lanes;
  fill<Real, 1>(table, 0), fill<Real, 2>(table, 1), fill<Real, 4>(table, 2);
  table.spread[0] = spread_segments<Real, 1>;
  table.spread[1] = spread_segments<Real, 2>;
  table.spread[2] = spread_segments<Real, 3>;
  table.spread[3] = spread_segments<Real, 4>;
  table.collect[0] = collect_segments<Real, 1>;
  table.collect[1] = collect_segments<Real, 2>;
  table.collect[2] = collect_segments<Real, 3>;
  table.collect[3] = collect_segments<Real, 4>;
  table.gather_tokens = gather_tokens<Real>;
  table.scatter_tokens = scatter_tokens<Real>;
  table.activate = activate<Real>;
  return table;
}

#undef ISSP_INLINE

}  // namespace issp::ISSP_ISA
