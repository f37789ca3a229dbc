// The loops of streams.h for one instruction set. Included once per set by streams.cpp, with
// ISSP_ISA (a namespace) and ISSP_TARGET (its function attribute) defined. Their results are the
// same bits for every set: sums have a fixed number of lanes, and nothing is contracted.

namespace issp::ISSP_ISA {

// g += factor * w where the mask has a 0 bit. Words that are kept whole cost their mask alone.
template <typename T>
ISSP_TARGET void regularize(typename T::Bits* g, const typename T::Bits* w, typename T::Wide factor,
                            int64_t numel, Range groups, const uint32_t* mask) {
  using Bits = typename T::Bits;
  for (int64_t word = 2 * groups.begin; word < 2 * groups.end; ++word) {
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
    Bits fresh[32];
    for (int i = 0; i < 32; ++i) fresh[i] = regularized<T>(to[i], from[i], factor);
    for (int i = 0; i < 32; ++i) to[i] = kept >> i & 1u ? to[i] : fresh[i];
  }
}

// Bytes that a line is fetched ahead by hand: the statistics of EDSR-L fell from 20.6 to 16.6 ms on
// one core, where reading alone takes 15.
constexpr int64_t kAhead = 2048;

// Zeros of either sign. Counts of a block fit 32 bits: as many lanes as the instruction set has.
template <typename T>
ISSP_TARGET int64_t zeros(const typename T::Bits* w, int64_t numel) {
  using Bits = typename T::Bits;
  int64_t found = 0;
  constexpr int64_t kBlock = 2048 / sizeof(Bits);
  for (int64_t begin = 0; begin < numel; begin += kBlock) {
    const int64_t end = begin + kBlock < numel ? begin + kBlock : numel;
    const char* const ahead = reinterpret_cast<const char*>(w + begin) + kAhead;
    for (int line = 0; line < 2048; line += 64) __builtin_prefetch(ahead + line);
    Key<T> block = 0;
    for (int64_t i = begin; i < end; ++i) block += Bits(w[i] << 1) == 0;
    found += int64_t(block);
  }
  return found;
}

using Doubles = double __attribute__((vector_size(64)));
using Integers = int64_t __attribute__((vector_size(64)));

// Eight magnitudes.
template <typename T>
ISSP_TARGET inline __attribute__((always_inline)) void load(const typename T::Bits* w,
                                                            Doubles& wide) {
  if constexpr (sizeof(typename T::Bits) == 8) {
    memcpy(&wide, w, sizeof(wide));
  } else {
    double values[8];
    for (int i = 0; i < 8; ++i) values[i] = double(widen(T{}, w[i]));
    memcpy(&wide, values, sizeof(wide));
  }
  wide = Doubles(Integers(wide) & int64_t(Limits<Float64>::magnitude));
}

ISSP_TARGET inline __attribute__((always_inline)) double total(const Doubles& x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// One read, deviations from a guess of the mean. The guess is the mean of m = 64 of the n values,
// so by Cauchy and Schwarz it misses the mean by at most sqrt(n / m) standard deviations, and the
// difference below loses at most the factor 1 + n / m = 65 of float64's precision, whatever the
// values are.
template <typename T>
ISSP_TARGET PartSums sums(const typename T::Bits* w, int64_t numel) {
  Doubles a, b, sum_a = {}, sum_b = {}, squares_a = {}, squares_b = {};
  double guess = 0;
  if (numel >= 64) {
    for (int i = 0; i < 64; i += 8) load<T>(w + i, a), sum_a += a;
    guess = total(sum_a) / 64;
    sum_a = Doubles{};
  }
  guess = finite_or_zero(guess);
  int64_t i = 0;
  for (; i + 16 <= numel; i += 16) {
    __builtin_prefetch(reinterpret_cast<const char*>(w + i) + kAhead);
    load<T>(w + i, a), load<T>(w + i + 8, b);
    a -= guess, b -= guess;
    sum_a += a, sum_b += b;
    squares_a += a * a, squares_b += b * b;
  }
  double sum = total(sum_a) + total(sum_b), squares = total(squares_a) + total(squares_b);
  for (; i < numel; ++i) {
    const double wide = double(widen(T{}, w[i]));
    const double d = (wide < 0 ? -wide : wide) - guess;
    sum += d, squares += d * d;
  }
  return {guess, sum, about_mean(squares, sum, double(numel))};
}

}  // namespace issp::ISSP_ISA
