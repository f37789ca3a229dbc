// What convolve.inc.h and convert.inc.h share, for one instruction set, ISSP_ISA. The includer
// defines before what differs between them: kFlush (whether denormals must be flushed by hand),
// fma, scale_by, relu, pack (two vectors of 16 floats to 16 pairs of bfloat16), interleave (two
// lines of pairs), and for conversions load_some, store_some, pack_neighbours and transpose.

namespace issp::ISSP_ISA {
namespace {

#define ISSP_INLINE ISSP_TARGET inline __attribute__((always_inline))

ISSP_INLINE void load(F16& to, const void* from) {
  std::memcpy(&to, from, sizeof(to));
}
ISSP_INLINE void load(U16& to, const void* from) {
  std::memcpy(&to, from, sizeof(to));
}
ISSP_INLINE void store(void* to, const U16& from) {
  std::memcpy(to, &from, sizeof(from));
}
ISSP_INLINE void store_first(void* to, const F16& from, int64_t count) {
  if (count >= 16) {  // a size that is known is one instruction
    std::memcpy(to, &from, sizeof(from));
  } else {
    std::memcpy(to, &from, size_t(4 * count));
  }
}

// Zero of the same sign for denormals.
ISSP_INLINE void flush(F16& x) {
  if (!kFlush) return;
  U16 bits = U16(x);
  bits = ((bits & 0x7f800000u) == 0u) ? (bits & 0x80000000u) : bits;
  x = F16(bits);
}

ISSP_INLINE void split(const U16& pairs, F16& first, F16& second) {
  first = F16(pairs << 16);
  second = F16(pairs & 0xffff0000u);
}

// Sets the lanes from `count` on to zero.
ISSP_INLINE void keep_first(U16& pairs, int count) {
  const U16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  pairs = lanes < uint32_t(count) ? pairs : U16{};
}

#undef ISSP_INLINE

}  // namespace
}  // namespace issp::ISSP_ISA
