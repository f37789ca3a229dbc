// What a kernel may ask of its machine: the only file with intrinsics.
// tests/cuda_emulator/emulator.h offers the same names to a C++ compiler, so that every kernel runs
// on a CPU, each CUDA thread a fiber. Hence the discipline: shared memory only through `Shared`,
// global memory only through load/store, waiting only through `relax`.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(ISSP_EMULATOR)
#include "emulator.h"
#else

#define ISSP_DEVICE __device__ __forceinline__
#define ISSP_PARAM __grid_constant__
#define ISSP_KERNEL(threads, blocks_per_sm) \
  __global__ void __launch_bounds__(threads, blocks_per_sm)

namespace issp {

ISSP_DEVICE uint32_t thread() {
  return threadIdx.x;
}
ISSP_DEVICE uint32_t lane() {
  return threadIdx.x & 31u;
}
ISSP_DEVICE uint32_t warp() {
  return threadIdx.x >> 5;
}
ISSP_DEVICE uint32_t block() {
  return blockIdx.x;
}
ISSP_DEVICE uint32_t blocks() {
  return gridDim.x;
}
ISSP_DEVICE uint32_t threads() {
  return blockDim.x;
}

ISSP_DEVICE void barrier() {
  __syncthreads();
}
ISSP_DEVICE void fence() {
  __threadfence();
}
ISSP_DEVICE uint32_t ballot(bool vote) {
  return __ballot_sync(0xffffffffu, vote);
}
ISSP_DEVICE uint32_t shuffle_up(uint32_t value, uint32_t delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}
ISSP_DEVICE uint32_t shuffle(uint32_t value, uint32_t from) {
  return __shfl_sync(0xffffffffu, value, from);
}
ISSP_DEVICE uint32_t shuffle_xor(uint32_t value, uint32_t distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}
ISSP_DEVICE bool any(bool vote) {
  return __any_sync(0xffffffffu, vote);
}
// Sum over the warp, in every lane.
ISSP_DEVICE uint32_t sum_warp(uint32_t value) {
  return __reduce_add_sync(0xffffffffu, value);
}

// The bytes of low (0 to 3) and high (4 to 7) that the hexadecimal digits of `which` name.
ISSP_DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t which) {
  return __byte_perm(low, high, which);
}
ISSP_DEVICE uint32_t popcount(uint32_t x) {
  return __popc(x);
}
ISSP_DEVICE int bit_length(uint32_t x) {
  return 32 - __clz(x);
}
ISSP_DEVICE int bit_length(uint64_t x) {
  return 64 - __clzll(x);
}

// One rounding, as update.h's of floats.
ISSP_DEVICE double fused(double a, double b, double c) {
  return __fma_rn(a, b, c);
}
ISSP_DEVICE float error_function(float x) {
  return erff(x);
}
ISSP_DEVICE double error_function(double x) {
  return erf(x);
}

// A spin loop calls this, so that the block it waits for gets the issue slots.
ISSP_DEVICE void relax() {
  __nanosleep(64);
}
// Ends the kernel with an error that the next call of the CUDA runtime reports.
ISSP_DEVICE void trap() {
  __trap();
}

template <typename T>
ISSP_DEVICE T load(const T* p) {
  return *p;
}
template <typename T>
ISSP_DEVICE void store(T* p, T value) {
  *p = value;
}
// For what another block of the same launch may have written: the L1 cache is not coherent.
template <typename T>
ISSP_DEVICE T load_fresh(const T* p) {
  return __ldcg(p);
}

// N neighbouring elements in one access of 8 or 16 bytes, to whose size they are aligned.
template <typename Bits, uint32_t N>
struct Vector {
  Bits x[N];
};
template <typename Bits, uint32_t N>
using Packed = std::conditional_t<sizeof(Bits) * N == 16, uint4, uint2>;

template <uint32_t N, typename Bits>
ISSP_DEVICE Vector<Bits, N> load_vector(const Bits* p) {
  static_assert(sizeof(Packed<Bits, N>) == sizeof(Vector<Bits, N>), "8 or 16 bytes");
  Vector<Bits, N> to;
  const auto packed = *reinterpret_cast<const Packed<Bits, N>*>(p);
  memcpy(&to, &packed, sizeof(to));
  return to;
}
template <uint32_t N, typename Bits>
ISSP_DEVICE Vector<Bits, N> load_vector_fresh(const Bits* p) {
  Vector<Bits, N> to;
  const auto packed = __ldcg(reinterpret_cast<const Packed<Bits, N>*>(p));
  memcpy(&to, &packed, sizeof(to));
  return to;
}
template <uint32_t N, typename Bits>
ISSP_DEVICE void store_vector(Bits* p, const Vector<Bits, N>& from) {
  Packed<Bits, N> packed;
  memcpy(&packed, &from, sizeof(from));
  *reinterpret_cast<Packed<Bits, N>*>(p) = packed;
}

ISSP_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
ISSP_DEVICE void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
ISSP_DEVICE uint32_t add(uint32_t* p, uint32_t value) {
  return atomicAdd(p, value);
}
ISSP_DEVICE void add(int64_t* p, int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
}
// Flips these bits of a word that other blocks flip bits of.
ISSP_DEVICE void flip(uint32_t* p, uint32_t bits) {
  atomicXor(p, bits);
}
// Maximum, as an integer.
ISSP_DEVICE void raise(uint32_t* p, uint32_t value) {
  atomicMax(p, value);
}
ISSP_DEVICE void raise(uint64_t* p, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
}

// A window of the block's dynamic shared memory, in words.
struct Shared {
  uint32_t* words;
  ISSP_DEVICE uint32_t get(uint32_t i) const { return words[i]; }
  ISSP_DEVICE void set(uint32_t i, uint32_t value) const { words[i] = value; }
  // Returns the value before.
  ISSP_DEVICE uint32_t add(uint32_t i, uint32_t value) const { return atomicAdd(words + i, value); }
  // The same where few threads of a warp take part: the compiler adds nothing up before.
  ISSP_DEVICE uint32_t claim(uint32_t i, uint32_t count) const {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(words + i));
    uint32_t before;
    asm volatile("atom.shared.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "r"(address), "r"(count)
                 : "memory");
    return before;
  }
  ISSP_DEVICE Shared from(uint32_t i) const { return {words + i}; }
};

ISSP_DEVICE Shared shared_memory() {
  extern __shared__ __align__(16) uint32_t issp_shared_words[];
  return {issp_shared_words};
}

// From global to shared memory without a register in between. It is there for this thread after
// wait_for_copies, for its block after a barrier behind that.
// One word, wherever it lies; a zero where there is none, and nothing is read.
ISSP_DEVICE void copy_word_async(Shared to, const void* from, bool there) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to.words));
  const uint32_t bytes = there ? 4u : 0u;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
}
ISSP_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace issp

#endif
