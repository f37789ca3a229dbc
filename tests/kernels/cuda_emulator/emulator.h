// Runs CUDA kernels on a CPU: what csrc/cuda/device.cuh and launch.cuh offer, for a C++ compiler.
//
// Every CUDA thread is a fiber on one OS thread. A fiber gives way at barriers, warp operations,
// spin waits, and at random at atomics and shared accesses; which fiber runs next, how many blocks
// are resident and in which order they start is drawn from a seed. Reported as errors:
//   - global accesses outside the buffers the test has registered, shared ones outside the block's;
//   - shared words read before they are written;
//   - two threads touching a shared word, one of them writing, with nothing ordering them (a shadow
//     of every word remembers who, after which barrier, how), and the same for global memory, where
//     blocks are ordered by fences, atomics, acquire and release alone (order.h);
//   - shared words read or overwritten while an asynchronous copy is on its way to them;
//   - threads of a block at different barriers, lanes of a warp at different operations;
//   - deadlock, and waiting that never ends.
// Any barrier or fence can be taken out by its number, to show that the tests would notice.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define ISSP_DEVICE inline
#define ISSP_PARAM
#define ISSP_KERNEL(threads, blocks_per_sm) void

namespace issp {
namespace emulator {

struct Options {
  uint64_t seed = 0;
  uint32_t resident = 0;                               // blocks at a time; 0: drawn from the seed
  int removed = -1;                                    // a barrier or a fence, by its number
  uint32_t processors = 4, shared_bytes = 228 * 1024;  // per processor
  int refused = -1;                                    // a kernel that the device cannot run
  bool debugs = false;
};
Options& options();

// Buffers that kernels may touch; everything else is out of bounds.
void allow(const void* begin, uint64_t bytes);
void forget_buffers();

// Barriers and fences are numbered in the order they are first met; names are file:line.
int site_count();
std::string site_name(int number);
uint64_t switch_count();

void run(uint32_t blocks, uint32_t threads, uint32_t shared_bytes,
         const std::function<void()>& kernel);
// What a device answers to a question about a kernel, before anything is launched.
void require();
uint32_t blocks_per_processor(uint32_t threads, uint32_t shared_bytes);
uint64_t launch_count();

uint32_t thread_number();
uint32_t thread_total();
uint32_t block_number();
uint32_t block_total();
// Ends the launch with an error.
[[noreturn]] void stop(const char* why);
void wait_at_barrier(const char* file, int line);
void wait_in_turn();   // gives way now
void perhaps_yield();  // gives way at random
// What an access to global memory is, for order.h.
enum class Global { load, store, load_acquire, store_release, atomic };
void touch_global(const void* p, uint64_t bytes, Global how);
// Neighbouring elements in one access.
void touch_vector(const void* p, uint32_t count, uint32_t bytes, Global how);
void pass_fence(const char* file, int line);
// Every lane of the warp hands in a value and gets all 32.
const std::array<uint32_t, 32>& exchange(uint32_t value, int kind);

enum class Access { read, write, atomic };
uint32_t* shared_word(uint32_t i, Access access);
// A word on its way to a shared word; null: a zero is.
void start_copy(uint32_t to, const void* from);
void finish_copies(const char* file, int line);

}  // namespace emulator

inline uint32_t thread() {
  return emulator::thread_number();
}
inline uint32_t lane() {
  return thread() & 31u;
}
inline uint32_t warp() {
  return thread() >> 5;
}
inline uint32_t block() {
  return emulator::block_number();
}
inline uint32_t blocks() {
  return emulator::block_total();
}
inline uint32_t threads() {
  return emulator::thread_total();
}

inline void barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::wait_at_barrier(file, line);
}
inline void fence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::pass_fence(file, line);
}
inline uint32_t ballot(bool vote) {
  const auto& votes = emulator::exchange(vote, 0);
  uint32_t word = 0;
  for (uint32_t i = 0; i < 32; ++i) word |= votes[i] << i;
  return word;
}
inline uint32_t shuffle_up(uint32_t value, uint32_t delta) {
  const auto& values = emulator::exchange(value, 1);
  return lane() >= delta ? values[lane() - delta] : value;
}
inline uint32_t shuffle(uint32_t value, uint32_t from) {
  return emulator::exchange(value, 2)[from & 31u];
}

inline uint32_t shuffle_xor(uint32_t value, uint32_t distance) {
  return emulator::exchange(value, 4)[lane() ^ distance];
}
inline bool any(bool vote) {
  return ballot(vote) != 0;
}
inline uint32_t sum_warp(uint32_t value) {
  uint32_t sum = 0;
  for (const uint32_t x : emulator::exchange(value, 3)) sum += x;
  return sum;
}

inline uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t both = low | uint64_t(high) << 32;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    bytes |= uint32_t(both >> 8 * (which >> 4 * i & 7u) & 0xffu) << 8 * i;
  }
  return bytes;
}
inline uint32_t popcount(uint32_t x) {
  return uint32_t(__builtin_popcount(x));
}
inline int bit_length(uint32_t x) {
  return x ? 32 - __builtin_clz(x) : 0;
}
inline int bit_length(uint64_t x) {
  return x ? 64 - __builtin_clzll(x) : 0;
}

inline double fused(double a, double b, double c) {
  return __builtin_fma(a, b, c);
}
inline float error_function(float x) {
  return __builtin_erff(x);
}
inline double error_function(double x) {
  return __builtin_erf(x);
}

inline void relax() {
  emulator::wait_in_turn();
}
inline void trap() {
  emulator::stop("trap");
}

template <typename T>
T load(const T* p) {
  emulator::touch_global(p, sizeof(T), emulator::Global::load);
  return *p;
}
template <typename T>
void store(T* p, T value) {
  emulator::touch_global(p, sizeof(T), emulator::Global::store);
  *p = value;
}
template <typename T>
T load_fresh(const T* p) {
  emulator::perhaps_yield();
  return load(p);
}

template <typename Bits, uint32_t N>
struct Vector {
  Bits x[N];
};
template <uint32_t N, typename Bits>
Vector<Bits, N> load_vector(const Bits* p) {
  emulator::touch_vector(p, N, sizeof(Bits), emulator::Global::load);
  Vector<Bits, N> to;
  memcpy(&to, p, sizeof(to));
  return to;
}
template <uint32_t N, typename Bits>
Vector<Bits, N> load_vector_fresh(const Bits* p) {
  emulator::perhaps_yield();
  return load_vector<N>(p);
}
template <uint32_t N, typename Bits>
void store_vector(Bits* p, const Vector<Bits, N>& from) {
  emulator::touch_vector(p, N, sizeof(Bits), emulator::Global::store);
  memcpy(p, &from, sizeof(from));
}

inline uint32_t load_acquire(const uint32_t* p) {
  emulator::perhaps_yield();
  emulator::touch_global(p, sizeof(*p), emulator::Global::load_acquire);
  return *p;
}
inline void store_release(uint32_t* p, uint32_t value) {
  emulator::perhaps_yield();
  emulator::touch_global(p, sizeof(*p), emulator::Global::store_release);
  *p = value;
}
// An atomic: the old value; nothing comes between this access and the caller's store.
template <typename T>
T exclusive(T* p) {
  emulator::perhaps_yield();
  emulator::touch_global(p, sizeof(T), emulator::Global::atomic);
  return *p;
}
inline uint32_t add(uint32_t* p, uint32_t value) {
  const uint32_t old = exclusive(p);
  *p = old + value;
  return old;
}
inline void add(int64_t* p, int64_t value) {
  *p = exclusive(p) + value;
}
inline void flip(uint32_t* p, uint32_t bits) {
  *p = exclusive(p) ^ bits;
}
inline void raise(uint32_t* p, uint32_t value) {
  *p = std::max(exclusive(p), value);
}
inline void raise(uint64_t* p, uint64_t value) {
  *p = std::max(exclusive(p), value);
}

struct Shared {
  uint32_t first = 0;
  uint32_t get(uint32_t i) const {
    return *emulator::shared_word(first + i, emulator::Access::read);
  }
  void set(uint32_t i, uint32_t value) const {
    *emulator::shared_word(first + i, emulator::Access::write) = value;
  }
  uint32_t add(uint32_t i, uint32_t value) const {
    uint32_t* const word = emulator::shared_word(first + i, emulator::Access::atomic);
    const uint32_t old = *word;
    *word = old + value;
    return old;
  }
  uint32_t claim(uint32_t i, uint32_t count) const { return add(i, count); }
  Shared from(uint32_t i) const { return {first + i}; }
};
inline Shared shared_memory() {
  return {};
}

inline void copy_word_async(Shared to, const void* from, bool there) {
  emulator::start_copy(to.first, there ? from : nullptr);
}
inline void wait_for_copies(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::finish_copies(file, line);
}

using Stream = void*;

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), uint32_t blocks, uint32_t threads, uint32_t shared_bytes,
            Stream, const Args&... args) {
  static_assert((std::is_same_v<Params, Args> && ...), "an argument needs a conversion");
  emulator::run(blocks, threads, shared_bytes, [&] { kernel(args...); });
}

struct Room {
  uint32_t processors, per_processor, per_block, reserved_per_block;
};
inline Room room_of_device() {
  const emulator::Options& machine = emulator::options();
  return {machine.processors, machine.shared_bytes, machine.shared_bytes, 0};
}
template <typename... Params>
uint32_t blocks_per_processor(void (*)(Params...), uint32_t threads, uint32_t shared_bytes) {
  return emulator::blocks_per_processor(threads, shared_bytes);
}
template <typename... Params>
void require_kernel(void (*)(Params...), uint32_t) {
  emulator::require();
}
inline bool debugs() {
  return emulator::options().debugs;
}
template <typename Probe, typename Kernel>
auto once_per_device(Kernel kernel, const Probe& probe) {
  return probe(kernel);  // every test has its own machine
}

}  // namespace issp
