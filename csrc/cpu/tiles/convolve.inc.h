// Convolution and epilogue of tile_kernels.h for one instruction set; see vectors.inc.h.

namespace issp::ISSP_ISA {
namespace {

#define ISSP_INLINE ISSP_TARGET inline __attribute__((always_inline))

// x * Phi(x), as gelu of sparse/sparse_kernels.cpp.
ISSP_INLINE void gelu(F16& x) {
  const F16 zero = {};
  F16 t = x * 0.70710678118654752f;
  t = t < zero - 4.0f ? zero - 4.0f : t > zero + 4.0f ? zero + 4.0f : t;
  const F16 s = t * t;
  F16 p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  F16 q = s * -1.45660718464996e-05f + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  x = 0.5f * x * (1.0f + t * p / q);
  flush(x);
}

template <TileActivation activation, bool kScaled>
ISSP_INLINE void finish(F16& sum, float bias, float scale) {
  sum += bias;
  flush(sum);
  if (activation == TileActivation::kRelu) relu(sum);
  if (activation == TileActivation::kGelu) gelu(sum);
  if (kScaled) scale_by(sum, scale);
}

ISSP_INLINE void add_residual(const char* residual, F16& even, F16& odd) {
  U16 pairs;
  F16 first, second;
  load(pairs, residual);
  split(pairs, first, second);
  flush(first);
  flush(second);
  even += first;
  odd += second;
  flush(even);
  flush(odd);
}

// The block's rows of one pixel tile, without shuffle: a line of pairs per two rows. kWhole: all 16
// pixels and all rows exist.
template <TileActivation activation, bool kScaled, bool kResidual, bool kWhole>
ISSP_INLINE void write_lines(const TiledConv& conv, int64_t block, const PixelTile& tile,
                             const float* sums) {
  const TileEpilogue& by = conv.epilogue;
  const int64_t row = block * conv.v, at = tile.output + (row / 2 + 1) * by.plane_bytes;
  const int64_t plane_bytes = by.plane_bytes, rows = kWhole ? conv.v : by.rows - row;
  const float *bias = by.bias + row, scale = by.scale;
  char* out = by.out + at;
  const char* residual = by.residual + (kResidual ? at : 0);
  for (int64_t i = 0; i < std::min<int64_t>(rows, conv.v); i += 2) {
    F16 even, odd = {};
    load(even, sums + 16 * i);
    finish<activation, kScaled>(even, bias[i], scale);
    if (kWhole || i + 1 < rows) {
      load(odd, sums + 16 * (i + 1));
      finish<activation, kScaled>(odd, bias[i + 1], scale);
    }
    if (kResidual) add_residual(residual, even, odd);
    U16 line;
    pack(even, odd, line);
    if (!kWhole) keep_first(line, tile.count);
    store(out, line);
    out += plane_bytes;
    residual += kResidual ? plane_bytes : 0;
  }
}

template <TileActivation activation, bool kScaled, bool kResidual>
ISSP_TARGET void write_image(const TiledConv& conv, int64_t block, const PixelTile& tile,
                             const float* sums) {
  if (tile.count == kTilePixels && (block + 1) * conv.v <= conv.epilogue.rows) {
    return write_lines<activation, kScaled, kResidual, true>(conv, block, tile, sums);
  }
  write_lines<activation, kScaled, kResidual, false>(conv, block, tile, sums);
}

// The same with PixelShuffle(2): 16 pixels of eight rows are two lines in each of two rows of a
// plane.
template <TileActivation activation, bool kScaled>
ISSP_TARGET void write_doubled(const TiledConv& conv, int64_t block, const PixelTile& tile,
                               const float* sums) {
  const TileEpilogue& by = conv.epilogue;
  const int64_t first = block * conv.v / 8;
  const int64_t planes = std::min<int64_t>(conv.v / 8, by.planes - first);
  char* out = by.out + tile.output + (first + 1) * by.plane_bytes;
  for (int64_t plane = 0; plane < planes; ++plane, out += by.plane_bytes) {
    const float* bias = by.bias + block * conv.v + 8 * plane;
    const bool both = block * conv.v + 8 * plane + 7 < by.rows;
    for (int64_t i = 0; i < 2; ++i) {
      U16 lines[2];
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t row = 2 * i + j;
        F16 even, odd = {};
        load(even, sums + 16 * (8 * plane + row));
        finish<activation, kScaled>(even, bias[row], by.scale);
        if (both) {
          load(odd, sums + 16 * (8 * plane + 4 + row));
          finish<activation, kScaled>(odd, bias[4 + row], by.scale);
        }
        pack(even, odd, lines[j]);
        if (tile.count < kTilePixels) keep_first(lines[j], tile.count);
      }
      interleave(lines[0], lines[1]);
      store(out + i * by.row_bytes, lines[0]);
      store(out + i * by.row_bytes + 64, lines[1]);
    }
  }
}

// The same with any shuffle: every pixel of a row goes to a place of its own.
template <TileActivation activation, bool kScaled>
ISSP_TARGET void write_scattered(const TiledConv& conv, int64_t block, const PixelTile& tile,
                                 const float* sums) {
  const TileEpilogue& by = conv.epilogue;
  const int64_t r = by.shuffle, begin = block * conv.v;
  const int64_t end = std::min(begin + conv.v, by.rows);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t channel = row / (r * r), i = row / r % r, j = row % r;
    F16 sum;
    load(sum, sums + 16 * (row - begin));
    finish<activation, kScaled>(sum, by.bias[row], by.scale);
    U16 line;
    pack(sum, sum, line);
    char* out = by.out + tile.output + i * by.row_bytes + (channel / 2 + 1) * by.plane_bytes +
                4 * j + 2 * (channel % 2);
    for (int k = 0; k < tile.count; ++k) {
      const uint16_t value = uint16_t(line[k]);
      std::memcpy(out + 4 * r * k, &value, 2);
    }
  }
}

ISSP_TARGET inline void write_sums(const TiledConv& conv, int64_t block, const PixelTile& tile,
                                   const float* sums) {
  const TileEpilogue& by = conv.epilogue;
  const int64_t rows = std::min<int64_t>(conv.v, by.rows - block * conv.v);
  char* out = by.out + tile.output + block * conv.v * by.plane_bytes;
  for (int64_t i = 0; i < rows; ++i, out += by.plane_bytes) {
    F16 sum;
    load(sum, sums + 16 * i);
    store_first(out, sum, tile.count);
  }
}

using Write = void (*)(const TiledConv&, int64_t, const PixelTile&, const float*);

template <TileActivation activation, bool kScaled>
Write writer(const TileEpilogue& by) {
  // Blocks of 16 rows hold whole pairs of channels after PixelShuffle(2).
  if (by.shuffle == 2) return write_doubled<activation, kScaled>;
  if (by.shuffle != 1) return write_scattered<activation, kScaled>;
  return by.residual ? write_image<activation, kScaled, true>
                     : write_image<activation, kScaled, false>;
}

template <TileActivation activation>
Write writer(const TileEpilogue& by) {
  return by.scale == 1.0f ? writer<activation, false>(by) : writer<activation, true>(by);
}

inline Write writer(const TiledConv& conv) {
  if (conv.epilogue.sums) return write_sums;
  switch (conv.epilogue.activation) {
    case TileActivation::kRelu: return writer<TileActivation::kRelu>(conv.epilogue);
    case TileActivation::kGelu: return writer<TileActivation::kGelu>(conv.epilogue);
    default: return writer<TileActivation::kNone>(conv.epilogue);
  }
}

// Zeros around the image need not be added: a sum that begins with +0 is never -0.
ISSP_TARGET inline void add_taps(const TapRow& row) {
  const int64_t taps = row.kernel * row.kernel;
  for (int64_t channel = 0; channel < row.channels; ++channel) {
    float* const out = row.out + channel * row.plane;
    for (int64_t x = 0; x < row.width; x += kTilePixels) {
      F16 sum = {};
      for (int64_t ky = 0; ky < row.kernel; ++ky) {
        if (!row.sums[ky]) continue;
        const float* shares = row.sums[ky] + (channel * taps + ky * row.kernel) * row.pitch + x;
        for (int64_t kx = 0; kx < row.kernel; ++kx, shares += row.pitch) {
          F16 share;
          load(share, shares + kx);
          sum += share;
          flush(sum);
        }
      }
      sum += row.bias[channel];
      flush(sum);
      store_first(out + x, sum, row.width - x);
    }
  }
}

// A position is 16 * plane + tap. Plane 0 is the plane of zeros, which padded entries read at the
// middle tap alone: the other taps of the first row lie outside of the memory.
ISSP_TARGET inline bool translate(const int32_t* positions, int64_t count, int64_t planes,
                                  int64_t taps, int32_t plane_bytes, int32_t row_bytes,
                                  int32_t* offsets) {
  const int32_t middle = int32_t(taps / 2), down = taps == 9 ? row_bytes : 0;
  const int32_t right = taps == 9 ? 4 : 0, last = int32_t(planes), all = int32_t(taps);
  int32_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t plane = positions[i] >> 4, tap = positions[i] & 15;
    const int32_t dy = (tap * 11) >> 5, dx = tap - 3 * dy;
    wrong |= (plane < 0) | (plane > last) | (tap >= all) | ((plane == 0) & (tap != middle));
    offsets[i] = plane * plane_bytes + (dy - 1) * down + (dx - 1) * right;
  }
  return !wrong;
}

#if ISSP_AMX

// Tile registers: sums 0 .. G * M - 1, then M of weights, the last one of pixels.
template <int N>
ISSP_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(N));
}
template <int N>
ISSP_INLINE void load_tile(const void* from) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(N), "r"(from), "r"(64L) : "memory");
}
template <int N>
ISSP_INLINE void store_tile(void* to) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(N), "r"(to), "r"(64L) : "memory");
}
template <int Sum, int Weights, int Pixels>
ISSP_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Weights), "i"(Pixels));
}

// G pixel tiles and blocks of 16 * M rows. While K tile k is multiplied, the lines of K tile k + 1
// are copied to the other half of `lines`, which stays in the L1 cache. An entry is copied for all
// pixel tiles at once, because their lines are neighbours; 16 / G entries per multiplication.
template <int G, int M>
struct Group {
  using Half = char[G][64 * kTileEntries];
  struct Memory {
    alignas(64) Half lines[2];
    alignas(64) float sums[G][M * 256];
  };
  using Tiles = std::make_integer_sequence<int, G>;
  using Parts = std::make_integer_sequence<int, M>;

  template <int Begin, int End>
  ISSP_INLINE static void copy_lines(const PixelTile* tiles, const int32_t* offsets, Half& to) {
#pragma GCC unroll 16
    for (int i = Begin; i < End; ++i) {
      const int64_t offset = offsets[i];
#pragma GCC unroll 8
      for (int tile = 0; tile < G; ++tile) {
        const __m512i line = _mm512_loadu_si512(tiles[tile].input + offset);
        _mm512_store_si512(to[tile] + 64 * i, line);
      }
    }
  }
  template <int... I>
  ISSP_INLINE static void clear(std::integer_sequence<int, I...>) {
    (zero_tile<I>(), ...);
  }
  template <int... I>
  ISSP_INLINE static void load_weights(const uint16_t* values, std::integer_sequence<int, I...>) {
    (load_tile<G * M + I>(values + 512 * I), ...);
  }
  template <int tile, int... I>
  ISSP_INLINE static void multiply_tile(std::integer_sequence<int, I...>) {
    (multiply_tiles<tile * M + I, G * M + I, 7>(), ...);
  }
  template <int tile>
  ISSP_INLINE static void step(const PixelTile* tiles, const int32_t* next, const Half& current,
                               Half& filled) {
    copy_lines<kTileEntries * tile / G, kTileEntries*(tile + 1) / G>(tiles, next, filled);
    load_tile<7>(current[tile]);
    multiply_tile<tile>(Parts());
  }
  template <int... tile>
  ISSP_INLINE static void multiply(const PixelTile* tiles, const int32_t* next, const Half& current,
                                   Half& filled, std::integer_sequence<int, tile...>) {
    (step<tile>(tiles, next, current, filled), ...);
  }
  template <int tile, int... I>
  ISSP_INLINE static void store_sums(float* sums, std::integer_sequence<int, I...>) {
    (store_tile<tile * M + I>(sums + 256 * I), ...);
  }
  template <int... tile>
  ISSP_INLINE static void store_all(Memory& memory, std::integer_sequence<int, tile...>) {
    (store_sums<tile>(memory.sums[tile], Parts()), ...);
  }

  ISSP_TARGET static void run(const TiledConv& conv, const PixelTile* tiles) {
    Memory memory;
    const Write write = writer(conv);
    const int32_t* next = conv.offsets;
    copy_lines<0, kTileEntries>(tiles, next, memory.lines[0]);
    const uint16_t* values = conv.values;
    int current = 0;
    for (int64_t block = 0; block < conv.blocks; ++block) {
      clear(std::make_integer_sequence<int, G * M>());
      for (int32_t k = conv.starts[block]; k < conv.starts[block + 1]; ++k) {
        next += kTileEntries;
        load_weights(values, Parts());
        multiply(tiles, next, memory.lines[current], memory.lines[1 - current], Tiles());
        values += 512 * M;
        current = 1 - current;
      }
      store_all(memory, Tiles());
      for (int tile = 0; tile < G; ++tile) write(conv, block, tiles[tile], memory.sums[tile]);
    }
  }
};

ISSP_TARGET inline void convolve(const TiledConv& conv, const PixelTile* tiles, int count) {
  if (conv.v == 32)
    return count == 2 ? Group<2, 2>::run(conv, tiles) : Group<1, 2>::run(conv, tiles);
  switch (count) {
    case 1: return Group<1, 1>::run(conv, tiles);
    case 2: return Group<2, 1>::run(conv, tiles);
    case 3: return Group<3, 1>::run(conv, tiles);
    default: return Group<4, 1>::run(conv, tiles);
  }
}

#else

ISSP_TARGET inline void multiply_block(const TiledConv& conv, int64_t block, const PixelTile& tile,
                                       float* sums) {
  for (int row = 0; row < conv.v; ++row) {
    F16 sum = {};
    for (int32_t k = conv.starts[block]; k < conv.starts[block + 1]; ++k) {
      const uint16_t* weights = conv.values + 32 * (int64_t(k) * conv.v + row);
      F16 even = {}, odd = {};
      for (int64_t i = 0; i < kTileEntries; ++i) {
        U16 pairs;
        F16 first, second;
        load(pairs, tile.input + conv.offsets[kTileEntries * k + i]);
        split(pairs, first, second);
        fma(widen(BFloat16{}, weights[2 * i]), first, even);
        fma(widen(BFloat16{}, weights[2 * i + 1]), second, odd);
      }
      even += odd;
      flush(even);
      sum += even;
      flush(sum);
    }
    std::memcpy(sums + 16 * row, &sum, sizeof(sum));
  }
}

ISSP_TARGET inline void convolve(const TiledConv& conv, const PixelTile* tiles, int count) {
  const Write write = writer(conv);
  alignas(64) float sums[16 * kMaxBlock];
  for (int tile = 0; tile < count; ++tile) {
    for (int64_t block = 0; block < conv.blocks; ++block) {
      multiply_block(conv, block, tiles[tile], sums);
      write(conv, block, tiles[tile], sums);
    }
  }
}

#endif

#undef ISSP_INLINE

}  // namespace
}  // namespace issp::ISSP_ISA
