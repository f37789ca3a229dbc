// The kernels of streaming_kernels.h for one instruction set. streaming_kernels.cpp includes this
// file once per set, with ISSP_ISA (a namespace) and ISSP_TARGET (its function attribute) defined.
// All sets give the same bits: sums have a fixed number of lanes, and no multiply-add is
// contracted.

namespace issp::ISSP_ISA {

// g += factor * w where the mask has a 0 bit. For a word without a 0 bit only the mask is read.
template <typename T>
ISSP_TARGET void regularize(typename T::Bits* g, const typename T::Bits* w, typename T::Wide factor,
                            int64_t numel, Range blocks, const uint32_t* mask) {
  using Bits = typename T::Bits;
  for (int64_t word = 2 * blocks.begin; word < 2 * blocks.end; ++word) {
    const int64_t left = numel - 32 * word;
    if (left <= 0) break;
    const uint32_t kept = mask[word];
    if (kept == 0xffffffffu) continue;
    Bits* const to = g + 32 * word;
    const Bits* const from = w + 32 * word;
    if (left < 32) {
      for (int i = 0; i < int(left); ++i) {
        if (!(kept >> i & 1u)) to[i] = regularized<T>(to[i], from[i], factor);
      }
      break;
    }
    Bits results[32];
    for (int i = 0; i < 32; ++i) results[i] = regularized<T>(to[i], from[i], factor);
    for (int i = 0; i < 32; ++i) to[i] = kept >> i & 1u ? to[i] : results[i];
  }
}

// Prefetch distance in bytes. Measured: magnitude_statistics of EDSR-L on one core takes 16.6 ms,
// without prefetch 20.6 ms; reading the memory takes 15 ms.
constexpr int64_t kAhead = 2048;

// Counts zeros of both signs. The count of a block fits 32 bits, so that all vector lanes are used.
template <typename T>
ISSP_TARGET int64_t zeros(const typename T::Bits* w, int64_t numel) {
  using Bits = typename T::Bits;
  int64_t count = 0;
  constexpr int64_t kBlock = 2048 / sizeof(Bits);
  for (int64_t begin = 0; begin < numel; begin += kBlock) {
    const int64_t end = begin + kBlock < numel ? begin + kBlock : numel;
    const char* const ahead = reinterpret_cast<const char*>(w + begin) + kAhead;
    for (int line = 0; line < 2048; line += 64) __builtin_prefetch(ahead + line);
    Key<T> block = 0;
    for (int64_t i = begin; i < end; ++i) block += Bits(w[i] << 1) == 0;
    count += int64_t(block);
  }
  return count;
}

using Doubles = double __attribute__((vector_size(64)));
using Integers = int64_t __attribute__((vector_size(64)));

template <typename T>
ISSP_TARGET inline __attribute__((always_inline)) double magnitude(typename T::Bits bits,
                                                                   double scale) {
  const double wide = double(widen(T{}, typename T::Bits(key<T>(bits))));
  return sizeof(bits) == 8 ? wide * scale : wide;
}

// Eight magnitudes.
template <typename T>
ISSP_TARGET inline __attribute__((always_inline)) void load(const typename T::Bits* w, double scale,
                                                            Doubles& wide) {
  if constexpr (sizeof(typename T::Bits) == 8) {
    memcpy(&wide, w, sizeof(wide));
    wide = Doubles(Integers(wide) & int64_t(Limits<Float64>::magnitude)) * scale;
  } else {
    double values[8];
    for (int i = 0; i < 8; ++i) values[i] = double(widen(T{}, w[i]));
    memcpy(&wide, values, sizeof(wide));
    wide = Doubles(Integers(wide) & int64_t(Limits<Float64>::magnitude));
  }
}

ISSP_TARGET inline __attribute__((always_inline)) double total(const Doubles& x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

template <typename T>
ISSP_TARGET double scale_of(const typename T::Bits* w, int64_t numel) {
  Key<T> largest = 0;
  if (sizeof(*w) == 8) {
    for (int64_t i = 0; i < numel; ++i) largest = key<T>(w[i]) > largest ? key<T>(w[i]) : largest;
  }
  return scale_for(T{}, largest);
}

// One read (float64: a second one, from L1): sums of deviations from a guess of the mean. The guess
// is the mean of m = 64 of the n values. By Cauchy-Schwarz it differs from the mean by at most
// sqrt(n / m) standard deviations, so the subtraction in about_mean loses at most the factor
// 1 + n / m = 65 of the precision of float64.
template <typename T>
ISSP_TARGET PartialSums sums(const typename T::Bits* w, int64_t numel) {
  const double scale = scale_of<T>(w, numel), first = magnitude<T>(w[0], scale);
  const int64_t guessed = numel < 64 ? numel : 64;
  double apart = 0;
  for (int64_t i = 0; i < guessed; ++i) apart += magnitude<T>(w[i], scale) - first;
  const double guess = finite_or_zero(first + apart / double(guessed));
  Doubles a, b, sum_a = {}, sum_b = {}, squares_a = {}, squares_b = {};
  int64_t i = 0;
  for (; i + 16 <= numel; i += 16) {
    __builtin_prefetch(reinterpret_cast<const char*>(w + i) + kAhead);
    load<T>(w + i, scale, a), load<T>(w + i + 8, scale, b);
    a -= guess, b -= guess;
    sum_a += a, sum_b += b;
    squares_a += a * a, squares_b += b * b;
  }
  double sum = total(sum_a) + total(sum_b), squares = total(squares_a) + total(squares_b);
  for (; i < numel; ++i) {
    const double d = magnitude<T>(w[i], scale) - guess;
    sum += d, squares += d * d;
  }
  return {guess, sum, about_mean(squares, sum, double(numel)), scale};
}

}  // namespace issp::ISSP_ISA
