// Conversion between plain images and the tile layout for one instruction set; see vectors.inc.h.

namespace issp::ISSP_ISA {
namespace {

#define ISSP_INLINE ISSP_TARGET inline __attribute__((always_inline))

// Of `count` elements, zeros behind them.
template <typename T>
ISSP_INLINE void load_strided(T type, const typename T::Bits* from, int64_t stride, int64_t count,
                              F16& to) {
  if (stride == 1) return load_some(type, from, count, to);
  to = F16{};
  for (int64_t i = 0; i < count; ++i) to[i] = widen(type, from[i * stride]);
}

// Of a pair of channels, the lines that hold pixels; `second` may be null: zeros.
template <typename T>
ISSP_INLINE void pack_plane(T type, const typename T::Bits* first, const typename T::Bits* second,
                            int64_t stride, int64_t width, char* out) {
  for (int64_t x = 0; x < width; x += kTilePixels) {
    const int64_t count = std::min(kTilePixels, width - x);
    F16 even, odd = {};
    load_strided(type, first + x * stride, stride, count, even);
    if (second) load_strided(type, second + x * stride, stride, count, odd);
    U16 line;
    pack(even, odd, line);
    store(out + 4 * x, line);
  }
}

// Up to 16 pixels of up to 16 planes, from channels that are neighbours in memory.
template <typename T>
ISSP_INLINE void pack_block(T type, const typename T::Bits* from, int64_t pixel, int64_t pixels,
                            int64_t channels, int64_t plane_bytes, char* out) {
  U16 pairs[kTilePixels] = {};
  for (int64_t i = 0; i < pixels; ++i) {
    F16 low, high;
    load_some(type, from + i * pixel, std::min<int64_t>(16, channels), low);
    load_some(type, from + i * pixel + 16, channels - 16, high);
    pack_neighbours(low, high, pairs[i]);
  }
  transpose(pairs);
  for (int64_t plane = 0; 2 * plane < std::min<int64_t>(32, channels); ++plane) {
    store(out + plane * plane_bytes, pairs[plane]);
  }
}

template <typename T>
ISSP_TARGET void pack_row(T type, const PlainImage& x, const TileLayout& to, int64_t image,
                          int64_t y, char* out) {
  using Bits = typename T::Bits;
  const Bits* row = reinterpret_cast<const Bits*>(x.data) + image * x.image + y * x.row;
  char* const planes = out + to.row(image, y) + to.plane_bytes();
  if (x.channel == 1 && x.pixel != 1) {
    for (int64_t channel = 0; channel < to.channels; channel += 32) {
      for (int64_t at = 0; at < to.width; at += kTilePixels) {
        pack_block(type, row + at * x.pixel + channel, x.pixel,
                   std::min(kTilePixels, to.width - at), to.channels - channel, to.plane_bytes(),
                   planes + channel / 2 * to.plane_bytes() + 4 * at);
      }
    }
    return;
  }
  for (int64_t channel = 0; channel < to.channels; channel += 2) {
    const Bits* const first = row + channel * x.channel;
    const Bits* const second = channel + 1 < to.channels ? first + x.channel : nullptr;
    pack_plane(type, first, second, x.pixel, to.width, planes + channel / 2 * to.plane_bytes());
  }
}

template <typename T>
ISSP_TARGET void unpack_row(T type, const char* data, const TileLayout& from, int64_t image,
                            int64_t y, const PlainImage& to) {
  using Bits = typename T::Bits;
  Bits* const row = reinterpret_cast<Bits*>(to.data) + image * to.image + y * to.row;
  for (int64_t channel = 0; channel < from.channels; channel += 2) {
    const char* line = data + from.row(image, y) + (channel / 2 + 1) * from.plane_bytes();
    Bits* const first = row + channel * to.channel;
    for (int64_t x = 0; x < from.width; x += kTilePixels) {
      const int64_t count = std::min(kTilePixels, from.width - x);
      U16 pairs;
      F16 even, odd;
      load(pairs, line + 4 * x);
      split(pairs, even, odd);
      store_some(type, even, count, first + x);
      if (channel + 1 < from.channels) store_some(type, odd, count, first + to.channel + x);
    }
  }
}

ISSP_TARGET inline void to_tiles(const PlainImage& x, const TileLayout& to, int64_t image,
                                 int64_t y, char* out) {
  switch (x.dtype) {
    case ScalarType::Float: return pack_row(Float32{}, x, to, image, y, out);
    case ScalarType::Half: return pack_row(Float16{}, x, to, image, y, out);
    default: return pack_row(BFloat16{}, x, to, image, y, out);
  }
}

ISSP_TARGET inline void from_tiles(const char* data, const TileLayout& from, int64_t image,
                                   int64_t y, const PlainImage& to) {
  switch (to.dtype) {
    case ScalarType::Float: return unpack_row(Float32{}, data, from, image, y, to);
    case ScalarType::Half: return unpack_row(Float16{}, data, from, image, y, to);
    default: return unpack_row(BFloat16{}, data, from, image, y, to);
  }
}

#undef ISSP_INLINE

}  // namespace
}  // namespace issp::ISSP_ISA
